"""The programs train, evaluate and predict on a tiny folder in COCO's layout."""

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile

import h5py
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import keras_fpn
from keras_fpn.runs import evaluate, predict, train, training
from keras_fpn.runs.callbacks import SaveCheckpoints
from keras_fpn.runs.recipes import RECIPES, Recipe
from keras_fpn.runs.run_folder import evaluation_edges
from keras_fpn.runs.run_state import RunState, checkpoint_file

CLASSES = ["bolt", "nut"]
CATEGORY_IDS = [3, 17]

pytestmark = pytest.mark.usefixtures("two_levels")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six images with one rectangle each, and one file that is not an image, in a split."""
    root = tmp_path_factory.mktemp("coco")
    random = np.random.RandomState(0)
    (root / "annotations").mkdir()
    (root / "train").mkdir()
    images, annotations = [], []
    for i in range(7):
        pixels = random.randint(0, 60, (48, 64, 3)).astype("uint8")
        x, y = random.randint(0, 30), random.randint(0, 20)
        pixels[y : y + 20, x : x + 24, i % 2] = 250
        path = root / "train" / f"{i}.png"
        Image.fromarray(pixels).save(path)
        images.append({"id": 10 + i, "file_name": path.name, "width": 64, "height": 48})
        annotations.append(
            {
                "id": i + 1,
                "image_id": 10 + i,
                "category_id": CATEGORY_IDS[i % 2],
                "bbox": [int(x), int(y), 24, 20],
                "area": 480,
                "iscrowd": 0,
            }
        )
    (root / "train" / "6.png").write_bytes(b"this is not an image")
    categories = [{"id": i, "name": n} for i, n in zip(CATEGORY_IDS, CLASSES, strict=True)]
    (root / "annotations" / "instances_train.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return root


def arrays_of(file):
    """Every array of a .keras file: weights, optimizer, samplers' seeds, loss means."""
    with zipfile.ZipFile(file) as archive:
        content = io.BytesIO(archive.read("model.weights.h5"))
    arrays = {}
    with h5py.File(content) as weights:
        weights.visititems(
            lambda name, item: arrays.update({name: item[()]}) if hasattr(item, "dtype") else None
        )
    return arrays


def train_arguments(folder, output):
    return (
        f"--dataset {folder} --train-split train --validation-split train --output {output} "
        "--backbone resnet10 --resnet.width 16 --pyramid.channels 8 --box-head.hidden-dim 8 "
        "--roi-targets.num-samples 8 --proposals.training-pre-nms 20 "
        "--proposals.training-post-nms 20 --shorter-edges 64 --evaluation-shorter-edge 64 "
        "--longest-edge 64 --batch-size 2 --images-per-epoch 6 --epochs 1 --verbose 0 "
        "--checkpoint-steps 2 --no-jit-compile"
    ).split()


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """The folder of a run of three steps."""
    output = tmp_path_factory.mktemp("runs") / "first"
    train.main(train_arguments(folder, output))
    return output


def test_a_run_leaves_configuration_checkpoints_logs_and_metrics(run, folder):
    configuration = json.loads((run / "config.json").read_text())
    assert configuration["dataset"] == str(folder)
    assert configuration["class_names"] == CLASSES
    assert configuration["category_ids"] == CATEGORY_IDS
    # What was asked for, and beside it what the stages were built with.
    assert configuration["recipe"]["model"] == {
        "backbone": "resnet10",
        "resnet": {"width": 16},
        "pyramid": {"channels": 8},
        "proposals": {"training_pre_nms": 20, "training_post_nms": 20},
        "box_head": {"hidden_dim": 8},
        "roi_targets": {"num_samples": 8},
    }
    assert configuration["recipe"]["momentum"] == Recipe.momentum
    assert configuration["stages"]["proposals"]["training_post_nms"] == 20
    assert configuration["stages"]["proposals"]["post_nms"] == 1000
    checkpoints = {"best.keras", "step-00000002.keras", "step-00000003.keras"}
    assert {path.name for path in (run / "checkpoints").iterdir()} == checkpoints
    assert list((run / "logs").rglob("events.out.tfevents.*"))
    header, *epochs = (run / "history.csv").read_text().splitlines()
    assert {"loss", "rpn_box_loss", "val_AP"} <= set(header.split(","))
    assert len(epochs) == 1
    # One of the seven files is not an image.
    assert list(json.loads((run / "skipped.json").read_text())["images"]) == ["6.png"]
    assert -1 <= json.loads((run / "metrics.json").read_text())["AP50"] <= 1


def test_the_best_model_is_for_inference(run):
    best, last = (run / "checkpoints" / name for name in ("best.keras", "step-00000003.keras"))
    # Momentum alone is as large as the weights.
    best_size, last_size = (
        sum(x.nbytes for x in arrays_of(file).values()) for file in (best, last)
    )
    assert best_size < 0.6 * last_size
    assert not any("optimizer" in name for name in arrays_of(best))
    assert any("optimizer" in name for name in arrays_of(last))
    assert keras_fpn.build_fpn_faster_rcnn(weights=best).num_classes == 2


def test_evaluate_repeats_the_metrics_of_the_run(run, tmp_path, capsys):
    evaluate.main(["--model", str(run), "--results", str(tmp_path / "results.json")])
    printed = capsys.readouterr().out
    metrics = json.loads((run / "metrics.json").read_text())
    lines = dict(line.rsplit(maxsplit=1) for line in printed.splitlines() if line.count(" ") > 3)
    assert float(lines["AP50"]) == pytest.approx(metrics["AP50"], abs=1e-4)
    assert "AP/bolt" in lines
    # The broken image was skipped, counted and named.
    assert "6.png" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert {result["category_id"] for result in results} <= set(CATEGORY_IDS)
    assert {result["image_id"] for result in results} <= set(range(10, 16))


def test_models_load_in_a_process_of_its_own(run):
    program = (
        "import keras, keras_fpn, sys; "
        "print(keras.saving.load_model(sys.argv[1]).optimizer.iterations.numpy()); "
        "from keras_fpn.runs.run_folder import load_detector; "
        "print(load_detector(sys.argv[2])[0].num_classes)"
    )
    files = [run / "checkpoints" / name for name in ("step-00000003.keras", "best.keras")]
    process = subprocess.run(
        [sys.executable, "-c", program, *files], capture_output=True, text=True, check=False
    )
    assert process.stdout.split() == ["3", "2"], process.stderr


def test_predict_draws_pictures_and_writes_coco_results(run, folder, tmp_path, capsys):
    images = [str(folder / "train" / name) for name in ("0.png", "6.png", "1.png")]
    output = tmp_path / "found"
    predict.main(
        [*images, "--model", str(run), "--output", str(output), "--score-threshold", "0.0"]
    )
    assert {path.name for path in output.iterdir()} == {
        "0001_0.png",
        "0003_1.png",
        "detections.json",
    }
    with Image.open(output / "0001_0.png") as picture:
        assert picture.size == (64, 48)
    # The broken image was skipped and named.
    printed = capsys.readouterr().out
    assert f"skipped 1 image: {images[1]} (not a JPEG, PNG, GIF, BMP or WebP file)" in printed
    results = json.loads((output / "detections.json").read_text())
    assert f"{len(results)} detections of 2 images" in printed
    assert {result["image_id"] for result in results} == {1, 3}
    for result in results:
        assert set(result) == {"image_id", "category_id", "bbox", "score", "file_name"}
        assert result["file_name"] == images[result["image_id"] - 1]
        x, y, width, height = result["bbox"]
        assert 0 <= x <= x + width <= 64.001
        assert 0 <= y <= y + height <= 48.001


@pytest.fixture(scope="module")
def resumed(run, folder, tmp_path_factory):
    """A run like `run`, stopped after two steps and resumed, and killed while writing its report.

    The report is then missing, and a partial one left.
    """
    output = tmp_path_factory.mktemp("runs") / "resumed"
    with pytest.MonkeyPatch.context() as patch:
        # The signal is received during the second step.
        patch.setattr(
            SaveCheckpoints,
            "on_train_batch_begin",
            lambda self, batch, logs=None: (
                os.kill(os.getpid(), signal.SIGTERM) if batch == 1 else None
            ),
        )
        with pytest.raises(SystemExit) as stopped:
            train.main(train_arguments(folder, output))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert [file.name for file in output.glob("checkpoints/*")] == ["step-00000002.keras"]
    train.main(train_arguments(folder, output))
    os.rename(output / "report.html", output / ".partial-report.html")
    return output


def test_a_run_that_is_stopped_resumes_and_ends_with_the_same_weights(run, resumed):
    undisturbed, arrays = (
        arrays_of(x / "checkpoints" / "step-00000003.keras") for x in (run, resumed)
    )
    assert set(undisturbed) == set(arrays)
    assert any("seed" in name for name in undisturbed)
    for name, array in undisturbed.items():
        assert array.tobytes() == arrays[name].tobytes(), name
    assert (resumed / "metrics.json").read_text() == (run / "metrics.json").read_text()
    losses, again = (
        [line.split(",")[:6] for line in (x / "history.csv").read_text().splitlines()]
        for x in (run, resumed)
    )
    assert again == losses


def test_a_run_killed_while_writing_its_report_writes_it_when_rerun(
    run, resumed, folder, capsys, eagerly
):
    before = contents_of(resumed / "checkpoints")
    train.main(train_arguments(folder, resumed))
    assert str(resumed / "report.html") in capsys.readouterr().out
    # Tables and pictures come from the same evaluation as those of the run left alone.
    page, expected = ((x / "report.html").read_text() for x in (resumed, run))
    tables = re.compile(r"<table>.*?</table>", re.DOTALL)
    assert tables.findall(page)[:2] == tables.findall(expected)[:2]
    captions = re.compile("<figcaption>.*?</figcaption>")
    assert captions.findall(page) == captions.findall(expected)
    assert contents_of(resumed / "checkpoints") == before
    assert not (resumed / ".partial-report.html").exists()


def contents_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_complete_run_says_so_and_stays_as_it_is(run, folder, capsys):
    before = contents_of(run)
    train.main(train_arguments(folder, run))
    assert f"is complete; see {run / 'report.html'}" in capsys.readouterr().out
    assert contents_of(run) == before


def test_a_run_of_another_recipe_is_never_written_over(run, folder, tmp_path):
    before = (run / "config.json").read_bytes()
    with pytest.raises(SystemExit, match=r"learning_rate 0\.02; received 0\.5"):
        train.main([*train_arguments(folder, run), "--learning-rate", "0.5"])
    # Asked for is asked for, also where it is the default.
    with pytest.raises(SystemExit, match=r"proposals\.post_nms None; received 1000"):
        train.main([*train_arguments(folder, run), "--proposals.post-nms", "1000"])
    with pytest.raises(SystemExit, match=r"proposals\.training_pre_nms 20; received 30"):
        train.main([*train_arguments(folder, run), "--proposals.training-pre-nms", "30"])
    assert (run / "config.json").read_bytes() == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="is not empty"):
        train.main(train_arguments(folder, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_report_of_a_run_shows_its_curves_tables_and_images(run):
    page = (run / "report.html").read_text()
    for heading in ("Losses", "COCO metrics", "Classes", "Best images", "Worst images", "Recipe"):
        assert f"<h2>{heading}</h2>" in page
    assert "<td>bolt</td>" in page
    assert "http" not in page
    assert (run / "steps.csv").read_text().startswith("step,loss,objectness_loss")


@pytest.fixture
def eagerly():
    """Steps without tracing, which takes longer than a few of them."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


def nan_with_image(image_id):
    """`compute_losses` of a model, NaN for batches with an image."""
    compute_losses = keras_fpn.FasterRCNN.compute_losses

    def spoiled(model, inputs, targets, training=True):
        losses = compute_losses(model, inputs, targets, training)
        has_image = tf.reduce_any(tf.equal(targets["image_ids"], image_id))
        return losses | {"box_loss": tf.where(has_image, np.nan, losses["box_loss"])}

    return spoiled


def test_a_nan_loss_names_its_images_and_saves_the_batch(folder, tmp_path, monkeypatch, eagerly):
    monkeypatch.setattr(keras_fpn.FasterRCNN, "compute_losses", nan_with_image(12))
    output = tmp_path / "nan"
    with pytest.raises(SystemExit, match=r"at step \d, with the images of ids") as end:
        train.main([*train_arguments(folder, output), "--images-per-epoch", "12"])
    named = [int(x) for x in re.search(r"ids \[(.*?)\]", str(end.value))[1].split(",")]
    assert 12 in named
    (file,) = output.glob("nan-step-*.npz")
    with np.load(file) as batch:
        assert batch["image_ids"].tolist() == named
        assert batch["images"].shape == (2, 64, 64, 3)
    assert_checkpoints_are_whole(output)


def assert_checkpoints_are_whole(output):
    for checkpoint in output.glob("checkpoints/*.keras"):
        with zipfile.ZipFile(checkpoint) as archive:
            assert archive.testzip() is None


def test_data_that_vanish_end_the_run_with_what_to_do(folder, tmp_path, monkeypatch, eagerly):
    mine, output = tmp_path / "data", tmp_path / "run"
    shutil.copytree(folder, mine)

    def vanish(self, batch, logs=None):
        if batch == 3:
            shutil.rmtree(mine / "train")

    monkeypatch.setattr(SaveCheckpoints, "on_train_batch_begin", vanish)
    with pytest.raises(SystemExit, match=r"the data can no longer be read: .*train.*Restore"):
        train.main([*train_arguments(mine, output), "--images-per-epoch", "400"])
    assert_checkpoints_are_whole(output)


@pytest.mark.parametrize("error", [TypeError, ValueError])
def test_a_bug_keeps_its_traceback(folder, tmp_path, monkeypatch, error):
    def raises(recipe, steps_per_epoch):
        raise error("a bug")

    monkeypatch.setattr(training, "build_optimizer", raises)
    with pytest.raises(error, match="a bug"):
        train.main(train_arguments(folder, tmp_path / "run"))


def test_the_checkpoint_to_resume_from_is_that_of_the_step(tmp_path, detector, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    for steps in (2, 12, 20):
        checkpoint_file(tmp_path / "checkpoints", steps).touch()
    read = []
    monkeypatch.setattr(training, "claim_run", lambda *_: checkpoint_file(tmp_path, 2))
    monkeypatch.setattr(
        training, "read_checkpoint", lambda model, file: read.append(file.name) or RunState(2)
    )
    assert training.resume(detector, tmp_path, {}).steps == 2
    assert read == ["step-00000002.keras"]
    # Another worker's folder.
    monkeypatch.setattr(training, "claim_run", lambda *_: checkpoint_file(tmp_path, 1))
    with pytest.raises(FileNotFoundError, match="step 1"):
        training.resume(detector, tmp_path, {})


def test_edges_that_are_given_count():
    recipe = {"evaluation_shorter_edge": 64, "longest_edge": 96}
    assert evaluation_edges({}, None, None) == {"shorter_edge": 800, "longest_edge": 1333}
    of_run = evaluation_edges({"recipe": recipe}, None, None)
    assert of_run == {"shorter_edge": 64, "longest_edge": 96}
    given = evaluation_edges({"recipe": recipe}, 800, 1333)
    assert given == {"shorter_edge": 800, "longest_edge": 1333}


def test_bad_input_ends_in_one_sentence(run, folder, tmp_path):
    with pytest.raises(SystemExit, match=r"--model .*nowhere' not found"):
        evaluate.main(["--model", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="has neither"):
        evaluate.main(["--model", str(folder)])
    with pytest.raises(SystemExit, match=r"received 'gone\.jpg'"):
        predict.main(["gone.jpg", "--model", str(run), "--output", str(tmp_path / "x")])
    with pytest.raises(SystemExit, match="received none"):
        predict.main(["--model", str(run), "--output", str(tmp_path / "x")])
    with pytest.raises(SystemExit, match="sliver"):
        train.main(f"--dataset {folder} --train-split sliver --output {tmp_path / 'y'}".split())
    with pytest.raises(SystemExit, match=r"`epochs` .* received 0"):
        train.main([*train_arguments(folder, tmp_path / "y"), "--epochs", "0"])
    with pytest.raises(SystemExit, match=r"shorter_edges.*0"):
        train.main([*train_arguments(folder, tmp_path / "y"), "--shorter-edges", "0"])
    with pytest.raises(SystemExit, match=r"shorter_edge.*-3"):
        train.main([*train_arguments(folder, tmp_path / "y"), "--evaluation-shorter-edge=-3"])
    # Of the model, as of the run.
    with pytest.raises(SystemExit, match=r"nms_iou_threshold.* received 1\.5"):
        train.main([*train_arguments(folder, tmp_path / "y"), "--proposals.nms-iou-threshold=1.5"])
    with pytest.raises(SystemExit, match=r"`sizes`|`anchor_sizes`"):
        train.main(
            [
                *train_arguments(folder, tmp_path / "y"),
                *("--anchor-sizes", "8", "--anchors.sizes", "9"),
            ]
        )


def test_a_model_of_other_classes_is_refused(run, folder, tmp_path):
    three = json.loads((folder / "annotations" / "instances_train.json").read_text())
    three["categories"].append({"id": 40, "name": "washer"})
    other = tmp_path / "three"
    (other / "annotations").mkdir(parents=True)
    (other / "train").symlink_to(folder / "train")
    (other / "annotations" / "instances_train.json").write_text(json.dumps(three))
    with pytest.raises(SystemExit, match=r"has 3 classes .*; the model has 2 classes"):
        evaluate.main(["--model", str(run), "--dataset", str(other), "--split", "train"])


def test_the_configuration_of_a_run_can_be_given_back(run, folder):
    config = str(run / "config.json")
    options, recipe = train.parse_arguments(["--config", config, "--output=y", "--epochs=7"])
    assert (options.dataset, options.train_split) == (str(folder), "train")
    assert (recipe.shorter_edges, recipe.epochs) == ((64,), 7)
    assert recipe.model == json.loads((run / "config.json").read_text())["recipe"]["model"]
    with pytest.raises(SystemExit, match=r"config\.json; .*gone\.json' not found"):
        train.parse_arguments(["--config", str(run / "gone.json"), "--output=y"])


@pytest.mark.parametrize("batch_size", [16, 4])
def test_the_paper_recipe_sees_what_the_paper_saw(batch_size):
    # FPN, section 5.2: 60k steps of 16 images at 0.02, then 20k at 0.002.
    paper = dataclasses.replace(RECIPES["paper"], batch_size=batch_size)
    steps = paper.images_per_epoch // batch_size
    assert paper.epochs * steps * batch_size == 80_000 * 16
    config = training.build_optimizer(paper, steps).get_config()["learning_rate"]["config"]
    assert config["learning_rate"] == pytest.approx(0.02 * batch_size / 16)
    assert config["decay_steps"] == (60_000 * 16 // batch_size,)
    assert config["warmup_steps"] == 0


def test_the_rate_follows_the_batch_by_the_linear_rule():
    recipe = Recipe(batch_size=4, learning_rate=0.02, warmup_steps=100, decay_epochs=(1, 2))
    schedule = training.build_optimizer(recipe, steps_per_epoch=1000).get_config()["learning_rate"]
    assert schedule["config"] == {
        "learning_rate": pytest.approx(0.005),
        "warmup_steps": 400,
        "decay_steps": (1000, 2000),
        "decay_factor": 0.1,
    }
