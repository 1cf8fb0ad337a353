"""The normalization layers of backbone, pyramid and box head, by name."""

import keras
from keras import ops

from keras_fpn.typing import Tensor

NORMALIZATIONS = ("frozen_batch_norm", "batch_norm", "sync_batch_norm", "group_norm")


@keras.saving.register_keras_serializable("keras_fpn")
class FrozenBatchNormalization(keras.layers.Layer):
    """Batch normalization whose statistics and affine parameters are all constants.

    `y = gamma * (x - moving_mean) / sqrt(moving_variance + epsilon) + beta` over the last axis, in
    training as in inference. The weights are those of `keras.layers.BatchNormalization`, in its
    order: gamma, beta, moving_mean, moving_variance, each `[channels]` and none of them trainable.
    They are held, and the scale and shift made from them, in float32 whatever the precision policy;
    scale and shift are applied in the compute dtype.

    Args:
        epsilon: float, added to the variance. Defaults to 1e-5; torchvision's COCO_V1 checkpoint
            was trained with 0.
    """

    def __init__(self, epsilon: float = 1e-5, **kwargs):
        super().__init__(**kwargs)
        self.epsilon = epsilon

    def build(self, input_shape):
        def weight(name, initializer):
            return self.add_weight(
                shape=(input_shape[-1],),
                name=name,
                initializer=initializer,
                dtype="float32",
                autocast=False,
                trainable=False,
            )

        self.gamma = weight("gamma", "ones")
        self.beta = weight("beta", "zeros")
        self.moving_mean = weight("moving_mean", "zeros")
        self.moving_variance = weight("moving_variance", "ones")

    def call(self, inputs) -> Tensor:
        scale = self.gamma * ops.rsqrt(self.moving_variance + self.epsilon)
        shift = self.beta - self.moving_mean * scale
        return inputs * ops.cast(scale, inputs.dtype) + ops.cast(shift, inputs.dtype)

    def compute_output_shape(self, input_shape) -> tuple:
        return input_shape

    def get_config(self) -> dict:
        return {**super().get_config(), "epsilon": self.epsilon}


def normalization_layer(
    kind: str, epsilon: float, *, name: str, dtype: keras.DTypePolicy
) -> keras.layers.Layer:
    """Returns a normalization layer over the last axis; `kind` is one of `NORMALIZATIONS`."""
    if kind == "frozen_batch_norm":
        return FrozenBatchNormalization(epsilon, name=name, dtype=dtype)
    if kind == "group_norm":
        return keras.layers.GroupNormalization(32, axis=-1, epsilon=epsilon, name=name, dtype=dtype)
    return keras.layers.BatchNormalization(
        axis=-1,
        momentum=0.9,
        epsilon=epsilon,
        synchronized=kind == "sync_batch_norm",
        name=name,
        dtype=dtype,
    )
