"""Inputs of the stored reference results, made from numpy alone on both sides.

The oracle (``make_reference.py``, PyTorch) and the tests (Keras) call the same functions, so that
neither weights nor images are stored. Every array comes from a ``np.random.RandomState`` whose seed
is the CRC-32 of a name; its integer stream is frozen by numpy's compatibility policy. Only integer
draws and elementwise IEEE arithmetic are used: no ``log``, ``sin`` or floating-point sum, so the
arrays are the same bits on every machine.
"""

import re
import zlib

import numpy as np

_HALF_RANGE = 32768

# Standard deviation of a layer's weights times sqrt(fan-in), by a part of the layer's name. Layers
# not listed use He's sqrt(2).
_GAINS = {
    "fpn.inner_blocks": 1.0,
    "fpn.layer_blocks": 1.0,
    "rpn.head.cls_logits": 1.6,
    "rpn.head.bbox_pred": 0.4,
    "box_predictor.cls_score": 2.5,
    "box_predictor.bbox_pred": 2.0,
}


def _integers(name: str, shape: tuple[int, ...]) -> np.ndarray:
    random = np.random.RandomState(zlib.crc32(name.encode()))
    return random.randint(-_HALF_RANGE, _HALF_RANGE, size=shape, dtype=np.int32)


def reference_uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 array of `shape`, uniform in [-1, 1), decided by `name` alone."""
    return (_integers(name, shape) / float(_HALF_RANGE)).astype(np.float32)


def reference_projection(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The direction on which the gradient of parameter `name` is projected, in PyTorch's layout.

    Uniform in [-1, 1): the stored number is ``sum(gradient * projection)`` in float64.
    """
    return reference_uniform("projection of " + name, shape)


def _weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    # Each filter sums to zero: the positive mean of a ReLU's output then does not drown what
    # differs between places.
    integers = _integers(name, shape).reshape(shape[0], -1)
    fan_in = integers.shape[1]
    values = integers - integers.sum(axis=1, keepdims=True, dtype=np.int64) / float(fan_in)
    gain = next((gain for layer, gain in _GAINS.items() if layer in name), 2.0**0.5)
    values *= gain * (3.0 / fan_in) ** 0.5 / _HALF_RANGE
    return values.astype(np.float32).reshape(shape)


# Blocks of the four stages, channels of C2, and the groups of a bottleneck's 3x3 convolution and
# their width.
_RESNETS = {
    "resnet18": ((2, 2, 2, 2), 64, 1, 64),
    "resnet50": ((3, 4, 6, 3), 256, 1, 64),
    "resnext50_32x4d": ((3, 4, 6, 3), 256, 32, 4),
}


def reference_shapes(
    backbone: str, num_classes: int, *, version: int = 1, c4: bool = False
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of torchvision's Faster R-CNN.

    `num_classes` counts the background. Version 2 is that of `fasterrcnn_resnet50_fpn_v2`. With
    `c4` they are those of Detectron2's C4 model, which torchvision has not, under names that it
    would have: 15 anchors on C4, and `layer4` as the box head.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name, *kernel, bias=True):
        shapes[f"{name}.weight"] = kernel
        if bias:
            shapes[f"{name}.bias"] = kernel[:1]

    def norm(name, channels):
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (channels,)

    blocks, out, groups, group_width = _RESNETS[backbone]
    layer("backbone.body.conv1", 64, 3, 7, 7, bias=False)
    norm("backbone.body.bn1", 64)
    channels = []
    before, width = 64, groups * group_width
    for stage, count in enumerate(blocks, start=1):
        for block in range(count):
            name = f"backbone.body.layer{stage}.{block}"
            kernels = [(width, before, 1), (width, width // groups, 3), (out, width, 1)]
            if backbone == "resnet18":
                kernels = [(out, before, 3), (out, out, 3)]
            for i, (outputs, inputs, size) in enumerate(kernels, start=1):
                layer(f"{name}.conv{i}", outputs, inputs, size, size, bias=False)
                norm(f"{name}.bn{i}", outputs)
            if block == 0 and (stage > 1 or before != out):
                layer(f"{name}.downsample.0", out, before, 1, 1, bias=False)
                norm(f"{name}.downsample.1", out)
            before = out
        channels.append(out)
        out, width = 2 * out, 2 * width

    rpn_channels, anchors = (channels[2], 15) if c4 else (256, 3)
    for i in range(version):
        layer(f"rpn.head.conv.{i}.0", rpn_channels, rpn_channels, 3, 3)
    layer("rpn.head.cls_logits", anchors, rpn_channels, 1, 1)
    layer("rpn.head.bbox_pred", 4 * anchors, rpn_channels, 1, 1)
    predictor_channels = channels[3] if c4 else 1024
    layer("roi_heads.box_predictor.cls_score", num_classes, predictor_channels)
    layer("roi_heads.box_predictor.bbox_pred", 4 * num_classes, predictor_channels)
    if c4:
        return shapes
    convolutions = [
        (f"backbone.fpn.{kind}_blocks.{i}", 256, inputs, size, size)
        for i, of_stage in enumerate(channels)
        for kind, inputs, size in (("inner", of_stage, 1), ("layer", 256, 3))
    ]
    if version == 2:
        convolutions += [(f"roi_heads.box_head.{i}", 256, 256, 3, 3) for i in range(4)]
        layer("roi_heads.box_head.5", 1024, 256 * 7 * 7)
    else:
        layer("roi_heads.box_head.fc6", 1024, 256 * 7 * 7)
        layer("roi_heads.box_head.fc7", 1024, 1024)
    for name, *kernel in convolutions:
        layer(f"{name}.0", *kernel, bias=version == 1)
        if version == 2:
            norm(f"{name}.1", 256)
    return shapes


def reference_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Float32 weights for a torchvision Faster R-CNN FPN, from its parameters' names and shapes.

    `shapes` maps the names of ``model.state_dict()`` to shapes (PyTorch's layout: convolutions
    ``[out, in, height, width]``, linear layers ``[out, in]``). ``num_batches_tracked`` entries are
    left out of the result. An array depends on its own name and shape, and on whether its residual
    block has two or three convolutions.
    """
    weights = {}
    for name, shape in shapes.items():
        shape = tuple(shape)
        layer, role = name.rsplit(".", 1)
        if role == "num_batches_tracked":
            continue
        if role == "running_mean":
            weights[name] = np.float32(0.25) * reference_uniform(name, shape)
        elif role == "running_var":
            weights[name] = np.float32(1) + np.float32(0.5) * reference_uniform(name, shape)
        elif role == "bias":
            weights[name] = np.float32(0.25) * reference_uniform(name, shape)
            if name.endswith("box_predictor.cls_score.bias"):
                # The background: most RoIs are to score low elsewhere.
                weights[name][0] += np.float32(9)
        elif len(shape) == 1:
            block, norm = layer.rsplit(".", 1)
            last = "bn3" if f"{block}.bn3.{role}" in shapes else "bn2"
            scale = np.float32(0.375 if norm == last else 1.0)
            weights[name] = scale * (
                np.float32(1) + np.float32(0.25) * reference_uniform(name, shape)
            )
        else:
            weights[name] = _weight(name, shape)
    return weights


def _smooth(name: str, height: int, width: int, channels: int, cell: int) -> np.ndarray:
    """Bilinear interpolation of random values `cell` places apart, within [-1, 1), float64."""
    shape = (height // cell + 2, width // cell + 2, channels)
    grid = _integers(name, shape) / float(_HALF_RANGE)
    rows, columns = np.arange(height), np.arange(width)
    y = ((rows % cell) / float(cell))[:, None, None]
    x = ((columns % cell) / float(cell))[None, :, None]
    top, left = rows // cell, columns // cell
    upper = grid[top][:, left] * (1 - x) + grid[top][:, left + 1] * x
    lower = grid[top + 1][:, left] * (1 - x) + grid[top + 1][:, left + 1] * x
    return np.ascontiguousarray(upper * (1 - y) + lower * y)


def reference_features(name: str, batch: int, height: int, width: int, channels: int) -> np.ndarray:
    """Float32 map ``[batch, height, width, channels]``, smooth over 4 places with a little noise.

    Neighbours differ by about 0.3, so that the rounding of a coordinate (1e-5 at 160) moves what is
    sampled there by a few 1e-6 only.
    """
    maps = [_smooth(f"{name} {i}", height, width, channels, 4) for i in range(batch)]
    noise = _integers(name + " noise", (batch, height, width, channels)) / float(_HALF_RANGE)
    return (np.stack(maps) + 0.125 * noise).astype(np.float32)


def reference_image(name: str, height: int, width: int) -> np.ndarray:
    """uint8 RGB image ``[height, width, 3]``, decided by the arguments: shades and some noise."""
    name = f"image {name} {height} {width}"
    shades = 128 + 90 * _smooth(name + " coarse", height, width, 3, 32)
    shades += 50 * _smooth(name + " fine", height, width, 3, 8)
    shades += 20 * (_integers(name + " noise", (height, width, 3)) / float(_HALF_RANGE))
    return np.clip(np.floor(shades), 0, 255).astype(np.uint8)


def as_detectron2(weights: dict[str, np.ndarray], stem_scale: float) -> dict[str, np.ndarray]:
    """Weights of a torchvision Faster R-CNN FPN as Detectron2's model of the same shape has them.

    Its background is the last class and has no box. `stem_scale` multiplies the first kernel: most
    of its models do not divide pixels by their deviation. Without a feature pyramid they are those
    of its C4 model, whose last stage is the box head.
    """
    names = _DETECTRON2_NAMES
    c4 = not any(name.startswith("backbone.fpn.") for name in weights)
    if c4:
        names = (
            *((pattern, new.replace(".bottom_up.", ".")) for pattern, new in names),
            (r"^backbone\.res5\.", "roi_heads.res5."),
        )
    renamed = {}
    for name, value in weights.items():
        if name == "backbone.body.conv1.weight":
            value = value * np.float32(stem_scale)
        if name.startswith("roi_heads.box_predictor.cls_score"):
            value = np.roll(value, -1, axis=0)
        elif name.startswith("roi_heads.box_predictor.bbox_pred"):
            value = value[4:]
        if c4 and name.startswith("roi_heads.box_predictor") and name.endswith("weight"):
            # The mean over a region's pixels differs less from region to region.
            value = value * np.float32(2.5)
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


_DETECTRON2_NAMES = (
    (r"^backbone\.body\.conv1\.", "backbone.bottom_up.stem.conv1."),
    (r"^backbone\.body\.bn1\.", "backbone.bottom_up.stem.conv1.norm."),
    *((rf"^backbone\.body\.layer{i}\.", f"backbone.bottom_up.res{i + 1}.") for i in range(1, 5)),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"(res\d\.\d+)\.bn(\d)\.", r"\1.conv\2.norm."),
    *((rf"\.fpn\.inner_blocks\.{i}\.0\.", f".fpn_lateral{i + 2}.") for i in range(4)),
    *((rf"\.fpn\.layer_blocks\.{i}\.0\.", f".fpn_output{i + 2}.") for i in range(4)),
    (r"^rpn\.head\.conv\.0\.0\.", "proposal_generator.rpn_head.conv."),
    (r"^rpn\.head\.cls_logits\.", "proposal_generator.rpn_head.objectness_logits."),
    (r"^rpn\.head\.bbox_pred\.", "proposal_generator.rpn_head.anchor_deltas."),
    (r"\.box_head\.fc6\.", ".box_head.fc1."),
    (r"\.box_head\.fc7\.", ".box_head.fc2."),
)
