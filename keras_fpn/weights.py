"""Weights from torchvision: names, layouts, and an all-or-nothing load."""

import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping

import keras
import numpy as np


def load_torchvision_weights(
    model: keras.Model, state_dict: Mapping[str, np.ndarray] | str | os.PathLike
) -> None:
    """Loads a torchvision Faster R-CNN with a ResNet-FPN backbone into a detector.

    PyTorch is needed only to read a PyTorch file; a mapping of arrays or an `.npz` file needs
    nothing. Nothing of the model changes unless everything fits.

    Args:
        model: from `build_fpn_faster_rcnn` with a ResNet backbone. Torchvision counts the
            background: its 91 classes are `num_classes=90` here.
        state_dict: mapping of torchvision's names to arrays (or tensors), or the path of an
            `.npz`, `.pth` or `.pt` file of one.

    Raises:
        FileNotFoundError: where the path is no file.
        ImportError: for a PyTorch file without PyTorch.
        ValueError: for names that are missing or left over, and shapes or values that do not fit.
    """
    arrays = {_current_name(name): value for name, value in _read(state_dict).items()}
    num_classes = model.num_classes
    plan = _backbone_plan(model.backbone, prefix="backbone.body.")
    pyramid = model.feature_pyramid
    for index, level in enumerate(sorted(pyramid.laterals)):
        plan += _convolution(f"backbone.fpn.inner_blocks.{index}.0", pyramid.laterals[level])
        plan += _convolution(f"backbone.fpn.layer_blocks.{index}.0", pyramid.outputs[level])
    head = model.rpn_head
    plan += _convolution("rpn.head.conv.0.0", head.hidden)
    plan += _convolution("rpn.head.cls_logits", head.objectness)
    plan += _convolution("rpn.head.bbox_pred", head.deltas)
    box_head, bins = model.box_head, model.roi_pooling.output_size

    def flatten_last(kernel):
        channels = kernel.shape[1] // (bins * bins)
        kernel = kernel.reshape(-1, channels, bins, bins).transpose(2, 3, 1, 0)
        return kernel.reshape(-1, kernel.shape[-1])

    def background_last(x):
        return np.concatenate([x[1:], x[:1]])

    def without_background(x):
        return x[4:]

    plan += _dense("roi_heads.box_head.fc6", box_head.hidden1, kernel=flatten_last)
    plan += _dense("roi_heads.box_head.fc7", box_head.hidden2)
    predictor = "roi_heads.box_predictor"
    plan += _dense(f"{predictor}.cls_score", box_head.class_logits, rows=background_last)
    plan += _dense(f"{predictor}.bbox_pred", box_head.deltas, rows=without_background)
    classes = np.shape(arrays.get(f"{predictor}.cls_score.bias", ()))
    if classes and classes != (num_classes + 1,):
        raise ValueError(
            f"The weights are for {classes[0] - 1} classes and the background; the model has "
            f"num_classes={num_classes}."
        )
    _assign(plan, arrays)


def load_backbone_weights(
    backbone: keras.Model, state_dict: Mapping[str, np.ndarray] | str | os.PathLike
) -> None:
    """Loads a torchvision ResNet classifier into a `ResNet`; its `fc` layer is left out.

    Args:
        backbone: a `keras_fpn.resnet.ResNet`.
        state_dict: as for `load_torchvision_weights`.

    Raises:
        As `load_torchvision_weights`.
    """
    arrays = _read(state_dict)
    arrays = {name: value for name, value in arrays.items() if name not in ("fc.weight", "fc.bias")}
    _assign(_backbone_plan(backbone, prefix=""), arrays)


def _read(state_dict):
    if isinstance(state_dict, Mapping):
        items = dict(state_dict)
    else:
        path = os.fspath(state_dict)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"No file of weights at {path!r}.")
        if path.endswith(".npz"):
            try:
                with np.load(path, allow_pickle=False) as archive:
                    items = dict(archive)
            except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise ValueError(f"{path!r} is no whole .npz file of arrays.") from error
        elif path.endswith((".pth", ".pt")):
            try:
                import torch
            except ImportError as error:
                raise ImportError(
                    f"Reading {path!r} needs PyTorch; install it, or give an .npz file."
                ) from error
            try:
                items = torch.load(path, map_location="cpu", weights_only=True)
            except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
                raise ValueError(f"{path!r} is no whole PyTorch file of tensors.") from error
        else:
            raise ValueError(f"A file of weights ends in .npz, .pth or .pt; received {path!r}.")
    arrays = {
        name: value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)
        for name, value in items.items()
    }
    # Batch norm counts its batches there; no layer needs the count.
    return {k: v for k, v in arrays.items() if not k.endswith("num_batches_tracked")}


def _current_name(name):
    """Published checkpoints carry the names that torchvision had before version 0.13."""
    name = re.sub(r"^(backbone\.fpn\.\w+_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2", name)
    return re.sub(r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1", name)


def _backbone_plan(backbone, prefix):
    layers = {layer.name: layer for layer in backbone.layers}
    if "stem_conv" not in layers:
        raise ValueError(
            "torchvision's names are those of its ResNets; the model's backbone is "
            f"{backbone.name!r} of type {type(backbone).__name__}."
        )
    plan = []
    for layer_name, layer in layers.items():
        if layer.weights:
            name = prefix + _torchvision_name(layer_name)
            plan += _norm(name, layer) if "norm" in layer_name else _convolution(name, layer)
    return plan


def _torchvision_name(layer_name):
    if layer_name.startswith("stem"):
        return {"stem_conv": "conv1", "stem_norm": "bn1"}[layer_name]
    stage, block, part = re.fullmatch(r"stage(\d)_block(\d+)_(\w+)", layer_name).groups()
    part = re.sub(r"^norm", "bn", part)
    part = {"shortcut_conv": "downsample.0", "shortcut_norm": "downsample.1"}.get(part, part)
    return f"layer{int(stage) - 1}.{block}.{part}"


# A plan is a list of (torchvision's name, variable, how its array becomes the variable's).


def _convolution(name, layer):
    plan = [(f"{name}.weight", layer.kernel, lambda x: x.transpose(2, 3, 1, 0))]
    if layer.use_bias:
        plan.append((f"{name}.bias", layer.bias, lambda x: x))
    return plan


def _dense(name, layer, kernel=lambda x: x.T, rows=lambda x: x):
    return [
        (f"{name}.weight", layer.kernel, lambda x: kernel(rows(x))),
        (f"{name}.bias", layer.bias, rows),
    ]


def _norm(name, layer):
    plan = [(f"{name}.weight", layer.gamma), (f"{name}.bias", layer.beta)]
    if hasattr(layer, "moving_mean"):
        plan.append((f"{name}.running_mean", layer.moving_mean))
        plan.append((f"{name}.running_var", layer.moving_variance))
    return [(*entry, lambda x: x) for entry in plan]


def _assign(plan, arrays):
    wanted = {name for name, _, _ in plan}
    missing = sorted(wanted - set(arrays))
    left_over = sorted(set(arrays) - wanted)
    if missing or left_over:
        raise ValueError(
            f"The weights do not fit: {_named('missing', missing)}, "
            f"{_named('left over', left_over)}; nothing was loaded."
        )
    values, misfits = [], []
    for name, variable, convert in plan:
        array = arrays[name]
        try:
            value = convert(array)
        except (ValueError, IndexError):
            value = None
        if value is None or value.shape != tuple(variable.shape):
            misfits.append(f"{name} {array.shape} for {tuple(variable.shape)}")
        elif not (np.issubdtype(array.dtype, np.floating) and np.isfinite(array).all()):
            misfits.append(f"{name} of dtype {array.dtype} is not all finite numbers")
        values.append(value)
    if misfits:
        raise ValueError(
            f"The weights do not fit: {'; '.join(misfits[:5])}"
            f"{f' and {len(misfits) - 5} more' if len(misfits) > 5 else ''}; nothing was loaded."
        )
    for (_, variable, _), value in zip(plan, values, strict=True):
        variable.assign(value)


def _named(what, names):
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} {what}" + (f" ({shown})" if names else "")
