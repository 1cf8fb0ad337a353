"""Measures a served detector against `model.predict`: size, loading, first answer, latency, memory.

    python benchmarks/serving.py
    python benchmarks/serving.py --backbone resnet18 --shorter-edge 320 --longest-edge 533

The SavedModel runs in this process for the latencies, in turns with `model.predict` on the same
image, resized; and for the rest in processes of their own, without a Keras model. Needs
tensorflow-serving-api, to read the warm-up requests.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

VARIANTS = {
    "variables": {},
    "constants": {"frozen": True},
    "bfloat16": {"precision": "bfloat16"},
}
CAMERA = (480, 640)  # Height and width of the image that latencies are measured with.
MAX_IMAGES = 8  # The default limit of a request.


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--weights", help="as build_fpn_faster_rcnn takes them (default: random)")
    parser.add_argument("--shorter-edge", type=int, default=800)
    parser.add_argument("--longest-edge", type=int, default=1333)
    parser.add_argument("--repeats", type=int, default=10, help="turns of the latencies")
    parser.add_argument("--requests", type=int, default=200, help="of the measured memory")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--in-own-process", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_own_process:
        what, path, warm = options.in_own_process
        results = {
            "load": lambda: answer_first(path, warm == "warm"),
            "grow": lambda: grow(path, options),
            "peak": lambda: peak(path),
        }
        print(json.dumps(results[what]()))
        return

    model = build(options)
    edges = {"shorter_edge": options.shorter_edge, "longest_edge": options.longest_edge}
    with tempfile.TemporaryDirectory() as folder:
        for variant in options.variants:
            measure(model, variant, Path(folder) / variant / "1", edges, options)


def build(options: argparse.Namespace):
    import keras

    import keras_fpn

    keras.utils.set_random_seed(0)
    if options.weights:
        return keras_fpn.build_fpn_faster_rcnn(weights=options.weights)
    # Random weights score every class alike: without a threshold there are boxes to thin out.
    return keras_fpn.build_fpn_faster_rcnn(
        80, options.backbone, normalization="frozen_batch_norm", score_threshold=0.0
    )


def measure(model, variant: str, path: Path, edges: dict, options: argparse.Namespace) -> None:
    import keras

    from keras_fpn.serving.saved_model import export_saved_model

    started = time.perf_counter()
    export_saved_model(model, path, **edges, **VARIANTS[variant])
    print(f"\n{variant}: exported in {time.perf_counter() - started:.1f} s")
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    weights = 4 * sum(int(np.prod(weight.shape)) for weight in model.weights)
    print(f"  on disk                 {size / 1e6:8.1f} MB, the weights are {weights / 1e6:.1f} MB")
    for warm in ("cold", "warm"):
        found = in_own_process("load", path, warm, options)
        print(
            f"  {warm}: loaded in {found['load']:.2f} s, "
            f"{'warm-up ' + format(found['warm_up'], '.2f') + ' s, ' if warm == 'warm' else ''}"
            f"first answer {found['first']:.2f} s, second {found['second']:.2f} s, resident "
            f"{found['resident']:.0f} MB"
        )
    found = in_own_process("grow", path, "cold", options)
    print(
        f"  requests of {found['sizes']} sizes: {found['traces']} traces, resident "
        + ", ".join(f"{size:.0f} MB after {number}" for number, size in found["resident"].items())
    )
    found = in_own_process("peak", path, "cold", options)
    print(
        f"  resident {found['loaded']:.0f} MB, peak {found['1']:.0f} MB with all pixels of a "
        f"request in one image, {found[str(MAX_IMAGES)]:.0f} MB with these in {MAX_IMAGES}"
    )

    image = picture(*CAMERA)
    served = load(path)
    resized = resize(image, **edges)
    content = encode(image)
    calls = {
        "served pixels": lambda: served["serving_default"](images=image),
        "served JPEG": lambda: served["encoded_images"](image_bytes=content),
        "model.predict": lambda: model.predict(resized, verbose=0),
    }
    seconds = {name: [] for name in calls}
    for turn in range(options.repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if turn > 0:  # The first is for warming up.
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        spread = f"{min(seconds[name]):.3f}..{max(seconds[name]):.3f}"
        print(
            f"  {name:23s} {median:8.3f} s ({spread}), "
            f"{median / medians['model.predict']:.2f} of model.predict"
        )
    keras.backend.clear_session(free_memory=True)


def in_own_process(what: str, path: Path, warm: str, options: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--in-own-process", what, str(path), warm]
    command += ["--requests", str(options.requests), "--longest-edge", str(options.longest_edge)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# === In processes with TensorFlow alone ===


def load(path):
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    # The signatures do not keep what they call alive.
    return dict(loaded.signatures) | {"": loaded}


def answer_first(path: str, warm: bool) -> dict:
    import tensorflow as tf

    image = tf.constant(picture(*CAMERA))
    started = time.perf_counter()
    served = load(path)
    result = {"load": time.perf_counter() - started}
    started = time.perf_counter()
    if warm:
        for signature, inputs in warm_up_requests(path):
            served[signature](**inputs)
    result["warm_up"] = time.perf_counter() - started
    for name in ("first", "second"):
        started = time.perf_counter()
        served["serving_default"](images=image)["num_detections"].numpy()
        result[name] = time.perf_counter() - started
    return result | {"resident": resident()}


def warm_up_requests(path: str):
    """The signature and the inputs of each stored request, as a server reads them."""
    import tensorflow as tf
    from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

    file = Path(path) / "assets.extra" / "tf_serving_warmup_requests"
    for record in tf.data.TFRecordDataset(str(file)):
        request = PredictionLog.FromString(record.numpy()).predict_log.request
        inputs = {name: tf.constant(tf.make_ndarray(x)) for name, x in request.inputs.items()}
        yield request.model_spec.signature_name, inputs


def grow(path: str, options: argparse.Namespace) -> dict:
    """Memory while requests of ever new sizes are answered, by both signatures in turns."""
    import tensorflow as tf
    from tensorflow.python.eager import context

    served = load(path)
    random = np.random.RandomState(0)
    sizes, functions, memory = set(), None, {}
    for number in range(1, options.requests + 1):
        size = tuple(random.randint(options.longest_edge // 4, options.longest_edge, 2))
        sizes.add(size)
        image = picture(*size)
        if number % 2:
            served["serving_default"](images=tf.constant(image))
        else:
            served["encoded_images"](image_bytes=tf.constant(encode(image)))
        if number == 20:
            functions = len(context.context().list_function_names())
        if number in (20, options.requests // 2, options.requests):
            memory[number] = resident()
    traces = len(context.context().list_function_names()) - functions
    return {"resident": memory, "sizes": len(sizes), "traces": traces}


def peak(path: str) -> dict:
    """Megabytes at most while the largest requests that the default limits allow are answered."""
    import tensorflow as tf

    from keras_fpn.data.image_files import MAX_PIXELS

    served = load(path)
    served["serving_default"](images=tf.constant(picture(*CAMERA)))
    memory = {"loaded": resident()}
    for count in (1, MAX_IMAGES):
        # A batch is widest and highest if it has images of both orientations, and progressive JPEGs
        # take the most memory to decode.
        short = int((MAX_PIXELS / count * 3 / 5) ** 0.5)
        long = MAX_PIXELS // count // short
        files = [
            tf.io.encode_jpeg(
                tf.zeros([*size, 3], tf.uint8), progressive=True, chroma_downsampling=False
            ).numpy()
            for size in ((short, long), (long, short))[:count]
        ]
        files = (files * count)[:count]
        served["encoded_images"](image_bytes=tf.constant(files))
        memory[str(count)] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return memory


def resident() -> float:
    """Megabytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


# === Images ===


def picture(height: int, width: int) -> np.ndarray:
    """uint8 `[1, height, width, 3]`: blocks of colours, which give a detector something to see."""
    random = np.random.RandomState(height * 10_000 + width)
    blocks = random.randint(0, 256, (-(-height // 40), -(-width // 40), 3)).astype("uint8")
    return blocks.repeat(40, axis=0).repeat(40, axis=1)[None, :height, :width]


def encode(image: np.ndarray):
    import tensorflow as tf

    return tf.io.encode_jpeg(image[0])[None]


def resize(image: np.ndarray, shorter_edge: int, longest_edge: int) -> np.ndarray:
    from keras_fpn.data.image_files import resize_image, resized_size

    size = resized_size(np.array(image.shape[1:3]), shorter_edge, longest_edge)
    return resize_image(image, size).numpy()


if __name__ == "__main__":
    main()
