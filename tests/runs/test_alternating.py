"""4-step training on a tiny folder in COCO's layout."""

import json
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from data_sets import encode, write_coco_folder
from small_runs import small_models

import keras_fpn
from keras_fpn.data.stored_proposals import read_proposals
from keras_fpn.runs import alternating, evaluation, training
from keras_fpn.runs.recipes import RECIPES, Recipe
from keras_fpn.runs.run_folder import claim_run, load_detector, recipe_in
from keras_fpn.runs.run_state import write_model
from keras_fpn.runs.training import build_model

STEPS = ("1-rpn", "2-fast_rcnn", "3-rpn", "4-fast_rcnn")


@pytest.fixture(scope="module", autouse=True)
def small_networks():
    """Backbones of four convolutions with batch norms, in steps without tracing."""
    with small_models(backbone=small_backbone):
        tf.config.run_functions_eagerly(True)
        yield
        tf.config.run_functions_eagerly(False)


def small_backbone():
    images = keras.Input((None, None, 3))
    x = keras.layers.AveragePooling2D(2)(images)
    maps = {}
    for level in ("C2", "C3", "C4", "C5"):
        x = keras.layers.Conv2D(4, 3, strides=2, padding="same", use_bias=False)(x)
        x = maps[level] = keras.layers.ReLU()(keras.layers.BatchNormalization(momentum=0.5)(x))
    return keras.Model(images, maps)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four images with a square each."""
    random = np.random.RandomState(0)
    files, objects = {}, []
    for number in range(4):
        pixels = random.randint(0, 60, (64, 64, 3)).astype("uint8")
        x, y = (int(corner) for corner in random.randint(0, 30, 2))
        pixels[y : y + 30, x : x + 30, number % 3] = 250
        files[f"{number}.png"] = encode(pixels)
        objects.append({"image_id": 10 * (number + 1), "bbox": [x, y, 30, 30], "area": 900})
    return write_coco_folder(tmp_path_factory.mktemp("data"), files, objects, size=(64, 64))


def arguments_of(folder, output):
    return (
        f"--dataset {folder} --train-split train --validation-split train --output {output} "
        "--pyramid.channels 8 --box-head.hidden-dim 8 --roi-targets.num-samples 8 "
        "--anchor-sizes 8 16 32 64 128 --proposals.pre-nms 20 --proposals.post-nms 10 "
        "--proposals.training-pre-nms 20 --proposals.training-post-nms 15 --shorter-edges 64 "
        "--evaluation-shorter-edge 64 --longest-edge 64 --batch-size 2 --images-per-epoch 4 "
        "--epochs 1 --learning-rate 0.1 --warmup-steps 0 --verbose 0 --no-jit-compile"
    ).split()


def train_one_step(options, recipe):
    """A run of one step on random images, without the pipeline, whose tracing takes seconds."""
    train_data, _ = training.open_splits(options, recipe.detector)
    recipe = training.checked_recipe(recipe, 1, False)
    model = build_model(recipe, train_data.class_names)
    model.compile(training.build_optimizer(recipe, 1))
    random = np.random.RandomState(recipe.seed)
    inputs = {"images": random.randint(0, 256, (2, 64, 64, 3)).astype("uint8")}
    if options.proposals:
        proposals = read_proposals(options.proposals)
        inputs["proposals"] = proposals.boxes[: 2 * 15].reshape(2, 15, 4)
    boxes = [[[10.0, 5, 40, 35]], [[20, 20, 50, 60]]]
    model.train_on_batch(inputs, {"boxes": np.array(boxes), "labels": np.array([[0], [1]])})
    configuration = training.configuration_of(options, recipe)
    configuration |= training.outcome_of(train_data, train_data, model)
    claim_run(options.output, configuration)
    write_model(model.inference_copy(), options.output / "checkpoints" / "best.keras")
    (options.output / "report.html").touch()


def random_batches(dataset, batch_size, **_):
    """The images of a split with random pixels, without the pipeline."""
    ids = dataset.read_image_ids()
    images = np.random.RandomState(2).randint(0, 256, (len(ids), 64, 64, 3)).astype("uint8")
    sizes = np.full((len(ids), 2), 64, np.int32)
    inputs = {"images": images, "image_sizes": sizes}
    info = {"image_ids": ids, "original_sizes": sizes}
    return tf.data.Dataset.from_tensor_slices((inputs, info)).batch(batch_size)


@pytest.fixture(
    scope="module", params=["one step", pytest.param("fit", marks=pytest.mark.acceptance)]
)
def trained(request, folder, tmp_path_factory):
    """The output folder of the four steps."""
    output = tmp_path_factory.mktemp("runs") / "steps"
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "one step":
            patch.setattr(training, "train", train_one_step)
            patch.setattr(evaluation, "evaluation_batches", random_batches)
        alternating.main(arguments_of(folder, output))
        yield output


def weights_of(folder, *stages):
    model, _ = load_detector(folder)
    return [array for stage in stages for array in getattr(model, stage).get_weights()]


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.tobytes() == b.tobytes()


def assert_all_differ(first, second):
    assert not any(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_last_steps_share_the_features_of_the_second(trained):
    shared = ("backbone", "pyramid")
    second = weights_of(trained / "2-fast_rcnn", *shared)
    # The moving statistics of batch norms are among them.
    for folder in (trained / "3-rpn", trained / "4-fast_rcnn", trained):
        assert_same(weights_of(folder, *shared), second)
    # The RPN of the first step has features of its own.
    assert_all_differ(weights_of(trained / "1-rpn", "pyramid"), weights_of(trained, "pyramid"))
    # The heads of the second step's detector go on in the fourth.
    heads = (weights_of(trained / name, "box_head") for name in ("2-fast_rcnn", "4-fast_rcnn"))
    assert_all_differ(*heads)


def test_the_detector_proposes_as_the_third_step_and_classifies_as_the_fourth(trained, folder):
    detector, rpn, fast_rcnn = (
        load_detector(path)[0] for path in (trained, trained / "3-rpn", trained / "4-fast_rcnn")
    )
    images = np.random.RandomState(1).randint(0, 256, (2, 64, 64, 3)).astype("uint8")
    sizes = np.array([[64, 64], [50, 64]])
    batch, features = detector.extract_features(images, sizes)
    proposals = detector.propose_regions(batch, features, sizes)
    of_rpn = rpn({"images": images, "image_sizes": sizes})
    assert_same(
        [np.asarray(proposals.boxes), np.asarray(proposals.scores)],
        [np.asarray(of_rpn["boxes"]), np.asarray(of_rpn["scores"])],
    )
    inputs = {"images": images, "image_sizes": sizes}
    detected = detector(inputs)
    expected = fast_rcnn(inputs | {"proposals": of_rpn["boxes"]})
    for name in ("boxes", "scores", "labels"):
        np.testing.assert_array_equal(detected[name], expected[name])
    # It is a model to train on, with the run's own classes.
    assert len(detector.backbone.trainable_variables) == 12
    assert detector.class_names == ("cat", "dog")
    metrics = json.loads((trained / "metrics.json").read_text())
    assert -1 <= metrics["AP"] <= 1


def test_each_step_has_the_proposals_of_the_one_before(trained, folder):
    for step, of in ((1, "1-rpn"), (3, "3-rpn")):
        configuration = json.loads((trained / STEPS[step] / "config.json").read_text())
        files = [configuration[name] for name in ("proposals", "validation_proposals")]
        assert files == [
            str(trained / of / f"proposals-{split}.npz") for split in ("training", "validation")
        ]
        # The numbers for training, and for testing.
        for file, most in zip(files, (15, 10), strict=True):
            proposals = read_proposals(file)
            assert proposals.image_ids.tolist() == [10, 20, 30, 40]
            assert np.diff(proposals.row_splits).max() == most
            assert set(map(tuple, proposals.frames.tolist())) == {(64, 64)}


def test_what_is_stopped_between_steps_goes_on_to_the_same_weights(
    trained, folder, tmp_path, capsys
):
    output = trained.parent / "stopped" / "steps"
    output.parent.mkdir()
    # As `trained` was before its third step; paths are part of the configuration.
    kept = trained.rename(output.parent / "kept")
    try:
        ignored = shutil.ignore_patterns("3-rpn", "4-fast_rcnn", "checkpoints", "metrics.json")
        shutil.copytree(kept, trained, ignore=ignored)
        for step in STEPS[:2]:
            shutil.copytree(kept / step, trained / step, dirs_exist_ok=True)
        before = (trained / "1-rpn" / "report.html").stat().st_mtime_ns
        alternating.main(arguments_of(folder, trained))
        printed = capsys.readouterr().out
        assert "Step 3-rpn:" in printed
        assert "Step 2-fast_rcnn:" not in printed
        assert (trained / "1-rpn" / "report.html").stat().st_mtime_ns == before
        stages = keras_fpn.FasterRCNN.stage_names
        assert_same(weights_of(trained, *stages), weights_of(kept, *stages))
        assert (trained / "metrics.json").read_text() == (kept / "metrics.json").read_text()
    finally:
        shutil.rmtree(trained)
        kept.rename(trained)


def test_what_is_complete_stays_as_it_is(trained, folder, capsys):
    files = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()}
    alternating.main(arguments_of(folder, trained))
    assert f"{trained} is complete; its detector is" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_a_folder_of_another_recipe_is_refused(trained, folder):
    with pytest.raises(SystemExit, match=r"learning_rate 0\.1; received 0\.2"):
        alternating.main([*arguments_of(folder, trained), "--learning-rate", "0.2"])


@pytest.mark.parametrize(
    "given", ["--model rpn", "--frozen backbone", "--proposals a.npz", "--validation-proposals b"]
)
def test_options_that_follow_from_the_step_are_refused(folder, tmp_path, given):
    with pytest.raises(SystemExit, match="follow from the step"):
        alternating.main([*arguments_of(folder, tmp_path / "x"), *given.split()])


def test_a_step_gets_the_arguments_that_its_model_has():
    recipe = RECIPES["paper"]
    rpn = alternating.recipe_of_step(recipe, "rpn", None)
    assert rpn.model == {"backbone_weights": "imagenet"}
    assert rpn.frozen == ()
    fast_rcnn = alternating.recipe_of_step(recipe, "fast_rcnn", "x.keras")
    # The weights take the place of ImageNet's.
    assert fast_rcnn.model == {
        "pooling": "max",
        "roi_loss": {"smooth_l1_beta": 1.0},
        "weights": "x.keras",
    }
    assert fast_rcnn.frozen == ("backbone", "pyramid")


def test_frozen_stages_are_not_trained():
    recipe = Recipe(model={"pyramid": {"channels": 8}}, detector="rpn", frozen=("backbone",))
    model = build_model(recipe, ["a"])
    trainable = {id(variable) for variable in model.trainable_variables}
    assert not trainable & {id(variable) for variable in model.backbone.variables}
    assert trainable >= {id(variable) for variable in model.pyramid.variables}
    assert recipe_in({"recipe": {"frozen": ["backbone"]}}).frozen == ("backbone",)
    with pytest.raises(ValueError, match=r"--frozen must name stages .*received box_head"):
        build_model(Recipe(detector="rpn", frozen=("box_head",)), ["a"])
    everything = Recipe(detector="rpn", frozen=("backbone", "pyramid", "rpn_head"))
    with pytest.raises(ValueError, match="--frozen must leave a stage to train"):
        build_model(everything, ["a"])
