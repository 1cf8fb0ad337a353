"""The program export on the folder of a run."""

import errno
import json
import os
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_detector import two_level_detector

from keras_fpn.runs import export
from keras_fpn.serving import saved_model

CLASS_NAMES = ["bolt", "nut", "washer"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder as training leaves it, as far as the export reads it."""
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("runs") / "first"
    (folder / "checkpoints").mkdir(parents=True)
    two_level_detector().save(folder / "checkpoints" / "best.keras")
    recipe = {"evaluation_shorter_edge": 48, "longest_edge": 64}
    (folder / "config.json").write_text(json.dumps({"class_names": CLASS_NAMES, "recipe": recipe}))
    return folder


def test_a_run_becomes_a_served_model_with_its_sizes_and_class_names(run, tmp_path, capsys):
    output = tmp_path / "models" / "detector" / "1"
    export.main(["--model", str(run), "--output", str(output), "--class-names"])
    assert "3 classes" in capsys.readouterr().out
    assert (output / "assets.extra" / "tf_serving_warmup_requests").exists()
    # 48 x 64 pixels are not resized, so that the answer is that of the checkpoint for them.
    image = np.random.RandomState(0).randint(0, 256, (1, 48, 64, 3)).astype("uint8")
    answer = tf.saved_model.load(str(output)).signatures["serving_default"](
        images=tf.constant(image)
    )
    model = keras.saving.load_model(run / "checkpoints" / "best.keras")
    model.run_eagerly = True  # Tracing takes longer than a batch.
    wanted = model.predict(image, verbose=0)
    np.testing.assert_allclose(answer["detection_scores"], wanted["scores"], atol=1e-4)
    np.testing.assert_allclose(
        answer["detection_boxes"] * np.array([48, 64, 48, 64]),
        wanted["boxes"][..., [1, 0, 3, 2]],
        atol=1e-3,
    )
    names = [name.decode() for name in answer["detection_class_names"].numpy()[0]]
    assert names == [CLASS_NAMES[label] for label in wanted["labels"][0]]


def test_options_are_those_of_the_exporter(run, tmp_path, monkeypatch):
    received = []
    monkeypatch.setattr(
        saved_model, "export_saved_model", lambda model, path, **options: received.append(options)
    )
    arguments = ["--model", str(run), "--output", str(tmp_path / "1")]
    export.main(arguments)
    more = "--shorter-edge 40 --longest-edge 50 --precision bfloat16 --frozen --no-warm-up"
    limits = "--errors-as-output --max-images 2 --max-pixels 5000"
    export.main([*arguments, *more.split(), *limits.split()])
    plain = {"frozen": False, "precision": "float32", "class_names": None, "warm_up": True}
    plain |= {"errors_as_output": False, "max_images": 8, "max_pixels": None}
    assert received == [
        {"shorter_edge": 48, "longest_edge": 64, **plain},
        {
            "shorter_edge": 40,
            "longest_edge": 50,
            "frozen": True,
            "precision": "bfloat16",
            "class_names": None,
            "errors_as_output": True,
            "max_images": 2,
            "max_pixels": 5000,
            "warm_up": False,
        },
    ]


def test_a_full_disk_ends_in_one_sentence(run, tmp_path, monkeypatch):
    def fail(model, path, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(saved_model, "export_saved_model", fail)
    with pytest.raises(SystemExit, match=r"^error: .*/1 could not be written: the disk is full; "):
        export.main(["--model", str(run), "--output", str(tmp_path / "1")])


def test_bad_input_ends_in_one_sentence(run, tmp_path):
    with pytest.raises(SystemExit, match=r"--output .*exists"):
        export.main(["--model", str(run), "--output", str(tmp_path)])
    output = str(tmp_path / "1")
    with pytest.raises(SystemExit, match=r"--model .*nowhere' not found"):
        export.main(["--model", str(tmp_path / "nowhere"), "--output", output])
    with pytest.raises(SystemExit, match=r"longest_edge.*-5"):
        export.main(["--model", str(run), "--output", output, "--longest-edge", "-5"])
    nameless = tmp_path / "nameless.keras"
    shutil.copy(run / "checkpoints" / "best.keras", nameless)
    with pytest.raises(SystemExit, match=r"--class-names: .*nameless\.keras'"):
        export.main(["--model", str(nameless), "--output", output, "--class-names"])
