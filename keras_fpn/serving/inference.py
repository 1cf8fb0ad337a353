"""Detection in image files, PIL images and arrays of any size."""

import functools
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy as np

from keras_fpn.boxes import convert_boxes
from keras_fpn.faster_rcnn import FasterRCNN
from keras_fpn.image_pyramid import MERGE_METHODS, merge_scales
from keras_fpn.validation import check_choice, check_int, check_pixels

# With more batches than this, verbose="auto" shows a progress bar.
_FEW_BATCHES = 3
# A PIL image reads its file when its pixels are first accessed, which is not thread-safe.
_PIL_LOCK = threading.Lock()


def detect(
    model: FasterRCNN,
    images: Any,
    *,
    batch_size: int = 4,
    shorter_edge: int | Sequence[int] = 800,
    longest_edge: int = 1333,
    merge: str = "nms",
    score_threshold: float | None = None,
    verbose: str | int = "auto",
) -> list[dict[str, np.ndarray]]:
    """Detects objects in images of any size and kind.

    An image is resized as in training: its shorter edge to `shorter_edge`, or less if its longer
    edge would exceed `longest_edge`. Images of similar shape share a batch, and files are decoded
    one batch ahead of the model, so that thousands of paths take the memory of two batches. If
    every new shape is compiled (XLA, JAX), batches are padded to one of four shapes.

    Several shorter edges make a featurized image pyramid (FPN, Fig. 1a): the detector runs on the
    image at each of these scales, and the detections are merged (`keras_fpn.image_pyramid`), with
    the NMS IoU threshold and the number of detections that the model has. Each scale takes its own
    time and, if shapes are compiled, its own four shapes.

    TensorFlow decodes and resizes, on every backend. The EXIF orientation is not applied, as in
    training.

    Args:
        model: the detector.
        images: one image or a sequence of images, of any mixture of kinds and sizes. An image is a
            path; the bytes of a JPEG, PNG, GIF, BMP or WebP file; a PIL image; or an array of
            pixels in 0..255, `[height, width, 3]` RGB or `[height, width]` gray. An array `[batch,
            height, width, 3]` is a sequence of images.
        batch_size: largest number of images in a batch. Defaults to 4.
        shorter_edge: target length of the shorter edge, in pixels, or a sequence of several.
            Defaults to 800.
        longest_edge: limit of the longer edge, in pixels, the same at all scales, as in
            Detectron2's test-time augmentation, where it is 4000. Defaults to 1333.
        merge: `method` of `merge_scales`, "nms" or "vote" (box voting). Defaults to "nms".
        score_threshold: detections with a score above this are returned. Defaults to None, all that
            the model returns, which has a threshold of its own.
        verbose: 1 shows a progress bar, 0 none; "auto", the default, shows one for more than three
            batches.

    Returns:
        For each image, in the order given, `{"boxes": float32 [N, 4], "scores": float32 [N],
        "labels": int32 [N]}`, sorted by score, without padding rows. Boxes are `xyxy` in pixels of
        the original image, whatever `bounding_box_format` the model has.

    Raises:
        FileNotFoundError: if a path is not a file; all are checked before the model runs.
        ValueError: if a file cannot be read or an array is not an image, naming which. All headers
            are read before the model runs; damage after the header is found when the batch of the
            file is decoded.
        TypeError: if an image is neither a path, bytes, a PIL image nor an array of numbers.
    """
    if not isinstance(model, FasterRCNN):
        raise TypeError(f"`model` must be a FasterRCNN; received {type(model).__name__}.")
    batch_size = check_int("batch_size", batch_size)
    shorter_edges = _check_edges(shorter_edge)
    longest_edge = check_int("longest_edge", longest_edge)
    check_choice("merge", merge, MERGE_METHODS)
    if verbose not in ("auto", 0, 1):
        raise ValueError(f"`verbose` must be 'auto', 0 or 1; received {verbose!r}.")
    images = _as_list(images)
    if not images:
        return []

    # For each scale, what was found in each image.
    found: list[list] = [[None] * len(images) for _ in shorter_edges]
    with ThreadPoolExecutor(min(batch_size, os.cpu_count() or 1)) as threads:
        sizes = _sizes(images, threads)
        resized_sizes = _graph_functions()["resized_sizes"]
        resized = [resized_sizes(sizes, edge, longest_edge).numpy() for edge in shorter_edges]
        batches = [
            (scale, *batch)
            for scale, edge in enumerate(shorter_edges)
            for batch in _batches(model, resized[scale], edge, longest_edge, batch_size)
        ]
        progress = None
        if verbose == 1 or (verbose == "auto" and len(batches) > _FEW_BATCHES):
            progress = keras.utils.Progbar(len(images) * len(found), unit_name="image")

        def start(batch: tuple) -> tuple:
            scale, rows, shape = batch
            futures = [
                threads.submit(
                    _resized_pixels, images[row], _name(images[row], row), resized[scale][row]
                )
                for row in rows
            ]
            return scale, rows, shape, futures

        for scale, rows, shape, futures in _one_ahead(start, batches):
            pixels = np.zeros((len(rows), *shape, 3), "float32")
            for image, future in zip(pixels, futures, strict=True):
                height, width = future.result().shape[:2]
                image[:height, :width] = future.result()
            inputs = {"images": pixels, "image_sizes": resized[scale][rows]}
            detections = _to_xyxy(model, model.predict_on_batch(inputs), inputs["image_sizes"])
            for i, row in enumerate(rows):
                found[scale][row] = _own_detections(
                    {name: values[i] for name, values in detections.items()},
                    resized[scale][row],
                    sizes[row],
                )
            if progress is not None:
                progress.update(sum(one is not None for one in itertools.chain(*found)))
    if len(found) == 1:
        results = found[0]
    else:
        results = [
            merge_scales(
                at_scales,
                nms_iou_threshold=model.detections.nms_iou_threshold,
                max_detections=model.detections.max_detections,
                method=merge,
            )
            for at_scales in zip(*found, strict=True)
        ]
    if score_threshold is not None:
        # Not before: boxes of low scores vote too.
        results = [_above(score_threshold, one) for one in results]
    return results


def _check_edges(shorter_edge: int | Sequence[int]) -> tuple[int, ...]:
    """Returns the shorter edge at each scale."""
    if not isinstance(shorter_edge, (Sequence, np.ndarray)):
        shorter_edge = [shorter_edge]
    if not len(shorter_edge):
        raise ValueError(f"`shorter_edge` must have at least one entry; received {shorter_edge!r}.")
    return tuple(check_int("shorter_edge", edge) for edge in shorter_edge)


# === Kinds of images ===


def _as_list(images: Any) -> list:
    if isinstance(images, (str, os.PathLike, bytes)) or _is_pil_image(images):
        return [images]
    if _is_array(images):
        return [images] if len(images.shape) in (2, 3) else list(images)
    if isinstance(images, dict) or not hasattr(images, "__iter__"):
        raise TypeError(
            "`images` must be a path, bytes of a file, a PIL image or an array, or a sequence of "
            f"these; received {type(images).__name__}."
        )
    return list(images)


def _is_pil_image(image: Any) -> bool:
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(image, pillow.Image)


def _is_array(image: Any) -> bool:
    return hasattr(image, "shape") and hasattr(image, "dtype")


def _is_path(image: Any) -> bool:
    return isinstance(image, (str, os.PathLike))


def _name(image: Any, row: int) -> str:
    """Returns the name of an image in errors."""
    return f"image {row} ({os.fspath(image)!r})" if _is_path(image) else f"image {row}"


def _content(image: Any) -> bytes:
    """Returns the contents of a file, given by its path or as bytes."""
    if isinstance(image, bytes):
        return image
    with open(image, "rb") as file:
        return file.read()


def _pixels(image: Any) -> np.ndarray:
    """Returns a PIL image or an array as float32 `[height, width, 3]`."""
    if _is_pil_image(image):
        with _PIL_LOCK:
            # Pillow itself would clip 16-bit pixels to 255.
            is_deep = image.mode.startswith("I;16")
            image = np.asarray(image) / 257 if is_deep else np.asarray(image.convert("RGB"))
    elif keras.ops.is_tensor(image):
        image = keras.ops.convert_to_numpy(image)
    image = np.asarray(image, "float32")
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=-1)


# === Sizes and batches ===


def _sizes(images: list, threads: ThreadPoolExecutor) -> np.ndarray:
    """Returns the height and width of every image, int32 `[N, 2]`, without decoding files.

    Raises:
        FileNotFoundError, ValueError, TypeError: see `detect`; errors name all such images.
    """
    names = [_name(image, row) for row, image in enumerate(images)]
    is_missing = [_is_path(image) and not os.path.isfile(image) for image in images]
    if any(is_missing):
        missing = itertools.compress(names, is_missing)
        raise FileNotFoundError(f"There is no image file for {_listed(missing)}.")
    sizes = np.zeros((len(images), 2), "int32")
    problems = []
    for row, (size, problem) in enumerate(threads.map(_size, images, names)):
        sizes[row] = size
        if problem:
            problems.append(f"{names[row]}: {problem}")
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(images)} images cannot be read: {_listed(problems)}."
        )
    return sizes


def _size(image: Any, name: str) -> tuple:
    """Returns the height and width of an image, and its problem, empty if there is none."""
    if _is_path(image) or isinstance(image, bytes):
        size, problem = _graph_functions()["read_size"](_content(image))
        return size.numpy(), problem.numpy().decode()
    if _is_pil_image(image):
        return (image.height, image.width), ""
    if not _is_array(image):
        raise TypeError(
            f"{name} must be a path, bytes of a file, a PIL image or an array; received "
            f"{type(image).__name__}."
        )
    check_pixels(name, image)
    shape = tuple(image.shape)
    if len(shape) not in (2, 3) or 0 in shape or shape[2:] not in ((), (3,)):
        return (0, 0), (
            f"must be [height, width, 3] or [height, width]; received an array of shape {shape}"
        )
    return shape[:2], ""


def _listed(names: Any) -> str:
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return "; ".join(names[:5]) + more


def _batches(
    model: FasterRCNN, resized: np.ndarray, shorter_edge: int, longest_edge: int, batch_size: int
) -> list[tuple[np.ndarray, tuple[int, int]]]:
    """Returns the rows of the images of each batch, and the height and width of the batch."""
    from keras_fpn.data.image_files import bucket_shapes

    fixed = model.image_shape[:2]
    shapes = np.array(bucket_shapes(shorter_edge, longest_edge))
    if None not in fixed:
        if (resized > fixed).any():
            raise ValueError(
                f"Images must fit the shape {model.image_shape} that the model was built for; with "
                f"shorter_edge={shorter_edge} and longest_edge={longest_edge}, received one that "
                f"is resized to {resized[(resized > fixed).any(axis=1)][0].tolist()}."
            )
        shapes = np.array([fixed])
    is_compiled = model.jit_compile and not model.run_eagerly
    shape_of = (resized[:, None] <= shapes).all(axis=-1).argmax(axis=1)
    order = np.lexsort((resized[:, 1], resized[:, 0], shape_of))
    batches = []
    for number, shape in enumerate(shapes):
        rows = order[shape_of[order] == number]
        for start in range(0, len(rows), batch_size):
            if is_compiled:
                # A smaller last batch would be compiled too; repeat a few images instead.
                start = min(start, max(len(rows) - batch_size, 0))
            members = rows[start : start + batch_size]
            if not is_compiled and None in fixed:
                shape = resized[members].max(axis=0)
            batches.append((members, (int(shape[0]), int(shape[1]))))
    return batches


def _one_ahead(start: Callable, batches: list) -> Iterator:
    """Yields `start(batch)` of each batch after starting the next."""
    started = None
    for batch in batches:
        following = start(batch)
        if started is not None:
            yield started
        started = following
    yield started


# === Pixels and boxes ===


@functools.cache
def _graph_functions() -> dict[str, Callable]:
    """Returns TensorFlow's functions, traced once for all sizes, and run on the CPU."""
    import tensorflow as tf

    from keras_fpn.data.image_files import read_image, read_image_size, resize_image, resized_size

    file, size = tf.TensorSpec([], tf.string), tf.TensorSpec([2], tf.int32)
    edge = tf.TensorSpec([], tf.int32)

    def on_cpu(function: Callable, *signature: tf.TensorSpec) -> Callable:
        def placed(*arguments):
            with tf.device("CPU"):
                return function(*arguments)

        return tf.function(placed, input_signature=signature, autograph=False)

    def read_resized(content, wanted):
        image, problem = read_image(content)
        pixels = tf.cond(
            tf.equal(problem, ""), lambda: resize_image(image, wanted), lambda: tf.zeros([0, 0, 3])
        )
        return tf.ensure_shape(pixels, [None, None, 3]), problem

    return {
        "read_size": on_cpu(read_image_size, file),
        "read_resized": on_cpu(read_resized, file, size),
        "resize": on_cpu(resize_image, tf.TensorSpec([None, None, 3], tf.float32), size),
        "resized_sizes": on_cpu(resized_size, tf.TensorSpec([None, 2], tf.int32), edge, edge),
    }


def _resized_pixels(image: Any, name: str, size: np.ndarray) -> np.ndarray:
    """Returns an image of any kind resized to `size`, float32 `[height, width, 3]`."""
    if _is_path(image) or isinstance(image, bytes):
        pixels, problem = _graph_functions()["read_resized"](_content(image), size)
        problem = problem.numpy().decode()
        if problem:
            raise ValueError(f"{name} cannot be read: {problem}.")
        return pixels.numpy()
    return _graph_functions()["resize"](_pixels(image), size).numpy()


def _to_xyxy(model: FasterRCNN, detections: dict, image_sizes: np.ndarray) -> dict:
    """Returns the detections of a batch as arrays, boxes as `xyxy` pixels of the batch."""
    boxes = convert_boxes(detections["boxes"], model.bounding_box_format, "xyxy", image_sizes)
    return {
        "boxes": keras.ops.convert_to_numpy(boxes),
        "scores": keras.ops.convert_to_numpy(detections["scores"]),
        "labels": keras.ops.convert_to_numpy(detections["labels"]),
    }


def _own_detections(detections: dict, resized: np.ndarray, size: np.ndarray) -> dict:
    """Returns the detections of one image in its original pixels, without padding rows."""
    real = detections["labels"] >= 0
    edges = np.tile(size[::-1], 2)
    boxes = detections["boxes"][real] * (edges / np.tile(resized[::-1], 2))
    return {
        "boxes": np.clip(boxes, 0, edges).astype("float32"),
        "scores": detections["scores"][real],
        "labels": detections["labels"][real],
    }


def _above(score_threshold: float, detections: dict) -> dict:
    """Returns the detections of an image with a score above the threshold."""
    above = detections["scores"] > score_threshold
    return {name: values[above] for name, values in detections.items()}
