"""Bottom-up pathway: residual networks that give the feature maps C2..C5.

He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385, Table 1, in the form in
which Lin et al. use them (arXiv 1612.03144, section 3): the output of each stage's last residual
block, without the classifier.
"""

import difflib
from functools import partial

import keras
from keras import ops

# Residual blocks in C2, C3, C4 and C5 for each depth. From 50 on the blocks are bottlenecks.
STAGE_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
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

    def call(self, inputs):
        scale = self.gamma * ops.rsqrt(self.moving_variance + self.epsilon)
        shift = self.beta - self.moving_mean * scale
        return inputs * ops.cast(scale, inputs.dtype) + ops.cast(shift, inputs.dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "epsilon": self.epsilon}


@keras.saving.register_keras_serializable("keras_fpn")
class ResNet(keras.Model):
    """Residual network that gives the last feature map of each of its stages.

    Takes normalized images `[batch, height, width, 3]` of any size and returns
    `{"C2", "C3", "C4", "C5"}`, where `C{n}` is `[batch, ceil(height / 2**n), ceil(width / 2**n),
    channels]` with 64, 128, 256, 512 channels for depths 18 and 34 and four times as many for the
    others.

    Layers are named `stem_conv`, `stem_norm` and, for stage s = 2..5, block b = 0.. and convolution
    i = 1.., `stage{s}_block{b}_conv{i}`, `stage{s}_block{b}_norm{i}`,
    `stage{s}_block{b}_shortcut_conv` and `stage{s}_block{b}_shortcut_norm`.

    Args:
        depth: 18, 34, 50, 101 or 152.
        stride_in_1x1: whether a bottleneck block strides in its first 1x1 convolution, as the
            original network and Detectron2 have it, or in the 3x3 (v1.5, as torchvision has it).
            Defaults to False. Depths 18 and 34 have no bottleneck blocks and admit only False.
        normalization: "frozen_batch_norm", "batch_norm", "sync_batch_norm" (batch statistics over
            all replicas, TensorFlow only) or "group_norm" (32 groups). Defaults to "batch_norm".
        norm_epsilon: float, added to the variance in every normalization. Defaults to 1e-5.
        frozen_stages: int, how many of stem, C2, C3, C4 and C5 are fixed in training, counted from
            the image: 0 is none, 2 is stem and C2, 5 is all. A batch norm that is fixed uses its
            moving statistics. Defaults to 0.
        image_shape: shape of one image, `(height, width, 3)`. Defaults to `(None, None, 3)`.
        name: name of the model. Defaults to "resnet{depth}".
        trainable: whether anything of the network is trained. Defaults to True.
        dtype: precision policy or its name. Defaults to the global policy.

    Raises:
        ValueError: if `depth`, `normalization`, `frozen_stages` or `image_shape` is not one of
            those named above.
    """

    def __init__(
        self,
        depth: int,
        stride_in_1x1: bool = False,
        normalization: str = "batch_norm",
        norm_epsilon: float = 1e-5,
        frozen_stages: int = 0,
        image_shape: tuple[int | None, int | None, int] = (None, None, 3),
        name: str | None = None,
        trainable: bool = True,
        dtype: str | keras.DTypePolicy | None = None,
    ):
        if depth not in STAGE_BLOCKS:
            raise ValueError(f"depth must be one of {list(STAGE_BLOCKS)}, not {depth!r}.")
        bottleneck = depth >= 50
        if stride_in_1x1 and not bottleneck:
            raise ValueError(
                "stride_in_1x1=True needs the bottleneck blocks of depth 50, 101 or 152, not depth "
                f"{depth}."
            )
        if normalization not in NORMALIZATIONS:
            nearest = difflib.get_close_matches(str(normalization), NORMALIZATIONS, n=1)
            raise ValueError(
                f"normalization must be one of {list(NORMALIZATIONS)}, not {normalization!r}"
                + (f"; did you mean {nearest[0]!r}?" if nearest else ".")
            )
        if not isinstance(frozen_stages, int) or not 0 <= frozen_stages <= 5:
            raise ValueError(
                "frozen_stages must be an int from 0 (none) to 5 (stem, C2, C3, C4 and C5), not "
                f"{frozen_stages!r}."
            )
        image_shape = tuple(image_shape)
        if len(image_shape) != 3 or image_shape[-1] != 3:
            raise ValueError(f"image_shape must be (height, width, 3), not {image_shape}.")
        dtype = keras.dtype_policies.get(dtype)

        # === Layers ===
        convolve = partial(_convolve, dtype=dtype)
        normalize = partial(_normalize, kind=normalization, epsilon=norm_epsilon, dtype=dtype)

        # === Functional Model ===
        images = keras.Input(image_shape)
        x = convolve(images, 64, 7, strides=2, name="stem_conv")
        x = normalize(x, name="stem_norm")
        x = keras.layers.ReLU(name="stem_relu", dtype=dtype)(x)
        # Nothing is below zero after the ReLU, so that padding with zeros changes no maximum.
        x = _pad(x, 1, name="stem_pool_pad", dtype=dtype)
        x = keras.layers.MaxPooling2D(
            3, strides=2, data_format="channels_last", name="stem_pool", dtype=dtype
        )(x)
        feature_maps = {}
        for stage, blocks in enumerate(STAGE_BLOCKS[depth], start=2):
            filters = 64 * 2 ** (stage - 2)
            for block in range(blocks):
                strides = 2 if block == 0 and stage > 2 else 1
                if bottleneck:
                    strides_1x1, strides_3x3 = (strides, 1) if stride_in_1x1 else (1, strides)
                    convolutions = (
                        (filters, 1, strides_1x1),
                        (filters, 3, strides_3x3),
                        (4 * filters, 1, 1),
                    )
                else:
                    convolutions = ((filters, 3, strides), (filters, 3, 1))
                x = _residual_block(
                    x, convolutions, convolve, normalize, f"stage{stage}_block{block}", dtype
                )
            feature_maps[f"C{stage}"] = x
        super().__init__(inputs=images, outputs=feature_maps, name=name or f"resnet{depth}")

        # === Config ===
        self.depth = depth
        self.stride_in_1x1 = stride_in_1x1
        self.normalization = normalization
        self.norm_epsilon = norm_epsilon
        self.frozen_stages = frozen_stages
        self.image_shape = image_shape
        self.dtype_policy = dtype
        frozen = ("stem_", "stage2_", "stage3_", "stage4_", "stage5_")[:frozen_stages]
        for layer in self.layers:
            if layer.name.startswith(frozen):
                layer.trainable = False
        if not trainable:
            self.trainable = False

    def get_config(self):
        return {
            "depth": self.depth,
            "stride_in_1x1": self.stride_in_1x1,
            "normalization": self.normalization,
            "norm_epsilon": self.norm_epsilon,
            "frozen_stages": self.frozen_stages,
            "image_shape": self.image_shape,
            "name": self.name,
            "trainable": self.trainable,
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
        }

    @classmethod
    def from_config(cls, config):
        return cls(**config)


def _residual_block(x, convolutions, convolve, normalize, name, dtype):
    """`relu(F(x) + shortcut(x))`, F's convolutions given as (filters, kernel size, strides)."""
    block_filters = convolutions[-1][0]
    block_strides = max(strides for _, _, strides in convolutions)
    shortcut = x
    if block_strides > 1 or x.shape[-1] != block_filters:
        shortcut = convolve(x, block_filters, 1, block_strides, name=f"{name}_shortcut_conv")
        shortcut = normalize(shortcut, name=f"{name}_shortcut_norm")
    for i, (filters, kernel_size, strides) in enumerate(convolutions, start=1):
        x = convolve(x, filters, kernel_size, strides, name=f"{name}_conv{i}")
        x = normalize(x, name=f"{name}_norm{i}")
        if i < len(convolutions):
            x = keras.layers.ReLU(name=f"{name}_relu{i}", dtype=dtype)(x)
    x = keras.layers.Add(name=f"{name}_add", dtype=dtype)([x, shortcut])
    return keras.layers.ReLU(name=f"{name}_relu", dtype=dtype)(x)


def _convolve(x, filters, kernel_size, strides, *, name, dtype):
    # "same" would pad a strided convolution at the far side only; the reference pads both alike.
    if kernel_size > 1 and strides > 1:
        x = _pad(x, kernel_size // 2, name=f"{name}_pad", dtype=dtype)
        padding = "valid"
    else:
        padding = "same"
    return keras.layers.Conv2D(
        filters,
        kernel_size,
        strides=strides,
        padding=padding,
        data_format="channels_last",
        use_bias=False,
        kernel_initializer=keras.initializers.VarianceScaling(2.0, "fan_out", "untruncated_normal"),
        name=name,
        dtype=dtype,
    )(x)


def _pad(x, padding, *, name, dtype):
    layer = keras.layers.ZeroPadding2D(padding, data_format="channels_last", name=name, dtype=dtype)
    return layer(x)


def _normalize(x, *, kind, epsilon, name, dtype):
    if kind == "frozen_batch_norm":
        layer = FrozenBatchNormalization(epsilon, name=name, dtype=dtype)
    elif kind == "group_norm":
        layer = keras.layers.GroupNormalization(
            32, axis=-1, epsilon=epsilon, name=name, dtype=dtype
        )
    else:
        layer = keras.layers.BatchNormalization(
            axis=-1,
            momentum=0.9,
            epsilon=epsilon,
            synchronized=kind == "sync_batch_norm",
            name=name,
            dtype=dtype,
        )
    return layer(x)
