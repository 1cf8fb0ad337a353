"""What was exported once, for several test files."""

import fcntl
import os

import keras
import numpy as np
import pytest
import tensorflow as tf
from answers import CLASS_NAMES, EDGES, IMAGE_SHAPE, MAX_IMAGES, MAX_PIXELS, SIZES
from pixels import bilinear, noise
from small_detector import two_level_detector

import keras_fpn
from keras_fpn.serving.saved_model import export_saved_model


def eager_detector(**arguments) -> keras_fpn.FasterRCNN:
    """A detector of two levels; tracing it takes longer than a few batches."""
    model = two_level_detector(**arguments)
    model.run_eagerly = True
    return model


@pytest.fixture(scope="session")
def detector() -> keras_fpn.FasterRCNN:
    """A detector that finds a few objects in noise, fewer than it has rows for."""
    keras.utils.set_random_seed(0)
    all_kept = eager_detector()
    scores = [
        all_kept.predict(bilinear(noise(*own), *new)[None].astype("float32"), verbose=0)["scores"]
        for own, new in SIZES.items()
    ]
    # Between two scores of every image, and so not at the mercy of rounding.
    gaps = np.sort(np.concatenate(scores, axis=None))
    middle = gaps[len(gaps) // 4 :][: len(gaps) // 2]
    widest = np.diff(middle).argmax()
    detector = eager_detector(score_threshold=float(middle[widest : widest + 2].mean()))
    detector.set_weights(all_kept.get_weights())
    return detector


@pytest.fixture(scope="session")
def fixed_detector(detector) -> keras_fpn.FasterRCNN:
    """The same for one shape of images."""
    threshold = detector.detections.score_threshold
    fixed = eager_detector(image_shape=IMAGE_SHAPE, score_threshold=threshold)
    fixed.set_weights(detector.get_weights())
    return fixed


@pytest.fixture(scope="session")
def export_once(tmp_path_factory):
    """A function that exports, unless another process of pytest-xdist has, and returns the path."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def export(name, model, **options):
        path = root / name / "detector" / "1"
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                export_saved_model(model, path, class_names=CLASS_NAMES, **EDGES, **options)
        return path

    return export


@pytest.fixture(scope="session")
def exported(detector, export_once):
    """The detector as exported by default."""
    return export_once("plain", detector)


@pytest.fixture(scope="session")
def exported_with_options(fixed_detector, export_once):
    """A detector of one shape, frozen, with limits, whose bad files have an `error`."""
    return export_once(
        "with_options",
        fixed_detector,
        frozen=True,
        errors_as_output=True,
        max_images=MAX_IMAGES,
        max_pixels=MAX_PIXELS,
        warm_up=False,
    )


@pytest.fixture(scope="session")
def signatures(exported):
    return tf.saved_model.load(str(exported)).signatures


@pytest.fixture(scope="session")
def signatures_with_options(exported_with_options):
    return tf.saved_model.load(str(exported_with_options)).signatures
