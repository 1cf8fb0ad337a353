"""Detections equal an obvious implementation, one image, class and box at a time."""

import numpy as np
import pytest
from keras.ops import convert_to_numpy
from test_nms import textbook

from keras_fpn.boxes import BOX_FORMATS, convert_boxes
from keras_fpn.detections import DetectionGenerator

IMAGE_SIZES = np.array([[60, 80], [40, 50]], "int32")
CLASSES = 4
REGIONS = 30


def inputs(seed=0):
    random = np.random.RandomState(seed)
    corners = random.uniform(0, 40, (2, REGIONS, 2))
    proposals = np.concatenate([corners, corners + random.uniform(4, 30, (2, REGIONS, 2))], -1)
    scores = random.uniform(0, 1, (2, REGIONS))
    scores[0, 25:] = -1
    return [
        x.astype("float32")
        for x in (
            random.normal(scale=2, size=(2, REGIONS, CLASSES + 1)),
            random.normal(scale=2, size=(2, REGIONS, CLASSES, 4)),
            proposals,
            scores,
        )
    ]


def decode(deltas, box):
    width, height = box[2] - box[0], box[3] - box[1]
    x = box[0] + width / 2 + deltas[0] / 10 * width
    y = box[1] + height / 2 + deltas[1] / 10 * height
    width = width * np.exp(min(deltas[2] / 5, np.log(1000 / 16)))
    height = height * np.exp(min(deltas[3] / 5, np.log(1000 / 16)))
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def obvious(logits, deltas, proposals, scores, image, threshold, most):
    boxes, probabilities, labels = [], [], []
    height, width = IMAGE_SIZES[image]
    for region in range(REGIONS):
        exp = np.exp(logits[image, region].astype("float64"))
        for label in range(CLASSES):
            x1, y1, x2, y2 = decode(deltas[image, region, label], proposals[image, region])
            x1, x2 = min(max(x1, 0), width), min(max(x2, 0), width)
            y1, y2 = min(max(y1, 0), height), min(max(y2, 0), height)
            probability = exp[label] / exp.sum()
            if scores[image, region] < 0 or probability <= threshold:
                continue
            if x2 - x1 >= 1e-2 and y2 - y1 >= 1e-2:
                boxes.append([x1, y1, x2, y2])
                probabilities.append(probability)
                labels.append(label)
    boxes = np.array(boxes, "float32").reshape(-1, 4)
    probabilities, labels = np.array(probabilities, "float32"), np.array(labels, int)
    kept = textbook(boxes, probabilities, labels, 0.5, most)
    kept = kept[kept >= 0]
    return boxes[kept], probabilities[kept], labels[kept]


def to_numpy(detections):
    return {name: convert_to_numpy(value) for name, value in detections.items()}


@pytest.mark.parametrize(("threshold", "most"), [(0.05, 100), (0.0, 200), (0.4, 10), (0.999, 5)])
def test_equal_the_obvious_implementation(threshold, most):
    case = inputs()
    ours = to_numpy(DetectionGenerator(threshold, max_detections=most)(*case, IMAGE_SIZES))
    assert ours["boxes"].shape == (2, most, 4)
    assert ours["labels"].dtype == ours["num_detections"].dtype == "int32"
    for image in range(2):
        boxes, scores, labels = obvious(*case, image, threshold, most)
        count = len(boxes)
        assert ours["num_detections"][image] == count
        np.testing.assert_allclose(ours["boxes"][image, :count], boxes, atol=1e-3)
        np.testing.assert_allclose(ours["scores"][image, :count], scores, rtol=1e-5)
        np.testing.assert_array_equal(ours["labels"][image, :count], labels)
        assert not ours["boxes"][image, count:].any()
        assert not ours["scores"][image, count:].any()
        assert np.all(ours["labels"][image, count:] == -1)


@pytest.mark.parametrize("box_format", BOX_FORMATS)
def test_boxes_in_the_format_of_the_caller(box_format):
    case = inputs()
    xyxy = to_numpy(DetectionGenerator(max_detections=200)(*case, IMAGE_SIZES))
    ours = to_numpy(
        DetectionGenerator(max_detections=200, bounding_box_format=box_format)(*case, IMAGE_SIZES)
    )
    expected = convert_to_numpy(convert_boxes(xyxy["boxes"], "xyxy", box_format, IMAGE_SIZES))
    np.testing.assert_allclose(ours["boxes"], expected, atol=1e-5)
    np.testing.assert_array_equal(ours["labels"], xyxy["labels"])


def test_the_threshold_itself_is_not_over_it():
    logits = np.zeros((1, 2, 2), "float32")
    box = np.array([[[0, 0, 9, 9], [20, 20, 30, 30]]], "float32")
    deltas, scores = np.zeros((1, 2, 1, 4), "float32"), np.ones((1, 2), "float32")
    given = (logits, deltas, box, scores, np.array([[40, 40]]))
    assert to_numpy(DetectionGenerator(score_threshold=0.5)(*given))["num_detections"] == 0
    assert to_numpy(DetectionGenerator(score_threshold=0.49)(*given))["num_detections"] == 2


def test_without_proposals_there_are_no_detections():
    logits, deltas, proposals, scores = inputs()
    detections = to_numpy(
        DetectionGenerator(0.0)(
            logits, deltas, np.zeros_like(proposals), np.full_like(scores, -1), IMAGE_SIZES
        )
    )
    np.testing.assert_array_equal(detections["num_detections"], [0, 0])
    assert np.all(detections["labels"] == -1)


def test_what_is_not_a_number_is_not_detected():
    logits, deltas, proposals, scores = inputs()
    logits[0], deltas[1] = np.nan, np.nan
    detections = to_numpy(DetectionGenerator(0.0)(logits, deltas, proposals, scores, IMAGE_SIZES))
    np.testing.assert_array_equal(detections["num_detections"], [0, 0])
    assert np.isfinite(detections["boxes"]).all()


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match=r"`bounding_box_format` must be one of .*received 'coco'"):
        DetectionGenerator(bounding_box_format="coco")
