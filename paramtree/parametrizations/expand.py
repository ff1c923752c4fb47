"""A tree whose parameters are stored as the parts of a parametrisation.

One rule table makes and unmakes it: ``expand`` splits the parameters that match, and ``fold`` joins
their parts again. What a rule means is the same in both, as patterns name the parameter, never a part.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.core.arrays import describe, join, shape_of
from paramtree.core.errors import MismatchError, RuleError
from paramtree.core.pytrees import open_tree
from paramtree.core.rules import (
    Rules,
    check_table,
    hits,
    pattern_text,
    resolve,
)
from paramtree.core.structure import PARAM, STATE, Path, Stack
from paramtree.core.tree import ParamTree, flatten, place_of
from paramtree.initializers.keys import check_key, path_key, path_words
from paramtree.verbs.assemble import Entry, take_apart
from paramtree.verbs.restructure import editable

__all__ = ["check_rules", "expand", "expand_levels", "over_stack", "state_parts"]

T = TypeVar("T")


def expand(tree: T, rules: Rules, key: jax.Array | None = None) -> T:
    """Returns the tree with the parameters that match split into the parts of their parametrisation.

    If a parametrisation has several parts, the leaf ``dense0/weight`` becomes a level, with the
    leaves ``dense0/weight/g`` and ``dense0/weight/v``, say; if it has one, the leaf stays where it
    is. Ties and stacks stay: a tied leaf has one set of parts, and in a stack each copy is split by
    itself.

    Args:
      tree: the parameters of a model ``f``, or other nested dicts.
      rules: patterns to parametrisations, as in ``pt.parametrizations``, or to None, which leaves a
        parameter as it is; the first that matches the name of a parameter wins. State is never split.
      key: a PRNG key, for parametrisations that draw random numbers, such as ``LoRA``.

    Returns:
      The parameters of ``pt.reparametrize(f, rules)``.

    Raises:
      RuleError: a pattern matches no parameter, a value is not a parametrisation, or the names of a
        tied leaf have different ones.
      MismatchError: a parametrisation does not fit a parameter, which is named.
      TypeError: ``key`` is not a PRNG key, or is needed and missing.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"dense0": {"weight": jnp.ones((2, 3)), "bias": jnp.zeros(2)}})
      >>> pt.expand(params, {".*weight": pt.parametrizations.WeightNorm()})
      Parameter dense0_weight_g (shape=(2, 1), dtype=float32)
      Parameter dense0_weight_v (shape=(2, 3), dtype=float32)
      Parameter dense0_bias (shape=(2,), dtype=float32)
    """
    check_rules(rules)
    if key is not None:
        check_key(key)
    plain, back = editable(tree, "expand")
    return back(expand_levels(plain, [()], rules, key, "expand"))


def expand_levels(
    tree: ParamTree, levels: Iterable[Path], rules: Rules, key: jax.Array | None, verb: str
) -> ParamTree:
    """Returns a tree in which some levels are expanded; patterns match names that start there.

    A leaf that is tied into several of them is split once.
    """
    whole, values = flatten(tree)[0], tuple(rules.values())
    chosen: dict[int, int] = {}  # the rule of each slot
    for at in levels:
        for slot, rule in _assigned(tree, at, rules, verb).items():
            if chosen.setdefault(slot, rule) != rule:
                raise RuleError(
                    f"{verb}: `{join(whole.canonical[slot])}` is tied into several levels, in which "
                    "different rules match it: give all its names one rule."
                )
    draft = take_apart(tree)
    split: dict[Any, dict[str, Any]] = {}
    for slot, rule in chosen.items():
        if values[rule] is None:
            continue
        label, stack = whole.kept[slot], whole.stack_of(slot)
        path = whole.canonical[slot]
        shown = join((*place_of(tree), *path))
        parts = _split(values[rule], draft.leaves[label], path, shown, stack, key)
        kinds = state_parts(values[rule], parts)
        if not isinstance(parts, dict):
            draft.leaves[label] = parts
            continue
        del draft.leaves[label]
        split[label] = parts
        for name, part in parts.items():
            draft.leaves[label, name], draft.kinds[label, name] = (
                part,
                STATE if name in kinds else PARAM,
            )
    edited: list[Entry] = []
    for entry in draft.entries:
        names = split.get(entry.label)
        edited += (
            [entry]
            if names is None
            else [Entry((*entry.path, name), (entry.label, name), entry.stack) for name in names]
        )
    return draft.assembled(edited)


def _assigned(tree: ParamTree, at: Path, rules: Rules, verb: str) -> dict[int, int]:
    """Returns the rule of each slot of a tree with a parameter of a level that a rule matches."""
    source = open_tree(tree["/".join(at)] if at else tree)
    structure = source.structure
    assigned = resolve(source, rules, f"the rules of {verb}", default=None)
    for pattern in rules:
        entries = zip(structure.entries(), hits(source, pattern), strict=True)
        if not any(hit and structure.kinds[slot] == PARAM for (_, slot), hit in entries):
            raise RuleError(f"{verb}: {pattern_text(pattern)} matches only state, which is not split.")
    slots = flatten(tree)[0].slots_by_path()
    return {
        slots["/".join((*at, *structure.canonical[own]))]: rule
        for own, rule in enumerate(assigned.rules)
        if rule >= 0 and structure.kinds[own] == PARAM
    }


def _split(parametrization: Any, value: Any, path: Path, shown: str, stack: Stack, key: Any) -> Any:
    """Returns the parts of a parameter; in a stack, each copy is split by itself."""
    shape, sizes = shape_of(value), tuple(size for _, size in stack)
    if shape is None or shape[: len(sizes)] != sizes:
        raise MismatchError(f"expand: `{shown}` is {describe(value)}, not an array of its stack.")
    keys = None if key is None else _keys(key, path, stack)
    problem = f"`{shown}` is {describe(value)}, and {parametrization!r} cannot split it"
    names: list[str] = []  # jax sorts the keys of a dict

    def one(pair: Any) -> Any:
        parts = parametrization.split(*pair)
        names[:] = parts if isinstance(parts, dict) else ()
        return jax.tree.map(lambda part: part if shape_of(part) is None else jnp.asarray(part), parts)

    function = over_stack(one, stack)
    try:
        if isinstance(value, jax.ShapeDtypeStruct):
            parts = jax.eval_shape(function, (value, keys))
        else:
            parts = function((jnp.asarray(value), keys))
    except Exception as error:
        if type(error) is ValueError:
            raise MismatchError(f"expand: {problem}: {error}") from error
        error.add_note(f"{problem}.")
        raise
    if names and isinstance(parts, dict):
        parts = {name: parts[name] for name in names}
    if _lost(value, parts, over_stack(lambda parts: parametrization.join(parts), stack)):
        expects = getattr(parametrization, "expects", "")
        raise MismatchError(
            f"expand: {problem}: joined again, finite values are infinite or NaN.{expects} Give the "
            f"parameter other values, or the rule {{{shown!r}: None}}, before this one."
        )
    named = parts if isinstance(parts, dict) else {"": parts}
    wrong = [n for n in named if not isinstance(n, str) or "/" in n or (not n and named is parts)]
    if wrong or not named or any(shape_of(part) is None for part in named.values()):
        raise MismatchError(
            f"expand: {parametrization!r} splits `{shown}` into {parts!r}; expected an array, "
            "or a dict of names without '/' to arrays."
        )
    return parts


def _lost(value: Any, parts: Any, join_parts: Callable[[Any], Any]) -> bool:
    """Returns whether the values of a parameter are finite, and its parts, or what is read, are not."""
    leaves = jax.tree.leaves((value, parts))
    if any(isinstance(a, jax.core.Tracer | jax.ShapeDtypeStruct) for a in leaves):
        return False
    joined = join_parts(parts)
    return _finite(value) and not all(map(_finite, (joined, *jax.tree.leaves(parts))))


def _finite(value: Any) -> bool:
    return not jnp.issubdtype(value.dtype, jnp.inexact) or bool(jnp.all(jnp.isfinite(value)))


def _keys(key: Any, path: Path, stack: Stack) -> Any:
    """Returns the key of a parameter, or that of each copy, by the path that it has on its own."""
    sizes = tuple(size for _, size in stack)
    words = []
    for index in np.ndindex(*sizes):
        copy = [*path, "split"]  # not the key of the value itself
        for number, (position, _) in reversed(list(zip(index, stack, strict=True))):
            copy.insert(position, str(number))
        words.append(path_words(tuple(copy)))
    if not sizes:
        return path_key(key, words[0])
    keys = jax.vmap(path_key, (None, 0))(key, jnp.asarray(np.stack(words)))
    return keys.reshape(*sizes, *keys.shape[1:])


def over_stack(function: Callable[[Any], Any], stack: Stack) -> Callable[[Any], Any]:
    """Returns a function of one copy as one of a stack of copies."""
    for _ in stack:
        function = jax.vmap(function)
    return function


def state_parts(parametrization: Any, parts: Any) -> frozenset[str]:
    """Returns the names of the parts that are state; a single part, without a name, never is."""
    kinds = getattr(parametrization, "kinds", ())
    if isinstance(kinds, Mapping):
        kinds = [name for name, kind in kinds.items() if kind == STATE]
    return frozenset(kinds) & frozenset(parts if isinstance(parts, dict) else ())


def check_rules(rules: Any) -> None:
    """Raises RuleError if it is not a table of parametrisations."""
    check_table(rules, "the rules of a parametrisation")
    wrong = [
        f"{pattern_text(pattern)} gives {value!r}"
        for pattern, value in rules.items()
        if isinstance(value, type | str | bytes)
        or (value is not None and not all(callable(getattr(value, f, None)) for f in ("split", "join")))
    ]
    if wrong:
        raise RuleError(
            f"{'; '.join(wrong)}. Expected a parametrisation, such as "
            "pt.parametrizations.WeightNorm(): an object with split(value, key) and join(parts)."
        )
