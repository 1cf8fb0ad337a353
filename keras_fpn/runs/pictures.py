"""Pictures of detections beside ground truth."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from keras_fpn.data.drawing import draw_detections

_GAP = 8


def detections_beside_truth(
    image: np.ndarray,
    found: Sequence[dict[str, Any]],
    truth: Sequence[dict[str, Any]],
    class_names: Sequence[str],
    category_ids: Sequence[int],
    score_threshold: float = 0.5,
) -> Image.Image:
    """Draws an image with its detections on the left and its ground truth on the right.

    Args:
        image: `[H, W, 3]` RGB pixels in 0..255.
        found: detections of this image, in COCO's results format.
        truth: annotations of this image, in COCO's format; crowds are marked as such.
        class_names: class name of each label.
        category_ids: COCO category id of each label.
        score_threshold: detections with a score below this are not drawn.
    """
    label_of = {category_id: label for label, category_id in enumerate(category_ids)}
    names = [*class_names, *(f"{name} (crowd)" for name in class_names)]
    left = draw_detections(
        image,
        {
            **_boxes_and_labels(found, label_of),
            "scores": np.array([x["score"] for x in found], np.float32),
        },
        names,
        score_threshold,
    )
    shown = _boxes_and_labels(truth, label_of)
    is_crowd = np.array([bool(x.get("iscrowd")) for x in truth], bool)
    shown["labels"] = shown["labels"] + len(class_names) * is_crowd
    right = draw_detections(image, shown, names)
    picture = Image.new("RGB", (2 * left.width + _GAP, left.height), "white")
    picture.paste(left, (0, 0))
    picture.paste(right, (left.width + _GAP, 0))
    return picture


def _boxes_and_labels(rows: Sequence[dict], label_of: dict[int, int]) -> dict[str, np.ndarray]:
    boxes = np.array([row["bbox"] for row in rows], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = np.array([label_of[row["category_id"]] for row in rows], np.int32)
    return {"boxes": boxes, "labels": labels}
