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

    The last three arguments are the ablations of Tables 1 and 2, (d), (e) and (f).

    Args:
        channels: of every level. Defaults to 256, d in the paper.
        normalization: normalization layer after each convolution, which then has no bias: one of
            `keras_fpn.normalization.NORMALIZATIONS`. Defaults to None, as in the paper.
        norm_epsilon: epsilon of those layers. Defaults to 1e-5.
        top_down: whether the level above is upsampled and added. False is (d), the bottom-up
            pyramid: each P is the 3x3 convolution of its own lateral. Defaults to True.
        lateral: whether every C has a lateral connection. False is (e), the top-down pyramid
            without them: only the coarsest C has the 1x1 convolution, and each P is computed from
            the upsampled level above alone. Defaults to True.
        finest_only: whether only the finest level is returned, to the RPN and to the regions, all
            anchors being assigned to it: (f). Defaults to False.

    Attributes:
        rpn_levels: names of the levels that the RPN predicts on, finest first; known once built.
        roi_levels: names of the levels that regions are pooled from, finest first; known once
            built. The level above the backbone's coarsest is for the RPN only.
        laterals: once built, C to its 1x1 convolution.
        outputs: once built, C to the 3x3 convolution that gives its P.

    Raises:
        ValueError: if `channels` is not an integer of at least 1, `normalization` is unknown, or
            `top_down` is False together with `lateral=False` or `finest_only=True`.
    """

    def __init__(
        self,
        channels: int = 256,
        normalization: str | None = None,
        norm_epsilon: float = 1e-5,
        top_down: bool = True,
        lateral: bool = True,
        finest_only: bool = False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if normalization is not None:
            check_choice("normalization", normalization, NORMALIZATIONS)
        self.channels = check_int("channels", channels)
        self.normalization = normalization
        self.norm_epsilon = check_non_negative("norm_epsilon", norm_epsilon)
        if not top_down and (finest_only or not lateral):
            raise ValueError(
                "`top_down` must be True with `lateral=False` or `finest_only=True`; received "
                f"top_down={top_down}, lateral={lateral}, finest_only={finest_only}."
            )
        self.top_down = top_down
        self.lateral = lateral
        self.finest_only = finest_only
        self.laterals, self.outputs = {}, {}
        self.lateral_norms, self.output_norms = {}, {}

    def build(self, input_shapes):
        levels = sorted(input_shapes)
        names = tuple(f"P{level[1:]}" for level in levels)
        self.roi_levels = names[:1] if self.finest_only else names
        self.rpn_levels = names[:1] if self.finest_only else (*names, _next_level(names[-1]))
        for level, name in zip(levels, names, strict=True):
            shape = input_shapes[level]
            between = (*shape[:-1], self.channels)
            if self.lateral or level == levels[-1]:
                if shape[-1] is None:
                    raise ValueError(
                        f"The channels of {level} must be known; received shape {shape}."
                    )
                self.laterals[level] = self._convolution(1, f"lateral_{level}", shape)
            if name in self.roi_levels:
                self.outputs[level] = self._convolution(3, f"output_{level}", between)
            if self.normalization is not None:
                for kind, layers, norms in (
                    ("lateral", self.laterals, self.lateral_norms),
                    ("output", self.outputs, self.output_norms),
                ):
                    if level in layers:
                        norms[level] = normalization_layer(
                            self.normalization,
                            self.norm_epsilon,
                            name=f"{kind}_norm_{level}",
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
            above the coarsest; the finest alone if `finest_only`.
        """
        pyramid = {}
        above = None
        for level in sorted(features, reverse=True):
            if level in self.laterals:
                x = self.laterals[level](features[level])
                if self.normalization is not None:
                    x = self.lateral_norms[level](x, training=training)
                if self.top_down and above is not None:
                    x = x + _upsample(above, x)
            else:
                x = _upsample(above, features[level])
            above = x
            if level in self.outputs:
                x = self.outputs[level](x)
                if self.normalization is not None:
                    x = self.output_norms[level](x, training=training)
                pyramid[f"P{level[1:]}"] = x
        if not self.finest_only:
            *_, coarsest, subsampled = self.rpn_levels
            pyramid[subsampled] = pyramid[coarsest][:, ::2, ::2, :]
        return {level: pyramid[level] for level in self.rpn_levels}

    def compute_output_shape(self, input_shapes) -> dict:
        shapes = {
            f"P{level[1:]}": (*shape[:-1], self.channels)
            for level, shape in sorted(input_shapes.items())
        }
        finest, coarsest = min(shapes), max(shapes)
        if self.finest_only:
            return {finest: shapes[finest]}
        batch, height, width, channels = shapes[coarsest]
        halved = [None if size is None else (size + 1) // 2 for size in (height, width)]
        shapes[_next_level(coarsest)] = (batch, *halved, channels)
        return shapes


def _next_level(level):
    return f"P{int(level[1:]) + 1}"


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
