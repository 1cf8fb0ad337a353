"""NMS equals the textbook loop."""

import numpy as np
import pytest
from keras import ops

from keras_fpn.nms import non_max_suppression


def textbook(boxes, scores, groups, iou_threshold, max_output):
    """One box at a time, in float32 as the library computes."""
    order = sorted(np.flatnonzero(scores > -np.inf), key=lambda i: (-scores[i], i))
    kept = []
    for i in order:
        for j in kept:
            if groups[i] != groups[j]:
                continue
            width = min(boxes[i, 2], boxes[j, 2]) - max(boxes[i, 0], boxes[j, 0])
            height = min(boxes[i, 3], boxes[j, 3]) - max(boxes[i, 1], boxes[j, 1])
            inter = max(width, np.float32(0)) * max(height, np.float32(0))
            area_i = (boxes[i, 2] - boxes[i, 0]) * (boxes[i, 3] - boxes[i, 1])
            area_j = (boxes[j, 2] - boxes[j, 0]) * (boxes[j, 3] - boxes[j, 1])
            union = area_i + area_j - inter
            if union > 0 and inter / union > np.float32(iou_threshold):
                break
        else:
            kept.append(i)
    kept = kept[:max_output]
    return np.array(kept + [-1] * (max_output - len(kept)))


def random_case(seed, count, span=40, levels_of_score=10, groups=3):
    """Whole-pixel boxes, so that the arithmetic is exact, and many equal scores."""
    random = np.random.RandomState(seed)
    corner = random.randint(0, span, (2, count, 2))
    size = random.randint(0, span // 2, (2, count, 2))
    boxes = np.concatenate([corner, corner + size], -1).astype("float32")
    scores = (random.randint(0, levels_of_score, (2, count)) / levels_of_score).astype("float32")
    scores[random.rand(2, count) < 0.1] = -np.inf
    return boxes, scores, random.randint(0, groups, (2, count))


@pytest.mark.parametrize(
    ("count", "tile_size", "max_output"),
    [(1, 8, 3), (60, 16, 60), (100, 7, 20), (100, 256, 100), (90, 16, 5), (64, 64, 200)],
)
@pytest.mark.parametrize("iou_threshold", [0.0, 0.5, 0.7])
def test_equals_the_textbook_loop(count, tile_size, max_output, iou_threshold):
    boxes, scores, groups = random_case(count, count)
    kept = non_max_suppression(boxes, scores, groups, iou_threshold, max_output, tile_size)
    expected = [
        textbook(boxes[i], scores[i], groups[i], iou_threshold, max_output) for i in range(2)
    ]
    np.testing.assert_array_equal(ops.convert_to_numpy(kept), expected)


def test_a_chain_of_suppressions_is_followed_to_its_end():
    # Each box overlaps its neighbours only: the first, third, fifth, ... stay.
    left = np.arange(50, dtype="float32") * 4
    boxes = np.stack([left, left * 0, left + 10, left * 0 + 10], -1)[None]
    scores = np.linspace(1, 0.1, 50, dtype="float32")[None]
    kept = non_max_suppression(boxes, scores, np.zeros((1, 50)), 0.4, 50, tile_size=16)
    np.testing.assert_array_equal(ops.convert_to_numpy(kept)[0], [*range(0, 50, 2), *[-1] * 25])


def test_equal_scores_keep_the_lower_index():
    boxes = np.tile(np.array([0, 0, 10, 10], "float32"), (1, 5, 1))
    kept = non_max_suppression(boxes, np.full((1, 5), 0.5, "float32"), np.zeros((1, 5)), 0.5, 3)
    np.testing.assert_array_equal(ops.convert_to_numpy(kept), [[0, -1, -1]])


def test_groups_do_not_compete_and_one_row_of_groups_serves_all_images():
    boxes = np.tile(np.array([0, 0, 10, 10], "float32"), (2, 3, 1))
    scores = np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]], "float32")
    kept = non_max_suppression(boxes, scores, np.array([[0, 1, 0]]), 0.5, 3)
    np.testing.assert_array_equal(ops.convert_to_numpy(kept), [[2, 1, -1], [0, 1, -1]])


def test_a_nan_score_is_no_candidate():
    boxes = np.array([[[0, 0, 4, 4], [8, 8, 12, 12]]], "float32")
    kept = non_max_suppression(
        boxes, np.array([[np.nan, 0.2]], "float32"), np.zeros((1, 2)), 0.5, 2
    )
    np.testing.assert_array_equal(ops.convert_to_numpy(kept), [[1, -1]])
