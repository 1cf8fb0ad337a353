"""RoIAlign equals torchvision's, and an implementation by loops."""

import json
import math
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops
from keras.ops import convert_to_numpy
from reference.weights import reference_features, reference_uniform

from keras_fpn.roi_align import PyramidRoIAlign

# Torchvision's pooling is that of the defaults.
DETECTRON2 = {"aligned": True, "sampling_ratio": None}


@pytest.fixture(scope="module", params=["roi_align", "detectron2_roi_align"])
def stored(request):
    with np.load(Path(__file__).parent / "reference" / f"{request.param}.npz") as archive:
        return {"name": request.param, **archive}


@pytest.fixture(scope="module")
def pooling(stored):
    return PyramidRoIAlign(**(DETECTRON2 if stored["name"] == "detectron2_roi_align" else {}))


@pytest.fixture(scope="module")
def features(stored):
    config = json.loads(str(stored["config"]))
    height, width, channels = (config[name] for name in ("height", "width", "channels"))
    return {
        f"P{level}": reference_features(
            f"roi_align P{level}", 2, height // 2**level, width // 2**level, channels
        )
        for level in range(2, 6)
    }


@pytest.fixture(scope="module")
def boxes(stored):
    """Both images' regions as one array, the second filled up with zeros."""
    boxes = np.zeros((2, len(stored["boxes_0"]), 4), "float32")
    boxes[0] = stored["boxes_0"]
    boxes[1, : len(stored["boxes_1"])] = stored["boxes_1"]
    return boxes


def test_equals_the_reference(stored, pooling, features, boxes):
    pooled = convert_to_numpy(pooling(features, boxes))
    assert pooled.shape == (2, 40, 7, 7, 4)
    pooled = np.concatenate([pooled[0], pooled[1, : len(stored["boxes_1"])]])
    np.testing.assert_allclose(pooled, stored["output"], rtol=0, atol=1e-5)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="gradients are taken with TensorFlow's GradientTape",
)
def test_gradient_equals_the_reference(stored, pooling, features, boxes):
    import tensorflow as tf

    steps = json.loads(str(stored["config"]))["gradient_step"]
    projection = np.zeros((2, 40, 7, 7, 4), "float32")
    count = len(stored["output"])
    given = reference_uniform("roi_align projection", (count, 7, 7, 4))
    projection[0], projection[1, : count - 40] = given[:40], given[40:]
    maps = {level: tf.constant(x) for level, x in features.items()}
    regions = tf.constant(boxes)
    with tf.GradientTape() as tape:
        tape.watch([maps, regions])
        total = ops.sum(pooling(maps, regions) * projection)
    gradients, by_regions = tape.gradient(total, [maps, regions])
    assert by_regions is None, "regions are constants (Fast R-CNN)"
    for level, gradient in gradients.items():
        gradient = convert_to_numpy(gradient).astype("float64")
        step = steps[level]
        theirs = stored[f"gradient_{level}"]
        np.testing.assert_allclose(
            gradient[:, ::step, ::step], theirs, rtol=0, atol=1e-5 * np.abs(theirs).max()
        )
        norm = stored[f"gradient_{level}_norm"]
        assert np.linalg.norm(gradient) == pytest.approx(norm, rel=1e-5)
        along = (gradient * reference_uniform(f"roi_align {level} gradient", gradient.shape)).sum()
        assert along == pytest.approx(stored[f"gradient_{level}_projection"], abs=1e-5 * norm)


def bilinear(x, row, column):
    height, width, _ = x.shape
    if row < -1 or row > height or column < -1 or column > width:
        return np.zeros(x.shape[-1])
    row, column = min(max(row, 0), height - 1), min(max(column, 0), width - 1)
    top, left = int(row), int(column)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    v, h = row - top, column - left
    upper = (1 - h) * x[top, left] + h * x[top, right]
    lower = (1 - h) * x[bottom, left] + h * x[bottom, right]
    return (1 - v) * upper + v * lower


def by_loops(features, box, level, bins, sampling_ratio, aligned=False):
    x1, y1, x2, y2 = box.astype("float64") / 2**level - (0.5 if aligned else 0)
    height, width = y2 - y1, x2 - x1
    if not aligned:
        height, width = max(height, 1), max(width, 1)
    rows, columns = (sampling_ratio or math.ceil(side / bins) for side in (height, width))
    pooled = np.zeros((bins, bins, features.shape[-1]))
    for i in range(bins):
        for j in range(bins):
            for v in range(rows):
                for h in range(columns):
                    row = y1 + (i + (v + 0.5) / rows) * height / bins
                    column = x1 + (j + (h + 0.5) / columns) * width / bins
                    pooled[i, j] += bilinear(features, row, column)
    return pooled / max(rows * columns, 1)


@pytest.mark.parametrize(("bins", "sampling_ratio"), [(7, 2), (3, 1), (2, 3)])
def test_equals_the_loops_at_other_numbers(bins, sampling_ratio):
    random = np.random.RandomState(0)
    features = {
        "P3": random.normal(size=(2, 9, 11, 3)).astype("float32"),
        "P4": random.normal(size=(2, 5, 6, 3)).astype("float32"),
    }
    corners = random.uniform(-20, 70, (2, 12, 2))
    boxes = np.concatenate([corners, corners + random.uniform(0, 60, (2, 12, 2))], axis=-1)
    boxes = boxes.astype("float32")
    layer = PyramidRoIAlign(bins, sampling_ratio, canonical_level=4, canonical_size=32)
    pooled = convert_to_numpy(layer(features, boxes))
    used = set()
    for image in range(2):
        for region, box in enumerate(boxes[image]):
            area = (box[2] - box[0]) * (box[3] - box[1])
            level = 4 if area >= 32 * 32 else 3
            used.add(level)
            expected = by_loops(features[f"P{level}"][image], box, level, bins, sampling_ratio)
            np.testing.assert_allclose(pooled[image, region], expected, atol=1e-5)
    assert used == {3, 4}
    shapes = {level: x.shape for level, x in features.items()}
    assert layer.compute_output_shape(shapes, boxes.shape) == pooled.shape


def test_coordinates_stay_float32_under_mixed_precision():
    # A pixel's value is its column, counted from the hundredth. 401 and 405 are no bfloat16.
    ramp = np.broadcast_to(np.arange(128, dtype="float32")[:, None] - 100, (1, 8, 128, 1))
    boxes = np.array([[[401, 0, 405, 28]]], "float32")
    pooled = PyramidRoIAlign(output_size=1, dtype="mixed_bfloat16")({"P2": ramp}, boxes)
    assert keras.backend.standardize_dtype(pooled.dtype) == "bfloat16"
    assert convert_to_numpy(ops.cast(pooled, "float32")).item() == (401 + 405) / 2 / 4 - 100


# In float32 the position of a point at column 336 is known to 3e-5 pixels.
ROUNDING = 5e-5
# On images of 64 x 1344, whose levels are 16 x 336 (P2) to 2 x 42 (P5).
EXTREME_BOXES = {
    "wide: 48 points a bin on P2": [0, 10, 1333, 12],
    "wide, on P3": [0, 20.5, 1340.3, 31],
    "high": [3, 0, 5.5, 64],
    "all of the image": [0, 0, 1344, 64],
    "beyond the image": [-300, -200, 1600, 500],
    "outside the image": [-90, -80, -50, -40],
    "over the first edges": [-9, -7, 30, 20],
    "over the last edges": [1310, 45, 1353, 71],
    # Three points a bin along x, one along y: 84 / 4 / 7 and 28 / 4 / 7.
    "whole points": [8, 4, 92, 32],
    "just over whole points": [8, 4, 92.00001, 32.00001],
    "the largest square of P2": [500.3, 0.2, 611.9, 63.9],
    "small": [700.1, 30.2, 703, 34],
    "thinner than a thousandth": [700, 3, 700.0005, 50],
    "point": [700, 30, 700, 30],
    "turned around": [720, 50, 700, 30],
}


def level_of(box):
    area = max((box[2] - box[0]) * (box[3] - box[1]), 1e-6)
    return min(max(math.floor(4 + math.log2(math.sqrt(area) / 224)), 2), 5)


@pytest.fixture(scope="module")
def wide_features():
    random = np.random.RandomState(0)
    return {
        f"P{level}": random.normal(size=(2, 64 >> level, 1344 >> level, 3)).astype("float32")
        for level in range(2, 6)
    }


@pytest.fixture(scope="module")
def extreme_boxes():
    boxes = np.array(list(EXTREME_BOXES.values()), "float32")
    return np.stack([boxes, boxes[::-1]])


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [2, None])
def test_equals_the_loops_for_regions_of_any_shape(
    wide_features, extreme_boxes, sampling_ratio, aligned
):
    layer = PyramidRoIAlign(sampling_ratio=sampling_ratio, aligned=aligned)
    pooled = convert_to_numpy(layer(wide_features, extreme_boxes))
    assert {level_of(box) for box in extreme_boxes[0]} == {2, 3, 4, 5}
    for image, names in enumerate((list(EXTREME_BOXES), list(EXTREME_BOXES)[::-1])):
        for name, box, found in zip(names, extreme_boxes[image], pooled[image], strict=True):
            level = level_of(box)
            features = wide_features[f"P{level}"][image]
            expected = by_loops(features, box, level, 7, sampling_ratio, aligned)
            np.testing.assert_allclose(found, expected, atol=ROUNDING, err_msg=name)


@pytest.mark.parametrize("bins", [1, 3, 14])
def test_adaptive_sampling_equals_the_loops_at_other_numbers_of_bins(bins):
    random = np.random.RandomState(0)
    features = {"P3": random.normal(size=(1, 29, 41, 2)).astype("float32")}
    corners = random.uniform(-20, 200, (1, 30, 2))
    boxes = np.concatenate([corners, corners + random.uniform(0, 300, (1, 30, 2))], axis=-1)
    boxes = boxes.astype("float32")
    layer = PyramidRoIAlign(bins, sampling_ratio=None, aligned=True)
    pooled = convert_to_numpy(layer(features, boxes))
    for box, found in zip(boxes[0], pooled[0], strict=True):
        expected = by_loops(features["P3"][0], box, 3, bins, None, aligned=True)
        np.testing.assert_allclose(found, expected, atol=ROUNDING)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="graphs of unknown sizes are TensorFlow's"
)
@pytest.mark.parametrize("jit_compile", [False, True])
def test_adaptive_sampling_in_a_graph_and_under_xla(wide_features, extreme_boxes, jit_compile):
    import tensorflow as tf

    layer = PyramidRoIAlign(sampling_ratio=None, aligned=True)
    unknown = {level: tf.TensorSpec((None, None, None, 3)) for level in wide_features}
    count = extreme_boxes.shape[1]
    pool = tf.function(
        layer, input_signature=[unknown, tf.TensorSpec((None, count, 4))], jit_compile=jit_compile
    )
    expected = layer(wide_features, extreme_boxes)
    found = pool(wide_features, extreme_boxes)
    np.testing.assert_allclose(found, expected, atol=ROUNDING)
    # Another size and number of images, through the same graph.
    halves = {level: x[:1, :, : x.shape[2] // 2] for level, x in wide_features.items()}
    boxes = extreme_boxes[:1] * np.array([0.5, 1, 0.5, 1], "float32")
    np.testing.assert_allclose(pool(halves, boxes), layer(halves, boxes), atol=ROUNDING)


def gradient(function, x, jit_compile):
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        @tf.function(jit_compile=jit_compile)
        def take(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = function(x)
            return tape.gradient(y, x)

        return convert_to_numpy(take(tf.constant(x)))
    if backend == "jax":
        import jax

        take = jax.grad(function)
        return convert_to_numpy((jax.jit(take) if jit_compile else take)(x))
    import torch

    x = torch.tensor(x, requires_grad=True)
    function(x).backward()
    return convert_to_numpy(x.grad)


@pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="gradients are taken as TensorFlow and JAX take them"
)
@pytest.mark.parametrize("jit_compile", [False, True])
def test_gradient_of_adaptive_sampling_is_the_weight_of_each_pixel(jit_compile):
    random = np.random.RandomState(0)
    features = random.normal(size=(2, 14, 17, 2)).astype("float32")
    corners = random.uniform(-10, 50, (2, 4, 2))
    boxes = np.concatenate([corners, corners + random.uniform(0, 90, (2, 4, 2))], axis=-1)
    boxes = boxes.astype("float32")
    upstream = random.normal(size=(2, 4, 3, 3, 2)).astype("float32")
    layer = PyramidRoIAlign(3, sampling_ratio=None, aligned=True)
    found = gradient(lambda x: ops.sum(layer({"P2": x}, boxes) * upstream), features, jit_compile)
    # One channel for each pixel, 1 there and 0 elsewhere: what is pooled are the weights.
    pixels = np.eye(14 * 17).reshape(14, 17, -1)
    for image in range(2):
        expected = np.zeros((14, 17, 2))
        for box, given in zip(boxes[image], upstream[image], strict=True):
            weights = by_loops(pixels, box, 2, 3, None, aligned=True)
            expected += np.einsum("ijp,ijc->pc", weights, given).reshape(14, 17, 2)
        np.testing.assert_allclose(found[image], expected, atol=1e-5)


def test_adaptive_sampling_adds_up_in_float32_under_mixed_precision():
    # 20 tiles a region: sums of bfloat16 would drift from the mean of equal values.
    features = {"P2": np.full((1, 50, 60, 1), 1.0, "float32")}
    boxes = np.array([[[0, 0, 240, 200]]], "float32")
    layer = PyramidRoIAlign(1, sampling_ratio=None, dtype="mixed_bfloat16")
    pooled = layer(features, boxes)
    assert keras.backend.standardize_dtype(pooled.dtype) == "bfloat16"
    assert convert_to_numpy(ops.cast(pooled, "float32")).item() == pytest.approx(1, abs=2**-7)


def test_config_holds_the_kind_of_sampling():
    layer = PyramidRoIAlign(sampling_ratio=None, aligned=True)
    copy = PyramidRoIAlign.from_config(layer.get_config())
    assert (copy.sampling_ratio, copy.aligned) == (None, True)
    assert (PyramidRoIAlign().sampling_ratio, PyramidRoIAlign().aligned) == (2, False)
