"""What the pickles of PyTorch and numpy call: the makers of tensors, storages, arrays and dicts.

They only put together what the pickle says; the bytes are looked at later (see ``storages``).
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from paramtree.io.formats.pickled import Entries, Global, Inert
from paramtree.io.wire import NUMBERS, to_dtype

__all__ = ["MAKERS", "Array", "Kind", "Storage", "Tensor", "identified", "kind_of"]

_MOST = 2**62  # elements
_NUMBER = re.compile(r"[<>=|]?[biufc](1|2|4|8|16)")  # a dtype of numpy


# PyTorch's dtypes


class Kind(NamedTuple):
    """A dtype of torch's: how it is listed, its bytes in a file, and why it is not read."""

    name: str
    dtype: np.dtype[Any]
    size: int
    problem: str = ""


def _same_as(name: str) -> Kind:
    return Kind(name, to_dtype(name), to_dtype(name).itemsize)


_PACKED = "has dtype {}, whose numbers share bytes: convert it first"
_QUANTIZED = "is quantized, as {}: save its .dequantize() or its .int_repr() instead"
_HALVES = "has dtype {}, which jax lacks: save it as complex64, with .to(torch.complex64)"
_READ = (
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
    "float16", "float32", "float64", "bfloat16", "complex64", "complex128", "float8_e4m3fn",
    "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
)  # fmt: skip
_UNREAD = {
    "complex32": ("complex64", 4, _HALVES),
    "qint8": ("int8", 1, _QUANTIZED),
    "quint8": ("uint8", 1, _QUANTIZED),
    "qint32": ("int32", 4, _QUANTIZED),
    "quint4x2": ("uint8", 1, _PACKED),
    "quint2x4": ("uint8", 1, _PACKED),
    "float4_e2m1fn_x2": ("uint8", 1, _PACKED),
}
_KINDS = {name: _same_as(name) for name in _READ}
for _name, (_listed, _width, _problem) in _UNREAD.items():
    _KINDS[_name] = Kind(_name, to_dtype(_listed), _width, _problem.format(_name))
_STORAGES = {
    "BoolStorage": "bool", "ByteStorage": "uint8", "CharStorage": "int8", "ShortStorage": "int16",
    "IntStorage": "int32", "LongStorage": "int64", "HalfStorage": "float16",
    "FloatStorage": "float32", "DoubleStorage": "float64", "BFloat16Storage": "bfloat16",
    "ComplexHalfStorage": "complex32", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128", "QInt8Storage": "qint8", "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32", "QUInt4x2Storage": "quint4x2", "QUInt2x4Storage": "quint2x4",
    "UntypedStorage": "uint8",
}  # fmt: skip


def kind_of(dtype: Any) -> Kind | None:
    """Returns the kind that a name such as ``torch.float32`` stands for, or None."""
    name = dtype.name if isinstance(dtype, Global) else ""
    return _KINDS.get(name.removeprefix("torch.")) if name.startswith("torch.") else None


# Tensors


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage in a pickle: its key, the dtype that it was saved as, and its number of elements.

    In files of old versions it may begin ``shift`` bytes into the one with its key.
    """

    key: str
    kind: Kind
    numel: int
    shift: int = 0


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in a pickle: a view of a storage. ``problem`` says why it cannot be read."""

    storage: Storage | None  # None if there is a problem
    offset: Any  # this and the next are numbers of elements, and not yet checked
    shape: Any
    strides: Any
    kind: Kind
    conjugate: bool = False
    negative: bool = False
    problem: str = ""

    def build(self, state: Any) -> None:
        """Ignores attributes of the tensor."""


def identified(key: Any) -> Storage | Global:
    """Returns the storage, or the class, that an identifier in a pickle stands for."""
    match key:
        case ("storage", Global() as typed, str(name), _, int(numel), *rest):
            code = _STORAGES.get(typed.name.rpartition(".")[2])
            if code is None:
                raise ValueError(f"it has a storage of an unknown type, {typed.name}")
            match rest:
                case [] | [None]:
                    return Storage(name, _KINDS[code], _count(numel))
                case [(str(), int(offset), int(size))]:
                    shift = _count(offset) * _KINDS[code].size
                    return Storage(name, _KINDS[code], _count(size), shift)
        case ("module", Global() as made, *_):
            return made
    raise ValueError("it refers to something that is no storage")


def _count(number: int) -> int:
    if not 0 <= number < _MOST:
        raise ValueError("a storage has a wrong number of elements")
    return int(number)


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, *more: Any, kind: Kind | None = None
) -> Tensor:
    _, _, metadata = (*more, None, None, None)[:3]  # after what is only for training
    if not isinstance(storage, Storage):
        raise ValueError("a tensor has no storage")
    flags = metadata if isinstance(metadata, Entries) else {}
    conjugate, negative = (flags.get(("str", flag)) is True for flag in ("conj", "neg"))
    kind = kind or storage.kind
    if kind.dtype.kind not in ("c" if conjugate else "fc" if negative else kind.dtype.kind):
        raise ValueError("a tensor is the conjugate or the negative of one that has none")
    return Tensor(storage, offset, shape, strides, kind, conjugate, negative, kind.problem)


def _tensor_of(*arguments: Any) -> Tensor:
    *first, dtype = arguments[:7]
    if not isinstance(dtype, Global) or len(first) != 6:
        raise ValueError("a tensor has no dtype")
    unknown = Kind(dtype.name, to_dtype("uint8"), 1, f"has dtype {dtype.name:.60}, which jax lacks")
    return _tensor(*first, *arguments[7:], kind=kind_of(dtype) or unknown)


def _quantized(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    made = _tensor(storage, offset, shape, strides)
    name = made.kind.name
    return Tensor(storage, offset, shape, strides, made.kind, problem=_QUANTIZED.format(name))


def _sparse(layout: Any, data: Any) -> Tensor:
    for values, shape in itertools.pairwise(data):  # after indices, of which there are one or two
        if isinstance(values, Tensor) and isinstance(shape, tuple):
            name = layout if isinstance(layout, str) else "torch.sparse_coo"
            problem = f"is sparse, as {name:.40}: save its .to_dense() instead"
            return Tensor(None, 0, shape, (), values.kind, problem=problem)
    raise ValueError("a sparse tensor has no values")


def _absent(dtype: Any, shape: Any, *_: Any) -> Tensor | Inert:
    kind = kind_of(dtype)
    problem = "is on the device 'meta' and has no values: save it after they are loaded"
    return Inert("torch.Tensor") if kind is None else Tensor(None, 0, shape, (), kind, problem=problem)


def _of_type(maker: Any, made: Any, arguments: Any, *_: Any) -> Any:
    """Makes a tensor of a subclass, or with attributes."""
    known = _TENSORS.get(maker.name) if isinstance(maker, Global) else None
    return known(*arguments) if known else Inert(getattr(made, "name", "torch.Tensor"))


def _same(data: Any, *_: Any) -> Any:
    return data


def _size(sizes: Any = ()) -> tuple[Any, ...]:
    return tuple(sizes)


def _device(*parts: Any) -> str:
    return ":".join(f"{part!s:.100}" for part in parts if isinstance(part, str | int))


def _converted(data: Any, dtype: Any, *_: Any) -> Any:
    kind = kind_of(dtype)
    if not isinstance(data, Array) or kind is None or kind.problem:
        return Inert("torch.Tensor")
    data.cast = kind.dtype
    return data


# Arrays of numpy's, and dicts


class _DType:
    """A dtype of numpy's; ``order`` is its byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: str) -> None:
        self.code, self.order = code, ""

    def build(self, state: Any) -> None:
        self.order = state[1]

    def dtype(self) -> np.dtype[Any] | None:
        """Returns the dtype; None if it is not one of numbers."""
        if not _NUMBER.fullmatch(self.code) or self.order not in ("", "<", ">", "=", "|"):
            return None
        text = (self.order + self.code.lstrip("<>=|")) if self.order else self.code
        dtype = np.dtype(text)
        return dtype if dtype.newbyteorder("=").name in NUMBERS else None


class _Encoded:
    """Bytes as the text that they are in latin-1, as protocols before 3 have them."""

    __slots__ = ("text",)

    def __init__(self, text: str, encoding: str = "latin1") -> None:
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise ValueError("it has bytes of an unknown encoding")
        self.text = text

    def __len__(self) -> int:
        return len(self.text)


class Array:
    """An array of numpy's. Only reading it takes memory, so many may be of the same bytes.

    ``dtype`` is None if it holds no numbers. The array is cast to ``cast`` if that is given.
    """

    __slots__ = ("cast", "data", "dtype", "order", "shape")

    def __init__(self) -> None:
        self.dtype: np.dtype[Any] | None = None
        self.cast: np.dtype[Any] | None = None
        self.shape: Any = ()
        self.data: bytes | bytearray | _Encoded = b""
        self.order: Literal["C", "F"] = "C"

    def build(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.fill(data, dtype, shape, "F" if fortran else "C")

    def fill(self, data: Any, dtype: Any, shape: Any, order: Any = "C") -> "Array":
        """Takes bytes as the value, if they are those of numbers."""
        data = _Encoded(data) if isinstance(data, str) else data
        if isinstance(dtype, _DType) and isinstance(data, bytes | bytearray | _Encoded):
            self.dtype, self.data, self.shape = dtype.dtype(), data, shape
            self.order = "F" if order == "F" else "C"
        return self

    def read(self) -> np.ndarray:
        """Returns the value, in memory of its own.

        Raises:
          ValueError: the bytes are not those of such an array.
        """
        assert self.dtype is not None  # else it is not read
        raw = self.data.text.encode("latin-1") if isinstance(self.data, _Encoded) else self.data
        flat = np.frombuffer(raw, self.dtype) if raw else np.empty(0, self.dtype)
        native = self.dtype.newbyteorder("=") if self.cast is None else self.cast
        array = flat.reshape(self.shape, order=self.order).astype(native, order="C")
        return array.view(np.uint8) != 0 if native == np.bool_ else array  # a file may hold any byte


class _Namespace(Entries):
    """An object that is its attributes."""

    __slots__ = ()

    def build(self, state: Any) -> None:
        if isinstance(state, Entries):
            self.update(state)


def _dict(items: Any = ()) -> Entries:
    if isinstance(items, Entries):
        return items
    made = Entries()
    for key, value in items:
        made.put(key, value)
    return made


def _dict_of(default: Any = None, items: Any = ()) -> Entries:
    return _dict(items)


def _dtype(code: Any, *_: Any) -> Any:
    return _DType(code) if isinstance(code, str) else Inert("numpy.dtype")


def _bytes(*content: Any) -> Any:
    return Inert("builtins.bytes") if content else b""  # protocols before 3 spell only these so


def _scalar(dtype: Any, data: Any) -> Array:
    return Array().fill(data, dtype, ())


def _empty(*_: Any) -> Array:
    return Array()


def _filled(*arguments: Any) -> Array:
    return Array().fill(*arguments)


_TENSORS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of,
    "torch._utils._rebuild_qtensor": _quantized,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_sparse_csr_tensor": _sparse,
    "torch._utils._rebuild_meta_tensor_no_storage": _absent,
    "torch._utils._rebuild_parameter": _same,
    "torch._utils._rebuild_parameter_with_state": _same,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _same,
    "torch._utils._rebuild_device_tensor_from_numpy": _converted,
    "torch._utils._rebuild_xla_tensor": _converted,
    "torch.nn.parameter.Parameter": _same,
}
# What a pickle may call, by qualified name.
MAKERS: dict[str, Callable[..., Any]] = {
    **_TENSORS,
    **dict.fromkeys(
        ("torch._tensor._rebuild_from_type", "torch._tensor._rebuild_from_type_v2"), _of_type
    ),
    **dict.fromkeys(
        ("torch.tensor._rebuild_from_type", "torch.tensor._rebuild_from_type_v2"), _of_type
    ),
    "torch.serialization._get_layout": _same,
    "torch.Size": _size,
    "torch.device": _device,
    **dict.fromkeys(("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"), _scalar),
    **dict.fromkeys(
        ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"), _empty
    ),
    **dict.fromkeys(("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"), _filled),
    "numpy.dtype": _dtype,
    "_codecs.encode": _Encoded,
    **dict.fromkeys(("builtins.bytes", "__builtin__.bytes"), _bytes),
    **dict.fromkeys(("builtins.complex", "__builtin__.complex"), complex),
    **dict.fromkeys(("builtins.dict", "__builtin__.dict", "collections.OrderedDict"), _dict),
    "collections.defaultdict": _dict_of,
    **dict.fromkeys(("argparse.Namespace", "types.SimpleNamespace"), _Namespace),
}
