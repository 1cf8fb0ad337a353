"""The featurized image pyramid (FPN, Fig. 1a): detections at several scales, merged."""

from collections.abc import Mapping, Sequence

import numpy as np

from keras_fpn.validation import check_choice, check_fraction, check_int

MERGE_METHODS = ("nms", "vote")
# From this IoU on, a box votes for one that NMS kept.
_VOTE_IOU = 0.5


def merge_scales(
    detections: Sequence[Mapping[str, np.ndarray]],
    *,
    nms_iou_threshold: float,
    max_detections: int,
    method: str = "nms",
) -> dict[str, np.ndarray]:
    """Merges the detections of one image at several scales.

    NMS runs within each class over the detections of all scales, as in Detectron2's test-time
    augmentation; ties go to the scale that comes first. With box voting (Gidaris and Komodakis,
    "Object detection via a multi-region & semantic segmentation-aware CNN model", ICCV 2015) each
    box that NMS keeps then becomes the mean of all boxes of its class that have an IoU of at least
    0.5 with it, weighted by their scores; it keeps its own score.

    Args:
        detections: for each scale, `{"boxes": [N, 4], "scores": [N], "labels": [N]}` without
            padding rows, in any order, boxes as xyxy pixels of the original image.
        nms_iou_threshold: NMS IoU threshold, per class.
        max_detections: detections that remain, the best of all classes together.
        method: "nms" (the default), or "vote" for NMS with box voting.

    Returns:
        `{"boxes": float32 [M, 4], "scores": float32 [M], "labels": int32 [M]}`, sorted by score.

    Raises:
        ValueError: if there are no scales, a number is out of range, or `method` is unknown.
    """
    nms_iou_threshold = check_fraction("nms_iou_threshold", nms_iou_threshold)
    max_detections = check_int("max_detections", max_detections)
    check_choice("method", method, MERGE_METHODS)
    if not len(detections):
        raise ValueError(
            f"`detections` must have an entry for each scale; received {detections!r}."
        )
    boxes, scores, labels = (
        np.concatenate([np.asarray(one[name], dtype) for one in detections])
        for name, dtype in (("boxes", "float32"), ("scores", "float32"), ("labels", "int32"))
    )
    order = np.argsort(-scores, kind="stable")
    boxes, scores, labels = boxes[order], scores[order], labels[order]
    merged, kept = boxes.copy(), np.ones(len(scores), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        iou = _pairwise_iou(boxes[rows])
        alive = np.ones(len(rows), bool)
        for i in range(len(rows)):
            if alive[i]:
                alive[i + 1 :] &= iou[i, i + 1 :] <= nms_iou_threshold
        kept[rows] = alive
        if method == "vote":
            merged[rows] = _vote(boxes[rows], scores[rows], iou)
    kept = np.flatnonzero(kept)[:max_detections]
    return {"boxes": merged[kept], "scores": scores[kept], "labels": labels[kept]}


# In NumPy, unlike in `boxes` and `nms`: an image has few boxes, and every image another number of
# them, for which JAX would compile again.
def _pairwise_iou(boxes):
    """Intersection over union of every pair, `[N, N]`; 0 where both boxes are empty."""
    top_left = np.maximum(boxes[:, None, :2], boxes[:, :2])
    bottom_right = np.minimum(boxes[:, None, 2:], boxes[:, 2:])
    intersection = np.maximum(bottom_right - top_left, 0).prod(axis=-1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=-1)
    union = area[:, None] + area - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


def _vote(boxes, scores, iou):
    """The boxes of one class after voting; one without a vote, such as an empty one, stays."""
    weights = np.where(iou >= _VOTE_IOU, scores, 0).astype("float64")
    total = weights.sum(axis=-1, keepdims=True)
    return np.where(total > 0, weights @ boxes / np.where(total > 0, total, 1), boxes)
