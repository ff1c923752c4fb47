"""Flax's msgpack files: nested maps, with each array as its shape, its dtype and its bytes.

The reader is our own. It notes where the bytes of arrays are and skips them, so that listing a file of
gigabytes reads kilobytes and a slice of an array is read alone. The package ``msgpack`` would build
every array in memory.
"""

import os
import struct
from functools import partial
from io import BufferedReader
from typing import Any, NamedTuple, NoReturn

import numpy as np

from paramtree.core.structure import STATE
from paramtree.io.formats.format import Format
from paramtree.io.layout import DEEPEST
from paramtree.io.pieces import Span, read_pieces, read_pieces_part
from paramtree.io.source import (
    Source,
    Stored,
    check_name,
    check_shape,
    fail,
    read_part,
    read_span,
    shortened,
)  # fmt: skip
from paramtree.io.transforms import natural
from paramtree.io.wire import to_dtype

__all__ = ["FORMAT"]

_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3  # Flax's types of extensions
_CHUNKED = "__msgpack_chunked_array__"  # the first key of an array in pieces
_STATE = "batch_stats/"  # Flax's collection of running statistics
# A number takes a byte in a file and hundreds in memory, and a name repeats those of its levels. A file
# may have this many numbers and texts, and this many letters in its names; more if it is large.
_SINGLES, _LETTERS = 2**12, 2**18


class Flax(Format):
    """Flax's ``.msgpack``, as ``flax.serialization`` writes it."""

    name = "flax"
    endings = (".msgpack",)
    keeps = frozenset(("slices", "shards"))
    writes = False

    def recognises(self, path: str, head: bytes) -> bool:
        """Returns whether a file is a map whose first key is a text or, by the ending, any map.

        A pickle begins with what is an empty map in msgpack, and goes on.
        """
        if not head or _HEADS[head[0]].kind != "map":
            return False
        if head == b"\x80" or path.lower().endswith(self.endings):
            return True
        first = 1 + struct.calcsize(_HEADS[head[0]].code)
        kind, code, size = _HEADS[head[first]] if head[first:] else _HEADS[0]
        begin = first + 1 + struct.calcsize(code)
        size = int.from_bytes(head[first + 1 : begin]) if code else int(size)
        key = head[begin : begin + size]
        named = kind == "text" and 0 < size == len(key)
        return head[0] != 0x80 and named and key.isascii() and key.decode().isprintable()

    def read(self, path: str, file: BufferedReader) -> Source:
        """Opens a file. Levels are joined with "/", and the entries of a list are numbered.

        Texts are metadata; None, and levels of nothing, are left out.
        """
        reader = _Reader(path, file)
        reader.value("", 0)
        if reader.left:
            fail(path, f"at byte {file.tell()}", f"{reader.left} bytes follow the end.")
        return Source(
            path,
            self,
            reader.arrays,
            kinds={name: STATE for name in reader.arrays if name.startswith(_STATE)},
            unordered=reader.sorted,  # jax sorts the keys of dicts: that order means nothing
            metadata=reader.texts,
            notes=reader.notes,
        )


class _Head(NamedTuple):
    """What the first byte of a value says: its kind, and its length or value, or how that is packed."""

    kind: str
    code: str  # of struct
    value: Any = 0


def _heads() -> list[_Head]:
    """Returns the head for each first byte, as in msgpack's specification."""
    heads = [_Head("number", "", i) for i in range(0x80)]
    heads += [_Head(kind, "", i) for kind in ("map", "list") for i in range(16)]
    heads += [_Head("text", "", i) for i in range(32)]
    heads += [_Head("nothing", ""), _Head("unknown", "")]
    heads += [_Head("number", "", flag) for flag in (False, True)]
    heads += [_Head(kind, code) for kind in ("bytes", "extension") for code in "BHI"]
    heads += [_Head("number", code) for code in "fdBHIQbhiq"]
    heads += [_Head("extension", "", 2**i) for i in range(5)]
    heads += [_Head("text", code) for code in "BHI"]
    heads += [_Head(kind, code) for kind in ("list", "map") for code in "HI"]
    return heads + [_Head("number", "", i - 0x100) for i in range(0xE0, 0x100)]


_HEADS = _heads()


class _Array(NamedTuple):
    """An array in the file, or a piece of one."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    span: Span


class _Reader:
    """Reads msgpack sequentially, checks every size against the bytes left, and skips arrays.

    Attributes:
      left: the bytes that are not read yet.
      arrays: the arrays and numbers by name.
      texts: the texts by name.
      notes: what was left out.
      sorted: whether the keys of every map are in order.
    """

    def __init__(self, path: str, file: BufferedReader) -> None:
        self.path, self.file = path, file
        self.left = os.fstat(file.fileno()).st_size
        self.singles, self.letters = _SINGLES + self.left // 256, _LETTERS + self.left
        self.arrays: dict[str, Stored] = {}
        self.texts: dict[str, str] = {}
        self.notes: list[str] = []
        self.sorted = True

    def fail(self, name: str, problem: str) -> NoReturn:
        fail(self.path, repr(shortened(name, 80)) if name else "the root", problem)

    # Bytes

    def advance(self, size: int, name: str) -> None:
        """Counts the next bytes as read."""
        if size > self.left:
            self.fail(name, f"is truncated: needs {size} bytes, but {self.left} are left.")
        self.left -= size

    def take(self, size: int, name: str) -> bytes:
        """Returns the next bytes."""
        self.advance(size, name)
        return self.file.read(size)

    def skip(self, size: int, name: str) -> Span:
        """Skips the next bytes."""
        self.advance(size, name)
        begin = self.file.tell()
        self.file.seek(size, os.SEEK_CUR)
        return Span(begin, size)

    def text(self, size: int, name: str) -> str:
        try:
            return self.take(size, name).decode()
        except UnicodeDecodeError:
            self.fail(name, "has a text that is not utf-8.")

    def head(self, name: str) -> tuple[str, Any]:
        """Returns the kind of the next value, and its length, or itself if it is a number."""
        kind, code, value = _HEADS[self.take(1, name)[0]]
        if code:
            (value,) = struct.unpack(f">{code}", self.take(struct.calcsize(code), name))
        return kind, np.float32(value) if code == "f" else value

    def expect(self, kind: str, name: str, what: str) -> Any:
        """Returns the length of the next value, or itself, which has to be of a kind."""
        found, value = self.head(name)
        if found != kind:
            self.fail(name, f"is damaged: expected {what}, found a {found}.")
        return value

    # Values

    def value(self, name: str, depth: int) -> None:
        """Reads a value, and whatever is below it."""
        kind, size = self.head(name)
        if not depth and kind != "map":
            self.fail(name, f"is a {kind}, not a map of names to arrays.")
        if kind in ("text", "bytes", "number"):
            self.singles -= 1
            if self.singles < 0:
                self.fail(
                    name, "and those before it are too many single numbers: write them as one array."
                )
        if kind == "map":
            self.map(size, name, depth)
        elif kind == "list":
            for i in range(size):
                self.value(self.below(name, str(i), depth), depth + 1)
        elif kind == "text":
            self.texts[name] = self.text(size, name)
        elif kind == "bytes":
            self.skip(size, name)
            self.notes.append(f"{name}: {size} bytes that are no array, left out")
        elif kind == "number":
            self.add(name, _number(size))
        elif kind == "extension":
            self.extension(size, name)
        elif kind == "unknown":
            self.fail(name, "is damaged: it begins with a byte that msgpack does not have.")

    def map(self, count: int, name: str, depth: int) -> None:
        """Reads the entries of a map, which may be the pieces of an array."""
        keys: list[str] = []
        for i in range(count):
            key = self.key(name)
            if key == _CHUNKED and i == 0 and name:
                self.add(name, self.chunked(count - 1, name))
                return
            keys.append(key)
            self.value(self.below(name, key, depth), depth + 1)
        self.sorted &= keys == sorted(keys) or keys == sorted(keys, key=natural)

    def key(self, name: str) -> str:
        kind, size = self.head(name)
        if kind not in ("text", "number"):
            self.fail(name, f"has a key that is a {kind}, not a name.")
        return self.text(size, name) if kind == "text" else str(size)

    def below(self, name: str, key: str, depth: int) -> str:
        """Returns the name of an entry."""
        joined = f"{name}/{key}" if name else key
        check_name(self.path, joined)
        self.letters -= len(joined)
        if depth >= DEEPEST:
            self.fail(joined, f"is nested deeper than {DEEPEST} levels.")
        if self.letters < 0:
            self.fail(joined, "and the names before it are longer than the file.")
        return joined

    def add(self, name: str, stored: Stored) -> None:
        if name in self.arrays:
            self.fail(name, "appears twice.")
        self.arrays[name] = stored

    # Arrays

    def extension(self, size: int, name: str) -> None:
        """Reads an array, a scalar of numpy or a complex number."""
        (code,) = struct.unpack("b", self.take(1, name))
        if code in (_ARRAY, _SCALAR):
            shape, dtype, (begin, _) = self.array(size, name)
            where = self.path, self.file, begin, dtype, shape
            self.add(
                name,
                Stored(shape, dtype, partial(read_span, *where), False, partial(read_part, *where)),
            )
        elif code == _COMPLEX:
            end = self.left - size
            pair = self.expect("list", name, "two numbers") == 2
            parts = [self.expect("number", name, "two numbers") for _ in range(2)] if pair else []
            if not pair or self.left != end:
                self.fail(name, "is damaged: it is not the two parts of a complex number.")
            self.add(name, _number(complex(*parts)))
        else:
            self.skip(size, name)
            self.notes.append(f"{name}: an extension of type {code}, left out")

    def array(self, size: int, name: str) -> _Array:
        """Reads where an array is: a list of its shape, the name of its dtype, and its bytes."""
        end = self.left - size
        if self.expect("list", name, "an array") != 3:
            self.fail(name, "is damaged: an array is its shape, its dtype and its bytes.")
        count = self.expect("list", name, "a shape")
        if count > 32:
            self.fail(name, f"has {count} axes.")
        shape = tuple(self.axis(name) for _ in range(count))
        code = self.text(self.expect("text", name, "a dtype"), name)
        try:
            dtype = to_dtype(code)
        except ValueError:
            self.fail(name, f"has dtype {shortened(code, 80)!r}: only numbers and booleans are read.")
        span = self.skip(self.expect("bytes", name, "the bytes of an array"), name)
        if self.left != end:
            self.fail(name, "is damaged: it is not as long as it says.")
        self.check(name, shape, dtype, span.size)
        return _Array(shape, dtype, span)

    def axis(self, name: str) -> int:
        number = self.expect("number", name, "the length of an axis")
        if type(number) is not int:
            self.fail(name, f"has an axis of length {number}.")
        return number

    def check(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], size: int) -> None:
        needed = check_shape(self.path, repr(shortened(name, 80)), shape, dtype)
        if size != needed:
            self.fail(name, f"has {size} bytes; its shape {shape} needs {needed}.")

    def chunked(self, fields: int, name: str) -> Stored:
        """Reads where the pieces of an array are, which Flax cuts as it is too large for msgpack."""
        self.expect("number", name, "a mark of pieces")
        shape: tuple[int, ...] = ()
        parts: list[_Array] = []
        for _ in range(fields):
            field = self.key(name)
            count = self.expect("map", name, "the pieces of an array")
            if field == "shape" and count <= 32:
                shape = tuple(self.axis(name) for i in range(count) if self.numbered(i, name))
            elif field == "chunks":
                parts = [self.piece(name) for i in range(count) if self.numbered(i, name)]
            else:
                self.fail(
                    name, f"is damaged: {shortened(field, 80)!r} is among the pieces of an array."
                )
        if not parts or any(len(p.shape) != 1 or p.dtype != parts[0].dtype for p in parts):
            self.fail(name, "is damaged: it has no pieces, or they do not fit each other.")
        spans = [part.span for part in parts]
        self.check(name, shape, parts[0].dtype, sum(span.size for span in spans))
        where = self.path, self.file, spans, parts[0].dtype, shape
        return Stored(
            shape,
            parts[0].dtype,
            partial(read_pieces, *where),
            False,
            partial(read_pieces_part, *where),
        )

    def numbered(self, i: int, name: str) -> bool:
        """Reads a key that has to be a number, and returns that it is."""
        if self.key(name) != str(i):
            self.fail(name, "is damaged: the pieces of the array are not numbered in order.")
        return True

    def piece(self, name: str) -> _Array:
        size = self.expect("extension", name, "a piece of an array")
        if self.take(1, name)[0] != _ARRAY:
            self.fail(name, "is damaged: a piece of the array is none.")
        return self.array(size, name)


def _number(value: Any) -> Stored:
    array = np.asarray(value)
    return Stored((), array.dtype, array.copy)


FORMAT = Flax()
