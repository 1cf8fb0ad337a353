"""What the pooling stages share: every region on its level, and all levels as one table."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from keras import ops

from keras_fpn.roi_levels import assign_levels
from keras_fpn.stage import Stage
from keras_fpn.validation import check_int, check_non_negative


class PlacedRegions(NamedTuple):
    """Regions on their levels.

    Attributes:
        table: `[B, N, C]` in the compute dtype, the pixels of all levels, each level row by row.
        boxes: `[B, R, 4]` float32 xyxy in pixels of the region's level.
        first_pixel: `[B, R]` int32, row of `table` at which that level begins.
        map_size: `[B, R, 2]` int32, height and width of that level.
    """

    table: Any
    boxes: Any
    first_pixel: Any
    map_size: Any


class RegionPooling(Stage):
    """Base class of the stages that pool every region from its own level (FPN, Eqn. 1).

    Args:
        output_size: bins along each side.
        canonical_level: level of a region of `canonical_size`, k0 of Eqn. 1.
        canonical_size: side in pixels.
    """

    def __init__(self, output_size: int, canonical_level: int, canonical_size: float, **kwargs):
        # Features come in the compute dtype; coordinates must stay float32.
        super().__init__(autocast=False, **kwargs)
        self.output_size = check_int("output_size", output_size)
        self.canonical_level = check_int("canonical_level", canonical_level, minimum=0)
        self.canonical_size = check_non_negative("canonical_size", canonical_size)

    def place_regions(self, features: Mapping, boxes) -> PlacedRegions:
        """Returns regions on their levels; boxes are constants to the gradient (Fast R-CNN, 2.3).

        Args:
            features: `{"P2": [B, H/4, W/4, C], ...}`: consecutive levels, level k with stride 2^k.
            boxes: `[B, R, 4]` xyxy pixels of the image.
        """
        levels = sorted(int(level[1:]) for level in features)
        maps = [ops.cast(features[f"P{level}"], self.compute_dtype) for level in levels]
        boxes = ops.stop_gradient(ops.cast(boxes, "float32"))
        batch, channels = ops.shape(boxes)[0], maps[0].shape[-1]
        table = ops.concatenate([ops.reshape(x, (batch, -1, channels)) for x in maps], axis=1)
        map_sizes = ops.stack([ops.stack([ops.shape(x)[1], ops.shape(x)[2]]) for x in maps])
        pixels = map_sizes[:, 0] * map_sizes[:, 1]
        level = assign_levels(
            boxes, levels[0], levels[-1], self.canonical_level, self.canonical_size
        )
        which = level - levels[0]
        return PlacedRegions(
            table,
            boxes * ops.exp2(-ops.cast(level, "float32"))[..., None],
            ops.take(ops.cumsum(pixels) - pixels, which),
            ops.take(map_sizes, which, axis=0),
        )

    def compute_output_shape(self, features_shape, boxes_shape) -> tuple:
        channels = next(iter(features_shape.values()))[-1]
        return (*boxes_shape[:2], self.output_size, self.output_size, channels)
