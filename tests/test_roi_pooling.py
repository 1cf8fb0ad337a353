"""RoIAlign equals torchvision's, and an implementation by loops."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops
from keras.ops import convert_to_numpy
from reference.weights import reference_features, reference_uniform

from keras_fpn.roi_pooling import PyramidRoIAlign


@pytest.fixture(scope="module")
def stored():
    with np.load(Path(__file__).parent / "reference" / "roi_align.npz") as archive:
        return dict(archive)


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


def test_equals_the_reference(stored, features, boxes):
    pooled = convert_to_numpy(PyramidRoIAlign()(features, boxes))
    assert pooled.shape == (2, 40, 7, 7, 4)
    pooled = np.concatenate([pooled[0], pooled[1, : len(stored["boxes_1"])]])
    np.testing.assert_allclose(pooled, stored["output"], rtol=0, atol=1e-5)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="gradients are taken with TensorFlow's GradientTape",
)
def test_gradient_equals_the_reference(stored, features, boxes):
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
        total = ops.sum(PyramidRoIAlign()(maps, regions) * projection)
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


def by_loops(features, box, level, bins, sampling_ratio):
    x1, y1, x2, y2 = box.astype("float64") / 2**level
    height, width = max(y2 - y1, 1) / bins, max(x2 - x1, 1) / bins
    pooled = np.zeros((bins, bins, features.shape[-1]))
    for i in range(bins):
        for j in range(bins):
            for v in range(sampling_ratio):
                for h in range(sampling_ratio):
                    row = y1 + (i + (v + 0.5) / sampling_ratio) * height
                    column = x1 + (j + (h + 0.5) / sampling_ratio) * width
                    pooled[i, j] += bilinear(features, row, column)
    return pooled / sampling_ratio**2


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
