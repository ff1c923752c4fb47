"""Verbs that divide a tree by name: what is trained, frozen, decayed, cast.

They are all thin over the one resolver. On a parameter tree a part keeps the whole structure and has
holes; on any other pytree it is the same container with None where a leaf is left out. A mask or a
table of labels is made once for a structure and its rules, and is the same object ever after.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from paramtree.core.arrays import dtype_of, join
from paramtree.core.errors import MismatchError, RuleError
from paramtree.core.names import (
    UNSET,
    Named,
    Pattern,
    Rules,
    compiled,
    match,
    named,
    names,
    no_match,
    resolve,
)
from paramtree.core.structure import Picker, Structure, picker
from paramtree.core.tree import ParamTree, _rebuild, whole
from paramtree.verbs.compare import bare, differences, lines
from paramtree.verbs.selection import collect

__all__ = ["cast", "labels", "mask", "merge", "partition", "select"]

T = TypeVar("T")
Patterns = Pattern | Sequence[Pattern] | None


def select(tree: T, pattern: Patterns = None, *, kind: str | None = None) -> T:
    """Returns the tree with only the leaves whose names match; the others are left out.

    A tied leaf is there if any of its names matches.

    Args:
      tree: a parameter tree or any other pytree.
      pattern: a regular expression for whole names, or several; None takes all.
      kind: "param" or "state" to take only these.

    Returns:
      The same structure with holes, or the same container with None in place of what is left out.

    Raises:
      RuleError: a pattern matches nothing.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"body": {"w": 1.0}, "head": {"w": 2.0}})
      >>> pt.select(params, "head_.*")
      Parameter head_w (2.0)
      (1 hole)
    """
    source = named(tree)
    taken, _ = choose(source.tree._structure, pattern, kind, "select")
    return part(source, taken)


def partition(tree: T, pattern: Patterns = None, *, kind: str | None = None) -> tuple[T, T]:
    """Returns the leaves whose names match and all the others, as two parts for ``merge``.

    Args:
      tree: a parameter tree or any other pytree.
      pattern: a regular expression for whole names, or several; None takes all.
      kind: "param" or "state" to take only these.

    Raises:
      RuleError: a pattern matches nothing.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"body": {"w": 1.0}, "head": {"w": 2.0}})
      >>> trainable, frozen = pt.partition(params, "head_.*")
      >>> list(pt.collect(trainable)), list(pt.collect(frozen))
      (['head_w'], ['body_w'])
      >>> jax.tree.structure(pt.merge(trainable, frozen)) == jax.tree.structure(params)
      True
    """
    source = named(tree)
    taken, left = choose(source.tree._structure, pattern, kind, "partition")
    return part(source, taken), part(source, left, rest=True)


def merge(*trees: T) -> T:
    """Returns one tree from parts of it: what is left out in one comes from the others.

    Args:
      *trees: parts of one tree, from ``partition`` or ``select``, in any order.

    Returns:
      The tree with the identical structure that the parts were taken from; a leaf that is in none
      of the parts is still left out.

    Raises:
      MismatchError: the parts are not of one tree, or have a leaf in common; all are listed.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"a": 1.0, "b": 2.0})
      >>> pt.merge(pt.select(params, "b"), pt.select(params, "a"))
      Parameter a (1.0)
      Parameter b (2.0)
    """
    if not trees:
        raise TypeError("merge takes the parts of a tree, as in pt.merge(trainable, frozen).")
    if not all(isinstance(tree, ParamTree) for tree in trees):
        return _merge_others(trees)
    parts: list[ParamTree] = [whole(tree) for tree in trees]  # type: ignore[arg-type]  # checked above
    structure = parts[0]._structure.whole
    if any(part._structure.whole is not structure for part in parts):
        raise _unlike(parts)
    key = ("merge", tuple(part._structure.kept for part in parts))
    if key not in structure.cache:
        kept = [slot for part in parts for slot in part._structure.kept]
        order = sorted(range(len(kept)), key=kept.__getitem__)
        ordered = [kept[i] for i in order]
        doubled = [a for a, b in itertools.pairwise(ordered) if a == b]
        if doubled:
            shown = ", ".join(join(structure.canonical[slot]) for slot in doubled)
            raise MismatchError(f"merge: more than one part has {shown}. Take each leaf from one part.")
        structure.cache[key] = structure.keep(ordered), picker(order)
    merged, take = structure.cache[key]
    leaves = [leaf for part in parts for leaf in part._leaves]
    result: Any = _rebuild(merged, take(leaves), parts[0]._place)
    return result


def mask(
    tree: T, rules: Patterns | Rules = None, *, kind: str | None = None, default: Any = UNSET
) -> T:
    """Returns the tree with True for the leaves that are meant and False for the others.

    Args:
      tree: a parameter tree or any other pytree.
      rules: a pattern, or several, whose matches are True and all else False; or a rule table of
        True and False.
      kind: "param" or "state": leaves of another kind are False.
      default: the value of leaves that no pattern of a table matches.

    Returns:
      A tree of the same structure, or the same container; what is no array there is False.

    Raises:
      RuleError: the rules do not fit the tree, or a value is neither True nor False.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"dense0": {"weight": jnp.ones(2), "bias": jnp.ones(2)}})
      >>> pt.mask(params, ".*weight").to_dict()
      {'dense0': {'weight': True, 'bias': False}}
    """
    if not isinstance(rules, Mapping):
        everything = rules is None
        rules, default = dict.fromkeys(_patterns(rules), True), False
        if everything and not named(tree).tree._structure.kinds:
            rules = {}
    _check_values("mask", rules, default, lambda value: isinstance(value, bool), "True or False")
    return _table("mask", tree, rules, default, kind, False)


def labels(tree: T, rules: Rules, *, default: Any = UNSET) -> T:
    """Returns the tree with a label for every leaf, as ``optax.multi_transform`` takes it.

    Args:
      tree: a parameter tree or any other pytree.
      rules: a rule table of labels, strings or anything hashable.
      default: the label of leaves that no pattern matches, and of what is no array.

    Raises:
      RuleError: the rules do not fit the tree, or a label is not hashable.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"body": {"w": jnp.ones(2)}, "head": {"w": jnp.ones(2)}})
      >>> pt.labels(params, {"head_.*": "fast", ".*": "slow"}).to_dict()
      {'body': {'w': 'slow'}, 'head': {'w': 'fast'}}
    """
    _check_values("labels", rules, default, _hashable, "a hashable label, such as a string")
    return _table("labels", tree, rules, default, None, None if default is UNSET else default)


def cast(tree: T, rules: Any) -> T:
    """Returns the tree with its floating-point leaves in other dtypes, by name.

    Whole numbers, booleans and keys stay as they are, as do leaves that no pattern matches.

    Args:
      tree: a parameter tree of arrays or shapes, or any other pytree.
      rules: one floating dtype for all, or a rule table of them, where None leaves a leaf as it is.

    Raises:
      RuleError: a pattern matches nothing, or a value is no floating dtype.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"norm": {"gamma": jnp.ones(2)}, "w": jnp.ones(2)})
      >>> pt.cast(params, {"norm.*": None, ".*": jnp.bfloat16})
      Parameter norm_gamma (shape=(2,), dtype=float32)
      Parameter w (shape=(2,), dtype=bfloat16)
    """
    source, restore, _ = named(tree)
    structure = source._structure
    if not isinstance(rules, Mapping):
        rules = {".*": rules} if structure.kinds else {}
    _check_values(
        "cast", rules, None, _floating_or_none, "a floating dtype such as jnp.bfloat16, or None"
    )
    chosen = resolve(structure, rules, default=None, what="the dtype rules")
    return restore(tuple(map(_in_dtype, source._leaves, chosen)))


def _in_dtype(leaf: Any, dtype: Any) -> Any:
    have = dtype_of(leaf)
    if dtype is None or have is None or not jnp.issubdtype(have, jnp.floating) or have == dtype:
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, dtype)
    return leaf.astype(dtype)


def _floating_or_none(value: Any) -> bool:
    try:
        return value is None or bool(jnp.issubdtype(jnp.dtype(value), jnp.floating))
    except TypeError:
        return False


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _check_values(verb: str, rules: Any, default: Any, good: Any, expected: str) -> None:
    """Raises RuleError for the values of a table that are not what the verb takes; it lists all."""
    if not isinstance(rules, Mapping):
        return  # resolve says what a table is
    wrong = [f"{pattern!r} gives {value!r}" for pattern, value in rules.items() if not good(value)]
    if default is not UNSET and not good(default):
        wrong.append(f"the default is {default!r}")
    if wrong:
        raise RuleError(f"{verb}: {'; '.join(wrong)}. Expected {expected}.")


def _patterns(pattern: Patterns) -> Sequence[Pattern]:
    if pattern is None:
        return (".*",)
    patterns = pattern if isinstance(pattern, list | tuple) else (pattern,)
    for one in patterns:
        if type(one).__hash__ is None:  # a dict, say, which no cache can look up
            compiled(one)
    return patterns


class Choice:
    """Some slots of a structure, and what takes them out of a tree of it, made once."""

    def __init__(self, structure: Structure, slots: tuple[int, ...]) -> None:
        self.slots = slots
        self._structure = structure
        self._part: tuple[Structure, Picker] | None = None

    def part(self) -> tuple[Structure, Picker]:
        """Returns the structure with holes for all other slots, and what takes its leaves."""
        if self._part is None:
            self._part = self._structure.keep(self.slots), picker(self.slots)
        return self._part


def choose(
    structure: Structure, pattern: Patterns, kind: str | None, verb: str
) -> tuple[Choice, Choice]:
    """Returns the slots that patterns and a kind choose, and all the others."""
    patterns = None if pattern is None else tuple(_patterns(pattern))
    key = ("chosen", patterns, kind)
    if key not in structure.cache:
        taken: set[int] = set()
        problems = []
        for one in (None,) if patterns is None else patterns:
            hits = match(structure, one, kind)
            found = {slot for (_, slot), hit in zip(structure.entries(), hits, strict=True) if hit}
            if one is not None and not found:
                other = kind is not None and any(match(structure, one))
                text = f"{one!r} matches no name of kind {kind}" if other else ""
                problems.append(text or no_match(one, names(structure)))
            taken |= found
        if problems:
            raise RuleError(f"{verb}: {'; '.join(problems)}.")
        structure.cache[key] = divide(structure, taken)
    chosen: tuple[Choice, Choice] = structure.cache[key]
    return chosen


def taken(
    verb: str, tree: Any, pattern: Pattern | None, *, sep: str = "_", kind: str | None = None
) -> ParamTree:
    """Returns what ``collect`` does, for verbs in which a pattern that matches nothing is an error."""
    choose(named(tree).tree._structure, pattern, kind, verb)
    return collect(tree, pattern, sep=sep, kind=kind)


def divide(structure: Structure, taken: set[int]) -> tuple[Choice, Choice]:
    """Returns some slots, and all the others."""
    slots = range(len(structure.kinds))
    return (
        Choice(structure, tuple(slot for slot in slots if slot in taken)),
        Choice(structure, tuple(slot for slot in slots if slot not in taken)),
    )


def part(source: Named, choice: Choice, rest: bool = False) -> Any:
    """Returns a tree with some of its slots; of other pytrees the rest has what is no array as well."""
    tree, restore, foreign = source
    if foreign:
        kept = set(choice.slots)
        leaves = [leaf if slot in kept else None for slot, leaf in enumerate(tree._leaves)]
        return restore(leaves) if rest else restore(leaves, None)
    structure, take = choice.part()
    if structure is tree._structure:
        return tree
    return _rebuild(structure, take(tree._leaves), tree._place)


def _unlike(parts: Sequence[Any]) -> MismatchError:
    """Returns the error for parts that are not of one tree; it lists all in which they differ."""
    first, *others = map(bare, parts)
    shown = []
    for i, other in enumerate(others, 2):
        if found := differences(first, other):
            shown += [f"part {i} is not like the first:", *lines(found)]
    return MismatchError(
        "\n".join(["merge: the parts differ in structure.", *shown])
        + "\nMerge what partition or select made of one tree."
    )


def _merge_others(trees: Sequence[Any]) -> Any:
    """Merges parts of another pytree: the same container, None where a leaf is left out."""
    flat = [
        jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: leaf is None) for tree in trees
    ]
    treedef: Any = flat[0][1]
    if any(other != treedef for _, other in flat):
        raise _unlike(trees)
    leaves, doubled = [], []
    for entries in zip(*(entries for entries, _ in flat), strict=True):
        there = [leaf for _, leaf in entries if leaf is not None]
        if len(there) > 1:
            doubled.append(jax.tree_util.keystr(entries[0][0]))
        leaves.append(there[0] if there else None)
    if doubled:
        raise MismatchError(
            f"merge: more than one part has {', '.join(doubled)}. Take each leaf from one part."
        )
    return jax.tree_util.tree_unflatten(treedef, leaves)


def _table(verb: str, tree: Any, rules: Any, default: Any, kind: str | None, other: Any) -> Any:
    """Returns a tree of the values that rules give, made once for a structure and the same rules."""
    source, restore, foreign = named(tree)
    structure = source._structure
    key: Any = None
    if isinstance(rules, Mapping):
        values = tuple(rules.items())
        types = tuple(type(value) for value in (*rules.values(), default))  # True is not 1
        key = (verb, values, types, default, kind)
        if not foreign and key in structure.cache:
            return structure.cache[key]
    chosen = resolve(structure, rules, default=default, what=f"the rules of {verb}")
    if kind is not None:
        wanted = set(choose(structure, None, kind, verb)[0].slots)
        chosen = tuple(value if slot in wanted else other for slot, value in enumerate(chosen))
    if foreign:
        return restore(chosen, other)
    made = structure.cache[key] = _rebuild(structure, chosen)
    return made
