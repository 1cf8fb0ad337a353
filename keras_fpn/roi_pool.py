"""Quantized max pooling of regions from the pyramid: RoI pooling (Fast R-CNN, section 2.1)."""

from collections.abc import Mapping

import keras
from keras import ops

from keras_fpn.region_pooling import RegionPooling
from keras_fpn.typing import Tensor

# Regions are pooled a chunk at a time, which bounds the memory of a step to so many numbers.
CHUNK_NUMBERS = 2**22


@keras.saving.register_keras_serializable("keras_fpn")
class PyramidRoIPool(RegionPooling):
    """Max-pools every region from its own level into a grid of `output_size` x `output_size` bins.

    It is what the papers use; `PyramidRoIAlign` came later and is more exact. A region's corners
    are rounded to pixels of its level, halves away from zero, and both corners belong to it: it is
    `max(x2 - x1 + 1, 1)` pixels wide. Bin i of n covers the pixels from `floor(i * width / n)` to
    before `ceil((i + 1) * width / n)`, so that neighbors may overlap, and is 0 if they all lie
    outside the map. The gradient goes to the pixel of the maximum, the first in reading order.

    It equals Caffe's layer and torchvision's `roi_pool`, except that the edges of bins are computed
    in integers: in float32, `7 * (57 / 7)` rounds up past 57, and the last bin grows by a pixel.

    Args:
        output_size: bins along each side. Defaults to 7, as in the paper.
        canonical_level: level of a region of `canonical_size`, k0 of Eqn. 1. Defaults to 4.
        canonical_size: side in pixels. Defaults to 224.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        output_size: int = 7,
        canonical_level: int = 4,
        canonical_size: float = 224.0,
        **kwargs,
    ):
        super().__init__(output_size, canonical_level, canonical_size, **kwargs)

    def call(self, features: Mapping, boxes) -> Tensor:
        """Returns the pooled features.

        Args:
            features: `{"P2": [B, H/4, W/4, C], ...}`: consecutive levels, level k with stride 2^k.
            boxes: `[B, R, 4]` xyxy pixels of the image.

        Returns:
            `[B, R, output_size, output_size, C]`.
        """
        table, boxes, first_pixel, map_size = self.place_regions(features, boxes)
        batch, pixels, channels = ops.shape(table)[0], ops.shape(table)[1], table.shape[-1]
        regions, bins = boxes.shape[1], self.output_size

        # Along rows and columns, [B, R, 2, bins]: the pixels of a bin are from `start` to `end`.
        corners = _round_to_int(boxes)
        first = ops.stack([corners[..., 1], corners[..., 0]], axis=-1)[..., None]
        last = ops.stack([corners[..., 3], corners[..., 2]], axis=-1)[..., None]
        side = ops.maximum(last - first + 1, 1)
        index = ops.arange(bins, dtype="int32")
        limit = map_size[..., None]
        start = ops.clip(first + index * side // bins, 0, limit)
        end = ops.clip(first + ((index + 1) * side + bins - 1) // bins, 0, limit)

        first_pixel = first_pixel + ops.arange(batch, dtype="int32")[:, None] * pixels
        pooled = _pool(
            ops.reshape(table, (-1, channels)),
            ops.reshape(first_pixel, (-1,)),
            ops.reshape(map_size[..., 1], (-1,)),
            ops.reshape(start, (-1, 2, bins)),
            ops.reshape(end, (-1, 2, bins)),
            min(regions, max(1, CHUNK_NUMBERS // (bins * bins * channels))),
        )
        return ops.reshape(pooled, (-1, regions, bins, bins, channels))


def _round_to_int(x):
    """Rounds as C does, halves away from zero, and not to the even neighbor."""
    size = ops.abs(x)
    whole = ops.floor(size)
    whole = ops.where(size - whole >= 0.5, whole + 1.0, whole)
    return ops.cast(ops.sign(x) * whole, "int32")


def _pool(table, first_pixel, width, start, end, at_a_time):
    """Pools M regions.

    Args:
        table: `[N, C]`, the pixels of all maps.
        first_pixel: `[M]` int32, row of `table` at which the map of a region begins.
        width: `[M]` int32, width of that map.
        start: `[M, 2, bins]` int32, first row and first column of each bin.
        end: `[M, 2, bins]` int32, row and column after the last.
        at_a_time: number of regions in a chunk.

    Returns:
        `[M, bins * bins, C]`. The gradient is with respect to `table` only.
    """
    count, channels, bins = ops.shape(start)[0], table.shape[-1], start.shape[-1]
    nowhere = ops.shape(table)[0]  # In place of a pixel, for empty bins.
    # Inside the map, bins of a region differ by a pixel at most. All are visited in the window of
    # the largest, and regions of like windows share a chunk.
    window = ops.max(end - start, axis=-1)
    visits = window[:, 0] * window[:, 1]
    order = ops.cast(ops.argsort(visits), "int32")

    # The number of visits depends on the regions, and a loop of unknown length has no gradient.
    @ops.custom_gradient
    def pool(table):
        def pool_chunk(number, pooled, winners):
            # After the last region, that one is pooled again.
            region = ops.minimum(number + ops.arange(at_a_time, dtype="int32"), count - 1)
            region = ops.take(order, region)
            of_region = (ops.take(x, region, axis=0) for x in (first_pixel, width, start, end))
            origin, row_length, first, after = of_region
            columns = ops.maximum(ops.take(window[:, 1], region), 1)

            def visit(offset, best, winner):
                row = first[:, 0] + (offset // columns)[:, None]
                column = first[:, 1] + (offset % columns)[:, None]
                inside = (row < after[:, 0])[:, :, None] & (column < after[:, 1])[:, None, :]
                pixel = origin[:, None] + row * row_length[:, None]
                pixel = pixel[:, :, None] + column[:, None, :]
                inside, pixel = (ops.reshape(x, (at_a_time, -1, 1)) for x in (inside, pixel))
                pixel = ops.where(inside, pixel, 0)
                x = ops.take(table, pixel[..., 0], axis=0)
                better = inside & (x > best)
                return offset + 1, ops.where(better, x, best), ops.where(better, pixel, winner)

            most = ops.max(ops.take(visits, region))
            shape = (at_a_time, bins * bins, channels)
            _, best, winner = ops.while_loop(
                lambda offset, *_: offset < most,
                visit,
                (
                    ops.zeros((), "int32"),
                    ops.full(shape, -float("inf"), table.dtype),
                    ops.full(shape, nowhere, "int32"),
                ),
            )
            best = ops.where(winner < nowhere, best, 0)
            return (
                number + at_a_time,
                ops.scatter_update(pooled, region[:, None], best),
                ops.scatter_update(winners, region[:, None], winner),
            )

        shape = (count, bins * bins, channels)
        _, pooled, winners = ops.while_loop(
            lambda number, *_: number < count,
            pool_chunk,
            (ops.zeros((), "int32"), ops.zeros(shape, table.dtype), ops.zeros(shape, "int32")),
        )

        def gradient(*args, upstream=None):
            if upstream is None:
                (upstream,) = args
            index = winners * channels + ops.arange(channels, dtype="int32")
            total = ops.scatter_update(
                ops.zeros(((nowhere + 1) * channels,), "float32"),
                ops.reshape(index, (-1, 1)),
                ops.cast(ops.reshape(upstream, (-1,)), "float32"),
                reduction="add",
            )
            return ops.cast(ops.reshape(total, (-1, channels))[:-1], table.dtype)

        return pooled, gradient

    return pool(table)
