"""Which pyramid level a region is pooled from (FPN, Eqn. 1)."""

from keras import ops

from keras_fpn.boxes import box_area
from keras_fpn.typing import Tensor


def assign_levels(
    boxes, min_level: int, max_level: int, canonical_level: int, canonical_size: float
) -> Tensor:
    """Returns k = floor(k0 + log2(sqrt(w * h) / 224)), clamped to the levels of the pyramid.

    Args:
        boxes: `[..., 4]` xyxy pixels.
        min_level: the finest level.
        max_level: the coarsest level.
        canonical_level: k0, the level of a region of `canonical_size`.
        canonical_size: side in pixels; 224 in the paper, that of ImageNet pre-training.

    Returns:
        `[...]` int32 levels. Empty boxes get the finest level.
    """
    size = ops.sqrt(ops.maximum(box_area(boxes), 1e-6))
    # The 1e-6 keeps exact powers of two on their level where log2 rounds down.
    level = ops.floor(canonical_level + ops.log2(size / canonical_size) + 1e-6)
    return ops.cast(ops.clip(level, min_level, max_level), "int32")
