"""Rules to shardings: by name, over which axis of a mesh each dimension of each leaf is sharded.

jax itself shards the arrays and the work on them (``jax.sharding``, GSPMD). This module says how, with
the same rule tables as everything else. An optimizer state holds trees of the same
names as the parameters, so one table covers both.
"""

import math
import re
import warnings
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from paramtree.core.arrays import join, shape_of
from paramtree.core.errors import first_few, suggest
from paramtree.core.pytrees import Opened, is_array_or_number, open_tree
from paramtree.core.rules import UNSET, Rules, assign, check_table, resolve
from paramtree.core.structure import Structure
from paramtree.core.tree import ParamTree

__all__ = ["shardings"]

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

    In a container of parameter trees, such as an optimizer state, a pattern may match the name of a
    leaf in its own tree, ``dense0_weight``, as well as the whole name, ``0_mu_dense0_weight``. A scalar
    there that no pattern matches, such as a count of steps, is replicated. Some leaves there have
    another shape than the parameter of that name, as in ``optax.adafactor`` and ``optax.lbfgs``. Where
    its spec does not fit, ``uneven="replicate"`` replicates the leaf, or give whole names a rule that
    comes first, as in ``{".*_memory_.*": None, **rules}``.

    Args:
      tree: a parameter tree of arrays or shapes, or any other pytree.
      mesh: a ``jax.sharding.Mesh``, or an ``AbstractMesh`` where there are no such devices.
      rules: patterns to a ``jax.P`` of mesh axes, one for each dimension, such as
        ``{".*weight": P("model", None), ".*": None}``; None replicates a leaf. The first pattern that
        matches a name wins.
      axes: logical names in the specs ("vocabulary") to a mesh axis, several of them, or None.
      default: the spec of leaves that no pattern matches.
      uneven: "error", or "replicate" to replicate, with a warning, a dimension that is not a multiple
        of its axis, and a leaf that has fewer dimensions than its spec.

    Returns:
      A tree of ``jax.sharding.NamedSharding``: of the same structure, or the same container, in which
      leaves that are not arrays have None.

    Raises:
      RuleError: a pattern matches nothing, a leaf has no rule, a spec uses an axis twice or one that
        the mesh does not have, or, unless they are replicated, a spec is longer than a shape or shards
        a dimension that is not a multiple of the axis. One error lists all of these.
      ValueError: ``uneven`` is neither "error" nor "replicate".
      TypeError: ``mesh`` is not a mesh.

    Example:
      >>> import jax, paramtree as pt
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
    check_table(rules, "the sharding rules")
    work = _Work(mesh, rules, axes or {}, default, uneven == "replicate")
    if type(tree) is not ParamTree:
        result = work.of(open_tree(tree, is_array_or_number))
        _warn(work.notes())
        return result
    # Whether the rules fit depends on the shapes, not only on the structure, and reading the shapes of
    # 100,000 arrays takes milliseconds. So the result is cached for this very tree.
    source = open_tree(tree)
    key = ("shardings", mesh, work.patterns, work.specs, work.default, uneven)
    if work.problems or any(map(callable, work.patterns)):
        return work.of(source)
    held: list[Any] = source.structure.cached(key, lambda: [(lambda: None, None, "")])
    of, result, notes = held[0]  # one tuple, as another thread may ask for another tree
    if of() is not tree:
        of, result, notes = held[0] = weakref.ref(tree), work.of(source), work.notes()
    _warn(notes)
    return result


def _warn(text: str) -> None:
    if text:
        warnings.warn(text, UserWarning, stacklevel=3)


class _Fit(NamedTuple):
    """The result of a rule for a shape: the sharding, and what stays replicated and why."""

    sharding: NamedSharding
    misfit: str = ""


class _Work:
    """One pass over a tree: each spec is checked once, and each spec with each shape once."""

    def __init__(self, mesh: Any, rules: Rules, axes: Axes, default: Any, replicate: bool) -> None:
        self.mesh, self.replicate = mesh, replicate
        self.patterns = tuple(rules)
        self.default = default is not UNSET
        self.problems: list[str] = []
        named = [(repr(pattern), spec) for pattern, spec in rules.items()]
        named.append(("the default", None if default is UNSET else default))
        # The spec of a leaf that no pattern matches is the last, at -1.
        self.specs = tuple(self.spec(name, value, axes) for name, value in named)
        self.fits: dict[tuple[int, Any], _Fit] = {}
        self.misfits: dict[int, str] = {}  # by slot

    def spec(self, rule: str, value: Any, axes: Axes) -> tuple[tuple[str, ...], ...]:
        """Returns the mesh axes of each dimension."""
        if value is None:
            return ()
        if not isinstance(value, P | tuple | list):
            self.problems.append(
                f"{rule} gives {value!r}, where a spec is expected, such as P('model', None), or None"
            )
            return ()
        dimensions = []
        for entry in value:
            names = entry if isinstance(entry, tuple | list) else (entry,)
            dimensions.append(tuple(axis for name in names for axis in self.axes(rule, name, axes)))
        used = [axis for dimension in dimensions for axis in dimension]
        twice = [axis for i, axis in enumerate(used) if axis in used[:i]]
        if twice:
            self.problems.append(f"{rule} gives {value}, which uses the axis {twice[0]!r} twice")
            return ()
        return tuple(dimensions)

    def axes(self, rule: str, name: Any, axes: Axes) -> list[str]:
        """Returns the mesh axes that a name in a spec stands for."""
        value = axes[name] if isinstance(name, str) and name in axes else name
        meant = list(value) if isinstance(value, tuple | list) else [] if value is None else [value]
        for axis in meant:
            if axis not in self.mesh.axis_names:
                known = [*self.mesh.axis_names, *axes]
                source = f", which axes= gives for {name!r}" if value is not name else ""
                close = suggest(axis, known) if isinstance(axis, str) else ""
                self.problems.append(
                    f"{rule} has {axis!r}{source}: not an axis of the mesh, which has "
                    f"{', '.join(map(repr, self.mesh.axis_names))}{f'.{close}' if close else ''}"
                )
        return [axis for axis in meant if axis in self.mesh.axis_names]

    def fit(self, rule: int, shape: tuple[int, ...]) -> _Fit:
        """Returns the sharding of a shape by a rule."""
        axes = self.specs[rule]
        shown = "the default" if rule < 0 else f"the rule {self.patterns[rule]!r}"
        if any(axes) and len(axes) > len(shape):
            dimensions = f"{len(axes)} dimension{'s' if len(axes) > 1 else ''}"
            misfit = f"is {len(shape)}-dimensional, and {shown} has {dimensions}"
            return _Fit(NamedSharding(self.mesh, P()), misfit)
        entries: list[Any] = []
        odd = []
        for dimension, (size, used) in enumerate(zip(shape, axes, strict=False)):
            count = math.prod(self.mesh.shape[axis] for axis in used)
            entry = used[0] if len(used) == 1 else used or None
            if size % count:
                odd.append(
                    f"dimension {dimension}, of {size}, is not a multiple of {count}, the size of "
                    f"{entry!r}"
                )
                entry = None
            entries.append(entry)
        spec: Any = P(*entries)
        return _Fit(NamedSharding(self.mesh, spec), f"{'; '.join(odd)} ({shown})" if odd else "")

    def of(self, source: Opened) -> Any:
        """Returns the shardings of a tree.

        Raises:
          RuleError: the rules do not fit the tree.
        """
        structure, leaves = source.structure, source.leaves
        shapes = [shape_of(leaf) for leaf in leaves]
        free = {
            slot
            for slot, (kind, shape) in enumerate(zip(source.kinds, shapes, strict=True))
            if shape is None or (kind is None and shape == ())
        }
        rules = dict(zip(self.patterns, self.specs, strict=False))
        if source.containers and len(free) == len(leaves):
            rules = {}  # a state of scalars alone, or of nothing: no rule could match
        assigned = assign(source, tuple(rules), nested=True)
        for slot, (i, shape) in enumerate(zip(assigned.rules, shapes, strict=True)):
            if shape is None:
                continue
            fit = self.fits.get((i, shape)) or self.fits.setdefault((i, shape), self.fit(i, shape))
            if fit.misfit and (i >= 0 or slot not in free):
                name = join(source.place + structure.canonical[slot])
                self.misfits[slot] = f"`{name}` {shape} {fit.misfit}"
        refused = bool(self.misfits) and not self.replicate
        resolve(
            source,
            rules,
            "the sharding rules",
            default=self.specs[-1] if self.default else UNSET,
            nested=True,
            free=free,
            problems=[*self.problems, *([*self.misfits.values()] if refused else [])],
            advice=self.advice(structure) if refused else "",
        )
        pairs = zip(assigned.rules, shapes, strict=True)
        placed = [None if shape is None else self.fits[i, shape].sharding for i, shape in pairs]
        return source.restore(placed, None)

    def advice(self, structure: Structure) -> str:
        """Returns what to do about leaves that their rules do not fit."""
        first = next(iter(self.misfits))
        entries = zip(structure.entries(), structure.names(), strict=True)
        # All names of a tied leaf need the same value.
        pattern = "|".join(re.escape(name) for (_, slot), name in entries if slot == first)
        return (
            " To replicate what does not fit: uneven='replicate', or, for this tree, a first rule for "
            f"each such name, as in {{{pattern!r}: None, ...}}."
        )

    def notes(self) -> str:
        """Returns the warning about what is replicated although a rule would shard it."""
        return (
            f"replicated on every device: {first_few([*self.misfits.values()])}."
            if self.misfits
            else ""
        )
