"""Checkpoints are complete or absent, and restore all that a run needs."""

import errno
import shutil
import zipfile

import keras
import numpy as np
import pytest

from keras_fpn.runs.run_state import (
    RunState,
    checkpoints,
    read_checkpoint,
    write_checkpoint,
    write_model,
    write_text,
)


def model_of(units: int = 2) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(units)])
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True), "mse", jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    return model


def arrays(model):
    variables = [*model.variables, *model.optimizer.variables]
    return [keras.ops.convert_to_numpy(variable) for variable in variables]


def train(model, steps):
    for _ in range(steps):
        model.train_on_batch(np.ones((4, 3)), np.ones((4, 2)))


def test_a_checkpoint_brings_back_weights_optimizer_and_state(tmp_path):
    model = model_of()
    train(model, 3)
    state = RunState(3, 1, 0.25, [{"epoch": 1, "loss": 0.1}], [{"step": 2, "loss": 0.1 + 0.2}])
    write_checkpoint(model, state, tmp_path, keep=2)
    saved = arrays(model)
    train(model, 2)
    gone_on = arrays(model)

    other = model_of()
    assert read_checkpoint(other, tmp_path / "step-00000003.keras") == state
    for a, b in zip(arrays(other), saved, strict=True):
        np.testing.assert_array_equal(a, b)
    train(other, 2)
    for a, b in zip(arrays(other), gone_on, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_checkpoint_is_a_keras_file(tmp_path):
    model = model_of()
    write_checkpoint(model, RunState(1), tmp_path, keep=1)
    loaded = keras.saving.load_model(tmp_path / "step-00000001.keras")
    np.testing.assert_array_equal(loaded.get_weights()[0], model.get_weights()[0])


def test_the_last_ones_are_kept_in_the_order_of_their_steps(tmp_path):
    (tmp_path / "best.keras").write_bytes(b"another file")
    for steps in (90, 100, 110, 2):
        write_checkpoint(model_of(), RunState(steps), tmp_path, keep=3)
    names = [file.name for file in checkpoints(tmp_path)]
    assert names == ["step-00000090.keras", "step-00000100.keras", "step-00000110.keras"]
    assert (tmp_path / "best.keras").exists()


@pytest.mark.parametrize("name", ["step-00000005.keras", "history.csv"])
def test_a_full_disk_leaves_what_was_there(tmp_path, name):
    model, file = model_of(), tmp_path / name
    file.write_bytes(b"as it was")
    # Linux's file that is always full, under the name that is written first.
    partial = tmp_path / f".partial-{name}"
    partial.symlink_to("/dev/full")

    def write():
        if name == "history.csv":
            write_text(file, "epoch,loss\n" * 10_000)
        else:
            write_checkpoint(model, RunState(5), tmp_path, keep=1)

    with pytest.raises(OSError, match=f"{name} .*the disk is full") as error:
        write()
    assert error.value.__cause__.errno == errno.ENOSPC
    assert file.read_bytes() == b"as it was"
    assert not partial.is_symlink()


def test_a_damaged_checkpoint_is_refused_with_what_to_do(tmp_path):
    model = model_of()
    for steps in (1, 2):
        write_checkpoint(model, RunState(steps), tmp_path, keep=2)
    first, last = checkpoints(tmp_path)
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    with pytest.raises(ValueError, match=r"step-00000002\.keras cannot be read .* move it away"):
        read_checkpoint(model, last)
    last.write_bytes(content[:100])
    with pytest.raises(ValueError, match=r"resume from .*step-00000001\.keras"):
        read_checkpoint(model, last)
    # The directory of the archive, said to be where it would begin before the file.
    end = content.rindex(b"PK\5\6") + 18
    content[end] += 1
    last.write_bytes(content)
    with pytest.raises(ValueError, match=r"step-00000002\.keras cannot be read"):
        read_checkpoint(model, last)
    assert read_checkpoint(model, first).steps == 1


NONSENSE = [
    b"[" * 100_000,
    b"\xff",
    b"[]",
    b"{}",  # Of step 0.
    b'{"steps": "many"}',
    b'{"steps": -1}',
    b'{"steps": 1, "epochs": 2}',
    b'{"steps": 1, "best_score": null}',
    b'{"steps": 1, "history": [3]}',
    b'{"steps": 1, "curves": [{"step": "1"}]}',
    b'{"steps": 1, "means": {"loss": 1}}',
    b'{"steps": 1, "step": 1}',
]


def test_a_state_of_nonsense_is_refused_by_its_file(tmp_path):
    model = model_of()
    write_model(model, tmp_path / "without.keras")
    for number, content in enumerate(NONSENSE):
        file = tmp_path / str(number) / "step-00000001.keras"
        file.parent.mkdir()
        shutil.copy(tmp_path / "without.keras", file)
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr("training_state.json", content)
        with pytest.raises(ValueError, match=rf"{number}/step-00000001\.keras cannot be read"):
            read_checkpoint(model, file)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    write_checkpoint(model_of(units=5), RunState(1), tmp_path, keep=1)
    with pytest.raises(ValueError, match=r"step-00000001\.keras has another architecture"):
        read_checkpoint(model_of(units=2), tmp_path / "step-00000001.keras")


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    model = model_of()
    model.compile(keras.optimizers.Adam(), "mse")
    train(model, 1)
    write_checkpoint(model, RunState(1), tmp_path, keep=1)
    with pytest.raises(ValueError, match="another architecture"):
        read_checkpoint(model_of(), tmp_path / "step-00000001.keras")
