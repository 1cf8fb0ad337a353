"""Proposals equal an obvious implementation, one image, level and box at a time."""

import numpy as np
import pytest
from keras.ops import convert_to_numpy
from test_nms import textbook

from keras_fpn.proposals import ProposalGenerator

SHAPES = {"P2": (6, 7), "P3": (3, 4), "P4": (2, 2)}
ANCHORS_PER_LOCATION = 3
IMAGE_SIZES = np.array([[48, 56], [30, 44]], "int32")


def inputs(seed):
    random = np.random.RandomState(seed)
    objectness, deltas, anchors = {}, {}, {}
    for level, (height, width) in SHAPES.items():
        stride = 2 ** int(level[1:])
        count = height * width * ANCHORS_PER_LOCATION
        objectness[level] = random.normal(size=(2, height, width, 3)).astype("float32")
        deltas[level] = random.normal(size=(2, height, width, 12)).astype("float32")
        centers = random.uniform(0, 50, (count, 2))
        sides = stride * random.uniform(1, 6, (count, 2))
        boxes = np.concatenate([centers - sides / 2, centers + sides / 2], axis=-1)
        anchors[level] = boxes.astype("float32")
    return objectness, deltas, anchors


def decode(deltas, anchors):
    width, height = anchors[2] - anchors[0], anchors[3] - anchors[1]
    x = anchors[0] + width / 2 + deltas[0] * width
    y = anchors[1] + height / 2 + deltas[1] * height
    width = width * np.exp(min(deltas[2], np.log(1000 / 16)))
    height = height * np.exp(min(deltas[3], np.log(1000 / 16)))
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def obvious(objectness, deltas, anchors, image, pre_nms, post_nms, min_size=1e-3):
    boxes, scores, levels = [], [], []
    height, width = IMAGE_SIZES[image]
    for number, level in enumerate(SHAPES):
        logits = objectness[level][image].reshape(-1)
        level_deltas = deltas[level][image].reshape(-1, 4)
        for i in np.argsort(-logits, kind="stable")[:pre_nms]:
            x1, y1, x2, y2 = decode(level_deltas[i], anchors[level][i])
            x1, x2 = min(max(x1, 0), width), min(max(x2, 0), width)
            y1, y2 = min(max(y1, 0), height), min(max(y2, 0), height)
            if x2 - x1 >= min_size and y2 - y1 >= min_size:
                boxes.append([x1, y1, x2, y2])
                scores.append(1 / (1 + np.exp(-logits[i])))
                levels.append(number)
    boxes, scores = np.array(boxes, "float32").reshape(-1, 4), np.array(scores, "float32")
    kept = textbook(boxes, scores, levels, 0.7, post_nms)
    kept = kept[kept >= 0]
    return boxes[kept], scores[kept]


@pytest.mark.parametrize(
    ("pre_nms", "post_nms", "training"),
    [(20, 25, False), (20, 25, True), (1000, 1000, False), (5, 3, False)],
)
def test_equal_the_obvious_implementation(pre_nms, post_nms, training):
    numbers = {"pre_nms": pre_nms, "post_nms": post_nms}
    if training:
        numbers = {f"training_{name}": number for name, number in numbers.items()}
    case = inputs(seed=pre_nms)
    ours = ProposalGenerator(**numbers)(*case, IMAGE_SIZES, training=training)
    boxes, scores = map(convert_to_numpy, ours)
    assert boxes.shape == (2, post_nms, 4)
    assert scores.shape == (2, post_nms)
    for image in range(2):
        their_boxes, their_scores = obvious(*case, image, pre_nms, post_nms)
        count = len(their_boxes)
        assert count > 0
        np.testing.assert_allclose(scores[image, :count], their_scores, rtol=1e-5)
        np.testing.assert_allclose(boxes[image, :count], their_boxes, atol=1e-3)
        np.testing.assert_array_equal(scores[image, count:], -1)
        np.testing.assert_array_equal(boxes[image, count:], 0)


def test_inference_and_training_have_numbers_of_their_own():
    layer = ProposalGenerator(pre_nms=4, post_nms=6, training_pre_nms=10, training_post_nms=9)
    case = inputs(0)
    assert layer(*case, IMAGE_SIZES)[0].shape == (2, 6, 4)
    assert layer(*case, IMAGE_SIZES, training=True)[0].shape == (2, 9, 4)


def test_levels_do_not_suppress_each_other_but_boxes_of_one_level_do():
    box = np.array([[0, 0, 20, 20]], "float32")
    logits = {"P2": np.full((1, 1, 2, 1), 2.0), "P3": np.full((1, 1, 1, 1), 1.0)}
    deltas = {"P2": np.zeros((1, 1, 2, 4)), "P3": np.zeros((1, 1, 1, 4))}
    anchors = {"P2": np.tile(box, (2, 1)), "P3": box}
    boxes, scores = ProposalGenerator(post_nms=4)(logits, deltas, anchors, np.array([[30, 30]]))
    expected = [1 / (1 + np.exp(-2.0)), 1 / (1 + np.exp(-1.0)), -1, -1]
    np.testing.assert_allclose(convert_to_numpy(scores), [expected], rtol=1e-6)
    np.testing.assert_array_equal(convert_to_numpy(boxes)[0, :2], np.tile(box, (2, 1)))


def test_deltas_belong_to_the_anchors_of_their_pixel_in_turn():
    # Of three anchors a pixel, the second in row 1, column 0 alone scores; it moves by its width.
    logits = np.full((1, 2, 2, 3), -50.0)
    logits[0, 1, 0, 1] = 0
    deltas = np.zeros((1, 2, 2, 12))
    deltas[0, 1, 0, 4] = 1
    anchors = np.array([[i, 0, i + 1, 10] for i in range(0, 48, 4)], "float32")
    boxes, _ = ProposalGenerator(post_nms=1)(
        {"P2": logits}, {"P2": deltas}, {"P2": anchors}, np.array([[50, 50]])
    )
    np.testing.assert_allclose(convert_to_numpy(boxes)[0, 0], [29, 0, 30, 10])


def test_what_is_not_a_box_is_not_proposed():
    objectness, deltas, anchors = inputs(0)
    for level in SHAPES:
        deltas[level][0] = np.nan
        objectness[level][1] = np.nan
    boxes, scores = ProposalGenerator(pre_nms=10, post_nms=5)(
        objectness, deltas, anchors, IMAGE_SIZES
    )
    np.testing.assert_array_equal(convert_to_numpy(scores), np.full((2, 5), -1))
    np.testing.assert_array_equal(convert_to_numpy(boxes), np.zeros((2, 5, 4)))
