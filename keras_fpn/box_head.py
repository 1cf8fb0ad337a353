"""The second stage: class and box of every region (FPN, section 4.2)."""

import keras
from keras import ops


@keras.saving.register_keras_serializable("keras_fpn")
class BoxHead(keras.layers.Layer):
    """Two hidden fully connected layers with ReLU, then class scores and class-specific boxes.

    Args:
        num_classes: without the background.
        hidden_dim: of both hidden layers.
    """

    def __init__(self, num_classes: int, hidden_dim: int = 1024, **kwargs):
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.hidden_dim = hidden_dim

    def build(self, input_shape):
        *_, height, width, channels = input_shape
        xavier = keras.initializers.VarianceScaling(1.0, "fan_in", "uniform")
        self.hidden1 = self._dense(self.hidden_dim, "relu", xavier, "hidden1")
        self.hidden2 = self._dense(self.hidden_dim, "relu", xavier, "hidden2")
        self.class_logits = self._dense(
            self.num_classes + 1, None, keras.initializers.RandomNormal(stddev=0.01), "class_logits"
        )
        self.deltas = self._dense(
            4 * self.num_classes, None, keras.initializers.RandomNormal(stddev=0.001), "deltas"
        )
        self.hidden1.build((None, None, height * width * channels))
        for layer in (self.hidden2, self.class_logits, self.deltas):
            layer.build((None, None, self.hidden_dim))

    def _dense(self, units, activation, initializer, name):
        return keras.layers.Dense(
            units,
            activation=activation,
            kernel_initializer=initializer,
            dtype=self.dtype_policy,
            name=name,
        )

    def call(self, pooled) -> tuple:
        """Class scores and deltas.

        Args:
            pooled: `[B, R, 7, 7, C]`.

        Returns:
            `(class_logits, deltas)`: `[B, R, num_classes + 1]`, the background last, and
            `[B, R, num_classes, 4]` (dx, dy, dw, dh) of the region for each class.
        """
        _, regions, height, width, channels = pooled.shape
        x = ops.reshape(pooled, (-1, regions, height * width * channels))
        x = self.hidden2(self.hidden1(x))
        deltas = ops.reshape(self.deltas(x), (-1, regions, self.num_classes, 4))
        return self.class_logits(x), deltas

    def compute_output_shape(self, input_shape) -> tuple:
        batch, regions = input_shape[:2]
        return (batch, regions, self.num_classes + 1), (batch, regions, self.num_classes, 4)

    def get_config(self):
        config = super().get_config()
        config.update(num_classes=self.num_classes, hidden_dim=self.hidden_dim)
        return config
