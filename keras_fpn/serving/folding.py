"""Folding of batch norms into the convolutions before them, for faster inference."""

import keras
import numpy as np
from keras.ops import convert_to_numpy

from keras_fpn.detector import Detector

# Their statistics are constants in inference; those of a group norm depend on the image.
FOLDABLE = ("frozen_batch_norm", "batch_norm", "sync_batch_norm")


def fold_normalization(model: Detector) -> Detector:
    """Returns a copy of a detector for inference, without its batch norms.

    `gamma * (W x - mean) / sqrt(variance + epsilon) + beta` is `W' x + b'` with
    `scale = gamma / sqrt(variance + epsilon)`, `W' = W * scale` and `b' = beta - mean * scale`,
    computed in float64. Group norms, and stages without a method `normalized_convolutions`, such as
    third-party backbones, are copied as they are.

    Args:
        model: the detector; it is left unchanged.

    Returns:
        A detector of the same class with the same detections up to rounding. It is not meant for
        training.
    """
    config = model.get_config()
    foldable = [
        name
        for name in model.stage_names
        if hasattr(getattr(model, name), "normalized_convolutions")
        and getattr(model, name).normalization in FOLDABLE
    ]
    for name in foldable:
        config[name]["config"]["normalization"] = None
    folded = type(model).from_config(config)
    for name in model.stage_names:
        theirs, ours = getattr(model, name), getattr(folded, name)
        if name in foldable:
            _fold_stage(theirs, ours)
        else:
            ours.set_weights(theirs.get_weights())
    return folded


def _fold_stage(stage: keras.layers.Layer, folded: keras.layers.Layer) -> None:
    done = set()
    for (convolution, norm), (target, _) in zip(
        stage.normalized_convolutions(), folded.normalized_convolutions(), strict=True
    ):
        gamma, beta, mean, variance = (
            convert_to_numpy(x).astype("float64")
            for x in (norm.gamma, norm.beta, norm.moving_mean, norm.moving_variance)
        )
        scale = gamma / np.sqrt(variance + norm.epsilon)
        kernel = convert_to_numpy(convolution.kernel).astype("float64") * scale
        target.set_weights([kernel, beta - mean * scale])
        done.update(map(id, target.weights))
    weights = {variable.path: variable for variable in stage.weights}
    for variable in folded.weights:
        if id(variable) not in done:
            variable.assign(weights[variable.path])
