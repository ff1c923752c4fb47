"""How the leaves of a tree are sharded, with the bytes of each on every device."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import jax
from jax.sharding import NamedSharding, Sharding

from paramtree.core.arrays import dtype_of, join, shape_of
from paramtree.core.errors import MismatchError
from paramtree.core.pytrees import is_array_or_number, open_tree
from paramtree.inspect.report import Report, Table, bytes_text, plural, some
from paramtree.sharding.place import spread

__all__ = ["Place", "Places", "places", "show_sharding"]

LARGE = 2**20  # bytes


@dataclass(frozen=True)
class Place:
    """How one leaf is sharded."""

    name: str
    shape: tuple[int, ...]  # the global shape
    dtype: str
    spec: str  # the partition spec, as text
    bytes_per_device: int
    replicated: bool  # whether it is large and fully replicated over several devices


@dataclass(frozen=True, repr=False)
class Places(Report):
    """The result of ``pt.show_sharding``.

    Attributes:
      leaves: one entry for each stored leaf, in order.
      total: the bytes of all leaves per device.
      whole: the bytes of all leaves unsharded.
      above: the size in bytes above which a leaf is large.
    """

    leaves: list[Place]
    total: int
    whole: int
    above: int

    def to_dict(self) -> dict[str, Any]:
        leaves = [{**asdict(leaf), "shape": list(leaf.shape)} for leaf in self.leaves]
        return {"leaves": leaves, "total": self.total, "whole": self.whole, "above": self.above}

    def table(self) -> Table:
        rows: list[tuple[str, ...]] = [
            (
                leaf.name,
                str(leaf.shape),
                leaf.dtype,
                leaf.spec,
                bytes_text(leaf.bytes_per_device),
                "replicated" if leaf.replicated else "",
            )
            for leaf in self.leaves
        ]
        large = [leaf.name for leaf in self.leaves if leaf.replicated]
        above = bytes_text(self.above)
        return Table(
            title="",
            columns=("name", "shape", "dtype", "spec", "bytes per device", ""),
            rows=rows,
            numbers=("bytes per device",),
            totals=[("total per device", "", "", "", bytes_text(self.total), "")],
            notes=[f"Replicated on every device, and above {above}: {some(large, 3)}."]
            if large
            else [],
        )

    def __str__(self) -> str:
        return self.table().text()

    def __repr__(self) -> str:  # show_sharding has printed the table
        return f"<{plural(len(self.leaves), 'leaf', 'leaves')}, {bytes_text(self.total)} per device>"

    def _repr_html_(self) -> Any:
        return None


def places(tree: Any, shardings: Any = None, *, above: int = LARGE) -> Places:
    """Returns how the leaves of a tree are sharded; ``show_sharding`` also prints it."""
    source = open_tree(tree, is_array_or_number)
    by_leaf: list[Any] = [getattr(leaf, "sharding", None) for leaf in source.leaves]
    if shardings is not None:
        by_leaf = spread(shardings, tree, "the shardings to show", real=False)
    if any(isinstance(leaf, Sharding) for leaf in jax.tree.leaves(tree)):
        raise MismatchError(
            "show_sharding takes a tree of arrays or shapes, but found one of shardings: pass both, as "
            "in pt.show_sharding(params, shardings)."
        )
    leaves, total, whole = [], 0, 0
    for path, leaf, sharding in zip(source.structure.canonical, source.leaves, by_leaf, strict=True):
        shape, dtype = shape_of(leaf), dtype_of(leaf)
        if shape is None or dtype is None:
            continue
        full = math.prod(shape) * dtype.itemsize
        size = full if sharding is None else math.prod(sharding.shard_shape(shape)) * dtype.itemsize
        large = sharding is not None and sharding.num_devices > 1 and size == full > above
        leaves.append(Place(join(path), shape, str(dtype), _spec(sharding), size, large))
        total, whole = total + size, whole + full
    return Places(leaves, total, whole, above)


def show_sharding(tree: Any, shardings: Any = None, *, above: int = LARGE) -> Places:
    """Prints name, shape, dtype, spec and bytes per device of every leaf, and the total per device.

    Large leaves that are replicated over several devices are marked.

    Args:
      tree: a parameter tree, or any other pytree, of arrays or shapes.
      shardings: a matching tree of shardings, as from ``pt.shardings``, or one sharding for all leaves;
        by default those of the arrays.
      above: the size in bytes above which a leaf is large.

    Returns:
      The printed report: text with ``str``, plain values with ``.to_dict()``.

    Raises:
      MismatchError: the shardings do not fit the tree, or the tree itself is of shardings.

    Example:
      >>> import jax, paramtree as pt
      >>> params = pt.abstract(pt.nn.Dense(8), jax.ShapeDtypeStruct((2, 4), "float32"))
      >>> mesh = jax.sharding.AbstractMesh((4,), ("model",))
      >>> rules = {".*weight": jax.P("model"), ".*": None}
      >>> report = pt.show_sharding(params, pt.shardings(params, mesh, rules))
      name               shape    dtype     spec         bytes per device
      ──────────────────────────────────────────────────────────────────────
      weight             (8, 4)   float32   P('model')               32 B
      bias               (8,)     float32   P()                      32 B
      <BLANKLINE>
      total per device                                               64 B
    """
    report = places(tree, shardings, above=above)
    print(report)
    return report


def _spec(sharding: Any) -> str:
    if sharding is None:
        return "none"
    if isinstance(sharding, NamedSharding):
        return f"P({', '.join(map(repr, sharding.spec))})"
    return "one device" if sharding.num_devices == 1 else type(sharding).__name__
