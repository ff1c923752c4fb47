"""The safetensors format, read and written with its own package.

The package checks the header. The arrays are then read directly into memory that jax can take over;
the package's own reader would map the file and copy from there.
"""

import json
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from io import BufferedReader
from typing import Any

from paramtree.core.errors import ParamTreeError
from paramtree.io.atomic import replacing
from paramtree.io.source import Source, Stored, check_array, fail, read_layout, read_part, read_span
from paramtree.io.wire import to_dtype, to_host

__all__ = ["INDEX", "NATIVE", "read", "read_index", "write"]

_CODES = {
    "BOOL": "bool", "C64": "complex64",
    "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
NATIVE = frozenset(_CODES.values())
INDEX = ".index.json"  # the suffix of an index of several files
_RESERVED = "__metadata__"
_KEY = "paramtree"  # the metadata key of the layout


def write(path: str, arrays: Mapping[str, Any], layout: str) -> None:
    """Writes arrays of native dtypes, and the layout as metadata."""
    from safetensors import SafetensorError, TensorSpec, serialize_file

    if _RESERVED in arrays:
        raise ParamTreeError(
            f"`{_RESERVED}` is reserved in safetensors: save as .npz, or rename the leaf."
        )
    host = {name: to_host(array) for name, array in arrays.items()}
    specs = {
        name: TensorSpec(
            dtype=array.dtype.name, shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes
        )
        for name, array in host.items()
    }
    with replacing(path) as new:
        try:
            serialize_file(specs, new, metadata={_KEY: layout})
        except SafetensorError as error:  # such as a full disk
            raise OSError(f"{path} was not written: {error}") from error


def read(path: str, file: BufferedReader) -> Source:
    """Opens a safetensors file.

    Raises:
      LoadError: the file is damaged, or has a dtype that jax lacks.
    """
    from safetensors import SafetensorError, safe_open

    arrays: dict[str, Stored] = {}
    offset = 8 + int.from_bytes(file.read(8), "little")
    # Reopen by descriptor: the path may be another file by now.
    same_file = f"/dev/fd/{file.fileno()}" if os.path.exists("/dev/fd") else path
    try:
        with safe_open(same_file, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            # The package has checked that there are no gaps or overlaps: sizes determine the offsets.
            for name in opened.offset_keys():
                info = opened.get_slice(name)
                shape, code = tuple(info.get_shape()), info.get_dtype()
                if code not in _CODES:
                    fail(path, repr(name), f"has dtype {code}, which jax lacks: convert it first.")
                dtype = to_dtype(_CODES[code])
                size = check_array(path, name, shape, dtype)
                read_all = partial(read_span, path, file, offset, dtype, shape)
                read_slice = partial(read_part, path, file, offset, dtype, shape)
                arrays[name] = Stored(shape, dtype, read_all, read_slice=read_slice)
                offset += size
    except SafetensorError as error:
        fail(path, "", f"is not a safetensors file, or is damaged: {error}.")
    layout = read_layout(path, f"the metadata {_KEY!r}", metadata.get(_KEY), arrays)
    return Source(path, "safetensors", arrays, layout)


def read_index(path: str, files: ExitStack) -> Source:
    """Opens the files that an index lists, as Hugging Face splits large models.

    Raises:
      LoadError: the index is damaged, lists a file in another folder, or disagrees with a file.
    """
    try:
        with open(path, encoding="utf-8") as file:
            listed = json.load(file)["weight_map"]
        parts = sorted(set(listed.values()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        fail(path, "", f"is not an index of safetensors files: {error!r}.")
    arrays: dict[str, Stored] = {}
    opened = []
    for part in parts:
        if not isinstance(part, str) or part in ("", ".", "..") or re.search(r"[/\\\0]", part):
            fail(path, repr(part), "is not the name of a file next to the index.")
        where = os.path.join(os.path.dirname(path), part)
        if not os.path.isfile(where):
            fail(path, repr(part), "is in the index, but not next to it.")
        opened.append(where)
        contents = read(where, files.enter_context(open(where, "rb"))).arrays  # noqa: SIM115
        arrays |= {name: stored for name, stored in contents.items() if listed.get(name) == part}
    if lost := sorted(set(listed) - set(arrays)):
        fail(path, repr(lost[0]), f"and {len(lost) - 1} more are in the index, but not in the files.")
    return Source(path, "safetensors", arrays, parts=opened)
