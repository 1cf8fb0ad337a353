"""Weights of Detectron2's Faster R-CNN, RPN and Fast R-CNN on ResNets, and its conventions."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from keras_fpn.conv5_head import Conv5Head
from keras_fpn.single_scale import SingleScale
from keras_fpn.weights.plan import (
    channels_last_columns,
    check_resnet,
    count_names,
    fit,
    layers_with_weights,
    normalization_kind,
    plan_of,
    resnet_name,
)

BOTTOM_UP = "backbone.bottom_up."
# Of a model without a feature pyramid.
BACKBONE = "backbone."
RES5 = "roi_heads.res5"
RPN_HEAD = "proposal_generator.rpn_head"
BOX_HEAD = "roi_heads.box_head"
PREDICTOR = "roi_heads.box_predictor"


def _residual_blocks(ours: str, theirs: str) -> dict[str, str | Callable[[re.Match], str]]:
    return {
        rf"{ours}_block(?P<block>\d+)_conv(?P<i>\d)": rf"{theirs}.\g<block>.conv\g<i>",
        rf"{ours}_block(?P<block>\d+)_norm(?P<i>\d)": rf"{theirs}.\g<block>.conv\g<i>.norm",
        rf"{ours}_block(?P<block>\d+)_shortcut_conv": rf"{theirs}.\g<block>.shortcut",
        rf"{ours}_block(?P<block>\d+)_shortcut_norm": rf"{theirs}.\g<block>.shortcut.norm",
    }


# As in `plan_of`. The background is the last class, as in `BoxHead`.
NAMES: dict[str, str | Callable[[re.Match], str]] = {
    **_residual_blocks(r"box_head/stage5", RES5),
    r"pyramid/(lateral|output)_C(\d)": r"backbone.fpn_\1\2",
    r"pyramid/(lateral|output)_norm_C(\d)": r"backbone.fpn_\1\2.norm",
    r"rpn_head/objectness": f"{RPN_HEAD}.objectness_logits",
    r"rpn_head/deltas": f"{RPN_HEAD}.anchor_deltas",
    r"box_head/convolution(\d+)": rf"{BOX_HEAD}.conv\1",
    r"box_head/norm(\d+)": rf"{BOX_HEAD}.conv\1.norm",
    r"box_head/hidden(\d+)": rf"{BOX_HEAD}.fc\1",
    r"box_head/class_logits": f"{PREDICTOR}.cls_score",
    r"box_head/deltas": f"{PREDICTOR}.bbox_pred",
}
ANCHOR_SIZES = (32, 64, 128, 256, 512)
# State dicts contain parts of the configuration beside the weights.
BUFFERS = r"pixel_mean|pixel_std|proposal_generator\.anchor_generator\.cell_anchors\.\d+"


def is_detectron2(arrays: Mapping[str, np.ndarray]) -> bool:
    """Returns whether arrays have the names of Detectron2."""
    return f"{RPN_HEAD}.objectness_logits.weight" in arrays or any(
        # Fast R-CNN has no RPN.
        f"{prefix}stem.conv1.weight" in arrays
        for prefix in (BOTTOM_UP, BACKBONE)
    )


def detectron2_architecture(arrays: Mapping[str, np.ndarray]) -> tuple[str, int | None, dict]:
    """Returns the architecture of a model, as far as its arrays tell, with Detectron2's defaults.

    What the arrays do not tell follows the model zoo: ResNets stride in the 1x1 convolution and
    take pixels with a standard deviation of 1, ResNeXts stride in the 3x3 and take pixels divided
    by their standard deviation; models on C4 do not pad images; an RPN alone proposes more.

    Returns:
        `(backbone, num_classes, stages)`: the name of the ResNet, the number of classes (None for
        an RPN alone), and stage name to arguments, or to a stage that is not the default one.

    Raises:
        ValueError: if the arrays are those of neither a model on a ResNet with a feature pyramid
            nor one on C4.
    """
    on_c4 = _is_on_c4(arrays)
    if not on_c4 and np.ndim(arrays.get("backbone.fpn_lateral2.weight", ())) != 4:
        raise ValueError(
            "Expected a Detectron2 model on a ResNet with a feature pyramid from stride 4, or on "
            "C4; received weights without backbone.fpn_lateral2."
        )
    prefix = BACKBONE if on_c4 else BOTTOM_UP
    blocks = tuple(
        count_names(arrays, rf"{re.escape(prefix)}res{stage}\.\d+\.conv1\.weight")
        for stage in range(2, 5 if on_c4 else 6)
    )
    backbone = resnet_name(
        blocks,
        f"{prefix}res2.0.conv3.weight" in arrays,
        np.shape(arrays.get(f"{prefix}res2.0.conv2.weight", ())),
    )
    grouped = backbone.startswith("resnext")
    preprocessing: dict[str, Any] = {"channel_order": "bgr"}
    if not grouped:
        preprocessing["std"] = (1.0, 1.0, 1.0)
    for argument in ("mean", "std"):
        pixel = arrays.get(f"pixel_{argument}", ())
        if np.size(pixel) == 3:
            preprocessing[argument] = tuple(float(x) for x in np.ravel(pixel)[::-1])
    sizes = (ANCHOR_SIZES,) if on_c4 else tuple((size,) for size in ANCHOR_SIZES)
    for level, of_level in enumerate(sizes):
        cell = arrays.get(f"proposal_generator.anchor_generator.cell_anchors.{level}")
        if cell is not None:
            _check_anchors(np.asarray(cell), of_level)
    num_classes = None
    if f"{PREDICTOR}.cls_score.bias" in arrays:
        num_classes = len(arrays[f"{PREDICTOR}.cls_score.bias"]) - 1
    stages: dict[str, Any] = {
        "preprocessing": preprocessing,
        "resnet": {
            "normalization": normalization_kind(arrays, f"{prefix}stem.conv1.norm"),
            "stride_in_1x1": not grouped and int(backbone.removeprefix("resnet")) >= 50,
        },
        "rpn_head": {"hidden_layers": len(_rpn_convolutions(arrays))},
        "anchors": {"rounded": False},
        # Only empty boxes are dropped.
        "proposals": {"min_size": 1e-12},
        "detections": {"min_size": 0.0},
        "roi_pooling": {"aligned": True, "sampling_ratio": None},
        "rpn_loss": {"smooth_l1_beta": 0.0},
        "roi_loss": {"smooth_l1_beta": 0.0},
    }
    if num_classes is None:
        stages["proposals"]["post_nms"] = 2000
    add_stages = _add_c4 if on_c4 else _add_pyramid
    add_stages(stages, arrays, num_classes)
    return backbone, num_classes, stages


def _add_c4(stages: dict[str, Any], arrays, num_classes: int | None) -> None:
    """Adds the stages and arguments of a model on C4."""
    # The builder's number of classes replaces this one.
    stages["box_head"] = Conv5Head(num_classes or 80, **stages["resnet"], name="box_head")
    stages["resnet"]["last_stage"] = 4
    stages["preprocessing"]["size_divisor"] = 1
    stages["pyramid"] = SingleScale("C4", name="pyramid")
    stages["anchors"] |= {"sizes": (ANCHOR_SIZES,), "strides": (16,)}
    stages["proposals"] |= {
        "pre_nms": 12000 if num_classes is None else 6000,
        "training_pre_nms": 12000,
        "training_post_nms": 2000,
    }
    stages["roi_pooling"]["output_size"] = 14


def _add_pyramid(stages: dict[str, Any], arrays, num_classes: int | None) -> None:
    """Adds the stages and arguments of a model with a feature pyramid."""
    channels = arrays["backbone.fpn_lateral2.weight"].shape[0]
    stages["pyramid"] = {
        "channels": channels,
        "normalization": normalization_kind(arrays, "backbone.fpn_lateral2.norm"),
    }
    stages["anchors"]["strides"] = (4, 8, 16, 32, 64)
    stages["proposals"]["training_post_nms"] = 1000
    if num_classes is None:
        return
    hidden = arrays.get(f"{BOX_HEAD}.fc1.weight")
    if hidden is None or np.ndim(hidden) != 2:
        raise ValueError(
            "Expected a box head with fully connected hidden layers; received weights of none."
        )
    stages["roi_pooling"]["output_size"] = round((hidden.shape[1] / channels) ** 0.5)
    stages["box_head"] = {
        "convolutions": count_names(arrays, r"roi_heads\.box_head\.conv\d+\.weight"),
        "normalization": normalization_kind(arrays, f"{BOX_HEAD}.conv1.norm"),
        "hidden_layers": count_names(arrays, r"roi_heads\.box_head\.fc\d+\.weight"),
        "hidden_dim": hidden.shape[0],
    }


def fit_detectron2_arrays(
    model: keras.Model, arrays: Mapping[str, np.ndarray], *, with_classes: bool
) -> Callable[[], None]:
    """Checks that a state dict of Detectron2 fits a model.

    That of an RPN alone leaves the box head as it is, that of Fast R-CNN the RPN.

    Args:
        model: from one of the builders, with the arguments of `detectron2_architecture`.
        arrays: name to array.
        with_classes: whether to load the layers that depend on the classes.

    Returns:
        A function that loads them.

    Raises:
        ValueError: for missing or unexpected names, and for shapes or values that do not fit.
    """
    arrays = {k: v for k, v in arrays.items() if not re.fullmatch(BUFFERS, k)}
    check_resnet(model.backbone, "Detectron2")
    layers = layers_with_weights({stage: getattr(model, stage) for stage in model.stage_names})
    convolutions = dict(enumerate(_rpn_convolutions(arrays), start=1))
    prefix = BACKBONE if f"{BACKBONE}stem.conv1.weight" in arrays else BOTTOM_UP
    names = NAMES | {
        r"backbone/stem_conv": f"{prefix}stem.conv1",
        r"backbone/stem_norm": f"{prefix}stem.conv1.norm",
        **_residual_blocks(r"backbone/stage(?P<stage>\d)", rf"{prefix}res\g<stage>"),
        r"rpn_head/hidden(\d+)": lambda match: convolutions.get(
            int(match[1]), f"{RPN_HEAD}.{match[0]}"
        ),
    }
    layouts = {}
    if "rpn_head" not in model.stage_names:
        arrays = {k: v for k, v in arrays.items() if not k.startswith("proposal_generator.")}
    elif not any(name.startswith("proposal_generator.") for name in arrays):
        # Weights of Fast R-CNN.
        layers = {key: layer for key, layer in layers.items() if not key.startswith("rpn_head/")}
    if "box_head" not in model.stage_names:
        arrays = {k: v for k, v in arrays.items() if not k.startswith("roi_heads.")}
    elif not any(name.startswith("roi_heads.") for name in arrays):
        # Weights of an RPN alone.
        layers = {key: layer for key, layer in layers.items() if not key.startswith("box_head/")}
    else:
        columns = channels_last_columns(model.roi_pooling.output_size)
        layouts["box_head/hidden1"] = {"columns": columns}
        if not with_classes:
            arrays = {k: v for k, v in arrays.items() if not k.startswith(PREDICTOR)}
            for layer in model.box_head.class_layers():
                del layers[f"box_head/{layer.name}"]
    return fit(plan_of(layers, names, layouts), arrays)


def _is_on_c4(arrays) -> bool:
    has_backbone = f"{BACKBONE}stem.conv1.weight" in arrays
    return has_backbone and f"{BACKBONE}res5.0.conv1.weight" not in arrays


def _check_anchors(cell: np.ndarray, sizes: tuple[int, ...]) -> None:
    roots = np.sqrt([0.5, 1.0, 2.0])
    sides = np.concatenate([size * np.stack([1 / roots, roots], axis=-1) for size in sizes])
    if cell.shape != (len(sides), 4) or not np.allclose(cell[:, 2:] - cell[:, :2], sides, atol=1.0):
        raise ValueError(
            f"Expected Detectron2's anchors of size {', '.join(map(str, sizes))} and aspect ratios "
            f"0.5, 1 and 2; received the cell anchors {cell.tolist()}."
        )


def _rpn_convolutions(arrays) -> list[str]:
    several = sorted(
        {
            match[1]
            for name in arrays
            if (match := re.match(rf"({RPN_HEAD}\.conv\.conv\d+)\.", name))
        },
        key=lambda name: int(name.rsplit("conv", 1)[1]),
    )
    return several or [f"{RPN_HEAD}.conv"]
