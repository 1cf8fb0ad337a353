"""What every model refuses before it runs, and which steps `fit` takes."""

import types

import numpy as np
import pytest

import keras_fpn
from keras_fpn.detector import Detector

IMAGES = np.zeros((2, 48, 64, 3), "uint8")
TARGETS = {"boxes": np.float32([[[5, 6, 30, 20]]] * 2), "labels": np.int32([[0], [1]])}
MODELS = (keras_fpn.FasterRCNN, keras_fpn.RegionProposalNetwork, keras_fpn.FastRCNN)


def call(method, model, images, targets=TARGETS):
    """Calls a method of a model that has nothing but what its checks read."""
    inputs = images
    if model.takes_proposals:
        batch = len(images) if isinstance(images, np.ndarray) else 2
        inputs = {"images": images, "proposals": np.zeros((batch, 5, 4))}
    checked = types.SimpleNamespace(
        image_shape=(None, None, 3), takes_proposals=model.takes_proposals, num_classes=3
    )
    arguments = [inputs] if method == "predict" else [inputs, targets]
    getattr(model, method)(checked, *arguments)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "method", ["predict", "fit", "evaluate", "train_on_batch", "test_on_batch"]
)
class TestImages:
    @pytest.mark.parametrize(
        ("images", "received"),
        [
            ([IMAGES[0]], r"list of length 1 with arrays of shape \(48, 64, 3\)"),
            ([IMAGES[0], IMAGES[1, :9]], r"arrays of shape \(48, 64, 3\) and \(9, 64, 3\)"),
            (None, "None"),
            (IMAGES.tolist(), "list of length 2"),
        ],
    )
    def test_images_that_are_no_batch_are_refused(self, model, method, images, received):
        with pytest.raises(ValueError, match=rf"^Images must be .*; received .*{received}\.$"):
            call(method, model, images)

    def test_a_batch_has_an_image(self, model, method):
        with pytest.raises(
            ValueError, match=r"at least one image; received shape \(0, 48, 64, 3\)"
        ):
            call(method, model, IMAGES[:0])

    def test_ragged_images_are_refused(self, model, method):
        tf = pytest.importorskip("tensorflow")
        with pytest.raises(ValueError, match=r"^Images must be .*; received RaggedTensor"):
            call(method, model, tf.ragged.stack([IMAGES[0], IMAGES[1, :9]]))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", ["fit", "evaluate", "train_on_batch", "test_on_batch"])
class TestTargets:
    @pytest.mark.parametrize(
        ("targets", "received"),
        [
            (
                TARGETS | {"labels": [[0], [1, 2]]},
                "'labels' must be .* received a list of length 2",
            ),
            (TARGETS | {"boxes": TARGETS["boxes"].tolist()}, "'boxes' must be .*received a list"),
            ([TARGETS], "received list"),
            (None, "received none"),
            ({name: x[:1] for name, x in TARGETS.items()}, "2 images; received 1"),
            (TARGETS | {"labels": np.zeros((2, 3))}, r"shapes \(2, 1, 4\) and \(2, 3\)"),
        ],
    )
    def test_targets_that_are_no_arrays_of_the_batch_are_refused(
        self, model, method, targets, received
    ):
        with pytest.raises(ValueError, match=received):
            call(method, model, IMAGES, targets)

    def test_targets_are_numbers(self, model, method):
        with pytest.raises(TypeError, match=r"^'labels' must hold numbers; received dtype str"):
            call(method, model, IMAGES, TARGETS | {"labels": TARGETS["labels"].astype(str)})

    def test_ragged_targets_are_refused(self, model, method):
        tf = pytest.importorskip("tensorflow")
        labels = tf.ragged.constant([[0], [1, 2]])
        with pytest.raises(ValueError, match=r"'labels' must be .*; received RaggedTensor"):
            call(method, model, IMAGES, TARGETS | {"labels": labels})


@pytest.mark.parametrize("method", ["fit", "evaluate", "train_on_batch", "test_on_batch"])
def test_weights_of_samples_are_not_supported(detector, method):
    with pytest.raises(ValueError, match="`sample_weight` is not supported"):
        getattr(detector, method)(IMAGES, TARGETS, sample_weight=np.ones(2))


@pytest.mark.parametrize("method", ["fit", "evaluate"])
def test_ragged_elements_of_a_data_set_are_refused(detector, method):
    tf = pytest.importorskip("tensorflow")
    labels = TARGETS | {"labels": tf.ragged.constant([[0], [1, 2]])}
    dataset = tf.data.Dataset.from_tensors((IMAGES, labels))
    with pytest.raises(ValueError, match=r"'labels' must be .*; received RaggedTensor"):
        getattr(detector, method)(dataset)


def test_the_first_batch_of_a_data_set_has_an_image(detector):
    tf = pytest.importorskip("tensorflow")
    targets = {name: x[:0] for name, x in TARGETS.items()}
    with pytest.raises(ValueError, match=r"at least one image; received shape \(0, 48, 64, 3\)"):
        detector.fit(tf.data.Dataset.from_tensors((IMAGES[:0], targets)))


def test_the_initial_step_counts_steps_not_executions(monkeypatch):
    step = pytest.importorskip("keras_fpn.tensorflow_step")
    taken = []
    monkeypatch.setattr(
        step, "function_of_iterator", lambda *_: lambda _, number: (taken.append(number), {})
    )
    model = types.SimpleNamespace(
        train_function=None, train_step=None, steps_per_execution=4, _steps_to_skip=6
    )
    Detector.make_train_function(model)
    assert model.train_function(None) == {}
    model.train_function(None)
    model.train_function(None)
    assert taken == [2, 4]
