"""Any pytree as a parameter tree."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax

from paramtree.core.arrays import join
from paramtree.core.pytrees import open_tree
from paramtree.core.rules import Rules, resolve
from paramtree.core.structure import EMPTY, PARAM, STATE, Path, Structure
from paramtree.core.tree import ParamTree, unflatten
from paramtree.verbs.assemble import take_apart
from paramtree.verbs.labels import check_values
from paramtree.verbs.tie import tie
from paramtree.verbs.uncollected import uncollected

__all__ = ["from_tree"]


def from_tree(
    tree: Any, *, kinds: Rules | None = None, ties: Mapping[str, str] | None = None
) -> ParamTree:
    """Returns any pytree as a parameter tree: mappings in their own order, "/" in a key as a level.

    Parameter trees in it keep their order, ties, kinds, stacks and holes. Other containers have no
    kinds or ties: their leaves are parameters, one for each path, unless ``kinds`` and ``ties`` say
    otherwise. Every leaf is kept, of whatever type.

    Args:
      tree: nested mappings, or any pytree: Flax, Haiku or Equinox parameters, lists, dataclasses.
      kinds: patterns to "param" or "state"; the leaves that no pattern matches keep their kind.
      ties: paths to tie, ``{alias: source}``, as in ``pt.tie``.

    Raises:
      NameCollisionError: two leaves have one path.
      RuleError: a key is empty or has an empty segment, or the kinds or ties do not fit.
      MismatchError: two leaves to tie differ in shape, dtype, kind or stack.
      TypeError: it is a single leaf, which has no name.
      ValueError: a dict holds itself.

    Example:
      >>> from_tree({"mlp/~/linear_0": {"w": 1.5, "b": 2.5}, "heads": [3, 4]})
      Parameter mlp_~_linear_0_w (1.5)
      Parameter mlp_~_linear_0_b (2.5)
      Parameter heads_0 (3)
      Parameter heads_1 (4)
      >>> from_tree({"gamma": 1.0, "running_mean": 0.0}, kinds={"running_.*": "state"})
      Parameter gamma (1.0)
      State running_mean (0.0)
    """
    if type(tree) is ParamTree:
        result = tree
    elif (plain := _of_dicts(tree)) is not None:
        result = plain
    else:
        source = open_tree(tree, counts=None, declared=True)
        if not source.containers and not hasattr(type(tree), "__open__"):
            raise TypeError(
                f"a tree is made from a container of leaves, but found a single "
                f"{type(tree).__name__}: give it a name, as in pt.from_tree({{'name': value}})."
            )
        if source.pending is not None:
            source.pending.structural("from_tree", tree)
        result = (source.renamed or unflatten)(source.structure, source.leaves)
    if kinds is not None:
        result = _with_kinds(result, kinds)
    return result if ties is None else tie(result, ties)


@uncollected()
def _of_dicts(tree: Any) -> ParamTree | None:
    """Returns the tree of nested dicts whose keys are names; None for anything else.

    That is what the walker gives, which takes ten times as long since it can put any pytree together
    again, and expects ties.
    """
    if type(tree) is not dict:
        return None
    paths: list[Path] = []
    slots: list[int] = []
    leaves: list[Any] = []
    atoms = {type(None)}  # the types of leaves
    todo: list[tuple[Path, Iterator[tuple[Any, Any]]]] = [((), iter(tree.items()))]
    around = [id(tree)]  # the dicts that hold what is read
    while todo:
        above, items = todo[-1]
        for key, value in items:
            if type(key) is not str or not key or "/" in key:
                return None
            kind, path = type(value), (*above, key)
            if kind is dict and value:
                if id(value) in around:
                    raise ValueError(f"the dict at `{join(path, '/')}` holds itself, which has no end.")
                around.append(id(value))
                todo.append((path, iter(value.items())))
                break
            if kind is not dict and kind not in atoms:
                if isinstance(value, Mapping) or hasattr(kind, "__open__"):
                    return None
                if not jax.tree_util.all_leaves([value]):
                    return None
                atoms.add(kind)
            paths.append(path)
            slots.append(EMPTY if kind is dict else len(leaves))
            if kind is not dict:
                leaves.append(value)
        else:
            todo.pop()
            around.pop()
    kinds = (PARAM,) * len(leaves)
    return unflatten(Structure.intern(tuple(paths), tuple(slots), kinds), leaves)


def _with_kinds(tree: ParamTree, kinds: Rules) -> ParamTree:
    check_values(
        "from_tree", kinds, None, lambda kind: kind in (PARAM, STATE, None), "'param' or 'state'"
    )
    source = open_tree(tree)
    draft = take_apart(unflatten(source.structure, source.leaves, source.place))
    assigned = resolve(source, kinds, "the kinds of from_tree", default=None)
    values = (*kinds.values(), None)
    for slot, rule in zip(source.structure.kept, assigned.rules, strict=True):
        draft.kinds[slot] = values[rule] or draft.kinds[slot]
    return draft.assembled(draft.entries)
