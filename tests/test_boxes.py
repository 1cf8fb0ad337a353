"""Box geometry equals torchvision's, and hand calculations."""

from pathlib import Path

import numpy as np
import pytest
from keras.ops import convert_to_numpy

from keras_fpn.boxes import (
    BOX_FORMATS,
    box_area,
    check_box_format,
    clip_boxes,
    convert_boxes,
    decode_deltas,
    encode_deltas,
    larger_than,
    pairwise_iou,
)

DELTA_WEIGHTS = {"weights_1": (1.0, 1.0, 1.0, 1.0), "weights_10_5": (10.0, 10.0, 5.0, 5.0)}

# One box in an image of 100 x 200 and another in one of 50 x 80 (height x width), in all formats.
IMAGE_SIZES = np.array([[100, 200], [50, 80]])
SAME_BOXES = {
    "xyxy": ([10, 20, 50, 80], [8, 5, 24, 10]),
    "yxyx": ([20, 10, 80, 50], [5, 8, 10, 24]),
    "xywh": ([10, 20, 40, 60], [8, 5, 16, 5]),
    "center_xywh": ([30, 50, 40, 60], [16, 7.5, 16, 5]),
    "center_yxhw": ([50, 30, 60, 40], [7.5, 16, 5, 16]),
    "rel_xyxy": ([0.05, 0.2, 0.25, 0.8], [0.1, 0.1, 0.3, 0.2]),
    "rel_yxyx": ([0.2, 0.05, 0.8, 0.25], [0.1, 0.1, 0.2, 0.3]),
    "rel_xywh": ([0.05, 0.2, 0.2, 0.6], [0.1, 0.1, 0.2, 0.1]),
    "rel_center_xywh": ([0.15, 0.5, 0.2, 0.6], [0.2, 0.15, 0.2, 0.1]),
    "rel_center_yxhw": ([0.5, 0.15, 0.6, 0.2], [0.15, 0.2, 0.1, 0.2]),
}


@pytest.fixture(scope="module")
def stored():
    with np.load(Path(__file__).parent / "reference" / "parts.npz") as archive:
        return dict(archive)


def test_area():
    boxes = np.array([[1, 2, 4, 8], [3, 3, 3, 9]], "float32")
    np.testing.assert_array_equal(convert_to_numpy(box_area(boxes)), [18, 0])


@pytest.mark.parametrize("minimum", [1e-3, 1e-2])
def test_a_box_under_the_minimum_on_either_side_is_too_small(stored, minimum):
    large = convert_to_numpy(larger_than(stored["thin_boxes"], minimum))
    np.testing.assert_array_equal(np.flatnonzero(large), stored[f"thin_kept_{minimum}"])


def test_a_box_whose_corners_are_swapped_is_too_small(stored):
    assert not convert_to_numpy(larger_than(stored["negative_boxes"], 1e-3)).any()


def test_iou_of_every_pair(stored):
    iou = pairwise_iou(stored["nms_boxes"][:40], stored["nms_boxes"])
    np.testing.assert_allclose(convert_to_numpy(iou), stored["nms_iou"], rtol=1e-6, atol=0)


def test_iou_by_hand_with_leading_dimensions_that_broadcast():
    anchors = np.array([[[0, 0, 10, 10], [5, 5, 5, 5]]], "float32")
    boxes = np.array([[[0, 0, 10, 5]], [[5, 5, 15, 15]], [[5, 5, 5, 5]]], "float32")
    np.testing.assert_allclose(
        convert_to_numpy(pairwise_iou(anchors, boxes))[..., 0],
        [[0.5, 0], [25 / 175, 0], [0, 0]],
        rtol=1e-6,
    )


def test_clipping_equals_the_reference(stored):
    clipped = clip_boxes(stored["clip_boxes"][None], stored["clip_size"][None])
    np.testing.assert_array_equal(convert_to_numpy(clipped)[0], stored["clipped_boxes"])


def test_each_image_clips_to_its_own_size_whatever_the_rank():
    boxes = np.broadcast_to(np.array([-5, -6, 500, 600], "float32"), (2, 3, 2, 4))
    clipped = convert_to_numpy(clip_boxes(boxes, np.array([[10, 20], [30, 40]])))
    np.testing.assert_array_equal(clipped[0], np.broadcast_to([0, 0, 20, 10], (3, 2, 4)))
    np.testing.assert_array_equal(clipped[1], np.broadcast_to([0, 0, 40, 30], (3, 2, 4)))


@pytest.mark.parametrize("weights", DELTA_WEIGHTS)
def test_deltas_equal_the_reference(stored, weights):
    boxes, anchors = stored["coder_boxes"], stored["coder_anchors"]
    encoded = encode_deltas(boxes, anchors, DELTA_WEIGHTS[weights])
    np.testing.assert_allclose(
        convert_to_numpy(encoded), stored[f"encoded_{weights}"], rtol=1e-5, atol=1e-6
    )
    decoded = decode_deltas(stored["coder_deltas"], anchors, DELTA_WEIGHTS[weights])
    # Sides of up to 3000 px grow by up to 1000 / 16: the last bit of a coordinate is 0.01 px.
    expected = stored[f"decoded_{weights}"]
    error = np.abs(convert_to_numpy(decoded) - expected).max(axis=-1)
    assert np.all(error <= 1e-6 * np.abs(expected).max(axis=-1) + 1e-4)


@pytest.mark.parametrize("weights", DELTA_WEIGHTS)
def test_deltas_of_each_class_share_their_anchor(stored, weights):
    deltas = stored["coder_class_deltas"].reshape(-1, 3, 4)
    anchors = stored["coder_anchors"][:, None]
    decoded = convert_to_numpy(decode_deltas(deltas, anchors, DELTA_WEIGHTS[weights]))
    expected = stored[f"class_decoded_{weights}"]
    error = np.abs(decoded - expected).max(axis=-1)
    assert np.all(error <= 1e-6 * np.abs(expected).max(axis=-1) + 1e-4)


def test_decoding_undoes_encoding():
    random = np.random.RandomState(0)
    corners = random.uniform(0, 100, (2, 30, 2))
    boxes, anchors = np.concatenate(
        [corners, corners + random.uniform(5, 90, (2, 30, 2))], axis=-1
    ).astype("float32")
    weights = (10.0, 10.0, 5.0, 5.0)
    decoded = decode_deltas(encode_deltas(boxes, anchors, weights), anchors, weights)
    np.testing.assert_allclose(convert_to_numpy(decoded), boxes, atol=1e-4)


def test_deltas_of_empty_boxes_are_finite():
    boxes = np.array([[0, 0, 0, 0], [5, 5, 5, 9], [1, 1, 3, 3]], "float32")
    deltas = encode_deltas(boxes[:, None], boxes[None])
    assert np.isfinite(convert_to_numpy(deltas)).all()


@pytest.mark.parametrize("source", BOX_FORMATS)
@pytest.mark.parametrize("target", BOX_FORMATS)
def test_every_format_in_every_other(source, target):
    boxes = np.array(SAME_BOXES[source])[:, None]
    converted = convert_boxes(boxes, source, target, IMAGE_SIZES)
    expected = np.array(SAME_BOXES[target])[:, None]
    np.testing.assert_allclose(convert_to_numpy(converted), expected, rtol=1e-5)


def test_the_formats_are_known_by_name():
    assert set(BOX_FORMATS) == set(SAME_BOXES)
    assert check_box_format("rel_yxyx") == "rel_yxyx"
    with pytest.raises(ValueError, match=r"must be one of xyxy, .*; received 'coco'"):
        check_box_format("coco")
