"""Requests detections from TensorFlow Serving over gRPC and draws them.

    python grpc_client.py photo.jpg other.png --output found

Needs tensorflow-serving-api and Pillow.
"""

import argparse
import sys
from pathlib import Path

import grpc
import tensorflow as tf
from rest_client import draw_answer
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--server", default="localhost:8500", help="host and port")
    parser.add_argument("--model", default="detector", help="name of the model")
    parser.add_argument("--output", required=True, help="folder for the drawings")
    parser.add_argument("--score-threshold", type=float, default=0.5)
    options = parser.parse_args()

    request = predict_pb2.PredictRequest()
    request.model_spec.name = options.model
    request.model_spec.signature_name = "encoded_images"
    files = [Path(name).read_bytes() for name in options.images]
    request.inputs["image_bytes"].CopyFrom(tf.make_tensor_proto(files))
    with grpc.insecure_channel(options.server) as channel:
        service = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        try:
            response = service.Predict(request, timeout=60)
        except grpc.RpcError as error:
            sys.exit(f"error: {error.code().name}: {error.details()}")
    outputs = {name: tf.make_ndarray(tensor) for name, tensor in response.outputs.items()}
    if "detection_class_names" in outputs:
        names = outputs["detection_class_names"]
        outputs["detection_class_names"] = [[name.decode() for name in row] for row in names]
    if "error" in outputs:
        outputs["error"] = [error.decode() for error in outputs["error"]]
    draw_answer(options.images, outputs, options.output, options.score_threshold)


if __name__ == "__main__":
    main()
