"""Clients of TensorFlow Serving: of a server on PATH, and of a stand-in with its protocols."""

import base64
import json
import pathlib
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import keras
import numpy as np
import pytest
import tensorflow as tf
from answers import CLASS_NAMES, SIZES, assert_same_answer
from data_sets import encode
from PIL import Image
from pixels import noise

grpc = pytest.importorskip("grpc")
REASON = "tensorflow-serving-api, the gRPC client, is not installed"
predict_pb2 = pytest.importorskip("tensorflow_serving.apis.predict_pb2", reason=REASON)

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="a SavedModel is made with TensorFlow"
)

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples" / "serving"


PROGRAM = shutil.which("tensorflow_model_server")


@pytest.fixture(scope="module", params=["stand-in", PROGRAM] if PROGRAM else ["stand-in"])
def server(request, exported, signatures):
    """Ports for gRPC and REST of a server of what was exported."""
    if request.param == "stand-in":
        from stand_in import serve

        with serve("detector", signatures) as ports:
            yield ports
        return
    with socket.socket() as one, socket.socket() as other:
        for unused in (one, other):
            unused.bind(("localhost", 0))
        grpc_port, rest_port = one.getsockname()[1], other.getsockname()[1]
    process = subprocess.Popen(
        [
            PROGRAM,
            f"--port={grpc_port}",
            f"--rest_api_port={rest_port}",
            "--model_name=detector",
            f"--model_base_path={exported.parent}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        _wait_until_served(process, rest_port)
        yield grpc_port, rest_port
    finally:
        process.kill()
        process.communicate()


def _wait_until_served(process, port):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read().decode()
        try:
            if _rest(port)["model_version_status"][0]["state"] == "AVAILABLE":
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise AssertionError("the model is not available after two minutes")


def _rest(port, name="detector", **body):
    """What is answered to a prediction, or without one the status of the model."""
    url = f"http://localhost:{port}/v1/models/{name}"
    request = urllib.request.Request(f"{url}:predict", json.dumps(body).encode()) if body else url
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def _base64(content):
    return {"b64": base64.b64encode(content).decode()}


@pytest.fixture(scope="module")
def files():
    return [encode(noise(*size)) for size in SIZES]


@pytest.fixture(scope="module")
def pixels():
    return np.stack([noise(40, 50), noise(40, 50)[::-1]])


@pytest.fixture(scope="module")
def wanted(signatures, files, pixels):
    """Python's answers for `pixels` and for `files`."""
    return {
        "pixels": signatures["serving_default"](images=tf.constant(pixels)),
        "files": signatures["encoded_images"](image_bytes=tf.constant(files)),
    }


def test_a_model_says_over_rest_that_it_is_available(server):
    [version] = _rest(server[1])["model_version_status"]
    assert (version["version"], version["state"]) == ("1", "AVAILABLE")


def test_rest_answers_in_columns(server, pixels, files, wanted):
    answer = _rest(server[1], inputs={"images": pixels.tolist()})["outputs"]
    assert_same_answer(answer, wanted["pixels"])
    # The name of an only input may be left out.
    for inputs in ({"image_bytes": list(map(_base64, files))}, list(map(_base64, files))):
        answer = _rest(server[1], signature_name="encoded_images", inputs=inputs)["outputs"]
        assert_same_answer(answer, wanted["files"])


def test_rest_answers_in_rows(server, files, wanted):
    for rows in ([{"image_bytes": _base64(file)} for file in files], list(map(_base64, files))):
        answer = _rest(server[1], signature_name="encoded_images", instances=rows)["predictions"]
        answer = {name: [row[name] for row in answer] for name in answer[0]}
        assert_same_answer(answer, wanted["files"])


@pytest.mark.parametrize(
    ("code", "message", "name", "body"),
    [
        (400, "image_bytes[1]: not a JPEG", "detector", {"signature_name": "encoded_images"}),
        (400, "no_such", "detector", {"signature_name": "no_such"}),
        (404, "other", "other", {}),
    ],
)
def test_an_error_over_rest_has_a_status_and_a_sentence(server, files, code, message, name, body):
    inputs = {"image_bytes": [_base64(files[0]), _base64(b"no image")]}
    with pytest.raises(urllib.error.HTTPError) as error:
        _rest(server[1], name, inputs=inputs, **body)
    assert error.value.code == code
    assert message in json.load(error.value)["error"]


def _grpc(port, signature, **inputs):
    from tensorflow_serving.apis import prediction_service_pb2_grpc

    request = predict_pb2.PredictRequest()
    request.model_spec.name = "detector"
    request.model_spec.signature_name = signature
    for name, value in inputs.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    with grpc.insecure_channel(f"localhost:{port}") as channel:
        service = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        outputs = service.Predict(request, timeout=60).outputs
    return {name: tf.make_ndarray(value) for name, value in outputs.items()}


def test_grpc_answers(server, pixels, files, wanted):
    assert_same_answer(_grpc(server[0], "serving_default", images=pixels), wanted["pixels"])
    assert_same_answer(_grpc(server[0], "encoded_images", image_bytes=files), wanted["files"])


def test_an_error_over_grpc_has_a_code_and_a_sentence(server, files):
    for inputs, message in (
        ({"image_bytes": [files[0], b"no image"]}, "image_bytes[1]: not a JPEG"),
        ({"images": files}, "images"),
    ):
        with pytest.raises(grpc.RpcError) as error:
            _grpc(server[0], "encoded_images", **inputs)
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert message in error.value.details()


@pytest.fixture(params=["rest_client", "grpc_client"])
def client(request, server, tmp_path, monkeypatch):
    """The function that runs an example on images, which are paths."""
    addresses = {
        "rest_client": ("--url", f"http://localhost:{server[1]}/v1/models/detector"),
        "grpc_client": ("--server", f"localhost:{server[0]}"),
    }
    # In this process: importing TensorFlow takes longer than anything that the client does.
    monkeypatch.syspath_prepend(EXAMPLES)
    program = __import__(request.param)

    def run(*images):
        command = [*map(str, images), "--output", str(tmp_path / "found")]
        command += [*addresses[request.param], "--score-threshold", "0"]
        monkeypatch.setattr(sys, "argv", [request.param, *command])
        program.main()

    return run


def test_the_example_clients_draw_what_a_server_finds(client, files, tmp_path, capsys):
    (tmp_path / "noise.png").write_bytes(files[0])
    client(tmp_path / "noise.png")
    assert any(f"noise.png: {name} 0." in capsys.readouterr().out for name in CLASS_NAMES)
    with Image.open(tmp_path / "found" / "0001_noise.png") as picture:
        assert (np.asarray(picture) != noise(40, 50)).any()


def test_the_example_clients_end_with_the_sentence_of_a_server(client, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match=r"(?s)error: .*image_bytes\[0\]: not a JPEG"):
        client(tmp_path / "bad.png")
    assert not (tmp_path / "found").exists()


def test_the_rest_client_needs_no_tensorflow():
    program = "import sys, rest_client; assert not {'tensorflow', 'keras'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=EXAMPLES, check=True)
