"""What the real state dicts, of which names and shapes are stored, lead the builder to."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest

from keras_fpn.builder import STAGES
from keras_fpn.weights.detectron2 import detectron2_architecture, is_detectron2
from keras_fpn.weights.torchvision import torchvision_architecture


def state_dict(source, name):
    """Zeros of the stored names and shapes, which take no memory."""
    names = json.loads((Path(__file__).parent / "reference" / f"{source}_names.json").read_text())
    return {key: np.broadcast_to(np.float32(0), shape) for key, shape in names[name].items()}


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        ("faster_rcnn_R_50_FPN_1x", "resnet50"),
        ("faster_rcnn_R_101_FPN_3x", "resnet101"),
        ("faster_rcnn_X_101_32x8d_FPN_3x", "resnext101_32x8d"),
        ("rpn_R_50_FPN_1x", "resnet50"),
    ],
)
def test_of_detectron2(name, backbone):
    arrays = state_dict("detectron2", name)
    assert is_detectron2(arrays)
    found, num_classes, stages = detectron2_architecture(arrays)
    assert found == backbone
    assert stages["resnet"]["stride_in_1x1"] == (backbone != "resnext101_32x8d")
    assert num_classes == (None if name.startswith("rpn") else 80)
    for stage, arguments in stages.items():
        assert set(arguments) <= set(inspect.signature(STAGES[stage]).parameters)


def test_of_torchvision():
    first = torchvision_architecture(state_dict("torchvision", "fasterrcnn_resnet50_fpn"))
    second = torchvision_architecture(state_dict("torchvision", "fasterrcnn_resnet50_fpn_v2"))
    norm = "frozen_batch_norm"
    pooling = {"output_size": 7}
    assert first == (
        "resnet50",
        90,
        {
            "pyramid": {"channels": 256, "normalization": None},
            "rpn_head": {"hidden_layers": 1},
            "roi_pooling": pooling,
            "box_head": {
                "convolutions": 0,
                "normalization": None,
                "hidden_layers": 2,
                "hidden_dim": 1024,
            },
        },
    )
    assert second == (
        "resnet50",
        90,
        {
            "pyramid": {"channels": 256, "normalization": norm},
            "rpn_head": {"hidden_layers": 2},
            "roi_pooling": pooling,
            "box_head": {
                "convolutions": 4,
                "normalization": norm,
                "hidden_layers": 1,
                "hidden_dim": 1024,
            },
        },
    )
