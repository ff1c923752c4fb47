"""A tree whose parameters are stored as the parts of a parametrisation, and back.

One rule table makes and unmakes it: ``expand`` splits the parameters that match, and ``fold`` joins
their parts again. What a rule means is the same in both, as patterns name the parameter, never a part.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.core.arrays import describe, join, shape_of
from paramtree.core.errors import MismatchError, RuleError
from paramtree.core.pytrees import open_tree
from paramtree.core.rules import (
    Rules,
    check_table,
    compiled,
    hits,
    no_match,
    pattern_text,
    resolve,
    sep_of,
)
from paramtree.core.structure import PARAM, STATE, Path, Stack
from paramtree.core.tree import ParamTree, flatten, place_of
from paramtree.initializers.draw import check_key, path_key, path_words
from paramtree.verbs.assemble import Draft, Entry, take_apart
from paramtree.verbs.restructure import editable

__all__ = [
    "Folded", "check_rules", "expand", "expand_levels", "fold", "folded", "over_stack", "state_parts",
]  # fmt: skip

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


def fold(tree: T, rules: Rules) -> T:
    """Returns the tree with the parts of each parametrised parameter joined to one: undoes ``expand``.

    Args:
      tree: the parameters of ``pt.reparametrize(f, rules)``, or other nested dicts.
      rules: the rules that the tree was expanded with.

    Returns:
      The parameters of ``f``, which gives the same output with them.

    Raises:
      RuleError: a pattern matches no parametrised parameter, or a value is not a parametrisation.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"dense0": {"weight": jnp.ones((2, 3)), "bias": jnp.zeros(2)}})
      >>> rules = {".*weight": pt.parametrizations.WeightNorm()}
      >>> pt.fold(pt.expand(params, rules), rules)
      Parameter dense0_weight (shape=(2, 3), dtype=float32)
      Parameter dense0_bias (shape=(2,), dtype=float32)
    """
    check_rules(rules)
    plain, back = editable(tree, "fold")
    return back(folded(plain, rules, "fold", kinds=isinstance(tree, ParamTree)))


class Folded(NamedTuple):
    """A parametrised parameter; the name of a single part is empty."""

    path: Path
    parametrization: Any
    parts: dict[str, Any]
    stack: Stack


def folded(
    tree: ParamTree,
    rules: Rules,
    verb: str,
    update: Callable[[Folded], dict[str, Any]] | None = None,
    kinds: bool = True,
) -> ParamTree:
    """Returns the tree with parts joined; ``update`` gives new values of parts that are state.

    Without it the tree is for storing: a parametrisation may have a ``restore(parts)`` for that, if the
    value that ``join`` gives has lost something. ``kinds`` says that the kinds of parts are known.
    """
    draft = take_apart(tree)
    groups = _groups(draft)
    gone: dict[Path, Any] = {}  # the path of each parameter, to the labels of its parts
    values: dict[Any, Any] = {}
    used: set[int] = set()
    unfit: dict[Path, str] = {}
    for labels, paths in groups.items():
        parts = {name: draft.leaves[label] for name, label in labels if label in draft.leaves}
        known = {name: draft.kinds[label] for name, label in labels}
        single = [*known] == [""]
        if any(path[:-1] in gone for path in paths) or (single and (known[""] == STATE or not parts)):
            continue  # a part of a parameter, a state or a hole
        one = Folded((*draft.place, *paths[0]), None, parts, _stack_of(draft, paths[0], labels))
        for i, (pattern, parametrization) in enumerate(rules.items()):
            one = one._replace(parametrization=parametrization)
            problem = "" if parametrization is None else _problem(one, known if kinds else {})
            if not _applies(pattern, one, paths, problem):
                continue
            used |= {j for j, other in enumerate(rules) if j >= i and _applies(other, one, paths, "")}
            if problem:
                # A level whose leaves the pattern matches, too, may be one of the model's own.
                if single or not all(_applies(pattern, one, [(*paths[0], n)], problem) for n in known):
                    above = unfit.get(paths[0][:-1], "") if single else ""
                    unfit[paths[0]] = above or f"`{join(one.path)}` does not fit: {problem}"
            elif parametrization is not None:
                one = one._replace(parts={**parts, **update(one)}) if update else one
                join_parts = _joined(one) if update else _joined(one, "restore")
                values[labels] = over_stack(join_parts, one.stack)(one.parts)
                gone.update(dict.fromkeys(paths, labels))
            break
    if unused := [pattern for i, pattern in enumerate(rules) if i not in used]:
        names = [path for paths in groups.values() for path in paths]
        raise RuleError(f"{verb}: {'; '.join(_no_parameter(pattern, names) for pattern in unused)}.")
    if unfit:
        shown = [*dict.fromkeys(unfit.values())]
        more = f"; and {len(shown) - 20:,} more" if len(shown) > 20 else ""
        raise RuleError(
            f"{verb}: the rules match parameters that are not parametrised by them: "
            f"{'; '.join(shown[:20])}{more}. Call pt.expand(params, rules) with the same rules first."
        )
    entries: list[Entry] = []
    for entry in draft.entries:
        at = entry.path if entry.path in gone else entry.path[:-1]
        if at not in gone or entry.label is None:
            entries.append(entry)
        elif not entries or entries[-1].path != at:  # the first of its parts
            entries.append(Entry(at, gone[at], entry.stack))
            draft.leaves[gone[at]], draft.kinds[gone[at]] = values[gone[at]], PARAM
    return draft.assembled(entries)


def _applies(pattern: Any, one: Folded, paths: Sequence[Path], problem: str) -> bool:
    """Returns whether a pattern matches one of the names of a parameter.

    None, which leaves parameters alone, applies to a level if it does to all leaves in it; a predicate
    applies to nothing whose value is unknown.
    """
    if not callable(pattern):
        test, sep = compiled(pattern).fullmatch, sep_of(pattern)
        if one.parametrization is None and "" not in one.parts:
            return all(any(test(sep.join((*p, name))) for p in paths) for name in one.parts)
        return any(test(sep.join(path)) for path in paths)
    if problem or (one.parametrization is None and "" not in one.parts):
        return False
    value = one.parts.get("")
    if one.parametrization is not None:
        value = over_stack(_joined(one), one.stack)(one.parts)
    return any(pattern(join(path), value) for path in paths)


def _no_parameter(pattern: Any, paths: Sequence[Path]) -> str:
    if callable(pattern):
        return f"{pattern_text(pattern)} is true for no parametrised parameter"
    return no_match(pattern, [sep_of(pattern).join(path) for path in paths])


def _groups(draft: Draft) -> dict[Any, list[Path]]:
    """Returns what may be a parameter: levels of leaves, then leaves; by the labels of the parts."""
    levels: dict[Path, list[tuple[str, Any]]] = {}
    above: set[Path] = {entry.path[:-2] for entry in draft.entries if len(entry.path) > 1}
    above |= {entry.path[:-1] for entry in draft.entries if entry.label is None}
    single: dict[Any, list[Path]] = {}
    for entry in draft.entries:
        if entry.label is not None:
            levels.setdefault(entry.path[:-1], []).append((entry.path[-1], entry.label))
            single.setdefault((("", entry.label),), []).append(entry.path)
    groups: dict[Any, list[Path]] = {}
    for path, labels in levels.items():
        if path and path not in above:
            groups.setdefault(tuple(labels), []).append(path)
    return {**groups, **single}


def _stack_of(draft: Draft, path: Path, labels: Any) -> Stack:
    wanted = {(*path, name) if name else path for name, _ in labels}
    return next(entry.stack for entry in draft.entries if entry.path in wanted)


def _joined(one: Folded, how: str = "join") -> Callable[[Any], Any]:
    """Returns the function that joins the parts of one copy."""
    function = getattr(one.parametrization, how, one.parametrization.join)
    return lambda parts: function(parts.get("", parts))


def _problem(one: Folded, kinds: Mapping[str, str]) -> str:
    """Returns why some parts are not those of a parametrisation, or an empty string."""
    sizes = [size for _, size in one.stack]
    shapes = {}
    for name, part in one.parts.items():
        shape = shape_of(part)
        if shape is None or list(shape[: len(sizes)]) != sizes:
            return f"{name or 'the leaf'} is {describe(part)}"
        shapes[name] = jax.ShapeDtypeStruct(shape[len(sizes) :], part.dtype)
    if kinds and len(shapes) < len(kinds):
        return "parts are left out of the tree"
    parametrization, names = one.parametrization, ", ".join(filter(None, one.parts)) or "one array"
    try:
        value = jax.eval_shape(_joined(one), shapes)
        again = jax.eval_shape(parametrization.split, value, jax.random.key(0))
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError):
        return ""  # a split that needs values; the parts can be joined
    except Exception as error:  # whatever a parametrisation raises for parts that are not its own
        if isinstance(error, KeyError | TypeError | AttributeError):  # other names, or one array
            return f"{parametrization!r} has other parts than {names}"
        return f"{parametrization!r} cannot join {names} ({type(error).__name__}: {error})"
    expected = again if isinstance(again, dict) else {"": again}
    state = state_parts(parametrization, again)
    # Not the dtypes, which a cast may have changed.
    wanted = {name: jnp.shape(part) for name, part in expected.items()}
    found = {name: part.shape for name, part in shapes.items()}
    if wanted != found:
        return f"expected {_shown(wanted)}, but found {_shown(found)}"
    wrong = [name for name, kind in kinds.items() if (kind == STATE) != (name in state)]
    return f"the kind of {wrong[0] or 'the leaf'} is {kinds[wrong[0]]}" if wrong else ""


def _shown(parts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name or 'one part'} {shape}" for name, shape in parts.items())


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
