"""`.weights.h5` files: what is in them, within bounds, and the checksum that models add."""

import hashlib
import math
import os
import warnings
from pathlib import Path
from typing import IO

import h5py

from keras_fpn.weights.refusal import DAMAGED, Refused, damage, shown

# What the arrays of a file may unpack to: 64 MiB and this many times its size.
MAX_GROWTH = 16
MAX_OBJECTS = 100_000
MAX_DEPTH = 32
CHECKSUM = "keras_fpn_sha256"
# What h5py raises for a damaged file.
H5_DAMAGE = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError)


def add_checksum(path: str | os.PathLike) -> None:
    """Adds the SHA-256 of all arrays to a file that Keras has written."""
    with h5py.File(path, "r+") as file:
        file.attrs[CHECKSUM] = _sha256(_arrays(file, os.path.getsize(path)))


def check_h5_file(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """Checks a file's bounds and its checksum; a warning says if it has none.

    Returns:
        Name to shape of the arrays.

    Raises:
        ValueError: if the file is damaged, or holds more than arrays, or too large ones.
    """
    path = Path(path)
    try:
        with damage(*H5_DAMAGE):
            file = h5py.File(path)
        with file:
            arrays = _arrays(file, path.stat().st_size)
            with damage(*H5_DAMAGE):
                checksum = file.attrs.get(CHECKSUM)
                sha256 = None if checksum is None else _sha256(arrays)
            if checksum != sha256:
                raise Refused(f"{DAMAGED}: its arrays have another SHA-256 than it says")
            shapes = {name: array.shape for name, array in arrays.items()}
    except Refused as refused:
        raise ValueError(f"{str(path)!r} {refused}.") from refused.__cause__
    if checksum is None:
        warnings.warn(
            f"{str(path)!r} has no checksum: changed weights would go unnoticed. `save_weights` of "
            "a model of keras_fpn adds one.",
            stacklevel=3,
        )
    return shapes


def shapes_inside(file: IO[bytes], size: int) -> dict[str, tuple[int, ...]]:
    """Returns name to shape of the arrays in an HDF5 file of `size` bytes.

    Raises:
        Refused: if it is damaged, or holds more than arrays, or too large ones.
    """
    with damage(*H5_DAMAGE):
        opened = h5py.File(file)
    with opened:
        return {name: array.shape for name, array in _arrays(opened, size).items()}


def _arrays(file: h5py.File, size: int) -> dict[str, h5py.Dataset]:
    """Returns all arrays, none of which has been read."""
    arrays, claimed, count = {}, 0, 0
    todo = [("", file)]
    while todo:
        prefix, group = todo.pop()
        if prefix.count("/") > MAX_DEPTH:
            raise Refused(f"nests groups more than {MAX_DEPTH} deep")
        with damage(*H5_DAMAGE):
            items = [(name, group.get(name, getlink=True), group.get(name)) for name in group]
        count += len(items)
        if count > MAX_OBJECTS:
            raise Refused(f"holds more than {MAX_OBJECTS} arrays and groups")
        for name, link, item in items:
            if isinstance(link, h5py.HardLink) and isinstance(item, h5py.Group):
                todo.append((f"{prefix}{name}/", item))
                continue
            with damage(*H5_DAMAGE):
                is_array = isinstance(item, h5py.Dataset)
                is_here = isinstance(link, h5py.HardLink)
                if not is_here or (is_array and (item.external or item.is_virtual)):
                    raise Refused(f"has {shown(prefix + name)} in another place or file")
                if not is_array or item.shape is None or item.dtype.kind not in "fiubV":
                    raise Refused(f"has {shown(prefix + name)}, which is no array of numbers")
                claimed += math.prod(item.shape) * item.dtype.itemsize
            arrays[prefix + name] = item
    if claimed > 2**26 + MAX_GROWTH * size:
        raise Refused(f"has {size} bytes that claim to unpack to {claimed}")
    return arrays


def _sha256(arrays: dict[str, h5py.Dataset]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array[()].tobytes())
    return digest.hexdigest()
