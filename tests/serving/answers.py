"""What a served detector is asked, and how its answers are held against others."""

import numpy as np
from pixels import bilinear

EDGES = {"shorter_edge": 64, "longest_edge": 96}
# Images by height and width, and what they are resized to: 64 / 40 and 96 / 70 are the scales.
SIZES = {(40, 50): (64, 80), (50, 40): (80, 64), (33, 70): (45, 96)}
CLASS_NAMES = ("bolt", "nut", "washer")
# Of the export with options.
IMAGE_SHAPE = (96, 128, 3)
MAX_IMAGES = 3
MAX_PIXELS = 3 * 40 * 50


def assert_predicted(answer, detector, images, atol=1e-4):
    """Holds outputs of a request against `predict` on the images resized and padded by hand.

    Boxes are compared in the pixels of the caller's images.
    """
    resized = [bilinear(image, *SIZES[image.shape[:2]]) for image in images]
    sizes = np.array([image.shape[:2] for image in resized])
    height, width = [
        largest if edge is None else edge
        for largest, edge in zip(sizes.max(axis=0), detector.image_shape, strict=False)
    ]
    batch = np.zeros((len(images), height, width, 3), "float32")
    for pixels, image in zip(batch, resized, strict=True):
        pixels[: image.shape[0], : image.shape[1]] = image
    wanted = detector.predict({"images": batch, "image_sizes": sizes}, verbose=0)
    answer = {name: np.asarray(value) for name, value in answer.items()}
    names = answer.pop("detection_class_names", None)
    np.testing.assert_array_equal(answer["num_detections"], wanted["num_detections"])
    for row, image in enumerate(images):
        count = wanted["num_detections"][row]
        assert 0 < count < len(answer["detection_scores"][row])
        height, width = image.shape[:2]
        scale = np.array([height, width, height, width])
        to_own = scale / np.tile(sizes[row], 2)
        np.testing.assert_allclose(
            answer["detection_boxes"][row, :count] * scale,
            wanted["boxes"][row, :count, [1, 0, 3, 2]].T * to_own,
            atol=atol,
        )
        np.testing.assert_allclose(
            answer["detection_scores"][row], wanted["scores"][row], atol=atol
        )
        labels = wanted["labels"][row, :count]
        np.testing.assert_array_equal(answer["detection_classes"][row, :count], labels)
        for name in ("detection_boxes", "detection_scores", "detection_classes"):
            assert not answer[name][row, count:].any()
        if names is not None:
            found = [name.decode() for name in names[row]]
            assert found[:count] == [CLASS_NAMES[label] for label in labels]
            assert set(found[count:]) == {""}


def assert_same_answer(answer, wanted):
    """Holds outputs, as arrays or nested lists, against those of a signature in Python."""
    assert set(answer) == set(wanted)
    for name, value in wanted.items():
        value, found = np.asarray(value), np.asarray(answer[name])
        if value.dtype == np.float32:
            assert np.asarray(found).shape == value.shape
            np.testing.assert_allclose(found, value, atol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(found.astype("S"), value.astype("S"), err_msg=name)
