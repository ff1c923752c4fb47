"""numpy's ``.npz``: a zip file with an ``.npy`` file for each array."""

import struct
import warnings
import zipfile
from collections.abc import Mapping
from functools import partial
from io import BufferedReader
from typing import Any, Literal

import numpy as np
from numpy.lib import format as npy

from paramtree.core.errors import LoadError
from paramtree.io.atomic import replacing
from paramtree.io.source import Source, Stored, check_name, check_shape, fail, read_into, read_layout
from paramtree.io.wire import NUMBERS, to_host

__all__ = ["NATIVE", "PICKLE", "read", "write"]

NATIVE = NUMBERS
PICKLE = (
    "is a pickle, as PyTorch and others write them. A pickle runs whatever code is in it, so it is "
    "never read here. Convert it where it comes from, in PyTorch with "
    "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')."
)
_LAYOUT = "paramtree.json"
_PLAIN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_CHUNK = 2**16  # zipfile reads into memory of its own first
_HEADER = 1_000  # bytes; 32 axes need 700, and the parser of numpy takes much memory for a long one


def write(path: str, arrays: Mapping[str, Any], layout: str) -> None:
    """Writes arrays of native dtypes as ``numpy.savez`` does, and the layout beside them."""
    with replacing(path) as new, zipfile.ZipFile(new, "w", zipfile.ZIP_STORED) as file:
        for name, array in arrays.items():
            with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                npy.write_array(member, to_host(array), allow_pickle=False)
        file.writestr(_LAYOUT, layout)


def read(path: str, file: BufferedReader) -> Source:
    """Returns what a file holds.

    Raises:
      LoadError: the file is damaged, is a checkpoint of PyTorch, or holds objects.
    """
    arrays: dict[str, Stored] = {}
    text = None
    try:
        opened = zipfile.ZipFile(file)
        members = opened.infolist()
        if any(member.filename.endswith("data.pkl") for member in members):
            fail(path, "", PICKLE)
        _check_sizes(path, file, members)
        for member in members:
            if member.filename == _LAYOUT:
                if member.compress_type != zipfile.ZIP_STORED:
                    fail(path, _LAYOUT, "is compressed, which this library never does.")
                text = opened.read(member).decode()
                continue
            name = member.filename.removesuffix(".npy")
            if name in arrays or name == member.filename:
                fail(path, repr(name), "is there twice, or is no .npy file.")
            check_name(path, name)
            arrays[name] = _stored(path, opened, member)
    except LoadError:
        raise
    except Exception as error:  # zipfile and numpy raise a dozen types on damaged files
        fail(path, "", f"is no .npz file, or a damaged one: {error or type(error).__name__}.")
    return Source(path, "npz", arrays, read_layout(path, _LAYOUT, text, arrays))


def _check_sizes(path: str, file: BufferedReader, members: list[zipfile.ZipInfo]) -> None:
    """Raises LoadError if the members are encrypted, or cannot all be in the file at once."""
    left = file.seek(0, 2)
    for member in members:
        if member.compress_type not in _PLAIN or member.flag_bits & 1:
            fail(path, repr(member.filename), "is encrypted, or compressed in an unusual way.")
        if member.compress_type == zipfile.ZIP_STORED and member.file_size != member.compress_size:
            fail(path, repr(member.filename), "is not compressed, and yet of two sizes.")
        left -= member.compress_size
        if left < 0:
            fail(path, repr(member.filename), "and those before it are larger than the file.")


def _stored(path: str, file: zipfile.ZipFile, member: zipfile.ZipInfo) -> Stored:
    where = repr(member.filename)
    opened: Any  # a ZipExtFile, which typeshed does not say
    with file.open(member) as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy warns of headers that old versions wrote
        version = npy.read_magic(opened)
        wide = version != (1, 0)
        (length,) = struct.unpack("<I" if wide else "<H", opened.peek(4)[: 4 if wide else 2])
        if length > _HEADER:
            fail(path, where, f"has a header of {length} bytes, and no array needs that much.")
        read_header = npy.read_array_header_2_0 if wide else npy.read_array_header_1_0
        shape, fortran, dtype = read_header(opened)
        start = opened.tell()
    native = dtype.newbyteorder("=")
    if native.name not in NATIVE:
        fail(
            path,
            where,
            f"has dtype {dtype}: only numbers and booleans are read, without pickle. numpy forgets the "
            "name of dtypes such as bfloat16: write them as safetensors.",
        )
    size = check_shape(path, where, shape, dtype)
    if member.file_size != start + size:
        fail(path, where, f"has {member.file_size} bytes; of its shape it would have {start + size}.")
    get = partial(_array, path, file, member, start, size, dtype, shape, "F" if fortran else "C")
    return Stored(shape, native, get, expands=member.compress_type != zipfile.ZIP_STORED)


def _array(
    path: str,
    file: zipfile.ZipFile,
    member: zipfile.ZipInfo,
    start: int,
    size: int,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    order: Literal["C", "F"],
) -> np.ndarray:
    opened: Any
    try:
        with file.open(member) as opened:
            opened.read(start)
            array = read_into(path, lambda to: opened.readinto(to[:_CHUNK]), size, dtype, shape, order)
            if opened.read(1):  # the end, where the checksum is compared
                raise EOFError("there is more than its shape needs")
    except LoadError:
        raise
    except Exception as error:  # of zipfile or zlib
        fail(path, repr(member.filename), f"cannot be read: {error or type(error).__name__}.")
    return array.astype(dtype.newbyteorder("="), copy=False)
