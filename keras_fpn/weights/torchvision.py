"""Weights of torchvision's Faster R-CNN on ResNets: their architecture, and how they are loaded."""

import os
import re
from collections.abc import Callable, Mapping

import keras
import numpy as np

from keras_fpn.conv5_head import Conv5Head
from keras_fpn.data.coco_classes import COCO_IDS_AND_NAMES
from keras_fpn.weights.plan import (
    channels_last_columns,
    check_resnet,
    count_names,
    fit,
    layers_with_weights,
    normalization_kind,
    plan_of,
    read_arrays,
    resnet_name,
)

PREDICTOR = "roi_heads.box_predictor"


def _of_block(match: re.Match) -> str:
    stage, block, part, number = match.groups()
    name = f"backbone.body.layer{int(stage) - 1}.{block}"
    if part == "shortcut_":
        return f"{name}.downsample.{('conv', 'norm').index(number)}"
    return f"{name}.{part.replace('norm', 'bn')}{number}"


# As in `plan_of`.
NAMES: dict[str, str | Callable[[re.Match], str]] = {
    r"backbone/stem_conv": "backbone.body.conv1",
    r"backbone/stem_norm": "backbone.body.bn1",
    r"backbone/stage(\d)_block(\d+)_(conv|norm|shortcut_)(\w+)": _of_block,
    r"rpn_head/hidden(\d+)": lambda match: f"rpn.head.conv.{int(match[1]) - 1}.0",
    r"rpn_head/objectness": "rpn.head.cls_logits",
    r"rpn_head/deltas": "rpn.head.bbox_pred",
    r"box_head/convolution(\d+)": lambda match: f"roi_heads.box_head.{int(match[1]) - 1}.0",
    r"box_head/norm(\d+)": lambda match: f"roi_heads.box_head.{int(match[1]) - 1}.1",
    r"box_head/class_logits": f"{PREDICTOR}.cls_score",
    r"box_head/deltas": f"{PREDICTOR}.bbox_pred",
}


def load_torchvision_weights(
    model: keras.Model, state_dict: Mapping[str, np.ndarray] | str | os.PathLike
) -> None:
    """Loads a torchvision Faster R-CNN with a ResNet-FPN backbone into a detector.

    The model changes only if everything fits. PyTorch is not needed.

    Args:
        model: from `build_fpn_faster_rcnn`, with a ResNet backbone and the architecture of the
            weights (which `build_fpn_faster_rcnn(weights=...)` detects itself). Torchvision counts
            the background: its 91 classes are `num_classes=90` here; with `num_classes=80`, those
            in use in COCO are loaded.
        state_dict: mapping of torchvision's names to arrays or tensors, or the path of a `.pth` or
            `.npz` file.

    Raises:
        FileNotFoundError: if the path is not a file.
        ValueError: for missing or unexpected names, and for shapes or values that do not fit.
    """
    fit_torchvision_arrays(model, torchvision_arrays(state_dict), with_classes=True)()


def torchvision_arrays(state_dict: Mapping | str | os.PathLike) -> dict[str, np.ndarray]:
    """Returns the arrays of a state dict by the names that torchvision has had since version 0.13.

    Its published COCO_V1 checkpoint has the former names.

    Raises:
        FileNotFoundError, ValueError: see `read_arrays`.
    """
    arrays = {}
    for name, value in read_arrays(state_dict).items():
        name = re.sub(r"^(backbone\.fpn\.\w+_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2", name)
        name = re.sub(r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1", name)
        arrays[name] = value
    return arrays


def torchvision_architecture(arrays: Mapping[str, np.ndarray]) -> tuple[str, int, dict]:
    """Returns the architecture of a detector, as far as its arrays tell.

    Returns:
        `(backbone, num_classes, stages)`: the name of the ResNet, the number of classes without
        the background, and stage name to arguments.

    Raises:
        ValueError: if the arrays are not those of torchvision's Faster R-CNN on a ResNet.
    """
    lateral = arrays.get("backbone.fpn.inner_blocks.0.0.weight")
    if lateral is None or np.ndim(lateral) != 4 or f"{PREDICTOR}.cls_score.bias" not in arrays:
        raise ValueError(
            "Expected the weights of a torchvision Faster R-CNN with a feature pyramid; received "
            f"{len(arrays)} arrays without its names"
            + (" (a classifier's are for `backbone_weights`)." if "fc.weight" in arrays else ".")
        )
    linear = _hidden_layers(arrays)
    hidden = arrays[f"{linear[0]}.weight"] if linear else None
    if hidden is None or np.ndim(hidden) != 2:
        raise ValueError(
            "Expected a box head with fully connected hidden layers; received weights of none."
        )
    stages = {
        "pyramid": {
            "channels": lateral.shape[0],
            "normalization": normalization_kind(arrays, "backbone.fpn.inner_blocks.0.1"),
        },
        "rpn_head": {"hidden_layers": count_names(arrays, r"rpn\.head\.conv\.\d+\.0\.weight")},
        "roi_pooling": {"output_size": round((hidden.shape[1] / lateral.shape[0]) ** 0.5)},
        "box_head": {
            "convolutions": count_names(arrays, r"roi_heads\.box_head\.\d+\.0\.weight"),
            "normalization": normalization_kind(arrays, "roi_heads.box_head.0.1"),
            "hidden_layers": len(linear),
            "hidden_dim": hidden.shape[0],
        },
    }
    num_classes = len(arrays[f"{PREDICTOR}.cls_score.bias"]) - 1
    return _backbone(arrays, "backbone.body."), num_classes, stages


def fit_torchvision_arrays(
    model: keras.Model, arrays: Mapping[str, np.ndarray], *, with_classes: bool
) -> Callable[[], None]:
    """Checks that the arrays of `torchvision_arrays` fit a detector.

    Args:
        model: as for `load_torchvision_weights`.
        arrays: name to array.
        with_classes: whether to load the layers that depend on the classes.

    Returns:
        A function that loads them.

    Raises:
        ValueError: see `load_torchvision_weights`.
    """
    check_resnet(model.backbone, "torchvision")
    layers = layers_with_weights({stage: getattr(model, stage) for stage in model.stage_names})
    finest = int(model.pyramid.roi_levels[0][1:])
    linear = _hidden_layers(arrays)
    names = NAMES | {
        r"pyramid/lateral(_norm)?_C(\d)": lambda match: (
            f"backbone.fpn.inner_blocks.{int(match[2]) - finest}.{int(match[1] is not None)}"
        ),
        r"pyramid/output(_norm)?_C(\d)": lambda match: (
            f"backbone.fpn.layer_blocks.{int(match[2]) - finest}.{int(match[1] is not None)}"
        ),
        r"box_head/hidden(\d+)": lambda match: dict(enumerate(linear, start=1)).get(
            int(match[1]), f"roi_heads.box_head.{match[0]}"
        ),
    }
    layouts: dict[str, dict] = {}
    if "rpn_head" in model.stage_names:
        order = _anchor_order(model.anchors)
        layouts["rpn_head/objectness"] = {"order": order}
        layouts["rpn_head/deltas"] = {"order": (4 * order[:, None] + np.arange(4)).ravel()}
    else:
        arrays = {k: v for k, v in arrays.items() if not k.startswith("rpn.")}
    if "box_head" in model.stage_names:
        columns = channels_last_columns(model.roi_pooling.output_size)
        layouts["box_head/hidden1"] = {"columns": columns}
        if with_classes:
            layouts |= _class_layouts(model, arrays)
        else:
            arrays = {k: v for k, v in arrays.items() if not k.startswith(PREDICTOR)}
            for layer in model.box_head.class_layers():
                del layers[f"box_head/{layer.name}"]
    else:
        arrays = {k: v for k, v in arrays.items() if not k.startswith("roi_heads.")}
    return fit(plan_of(layers, names, layouts), arrays)


def load_backbone_weights(
    backbone: keras.Model,
    state_dict: Mapping[str, np.ndarray] | str | os.PathLike,
    box_head: keras.layers.Layer | None = None,
) -> None:
    """Loads a torchvision ResNet classifier, without its `fc` layer, into a `ResNet`.

    Args:
        backbone: a `keras_fpn.resnet.ResNet`; the stages that it lacks are ignored.
        state_dict: as for `load_torchvision_weights`.
        box_head: box head of the same model, loaded as well if it is a `Conv5Head`. Defaults to
            None.

    Raises:
        FileNotFoundError, ValueError: see `load_torchvision_weights`.
    """
    arrays = read_arrays(state_dict)
    check_resnet(backbone, "torchvision")
    layers = layers_with_weights({"backbone": backbone})
    last_stage = backbone.last_stage
    if isinstance(box_head, Conv5Head):
        layers |= layers_with_weights({"backbone": box_head.conv5})
        last_stage = 5
    ignored = ("fc.", *(f"layer{stage - 1}." for stage in range(last_stage + 1, 6)))
    arrays = {name: value for name, value in arrays.items() if not name.startswith(ignored)}
    plan = plan_of(layers, NAMES)
    fit([e._replace(name=e.name.removeprefix("backbone.body.")) for e in plan], arrays)()


def _anchor_order(anchors) -> np.ndarray:
    """Returns torchvision's index of each anchor of a location: there, sizes change fastest."""
    sizes = len(anchors.sizes[0])
    ratios = anchors.anchors_per_location // sizes
    return np.arange(sizes * ratios).reshape(ratios, sizes).T.ravel()


def keeps_classes(checkpoint_classes: int, num_classes: int) -> bool:
    """Returns whether a model of `num_classes` can use the classes of a checkpoint."""
    return checkpoint_classes == num_classes or (checkpoint_classes, num_classes) == (90, 80)


def _class_layouts(model, arrays) -> dict[str, dict]:
    classes = np.shape(arrays.get(f"{PREDICTOR}.cls_score.bias", ()))
    if classes and not keeps_classes(classes[0] - 1, model.num_classes):
        raise ValueError(
            f"The weights must be for the model's {model.num_classes} classes; received those of "
            f"{classes[0] - 1} classes and the background."
        )
    # Torchvision's class 0 is the background.
    labels = np.arange(1, model.num_classes + 1)
    if classes and classes[0] == 91 and model.num_classes == 80:
        labels = np.array(list(COCO_IDS_AND_NAMES))
    return {
        "box_head/class_logits": {"rows": lambda x: x[np.append(labels, 0)]},
        "box_head/deltas": {
            "rows": lambda x: x.reshape(-1, 4, *x.shape[1:])[labels].reshape(-1, *x.shape[1:])
        },
    }


def _hidden_layers(arrays) -> list[str]:
    """Returns the names of the box head's fully connected hidden layers, in their order."""
    names = [re.fullmatch(r"(roi_heads\.box_head\.(?:fc)?(\d+))\.weight", name) for name in arrays]
    return [m[1] for m in sorted(filter(None, names), key=lambda match: int(match[2]))]


def _backbone(arrays, prefix) -> str:
    blocks = tuple(
        count_names(arrays, rf"{re.escape(prefix)}layer{stage}\.\d+\.conv1\.weight")
        for stage in range(1, 5)
    )
    bottleneck = f"{prefix}layer1.0.conv3.weight" in arrays
    return resnet_name(blocks, bottleneck, np.shape(arrays.get(f"{prefix}layer1.0.conv2.weight")))
