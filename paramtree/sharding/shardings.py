"""Rules to shardings: which axis of a mesh each dimension of each leaf is divided over, by name.

Dividing the arrays, and the work on them, is jax's own business (``jax.sharding``, GSPMD); this room
only says how, with the rule tables that serve every other job. A state of an optimiser holds trees of
the same names as the parameters, so the same table covers it.
"""

import math
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from paramtree.core.arrays import join, shape_of
from paramtree.core.errors import MismatchError, RuleError, suggest
from paramtree.core.names import UNSET, Rules, assign, key_segments, named, names, no_match
from paramtree.core.structure import PARAM, Path, Structure, build
from paramtree.core.tree import ParamTree, _rebuild, whole

__all__ = ["scatter", "shardings", "spread"]

T = TypeVar("T")
Axes = Mapping[str, Any]  # logical names to axes of the mesh


def shardings(
    tree: T,
    mesh: Any,
    rules: Rules,
    *,
    axes: Axes | None = None,
    default: Any = UNSET,
    uneven: str = "error",
) -> T:
    """Returns a sharding for each leaf: for ``jit``, ``device_put``, ``pt.init``, ``pt.load``, Orbax.

    In a tree with parameter trees in it, such as the state of an optimiser, a pattern matches the name
    of a leaf in its own parameter tree, as ``dense0_weight``, or the whole, ``0_mu_dense0_weight``. A
    number there that no pattern matches, such as a count of steps, is on every device.

    Args:
      tree: a parameter tree of arrays or shapes, or any other pytree.
      mesh: a ``jax.sharding.Mesh``, or an ``AbstractMesh`` where there are no such devices.
      rules: patterns to a ``jax.P`` of axes of the mesh, one for each dimension, such as
        ``{".*weight": P("model", None), ".*": None}``; None keeps a leaf whole on every device. The
        first pattern that matches a name counts.
      axes: a table from names of your own in the specs ("vocabulary") to an axis of the mesh, several
        of them, or None.
      default: the spec of leaves that no pattern matches.
      uneven: "error", or "replicate" to keep whole, with a warning, a dimension that its axis does not
        divide.

    Returns:
      A tree of ``jax.sharding.NamedSharding``: of the same structure, or the same container, where what
      is no array has None.

    Raises:
      RuleError: a pattern matches nothing, a leaf has no rule, a spec is longer than a shape, uses an
        axis twice or one that the mesh does not have, or divides a dimension that is not a multiple
        of the axis. One error lists all of these.

    Example:
      >>> import paramtree as pt
      >>> params = pt.abstract(pt.nn.Dense(6), jax.ShapeDtypeStruct((2, 4), "float32"))
      >>> mesh = jax.sharding.AbstractMesh((4, 2), ("data", "model"))
      >>> placed = pt.shardings(params, mesh, {".*weight": jax.P("model", None), ".*": None})
      >>> placed.weight.shard_shape((6, 4)), placed.bias.shard_shape((6,))
      ((3, 4), (6,))
    """
    if uneven not in ("error", "replicate"):
        raise ValueError(f"uneven is 'error' or 'replicate', not {uneven!r}.")
    if not isinstance(getattr(mesh, "axis_names", None), tuple):
        raise TypeError(
            f"shardings takes a tree, a mesh and rules, as in pt.shardings(params, mesh, rules), but "
            f"found a {type(mesh).__name__} for the mesh."
        )
    if not isinstance(rules, Mapping):
        raise RuleError(
            f"the sharding rules are a mapping of patterns to specs, as in {{'.*weight': P('model')}}, "
            f"but found {rules!r} of type {type(rules).__name__}."
        )
    work = _Work(mesh, rules, axes or {}, default, uneven == "replicate")
    if not isinstance(tree, ParamTree):
        made = work.of_any(tree)
        _warn(work.said())
        return made
    source = whole(tree)
    # The rules are of the structure, but whether they fit is of the shapes, and to read those of
    # 100,000 arrays takes milliseconds. So the answer is kept for the very tree that was asked of.
    key = ("shardings", mesh, work.patterns, work.specs, work.default, uneven)
    seen, found, said = source._structure.cache.get(key, (None, None, ""))
    if work.problems or seen is None or seen() is not source:
        found, said = work.of_one(source), work.said()
        source._structure.cache[key] = weakref.ref(source), found, said
    _warn(said)
    return found


@dataclass(frozen=True)
class _Mark:
    """Takes the place of an array in a tree, to carry its sharding to where the names are."""

    shape: tuple[int, ...]
    sharding: Any


def spread(shardings: Any, like: Any, what: str, real: bool = True) -> list[Any]:
    """Returns the sharding of every leaf that ``named`` finds in a tree, in its order, or None.

    Args:
      shardings: a tree like the other one, or a single ``jax.sharding.Sharding`` for all of it.
      like: a tree of arrays or shapes.
      what: what to call the shardings in a message.
      real: whether they must be of devices that are here.

    Raises:
      MismatchError: the structures differ, a leaf is no sharding, or a mesh has no devices.
    """
    leaves, made = jax.tree.flatten(like)
    treedef: Any = made
    found = [shardings] * len(leaves)
    if not isinstance(shardings, jax.sharding.Sharding):
        try:
            found = treedef.flatten_up_to(shardings)
        except ValueError as error:
            why = str(error).rstrip(".")
            raise MismatchError(
                f"{what} are not of the tree: {why}. Make them with pt.shardings of the tree, or of "
                "its shapes, or give one sharding for all."
            ) from None
    wrong = [one for one in found if one is not None and not isinstance(one, jax.sharding.Sharding)]
    if wrong:
        raise MismatchError(
            f"{what} have a {type(wrong[0]).__name__}, {wrong[0]!r}, where a jax.sharding.Sharding is "
            "expected. pt.shardings makes them from rules."
        )
    if real and any(isinstance(getattr(one, "mesh", None), AbstractMesh) for one in found):
        raise MismatchError(
            f"{what} are of an AbstractMesh, which has no devices: make them with pt.shardings of a "
            "jax.sharding.Mesh."
        )
    marks = [
        leaf if (shape := shape_of(leaf)) is None else _Mark(shape, one)
        for leaf, one in zip(leaves, found, strict=True)
    ]
    placed = named(jax.tree.unflatten(treedef, marks), numbers=True).tree
    return [getattr(mark, "sharding", None) for mark in placed._leaves]


def scatter(value: Any, sharding: Any) -> jax.Array:
    """Returns an array of the host on the devices of a sharding, each of which is sent its part."""
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _warn(text: str) -> None:
    if text:
        warnings.warn(text, UserWarning, stacklevel=3)


class _Fit(NamedTuple):
    """What becomes of a rule and a shape: a sharding, or what is wrong; and what is kept whole."""

    sharding: Any
    problem: str = ""
    note: str = ""


class _Work:
    """One pass over a tree: specs are checked once, and a spec with a shape once."""

    def __init__(self, mesh: Any, rules: Rules, axes: Axes, default: Any, replicate: bool) -> None:
        self.mesh, self.replicate = mesh, replicate
        self.patterns = tuple(rules)
        self.default = default is not UNSET
        self.problems: list[str] = []
        given = [(repr(pattern), spec) for pattern, spec in rules.items()]
        given.append(("the default", None if default is UNSET else default))
        # The spec of a leaf that no pattern matches is the last, at -1.
        self.specs = tuple(self.spec(what, value, axes) for what, value in given)
        self.fits: dict[tuple[int, Any], _Fit] = {}
        self.unused = set(range(len(self.patterns)))
        self.known: list[str] = []
        self.ruled = False  # whether there is a leaf that needs a rule
        self.unmatched: list[str] = []
        self.uneven: list[str] = []

    # Specs

    def spec(self, what: str, value: Any, axes: Axes) -> tuple[tuple[str, ...], ...]:
        """Returns the axes of the mesh for each dimension."""
        if value is None:
            return ()
        if not isinstance(value, P | tuple | list):
            self.problems.append(
                f"{what} gives {value!r}, where a spec is expected, such as P('model', None), or None"
            )
            return ()
        dimensions = []
        for part in value:
            names = part if isinstance(part, tuple | list) else (part,)
            dimensions.append(tuple(axis for name in names for axis in self.axis(what, name, axes)))
        used = [axis for part in dimensions for axis in part]
        twice = [axis for i, axis in enumerate(used) if axis in used[:i]]
        if twice:
            self.problems.append(f"{what} gives {value}, which uses the axis {twice[0]!r} twice")
            return ()
        return tuple(dimensions)

    def axis(self, what: str, name: Any, axes: Axes) -> list[str]:
        """Returns the axes of the mesh that a name in a spec stands for."""
        given = axes[name] if isinstance(name, str) and name in axes else name
        found = list(given) if isinstance(given, tuple | list) else [] if given is None else [given]
        for axis in found:
            if axis not in self.mesh.axis_names:
                known = [*self.mesh.axis_names, *axes]
                of = f", which axes= gives for {name!r}" if given is not name else ""
                close = suggest(axis, known) if isinstance(axis, str) else ""
                self.problems.append(
                    f"{what} has {axis!r}{of}: no axis of the mesh, which has "
                    f"{', '.join(map(repr, self.mesh.axis_names))}{f'.{close}' if close else ''}"
                )
        return [axis for axis in found if axis in self.mesh.axis_names]

    def fit(self, rule: int, shape: tuple[int, ...]) -> _Fit:
        """Returns the sharding of a shape by a rule."""
        axes = self.specs[rule]
        if len(axes) > len(shape):
            return _Fit(
                None, f"is {len(shape)}-dimensional, and {self.of(rule)} has {len(axes)} dimensions"
            )
        parts: list[Any] = []
        odd = []
        for dimension, (size, used) in enumerate(zip(shape, axes, strict=False)):
            count = math.prod(self.mesh.shape[axis] for axis in used)
            part = used[0] if len(used) == 1 else used or None
            if size % count:
                odd.append(
                    f"dimension {dimension}, of {size}, is no multiple of {count}, the size of {part!r}"
                )
                part = None
            parts.append(part)
        if odd and not self.replicate:
            return _Fit(None, f"{'; '.join(odd)} ({self.of(rule)})")
        spec: Any = P(*parts)
        return _Fit(NamedSharding(self.mesh, spec), note="; ".join(odd))

    def of(self, rule: int) -> str:
        """Returns what to call a rule."""
        return "the default" if rule < 0 else f"the rule {self.patterns[rule]!r}"

    # Trees

    def of_one(self, tree: ParamTree) -> ParamTree:
        """Returns the shardings of a parameter tree.

        Raises:
          RuleError: anything is wrong.
        """
        made = self.of_tree(tree, ())
        self.check()
        return made

    def of_tree(self, tree: ParamTree, prefix: Path) -> ParamTree:
        """Returns the shardings of a parameter tree that stands somewhere in another tree."""
        structure = tree._structure
        self.known += names(structure.whole)
        rule, disputed, _ = assign(structure, self.patterns, prefix)
        # What is left out here has a name all the same: its rule is no typo.
        _, _, unused = assign(structure.whole, self.patterns, prefix)
        self.unused.intersection_update(unused)
        for hits in disputed:
            if len({self.specs[i] for i, _ in hits}) > 1:
                shown = ", ".join(f"{name} by {self.patterns[i]!r}" for i, name in hits)
                self.problems.append(
                    f"one tied leaf gets different specs: {shown}; give both names one rule"
                )
        return _rebuild(
            structure, self.of_leaves(tree._leaves, rule, structure, prefix, ()), tree._place
        )

    def of_leaves(
        self, leaves: Any, rule: Any, structure: Structure, prefix: Path, free: Any
    ) -> tuple[Any, ...]:
        """Returns the sharding of each leaf by its rule; those in ``free`` may go without one."""
        made = []
        for slot, (leaf, i) in enumerate(zip(leaves, rule, strict=True)):
            shape = shape_of(leaf)
            if shape is None:
                # optax masks a leaf with an empty node, which has to stay in its place.
                made.append(None if jax.tree.leaves(leaf) else leaf)
                continue
            fit = self.fits.get((i, shape))
            if fit is None:
                fit = self.fits[i, shape] = self.fit(i, shape)
            if i < 0 and not self.default and slot not in free:
                self.unmatched.append(join((*prefix, *structure.canonical[slot])))
            elif fit.problem or fit.note:
                text = f"`{join((*prefix, *structure.canonical[slot]))}` {shape} "
                if fit.problem:
                    self.problems.append(text + fit.problem)
                else:
                    self.uneven.append(text + fit.note)
            made.append(fit.sharding)
        self.ruled = self.ruled or len(made) > len(free)
        return tuple(made)

    def of_any(self, tree: Any) -> Any:
        """Returns the shardings of any pytree; trees in it go by their own names, too.

        Raises:
          RuleError: anything is wrong.
        """
        flat, treedef = jax.tree_util.tree_flatten_with_path(
            tree, is_leaf=lambda value: isinstance(value, ParamTree)
        )
        made: list[Any] = [None] * len(flat)
        items: list[tuple[Path, int]] = []
        for i, (key_path, value) in enumerate(flat):
            path = key_segments(key_path)
            if isinstance(value, ParamTree):
                made[i] = self.of_tree(whole(value), path)
            elif shape_of(value) is not None:
                items.append((path or ("value",), i))
        structure, order = build(items, {i: PARAM for _, i in items})
        self.known += names(structure)
        rule, _, unused = assign(structure, self.patterns)
        self.unused.intersection_update(unused)
        leaves = [flat[i][1] for i in order]
        free = {slot for slot, leaf in enumerate(leaves) if shape_of(leaf) == ()}
        for i, sharding in zip(order, self.of_leaves(leaves, rule, structure, (), free), strict=True):
            made[i] = sharding
        if not self.ruled:  # a state of numbers alone, or of nothing: no rule could match
            self.unused.clear()
        self.check()
        return jax.tree_util.tree_unflatten(treedef, made)

    # What there is to say

    def check(self) -> None:
        """Raises RuleError if anything is wrong."""
        problems = [no_match(self.patterns[i], self.known) for i in sorted(self.unused)]
        problems += self.problems
        if self.unmatched:
            problems.append(f"no pattern matches {', '.join(self.unmatched)}; add a last rule '.*'")
        if problems:
            raise RuleError(
                f"the sharding rules do not fit the tree: {'; '.join(problems)}."
                + (
                    " To keep such dimensions whole on every device: uneven='replicate'."
                    if any("no multiple" in text for text in problems)
                    else ""
                )
            )

    def said(self) -> str:
        """Returns what is kept whole although a rule would divide it."""
        return f"kept whole on every device: {'; '.join(self.uneven)}." if self.uneven else ""
