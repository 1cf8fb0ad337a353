from pathlib import Path

import numpy as np
import pytest
from keras.ops import convert_to_numpy

from keras_fpn.roi_levels import assign_levels

PAPER = {"min_level": 2, "max_level": 5, "canonical_level": 4, "canonical_size": 224}


@pytest.mark.parametrize(
    ("width", "height", "level"),
    [
        (224, 224, 4),  # Eqn. 1: k0
        (112, 112, 3),
        (448, 448, 5),
        (448, 112, 4),  # the area counts, not the shape
        (223.75, 223.75, 3),
        (111.75, 112, 2),
        (447.5, 448, 4),
        (10, 10, 2),
        (4000, 4000, 5),
        (0, 50, 2),
        (0, 0, 2),
    ],
)
def test_the_level_of_a_region(width, height, level):
    boxes = np.array([[[30.0, 20.0, 30.0 + width, 20.0 + height]]], "float32")
    levels = convert_to_numpy(assign_levels(boxes, **PAPER))
    assert levels.dtype == "int32"
    np.testing.assert_array_equal(levels, [[level]])


def test_levels_equal_the_reference():
    with np.load(Path(__file__).parent / "reference" / "roi_align.npz") as stored:
        boxes = np.concatenate([stored["boxes_0"], stored["boxes_1"]])
        np.testing.assert_array_equal(
            convert_to_numpy(assign_levels(boxes, **PAPER)), stored["levels"]
        )


def test_other_levels_and_another_canonical_size():
    boxes = np.array([[0, 0, side, side] for side in (4, 8, 16, 64)], "float32")
    levels = assign_levels(boxes, 1, 3, canonical_level=2, canonical_size=8)
    np.testing.assert_array_equal(convert_to_numpy(levels), [1, 2, 3, 3])
