"""Batch norms folded into the convolutions before them: the same function with fewer steps."""

import keras
import numpy as np
from keras.ops import convert_to_numpy

from keras_fpn.faster_rcnn import FasterRCNN
from keras_fpn.resnet import ResNet

# These have constants for statistics in inference; group norm depends on the image.
FOLDABLE = ("frozen_batch_norm", "batch_norm", "sync_batch_norm")


def fold_normalization(model: FasterRCNN) -> FasterRCNN:
    """A copy of a detector for inference, without the batch norms of its ResNet, pyramid and head.

    `gamma * (W x - mean) / sqrt(variance + epsilon) + beta` is `W' x + b'` with
    `scale = gamma / sqrt(variance + epsilon)`, `W' = W * scale` and `b' = beta - mean * scale`,
    which are made in float64. A backbone that is no `ResNet`, and group norms, are copied as they
    are.

    Args:
        model: a `FasterRCNN`; it is left unchanged.

    Returns:
        A `FasterRCNN` with the same detections up to rounding. Training it trains another function:
        nothing of it is frozen.
    """
    config = model.get_config()
    backbone, pyramid, head = model.backbone, model.feature_pyramid, model.box_head
    folds_backbone = isinstance(backbone, ResNet) and backbone.normalization in FOLDABLE
    folds_pyramid = pyramid.normalization in FOLDABLE
    folds_head = head.normalization in FOLDABLE
    if folds_backbone:
        config["backbone"]["config"]["normalization"] = "folded"
    if folds_pyramid:
        config["feature_pyramid"]["config"]["normalization"] = None
    if folds_head:
        config["box_head"]["config"]["normalization"] = None
    folded = FasterRCNN.from_config(config)

    if folds_backbone:
        for layer in folded.backbone.layers:
            if layer.weights:
                norm = backbone.get_layer(layer.name.replace("conv", "norm"))
                _fold(backbone.get_layer(layer.name), norm, layer)
    else:
        folded.backbone.set_weights(backbone.get_weights())
    if folds_pyramid:
        ours = folded.feature_pyramid
        for level in pyramid.laterals:
            _fold(pyramid.laterals[level], pyramid.lateral_norms[level], ours.laterals[level])
            _fold(pyramid.outputs[level], pyramid.output_norms[level], ours.outputs[level])
    else:
        folded.feature_pyramid.set_weights(pyramid.get_weights())
    folded.rpn_head.set_weights(model.rpn_head.get_weights())
    if folds_head:
        for theirs, norm, ours in zip(
            head.convolved, head.norms, folded.box_head.convolved, strict=True
        ):
            _fold(theirs, norm, ours)
        for theirs, ours in zip(
            [*head.hidden, *head.class_layers()],
            [*folded.box_head.hidden, *folded.box_head.class_layers()],
            strict=True,
        ):
            ours.set_weights(theirs.get_weights())
    else:
        folded.box_head.set_weights(head.get_weights())
    return folded


def _fold(convolution: keras.layers.Layer, norm: keras.layers.Layer, folded: keras.layers.Layer):
    gamma, beta, mean, variance = (
        convert_to_numpy(x).astype("float64")
        for x in (norm.gamma, norm.beta, norm.moving_mean, norm.moving_variance)
    )
    scale = gamma / np.sqrt(variance + norm.epsilon)
    kernel = convert_to_numpy(convolution.kernel).astype("float64") * scale
    folded.set_weights([kernel, beta - mean * scale])
