"""Weights files are read as PyTorch, NumPy and pickle read them, and never executed."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import re
import struct
import time
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

from keras_fpn.weights import checkpoints, pickle_globals, pickles
from keras_fpn.weights.checkpoints import read_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.* is of a format without a checksum")

FOLDER = Path(__file__).parents[1] / "reference" / "checkpoints"
STORED = sorted(path.name for path in FOLDER.iterdir() if path.suffix in (".pth", ".pkl"))
MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
WHOLE_PICKLE = b"\x80\x02}."


@pytest.fixture
def read(tmp_path):
    """Writes bytes to a file and reads it."""

    def read(content: bytes, name: str = "weights.pth"):
        (tmp_path / name).write_bytes(content)
        return read_checkpoint(tmp_path / name)

    return read


def arrays_inside(value, name=""):
    if isinstance(value, np.ndarray | np.generic):
        return {name: value}
    pairs = {}
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list | tuple):
        pairs = enumerate(value)
    return {k: v for key, item in pairs for k, v in arrays_inside(item, f"{name}/{key}").items()}


def zipped(
    pickled: bytes, storages: tuple = (), compression=zipfile.ZIP_STORED, **members
) -> bytes:
    """A PyTorch archive."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for index, storage in enumerate(storages):
            archive.writestr(f"archive/data/{index}", storage)
    return file.getvalue()


def legacy(pickled: bytes, keys: list | bytes = (), storages: bytes = b"") -> bytes:
    """A file in PyTorch's format before 1.6."""
    keys = keys if isinstance(keys, bytes) else pickle.dumps(list(keys), 2)
    return MAGIC + pickle.dumps({"little_endian": True}, 2) + pickled + keys + storages


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def integers(values) -> bytes:
    return b"(" + b"".join(pickle.dumps(value, 2)[2:-1] for value in values) + b"t"


def tensor(
    size=(2, 3), stride=(3, 1), offset=0, count=6, storage="torch\nFloatStorage", after=b""
) -> bytes:
    """A pickle of one tensor, whose storage has the key "0"; `after` ends the persistent id."""
    storage = b"(" + text("storage") + b"c" + storage.encode() + b"\n" + text("0") + text("cpu")
    storage += integers([count])[1:-1] + after + b"tQ"
    view = integers([offset])[1:-1] + integers(size) + integers(stride)
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + view + hooks + b"tR."


@contextlib.contextmanager
def memory_below(limit: int):
    """Fails if more bytes are allocated inside at any time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def refusal(read, *arguments) -> str:
    """Why a file is not read: one sentence that begins with its path."""
    with pytest.raises(ValueError, match=r"^'.*/[^/]+' .*\.$") as caught:
        read(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert ". " not in message
    return message


# === What is read ===


@pytest.mark.parametrize("name", STORED)
def test_stored_files_have_the_bits_that_pytorch_and_pickle_read(name):
    arrays = arrays_inside(read_checkpoint(FOLDER / name))
    with np.load(FOLDER / f"{name.rsplit('.', 1)[0]}.expected.npz") as expected:
        about = json.loads(str(expected["arrays"]))
        assert list(arrays) == list(about)
        for key, (dtype, shape) in about.items():
            assert arrays[key].dtype.name == dtype, key
            assert arrays[key].dtype.isnative
            assert list(arrays[key].shape) == shape, key
            assert arrays[key].tobytes() == expected[f"raw{key}"].tobytes(), key


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_training_checkpoint_keeps_its_containers_and_plain_values(form):
    checkpoint = read_checkpoint(FOLDER / f"training_{form}.pth")
    assert list(checkpoint["model"])[:3] == ["0.weight", "0.bias", "1.weight"]
    assert type(checkpoint["model"]) is dict
    assert checkpoint["optimizer"]["param_groups"][0]["lr"] == 0.1
    assert checkpoint["optimizer"]["param_groups"][0]["params"] == [0, 1, 2, 3]
    assert checkpoint["size"] == (3, 4)
    plain = [1, -1, 2**40, 2**70, 0.5, True, None, "é", b"\x00\xff", b"", (1, (2, 3), [])]
    assert checkpoint["plain"] == plain
    assert [type(value) for value in checkpoint["plain"]] == [type(value) for value in plain]


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_arrays_of_one_storage_share_memory_and_can_be_written(form):
    arrays = read_checkpoint(FOLDER / f"tensors_{form}.pth")
    arrays["base"][1, 0, 1] = 7.0
    np.testing.assert_array_equal(arrays["slice"][0, 0], np.full(5, 7.0, "float32"))
    assert not np.shares_memory(arrays["base"], arrays["channels_last"])


def test_parts_of_a_storage_that_old_files_note_are_found(read):
    part = b"(" + text("part") + integers([2, 3])[1:-1] + b"t"
    data = struct.pack("<q6f", 6, *range(6))
    for view, expected in ((b"N", [0, 1]), (part, [2, 3])):
        pickled = tensor(size=(2,), stride=(1,), after=view)
        np.testing.assert_array_equal(read(legacy(pickled, ["0"], data)), np.float32(expected))
    assert "beyond its end" in refusal(
        read, legacy(tensor(after=part.replace(b"K\x03", b"K\x05")), ["0"], data)
    )


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_files_are_read_as_numpy_reads_them(tmp_path, save):
    arrays = {
        "a": np.arange(6, dtype="float32").reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "big": np.arange(3, dtype=">f8"),
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 3), bool),
        "folder/text": np.array("configuration"),
    }
    save(tmp_path / "weights.npz", **arrays)
    found = read_checkpoint(tmp_path / "weights.npz")
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype.newbyteorder("=")


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_npy_is_read(read, version):
    file, member = io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        np.lib.format.write_array(member, np.arange(4), version=version)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.npy", member.getvalue())
    np.testing.assert_array_equal(read(file.getvalue())["x"], np.arange(4))


def test_the_format_is_detected_from_the_contents(read):
    content = (FOLDER / "numpy2_protocol2.pkl").read_bytes()
    assert read(content, "weights.npz")["__author__"] == "Third Party"


# === What is refused, and why ===


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class Evaluation(Command):
    def __reduce__(self):
        return eval, (f"open({str(self.marker)!r}, 'w')",)


class Opened(Command):
    def __reduce__(self):
        return open, (str(self.marker), "w")


FORMS = {
    "pickle": lambda pickled: pickled,
    "zip": zipped,
    "compressed zip": lambda pickled: zipped(pickled, compression=zipfile.ZIP_DEFLATED),
    "legacy object": legacy,
    "legacy machine": lambda pickled: MAGIC + pickled + WHOLE_PICKLE,
    "legacy protocol": lambda pickled: MAGIC[:15] + pickled,
    "legacy keys": lambda pickled: legacy(WHOLE_PICKLE, pickled),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("kind", "name"), [(Command, "posix.system"), (Evaluation, "builtin"), (Opened, "open")]
)
def test_a_file_that_would_run_something_is_refused_by_its_name(
    read, tmp_path, form, protocol, kind, name
):
    marker = tmp_path / "marker"
    pickled = pickle.dumps({"model": kind(marker)}, protocol)
    assert name in refusal(read, FORMS[form](pickled))
    assert not marker.exists()
    pickle.loads(pickled)  # It would have.
    assert marker.exists()


@pytest.mark.parametrize("form", ["pickle", "zip", "legacy object"])
@pytest.mark.parametrize(
    ("pickled", "name"),
    {
        # Objects that run code, load more pickles or import.
        b"ctorch.storage\n_load_from_bytes\n(U\x01.tR.": "torch.storage._load_from_bytes",
        b"ctorch._utils\n_rebuild_qtensor\n.": "torch._utils._rebuild_qtensor",
        b"ctorch._utils\n_rebuild_sparse_tensor\n.": "torch._utils._rebuild_sparse_tensor",
        b"ctorch._tensor\n_rebuild_from_type_v2\n.": "torch._tensor._rebuild_from_type_v2",
        b"ctorch.nn.modules.linear\nLinear\n)\x81.": "torch.nn.modules.linear.Linear",
        b"cnumpy.lib.npyio\nload\n.": "numpy.lib.npyio.load",
        b"cnumpy\ndtype.__new__\n.": "numpy.dtype.__new__",
        b"cbuiltins\ngetattr\n.": "builtins.getattr",
        b"ccopy_reg\n_reconstructor\n.": "copy_reg._reconstructor",
        b"(U\x04echoios\nsystem\n.": "INST os system",
        b"\x82\x01.": "EXT1",
        b"Pstorage\n.": "PERSID",
        # Nothing but the functions of the table is called, and only with what they take.
        b"U\x04echo)R.": "damaged",
        b"ctorch\nFloatStorage\n)R.": "damaged",
        b"c_codecs\nencode\n)R.": "with 0 arguments",
        b"c_codecs\nencode\nC\x01aU\x06latin1\x86R.": "bytes where str is expected",
        b"ccollections\nOrderedDict\nK\x01\x85R.": "damaged",
        b"ccollections\nOrderedDict\n]K\x01a\x85R.": "damaged",
        b"c_codecs\nencode\n(X\x01\x00\x00\x00aU\x05rot13tR.": "latin1",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\n)U\x01btR.": "a class of its own",
        b"cnumpy\ndtype\nU\x02O8K\x00K\x01\x87R(K\x03U\x01|NNNK\x00K\x00K\x00tb.": "dtype O8",
        b"cnumpy\ndtype\nU\x02V8K\x00K\x01\x87R(K\x03U\x01|NU\x01a}K\x08K\x01K\x00tb.": "several",
        # Attributes are set on nothing.
        b"}}U\x0c__setstate__K\x01sb.": "sets attributes of a dict",
        b"}}U\x09_metadataK\x01sU\x01aK\x01sb.": "sets attributes of a dict",
        b"]}U\x09_metadataK\x01sb.": "sets attributes of a list",
        # Data outside the pickle are storages alone.
        b"U\x01aQ.": "other than a tensor",
        b"(U\x06modulectorch\nFloatStorage\nU\x010U\x03cpuK\x01tQ.": "other than a tensor",
        b"(U\x07storageU\x05FloatU\x010U\x03cpuK\x01tQ.": "other than a tensor",
        b"(U\x07storagectorch\nFloatStorage\nK\x00U\x03cpuK\x01tQ.": "damaged",
        b"ctorch\nFloatStorage\n.": "StorageType outside of any array",
        b"ctorch\nfloat32\n.": "outside of any array",
        b"ctorch._utils\n_rebuild_tensor\n.": "function outside of any array",
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_any_other_object_is_refused_by_name(read, form, pickled, name):
    assert name in refusal(read, FORMS[form](b"\x80\x02" + pickled))


def test_a_pickle_that_is_no_checkpoint_has_no_storages(read):
    assert "data outside the pickle" in refusal(read, tensor())


def test_tensors_with_a_deferred_sign_are_refused(read):
    marked = tensor()[:-3] + b"}" + text("conj") + b"\x88stR."
    assert "conjugated" in refusal(read, zipped(marked, [bytes(24)]))


def test_an_archive_in_an_archive_is_not_opened(read):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/inner.pth", zipped(pickle.dumps(Command(Path("x")), 2)))
    assert "zip archive of other things" in refusal(read, file.getvalue())


def other_archive(*names) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, WHOLE_PICKLE)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "is empty"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file"),
        (b"\n<!DOCTYPE html>\n<html><body>404. Not found.</body></html>", "a web page"),
        (b"\xef\xbb\xbf<html>", "a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (b"\x93NUMPY\x01\x00" + bytes(50), "an .npy file"),
        (b"\x1f\x8b\x08" + bytes(50), "a gzip file"),
        (struct.pack("<Q", 60) + b'{"weight": {}}', "a safetensors file"),
        (struct.pack("<Q", 0x280) + b'{"weight": {}}', "a safetensors file"),
        (b"pickle".ljust(257, b"\x00") + b"ustar\x0000" + bytes(300), "a tar archive"),
        (other_archive(), "an empty zip archive"),
        (other_archive("config.json", "model.weights.h5"), "Keras's own format"),
        (other_archive("a/data.pkl", "a/constants.pkl", "a/code/a.py"), "a TorchScript archive"),
        (other_archive("word/document.xml"), "a zip archive of other things"),
        (other_archive("a/data.pkl", "b/data.pkl"), "a zip archive of other things"),
        (other_archive("x.npy"), "not a NumPy array"),
        (b"\x7fELF" + bytes(100), r"begins with b'\x7fELF"),
    ],
)
def test_other_files_are_recognized(read, content, kind):
    message = refusal(read, content)
    assert kind in message
    assert "expected a PyTorch checkpoint" in message


def test_a_missing_file_and_a_folder(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"missing\.pth"):
        read_checkpoint(tmp_path / "missing.pth")
    assert "is a folder" in refusal(read_checkpoint, tmp_path)


# === Damage ===


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"size": (2, 4)}, "beyond the end"),
        ({"offset": 1}, "beyond the end"),
        ({"offset": -1}, "negative"),
        ({"stride": (-3, 1)}, "negative"),
        ({"size": (-2, -3)}, "negative"),
        ({"size": (2**62, 2**62), "stride": (0, 0)}, "damaged"),
        ({"size": (2**70, 3)}, "impossible"),
        ({"size": (2**40, 3), "stride": (0, 1)}, "multiplies"),
        ({"size": (2**62,) * 10000, "stride": (0,) * 10000}, "impossible"),
        ({"size": (6,)}, "rank"),
        ({"size": (1,) * 65, "stride": (1,) * 65}, "impossible"),
        ({"count": 7}, "size or type"),
        ({"count": 5}, "size or type|beyond the end"),
        ({"count": 2**40}, "size or type|ends before the data"),
        ({"count": -1}, "impossible"),
        ({"storage": "torch\nDoubleStorage"}, "size or type"),
        ({"storage": "torch.cuda\nShortStorage"}, "size or type|bytes follow"),
        ({"storage": "torch\nQInt8Storage"}, "torch.QInt8Storage"),
    ],
)
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_tensor_that_does_not_fit_its_storage_is_refused(read, form, arguments, reason):
    raw = struct.pack("<6f", *range(6))
    if form == "zip":
        content = zipped(tensor(**arguments), [raw])
    else:
        content = legacy(tensor(after=b"N", **arguments), ["0"], struct.pack("<q", 6) + raw)
    with memory_below(2**20):
        assert re.search(reason, refusal(read, content))


def test_one_element_and_none_have_any_stride(read):
    raw = struct.pack("<6f", *range(6))
    one = read(zipped(tensor(size=(1, 6), stride=(2**62, 1)), [raw]))
    np.testing.assert_array_equal(one, np.arange(6, dtype="float32")[None])
    none = read(zipped(tensor(size=(0, 6), stride=(2**62, 1)), [raw]))
    assert none.shape == (0, 6)


@pytest.mark.parametrize(
    ("keys", "storages"),
    [
        ([], b""),
        (["0"], b""),
        (["0"], struct.pack("<q5f", 6, *range(5))),
        (["0"], struct.pack("<q6f", 5, *range(6))),
        (["0"], struct.pack("<q6f", -6, *range(6))),
        (["0"], struct.pack("<q7f", 6, *range(7))),
        (["1"], struct.pack("<q6f", 6, *range(6))),
        (["0", "0"], struct.pack("<q6f", 6, *range(6)) * 2),
        ([0], struct.pack("<q6f", 6, *range(6))),
        ([["0"]], struct.pack("<q6f", 6, *range(6))),
    ],
)
def test_storages_of_the_old_format_are_all_there_once_and_whole(read, keys, storages):
    pickled = tensor(after=b"N")
    assert read(legacy(pickled, ["0"], struct.pack("<q6f", 6, *range(6)))).shape == (2, 3)
    assert "is damaged" in refusal(read, legacy(pickled, keys, storages))


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_every_bit_of_an_archives_content_is_checked(read):
    raw = struct.pack("<6f", *range(6))
    content = zipped(tensor(), [raw])
    start = content.index(raw)
    for place in range(start, start + len(raw)):
        assert "is damaged" in refusal(read, flipped(content, place))
    assert "is damaged" in refusal(read, flipped(content, content.index(b"OrderedDict")))


def npz(**members) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def npy(descr="<f8", shape="(3,)", data=bytes(24)) -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (npy(shape="(4,)"), "not of the size"),
        (npy(shape="(1000000000000,)"), "not of the size"),
        (npy(shape="(1000000000000000000000000000000,)"), "impossible shape"),
        (npy(shape="(-3,)"), "damaged header"),
        (npy(shape="(" + "-" * 9000 + "3,)"), "damaged header"),
        (npy(shape="(" + "1" * 9000 + ",)"), "damaged header"),
        (npy(shape="(0, 4611686018427387904, 4611686018427387904)", data=b""), "damaged"),
        (npy(descr="<U1", shape="()", data=b"\xff" * 4), "beyond Unicode"),
        (npy(descr="|O"), "dtype O"),
        (npy(descr="|O8"), "dtype O8"),
        (npy(descr="|V8"), "dtype V8"),
        (npy(descr="<f3"), "damaged"),
        (npy()[:20], "damaged"),
        (b"", "not a NumPy array"),
    ],
)
def test_damaged_arrays_in_npz_files_are_refused(read, member, reason):
    assert read(npz(x=npy()))["x"].tolist() == [0.0, 0.0, 0.0]
    assert reason in refusal(read, npz(x=member))


def test_archives_with_members_twice_overlapping_or_far_larger_unpacked_are_refused(read):
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.npy", npy())
        archive.writestr("x.npy", npy())
    assert "have one name" in refusal(read, file.getvalue())

    content = npz(x=npy(), y=npy())
    first, second = (content.index(b"PK\x01\x02"), content.rindex(b"PK\x01\x02"))
    # The offset of the second member is made that of the first.
    content = content[: second + 42] + content[first + 42 : first + 46] + content[second + 46 :]
    assert "overlap" in refusal(read, content)

    bomb = zipped(WHOLE_PICKLE, [bytes(2**26 + 2**23)], zipfile.ZIP_DEFLATED)
    with memory_below(10 * len(bomb)):
        assert "claim to unpack" in refusal(read, bomb)


def test_a_misspelled_member_does_not_pass_for_a_missing_one(read):
    content = (FOLDER / "big_endian_zip.pth").read_bytes()
    assert read(content)
    # The last occurrence is in the archive's directory: without it, the data would be swapped.
    assert "is damaged" in refusal(read, flipped(content, content.rindex(b"byteorder")))


@pytest.mark.parametrize("error", [TypeError, ValueError, KeyError, IndexError, EOFError])
@pytest.mark.parametrize(
    ("module", "function", "file"),
    [
        (checkpoints, "check_members", "training_zip.pth"),
        (checkpoints, "_whole", "training_legacy.pth"),
        (checkpoints, "check_plain", "numpy2_protocol2.pkl"),
        (pickles, "find_storage", "training_zip.pth"),
        (pickles, "build", "numpy2_protocol2.pkl"),
        (pickle_globals, "_is_size", "training_legacy.pth"),
    ],
)
def test_a_bug_of_the_reader_is_not_mistaken_for_damage(monkeypatch, module, function, file, error):
    def bug(*_):
        raise error("a bug")

    monkeypatch.setattr(module, function, bug)
    with pytest.raises(error, match=r"^'?a bug'?$"):
        read_checkpoint(FOLDER / file)


def test_a_name_with_the_start_of_its_sha256_is_checked(read):
    content = (FOLDER / "tensors_legacy.pth").read_bytes()
    digits = hashlib.sha256(content).hexdigest()
    # Somewhere in the last storage, where nothing else could tell.
    changed = flipped(content, len(content) - 1)
    assert read(changed).keys() == read(content).keys()
    for length in (8, 20, 64):
        name = f"model-{digits[:length]}.pth"
        assert read(content, name).keys() == read(changed).keys()
        assert "its SHA-256 begins with" in refusal(read, changed, name)
    # Not hashes: too short, a date, a count, another kind of file.
    for name in ("model-abcdef.pth", "model-20170315.pth", "x-0012345678.pkl", "x-abcdef12.npz"):
        assert read(content, name)["scalar"] == 2.5


@pytest.mark.parametrize("name", ["tensors_zip.pth", "training_legacy.pth", "numpy2_protocol2.pkl"])
def test_mutated_files_are_refused_in_one_sentence_or_read(read, name):
    content = (FOLDER / name).read_bytes()
    digits = hashlib.sha256(content).hexdigest()[:10]
    generator = random.Random(name)
    whole = {k: v.tobytes() for k, v in arrays_inside(read(content)).items()}
    refused = 0
    for _ in range(40):
        place = generator.randrange(len(content))
        assert refusal(read, content[:place])
        changed = flipped(content, place)
        refusal(read, changed, f"changed-{digits}.{name[-3:]}")
        try:
            found = arrays_inside(read(changed))
        except ValueError:
            refused += 1
            continue
        if "zip" in name:
            assert {k: v.tobytes() for k, v in found.items()} == whole
    assert refused >= 5


# === Pickles that would take too much memory or time ===


def doubled(level: bytes, times: int, end: bytes) -> bytes:
    """A pickle in which each level holds the one before twice."""
    twice = (b"(h%ch%c%sq%c" % (i, i, end, i + 1) for i in range(times))
    return b"\x80\x02(" + level + b"q\x00" + b"".join(twice) + b"l."


@pytest.mark.parametrize(
    ("pickled", "reason"),
    {
        # Lists and tuples whose values would be billions if gone through.
        doubled(b"]", 60, b"l"): "more values",
        doubled(b")", 60, b"t"): "more values",
        # The hash of a tuple goes through all of it.
        doubled(b")", 60, b"t")[:-2] + b"}h\x3cK\x00sl.": "a tuple as the key",
        b"\x80\x02}\x8a\x09" + b"\x01" * 9 + b"K\x00s.": "beyond 64 bits",
        b"\x80\x02]q\x00h\x00a.": "contains itself",
        b"\x80\x02}q\x00K\x00h\x00s.": "contains itself",
        b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b".": "nests containers",
        b"\x80\x02" + b")" + b"\x85" * 200 + b".": "nests containers more than 100 deep",
        b"\x80\x02" + b"(" * 5000 + b".": "damaged",
        b"\x80\x02" + b"N0" * 10 + b".": "POP",
        b"\x80\x02}" + b"(" * 3 + b"u.": "damaged",
        b"\x80\x02X\xff\xff\xff\x7fabc.": "damaged",
        b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7fabc.": "damaged",
        b"\x80\x02r\xff\xff\xff\x7f.": "damaged",
        b"\x80\x02\x8b\xff\xff\xff\x7f.": "damaged",
        b"\x80\x02}(K\x00u.": "damaged",
        b"\x80\x02h\x07.": "damaged",
        b"\x80\x02NN.": "damaged",
        b"\x80\x02.": "damaged",
        b"\x80\x02N.N.": "bytes follow",
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("form", ["pickle", "zip"])
def test_pickles_that_grow_without_end_are_refused(read, form, pickled, reason):
    content = FORMS[form](pickled)
    with memory_below(2**22):
        assert reason in refusal(read, content)


@pytest.mark.parametrize(
    "call",
    [
        b"c_codecs\nencode\nh\x00U\x06latin1\x86R",
        b"cnumpy.core.multiarray\nscalar\nh\x01h\x00\x86R",
        b"cnumpy.core.numeric\n_frombuffer\n(h\x00h\x02J\x00\x00\x10\x00\x85U\x01CtR",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
        b"(K\x01J\x00\x00\x10\x00\x85h\x02\x89h\x00tb",
    ],
)
def test_one_text_is_not_made_into_many_arrays(read, call):
    dtype = b"cnumpy\ndtype\nU%c%sK\x00K\x01\x87R(K\x03U\x01|NNNK\x00K\x00K\x00tbq%c"
    dtypes = dtype % (8, b"S1048576", 1) + dtype % (2, b"u1", 2)
    content = b"\x80\x02(" + text("a" * 2**20) + b"q\x00" + dtypes + call * 1024 + b"t."
    # Of a gibibyte, 64 MiB and 16 times the file's mebibyte may be made.
    with memory_below(100 * 2**20):
        assert "multiplies" in refusal(read, content)


def test_too_many_operations_are_refused(read, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_OPERATIONS", 1000)
    assert len(read(b"\x80\x02(" + b"N" * 900 + b"t.")) == 900
    assert "more than 1000 operations" in refusal(read, b"\x80\x02(" + b"N" * 1100 + b"t.")


@pytest.mark.parametrize(("item", "reason"), [(b"N", "operations"), (b"]", "multiplies")])
def test_a_small_file_of_many_values_is_refused(read, item, reason):
    # A list takes one byte of the file and 200 of memory.
    assert reason in refusal(read, b"\x80\x02(" + item * 260_000 + b"l.")


def test_what_takes_long_is_not_repeated(read):
    """Nothing here is large, and each would take minutes if it were done as often as it says."""
    many = b"(" + integers(range(500))[1:-1] * 100 + b"t"
    pairs = b"(" + b"K\x00K\x00\x86" * 20000 + b"l"
    names = b"}(" + b"".join(text(str(i)) + b"N" for i in range(20000)) + b"u"
    dtype = b"cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R"
    state = b"(K\x03U\x01<" + b"N" * 20000 + b"t"
    for once, again in (
        (many, b"ctorch\nSize\nh\x00R"),
        (many, b"ctorch._utils\n_rebuild_tensor\nh\x00R"),
        (pairs, b"ccollections\nOrderedDict\nh\x00\x85R"),
        (names, b"ccollections\nOrderedDict\n)Rh\x00b"),
        (state, dtype + b"h\x00b"),
    ):
        start = time.perf_counter()
        refusal(read, b"\x80\x02(" + once + b"q\x00" + again * 100_000 + b"t.")
        assert time.perf_counter() - start < 1.0


def test_a_dictionary_with_a_key_twice_is_refused(read):
    pairs = pickle.dumps([("x", 1), ("y", 2)], 2)[2:-1]
    pickled = b"\x80\x02ccollections\nOrderedDict\n" + pairs + b"\x85R."
    assert read(pickled) == {"x": 1, "y": 2}
    assert "one key twice" in refusal(read, pickled.replace(b"y", b"x"))


def test_containers_may_be_shared(read):
    shared = [1, {"a": 2}]
    value = read(pickle.dumps({"x": shared, "y": shared}, 2))
    assert value == {"x": shared, "y": shared}
    assert value["x"] is value["y"]


@pytest.mark.parametrize("name", ["model_final.pkl", "model-20170315.pkl"])
def test_a_format_without_a_checksum_is_warned_of(tmp_path, name):
    content = pickle.dumps({"x": np.arange(3.0)}, protocol=2)
    (tmp_path / name).write_bytes(content)
    digits = hashlib.sha256(content).hexdigest()[:8]
    with pytest.warns(UserWarning, match=rf"without a checksum: .* begins with {digits}"):
        read_checkpoint(tmp_path / name)
    named = tmp_path / f"model_final-{digits}.pkl"
    (tmp_path / name).rename(named)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_checkpoint(named)
