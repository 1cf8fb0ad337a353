"""RoIAlign with an adaptive number of sampling points per bin: Detectron2's `sampling_ratio=0`."""

from keras import ops

from keras_fpn.typing import Tensor

# The window of a region on its level is cut into square tiles of this side in pixels, and a fixed
# number of tiles is pooled at a time, which bounds the memory for regions of any shape.
TILE = 12
TILES_AT_A_TIME = 256


def pool_adaptively(table, first_pixel, map_size, start, size, output_size: int) -> Tensor:
    """Pools regions with `ceil(side / output_size)` sampling points per bin along each axis.

    The points of a bin are equally spaced, at most a pixel apart, and interpolated bilinearly. A
    region therefore covers a window without gaps, and since interpolation and mean are separable,
    `pooled = Wy @ window @ Wx^T`, where the weights are the mean interpolation weights of a row or
    column of pixels over the points of a bin. Points more than a pixel outside the map count as 0,
    others outside as the edge; a region with a side of 0 or less has no points, and pools to 0.

    Args:
        table: `[B, N, C]`, the pixels of all maps of an image, each map row by row.
        first_pixel: `[B, R]` int32, row of `table` at which the map of a region begins.
        map_size: `[B, R, 2]` int32, height and width of that map.
        start: `[B, R, 2]` float32, y and x of the regions' first edges in pixels of their map; 0 is
            the center of the first pixel.
        size: `[B, R, 2]` float32, height and width of the regions, in the same pixels.
        output_size: bins along each side.

    Returns:
        `[B, R, output_size, output_size, C]` in the dtype of `table`. The gradient is with respect
        to `table` only.
    """
    regions, channels = start.shape[1], table.shape[-1]
    at_a_time = min(regions, TILES_AT_A_TIME)
    # The maps of all images are one table, and all their regions one list.
    batch, pixels = ops.shape(table)[0], ops.shape(table)[1]
    first_pixel = first_pixel + ops.arange(batch, dtype="int32")[:, None] * pixels
    geometry = (
        ops.reshape(first_pixel, (-1,)),
        *(ops.reshape(x, (-1, 2)) for x in (map_size, start, size)),
    )

    # The number of tiles depends on the regions, and a loop of unknown length has no gradient.
    @ops.custom_gradient
    def pool(table):
        def add(pooled, region, index, row_weights, column_weights):
            x = ops.matmul(column_weights[:, None], ops.take(table, index, axis=0))
            x = ops.reshape(x, (at_a_time, TILE, output_size * channels))
            x = ops.reshape(ops.matmul(row_weights, x), (at_a_time, -1))
            return ops.scatter_update(
                pooled, region[:, None], ops.cast(x, "float32"), reduction="add"
            )

        def gradient(*args, upstream=None):
            if upstream is None:
                (upstream,) = args
            upstream = ops.cast(upstream, table.dtype)

            def add(gradient, region, index, row_weights, column_weights):
                x = ops.take(upstream, region, axis=0)
                x = ops.reshape(x, (at_a_time, output_size, output_size * channels))
                x = ops.matmul(ops.swapaxes(row_weights, 1, 2), x)
                x = ops.reshape(x, (at_a_time, TILE, output_size, channels))
                x = ops.matmul(ops.swapaxes(column_weights, 1, 2)[:, None], x)
                x = ops.cast(ops.reshape(x, (-1, channels)), "float32")
                index = ops.reshape(index, (-1, 1))
                return ops.scatter_update(gradient, index, x, reduction="add")

            total = ops.zeros((batch * pixels, channels), "float32")
            total = _over_tiles(add, total, geometry, output_size, at_a_time, table.dtype)
            return ops.cast(total, table.dtype)

        pooled = ops.zeros((batch * regions, output_size * output_size * channels), "float32")
        pooled = _over_tiles(add, pooled, geometry, output_size, at_a_time, table.dtype)
        return ops.cast(pooled, table.dtype), gradient

    pooled = pool(ops.reshape(table, (-1, channels)))
    return ops.reshape(pooled, (-1, regions, output_size, output_size, channels))


def _over_tiles(add, total, geometry, output_size, at_a_time, dtype):
    """Accumulates `total = add(total, ...)` over the tiles of all regions, `K = at_a_time` at once.

    `add` receives the regions, `[K]`, the indices of each tile's pixels into the table, `[K, TILE,
    TILE]`, and the weights of rows and of columns, both `[K, output_size, TILE]` in `dtype`.
    """
    first_pixel, map_size, start, size = geometry
    # `ceil(size / output_size)` is one too many if the quotient is rounded up past an integer.
    points = ops.round(size / output_size)
    points = points + ops.cast(size > points * output_size, "float32")
    has_points = ops.all(points > 0, axis=-1, keepdims=True)
    points = ops.maximum(points, 1.0)
    bin_size = size / output_size
    spacing = bin_size / points
    last = ops.cast(map_size - 1, "float32")

    # The window goes from the first point's first pixel to the last point's second.
    last_point = start + (output_size - 1) * bin_size + (points - 0.5) * spacing
    low = ops.floor(ops.clip(start + 0.5 * spacing, 0.0, last))
    high = ops.minimum(ops.floor(ops.clip(last_point, 0.0, last)) + 1.0, last)
    tiles = ops.cast(ops.where(has_points, ops.floor((high - low) / TILE) + 1.0, 0.0), "int32")
    counts = tiles[:, 0] * tiles[:, 1]
    ends = ops.cumsum(counts)
    bins = ops.arange(output_size, dtype="float32")

    def step(number, total):
        tile = number + ops.arange(at_a_time, dtype="int32")
        region = ops.cast(ops.searchsorted(ends, tile, side="right"), "int32")
        # Tiles after the last belong to the last region, with weights of 0.
        region = ops.minimum(region, ops.shape(start)[0] - 1)
        exists = ops.cast(tile < ends[-1], "float32")[:, None, None, None]
        tile = tile - ops.take(ends - counts, region)
        tiles_in_a_row = ops.maximum(ops.take(tiles[:, 1], region), 1)
        corner = ops.stack([tile // tiles_in_a_row, tile % tiles_in_a_row], axis=-1) * TILE

        map_start, map_height_width, *of_region = (
            ops.take(x, region, axis=0)
            for x in (first_pixel, map_size, low, start, bin_size, points, last)
        )
        corner = ops.cast(corner, "float32") + of_region[0]
        pixel = corner[..., None] + ops.arange(TILE, dtype="float32")
        weights = ops.cast(exists * _shares(pixel, of_region[1:], bins), dtype)
        # Pixels outside the map have the weight 0.
        pixel = ops.cast(ops.clip(pixel, 0.0, of_region[-1][..., None]), "int32")
        rows = map_start[:, None] + pixel[:, 0] * map_height_width[:, 1:]
        index = rows[:, :, None] + pixel[:, 1][:, None, :]
        return number + at_a_time, add(total, region, index, weights[:, 0], weights[:, 1])

    initial = (ops.zeros((), "int32"), total)
    return ops.while_loop(lambda number, _: number < ends[-1], step, initial)[1]


def _shares(pixel, of_region, bins):
    """Returns the mean over the points of each bin of `max(0, 1 - |point - pixel|)`.

    Args:
        pixel: `[K, 2, TILE]` rows and columns of a tile.
        of_region: start, bin size, number of points per bin and last pixel of the map of the
            tile's region, each `[K, 2]`.
        bins: `[output_size]`, the indices of the bins.

    Returns:
        `[K, 2, output_size, TILE]`.
    """
    start, bin_size, points, last = (x[..., None, None, None] for x in of_region)
    pixel = pixel[:, :, None, :, None]
    start = start + bins[:, None, None] * bin_size
    spacing = ops.maximum(bin_size / points, 1e-6)
    # Three or more points per bin are over 2/3 pixel apart: at most three lie within a pixel of
    # another; one more on either side covers rounding.
    first = ops.floor((pixel - 1.0 - start) / spacing - 0.5)
    point = ops.clip(first, 0.0, points - 1.0) + ops.arange(5, dtype="float32")
    position = start + (point + 0.5) * spacing
    counts = (point < points) & (position >= -1.0) & (position <= last + 1.0)
    distance = ops.abs(ops.clip(position, 0.0, last) - pixel)
    shares = ops.where(counts, ops.maximum(1.0 - distance, 0.0), 0.0)
    return ops.sum(shares, axis=-1) / points[..., 0]
