"""Anchors are torchvision's, number for number."""

import json
from pathlib import Path

import numpy as np
import pytest
from keras.ops import convert_to_numpy

from keras_fpn.anchors import AnchorGenerator

with np.load(Path(__file__).parent / "reference" / "anchors.npz") as archive:
    STORED = dict(archive)
FRAMES = json.loads(str(STORED["config"]))["frames"]


def empty_maps(height, width):
    sizes = {f"P{level}": (height // 2**level, width // 2**level) for level in range(2, 6)}
    sizes["P6"] = tuple((side + 1) // 2 for side in sizes["P5"])
    return {level: np.zeros((1, *size, 1), "float32") for level, size in sizes.items()}


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: "x".join(map(str, frame)))
def test_anchors_equal_the_reference(frame):
    height, width = frame
    layer = AnchorGenerator()
    maps = empty_maps(height, width)
    anchors = layer(np.zeros((1, height, width, 1), "float32"), maps)
    shapes = layer.compute_output_shape((1, *frame, 1), {name: x.shape for name, x in maps.items()})
    for level, values in anchors.items():
        values, key = convert_to_numpy(values), f"{height}x{width}_{level}"
        assert values.shape == (STORED[f"{key}_count"], 4) == shapes[level]
        np.testing.assert_array_equal(values[:6], STORED[f"{key}_first"])
        np.testing.assert_array_equal(values[-6:], STORED[f"{key}_last"])
        np.testing.assert_array_equal(values[::997], STORED[f"{key}_every_997"])
        # Whole numbers: both sums are exact.
        values = values.astype("float64")
        np.testing.assert_array_equal(values.sum(axis=0), STORED[f"{key}_sum"])
        np.testing.assert_array_equal(np.arange(len(values)) @ values, STORED[f"{key}_sum_by_row"])


ONE_PIXEL = (np.zeros((1, 8, 8, 3)), {"P3": np.zeros((1, 1, 1, 4))})


def test_anchors_by_hand():
    layer = AnchorGenerator((32,), aspect_ratios=(0.5, 1, 2))
    images, maps = np.zeros((2, 16, 24, 3)), {"P3": np.zeros((2, 2, 3, 4))}
    anchors = convert_to_numpy(layer(images, maps)["P3"]).reshape(2, 3, 3, 4)
    # 32 * sqrt(2) = 45.25 and 32 / sqrt(2) = 22.63, halved and rounded.
    cell = np.array([[-23, -11, 23, 11], [-16, -16, 16, 16], [-11, -23, 11, 23]])
    for row in range(2):
        for column in range(3):
            shift = [8 * column, 8 * row, 8 * column, 8 * row]
            np.testing.assert_array_equal(anchors[row, column], cell + shift)
    assert layer.anchors_per_location == 3


def test_several_sizes_per_level_by_hand():
    layer = AnchorGenerator(((32, 64), (128, 256)), aspect_ratios=(1, 4))
    images = np.zeros((1, 16, 16, 3))
    maps = {"P3": np.zeros((1, 2, 2, 4)), "P4": np.zeros((1, 1, 1, 4))}
    anchors = {level: convert_to_numpy(x) for level, x in layer(images, maps).items()}
    # Size by size, at each size ratio by ratio: a ratio of 4 doubles the height, halves the width.
    cell = np.array([[-16, -16, 16, 16], [-8, -32, 8, 32], [-32, -32, 32, 32], [-16, -64, 16, 64]])
    np.testing.assert_array_equal(anchors["P3"][:4], cell)
    np.testing.assert_array_equal(anchors["P3"][12:], cell + 8)
    np.testing.assert_array_equal(anchors["P4"], 4 * cell)
    assert layer.anchors_per_location == 4
    shapes = layer.compute_output_shape(images.shape, {k: x.shape for k, x in maps.items()})
    assert shapes == {level: x.shape for level, x in anchors.items()}


def test_the_nested_spelling_of_torchvision_is_the_same():
    flat = AnchorGenerator((32, 64), (0.5, 2.0))
    nested = AnchorGenerator(((32,), (64,)), ((0.5, 2.0),) * 2)
    lists = AnchorGenerator([[32], [64]], [[0.5, 2.0]] * 2)
    maps = {"P2": np.zeros((1, 4, 4, 1)), "P3": np.zeros((1, 2, 2, 1))}
    expected = flat(np.zeros((1, 16, 16, 3)), maps)
    assert flat.sizes == nested.sizes == lists.sizes
    for layer in (nested, lists):
        assert layer.anchors_per_location == 2
        for level, anchors in layer(np.zeros((1, 16, 16, 3)), maps).items():
            np.testing.assert_array_equal(
                convert_to_numpy(anchors), convert_to_numpy(expected[level])
            )


def test_each_level_has_its_own_ratios():
    maps = {"P2": np.zeros((1, 1, 1, 1)), "P3": np.zeros((1, 1, 1, 1))}
    anchors = AnchorGenerator((32, 64), ((1.0,), (4.0,)))(np.zeros((1, 4, 4, 3)), maps)
    np.testing.assert_array_equal(convert_to_numpy(anchors["P2"]), [[-16, -16, 16, 16]])
    np.testing.assert_array_equal(convert_to_numpy(anchors["P3"]), [[-16, -64, 16, 64]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": (32, 64), "strides": (4,)}, r"`strides` .* 2 levels .*; received \(4,\)"),
        (
            {"sizes": (32, 64), "aspect_ratios": ((1.0,),)},
            r"`aspect_ratios` .* 2 levels .*; received \(\(1\.0,\),\)",
        ),
        ({"sizes": (32, 0)}, r"`sizes` .*; received 0"),
        ({"sizes": (32, float("nan"))}, r"`sizes` .*; received nan"),
        ({"sizes": float("inf")}, r"`sizes` must be a sequence .*; received inf"),
        ({"aspect_ratios": "1"}, r"`aspect_ratios` must be a sequence .*; received '1'"),
        ({"strides": 4}, r"`strides` must be a sequence .*; received 4"),
        ({"sizes": ()}, r"`sizes` .*; received \(\)"),
        ({"aspect_ratios": (1.0, -1.0)}, r"`aspect_ratios` .*received .*-1\.0"),
        ({"sizes": ((32, 64), (128,))}, r"same number .*received sizes \(\(32, 64\), \(128,\)\)"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AnchorGenerator(**arguments)


def test_every_map_needs_a_size():
    maps = {"P2": np.zeros((1, 2, 2, 1)), "P3": np.zeros((1, 1, 1, 1))}
    with pytest.raises(ValueError, match=r"received the sizes \(\(32,\),\) and maps of P2, P3"):
        AnchorGenerator((32,))(np.zeros((1, 8, 8, 3)), maps)


def test_an_unknown_size_gives_an_unknown_count():
    shapes = AnchorGenerator((32,)).compute_output_shape(
        (None, None, None, 3), {"P2": (None, None, 8, 256)}
    )
    assert shapes == {"P2": (None, 4)}


def test_unrounded_anchors_by_hand():
    layer = AnchorGenerator((32,), aspect_ratios=(0.5, 1, 2), rounded=False)
    # Detectron2: width sqrt(32 * 32 / ratio), height ratio * width; 45.254834 and 22.627417.
    expected = [
        [-22.627417, -11.3137085, 22.627417, 11.3137085],
        [-16, -16, 16, 16],
        [-11.3137085, -22.627417, 11.3137085, 22.627417],
    ]
    np.testing.assert_allclose(convert_to_numpy(layer(*ONE_PIXEL)["P3"]), expected, rtol=1e-7)


def test_strides_of_their_own():
    # 100 // 13 would be 7.
    images, maps = np.zeros((1, 100, 100, 3)), {"P3": np.zeros((1, 13, 13, 4))}
    layer = AnchorGenerator((32,), aspect_ratios=(1,), strides=(8,))
    anchors = convert_to_numpy(layer(images, maps)["P3"]).reshape(13, 13, 4)
    np.testing.assert_array_equal(anchors[2, 12], [80, 0, 112, 32])
    anchors = convert_to_numpy(AnchorGenerator((32,), (1,))(images, maps)["P3"])
    np.testing.assert_array_equal(anchors.reshape(13, 13, 4)[2, 12], [68, -2, 100, 30])


def test_config_holds_rounding_and_strides():
    layer = AnchorGenerator((32,), rounded=False, strides=(4,))
    copy = AnchorGenerator.from_config(layer.get_config())
    assert (copy.rounded, copy.strides) == (False, (4,))
    assert (AnchorGenerator().rounded, AnchorGenerator().strides) == (True, None)
