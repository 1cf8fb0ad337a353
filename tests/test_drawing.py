"""Boxes are drawn where they are, in one colour a class."""

import numpy as np

from keras_fpn.drawing import draw_detections

GREY = np.full((100, 160, 3), 128, "uint8")


def draw(labels, scores=None, boxes=None):
    count = len(labels)
    detections = {
        "boxes": np.array(boxes or [[20, 40, 90, 80]] * count, "float32"),
        "scores": np.array(scores or [0.9] * count),
        "labels": np.array(labels),
    }
    return np.asarray(draw_detections(GREY, detections, ["cat", "dog"]))


def changed(picture):
    return (picture != GREY).any(-1)


def test_the_outline_is_drawn_and_nothing_inside_it():
    different = changed(draw([0]))
    assert different[60, 20]
    assert different[60, 90]
    assert different[80, 50]
    assert not different[50:70, 30:80].any()
    assert not different[:, 100:].any()


def test_classes_have_colours_of_their_own_that_stay():
    cat, dog = draw([0])[60, 20], draw([1])[60, 20]
    assert tuple(cat) != tuple(dog)
    np.testing.assert_array_equal(draw([1, 0], boxes=[[0, 0, 9, 9], [20, 40, 90, 80]])[60, 20], cat)


def test_padding_rows_are_left_out():
    assert not changed(draw([-1, -1])).any()


def test_labels_of_boxes_at_the_edge_stay_in_the_picture():
    picture = draw([1], boxes=[[150, 0, 159, 20]])
    different = changed(picture)
    # The text's background is wider than the box, and is moved to the left of it.
    assert different[2:10, 110:150].any()


def test_the_image_itself_is_left_as_it_was():
    draw([0])
    assert (GREY == 128).all()
