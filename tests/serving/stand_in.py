"""A stand-in for `tensorflow_model_server`: its gRPC and REST protocols, answered by this process.

Of the protocols it has what a client of a single model meets: `PredictionService.Predict`, and over
REST `:predict` in the row and in the columnar format, and the status of a model. The messages of
gRPC are those of tensorflow-serving-api; REST is as in
https://www.tensorflow.org/tfx/serving/api_rest.
"""

import base64
import contextlib
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

VERSION = 1
HTTP_STATUS = {tf.errors.INVALID_ARGUMENT: 400, tf.errors.NOT_FOUND: 404}


def invalid(message):
    return tf.errors.InvalidArgumentError(None, None, message)


class Model:
    """The one model that is served, by its signatures.

    Args:
        name: its name.
        signatures: those of `tf.saved_model.load`.
    """

    def __init__(self, name, signatures):
        self.name = name
        self.signatures = signatures

    def check(self, name, version=None):
        """Raises an error if another model, or version of it, is asked for."""
        if name != self.name or version not in (None, VERSION):
            asked = f"Latest({name})" if version is None else f"Specific({name}, {version})"
            message = f"Servable not found for request: {asked}"
            raise tf.errors.NotFoundError(None, None, message)

    def specs(self, signature):
        """The inputs of a signature by name."""
        if signature not in self.signatures:
            raise invalid(f'Serving signature key "{signature}" not found.')
        return self.signatures[signature].structured_input_signature[1]

    def predict(self, signature, inputs):
        """Runs a signature on arrays by name, and returns arrays by name."""
        specs = self.specs(signature)
        if set(inputs) != set(specs):
            raise invalid(
                f"input size does not match signature: received {sorted(inputs)}, expected "
                f"{sorted(specs)}"
            )
        for name, spec in specs.items():
            tensor = inputs[name] = tf.convert_to_tensor(inputs[name])
            if tensor.dtype != spec.dtype or not spec.shape.is_compatible_with(tensor.shape):
                raise invalid(f"{name}: received {tensor.dtype} {tensor.shape}, expected {spec}")
        outputs = self.signatures[signature](**inputs)
        return {name: value.numpy() for name, value in outputs.items()}


# === gRPC ===


class PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
    """`Predict` of a model; the other methods are unimplemented."""

    def __init__(self, model):
        self.model = model

    def Predict(self, request, context):
        try:
            return self.response(request)
        except tf.errors.OpError as error:
            codes = {code.value[0]: code for code in grpc.StatusCode}
            context.abort(codes[error.error_code], error.message)

    def response(self, request):
        spec = request.model_spec
        self.model.check(spec.name, spec.version.value if spec.HasField("version") else None)
        signature = spec.signature_name or "serving_default"
        inputs = {name: tf.make_ndarray(tensor) for name, tensor in request.inputs.items()}
        outputs = self.model.predict(signature, inputs)
        response = predict_pb2.PredictResponse()
        response.model_spec.name = self.model.name
        response.model_spec.version.value = VERSION
        response.model_spec.signature_name = signature
        for name in request.output_filter or outputs:
            if name not in outputs:
                raise invalid(f"output tensor alias not found in signature: {name}")
            response.outputs[name].CopyFrom(tf.make_tensor_proto(outputs[name]))
        return response


# === REST ===


def is_binary(value):
    return isinstance(value, dict) and set(value) == {"b64"}


def without_base64(value):
    """The value with `{"b64": ...}` decoded, wherever it is."""
    if is_binary(value):
        return base64.b64decode(value["b64"], validate=True)
    return [without_base64(item) for item in value] if isinstance(value, list) else value


def columns(body, specs):
    """The inputs of a request by name, in either format."""
    if ("instances" in body) == ("inputs" in body):
        raise invalid("Request must have one of the keys 'instances' and 'inputs'")
    if "inputs" in body:
        inputs = body["inputs"]
        is_named = isinstance(inputs, dict) and not is_binary(inputs)
        return inputs if is_named else dict.fromkeys(specs, inputs)
    rows = body["instances"]
    if not isinstance(rows, list) or not rows:
        raise invalid("'instances' must be a list with at least one value")
    if not isinstance(rows[0], dict) or is_binary(rows[0]):
        return dict.fromkeys(specs, rows)
    return {name: [row[name] for row in rows] for name in rows[0]}


def to_array(value, spec):
    try:
        value = without_base64(value)
        return np.array(value, object if spec.dtype == tf.string else spec.dtype.as_numpy_dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise invalid(f"JSON value is not of type {spec.dtype.name}: {error}") from error


def to_json(name, value):
    """A value of an output; strings are base64 in outputs of binary data, by their name."""
    if isinstance(value, list):
        return [to_json(name, item) for item in value]
    if not isinstance(value, bytes):
        return value
    if name.endswith("_bytes"):
        return {"b64": base64.b64encode(value).decode()}
    return value.decode()


class Handler(BaseHTTPRequestHandler):
    """The REST API of the `model` of its server."""

    def do_GET(self):
        self.respond(r"/v1/models/([^/:]+)(?:/versions/(\d+))?", self.status)

    def do_POST(self):
        self.respond(r"/v1/models/([^/:]+)(?:/versions/(\d+))?:predict", self.predict)

    def log_message(self, *arguments):
        """Prints nothing."""

    def respond(self, pattern, method):
        found = re.fullmatch(pattern, self.path)
        try:
            if found is None:
                raise invalid(f"Malformed request: {self.command} {self.path}")
            name, version = found.groups()
            self.server.model.check(name, version and int(version))
            status, body = 200, method()
        except tf.errors.OpError as error:
            status, body = HTTP_STATUS.get(error.error_code, 500), {"error": error.message}
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def status(self):
        status = {"error_code": "OK", "error_message": ""}
        version = {"version": str(VERSION), "state": "AVAILABLE", "status": status}
        return {"model_version_status": [version]}

    def predict(self):
        try:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        except json.JSONDecodeError as error:
            raise invalid(f"JSON Parse error: {error}") from error
        signature = body.get("signature_name", "serving_default")
        specs = self.server.model.specs(signature)
        inputs = {
            name: to_array(value, specs[name]) if name in specs else value
            for name, value in columns(body, specs).items()
        }
        outputs = self.server.model.predict(signature, inputs)
        outputs = {name: to_json(name, value.tolist()) for name, value in outputs.items()}
        only = next(iter(outputs.values())) if len(outputs) == 1 else None
        if "inputs" in body:
            return {"outputs": outputs if only is None else only}
        rows = [dict(zip(outputs, row, strict=True)) for row in zip(*outputs.values(), strict=True)]
        return {"predictions": rows if only is None else only}


@contextlib.contextmanager
def serve(name, signatures):
    """Serves a model while the context lasts, and yields the ports of gRPC and REST."""
    model = Model(name, signatures)
    grpc_server = grpc.server(ThreadPoolExecutor(2))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
        PredictionService(model), grpc_server
    )
    grpc_port = grpc_server.add_insecure_port("localhost:0")
    grpc_server.start()
    rest_server = ThreadingHTTPServer(("localhost", 0), Handler)
    rest_server.model = model
    threading.Thread(target=rest_server.serve_forever, daemon=True).start()
    try:
        yield grpc_port, rest_server.server_port
    finally:
        rest_server.shutdown()
        rest_server.server_close()
        grpc_server.stop(None)
