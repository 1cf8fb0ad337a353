"""Export as a SavedModel for TensorFlow Serving: from files or pixels to boxes."""

import contextlib
import errno
import json
import math
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import keras
import numpy as np

from keras_fpn.faster_rcnn import FasterRCNN
from keras_fpn.serving.folding import fold_normalization
from keras_fpn.stage import Float32Stage
from keras_fpn.validation import check_choice, check_int

# Images of a request that are decoded in parallel. Memory is bounded by `max_pixels` instead, since
# all of a request may be in a single image.
_PARALLEL_IMAGES = 8
_WARM_UP_IMAGE = (60, 80)  # Height and width, in the most common aspect ratio of cameras.
_BATCHING_PARAMETERS = """\
# For --enable_batching, with requests to the signature `encoded_images`: all `images` of a batch
# would have to be of one size. See examples/serving/README.md.
max_batch_size { value: %d }
batch_timeout_micros { value: 5000 }
max_enqueued_batches { value: 64 }
num_batch_threads { value: 2 }
"""


def export_saved_model(
    model: FasterRCNN,
    path: str | os.PathLike,
    *,
    shorter_edge: int = 800,
    longest_edge: int = 1333,
    frozen: bool = False,
    precision: str = "float32",
    class_names: Sequence[str] | None = None,
    errors_as_output: bool = False,
    max_images: int = 8,
    max_pixels: int | None = None,
    warm_up: bool = True,
) -> None:
    """Exports a SavedModel that TensorFlow Serving, or TensorFlow alone, can run.

    Two signatures contain everything from the file to the detections:

    - `serving_default`: `images`, uint8 `[batch, height, width, 3]` RGB of any size;
    - `encoded_images`: `image_bytes`, string `[batch]`, the contents of JPEG, PNG, GIF (first
      frame), BMP or still WebP files, whose sizes may differ within a request. A file that cannot
      be read is an InvalidArgumentError that names its position, unless `errors_as_output`. The
      sizes in all headers are checked before anything is decoded: one above
      `keras_fpn.data.image_files.MAX_PIXELS` is refused, and so is an image that takes the request
      over `max_pixels`.

    Images are resized as by `detect`, and padded to the largest of their request (or to the shape
    that the model was built for): a single image gets the detections that `model.predict` returns
    for the resized image.

    Both signatures return, with D the model's `max_detections`:

    - `detection_boxes`: float32 `[batch, D, 4]`, `ymin, xmin, ymax, xmax` relative to the height
      and width of the original image, within 0..1;
    - `detection_scores`: float32 `[batch, D]`, in descending order;
    - `detection_classes`: float32 `[batch, D]`, the model's labels 0..num_classes-1; float as
      clients of TensorFlow's object detection models expect;
    - `detection_class_names`: string `[batch, D]`, if `class_names` are given;
    - `num_detections`: float32 `[batch]`, the number of rows that are detections. The rows after
      them are padding: zeros, also as class, and empty names;
    - `error`: string `[batch]`, only of `encoded_images` and if `errors_as_output`: why a file was
      refused, empty for the others.

    Batch norms are folded into convolutions. Beside `path`, in the folder of the model, a
    `model.config` and a `batching_parameters.txt` for the server are written unless they exist.

    Args:
        model: the detector; it is left unchanged.
        path: a new folder, such as `models/detector/1`: the server expects numbered versions in the
            folder of a model. It appears under this name once it is complete.
        shorter_edge: target length of the shorter edge, in pixels. Defaults to 800.
        longest_edge: limit of the longer edge, in pixels, which takes precedence. Defaults to 1333.
        frozen: whether weights are constants of the graph rather than variables in files of their
            own. Constants make inference a few percent faster; loading takes several times as long
            and twice the memory. Defaults to False.
        precision: "float32" (the default), or "bfloat16" for weights and features: half the size,
            and faster on hardware that supports it. Box arithmetic is float32 in both.
        class_names: name of every label, such as `model.class_names`, for the output
            `detection_class_names`. Defaults to None, without that output.
        errors_as_output: whether a file that cannot be read, or exceeds `max_pixels`, has no
            detections and a sentence in the output `error`, rather than failing the whole request,
            and with it those that a server batches with it. Defaults to False.
        max_images: limit of the number of images in a request, or in a batch of requests; a
            request above it fails. Memory grows by the detector's feature maps per image. Defaults
            to 8.
        max_pixels: limit of the pixels of all images of a request before resizing, at least 4800,
            the warm-up request's. Each takes about 15 bytes while it is decoded and resized.
            Defaults to None, the limit of a single image: 178,956,970, or 2.7 GB.
        warm_up: whether `assets.extra` contains a request to each signature, which the server runs
            before it reports itself ready, so that no client waits for tracing. Defaults to True.

    Raises:
        NotImplementedError: on another backend than TensorFlow.
        TypeError: if `model` is not a `FasterRCNN`.
        ValueError: if an argument is out of range, or resized images would not fit in the shape
            that the model was built for.
        FileExistsError: if `path` exists.
        OSError: if a file cannot be written, for example on a full disk; nothing remains of `path`.
    """
    if keras.backend.backend() != "tensorflow":
        raise NotImplementedError(
            "export_saved_model() needs the TensorFlow backend, on which a .keras file of any "
            f"backend loads; received the {keras.backend.backend()} backend."
        )
    from keras_fpn.data.image_files import MAX_PIXELS

    max_pixels = MAX_PIXELS if max_pixels is None else max_pixels
    _check_arguments(
        model, shorter_edge, longest_edge, precision, class_names, max_images, max_pixels
    )
    path = Path(os.path.abspath(path))
    if os.path.lexists(path):
        raise FileExistsError(
            f"`path` must be a new folder; received {str(path)!r}, which already exists."
        )
    is_version = path.name.isascii() and path.name.isdigit()
    if not is_version:
        warnings.warn(
            "TensorFlow Serving loads versions of a model by their numbers, as in "
            f"'models/detector/1'; it will not load {str(path)!r}.",
            stacklevel=2,
        )
    with _appears_complete(path) as folder, _os_errors(path):
        copy = _inference_copy(model, precision)
        signatures = _signatures(
            copy,
            shorter_edge,
            longest_edge,
            frozen,
            class_names,
            errors_as_output,
            max_images,
            max_pixels,
        )
        _save(signatures, [] if frozen else copy.variables, folder)
        if warm_up:
            _write_warm_up_requests(folder, path.parent.name)
        if is_version:
            _write_where_missing(path.parent / "model.config", _model_config(path.parent))
            batching = _BATCHING_PARAMETERS % min(4, max_images)
            _write_where_missing(path.parent / "batching_parameters.txt", batching)


def _check_arguments(
    model, shorter_edge, longest_edge, precision, class_names, max_images, max_pixels
):
    if not isinstance(model, FasterRCNN):
        raise TypeError(f"`model` must be a FasterRCNN; received {type(model).__name__}.")
    check_int("shorter_edge", shorter_edge)
    check_int("longest_edge", longest_edge)
    check_int("max_images", max_images, maximum=2**31 - 1)
    check_int("max_pixels", max_pixels, math.prod(_WARM_UP_IMAGE), maximum=2**63 - 1)
    check_choice("precision", precision, ("float32", "bfloat16"))
    if class_names is not None and (
        isinstance(class_names, str)
        or len(class_names) != model.num_classes
        or not all(isinstance(name, str) for name in class_names)
    ):
        raise ValueError(
            f"`class_names` must have one name for each of the {model.num_classes} classes; "
            f"received {class_names!r}."
        )
    if any(edge is not None and edge < longest_edge for edge in model.image_shape[:2]):
        raise ValueError(
            f"`longest_edge` must fit the image shape {tuple(model.image_shape)} that the model "
            f"was built for; received {longest_edge}."
        )


# === The model ===


def _inference_copy(model: FasterRCNN, precision: str) -> FasterRCNN:
    """Returns the detector with folded norms, features in `precision`, and relative boxes.

    Boxes relative to the resized image are relative to the original image as well.
    """
    folded = fold_normalization(model)
    config = folded.get_config()
    config["detections"]["config"]["bounding_box_format"] = "rel_yxyx"
    policy = keras.dtype_policies.serialize(keras.DTypePolicy(precision))
    for stage in model.stage_names:
        if not isinstance(getattr(model, stage), Float32Stage):
            config[stage] = _with_policy(config[stage], policy)
    copy = FasterRCNN.from_config(config)
    copy.set_weights(folded.get_weights())
    return copy


def _with_policy(config, policy: dict):
    """Returns the config of a layer or model with the dtype policy of every layer replaced."""
    if isinstance(config, dict):
        if config.get("class_name") == "DTypePolicy":
            return policy
        return {name: _with_policy(value, policy) for name, value in config.items()}
    if isinstance(config, (list, tuple)):
        return type(config)(_with_policy(value, policy) for value in config)
    return config


# === The graph ===


def _signatures(
    model: FasterRCNN,
    shorter_edge: int,
    longest_edge: int,
    frozen: bool,
    class_names: Sequence[str] | None,
    errors_as_output: bool,
    max_images: int,
    max_pixels: int,
) -> dict:
    """Returns the function of each signature, traced once for all sizes."""
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    from keras_fpn.data.image_files import read_image, read_image_size, resize_image, resized_size

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None, None, 3], tf.float32),
            tf.TensorSpec([None, 2], tf.int32),
        ],
        autograph=False,
    )
    def detect(images, image_sizes):
        if model.image_shape[:2] != (None, None):
            padding = [
                [0, 0 if edge is None else edge - size]
                for edge, size in zip(
                    model.image_shape, tf.unstack(tf.shape(images))[1:], strict=True
                )
            ]
            images = tf.ensure_shape(tf.pad(images, [[0, 0], *padding]), [None, *model.image_shape])
        found = model({"images": images, "image_sizes": image_sizes}, training=False)
        return [found[name] for name in ("boxes", "scores", "labels", "num_detections")]

    # Both signatures call one function, so that the weights are stored once.
    detect = detect.get_concrete_function()
    if frozen:
        detect = convert_variables_to_constants_v2(detect, lower_control_flow=False)

    def answer(images, image_sizes, problems=None):
        """Returns the outputs for a batch of resized images; those with problems have none."""
        boxes, scores, labels, count = detect(images, image_sizes)
        if problems is not None:
            is_read = tf.equal(problems, "")
            boxes = tf.where(is_read[:, None, None], boxes, 0)
            scores = tf.where(is_read[:, None], scores, 0)
            labels = tf.where(is_read[:, None], labels, -1)
            count = tf.where(is_read, count, 0)
        rows = model.detections.max_detections
        outputs = {
            "detection_boxes": tf.ensure_shape(boxes, [None, rows, 4]),
            "detection_scores": tf.ensure_shape(scores, [None, rows]),
            "detection_classes": tf.cast(tf.maximum(labels, 0), tf.float32),
            "num_detections": tf.cast(count, tf.float32),
        }
        if class_names is not None:
            names = tf.gather(tf.constant(list(class_names)), tf.maximum(labels, 0))
            outputs["detection_class_names"] = tf.where(labels >= 0, names, "")
        if problems is not None:
            outputs["error"] = problems
        return outputs

    def assert_no_problem(problem):
        return tf.debugging.Assert(tf.equal(problem, ""), [problem])

    def serving_default(images):
        shape = tf.shape(images)
        pixels = tf.reduce_prod(tf.cast(shape[:3], tf.int64))
        problem = tf.constant("")
        for is_problem, text in (
            (pixels > max_pixels, f"is over the limit of {max_pixels} pixels in a request"),
            (shape[0] > max_images, f"is over the limit of {max_images} images in a request"),
            (tf.equal(pixels, 0), "has no pixels"),
        ):
            described = tf.strings.format("`images` of shape {} " + text, (shape,))
            problem = tf.where(is_problem, described, problem)
        with tf.control_dependencies([assert_no_problem(problem)]):
            size = resized_size(shape[1:3], shorter_edge, longest_edge)
        return answer(resize_image(images, size), tf.tile(size[None], [shape[0], 1]))

    def assert_readable(problems):
        """Returns an op that fails if any of `problems`, one string per image, is not empty."""
        rows = tf.where(tf.not_equal(problems, ""))[:, 0]
        named = tf.strings.join(
            ["image_bytes[", tf.strings.as_string(rows), "]: ", tf.gather(problems, rows)]
        )
        count = tf.strings.join(
            [tf.strings.as_string(tf.size(n)) for n in (rows, problems)], separator=" of "
        )
        text = [count, "images cannot be read:", tf.strings.reduce_join(named, separator="; ")]
        return tf.debugging.Assert(
            tf.equal(tf.size(rows), 0), [tf.strings.join(text, separator=" ")]
        )

    def for_each(function: Callable, values, signature):
        return tf.map_fn(
            function, values, fn_output_signature=signature, parallel_iterations=_PARALLEL_IMAGES
        )

    def excess(sizes):
        """Returns a problem for each image that, with those accepted before, is too many pixels."""
        pixels = tf.reduce_prod(tf.cast(sizes, tf.int64), axis=1)
        accepted = tf.scan(
            lambda total, own: tf.where(total + own > max_pixels, total, total + own),
            pixels,
            tf.constant(0, tf.int64),
        )
        total = tf.concat([[0], accepted[:-1]], axis=0) + pixels
        end = f" pixels, over the limit of {max_pixels}"
        described = tf.strings.join(["takes the request to ", tf.strings.as_string(total), end])
        return tf.where(total > max_pixels, described, "")

    def encoded_images(image_bytes):
        count = tf.size(image_bytes)
        problem = tf.where(
            count > max_images,
            tf.strings.format(
                f"`image_bytes` has {{}} files, over the limit of {max_images} in a request",
                (count,),
            ),
            tf.where(count > 0, "", "`image_bytes` has no files"),
        )
        with tf.control_dependencies([assert_no_problem(problem)]):
            files = tf.identity(image_bytes)
        text = tf.TensorSpec([], tf.string)
        sizes, problems = for_each(read_image_size, files, (tf.TensorSpec([2], tf.int32), text))
        problems = tf.where(tf.equal(problems, ""), excess(sizes), problems)
        # Nothing is decoded before all headers have been checked.
        with tf.control_dependencies([] if errors_as_output else [assert_readable(problems)]):
            sizes = resized_size(sizes, shorter_edge, longest_edge)
        # Refused files are neither decoded, nor do they enlarge the batch.
        is_accepted = tf.equal(problems, "")
        files = tf.where(is_accepted, files, "")
        sizes = tf.where(is_accepted[:, None], sizes, 1)
        height, width = tf.unstack(tf.reduce_max(sizes, axis=0))

        def read_resized(file_and_size):
            file, size = file_and_size
            image, problem = read_image(file)

            def resized():
                padding = [[0, height - size[0]], [0, width - size[1]], [0, 0]]
                return tf.pad(resize_image(image, size), padding)

            nothing = tf.zeros([height, width, 3])
            return tf.cond(tf.equal(problem, ""), resized, lambda: nothing), problem

        pixels = tf.TensorSpec([None, None, 3], tf.float32)
        images, found = for_each(read_resized, (files, sizes), (pixels, text))
        problems = tf.where(is_accepted, found, problems)
        if errors_as_output:
            return answer(images, sizes, problems)
        with tf.control_dependencies([assert_readable(problems)]):
            images = tf.identity(images)
        return answer(images, sizes)

    inputs = {
        serving_default: tf.TensorSpec([None, None, None, 3], tf.uint8, name="images"),
        encoded_images: tf.TensorSpec([None], tf.string, name="image_bytes"),
    }
    return {
        function.__name__: tf.function(
            function, input_signature=[spec], autograph=False
        ).get_concrete_function()
        for function, spec in inputs.items()
    }


# === The folder ===


@contextlib.contextmanager
def _appears_complete(path: Path):
    """Yields a folder that is renamed to `path` on success, and removed on failure.

    Its temporary name is not a number, so that a server never loads an incomplete version.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        yield folder
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        folder.rename(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _os_errors(path: Path):
    """Raises TensorFlow's errors of files as what they are, errors of the operating system."""
    import tensorflow as tf

    try:
        yield
    except tf.errors.OpError as error:
        for number in errno.errorcode:
            if f"; {os.strerror(number)}" in error.message:
                raise OSError(number, os.strerror(number), str(path)) from error
        raise


def _save(signatures: dict, variables: Sequence[keras.Variable], folder: Path) -> None:
    import tensorflow as tf

    module = tf.Module()
    module.weights = [variable.value for variable in variables]
    # Gradients are not needed, and custom ones that capture a tensor cannot be saved.
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    tf.saved_model.save(module, str(folder), signatures, options)


def _model_config(folder: Path) -> str:
    """Returns a `ModelServerConfig` of one model as text; the server requires absolute paths."""
    name, base_path = (json.dumps(text, ensure_ascii=False) for text in (folder.name, str(folder)))
    return (
        "model_config_list {\n  config {\n"
        f'    name: {name}\n    base_path: {base_path}\n    model_platform: "tensorflow"\n'
        "  }\n}\n"
    )


def _write_where_missing(path: Path, text: str) -> None:
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        pass
    except OSError:
        path.unlink(missing_ok=True)  # It would never be written over.
        raise


# === Warm-up ===


def _write_warm_up_requests(folder: Path, model_name: str) -> None:
    """Writes a request to each signature to the file that TensorFlow Serving reads."""
    import tensorflow as tf

    pixels = np.random.RandomState(0).randint(0, 256, (*_WARM_UP_IMAGE, 3)).astype("uint8")
    requests = {
        "serving_default": {"images": tf.make_tensor_proto(pixels[None])},
        "encoded_images": {
            "image_bytes": tf.make_tensor_proto([tf.io.encode_jpeg(pixels).numpy()])
        },
    }
    (folder / "assets.extra").mkdir()
    file = folder / "assets.extra" / "tf_serving_warmup_requests"
    with tf.io.TFRecordWriter(str(file)) as writer:
        for signature, inputs in requests.items():
            writer.write(_prediction_log(model_name, signature, inputs))


def _prediction_log(model_name: str, signature: str, inputs: dict) -> bytes:
    """Returns a request as a `PredictionLog` (tensorflow_serving/apis/prediction_log.proto).

    It is encoded by hand, which saves a dependency on tensorflow-serving-api.
    """
    model_spec = _field(1, model_name.encode()) + _field(3, signature.encode())
    request = _field(1, model_spec)
    for name, tensor in inputs.items():
        request += _field(2, _field(1, name.encode()) + _field(2, tensor.SerializeToString()))
    return _field(6, _field(1, request))  # PredictionLog.predict_log.request


def _field(number: int, content: bytes) -> bytes:
    """Returns a field of a protobuf message: bytes, text or another message."""
    length, encoded = len(content), bytearray([number << 3 | 2])
    while length >= 128:
        encoded.append(length % 128 + 128)
        length //= 128
    return bytes(encoded) + bytes([length]) + content
