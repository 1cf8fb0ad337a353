"""The head of the region proposal network, shared by all pyramid levels (FPN, section 4.1)."""

from collections.abc import Mapping

import keras

from keras_fpn.stage import Stage
from keras_fpn.validation import MAX_LAYERS, check_int


@keras.saving.register_keras_serializable("keras_fpn")
class RPNHead(Stage):
    """A 3x3 convolution with ReLU and two 1x1 siblings: objectness and box deltas.

    Args:
        anchors_per_location: anchors at each location of a feature map.
        channels: of the 3x3 convolutions. Defaults to None, those of the feature maps.
        hidden_layers: number of 3x3 convolutions. Defaults to 1, as in the paper.

    Raises:
        ValueError: if a number is not an integer of at least 1, or `hidden_layers` is over 1000.
    """

    def __init__(
        self,
        anchors_per_location: int,
        channels: int | None = None,
        hidden_layers: int = 1,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.anchors_per_location = check_int("anchors_per_location", anchors_per_location)
        self.channels = None if channels is None else check_int("channels", channels)
        self.hidden_layers = check_int("hidden_layers", hidden_layers, maximum=MAX_LAYERS)

    def build(self, input_shapes):
        shape = next(iter(input_shapes.values()))
        channels = self.channels or shape[-1]
        self.hidden = [
            self._convolution(channels, 3, "relu", f"hidden{i}")
            for i in range(1, self.hidden_layers + 1)
        ]
        self.objectness = self._convolution(self.anchors_per_location, 1, None, "objectness")
        self.deltas = self._convolution(4 * self.anchors_per_location, 1, None, "deltas")
        for layer in self.hidden:
            layer.build(shape)
            shape = (*shape[:-1], channels)
        for sibling in (self.objectness, self.deltas):
            sibling.build(shape)
        if not self.trainable:
            # Set before the layers existed; apply it to them.
            self.trainable = False

    def _convolution(self, filters, kernel_size, activation, name):
        return keras.layers.Conv2D(
            filters,
            kernel_size,
            padding="same",
            activation=activation,
            data_format="channels_last",
            kernel_initializer=keras.initializers.RandomNormal(stddev=0.01),
            dtype=self.dtype_policy,
            name=name,
        )

    def call(self, features: Mapping) -> tuple[dict, dict]:
        """Returns predictions for every anchor.

        Args:
            features: level name to `[B, h, w, C]`.

        Returns:
            `(objectness, deltas)`: level name to `[B, h, w, A]` logits and to `[B, h, w, 4 * A]`
            (dx, dy, dw, dh), anchor by anchor.
        """
        objectness, deltas = {}, {}
        for level, feature in features.items():
            for layer in self.hidden:
                feature = layer(feature)
            objectness[level] = self.objectness(feature)
            deltas[level] = self.deltas(feature)
        return objectness, deltas

    def compute_output_shape(self, input_shapes) -> tuple[dict, dict]:
        anchors = self.anchors_per_location
        return (
            {level: (*shape[:-1], anchors) for level, shape in input_shapes.items()},
            {level: (*shape[:-1], 4 * anchors) for level, shape in input_shapes.items()},
        )
