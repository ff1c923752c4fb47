"""Verbs that change the paths of a tree: rename, drop and insert."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from paramtree.core.arrays import join
from paramtree.core.errors import NameCollisionError, RuleError, first_few
from paramtree.core.pytrees import open_tree
from paramtree.core.rules import Patterns, compiled, hits, no_match, select_slots
from paramtree.core.structure import PARAM, Path, moved
from paramtree.core.tree import ParamTree, flatten, unflatten
from paramtree.verbs.assemble import Entry, take_apart
from paramtree.verbs.from_tree import from_tree

__all__ = ["drop", "editable", "insert", "rename", "rewriter"]

T = TypeVar("T")


def rename(tree: T, pairs: Sequence[tuple[Any, str]]) -> T:
    r"""Returns the tree with its paths rewritten, as ``re.sub`` rewrites text; all else stays.

    Args:
      tree: a parameter tree, or nested dicts.
      pairs: regular expressions and their replacements, applied one after another to every path, such
        as "encoder/layer0/weight". In a replacement ``\1`` is the first group, and "/" starts a level.

    Raises:
      NameCollisionError: two paths become one.
      RuleError: a pattern is found in no path, or a path would have an empty segment.
      TypeError: the tree is another container, whose keys cannot be renamed.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"layers_0": {"w": 1}, "layers_1": {"w": 2}})
      >>> pt.rename(params, [(r"layers_(\d+)", r"blocks/\1"), ("w$", "weight")])
      Parameter blocks_0_weight (1)
      Parameter blocks_1_weight (2)
    """
    source, back = editable(tree, "rename")
    draft = take_apart(source)
    rewrite = rewriter(pairs, ["/".join(entry.path) for entry in draft.entries], "rename")
    entries = []
    for entry in draft.entries:
        path = _path(rewrite("/".join(entry.path)), entry.path)
        stack = [
            (_position(rewrite, entry.path, path, position), size) for position, size in entry.stack
        ]
        entries.append(Entry(path, entry.label, tuple(stack)))
    return back(draft.assembled(entries))


def drop(tree: T, pattern: Patterns, *, kind: str | None = None) -> T:
    """Returns the tree without the names that match, and without the levels that this empties.

    Of a tied leaf only the names that match go; the leaf stays under the others.

    Args:
      tree: a parameter tree, or any other pytree, in which the leaves become None.
      pattern: a pattern or several.
      kind: "param" or "state" to drop only these.

    Raises:
      RuleError: a pattern matches nothing.

    Example:
      >>> import paramtree as pt
      >>> pt.drop(pt.from_tree({"body": {"w": 1}, "head": {"w": 2}}), "head/.*")
      Parameter body_w (1)
    """
    source = open_tree(tree)
    if source.pending is not None:
        source.pending.structural("drop", tree)
    chosen, rest = select_slots(source, pattern, kind, "drop")
    slots, structure = set(chosen.slots), source.structure
    listed = pattern if isinstance(pattern, list | tuple) else (pattern,)
    matched = [any(row) for row in zip(*(hits(source, one) for one in listed), strict=True)]
    entries = list(zip(structure.entries(), matched, strict=True))
    if source.containers:  # there a leaf has one place, whatever its names
        kept = [join(path) for (path, slot), hit in entries if slot in slots and not hit]
        if kept:
            raise RuleError(
                f"drop: {first_few(kept, ', ')} are names of tied leaves that would go: match all of "
                "their names, or drop from the parameter tree itself."
            )
        return source.part(rest.structure, rest.take)
    plain = unflatten(source.structure, source.leaves, source.place)
    gone = {path for (path, slot), hit in entries if hit and slot in slots}
    draft = take_apart(plain)
    edited = draft.assembled(entry for entry in draft.entries if entry.path not in gone)
    result: T = source.rebuild(*flatten(edited))
    return result


def insert(tree: T, values: Mapping[str, Any]) -> T:
    """Returns the tree with more leaves or levels, each at the end of its level.

    Args:
      tree: a parameter tree, or nested dicts.
      values: new paths to arrays, mappings or parameter trees, which keep their kinds and ties; missing
        levels are created.

    Raises:
      NameCollisionError: there is already something at a path, or a leaf on the way to it.
      RuleError: a path is empty or has an empty segment.
      TypeError: the tree is another container, whose keys are fixed.

    Example:
      >>> import paramtree as pt
      >>> pt.insert(pt.from_tree({"body": {"w": 1}}), {"body/b": 2, "head": {"w": 3}})
      Parameter body_w (1)
      Parameter body_b (2)
      Parameter head_w (3)
    """
    source, back = editable(tree, "insert")
    draft = take_apart(source)
    if not isinstance(values, Mapping):
        raise RuleError(f"insert takes a mapping of paths to arrays or trees, but found {values!r}.")
    known = {path[:i] for path, _, _ in draft.entries for i in range(1, len(path) + 1)}
    entries = list(draft.entries)
    for text, value in values.items():
        path = _path(text, ())
        if path in known:
            raise NameCollisionError(
                f"insert: `{join(path)}` is already in the tree. pt.replace gives it another value, "
                "and pt.drop takes it out."
            )
        if isinstance(value, Mapping | ParamTree):
            below = take_apart(from_tree(value))
            entries.append(Entry(path, None))
            for entry in below.entries:
                label = None if entry.label is None else (text, entry.label)
                entries.append(Entry(path + entry.path, label, moved(entry.stack, len(path))))
            draft.kinds.update({(text, label): kind for label, kind in below.kinds.items()})
            draft.leaves.update({(text, label): leaf for label, leaf in below.leaves.items()})
        else:
            entries.append(Entry(path, (text,)))
            draft.kinds[text,], draft.leaves[text,] = PARAM, value
    return back(draft.assembled(entries))


def rewriter(pairs: Any, texts: Sequence[str], verb: str) -> Callable[[str], Any]:
    """Returns a function that rewrites text by pairs of a pattern and its replacement.

    A replacement of None gives None.

    Raises:
      RuleError: a pattern is not valid or is found in no text, or a replacement does not fit it.
      TypeError: they are not pairs.
    """
    try:
        table = [(compiled(pattern), to) for pattern, to in pairs]
        if any(not isinstance(to, str | None) for _, to in table):
            raise TypeError
    except (TypeError, ValueError) as error:
        if isinstance(error, RuleError):
            raise
        raise TypeError(
            f"{verb} takes a list of pairs (pattern, replacement), as in [('gamma', 'weight')], not "
            f"{pairs!r}."
        ) from None
    unused = dict(enumerate(pattern for pattern, _ in table))

    def rewrite(text: str) -> str | None:
        for i, (pattern, to) in enumerate(table):
            if pattern.search(text):
                unused.pop(i, None)
                if to is None:
                    return None
                try:
                    text = pattern.sub(to, text)
                except (re.error, IndexError) as error:
                    raise RuleError(
                        f"{verb}: {to!r} cannot replace {pattern.pattern!r}: {error}."
                    ) from None
        return text

    for text in texts:
        rewrite(text)
    if unused:
        problems = first_few([*unused.values()], show=lambda pattern: no_match(pattern, texts))
        raise RuleError(
            f"{verb}: {problems}. Each pattern is applied to the result of the patterns before it."
        )
    return rewrite


def _path(text: Any, old: Path) -> Path:
    path = tuple(text.split("/")) if isinstance(text, str) else ("",)
    if not all(path):
        subject = f"`{'/'.join(old)}` becomes {text!r}, which" if old else f"{text!r}"
        raise RuleError(f"{subject} is not a path: names joined with '/', none of them empty.")
    return path


def _position(rewrite: Callable[[str], Any], old: Path, new: Path, position: int) -> int:
    """Returns the depth in a rewritten path of a level that is a stack.

    Raises:
      RuleError: the level has no path of its own there.
    """
    level = "/".join(old[:position])
    for text in (f"{level}/" if level else "", level):
        above = tuple(segment for segment in rewrite(text).split("/") if segment)
        if new[: len(above)] == above and len(above) < len(new):
            return len(above)
    raise RuleError(
        f"rename: `{'/'.join(old)}` becomes `{'/'.join(new)}`, in which the level `{level}`, a stack "
        "of copies, is not recognised: pt.unstack it first, or rename the level by itself."
    )


def editable(tree: Any, verb: str) -> tuple[ParamTree, Callable[[ParamTree], Any]]:
    """Returns the tree to edit, and a function that turns the result into the same container.

    Raises:
      TypeError: the tree is neither a parameter tree nor nested dicts.
    """
    if type(tree) is ParamTree:
        return tree, lambda edited: edited
    source = open_tree(tree, counts=None)
    if hasattr(type(tree), "__open__"):
        if source.pending is not None:
            source.pending.structural(verb, tree)
        plain = unflatten(source.structure, source.leaves, source.place)
        rebuild = (verb == "rename" and source.renamed) or source.rebuild
        return plain, lambda edited: rebuild(*flatten(edited))
    if not _is_nested(tree):
        raise TypeError(
            f"{verb} takes a parameter tree, or nested dicts whose keys are names without '/', as "
            f"paths in other containers are fixed, but found {type(tree).__name__}: {verb} "
            "pt.from_tree(tree)."
        )
    return from_tree(tree), ParamTree.to_dict


def _is_nested(tree: Any) -> bool:
    """Whether a tree is made of dicts with names as keys, and of nothing else."""
    if type(tree) is not dict:
        return False
    names = all(isinstance(key, str) and key and "/" not in key for key in tree)
    return names and all(
        _is_nested(value) or jax.tree_util.all_leaves([value]) for value in tree.values()
    )
