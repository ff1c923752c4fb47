"""What the headers of HDF5's objects say: the messages in them, after the format's specification."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = [
    "FILTERS", "KIND", "LAYOUT", "LINK", "NOWHERE", "SPACE", "Chunk", "Dataset", "Fields", "Group",
    "HDF5Error", "Kind", "Value", "attribute", "dataset", "elsewhere", "link", "text", "texts",
]  # fmt: skip

NOWHERE = 2**64 - 1  # the address of what was never written
SPACE, KIND, LINK, LAYOUT, FILTERS = 1, 3, 6, 8, 11  # numbers of messages
_EXTERNAL = 7
_TEXT, _SERIES = 3, 9  # the classes of texts of one size, and of as many letters as each has


class HDF5Error(Exception):
    """What is wrong with a file, or is not read."""


class Kind(NamedTuple):
    """A dtype: HDF5's class of it, its size in bytes, its flags and its other properties."""

    number: int
    size: int
    flags: int
    properties: bytes


class Chunk(NamedTuple):
    """A block of an array: where it is in the array and in the file, and which filters it skipped."""

    at: tuple[int, ...]
    skipped: int
    begin: int
    size: int


class Value(NamedTuple):
    """The value of an attribute."""

    kind: Kind
    shape: tuple[int, ...] | None
    fields: "Fields"


@dataclass
class Group:
    """A group.

    Attributes:
      links: the names in it, and the addresses of what they lead to.
      tracked: whether they are in the order of their creation.
      attributes: the names of its attributes, and the texts in those that are read.
    """

    links: list[tuple[str, int]]
    tracked: bool
    attributes: dict[str, list[str]]


@dataclass
class Dataset:
    """An array, contiguous or in chunks.

    Attributes:
      kind: its dtype.
      shape: its shape; None if it has no value.
      attributes: as of a group.
      begin: where its values are; None if they were never written.
      size: how many bytes they have.
      block: the shape of its chunks; None if it has none.
      filters: the numbers of the filters that chunks pass before they are written.
      index: where its chunks are listed.
      only: its chunk, if there is just one, and no list.
    """

    kind: Kind
    shape: tuple[int, ...] | None
    attributes: dict[str, list[str]]
    begin: int | None = None
    size: int = 0
    block: tuple[int, ...] | None = None
    filters: list[int] = field(default_factory=list)
    index: int = NOWHERE
    only: Chunk | None = None


class Fields:
    """Reads numbers from bytes."""

    def __init__(self, data: bytes, at: int = 0) -> None:
        self.data, self.at = data, at

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, size: int) -> bytes:
        self.at += size
        if self.at > len(self.data):
            raise HDF5Error("is damaged: a part of it ends too early")
        return self.data[self.at - size : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def numbers(self, count: int, size: int) -> tuple[int, ...]:
        return tuple(self.number(size) for _ in range(count))

    def expect(self, *values: int) -> int:
        """Reads a byte, such as a version, that has one of some values."""
        value = self.number(1)
        if value not in values:
            raise HDF5Error(f"has a part of version {value}, which is not read")
        return value


def text(data: bytes) -> str:
    """Returns a name or another text."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise HDF5Error("is damaged: a name in it is not utf-8") from None


def elsewhere(name: str) -> HDF5Error:
    """Returns the error of a link that does not lead to an object in the file."""
    return HDF5Error(f"has {name!r}, a link to another name or file: only arrays in the file are read")


def link(fields: Fields) -> tuple[int, str, int]:
    """Returns the place in the order of creation, the name and the address of a link."""
    fields.expect(1)
    flags = fields.number(1)
    hard = not (flags & 8 and fields.number(1))
    order = fields.number(8) if flags & 4 else 0
    fields.take(1 if flags & 16 else 0)
    name = text(fields.take(fields.number(1 << (flags & 3))))
    if not hard:
        raise elsewhere(name)
    return order, name, fields.number(8)


def _kind(fields: Fields) -> Kind:
    first, flags, size = fields.number(1), fields.number(3), fields.number(4)
    return Kind(first & 15, size, flags, fields.take(fields.left))


def _shape(fields: Fields) -> tuple[int, ...] | None:
    version, count, _ = fields.expect(1, 2), fields.number(1), fields.number(1)
    none = version == 2 and fields.number(1) == 2
    fields.take(5 if version == 1 else 0)
    return None if none else fields.numbers(count, 8)


def attribute(fields: Fields) -> tuple[str, Value | None]:
    """Returns the name of an attribute, and its value if that is on its own."""
    version = fields.expect(1, 2, 3)
    shared = fields.number(1) and version > 1
    sizes = fields.numbers(3, 2)
    fields.take(1 if version == 3 else 0)
    name, kind, shape = (fields.take(-(-n // 8) * 8 if version == 1 else n) for n in sizes)
    label = text(name.split(b"\0")[0])
    return label, None if shared else Value(_kind(Fields(kind)), _shape(Fields(shape)), fields)


def texts(value: Value, shared: Callable[[int, int], bytes]) -> list[str]:
    """Returns the texts in an attribute, of a fixed size or in a heap; nothing of other kinds."""
    kind, shape, fields = value
    if kind.number not in (_TEXT, _SERIES) or not kind.size or not shape:
        return []
    found = []
    for _ in range(min(shape[0], fields.left // kind.size)):
        data = fields.take(kind.size)
        if kind.number == _SERIES:
            where = Fields(data)
            _, heap, index = where.number(4), where.number(8), where.number(4)
            data = shared(heap, index)
        found.append(text(data.rstrip(b"\0")))
    return found


def _filters(fields: Fields) -> list[int]:
    """Returns the numbers of the filters in a pipeline."""
    version, count = fields.expect(1, 2), fields.number(1)
    fields.take(6 if version == 1 else 0)
    found = []
    for _ in range(count):
        number = fields.number(2)
        length = fields.number(2) if version == 1 or number >= 256 else 0
        _, values = fields.numbers(2, 2)
        fields.take(-(-length // 8) * 8 if version == 1 else length)
        fields.take(4 * (values + (values % 2 if version == 1 else 0)))
        found.append(number)
    return found


def dataset(parts: dict[int, Fields], attributes: dict[str, list[str]]) -> Dataset:
    """Returns what the header of an array says, whose messages are given by number."""
    if _EXTERNAL in parts:
        raise HDF5Error("has its values in another file, which is not read: copy them into one")
    if KIND not in parts or SPACE not in parts:
        raise HDF5Error("is damaged: an array has no dtype or no shape")
    found = Dataset(_kind(parts[KIND]), _shape(parts[SPACE]), attributes)
    found.filters = _filters(parts[FILTERS]) if FILTERS in parts else []
    fields = parts[LAYOUT]
    version, layout = fields.expect(3, 4, 5), fields.number(1)
    if layout == 3:
        raise HDF5Error("is virtual, with its values in other files: copy them into one")
    if layout == 1:
        begin, found.size = fields.numbers(2, 8)
        found.begin = None if begin == NOWHERE else begin
    elif layout == 2 and version == 3:
        count, found.index = fields.number(1), fields.number(8)
        found.block = fields.numbers(count, 4)[:-1]
    elif layout == 2:
        flags, count, width = fields.number(1), fields.number(1), fields.number(1)
        *block, itemsize = fields.numbers(max(count, 1), width)
        found.block = tuple(block)
        if fields.number(1) != 1:  # a single chunk
            raise HDF5Error(
                "lists its chunks as in libver='latest', which is not read: write it without"
            )
        size, skipped = math.prod(block) * itemsize, 0
        if flags & 2:
            size, skipped = fields.number(8), fields.number(4)
        begin = fields.number(8)
        found.only = None if begin == NOWHERE else Chunk((0,) * len(block), skipped, begin, size)
    else:
        raise HDF5Error(
            "has its values in its header, which is not read: write it with h5py's defaults"
        )
    return found
