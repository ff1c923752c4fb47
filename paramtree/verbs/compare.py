"""Whether two trees are alike in all but their values, and if not, in what: every difference by name.

jax asks the same when it is given two trees, and stops at the first node at which they differ,
with a dump of both. Here the contents of each are put down path by path, which can be done whatever the
trees are made of, and what differs is a list of plain records.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax

from paramtree.core.arrays import clip, dtype_of, join, printable, shape_of
from paramtree.core.errors import MismatchError, close_names
from paramtree.core.structure import Path
from paramtree.core.tree import ParamTree, _rebuild, whole
from paramtree.verbs.contents import LEFT_OUT, LEVEL, Contents, Entry

__all__ = ["Difference", "Pair", "bare", "check_match", "compare", "differences", "lines", "sides"]

# What can differ, in the order in which it is told.
WHATS = ("missing", "extra", "nesting", "level", "container", "static", "order", "hole", "tie", "kind",
         "shape", "dtype")  # fmt: skip

_MOST_COMPARED = 5_000  # pairs of names in search of close ones: a tenth of a second
_MOST_TEXT = 200  # characters of one name or form in a message


class Difference(NamedTuple):
    """One difference between two trees, in plain values.

    Attributes:
      name: the name of the leaf or level, from the top of the trees; empty for the top itself.
      what: what differs, one of ``WHATS``.
      expected: what is there in the first tree; None for nothing.
      found: what is there in the second tree; None for nothing.
      close: for what is missing, the names that only the second tree has and that look like it.
    """

    name: str
    what: str
    expected: Any
    found: Any
    close: tuple[str, ...] = ()


class Pair(NamedTuple):
    """A leaf of the first tree, and the one of the second that has its name."""

    name: str
    first: Any
    second: Any


def check_match(a: Any, b: Any) -> None:
    """Raises if two trees differ in structure, shapes or dtypes; the error lists all that differs.

    What passes can be given to ``jax.tree.map`` together, or be carried by a scan: containers,
    names and their order, ties, kinds and holes are the same, and so are shapes and dtypes.
    Values are not looked at, so it may be called while jax is tracing.

    Args:
      a: what is expected: a parameter tree or any other pytree, of arrays or shapes.
      b: what is to be like it.

    Raises:
      MismatchError: they differ. Names start at the trees, also where these are sub-trees.
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
    if found := differences(a, b):
        shown = "".join(f"\n{line}" for line in (*lines(found), *_advice(found, a, b)))
        raise MismatchError(f"check_match: b is not like a:{shown}")


def differences(a: Any, b: Any) -> list[Difference]:
    """Returns all in which two trees differ but the values; empty if jax takes one for the other."""
    one: Any  # mypy knows nothing of a treedef
    (first, one), (second, other) = (jax.tree.flatten(tree) for tree in (a, b))
    if one == other and all(map(_alike, first, second)):
        return []
    return compare(a, b)[0]


def compare(a: Any, b: Any) -> tuple[list[Difference], list[Pair]]:
    """Returns all in which two trees differ but the values, and the leaves that are in both, each once.

    Raises:
      NameCollisionError: two leaves of one tree have one path.
    """
    first, second = Contents(a), Contents(b)
    spell = _speller(first.entries, second.entries)
    found, matched = _names(first, second, spell)
    containers = _containers(first, second, spell)
    found += containers or _order(first, second, spell)  # dicts are sorted, so their order says nothing
    found += _ties(first, second, spell)
    seen = set()
    pairs = []
    for here, there in matched:
        one, other = first.entries[here], second.entries[there]
        if (one.owner, other.owner) not in seen:
            seen.add((one.owner, other.owner))
            found += _of_leaf(spell(here), one, other)
            if one.there and other.there:
                pairs.append(Pair(spell(here), one.leaf, other.leaf))
    form: Any = jax.tree.structure(a)
    other_form = jax.tree.structure(b)
    if not found and form != other_form:
        found.append(_static("", form, other_form))
    return sorted(found, key=lambda difference: WHATS.index(difference.what)), pairs


def bare(tree: Any) -> Any:
    """Returns a tree with nothing but its structure, and that of the whole if it is a part."""
    if isinstance(tree, ParamTree):
        full = whole(tree)._structure.whole
        return _rebuild(full, (None,) * len(full.kinds))
    return jax.tree.map(lambda leaf: None, tree)


# In words


def lines(found: Iterable[Difference]) -> list[str]:
    """Returns differences as lines of a message."""
    return [f"  {printable(_line(difference))}" for difference in found]


def _line(difference: Difference) -> str:
    name, what, expected, found, close = difference
    subject = f"`{_clip(name)}`" if name else "the tree"
    one, other = sides(difference)
    match what:
        case "missing":
            expectation = "" if expected == LEFT_OUT.text else f", expected {one}"
            near = " or ".join(f"`{_clip(text)}`" for text in close)
            hint = f"; the closest name is {near}" if near else ""
            return f"{subject} is missing{expectation}{hint}."
        case "extra":
            return f"{subject} is extra{'' if found == LEFT_OUT.text else f', found {other}'}."
        case "order":
            return f"the order differs: expected {one}, found {other} in its place."
        case "shape" | "dtype" | "kind" | "nesting":
            return f"{subject}: expected {what} {one}, found {other}."
    return f"{subject}: expected {one}, found {other}."


def sides(difference: Difference) -> tuple[str, str]:
    """Returns what is said of each of the two trees."""

    def say(value: Any) -> str:
        if difference.what == "tie":
            return "not tied" if value is None else f"tied to `{_clip(value)}`"
        if difference.what == "order":
            return f"`{_clip(value)}`"
        return "nothing" if value is None else _clip(str(value))

    return say(difference.expected), say(difference.found)


def _clip(text: str) -> str:
    return clip(text, _MOST_TEXT)


_ADVICE = {
    "missing": "To match a part, give pt.collect(a, pattern) and pt.collect(b, pattern).",
    "extra": "To match a part, give pt.collect(a, pattern) and pt.collect(b, pattern).",
    "hole": "pt.merge fills the holes of a part with the leaves of the other part.",
    "kind": "Kinds are those that the model declares with p.param and p.state.",
    "shape": "Shapes follow from the model and from the shape of the input that pt.init was given.",
}


def _advice(found: list[Difference], a: Any, b: Any) -> list[str]:
    """Returns what can be done about some differences."""
    whats = {difference.what for difference in found}
    advice = dict.fromkeys(text for what, text in _ADVICE.items() if what in whats)
    if any(d.what == "dtype" and _floats(d.expected, d.found) for d in found):
        advice["pt.cast(b, dtype) casts floating-point leaves."] = None
    if whats <= {"nesting", "container", "order"}:
        advice["pt.replace(a, pt.collect(b)) puts the values of b into the form of a, by name."] = None
    if "tie" in whats and whats <= {"tie", "order", "level"} and _are_trees(a, b):
        ties = [difference for difference in found if difference.what == "tie"]
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

_Speller = Callable[[Path], str]


def _alike(one: Any, other: Any) -> bool:
    """Whether two leaves have one shape and dtype; of other objects nothing is asked."""
    if one is other:
        return True
    if shape_of(one) != shape_of(other):
        return False
    dtype = getattr(one, "dtype", None)
    same = dtype is not None and dtype is getattr(other, "dtype", None)  # most often one object
    return same or _dtype_name(one) == _dtype_name(other)


def _dtype_name(leaf: Any) -> str | None:
    """Returns the name of a leaf's dtype, or of the type of a number; None for what is neither."""
    if shape_of(leaf) is None:
        return None
    dtype = dtype_of(leaf)
    return type(leaf).__name__ if dtype is None else str(dtype)


def _speller(*outlines: Mapping[Path, Any]) -> _Speller:
    """Returns what spells a path: as its name, or as it is if another path has the same name."""
    doubled = {
        name for paths in outlines for name, count in Counter(map(join, paths)).items() if count > 1
    }
    return lambda path: "/".join(path) if (name := join(path)) in doubled else name


def _names(
    first: Contents, second: Contents, spell: _Speller
) -> tuple[list[Difference], list[tuple[Path, Path]]]:
    """Returns what is in one tree alone, and the paths that are in both or at least share a name."""
    missing = {path: entry for path, entry in first.entries.items() if path not in second.entries}
    extra = {path: entry for path, entry in second.entries.items() if path not in first.entries}
    matched = [(path, path) for path in first.entries if path in second.entries]
    found = [Difference(name, "level", LEVEL.text, None) for name in _levels(missing, second, spell)]
    found += [Difference(name, "level", None, LEVEL.text) for name in _levels(extra, first, spell)]
    missing, extra = (
        {path: entry for path, entry in only.items() if entry.leaf is not LEVEL}
        for only in (missing, extra)
    )
    by_name = {spell(path): path for path in extra}
    for path in list(missing):
        if other := by_name.get(spell(path)):
            matched.append((path, other))
            found.append(Difference(spell(path), "nesting", "/".join(path), "/".join(other)))
            del missing[path], extra[other]
    names = [spell(path) for path in extra]
    searches = max(1, _MOST_COMPARED // (len(names) + 1))  # each takes a while
    for i, (path, entry) in enumerate(missing.items()):
        close = close_names(spell(path), names) if i < searches else ()
        found.append(Difference(spell(path), "missing", str(entry), None, tuple(close)))
    found += [Difference(spell(path), "extra", None, str(entry)) for path, entry in extra.items()]
    return found, matched


def _levels(only: Mapping[Path, Entry], other: Contents, spell: _Speller) -> list[str]:
    """Returns the levels without leaves that the other tree does not have, with leaves or without."""
    empty = [path for path, entry in only.items() if entry.leaf is LEVEL]
    depths = {len(path) for path in empty}
    levels = {path[:depth] for path in other.entries for depth in depths if len(path) > depth}
    return [spell(path) for path in empty if path not in levels]


def _containers(first: Contents, second: Contents, spell: _Speller) -> list[Difference]:
    """Returns the containers that are of another type, or differ in what jax takes for static."""
    found = []
    for path, one in first.containers.items():
        other = second.containers.get(path)
        if other is None:
            continue
        if one.type is not other.type:
            name, other_name = (kind.__qualname__ for kind in (one.type, other.type))
            if name == other_name:
                name, other_name = f"{one.type.__module__}.{name}", f"{other.type.__module__}.{name}"
            found.append(Difference(spell(path), "container", name, other_name))
        elif one.form != other.form and one.keys == other.keys:
            found.append(_static(spell(path), one.form, other.form))
    return found


def _static(name: str, one: Any, other: Any) -> Difference:
    return Difference(name, "static", str(one), str(other))


def _order(first: Contents, second: Contents, spell: _Speller) -> list[Difference]:
    """Returns the first place at which names that are in both trees stand in another order."""
    here = (path for path in first.entries if path in second.entries)
    there = (path for path in second.entries if path in first.entries)
    for one, other in zip(here, there, strict=True):
        if one != other:
            return [Difference(spell(one), "order", spell(one), spell(other))]
    return []


def _ties(first: Contents, second: Contents, spell: _Speller) -> list[Difference]:
    """Returns the names that are tied to others in one tree and not in the other."""
    common = [path for path in first.entries if path in second.entries]
    owners = [[outline.entries[path].owner for path in common] for outline in (first, second)]
    # The name by which a leaf goes here is the first that both trees have, in the order of the first.
    firsts: list[dict[Path, Path]] = [{}, {}]
    for path, *pair in zip(common, *owners, strict=True):
        for known, owner in zip(firsts, pair, strict=True):
            known.setdefault(owner, path)
    found = []
    for path, *pair in zip(common, *owners, strict=True):
        end, other = (known[owner] for known, owner in zip(firsts, pair, strict=True))
        if end != other:
            one, two = (None if source == path else spell(source) for source in (end, other))
            found.append(Difference(spell(path), "tie", one, two))
    return found


def _of_leaf(name: str, one: Entry, other: Entry) -> list[Difference]:
    """Returns what differs in two entries of one name."""
    here, there = one.leaf, other.leaf
    if LEVEL is here or LEVEL is there:
        return [] if here is there else [Difference(name, "level", str(one), str(other))]
    found = []
    if None not in (one.kind, other.kind) and one.kind != other.kind:
        found.append(Difference(name, "kind", one.kind, other.kind))
    if LEFT_OUT is here or LEFT_OUT is there:
        one_is, other_is = (LEFT_OUT.text if leaf is LEFT_OUT else "a leaf" for leaf in (here, there))
        return found if here is there else [*found, Difference(name, "hole", one_is, other_is)]
    shape, other_shape = shape_of(here), shape_of(there)
    if None not in (shape, other_shape) and shape != other_shape:
        found.append(Difference(name, "shape", shape, other_shape))
    dtype, other_dtype = (_dtype_name(leaf) or type(leaf).__name__ for leaf in (here, there))
    if dtype != other_dtype and not shape is other_shape is None:
        found.append(Difference(name, "dtype", dtype, other_dtype))
    return found
