"""Backbones: by name, or adapted from models of other libraries (FPN, section 3)."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping

import keras

from keras_fpn.resnet import STAGE_BLOCKS, ResNet
from keras_fpn.validation import check_choice

# Name to arguments of `ResNet`.
BACKBONES = {
    **{f"resnet{depth}": {"depth": depth} for depth in STAGE_BLOCKS},
    "resnext50_32x4d": {"depth": 50, "groups": 32, "width_per_group": 4},
    "resnext101_32x8d": {"depth": 101, "groups": 32, "width_per_group": 8},
}
# C{n} has a stride of 2**n pixels (arXiv 1612.03144, section 3).
LEVEL_STRIDES = {"C2": 4, "C3": 8, "C4": 16, "C5": 32}
# Image size at which strides are measured: large compared with what unpadded convolutions cut off.
PROBE_SIZE = 512


def resolve_backbone(
    backbone: str | keras.Model,
    resnet: Mapping | None = None,
    image_shape: tuple[int | None, int | None, int] = (None, None, 3),
) -> keras.Model:
    """Returns a model from images `[batch, height, width, 3]` to `{"C2", "C3", "C4", "C5"}`.

    A name gives a new `ResNet`. A `keras.Model` shares its layers and weights with what is
    returned, and its feature maps are found in the first of these ways that applies:

    - a keras-hub backbone: among its `pyramid_outputs`;
    - a keras-cv backbone: among its `pyramid_level_inputs`;
    - a model whose output is a dict with keys among C2..C5: these;
    - a model with several outputs: among them, by their strides 4, 8, 16 and 32;
    - a functional model with one output, with or without a classifier, such as those of
      keras.applications: at each stride, the last feature map that every path from the image to
      the output passes through (not one inside a block's branch).

    A model may lack the finest or the coarsest levels, but must have at least two. Feature maps are
    assumed to be aligned with the image, as those of padded convolutions are; networks without
    padding are accepted, with an offset of the pixels that their maps do not cover.

    Args:
        backbone: one of "resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
            "resnext50_32x4d" and "resnext101_32x8d", or a channels-last `keras.Model` with one
            input, whose layers after the coarsest level are dropped.
        resnet: further arguments of `ResNet`, for a backbone given by name. Defaults to None.
        image_shape: shape of one image, `(height, width, 3)`; None for any height or width.

    Raises:
        TypeError: if `backbone` is neither a name nor a `keras.Model`.
        ValueError: if the name is unknown, if a model does not take images of `image_shape` or has
            no run of feature maps, or if `resnet` is given with a model.
    """
    if isinstance(backbone, str):
        check_choice("backbone", backbone, BACKBONES)
        return ResNet(**{**BACKBONES[backbone], **(resnet or {})}, image_shape=image_shape)
    if not isinstance(backbone, keras.Model):
        raise TypeError(
            "`backbone` must be a name such as 'resnet50' or a keras.Model of Keras 3; received "
            f"{type(backbone).__module__}.{type(backbone).__qualname__}."
        )
    if resnet:
        raise ValueError(
            "Arguments of `ResNet` must go with a backbone given by name; received the model "
            f"{backbone.name!r} and {', '.join(map(repr, resnet))}."
        )
    return _pyramid_model(backbone, tuple(image_shape))


def _pyramid_model(model, image_shape):
    inputs = getattr(model, "inputs", None)
    if inputs:
        _check_inputs(model, inputs, image_shape)
        images = inputs[0]
        outputs = model.outputs if isinstance(model, keras.Sequential) else model.output
    else:  # A subclassed model: its graph is one call of it.
        images = keras.Input(image_shape)
        outputs = model(images)

    if getattr(model, "pyramid_outputs", None):
        candidates = list(model.pyramid_outputs.values())
    elif getattr(model, "pyramid_level_inputs", None):
        candidates = [
            model.get_layer(layer).output if isinstance(layer, str) else layer
            for layer in model.pyramid_level_inputs.values()
        ]
    elif isinstance(outputs, dict) and _is_run(
        LEVEL_STRIDES[k] for k in outputs if k in LEVEL_STRIDES
    ):
        if outputs.keys() <= LEVEL_STRIDES.keys() and inputs:
            return model
        maps = {level: outputs[level] for level in LEVEL_STRIDES if level in outputs}
        return keras.Model(images, maps, name=model.name)
    else:
        candidates = keras.tree.flatten(outputs)
        if len(candidates) == 1:
            candidates = _trunk(candidates[0])

    found = _by_stride(images, candidates)
    strides = [stride for stride in LEVEL_STRIDES.values() if stride in found]
    if not _is_run(strides):
        sources = [tensor._keras_history.operation for tensor in candidates]
        nested = [
            repr(source.name)
            for source in sources
            if isinstance(source, keras.Model) and source is not model
        ]
        raise ValueError(
            f"The backbone {model.name!r} must have feature maps [batch, height, width, channels] "
            "of strides 4, 8, 16 and 32, or at least two consecutive ones; received strides "
            f"{sorted(found) or 'none'}"
            + (f" (it contains the model {' and '.join(nested)}: pass that)." if nested else ".")
        )
    maps = {level: found[stride] for level, stride in LEVEL_STRIDES.items() if stride in found}
    return keras.Model(images, maps, name=model.name)


def _is_run(strides):
    """Whether there are at least two strides, each twice the one before."""
    strides = sorted(strides)
    return len(strides) > 1 and all(b == 2 * a for a, b in itertools.pairwise(strides))


def _check_inputs(model, inputs, image_shape):
    shapes = [tuple(tensor.shape) for tensor in inputs]
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][-1] != 3:
        raise ValueError(
            f"The backbone {model.name!r} must take one channels-last batch of images "
            f"[batch, height, width, 3]; received inputs {' and '.join(map(str, shapes))}."
        )
    height, width = shapes[0][1:3]
    if height not in (None, image_shape[0]) or width not in (None, image_shape[1]):
        raise ValueError(
            f"The backbone {model.name!r} must take images of image_shape={image_shape}, or of "
            f"(None, None, 3); received one for images of shape {shapes[0][1:]}."
        )


def _trunk(output):
    """Returns the tensors that every path to `output` passes through, in their order."""
    # Depth-first, so that a node comes after those that compute its inputs.
    nodes, seen, stack = [], set(), [(_node(output), False)]
    while stack:
        node, inputs_done = stack.pop()
        if inputs_done:
            nodes.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((_node(tensor), False) for tensor in node.input_tensors)

    uses_left = Counter({id(output): 1})
    for node in nodes:
        uses_left.update({id(tensor) for tensor in node.input_tensors})
    # Where only one tensor is still to be used, everything after depends on it.
    trunk, live = [], {}
    for node in nodes:
        for key in {id(tensor) for tensor in node.input_tensors}:
            uses_left[key] -= 1
            if not uses_left[key]:
                del live[key]
        live.update({id(tensor): tensor for tensor in node.output_tensors if uses_left[id(tensor)]})
        if len(live) == 1:
            trunk.extend(live.values())
    return trunk


def _node(tensor):
    operation, node_index, _ = tensor._keras_history
    return operation._inbound_nodes[node_index]


def _by_stride(images, tensors):
    """Returns the feature map of each stride: the last of those with the fewest pixels.

    A map with more pixels than another of its stride was padded for the next convolution.
    """
    maps = [tensor for tensor in tensors if len(tensor.shape) == 4]
    if not maps:
        return {}
    batch, height, width, channels = images.shape
    probe_height, probe_width = height or PROBE_SIZE, width or PROBE_SIZE
    probe = keras.KerasTensor((batch, probe_height, probe_width, channels), images.dtype)
    found, smallest = {}, {}
    probed = keras.Function(images, maps).compute_output_spec(probe)
    for tensor, (_, height, width, _) in zip(maps, (spec.shape for spec in probed), strict=True):
        if height < 2 or width < 2:
            continue  # Global pooling.
        stride = 2 ** round(math.log2(probe_height / height))
        if stride != 2 ** round(math.log2(probe_width / width)):
            continue
        if height * width <= smallest.get(stride, math.inf):
            found[stride], smallest[stride] = tensor, height * width
    return found
