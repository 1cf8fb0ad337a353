"""Merged scales equal the loops of the papers."""

import numpy as np
import pytest

from keras_fpn.image_pyramid import merge_scales

THRESHOLDS = {"nms_iou_threshold": 0.5, "max_detections": 100}


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def merged_in_loops(scales, nms_iou_threshold, max_detections, method):
    """One box at a time, in Python's floats: `[(box, score, label), ...]`."""
    everything = [
        (box, score, label)
        for scale in scales
        for box, score, label in zip(
            scale["boxes"].tolist(), scale["scores"].tolist(), scale["labels"], strict=True
        )
    ]
    kept = []
    for box, score, label in sorted(everything, key=lambda one: -one[1]):
        if all(label != other or iou(box, rival) <= nms_iou_threshold for rival, _, other in kept):
            kept.append((box, score, label))
    if method == "vote":
        for row, (box, score, label) in enumerate(kept):
            voters = [x for x in everything if x[2] == label and iou(x[0], box) >= 0.5]
            weight = sum(x[1] for x in voters)
            mean = [sum(x[1] * x[0][edge] for x in voters) / weight for edge in range(4)]
            kept[row] = (mean, score, label)
    return kept[:max_detections]


def scale(boxes, scores, labels):
    return {
        "boxes": np.array(boxes, "float32").reshape(-1, 4),
        "scores": np.array(scores, "float32"),
        "labels": np.array(labels, "int32"),
    }


def random_scale(random, count):
    """Whole-pixel boxes around a few objects, and many equal scores."""
    center = random.choice([20, 40, 60], (count, 2)) + random.randint(-4, 5, (count, 2))
    half = random.randint(8, 12, (count, 2))
    return scale(
        np.concatenate([center - half, center + half], -1),
        random.randint(1, 10, count) / 10,
        random.randint(0, 3, count),
    )


@pytest.mark.parametrize("method", ["nms", "vote"])
@pytest.mark.parametrize(("nms_iou_threshold", "max_detections"), [(0.5, 100), (0.3, 7), (0.9, 40)])
def test_equals_the_loops(method, nms_iou_threshold, max_detections):
    random = np.random.RandomState(0)
    scales = [random_scale(random, count) for count in (60, 1, 0, 45)]
    wanted = merged_in_loops(scales, nms_iou_threshold, max_detections, method)
    merged = merge_scales(
        scales,
        nms_iou_threshold=nms_iou_threshold,
        max_detections=max_detections,
        method=method,
    )
    boxes, scores, labels = zip(*wanted, strict=True)
    np.testing.assert_allclose(merged["boxes"], boxes, atol=1e-4)
    np.testing.assert_allclose(merged["scores"], scores, rtol=1e-6)
    np.testing.assert_array_equal(merged["labels"], labels)
    assert [merged[name].dtype for name in ("boxes", "scores", "labels")] == [
        "float32",
        "float32",
        "int32",
    ]


def test_a_vote_is_the_mean_of_the_class_weighted_by_score():
    # Boxes of the same top left corner and width; heights and scores of class 1:
    # 10 (0.6), kept: votes of 12 (IoU 0.83) and 20 (0.5), not of 25 (0.4);
    # 25 (0.3), kept: a vote of 20 (0.8), not of 12 (0.48).
    first = scale([[0, 0, 10, 10], [0, 0, 10, 20]], [0.6, 0.2], [1, 1])
    second = scale([[0, 0, 10, 12], [0, 0, 10, 25], [0, 0, 10, 11]], [0.2, 0.3, 0.5], [1, 1, 0])
    merged = merge_scales([first, second], method="vote", **THRESHOLDS)
    heights = [0.6 * 10 + 0.2 * 12 + 0.2 * 20, 11, (0.3 * 25 + 0.2 * 20) / 0.5]
    np.testing.assert_allclose(merged["boxes"][:, 3], heights, rtol=1e-6)
    np.testing.assert_array_equal(merged["boxes"][:, :3], [[0, 0, 10]] * 3)
    np.testing.assert_allclose(merged["scores"], [0.6, 0.5, 0.3])
    np.testing.assert_array_equal(merged["labels"], [1, 0, 1])


def test_of_equal_scores_the_first_scale_is_kept():
    scales = [scale([[0, 0, 10, height]], [0.5], [0]) for height in (12, 10, 11)]
    merged = merge_scales(scales, **THRESHOLDS)
    np.testing.assert_array_equal(merged["boxes"], [[0, 0, 10, 12]])


@pytest.mark.parametrize("method", ["nms", "vote"])
def test_scales_without_detections_have_none(method):
    merged = merge_scales([scale([], [], [])] * 2, method=method, **THRESHOLDS)
    assert {name: values.shape for name, values in merged.items()} == {
        "boxes": (0, 4),
        "scores": (0,),
        "labels": (0,),
    }


def test_boxes_without_a_vote_stay():
    # An empty box has an IoU of 0 with itself; scores of 0 have no weight.
    boxes = [[5, 5, 5, 9], [0, 0, 4, 4]]
    merged = merge_scales([scale(boxes, [0.5, 0.0], [0, 0])], method="vote", **THRESHOLDS)
    np.testing.assert_array_equal(merged["boxes"], boxes)


def test_arguments_out_of_range_are_refused():
    scales = [scale([], [], [])]
    with pytest.raises(ValueError, match=r"`method` must be one of 'nms', 'vote'; received 'mean'"):
        merge_scales(scales, method="mean", **THRESHOLDS)
    with pytest.raises(ValueError, match=r"`nms_iou_threshold` .* received 2"):
        merge_scales(scales, nms_iou_threshold=2, max_detections=1)
    with pytest.raises(ValueError, match=r"`max_detections` .* received 0"):
        merge_scales(scales, nms_iou_threshold=0.5, max_detections=0)
    with pytest.raises(ValueError, match=r"`detections` must have an entry .* received \[\]"):
        merge_scales([], **THRESHOLDS)
