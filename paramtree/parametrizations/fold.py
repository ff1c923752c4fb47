"""Joining the parts of parametrised parameters: for a model that reads them, or for good."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from paramtree.core.arrays import describe, dtype_of, join, shape_of
from paramtree.core.errors import RuleError, first_few
from paramtree.core.rules import Rules, compiled, no_match, pattern_text, sep_of
from paramtree.core.structure import PARAM, STATE, Path, Stack
from paramtree.core.tree import ParamTree
from paramtree.parametrizations.expand import check_rules, over_stack, state_parts
from paramtree.verbs.assemble import Draft, Entry, take_apart
from paramtree.verbs.restructure import editable

__all__ = ["Folded", "fold", "folded"]

T = TypeVar("T")


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
    stacks = {entry.path: entry.stack for entry in draft.entries}
    gone: dict[Path, Any] = {}  # the path of each parameter, to the labels of its parts
    values: dict[Any, Any] = {}
    used: set[int] = set()
    unfit: dict[Path, str] = {}
    problems: dict[Any, str] = {}  # of alike parameters, as abstract evaluation takes milliseconds
    for labels, paths in groups.items():
        parts = {name: draft.leaves[label] for name, label in labels if label in draft.leaves}
        known = {name: draft.kinds[label] for name, label in labels}
        single = [*known] == [""]
        if any(path[:-1] in gone for path in paths) or (single and (known[""] == STATE or not parts)):
            continue  # a part of a parameter, a state or a hole
        one = Folded((*draft.place, *paths[0]), None, parts, stacks[_first_of(paths[0], labels)])
        for i, (pattern, parametrization) in enumerate(rules.items()):
            one = one._replace(parametrization=parametrization)
            form = i, one.stack, *((n, k, *_form(parts.get(n))) for n, k in known.items())
            if parametrization is None:
                problem = ""
            elif form in problems:
                problem = problems[form]
            else:
                problem = problems[form] = _problem(one, known if kinds else {})
            if not _applies(pattern, one, paths, problem):
                continue
            used |= {
                j for j, other in enumerate(rules) if j >= i and _applies(other, one, paths, problem)
            }
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
    unused = [pattern for i, pattern in enumerate(rules) if i not in used]
    if unused and not (unfit and all(map(callable, unused))):  # a predicate needs a value
        names = [path for paths in groups.values() for path in paths]
        raise RuleError(f"{verb}: {'; '.join(_no_parameter(pattern, names) for pattern in unused)}.")
    if unfit:
        shown = first_few([*dict.fromkeys(unfit.values())])
        raise RuleError(
            f"{verb}: the rules match parameters that are not parametrised by them: {shown}. Call "
            "pt.expand(params, rules) with the same rules first."
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


def _form(part: Any) -> tuple[Any, Any]:
    return shape_of(part), getattr(part, "dtype", None)


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


def _first_of(path: Path, labels: Any) -> Path:
    """Returns the path of the first part of a parameter."""
    name = labels[0][0]
    return (*path, name) if name else path


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
        shapes[name] = jax.ShapeDtypeStruct(
            shape[len(sizes) :], dtype_of(part) or jnp.result_type(part)
        )
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
