"""Matching equals torchvision's on stored overlaps, and loops on boxes."""

from pathlib import Path

import numpy as np
import pytest
from keras.ops import convert_to_numpy, convert_to_tensor

import keras_fpn.matcher
from keras_fpn.matcher import match, real_objects

BELOW, BETWEEN = -1, -2

with np.load(Path(__file__).parent / "reference" / "parts.npz") as archive:
    STORED = {name: archive[name] for name in archive.files if name.startswith("matcher")}


def as_matches(matched, is_positive, is_negative):
    """torchvision's one number for a candidate: an object, -1 for background, -2 for neither."""
    matched, is_positive, is_negative = map(convert_to_numpy, (matched, is_positive, is_negative))
    assert not (is_positive & is_negative).any()
    return np.where(is_positive, matched, np.where(is_negative, BELOW, BETWEEN))


def match_overlaps(monkeypatch, iou, *thresholds, keep_best):
    """`match` on a given `[objects, candidates]` matrix of overlaps."""
    # The overlaps in place of the candidates that have them.
    monkeypatch.setattr(keras_fpn.matcher, "pairwise_iou", lambda overlaps, boxes: overlaps)
    overlaps, objects = convert_to_tensor(iou.T[None]), np.ones((1, len(iou)), bool)
    return as_matches(*match(overlaps, None, objects, *thresholds, keep_best))[0]


@pytest.mark.parametrize("overlaps", ["", "_without_overlap"])
@pytest.mark.parametrize(
    ("high", "low", "keep_best"), [(0.7, 0.3, True), (0.7, 0.3, False), (0.5, 0.5, False)]
)
def test_ties_and_thresholds_equal_the_reference(monkeypatch, overlaps, high, low, keep_best):
    iou = STORED[f"matcher_iou{overlaps}"]
    suffix = f"{high}_{low}" + ("_low_quality" if keep_best else "")
    expected = STORED[f"matcher_matches{overlaps}_{suffix}"]
    if overlaps and keep_best:
        # An object that overlaps nothing: torchvision takes every candidate for its best, here none
        # is, and what remains is what the other objects give.
        assert np.all(expected >= 0)
        expected = match_overlaps(monkeypatch, np.delete(iou, 3, 0), high, low, keep_best=True)
        expected = np.where(expected >= 3, expected + 1, expected)
    ours = match_overlaps(monkeypatch, iou, high, low, keep_best=keep_best)
    np.testing.assert_array_equal(ours, expected)


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def by_loops(candidates, boxes, high, low, keep_best):
    overlaps = [[iou(candidate, box) for box in boxes] for candidate in candidates]
    best_of_object = [max(row[j] for row in overlaps) for j in range(len(boxes))]
    matches = []
    for row in overlaps:
        best = max(row, default=0)
        is_best = any(x == top and x > 0 for x, top in zip(row, best_of_object, strict=True))
        if best >= high or (keep_best and is_best):
            matches.append(row.index(best))
        else:
            matches.append(BELOW if best < low else BETWEEN)
    return matches


@pytest.mark.parametrize("shared_candidates", [True, False])
@pytest.mark.parametrize(("high", "low", "keep_best"), [(0.6, 0.3, True), (0.5, 0.5, False)])
def test_equals_the_loops(shared_candidates, high, low, keep_best):
    # Sides in whole pixels: overlaps of equal boxes are equal in any precision.
    random = np.random.RandomState(0)
    corners = random.randint(0, 30, (2, 66, 2))
    all_boxes = np.concatenate([corners, corners + random.randint(4, 20, (2, 66, 2))], axis=-1)
    candidates, boxes = all_boxes[:, :60].astype("float32"), all_boxes[:, 60:].astype("float32")
    candidates[:, 0] = boxes[:, 0]
    is_object = np.array([[1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]], bool)
    if shared_candidates:
        candidates = candidates[:1]
    ours = as_matches(
        *match(candidates, boxes, is_object, high, low, keep_best_of_each_object=keep_best)
    )
    for image in range(2):
        real = np.flatnonzero(is_object[image])
        expected = by_loops(
            candidates[0 if shared_candidates else image], boxes[image][real], high, low, keep_best
        )
        expected = [real[i] if i >= 0 else i for i in expected]
        np.testing.assert_array_equal(ours[image], expected)


def test_rows_that_are_objects():
    nan, inf, big = float("nan"), float("inf"), 1e30
    rows = [
        ([0, 0, 5, 5], 0, True),
        ([-3, -3, 500, 5], 2, True),
        ([0, 0, 5, 5], -1, False),
        ([0, 0, 0, 0], 0, False),
        ([2, 2, 2, 8], 0, False),
        ([5, 5, 2, 2], 0, False),
        ([nan, 0, 5, 5], 0, False),
        ([nan, nan, nan, nan], 1, False),
        ([0, 0, inf, 5], 0, False),
        ([-inf, 0, 5, 5], 0, False),
        ([0, 0, big, big], 0, False),
    ]
    boxes, labels, expected = zip(*rows, strict=True)
    boxes = convert_to_tensor(np.array([boxes], "float32"))
    found = real_objects(boxes, convert_to_tensor(np.array([labels])))
    np.testing.assert_array_equal(convert_to_numpy(found)[0], expected)
