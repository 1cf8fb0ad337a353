"""TensorFlow's C++ library loads and runs what is exported, as TensorFlow Serving does."""

import json
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from answers import SIZES, assert_same_answer
from data_sets import encode
from pixels import noise
from tensorflow.core.protobuf import saved_model_pb2

pytestmark = [
    pytest.mark.skipif(
        keras.backend.backend() != "tensorflow", reason="a SavedModel is made with TensorFlow"
    ),
    pytest.mark.skipif(
        not pathlib.Path(tf.sysconfig.get_lib(), "libtensorflow_cc.so.2").exists(),
        reason="this TensorFlow has no C++ library",
    ),
]

INVALID_ARGUMENT = 3


@pytest.fixture(scope="module")
def inputs():
    """A request for each signature, and one with a bad file."""
    images = [noise(*size) for size in SIZES]
    return {
        "pixels": ("serving_default", np.stack([images[0], images[0][::-1]])),
        "files": ("encoded_images", np.array([encode(image) for image in images])),
        "bad": ("encoded_images", np.array([encode(images[0]), b"no image"])),
    }


@pytest.fixture(scope="module")
def answers(inputs, exported, tmp_path_factory):
    """The answers of a process without Python's TensorFlow."""
    saved = saved_model_pb2.SavedModel.FromString((exported / "saved_model.pb").read_bytes())
    signatures = saved.meta_graphs[0].signature_def
    folder, requests = tmp_path_factory.mktemp("cpp"), {}
    for name, (signature, array) in inputs.items():
        [source] = signatures[signature].inputs.values()
        outputs = {key: info.name for key, info in signatures[signature].outputs.items()}
        requests[name] = {"input": source.name, "outputs": outputs}
        np.save(folder / f"{name}.npy", array)
    (folder / "requests.json").write_text(json.dumps(requests))
    program = pathlib.Path(__file__).with_name("cpp_loader_program.py")
    done = subprocess.run(
        [sys.executable, "-I", str(program), str(exported), str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name: dict(np.load(folder / f"{name}.npz")) for name in requests}


def test_pixels_have_the_answer_of_python(answers, inputs, signatures):
    wanted = signatures["serving_default"](images=tf.constant(inputs["pixels"][1]))
    assert_same_answer(answers["pixels"], wanted)


def test_files_have_the_answer_of_python(answers, inputs, signatures):
    wanted = signatures["encoded_images"](image_bytes=tf.constant(inputs["files"][1].tolist()))
    assert_same_answer(answers["files"], wanted)


def test_a_bad_file_is_an_invalid_argument_that_names_it(answers):
    assert answers["bad"]["code"] == INVALID_ARGUMENT
    assert "image_bytes[1]: not a JPEG" in str(answers["bad"]["message"])
