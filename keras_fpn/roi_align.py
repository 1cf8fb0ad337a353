"""Crop-and-resize pooling of regions from the pyramid: RoIAlign over all levels in one pass."""

from collections.abc import Mapping

import keras
from keras import ops

from keras_fpn.adaptive_roi_align import pool_adaptively
from keras_fpn.region_pooling import RegionPooling
from keras_fpn.typing import Tensor
from keras_fpn.validation import check_int


@keras.saving.register_keras_serializable("keras_fpn")
class PyramidRoIAlign(RegionPooling):
    """Pools every region from its own level into a grid of `output_size` x `output_size` bins.

    A bin is the mean of `sampling_ratio` x `sampling_ratio` points inside it, each interpolated
    bilinearly from the four pixels around it (RoIAlign). The defaults are torchvision's; Detectron2
    has `aligned=True, sampling_ratio=None`.

    Args:
        output_size: bins along each side. Defaults to 7, as in the paper.
        sampling_ratio: sampling points along each side of a bin. Defaults to 2. None is adaptive:
            `ceil(side of the region on its level / output_size)` along each axis, so that points
            are at most a pixel apart.
        canonical_level: level of a region of `canonical_size`, k0 of Eqn. 1. Defaults to 4.
        canonical_size: side in pixels. Defaults to 224.
        aligned: whether the center of a level's first pixel lies half a pixel inside the image's
            edge, and regions keep their size. If False, the default, it lies on the edge, and a
            region is at least one pixel of its level wide and high.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        output_size: int = 7,
        sampling_ratio: int | None = 2,
        canonical_level: int = 4,
        canonical_size: float = 224.0,
        aligned: bool = False,
        **kwargs,
    ):
        super().__init__(output_size, canonical_level, canonical_size, **kwargs)
        self.sampling_ratio = (
            None if sampling_ratio is None else check_int("sampling_ratio", sampling_ratio)
        )
        self.aligned = aligned

    def call(self, features: Mapping, boxes) -> Tensor:
        """Returns the pooled features.

        Args:
            features: `{"P2": [B, H/4, W/4, C], ...}`: consecutive levels, level k with stride 2^k.
            boxes: `[B, R, 4]` xyxy pixels of the image.

        Returns:
            `[B, R, output_size, output_size, C]`.
        """
        table, boxes, first_pixel, map_size = self.place_regions(features, boxes)
        regions, channels = boxes.shape[1], table.shape[-1]
        if self.aligned:
            boxes = boxes - 0.5
        x1, y1, x2, y2 = ops.split(boxes, 4, -1)
        if self.sampling_ratio is None:
            start, end = ops.concatenate([y1, x1], -1), ops.concatenate([y2, x2], -1)
            sides = self._sides(start, end)
            return pool_adaptively(table, first_pixel, map_size, start, sides, self.output_size)
        points = self.sampling_ratio
        height, width = map_size[..., :1], map_size[..., 1:]
        rows, row_weights = self._taps(y1, y2, height, points)
        columns, column_weights = self._taps(x1, x2, width, points)

        batch, pixels = ops.shape(table)[0], ops.shape(table)[1]
        table = ops.reshape(table, (-1, channels))
        # [B, R, bin row, bin column, tap row, tap column], the taps of a bin side by side.
        first = first_pixel + ops.arange(batch, dtype="int32")[:, None] * pixels
        row_starts = first[..., None, None] + rows * width[..., None]
        row_starts = row_starts[:, :, :, None, :, None]
        index = row_starts + columns[:, :, None, :, None, :]
        weights = row_weights[:, :, :, None, :, None] * column_weights[:, :, None, :, None, :]
        side, taps = self.output_size, (2 * points) ** 2
        pixels_of_bins = ops.take(table, ops.reshape(index, (-1, side, side, taps)), axis=0)
        weights = ops.cast(ops.reshape(weights, (-1, side, side, 1, taps)), table.dtype)
        pooled = ops.matmul(weights, pixels_of_bins)
        return ops.reshape(pooled, (-1, regions, side, side, channels))

    def _taps(self, start, end, limit, points):
        """Returns the pixels and weights that interpolate the points of each bin along one axis.

        Args:
            start: `[B, R, 1]` first edge of the regions, in pixels of their level.
            end: `[B, R, 1]` last edge.
            limit: `[B, R, 1]` int32 pixels of the level along the axis.
            points: points of a bin along the axis.

        Returns:
            `(indices, weights)`, both `[B, R, output_size, 2 * points]`: the two pixels
            around each point. Points more than a pixel outside the map count as 0, others outside
            are moved to its edge.
        """
        total = self.output_size * points
        spacing = self._sides(start, end) / total
        position = start + (ops.arange(total, dtype="float32") + 0.5) * spacing
        last = ops.cast(limit - 1, "float32")
        inside = ops.logical_and(position >= -1.0, position <= last + 1.0)
        position = ops.clip(position, 0.0, last)
        low = ops.floor(position)
        high = ops.minimum(low + 1.0, last)
        share = position - low
        mean = ops.cast(inside, "float32") / points
        indices = ops.cast(ops.stack([low, high], axis=-1), "int32")
        weights = ops.stack([(1.0 - share) * mean, share * mean], axis=-1)
        bins = (*start.shape[1:2], self.output_size, 2 * points)
        return ops.reshape(indices, (-1, *bins)), ops.reshape(weights, (-1, *bins))

    def _sides(self, start, end):
        return end - start if self.aligned else ops.maximum(end - start, 1.0)
