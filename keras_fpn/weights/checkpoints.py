"""Files of trained weights, read without PyTorch and without running anything of the file.

A pickle is a program. Here its operations are interpreted one by one: those that build plain
containers are carried out, and of the functions that it may call each has a counterpart below that
makes an array or a plain value. Nothing is ever imported on behalf of a file.
"""

import hashlib
import io
import math
import os
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FunctionType, NoneType
from typing import NamedTuple

import ml_dtypes
import numpy as np

# A tensor takes about 35 operations.
MAX_OPERATIONS = 2_000_000
MAX_DEPTH = 100
# As many as an array may have.
MAX_RANK = 64
# Of what a pickle's calls make, compressed members unpack to, and views repeat: 64 MiB and this
# many times the file's size.
MAX_GROWTH = 16

WANTED = "wanted is a PyTorch checkpoint, a pickle of NumPy arrays or an .npz file"
LEGACY_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

# What parsing damaged bytes raises: missing memo entries and zip members, empty stacks, operands of
# another type or number than the operation takes, undecodable text and counts beyond the file's
# end, numbers that no C integer holds, fields cut short, zip's own, and, where warnings are errors,
# escapes that no text has.
DAMAGE = (
    KeyError,
    IndexError,
    TypeError,
    ValueError,
    OverflowError,
    EOFError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    DeprecationWarning,
)

OTHER_FILES = {
    rb"\x89HDF\r\n\x1a\n": "an HDF5 file",
    rb"(?:\xef\xbb\xbf)?\s*(?i:<!doctype|<html|<head|<\?xml)": "a web page, perhaps an error",
    rb"version https://git-lfs": "a Git LFS pointer, not the file that it stands for",
    rb"\x93NUMPY": "an .npy file of one nameless array",
    rb"\x1f\x8b": "a gzip file, which must be unpacked first",
    rb"PK\x05\x06": "an empty zip archive",
    rb"(?s:.{8}\{\s*\")": "a safetensors file",
    rb"(?s:.{257}ustar)": "a tar archive, perhaps a checkpoint of PyTorch before 0.1.10",
}
PICKLE = rb"\x80[\x00-\x05]|\([dl]p|[]}][q(.]|\(?[ci][\w.]+\n[\w.]+\n"


class _Refused(Exception):
    """Says why a file is not read, as the end of a sentence that begins with its path."""


def read_checkpoint(path: str | os.PathLike) -> dict | list | tuple | np.ndarray:
    """Reads a file of weights; what it is is decided by its content.

    That is a PyTorch checkpoint (zip archive, or the format before 1.6), a pickle of NumPy arrays
    such as Detectron2's model zoo has, or an `.npz` file. Tensors become arrays of the same values,
    bfloat16 and float8 those of `ml_dtypes`; arrays of one storage share memory. Parameters are
    arrays, ordered dictionaries and `torch.Size` are `dict` and `tuple`. Quantized, sparse and
    conjugated tensors, tensors of a class of their own and any other object are refused by name.
    Reading takes up to four times the file's size in memory; a file that would take far more than
    that is refused.

    A zip archive is checked by its CRC-32. Pickles and the older PyTorch format carry no checksum:
    a changed weight shows only where the name of a `.pth`, `.pt` or `.pkl` file ends in the first 8
    or more digits of its SHA-256, as published files have it (`resnet50-0676ba61.pth`), and
    then any change is refused. Without them a warning says so. Digits without a letter are taken
    for a date or a count instead.

    Args:
        path: of the file.

    Returns:
        Dictionaries, lists and tuples of `str`, `bytes`, `int`, `float`, `bool`, `None` and numpy
        arrays or scalars, in the machine's byte order; for an `.npz` file a dictionary.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where it is another kind of file, is damaged or incomplete, or asks for more
            than tensors, arrays and plain containers.
    """
    path = Path(path)
    try:
        return _read(path)
    except _Refused as refused:
        raise ValueError(f"{str(path)!r} {refused}.") from None
    except DAMAGE as error:
        raise ValueError(f"{str(path)!r} is damaged or incomplete; {WANTED}.") from error


def _read(path: Path):
    if path.is_dir():
        raise _Refused(f"is a folder; {WANTED}")
    with path.open("rb") as file:
        beginning = file.read(512)
        if not beginning:
            raise _Refused(f"is empty; {WANTED}")
        for pattern, kind in OTHER_FILES.items():
            if re.match(pattern, beginning):
                raise _Refused(f"seems to be {kind}; {WANTED}")
        is_zip = beginning[:4] == b"PK\x03\x04"
        if not is_zip and not re.match(PICKLE, beginning):
            raise _Refused(f"is no file of weights, it begins with {beginning[:16]!r}; {WANTED}")
        file.seek(0)
        data = file.read()
    digits = re.search(r"-([0-9a-f]{8,64})\.(?:pth|pt|pkl)$", path.name)
    is_named = bool(digits) and not digits[1].isdigit()
    sha256 = "" if is_zip and not is_named else hashlib.sha256(data).hexdigest()
    if is_named and not sha256.startswith(digits[1]):
        raise _Refused(
            f"is damaged or incomplete: its SHA-256 begins with {sha256[:8]}, not with "
            f"{digits[1]} as its name says"
        )
    value = _read_zip(data) if is_zip else _read_pickles(data)
    _check_plain(value)
    if not is_zip and not is_named:
        warnings.warn(
            f"{str(path)!r} is of a format without a checksum: whether its numbers are those that "
            f"were saved is not known. Its SHA-256 begins with {sha256[:8]}; where a name ends in "
            f"that, as in '{path.stem}-{sha256[:8]}{path.suffix}', it is checked.",
            stacklevel=4,
        )
    return value


# === Zip archives ===


def _read_zip(data: bytes):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        if {"config.json", "model.weights.h5"} <= set(names):
            raise _Refused(f"seems to be a model in Keras's own format; {WANTED}")
        folders = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl")]
        is_npz = bool(names) and all(name.endswith(".npy") for name in names)
        if not is_npz and len(folders) != 1:
            raise _Refused(f"seems to be a zip archive of other things; {WANTED}")
        if folders and f"{folders[0]}/constants.pkl" in names:
            raise _Refused(f"seems to be a TorchScript archive, which holds code; {WANTED}")
        _check_members(archive, len(data))
        # Reading a member to its end compares its CRC-32.
        if is_npz:
            return {name.removesuffix(".npy"): _read_npy(archive.read(name)) for name in names}
        return _read_torch_zip(archive, folders[0], _allowance(len(data)))


def _check_members(archive: zipfile.ZipFile, file_size: int) -> None:
    members = sorted(archive.infolist(), key=lambda member: member.header_offset)
    ends = [member.header_offset for member in members[1:]] + [archive.start_dir]
    for member, end in zip(members, ends, strict=True):
        # 30 bytes of header go before a member's name and content.
        if member.header_offset + 30 + len(member.orig_filename) + member.compress_size > end:
            raise _Refused("is damaged or incomplete: members of the archive overlap")
        if member.flag_bits & 0x61 or member.compress_type not in (0, zipfile.ZIP_DEFLATED):
            raise _Refused("holds members that are encrypted or compressed in a way not read here")
    if len(set(archive.namelist())) < len(members):
        raise _Refused("is damaged: two members of the archive have one name")
    unpacked = sum(member.file_size for member in members)
    if unpacked > _allowance(file_size):
        raise _Refused(f"is {file_size} bytes that claim to unpack to {unpacked}")


def _read_torch_zip(archive: zipfile.ZipFile, folder: str, allowance: int):
    order = b"little"
    if f"{folder}/byteorder" in archive.namelist():
        order = archive.read(f"{folder}/byteorder")
        if order not in (b"little", b"big"):
            raise _Refused("is in a byte order that is neither little nor big")

    def read_storage(key, storage_type, _size):
        buffer = bytearray(archive.read(f"{folder}/data/{key}"))
        if order == b"big":
            if storage_type.is_untyped:
                raise _Refused("holds big-endian data of a type that is not known in time")
            # A complex number is two numbers.
            size = storage_type.dtype.itemsize >> (storage_type.dtype.kind == "c")
            np.frombuffer(buffer, f"u{size}").byteswap(inplace=True)
        return buffer

    stream = io.BytesIO(archive.read(f"{folder}/data.pkl"))
    return _whole(stream, _unpickle(stream, allowance, {}, read_storage))


def _read_npy(data: bytes) -> np.ndarray:
    if data[:6] != b"\x93NUMPY":
        raise _Refused(f"holds what is no NumPy array; {WANTED}")
    start = 10 if data[6] == 1 else 12
    end = start + int.from_bytes(data[8:start], "little")
    header = re.fullmatch(
        r"\{'descr': '(.)(\w+)', 'fortran_order': (True|False), 'shape': \(([\dL, ]*)\), \}\s*",
        data[start:end].decode("utf-8"),
    )
    if header is None:
        raise _Refused("holds an array of several fields or with a damaged header")
    order, kind, is_fortran, shape = header.groups()
    shape = tuple(int(size) for size in re.findall(r"\d+", shape))
    return _array(shape, _dtype(kind, order), is_fortran == "True", data[end:])


# === Pickles that are files of their own ===


def _read_pickles(data: bytes):
    stream, allowance, unfilled = io.BytesIO(data), _allowance(len(data)), len(data)
    value = _unpickle(stream, allowance)
    if type(value) is not int or value != LEGACY_MAGIC_NUMBER:
        return _whole(stream, value)
    if _unpickle(stream, allowance) != LEGACY_PROTOCOL:
        raise _Refused("is a PyTorch checkpoint of an unknown protocol")
    # About the machine that wrote it; the data are little-endian whatever it says.
    _unpickle(stream, allowance)

    def new_storage(_key, _type, size):
        nonlocal unfilled
        unfilled -= size
        if unfilled < 0:
            raise _Refused("is damaged or incomplete: it ends before the data that it announces")
        return bytearray(size)

    storages = {}
    value = _unpickle(stream, allowance, storages, new_storage)
    # Tensors are views of their storages, whose bytes come only now.
    keys = _unpickle(stream, allowance)
    if not all(type(key) is str for key in keys) or sorted(keys) != sorted(storages):
        raise _Refused("is damaged: the storages that it lists are not those that its tensors use")
    for key in keys:
        buffer, size = storages[key].buffer, len(storages[key].buffer)
        (number,) = struct.unpack("<q", stream.read(8))
        if number * storages[key].type.dtype.itemsize != size or stream.readinto(buffer) != size:
            raise _Refused(
                "is damaged or incomplete: a storage has another size than its tensors say"
            )
    return _whole(stream, value)


def _whole(stream: io.BytesIO, value):
    if stream.read(1):
        raise _Refused("is damaged: bytes follow after its end")
    return value


# === What a pickle may call ===


class _StorageType(NamedTuple):
    dtype: np.dtype
    is_untyped: bool = False


class _Storage(NamedTuple):
    type: _StorageType
    buffer: memoryview


class _Unbuilt(NamedTuple):
    """An array (`kind` None) or a dtype until its state arrives, and where it is memorised."""

    kind: str | None
    memo_keys: list


def _storage(storages, make, kind, storage_type, key, _location, number, view=None) -> _Storage:
    """The storage of a persistent id, from `storages` or by `make(key, storage_type, bytes)`."""
    if (kind, type(key), type(storage_type)) != ("storage", str, _StorageType):
        raise _Refused("refers to something other than a tensor's storage outside of its pickle")
    itemsize = storage_type.dtype.itemsize
    if not _is_size(number):
        raise _Refused("is damaged: a storage has an impossible size")
    if key not in storages:
        buffer = make(key, storage_type, number * itemsize)
        storages[key] = _Storage(storage_type, memoryview(buffer))
    buffer = storages[key].buffer
    if storages[key].type != storage_type or len(buffer) != number * itemsize:
        raise _Refused("is damaged or incomplete: a storage has another size than its tensors say")
    if view is not None:
        _key, start, number = view
        if not (
            _is_size(start) and _is_size(number) and (start + number) * itemsize <= len(buffer)
        ):
            raise _Refused("is damaged: a part of a storage reaches beyond its end")
        buffer = buffer[start * itemsize : (start + number) * itemsize]
    return _Storage(storage_type, buffer)


def _is_size(value) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_shape(value) -> bool:
    return type(value) is tuple and len(value) <= MAX_RANK and all(map(_is_size, value))


def _tensor(storage, offset, size, stride, dtype=None) -> np.ndarray:
    if type(storage) is not _Storage or not isinstance(dtype, np.dtype | None):
        raise _Refused("is damaged: a tensor has no storage or no dtype")
    if not (_is_size(offset) and _is_shape(size) and _is_shape(stride)):
        raise _Refused("is damaged: a tensor has a negative or impossible size, stride or offset")
    if len(size) != len(stride):
        raise _Refused("is damaged: a tensor's size and stride do not go together")
    dtype = dtype or storage.type.dtype
    if 0 in size:
        return np.empty(size, dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if (last + 1) * dtype.itemsize > len(storage.buffer):
        raise _Refused("is damaged: a tensor reaches beyond the end of its storage")
    # The stride of a single element is never used, and may be any number.
    strides = [step * dtype.itemsize if n > 1 else 0 for n, step in zip(size, stride, strict=True)]
    return np.ndarray(size, dtype, storage.buffer, offset * dtype.itemsize, strides)


def _tensor_v2(storage, offset, size, stride, requires_grad, hooks, metadata=None):
    return _tensor_v3(storage, offset, size, stride, requires_grad, hooks, None, metadata)


def _tensor_v3(storage, offset, size, stride, _requires_grad, _hooks, dtype, metadata=None):
    if metadata:
        raise _Refused("holds a conjugated or negated tensor; only plain tensors are read")
    return _tensor(storage, offset, size, stride, dtype)


def _unchanged(value, _requires_grad=None, _hooks=None):
    """A parameter is its array, a `torch.Size` its tuple."""
    return value


def _dictionary(pairs=()) -> dict:
    result = _update({}, pairs)
    if len(result) != len(pairs):
        raise _Refused("has a dictionary with one key twice")
    return result


def _update(target: dict, pairs: Iterable) -> dict:
    for key, value in pairs:
        # The hashes of these take little time and cannot be made to collide.
        if type(key) not in (str, bytes, int, bool, NoneType):
            raise _Refused(f"has a {_kind(key)} as the key of a dictionary")
        if type(key) is int and not -(2**63) <= key < 2**63:
            raise _Refused("has a number beyond 64 bits as the key of a dictionary")
        target[key] = value
    return target


def _encode(text, encoding) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise _Refused("encodes text in another way than as latin1")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


def _unbuilt_dtype(kind, _align, _copy) -> _Unbuilt:
    return _Unbuilt(_typed(kind, str), [])


def _unbuilt_array(array_type, _shape, _kind) -> _Unbuilt:
    if array_type is not _NDARRAY:
        raise _Refused("holds an array of a class of its own")
    return _Unbuilt(None, [])


def _build(unbuilt: _Unbuilt, state: tuple) -> np.ndarray | np.dtype:
    if unbuilt.kind is None:
        _version, shape, dtype, is_fortran, raw = state
        return _array(shape, dtype, is_fortran, raw)
    _version, order, subarray, names, fields, _size, _alignment, _flags = state
    if not (subarray is None and names is None and fields is None):
        raise _Refused("holds an array of several fields; only numbers and text are read")
    return _dtype(unbuilt.kind, order)


def _dtype(kind: str, order: str) -> np.dtype:
    if not re.fullmatch(r"[biufcSU][1-9]\d{0,8}", kind) or order not in ("<", ">", "|", "="):
        raise _Refused(f"holds an array of dtype {_shown(kind)}; only numbers and text are read")
    return np.dtype(order + kind)


def _scalar(dtype, raw) -> np.generic:
    return _array((), dtype, False, raw)[()]


def _frombuffer(raw, dtype, shape, order) -> np.ndarray:
    return _array(shape, dtype, order == "F", raw)


def _array(shape, dtype, is_fortran, raw) -> np.ndarray:
    if not isinstance(dtype, np.dtype) or not _is_shape(shape):
        raise _Refused("is damaged: an array has no dtype or an impossible shape")
    # Pickles made under Python 2 hold bytes as text.
    raw = raw.encode("latin1") if type(raw) is str else raw
    if math.prod(shape) * dtype.itemsize != len(raw):
        raise _Refused("is damaged or incomplete: an array's data are not of the size of its shape")
    array = np.ndarray(shape, dtype, bytearray(raw), order="F" if is_fortran else "C")
    return array.astype(dtype.newbyteorder("="), copy=False)


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
# Younger than PyTorch's storages with a type, and in `ml_dtypes` one after the other.
_YOUNG = "complex32 float8_e5m2 float8_e4m3fn float8_e5m2fnuz float8_e4m3fnuz float8_e8m0fnu"
_DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in (*_STORAGES.values(), "uint16", "uint32", "uint64")
} | {
    name: np.dtype(getattr(ml_dtypes, name)) for name in _YOUNG.split() if hasattr(ml_dtypes, name)
}
_GLOBALS = {
    "collections.OrderedDict": _dictionary,
    "_codecs.encode": _encode,
    "builtins.bytes": _no_bytes,
    "numpy.ndarray": _NDARRAY,
    "numpy.dtype": _unbuilt_dtype,
    "numpy.core.multiarray._reconstruct": _unbuilt_array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _frombuffer,
    "torch.Size": _unchanged,
    "torch.storage.UntypedStorage": _StorageType(np.dtype(np.uint8), is_untyped=True),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _unchanged,
    **{f"torch.{name}Storage": _StorageType(_DTYPES[of]) for name, of in _STORAGES.items()},
    **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
}
# Under Python 2, NumPy 2 and on GPUs.
_OTHER_MODULES = {
    "__builtin__": "builtins",
    "numpy._core.multiarray": "numpy.core.multiarray",
    "numpy._core.numeric": "numpy.core.numeric",
    "torch.cuda": "torch",
}


def _find_global(module: str, name: str):
    asked = f"{_OTHER_MODULES.get(module, module)}.{name}"
    if asked not in _GLOBALS:
        asked = _shown(f"{module}.{name}")
        raise _Refused(f"asks for {asked}; only tensors, arrays and plain containers are read")
    return _GLOBALS[asked]


# === The interpreter of pickles ===

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


def _refuse_storage(*_):
    raise _Refused("refers to data outside of its pickle")


def _unpickle(
    stream: io.BytesIO,
    allowance: int,
    storages: dict | None = None,
    make_storage: Callable = _refuse_storage,
):
    """The value of the pickle at the place of `stream`, which is then after it.

    Args:
        allowance: bytes that calls may make.
        storages: those already there, and those that `make_storage` makes, as in `_storage`.
    """
    storages = {} if storages is None else storages
    stack, marks, memo = [], [], {}

    def take() -> list:
        """What came since the last mark."""
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for count, (operation, argument, _) in enumerate(pickletools.genops(stream)):
        if count > MAX_OPERATIONS:
            raise _Refused(f"is a pickle of more than {MAX_OPERATIONS} operations")
        match operation.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                # One value and no open mark.
                (value,) = stack + marks
                return value
            case "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "FLOAT" | "BINFLOAT":
                stack.append(argument)
            case "STRING" | "BINSTRING" | "SHORT_BINSTRING" | "UNICODE":
                stack.append(argument)
            case "SHORT_BINUNICODE" | "BINUNICODE" | "BINUNICODE8":
                stack.append(argument)
            case "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8" | "BYTEARRAY8":
                stack.append(bytes(argument))
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(take()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                number = int(name[-1])
                stack[-number:] = [tuple(stack[-number:])]
            case "EMPTY_LIST":
                stack.append([])
            case "LIST":
                stack.append(take())
            case "APPEND":
                item = stack.pop()
                _typed(stack[-1], list).append(item)
            case "APPENDS":
                items = take()
                _typed(stack[-1], list).extend(items)
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                items = take()
                stack.append(_update({}, zip(items[::2], items[1::2], strict=True)))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _update(_typed(stack[-1], dict), [(key, value)])
            case "SETITEMS":
                items = take()
                _update(_typed(stack[-1], dict), zip(items[::2], items[1::2], strict=True))
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                key = len(memo) if argument is None else argument
                memo[key] = stack[-1]
                if type(stack[-1]) is _Unbuilt:
                    stack[-1].memo_keys.append(key)
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_find_global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_find_global(_typed(module, str), _typed(name, str)))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                # Functions are on the stack from `_GLOBALS` alone.
                value = _typed(function, FunctionType)(*_typed(arguments, tuple))
                allowance = _spent(allowance, value)
                stack.append(value)
            case "BUILD":
                state, value = stack.pop(), stack[-1]
                if type(value) is _Unbuilt:
                    stack[-1] = _build(value, _typed(state, tuple))
                    allowance = _spent(allowance, stack[-1])
                    memo.update(dict.fromkeys(value.memo_keys, stack[-1]))
                    value.memo_keys.clear()
                # Versions that `state_dict()` notes are an attribute of its dictionary.
                elif type(value) is not dict or _typed(state, dict).keys() != {"_metadata"}:
                    raise _Refused(f"sets attributes of a {_kind(value)}")
            case "BINPERSID":
                stack.append(_storage(storages, make_storage, *_typed(stack.pop(), tuple)))
            case name:
                name += f" {_shown(argument)}" if type(argument) is str else ""
                raise _Refused(f"uses pickle's operation {name}; only plain containers are read")


def _spent(allowance: int, made) -> int:
    # An entry of a dictionary takes about 100 bytes.
    size = getattr(made, "nbytes", len(made) if type(made) is bytes else 0)
    allowance -= 100 * len(made) if type(made) is dict else size
    if allowance < 0:
        raise _Refused("is a pickle that multiplies its own bytes")
    return allowance


def _typed(value, wanted: type):
    if type(value) is not wanted:
        raise TypeError(f"wanted a {wanted.__name__}, received a {type(value).__name__}")
    return value


def _kind(value) -> str:
    return type(value).__name__.lstrip("_")


def _shown(name: str) -> str:
    """A name of the file in a message: printable and short."""
    return ascii(name[:100])[1:-1]


def _allowance(file_size: int) -> int:
    return 2**26 + MAX_GROWTH * file_size


def _check_plain(value) -> None:
    """Refuses values that are not plain, hold themselves, nest deep or multiply by sharing."""
    # Id of a container to (depth, values inside); `entered` are those being measured.
    measured, entered, todo = {}, set(), [(value, False)]
    while todo:
        item, is_left = todo.pop()
        if type(item) not in (dict, list, tuple):
            plain = (str, bytes, int, float, bool, NoneType, np.ndarray)
            if type(item) not in plain and not isinstance(item, np.generic):
                raise _Refused(f"holds a {_kind(item)} outside of any array")
            continue
        inside = item.values() if type(item) is dict else item
        if is_left:
            below = [measured.get(id(child), (0, 0)) for child in inside]
            depth = 1 + max((depth for depth, _ in below), default=0)
            number = len(item) + sum(number for _, number in below)
            if depth > MAX_DEPTH:
                raise _Refused(f"nests containers more than {MAX_DEPTH} deep")
            if number > MAX_OPERATIONS:
                raise _Refused("holds more values than can be gone through")
            measured[id(item)] = depth, number
            entered.remove(id(item))
        elif id(item) in entered:
            raise _Refused("has a container that holds itself")
        elif id(item) not in measured:
            entered.add(id(item))
            todo.append((item, True))
            todo.extend((child, False) for child in inside)
