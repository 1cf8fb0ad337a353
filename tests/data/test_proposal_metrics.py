"""Average recall agrees with pycocotools, on data with crowds and equal scores."""

import contextlib
import copy
import io

import numpy as np
import pytest

from keras_fpn.data import proposal_metrics
from keras_fpn.data.proposal_metrics import PROPOSAL_METRICS, proposal_evaluation
from keras_fpn.data.stored_proposals import Proposals

IMAGES = [{"id": 7 * i + 1, "width": 400, "height": 300} for i in range(7)]
CATEGORIES = [{"id": 2, "name": "cat"}, {"id": 5, "name": "dog"}]


def ground_truth_and_results(seed):
    """Seven images, one of them empty and one with objects behind the first 100 proposals."""
    random = np.random.RandomState(seed)
    annotations, results = [], []
    for image in IMAGES[:-1]:
        for number in range(random.randint(3, 7)):
            box = np.array([*random.randint(0, 200, 2), *random.randint(4, 190, 2)], float)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": int(random.choice([2, 5])),
                    "bbox": box.tolist(),
                    # The limits themselves belong to both sizes.
                    "area": float(random.choice([box[2] * box[3], 32**2, 96**2])),
                    "iscrowd": int(number == 1),
                }
            )
            for _ in range(60 if image["id"] == 8 else random.randint(0, 9)):
                moved = np.maximum(box + random.randint(-12, 13, 4), 0)
                results.append(
                    {
                        "image_id": image["id"],
                        "category_id": 2,
                        "bbox": moved.tolist(),
                        "score": random.randint(0, 5) / 4 - number,
                    }
                )
    random.shuffle(results)
    return {"images": IMAGES, "annotations": annotations, "categories": CATEGORIES}, results


def pycocotools_recall(truth, results) -> list[float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = copy.deepcopy(truth)
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(copy.deepcopy(results)), "bbox")
        evaluation.params.useCats = 0
        evaluation.params.maxDets = [100, 1000]
        evaluation.evaluate()
        evaluation.accumulate()
    recall = evaluation.eval["recall"][:, 0]  # IoU threshold, area, number of proposals.
    metrics = []
    for area, number in ((0, 0), (0, 1), (1, 0), (2, 0), (3, 0), (1, 1), (2, 1), (3, 1)):
        values = recall[:, area, number]
        values = values[values > -1]
        metrics.append(values.mean() if values.size else -1)
    return metrics


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("images_at_once", [3, 200])
def test_equals_pycocotools(monkeypatch, seed, images_at_once):
    monkeypatch.setattr(proposal_metrics, "_IMAGES_AT_ONCE", images_at_once)
    truth, results = ground_truth_and_results(seed)
    untouched = copy.deepcopy((truth, results))
    metrics = proposal_evaluation(truth, results)
    assert tuple(metrics) == PROPOSAL_METRICS
    assert list(metrics.values()) == pytest.approx(pycocotools_recall(truth, results), abs=1e-9)
    assert 0.1 < metrics["AR100"] < metrics["AR1k"] < 1
    assert (truth, results) == untouched


def test_stored_proposals_are_evaluated_in_original_pixels():
    truth, results = ground_truth_and_results(0)
    # Resized to twice the height and half the width.
    boxes = {image["id"]: [] for image in IMAGES}
    scores = {image["id"]: [] for image in IMAGES}
    for result in results:
        x, y, width, height = result["bbox"]
        boxes[result["image_id"]].append([x / 2, 2 * y, (x + width) / 2, 2 * (y + height)])
        scores[result["image_id"]].append(result["score"])
    proposals = Proposals.from_images(
        list(boxes), list(boxes.values()), list(scores.values()), [(600, 200)] * 7
    )
    # Category 1 of the proposals is not in the ground truth.
    assert proposal_evaluation(truth, proposals) == proposal_evaluation(truth, results)


def test_recall_by_hand():
    boxes = [[0, 0, 10, 10], [50, 50, 200, 200]]
    annotations = [
        {"id": i, "image_id": 1, "category_id": 5, "bbox": box, "area": box[2] * box[3]}
        | {"iscrowd": 0}
        for i, box in enumerate(boxes)  # An id of 0 is as good as another.
    ]
    truth = {"images": IMAGES[:1], "annotations": annotations, "categories": CATEGORIES}
    # 100 false ones come before the small object, which is hit with an IoU of 0.8: found at 0.5,
    # 0.55, ..., 0.8, seven of ten thresholds. The large one is hit exactly.
    hits = [([50, 50, 200, 200], 0.9), ([0, 0, 10, 8], 0.1)]
    clutter = [([300 + i / 10, 0, 9, 9], 0.5) for i in range(100)]
    results = [
        {"image_id": 1, "category_id": 5, "bbox": box, "score": score}
        for box, score in hits + clutter
    ]
    assert proposal_evaluation(truth, results) == pytest.approx(
        {
            "AR100": 0.5,
            "AR1k": 0.85,
            "AR100s": 0.0,
            "AR100m": -1.0,
            "AR100l": 1.0,
            "AR1ks": 0.7,
            "AR1km": -1.0,
            "AR1kl": 1.0,
        }
    )


def test_without_proposals_or_objects():
    truth, _ = ground_truth_and_results(0)
    assert proposal_evaluation(truth, [])["AR1k"] == 0.0
    nothing = proposal_evaluation(truth | {"annotations": []}, [])
    assert set(nothing.values()) == {-1.0}


def test_proposals_of_an_unknown_image_are_rejected():
    truth, results = ground_truth_and_results(0)
    with pytest.raises(ValueError, match=r"`results`.*4711"):
        proposal_evaluation(truth, [results[0] | {"image_id": 4711}])
    with pytest.raises(ValueError, match=r"`results`.*4711"):
        proposal_evaluation(truth, Proposals.from_images([4711], [[[0, 0, 1, 1]]], [[1]]))
