"""COCO's metrics of detections: the results format, AP and AR."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

COCO_METRICS = (
    "AP",
    "AP50",
    "AP75",
    "APs",
    "APm",
    "APl",
    "AR1",
    "AR10",
    "AR100",
    "ARs",
    "ARm",
    "ARl",
)


def coco_results(
    detections: Mapping[str, np.ndarray],
    image_ids: Sequence[int],
    image_sizes: np.ndarray,
    original_sizes: np.ndarray,
    category_ids: Sequence[int],
) -> list[dict]:
    """Detections of a batch in COCO's results format, in each image's original pixels.

    Args:
        detections: `{"boxes": [B, D, 4], "scores": [B, D], "labels": [B, D]}` as the model gives
            them, boxes as xyxy pixels of the batch.
        image_ids: B ids.
        image_sizes: `[B, 2]` height and width of each image inside the batch.
        original_sizes: `[B, 2]` height and width of each image before it was resized.
        category_ids: the data set's id of every label.

    Returns:
        A list of `{"image_id", "category_id", "bbox": [x, y, width, height], "score"}`.
    """
    scale = np.asarray(original_sizes, "float64") / np.asarray(image_sizes, "float64")
    results = []
    for i, image_id in enumerate(image_ids):
        real = np.asarray(detections["labels"][i]) >= 0
        boxes = np.asarray(detections["boxes"][i], "float64")[real] * np.tile(scale[i, ::-1], 2)
        boxes[:, 2:] -= boxes[:, :2]
        scores = np.asarray(detections["scores"][i])[real]
        labels = np.asarray(detections["labels"][i])[real]
        results += [
            {
                "image_id": int(image_id),
                "category_id": int(category_ids[label]),
                "bbox": box.tolist(),
                "score": float(score),
            }
            for box, score, label in zip(boxes, scores, labels, strict=True)
        ]
    return results


class CocoEvaluation(NamedTuple):
    """What `coco_evaluation` measures.

    Attributes:
        metrics: each of `COCO_METRICS` in 0..1, or -1 where the ground truth has nothing to measure
            (no large object, say); and `"AP/<category name>"` for every category.
        precision: `[10, 101, K]`, at IoU thresholds 0.50, 0.55, ..., 0.95, at recalls 0, 0.01, ...,
            1 and for each category in the order of ids; -1 where there is nothing to measure.
    """

    metrics: dict[str, float]
    precision: np.ndarray


def coco_evaluation(ground_truth: Mapping, results: Sequence[Mapping]) -> CocoEvaluation:
    """AP and AR of COCO's bounding-box challenge.

    Crowd regions absorb detections without counting, as COCO has it.

    Args:
        ground_truth: COCO's dictionary of `images`, `annotations` and `categories`.
        results: detections in COCO's results format, of images in `ground_truth`.

    Raises:
        ValueError: for results of images that the ground truth does not know.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    known = {image["id"] for image in ground_truth["images"]}
    unknown = sorted({result["image_id"] for result in results} - known)
    if unknown:
        raise ValueError(
            f"Results are of images in the ground truth; received unknown image ids {unknown[:5]}."
        )

    def silent(*_):
        pass

    truth = COCO(dict(ground_truth), print_function=silent)
    found = truth.loadRes([dict(result) for result in results])
    evaluation = COCOeval_faster(truth, found, iouType="bbox", print_function=silent)
    evaluation.run()
    metrics = dict(zip(COCO_METRICS, map(float, evaluation.stats[:12]), strict=True))
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    # Axes: IoU threshold, recall, category, area range (0 is all), detections an image (-1 is 100).
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    for index, category_id in enumerate(evaluation.params.catIds):
        of_category = precision[:, :, index]
        of_category = of_category[of_category > -1]
        metrics[f"AP/{names[category_id]}"] = (
            float(of_category.mean()) if of_category.size else -1.0
        )
    return CocoEvaluation(metrics, precision)
