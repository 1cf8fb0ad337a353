"""`.weights.h5` files: those of trained models, of damage, and of what they claim."""

import contextlib
import re
import warnings
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from keras.ops import convert_to_numpy
from small_detector import tiny_detector

import keras_fpn


@contextlib.contextmanager
def peak_below(megabytes: int):
    """Holds the process to a growth of its memory."""

    def kilobytes(entry):
        return int(re.search(rf"{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    Path("/proc/self/clear_refs").write_text("5")  # Forgets the peak so far.
    before = kilobytes("VmHWM")
    yield
    assert (kilobytes("VmHWM") - before) / 1024 < megabytes


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model with an optimizer's state, and its weights' file."""
    model = tiny_detector()
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True))
    model.optimizer.build(model.trainable_variables)
    file = tmp_path_factory.mktemp("trained") / "x.weights.h5"
    model.save_weights(file)
    return model, file


def changed(file, path, change):
    """A copy of a file, with its arrays changed and its checksum gone."""
    path.write_bytes(file.read_bytes())
    with h5py.File(path, "r+") as copy:
        copy.attrs.clear()
        change(copy)
    return path


def replace(name, **data):
    def change(file):
        del file[name]
        file.create_dataset(name, **data)

    return change


def test_weights_of_a_trained_model_are_loaded_without_its_optimizer(trained):
    model, file = trained
    with h5py.File(file) as content:
        assert "optimizer" in content
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = tiny_detector(weights=file)
    for ours, theirs in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_keras_reads_a_file_with_a_checksum(trained):
    model, file = trained
    other = tiny_detector()
    keras.Model.load_weights(other, file)
    np.testing.assert_array_equal(other.get_weights()[0], model.get_weights()[0])


def test_a_changed_weight_is_refused(trained, tmp_path):
    model, file = trained
    content = bytearray(file.read_bytes())
    kernel = convert_to_numpy(model.box_head.hidden[0].kernel).tobytes()
    content[content.index(kernel) + 5] ^= 64
    (tmp_path / "changed.weights.h5").write_bytes(content)
    for load in (lambda path: tiny_detector(weights=path), model.load_weights):
        with pytest.raises(ValueError, match=r"changed\.weights\.h5' is damaged.*SHA-256"):
            load(tmp_path / "changed.weights.h5")


def test_a_file_without_a_checksum_is_warned_of_once(trained, tmp_path):
    path = changed(trained[1], tmp_path / "plain.weights.h5", lambda file: None)
    with pytest.warns(UserWarning, match="checksum") as caught:
        tiny_detector(weights=path)
    assert [re.search("'(.*)' has no checksum", str(w.message))[1] for w in caught] == [str(path)]
    with pytest.warns(UserWarning, match=r"plain\.weights\.h5' has no checksum"):
        trained[0].load_weights(path)


@pytest.mark.filterwarnings("ignore:.*no checksum")
def test_a_million_classes_without_their_weights_take_no_memory(trained, tmp_path):
    change = replace("box_head/class_logits/vars/1", data=np.zeros(1_000_001, "float32"))
    path = changed(trained[1], tmp_path / "million.weights.h5", change)
    with peak_below(60), pytest.raises(ValueError, match=r"million\.weights\.h5' do not fit"):
        # The head of the default size would take 20 GB.
        keras_fpn.build_fpn_faster_rcnn(weights=path, backbone="resnet18")


@pytest.mark.filterwarnings("ignore:.*no checksum")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            replace("box_head/deltas/vars/1", shape=2**28, dtype="f4", chunks=(2**20,)),
            "claim to unpack to 1074",
        ),
        (replace("box_head/deltas/vars/1", data="text"), "deltas/vars/1, which is no array"),
        (lambda file: file.update({"x": np.dtype("f4")}), "x, which is no array"),
        (lambda file: file.update({"box_head/x": h5py.SoftLink("/optimizer")}), "x in another pl"),
        (lambda file: file.update({"x": h5py.ExternalLink("/etc/passwd", "/")}), "x in another pl"),
        (lambda file: file.update({"box_head/x": file["/"]}), "more than 32 deep"),
        (lambda file: file.create_group("/".join("abc" * 20)), "more than 32 deep"),
    ],
)
def test_what_no_model_has_written_is_refused(trained, tmp_path, change, reason):
    path = changed(trained[1], tmp_path / "x.weights.h5", change)
    with peak_below(60), pytest.raises(ValueError, match=rf"x\.weights\.h5' .*{reason}"):
        tiny_detector(weights=path)


def test_arrays_of_another_file_are_never_read(trained, tmp_path):
    (tmp_path / "secret").write_bytes(bytes(48))
    change = replace(
        "box_head/deltas/vars/1", shape=12, dtype="f4", external=[(str(tmp_path / "secret"), 0, 48)]
    )
    path = changed(trained[1], tmp_path / "x.weights.h5", change)
    with pytest.raises(ValueError, match="vars/1 in another place or file"):
        trained[0].load_weights(path)
