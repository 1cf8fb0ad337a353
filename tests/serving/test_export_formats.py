"""What Keras's own `model.export` writes as ONNX and LiteRT answers as the model does."""

import keras
import numpy as np
import pytest
from small_detector import two_level_detector

# Sizes that are multiples of 32, upright and across, one that is padded inside, and a batch.
SHAPES = [(1, 64, 96), (1, 96, 64), (1, 70, 80), (2, 64, 96)]

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="exported from TensorFlow"
)


def batch(count, height, width):
    pixels = np.random.RandomState(0).randint(0, 256, (count, height, width, 3))
    sizes = np.tile(np.array([[height, width]], "int32"), (count, 1))
    return {"images": pixels.astype("float32"), "image_sizes": sizes}


def assert_answers(answer, wanted):
    """Holds the outputs of a runtime against those of `predict`."""
    assert wanted["num_detections"].min() > 0
    for name in ("labels", "num_detections"):
        np.testing.assert_array_equal(answer[name], wanted[name])
    np.testing.assert_allclose(answer["scores"], wanted["scores"], atol=1e-5)
    np.testing.assert_allclose(answer["boxes"], wanted["boxes"], atol=1e-3)


@pytest.fixture(scope="module")
def detector():
    """A detector of two levels and their subsample: converters take their time for each op."""
    keras.utils.set_random_seed(0)
    model = two_level_detector()
    model.run_eagerly = True  # Tracing takes longer than a few batches.
    return model


@pytest.fixture(scope="module")
def predictions(detector):
    """Batches, and what `predict` returns for them."""
    batches = [batch(*shape) for shape in SHAPES]
    return [(inputs, detector.predict(inputs, verbose=0)) for inputs in batches]


def test_onnx_answers_for_images_of_any_size(detector, predictions, tmp_path, monkeypatch):
    for package in ("onnx", "tf2onnx"):
        pytest.importorskip(package, reason=f"{package}, which exports to ONNX, is not installed")
    runtime = pytest.importorskip(
        "onnxruntime", reason="onnxruntime, which runs ONNX files, is not installed"
    )
    # tf2onnx would copy the graph before each of its optimizations, in case that one fails.
    monkeypatch.setenv("TF2ONNX_CATCH_ERRORS", "")
    detector.export(tmp_path / "detector.onnx", format="onnx", verbose=False)
    session = runtime.InferenceSession(str(tmp_path / "detector.onnx"))
    names = [output.name for output in session.get_outputs()]
    for inputs, wanted in predictions:
        assert_answers(dict(zip(names, session.run(None, inputs), strict=True)), wanted)


def litert_runner(model, path):
    interpreter = pytest.importorskip(
        "ai_edge_litert.interpreter",
        reason="ai-edge-litert, which runs LiteRT files, is not installed",
    )
    model.export(path, format="litert", verbose=False)
    # No op is one of TensorFlow's own (FlexConv2D): the plain runtime has all it needs.
    assert b"Flex" not in path.read_bytes()
    return interpreter.Interpreter(model_path=str(path)).get_signature_runner()


def test_litert_answers_for_images_of_any_size(detector, predictions, tmp_path):
    answer = litert_runner(detector, tmp_path / "detector.tflite")
    for inputs, wanted in predictions:
        assert_answers(answer(**inputs), wanted)


def test_litert_answers_for_images_of_one_size(tmp_path):
    model = two_level_detector(image_shape=(64, 96, 3))
    model.run_eagerly = True
    answer = litert_runner(model, tmp_path / "detector.tflite")
    for inputs in (batch(1, 64, 96), batch(2, 64, 96)):
        assert_answers(answer(**inputs), model.predict(inputs, verbose=0))
