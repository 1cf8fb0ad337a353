"""What the real state dicts, of which names and shapes are stored, lead the builder to."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest

from keras_fpn.builder import STAGES
from keras_fpn.proposals import ProposalGenerator
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
        ("faster_rcnn_R_50_C4_1x", "resnet50"),
        ("rpn_R_50_C4_1x", "resnet50"),
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
        if isinstance(arguments, dict):
            assert set(arguments) <= set(inspect.signature(STAGES[stage]).parameters)


def test_proposals_of_detectron2():
    """Those of an RPN alone are more; on C4 they are not counted by level."""
    found = {}
    for name in ("faster_rcnn_R_50_FPN_1x", "rpn_R_50_FPN_1x"):
        stages = detectron2_architecture(state_dict("detectron2", name))[2]
        found[name] = ProposalGenerator(**stages["proposals"])
        assert found[name].pre_nms == 1000
        assert (found[name].training_pre_nms, found[name].training_post_nms) == (2000, 1000)
    assert [proposals.post_nms for proposals in found.values()] == [1000, 2000]
    for name in ("faster_rcnn_R_50_C4_1x", "rpn_R_50_C4_1x"):
        stages = detectron2_architecture(state_dict("detectron2", name))[2]
        found[name] = ProposalGenerator(**stages["proposals"])
        assert (found[name].training_pre_nms, found[name].training_post_nms) == (12000, 2000)
    numbers = [(proposals.pre_nms, proposals.post_nms) for proposals in found.values()]
    assert numbers[2:] == [(6000, 1000), (12000, 2000)]


def test_detectron2s_model_on_c4():
    arrays = state_dict("detectron2", "faster_rcnn_R_50_C4_1x")
    _, _, stages = detectron2_architecture(arrays)
    assert stages["preprocessing"]["size_divisor"] == 1
    assert stages["resnet"]["last_stage"] == 4
    assert stages["pyramid"].level == "C4"
    assert stages["anchors"]["sizes"] == ((32, 64, 128, 256, 512),)
    assert stages["anchors"]["strides"] == (16,)
    assert stages["roi_pooling"]["output_size"] == 14
    head = stages["box_head"]
    assert (head.num_classes, head.stride_in_1x1, head.normalization) == (
        80,
        True,
        "frozen_batch_norm",
    )


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
