"""Runs a SavedModel with TensorFlow's C++ library and without its Python, for test_cpp_loader.py.

    python cpp_loader_program.py MODEL FOLDER

It is loaded and run as TensorFlow Serving does it. FOLDER/requests.json has for each request the
names of an input tensor and of output tensors, and FOLDER/<request>.npy the input. What becomes of
it is FOLDER/<request>.npz: the outputs, or the error's code and message.
"""

import ctypes
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

FLOAT, UINT8, STRING = 1, 4, 7  # TF_DataType
TSTRING_BYTES = 24  # sizeof(TF_TString)


class Output(ctypes.Structure):
    """TF_Output: an output of an operation, the parameter of a function as well."""

    _fields_ = (("operation", ctypes.c_void_p), ("index", ctypes.c_int))


def library():
    """The C API, of which the C++ library of the wheel has all symbols."""
    package = Path(importlib.util.find_spec("tensorflow").origin).parent
    tf = ctypes.CDLL(str(package / "libtensorflow_cc.so.2"))
    pointer, size, text = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
    several = (pointer, pointer, ctypes.c_int)  # Operations, their tensors, and how many.
    for name, result, *arguments in (
        ("NewStatus", pointer),
        ("GetCode", ctypes.c_int, pointer),
        ("Message", text, pointer),
        ("NewGraph", pointer),
        ("NewSessionOptions", pointer),
        ("LoadSessionFromSavedModel", *[pointer] * 3, text, pointer, ctypes.c_int, *[pointer] * 3),
        ("GraphOperationByName", pointer, pointer, text),
        ("AllocateTensor", pointer, ctypes.c_int, pointer, ctypes.c_int, size),
        ("TensorData", pointer, pointer),
        ("TensorByteSize", size, pointer),
        ("TensorType", ctypes.c_int, pointer),
        ("NumDims", ctypes.c_int, pointer),
        ("Dim", ctypes.c_int64, pointer, ctypes.c_int),
        ("StringInit", None, pointer),
        ("StringCopy", None, pointer, text, size),
        ("StringGetDataPointer", pointer, pointer),
        ("StringGetSize", size, pointer),
        ("SessionRun", None, *[pointer] * 2, *several, *several, *several[1:], *[pointer] * 2),
    ):
        function = getattr(tf, f"TF_{name}")
        function.restype, function.argtypes = result, arguments
    return tf


def load(tf, path):
    """The session and the graph of a SavedModel."""
    status, graph = tf.TF_NewStatus(), tf.TF_NewGraph()
    tags = (ctypes.c_char_p * 1)(b"serve")
    session = tf.TF_LoadSessionFromSavedModel(
        tf.TF_NewSessionOptions(), None, path.encode(), tags, 1, graph, None, status
    )
    assert tf.TF_GetCode(status) == 0, tf.TF_Message(status)
    return session, graph


def output(tf, graph, tensor):
    """What is called "operation:index"."""
    name, index = tensor.split(":")
    return Output(tf.TF_GraphOperationByName(graph, name.encode()), int(index))


def to_tensor(tf, array):
    """A tensor of bytes or strings."""
    is_string = array.dtype.kind == "S"
    dims = (ctypes.c_int64 * array.ndim)(*array.shape)
    size = array.size * (TSTRING_BYTES if is_string else 1)
    kind = STRING if is_string else UINT8
    tensor = tf.TF_AllocateTensor(kind, dims, array.ndim, size)
    data = tf.TF_TensorData(tensor)
    if is_string:
        for i, content in enumerate(array.ravel().tolist()):
            tf.TF_StringInit(data + TSTRING_BYTES * i)
            tf.TF_StringCopy(data + TSTRING_BYTES * i, content, len(content))
    else:
        ctypes.memmove(data, array.tobytes(), size)
    return tensor


def to_array(tf, tensor):
    """The array in a tensor of floats or strings."""
    shape = [tf.TF_Dim(tensor, i) for i in range(tf.TF_NumDims(tensor))]
    data, size = tf.TF_TensorData(tensor), tf.TF_TensorByteSize(tensor)
    if tf.TF_TensorType(tensor) == FLOAT:
        return np.frombuffer(ctypes.string_at(data, size), "float32").reshape(shape)
    strings = [
        ctypes.string_at(tf.TF_StringGetDataPointer(string), tf.TF_StringGetSize(string))
        for string in range(data, data + size, TSTRING_BYTES)
    ]
    return np.array(strings, "S").reshape(shape)


def answer(tf, session, graph, request, array):
    """The outputs of a request by name, or its error."""
    status, count = tf.TF_NewStatus(), len(request["outputs"])
    fetched = (Output * count)(*(output(tf, graph, x) for x in request["outputs"].values()))
    values = (ctypes.c_void_p * count)()
    fed, tensor = output(tf, graph, request["input"]), to_tensor(tf, array)
    given = (Output * 1)(fed), (ctypes.c_void_p * 1)(tensor), 1
    tf.TF_SessionRun(session, None, *given, fetched, values, count, None, 0, None, status)
    if tf.TF_GetCode(status):
        return {"code": tf.TF_GetCode(status), "message": tf.TF_Message(status).decode()}
    return {
        name: to_array(tf, value) for name, value in zip(request["outputs"], values, strict=True)
    }


def main():
    model, folder = sys.argv[1], Path(sys.argv[2])
    tf = library()
    session, graph = load(tf, model)
    for name, request in json.loads((folder / "requests.json").read_text()).items():
        array = np.load(folder / f"{name}.npy")
        np.savez(folder / f"{name}.npz", **answer(tf, session, graph, request, array))
    assert "tensorflow" not in sys.modules


if __name__ == "__main__":
    main()
