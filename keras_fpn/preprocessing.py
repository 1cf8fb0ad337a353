"""From pixels to what the backbone reads: the first stage of the model."""

from collections.abc import Sequence

import keras
from keras import ops


@keras.saving.register_keras_serializable("keras_fpn")
class ImageNormalizer(keras.layers.Layer):
    """Normalises RGB pixels and pads the batch to a multiple of `size_divisor`.

    Everything outside an image's own area becomes 0 after normalising, wherever the caller's
    padding came from, so that an image gives the same features alone and in a padded batch.

    Args:
        mean: of R, G and B, in 0..255.
        std: of R, G and B, in 0..255.
        size_divisor: height and width are padded, at the bottom and the right, to a multiple.
        channel_order: "rgb", or "bgr" for a backbone that reads blue first. Given images, `mean`
            and `std` are R, G, B either way.

    Raises:
        ValueError: if `channel_order` is neither.
    """

    def __init__(
        self,
        mean: Sequence[float] = (123.675, 116.28, 103.53),
        std: Sequence[float] = (58.395, 57.12, 57.375),
        size_divisor: int = 32,
        channel_order: str = "rgb",
        **kwargs,
    ):
        # The pixels are handled in float32; the backbone casts them to its own compute dtype.
        kwargs.setdefault("dtype", "float32")
        super().__init__(**kwargs)
        if channel_order not in ("rgb", "bgr"):
            raise ValueError(f"`channel_order` is 'rgb' or 'bgr'; received {channel_order!r}.")
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.size_divisor = size_divisor
        self.channel_order = channel_order

    def call(self, images, image_sizes):
        """Normalised images.

        Args:
            images: `[B, H, W, 3]` RGB pixels in 0..255.
            image_sizes: `[B, 2]` height and width of each image inside the batch.

        Returns:
            `[B, H', W', 3]` float32 in `channel_order`, with H' and W' multiples of `size_divisor`.
        """
        images = ops.cast(images, "float32")
        x = (images - ops.convert_to_tensor(self.mean, "float32")) / ops.convert_to_tensor(
            self.std, "float32"
        )
        if self.channel_order == "bgr":
            x = ops.flip(x, axis=-1)
        shape = ops.shape(images)
        sizes = ops.cast(image_sizes, "int32")
        rows = ops.arange(shape[1], dtype="int32")[None, :] < sizes[:, 0:1]
        columns = ops.arange(shape[2], dtype="int32")[None, :] < sizes[:, 1:2]
        inside = ops.logical_and(ops.expand_dims(rows, 2), ops.expand_dims(columns, 1))
        x = ops.where(ops.expand_dims(inside, 3), x, 0.0)
        # Not `-size % divisor`: tf2onnx makes another number of a negative one.
        bottom, right = (
            self.size_divisor - 1 - (size - 1) % self.size_divisor for size in shape[1:3]
        )
        x = ops.pad(x, [[0, 0], [0, bottom], [0, right], [0, 0]])
        # LiteRT wants to know the number of channels.
        return ops.reshape(x, (shape[0], shape[1] + bottom, shape[2] + right, 3))

    def compute_output_shape(self, images_shape, image_sizes_shape):
        def padded(size):
            return None if size is None else size + -size % self.size_divisor

        batch, height, width, channels = images_shape
        return (batch, padded(height), padded(width), channels)

    def get_config(self):
        config = super().get_config()
        config.update(
            mean=self.mean,
            std=self.std,
            size_divisor=self.size_divisor,
            channel_order=self.channel_order,
        )
        return config
