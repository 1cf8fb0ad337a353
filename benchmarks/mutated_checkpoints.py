"""Reads damaged checkpoints: each must be refused in one sentence or give identical values.

    python benchmarks/mutated_checkpoints.py 300

The checkpoints of the tests are truncated, have bits flipped, bytes inserted, or numbers edited in
their pickles and before their storages (sizes, strides, offsets, counts), each with and without the
start of the original's SHA-256 in the file name. Files that are read with different values are
counted by the reason why the reader cannot notice; the exit status is 1 if there is no such reason.
"""

import argparse
import collections
import hashlib
import io
import itertools
import pickletools
import random
import resource
import struct
import sys
import tempfile
import time
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np

from keras_fpn.weights.checkpoints import read_checkpoint

FOLDER = Path(__file__).parents[1] / "tests" / "reference" / "checkpoints"
FILES = ("tensors_zip.pth", "training_zip.pth", "big_endian_zip.pth", "protocol4_zip.pth")
FILES += ("tensors_legacy.pth", "training_legacy.pth", "protocol4_legacy.pth")
FILES += ("numpy2_protocol2.pkl", "numpy2_protocol4.pkl", "numpy1_protocol2.pkl")
FILES += ("python2_protocol2.pkl",)
# On top of what the process holds before the first file.
MEMORY_LIMIT = 512 * 2**20
NUMBERS = (-1, 0, 1, 2, 3, 255, 2**16, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**70)


def truncate(content: bytes, random: random.Random) -> bytes:
    return content[: random.randrange(len(content))]


def flip_bits(content: bytes, random: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 8))):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def insert_bytes(content: bytes, random: random.Random) -> bytes:
    place = random.randrange(len(content))
    return content[:place] + random.randbytes(random.randrange(1, 20)) + content[place:]


def edit_numbers(content: bytes, random: random.Random) -> bytes:
    """Replaces numbers in the pickle; an archive gets a new CRC-32."""
    if content[:2] != b"PK":
        return _edit_pickles(content, random)
    source, target = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            data = source.read(name)
            archive.writestr(
                name, _edit_pickles(data, random) if name.endswith("/data.pkl") else data
            )
    return target.getvalue()


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
        return (
            content[:start]
            + struct.pack("<Q", random.choice(NUMBERS) % 2**64)
            + content[start + 8 :]
        )
    for start, end in sorted(random.sample(places, random.choice((1, 1, 2, 3))), reverse=True):
        number = random.choice(NUMBERS)
        packed = number.to_bytes(10, "little", signed=True)
        content = content[:start] + b"\x8a" + bytes([len(packed)]) + packed + content[end:]
    return content


MUTATIONS = (truncate, flip_bits, insert_bytes, edit_numbers)


def flatten(value, name=""):
    """Every value inside, with its path, type and bits."""
    if isinstance(value, np.ndarray | np.generic):
        yield name, str(value.dtype), value.shape, value.tobytes()
    elif isinstance(value, dict | list | tuple):
        yield name, type(value), len(value)
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flatten(item, f"{name}/{key!r}")
    else:
        yield name, type(value), value


def outcome(path: Path, whole: list, named: bool, mutation, kind: str) -> str:
    """What became of reading a file; starts with "FAILED" if that must not happen."""
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            value = read_checkpoint(path)
        is_same = list(flatten(value)) == whole
    except ValueError as error:
        message = str(error)
        sentence = message.removeprefix(repr(str(path))).removesuffix(".")
        if len(message) - len(sentence) != len(repr(str(path))) + 1 or ". " in sentence:
            return f"FAILED, not one sentence with the path: {message!r}"
        return "refused" if "\n" not in sentence else f"FAILED, several lines: {message!r}"
    except BaseException as error:
        return f"FAILED, {error!r}"
    if named:
        return "FAILED, read despite the SHA-256 in its name"
    if is_same:
        return "identical values"
    if kind != "zip":
        if not any("without a checksum" in str(w.message) for w in warned):
            return "FAILED, different values without a warning"
        return "different values, with a warning that this format has no checksum"
    if mutation is edit_numbers:
        return "different values, edited together with the checksum"
    return "FAILED, different values without a warning"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("mutations", type=int, nargs="?", default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    contents = {name: (FOLDER / name).read_bytes() for name in FILES}
    with warnings.catch_warnings(action="ignore"):
        whole = {name: list(flatten(read_checkpoint(FOLDER / name))) for name in FILES}
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_LIMIT,) * 2)

    counts, failures, peak, slowest = collections.Counter(), [], 0, 0.0
    tracemalloc.start()
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(arguments.mutations):
            seeded = random.Random(f"{arguments.seed} {number}")
            name, mutation = FILES[number % len(FILES)], seeded.choice(MUTATIONS)
            named = seeded.random() < 0.3
            content = mutation(contents[name], seeded)
            if content == contents[name]:
                counts["-", mutation.__name__, "not changed"] += 1
                continue
            digits = hashlib.sha256(contents[name]).hexdigest()[:12]
            suffix = name.rsplit(".", 1)[1]
            path = Path(temporary, f"mutated-{digits}.{suffix}" if named else f"mutated.{suffix}")
            path.write_bytes(content)
            kind = next(kind for kind in ("zip", "legacy", "pkl") if kind in name)
            tracemalloc.reset_peak()
            before, start = tracemalloc.get_traced_memory()[0], time.perf_counter()
            result = outcome(path, whole[name], named, mutation, kind)
            slowest = max(slowest, time.perf_counter() - start)
            peak = max(peak, tracemalloc.get_traced_memory()[1] - before)
            if result.startswith("FAILED"):
                failures.append(f"{number}: {name}, {mutation.__name__}: {result}")
                result = "FAILED"
            counts[kind + (" named" if named else ""), mutation.__name__, result] += 1
    for (kind, mutation, result), count in sorted(counts.items()):
        print(f"{count:6}  {kind:14}{mutation:15}{result}")
    totals = collections.Counter()
    for (_, _, result), count in counts.items():
        totals[result] += count
    print(f"{arguments.mutations} in total: " + "; ".join(f"{n} {r}" for r, n in totals.items()))
    print(f"Peak memory for one file {peak / 2**20:.1f} MiB, longest time {slowest:.2f} s.")
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
