"""AP and AR agree with pycocotools, on data with crowds and empty images."""

import contextlib
import io

import numpy as np
import pytest

from keras_fpn.data.coco_metrics import COCO_METRICS, coco_evaluation, coco_results


def ground_truth_and_results():
    random = np.random.RandomState(3)
    images = [{"id": 7 * i + 1, "width": 400, "height": 300} for i in range(12)]
    categories = [{"id": i, "name": name} for i, name in ((2, "cat"), (5, "dog"), (9, "emu"))]
    annotations, results = [], []
    for image in images[:-2]:
        for _ in range(random.randint(1, 8)):
            x, y, w, h = [*random.uniform(0, 200, 2), *random.uniform(8, 190, 2)]
            category = int(random.choice([2, 5]))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(random.rand() < 0.15),
                }
            )
            for _ in range(random.randint(0, 3)):
                box = np.array([x, y, w, h]) * random.uniform(0.9, 1.1, 4)
                results.append(
                    {
                        "image_id": image["id"],
                        "category_id": category,
                        "bbox": box.tolist(),
                        "score": float(random.rand()),
                    }
                )
    truth = {"images": images, "annotations": annotations, "categories": categories}
    return truth, results


def test_equals_pycocotools():
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, results = ground_truth_and_results()
    metrics = coco_evaluation(truth, results).metrics
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = truth
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert [metrics[name] for name in COCO_METRICS] == pytest.approx(
        list(evaluation.stats), abs=1e-9
    )
    assert 0.1 < metrics["AP"] < 0.95
    assert metrics["AP/emu"] == -1.0
    assert metrics["AP"] == pytest.approx((metrics["AP/cat"] + metrics["AP/dog"]) / 2)


def test_ap_is_zero_without_detections():
    truth, _ = ground_truth_and_results()
    metrics = coco_evaluation(truth, []).metrics
    assert metrics["AP"] == 0.0
    assert metrics["AR100"] == 0.0


def test_results_of_an_unknown_image_are_rejected():
    truth, results = ground_truth_and_results()
    results[0]["image_id"] = 4711
    with pytest.raises(ValueError, match=r"`results`.*4711"):
        coco_evaluation(truth, results)


def test_results_are_in_original_pixels_without_padding_rows():
    detections = {
        "boxes": np.array([[[10, 20, 30, 60], [0, 0, 0, 0]]], "float32"),
        "scores": np.array([[0.5, 0.0]], "float32"),
        "labels": np.array([[1, -1]]),
    }
    # The image was halved in height and kept in width.
    results = coco_results(detections, [42], np.array([[50, 80]]), np.array([[100, 80]]), [1, 90])
    assert results == [
        {"image_id": 42, "category_id": 90, "bbox": [10.0, 40.0, 20.0, 80.0], "score": 0.5}
    ]
