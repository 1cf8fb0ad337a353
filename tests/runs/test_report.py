"""The report of a run, and pictures of detections beside ground truth."""

import re

import numpy as np
import pytest

from keras_fpn.data.coco_metrics import COCO_METRICS, coco_evaluation
from keras_fpn.faster_rcnn import FasterRCNN
from keras_fpn.runs.pictures import detections_beside_truth
from keras_fpn.runs.report import image_scores, write_report

CONFIGURATION = {
    "dataset": "a folder",
    "train_split": "train",
    "validation_split": "validation",
    "class_names": ["cat", "<dog>"],
    "category_ids": [3, 7],
    "recipe": {"epochs": 2, "batch_size": 4, "precision": "float32"},
}


def annotation(image_id, bbox, category_id=3, iscrowd=0):
    return {
        "id": 100 * image_id + int(bbox[0]) + 1,
        "image_id": image_id,
        "bbox": bbox,
        "area": bbox[2] * bbox[3],
        "category_id": category_id,
        "iscrowd": iscrowd,
    }


def result(image_id, bbox, score, category_id=3):
    return {"image_id": image_id, "bbox": bbox, "score": score, "category_id": category_id}


def coco(annotations, images=(1, 2, 3)):
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 60, "width": 80} for i in images],
        "annotations": annotations,
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "<dog>"}],
    }


def test_an_image_is_ranked_by_its_f1():
    truth = coco([annotation(1, [0, 0, 10, 10]), annotation(1, [20, 0, 10, 10])])
    found = [
        result(1, [0, 0, 10, 10], 0.9),  # Right.
        result(1, [0, 1, 10, 10], 0.8),  # The same object again.
        result(1, [20, 0, 10, 10], 0.7, category_id=7),  # Another class.
        result(1, [20, 0, 10, 10], 0.4),  # Not sure enough.
    ]
    # 1 right of 3 found and 2 there.
    assert image_scores(truth, found) == {1: pytest.approx(2 * 1 / (3 + 2))}


def test_an_overlap_of_half_is_enough_and_less_is_not():
    truth = coco([annotation(1, [0, 0, 10, 10]), annotation(2, [0, 0, 10, 10])])
    # Intersections of 50 and 49 with unions of 100.
    found = [result(1, [0, 0, 10, 5], 0.9), result(2, [0, 0, 10, 4.9], 0.9)]
    assert image_scores(truth, found) == {1: 1.0, 2: 0.0}


def test_crowds_count_on_neither_side():
    truth = coco([annotation(1, [0, 0, 10, 10]), annotation(1, [30, 0, 40, 40], iscrowd=1)])
    found = [
        result(1, [0, 0, 10, 10], 0.9),
        result(1, [30, 10, 10, 10], 0.8),  # All of it in the crowd.
        result(1, [16, 0, 20, 10], 0.7),  # 6 of its 20 columns are.
    ]
    assert image_scores(truth, found) == {1: pytest.approx(2 * 1 / (2 + 1))}


def test_an_image_without_objects_and_detections_has_no_score():
    assert image_scores(coco([annotation(2, [0, 0, 9, 9])]), []) == {2: 0.0}


def test_found_boxes_are_drawn_on_the_left_and_true_ones_on_the_right():
    grey = np.full((60, 80, 3), 127, np.uint8)
    found = [result(1, [10, 20, 30, 30], 0.9), result(1, [50, 20, 20, 20], 0.3)]
    truth = [annotation(1, [50, 20, 20, 20], iscrowd=1)]
    picture = np.asarray(detections_beside_truth(grey, found, truth, ["cat", "dog"], [3, 7]))
    left, right = picture[:, :80], picture[:, -80:]
    assert picture.shape == (60, 80 + 8 + 80, 3)
    assert (left[35, 8:13] != 127).any()  # The left edge of the sure detection.
    assert (left[35, 67:73] == 127).all()  # The right edge of the other one.
    assert (right[35, 8:13] == 127).all()
    assert (right[35, 67:73] != 127).any()


@pytest.fixture
def write(tmp_path):
    def write(truth, results, steps=(), history=(), unreadable=()) -> str:
        def read_images(ids):
            return {i: np.full((60, 80, 3), 40 * i, np.uint8) for i in ids if i not in unreadable}

        path = write_report(
            tmp_path,
            title="<run>",
            configuration=CONFIGURATION,
            steps=steps,
            history=history,
            evaluation=coco_evaluation(truth, results),
            ground_truth=truth,
            results=results,
            metric_names=COCO_METRICS,
            read_images=read_images,
        )
        return path.read_text()

    return write


def test_the_report_shows_curves_metrics_and_the_best_and_the_worst_images(write):
    truth = coco(
        [annotation(i, [0, 0, 40, 40], category_id=3 + 4 * (i % 2)) for i in range(1, 7)],
        images=range(1, 7),
    )
    # Images 1 to 3 are solved, 4 has a wrong detection too, 5 and 6 have none.
    found = [result(i, [0, 0, 40, 40], 0.9, category_id=3 + 4 * (i % 2)) for i in range(1, 5)]
    found.append(result(4, [50, 0, 20, 20], 0.8))
    steps = [{"step": s, "loss": 1.0, "learning_rate": 0.1} for s in (1, 2)]
    steps = [row | dict.fromkeys(FasterRCNN.loss_names, 0.25) for row in steps]
    history = [
        {"epoch": epoch, "val_AP": 0.5, "val_AP50": 0.6, "val_AP75": 0.4} for epoch in (1, 2)
    ]
    page = write(truth, found, steps, history)
    best, worst = page.split("Worst images")
    best = best.split("Best images")[1]
    assert re.findall(r"(\d).jpg \(id \d\): F1 (....)</fig", best) == [
        ("1", "1.00"),
        ("2", "1.00"),
        ("3", "1.00"),
        ("4", "0.67"),
    ]
    assert re.findall(r"(\d).jpg \(id \d\): F1 (....)</fig", worst) == [
        ("6", "0.00"),
        ("5", "0.00"),
    ]
    # Of both classes 2 of 3 objects are found: recall reaches 67 of the 101 points of the curve,
    # with nothing wrong of the dogs and nothing wrong above the last right one of the cats.
    assert "<td>&lt;dog&gt;</td><td>0.663</td>" in page
    # Losses, metrics over epochs, precision and recall.
    assert page.count("data:image/png") == 3
    assert page.count("data:image/jpeg") == 6
    assert "<h1>&lt;run&gt;</h1>" in page


def test_a_report_of_nothing_says_so(write):
    page = write(coco([]), [])
    assert "No data." in page
    assert "data:image" not in page


def test_an_image_that_is_gone_is_named(write):
    truth = coco([annotation(1, [0, 0, 9, 9])])
    page = write(truth, [], unreadable=[1])
    assert "1.jpg (id 1): F1 0.00: " in page
