"""What is exported answers as the model does, with TensorFlow alone."""

import base64
import io
import json
import pathlib
import shutil
import socket
import struct
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
import zlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from pixels import bilinear, noise
from small_detector import tiny_detector

import keras_fpn
from keras_fpn.serving import saved_model
from keras_fpn.serving.saved_model import export_saved_model

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="a SavedModel is made with TensorFlow"
)

EDGES = {"shorter_edge": 64, "longest_edge": 96}
# Images by height and width, and what they are resized to: 64 / 40 and 96 / 70 are the scales.
SIZES = {(40, 50): (64, 80), (50, 40): (80, 64), (33, 70): (45, 96)}
CLASS_NAMES = ("bolt", "nut", "washer")
SERVED = {"detection_boxes", "detection_scores", "detection_classes", "num_detections"}


def encoded(image, file_format="PNG", **options):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, file_format, **options)
    return stream.getvalue()


def assert_answers(answer, detector, images, boxes=1e-4, scores=1e-4):
    """Holds outputs of a request against `predict` on the images resized and padded by hand.

    Boxes are compared in the pixels of the caller's images.
    """
    resized = [bilinear(image, *SIZES[image.shape[:2]]) for image in images]
    sizes = np.array([image.shape[:2] for image in resized])
    batch = np.zeros((len(images), *sizes.max(axis=0), 3), "float32")
    for pixels, image in zip(batch, resized, strict=True):
        pixels[: image.shape[0], : image.shape[1]] = image
    wanted = detector.predict({"images": batch, "image_sizes": sizes}, verbose=0)
    answer = {name: np.asarray(value) for name, value in answer.items()}
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
            atol=boxes,
        )
        np.testing.assert_allclose(
            answer["detection_scores"][row], wanted["scores"][row], atol=scores
        )
        np.testing.assert_array_equal(
            answer["detection_classes"][row, :count], wanted["labels"][row, :count]
        )
        for name, values in answer.items():
            if name != "num_detections":
                np.testing.assert_array_equal(
                    values[row, count:], np.zeros_like(values[row, count:])
                )


@pytest.fixture(scope="module")
def detector() -> keras_fpn.FasterRCNN:
    """A detector that finds a few objects in noise, fewer than it has rows for."""
    keras.utils.set_random_seed(0)
    all_kept = tiny_detector()
    scores = [
        all_kept.predict(bilinear(noise(*own), *new)[None].astype("float32"), verbose=0)["scores"]
        for own, new in SIZES.items()
    ]
    # Between two scores of every image, and so not at the mercy of rounding.
    gaps = np.sort(np.concatenate(scores, axis=None))
    middle = gaps[len(gaps) // 4 :][: len(gaps) // 2]
    widest = np.diff(middle).argmax()
    threshold = float(middle[widest : widest + 2].mean())
    detector = tiny_detector(score_threshold=threshold)
    detector.set_weights(all_kept.get_weights())
    return detector


@pytest.fixture(scope="module")
def exported(detector, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "detector" / "1"
    export_saved_model(detector, path, class_names=CLASS_NAMES, **EDGES)
    return path


@pytest.fixture(scope="module")
def signatures(exported):
    return tf.saved_model.load(str(exported)).signatures


def send_files(signatures, *files):
    return signatures["encoded_images"](image_bytes=tf.constant(files, tf.string))


# === Answers ===


@pytest.mark.parametrize("size", SIZES)
def test_pixels_have_the_detections_of_predict(signatures, detector, size):
    image = noise(*size)
    answer = signatures["serving_default"](images=tf.constant(image[None]))
    names = answer.pop("detection_class_names").numpy()[0]
    assert_answers(answer, detector, [image])
    count = int(answer["num_detections"][0])
    labels = answer["detection_classes"].numpy()[0, :count].astype(int)
    assert [name.decode() for name in names[:count]] == [CLASS_NAMES[label] for label in labels]
    assert set(names[count:]) == {b""}


def test_a_batch_of_pixels_has_a_row_for_each_image(signatures, detector):
    images = [noise(40, 50), noise(40, 50)[::-1]]
    answer = signatures["serving_default"](images=tf.constant(np.stack(images)))
    answer.pop("detection_class_names")
    assert_answers(answer, detector, images)


def test_files_of_different_sizes_share_a_request(signatures, detector):
    images = [noise(*size) for size in SIZES]
    answer = send_files(signatures, *map(encoded, images))
    answer.pop("detection_class_names")
    assert_answers(answer, detector, images)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_files_and_their_pixels_have_the_same_answer(signatures, file_format):
    image = noise(40, 50)
    if file_format == "GIF":
        # Another frame behind the first.
        more = {"save_all": True, "append_images": [Image.fromarray(image[::-1])]}
        stream = io.BytesIO()
        Image.fromarray(image).quantize(64).save(stream, "GIF", **more)
        content = stream.getvalue()
    else:
        content = encoded(image, file_format)
    with Image.open(io.BytesIO(content)) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    wanted = signatures["serving_default"](images=tf.constant(pixels[None]))
    for name, value in send_files(signatures, content).items():
        np.testing.assert_array_equal(value, wanted[name])


def test_signatures_have_the_names_of_the_detection_convention(signatures):
    rows, floats = 20, tf.float32
    outputs = {
        "detection_boxes": ([None, rows, 4], floats),
        "detection_scores": ([None, rows], floats),
        "detection_classes": ([None, rows], floats),
        "detection_class_names": ([None, rows], tf.string),
        "num_detections": ([None], floats),
    }
    inputs = {
        "serving_default": ("images", [None, None, None, 3], tf.uint8),
        "encoded_images": ("image_bytes", [None], tf.string),
    }
    assert set(signatures) == set(inputs)
    for name, (argument, shape, dtype) in inputs.items():
        _, arguments = signatures[name].structured_input_signature
        assert {key: (s.shape.as_list(), s.dtype) for key, s in arguments.items()} == {
            argument: (shape, dtype)
        }
        found = signatures[name].structured_outputs
        assert {key: (s.shape.as_list(), s.dtype) for key, s in found.items()} == outputs


# === What is refused ===


def png_chunk(kind, content):
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def black_png(height, width):
    """A valid PNG of one bit a pixel, made without its pixels ever being in memory."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    deflate, row = zlib.compressobj(1), bytes(1 + (width + 7) // 8)
    pixels = b"".join(deflate.compress(row) for _ in range(height)) + deflate.flush()
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def memory_peak():
    """Bytes of this process."""
    status = pathlib.Path("/proc/self/status").read_text()
    [peak] = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return 1024 * int(peak.split()[1])


def test_files_that_cannot_be_read_are_named_by_their_position(signatures):
    good = encoded(noise(40, 50))
    with pytest.raises(
        tf.errors.InvalidArgumentError,
        match=r"2 of 4 images cannot be read: image_bytes\[1\]: not a JPEG, PNG, GIF, BMP or WebP "
        r"file; image_bytes\[3\]: empty file",
    ):
        send_files(signatures, good, b"no image", good, b"")
    with pytest.raises(
        tf.errors.InvalidArgumentError,
        match=r"1 of 3 images cannot be read: image_bytes\[2\]: truncated or damaged",
    ):
        send_files(signatures, good, good, good[: len(good) // 2])


def test_a_bomb_is_refused_before_memory_is_taken(signatures):
    good, claim = encoded(noise(40, 50)), struct.pack(">II", 100_000, 100_000)
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"image_bytes\[1\]: claims 100000x100000 pixels"
    ):
        send_files(signatures, good, good[:16] + claim + good[24:])
    # A whole file that TensorFlow would decode, to 1.2 GB.
    bomb = black_png(20_000, 20_000)
    assert len(bomb) < 300_000
    if not pathlib.Path("/proc/self/clear_refs").exists():
        pytest.skip("memory is measured as Linux tells it")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # The peak counts from here on.
    before = memory_peak()
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"image_bytes\[0\]: claims 20000x20000 pixels"
    ):
        send_files(signatures, bomb, good)
    # A tenth of the bomb's pixels would show.
    assert memory_peak() - before < 100e6


def test_images_of_too_many_pixels_together_are_refused_by_their_headers(signatures):
    good, claim = encoded(noise(40, 50)), struct.pack(">II", 12_000, 12_000)
    large = good[:16] + claim + good[24:]
    with pytest.raises(
        tf.errors.InvalidArgumentError,
        match=r"1 of 3 images cannot be read: image_bytes\[2\]: takes the request to 288002000 "
        r"pixels, over the limit of 178956970",
    ):
        send_files(signatures, large, good, large)


def test_requests_without_an_image_are_refused(signatures):
    with pytest.raises(tf.errors.InvalidArgumentError, match="`image_bytes` has no files"):
        send_files(signatures)
    for shape in ((1, 0, 50, 3), (1, 40, 0, 3), (0, 40, 50, 3)):
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"`images` of shape .* no pixels"):
            signatures["serving_default"](images=tf.zeros(shape, tf.uint8))


def test_arguments_out_of_range_are_refused(detector, tmp_path):
    path = tmp_path / "1"
    with pytest.raises(TypeError, match=r"`model` .*FasterRCNN; received Sequential"):
        export_saved_model(keras.Sequential(), path)
    with pytest.raises(ValueError, match=r"`shorter_edge` .* received 0"):
        export_saved_model(detector, path, shorter_edge=0)
    with pytest.raises(ValueError, match=r"`precision` .*received 'float16'"):
        export_saved_model(detector, path, precision="float16")
    with pytest.raises(ValueError, match=r"`class_names` .* 3 classes; received \['bolt'\]"):
        export_saved_model(detector, path, class_names=["bolt"])
    with pytest.raises(ValueError, match=r"`longest_edge` .*\(64, 96, 3\) .*; received 96"):
        export_saved_model(tiny_detector(image_shape=(64, 96, 3)), path, **EDGES)
    assert list(tmp_path.iterdir()) == []


# === The folder ===


def test_a_server_finds_a_version_its_config_and_nothing_else(exported):
    folder = exported.parent
    assert {path.name for path in folder.iterdir()} == {
        "1",
        "model.config",
        "batching_parameters.txt",
    }
    assert {path.name for path in exported.iterdir()} >= {"saved_model.pb", "assets.extra"}
    reason = "tensorflow-serving-api, whose classes read the file here, is not installed"
    served = pytest.importorskip("tensorflow_serving.config.model_server_config_pb2", reason=reason)
    from google.protobuf import text_format

    config = text_format.Parse(
        (folder / "model.config").read_text(), served.ModelServerConfig()
    ).model_config_list.config
    assert [(one.name, one.base_path, one.model_platform) for one in config] == [
        ("detector", str(folder), "tensorflow")
    ]


def test_nothing_is_written_over(exported, detector, monkeypatch):
    def export(path):
        export_saved_model(detector, path, **EDGES)

    for name in ("model.config", "batching_parameters.txt"):
        (exported.parent / name).write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in exported.parent.rglob("*")}
    with pytest.raises(FileExistsError, match="already exists"):
        export(exported)
    # The version is written under another name: here a failure leaves nothing of it.
    seen = []

    monkeypatch.setattr(saved_model, "_inference_copy", lambda model, precision: model)
    monkeypatch.setattr(saved_model, "_signatures", lambda *arguments: {})

    def fail(signatures, variables, folder):
        (folder / "saved_model.pb").write_bytes(b"a part")
        seen.extend(path.name for path in folder.parent.iterdir() if path.name.isdigit())
        raise OSError("No space left on device")

    monkeypatch.setattr(saved_model, "_save", fail)
    with pytest.raises(OSError, match="No space left"):
        export(exported.parent / "2")
    assert seen == ["1"]
    assert {path: path.stat().st_mtime_ns for path in exported.parent.rglob("*")} == before
    # A second version leaves the server's files as they are.
    monkeypatch.setattr(saved_model, "_save", lambda *arguments: None)
    export(exported.parent / "2")
    shutil.rmtree(exported.parent / "2")
    for name in ("model.config", "batching_parameters.txt"):
        assert (exported.parent / name).read_text() == "mine"


def test_a_folder_that_is_no_version_is_told(detector, tmp_path, monkeypatch):
    monkeypatch.setattr(saved_model, "_inference_copy", lambda model, precision: model)
    monkeypatch.setattr(saved_model, "_signatures", lambda *arguments: {})
    monkeypatch.setattr(saved_model, "_save", lambda *arguments: None)
    with pytest.warns(UserWarning, match=r"versions of a model by their numbers.*latest"):
        export_saved_model(detector, tmp_path / "latest", warm_up=False, **EDGES)
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]
    assert list((tmp_path / "latest").iterdir()) == []


def test_weights_are_stored_once_and_no_op_is_python(exported, detector):
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel.FromString((exported / "saved_model.pb").read_bytes())
    [graph] = saved.meta_graphs
    functions = graph.graph_def.library.function
    ops = {node.op for node in graph.graph_def.node}
    ops |= {node.op for function in functions for node in function.node_def}
    assert "Conv2D" in ops
    assert not [op for op in ops if "PyFunc" in op]
    kinds = {node.user_object.identifier for node in graph.object_graph_def.nodes}
    assert not [kind for kind in kinds if "keras" in kind]
    weights = 4 * sum(int(np.prod(weight.shape)) for weight in detector.weights)
    size = sum(path.stat().st_size for path in exported.rglob("*") if path.is_file())
    # The graph itself is some 2 MB.
    assert size < 1.02 * weights + 3e6


def test_weights_are_variables(exported):
    stored = [name for name, _ in tf.train.list_variables(str(exported / "variables/variables"))]
    assert len([name for name in stored if name.startswith("weights/")]) > 20
    assert (exported / "saved_model.pb").stat().st_size < 3e6


def test_weights_can_be_constants_of_the_graph(detector, tmp_path):
    export_saved_model(detector, tmp_path / "1", frozen=True, warm_up=False, **EDGES)
    assert not (tmp_path / "1" / "assets.extra").exists()
    weights = 4 * sum(int(np.prod(weight.shape)) for weight in detector.weights)
    assert (tmp_path / "1" / "saved_model.pb").stat().st_size > 0.98 * weights
    stored = tf.train.list_variables(str(tmp_path / "1/variables/variables"))
    assert not [name for name, _ in stored if name.startswith("weights/")]
    image = noise(40, 50)
    loaded = tf.saved_model.load(str(tmp_path / "1")).signatures["serving_default"]
    assert_answers(loaded(images=tf.constant(image[None])), detector, [image])


def test_a_model_of_one_shape_gets_that_shape(detector, tmp_path):
    fixed = tiny_detector(
        image_shape=(96, 128, 3), score_threshold=detector.detections.score_threshold
    )
    fixed.set_weights(detector.get_weights())
    export_saved_model(fixed, tmp_path / "1", warm_up=False, **EDGES)
    answer = tf.saved_model.load(str(tmp_path / "1")).signatures["serving_default"](
        images=tf.constant(noise(50, 40)[None])
    )
    pixels = np.zeros((1, 96, 128, 3), "float32")
    pixels[0, :80, :64] = bilinear(noise(50, 40), 80, 64)
    wanted = fixed.predict({"images": pixels, "image_sizes": np.array([[80, 64]])}, verbose=0)
    np.testing.assert_array_equal(answer["num_detections"], wanted["num_detections"])
    np.testing.assert_allclose(
        answer["detection_boxes"] * np.array([80, 64, 80, 64]),
        wanted["boxes"][..., [1, 0, 3, 2]],
        atol=1e-4,
    )


def test_bfloat16_takes_half_the_size(detector, exported, tmp_path):
    full = tiny_detector()
    full.set_weights(detector.get_weights())
    export_saved_model(full, tmp_path / "1", precision="bfloat16", **EDGES)
    data = "variables/variables.data-00000-of-00001"
    sizes = [(path / data).stat().st_size for path in (tmp_path / "1", exported)]
    assert sizes[0] < 0.52 * sizes[1]
    image = noise(40, 50)
    answer = tf.saved_model.load(str(tmp_path / "1")).signatures["serving_default"](
        images=tf.constant(image[None])
    )
    wanted = full.predict(bilinear(image, 64, 80)[None].astype("float32"), verbose=0)
    # Eight bits of mantissa are 0.4 % of a value, here of logits and offsets under 1. Which of two
    # boxes of all but one score comes first, and so suppresses the other, is up to that.
    found = answer["detection_boxes"].numpy()[0] * [40, 50, 40, 50]
    boxes = wanted["boxes"][0][:, [1, 0, 3, 2]] / 1.6
    distance = np.abs(found[:, None] - boxes[None]).max(axis=-1)
    labels = answer["detection_classes"].numpy()[0]
    distance[labels[:, None] != wanted["labels"][0]] = np.inf
    nearest = distance.argmin(axis=1)
    near = distance.min(axis=1) < 0.5
    assert near.mean() >= 0.7
    scores = answer["detection_scores"].numpy()[0]
    np.testing.assert_allclose(scores[near], wanted["scores"][0][nearest][near], atol=0.004)


# === With TensorFlow alone ===


def test_it_answers_where_there_is_only_tensorflow(exported, detector, tmp_path):
    for i, size in enumerate(SIZES):
        np.save(tmp_path / f"pixels{i}.npy", noise(*size)[None])
        np.save(tmp_path / f"file{i}.npy", np.array([encoded(noise(*size))]))
    program = tmp_path / "answer.py"
    program.write_text(
        textwrap.dedent(
            """
            import sys
            import numpy as np
            import tensorflow as tf

            # TensorFlow imports Keras by itself. From here on there is none.
            for name in [name for name in sys.modules if name.split(".")[0] == "keras"]:
                del sys.modules[name]

            class NoKeras:
                def find_spec(self, name, path=None, target=None):
                    if name.split(".")[0] in ("keras", "tf_keras", "keras_fpn"):
                        raise ImportError(name + " was asked for")

            sys.meta_path.insert(0, NoKeras())
            model, folder = sys.argv[1:]
            signatures = tf.saved_model.load(model).signatures
            for i in range(3):
                pixels = np.load(f"{folder}/pixels{i}.npy")
                content = np.load(f"{folder}/file{i}.npy").tolist()
                answers = {
                    "pixels": signatures["serving_default"](images=tf.constant(pixels)),
                    "file": signatures["encoded_images"](image_bytes=tf.constant(content)),
                }
                for name, answer in answers.items():
                    answer.pop("detection_class_names")
                    np.savez(f"{folder}/{name}{i}_answer.npz", **answer)
            assert not {"keras", "keras_fpn"} & set(sys.modules)
            """
        )
    )
    commands = [
        [str(program), str(exported), str(tmp_path)],
        [
            *("-m", "tensorflow.python.tools.saved_model_cli", "run", "--dir", str(exported)),
            *("--tag_set", "serve", "--signature_def", "encoded_images"),
            *("--inputs", f"image_bytes={tmp_path}/file0.npy", "--outdir", f"{tmp_path}/cli"),
        ],
    ]
    processes = [
        subprocess.Popen(
            [sys.executable, "-I", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
        )
        for command in commands
    ]
    for process in processes:
        printed, _ = process.communicate()
        assert process.returncode == 0, printed
    for i, size in enumerate(SIZES):
        for name in ("pixels", "file"):
            with np.load(tmp_path / f"{name}{i}_answer.npz") as answer:
                assert_answers(dict(answer), detector, [noise(*size)])
    answer = {key: np.load(tmp_path / "cli" / f"{key}.npy") for key in SERVED}
    assert_answers(answer, detector, [noise(40, 50)])


def _without_names(answer):
    return {name: value for name, value in answer.items() if name != "detection_class_names"}


def test_warm_up_requests_are_those_of_tensorflow_serving(exported, signatures):
    reason = "tensorflow-serving-api, whose classes read the requests here, is not installed"
    logs = pytest.importorskip("tensorflow_serving.apis.prediction_log_pb2", reason=reason)
    file = exported / "assets.extra" / "tf_serving_warmup_requests"
    records = [record.numpy() for record in tf.data.TFRecordDataset(str(file))]
    requests = [logs.PredictionLog.FromString(record).predict_log.request for record in records]
    assert [request.model_spec.name for request in requests] == ["detector"] * 2
    assert [request.model_spec.signature_name for request in requests] == [
        "serving_default",
        "encoded_images",
    ]
    for record, request in zip(records, requests, strict=True):
        # Nothing in it is unknown to the classes.
        assert len(request.SerializeToString()) > 0.95 * len(record)
        inputs = {name: tf.constant(tf.make_ndarray(x)) for name, x in request.inputs.items()}
        answer = signatures[request.model_spec.signature_name](**inputs)
        assert answer["num_detections"].shape == [1]


# === TensorFlow Serving ===


@pytest.fixture(scope="module")
def server(exported):
    """Ports of a `tensorflow_model_server` that serves what was exported."""
    program = shutil.which("tensorflow_model_server")
    if program is None:
        pytest.skip("there is no tensorflow_model_server on PATH")
    with socket.socket() as one, socket.socket() as other:
        for unused in (one, other):
            unused.bind(("localhost", 0))
        grpc_port, rest_port = one.getsockname()[1], other.getsockname()[1]
    process = subprocess.Popen(
        [
            program,
            f"--port={grpc_port}",
            f"--rest_api_port={rest_port}",
            "--model_name=detector",
            f"--model_base_path={exported.parent}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        _wait_until_served(process, f"http://localhost:{rest_port}/v1/models/detector")
        yield grpc_port, rest_port
    finally:
        process.kill()
        process.communicate()


def _wait_until_served(process, url):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read().decode()
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                status = json.load(response)["model_version_status"]
            if status[0]["state"] == "AVAILABLE":
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"{url} is not available after two minutes")


def _rest(port, **body):
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/models/detector:predict", json.dumps(body).encode()
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["outputs"]


def test_a_server_answers_over_rest(server, detector):
    images = [noise(*size) for size in SIZES]
    for image in images:
        answer = _rest(server[1], inputs={"images": image[None].tolist()})
        assert_answers(_without_names(answer), detector, [image])
    files = [{"b64": base64.b64encode(encoded(image)).decode()} for image in images]
    answer = _rest(server[1], signature_name="encoded_images", inputs={"image_bytes": files})
    assert_answers(_without_names(answer), detector, images)
    bad = {"b64": base64.b64encode(b"no image").decode()}
    with pytest.raises(urllib.error.HTTPError) as error:
        _rest(server[1], signature_name="encoded_images", inputs={"image_bytes": [files[0], bad]})
    assert error.value.code == 400
    assert "image_bytes[1]: not a JPEG" in json.load(error.value)["error"]


def test_a_server_answers_over_grpc(server, detector):
    reason = "tensorflow-serving-api, the gRPC client, is not installed"
    predict_pb2 = pytest.importorskip("tensorflow_serving.apis.predict_pb2", reason=reason)
    grpc = pytest.importorskip("grpc")
    from tensorflow_serving.apis import prediction_service_pb2_grpc

    images = [noise(*size) for size in SIZES]
    requests = [("serving_default", {"images": image[None]}, [image]) for image in images]
    requests.append(("encoded_images", {"image_bytes": list(map(encoded, images))}, images))
    with grpc.insecure_channel(f"localhost:{server[0]}") as channel:
        service = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        for signature, inputs, seen in requests:
            request = predict_pb2.PredictRequest()
            request.model_spec.name = "detector"
            request.model_spec.signature_name = signature
            for name, value in inputs.items():
                request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
            outputs = service.Predict(request, timeout=60).outputs
            answer = {name: tf.make_ndarray(value) for name, value in outputs.items()}
            assert_answers(_without_names(answer), detector, seen)


@pytest.mark.parametrize("client", ["rest_client", "grpc_client"])
def test_the_example_clients_draw_what_a_server_finds(server, client, tmp_path):
    if client == "grpc_client":
        reason = "tensorflow-serving-api, the gRPC client, is not installed"
        pytest.importorskip("tensorflow_serving", reason=reason)
    addresses = {
        "rest_client": ("--url", f"http://localhost:{server[1]}/v1/models/detector"),
        "grpc_client": ("--server", f"localhost:{server[0]}"),
    }
    (tmp_path / "noise.png").write_bytes(encoded(noise(40, 50)))
    program = pathlib.Path(__file__).parents[2] / "examples" / "serving" / f"{client}.py"
    command = [sys.executable, str(program), "noise.png", "--output", "found", *addresses[client]]
    command += ["--score-threshold", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert any(f"noise.png: {name} 0." in done.stdout for name in CLASS_NAMES)
    with Image.open(tmp_path / "found" / "0001_noise.png") as picture:
        assert (np.asarray(picture) != noise(40, 50)).any()
