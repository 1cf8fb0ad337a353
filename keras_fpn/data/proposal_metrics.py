"""Average recall of proposals, as COCO's proposal evaluation defines it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from keras_fpn.data.coco_metrics import check_known_images, prepare_evaluation
from keras_fpn.data.stored_proposals import Proposals

PROPOSAL_METRICS = ("AR100", "AR1k", "AR100s", "AR100m", "AR100l", "AR1ks", "AR1km", "AR1kl")
_MAX_PROPOSALS = [100, 1000]
# A thousand proposals of each take 300 MB while they are evaluated.
_IMAGES_AT_ONCE = 200


def proposal_evaluation(
    ground_truth: Mapping, results: Sequence[Mapping] | Proposals
) -> dict[str, float]:
    """Computes the average recall of class-agnostic proposals.

    AR is the fraction of objects that are found, averaged over the IoU thresholds 0.5, 0.55, ...,
    0.95, among the 100 or 1000 highest-scoring proposals of each image. As in COCO, crowds need not
    be found, and objects are small up to an area of 32 x 32 pixels and large from 96 x 96.

    Args:
        ground_truth: `{"images", "annotations", "categories"}` in COCO's format.
        results: proposals for images in `ground_truth`: stored proposals, or a list in COCO's
            results format, where categories matter only for the order of equal scores.

    Returns:
        Each of `PROPOSAL_METRICS`, in 0..1, or -1 if there are no objects of that size.

    Raises:
        ValueError: if a proposal belongs to an image that is not in `ground_truth`.
    """
    if isinstance(results, Proposals):
        has_any = np.diff(results.row_splits) > 0
        check_known_images(ground_truth, results.image_ids[has_any].tolist())
        index = {image_id: i for i, image_id in enumerate(results.image_ids.tolist())}
    else:
        check_known_images(ground_truth, (result["image_id"] for result in results))
        by_image = defaultdict(list)
        for result in results:
            by_image[result["image_id"]].append(result)

    def results_of(image: Mapping) -> Sequence[Mapping]:
        if not isinstance(results, Proposals):
            return by_image.get(image["id"], [])
        if image["id"] not in index:
            return []
        size = image["height"], image["width"]
        return results.coco_results(index[image["id"]], size)

    categories = {category["id"] for category in ground_truth["categories"]}
    annotations = defaultdict(list)
    for number, annotation in enumerate(ground_truth["annotations"], start=1):
        # COCO's evaluators treat annotation id 0 as unmatched.
        annotations[annotation["image_id"]].append({**annotation, "id": number})

    # Objects by size; those found by IoU threshold, size and number of proposals.
    objects, found = np.zeros(4), np.zeros((10, 4, len(_MAX_PROPOSALS)))
    images = ground_truth["images"]
    for start in range(0, len(images), _IMAGES_AT_ONCE):
        part = images[start : start + _IMAGES_AT_ONCE]
        part_annotations = [x for image in part for x in annotations[image["id"]]]
        part_results = [dict(x) for image in part for x in results_of(image)]
        for result in part_results:
            # The evaluators pass over categories that are not in the ground truth.
            if result["category_id"] not in categories:
                result["category_id"] = min(categories, default=1)
        evaluation = prepare_evaluation(
            {**ground_truth, "images": part, "annotations": part_annotations}, part_results
        )
        evaluation.params.useCats = 0
        evaluation.params.maxDets = _MAX_PROPOSALS
        # `summarize` would compute AP as well, and AR by size for the largest number only.
        evaluation.evaluate()
        evaluation.accumulate()
        areas = np.array([x["area"] for x in part_annotations if not x["iscrowd"]])
        part_objects = np.array(
            [((areas >= low) & (areas <= high)).sum() for low, high in evaluation.params.areaRng]
        )
        # Without categories the second axis is of length 1. Recall is -1 where there is no object.
        recall = np.maximum(evaluation.eval["recall"][:, 0], 0)
        objects += part_objects
        found += np.rint(recall * part_objects[:, None])
    recall = np.where(objects[:, None] > 0, found / np.maximum(objects, 1)[:, None], -1).mean(0)
    values = [*recall[0].tolist(), *recall[1:].T.ravel().tolist()]
    return dict(zip(PROPOSAL_METRICS, values, strict=True))
