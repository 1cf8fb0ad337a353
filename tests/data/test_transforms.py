"""One transform moves image, boxes, proposals and masks together."""

import numpy as np
import pytest
import tensorflow as tf

from keras_fpn.data.transforms import GeometricTransform

# An image of height 4 and width 6 with an object, and a box that leaves the crop.
SIZE = [4, 6]
OBJECT, PARTIAL = [2, 1, 3, 3], [0, 0, 4, 2]
IMAGE = np.zeros((4, 6, 3), np.uint8)
IMAGE[1:3, 2] = 200
MASKS = np.zeros((2, 4, 6), np.uint8)
MASKS[0, 1:3, 2] = MASKS[1, :2, :4] = 1


def fractions(boxes):
    return np.array(boxes, "float32") / np.float32([6, 4, 6, 4])


def transform(target_size, flip=False, crop=None):
    return GeometricTransform(
        tf.constant(SIZE),
        tf.constant(target_size),
        tf.constant(flip),
        None if crop is None else tf.constant(crop),
    )


@pytest.mark.parametrize("flip", [False, True])
def test_crop_flip_and_resize_by_hand(flip):
    # The crop is 4 wide and 2 high, with the object in its first column and PARTIAL in
    # [0, 0, 2, 1]. It is doubled: output column 0 lies at -0.25 of the crop, 1 at 0.25, 2 at 0.75.
    moved = transform([4, 8], flip, crop=[2, 1, 6, 3])
    boxes, row = [[0, 0, 2, 4], [0, 0, 4, 2], [0, 0, 8, 4]], [200, 150, 50, 0, 0, 0, 0, 0]
    masks = np.zeros((2, 4, 8))
    masks[0, :, :2] = masks[1, :2, :4] = 1
    if flip:
        boxes, row = [[6, 0, 8, 4], [4, 0, 8, 2], [0, 0, 8, 4]], row[::-1]
        masks = masks[..., ::-1]
    np.testing.assert_allclose(
        moved.boxes(fractions([OBJECT, PARTIAL, [0, 0, 6, 4]])), boxes, atol=1e-5
    )
    np.testing.assert_array_equal(moved.masks(MASKS), masks)
    assert moved.masks(MASKS).dtype == tf.uint8
    for dtype in (tf.uint8, tf.float32):
        image = moved.image(IMAGE, dtype)
        assert image.dtype == dtype
        np.testing.assert_array_equal(image, np.tile(np.array(row)[:, None], (4, 1, 3)))


@pytest.mark.parametrize("flip", [False, True])
def test_proposals_move_like_boxes_from_any_frame(flip):
    moved = transform([4, 8], flip, crop=[2, 1, 6, 3])
    boxes = np.float32([OBJECT, PARTIAL, [0, 0, 6, 4]])
    expected = moved.boxes(fractions(boxes))
    for frame, scale in (([0, 0], 1), ([4, 6], 1), ([2, 18], [3, 0.5, 3, 0.5])):
        proposals = moved.proposals(boxes * np.float32(scale), tf.constant(frame))
        assert proposals.dtype == tf.float32
        np.testing.assert_allclose(proposals, expected, atol=1e-6)


@pytest.mark.parametrize("target_size", [[7, 11], [480, 641], [800, 1333]])
def test_proposals_in_the_frame_of_the_result_stay_the_same_to_the_bit(target_size):
    height, width = target_size
    corners = np.random.default_rng(0).uniform(0, 1, (2000, 2, 2)) * [width, height]
    proposals = np.sort(corners, axis=1).reshape(-1, 4).astype("float32")
    proposals[0] = [0, 0, width, height]
    received = transform(target_size).proposals(proposals, tf.constant(target_size))
    np.testing.assert_array_equal(received, proposals)


def test_no_crop_is_a_crop_of_the_whole_image():
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    one, other = transform([7, 11], True), transform([7, 11], True, crop=[0, 0, 6, 4])
    np.testing.assert_array_equal(one.image(image), other.image(image))
    np.testing.assert_array_equal(one.masks(MASKS), other.masks(MASKS))
    boxes = fractions([OBJECT, PARTIAL])
    np.testing.assert_allclose(one.boxes(boxes), other.boxes(boxes), atol=1e-5)


def test_integer_pixels_are_rounded_to_nearest():
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    exact = transform([7, 11]).image(image).numpy()
    np.testing.assert_array_equal(
        transform([7, 11]).image(image, tf.uint8), np.floor(exact + np.float32(0.5))
    )


def test_records_without_objects():
    moved = transform([8, 12], True, crop=[1, 0, 5, 4])
    assert moved.masks(np.zeros((0, 4, 6), np.uint8)).shape == (0, 8, 12)
    assert moved.boxes(np.zeros((0, 4), np.float32)).shape == (0, 4)
    assert moved.proposals(np.zeros((0, 4), np.float32), tf.constant([0, 0])).shape == (0, 4)
