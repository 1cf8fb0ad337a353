"""The variables of a detector under torchvision's names and in torchvision's layout.

Written down from torchvision's `state_dict()`, apart from `keras_fpn.weights`, which it checks.
"""

import keras
import numpy as np
from keras.ops import convert_to_numpy

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}


def torchvision_layers(model: keras.Model) -> dict[str, keras.layers.Layer]:
    """torchvision's name of a layer to the layer of `model`, in the order of its `state_dict()`."""
    depth = model.backbone.depth
    layer = model.backbone.get_layer
    body = {"conv1": layer("stem_conv"), "bn1": layer("stem_norm")}
    for stage, blocks in enumerate(BLOCKS[depth], start=1):
        for block in range(blocks):
            theirs, ours = f"layer{stage}.{block}", f"stage{stage + 1}_block{block}"
            for i in range(1, 3 if depth < 50 else 4):
                body[f"{theirs}.conv{i}"] = layer(f"{ours}_conv{i}")
                body[f"{theirs}.bn{i}"] = layer(f"{ours}_norm{i}")
            if block == 0 and (stage > 1 or depth >= 50):
                body[f"{theirs}.downsample.0"] = layer(f"{ours}_shortcut_conv")
                body[f"{theirs}.downsample.1"] = layer(f"{ours}_shortcut_norm")
    layers = {f"backbone.body.{name}": layer for name, layer in body.items()}
    pyramid, rpn, head = model.pyramid, model.rpn_head, model.box_head
    for blocks, convolutions, norms in (
        ("inner_blocks", pyramid.laterals, pyramid.lateral_norms),
        ("layer_blocks", pyramid.outputs, pyramid.output_norms),
    ):
        for index, level in enumerate(("C2", "C3", "C4", "C5")):
            layers[f"backbone.fpn.{blocks}.{index}.0"] = convolutions[level]
            if norms:
                layers[f"backbone.fpn.{blocks}.{index}.1"] = norms[level]
    for index, layer in enumerate(rpn.hidden):
        layers[f"rpn.head.conv.{index}.0"] = layer
    layers |= {"rpn.head.cls_logits": rpn.objectness, "rpn.head.bbox_pred": rpn.deltas}
    # A head with convolutions is a sequence in which flattening and ReLUs have numbers too.
    names = ("fc6", "fc7") if not head.convolved else (f"{len(head.convolved) + 1}",)
    for index, layer in enumerate(head.convolved):
        layers[f"roi_heads.box_head.{index}.0"] = layer
        if head.norms:
            layers[f"roi_heads.box_head.{index}.1"] = head.norms[index]
    for name, layer in zip(names, head.hidden, strict=True):
        layers[f"roi_heads.box_head.{name}"] = layer
    return layers | {
        "roi_heads.box_predictor.cls_score": head.class_logits,
        "roi_heads.box_predictor.bbox_pred": head.deltas,
    }


def torchvision_variables(model: keras.Model) -> dict[str, keras.Variable]:
    """torchvision's name of each parameter and buffer to the variable of `model`."""
    variables = {}
    for name, layer in torchvision_layers(model).items():
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


def torchvision_array(name: str, value, bins: int = 7) -> np.ndarray:
    """A variable of ours, or its gradient, in torchvision's layout.

    The rows of `bbox_pred` for the background, which keras_fpn has not, are zeros.
    """
    value = convert_to_numpy(value)
    if value.ndim == 4:
        return value.transpose(3, 2, 0, 1)
    if name in ("roi_heads.box_head.fc6.weight", "roi_heads.box_head.5.weight"):
        channels, units = value.shape[0] // bins**2, value.shape[1]
        value = value.reshape(bins, bins, channels, units)
        return value.transpose(3, 2, 0, 1).reshape(units, -1)
    if value.ndim == 2:
        value = value.T
    if name.startswith("roi_heads.box_predictor.cls_score"):
        return np.roll(value, 1, axis=0)
    if name.startswith("roi_heads.box_predictor.bbox_pred"):
        return np.concatenate([np.zeros_like(value[:4]), value])
    return value


def torchvision_shapes(model: keras.Model) -> dict[str, tuple[int, ...]]:
    """The names and shapes of `state_dict()` of the torchvision model that `model` equals."""
    return {
        name: torchvision_array(name, variable).shape
        for name, variable in torchvision_variables(model).items()
    }
