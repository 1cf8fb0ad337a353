"""Preprocessing: normalizes pixels and pads the batch."""

from collections.abc import Sequence

import keras
from keras import ops

from keras_fpn.stage import Float32Stage
from keras_fpn.typing import Tensor
from keras_fpn.validation import check_choice, check_int, check_positive, check_sequence


@keras.saving.register_keras_serializable("keras_fpn")
class ImageNormalizer(Float32Stage):
    """Normalizes RGB pixels and pads the batch to a multiple of `size_divisor`.

    Everything outside an image's own area is 0 after normalization, whatever the caller padded
    with, so that an image has the same features alone and in a padded batch.

    Args:
        mean: mean of R, G and B in 0..255. Defaults to ImageNet's. A backbone that rescales pixels
            itself takes (0, 0, 0).
        std: standard deviation of R, G and B. Defaults to ImageNet's. A backbone that rescales
            pixels itself takes (1, 1, 1).
        size_divisor: height and width are padded, at the bottom and the right, to a multiple of
            this. Defaults to 32.
        channel_order: "rgb" (the default), or "bgr" for a backbone that reads blue first. The
            images passed in, `mean` and `std` are in the order R, G, B either way.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        mean: Sequence[float] = (123.675, 116.28, 103.53),
        std: Sequence[float] = (58.395, 57.12, 57.375),
        size_divisor: int = 32,
        channel_order: str = "rgb",
        **kwargs,
    ):
        # Pixels are normalized in float32; the backbone casts them to its own compute dtype.
        super().__init__(**kwargs)
        self.mean = check_sequence("mean", mean, length=3)
        self.std = check_sequence("std", std, length=3)
        for deviation in self.std:
            check_positive("std", deviation)
        self.size_divisor = check_int("size_divisor", size_divisor)
        self.channel_order = check_choice("channel_order", channel_order, ("rgb", "bgr"))

    def call(self, images, image_sizes) -> Tensor:
        """Returns the normalized batch.

        Args:
            images: `[B, H, W, 3]` RGB pixels in 0..255.
            image_sizes: `[B, 2]`, height and width of each image inside the batch.

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
        # Not `-size % divisor`: tf2onnx computes another remainder of a negative number.
        bottom, right = (
            self.size_divisor - 1 - (size - 1) % self.size_divisor for size in shape[1:3]
        )
        x = ops.pad(x, [[0, 0], [0, bottom], [0, right], [0, 0]])
        # LiteRT needs a static number of channels.
        return ops.reshape(x, (shape[0], shape[1] + bottom, shape[2] + right, 3))

    def compute_output_shape(self, images_shape, image_sizes_shape) -> tuple:
        def padded(size):
            return None if size is None else size + -size % self.size_divisor

        batch, height, width, channels = images_shape
        return (batch, padded(height), padded(width), channels)
