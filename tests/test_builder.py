"""The builder: defaults of the reference, and where every argument arrives."""

import inspect
import json
import math

import keras
import pytest
from small_detector import small_detector, tiny_backbone

import keras_fpn
from keras_fpn.builder import DERIVED, EVERYDAY, STAGES
from keras_fpn.faster_rcnn import FasterRCNN

# torchvision's `fasterrcnn_resnet50_fpn` and the papers; a batch norm that is trained, from random
# weights.
DEFAULTS = {
    "preprocessing": {
        "mean": (123.675, 116.28, 103.53),
        "std": (58.395, 57.12, 57.375),
        "size_divisor": 32,
        "channel_order": "rgb",
    },
    "resnet": {
        "stride_in_1x1": False,
        "width": 64,
        "normalization": "batch_norm",
        "norm_epsilon": 1e-5,
        "frozen_stages": 0,
    },
    "pyramid": {
        "channels": 256,
        "normalization": None,
        "norm_epsilon": 1e-5,
        "top_down": True,
        "lateral": True,
        "finest_only": False,
    },
    "rpn_head": {"channels": None, "hidden_layers": 1},
    "anchors": {
        "sizes": ((32,), (64,), (128,), (256,), (512,)),
        "aspect_ratios": (0.5, 1.0, 2.0),
        "rounded": True,
        "strides": None,
    },
    "proposals": {
        "pre_nms": 1000,
        "post_nms": 1000,
        "training_pre_nms": 2000,
        "training_post_nms": 2000,
        "nms_iou_threshold": 0.7,
        "delta_weights": (1, 1, 1, 1),
        "max_log_scale": math.log(1000 / 16),
        "min_size": 1e-3,
    },
    "roi_pooling": {
        "output_size": 7,
        "sampling_ratio": 2,
        "canonical_level": 4,
        "canonical_size": 224,
        "aligned": False,
    },
    "box_head": {
        "hidden_dim": 1024,
        "hidden_layers": 2,
        "convolutions": 0,
        "normalization": None,
        "norm_epsilon": 1e-5,
    },
    "detections": {
        "score_threshold": 0.05,
        "nms_iou_threshold": 0.5,
        "max_detections": 100,
        "delta_weights": (10, 10, 5, 5),
        "max_log_scale": math.log(1000 / 16),
        "min_size": 1e-2,
        "bounding_box_format": "xyxy",
    },
    "rpn_targets": {
        "positive_iou": 0.7,
        "negative_iou": 0.3,
        "num_samples": 256,
        "positive_fraction": 0.5,
        "seed": None,
    },
    "rpn_loss": {"smooth_l1_beta": 1 / 9},
    "roi_targets": {
        "positive_iou": 0.5,
        "num_samples": 512,
        "positive_fraction": 0.25,
        "seed": None,
    },
    "roi_loss": {"smooth_l1_beta": 1 / 9},
}

# A value of each argument that is not its default.
OTHERS = {
    "preprocessing": {
        "mean": (1.0, 2.0, 3.0),
        "std": (4.0, 5.0, 6.0),
        "size_divisor": 64,
        "channel_order": "bgr",
    },
    "resnet": {
        "stride_in_1x1": True,
        "width": 32,
        "normalization": "group_norm",
        "norm_epsilon": 1e-3,
        "frozen_stages": 3,
    },
    "pyramid": {
        "channels": 8,
        "normalization": "batch_norm",
        "norm_epsilon": 1e-2,
        "top_down": False,
        "lateral": True,
        "finest_only": False,
    },
    "rpn_head": {"channels": 6, "hidden_layers": 2},
    "anchors": {
        "sizes": ((16,), (32,), (48,), (64,), (80,)),
        "aspect_ratios": (0.5, 2.0),
        "rounded": False,
        "strides": (2, 4, 6, 8, 10),
    },
    "proposals": {
        "pre_nms": 21,
        "post_nms": 22,
        "training_pre_nms": 23,
        "training_post_nms": 24,
        "nms_iou_threshold": 0.25,
        "delta_weights": (1.0, 2.0, 3.0, 4.0),
        "max_log_scale": 3.0,
        "min_size": 2.6,
    },
    "roi_pooling": {
        "output_size": 5,
        "sampling_ratio": 1,
        "canonical_level": 3,
        "canonical_size": 100.0,
        "aligned": True,
    },
    "box_head": {
        "hidden_dim": 9,
        "hidden_layers": 3,
        "convolutions": 1,
        "normalization": "sync_batch_norm",
        "norm_epsilon": 1e-1,
    },
    "detections": {
        "score_threshold": 0.11,
        "nms_iou_threshold": 0.12,
        "max_detections": 13,
        "delta_weights": (8.0, 7.0, 6.0, 5.0),
        "max_log_scale": 2.0,
        "min_size": 5.1,
        "bounding_box_format": "rel_yxyx",
    },
    "rpn_targets": {
        "positive_iou": 0.31,
        "negative_iou": 0.22,
        "num_samples": 33,
        "positive_fraction": 0.34,
        "seed": 53,
    },
    "rpn_loss": {"smooth_l1_beta": 0.52},
    "roi_targets": {
        "positive_iou": 0.41,
        "num_samples": 42,
        "positive_fraction": 0.43,
        "seed": 54,
    },
    "roi_loss": {"smooth_l1_beta": 0.62},
}
# They exclude each other and levels of their own anchors; see `TestVariants`.
SAME = ("lateral", "finest_only")
# What a constructor needs beside its defaults.
REQUIRED = {
    "resnet": {"depth": 18},
    "rpn_head": {"anchors_per_location": 3},
    "box_head": {"num_classes": 3},
}


def own_arguments(stage):
    return set(inspect.signature(STAGES[stage]).parameters) - {*DERIVED, "kwargs"}


def values(model, stage):
    layer = model.backbone if stage == "resnet" else getattr(model, stage)
    return {argument: getattr(layer, argument) for argument in own_arguments(stage)}


def test_the_defaults_are_those_of_the_reference():
    model = keras_fpn.build_fpn_faster_rcnn(backbone="resnet18")
    assert {stage: values(model, stage) for stage in STAGES} == DEFAULTS
    assert (model.num_classes, model.class_names) == (80, None)
    assert model.image_shape == (None, None, 3)
    parameters = dict(inspect.signature(keras_fpn.build_fpn_faster_rcnn).parameters)
    assert parameters.pop("name").default == "fpn_faster_rcnn"
    assert {parameter.default for parameter in parameters.values()} == {None}


@pytest.fixture(scope="module")
def other_numbers():
    """Built from JSON: lists in place of tuples."""
    return keras_fpn.build_fpn_faster_rcnn(num_classes=2, **json.loads(json.dumps(OTHERS)))


@pytest.mark.parametrize("stage", STAGES)
def test_the_arguments_of_a_stage_reach_it(other_numbers, stage):
    assert values(other_numbers, stage) == OTHERS[stage]
    same = [name for name, value in DEFAULTS[stage].items() if OTHERS[stage][name] == value]
    assert set(same) <= {*SAME}


def test_what_follows_from_other_stages(other_numbers):
    assert other_numbers.backbone.name == "resnet50"
    assert other_numbers.rpn_head.anchors_per_location == 2
    assert other_numbers.box_head.num_classes == 2
    assert other_numbers.backbone.get_layer("stage3_block0_conv1").strides == (2, 2)


def test_the_everyday_arguments():
    model = small_detector(
        num_classes=2,
        class_names=["bolt", "nut"],
        image_shape=[64, 96, 3],
        bounding_box_format="rel_yxyx",
        score_threshold=0.11,
        nms_iou_threshold=0.12,
        max_detections=13,
        anchor_sizes=[16, 32, 48, 64, 80],
        anchor_ratios=[0.5, 2.0],
        normalization="group_norm",
        frozen_stages=3,
        seed=53,
        name="mine",
    )
    assert (model.num_classes, model.class_names) == (2, ("bolt", "nut"))
    assert (model.image_shape, model.name) == ((64, 96, 3), "mine")
    detections = model.detections
    assert (detections.score_threshold, detections.nms_iou_threshold) == (0.11, 0.12)
    assert (detections.max_detections, detections.bounding_box_format) == (13, "rel_yxyx")
    assert model.anchors.sizes == ((16,), (32,), (48,), (64,), (80,))
    assert model.anchors.aspect_ratios == (0.5, 2.0)
    assert (model.backbone.normalization, model.backbone.frozen_stages) == ("group_norm", 3)
    assert model.rpn_targets.seed == 53
    # The two samplers do not draw the same numbers.
    assert model.roi_targets.seed not in (53, None)


def test_a_stage_is_used_as_it_is():
    small = {
        "anchors": {"sizes": (8, 16, 32, 64, 128)},
        "pyramid": {"channels": 8},
        "box_head": {"num_classes": 7, "hidden_dim": 8},
    }
    stages = {
        stage: layer(**REQUIRED.get(stage, {}) | small.get(stage, {}))
        for stage, layer in STAGES.items()
        if stage != "resnet"
    }
    model = keras_fpn.build_fpn_faster_rcnn(backbone="resnet18", **stages)
    assert isinstance(model, FasterRCNN)
    for stage, layer in stages.items():
        assert getattr(model, stage) is layer
    # Without `num_classes`, the number of classes is that of the given head.
    assert model.num_classes == 7


def test_there_are_as_many_classes_as_names():
    assert small_detector(num_classes=None, class_names=["a", "b"]).num_classes == 2


# Of the arguments that -1 is not a wrong value of, a wrong one.
WRONG = {
    "mean": (1.0, 2.0),
    "std": (1.0, 0.0, 1.0),
    "sizes": (32, 0),
    "aspect_ratios": (0.0,),
    "strides": (4,),
    "delta_weights": (1.0, 1.0, 0.0, 1.0),
}
SWITCHES = {"rounded", "aligned", "stride_in_1x1", "top_down", "lateral", "finest_only"}


@pytest.mark.parametrize(
    ("stage", "argument"),
    [
        (stage, argument)
        for stage in STAGES
        for argument in sorted(own_arguments(stage) | REQUIRED.get(stage, {}).keys())
        if argument not in SWITCHES | {"seed"}
    ],
)
def test_every_argument_of_a_stage_is_checked(stage, argument):
    value = WRONG.get(argument, -1)
    with pytest.raises(ValueError, match=rf"`{argument}`.* must .*received"):
        STAGES[stage](**REQUIRED.get(stage, {}) | {argument: value})
    if argument in WRONG:
        with pytest.raises(ValueError, match=rf"`{argument}` must be a sequence .*received 2"):
            STAGES[stage](**REQUIRED.get(stage, {}) | {argument: 2})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bounding_box_format": "coco"}, "`bounding_box_format` .*received 'coco'"),
        ({"num_classes": 0}, "`num_classes` .*received 0"),
        ({"num_classes": True}, "`num_classes` .*received True"),
        ({"score_threshold": math.nan}, "`score_threshold` .*received nan"),
        ({"image_shape": (64, 64)}, r"`image_shape` .*received \(64, 64\)"),
        ({"image_shape": (64, 64, 1)}, r"`image_shape` .*received \(64, 64, 1\)"),
        ({"anchor_sizes": (32, 64)}, r"`sizes` .*received .*\(32,\), \(64,\).* P2, P3, P4, P5, P6"),
        ({"class_names": "face"}, "`class_names` .*received 'face'"),
        ({"class_names": ["a"], "num_classes": 2}, "`class_names` .* 2 classes; received 1"),
        ({"backbone": "resnet51"}, "`backbone` .*received 'resnet51'; did you mean 'resnet50'"),
        ({"resnet": {"stride_in_1x1": True}}, "`stride_in_1x1` .* depth 18"),
        # Misspelled, or not the caller's to say.
        ({"proposals": {"post_mns": 3}}, "`proposals` .*'post_mns'; did you mean 'post_nms'"),
        ({"resnet": {"normalisation": None}}, "`resnet` .*; did you mean 'normalization'"),
        ({"box_head": {"num_classes": 3}}, "`box_head` .*'num_classes'"),
        ({"resnet": {"depth": 50}}, "`resnet` .*'depth'"),
        ({"proposals": {"kwargs": 3}}, "`proposals` .*'kwargs'"),
        # Given twice, or at odds.
        (
            {"score_threshold": 0.1, "detections": {"score_threshold": 0.1}},
            r"`score_threshold` .*`detections` .*twice; received 0\.1",
        ),
        (
            {"anchor_ratios": (1.0,), "anchors": keras_fpn.AnchorGenerator()},
            r"`aspect_ratios` .*`anchors` .*twice; received \(1\.0,\)",
        ),
        (
            {"frozen_stages": 0, "resnet": {"frozen_stages": 2}},
            "`frozen_stages` .*`resnet` .*twice; received 0",
        ),
        (
            {"num_classes": 2, "box_head": keras_fpn.BoxHead(3)},
            "`box_head` .*num_classes=2; received .*3",
        ),
        (
            {"anchor_ratios": (1.0,), "rpn_head": keras_fpn.RPNHead(3)},
            "`rpn_head` .*anchors_per_location=1; received .*3",
        ),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        keras_fpn.build_fpn_faster_rcnn(**({"backbone": "resnet18"} | arguments))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": keras.layers.Dense(3)}, r"`backbone` .*'resnet50' .*received .*Dense"),
        ({"proposals": 300}, "`proposals` .*ProposalGenerator .*received int"),
        ({"resnet": keras.layers.ReLU()}, "`resnet` .*received ReLU"),
    ],
)
def test_what_is_neither_a_stage_nor_its_arguments(arguments, message):
    with pytest.raises(TypeError, match=message):
        keras_fpn.build_fpn_faster_rcnn(**arguments)


class TestVariants:
    """The rows of the paper's Tables 1 to 3, on all three models."""

    @pytest.mark.parametrize("level", ["C4", "C5"])
    def test_one_map_has_the_anchors_of_all_sizes(self, level):
        model = keras_fpn.build_fpn_rpn(backbone="resnet10", single_scale=level)
        assert model.pyramid.rpn_levels == (f"P{level[1]}",)
        assert model.anchors.sizes == ((32, 64, 128, 256, 512),)
        assert model.rpn_head.anchors_per_location == 15
        assert model.backbone.last_stage == int(level[1])

    def test_the_head_on_c4_is_the_last_stage_of_the_same_resnet(self):
        model = keras_fpn.build_fpn_fast_rcnn(
            num_classes=3, backbone="resnet18", single_scale="C4", normalization="group_norm"
        )
        assert isinstance(model.box_head, keras_fpn.Conv5Head)
        assert (model.box_head.depth, model.box_head.normalization) == (18, "group_norm")
        assert model.roi_pooling.output_size == 14
        with pytest.raises(ValueError, match=r"must go with a ResNet.*'tiny'"):
            keras_fpn.build_fpn_fast_rcnn(
                num_classes=3, backbone=tiny_backbone(), single_scale="C4"
            )

    def test_the_head_on_c5_is_that_of_the_pyramid(self):
        model = keras_fpn.build_fpn_fast_rcnn(num_classes=3, backbone="resnet10", single_scale="C5")
        assert type(model.box_head) is keras_fpn.BoxHead
        assert model.roi_pooling.output_size == 7

    def test_the_finest_level_alone_has_the_anchors_of_all_sizes(self):
        model = keras_fpn.build_fpn_rpn(backbone=tiny_backbone(), pyramid={"finest_only": True})
        assert model.anchors.sizes == ((32, 64, 128, 256, 512),)
        mine = keras_fpn.build_fpn_rpn(
            backbone=tiny_backbone(), pyramid={"finest_only": True}, anchor_sizes=[[8, 16]]
        )
        assert mine.anchors.sizes == ((8, 16),)

    def test_pooling(self):
        pooling = {"output_size": 3}
        model = keras_fpn.build_fpn_fast_rcnn(
            num_classes=3, backbone=tiny_backbone(), pooling="max", roi_pooling=pooling
        )
        assert type(model.roi_pooling) is keras_fpn.PyramidRoIPool
        assert model.roi_pooling.output_size == 3
        with pytest.raises(ValueError, match="no argument 'sampling_ratio'"):
            keras_fpn.build_fpn_fast_rcnn(pooling="max", roi_pooling={"sampling_ratio": 2})
        with pytest.raises(ValueError, match="'align', 'max'; received 'mean'"):
            keras_fpn.build_fpn_fast_rcnn(pooling="mean")

    def test_an_argument_that_a_variant_has_no_use_for_is_refused(self):
        with pytest.raises(ValueError, match="`pyramid` has no argument 'channels'"):
            keras_fpn.build_fpn_rpn(single_scale="C4", pyramid={"channels": 8})
        with pytest.raises(ValueError, match="'C4', 'C5'; received 'C3'"):
            keras_fpn.build_fpn_rpn(single_scale="C3")


@pytest.mark.parametrize(
    ("build", "model_class"),
    [
        (keras_fpn.build_fpn_rpn, keras_fpn.RegionProposalNetwork),
        (keras_fpn.build_fpn_fast_rcnn, keras_fpn.FastRCNN),
    ],
    ids=["rpn", "fast_rcnn"],
)
def test_every_builder_has_the_arguments_of_its_stages_and_no_others(build, model_class):
    ours = inspect.signature(build).parameters
    all_of_them = inspect.signature(keras_fpn.build_fpn_faster_rcnn).parameters
    assert set(ours) <= set(all_of_them)
    stages = {"resnet", *model_class.stage_names} - {"backbone"}
    assert set(ours) & set(STAGES) == stages
    everyday = {name for name, (stage, _) in EVERYDAY.items() if stage in stages}
    assert set(ours) & set(EVERYDAY) == everyday
