"""The safetensors format, read and written with its own package.

The package checks the header. The arrays are then read directly into memory that jax can take over;
the package's own reader would map the file and copy from there.
"""

import json
import os
import re
from functools import partial
from io import BufferedReader
from typing import Any

from paramtree.core.errors import ParamTreeError
from paramtree.io.atomic import replacing
from paramtree.io.formats.format import Content, Format
from paramtree.io.source import Source, Stored, check_array, fail, read_layout, read_part, read_span
from paramtree.io.wire import to_dtype, to_host

__all__ = ["FORMAT"]

_CODES = {
    "BOOL": "bool", "C64": "complex64",
    "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
# Less than a byte each: such arrays are listed, but not read.
_PACKED = {
    "F4": ("float4_e2m1fn", 4), "F6_E2M3": ("float6_e2m3fn", 6), "F6_E3M2": ("float6_e3m2fn", 6),
}  # fmt: skip
_LONGEST = 100_000_000  # bytes of a header
_RESERVED = "__metadata__"
_KEY = "paramtree"  # the metadata key of the layout


class Safetensors(Format):
    """Hugging Face's safetensors."""

    name = "safetensors"
    endings = (".safetensors",)
    native = frozenset(_CODES.values())
    keeps = frozenset(("layout", "metadata", "slices", "shards"))

    def recognises(self, path: str, head: bytes) -> bool:
        # It begins with the length of the header, which the package limits.
        is_short = int.from_bytes(head[:8], "little") <= _LONGEST
        return head[8:9] == b"{" and (is_short or path.lower().endswith(self.endings))

    def write(self, path: str, content: Content) -> None:
        """Writes arrays, and the layout as metadata.

        Some readers of Hugging Face's models demand a ``format``; "pt" is the layout of our weights.
        """
        from safetensors import SafetensorError, TensorSpec, serialize_file

        if _RESERVED in content.arrays:
            raise ParamTreeError(
                f"`{_RESERVED}` is reserved in safetensors: save as .npz, or rename the leaf."
            )
        if _KEY in content.metadata:
            raise ParamTreeError(f"the metadata {_KEY!r} is reserved: use another key.")
        host = {name: to_host(array) for name, array in content.arrays.items()}
        specs = {
            name: TensorSpec(
                dtype=a.dtype.name, shape=a.shape, data_ptr=a.ctypes.data, data_len=a.nbytes
            )
            for name, a in host.items()
        }
        layout = {_KEY: content.layout} if content.layout else {}
        with replacing(path) as new:
            try:
                serialize_file(specs, new, metadata={"format": "pt", **content.metadata, **layout})
            except SafetensorError as error:  # such as a full disk
                raise OSError(f"{path} was not written: {error}") from error
            _sort_metadata(new)

    def read(self, path: str, file: BufferedReader) -> Source:
        from safetensors import SafetensorError, safe_open

        arrays: dict[str, Stored] = {}
        dtypes = {code: to_dtype(name) for code, name in _CODES.items()}
        size = int.from_bytes(file.read(8), "little")
        start = 8 + size
        # Reopen by descriptor: the path may be another file by now.
        same_file = f"/dev/fd/{file.fileno()}" if os.path.exists("/dev/fd") else path
        try:
            with safe_open(same_file, framework="numpy") as opened:
                metadata = opened.metadata() or {}
                # The package has checked the header. To ask it for one array after another is slow.
                header = json.loads(file.read(size))
                for name in opened.offset_keys():
                    entry = header[name]
                    shape, code = tuple(entry["shape"]), entry["dtype"]
                    if code in _PACKED:
                        arrays[name] = _packed(path, name, shape, code)
                        continue
                    if code not in _CODES:
                        fail(path, repr(name), f"has dtype {code}, which jax lacks: convert it first.")
                    dtype = dtypes[code]
                    check_array(path, name, shape, dtype)
                    span = path, file, start + entry["data_offsets"][0], dtype, shape
                    arrays[name] = Stored(
                        shape, dtype, partial(read_span, *span), False, partial(read_part, *span)
                    )
        except SafetensorError as error:
            fail(path, "", f"is not a safetensors file, or is damaged: {error}.")
        layout = read_layout(path, f"the metadata {_KEY!r}", metadata.pop(_KEY, None), arrays)
        # The package sorts by dtype and name.
        return Source(path, self, arrays, layout, metadata=metadata, unordered=True)


def _sort_metadata(path: str) -> None:
    """Sorts the metadata: the package writes it in random order, but equal trees give equal files."""
    first = b'{"__metadata__":'
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size)
        if not header.startswith(first):
            return
        text = header[len(first) :].decode()
        metadata, end = json.JSONDecoder().raw_decode(text)
        options: Any = {"separators": (",", ":"), "ensure_ascii": False}
        ordered = json.dumps(dict(sorted(metadata.items())), **options).encode()
        if len(ordered) == len(text[:end].encode()):  # or the texts were escaped in another way
            file.seek(8 + len(first))
            file.write(ordered)


def _packed(path: str, name: str, shape: tuple[int, ...], code: str) -> Stored:
    dtype = to_dtype(_PACKED[code][0])
    check_array(path, name, shape, dtype)

    def read() -> Any:
        fail(
            path,
            repr(name),
            f"has dtype {code}, whose numbers share bytes, and is not read: leave it out with "
            f"rename=[({re.escape(name)!r}, None)], or convert it first.",
        )

    return Stored(shape, dtype, read)


FORMAT = Safetensors()
