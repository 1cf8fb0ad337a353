"""The box head of the C4 baseline: a ResNet's last stage on every region (FPN, Table 2 (a))."""

import keras
from keras import ops

from keras_fpn.box_head import RegionHead
from keras_fpn.normalization import NORMALIZATIONS
from keras_fpn.resnet import check_blocks, normalized_convolutions, residual_stage
from keras_fpn.validation import check_choice, check_int, check_non_negative


@keras.saving.register_keras_serializable("keras_fpn")
class Conv5Head(RegionHead):
    """The residual blocks of C5, global average pooling, then class scores and box deltas.

    It is the head of He et al. (arXiv 1512.03385, appendix A) that FPN compares its own with
    (section 4.2): a nine-layer network per region at depths 50 and 101. Regions are 14x14 pixels of
    C4; the first block strides, as in the whole network, to 7x7.

    Its layers have the names of `ResNet`'s: `stage5_block0_conv1` and so on. It goes with a
    `ResNet` of `last_stage=4` with the same arguments.

    Args:
        num_classes: number of classes, without the background.
        depth: 10, 18, 34, 50, 101 or 152, as in `ResNet`. Defaults to 50.
        stride_in_1x1: as in `ResNet`. Defaults to False.
        groups: as in `ResNet`. Defaults to 1.
        width_per_group: as in `ResNet`. Defaults to 64.
        width: as in `ResNet`. Defaults to 64.
        normalization: as in `ResNet`. Defaults to "batch_norm".
        norm_epsilon: epsilon of the normalization layers. Defaults to 1e-5.

    Attributes:
        conv5: once built, the model of the residual blocks.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        num_classes: int,
        depth: int = 50,
        stride_in_1x1: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        width: int = 64,
        normalization: str | None = "batch_norm",
        norm_epsilon: float = 1e-5,
        **kwargs,
    ):
        super().__init__(num_classes, **kwargs)
        self.depth = depth
        self.stride_in_1x1 = stride_in_1x1
        self.groups, self.width_per_group = check_blocks(
            depth, stride_in_1x1, groups, width_per_group
        )
        self.width = check_int("width", width)
        if normalization is not None:
            check_choice("normalization", normalization, NORMALIZATIONS)
        self.normalization = normalization
        self.norm_epsilon = check_non_negative("norm_epsilon", norm_epsilon)

    def build(self, input_shape):
        channels = input_shape[-1]
        regions = keras.Input((None, None, channels), dtype=self.compute_dtype, name="regions")
        features = residual_stage(
            regions,
            5,
            depth=self.depth,
            stride_in_1x1=self.stride_in_1x1,
            groups=self.groups,
            width_per_group=self.width_per_group,
            width=self.width,
            normalization=self.normalization,
            norm_epsilon=self.norm_epsilon,
            dtype=self.dtype_policy,
        )
        self.conv5 = keras.Model(regions, features, name="conv5")
        self.build_predictors(features.shape[-1])
        if not self.trainable:
            # Set before the layers existed; apply it to them.
            self.trainable = False

    def class_independent_layers(self) -> list[keras.layers.Layer]:
        """Returns all layers whose shapes do not depend on the number of classes."""
        return [layer for layer in self.conv5.layers if layer.weights]

    # A method: Keras would save the contents of a property a second time.
    def normalized_convolutions(self) -> list[tuple]:
        """Returns each convolution with the normalization layer after it, None without one."""
        return normalized_convolutions(self.conv5)

    def call(self, pooled, training: bool | None = None) -> tuple:
        """Returns class scores and deltas.

        Args:
            pooled: `[B, R, 14, 14, C]`.
            training: as in Keras's normalization layers.

        Returns:
            `(class_logits, deltas)`: `[B, R, num_classes + 1]`, the background last, and
            `[B, R, num_classes, 4]`, (dx, dy, dw, dh) from the region for each class.
        """
        x = ops.reshape(pooled, (-1, *pooled.shape[2:]))
        x = ops.mean(self.conv5(x, training=training), axis=(1, 2))
        return self.predict_regions(ops.reshape(x, (-1, pooled.shape[1], x.shape[-1])))
