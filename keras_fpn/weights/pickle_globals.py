"""What a pickle of tensors, arrays and plain containers may refer to by name.

Each of PyTorch's and NumPy's functions has a counterpart here that makes an array or a plain value.
They are called with whatever a file says, and check all of it.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from types import NoneType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from keras_fpn.weights.refusal import DAMAGED, Refused, damage, kind, shown, typed

# NumPy's own limit.
MAX_RANK = 64


class StorageType(NamedTuple):
    """The dtype of a storage's elements; untyped storages are bytes, of any dtype."""

    dtype: np.dtype
    is_untyped: bool = False


class Storage(NamedTuple):
    """The memory that tensors are views of."""

    type: StorageType
    buffer: memoryview


class Unbuilt(NamedTuple):
    """An array (`code` None) or a dtype that awaits its state, and its places in the memo."""

    code: str | None
    memo_keys: list[int]


def find_global(module: str, name: str) -> Any:
    """What stands for `module.name`, which is never imported."""
    asked = f"{_OTHER_MODULES.get(module, module)}.{name}"
    if asked not in GLOBALS:
        asked = shown(f"{module}.{name}")
        raise Refused(f"asks for {asked}; only tensors, arrays and plain containers are read")
    return GLOBALS[asked]


# === Tensors ===


def find_storage(
    persistent_id: Any,
    storages: dict[str, Storage],
    make: Callable[[str, StorageType, int], bytearray],
) -> Storage:
    """Finds the storage, or the part of it, that a persistent id refers to.

    Args:
        persistent_id: a tuple that PyTorch puts in place of a storage.
        storages: by key; a missing one is made and added.
        make: takes a key, the type and the size in bytes, and returns the data.
    """
    if type(persistent_id) is not tuple or len(persistent_id) not in (5, 6):
        raise Refused("refers to something other than a tensor's storage outside the pickle")
    role, storage_type, key, _location, number, *view = persistent_id
    if typed(role, str) != "storage" or type(storage_type) is not StorageType:
        raise Refused("refers to something other than a tensor's storage outside the pickle")
    key, itemsize = typed(key, str), storage_type.dtype.itemsize
    if not _is_size(number):
        raise Refused("is damaged: a storage has an impossible size")
    if key not in storages:
        data = make(key, storage_type, number * itemsize)
        storages[key] = Storage(storage_type, memoryview(data))
    buffer = storages[key].buffer
    if storages[key].type != storage_type or len(buffer) != number * itemsize:
        raise Refused("is damaged or incomplete: a storage and its tensors differ in size or type")
    if view and view[0] is not None:
        if len(typed(view[0], tuple)) != 3:
            raise Refused(DAMAGED)
        _key, start, number = view[0]
        if not (_is_size(start) and _is_size(number)) or (start + number) * itemsize > len(buffer):
            raise Refused("is damaged: a part of a storage reaches beyond its end")
        buffer = buffer[start * itemsize : (start + number) * itemsize]
    return Storage(storage_type, buffer)


def _tensor(storage, offset, size, stride, dtype=None) -> np.ndarray:
    if type(storage) is not Storage or not isinstance(dtype, np.dtype | None):
        raise Refused("is damaged: a tensor has no storage or no dtype")
    if not (_is_size(offset) and _is_shape(size) and _is_shape(stride)):
        raise Refused("is damaged: a tensor has a negative or impossible size, stride or offset")
    if len(size) != len(stride):
        raise Refused("is damaged: a tensor's size and stride differ in rank")
    dtype = dtype or storage.type.dtype
    if 0 in size:
        with damage(ValueError):
            return np.empty(size, dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if (last + 1) * dtype.itemsize > len(storage.buffer):
        raise Refused("is damaged: a tensor reaches beyond the end of its storage")
    # The stride of a single element is never used, and may be any number.
    strides = [step * dtype.itemsize if n > 1 else 0 for n, step in zip(size, stride, strict=True)]
    # Strides of 0 make shapes that are too large for NumPy fit into any storage.
    with damage(ValueError):
        return np.ndarray(size, dtype, storage.buffer, offset * dtype.itemsize, strides)


def _tensor_v2(storage, offset, size, stride, _grad, _hooks, metadata=None) -> np.ndarray:
    return _tensor_v3(storage, offset, size, stride, _grad, _hooks, None, metadata)


def _tensor_v3(storage, offset, size, stride, _grad, _hooks, dtype, metadata=None) -> np.ndarray:
    if type(metadata) not in (dict, NoneType) or metadata:
        raise Refused("holds a conjugated or negated tensor; only plain tensors are read")
    return _tensor(storage, offset, size, stride, dtype)


def _unchanged(value, _grad=None, _hooks=None):
    """A parameter is its array, a `torch.Size` its tuple."""
    return value


# === NumPy's arrays ===


def _unbuilt_dtype(code, _align, _copy) -> Unbuilt:
    return Unbuilt(typed(code, str), [])


def _unbuilt_array(array_type, _shape, _code) -> Unbuilt:
    if array_type is not _NDARRAY:
        raise Refused("holds an array of a class of its own")
    return Unbuilt(None, [])


def build(unbuilt: Unbuilt, state: tuple) -> np.ndarray | np.dtype:
    """The array or dtype with the state that arrived for it."""
    if len(state) != (5 if unbuilt.code is None else 8):
        raise Refused("is damaged: an array or a dtype has another state than NumPy gives it")
    if unbuilt.code is None:
        _version, shape, dtype, is_fortran, raw = state
        return make_array(shape, dtype, typed(is_fortran, bool), raw)
    _version, order, subarray, names, fields, _size, _alignment, _flags = state
    if not (subarray is None and names is None and fields is None):
        raise Refused("holds an array of several fields; only numbers and text are read")
    return make_dtype(unbuilt.code, typed(order, str))


def make_dtype(code: str, order: str) -> np.dtype:
    """The dtype of, for instance, "f4" and "<"."""
    if not re.fullmatch(r"[biufcSU][1-9]\d{0,8}", code) or order not in ("<", ">", "|", "="):
        raise Refused(f"holds an array of dtype {shown(code)}; only numbers and text are read")
    # No number has 3 bytes.
    with damage(TypeError):
        return np.dtype(order + code)


def make_array(shape: Any, dtype: Any, is_fortran: bool, raw: Any) -> np.ndarray:
    """An array of its own memory, in the machine's byte order."""
    if not isinstance(dtype, np.dtype) or not _is_shape(shape):
        raise Refused("is damaged: an array has no dtype or an impossible shape")
    # Pickles made under Python 2 hold bytes as text.
    raw = _encode(raw, "latin1") if type(raw) is str else typed(raw, bytes)
    if math.prod(shape) * dtype.itemsize != len(raw):
        raise Refused("is damaged or incomplete: an array's data are not of the size of its shape")
    if dtype.kind == "U" and np.frombuffer(raw, dtype.byteorder + "u4").max(initial=0) > 0x10FFFF:
        raise Refused("is damaged: an array has characters beyond Unicode")
    with damage(ValueError):
        array = np.ndarray(shape, dtype, bytearray(raw), order="F" if is_fortran else "C")
    return array.astype(dtype.newbyteorder("="), copy=False)


def _scalar(dtype, raw) -> Any:
    return make_array((), dtype, False, raw)[()]


def _frombuffer(raw, dtype, shape, order) -> np.ndarray:
    return make_array(shape, dtype, typed(order, str) == "F", raw)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_shape(value: Any) -> bool:
    return type(value) is tuple and len(value) <= MAX_RANK and all(map(_is_size, value))


# === Plain values ===


def _dictionary(pairs=()) -> dict:
    sequences = (list, tuple)
    if type(pairs) not in sequences or not all(
        type(pair) in sequences and len(pair) == 2 for pair in pairs
    ):
        raise Refused(DAMAGED)
    result = update({}, pairs)
    if len(result) != len(pairs):
        raise Refused("has a dictionary with one key twice")
    return result


def update(target: dict, pairs: Iterable[Sequence]) -> dict:
    """`target` with the pairs of keys and values added, whose keys must be plain."""
    for key, value in pairs:
        # These hash fast, and nobody can make their hashes collide.
        if type(key) not in (str, bytes, int, bool, NoneType):
            raise Refused(f"has a {kind(key)} as the key of a dictionary")
        if type(key) is int and not -(2**63) <= key < 2**63:
            raise Refused("has a number beyond 64 bits as the key of a dictionary")
        target[key] = value
    return target


def _encode(text, encoding) -> bytes:
    if typed(encoding, str) not in ("latin1", "latin-1"):
        raise Refused("encodes text in another way than as latin1")
    with damage(UnicodeEncodeError):
        return typed(text, str).encode("latin1")


def _no_bytes() -> bytes:
    return b""


# === The names ===

_NDARRAY = object()
_STORAGES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "ComplexDouble": "complex128",
    "ComplexFloat": "complex64",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
}
# PyTorch has no typed storages of these. `ml_dtypes` has added them one after the other.
_NEW = "complex32 float8_e5m2 float8_e4m3fn float8_e5m2fnuz float8_e4m3fnuz float8_e8m0fnu"
_DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in (*_STORAGES.values(), "uint16", "uint32", "uint64")
} | {name: np.dtype(getattr(ml_dtypes, name)) for name in _NEW.split() if hasattr(ml_dtypes, name)}
GLOBALS = {
    "collections.OrderedDict": _dictionary,
    "_codecs.encode": _encode,
    "builtins.bytes": _no_bytes,
    "numpy.ndarray": _NDARRAY,
    "numpy.dtype": _unbuilt_dtype,
    "numpy.core.multiarray._reconstruct": _unbuilt_array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _frombuffer,
    "torch.Size": _unchanged,
    "torch.storage.UntypedStorage": StorageType(np.dtype(np.uint8), is_untyped=True),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _unchanged,
    **{f"torch.{name}Storage": StorageType(_DTYPES[of]) for name, of in _STORAGES.items()},
    **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
}
# Under Python 2, under NumPy 2, and for tensors on a GPU.
_OTHER_MODULES = {
    "__builtin__": "builtins",
    "numpy._core.multiarray": "numpy.core.multiarray",
    "numpy._core.numeric": "numpy.core.numeric",
    "torch.cuda": "torch",
}
