"""What the real state dicts, of which names and shapes are stored, lead the builder to."""

import json
from pathlib import Path

import numpy as np
import pytest

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
    architecture = detectron2_architecture(arrays)
    assert architecture["backbone"] == backbone
    assert architecture["stride_in_1x1"] == (backbone != "resnext101_32x8d")
    assert architecture.get("num_classes") == (None if name.startswith("rpn") else 80)


def test_of_torchvision():
    first = torchvision_architecture(state_dict("torchvision", "fasterrcnn_resnet50_fpn"))
    second = torchvision_architecture(state_dict("torchvision", "fasterrcnn_resnet50_fpn_v2"))
    same = {"num_classes": 90, "backbone": "resnet50", "pyramid_channels": 256}
    same |= {"roi_output_size": 7, "head_hidden_dim": 1024}
    norm = "frozen_batch_norm"
    assert first == same | {
        "pyramid_normalization": None,
        "rpn_hidden_layers": 1,
        "head_convolutions": 0,
        "head_normalization": None,
        "head_hidden_layers": 2,
    }
    assert second == same | {
        "pyramid_normalization": norm,
        "rpn_hidden_layers": 2,
        "head_convolutions": 4,
        "head_normalization": norm,
        "head_hidden_layers": 1,
    }
