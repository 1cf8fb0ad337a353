"""Detectron2's weights: the detector that computes as it does, and every array in its place."""

import pickle
import warnings

import numpy as np
import pytest
from detectron2_names import (
    detectron2_array,
    detectron2_shapes,
    detectron2_variables,
    zoo_shapes,
)
from small_detector import small_detector

import keras_fpn
from keras_fpn.data.coco_classes import COCO_CLASS_NAMES
from keras_fpn.weights.detectron2 import detectron2_architecture

SMALL = {"proposals": {"pre_nms": 20, "post_nms": 20}, "roi_targets": {"num_samples": 8}}


@pytest.fixture(scope="module")
def weights():
    """Of a ResNet-50, with the buffers that a state dict has beside its weights."""
    random = np.random.RandomState(0)
    shapes = detectron2_shapes(small_detector(backbone="resnet50", num_classes=80))
    weights = {name: random.uniform(0.5, 1.5, x).astype("float32") for name, x in shapes.items()}
    return weights | {
        "pixel_mean": np.float32([[[103.53]], [[116.28]], [[123.675]]]),
        "pixel_std": np.ones((3, 1, 1), "float32"),
        "proposal_generator.anchor_generator.cell_anchors.0": np.float32(
            [
                [-22.6274, -11.3137, 22.6274, 11.3137],
                [-16, -16, 16, 16],
                [-11.3137, -22.6274, 11.3137, 22.6274],
            ]
        ),
    }


def save(weights, path, **more):
    """As NumPy saves it: the reader of pickles has tests of its own."""
    np.savez(path, **weights, **more)
    return path


def assert_holds(model, weights, but=()):
    for name, variable in detectron2_variables(model).items():
        if not name.startswith(tuple(but)):
            found = detectron2_array(name, variable)
            np.testing.assert_array_equal(found, weights[name], err_msg=name)


@pytest.fixture(scope="module")
def model(weights, tmp_path_factory):
    path = save(weights, tmp_path_factory.mktemp("detectron2") / "zoo.npz")
    return keras_fpn.build_fpn_faster_rcnn(weights=path, **SMALL)


def test_every_array_goes_to_its_place(model, weights):
    assert_holds(model, weights)


def test_the_detector_computes_as_detectron2_does(model):
    backbone, pooling = model.backbone, model.roi_pooling
    assert (backbone.depth, backbone.stride_in_1x1, backbone.norm_epsilon) == (50, True, 1e-5)
    assert (backbone.normalization, backbone.frozen_stages) == ("frozen_batch_norm", 2)
    assert model.preprocessing.channel_order == "bgr"
    np.testing.assert_allclose(model.preprocessing.mean, (123.675, 116.28, 103.53))
    assert model.preprocessing.std == (1.0, 1.0, 1.0)
    assert (pooling.aligned, pooling.sampling_ratio, pooling.output_size) == (True, None, 7)
    assert not model.anchors.rounded
    assert model.anchors.strides == (4, 8, 16, 32, 64)
    assert model.rpn_loss.smooth_l1_beta == model.roi_loss.smooth_l1_beta == 0
    assert model.num_classes == 80
    assert model.proposals.training_post_nms == 1000


def test_other_classes_start_fresh(weights, tmp_path):
    path = save(weights, tmp_path / "zoo.npz")
    with pytest.warns(UserWarning, match="for 80 classes, the model has 2: box_head/class_logits"):
        model = keras_fpn.build_fpn_faster_rcnn(weights=path, num_classes=2, **SMALL)
    assert_holds(model, weights, but=["roi_heads.box_predictor"])


def test_an_rpn_alone_leaves_the_box_head_fresh(weights, tmp_path):
    rpn = {name: x for name, x in weights.items() if not name.startswith("roi_heads")}
    path = save(rpn, tmp_path / "rpn.npz")
    with pytest.warns(UserWarning, match="no weights of box_head, which are not loaded"):
        model = keras_fpn.build_fpn_faster_rcnn(weights=path, box_head={"hidden_dim": 8}, **SMALL)
    assert_holds(model, weights, but=["roi_heads"])
    assert model.num_classes == 80


def built(build, weights, path):
    """A model of a file, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = build(weights=save(weights, path))
    return model, [str(w.message) for w in caught if w.category is UserWarning]


def assert_same_stages(model, source):
    for stage in {*model.stage_names} & {*source.stage_names}:
        theirs = getattr(source, stage).get_weights()
        for a, b in zip(getattr(model, stage).get_weights(), theirs, strict=True):
            if a.dtype.kind == "f":  # Not the seeds of samplers.
                np.testing.assert_array_equal(a, b, err_msg=stage)


@pytest.mark.parametrize("own", [True, False], ids=["of its own file", "of the whole detector's"])
@pytest.mark.parametrize(
    ("build", "other_half"),
    [
        (keras_fpn.build_fpn_rpn, "roi_heads"),
        (keras_fpn.build_fpn_fast_rcnn, "proposal_generator"),
    ],
)
def test_half_a_detector(model, weights, tmp_path, build, other_half, own):
    if own:
        weights = {name: x for name, x in weights.items() if not name.startswith(other_half)}
    half, warned = built(build, weights, tmp_path / "weights.npz")
    assert not warned
    assert_same_stages(half, model)
    # Conventions come with the weights.
    assert half.preprocessing.std == (1.0, 1.0, 1.0)
    assert half.num_classes == (None if build is keras_fpn.build_fpn_rpn else 80)


@pytest.mark.parametrize(
    ("build", "own_half", "lacks"),
    [
        (keras_fpn.build_fpn_rpn, "proposal_generator", "rpn_head"),
        (keras_fpn.build_fpn_fast_rcnn, "roi_heads", "box_head"),
        (keras_fpn.build_fpn_faster_rcnn, "proposal_generator", "rpn_head"),
    ],
)
def test_the_half_that_a_file_lacks_is_named(model, weights, tmp_path, build, own_half, lacks):
    other = {name: x for name, x in weights.items() if not name.startswith(own_half)}
    built_model, (warning,) = built(build, other, tmp_path / "weights.npz")
    assert warning.endswith(f"weights.npz' has no weights of {lacks}, which are not loaded.")
    assert built_model.backbone.stride_in_1x1
    for stage in ("backbone", "pyramid"):
        theirs = getattr(model, stage).get_weights()
        for a, b in zip(getattr(built_model, stage).get_weights(), theirs, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("author", [True, False])
def test_the_classes_of_the_model_zoo_are_cocos(weights, tmp_path, monkeypatch, author):
    contents = {"model": weights} | ({"__author__": "Detectron2 Model Zoo"} if author else {})
    monkeypatch.setattr("keras_fpn.weights.pretrained.read_checkpoint", lambda path: contents)
    (tmp_path / "zoo.pkl").write_bytes(b"read by the line above")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = keras_fpn.build_fpn_faster_rcnn(weights=tmp_path / "zoo.pkl", **SMALL)
    assert model.class_names == (COCO_CLASS_NAMES if author else None)


def test_a_resnext_strides_in_the_3x3_and_divides_by_the_deviation(weights):
    shapes = {"backbone.bottom_up.res2.0.conv2.weight": (256, 8, 3, 3)}
    arrays = {k: v for k, v in weights.items() if k != "pixel_std"}
    for block in range(6, 23):
        arrays[f"backbone.bottom_up.res4.{block}.conv1.weight"] = np.zeros(1)
    arrays |= {name: np.zeros(shape) for name, shape in shapes.items()}
    backbone, _, stages = detectron2_architecture(arrays)
    assert backbone == "resnext101_32x8d"
    assert not stages["resnet"]["stride_in_1x1"]
    # The default of the stage.
    assert "std" not in stages["preprocessing"]
    assert keras_fpn.ImageNormalizer().std == (58.395, 57.12, 57.375)


def test_other_anchors_are_refused(weights):
    name = "proposal_generator.anchor_generator.cell_anchors.0"
    with pytest.raises(ValueError, match=r"size 32 .*; received the cell anchors \[\["):
        detectron2_architecture(weights | {name: 2 * weights[name]})


def test_another_architecture_is_refused(weights, tmp_path):
    no_pyramid = {name: x for name, x in weights.items() if "fpn" not in name}
    with pytest.raises(ValueError, match=r"received weights without backbone\.fpn_lateral2"):
        keras_fpn.build_fpn_faster_rcnn(weights=save(no_pyramid, tmp_path / "c4.npz"))
    masks = weights | {"roi_heads.mask_head.mask_fcn1.weight": np.zeros(1, "float32")}
    with pytest.raises(ValueError, match=r"1 unexpected \(roi_heads\.mask_head\.mask_fcn1\.weight"):
        keras_fpn.build_fpn_faster_rcnn(weights=save(masks, tmp_path / "masks.npz"))


class TestC4:
    """Models without a pyramid, whose box head is the ResNet's last stage."""

    @pytest.fixture
    def build(self, tmp_path, monkeypatch):
        """Builds a model of arrays of a shape, of which no file is written."""

        def build(shapes, **arguments):
            zeros = {name: np.broadcast_to(np.float32(0), x) for name, x in shapes.items()}
            monkeypatch.setattr("keras_fpn.weights.pretrained.read_checkpoint", lambda path: zeros)
            (tmp_path / "c4.pkl").write_bytes(b"read by the line above")
            return keras_fpn.build_fpn_faster_rcnn(weights=tmp_path / "c4.pkl", **arguments)

        return build

    def test_an_rpn_alone(self, tmp_path):
        random = np.random.default_rng(0)
        shapes = zoo_shapes("rpn_R_50_C4_1x")
        weights = {name: random.random(x, "float32") + 0.5 for name, x in shapes.items()}
        contents = {"model": weights, "__author__": "Detectron2 Model Zoo"}
        (tmp_path / "model_final.pkl").write_bytes(pickle.dumps(contents))
        with pytest.warns(UserWarning, match="without a checksum") as warned:
            rpn = keras_fpn.build_fpn_rpn(weights=tmp_path / "model_final.pkl")
        assert len(warned) == 1
        assert detectron2_shapes(rpn) == shapes
        assert_holds(rpn, weights)
        assert (rpn.backbone.last_stage, rpn.backbone.frozen_stages) == (4, 2)
        assert rpn.anchors.anchors_per_location == 15

    def test_max_pooling_in_place_of_its_own_has_as_many_bins(self, build):
        model = build(zoo_shapes("faster_rcnn_R_50_C4_1x"), pooling="max")
        assert type(model.roi_pooling) is keras_fpn.PyramidRoIPool
        assert model.roi_pooling.output_size == 14

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"backbone.res5.0.conv1.weight": (512, 1024, 1, 1)},
                r"without backbone\.fpn_lateral2",
            ),
            (
                {"proposal_generator.rpn_head.objectness_logits.weight": (9, 1024, 1, 1)},
                r"objectness_logits\.weight \(9, 1024, 1, 1\) for \(1, 1, 1024, 15\)",
            ),
            (
                {"proposal_generator.anchor_generator.cell_anchors.0": (15, 4)},
                "size 32, 64, 128, 256, 512 .*; received the cell anchors",
            ),
            ({"roi_heads.res5.2.conv1.weight": None}, r"missing \(roi_heads\.res5\.2\.conv1"),
        ],
        ids=["C5 in the backbone", "9 anchors", "other anchors", "a shorter head"],
    )
    def test_another_architecture_is_refused(self, build, changes, message):
        shapes = zoo_shapes("faster_rcnn_R_50_C4_1x") | changes
        with pytest.raises(ValueError, match=message):
            build({name: shape for name, shape in shapes.items() if shape is not None})
