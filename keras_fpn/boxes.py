"""Geometry of boxes: overlap, clipping, the regression deltas of Faster R-CNN, formats.

Inside the library a box is float32 ``(x1, y1, x2, y2)`` in absolute pixels of the image that the
network sees, origin at the top left corner, x to the right, y down.
"""

import math
from collections.abc import Sequence

import keras
from keras import ops

from keras_fpn.typing import Tensor
from keras_fpn.validation import check_positive, check_sequence

BOX_FORMATS = tuple(
    prefix + layout
    for prefix in ("", "rel_")
    for layout in ("xyxy", "yxyx", "xywh", "center_xywh", "center_yxhw")
)

# Clamp on predicted dw, dh before exp(): a box is at most 1000 / 16 times as large as its anchor.
MAX_LOG_SCALE = math.log(1000.0 / 16)


def check_box_format(bounding_box_format: str) -> str:
    """Returns `bounding_box_format` if it is one of `BOX_FORMATS`.

    Raises:
        ValueError: for any other value.
    """
    if bounding_box_format not in BOX_FORMATS:
        raise ValueError(
            f"`bounding_box_format` must be one of {', '.join(BOX_FORMATS)}; "
            f"received {bounding_box_format!r}."
        )
    return bounding_box_format


def check_delta_weights(delta_weights: Sequence[float]) -> tuple[float, ...]:
    """Returns the weights of (dx, dy, dw, dh) as a tuple.

    Raises:
        ValueError: if they are not four numbers above 0.
    """
    weights = check_sequence("delta_weights", delta_weights, length=4)
    for weight in weights:
        check_positive("delta_weights", weight)
    return weights


def box_area(boxes) -> Tensor:
    """Area of boxes `[..., 4]` as `[...]`, in square pixels."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def larger_than(boxes, min_size: float) -> Tensor:
    """Whether both sides of boxes `[..., 4]` are at least `min_size` pixels, as `[...]` bool."""
    width = boxes[..., 2] - boxes[..., 0]
    height = boxes[..., 3] - boxes[..., 1]
    return ops.logical_and(width >= min_size, height >= min_size)


def pairwise_iou(boxes_a, boxes_b) -> Tensor:
    """Intersection over union of every pair.

    Args:
        boxes_a: `[..., N, 4]`.
        boxes_b: `[..., M, 4]`, same leading dimensions or ones that broadcast.

    Returns:
        `[..., N, M]` in 0..1; 0 where both boxes are empty.
    """
    a = ops.expand_dims(boxes_a, -2)
    b = ops.expand_dims(boxes_b, -3)
    width = ops.minimum(a[..., 2], b[..., 2]) - ops.maximum(a[..., 0], b[..., 0])
    height = ops.minimum(a[..., 3], b[..., 3]) - ops.maximum(a[..., 1], b[..., 1])
    intersection = ops.maximum(width, 0.0) * ops.maximum(height, 0.0)
    union = box_area(a) + box_area(b) - intersection
    return ops.where(union > 0, intersection / ops.where(union > 0, union, 1.0), 0.0)


def clip_boxes(boxes, image_sizes) -> Tensor:
    """Clips boxes to their image.

    Args:
        boxes: `[B, ..., 4]` in pixels.
        image_sizes: `[B, 2]` height and width of each image, without padding.

    Returns:
        Boxes of the same shape, within `0..width` and `0..height`.
    """
    sizes = ops.cast(image_sizes, "float32")
    limits = ops.stack([sizes[:, 1], sizes[:, 0], sizes[:, 1], sizes[:, 0]], axis=-1)
    limits = ops.reshape(limits, [-1] + [1] * (len(boxes.shape) - 2) + [4])
    return ops.minimum(ops.maximum(boxes, 0.0), limits)


def encode_deltas(boxes, anchors, weights=(1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Encodes boxes as deltas from anchors (R-CNN, appendix C; Faster R-CNN, Eq. 2).

    Args:
        boxes: `[..., 4]` target boxes.
        anchors: `[..., 4]` anchors or proposals.
        weights: factors of (dx, dy, dw, dh).

    Returns:
        `[..., 4]` deltas (dx, dy, dw, dh), finite for empty boxes too.
    """
    anchor_centers, anchor_sizes = _center_size(anchors)
    centers, sizes = _center_size(boxes)
    # An empty box is never the target of a positive, but must not produce NaN in masked rows.
    anchor_sizes = ops.maximum(anchor_sizes, 1e-6)
    sizes = ops.maximum(sizes, 1e-6)
    shifts = (centers - anchor_centers) / anchor_sizes
    scales = ops.log(sizes / anchor_sizes)
    return ops.concatenate([shifts, scales], axis=-1) * ops.convert_to_tensor(weights, "float32")


def decode_deltas(
    deltas, anchors, weights=(1.0, 1.0, 1.0, 1.0), max_log_scale: float = MAX_LOG_SCALE
) -> Tensor:
    """Decodes deltas into boxes: the inverse of `encode_deltas`.

    Args:
        deltas: `[..., 4]` (dx, dy, dw, dh).
        anchors: `[..., 4]`, same leading dimensions or ones that broadcast.
        weights: factors that the deltas were encoded with.
        max_log_scale: clamp on dw, dh.

    Returns:
        `[..., 4]` boxes.
    """
    deltas = deltas / ops.convert_to_tensor(weights, "float32")
    anchor_centers, anchor_sizes = _center_size(anchors)
    centers = deltas[..., :2] * anchor_sizes + anchor_centers
    half = 0.5 * ops.exp(ops.minimum(deltas[..., 2:], max_log_scale)) * anchor_sizes
    return ops.concatenate([centers - half, centers + half], axis=-1)


def convert_boxes(boxes, source: str, target: str, image_sizes) -> Tensor:
    """Converts boxes from one format to another.

    Args:
        boxes: `[B, N, 4]`.
        source: format of `boxes`, one of `BOX_FORMATS`.
        target: format to convert to, one of `BOX_FORMATS`.
        image_sizes: `[B, 2]`, height and width of each image, which `rel_` formats are relative
            to.

    Returns:
        `[B, N, 4]` float32.
    """
    boxes = ops.cast(boxes, "float32")
    if source == target:
        return boxes
    sizes = ops.expand_dims(ops.cast(image_sizes, "float32"), 1)

    def scale(layout):
        y_first = layout.endswith("yxyx") or layout.endswith("yxhw")
        first, second = (0, 1) if y_first else (1, 0)
        return ops.stack([sizes[..., first], sizes[..., second]] * 2, axis=-1)

    if source.startswith("rel_"):
        boxes = boxes * scale(source)
    boxes = keras.utils.bounding_boxes.convert_format(
        boxes, source=source.removeprefix("rel_"), target=target.removeprefix("rel_")
    )
    if target.startswith("rel_"):
        boxes = boxes / scale(target)
    return boxes


def _center_size(boxes):
    sizes = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * sizes, sizes
