"""The structure of an HDF5 file: its groups, and where its arrays are.

The reader is our own, after the format's specification. libhdf5, which h5py wraps, ends the process at
some damaged files, and opens other files that a file names. This one reads what h5py writes for plain
arrays in groups, old and new, and says of all else that it is not read. It reads no more bytes than the
file may have, so nothing in a file makes it go on forever.
"""

import os
from bisect import bisect
from collections.abc import Container, Iterator
from io import BufferedReader

from paramtree.io.formats.hdf5_messages import (
    FILTERS,
    KIND,
    LAYOUT,
    LINK,
    NOWHERE,
    SPACE,
    Chunk,
    Dataset,
    Fields,
    Group,
    HDF5Error,
    attribute,
    dataset,
    elsewhere,
    link,
    text,
    texts,
)  # fmt: skip

__all__ = ["HDF5File"]

_MAGIC = b"\x89HDF\r\n\x1a\n"
_SPARE = 2**16  # bytes that may be read in addition to those of the file
_DEEPEST = 8  # levels of an index
_LINKS, _ATTRIBUTE, _MORE, _SYMBOLS = 2, 12, 16, 17  # numbers of messages
_SOFT = 2  # the mark of a symbol that leads to another name


class HDF5File:
    """An HDF5 file.

    Args:
      file: the file.
      texts: the names of attributes whose texts are read.

    Attributes:
      size: its size in bytes.
      root: the address of its outermost group.
    """

    def __init__(self, file: BufferedReader, texts: Container[str] = ()) -> None:
        self._file, self._texts = file, texts
        self._heaps: dict[int, dict[int, bytes]] = {}
        self.size = os.fstat(file.fileno()).st_size
        self._left = 2 * self.size + _SPARE
        fields = self._fields(0, min(self.size, 96), _MAGIC)
        version = fields.expect(0, 1, 2, 3)
        fields.take(4 if version < 2 else 0)
        if fields.take(2) != b"\x08\x08":
            raise HDF5Error("has addresses that are not of 8 bytes, which is not read")
        fields.at = {0: 24, 1: 28}.get(version, 12)
        if fields.number(8):
            raise HDF5Error("has addresses that do not start at its beginning, which is not read")
        fields.take(8)
        if (end := fields.number(8)) > self.size:
            raise HDF5Error(f"is truncated: it has {self.size} bytes of {end}")
        fields.take(16 if version < 2 else 0)
        self.root = fields.number(8)

    def object(self, at: int) -> Group | Dataset:
        """Returns the group or array with its header at an address.

        Raises:
          HDF5Error: it is neither, or damaged, or of a kind that is not read.
        """
        parts: dict[int, Fields] = {}
        attributes: dict[str, list[str]] = {}
        links: list[tuple[int, str, int]] = []
        for kind, fields in self._messages(at):
            if kind == LINK:
                links.append(link(fields))
            elif kind == _ATTRIBUTE:
                name, value = attribute(fields)
                wanted = value is not None and name in self._texts
                attributes[name] = texts(value, self._shared) if value and wanted else []
            else:
                parts[kind] = fields
        if LAYOUT in parts:
            return dataset(parts, attributes)
        if not parts.keys() & {_LINKS, _SYMBOLS}:
            raise HDF5Error("is neither a group nor an array")
        tracked = False
        if _SYMBOLS in parts:
            tree, heap = parts[_SYMBOLS].numbers(2, 8)
            links += [(0, *pair) for pair in self._symbols(tree, heap)]
        if _LINKS in parts:
            fields = parts[_LINKS]
            fields.expect(0)
            tracked = bool(fields.number(1) & 1)
            fields.take(8 if tracked else 0)
            heap, tree = fields.numbers(2, 8)
            links += self._dense(heap, tree) if heap != NOWHERE else []
        if tracked:
            links.sort(key=lambda link: link[0])
        return Group([(name, where) for _, name, where in links], tracked, attributes)

    def chunks(self, found: Dataset) -> Iterator[Chunk]:
        """Yields the chunks of an array that were written."""
        if found.only is not None:
            yield found.only
        elif found.index != NOWHERE:
            count = len(found.block or ()) + 1
            for key, begin in self._nodes(found.index, 1, 8 + 8 * count):
                fields = Fields(key)
                size, skipped = fields.numbers(2, 4)
                yield Chunk(fields.numbers(count - 1, 8), skipped, begin, size)

    def _take(self, at: int, size: int) -> bytes:
        if at + size > self.size:
            raise HDF5Error(f"is damaged: {size} bytes at {at} are past the end")
        self._count(size)
        self._file.seek(at)
        return self._file.read(size)

    def _count(self, size: int) -> None:
        """Counts bytes as read. Each is read once, and names once more."""
        self._left -= size
        if self._left < 0:
            raise HDF5Error("is damaged: its parts overlap")

    def _fields(self, at: int, size: int, mark: bytes) -> Fields:
        """Returns the fields of a part that begins with a mark."""
        data = self._take(at, size)
        if not data.startswith(mark):
            raise HDF5Error(f"is damaged: there is no {mark!r} at {at}")
        return Fields(data, len(mark))

    def _messages(self, at: int) -> Iterator[tuple[int, Fields]]:
        """Yields what the header of an object says: kinds of messages and their fields."""
        head = Fields(self._take(at, 16))
        new = head.data.startswith(b"OHDR")
        flags = 0
        if new:
            head.take(4)
            head.expect(2)
            flags = head.number(1)
            begin = at + 6 + 16 * (flags >> 5 & 1) + 4 * (flags >> 4 & 1)
            width = 1 << (flags & 3)
            blocks = [(begin + width, int.from_bytes(self._take(begin, width), "little"))]
        else:
            head.expect(1)
            head.take(7)
            blocks = [(at + 16, head.number(4))]
        while blocks:
            block = Fields(self._take(*blocks.pop()))
            tracked = 2 if new and flags & 4 else 0  # bytes that tell the order of creation
            while block.left >= (4 + tracked if new else 8):
                kind, size = block.number(1 if new else 2), block.number(2)
                shared = block.number(1) & 2
                block.take(tracked if new else 3)
                fields = Fields(block.take(size))
                if kind == _MORE:
                    where, size = fields.numbers(2, 8)
                    if new:  # between a mark and a checksum
                        self._fields(where, 4, b"OCHK")
                    blocks.append((where + 4, max(size - 8, 0)) if new else (where, size))
                elif shared and kind in (SPACE, KIND, FILTERS, LAYOUT, LINK):
                    raise HDF5Error("shares its dtype with another, which is not read")
                else:
                    yield kind, fields

    def _shared(self, heap: int, index: int) -> bytes:
        """Returns a text of a length of its own, which is in a heap that objects share."""
        if heap not in self._heaps:
            fields = self._fields(heap, 16, b"GCOL")
            fields.expect(1)
            fields.take(3)
            fields = Fields(self._take(heap + 16, max(fields.number(8) - 16, 0)))
            found = self._heaps[heap] = {}
            while fields.left >= 16:
                number, _, size = fields.number(2), fields.number(6), fields.number(8)
                if not number:  # what is left is free
                    break
                found[number] = fields.take(size)
                fields.take(min(-size % 8, fields.left))
        text = self._heaps[heap].get(index, b"")
        self._count(len(text))
        return text

    # Groups of the old kind: a tree of tables of symbols, with their names in a heap

    def _symbols(self, tree: int, heap: int) -> Iterator[tuple[str, int]]:
        fields = self._fields(heap, 32, b"HEAP")
        fields.expect(0)
        fields.take(3)
        size, _, begin = fields.numbers(3, 8)
        names = self._take(begin, size)
        for _, table in self._nodes(tree, 0, 8):
            fields = self._fields(table, 8, b"SNOD")
            fields.take(2)
            entries = Fields(self._take(table + 8, 40 * fields.number(2)))
            while entries.left:
                start, where, mark = *entries.numbers(2, 8), entries.number(4)
                entries.take(20)
                end = max(names.find(b"\0", start), start)
                self._count(end - start)
                name = text(names[start:end])
                if mark == _SOFT:
                    raise elsewhere(name)
                yield name, where

    def _nodes(
        self, at: int, kind: int, key: int, above: int = _DEEPEST
    ) -> Iterator[tuple[bytes, int]]:
        """Yields the keys and addresses in a tree of the old kind."""
        fields = self._fields(at, 24, b"TREE")
        fields.expect(kind)
        level, count = fields.number(1), fields.number(2)
        if level >= above:
            raise HDF5Error("is damaged: an index in it is too deep")
        body = Fields(self._take(at + 24, count * (key + 8)))
        for _ in range(count):
            first, below = body.take(key), body.number(8)
            if level:
                yield from self._nodes(below, kind, key, level)
            else:
                yield first, below

    # Large groups of the new kind: a tree of places in a heap of messages

    def _dense(self, heap: int, tree: int) -> Iterator[tuple[int, str, int]]:
        fields = self._fields(heap, 142, b"FRHP")
        fields.expect(0)
        length, filtered = fields.numbers(2, 2)
        fields.at = 110
        width, first, most = fields.number(2), fields.number(8), fields.number(8)
        bits, _, root, rows = fields.number(2), fields.number(2), fields.number(8), fields.number(2)
        if (
            filtered
            or length != 7
            or bits != 32
            or rows > 32
            or not 0 < first <= most < 2**32
            or width > 64
        ):
            raise HDF5Error("has a group that is stored in a way that is not read")
        starts = [(0, root, first)]  # the first byte of each block, its address and its size
        if rows:
            block = self._fields(root, 17 + 8 * rows * width, b"FHIB")
            block.take(13)
            starts, begin = [], 0
            for row in range(rows):
                size = first << max(row - 1, 0)
                for where in block.numbers(width, 8):
                    if where != NOWHERE:
                        starts.append((begin, where, size if size <= most else 0))
                    begin += size
        for record in self._records(tree):
            place = Fields(record, 5)
            offset, size = place.number(4), place.number(2)
            begin, where, length = starts[max(bisect(starts, (offset, NOWHERE)) - 1, 0)]
            if record[4] & 0x30 or offset < begin or offset + size > begin + length:
                raise HDF5Error("has a group that is too large, or damaged")
            yield link(Fields(self._take(where + offset - begin, size)))

    def _records(self, tree: int) -> Iterator[bytes]:
        """Yields the records in a tree of the new kind: a hash of a name, and a place in the heap."""
        fields = self._fields(tree, 38, b"BTHD")
        fields.expect(0)
        fields.expect(5)
        size, record, depth = fields.number(4), fields.number(2), fields.number(2)
        fields.take(2)
        root, count = fields.number(8), fields.number(2)
        if record != 11 or not 64 <= size <= 2**16 or depth > _DEEPEST:
            raise HDF5Error("is damaged: an index in it has odd records")
        # A pointer has the address of a node, and the numbers of records in and below it. These have as
        # many bytes as the most records need.
        most = total = (size - 10) // record
        counts, totals = _width(most), [0]
        for _ in range(depth):
            pointer = 8 + counts + totals[-1]
            most = (size - 10 - pointer) // (record + pointer)
            total = (most + 1) * total + most
            totals.append(_width(total))
        nodes = [(root, count, depth)]
        while nodes:
            at, count, level = nodes.pop()
            pointer = 8 + counts + totals[level - 1]
            node = self._fields(
                at,
                6 + count * record + (count + 1) * pointer * bool(level),
                b"BTIN" if level else b"BTLF",
            )
            node.take(2)
            for _ in range(count):
                yield node.take(record)
            for _ in range(count + 1 if level else 0):
                nodes.append((node.number(8), node.number(counts), level - 1))
                node.take(totals[level - 1])


def _width(number: int) -> int:
    """Returns how many bytes a number has that may be as large as this."""
    return (max(number, 1).bit_length() - 1) // 8 + 1
