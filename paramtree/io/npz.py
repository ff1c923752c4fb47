"""numpy's ``.npz``: a zip file with an ``.npy`` file for each array."""

import warnings
import zipfile
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.lib import format as npy

from paramtree.errors import LoadError
from paramtree.io.atomic import replacing
from paramtree.io.source import Source, Stored, check_name, check_shape, fail, read_layout
from paramtree.io.wire import to_host

__all__ = ["NATIVE", "read", "write"]

NATIVE = frozenset(
    ["bool", "complex64", "complex128", "float16", "float32", "float64"]
    + [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
)
_LAYOUT = "paramtree.json"
_PLAIN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_CHUNK = 2**20


def write(path: str, arrays: Mapping[str, Any], layout: str) -> None:
    """Writes arrays of native dtypes as ``numpy.savez`` does, and the layout beside them."""
    with replacing(path) as new, zipfile.ZipFile(new, "w", zipfile.ZIP_STORED) as file:
        for name, array in arrays.items():
            with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                npy.write_array(member, to_host(array), allow_pickle=False)
        file.writestr(_LAYOUT, layout)


def read(path: str) -> Source:
    """Returns what a file holds.

    Raises:
      LoadError: the file is damaged, is a checkpoint of PyTorch, or holds objects.
    """
    arrays: dict[str, Stored] = {}
    text = None
    try:
        with zipfile.ZipFile(path) as file:
            members = file.infolist()
            if any(member.filename.endswith("data.pkl") for member in members):
                fail(path, "", PICKLE)
            for member in members:
                if member.compress_type not in _PLAIN or member.flag_bits & 1:
                    fail(path, repr(member.filename), "is encrypted, or compressed in an unusual way.")
                if member.filename == _LAYOUT:
                    text = _layout(path, file, member)
                    continue
                name = member.filename.removesuffix(".npy")
                if name in arrays or name == member.filename:
                    fail(path, repr(name), "is there twice, or is no .npy file.")
                check_name(path, name)
                arrays[name] = _stored(path, file, member)
    except LoadError:
        raise
    except Exception as error:  # zipfile and numpy raise a dozen types on damaged files
        fail(path, "", f"is no .npz file, or a damaged one: {error or type(error).__name__}.")
    return Source(path, "npz", arrays, read_layout(path, _LAYOUT, text, arrays))


PICKLE = (
    "is a pickle, as PyTorch and others write them. A pickle runs whatever code is in it, so it is "
    "never read here. Convert it where it comes from, in PyTorch with "
    "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')."
)


def _layout(path: str, file: zipfile.ZipFile, member: zipfile.ZipInfo) -> str:
    if member.compress_type != zipfile.ZIP_STORED:
        fail(path, _LAYOUT, "is compressed, which this library never does.")
    return file.read(member).decode()


def _stored(path: str, file: zipfile.ZipFile, member: zipfile.ZipInfo) -> Stored:
    with file.open(member) as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy warns of headers that old versions wrote
        version = npy.read_magic(opened)
        if version == (1, 0):
            shape, fortran, dtype = npy.read_array_header_1_0(opened)
        else:
            shape, fortran, dtype = npy.read_array_header_2_0(opened)
        start = opened.tell()
    where = repr(member.filename)
    if dtype.kind not in "biufc" or dtype.name.removeprefix("native") not in NATIVE:
        fail(
            path,
            where,
            f"has dtype {dtype}: only numbers and booleans are read, without pickle. numpy forgets the "
            "name of dtypes such as bfloat16: write them as safetensors.",
        )
    size = check_shape(path, where, shape, dtype)
    if member.file_size != start + size:
        fail(path, where, f"has {member.file_size} bytes; of its shape it would have {start + size}.")
    get = partial(_read, path, member, start, size, shape, fortran, dtype)
    native = dtype.newbyteorder("=")
    return Stored(shape, native, get, expands=member.compress_type != zipfile.ZIP_STORED)


def _read(
    path: str,
    member: zipfile.ZipInfo,
    start: int,
    size: int,
    shape: tuple[int, ...],
    fortran: bool,
    dtype: np.dtype[Any],
) -> np.ndarray:
    raw = np.empty(size + 64, np.uint8)  # see read_span
    begin = -raw.ctypes.data % 64
    span = raw.data[begin : begin + size]
    try:
        with zipfile.ZipFile(path) as file, file.open(member) as opened:
            opened.read(start)
            done = 0
            while chunk := opened.read(_CHUNK):  # to the end, where the checksum is compared
                span[done : done + len(chunk)] = chunk
                done += len(chunk)
            if done != size:
                raise EOFError("it ends early")
    except Exception as error:
        fail(path, repr(member.filename), f"cannot be read: {error or type(error).__name__}.")
    array = raw[begin : begin + size].view(dtype).reshape(shape, order="F" if fortran else "C")
    return array.astype(dtype.newbyteorder("="), copy=False)
