"""A request to a SavedModel is bounded, and a bad file in it can leave the others their answers."""

import pathlib
import struct
import zlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from answers import MAX_IMAGES, MAX_PIXELS
from data_sets import encode
from pixels import noise

from keras_fpn.serving.saved_model import export_saved_model

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="a SavedModel is made with TensorFlow"
)

HEIGHT, WIDTH = 40, 50


@pytest.fixture(scope="module")
def signatures(signatures_with_options):
    """Of a model whose bad files are answered in the output `error`."""
    return signatures_with_options


def png(seed=0, height=HEIGHT, width=WIDTH):
    return encode(noise(height, width, seed))


def claiming(height, width):
    """A PNG whose header claims a size; what is behind it is no image."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + checksum


def answer(signatures, *files):
    outputs = signatures["encoded_images"](image_bytes=tf.constant(files, tf.string))
    outputs = {name: value.numpy() for name, value in outputs.items()}
    return outputs, [error.decode() for error in outputs.pop("error")]


def assert_no_detections(outputs, row):
    for name, values in outputs.items():
        nothing = np.full_like(values[row], b"" if name == "detection_class_names" else 0)
        np.testing.assert_array_equal(values[row], nothing, err_msg=name)


def test_bad_files_have_an_error_and_the_others_their_answers(signatures):
    good = [png(0), png(1)]
    wanted, errors = answer(signatures, *good)
    assert errors == ["", ""]
    assert (wanted["num_detections"] > 0).all()
    # Refused by its header, by its claim of pixels, and by its decoder.
    for bad, reason in (
        (b"no image", "not a JPEG"),
        (claiming(100_000, 100_000), "claims 100000x100000 pixels"),
        (good[0][:-100], "truncated or damaged"),
    ):
        outputs, errors = answer(signatures, good[0], bad, good[1])
        assert errors[0] == errors[2] == ""
        assert errors[1].startswith(reason)
        assert_no_detections(outputs, 1)
        for name, values in wanted.items():
            if values.dtype == np.float32:
                np.testing.assert_allclose(outputs[name][[0, 2]], values, atol=1e-5)
            else:
                np.testing.assert_array_equal(outputs[name][[0, 2]], values)


def test_a_request_of_bad_files_alone_is_answered(signatures):
    outputs, errors = answer(signatures, b"", b"no image")
    assert [error[:5] for error in errors] == ["empty", "not a"]
    for row in range(2):
        assert_no_detections(outputs, row)


def test_an_image_that_exceeds_the_pixels_of_a_request_is_refused(signatures):
    # One that is refused leaves the others theirs, which are exactly the limit.
    outputs, errors = answer(signatures, png(), claiming(2000, 3000), png(0, 2 * HEIGHT))
    received = 2000 * 3000 + HEIGHT * WIDTH
    excess = f"takes the request to {received} pixels, over the limit of {MAX_PIXELS}"
    assert errors == ["", excess, ""]
    assert_no_detections(outputs, 1)
    assert (outputs["num_detections"][[0, 2]] > 0).all()
    _, errors = answer(signatures, png(), png(0, 2 * HEIGHT), png(0, 1, 1))
    assert errors[:2] == ["", ""]
    assert f" {MAX_PIXELS + 1} pixels" in errors[2]


def test_a_request_of_too_many_images_fails(signatures):
    too_many = MAX_IMAGES + 1
    limit = f"over the limit of {MAX_IMAGES}"
    with pytest.raises(tf.errors.InvalidArgumentError, match=rf"has {too_many} files, {limit}"):
        answer(signatures, *[b""] * too_many)
    images = tf.zeros([too_many, 8, 8, 3], tf.uint8)
    with pytest.raises(tf.errors.InvalidArgumentError, match=rf"\[{too_many} 8 8 3\].*{limit}"):
        signatures["serving_default"](images=images)


def test_too_many_pixels_in_memory_fail(signatures):
    images = tf.zeros([1, 1, MAX_PIXELS + 1, 3], tf.uint8)
    limit = rf"\[1 1 {MAX_PIXELS + 1} 3\].*over the limit of {MAX_PIXELS} pixels"
    with pytest.raises(tf.errors.InvalidArgumentError, match=limit):
        signatures["serving_default"](images=images)


def test_a_server_batches_no_more_images_than_the_limit(exported_with_options):
    parameters = (exported_with_options.parent / "batching_parameters.txt").read_text()
    assert f"max_batch_size {{ value: {MAX_IMAGES} }}" in parameters


def test_the_example_clients_print_why_a_file_was_refused(
    signatures, tmp_path, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[2] / "examples" / "serving")
    import rest_client

    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "good.png").write_bytes(png())
    outputs, errors = answer(signatures, b"no image", png())
    paths = [str(tmp_path / name) for name in ("bad.png", "good.png")]
    rest_client.draw_answer(paths, outputs | {"error": errors}, str(tmp_path / "found"), 0.0)
    assert "bad.png: error: not a JPEG" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "found").iterdir()] == ["0002_good.png"]


@pytest.mark.parametrize(
    "limit", [{"max_images": 0}, {"max_images": 1.5}, {"max_pixels": 4799}, {"max_pixels": 2**63}]
)
def test_limits_out_of_range_are_refused(detector, tmp_path, limit):
    [(name, value)] = limit.items()
    with pytest.raises(ValueError, match=rf"`{name}` .*received {value}\."):
        export_saved_model(detector, tmp_path / "1", **limit)
    assert list(tmp_path.iterdir()) == []
