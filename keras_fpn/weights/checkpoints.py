"""Reads weights files without PyTorch, and without running anything they contain."""

import hashlib
import io
import os
import re
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from keras_fpn.weights.pickle_globals import Storage, StorageType, make_array, make_dtype
from keras_fpn.weights.pickles import check_plain, unpickle
from keras_fpn.weights.refusal import DAMAGED, Refused, damage

# What a pickle's calls may make, compressed members may unpack to and views may repeat: 64 MiB and
# this many times the file's size.
MAX_GROWTH = 16

EXPECTED = "expected a PyTorch checkpoint, a pickle of NumPy arrays or an .npz file"
LEGACY_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

OTHER_FILES = {
    rb"\x89HDF\r\n\x1a\n": "an HDF5 file",
    rb"(?:\xef\xbb\xbf)?\s*(?i:<!doctype|<html|<head|<\?xml)": "a web page, perhaps an error",
    rb"version https://git-lfs": "a Git LFS pointer instead of the file it stands for",
    rb"\x93NUMPY": "an .npy file, a single array without a name",
    rb"\x1f\x8b": "a gzip file, which must be decompressed first",
    rb"PK\x05\x06": "an empty zip archive",
    rb"(?s:.{8}\{\s*\")": "a safetensors file",
    rb"(?s:.{257}ustar)": "a tar archive, perhaps a checkpoint of PyTorch before 0.1.10",
}
PICKLE = rb"\x80[\x00-\x05]|\([dl]p|[]}][q(.]|\(?[ci][\w.]+\n[\w.]+\n"
# What `zipfile` raises for a damaged archive, or for a member that is not in it.
ZIP_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    KeyError,
    ValueError,
    OverflowError,
    NotImplementedError,
)


def read_checkpoint(path: str | os.PathLike) -> Any:
    """Reads a weights file; the format is detected from its contents.

    The formats are PyTorch checkpoints (zip archives, and those written before 1.6), pickles of
    NumPy arrays such as Detectron2's model zoo publishes, and `.npz` files. Tensors become arrays
    with the same values (bfloat16 and float8 as in `ml_dtypes`); tensors that share a storage share
    memory. Parameters become arrays, ordered dictionaries `dict`, `torch.Size` a tuple. Quantized,
    sparse and conjugated tensors, tensor subclasses and any other object are refused by name.
    Reading takes up to four times the file's size in memory; a file that would take more than
    64 MiB and 16 times its size, or hold more than one pickle operation for every 8 bytes (250,000
    for files below 2 MB), is refused.

    A zip archive is checked by its CRC-32. Pickles and PyTorch's older format have no checksum: a
    changed weight is noticed only where the name of a `.pth`, `.pt` or `.pkl` file ends in 8 or
    more leading hex digits of its SHA-256, as published files do (`resnet50-0676ba61.pth`; digits
    without a letter are taken for a date or a count). Where it does not, a warning says so.

    Args:
        path: path of the file.

    Returns:
        Dictionaries, lists and tuples of `str`, `bytes`, `int`, `float`, `bool`, `None` and NumPy
        arrays or scalars, in native byte order; a dictionary for an `.npz` file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file has another format, is damaged or incomplete, or contains more than
            tensors, arrays and plain containers.
    """
    path = Path(path)
    try:
        return _read(path)
    except Refused as refused:
        reason = f"{DAMAGED}; {EXPECTED}" if str(refused) == DAMAGED else str(refused)
        raise ValueError(f"{str(path)!r} {reason}.") from refused.__cause__


def _read(path: Path) -> Any:
    if path.is_dir():
        raise Refused(f"is a folder; {EXPECTED}")
    with path.open("rb") as file:
        beginning = file.read(512)
        if not beginning:
            raise Refused(f"is empty; {EXPECTED}")
        for pattern, description in OTHER_FILES.items():
            if re.match(pattern, beginning):
                raise Refused(f"seems to be {description}; {EXPECTED}")
        is_zip = beginning[:4] == b"PK\x03\x04"
        if not is_zip and not re.match(PICKLE, beginning):
            raise Refused(f"is not a weights file, it begins with {beginning[:16]!r}; {EXPECTED}")
        file.seek(0)
        data = file.read()
    digits = re.search(r"-([0-9a-f]{8,64})\.(?:pth|pt|pkl)$", path.name)
    named = digits[1] if digits and not digits[1].isdigit() else None
    sha256 = "" if is_zip and named is None else hashlib.sha256(data).hexdigest()
    if named is not None and not sha256.startswith(named):
        raise Refused(
            f"{DAMAGED}: its SHA-256 begins with {sha256[:8]}, not with {named} as its name says"
        )
    value = _read_zip(data) if is_zip else _read_pickles(data)
    check_plain(value)
    if not is_zip and named is None:
        warnings.warn(
            f"{str(path)!r} is of a format without a checksum: changed weights would go unnoticed. "
            f"Its SHA-256 begins with {sha256[:8]}; it is checked if that ends the file's name, as "
            f"in '{path.stem}-{sha256[:8]}{path.suffix}'.",
            stacklevel=4,
        )
    return value


# === Zip archives ===


def _read_zip(data: bytes) -> Any:
    with damage(*ZIP_DAMAGE):
        archive = zipfile.ZipFile(io.BytesIO(data))
    with archive:
        names = archive.namelist()
        if {"config.json", "model.weights.h5"} <= set(names):
            raise Refused(f"seems to be a model in Keras's own format; {EXPECTED}")
        folders = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl")]
        is_npz = bool(names) and all(name.endswith(".npy") for name in names)
        if not is_npz and len(folders) != 1:
            raise Refused(f"seems to be a zip archive of other things; {EXPECTED}")
        if folders and f"{folders[0]}/constants.pkl" in names:
            raise Refused(f"seems to be a TorchScript archive, which holds code; {EXPECTED}")
        check_members(archive, len(data))
        if is_npz:
            return {n.removesuffix(".npy"): _read_npy(read_member(archive, n)) for n in names}
        return _read_torch_zip(archive, folders[0], _allowance(len(data)))


def check_members(archive: zipfile.ZipFile, file_size: int) -> None:
    """Refuses an archive whose members overlap, or may unpack to far more than the file's size."""
    members = sorted(archive.infolist(), key=lambda member: member.header_offset)
    ends = [member.header_offset for member in members[1:]] + [archive.start_dir]
    if members and members[0].header_offset < 0:
        raise Refused(f"{DAMAGED}: a member of the archive is said to precede the file")
    for member, end in zip(members, ends, strict=True):
        # 30 bytes of header precede a member's name and contents.
        if member.header_offset + 30 + len(member.orig_filename) + member.compress_size > end:
            raise Refused(f"{DAMAGED}: members of the archive overlap")
        if member.flag_bits & 0x61 or member.compress_type not in (0, zipfile.ZIP_DEFLATED):
            raise Refused("has members that are encrypted or of an unsupported compression")
        # Compares the two places that have a member's name: one misspelled would pass for missing.
        with damage(*ZIP_DAMAGE):
            archive.open(member).close()
    if len(set(archive.namelist())) < len(members):
        raise Refused("is damaged: two members of the archive have one name")
    unpacked = sum(member.file_size for member in members)
    if unpacked > _allowance(file_size):
        raise Refused(f"has {file_size} bytes that claim to unpack to {unpacked}")


def read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Returns the contents of a member, after comparing its CRC-32."""
    with damage(*ZIP_DAMAGE):
        return archive.read(name)


def _read_torch_zip(archive: zipfile.ZipFile, folder: str, allowance: int) -> Any:
    order = b"little"
    if f"{folder}/byteorder" in archive.namelist():
        order = read_member(archive, f"{folder}/byteorder")
        if order not in (b"little", b"big"):
            raise Refused("has a byte order that is neither little nor big")

    def read_storage(key: str, storage_type: StorageType, size: int) -> bytearray:
        buffer = bytearray(read_member(archive, f"{folder}/data/{key}"))
        if len(buffer) != size:
            raise Refused(f"{DAMAGED}: a storage and its tensors differ in size or type")
        if order == b"big":
            if storage_type.is_untyped:
                raise Refused("has big-endian data of a type that is not known in time")
            # A complex number is two numbers.
            itemsize = storage_type.dtype.itemsize >> (storage_type.dtype.kind == "c")
            np.frombuffer(buffer, f"u{itemsize}").byteswap(inplace=True)
        return buffer

    stream = io.BytesIO(read_member(archive, f"{folder}/data.pkl"))
    return _whole(stream, unpickle(stream, allowance, {}, read_storage))


def _read_npy(data: bytes) -> np.ndarray:
    if data[:6] != b"\x93NUMPY":
        raise Refused(f"has a member that is not a NumPy array; {EXPECTED}")
    start = 10 if data[6:7] == b"\x01" else 12
    end = start + int.from_bytes(data[8:start], "little")
    # `int` takes no more than 4300 digits.
    header = re.fullmatch(
        r"\{'descr': '(.)(\w+)', 'fortran_order': (True|False), 'shape': "
        r"\(([\dL, ]{0,4000})\), \}\s*",
        data[start:end].decode("latin1"),
    )
    if header is None:
        raise Refused("has an array of several fields or with a damaged header")
    order, code, is_fortran, shape = header.groups()
    sizes = tuple(int(size) for size in re.findall(r"\d+", shape))
    return make_array(sizes, make_dtype(code, order), is_fortran == "True", data[end:])


# === Pickles that are files of their own ===


def _read_pickles(data: bytes) -> Any:
    stream, allowance, unfilled = io.BytesIO(data), _allowance(len(data)), len(data)
    value = unpickle(stream, allowance)
    if type(value) is not int or value != LEGACY_MAGIC_NUMBER:
        return _whole(stream, value)
    protocol = unpickle(stream, allowance)
    if type(protocol) is not int or protocol != LEGACY_PROTOCOL:
        raise Refused("is a PyTorch checkpoint of an unknown protocol")
    # About the machine that wrote it; the data are little-endian whatever it says.
    unpickle(stream, allowance)

    def new_storage(_key: str, _type: StorageType, size: int) -> bytearray:
        nonlocal unfilled
        unfilled -= size
        if unfilled < 0:
            raise Refused(f"{DAMAGED}: it ends before the data that it announces")
        return bytearray(size)

    storages: dict[str, Storage] = {}
    value = unpickle(stream, allowance, storages, new_storage)
    # Tensors are views of their storages, whose bytes follow only now.
    keys = unpickle(stream, allowance)
    is_list = type(keys) is list and all(type(key) is str for key in keys)
    if not is_list or sorted(keys) != sorted(storages):
        raise Refused("is damaged: the storages that it lists are not those that its tensors use")
    for key in keys:
        buffer, itemsize = storages[key].buffer, storages[key].type.dtype.itemsize
        count = struct.pack("<q", len(buffer) // itemsize)
        if stream.read(8) != count or stream.readinto(buffer) != len(buffer):
            raise Refused(f"{DAMAGED}: a storage and its tensors differ in size or type")
    return _whole(stream, value)


def _whole(stream: io.BytesIO, value: Any) -> Any:
    if stream.read(1):
        raise Refused("is damaged: bytes follow after its end")
    return value


def _allowance(file_size: int) -> int:
    return 2**26 + MAX_GROWTH * file_size
