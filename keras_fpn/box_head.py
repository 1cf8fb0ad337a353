"""The second stage: class and box of every region (FPN, section 4.2)."""

import keras
from keras import ops

from keras_fpn.normalization import NORMALIZATIONS, normalization_layer
from keras_fpn.stage import Stage
from keras_fpn.validation import MAX_LAYERS, check_choice, check_int, check_non_negative


class RegionHead(Stage):
    """Base class of the heads: class scores and class-specific box deltas of every region.

    A subclass computes one feature vector per region: its `build` ends with `build_predictors`, its
    `call` with `predict_regions`.

    Args:
        num_classes: number of classes, without the background.
    """

    def __init__(self, num_classes: int, **kwargs):
        super().__init__(**kwargs)
        self.num_classes = check_int("num_classes", num_classes)

    def build_predictors(self, size: int) -> None:
        """Builds the two sibling layers on feature vectors of a size (Fast R-CNN, section 2)."""
        self.class_logits = self._dense(
            self.num_classes + 1, None, keras.initializers.RandomNormal(stddev=0.01), "class_logits"
        )
        self.deltas = self._dense(
            4 * self.num_classes, None, keras.initializers.RandomNormal(stddev=0.001), "deltas"
        )
        for layer in (self.class_logits, self.deltas):
            layer.build((None, None, size))

    def _dense(self, units, activation, initializer, name):
        return keras.layers.Dense(
            units,
            activation=activation,
            kernel_initializer=initializer,
            dtype=self.dtype_policy,
            name=name,
        )

    # Methods: Keras would save the contents of properties a second time.
    def class_layers(self) -> list[keras.layers.Layer]:
        """Returns the layers whose shapes depend on the number of classes."""
        return [self.class_logits, self.deltas]

    def class_independent_layers(self) -> list[keras.layers.Layer]:
        """Returns all other layers."""
        raise NotImplementedError

    def predict_regions(self, x) -> tuple:
        """Returns class scores and deltas of feature vectors `[B, R, size]`; see `call`."""
        deltas = ops.reshape(self.deltas(x), (-1, x.shape[1], self.num_classes, 4))
        return self.class_logits(x), deltas

    def compute_output_shape(self, input_shape) -> tuple:
        batch, regions = input_shape[:2]
        return (batch, regions, self.num_classes + 1), (batch, regions, self.num_classes, 4)


@keras.saving.register_keras_serializable("keras_fpn")
class BoxHead(RegionHead):
    """Hidden layers with ReLU, then class scores and class-specific box deltas.

    Args:
        num_classes: number of classes, without the background.
        hidden_dim: units of every fully connected hidden layer. Defaults to 1024.
        hidden_layers: number of fully connected hidden layers. Defaults to 2, as in the paper.
        convolutions: number of 3x3 convolutions before them, with as many channels as the pooled
            features. Defaults to 0, as in the paper.
        normalization: normalization layer after each of those convolutions, which then have no
            bias: one of `keras_fpn.normalization.NORMALIZATIONS`. Defaults to None.
        norm_epsilon: epsilon of those layers. Defaults to 1e-5.

    Raises:
        ValueError: if a number is out of range (there are at most 1000 layers of a kind), or
            `normalization` is unknown.
    """

    def __init__(
        self,
        num_classes: int,
        hidden_dim: int = 1024,
        hidden_layers: int = 2,
        convolutions: int = 0,
        normalization: str | None = None,
        norm_epsilon: float = 1e-5,
        **kwargs,
    ):
        super().__init__(num_classes, **kwargs)
        if normalization is not None:
            check_choice("normalization", normalization, NORMALIZATIONS)
        self.hidden_dim = check_int("hidden_dim", hidden_dim)
        self.hidden_layers = check_int("hidden_layers", hidden_layers, maximum=MAX_LAYERS)
        self.convolutions = check_int("convolutions", convolutions, 0, MAX_LAYERS)
        self.normalization = normalization
        self.norm_epsilon = check_non_negative("norm_epsilon", norm_epsilon)

    def build(self, input_shape):
        *_, height, width, channels = input_shape
        xavier = keras.initializers.VarianceScaling(1.0, "fan_in", "uniform")
        self.convolved = [
            self._convolution(channels, f"convolution{i}") for i in range(1, self.convolutions + 1)
        ]
        self.norms = []
        if self.normalization is not None:
            self.norms = [
                normalization_layer(
                    self.normalization, self.norm_epsilon, name=f"norm{i}", dtype=self.dtype_policy
                )
                for i in range(1, self.convolutions + 1)
            ]
        self.hidden = [
            self._dense(self.hidden_dim, "relu", xavier, f"hidden{i}")
            for i in range(1, self.hidden_layers + 1)
        ]
        for layer in (*self.convolved, *self.norms):
            layer.build((None, height, width, channels))
        size = height * width * channels
        for layer in self.hidden:
            layer.build((None, None, size))
            size = self.hidden_dim
        self.build_predictors(size)
        if not self.trainable:
            # Set before the layers existed; apply it to them.
            self.trainable = False

    def _convolution(self, channels, name):
        return keras.layers.Conv2D(
            channels,
            3,
            padding="same",
            use_bias=self.normalization is None,
            data_format="channels_last",
            kernel_initializer=keras.initializers.VarianceScaling(
                2.0, "fan_out", "untruncated_normal"
            ),
            dtype=self.dtype_policy,
            name=name,
        )

    def class_independent_layers(self) -> list[keras.layers.Layer]:
        """Returns all other layers."""
        return [*self.convolved, *self.norms, *self.hidden]

    # A method: Keras would save the contents of a property a second time.
    def normalized_convolutions(self) -> list[tuple]:
        """Returns each convolution with the normalization layer after it, None without one."""
        return list(zip(self.convolved, self.norms or [None] * len(self.convolved), strict=True))

    def call(self, pooled, training: bool | None = None) -> tuple:
        """Returns class scores and deltas.

        Args:
            pooled: `[B, R, 7, 7, C]`.
            training: as in Keras's normalization layers.

        Returns:
            `(class_logits, deltas)`: `[B, R, num_classes + 1]`, the background last, and
            `[B, R, num_classes, 4]`, (dx, dy, dw, dh) from the region for each class.
        """
        _, regions, height, width, channels = pooled.shape
        x = ops.reshape(pooled, (-1, height, width, channels))
        for i, convolution in enumerate(self.convolved):
            x = convolution(x)
            if self.norms:
                x = self.norms[i](x, training=training)
            x = ops.relu(x)
        x = ops.reshape(x, (-1, regions, height * width * channels))
        for layer in self.hidden:
            x = layer(x)
        return self.predict_regions(x)
