"""RoI pooling equals torchvision's, and Caffe's definition written as loops."""

import json
import math
from fractions import Fraction
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops
from keras.ops import convert_to_numpy
from reference.weights import reference_features, reference_uniform

from keras_fpn.roi_pool import PyramidRoIPool


def round_like_c(x):
    return int(math.copysign(math.floor(abs(x) + 0.5), x))


def by_loops(features, box, level, bins):
    """Caffe's ROIPoolingLayer on one map: the maxima, and where each is (-1 in an empty bin)."""
    height, width, channels = features.shape
    x1, y1, x2, y2 = (round_like_c(value / 2**level) for value in box.tolist())
    bin_height = Fraction(max(y2 - y1 + 1, 1), bins)
    bin_width = Fraction(max(x2 - x1 + 1, 1), bins)
    pooled = np.zeros((bins, bins, channels), "float32")
    argmax = np.full((bins, bins, channels), -1)
    for i in range(bins):
        for j in range(bins):
            top, bottom = math.floor(i * bin_height) + y1, math.ceil((i + 1) * bin_height) + y1
            left, right = math.floor(j * bin_width) + x1, math.ceil((j + 1) * bin_width) + x1
            for c in range(channels):
                best = -math.inf
                for row in range(max(top, 0), min(bottom, height)):
                    for column in range(max(left, 0), min(right, width)):
                        if features[row, column, c] > best:
                            best = pooled[i, j, c] = features[row, column, c]
                            argmax[i, j, c] = row * width + column
    return pooled, argmax


def level_of(box, canonical_size=224):
    area = max((box[2] - box[0]) * (box[3] - box[1]), 1e-6)
    return min(max(math.floor(4 + math.log2(math.sqrt(area) / canonical_size)), 2), 5)


# On images of 64 x 672, whose levels are 16 x 168 (P2) to 2 x 21 (P5).
BOXES = {
    "wide: bins of 24 columns on P2": [0, 10, 669, 12],
    "high": [3, 0, 5.5, 64],
    "all of the image": [0, 0, 672, 64],
    "beyond the image": [-300, -200, 900, 500],
    "beyond, on P4": [100, -100, 400, 200],
    "outside the image": [-90, -80, -50, -40],
    "over the first edges": [-30, -26, 30, 20],
    "over the last edges": [630, 45, 693, 81],
    "halves, which are rounded up": [10, 14, 62, 50],
    "halves before the image": [-10, -6, 42, 30],
    "whole bins": [8, 4, 116, 28],
    "57 columns": [4, 4, 228, 11],
    "fewer pixels than bins": [300.1, 30.2, 309, 40],
    "point": [300, 30, 300, 30],
    "turned around": [320, 50, 300, 30],
}


@pytest.fixture(scope="module")
def features():
    """Rounded as if after a ReLU: of equal maxima the first counts."""
    random = np.random.RandomState(0)
    return {
        f"P{level}": np.maximum(random.randint(-3, 6, (2, 64 >> level, 672 >> level, 2)), 0).astype(
            "float32"
        )
        for level in range(2, 6)
    }


@pytest.fixture(scope="module")
def boxes():
    boxes = np.array(list(BOXES.values()), "float32")
    return np.stack([boxes, boxes[::-1]])


@pytest.fixture(scope="module")
def expected(features, boxes):
    """Maxima, and the gradients of their sum weighted by `upstream`."""
    pooled = np.zeros((2, len(BOXES), 7, 7, 2), "float32")
    gradients = {level: np.zeros_like(x) for level, x in features.items()}
    for image, region in np.ndindex(pooled.shape[:2]):
        box = boxes[image, region]
        level = level_of(box)
        pooled[image, region], argmax = by_loops(features[f"P{level}"][image], box, level, 7)
        for i, j, c in np.ndindex(argmax.shape):
            if argmax[i, j, c] >= 0:
                gradient = gradients[f"P{level}"][image].reshape(-1, 2)
                gradient[argmax[i, j, c], c] += upstream()[image, region, i, j, c]
    return pooled, gradients


def upstream():
    """Whole numbers, whose sums are exact."""
    return np.random.RandomState(1).randint(-9, 10, (2, len(BOXES), 7, 7, 2)).astype("float32")


@pytest.mark.parametrize("at_a_time", [15, 4, 1])
def test_equals_the_loops_for_regions_of_any_shape(
    features, boxes, expected, at_a_time, monkeypatch
):
    monkeypatch.setattr("keras_fpn.roi_pool.CHUNK_NUMBERS", at_a_time * 7 * 7 * 2)
    assert {level_of(box) for box in boxes[0]} == {2, 3, 4, 5}
    layer = PyramidRoIPool()
    pooled = convert_to_numpy(layer(features, boxes))
    for region, name in enumerate(BOXES):
        np.testing.assert_array_equal(pooled[0, region], expected[0][0, region], err_msg=name)
    np.testing.assert_array_equal(pooled, expected[0])


@pytest.mark.parametrize(("bins", "canonical_size"), [(2, 224), (3, 112), (14, 56)])
def test_equals_the_loops_at_other_numbers(features, boxes, bins, canonical_size):
    layer = PyramidRoIPool(bins, canonical_size=canonical_size)
    pooled = convert_to_numpy(layer(features, boxes))
    assert layer.compute_output_shape(
        {level: x.shape for level, x in features.items()}, boxes.shape
    ) == (2, len(BOXES), bins, bins, 2)
    for box, found in zip(boxes[0], pooled[0], strict=True):
        level = level_of(box, canonical_size)
        expected, _ = by_loops(features[f"P{level}"][0], box, level, bins)
        np.testing.assert_array_equal(found, expected)


def test_a_region_includes_the_pixels_of_both_its_corners():
    pixels = np.arange(64, dtype="float32").reshape(1, 8, 8, 1)
    # From column 2 and row 1 to column 5 and row 3 of the map.
    boxes = np.array([[[8, 4, 20, 12]]], "float32")
    pooled = convert_to_numpy(PyramidRoIPool(2)({"P2": pixels}, boxes))
    # Four columns are 2 and 2; of three rows the middle one belongs to both.
    np.testing.assert_array_equal(pooled[0, 0, :, :, 0], [[19, 21], [27, 29]])


def test_one_map_serves_regions_of_any_size():
    random = np.random.RandomState(0)
    features = {"P4": random.normal(size=(1, 5, 8, 3)).astype("float32")}
    boxes = np.array([[[3, 5, 20, 30], [0, 0, 127, 79]]], "float32")
    pooled = convert_to_numpy(PyramidRoIPool(2)(features, boxes))
    for box, found in zip(boxes[0], pooled[0], strict=True):
        np.testing.assert_array_equal(found, by_loops(features["P4"][0], box, 4, 2)[0])


def test_mixed_precision_pools_the_rounded_features():
    # 301 and 303 are no bfloat16; as pixels of the map they stay apart.
    ramp = np.broadcast_to(np.arange(128, dtype="float32")[:, None], (1, 8, 128, 1))
    boxes = np.array([[[301, 0, 303, 28], [305, 0, 311, 28]]], "float32")
    pooled = PyramidRoIPool(1, dtype="mixed_bfloat16")({"P2": ramp}, boxes)
    assert keras.backend.standardize_dtype(pooled.dtype) == "bfloat16"
    np.testing.assert_array_equal(convert_to_numpy(ops.cast(pooled, "float32")).ravel(), [76, 78])


def gradients(function, maps):
    """Gradients of a function of the maps that gives a scalar, on any backend."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        maps = {level: tf.constant(x) for level, x in maps.items()}
        with tf.GradientTape() as tape:
            tape.watch(maps)
            y = function(maps)
        return tape.gradient(y, maps)
    if backend == "jax":
        import jax

        return jax.jit(jax.grad(function))(maps)
    import torch

    maps = {level: torch.tensor(x, requires_grad=True) for level, x in maps.items()}
    function(maps).backward()
    return {level: x.grad for level, x in maps.items()}


def test_the_gradient_goes_to_the_pixel_of_the_maximum(features, boxes, expected):
    layer = PyramidRoIPool()
    found = gradients(lambda maps: ops.sum(ops.multiply(layer(maps, boxes), upstream())), features)
    for level, gradient in expected[1].items():
        assert gradient.any()
        np.testing.assert_array_equal(convert_to_numpy(found[level]), gradient, err_msg=level)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="graphs of unknown sizes are TensorFlow's"
)
@pytest.mark.parametrize("jit_compile", [False, True])
def test_graph_of_unknown_sizes_and_xla(features, boxes, expected, jit_compile):
    import tensorflow as tf

    layer = PyramidRoIPool()
    unknown = {level: tf.TensorSpec((None, None, None, 2)) for level in features}
    regions = tf.TensorSpec((None, len(BOXES), 4))

    @tf.function(input_signature=[unknown, regions], jit_compile=jit_compile)
    def pool(maps, boxes):
        with tf.GradientTape() as tape:
            tape.watch(maps)
            pooled = layer(maps, boxes)
            total = tf.reduce_sum(pooled * tf.constant(upstream())[: tf.shape(boxes)[0]])
        return pooled, tape.gradient(total, maps)

    pooled, gradients = pool(features, boxes)
    np.testing.assert_array_equal(pooled, expected[0])
    for level, gradient in expected[1].items():
        np.testing.assert_array_equal(gradients[level], gradient, err_msg=level)
    # Another size and number of images, through the same graph.
    halves = {level: x[:1, :, : x.shape[2] // 2] for level, x in features.items()}
    np.testing.assert_array_equal(pool(halves, boxes[:1])[0], layer(halves, boxes[:1]))


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="gradients are taken with TensorFlow's tape"
)
def test_regions_are_constants(features, boxes):
    import tensorflow as tf

    regions = tf.constant(boxes)
    with tf.GradientTape() as tape:
        tape.watch(regions)
        total = ops.sum(PyramidRoIPool()(features, regions))
    assert tape.gradient(total, regions) is None


def test_values_and_gradients_equal_torchvisions():
    with np.load(Path(__file__).parent / "reference" / "roi_pool.npz") as archive:
        stored = dict(archive)
    config = json.loads(str(stored["config"]))
    height, width, channels = (config[name] for name in ("height", "width", "channels"))
    maps = {
        f"P{level}": reference_features(
            f"roi_pool P{level}", 2, height // 2**level, width // 2**level, channels
        )
        for level in range(2, 6)
    }
    boxes = np.stack([stored["boxes_0"], stored["boxes_1"]])
    bins, size = config["output_size"], config["canonical_size"]
    upstream = reference_uniform("roi_pool projection", stored["output"].shape)
    upstream = upstream.reshape(*boxes.shape[:2], *upstream.shape[1:])
    layer = PyramidRoIPool(bins, canonical_size=size)
    pooled = convert_to_numpy(layer(maps, boxes))
    np.testing.assert_array_equal(pooled.reshape(stored["output"].shape), stored["output"])
    found = gradients(lambda maps: ops.sum(ops.multiply(layer(maps, boxes), upstream)), maps)
    for level, gradient in found.items():
        theirs = stored[f"gradient_{level}"]
        np.testing.assert_allclose(convert_to_numpy(gradient), theirs, rtol=0, atol=1e-5)


def test_config_round_trip():
    layer = PyramidRoIPool(14, canonical_level=5, canonical_size=112, name="pooling")
    copy = PyramidRoIPool.from_config(layer.get_config())
    assert copy.get_config() == layer.get_config()
    assert (copy.output_size, copy.canonical_level, copy.canonical_size) == (14, 5, 112)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"`output_size` .*; received 0"):
        PyramidRoIPool(0)
