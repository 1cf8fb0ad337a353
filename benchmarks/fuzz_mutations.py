"""Seeded mutations of bytes, JSON, pickles, PNG and HDF5 files, for `fuzz.py`."""

import contextlib
import copy
import io
import itertools
import json
import math
import pickletools
import random
import struct
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np

NUMBERS = (-1, 0, 1, 2, 3, 255, 2**16, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**70)
# Values of JSON and of Python that are rarely where they should be.
ODD = (
    *(None, True, False, *NUMBERS, -(2**63) - 1, 10**400),
    *(0.5, -0.0, 1.5, 1e-320, 3.5e38, 1e308, math.nan, math.inf, -math.inf),
    *("", "0", "1", "cat", "no\0text", "two\nlines", "../x", "/etc/passwd", "\ud800", "é" * 300),
    *([], {}, [[]], [None] * 4, [0, 0, 1e300, 1e300], {"": None}, {"class_name": "x"}),
)
# Arguments of a command line.
TOKENS = (
    *("", "-", "--", "--no", "-1", "0", "1", "1e400", "nan", "inf", "1_000", "0x10", "1" * 5000),
    *("None", "True", "\ud800", "é\0", "a b", "../x", "/", "--no-such-option", "--seed=7", "[1]"),
)


# === Bytes ===


def truncate(content: bytes, random: random.Random) -> bytes:
    return content[: random.randrange(len(content))]


def flip_bits(content: bytes, random: random.Random) -> bytes:
    changed = bytearray(content)
    # Half of the time in the beginning, where headers are.
    end = random.choice((64, len(content)))
    for _ in range(random.choice((1, 1, 1, 2, 8))):
        changed[random.randrange(min(end, len(changed)))] ^= 1 << random.randrange(8)
    return bytes(changed)


def insert_bytes(content: bytes, random: random.Random) -> bytes:
    place = random.randrange(len(content))
    return content[:place] + random.randbytes(random.randrange(1, 20)) + content[place:]


def repeat_bytes(content: bytes, random: random.Random) -> bytes:
    """Repeats, moves or removes a piece."""
    start, end = sorted(random.choices(range(len(content) + 1), k=2))
    return content[:start] + content[start:end] * random.choice((0, 2, 20)) + content[end:]


def put_number(content: bytes, random: random.Random) -> bytes:
    """Replaces 1 to 8 bytes, in the beginning or anywhere, by a number of either byte order."""
    kind = random.choice(("B", "<H", ">H", "<I", ">I", "<Q", ">Q"))
    number = struct.pack(kind, random.choice(NUMBERS) % 256 ** struct.calcsize(kind))
    place = random.randrange(min(random.choice((64, len(content))), len(content)))
    return content[:place] + number + content[place + len(number) :]


BYTES = (truncate, flip_bits, insert_bytes, repeat_bytes, put_number)


def mutate_bytes(content: bytes, random: random.Random) -> bytes:
    return random.choice(BYTES)(content, random) if content else random.randbytes(20)


# === JSON ===


def mutate_value(value, random: random.Random):
    """Returns a copy with one to four changes: odd, missing, repeated, renamed and moved values."""
    value = copy.deepcopy(value)
    for _ in range(random.choice((1, 1, 2, 4))):
        parent, key = _place(value, random)
        if parent is None:
            continue
        change = random.randrange(6)
        if change == 0:
            del parent[key]
        elif change == 1 and isinstance(parent, list):
            parent.insert(random.randrange(len(parent) + 1), copy.deepcopy(parent[key]))
        elif change == 1:
            parent[random.choice(("", "id", f"{key}s", "\ud800", key[:-1]))] = parent.pop(key)
        elif change == 2 and type(parent[key]) in (int, float):
            by = random.choice((-1, 2, 0.5, 1.0, 10**6, 1e-300))
            parent[key] = parent[key] * by
        elif change == 3:
            other, of = _place(value, random)
            parent[key] = copy.deepcopy(other[of]) if other else None
        else:
            parent[key] = copy.deepcopy(random.choice(ODD))
    return value


def _place(value, random: random.Random) -> tuple:
    """Returns a container inside and a key of it."""
    parent, key = None, None
    while isinstance(value, list | dict) and value and (parent is None or random.random() < 0.95):
        parent = value
        key = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value = value[key]
    return parent, key


def mutate_json(value, random: random.Random) -> bytes:
    """Returns the text of a changed value; now and then it is nested, cut or damaged as well."""
    text = json.dumps(mutate_value(value, random)).encode()
    if random.random() < 0.15:
        return mutate_bytes(text, random)
    if random.random() < 0.03:
        place = random.randrange(len(text))
        depth = random.choice((10, 900, 100_000))
        opening, closing = random.choice(((b"[", b"]"), (b'{"a":', b"}")))
        return text[:place] + opening * depth + b"1" + closing * depth + text[place:]
    return text


# === Pickles and archives ===


def edit_numbers(content: bytes, random: random.Random) -> bytes:
    """Replaces numbers in the pickle; an archive gets a new CRC-32."""
    if content[:2] != b"PK":
        return _edit_pickles(content, random)
    members = read_members(content)
    for name in members:
        if name.endswith("/data.pkl"):
            members[name] = _edit_pickles(members[name], random)
    return archive_of(members)


def _edit_pickles(content: bytes, random: random.Random) -> bytes:
    stream, places = io.BytesIO(content), []
    while content[stream.tell() : stream.tell() + 1] == b"\x80":
        operations = [*pickletools.genops(stream), (None, None, stream.tell())]
        for (operation, _, start), (_, _, end) in itertools.pairwise(operations):
            if operation.name in ("BININT", "BININT1", "BININT2"):
                places.append((start, end))
    if stream.tell() < len(content) and random.random() < 0.2:
        # The count before the first storage of the older format.
        start = stream.tell()
        count = struct.pack("<Q", random.choice(NUMBERS) % 2**64)
        return content[:start] + count + content[start + 8 :]
    count = min(random.choice((1, 1, 2, 3)), len(places))
    for start, end in sorted(random.sample(places, count), reverse=True):
        packed = random.choice(NUMBERS).to_bytes(10, "little", signed=True)
        content = content[:start] + b"\x8a" + bytes([len(packed)]) + packed + content[end:]
    return content


def read_members(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archive_of(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


# === HDF5 ===


def edit_h5(path: Path, random: random.Random, is_checked: bool = True) -> None:
    """Changes what a file holds through the library that wrote it; the checksum stays, or goes."""
    with h5py.File(path, "r+") as file:
        if not is_checked:
            file.attrs.clear()
        names = []
        file.visititems(
            lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None
        )
        for name in random.sample(sorted(names), random.choice((1, 1, 2))):
            # HDF5 itself refuses some of the changes.
            with contextlib.suppress(OSError, ValueError, OverflowError):
                _edit_array(file, name, random)


def _edit_array(file: h5py.File, name: str, random: random.Random) -> None:
    values = file[name][()]
    parent = name.rpartition("/")[0]
    change = random.randrange(9)
    if change == 0:  # A weight.
        place = tuple(random.randrange(n) for n in values.shape)
        file[name][place] = random.choice((0, 1, 3, math.nan, math.inf))
        return
    del file[name]
    if change == 1:
        file[f"{parent}/{random.choice('0129x')}"] = values
    elif change == 2:
        shape = random.choice(((), (0,), values.shape[:-1], (*values.shape, 1), values.T.shape))
        file[name] = np.zeros(shape, values.dtype)
    elif change == 3:
        dtype = random.choice(("float64", "float16", "int64", "S4", "bool", "complex64", "u1"))
        file[name] = np.zeros(values.shape, dtype)
    elif change == 4:  # Claims what it does not hold.
        shape = random.choice(((10**6, 1024), (2**40,), values.shape[:1] * 12, (2**62,)))
        file.create_dataset(name, shape, "float32", chunks=tuple(min(n, 64) for n in shape))
    elif change == 5:
        file[name] = random.choice(
            (
                h5py.SoftLink(f"/{name}"),
                h5py.SoftLink("/"),
                h5py.SoftLink("/no/such"),
                h5py.ExternalLink("/etc/passwd", "/"),
            )
        )
    elif change == 6:
        file.create_group(name)
        if parent and random.random() < 0.5:
            file[f"{name}/loop"] = file[parent]
    elif change == 7:
        file[name] = random.choice(("text", b"bytes", [1, 2], h5py.Empty("f")))
    # Otherwise it is missing.


# === PNG ===


def mutate_png(content: bytes, random: random.Random) -> bytes:
    """Changes the contents of chunks, whose CRC-32 then fits."""
    place, chunks = 8, []
    while place < len(content):
        (length,) = struct.unpack_from(">I", content, place)
        chunks.append([content[place + 4 : place + 8], content[place + 8 : place + 8 + length]])
        place += 12 + length
    for chunk in random.sample(chunks[:-1], random.choice((1, 1, len(chunks) - 1))):
        chunk[1] = mutate_bytes(chunk[1], random)
    if random.random() < 0.2:
        random.shuffle(chunks)
    written = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return content[:8] + b"".join(written)


# === Training batches ===

EDGES = (-5, 0, 1, 63, 64, 65, 1e4, -1e6, 1e20, 3e38, math.nan, math.inf, -math.inf)
LABELS = (-2, -1, 0, 2, 3, 2**31 - 1, -(2**31), 2**40, 0.5, math.nan, math.inf)


def mutate_batch(images: np.ndarray, targets: dict, random: random.Random) -> tuple:
    """Returns changed images `[B, H, W, 3]` and ground truth, or something else in their place."""
    x, y = images, {name: values.copy() for name, values in targets.items()}
    for _ in range(random.choice((0, 1, 1, 3))):
        boxes = y["boxes"]
        boxes.flat[random.randrange(boxes.size)] = random.choice(EDGES)
    if random.random() < 0.4:
        dtype = random.choice(("int32", "int64", "float32"))
        label = random.choice(LABELS)
        if dtype != "float32" and not (label == label // 1 and abs(label) < 2**31):
            dtype = "float32"
        y["labels"] = y["labels"].astype(dtype)
        y["labels"].flat[random.randrange(y["labels"].size)] = label
    if random.random() < 0.1:
        x = x.astype("float32")
        x.flat[random.randrange(x.size)] = random.choice((0.5, -1, 1e4, math.nan, math.inf))
    if random.random() < 0.3:
        x, y = random.choice(STRUCTURES)(x, y)
    return x, y


STRUCTURES = (
    lambda x, y: (x, None),
    lambda x, y: (x, [y["boxes"], y["labels"]]),
    lambda x, y: (x, {"boxes": y["boxes"]}),
    lambda x, y: (x, y | {"weights": y["labels"]}),
    lambda x, y: (x, y | {"labels": y["labels"][0]}),
    lambda x, y: (x, y | {"labels": y["labels"][..., None]}),
    lambda x, y: (x, y | {"labels": y["labels"][:, :1]}),
    lambda x, y: (x, y | {"boxes": y["boxes"][..., :3]}),
    lambda x, y: (x, y | {"boxes": y["boxes"][:1]}),
    lambda x, y: (x, y | {"boxes": y["boxes"].astype("float64")}),
    lambda x, y: (x, y | {"labels": y["labels"].astype("str")}),
    lambda x, y: (x, y | {"labels": y["labels"].astype("bool")}),
    lambda x, y: (x, {name: values[:, :0] for name, values in y.items()}),
    lambda x, y: (x, {name: values.tolist() for name, values in y.items()}),
    lambda x, y: (x, y | {"labels": [[0], [1, 2]]}),
    lambda x, y: (x[:0], {name: values[:0] for name, values in y.items()}),
    lambda x, y: (x[:1], y),
    lambda x, y: (x[0], y),
    lambda x, y: (x[..., :1], y),
    lambda x, y: (x[:, :0], y),
    lambda x, y: (x[:, :40], y),
    lambda x, y: ([x[0], x[1][:40]], y),
    lambda x, y: (x.astype("str"), y),
    lambda x, y: (x.astype("int32"), y),
    lambda x, y: (None, y),
    lambda x, y: ({"images": x, "image_sizes": np.array([[64, 64], [40, 50]], "int32")}, y),
    lambda x, y: ({"images": x, "image_sizes": np.array([[64, 65], [-1, 0]], "int32")}, y),
    lambda x, y: ({"images": x, "image_sizes": np.array([64, 64], "int32")}, y),
    lambda x, y: ({"images": x, "sizes": x}, y),
)
