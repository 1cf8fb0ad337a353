"""Every layer is rebuilt from its configuration, and gives the same results."""

import json

import keras
import numpy as np
import pytest
from keras.ops import convert_to_numpy

from keras_fpn.anchors import AnchorGenerator
from keras_fpn.box_head import BoxHead
from keras_fpn.builder import ALTERNATIVES, STAGES
from keras_fpn.conv5_head import Conv5Head
from keras_fpn.detections import DetectionGenerator
from keras_fpn.losses import RoILoss, RPNLoss
from keras_fpn.preprocessing import ImageNormalizer
from keras_fpn.proposals import ProposalGenerator
from keras_fpn.pyramid import FeaturePyramid
from keras_fpn.resnet import ResNet
from keras_fpn.roi_align import PyramidRoIAlign
from keras_fpn.roi_pool import PyramidRoIPool
from keras_fpn.rpn import RPNHead
from keras_fpn.single_scale import SingleScale
from keras_fpn.targets import RoITargets, RPNTargets

RANDOM = np.random.RandomState(0)
SIZES = np.array([[30, 40]], "int32")


def maps(channels, **sizes):
    return {
        level: RANDOM.normal(size=(1, side, side, channels)).astype("float32")
        for level, side in sizes.items()
    }


def boxes(count):
    corners = RANDOM.uniform(0, 20, (1, count, 2))
    sides = RANDOM.uniform(5, 15, (1, count, 2))
    return np.concatenate([corners, corners + sides], axis=-1).astype("float32")


SAMPLES = {
    "positive": np.array([[True, True, False]]),
    "sampled": np.ones((1, 3), bool),
    "deltas": RANDOM.normal(size=(1, 3, 4)).astype("float32"),
}

# A layer whose every argument is not its default, and what it is called with.
LAYERS = [
    (
        ImageNormalizer((1.0, 2.0, 3.0), (4.0, 5.0, 6.0), 8, "bgr"),
        (np.full((1, 30, 40, 3), 9, "uint8"), SIZES),
    ),
    (FeaturePyramid(3, "frozen_batch_norm", 0.1, top_down=False), (maps(2, C2=8, C3=4),)),
    (FeaturePyramid(3, "batch_norm", 0.1, lateral=False), (maps(2, C2=8, C3=4),)),
    (FeaturePyramid(3, "batch_norm", 0.1, finest_only=True), (maps(2, C2=8, C3=4),)),
    (SingleScale("C3"), (maps(2, C2=8, C3=4),)),
    (PyramidRoIPool(3, 3, 16.0), (maps(2, P2=8, P3=4), boxes(5))),
    (
        Conv5Head(3, 18, width=32, normalization="frozen_batch_norm", norm_epsilon=0.1),
        (RANDOM.normal(size=(1, 4, 2, 2, 256)).astype("float32"),),
    ),
    (RPNHead(2, 5, 2), (maps(3, P2=4, P3=2),)),
    (
        AnchorGenerator(((8, 12), (20, 30)), (0.25, 1.0), False, (3, 7)),
        (np.zeros((1, 16, 16, 3), "float32"), maps(1, P2=4, P3=2)),
    ),
    (
        ProposalGenerator(5, 4, 7, 6, 0.4, (1.0, 2.0, 3.0, 4.0), 1.5, 3.0),
        (maps(1, P2=3, P3=2), maps(4, P2=3, P3=2), {"P2": boxes(9)[0], "P3": boxes(4)[0]}, SIZES),
    ),
    (PyramidRoIAlign(3, None, 3, 16.0, True), (maps(2, P2=8, P3=4), boxes(5))),
    (
        BoxHead(3, 6, 1, 2, "frozen_batch_norm", 0.1),
        (RANDOM.normal(size=(1, 4, 2, 2, 3)).astype("float32"),),
    ),
    (
        DetectionGenerator(0.1, 0.3, 4, (1.0, 2.0, 3.0, 4.0), 1.5, 2.0, "rel_xywh"),
        (
            RANDOM.normal(size=(1, 5, 4)).astype("float32"),
            RANDOM.normal(size=(1, 5, 3, 4)).astype("float32"),
            boxes(5),
            np.ones((1, 5), "float32"),
            SIZES,
        ),
    ),
    (
        RPNTargets(0.6, 0.2, 6, 0.4, seed=5),
        {
            "anchors": boxes(20)[0],
            "boxes": boxes(2),
            "is_object": np.array([[True, True]]),
            "delta_weights": (1.0, 2.0, 3.0, 4.0),
        },
    ),
    (
        RoITargets(0.4, 6, 0.3, seed=6),
        {
            "proposals": boxes(9),
            "scores": np.ones((1, 9), "float32"),
            "boxes": boxes(2),
            "labels": np.array([[1, 0]]),
            "is_object": np.ones((1, 2), bool),
            "delta_weights": (1.0, 2.0, 3.0, 4.0),
        },
    ),
    (
        RPNLoss(0.5),
        (
            maps(1, P2=3, P3=2),
            maps(4, P2=3, P3=2),
            SAMPLES | {"indices": np.array([[5, 11, 0]])},
        ),
    ),
    (
        RoILoss(0.5),
        (
            RANDOM.normal(size=(1, 3, 5)).astype("float32"),
            RANDOM.normal(size=(1, 3, 4, 4)).astype("float32"),
            SAMPLES | {"labels": np.array([[3, 0, -1]])},
        ),
    ),
]


@pytest.mark.parametrize(
    ("layer", "arguments"), LAYERS, ids=[type(layer).__name__ for layer, _ in LAYERS]
)
def test_a_layer_is_rebuilt_from_its_configuration(layer, arguments):
    required = {
        BoxHead: {"num_classes": 9},
        Conv5Head: {"num_classes": 9},
        RPNHead: {"anchors_per_location": 9},
    }
    default = type(layer)(**required.get(type(layer), {}))
    config = layer.get_config()
    common = {"name", "trainable", "dtype"}
    # Some of these exclude each other.
    same = {"top_down", "lateral", "finest_only", "stride_in_1x1", "groups", "width_per_group"}
    changed = config.keys() - common - same
    assert all(config[name] != default.get_config()[name] for name in changed)

    written = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    assert written["registered_name"].startswith("keras_fpn>")
    rebuilt = keras.saving.deserialize_keras_object(written)
    assert type(rebuilt) is type(layer)
    assert rebuilt.get_config() == config

    def called(layer):
        return layer(**arguments) if isinstance(arguments, dict) else layer(*arguments)

    expected = keras.tree.map_structure(convert_to_numpy, called(layer))
    rebuilt.build_from_config(layer.get_build_config())
    rebuilt.set_weights(layer.get_weights())
    if hasattr(rebuilt, "seed_generator"):
        # The first call has moved the generator on; a new one begins where the first began.
        rebuilt = type(layer).from_config(config)
    found = keras.tree.map_structure(convert_to_numpy, called(rebuilt))
    keras.tree.map_structure(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("stage", ["pyramid", "rpn_head", "box_head"])
def test_a_frozen_stage_stays_frozen(detector, stage):
    config = detector.get_config()
    config[stage]["config"]["trainable"] = False
    model = type(detector).from_config(config)
    assert not getattr(model, stage).trainable_variables
    assert len(model.trainable_variables) > 20


def test_every_stage_is_here():
    stages = {*STAGES.values(), *ALTERNATIVES.values()} - {ResNet}
    assert {type(layer) for layer, _ in LAYERS} == stages
