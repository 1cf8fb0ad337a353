import inspect
import math

import keras
import pytest
from small_detector import small_detector

import keras_fpn

DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(keras_fpn.build_fpn_faster_rcnn).parameters.items()
}


def test_the_defaults_are_those_of_the_reference():
    expected = {
        "backbone": "resnet50",
        "backbone_weights": None,
        "image_shape": (None, None, 3),
        "bounding_box_format": "xyxy",
        "score_threshold": 0.05,
        "nms_iou_threshold": 0.5,
        "max_detections": 100,
        "anchor_sizes": (32, 64, 128, 256, 512),
        "anchor_ratios": (0.5, 1.0, 2.0),
        "pyramid_channels": 256,
        "rpn_pre_nms": 1000,
        "rpn_post_nms": 1000,
        "rpn_training_pre_nms": 2000,
        "rpn_training_post_nms": 2000,
        "rpn_nms_iou_threshold": 0.7,
        "rpn_min_size": 1e-3,
        "rpn_positive_iou": 0.7,
        "rpn_negative_iou": 0.3,
        "rpn_samples": 256,
        "rpn_positive_fraction": 0.5,
        "rpn_delta_weights": (1, 1, 1, 1),
        "roi_output_size": 7,
        "roi_sampling_ratio": 2,
        "roi_canonical_level": 4,
        "roi_canonical_size": 224,
        "roi_positive_iou": 0.5,
        "roi_samples": 512,
        "roi_positive_fraction": 0.25,
        "roi_delta_weights": (10, 10, 5, 5),
        "roi_aligned": False,
        "round_anchors": True,
        "anchor_strides": None,
        "rpn_hidden_layers": 1,
        "pyramid_normalization": None,
        "head_convolutions": 0,
        "head_normalization": None,
        "head_hidden_layers": 2,
        "head_hidden_dim": 1024,
        "channel_order": "rgb",
        "max_log_scale": math.log(1000 / 16),
        "min_detection_size": 1e-2,
        "smooth_l1_beta": 1 / 9,
    }
    assert {name: DEFAULTS[name] for name in expected} == expected


# Of each argument a value that is not its default, and where it arrives.
ARRIVES = {
    "num_classes": (2, "box_head.num_classes"),
    "class_names": (("bolt", "nut"), "class_names"),
    "image_shape": ((64, 96, 3), "image_shape"),
    "bounding_box_format": ("rel_yxyx", "detections.bounding_box_format"),
    "score_threshold": (0.11, "detections.score_threshold"),
    "nms_iou_threshold": (0.12, "detections.nms_iou_threshold"),
    "max_detections": (13, "detections.max_detections"),
    "normalization": ("group_norm", "backbone.normalization"),
    "norm_epsilon": (
        1e-3,
        "backbone.norm_epsilon feature_pyramid.norm_epsilon box_head.norm_epsilon",
    ),
    "frozen_stages": (3, "backbone.frozen_stages"),
    "pixel_mean": ((1.0, 2.0, 3.0), "preprocessing.mean"),
    "pixel_std": ((4.0, 5.0, 6.0), "preprocessing.std"),
    "size_divisor": (64, "preprocessing.size_divisor"),
    "channel_order": ("bgr", "preprocessing.channel_order"),
    "pyramid_channels": (8, "pyramid.channels"),
    "pyramid_normalization": ("batch_norm", "pyramid.normalization"),
    "anchor_sizes": (
        (16, 32, 48, 64, 80),
        "anchors.sizes",
        {"P2": 16, "P3": 32, "P4": 48, "P5": 64, "P6": 80},
    ),
    "anchor_ratios": ((0.5, 2.0), "anchors.aspect_ratios"),
    "anchor_strides": (
        (2, 4, 6, 8, 10),
        "anchors.strides",
        {"P2": 2, "P3": 4, "P4": 6, "P5": 8, "P6": 10},
    ),
    "round_anchors": (False, "anchors.rounded"),
    "rpn_hidden_layers": (2, "rpn_head.hidden_layers"),
    "rpn_pre_nms": (21, "proposal_generator.pre_nms"),
    "rpn_post_nms": (22, "proposal_generator.post_nms"),
    "rpn_training_pre_nms": (23, "proposal_generator.training_pre_nms"),
    "rpn_training_post_nms": (24, "proposal_generator.training_post_nms"),
    "rpn_nms_iou_threshold": (0.25, "proposal_generator.nms_iou_threshold"),
    "rpn_min_size": (2.6, "proposal_generator.min_size"),
    "rpn_delta_weights": (
        (1.0, 2.0, 3.0, 4.0),
        "proposal_generator.delta_weights rpn_targets.delta_weights",
    ),
    "max_log_scale": (3.0, "proposal_generator.max_log_scale detection_generator.max_log_scale"),
    "rpn_positive_iou": (0.31, "rpn_targets.positive_iou"),
    "rpn_negative_iou": (0.22, "rpn_targets.negative_iou"),
    "rpn_samples": (33, "rpn_targets.num_samples"),
    "rpn_positive_fraction": (0.34, "rpn_targets.positive_fraction"),
    "roi_canonical_level": (3, "roi_pooling.canonical_level"),
    "roi_canonical_size": (100.0, "roi_pooling.canonical_size"),
    "roi_output_size": (5, "roi_pooling.output_size"),
    "roi_sampling_ratio": (1, "roi_pooling.sampling_ratio"),
    "roi_aligned": (True, "roi_pooling.aligned"),
    "roi_positive_iou": (0.41, "roi_targets.positive_iou"),
    "roi_samples": (42, "roi_targets.num_samples"),
    "roi_positive_fraction": (0.43, "roi_targets.positive_fraction"),
    "roi_delta_weights": (
        (8.0, 7.0, 6.0, 5.0),
        "detections.delta_weights roi_targets.delta_weights",
    ),
    "head_convolutions": (1, "box_head.convolutions"),
    "head_normalization": ("sync_batch_norm", "box_head.normalization"),
    "head_hidden_layers": (3, "box_head.hidden_layers"),
    "head_hidden_dim": (9, "box_head.hidden_dim"),
    "min_detection_size": (5.1, "detections.min_size"),
    "smooth_l1_beta": (0.52, "smooth_l1_beta"),
    "seed": (53, "rpn_targets.seed"),
    "name": ("mine", "name"),
}


@pytest.fixture(scope="module")
def every_number():
    return small_detector(**{name: value[0] for name, value in ARRIVES.items()})


def test_every_argument_is_looked_at():
    assert set(DEFAULTS) == {
        *("backbone", "backbone_weights", "weights", "stride_in_1x1"),
        *ARRIVES,
    }


@pytest.mark.parametrize("argument", ARRIVES)
def test_an_argument_arrives_in_its_layers(every_number, argument):
    value, paths, *wanted = ARRIVES[argument]
    for path in paths.split():
        found = every_number
        for attribute in path.split("."):
            found = getattr(found, attribute)
        assert found == (wanted[0] if wanted else value)
        assert value != DEFAULTS[argument]


def test_the_parts_that_follow_from_the_numbers(every_number):
    assert every_number.rpn_head.anchors_per_location == 2
    assert every_number.rpn_head.channels == 8
    # The two samplers do not draw the same numbers.
    assert every_number.roi_targets.seed != every_number.rpn_targets.seed
    assert DEFAULTS["seed"] is None


def test_there_are_as_many_classes_as_names_and_80_without_either():
    assert small_detector(num_classes=None, class_names=["a", "b"]).num_classes == 2
    assert small_detector(num_classes=None).num_classes == 80


def test_the_stride_of_a_bottleneck():
    model = small_detector(backbone="resnet50", stride_in_1x1=True)
    assert model.backbone.stride_in_1x1
    assert model.backbone.get_layer("stage3_block0_conv1").strides == (2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bounding_box_format": "coco"}, "`bounding_box_format` must be one of .*'coco'"),
        ({"num_classes": 0}, "`num_classes` is a whole number of at least 1; received 0"),
        ({"num_classes": True}, "`num_classes` is a whole number of at least 1; received True"),
        ({"num_classes": 2.0}, "`num_classes` is a whole number of at least 1; received 2.0"),
        *(
            ({name: -1}, f"`{name}` is a whole number of at least 1; received -1")
            for name in (
                "max_detections",
                "pyramid_channels",
                "rpn_pre_nms",
                "rpn_post_nms",
                "rpn_training_pre_nms",
                "rpn_training_post_nms",
                "rpn_samples",
                "roi_samples",
                "roi_output_size",
                "roi_sampling_ratio",
                "rpn_hidden_layers",
                "head_convolutions",
                "head_hidden_layers",
                "head_hidden_dim",
                "size_divisor",
            )
        ),
        *(
            ({name: 1.5}, f"`{name}` is within 0..1; received 1.5")
            for name in (
                "score_threshold",
                "nms_iou_threshold",
                "rpn_nms_iou_threshold",
                "rpn_positive_iou",
                "rpn_negative_iou",
                "rpn_positive_fraction",
                "roi_positive_iou",
                "roi_positive_fraction",
            )
        ),
        ({"score_threshold": math.nan}, "`score_threshold` is within 0..1; received nan"),
        ({"image_shape": (64, 64)}, r"\(height, width, 3\), .*; received \(64, 64\)"),
        ({"image_shape": (64, 64, 1)}, r"received \(64, 64, 1\)"),
        ({"anchor_sizes": (32, 64)}, r"one size for each of P2, P3, P4, P5, P6; .* \(32, 64\)"),
        ({"anchor_strides": (4, 8)}, r"one stride for each of P2, P3, P4, P5, P6; .* \(4, 8\)"),
        ({"class_names": "face"}, "a sequence of the names of the classes; received 'face'"),
        ({"class_names": ["a"], "num_classes": 2}, r"each of the 2 classes; received 1 names"),
        ({"channel_order": "gbr"}, "`channel_order` is 'rgb' or 'bgr'; received 'gbr'"),
        ({"head_normalization": "layer_norm"}, "must be one of .* not 'layer_norm'"),
        ({"backbone": "resnet51"}, "no backbone 'resnet51': give 'resnet50' or 'resnet"),
        ({"normalization": "batchnorm"}, "not 'batchnorm'; did you mean 'batch_norm'"),
        ({"frozen_stages": 6}, "from 0 .* to 5 .*, not 6"),
        ({"stride_in_1x1": True}, "needs the bottleneck blocks of depth 50, 101 or 152"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        keras_fpn.build_fpn_faster_rcnn(**({"backbone": "resnet18"} | arguments))


def test_a_backbone_that_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"a name such as 'resnet50' or a keras.Model"):
        keras_fpn.build_fpn_faster_rcnn(backbone=keras.layers.Dense(3))
