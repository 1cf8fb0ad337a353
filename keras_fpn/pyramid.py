"""The feature pyramid: lateral connections and the top-down pathway (FPN, section 3, Fig. 3)."""

from collections.abc import Mapping

import keras
from keras import ops

from keras_fpn.normalization import NORMALIZATIONS, normalization_layer
from keras_fpn.stage import Stage
from keras_fpn.validation import check_choice, check_int, check_non_negative


@keras.saving.register_keras_serializable("keras_fpn")
class FeaturePyramid(Stage):
    """Turns the bottom-up maps C2..C5 into the pyramid P2..P5, and P6 for the RPN.

    Every C goes through a 1x1 lateral convolution; from the coarsest level down, the level above
    is upsampled to the lateral's own size (nearest neighbor) and added; a 3x3 convolution of each
    sum gives P. There is no non-linearity. P6 is P5 subsampled with stride 2 (section 4.1).

    Args:
        channels: of every level. Defaults to 256, d in the paper.
        normalization: normalization layer after each convolution, which then has no bias: one of
            `keras_fpn.normalization.NORMALIZATIONS`. Defaults to None, as in the paper.
        norm_epsilon: epsilon of those layers. Defaults to 1e-5.

    Attributes:
        rpn_levels: names of the levels that the RPN predicts on, finest first; known once built.
        roi_levels: names of the levels that regions are pooled from, finest first; known once
            built. The level above the backbone's coarsest is for the RPN only.

    Raises:
        ValueError: if `channels` is not an integer of at least 1, or `normalization` is unknown.
    """

    def __init__(
        self,
        channels: int = 256,
        normalization: str | None = None,
        norm_epsilon: float = 1e-5,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if normalization is not None:
            check_choice("normalization", normalization, NORMALIZATIONS)
        self.channels = check_int("channels", channels)
        self.normalization = normalization
        self.norm_epsilon = check_non_negative("norm_epsilon", norm_epsilon)

    def build(self, input_shapes):
        self.roi_levels = tuple(f"P{level[1:]}" for level in sorted(input_shapes))
        self.rpn_levels = (*self.roi_levels, f"P{int(self.roi_levels[-1][1:]) + 1}")
        self.laterals, self.outputs = {}, {}
        self.lateral_norms, self.output_norms = {}, {}
        for level, shape in sorted(input_shapes.items()):
            if shape[-1] is None:
                raise ValueError(f"The channels of {level} must be known; received shape {shape}.")
            between = (*shape[:-1], self.channels)
            self.laterals[level] = self._convolution(1, f"lateral_{level}", shape)
            self.outputs[level] = self._convolution(3, f"output_{level}", between)
            if self.normalization is not None:
                for name, norms in (("lateral", self.lateral_norms), ("output", self.output_norms)):
                    norms[level] = normalization_layer(
                        self.normalization,
                        self.norm_epsilon,
                        name=f"{name}_norm_{level}",
                        dtype=self.dtype_policy,
                    )
                    norms[level].build(between)
        if not self.trainable:
            # Set before the layers existed; apply it to them.
            self.trainable = False

    def _convolution(self, kernel_size, name, input_shape):
        layer = keras.layers.Conv2D(
            self.channels,
            kernel_size,
            padding="same",
            use_bias=self.normalization is None,
            data_format="channels_last",
            kernel_initializer=keras.initializers.VarianceScaling(1.0, "fan_in", "uniform"),
            dtype=self.dtype_policy,
            name=name,
        )
        layer.build(input_shape)
        return layer

    # A method: Keras would save the contents of a property a second time.
    def normalized_convolutions(self) -> list[tuple]:
        """Returns each convolution with the normalization layer after it, None without one."""
        return [
            (layers[level], norms.get(level))
            for layers, norms in (
                (self.laterals, self.lateral_norms),
                (self.outputs, self.output_norms),
            )
            for level in layers
        ]

    def call(self, features: Mapping, training: bool | None = None) -> dict:
        """Returns the pyramid.

        Args:
            features: `{"C2": [B, H/4, W/4, C], ..., "C5": ...}`: any run of consecutive levels.
            training: as in Keras's normalization layers.

        Returns:
            `{"P2": [B, H/4, W/4, channels], ...}`, finest first: a level for every C, and the one
            above the coarsest.
        """
        levels = sorted(features, reverse=True)
        pyramid = {}
        top_down = None
        for level in levels:
            lateral = self.laterals[level](features[level])
            if self.normalization is not None:
                lateral = self.lateral_norms[level](lateral, training=training)
            top_down = lateral if top_down is None else lateral + _upsample(top_down, lateral)
            output = self.outputs[level](top_down)
            if self.normalization is not None:
                output = self.output_norms[level](output, training=training)
            pyramid[f"P{level[1:]}"] = output
        *_, coarsest, subsampled = self.rpn_levels
        pyramid[subsampled] = pyramid[coarsest][:, ::2, ::2, :]
        return {level: pyramid[level] for level in self.rpn_levels}

    def compute_output_shape(self, input_shapes) -> dict:
        shapes = {
            f"P{level[1:]}": (*shape[:-1], self.channels)
            for level, shape in sorted(input_shapes.items())
        }
        coarsest = list(shapes)[-1]
        batch, height, width, channels = shapes[coarsest]
        halved = [None if size is None else (size + 1) // 2 for size in (height, width)]
        shapes[f"P{int(coarsest[1:]) + 1}"] = (batch, *halved, channels)
        return shapes


def _upsample(x, like):
    """Nearest-neighbor upsampling of `x` to the height and width of `like`."""
    for axis in (1, 2):
        size, wanted = x.shape[axis], like.shape[axis]
        if size is not None and wanted is not None and wanted in (2 * size, 2 * size - 1):
            x = ops.repeat(x, 2, axis=axis)
            x = x[:, :wanted] if axis == 1 else x[:, :, :wanted]
        else:
            size, wanted = ops.shape(x)[axis], ops.shape(like)[axis]
            x = ops.take(x, ops.arange(wanted, dtype="int32") * size // wanted, axis=axis)
    return x
