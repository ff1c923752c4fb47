"""Where the leaves of a tree lie: a row for each, with the bytes that every device holds of it."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import jax
from jax.sharding import NamedSharding, Sharding

from paramtree.core.arrays import dtype_of, join, shape_of, short
from paramtree.core.errors import MismatchError
from paramtree.core.names import named
from paramtree.inspect.report import Column, Report, Table, bytes_text, plural
from paramtree.sharding.shardings import spread

__all__ = ["Place", "Places", "places", "show_sharding"]

LARGE = 2**20  # bytes


@dataclass(frozen=True)
class Place:
    """Where one leaf lies.

    Attributes:
      name: its name.
      shape: the shape of the whole of it.
      dtype: its dtype.
      spec: the axes of the mesh for each dimension, as text.
      bytes_per_device: how many bytes each device holds.
      replicated: whether it is large, and whole on each of several devices.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    bytes_per_device: int
    replicated: bool


@dataclass(frozen=True, repr=False)
class Places(Report):
    """What ``pt.show_sharding`` found.

    Attributes:
      leaves: one for each stored leaf, in order.
      total: the bytes per device of all of them.
      whole: the bytes of all of them, each once.
      above: how many bytes make a leaf large.
    """

    leaves: list[Place]
    total: int
    whole: int
    above: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain values.

        Example:
          >>> import jax, paramtree as pt
          >>> params = pt.abstract(pt.nn.Dense(8), jax.ShapeDtypeStruct((2, 4), "float32"))
          >>> mesh = jax.sharding.AbstractMesh((4,), ("model",))
          >>> found = places(params, pt.shardings(params, mesh, {".*": jax.P("model")})).to_dict()
          >>> found["total"], found["leaves"][0]["spec"]
          (40, "P('model')")
        """
        leaves = [{**asdict(leaf), "shape": list(leaf.shape)} for leaf in self.leaves]
        return {"leaves": leaves, "total": self.total, "whole": self.whole, "above": self.above}

    def table(self) -> Table:
        """Returns the leaves and the total as text."""
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
        notes = []
        if large:
            more = f" and {len(large) - 3} more" if len(large) > 3 else ""
            notes.append(
                f"Whole on every device, and above {bytes_text(self.above)}: "
                f"{', '.join(map(short, large[:3]))}{more}."
            )
        numbers = {"bytes per device"}
        titles = ("name", "shape", "dtype", "spec", "bytes per device", "")
        return Table(
            title="",
            columns=tuple(Column(title, number=title in numbers) for title in titles),
            rows=rows,
            totals=[("total per device", "", "", "", bytes_text(self.total), "")],
            notes=notes,
        )

    def __str__(self) -> str:
        return self.table().text()

    def __repr__(self) -> str:  # show_sharding has printed the table
        return f"<{plural(len(self.leaves), 'leaf', 'leaves')}, {bytes_text(self.total)} per device>"

    def _repr_html_(self) -> Any:
        return None


def places(tree: Any, shardings: Any = None, *, above: int = LARGE) -> Places:
    """Returns where the leaves of a tree lie; see ``show_sharding``, which prints it as well.

    Raises:
      MismatchError: the shardings are those of another tree, or there are only shardings.
    """
    source = named(tree, numbers=True).tree
    found: list[Any] = [getattr(leaf, "sharding", None) for leaf in source._leaves]
    if shardings is not None:
        found = spread(shardings, tree, "the shardings to show", real=False)
    if any(isinstance(leaf, Sharding) for leaf in jax.tree.leaves(tree)):
        raise MismatchError(
            "show_sharding takes a tree of arrays or shapes, and found one of shardings: give them "
            "beside it, as in pt.show_sharding(params, shardings)."
        )
    leaves, total, full = [], 0, 0
    for path, leaf, sharding in zip(source._structure.canonical, source._leaves, found, strict=True):
        shape, dtype = shape_of(leaf), dtype_of(leaf)
        if shape is None or dtype is None:
            continue
        whole_size = math.prod(shape) * dtype.itemsize
        size = whole_size
        if sharding is not None:
            size = math.prod(sharding.shard_shape(shape)) * dtype.itemsize
        several = sharding is not None and _devices(sharding) > 1
        large = several and size == whole_size > above
        leaves.append(Place(join(path), shape, str(dtype), _spec(sharding), size, large))
        total, full = total + size, full + whole_size
    return Places(leaves, total, full, above)


def show_sharding(tree: Any, shardings: Any = None, *, above: int = LARGE) -> Places:
    """Prints name, shape, spec and bytes per device of every leaf, and the total per device.

    Large leaves that are whole on each of several devices are marked.

    Args:
      tree: a parameter tree, or any other pytree, of arrays or shapes.
      shardings: a tree of shardings like it, as ``pt.shardings`` makes, or one sharding for all; the
        arrays' own if not given.
      above: how many bytes make a leaf large.

    Returns:
      What was printed, as text with ``str`` and as plain values with ``.to_dict()``.

    Raises:
      MismatchError: the shardings are those of another tree, or there are only shardings.

    Example:
      >>> import jax, paramtree as pt
      >>> params = pt.abstract(pt.nn.Dense(8), jax.ShapeDtypeStruct((2, 4), "float32"))
      >>> mesh = jax.sharding.AbstractMesh((4,), ("model",))
      >>> rules = {".*weight": jax.P("model"), ".*": None}
      >>> found = pt.show_sharding(params, pt.shardings(params, mesh, rules))
      name               shape    dtype     spec         bytes per device
      ──────────────────────────────────────────────────────────────────────
      weight             (8, 4)   float32   P('model')               32 B
      bias               (8,)     float32   P()                      32 B
      <BLANKLINE>
      total per device                                               64 B
    """
    found = places(tree, shardings, above=above)
    print(found)
    return found


def _devices(sharding: Any) -> int:
    size = sharding.mesh.size if isinstance(sharding, NamedSharding) else sharding.num_devices
    return int(size)


def _spec(sharding: Any) -> str:
    if sharding is None:
        return "none"
    if isinstance(sharding, NamedSharding):
        return f"P({', '.join(map(repr, sharding.spec))})"
    return "one device" if sharding.num_devices == 1 else type(sharding).__name__
