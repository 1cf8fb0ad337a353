"""What is exported answers as the model does, with TensorFlow alone."""

import errno
import io
import pathlib
import struct
import subprocess
import sys
import textwrap
import zlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from answers import EDGES, SIZES, assert_predicted, assert_same_answer
from data_sets import encode
from full_disk import no_file_grows
from PIL import Image
from pixels import bilinear, noise
from small_detector import two_level_detector

from keras_fpn.serving import saved_model
from keras_fpn.serving.saved_model import _save, export_saved_model

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="a SavedModel is made with TensorFlow"
)


def send_files(signatures, *files):
    return signatures["encoded_images"](image_bytes=tf.constant(files, tf.string))


# === Answers ===


@pytest.mark.parametrize("size", SIZES)
def test_pixels_have_the_detections_of_predict(signatures, detector, size):
    image = noise(*size)
    answer = signatures["serving_default"](images=tf.constant(image[None]))
    assert_predicted(answer, detector, [image])


def test_a_batch_of_pixels_has_a_row_for_each_image(signatures, detector):
    images = [noise(40, 50), noise(40, 50)[::-1]]
    answer = signatures["serving_default"](images=tf.constant(np.stack(images)))
    assert_predicted(answer, detector, images)


def test_files_of_different_sizes_share_a_request(signatures, detector):
    images = [noise(*size) for size in SIZES]
    assert_predicted(send_files(signatures, *map(encode, images)), detector, images)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_files_and_their_pixels_have_the_same_answer(signatures, file_format):
    image = noise(40, 50)
    if file_format == "GIF":
        # Another frame behind the first.
        more = {"save_all": True, "append_images": [Image.fromarray(image[::-1])]}
        content = encode(Image.fromarray(image).quantize(64), "GIF", **more)
    else:
        content = encode(image, file_format)
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
    good = encode(noise(40, 50))
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
    good, claim = encode(noise(40, 50)), struct.pack(">II", 100_000, 100_000)
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
    good, claim = encode(noise(40, 50)), struct.pack(">II", 12_000, 12_000)
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
        export_saved_model(two_level_detector(image_shape=(64, 96, 3)), path, **EDGES)
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


@pytest.fixture
def instant(monkeypatch):
    """Exports take no time, and their folders are empty."""
    monkeypatch.setattr(saved_model, "_inference_copy", lambda model, precision: model)
    monkeypatch.setattr(saved_model, "_signatures", lambda *arguments: {})
    monkeypatch.setattr(saved_model, "_save", lambda *arguments: None)
    monkeypatch.setattr(saved_model, "_write_warm_up_requests", lambda *arguments: None)


def test_nothing_is_written_over(detector, instant, tmp_path):
    for name in ("model.config", "batching_parameters.txt"):
        (tmp_path / name).write_text("mine")
    export_saved_model(detector, tmp_path / "1", **EDGES)
    (tmp_path / "1" / "saved_model.pb").write_text("mine")
    with pytest.raises(FileExistsError, match="already exists"):
        export_saved_model(detector, tmp_path / "1", **EDGES)
    # A second version leaves the server's files as they are.
    export_saved_model(detector, tmp_path / "2", **EDGES)
    for name in ("model.config", "batching_parameters.txt", "1/saved_model.pb"):
        assert (tmp_path / name).read_text() == "mine"


def save_onto_a_full_disk(signatures, variables, folder):
    with no_file_grows():
        _save(signatures, variables, folder)


def test_a_full_disk_is_an_os_error_and_leaves_nothing(detector, instant, tmp_path, monkeypatch):
    export_saved_model(detector, tmp_path / "1", **EDGES)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr(saved_model, "_save", save_onto_a_full_disk)
    with pytest.raises(OSError, match=rf"File too large: '{tmp_path}/2'") as error:
        export_saved_model(detector, tmp_path / "2", **EDGES)
    assert error.value.errno == errno.EFBIG
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_full_disk_leaves_no_part_of_a_server_file(detector, instant, tmp_path):
    with no_file_grows(), pytest.raises(OSError, match="File too large"):
        export_saved_model(detector, tmp_path / "1", **EDGES)
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_is_not_of_a_file_stays_as_it_is(detector, instant, tmp_path, monkeypatch):
    def fail(*arguments):
        raise tf.errors.ResourceExhaustedError(None, None, "failed to allocate memory")

    monkeypatch.setattr(saved_model, "_save", fail)
    with pytest.raises(tf.errors.ResourceExhaustedError):
        export_saved_model(detector, tmp_path / "1", **EDGES)


def test_a_version_appears_under_its_name_when_it_is_complete(
    detector, instant, tmp_path, monkeypatch
):
    seen = []
    monkeypatch.setattr(saved_model, "_save", lambda *_: seen.extend(tmp_path.iterdir()))
    export_saved_model(detector, tmp_path / "1", **EDGES)
    [hidden] = seen
    assert hidden.name.startswith(".1.")
    assert (tmp_path / "1").exists()
    assert not hidden.exists()


def test_a_folder_that_is_no_version_is_told(detector, instant, tmp_path):
    with pytest.warns(UserWarning, match=r"versions of a model by their numbers.*latest"):
        export_saved_model(detector, tmp_path / "latest", warm_up=False, **EDGES)
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]
    assert list((tmp_path / "latest").iterdir()) == []


def graph_of(path):
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
    [graph] = saved.meta_graphs
    return graph


def nodes_of(graph):
    functions = graph.graph_def.library.function
    return [*graph.graph_def.node, *(node for function in functions for node in function.node_def)]


def bytes_of_constants(path):
    nodes = nodes_of(graph_of(path))
    return sum(node.attr["value"].tensor.ByteSize() for node in nodes if node.op == "Const")


def bytes_of_weights(model):
    return 4 * sum(int(np.prod(weight.shape)) for weight in model.variables)


DATA = "variables/variables.data-00000-of-00001"


def test_no_op_is_python_and_no_object_is_of_keras(exported):
    graph = graph_of(exported)
    ops = {node.op for node in nodes_of(graph)}
    assert "Conv2D" in ops
    assert not [op for op in ops if "PyFunc" in op]
    kinds = {node.user_object.identifier for node in graph.object_graph_def.nodes}
    assert not [kind for kind in kinds if "keras" in kind]


def test_weights_are_variables_and_stored_once(exported, detector):
    weights = bytes_of_weights(detector)
    stored = tf.train.list_variables(str(exported / "variables/variables"))
    stored = [shape for name, shape in stored if name.startswith("weights/")]
    assert 4 * sum(int(np.prod(shape)) for shape in stored) == weights
    # The object graph is in the file too.
    assert (exported / DATA).stat().st_size < 1.02 * weights + 10e3
    assert bytes_of_constants(exported) < 0.3 * weights


def test_weights_can_be_constants_of_the_graph(exported_with_options, fixed_detector):
    assert not (exported_with_options / "assets.extra").exists()
    weights = bytes_of_weights(fixed_detector)
    assert 0.98 * weights < bytes_of_constants(exported_with_options) < 1.9 * weights
    stored = tf.train.list_variables(str(exported_with_options / "variables/variables"))
    assert not [name for name, _ in stored if name.startswith("weights/")]


def test_a_model_of_one_shape_gets_that_shape(signatures_with_options, fixed_detector):
    images = [noise(50, 40)]
    answer = signatures_with_options["serving_default"](images=tf.constant(np.stack(images)))
    assert_predicted(answer, fixed_detector, images)


def test_bfloat16_takes_half_the_size(detector, exported, tmp_path):
    full = two_level_detector()
    full.run_eagerly = True
    full.set_weights(detector.get_weights())
    export_saved_model(full, tmp_path / "1", precision="bfloat16", **EDGES)
    sizes = [(path / DATA).stat().st_size for path in (tmp_path / "1", exported)]
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


def test_it_answers_where_there_is_only_tensorflow(exported, signatures, tmp_path):
    image = noise(40, 50)
    np.save(tmp_path / "pixels.npy", image[None])
    np.save(tmp_path / "file.npy", np.array([encode(image)]))
    program = tmp_path / "answer.py"
    program.write_text(
        textwrap.dedent(
            """
            import importlib.machinery
            import sys

            class WithoutKeras(importlib.machinery.PathFinder):
                @classmethod
                def find_spec(cls, name, path=None, target=None):
                    if name.split(".")[0] in ("keras", "tf_keras", "keras_fpn"):
                        return None
                    return super().find_spec(name, path, target)

            sys.meta_path = [WithoutKeras if "PathFinder" in str(f) else f for f in sys.meta_path]
            import numpy as np
            import tensorflow as tf
            from tensorflow.python.tools import saved_model_cli

            # Optimizing a graph takes longer than running it a few times.
            tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
            signatures = tf.saved_model.load(sys.argv[1]).signatures
            pixels, [content] = np.load("pixels.npy"), np.load("file.npy").tolist()
            answers = {
                "pixels": signatures["serving_default"](images=tf.constant(pixels)),
                "file": signatures["encoded_images"](image_bytes=tf.constant([content])),
            }
            for name, answer in answers.items():
                arrays = {key: np.array(value.numpy().tolist()) for key, value in answer.items()}
                np.savez(name, **arrays)
            sys.argv[1:] = [
                *("show", "--dir", sys.argv[1], "--tag_set", "serve"),
                *("--signature_def", "encoded_images"),
            ]
            saved_model_cli.main()
            assert not {"keras", "tf_keras", "keras_fpn"} & set(sys.modules)
            """
        )
    )
    done = subprocess.run(
        [sys.executable, "-I", str(program), str(exported)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    wanted = signatures["serving_default"](images=tf.constant(image[None]))
    for name in ("pixels", "file"):
        with np.load(tmp_path / f"{name}.npz") as answer:
            assert_same_answer(dict(answer), wanted)
    for name in ("image_bytes", *wanted):
        assert f"['{name}'] tensor_info" in done.stdout


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
