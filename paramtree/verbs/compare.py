"""Differences between two trees in everything but their values, by name.

The comparison in jax stops at the first node that differs and prints both trees. This one reads any two
pytrees path by path, and returns the differences as plain records.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax

from paramtree.core.arrays import clip, describe, join, printable, shape_of
from paramtree.core.errors import MismatchError, close_names, first_few
from paramtree.core.pytrees import Container, open_tree
from paramtree.core.structure import EMPTY, Path
from paramtree.core.tree import ParamTree, flatten, unflatten
from paramtree.verbs.alike import Pair, alike, alike_pairs, dtype_name

__all__ = ["Difference", "Pair", "bare", "check_match", "compare", "differences", "lines", "sides"]

LEVEL, LEFT_OUT = "a level without children", "a hole"

# What can differ, in the order of a report.
WHATS = ("missing", "extra", "nesting", "level", "container", "static", "order", "hole", "tie", "kind",
         "stack", "shape", "dtype")  # fmt: skip

_MOST_COMPARED = 5_000  # pairs of names in a search for close ones: a tenth of a second
_MOST_TEXT = 200  # characters of one name or form in a message


class Difference(NamedTuple):
    """One difference between two trees, in plain values.

    Attributes:
      name: the name of the leaf or level, from the top of the trees; empty for the top itself.
      what: what differs, one of ``WHATS``.
      expected: what the first tree has; None for nothing.
      found: what the second tree has; None for nothing.
      close: for a missing name, similar names that only the second tree has.
    """

    name: str
    what: str
    expected: Any
    found: Any
    close: tuple[str, ...] = ()


def check_match(a: Any, b: Any) -> None:
    """Raises if two trees differ in structure, shapes or dtypes; the error lists all differences.

    Trees that pass can be given to ``jax.tree.map`` together, or be carried by a scan: they have the
    same containers, names, order, ties, kinds, stacks and holes, and the same shapes and dtypes. Values
    are not compared, so the call also works under tracing.

    Args:
      a: the expected tree: a parameter tree or any other pytree, of arrays or shapes.
      b: the tree to check.

    Raises:
      MismatchError: they differ. Names start at the trees, even if these are sub-trees.
      NameCollisionError: they differ, and two leaves of one tree have one path, as those of
        {"a/b": x, "a": {"b": y}}.

    Example:
      >>> import paramtree as pt, jax.numpy as jnp
      >>> params = pt.from_tree({"dense0": {"weight": jnp.ones((2, 3)), "bias": jnp.ones(2)}})
      >>> other = pt.from_tree({"dense0": {"weight": jnp.ones((2, 4)), "bais": jnp.ones(2)}})
      >>> pt.check_match(params, params)
      >>> try:
      ...     pt.check_match(params, other)
      ... except pt.MismatchError as error:
      ...     print(error)
      check_match: b is not like a:
        `dense0_bias` is missing, expected shape=(2,), dtype=float32; the closest name is `dense0_bais`.
        `dense0_bais` is extra, found shape=(2,), dtype=float32.
        `dense0_weight`: expected shape (2, 3), found (2, 4).
      To match a part, give pt.collect(a, pattern) and pt.collect(b, pattern).
      Shapes follow from the model and from the shape of the input that pt.init was given.
    """
    if mismatches := differences(a, b):
        shown = "".join(f"\n{line}" for line in (*lines(mismatches), *_advice(mismatches, a, b)))
        raise MismatchError(f"check_match: b is not like a:{shown}")


def differences(a: Any, b: Any) -> list[Difference]:
    """Returns all differences but those of values; none if the trees are equal to jax."""
    treedef: Any  # mypy does not know its type
    (first, treedef), (second, other) = (jax.tree.flatten(tree) for tree in (a, b))
    if treedef == other and all(map(alike, first, second)):
        return []
    return compare(a, b)[0]


def compare(a: Any, b: Any) -> tuple[list[Difference], list[Pair]]:
    """Returns all differences but those of values, and the leaves that both trees have, each once.

    Raises:
      NameCollisionError: two leaves of one tree have one path.
    """
    if (pairs := alike_pairs(a, b)) is not None:
        return [], pairs
    first, second = _read(a), _read(b)
    spell = _speller(first.entries, second.entries)
    differences, matched = _names(first, second, spell)
    containers = _containers(first, second, spell)
    differences += containers or _order(first, second, spell)  # the order of a dict means nothing
    differences += _ties(first, second, spell)
    seen = set()
    pairs = []
    for path, other_path in matched:
        entry, other = first.entries[path], second.entries[other_path]
        if (entry.owner, other.owner) not in seen:
            seen.add((entry.owner, other.owner))
            differences += _of_leaf(spell(path), entry, other)
            if not entry.sign and not other.sign:
                pairs.append(Pair(spell(path), entry.leaf, other.leaf))
    form: Any = jax.tree.structure(a)
    other_form = jax.tree.structure(b)
    if not differences and form != other_form:
        differences.append(Difference("", "static", str(form), str(other_form)))
    return sorted(differences, key=lambda difference: WHATS.index(difference.what)), pairs


def bare(tree: Any) -> Any:
    """Returns a tree with None for its leaves, its holes filled."""
    if isinstance(tree, ParamTree):
        full = flatten(tree)[0].full
        return unflatten(full, (None,) * len(full.kinds))
    return jax.tree.map(
        lambda leaf: bare(leaf) if isinstance(leaf, ParamTree) else None,
        tree,
        is_leaf=lambda value: isinstance(value, ParamTree),
    )


# Messages


def lines(differences: Iterable[Difference]) -> list[str]:
    """Returns differences as lines of a message, the first twenty and a count."""
    every = list(differences)
    return first_few(every, "\n", lambda one: f"  {printable(_line(one))}").split("\n") if every else []


def _line(difference: Difference) -> str:
    name, what, expected, found, close = difference
    subject = f"`{_clip(name)}`" if name else "the tree"
    want, have = sides(difference)
    match what:
        case "missing":
            expectation = "" if expected == LEFT_OUT else f", expected {want}"
            near = " or ".join(f"`{_clip(text)}`" for text in close)
            hint = f"; the closest name is {near}" if near else ""
            return f"{subject} is missing{expectation}{hint}."
        case "extra":
            return f"{subject} is extra{'' if found == LEFT_OUT else f', found {have}'}."
        case "order":
            return f"the order differs: expected {want}, found {have} in its place."
        case "shape" | "dtype" | "kind" | "nesting":
            return f"{subject}: expected {what} {want}, found {have}."
    return f"{subject}: expected {want}, found {have}."


def sides(difference: Difference) -> tuple[str, str]:
    """Returns the text about each of the two trees."""

    def say(value: Any) -> str:
        if difference.what == "tie":
            return "not tied" if value is None else f"tied to `{_clip(value)}`"
        if difference.what == "order":
            return f"`{_clip(value)}`"
        if difference.what == "stack":
            return f"a stack of {value}" if value else "not stacked"
        return "nothing" if value is None else _clip(str(value))

    return say(difference.expected), say(difference.found)


def _clip(text: str) -> str:
    return clip(text, _MOST_TEXT)


_ADVICE = {
    "missing": "To match a part, give pt.collect(a, pattern) and pt.collect(b, pattern).",
    "extra": "To match a part, give pt.collect(a, pattern) and pt.collect(b, pattern).",
    "hole": "pt.merge fills the holes of a part with the leaves of the other part.",
    "kind": "Kinds are those that the model declares with p.param and p.state.",
    "stack": "A stack is one leaf for all copies of a layer: pt.stack makes one of copies with names.",
    "shape": "Shapes follow from the model and from the shape of the input that pt.init was given.",
}


def _advice(differences: list[Difference], a: Any, b: Any) -> list[str]:
    """Returns advice on some differences."""
    whats = {difference.what for difference in differences}
    advice = dict.fromkeys(text for what, text in _ADVICE.items() if what in whats)
    if any(d.what == "dtype" and _floats(d.expected, d.found) for d in differences):
        advice["pt.cast(b, dtype) casts floating-point leaves."] = None
    if whats <= {"nesting", "container", "order"}:
        advice["pt.replace(a, pt.collect(b)) puts the values of b into the form of a, by name."] = None
    if "tie" in whats and whats <= {"tie", "order", "level"} and _are_trees(a, b):
        ties = [difference for difference in differences if difference.what == "tie"]
        loose = [re.escape(difference.name) for difference in ties if difference.found is not None]
        if loose and not any("/" in name for name in loose):  # patterns match names, not paths
            advice[f"pt.untie(b, {'|'.join(loose)!r}) unties what is not tied in a."] = None
        if any(difference.expected is not None for difference in ties):
            advice['pt.tie(b, pt.ties(a, sep="/")) ties b as a is tied.'] = None
    return list(advice)


def _floats(*dtypes: str) -> bool:
    return all(re.match(r"b?float\d", dtype) for dtype in dtypes)


def _are_trees(*trees: Any) -> bool:
    return all(isinstance(tree, ParamTree) for tree in trees)


# Two trees, path by path


class _Entry(NamedTuple):
    """What a tree has at a path."""

    leaf: Any
    sign: str  # what is there instead of a leaf: a hole, or a level without children
    kind: str | None  # None where leaves have no kinds
    sizes: tuple[int, ...]  # of its stack
    owner: Path  # the canonical path of the leaf

    def __str__(self) -> str:
        return self.sign or describe(self.leaf)


class _Contents(NamedTuple):
    entries: dict[Path, _Entry]
    containers: Mapping[Path, Container]


_Speller = Callable[[Path], str]


def _read(tree: Any) -> _Contents:
    """Returns what a tree has at each path; None in a container is a hole."""
    source = open_tree(tree, counts=None)
    structure, full = source.structure, source.structure.full
    in_trees = isinstance(tree, ParamTree)
    stacks = full.stacks or ((),) * len(full.paths)
    entries = {}
    for path, slot, present, stack in zip(full.paths, full.slots, structure.slots, stacks, strict=True):
        if slot == EMPTY:
            entries[path] = _Entry(None, LEVEL, None, (), path)
            continue
        leaf = source.leaves[present] if present >= 0 else None
        kind = source.kinds[present] if present >= 0 else full.kinds[slot] if in_trees else None
        sizes = tuple(size for _, size in stack)
        entries[path] = _Entry(
            leaf, LEFT_OUT if leaf is None else "", kind, sizes, full.canonical[slot]
        )
    return _Contents(entries, source.containers or {(): Container(type(tree), (), None)})


def _speller(*trees: Mapping[Path, Any]) -> _Speller:
    """Returns a function that spells a path as its name, or as a path if two paths share the name."""
    doubled = {
        name for paths in trees for name, count in Counter(map(join, paths)).items() if count > 1
    }
    return lambda path: "/".join(path) if (name := join(path)) in doubled else name


def _names(
    first: _Contents, second: _Contents, spell: _Speller
) -> tuple[list[Difference], list[tuple[Path, Path]]]:
    """Returns what only one tree has, and the pairs of paths that are equal or share a name."""
    missing = {path: entry for path, entry in first.entries.items() if path not in second.entries}
    extra = {path: entry for path, entry in second.entries.items() if path not in first.entries}
    matched = [(path, path) for path in first.entries if path in second.entries]
    differences = [Difference(name, "level", LEVEL, None) for name in _levels(missing, second, spell)]
    differences += [Difference(name, "level", None, LEVEL) for name in _levels(extra, first, spell)]
    missing, extra = (
        {path: entry for path, entry in only.items() if entry.sign is not LEVEL}
        for only in (missing, extra)
    )
    by_name = {spell(path): path for path in extra}
    for path in list(missing):
        if other := by_name.get(spell(path)):
            matched.append((path, other))
            differences.append(Difference(spell(path), "nesting", "/".join(path), "/".join(other)))
            del missing[path], extra[other]
    names = [spell(path) for path in extra]
    searches = max(1, _MOST_COMPARED // (len(names) + 1))
    for i, (path, entry) in enumerate(missing.items()):
        close = close_names(spell(path), names) if i < searches else ()
        differences.append(Difference(spell(path), "missing", str(entry), None, tuple(close)))
    differences += [Difference(spell(path), "extra", None, str(entry)) for path, entry in extra.items()]
    return differences, matched


def _levels(only: Mapping[Path, _Entry], other: _Contents, spell: _Speller) -> list[str]:
    """Returns the levels without leaves that the other tree does not have at all."""
    empty = [path for path, entry in only.items() if entry.sign is LEVEL]
    depths = {len(path) for path in empty}
    levels = {path[:depth] for path in other.entries for depth in depths if len(path) > depth}
    return [spell(path) for path in empty if path not in levels]


def _containers(first: _Contents, second: _Contents, spell: _Speller) -> list[Difference]:
    """Returns the containers that differ in type or in static data."""
    differences = []
    for path, container in first.containers.items():
        other = second.containers.get(path)
        if other is None:
            continue
        if container.type is not other.type:
            types = (container.type, other.type)
            name, other_name = (cls.__qualname__ for cls in types)
            if name == other_name:
                name, other_name = (f"{cls.__module__}.{cls.__qualname__}" for cls in types)
            differences.append(Difference(spell(path), "container", name, other_name))
        elif container.form != other.form and container.keys == other.keys:
            differences.append(Difference(spell(path), "static", str(container.form), str(other.form)))
    return differences


def _order(first: _Contents, second: _Contents, spell: _Speller) -> list[Difference]:
    """Returns the first difference in the order of the names that both trees have."""
    ours = (path for path in first.entries if path in second.entries)
    theirs = (path for path in second.entries if path in first.entries)
    for path, other in zip(ours, theirs, strict=True):
        if path != other:
            return [Difference(spell(path), "order", spell(path), spell(other))]
    return []


def _ties(first: _Contents, second: _Contents, spell: _Speller) -> list[Difference]:
    """Returns the names that are tied to different names in the two trees."""
    common = [path for path in first.entries if path in second.entries]
    owners = [[tree.entries[path].owner for path in common] for tree in (first, second)]
    # The canonical name of a leaf here is the first that both trees have, in the order of the first.
    firsts: list[dict[Path, Path]] = [{}, {}]
    for path, *pair in zip(common, *owners, strict=True):
        for known, owner in zip(firsts, pair, strict=True):
            known.setdefault(owner, path)
    differences = []
    for path, *pair in zip(common, *owners, strict=True):
        end, other = (known[owner] for known, owner in zip(firsts, pair, strict=True))
        if end != other:
            source, other_source = (None if p == path else spell(p) for p in (end, other))
            differences.append(Difference(spell(path), "tie", source, other_source))
    return differences


def _of_leaf(name: str, entry: _Entry, other: _Entry) -> list[Difference]:
    """Returns how two entries of one name differ."""
    if LEVEL in (entry.sign, other.sign):
        same = entry.sign == other.sign
        return [] if same else [Difference(name, "level", str(entry), str(other))]
    differences = []
    if None not in (entry.kind, other.kind):
        if entry.kind != other.kind:
            differences.append(Difference(name, "kind", entry.kind, other.kind))
        if entry.sizes != other.sizes:
            differences.append(Difference(name, "stack", entry.sizes or None, other.sizes or None))
    if entry.sign or other.sign:
        hole = Difference(name, "hole", entry.sign or "a leaf", other.sign or "a leaf")
        return differences if entry.sign == other.sign else [*differences, hole]
    shape, other_shape = shape_of(entry.leaf), shape_of(other.leaf)
    if None not in (shape, other_shape) and shape != other_shape:
        differences.append(Difference(name, "shape", shape, other_shape))
    dtype, other_dtype = (dtype_name(x.leaf) or type(x.leaf).__name__ for x in (entry, other))
    if dtype != other_dtype and not shape is other_shape is None:
        differences.append(Difference(name, "dtype", dtype, other_dtype))
    return differences
