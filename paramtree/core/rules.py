"""The selection: which leaves a pattern or rule table selects, and every message about patterns.

A pattern is a regular expression that must match a whole name, as in ``"dense0_.*"``; one that contains
"/" must match a whole path, as in ``"encoder/.*"``, which does not select ``encoder_head``; or it is a
predicate ``fn(name, leaf) -> bool``. In a rule table the first match wins.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from paramtree.core.arrays import join
from paramtree.core.errors import RuleError, close_names, first_few
from paramtree.core.pytrees import Opened
from paramtree.core.structure import PARAM, STATE, Structure, picker

__all__ = [
    "UNSET", "Assigned", "Pattern", "Patterns", "Rules", "Slots", "assign", "check_kind", "check_table",
    "compiled", "hits", "no_match", "pattern_text", "resolve", "select_slots", "sep_of", "slots_of",
]  # fmt: skip

Pattern = str | re.Pattern[str] | Callable[[str, Any], bool]
Patterns = Pattern | Sequence[Pattern] | None
Rules = Mapping[Any, Any]  # patterns to values; the key type of a Mapping is invariant
UNSET: Any = object()  # an argument that was not given, where None is a value


class Slots:
    """Some slots of a structure, the structure with only these, and a picker of their leaves."""

    def __init__(self, structure: Structure, slots: Iterable[int]) -> None:
        self.slots = tuple(slots)
        self.structure, self.take = structure.keep(self.slots), picker(self.slots)


class Assigned(NamedTuple):
    """For each slot the index of its rule, -1 for none, and the name that the rule matched."""

    rules: tuple[int, ...]
    names: tuple[str, ...]
    disputed: list[list[tuple[int, str]]]  # rules and names of tied leaves with several rules
    unused: list[int]


def compiled(pattern: Any) -> re.Pattern[str]:
    """Returns a compiled regular expression, in which "." matches newlines too.

    Raises:
      RuleError: it is not a string, or not a regular expression.
    """
    text = getattr(pattern, "pattern", pattern)
    if not isinstance(text, str):
        raise RuleError(
            "a pattern is a regular expression in a string, as in '.*weight', or a function of name "
            f"and leaf, but found {pattern!r} of type {type(pattern).__name__}."
        )
    try:
        return re.compile(text, getattr(pattern, "flags", 0) | re.DOTALL)
    except re.error as error:
        raise RuleError(
            f"the pattern {pattern!r} is not a regular expression: {error}. To match a name that has "
            "special characters, pass it through re.escape."
        ) from None


def hits(source: Opened, pattern: Any, nested: bool = False) -> tuple[bool, ...]:
    """Returns whether a pattern matches, for every entry.

    With ``nested``, names in a parameter tree inside a container may also start at that tree.

    Raises:
      RuleError: the pattern is not valid.
    """
    structure = source.structure
    if pattern is None:
        return (True,) * len(structure.names())
    if isinstance(pattern, list | tuple):
        return tuple(map(any, zip(*(hits(source, one, nested) for one in pattern), strict=True)))
    if callable(pattern):
        entries = zip(structure.names(), structure.entries(), strict=True)
        return tuple(bool(pattern(name, source.leaves[slot])) for name, (_, slot) in entries)
    depths = source.depths if nested else {}

    def match() -> tuple[bool, ...]:
        test, sep = compiled(pattern).fullmatch, sep_of(pattern)
        matched = [*map(bool, map(test, structure.names(sep)))]
        if depths:
            for i, (path, _) in enumerate(structure.entries()):
                matched[i] = matched[i] or test(join(path[depths.get(path, 0) :], sep)) is not None
        return tuple(matched)

    compiled(pattern)  # raises for what is not a pattern, also if it cannot be looked up
    return structure.cached(("hits", pattern, tuple(depths.items())), match)


def select_slots(
    source: Opened, patterns: Patterns, kind: str | None, verb: str
) -> tuple[Slots, Slots]:
    """Returns the slots of a kind that one of the patterns matches, and all others.

    Raises:
      RuleError: a pattern is not valid, or matches nothing; the latter are all listed.
      ValueError: a kind other than "param", "state" and None.
    """
    check_kind(kind)
    structure = source.structure
    several = tuple(patterns) if isinstance(patterns, list | tuple) else (patterns,)
    if not several:
        raise RuleError(f"{verb}: the list of patterns is empty.")

    def choose() -> tuple[Slots, Slots]:
        chosen: set[int] = set()
        problems: list[str] = []
        for pattern in several:
            entries = zip(structure.entries(), hits(source, pattern), strict=True)
            matched = {slot for (_, slot), hit in entries if hit}
            of_kind = {slot for slot in matched if kind in (None, structure.kinds[slot])}
            if pattern is not None and not of_kind:
                kindless = f"{pattern_text(pattern)} matches no name of kind {kind}"
                problems.append(
                    kindless if matched or len(problems) > 20 else no_match(pattern, structure)
                )
            chosen |= of_kind
        if problems:
            source.fail(RuleError(f"{verb}: {first_few(problems)}."))
        return slots_of(structure, chosen)

    if source.pending or not all(isinstance(one, str | re.Pattern | None) for one in several):
        return choose()
    return structure.cached(("slots", several, kind), choose)


def slots_of(structure: Structure, chosen: set[int]) -> tuple[Slots, Slots]:
    """Returns some slots, and all others."""
    slots = range(len(structure.kinds))
    rest = Slots(structure, (slot for slot in slots if slot not in chosen))
    return Slots(structure, (slot for slot in slots if slot in chosen)), rest


def assign(source: Opened, patterns: tuple[Any, ...], nested: bool = False) -> Assigned:
    """Returns the pattern of each stored leaf: the first that matches any of its names."""
    structure = source.structure

    def make() -> Assigned:
        # Each pattern is tried on all names: one that others merely shadow is not a typo.
        matches = [hits(source, pattern, nested) for pattern in patterns]
        unused = [i for i, row in enumerate(matches) if True not in row]
        last = len(patterns) - 1
        rule = picker(matches[last])((-1, last)) if patterns else (-1,) * len(structure.names())
        for i in reversed(range(last)):
            rule = tuple([i if hit else old for hit, old in zip(matches[i], rule, strict=True)])
        if len(rule) == len(structure.kinds):  # nothing is tied: entries are slots
            return Assigned(rule, structure.names(), [], unused)
        by_slot: list[list[tuple[int, str]]] = [[] for _ in structure.kinds]
        for (_, slot), name, i in zip(structure.entries(), structure.names(), rule, strict=True):
            by_slot[slot] += [(i, name)] if i >= 0 else []
        first = [named[0] if named else (-1, "") for named in by_slot]
        disputed = [named for named in by_slot if len({i for i, _ in named}) > 1]
        return Assigned(tuple(i for i, _ in first), tuple(n for _, n in first), disputed, unused)

    if any(not isinstance(pattern, str | re.Pattern) for pattern in patterns):
        return make()
    depths = tuple(source.depths.items()) if nested else ()
    return structure.cached(("assigned", patterns, depths), make)


def resolve(
    source: Opened, rules: Any, table: str, *, default: Any = UNSET, nested: bool = False,
    free: Iterable[int] = (), problems: Iterable[str] = (), advice: str = "",
) -> Assigned:  # fmt: skip
    """Returns the rule of each stored leaf.

    Args:
      source: the tree.
      rules: patterns to values.
      table: what messages call the rules.
      default: the value of leaves without a rule; if not given, every leaf needs one.
      nested: whether names may start at a parameter tree in the container, and match holes too.
      free: slots that need no rule.
      problems: other problems with the table, for the same message.
      advice: ends the message.

    Raises:
      RuleError: it is not a table, a pattern is not valid or matches nothing, a leaf has no rule and
        there is no default, or the names of a tied leaf have different values. One error lists all.
    """
    check_table(rules, table)
    structure, patterns, values = source.structure, tuple(rules), tuple(rules.values())
    assigned = assign(source, patterns, nested)
    unused = set(assigned.unused)
    if nested and unused and structure.full is not structure:
        unused &= set(assign(source._replace(structure=structure.full), patterns, nested).unused)
    full = structure.full if nested else structure
    wrong = [no_match(patterns[i], full) if n < 20 else "" for n, i in enumerate(sorted(unused))]
    for named in assigned.disputed:
        if any(not _same(values[i], values[named[0][0]]) for i, _ in named):
            shown = ", ".join(f"{name} by {pattern_text(patterns[i])}" for i, name in named)
            wrong.append(f"one tied leaf gets different values: {shown}; give both names one rule")
    wrong += problems
    if default is UNSET:
        without = {slot for slot, i in enumerate(assigned.rules) if i < 0} - set(free)
        if lacking := first_few([join(structure.canonical[slot]) for slot in sorted(without)], ", "):
            wrong.append(f"no pattern matches {lacking}; add a last rule '.*'")
    if wrong:
        source.fail(RuleError(f"{table} do not fit the tree: {first_few(wrong)}.{advice}"))
    return assigned


def no_match(pattern: Any, known: Structure | Sequence[str]) -> str:
    """Returns the message about a pattern that matches none of the names."""
    if callable(pattern):
        return f"{pattern_text(pattern)} is true for no leaf"
    text = pattern if isinstance(pattern, str) else pattern.pattern
    names = known.names(sep_of(pattern)) if isinstance(known, Structure) else known
    inside = [name for name in names if re.search(pattern, name)][:3]
    if inside:
        wider = f".*(?:{text}).*" if "|" in text else f".*{text}.*"
        hint = f": {wider!r} would match these" if isinstance(pattern, str) and "(?" not in text else ""
        return f"{text!r} matches no whole name, only a part of {', '.join(inside)}{hint}"
    plain = re.sub(r"\\(.)|\.\*|[\^$()]", r"\1", text)
    # "embd.*" means "embed_weight", and ".*weigth" does too: beginnings and ends are compared as well.
    ends = {e: name for name in reversed(names) for e in (name[-len(plain) :], name[: len(plain)])}
    close = close_names(plain, names) or [ends[end] for end in close_names(plain, list(ends))]
    word, shown = ("closest", close) if close else ("first", names[:5])
    hint = f"; the {word} are {', '.join(shown)}" if names else ""
    return f"{text!r} matches no name{hint}"


def check_kind(kind: str | None) -> None:
    """Raises ValueError if it is neither a kind nor None."""
    if kind not in (None, PARAM, STATE):
        raise ValueError(f"kind is 'param', 'state' or None for both, not {kind!r}.")


def check_table(rules: Any, table: str) -> None:
    """Raises RuleError if it is not a rule table."""
    if not isinstance(rules, Mapping):
        raise RuleError(
            f"{table} are a mapping of patterns to values, as in {{'.*weight': value}}, but found "
            f"{rules!r} of type {type(rules).__name__}."
        )


def pattern_text(pattern: Any) -> str:
    """Returns a pattern as messages show it."""
    if callable(pattern):
        return f"the predicate {getattr(pattern, '__name__', pattern)}"
    return repr(pattern)


def sep_of(pattern: str | re.Pattern[str]) -> str:
    """Returns what joins the segments of the names that a pattern matches."""
    return "/" if "/" in (pattern if isinstance(pattern, str) else pattern.pattern) else "_"


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, Hashable) and bool(a == b))
