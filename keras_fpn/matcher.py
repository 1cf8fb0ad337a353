"""Matching of anchors and proposals with the ground truth."""

from keras import ops

from keras_fpn.boxes import box_area, pairwise_iou
from keras_fpn.typing import Tensor


def match(
    candidates,
    boxes,
    is_object,
    positive_iou: float,
    negative_iou: float,
    keep_best_of_each_object: bool,
) -> tuple:
    """Matches candidates with the ground truth by overlap (Faster R-CNN, section 3.1.2).

    Args:
        candidates: `[1 or B, N, 4]` xyxy pixels.
        boxes: `[B, G, 4]` ground truth, padded.
        is_object: `[B, G]` bool, which rows of `boxes` are real.
        positive_iou: candidates of at least this IoU are positive.
        negative_iou: candidates below this IoU are negative; between the two they are neither.
        keep_best_of_each_object: whether the candidates of largest IoU with an object (all of them
            if tied) are positive whatever that IoU is.

    Returns:
        `(matched, is_positive, is_negative)`, each `[B, N]`: index of the object of largest IoU
        (int32, 0 where there is none), and two masks.
    """
    iou = ops.where(is_object[:, None, :], pairwise_iou(candidates, boxes), 0.0)
    best = ops.max(iou, axis=-1)
    matched = ops.cast(ops.argmax(iou, axis=-1), "int32")
    is_positive = best >= positive_iou
    if keep_best_of_each_object:
        best_of_object = ops.max(iou, axis=1, keepdims=True)
        is_best = ops.logical_and(iou >= best_of_object, best_of_object > 0)
        is_positive = ops.logical_or(is_positive, ops.any(is_best, axis=-1))
    is_negative = ops.logical_and(best < negative_iou, ops.logical_not(is_positive))
    return matched, is_positive, is_negative


def real_objects(boxes, labels) -> Tensor:
    """Returns which rows of a padded ground truth have a label, finite edges and an area.

    Args:
        boxes: `[B, G, 4]` xyxy pixels.
        labels: `[B, G]`, -1 in padding rows.

    Returns:
        `[B, G]` bool.
    """
    extent = boxes[..., 2:] - boxes[..., :2]
    # isfinite of the area too: two finite edges can still overflow.
    has_area = ops.logical_and(ops.all(extent > 0, axis=-1), ops.isfinite(box_area(boxes)))
    return ops.logical_and(labels >= 0, has_area)
