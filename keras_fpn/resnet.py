"""Bottom-up pathway: residual networks with the feature maps C2..C5.

He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385, Table 1, in the form in
which Lin et al. use them (arXiv 1612.03144, section 3): the output of each stage's last residual
block, without the classifier.
"""

from collections.abc import Sequence
from functools import partial

import keras
from keras import ops

from keras_fpn.normalization import NORMALIZATIONS, normalization_layer
from keras_fpn.typing import Tensor
from keras_fpn.validation import check_choice, check_image_shape, check_int, check_non_negative

# Residual blocks in C2, C3, C4 and C5 for each depth. From 50 on the blocks are bottlenecks.
STAGE_BLOCKS = {
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


@keras.saving.register_keras_serializable("keras_fpn")
class GroupedConv2D(keras.layers.Conv2D):
    """Grouped convolution.

    On TensorFlow it is one convolution per group: Keras compiles grouped ones with XLA, which not
    every server supports, and TensorFlow without oneDNN lacks their gradient on the CPU.
    """

    def convolution_op(self, inputs, kernel) -> Tensor:
        convolve = super().convolution_op
        if keras.backend.backend() != "tensorflow":
            return convolve(inputs, kernel)
        groups = zip(
            ops.split(inputs, self.groups, axis=-1),
            ops.split(kernel, self.groups, axis=-1),
            strict=True,
        )
        return ops.concatenate([convolve(x, w) for x, w in groups], axis=-1)


@keras.saving.register_keras_serializable("keras_fpn")
class ResNet(keras.Model):
    """Residual network that returns the last feature map of each of its stages.

    Takes normalized images `[batch, height, width, 3]` of any size and returns
    `{"C2", "C3", "C4", "C5"}`, where `C{n}` is `[batch, ceil(height / 2**n), ceil(width / 2**n),
    channels]` with 64, 128, 256, 512 channels for depths up to 34 and four times as many for the
    others; at another `width` than 64, in proportion.

    Layers are named `stem_conv`, `stem_norm` and, for stage s = 2..5, block b = 0.. and convolution
    i = 1.., `stage{s}_block{b}_conv{i}`, `stage{s}_block{b}_norm{i}`,
    `stage{s}_block{b}_shortcut_conv` and `stage{s}_block{b}_shortcut_norm`.

    With `last_stage=4` the network ends with C4, and `keras_fpn.conv5_head.Conv5Head` has the
    layers of stage 5, under the same names.

    Args:
        depth: 10, 18, 34, 50, 101 or 152.
        stride_in_1x1: whether bottleneck blocks stride in their first 1x1 convolution, as in the
            original network and Detectron2, rather than in the 3x3 (v1.5, as in torchvision).
            Defaults to False, the only choice for depths 18 and 34, without bottleneck blocks.
        groups: groups of the 3x3 convolutions in bottleneck blocks: 1, the default, for ResNet,
            more for ResNeXt (Xie et al., arXiv 1611.05431). Depths 18 and 34 have only 1.
        width_per_group: channels of a group in C2's 3x3 convolutions; each further stage has twice
            as many. Defaults to 64; ResNeXt-101 32x8d has 32 groups of 8.
        width: channels of the stem, and of C2 at depths up to 34; those of all layers are in
            proportion. Defaults to 64, that of the published networks.
        normalization: "frozen_batch_norm", "batch_norm", "sync_batch_norm" (batch statistics over
            all replicas, TensorFlow only), "group_norm" (32 groups), or None: convolutions with a
            bias, which batch norms can be folded into for inference. Defaults to "batch_norm".
        norm_epsilon: epsilon of the normalization layers. Defaults to 1e-5.
        frozen_stages: number of stages that are not trained, from the image on: 2 are the stem and
            C2, `last_stage` are all. Frozen batch norms use their moving statistics. Defaults to 0.
        image_shape: shape of one image, `(height, width, 3)`. Defaults to `(None, None, 3)`.
        last_stage: 2, 3, 4 or 5: the number of the coarsest feature map, after which the network
            ends. Defaults to 5.
        name: name of the model. Defaults to "resnet{depth}", and with groups to
            "resnext{depth}_{groups}x{width_per_group}d".
        trainable: whether any weight is trained. Defaults to True.
        dtype: precision policy or its name. Defaults to the global policy.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        depth: int,
        stride_in_1x1: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        width: int = 64,
        normalization: str | None = "batch_norm",
        norm_epsilon: float = 1e-5,
        frozen_stages: int = 0,
        image_shape: Sequence[int | None] = (None, None, 3),
        last_stage: int = 5,
        name: str | None = None,
        trainable: bool = True,
        dtype: str | keras.DTypePolicy | None = None,
    ):
        groups, width_per_group = check_blocks(depth, stride_in_1x1, groups, width_per_group)
        width = check_int("width", width)
        norm_epsilon = check_non_negative("norm_epsilon", norm_epsilon)
        if normalization is not None:
            check_choice("normalization", normalization, NORMALIZATIONS)
        last_stage = check_int("last_stage", last_stage, minimum=2)
        if last_stage > 5:
            raise ValueError(f"`last_stage` must be at most 5; received {last_stage}.")
        frozen_stages = check_int("frozen_stages", frozen_stages, minimum=0)
        if frozen_stages > last_stage:
            raise ValueError(
                f"`frozen_stages` must be at most {last_stage} (stem and C2 to C{last_stage}); "
                f"received {frozen_stages}."
            )
        image_shape = check_image_shape(image_shape)
        dtype = keras.dtype_policies.get(dtype)

        # === Layers ===
        convolve, normalize = _layers(normalization, norm_epsilon, dtype)

        # === Functional Model ===
        images = keras.Input(image_shape)
        x = convolve(images, width, 7, strides=2, name="stem_conv")
        x = normalize(x, name="stem_norm")
        x = keras.layers.ReLU(name="stem_relu", dtype=dtype)(x)
        # Values are >= 0 after the ReLU, so that padding with zeros changes no maximum.
        x = _pad(x, 1, name="stem_pool_pad", dtype=dtype)
        x = keras.layers.MaxPooling2D(
            3, strides=2, data_format="channels_last", name="stem_pool", dtype=dtype
        )(x)
        feature_maps = {}
        for stage in range(2, last_stage + 1):
            x = residual_stage(
                x,
                stage,
                depth=depth,
                stride_in_1x1=stride_in_1x1,
                groups=groups,
                width_per_group=width_per_group,
                width=width,
                normalization=normalization,
                norm_epsilon=norm_epsilon,
                dtype=dtype,
            )
            feature_maps[f"C{stage}"] = x
        if name is None:
            name = f"resnet{depth}"
            if groups > 1:
                name = f"resnext{depth}_{groups}x{width_per_group}d"
        super().__init__(inputs=images, outputs=feature_maps, name=name)

        # === Config ===
        self.depth = depth
        self.stride_in_1x1 = stride_in_1x1
        self.groups = groups
        self.width_per_group = width_per_group
        self.width = width
        self.normalization = normalization
        self.norm_epsilon = norm_epsilon
        self.frozen_stages = frozen_stages
        self.image_shape = image_shape
        self.last_stage = last_stage
        self.dtype_policy = dtype
        frozen = ("stem_", "stage2_", "stage3_", "stage4_", "stage5_")[:frozen_stages]
        for layer in self.layers:
            if layer.name.startswith(frozen):
                layer.trainable = False
        if not trainable:
            self.trainable = False

    def stage(self, level: str) -> keras.Model:
        """Returns the layers of one stage, for maps of any size; weights are shared.

        Args:
            level: "C2" to that of `last_stage`: the map that the stage computes, from the image
                for C2, else from the map before.

        Raises:
            ValueError: if there is no such level.
        """
        check_choice("level", level, self.output)
        inputs = self.output.get(f"C{int(level[1:]) - 1}", self.input)
        stage = keras.Model(inputs, self.output[level], name=f"{self.name}_{level}")
        stage.input_spec = None  # Accepts other sizes than those that follow from `image_shape`.
        return stage

    # A method: Keras would save the contents of a property a second time.
    def normalized_convolutions(self) -> list[tuple]:
        """Returns each convolution with the normalization layer after it, None without one."""
        return normalized_convolutions(self)

    def get_config(self) -> dict:
        return {
            "depth": self.depth,
            "stride_in_1x1": self.stride_in_1x1,
            "groups": self.groups,
            "width_per_group": self.width_per_group,
            "width": self.width,
            "normalization": self.normalization,
            "norm_epsilon": self.norm_epsilon,
            "frozen_stages": self.frozen_stages,
            "image_shape": self.image_shape,
            "last_stage": self.last_stage,
            "name": self.name,
            "trainable": self.trainable,
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
        }

    @classmethod
    def from_config(cls, config) -> "ResNet":
        return cls(**config)


def check_blocks(
    depth: int, stride_in_1x1: bool, groups: int, width_per_group: int
) -> tuple[int, int]:
    """Checks the arguments of `ResNet` that say how its residual blocks are made.

    Returns:
        `(groups, width_per_group)`, as integers.

    Raises:
        ValueError: if one is out of range, or does not fit the depth.
    """
    if depth not in STAGE_BLOCKS:
        raise ValueError(f"`depth` must be one of {list(STAGE_BLOCKS)}; received {depth!r}.")
    bottleneck = depth >= 50
    if stride_in_1x1 and not bottleneck:
        raise ValueError(
            f"`stride_in_1x1` must be False at depth {depth}, which has no bottleneck blocks; "
            f"received {stride_in_1x1!r}."
        )
    groups = check_int("groups", groups)
    width_per_group = check_int("width_per_group", width_per_group)
    if (groups, width_per_group) != (1, 64) and not bottleneck:
        raise ValueError(
            f"`groups` and `width_per_group` must be 1 and 64 at depth {depth}, which has no "
            f"bottleneck blocks; received {groups} and {width_per_group}."
        )
    return groups, width_per_group


def residual_stage(
    x,
    stage: int,
    *,
    depth: int,
    stride_in_1x1: bool,
    groups: int,
    width_per_group: int,
    width: int,
    normalization: str | None,
    norm_epsilon: float,
    dtype: keras.DTypePolicy,
) -> Tensor:
    """Returns the output of the residual blocks of a stage; its layers are new.

    Args:
        x: Keras tensor, the output of the stage before.
        stage: 2, 3, 4 or 5. From 3 on the first block halves the size.
        depth: as in `ResNet`, and so are all others.
        stride_in_1x1: see `ResNet`.
        groups: see `ResNet`.
        width_per_group: see `ResNet`.
        width: see `ResNet`.
        normalization: see `ResNet`.
        norm_epsilon: see `ResNet`.
        dtype: precision policy.
    """
    convolve, normalize = _layers(normalization, norm_epsilon, dtype)
    filters = width * 2 ** (stage - 2)
    for block in range(STAGE_BLOCKS[depth][stage - 2]):
        strides = 2 if block == 0 and stage > 2 else 1
        if depth >= 50:
            grouped = filters * width_per_group // 64 * groups
            strides_1x1, strides_3x3 = (strides, 1) if stride_in_1x1 else (1, strides)
            convolutions = [
                (grouped, 1, strides_1x1, 1),
                (grouped, 3, strides_3x3, groups),
                (4 * filters, 1, 1, 1),
            ]
        else:
            convolutions = [(filters, 3, strides, 1), (filters, 3, 1, 1)]
        name = f"stage{stage}_block{block}"
        x = _residual_block(x, convolutions, convolve, normalize, name, dtype)
    return x


def normalized_convolutions(network: keras.Model) -> list[tuple]:
    """Returns each convolution with the normalization layer after it, None without one."""
    layers = {layer.name: layer for layer in network.layers}
    return [
        (layer, layers.get(name.replace("conv", "norm")))
        for name, layer in layers.items()
        if isinstance(layer, keras.layers.Conv2D)
    ]


def _layers(normalization, norm_epsilon, dtype):
    """Returns the functions that add a convolution and a normalization layer."""
    return (
        partial(_convolve, use_bias=normalization is None, dtype=dtype),
        partial(_normalize, kind=normalization, epsilon=norm_epsilon, dtype=dtype),
    )


def _residual_block(x, convolutions, convolve, normalize, name, dtype):
    """Returns `relu(F(x) + shortcut(x))`; F's convolutions are (filters, size, strides, groups)."""
    block_filters = convolutions[-1][0]
    block_strides = max(strides for _, _, strides, _ in convolutions)
    shortcut = x
    if block_strides > 1 or x.shape[-1] != block_filters:
        shortcut = convolve(x, block_filters, 1, block_strides, name=f"{name}_shortcut_conv")
        shortcut = normalize(shortcut, name=f"{name}_shortcut_norm")
    for i, (filters, kernel_size, strides, groups) in enumerate(convolutions, start=1):
        x = convolve(x, filters, kernel_size, strides, groups, name=f"{name}_conv{i}")
        x = normalize(x, name=f"{name}_norm{i}")
        if i < len(convolutions):
            x = keras.layers.ReLU(name=f"{name}_relu{i}", dtype=dtype)(x)
    x = keras.layers.Add(name=f"{name}_add", dtype=dtype)([x, shortcut])
    return keras.layers.ReLU(name=f"{name}_relu", dtype=dtype)(x)


def _convolve(x, filters, kernel_size, strides, groups=1, *, use_bias, name, dtype):
    # "same" would pad strided convolutions at the far side only; the reference pads both sides.
    if kernel_size > 1 and strides > 1:
        x = _pad(x, kernel_size // 2, name=f"{name}_pad", dtype=dtype)
        padding = "valid"
    else:
        padding = "same"
    layer = GroupedConv2D if groups > 1 else keras.layers.Conv2D
    return layer(
        filters,
        kernel_size,
        strides=strides,
        padding=padding,
        data_format="channels_last",
        groups=groups,
        use_bias=use_bias,
        kernel_initializer=keras.initializers.VarianceScaling(2.0, "fan_out", "untruncated_normal"),
        name=name,
        dtype=dtype,
    )(x)


def _pad(x, padding, *, name, dtype):
    layer = keras.layers.ZeroPadding2D(padding, data_format="channels_last", name=name, dtype=dtype)
    return layer(x)


def _normalize(x, *, kind, epsilon, name, dtype):
    if kind is None:
        return x
    return normalization_layer(kind, epsilon, name=name, dtype=dtype)(x)
