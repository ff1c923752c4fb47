"""numpy's ``.npz``: a zip file with one ``.npy`` file per array."""

import struct
import warnings
import zipfile
from functools import partial
from io import BufferedReader
from typing import Any

import numpy as np
from numpy.lib import format as npy

from paramtree.core.errors import LoadError
from paramtree.io.archive import check_members
from paramtree.io.atomic import replacing
from paramtree.io.formats.format import Content, Format
from paramtree.io.source import Source, Stored, check_name, check_shape, fail, read_into, read_layout
from paramtree.io.wire import NUMBERS, to_host

__all__ = ["FORMAT"]

_LAYOUT = "paramtree.json"
_CHUNK = 2**16  # zipfile copies from a buffer of its own
_HEADER = 1_000  # bytes; 32 axes need 700, and numpy takes much memory to parse a long one


class Npz(Format):
    """numpy's ``.npz``."""

    name = "npz"
    endings = (".npz",)
    native = NUMBERS
    keeps = frozenset(("layout",))

    def recognises(self, path: str, head: bytes) -> bool:
        return head.startswith((b"PK\3\4", b"PK\5\6"))

    def write(self, path: str, content: Content) -> None:
        """Writes arrays as ``numpy.savez`` does, and the layout as another member."""
        with replacing(path) as new, zipfile.ZipFile(new, "w", zipfile.ZIP_STORED) as file:
            for name, array in content.arrays.items():
                with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                    npy.write_array(member, to_host(array), allow_pickle=False)
            if content.layout:
                file.writestr(zipfile.ZipInfo(_LAYOUT), content.layout)  # without the time of day

    def read(self, path: str, file: BufferedReader) -> Source:
        arrays: dict[str, Stored] = {}
        text = None
        try:
            opened = zipfile.ZipFile(file)
            members = opened.infolist()
            check_members(path, members, file.seek(0, 2))
            for member in members:
                if member.filename == _LAYOUT:
                    if member.compress_type != zipfile.ZIP_STORED:
                        fail(path, _LAYOUT, "is compressed, which paramtree never does.")
                    text = opened.read(member).decode()
                    continue
                name = member.filename.removesuffix(".npy")
                if name in arrays or name == member.filename:
                    fail(path, repr(name), "appears twice, or is not a .npy file.")
                check_name(path, name)
                arrays[name] = _stored(path, opened, member)
        except LoadError:
            raise
        except Exception as error:  # zipfile and numpy raise a dozen types on damaged files
            fail(path, "", f"is not a .npz file, or is damaged: {error or type(error).__name__}.")
        return Source(path, self, arrays, read_layout(path, _LAYOUT, text, arrays))


def _stored(path: str, file: zipfile.ZipFile, member: zipfile.ZipInfo) -> Stored:
    where = repr(member.filename)
    opened: Any  # typeshed lacks ZipExtFile.peek
    with file.open(member) as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy warns about headers of old versions
        wide = npy.read_magic(opened) != (1, 0)
        (length,) = struct.unpack("<I" if wide else "<H", opened.peek(4)[: 4 if wide else 2])
        if length > _HEADER:
            fail(path, where, f"has a header of {length} bytes, more than any array needs.")
        read_header = npy.read_array_header_2_0 if wide else npy.read_array_header_1_0
        header = shape, _, dtype = read_header(opened)
        start = opened.tell()
    native = dtype.newbyteorder("=")
    if native.name not in NUMBERS:
        problem = f"has dtype {dtype}: only numbers and booleans are read, without pickle"
        fail(path, where, f"{problem}. For dtypes such as bfloat16 use safetensors, as npz loses them.")
    size = check_shape(path, where, shape, dtype)
    if member.file_size != start + size:
        fail(path, where, f"has {member.file_size} bytes; its shape needs {start + size}.")
    read = partial(_array, path, file, member, start, header)
    return Stored(shape, native, read, expands=member.compress_type != zipfile.ZIP_STORED)


def _array(
    path: str, file: zipfile.ZipFile, member: zipfile.ZipInfo, start: int, header: Any
) -> np.ndarray:
    shape, fortran, dtype = header
    written = shape[::-1] if fortran else shape
    opened: Any
    try:
        with file.open(member) as opened:
            opened.read(start)
            array = read_into(path, lambda to: opened.readinto(to[:_CHUNK]), dtype, written)
            if opened.read(1):  # at the end zipfile checks the checksum
                raise EOFError("it has more bytes than its shape needs")
    except LoadError:
        raise
    except Exception as error:  # from zipfile or zlib
        fail(path, repr(member.filename), f"cannot be read: {error or type(error).__name__}.")
    return (array.T if fortran else array).astype(dtype.newbyteorder("="), copy=False)


FORMAT = Npz()
