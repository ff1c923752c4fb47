"""PyTorch's ``.pt``, ``.pth`` and ``.bin``: a pickle of dicts and tensors, and the bytes of storages.

A file is read without torch, and nothing in it is run or imported (see ``pickled``). A tensor is a view
of a storage (see ``tensors``), and two names of one view are a tie. Dicts and lists are levels, joined
by "." as in a state dict; numbers are arrays without axes, texts are metadata, and whatever else a
checkpoint holds is left out, with a note.
"""

import os
import re
import struct
import zipfile
from collections.abc import Iterator
from functools import partial
from io import BufferedReader
from typing import Any, NoReturn

import numpy as np

from paramtree.core.errors import LoadError
from paramtree.io.archive import check_members
from paramtree.io.formats.format import Format
from paramtree.io.formats.pickled import Entries, Global, Inert, Window, read_pickle
from paramtree.io.formats.storages import Place, Storages, sizes_of
from paramtree.io.formats.tensors import MAKERS, Array, Storage, Tensor, identified, kind_of
from paramtree.io.layout import DEEPEST
from paramtree.io.source import Source, Stored, check_array, check_name, fail, shortened

__all__ = ["FORMAT"]

_ZIP = (b"PK\3\4", b"PK\5\6")
_PICKLE = "data.pkl"  # the member of a zip file
_PICKLED = re.compile(rb"\x80[\x02-\x05]|L119547037146038801333356L\n|\([dl]p|[]}]q\0|ccollections\n")
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of files before torch 1.6
_TAR = slice(257, 262)  # where a tar file says so
_LOCAL = struct.Struct("<4s22xHH")  # the record before a member of a zip file: two lengths at its end

# Without limits a small file could make any number of objects, names and leaves, by sharing parts.
# Large files may have more.
_STEPS = 2**20  # of a pickle, and through what it made
_TENSORS, _NUMBERS = 2**14, 2**12
_LETTERS = 2**20  # of all names
_SLACK = 2**18
_SHOWN = 20  # notes
_ADVICE = "save the arrays alone, as in torch.save(model.state_dict(), path)"


class Torch(Format):
    """PyTorch's ``torch.save``, of any version since 0.1.10; read, never written."""

    name = "torch"
    endings = (".pt", ".pth", ".bin")
    keeps = frozenset(("slices", "shards"))
    writes = False

    def recognises(self, path: str, head: bytes) -> bool:
        if head[_TAR] == b"ustar":
            return head.startswith(b"sys_info\0") or path.lower().endswith(self.endings)
        return bool(_PICKLED.match(head)) or (head.startswith(_ZIP) and _has_pickle(path, head))

    def read(self, path: str, file: BufferedReader) -> Source:
        head = file.read(512)
        file.seek(0)
        if head[_TAR] == b"ustar":
            fail(
                path,
                "",
                "is a tar file, as torch wrote before 0.1.10: load it in torch and save it again.",
            )
        try:
            content, storages = (_zipped if head.startswith(_ZIP) else _legacy)(path, file)
            walk = _Walk(path, os.fstat(file.fileno()).st_size, storages)
            walk.root(content)
        except LoadError:
            raise
        except Exception as error:  # a damaged pickle or zip file raises any type
            text = shortened(str(error), 300) or type(error).__name__
            fail(path, "", f"is not a file of torch.save, or is damaged: {text}.")
        return Source(path, self, walk.arrays, ties=walk.ties, metadata=walk.texts, notes=walk.notes)


def _steps(size: int) -> int:
    return _STEPS + size // 32


# The two containers


def _is_pickle(name: str) -> bool:
    return name == _PICKLE or name.endswith("/" + _PICKLE)


def _has_pickle(path: str, head: bytes) -> bool:
    """Returns whether a zip file is one of torch's, by its first member or else by its directory."""
    try:
        length = int.from_bytes(head[26:28], "little")
        if _is_pickle(head[30 : 30 + length].decode()):
            return True
        with zipfile.ZipFile(path) as file:
            return any(map(_is_pickle, file.namelist()))
    except Exception:  # it is damaged, in one of a dozen ways
        return path.lower().endswith(FORMAT.endings)


def _zipped(path: str, file: BufferedReader) -> tuple[Any, Storages]:
    """Opens a zip file: a member with the pickle, and one for each storage."""
    archive = zipfile.ZipFile(file)
    size = file.seek(0, os.SEEK_END)
    check_members(path, archive.infolist(), size)
    members = {member.filename: member for member in archive.infolist()}
    main = next(filter(_is_pickle, members), None)
    if main is None:
        fail(path, "", f"is a zip file without {_PICKLE}, which torch.save writes.")
    prefix = main.removesuffix(_PICKLE)

    def opened(name: str) -> Window:
        member = members[name]
        if member.file_size > 2 * size + _SLACK:
            fail(path, repr(name), f"is compressed, and would take {member.file_size:,} bytes.")
        place = _place(path, file, size, archive, member)
        if place.begin is None:
            return Window(archive.open(member), member.file_size)
        file.seek(place.begin)
        return Window(file, member.file_size)

    def find(storage: Storage) -> Place:
        member = members.get(f"{prefix}data/{storage.key}")
        if member is None:
            fail(
                path, f"the storage {storage.key!r}", "is not in the file: it is damaged or incomplete."
            )
        return _place(path, file, size, archive, member)

    order = prefix + "byteorder"
    text = opened(order).read(8) if order in members else b"little"
    if text not in (b"little", b"big"):
        fail(path, repr(order), f"is {text!r}, not little or big.")
    content = read_pickle(opened(main), MAKERS, _steps(size), identified)
    return content, Storages(path, file, find, size, archive, swapped=text == b"big")


def _place(
    path: str, file: BufferedReader, size: int, archive: zipfile.ZipFile, member: zipfile.ZipInfo
) -> Place:
    """Returns where a member of a zip file is."""
    if member.compress_type != zipfile.ZIP_STORED:
        return Place(member.file_size, member.file_size, None, member)
    begin = size
    archive.open(member).close()  # compares its own record with that of the directory
    if 0 <= member.header_offset <= size - _LOCAL.size:
        file.seek(member.header_offset)
        magic, name, extra = _LOCAL.unpack(file.read(_LOCAL.size))
        begin = member.header_offset + _LOCAL.size + name + extra if magic == _ZIP[0] else size
    if begin + member.file_size > size:
        fail(path, repr(member.filename), "is not where the directory of the zip file says.")
    return Place(member.file_size, member.file_size, begin)


def _legacy(path: str, file: BufferedReader) -> tuple[Any, Storages]:
    """Opens a file of a torch before 1.6: five pickles, and then the storages one after another."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    stream = Window(file, size)
    read = partial(read_pickle, stream, MAKERS)
    magic: Any = None
    problem = ""
    try:
        magic = read(_steps(size))
    except Exception as error:
        problem = f" ({shortened(str(error), 100)})"
    if magic != _MAGIC:
        text = f"is a pickle{problem}, but not one of torch.save's. A pickle is not run"
        fail(path, "", f"{text}: save its arrays as safetensors or .npz, or with torch.save.")
    if read(_steps(size)) != _PROTOCOL:
        fail(
            path,
            "",
            "is of an unknown version of torch.save: load it in torch, and save it again.",
        )
    read(_steps(size))  # the machine that wrote it; the numbers are little-endian on all
    found: dict[str, Storage] = {}

    def noted(key: Any) -> Storage | Global:
        made = identified(key)
        if isinstance(made, Storage):
            found.setdefault(made.key, made)  # the first decides which dtype is counted
        return made

    content = read(_steps(size), noted)
    keys = read(_steps(size))
    places: dict[str, Place] = {}
    for key in keys:
        if not isinstance(key, str) or key in places or key not in found:
            fail(path, "", "lists a storage twice, or one that belongs to no tensor: it is damaged.")
        count = int.from_bytes(stream.read(8), "little", signed=True)
        nbytes = count * found[key].kind.size
        if not 0 <= nbytes <= stream.left:
            fail(
                path, f"the storage {key!r}", f"has {count} elements, but {stream.left} bytes are left."
            )
        places[key] = Place(nbytes, nbytes, size - stream.left)
        stream.left -= nbytes
        file.seek(nbytes, os.SEEK_CUR)

    def find(storage: Storage) -> Place:
        if storage.key not in places:
            fail(
                path, f"the storage {storage.key!r}", "is not in the file: it is damaged or incomplete."
            )
        return places[storage.key]

    return content, Storages(path, file, find, size)


# The objects in a pickle as arrays


class _Walk:
    """Collects the arrays, ties, texts and notes of what a pickle made."""

    def __init__(self, path: str, size: int, storages: Storages) -> None:
        self.path, self.storages = path, storages
        self.arrays: dict[str, Stored] = {}
        self.ties: dict[str, str] = {}
        self.texts: dict[str, str] = {}
        self.notes: list[str] = []
        self._more = 0  # notes
        self._steps, self._letters = _steps(size), _LETTERS + size
        self._tensors, self._numbers = _TENSORS + size // 64, _NUMBERS + size // 256
        self._surplus = 0  # numbers

    def root(self, content: Any) -> None:
        """Collects everything."""
        if isinstance(content, Tensor | Array):
            fail(self.path, "", "holds one array without a name: save a dict, as {'weight': array}.")
        if not isinstance(content, Entries | list | tuple):
            what = content.name if isinstance(content, Inert | Global) else type(content).__name__
            self._refuse(
                f"holds no dict of arrays, but a pickled {what}, which only its own code can read"
            )
        self.visit("", content, 0)
        if self._more:
            self.notes.append(f"{self._more:,} more objects are left out.")
        if self._surplus:
            self.notes.append(f"{self._surplus:,} more numbers are left out.")
        if not self.arrays and self.notes:
            self._refuse(f"holds no arrays. {self.notes[0].removesuffix('.')}")

    def _refuse(self, problem: str) -> NoReturn:
        fail(self.path, "", f"{shortened(problem, 400)}. Nothing in it is run: {_ADVICE}.")

    def visit(self, name: str, value: Any, depth: int) -> None:
        """Collects a value and what is below it."""
        self._steps -= 1 + len(name) // 64  # copying long names takes time
        if depth > DEEPEST or self._steps < 0:
            problem = "is nested too deep" if depth > DEEPEST else "has more below it than any model"
            fail(self.path, repr(shortened(name, 80)), f"{problem}, or contains itself.")
        match value:
            case Entries() | list() | tuple():
                self._name(name)
                for key, child in _children(value):
                    self.visit(f"{name}.{key}" if depth else key, child, depth + 1)
                if isinstance(value, Entries) and value.odd:
                    self._leave(name, f"{value.odd} entries with keys that are no texts or numbers")
            case Tensor():
                self._tensor(name, value)
            case Array() if value.dtype is not None:
                self._array(name, value)
            case bool() | int() | float() | complex():
                self._number(name, value)
            case str():
                self._name(name)
                self.texts[name] = value
            case Global() if kind_of(value):
                self._name(name)
                self.texts[name] = value.name
            case None:
                pass
            case Inert() | Global():
                self._leave(name, value.name, ", as nothing in a file is run")
            case _:
                self._leave(name, type(value).__name__)

    def _leave(self, name: str, what: str, why: str = "") -> None:
        if len(self.notes) < _SHOWN:
            where = shortened(name, 80) or "the top level"
            self.notes.append(f"{where}: {shortened(what, 80)} is left out{why}.")
        else:
            self._more += 1

    def _add(self, name: str, stored: Stored) -> None:
        self._check_new(name)
        self.arrays[name] = stored

    def _name(self, name: str) -> None:
        self._letters -= len(name)
        if self._letters < 0:
            fail(self.path, repr(shortened(name, 80)), "is one of too many long names.")

    def _check_new(self, name: str) -> None:
        self._name(name)
        if name in self.arrays or name in self.ties:
            fail(self.path, repr(shortened(name, 80)), "appears twice.")

    def _tensor(self, name: str, tensor: Tensor) -> None:
        self._tensors -= 1
        if self._tensors < 0:
            fail(self.path, repr(shortened(name, 80)), "is one of too many tensors for the file.")
        stored = self.storages.stored(name, tensor)
        if isinstance(stored, Stored):
            self._add(name, stored)
        else:
            self._check_new(name)
            self.ties[name] = stored

    def _array(self, name: str, array: Array) -> None:
        assert array.dtype is not None
        self._tensors -= 1
        shape = sizes_of(array.shape)
        if shape is None or self._tensors < 0:
            fail(self.path, repr(name), "has a shape of no array, or is one of too many.")
        size = check_array(self.path, name, shape, array.dtype)
        if size != len(array.data):
            fail(self.path, repr(name), f"has {len(array.data)} bytes; its shape needs {size}.")
        dtype = array.dtype.newbyteorder("=") if array.cast is None else array.cast

        def read() -> np.ndarray:
            try:
                return array.read()
            except ValueError as error:
                fail(self.path, repr(name), f"cannot be read: {error}.")

        self._add(name, Stored(shape, dtype, read, expands=True))  # arrays may share their bytes

    def _number(self, name: str, value: complex) -> None:
        dtype: np.dtype[Any] = np.dtype(type(value))
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            if not 0 <= value < 2**64:
                self._leave(name, "an integer of more than 64 bits")
                return
            dtype = np.dtype(np.uint64)
        if not self._numbers:
            self._surplus += 1
            return
        self._numbers -= 1
        check_name(self.path, name)
        self._add(name, Stored((), dtype, partial(np.array, value, dtype)))


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Entries):
        for (_, key), child in value.items():
            yield key, child
    else:
        for index, child in enumerate(value):
            yield str(index), child


FORMAT = Torch()
