"""Checks of what a user hands over: one sentence says what came and what is wanted."""

import keras
import numpy as np

from keras_fpn.boxes import convert_boxes


def check_images(inputs) -> tuple:
    """Splits a model input into images and their sizes, either of which may be symbolic.

    Args:
        inputs: `[B, H, W, 3]`, or `{"images": [B, H, W, 3], "image_sizes": [B, 2]}`.

    Returns:
        `(images, image_sizes)`; sizes are None where none are given.

    Raises:
        ValueError: for another structure, rank or number of channels.
        TypeError: for images that are not numbers.
    """
    image_sizes = None
    images = inputs
    if isinstance(inputs, dict):
        if "images" not in inputs or not set(inputs) <= {"images", "image_sizes"}:
            raise ValueError(
                "A dictionary of inputs has the keys 'images' and, for a padded batch, "
                f"'image_sizes'; received the keys {sorted(map(str, inputs))}."
            )
        images, image_sizes = inputs["images"], inputs.get("image_sizes")
    if not hasattr(images, "shape"):
        images = keras.ops.convert_to_tensor(images)
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[-1] not in (3, None):
        hint = " (add a batch dimension: images[None])" if len(shape) == 3 else ""
        raise ValueError(
            "Images are a batch [batch, height, width, 3] of RGB pixels; received shape "
            f"{shape}{hint}."
        )
    if 0 in shape[1:3]:
        raise ValueError(f"Images need at least one pixel; received shape {shape}.")
    dtype = keras.backend.standardize_dtype(images.dtype)
    if not dtype.startswith(("float", "bfloat", "uint", "int")):
        raise TypeError(f"Images are numbers in 0..255; received dtype {dtype}.")
    if image_sizes is not None:
        if not hasattr(image_sizes, "shape"):
            image_sizes = keras.ops.convert_to_tensor(image_sizes)
        sizes_shape = tuple(image_sizes.shape)
        if len(sizes_shape) != 2 or sizes_shape[-1] != 2:
            raise ValueError(
                "'image_sizes' holds height and width of each image, [batch, 2]; received shape "
                f"{sizes_shape}."
            )
        if None not in (shape[0], sizes_shape[0]) and shape[0] != sizes_shape[0]:
            raise ValueError(
                f"Received {shape[0]} images and 'image_sizes' of {sizes_shape[0]}; "
                "one row for each image is wanted."
            )
    return images, image_sizes


def check_training_arguments(model, x, y) -> None:
    """Checks what `FasterRCNN.fit` can check before the first step.

    Raises:
        NotImplementedError: on another backend than TensorFlow.
        ValueError: for a model compiled with a loss, or targets that `check_targets` refuses.
    """
    if keras.backend.backend() != "tensorflow":
        raise NotImplementedError(
            "fit() needs the TensorFlow backend; this is the "
            f"{keras.backend.backend()} backend, which can call and predict."
        )
    if getattr(model, "loss", None) is not None:
        raise ValueError(
            "FasterRCNN computes its own four losses; compile it without `loss` "
            f"(received loss={model.loss!r})."
        )
    if isinstance(y, dict) and all(hasattr(value, "__array__") for value in y.values()):
        images, image_sizes = check_images(x)
        check_targets(
            y,
            image_shape=images.shape,
            image_sizes=None if image_sizes is None else np.asarray(image_sizes),
            num_classes=model.num_classes,
            bounding_box_format=model.bounding_box_format,
        )
    elif y is not None and not isinstance(y, dict):
        raise ValueError(
            "Targets are {'boxes': [batch, objects, 4], 'labels': [batch, objects]}; received "
            f"{type(y).__name__}."
        )


def check_targets(targets, image_shape, image_sizes, num_classes, bounding_box_format) -> None:
    """Checks a ground truth in memory.

    Args:
        targets: `{"boxes": [B, G, 4], "labels": [B, G]}` arrays.
        image_shape: `[B, H, W, 3]` of the images.
        image_sizes: `[B, 2]` array, or None where images fill the batch.
        num_classes: labels are in 0..num_classes-1, or -1 in padding rows.
        bounding_box_format: of the boxes.

    Raises:
        ValueError: for missing keys, wrong shapes, labels out of range, boxes that are not finite,
            have no area, or lie outside their image, which is what a wrong format looks like.
    """
    if set(targets) != {"boxes", "labels"}:
        raise ValueError(
            f"Targets have the keys 'boxes' and 'labels'; received {sorted(map(str, targets))}."
        )
    boxes = np.asarray(targets["boxes"], "float64")
    labels = np.asarray(targets["labels"])
    batch = image_shape[0]
    if boxes.ndim != 3 or boxes.shape[-1] != 4 or labels.shape != boxes.shape[:2]:
        raise ValueError(
            "Targets are boxes [batch, objects, 4] and labels [batch, objects]; received shapes "
            f"{boxes.shape} and {labels.shape}."
        )
    if boxes.shape[0] != batch:
        raise ValueError(f"Received {batch} images and boxes of {boxes.shape[0]}.")
    if labels.size and not np.all(labels == np.floor(labels)):
        raise ValueError(f"Labels are whole numbers; received dtype {labels.dtype} with fractions.")
    wrong = (labels < -1) | (labels >= num_classes)
    if wrong.any():
        raise ValueError(
            f"Labels are in 0..{num_classes - 1}, or -1 for padding, in a model of {num_classes} "
            f"classes; received {labels[wrong][0]} in image {np.argwhere(wrong)[0][0]}."
        )
    real = labels >= 0
    if image_sizes is None:
        image_sizes = np.broadcast_to(np.asarray(image_shape[1:3]), (batch, 2))

    def refuse(mask, what):
        if mask.any():
            image, row = np.argwhere(mask)[0]
            raise ValueError(
                f"Box {boxes[image, row].tolist()} of image {image} {what} (format "
                f"{bounding_box_format!r})."
            )

    refuse(real & ~np.isfinite(boxes).all(-1), "is not finite")
    xyxy = keras.ops.convert_to_numpy(
        convert_boxes(
            np.where(real[..., None], boxes, 0.0), bounding_box_format, "xyxy", image_sizes
        )
    )
    extent = xyxy[..., 2:] - xyxy[..., :2]
    refuse(real & (extent <= 0).any(-1), "has no area")
    limits = np.asarray(image_sizes)[:, None, ::-1]
    # Annotations may stick out by a rounding; a wrong format sticks out by far.
    slack = 1.0 + 0.01 * limits
    outside = (xyxy[..., :2] < -slack).any(-1) | (xyxy[..., 2:] > limits + slack).any(-1)
    refuse(real & outside, "lies outside its image: is `bounding_box_format` right?")
