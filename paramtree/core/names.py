"""Names, patterns and rules: one language for every job that picks leaves.

A name is a path joined with ``_``. A pattern is a regular expression that must match a whole name.
A rule table is an ordered mapping from patterns to values, and the first pattern that matches a
name gives its value. ``resolve`` is the one place where rules meet names; every verb stands on it.
What it finds is cached on the structure, so it lives as long as the structure and asking again
costs a look-up.

Any other pytree takes part too: ``named`` reads its key paths into a tree and says how to get the
original container back.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from paramtree.core.arrays import dtype_of, join, shape_of
from paramtree.core.errors import NameCollisionError, RuleError, close_names, suggest
from paramtree.core.structure import EMPTY, PARAM, STATE, Path, Structure, build, picker
from paramtree.core.tree import ParamTree, _rebuild, whole

__all__ = [
    "Pattern",
    "Rules",
    "assign",
    "from_tree",
    "key_segments",
    "match",
    "named",
    "names",
    "resolve",
]

Pattern = str | re.Pattern[str]
Rules = Mapping[Any, Any]  # patterns to values; a Mapping's key type is invariant, so any will do
UNSET: Any = object()  # an argument that was not given, where None could be


def names(structure: Structure, sep: str = "_") -> tuple[str, ...]:
    """Returns the name of every leaf that is here, aliases too, in the order of ``entries``."""
    key = ("names", sep)
    if key not in structure.cache:
        structure.cache[key] = tuple(sep.join(path) for path, _ in structure.entries())
    found: tuple[str, ...] = structure.cache[key]
    return found


def check_unique(found: Iterable[tuple[str, Path]]) -> None:
    """Raises NameCollisionError if two different paths have one name; it lists all of them."""
    found = list(found)
    first = dict(found)
    if len(first) == len(found):
        return
    first.clear()
    clashes = [
        f"`{name}` is the name of both {'/'.join(first[name])} and {'/'.join(path)}"
        for name, path in found
        if first.setdefault(name, path) != path
    ]
    if clashes:
        raise NameCollisionError(
            f'{"; ".join(clashes)}. Join the paths with another separator, as in sep="/", or rename '
            "one of them."
        )


def compiled(pattern: Pattern) -> re.Pattern[str]:
    """Returns a compiled pattern.

    Raises:
      RuleError: it is not a string, or not a regular expression.
    """
    if not isinstance(pattern, str | re.Pattern):
        raise RuleError(
            f"a pattern is a regular expression in a string, as in '.*weight', but found "
            f"{pattern!r} of type {type(pattern).__name__}."
        )
    try:
        return re.compile(pattern)
    except re.error as error:
        raise RuleError(
            f"the pattern {pattern!r} is not a regular expression: {error}. To match a name that "
            "has special characters, pass it through re.escape."
        ) from None


def match(structure: Structure, pattern: Pattern | None, kind: str | None = None) -> tuple[bool, ...]:
    """Returns for every leaf entry whether its name matches the pattern and its kind is ``kind``.

    Raises:
      RuleError: a bad pattern.
      ValueError: a kind other than "param", "state" and None.
    """
    if kind not in (None, PARAM, STATE):
        raise ValueError(f"kind is 'param', 'state' or None for both, not {kind!r}.")
    found = names(structure)
    if pattern is None:
        hits = [True] * len(found)
    else:
        full = compiled(pattern).fullmatch
        hits = [full(name) is not None for name in found]
    if kind is None:
        return tuple(hits)
    entries = zip(hits, structure.entries(), strict=True)
    return tuple(hit and structure.kinds[slot] == kind for hit, (_, slot) in entries)


def no_match(pattern: Pattern, known: Sequence[str]) -> str:
    """Returns what to say of a pattern that matches none of the names."""
    text = pattern if isinstance(pattern, str) else pattern.pattern
    inside = [name for name in known if re.search(pattern, name)][:3]
    if inside:
        return (
            f"{text!r} matches no whole name, only a part of {', '.join(inside)}: "
            f"'.*{text}.*' would match these"
        )
    plain = re.sub(r"\\(.)|\.\*|[\^$()]", r"\1", text)
    # "embd.*" means "embed_weight", and ".*weigth" does too: beginnings and ends are compared as well.
    size = len(plain)
    ends = {part: name for name in reversed(known) for part in (name[-size:], name[:size])}
    close = close_names(plain, known) or [ends[part] for part in close_names(plain, list(ends))]
    hint = f"; the closest are {', '.join(close)}" if close else ""
    return f"{text!r} matches no name{hint}"


def resolve(
    structure: Structure, rules: Rules, *, default: Any = UNSET, what: str = "the rules"
) -> tuple[Any, ...]:
    """Returns the value that a rule table gives to every stored leaf, in the order of the slots.

    Args:
      structure: the structure whose names are matched.
      rules: patterns to values; the first that matches a name counts.
      default: the value of a leaf that no pattern matches.
      what: what to call the table in a message.

    Raises:
      RuleError: a pattern is bad or matches nothing, a leaf has no rule and there is no default, or
        the names of a tied leaf get different values. One error lists all of these.
    """
    if not isinstance(rules, Mapping):
        raise RuleError(
            f"{what} are a mapping of patterns to values, as in {{'.*weight': value}}, but found "
            f"{rules!r} of type {type(rules).__name__}."
        )
    patterns = tuple(rules)
    first, disputed, unused = assign(structure, patterns)
    values = [*rules.values(), default]  # the rule of a leaf that none matches is the last, -1
    problems = [no_match(patterns[i], names(structure)) for i in unused]
    for hits in disputed:
        if any(not _same(values[i], values[hits[0][0]]) for i, _ in hits):
            shown = ", ".join(f"{name} by {patterns[i]!r}" for i, name in hits)
            problems.append(f"one tied leaf gets different values: {shown}; give both names one rule")
    if default is UNSET and -1 in first:
        unmatched = [join(structure.canonical[slot]) for slot, i in enumerate(first) if i < 0]
        problems.append(f"no pattern matches {', '.join(unmatched)}; add a last rule '.*'")
    if problems:
        raise RuleError(f"{what} do not fit the tree: {'; '.join(problems)}.")
    return picker(first)(values)


Hits = list[tuple[int, str]]


def assign(
    structure: Structure, patterns: tuple[Pattern, ...], prefix: Path = ()
) -> tuple[tuple[int, ...], list[Hits], list[int]]:
    """Returns each slot's rule, -1 for none; the ties with several; the rules without a match.

    With a prefix, where the tree stands in another one, a pattern may match a name with it or without.
    """
    key = ("rules", patterns, prefix)
    if key not in structure.cache:
        structure.cache[key] = _assign(structure, patterns, prefix)
    made: tuple[tuple[int, ...], list[Hits], list[int]] = structure.cache[key]
    return made


def _assign(
    structure: Structure, patterns: tuple[Pattern, ...], prefix: Path
) -> tuple[tuple[int, ...], list[Hits], list[int]]:
    found = names(structure)
    start = join(prefix) + "_"
    rule = [-1] * len(found)
    unused = []
    for i, pattern in enumerate(patterns):
        # A pattern is tried on all names, also those that an earlier one took: one that is merely
        # shadowed is no typo.
        test = compiled(pattern).fullmatch
        hits = [k for k, name in enumerate(found) if test(name) or (prefix and test(start + name))]
        for k in hits:
            if rule[k] < 0:
                rule[k] = i
        if not hits:
            unused.append(i)
    if len(found) == len(structure.kinds):  # nothing is tied: entries and slots are one
        return tuple(rule), [], unused
    by_slot: list[Hits] = [[] for _ in structure.kinds]
    for (_, slot), name, i in zip(structure.entries(), found, rule, strict=True):
        if i >= 0:
            by_slot[slot].append((i, name))
    first = tuple(hits[0][0] if hits else -1 for hits in by_slot)
    return first, [hits for hits in by_slot if len({i for i, _ in hits}) > 1], unused


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, Hashable) and bool(a == b))


def find(structure: Structure, wanted: Iterable[str], what: str) -> dict[str, int]:
    """Returns the slot of each of some exact names; a path such as "a/b" will do as well.

    Raises:
      RuleError: some are not names of the tree; it lists them all with the closest ones.
      NameCollisionError: a name is that of two paths with different leaves.
    """
    if "by_name" not in structure.cache:
        made: dict[str, dict[int, Path]] = {}
        for name, (path, slot) in zip(names(structure), structure.entries(), strict=True):
            made.setdefault(name, {})[slot] = path
            made.setdefault("/".join(path), {})[slot] = path
        structure.cache["by_name"] = made
    by_name: dict[str, dict[int, Path]] = structure.cache["by_name"]
    wanted = list(wanted)
    unknown = [name for name in wanted if name not in by_name]
    if unknown:
        known = names(structure)
        lines = [f"`{name}` is not a name in the tree.{suggest(str(name), known)}" for name in unknown]
        raise RuleError(f"{what}: {' '.join(lines)}")
    for name in wanted:
        if len(by_name[name]) > 1:
            paths = " and ".join("/".join(path) for path in by_name[name].values())
            raise NameCollisionError(f"{what}: `{name}` is the name of both {paths}; give the path.")
    return {name: next(iter(by_name[name])) for name in wanted}


# Other pytrees


class Named(NamedTuple):
    """A pytree seen as a tree of named leaves, and how to get the container back.

    ``restore`` puts other leaves in their places. Its second argument, if given, takes the place of
    what is no array, such as an activation function in an Equinox module, and has no name.
    """

    tree: ParamTree
    restore: Callable[..., Any]
    foreign: bool


def named(tree: Any, *, numbers: bool = False) -> Named:
    """Returns any pytree as a tree of its array leaves, named by their key paths.

    Args:
      tree: a parameter tree, which is taken as it is, or any other pytree.
      numbers: whether Python's numbers count as arrays.

    Raises:
      NameCollisionError: two key paths are spelled alike, as those of {"a/b": x, "a": {"b": y}}.
    """
    if isinstance(tree, ParamTree):
        tree = whole(tree)
        return Named(tree, lambda leaves, others=None: tree._with(leaves), False)
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    least = shape_of if numbers else dtype_of
    where = [i for i, (_, leaf) in enumerate(flat) if least(leaf) is not None]
    items = [(key_segments(flat[i][0]) or ("value",), i) for i in where]
    structure, order = build(items, dict.fromkeys(where, PARAM))

    def restore(leaves: Sequence[Any], others: Any = UNSET) -> Any:
        values = [leaf if others is UNSET else others for _, leaf in flat]
        for i, leaf in zip(order, leaves, strict=True):
            values[i] = leaf
        return jax.tree_util.tree_unflatten(treedef, values)

    return Named(_rebuild(structure, tuple(flat[i][1] for i in order)), restore, True)


def key_segments(key_path: Iterable[Any]) -> Path:
    """Returns the path that a key path of jax stands for."""
    path: list[str] = []
    for key in key_path:
        match key:
            case DictKey() | FlattenedIndexKey():
                text = str(key.key)
            case GetAttrKey():
                text = key.name
            case SequenceKey():
                text = str(key.idx)
            case _:
                text = str(key)
        path.extend(text.split("/"))
    return tuple(segment for segment in path if segment)


def from_tree(tree: Any) -> ParamTree:
    """Returns any pytree as a parameter tree: dicts in their own order, "/" in a key as a level.

    Trees inside keep their order, ties, kinds and holes. Every leaf is kept, whatever it is.

    Args:
      tree: nested mappings, or any pytree: Flax, Haiku or Equinox parameters, lists, dataclasses.

    Raises:
      NameCollisionError: two leaves have one path.
      TypeError: it is a single leaf, which has no name.

    Example:
      >>> from_tree({"mlp/~/linear_0": {"w": 1.5, "b": 2.5}, "heads": [3, 4]})
      Parameter mlp_~_linear_0_w (1.5)
      Parameter mlp_~_linear_0_b (2.5)
      Parameter heads_0 (3)
      Parameter heads_1 (4)
    """
    if isinstance(tree, ParamTree):
        return tree
    items: list[tuple[Path, Any]] = []
    leaves: dict[Any, Any] = {}
    kinds: dict[Any, str] = {}
    stack: list[tuple[Path, Any]] = [((), tree)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, ParamTree):
            inner = whole(value)
            structure = inner._structure
            first = len(items)  # a number that is this tree's alone: a tree twice is no tie
            items.append((path, None))
            for below, slot in zip(structure.whole.paths, structure.whole.slots, strict=True):
                items.append(((*path, *below), None if slot == EMPTY else (first, slot)))
            kinds.update(((first, slot), kind) for slot, kind in enumerate(structure.whole.kinds))
            leaves.update(
                ((first, s), leaf) for s, leaf in zip(structure.kept, inner._leaves, strict=True)
            )
            continue
        children = _children(value)
        if children is None:
            if not path:
                raise TypeError(
                    f"a tree is made from a container of leaves, and found a single "
                    f"{type(value).__name__}: give it a name, as in pt.from_tree({{'name': value}})."
                )
            label = (len(items), 0)
            items.append((path, label))
            leaves[label], kinds[label] = value, PARAM
        else:
            items.append((path, None))
            stack.extend(((*path, *segments), below) for segments, below in reversed(children))
    structure, order = build(items, kinds)
    kept = [slot for slot, label in enumerate(order) if label in leaves]  # all but the holes
    return _rebuild(structure.keep(kept), tuple(leaves[order[slot]] for slot in kept))


def _children(value: Any) -> list[tuple[Path, Any]] | None:
    """Returns the children of one level of a pytree with their segments; None for a leaf."""
    if isinstance(value, Mapping):
        return [(_split(key), below) for key, below in value.items()]
    if value is None or jax.tree_util.all_leaves([value]):
        return None
    flat, _ = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda below: below is not value)
    return [(key_segments(key_path), below) for key_path, below in flat]


def _split(key: object) -> Path:
    segments = tuple(str(key).split("/"))
    if not all(segments):
        raise RuleError(
            f"{key!r} cannot be part of a path: a key is a name, or names joined with '/', none of "
            "them empty."
        )
    return segments
