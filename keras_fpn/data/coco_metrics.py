"""COCO's detection metrics: AP and AR, and the results format."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# fmt: off
COCO_METRICS = (
    "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"
)
# fmt: on


def coco_results(
    detections: Mapping[str, np.ndarray],
    image_ids: Sequence[int],
    image_sizes: np.ndarray,
    original_sizes: np.ndarray,
    category_ids: Sequence[int],
) -> list[dict]:
    """Converts the detections of a batch to COCO's results format, in original pixels.

    Args:
        detections: `{"boxes": [B, D, 4], "scores": [B, D], "labels": [B, D]}` as predicted, boxes
            as xyxy in pixels of the padded batch, rows of label -1 being padding.
        image_ids: B ids.
        image_sizes: `[B, 2]` height and width of each image within the batch.
        original_sizes: `[B, 2]` height and width of each image before resizing.
        category_ids: the data set's category id of each label.

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
    """Result of `coco_evaluation`.

    Attributes:
        metrics: each of `COCO_METRICS` and `"AP/<category name>"` of each category, in 0..1, or -1
            if undefined (for example APl without large objects).
        precision: `[10, 101, K]`, for IoU thresholds 0.50, 0.55, ..., 0.95, recalls 0, 0.01, ..., 1
            and categories in the order of their ids; -1 if undefined.
    """

    metrics: dict[str, float]
    precision: np.ndarray


def check_known_images(ground_truth: Mapping, image_ids: Iterable[int]) -> None:
    """Checks that results are for images in the ground truth.

    Raises:
        ValueError: if `image_ids` has others.
    """
    unknown = sorted(set(image_ids) - {image["id"] for image in ground_truth["images"]})
    if unknown:
        raise ValueError(
            f"`results` must be for images in `ground_truth`; received image ids {unknown[:5]}."
        )


def prepare_evaluation(ground_truth: Mapping, results: list[dict]) -> Any:
    """Returns a silent `COCOeval_faster` of boxes, which extends the dictionaries of both."""
    from faster_coco_eval import COCO, COCOeval_faster

    def silent(*_):
        pass

    truth = COCO(dict(ground_truth), print_function=silent)
    return COCOeval_faster(truth, truth.loadRes(results), iouType="bbox", print_function=silent)


def coco_evaluation(ground_truth: Mapping, results: Sequence[Mapping]) -> CocoEvaluation:
    """Computes AP and AR as in COCO's bounding-box challenge.

    As in COCO, detections matched to crowd regions are ignored.

    Args:
        ground_truth: `{"images", "annotations", "categories"}` in COCO's format.
        results: detections in COCO's results format, for images in `ground_truth`.

    Raises:
        ValueError: if a result belongs to an image that is not in `ground_truth`.
    """
    check_known_images(ground_truth, (result["image_id"] for result in results))
    evaluation = prepare_evaluation(ground_truth, [dict(result) for result in results])
    evaluation.run()
    metrics = dict(zip(COCO_METRICS, map(float, evaluation.stats[:12]), strict=True))
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    # Axes: IoU threshold, recall, category, area range (0: all), detections per image (-1: 100).
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    for index, category_id in enumerate(evaluation.params.catIds):
        of_category = precision[:, :, index]
        of_category = of_category[of_category > -1]
        metrics[f"AP/{names[category_id]}"] = (
            float(of_category.mean()) if of_category.size else -1.0
        )
    return CocoEvaluation(metrics, precision)
