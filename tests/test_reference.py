"""Every stage equals torchvision's and Detectron2's Faster R-CNN with the same weights.

`reference/make_reference.py` stored what torchvision gives, `make_detectron2_reference.py` what
Detectron2 does, `reference/README.md` says what it is.
A map is "relatively" within a tolerance where no value is off by more than that share of the
stored map's largest value; gradients are where their difference's norm is that share of theirs.
"""

import contextlib
import functools
import json
import zlib
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from keras.ops import convert_to_numpy
from reference.weights import (
    as_detectron2,
    reference_image,
    reference_projection,
    reference_shapes,
    reference_weights,
)
from torchvision_names import torchvision_array, torchvision_variables

import keras_fpn
from keras_fpn.faster_rcnn import FasterRCNN
from keras_fpn.proposals import ProposalGenerator
from keras_fpn.pyramid import FeaturePyramid
from keras_fpn.roi_levels import assign_levels

LEVELS = ("P2", "P3", "P4", "P5", "P6")
# All on one ResNet-18.
SHARED = ("padded_batch", "small", "no_proposals", "no_detections")
# Their detectors are built by `weights=` from a file under the names of those who made them.
FROM_FILES = (
    "odd",
    "detectron2",
    "detectron2_padded_batch",
    "detectron2_resnext",
    "detectron2_c4",
    "v2",
)
FROM_FILES_TRAINING = ("v2_train", "detectron2_train", "detectron2_c4_train")
TRAINING = ("train", "train_no_ground_truth", "train_only_empty")
THEIR_LOSSES = {
    "objectness_loss": "loss_objectness",
    "rpn_box_loss": "loss_rpn_box_reg",
    "class_loss": "loss_classifier",
    "box_loss": "loss_box_reg",
}


def load(case):
    with np.load(Path(__file__).parent / "reference" / f"{case}.npz") as archive:
        stored = dict(archive)
    config = json.loads(str(stored.pop("config")))
    return SimpleNamespace(config=config, stored=stored)


def padded_batch(config):
    """The images of a case as one batch, with rubbish where an image is smaller than the batch."""
    described = config["images"]
    sizes = np.array([(image["height"], image["width"]) for image in described], "int32")
    images = np.full((len(described), *sizes.max(axis=0), 3), 200, "uint8")
    for batch, image in zip(images, described, strict=True):
        height, width = image["height"], image["width"]
        batch[:height, :width] = reference_image(image["seed"], height, width)
    return {"images": images, "image_sizes": sizes}


@pytest.fixture(scope="module")
def resnet18():
    # The samplers take all there is: at most 64 regions and 3072 anchors, less than half positive.
    model = keras_fpn.build_fpn_faster_rcnn(
        num_classes=20,
        backbone="resnet18",
        normalization="frozen_batch_norm",
        proposals={
            "pre_nms": 200,
            "post_nms": 100,
            "training_pre_nms": 150,
            "training_post_nms": 60,
        },
        rpn_targets={"num_samples": 3072, "positive_fraction": 0.5},
        roi_targets={"num_samples": 64, "positive_fraction": 0.5},
    )
    weights = reference_weights(reference_shapes("resnet18", 21))
    keras_fpn.load_torchvision_weights(model, weights)
    return model


@pytest.fixture(scope="module")
def from_file(tmp_path_factory):
    """The model that a file of a case's weights, under the reference's names, leads to."""
    path = tmp_path_factory.mktemp("weights") / "weights.npz"

    @functools.lru_cache(maxsize=1)
    def their_weights(backbone, version, c4):
        return reference_weights(reference_shapes(backbone, 21, version=version, c4=c4))

    @functools.cache
    def build(backbone, version, file, stem_scale):
        weights = their_weights(backbone, version, "C4" in file)
        if file:
            weights = as_detectron2(weights, stem_scale)
        build = keras_fpn.build_fpn_faster_rcnn
        if file.startswith("rpn"):
            weights = {k: x for k, x in weights.items() if not k.startswith("roi_heads")}
            build = keras_fpn.build_fpn_rpn
        np.savez(path, **weights)
        return build(weights=path)

    def model(config):
        default = {"version": 1, "file": "", "stem_scale": 1.0} | config
        return build(*(default[x] for x in ("backbone", "version", "file", "stem_scale")))

    return model


@contextlib.contextmanager
def stages_replaced(model, **stages):
    """The detector with other stages in the place of its own."""
    own = {name: getattr(model, name) for name in stages}
    for name, stage in stages.items():
        setattr(model, name, stage)
    yield model
    for name, stage in own.items():
        setattr(model, name, stage)


def with_arguments(stage, **arguments):
    """A copy of a stage without weights that has other arguments."""
    return type(stage).from_config(stage.get_config() | arguments)


@contextlib.contextmanager
def noted_inputs(*stages):
    """By the names of stages, what they were last called on."""
    inputs = {}

    def noting(call):
        def noted(self, x, *args, **kwargs):
            inputs[self.name] = x
            return call(self, x, *args, **kwargs)

        return noted

    with pytest.MonkeyPatch.context() as patch:
        for stage in stages:
            patch.setattr(type(stage), "call", noting(type(stage).call))
        yield inputs


def run_stages(model, inputs, their_proposals=None):
    """The results of every piece of the forward pass, and of the reference's own proposals."""

    def first_stage(images, sizes):
        with noted_inputs(model.pyramid) as noted:
            normalized, pyramid = model.extract_features(images, sizes)
        proposals = model.propose_regions(normalized, pyramid, sizes)
        return pyramid, {
            "normalized": normalized,
            "maps": {**noted["pyramid"], **pyramid},
            "objectness": proposals.objectness,
            "deltas": proposals.deltas,
            "anchors": proposals.anchors,
            "proposals": proposals.boxes,
            "scores": proposals.scores,
        }

    def stages(images, sizes):
        pyramid, results = first_stage(images, sizes)
        if their_proposals is None:
            return results
        proposals = results["proposals"], results["scores"]
        outputs = model.classify_regions(pyramid, proposals[0])
        with noted_inputs(model.box_head) as noted:
            class_logits, box_deltas = model.classify_regions(pyramid, their_proposals)
        return {
            **results,
            "detections": model.detections(*outputs, *proposals, sizes),
            "pooled": noted["box_head"],
            "class_logits": class_logits,
            "box_deltas": box_deltas,
        }

    if keras.backend.backend() == "jax":
        import jax

        @jax.jit
        def compiled(images, sizes):
            # JAX would compile each operation by itself, and what is the same again.
            whole = model({"images": images, "image_sizes": sizes})
            return {**stages(images, sizes), "whole": whole}

        results = compiled(*inputs.values())
    else:
        results = stages(*inputs.values())
    return SimpleNamespace(**keras.tree.map_structure(convert_to_numpy, results))


def padded_rows(stored, key, rows=None):
    """`key`_0, `key`_1, ... of each image, with zeros after them: `[B, rows, ...]`."""
    images = [stored[f"{key}_{i}"] for i in range(sum(f"{key}_{i}" in stored for i in range(9)))]
    rows = rows or max(1, *map(len, images))
    padded = np.zeros((len(images), rows, *images[0].shape[1:]), images[0].dtype)
    for row, image in zip(padded, images, strict=True):
        row[: len(image)] = image
    return padded, [len(image) for image in images]


@pytest.fixture(scope="module")
def case(request):
    """A stored case, its inputs, and what each of our stages gives for them."""
    case = load(request.param)
    case.inputs = padded_batch(case.config)
    numbers = case.config["arguments"]
    if request.param in SHARED:
        model = request.getfixturevalue("resnet18")
    else:
        model = request.getfixturevalue("from_file")(case.config)
    top_n = {
        ours: case.config.get(f"rpn_{ours}", numbers.get(f"rpn_{ours}_top_n_test", 1000))
        for ours in ("pre_nms", "post_nms")
    }
    stages = {"proposals": with_arguments(model.proposals, **top_n)}
    # Torchvision counts the background, as its first class; in Detectron2 it is the last, as here.
    case.first_label = 0 if "detectron2" in case.config else 1
    case.roi_levels = [int(level[1:]) for level in model.pyramid.roi_levels]
    proposals = None
    if "box_head" in model.stage_names:
        threshold = numbers.get("box_score_thresh", 0.05)
        stages["detections"] = with_arguments(model.detections, score_threshold=threshold)
        proposals, case.counts = padded_rows(case.stored, "proposals")
    bias = model.rpn_head.deltas.bias
    original = convert_to_numpy(bias)
    bias.assign(case.stored.get("weights:rpn.head.bbox_pred.bias", original))
    with stages_replaced(model, **stages):
        case.ours = run_stages(model, case.inputs, proposals)
    bias.assign(original)
    return case


def assert_relatively_close(ours, theirs, tolerance):
    assert ours.shape == theirs.shape
    largest = np.abs(theirs).max(initial=0)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * largest)


def assert_same_spread(ours, mean_and_std):
    """Of whole maps, where a part of the channels is stored."""
    mean, std = mean_and_std
    if ours.size:
        assert ours.mean(dtype="float64") == pytest.approx(mean, abs=1e-4 * std)
        assert ours.std(dtype="float64") == pytest.approx(std, rel=1e-4)


def assert_matched(ours, theirs, rounding=1e-5):
    """Boxes, scores and labels pair off, in one order but where scores differ by rounding only."""
    boxes, scores, labels = ours
    their_boxes, their_scores, their_labels = theirs
    assert len(boxes) == len(their_boxes)
    distance = np.abs(boxes[:, None] - their_boxes[None]).max(-1, initial=0)
    fits = (
        (distance < 0.05)
        & (np.abs(scores[:, None] - their_scores[None]) < 1e-4)
        & (labels[:, None] == their_labels[None])
    )
    free = np.ones(len(boxes), bool)
    place = np.empty(len(boxes), int)
    for i in range(len(boxes)):
        candidates = np.flatnonzero(fits[i] & free)
        assert len(candidates), f"row {i}, {boxes[i]} of score {scores[i]}, is not in the reference"
        # The nearest in rank: boxes of two levels may coincide.
        place[i] = candidates[np.abs(candidates - i).argmin()]
        free[place[i]] = False
    assert np.all(np.diff(their_scores[place]) <= rounding)


def assert_detections(ours, stored, first_label=1):
    for i, count in enumerate(ours["num_detections"]):
        assert_matched(
            tuple(ours[key][i, :count] for key in ("boxes", "scores", "labels")),
            (
                stored[f"detection_boxes_{i}"],
                stored[f"detection_scores_{i}"],
                stored[f"detection_labels_{i}"] - first_label,
            ),
        )
        assert np.all(ours["labels"][i, count:] == -1)
        assert not ours["boxes"][i, count:].any()
        assert not ours["scores"][i, count:].any()


@pytest.mark.parametrize("case", [*SHARED, *FROM_FILES, "detectron2_rpn"], indirect=True)
class TestFirstStage:
    def test_the_image_is_the_one_that_the_reference_saw(self, case):
        for image, (height, width), described in zip(
            *case.inputs.values(), case.config["images"], strict=True
        ):
            assert zlib.crc32(image[:height, :width].tobytes()) == described["crc32"]
        assert list(case.ours.normalized.shape[1:3]) == case.config["padded_size"]

    def test_backbone_and_pyramid(self, case):
        for name, step in case.config["channel_step"].items():
            ours, theirs = case.ours.maps[name], case.stored[name]
            assert_relatively_close(ours[..., ::step], theirs, 1e-4)
            assert_same_spread(ours, case.stored[f"{name}_mean_std"])

    def test_rpn_head(self, case):
        assert list(case.ours.objectness) == list(case.config["delta_step"])
        for level, step in case.config["delta_step"].items():
            theirs = case.stored[f"rpn_deltas_{level}"]
            assert_relatively_close(
                case.ours.objectness[level], case.stored[f"objectness_{level}"], 1e-4
            )
            assert_relatively_close(case.ours.deltas[level][:, ::step, ::step], theirs, 1e-4)
            assert_same_spread(case.ours.deltas[level], case.stored[f"rpn_deltas_{level}_mean_std"])

    def test_anchors_are_the_same_numbers(self, case):
        for level, anchors in case.ours.anchors.items():
            np.testing.assert_array_equal(anchors, case.stored[f"anchors_{level}"])

    def test_proposals(self, case):
        for i, (boxes, scores) in enumerate(
            zip(case.ours.proposals, case.ours.scores, strict=True)
        ):
            real = scores >= 0
            theirs = case.stored[f"proposals_{i}"], case.stored[f"proposal_scores_{i}"]
            assert_matched(
                (boxes[real], scores[real], np.zeros(real.sum())),
                (*theirs, np.zeros(len(theirs[0]))),
            )
            assert not boxes[~real].any()


@pytest.mark.parametrize("case", [*SHARED, *FROM_FILES], indirect=True)
class TestSecondStage:
    def test_pooling_and_box_head(self, case):
        def rows(x):
            return np.concatenate([x[i, :count] for i, count in enumerate(case.counts)])

        theirs, sampled = case.stored, case.stored["sampled_rois"]
        pooled = rows(case.ours.pooled)
        step = case.config["pooled_channel_step"]
        assert_relatively_close(pooled[sampled][..., ::step], theirs["pooled"], 1e-5)
        assert_same_spread(pooled, theirs["pooled_mean_std"])
        # Our background is the last class and has no box.
        logits = np.roll(rows(case.ours.class_logits), case.first_label, axis=-1)
        assert_relatively_close(logits, theirs["class_logits"], 1e-4)
        deltas = rows(case.ours.box_deltas)[sampled]
        their_deltas = theirs["box_deltas"].reshape(-1, 20 + case.first_label, 4)[
            :, case.first_label :
        ]
        assert_relatively_close(deltas, their_deltas, 1e-4)

    def test_levels_of_the_proposals(self, case):
        proposals = [case.stored[f"proposals_{i}"] for i in range(len(case.counts))]
        levels = assign_levels(
            np.concatenate(proposals),
            case.roi_levels[0],
            case.roi_levels[-1],
            canonical_level=4,
            canonical_size=224,
        )
        levels = convert_to_numpy(levels)
        np.testing.assert_array_equal(levels, case.stored["roi_levels"])

    def test_detections(self, case):
        assert_detections(case.ours.detections, case.stored, case.first_label)


@pytest.mark.parametrize("case", ["padded_batch", "small"], indirect=True)
def test_the_model_as_a_whole_detects_the_same(resnet18, case):
    if keras.backend.backend() == "jax":
        detections = case.ours.whole
    else:
        # The images of `small` fill their batch, which then needs no sizes.
        is_padded = len(case.inputs["images"]) > 1
        detections = resnet18(case.inputs if is_padded else case.inputs["images"])
    assert_detections(
        {key: convert_to_numpy(value) for key, value in detections.items()}, case.stored
    )


@pytest.fixture(scope="module", params=TRAINING)
def training_case(request, resnet18):
    """A stored case, its inputs and padded ground truth."""
    case = load(request.param)
    case.model = resnet18
    case.inputs = padded_batch(case.config)
    boxes, counts = padded_rows(case.stored, "ground_truth_boxes", 3)
    labels, _ = padded_rows(case.stored, "ground_truth_labels", 3)
    case.is_object = np.arange(3) < np.array(counts)[:, None]
    # Their labels begin at 1.
    case.targets = {"boxes": boxes, "labels": np.where(case.is_object, labels - 1, -1)}
    return case


class TestTraining:
    def test_losses(self, training_case):
        case = training_case
        losses = case.model.compute_losses(case.inputs, case.targets, training=True)
        assert tuple(losses) == FasterRCNN.loss_names
        for name, loss in losses.items():
            expected = float(case.stored[THEIR_LOSSES[name]])
            assert float(convert_to_numpy(loss)) == pytest.approx(expected, rel=1e-4, abs=0)

    def test_proposals(self, training_case):
        case, model = training_case, training_case.model
        images, image_sizes = case.inputs.values()
        images, pyramid = model.extract_features(images, image_sizes)
        proposals = model.propose_regions(images, pyramid, image_sizes, training=True)
        ours = proposals.boxes, proposals.scores
        for i, (boxes, scores) in enumerate(zip(*map(convert_to_numpy, ours), strict=True)):
            no_labels = np.zeros(len(boxes))
            theirs = case.stored[f"proposals_{i}"], case.stored[f"proposal_scores_{i}"]
            assert_matched((boxes, scores, no_labels), (*theirs, no_labels))

    def test_targets_of_the_anchors(self, training_case):
        case, stored = training_case, training_case.stored
        height, width = case.config["padded_size"]
        maps = {
            level: np.zeros((1, *stored[f"objectness_{level}"].shape[1:3], 1)) for level in LEVELS
        }
        anchors = case.model.anchors(np.zeros((1, height, width, 3)), maps)
        anchors = np.concatenate([convert_to_numpy(anchors[level]) for level in LEVELS])
        targets = case.model.rpn_targets(
            anchors,
            case.targets["boxes"],
            case.is_object,
            delta_weights=case.model.proposals.delta_weights,
        )
        targets = {name: convert_to_numpy(value) for name, value in targets.items()}
        for i in range(len(case.is_object)):
            matches = stored[f"anchor_matches_{i}"]
            positive, sampled = targets["positive"][i], targets["sampled"][i]
            indices = targets["indices"][i]
            np.testing.assert_array_equal(np.sort(indices[positive]), np.flatnonzero(matches >= 0))
            np.testing.assert_array_equal(
                np.sort(indices[sampled & ~positive]), np.flatnonzero(matches == -1)
            )
            order = np.argsort(indices[positive])
            assert_relatively_close(
                targets["deltas"][i][positive][order], stored[f"anchor_positive_targets_{i}"], 1e-6
            )

    def test_targets_of_the_regions(self, training_case):
        case, stored = training_case, training_case.stored
        proposals, counts = padded_rows(stored, "proposals", 60)
        scores = np.where(np.arange(60) < np.array(counts)[:, None], 0.5, -1.0)
        targets = case.model.roi_targets(
            proposals,
            scores,
            case.targets["boxes"],
            case.targets["labels"],
            case.is_object,
            delta_weights=case.model.detections.delta_weights,
        )
        targets = {name: convert_to_numpy(value) for name, value in targets.items()}
        for i in range(len(case.is_object)):
            sampled = targets["sampled"][i]
            regions, matches = stored[f"rois_{i}"], stored[f"roi_matches_{i}"]
            assert sampled.sum() == len(regions)
            # Every region of theirs once, in an order of our own.
            same = np.all(targets["regions"][i][sampled][:, None] == regions, axis=-1)
            place = same.argmax(axis=1)
            np.testing.assert_array_equal(np.sort(place), np.arange(len(regions)))
            positive = targets["positive"][i][sampled]
            np.testing.assert_array_equal(positive, matches[place] >= 0)
            labels = stored[f"ground_truth_labels_{i}"] - 1
            labels = np.append(labels, -1)[np.maximum(matches[place], -1)]
            np.testing.assert_array_equal(targets["labels"][i][sampled], labels)
            order = np.argsort(place[positive])
            assert_relatively_close(
                targets["deltas"][i][sampled][positive][order],
                stored[f"roi_positive_targets_{i}"],
                1e-6,
            )


@pytest.mark.parametrize("name", FROM_FILES_TRAINING)
def test_losses_of_a_detector_from_a_file(name, from_file):
    case = load(name)
    config, arguments = case.config, case.config["arguments"]
    first_label = 0 if "detectron2" in config else 1
    model = from_file(config)
    proposals = arguments.get("rpn_post_nms_top_n_train") or config["rpn_training_post_nms"]
    stages = {
        "proposals": {"training_pre_nms": 150, "training_post_nms": proposals},
        # The samplers take all there is. Detectron2 divides by the number that it was to sample,
        # torchvision by what it did.
        "rpn_targets": {"num_samples": config.get("rpn_samples", 3072), "positive_fraction": 0.5},
        "roi_targets": {"num_samples": proposals + 3, "positive_fraction": 1.0},
    }
    stages = {
        stage: with_arguments(getattr(model, stage), **numbers) for stage, numbers in stages.items()
    }
    targets = {
        "boxes": case.stored["ground_truth_boxes_0"][None],
        "labels": case.stored["ground_truth_labels_0"][None] - first_label,
    }
    with stages_replaced(model, **stages):
        losses = model.compute_losses(padded_batch(config), targets, training=True)
    for loss, value in losses.items():
        expected = float(case.stored[THEIR_LOSSES[loss]])
        assert float(convert_to_numpy(value)) == pytest.approx(expected, rel=1e-4, abs=0)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="gradients are taken with TensorFlow's GradientTape",
)
class TestGradients:
    @pytest.fixture(scope="class")
    def ours(self, training_case):
        """Gradients of the sum of the losses by the parameters, of each loss by the pyramid.

        No gradient passes through the proposals. Here they are the reference's own: ours are those
        to 2e-4 px, which the parabola of smooth L1 turns into as much of a small delta's gradient.
        """
        import tensorflow as tf

        case, model = training_case, training_case.model
        variables = torchvision_variables(model)
        names = case.config["gradient_names"]
        proposals, _ = padded_rows(case.stored, "proposals", 60)
        pyramids = []
        make_pyramid = FeaturePyramid.call

        def recorded(self, features, training=None):
            pyramids.append(make_pyramid(self, features, training))
            return pyramids[-1]

        def given_proposals(self, *args, **kwargs):
            return tf.constant(proposals), tf.ones(proposals.shape[:2])

        with pytest.MonkeyPatch.context() as patch, tf.GradientTape(persistent=True) as tape:
            patch.setattr(FeaturePyramid, "call", recorded)
            patch.setattr(ProposalGenerator, "call", given_proposals)
            losses = model.compute_losses(case.inputs, case.targets, training=True)
            total = sum(losses.values())
        parameters = tape.gradient(
            total, [variables[name].value for name in names], unconnected_gradients="zero"
        )
        features = {
            THEIR_LOSSES[name]: tape.gradient(
                loss, [pyramids[0][level] for level in LEVELS], unconnected_gradients="zero"
            )
            for name, loss in losses.items()
        }
        gradients = {
            name: torchvision_array(name, gradient).astype("float64")
            for name, gradient in zip(names, parameters, strict=True)
        }
        return SimpleNamespace(parameters=gradients, features=features)

    def test_all_that_torchvision_trains_is_trained(self, training_case):
        model = training_case.model
        trainable = {id(variable) for variable in model.trainable_variables}
        names = {
            name
            for name, variable in torchvision_variables(model).items()
            if id(variable) in trainable
        }
        assert names == set(training_case.config["gradient_names"])
        assert len(names) == len(trainable)

    def test_of_each_parameter(self, training_case, ours):
        stored = training_case.stored
        gradients = {
            key.split(":")[1]: (key.split(":")[0], value)
            for key, value in stored.items()
            if key.startswith("gradient") and ":" in key
        }
        assert set(gradients) == set(ours.parameters)
        for name, (key, theirs) in gradients.items():
            values = ours.parameters[name]
            if key != "gradient":
                values = values.reshape(-1)[:: int(key.removeprefix("gradient_every_"))]
            assert values.shape == theirs.shape
            error = np.linalg.norm(values - theirs)
            assert error <= 1e-4 * np.linalg.norm(theirs), name

    def test_of_whole_parameters(self, training_case, ours):
        for name, norm, projection in zip(
            training_case.config["gradient_names"],
            training_case.stored["gradient_norms"],
            training_case.stored["gradient_projections"],
            strict=True,
        ):
            gradient = ours.parameters[name]
            assert np.linalg.norm(gradient) == pytest.approx(norm, rel=1e-4, abs=0), name
            along = (gradient * reference_projection(name, gradient.shape)).sum()
            assert along == pytest.approx(projection, rel=0, abs=1e-4 * norm), name

    def test_of_each_loss_by_each_level(self, training_case, ours):
        for loss, norms in zip(
            training_case.config["losses"],
            training_case.stored["loss_gradient_norms"],
            strict=True,
        ):
            values = [np.linalg.norm(convert_to_numpy(x)) for x in ours.features[loss]]
            np.testing.assert_allclose(values, norms, rtol=1e-4, atol=0, err_msg=loss)
