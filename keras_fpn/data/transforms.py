"""One geometric transform for everything in a record: image, boxes, proposals and masks."""

from typing import NamedTuple

import tensorflow as tf

from keras_fpn.data.image_files import resize_image


class GeometricTransform(NamedTuple):
    """A crop, then a horizontal flip, then a resize.

    Attributes:
        size: int32 `[2]`, height and width of the original image.
        target_size: int32 `[2]`, height and width of the result.
        flip: bool scalar, whether to mirror left and right.
        crop: int32 `[4]`, the region to keep as xyxy pixels of the original image. Defaults to
            None, the whole image.
    """

    size: tf.Tensor
    target_size: tf.Tensor
    flip: tf.Tensor
    crop: tf.Tensor | None = None

    def image(self, image: tf.Tensor, dtype: tf.DType = tf.float32) -> tf.Tensor:
        """Transforms the pixels of the image.

        Args:
            image: uint8 `[h, w, 3]`.
            dtype: dtype of the result; values are rounded if it is an integer type.

        Returns:
            `[*target_size, 3]` of `dtype`, interpolated bilinearly.
        """
        image = self._crop_and_flip(image)
        if dtype.is_integer:
            # Adds 0.5, so that the cast below rounds: `tf.cast(image, tf.float32) + 0.5` in one op,
            # and on fewer pixels than after resizing.
            image = tf.bitcast(image, tf.quint8)
            image = tf.quantization.dequantize(image, min_range=0.5, max_range=255.5)
        return tf.cast(resize_image(image, self.target_size), dtype)

    def boxes(self, boxes: tf.Tensor) -> tf.Tensor:
        """Transforms boxes.

        Args:
            boxes: `[n, 4]` floats, xyxy as fractions of the original image's width and height.

        Returns:
            `[n, 4]` of the dtype of `boxes`, xyxy in pixels of the result, clipped to it.
        """
        if self.crop is not None:
            origin, extent = self.crop[:2], self.crop[2:] - self.crop[:2]
            pixels = boxes * _twice(self.size[::-1], boxes.dtype)
            boxes = (pixels - _twice(origin, boxes.dtype)) / _twice(extent, boxes.dtype)
        boxes = tf.clip_by_value(boxes, 0.0, 1.0)
        mirrored = tf.gather(boxes, [2, 1, 0, 3], axis=1) * [-1.0, 1.0, -1.0, 1.0]
        mirrored += [1.0, 0.0, 1.0, 0.0]
        boxes = tf.where(self.flip, mirrored, boxes)
        return boxes * _twice(self.target_size[::-1], boxes.dtype)

    def proposals(self, proposals: tf.Tensor, frame: tf.Tensor) -> tf.Tensor:
        """Transforms proposals.

        Args:
            proposals: float32 `[n, 4]`, xyxy in pixels of the original image resized to `frame`.
            frame: int32 `[2]`, height and width, `[0, 0]` for those of the original image.

        Returns:
            float32 `[n, 4]`, xyxy in pixels of the result, clipped to it. Without a crop or flip,
            and with `frame` equal to `target_size`, the coordinates are the same to the bit.
        """
        frame = tf.where(tf.reduce_any(frame > 0), frame, self.size)
        # In float32, dividing by the frame and multiplying by the target would round twice.
        fractions = tf.cast(proposals, tf.float64) / _twice(frame[::-1], tf.float64)
        return tf.cast(self.boxes(fractions), tf.float32)

    def masks(self, masks: tf.Tensor) -> tf.Tensor:
        """Transforms masks.

        Args:
            masks: uint8 `[n, h, w]`, of the size of the original image.

        Returns:
            uint8 `[n, *target_size]`, the nearest pixels of `masks`.
        """
        masks = self._crop_and_flip(masks[..., None])
        return tf.image.resize(masks, self.target_size, method="nearest")[..., 0]

    def _crop_and_flip(self, pixels: tf.Tensor) -> tf.Tensor:
        """Crops and flips `[..., h, w, channels]`."""
        if self.crop is not None:
            x1, y1, x2, y2 = tf.unstack(self.crop)
            pixels = pixels[..., y1:y2, x1:x2, :]
        # Before resizing, where there are fewer pixels. The result is the same, since half-pixel
        # centers are symmetric.
        return tf.cond(self.flip, lambda: tf.reverse(pixels, [-2]), lambda: pixels)


def _twice(xy: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Returns `[x, y]` as `[x, y, x, y]` of `dtype`."""
    return tf.cast(tf.tile(xy, [2]), dtype)
