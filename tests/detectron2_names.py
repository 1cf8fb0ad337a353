"""The variables of a detector under Detectron2's names and in its layout.

Written down from Detectron2's `state_dict()`, apart from `keras_fpn.weights.detectron2`, which it
checks.
"""

import json
from pathlib import Path

import keras
import numpy as np
from keras.ops import convert_to_numpy

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def detectron2_variables(model: keras.Model) -> dict[str, keras.Variable]:
    """Detectron2's name of each parameter and buffer to the variable of `model`."""
    depth = model.backbone.depth
    on_c4 = model.backbone.last_stage == 4
    prefix = "backbone." if on_c4 else "backbone.bottom_up."
    names = {"stem.conv1": "stem_conv", "stem.conv1.norm": "stem_norm"}
    for stage, blocks in enumerate(BLOCKS[depth], start=2):
        for block in range(blocks):
            theirs, ours = f"res{stage}.{block}", f"stage{stage}_block{block}"
            if block == 0 and (stage > 2 or depth >= 50):
                names[f"{theirs}.shortcut"] = f"{ours}_shortcut_conv"
                names[f"{theirs}.shortcut.norm"] = f"{ours}_shortcut_norm"
            for i in range(1, 3 if depth < 50 else 4):
                names[f"{theirs}.conv{i}"] = f"{ours}_conv{i}"
                names[f"{theirs}.conv{i}.norm"] = f"{ours}_norm{i}"
    pyramid, rpn, head = model.pyramid, model.rpn_head, getattr(model, "box_head", None)
    layers = {
        f"{prefix}{name}": model.backbone.get_layer(ours)
        for name, ours in names.items()
        if not (on_c4 and name.startswith("res5"))
    }
    layers |= {
        "proposal_generator.rpn_head.conv": rpn.hidden[0],
        "proposal_generator.rpn_head.objectness_logits": rpn.objectness,
        "proposal_generator.rpn_head.anchor_deltas": rpn.deltas,
    }
    if not on_c4:
        for level in range(2, 6):
            layers[f"backbone.fpn_lateral{level}"] = pyramid.laterals[f"C{level}"]
            layers[f"backbone.fpn_output{level}"] = pyramid.outputs[f"C{level}"]
    if head is not None:
        layers["roi_heads.box_predictor.cls_score"] = head.class_logits
        layers["roi_heads.box_predictor.bbox_pred"] = head.deltas
        if on_c4:
            layers |= {
                f"roi_heads.{name}": head.conv5.get_layer(ours)
                for name, ours in names.items()
                if name.startswith("res5")
            }
        else:
            layers["roi_heads.box_head.fc1"] = head.hidden[0]
            layers["roi_heads.box_head.fc2"] = head.hidden[1]
    variables = {}
    for name, layer in layers.items():
        if hasattr(layer, "kernel"):
            variables[f"{name}.weight"] = layer.kernel
            if layer.use_bias:
                variables[f"{name}.bias"] = layer.bias
        else:
            variables[f"{name}.weight"] = layer.gamma
            variables[f"{name}.bias"] = layer.beta
            variables[f"{name}.running_mean"] = layer.moving_mean
            variables[f"{name}.running_var"] = layer.moving_variance
    return variables


def detectron2_array(name: str, value, bins: int = 7) -> np.ndarray:
    """A variable of ours in Detectron2's layout."""
    value = convert_to_numpy(value)
    if value.ndim == 4:
        return value.transpose(3, 2, 0, 1)
    if name == "roi_heads.box_head.fc1.weight":
        channels, units = value.shape[0] // bins**2, value.shape[1]
        value = value.reshape(bins, bins, channels, units)
        return value.transpose(3, 2, 0, 1).reshape(units, -1)
    return value.T if value.ndim == 2 else value


def detectron2_shapes(model: keras.Model) -> dict[str, tuple[int, ...]]:
    """The names and shapes of `state_dict()` of the Detectron2 model that `model` equals."""
    return {
        name: detectron2_array(name, variable).shape
        for name, variable in detectron2_variables(model).items()
    }


def zoo_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The names and shapes of `state_dict()` of a model of Detectron2's zoo, as it gave them."""
    path = Path(__file__).parent / "reference" / "detectron2_names.json"
    return {key: tuple(shape) for key, shape in json.loads(path.read_text())[name].items()}
