"""Checks of user input; each error is one sentence: what was expected, and what was received."""

import difflib
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

# Keras is imported where it is needed: programs check their options without waiting for it.
_LARGEST = float(np.finfo(np.float32).max)
# Each is an object: a file that says there are billions would fill the memory with them.
MAX_LAYERS = 1000


def check_int(argument: str, value, minimum: int = 1, maximum: int | None = None) -> int:
    """Returns an integer argument as an `int`; NumPy integers count, booleans do not.

    Raises:
        ValueError: if `value` is not an integer, is below `minimum`, or above `maximum`.
    """
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or value < minimum or (maximum is not None and value > maximum):
        limits = f">= {minimum}" if maximum is None else f"in {minimum}..{maximum}"
        raise ValueError(f"`{argument}` must be an integer {limits}; received {value!r}.")
    return int(value)


def check_fraction(argument: str, value) -> float:
    """Returns an argument in 0..1 as a `float`.

    Raises:
        ValueError: if `value` is not a number in 0..1.
    """
    if not 0 <= _number(value) <= 1:
        raise ValueError(f"`{argument}` must be in 0..1; received {value!r}.")
    return float(value)


def check_non_negative(argument: str, value) -> float:
    """Returns a finite argument of at least 0 as a `float`.

    Raises:
        ValueError: if `value` is not such a number.
    """
    if not _number(value) >= 0:
        raise ValueError(f"`{argument}` must be a finite number >= 0; received {value!r}.")
    return float(value)


def check_positive(argument: str, value) -> float:
    """Returns a finite argument above 0 as a `float`.

    Raises:
        ValueError: if `value` is not such a number.
    """
    if not _number(value) > 0:
        raise ValueError(f"`{argument}` must be a finite number > 0; received {value!r}.")
    return float(value)


def check_sequence(argument: str, value, length: int | None = None) -> tuple:
    """Returns a list, tuple or array of numbers as a tuple.

    Raises:
        ValueError: if `value` is a single number, a string or anything else, or if it has not
            `length` entries.
    """
    is_sequence = isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))
    entries = tuple(value) if is_sequence else ()
    if not is_sequence or length not in (None, len(entries)):
        count = "" if length is None else f"{length} "
        raise ValueError(f"`{argument}` must be a sequence of {count}numbers; received {value!r}.")
    return entries


def _number(value) -> float:
    """Returns a number that float32 can hold; NaN for anything else, booleans included."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return math.nan
    try:
        number = float(value)
    except OverflowError:  # An integer.
        return math.nan
    return number if abs(number) <= _LARGEST else math.nan


def check_choice(argument: str, value, choices: Iterable[str]) -> str:
    """Returns an argument that is one of several strings.

    Raises:
        ValueError: for any other value; the message names the nearest choice.
    """
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(
            f"`{argument}` must be one of {', '.join(map(repr, choices))}; received "
            f"{value!r}{did_you_mean(value, choices)}"
        )
    return value


def check_image_shape(image_shape: Sequence[int | None]) -> tuple[int | None, ...]:
    """Returns the shape of an image, `(height, width, 3)`, as a tuple.

    Raises:
        ValueError: if it has not three entries, or not three channels.
    """
    if isinstance(image_shape, int) or len(image_shape) != 3 or image_shape[-1] != 3:
        raise ValueError(f"`image_shape` must be (height, width, 3); received {image_shape!r}.")
    return tuple(image_shape)


def did_you_mean(name, known: Iterable[str]) -> str:
    """Returns the end of an error about an unknown name: the nearest known one, if any is near."""
    nearest = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else "."


def check_pixels(name: str, images) -> None:
    """Checks the dtype of an array or a tensor of any backend.

    Raises:
        TypeError: if it does not hold integers or floats.
    """
    _check_numbers(f"{name} must hold numbers in 0..255", images)


def _check_numbers(expected, x):
    dtype = str(getattr(x.dtype, "name", x.dtype)).removeprefix("torch.")
    if not dtype.startswith(("float", "bfloat", "uint", "int")):
        raise TypeError(f"{expected}; received dtype {dtype}.")


def check_array(expected: str, value) -> None:
    """Checks that a value is one array or tensor with a row for each image; it may be symbolic.

    Args:
        expected: beginning of the error, "'boxes' must be [batch, objects, 4]".
        value: anything.

    Raises:
        ValueError: for a list, also of arrays, a ragged tensor, None, and whatever has no shape.
    """
    is_ragged = getattr(value, "ragged_rank", None) is not None
    if hasattr(value, "shape") and not is_ragged:
        return
    if isinstance(value, (list, tuple)):
        shapes = sorted({tuple(x.shape) for x in value if hasattr(x, "shape")}, key=str)
        received = f"a {type(value).__name__} of length {len(value)}"
        if shapes:
            received += f" with arrays of shape {' and '.join(map(str, shapes[:2]))}"
    else:
        received = "None" if value is None else type(value).__name__
    raise ValueError(f"{expected}; received {received}.")


def check_inputs(inputs, image_shape=(None, None, 3), takes_proposals: bool = False) -> dict:
    """Returns the inputs of a model by name; any of them may be symbolic.

    Args:
        inputs: `[B, H, W, 3]` images, or `{"images": [B, H, W, 3], "image_sizes": [B, 2]}`, and
            `"proposals": [B, P, 4]` for a model that takes them. "image_sizes" may be missing.
        image_shape: `(height, width, 3)` of the images; None for any height or width.
        takes_proposals: whether "proposals" are required.

    Raises:
        ValueError: for another structure, rank, size or number of channels, for lists and ragged
            tensors, and for sizes in memory that exceed their batch.
        TypeError: if images are not numbers.
    """
    required = {"images", *(["proposals"] if takes_proposals else [])}
    checked = dict(inputs) if isinstance(inputs, dict) else {"images": inputs}
    if not required <= set(checked) <= required | {"image_sizes"}:
        keys = "'images' and 'proposals'" if takes_proposals else "'images'"
        raise ValueError(
            f"Inputs must have the keys {keys} and, for a padded batch, 'image_sizes'; received "
            f"the keys {sorted(map(str, checked))}."
        )
    checked = {n: x for n, x in checked.items() if x is not None or n != "image_sizes"}
    images, image_sizes = checked["images"], checked.get("image_sizes")
    check_array(
        "Images must be one array [batch, height, width, 3], padded if their 'image_sizes' differ",
        images,
    )
    check_pixels("Images", images)
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[-1] not in (3, None):
        hint = " (add a batch dimension: images[None])" if len(shape) == 3 else ""
        raise ValueError(
            "Images must be a batch [batch, height, width, 3] of RGB pixels; received shape "
            f"{shape}{hint}."
        )
    for received, expected in zip(shape[1:3], image_shape[:2], strict=True):
        if None not in (received, expected) and received != expected:
            raise ValueError(
                f"Images must have the shape {tuple(image_shape)} that the model was built for; "
                f"received a batch of shape {shape}."
            )
    if 0 in shape[1:3]:
        raise ValueError(f"Images must have at least one pixel; received shape {shape}.")
    if image_sizes is not None:
        expected = "'image_sizes' must be the height and width of each image, [batch, 2]"
        check_array(expected, image_sizes)
        sizes_shape = tuple(image_sizes.shape)
        if len(sizes_shape) != 2 or sizes_shape[-1] != 2:
            raise ValueError(f"{expected}; received shape {sizes_shape}.")
        if None not in (shape[0], sizes_shape[0]) and shape[0] != sizes_shape[0]:
            raise ValueError(
                f"'image_sizes' must have one row for each of the {shape[0]} images; received "
                f"{sizes_shape[0]}."
            )
        if isinstance(image_sizes, np.ndarray) and None not in shape[1:3]:
            wrong = ~((image_sizes >= 1) & (image_sizes <= shape[1:3])).all(axis=-1)
            if wrong.any():
                row = int(np.argmax(wrong))
                raise ValueError(
                    f"'image_sizes' must be (height, width) within the batch's {shape[1:3]}; "
                    f"received {image_sizes[row].tolist()} for image {row}."
                )
    if takes_proposals:
        expected = "'proposals' must be boxes [batch, proposals, 4], padded with zeros"
        check_array(expected, checked["proposals"])
        proposals_shape = tuple(checked["proposals"].shape)
        if len(proposals_shape) != 3 or proposals_shape[-1] not in (4, None):
            raise ValueError(f"{expected}; received shape {proposals_shape}.")
        if None not in (shape[0], proposals_shape[0]) and shape[0] != proposals_shape[0]:
            raise ValueError(
                f"'proposals' must have boxes for each of the {shape[0]} images; received those of "
                f"{proposals_shape[0]}."
            )
    return checked


def is_in_memory(x) -> bool:
    """Whether inputs of a model are images, right or wrong, rather than a source of batches."""
    return x is None or isinstance(x, (dict, list, tuple)) or hasattr(x, "shape")


def check_batch(model, x) -> dict:
    """Returns inputs in memory as `check_inputs` does; they must have an image.

    Raises:
        ValueError, TypeError: as in `check_inputs`, and for an empty batch.
    """
    inputs = check_inputs(x, model.image_shape, model.takes_proposals)
    shape = tuple(inputs["images"].shape)
    if shape[0] == 0:
        raise ValueError(f"A batch must have at least one image; received shape {shape}.")
    return inputs


def check_structure(model, x, y) -> None:
    """Checks the data of training or evaluation without reading values.

    Args:
        model: a `Detector`.
        x: inputs as in `check_inputs`, or a source of batches of `(inputs, targets)`.
        y: targets; None with a source of batches.

    Raises:
        ValueError, TypeError: as in `check_batch` and `check_target_structure`.
    """
    if is_in_memory(x):
        check_target_structure(y, check_batch(model, x)["images"].shape[0])
    elif y is None and hasattr(x, "element_spec"):
        structure = x.element_spec
        if not isinstance(structure, tuple) or len(structure) != 2:
            raise ValueError(
                "A data set must yield pairs (images, {'boxes', 'labels'}); received elements "
                f"{_described(structure)}."
            )
        if not _is_distributed(x):
            inputs = check_inputs(structure[0], model.image_shape, model.takes_proposals)
            check_target_structure(structure[1], inputs["images"].shape[0])


def check_training_data(model, x, y) -> None:
    """Checks the data of training or validation before it begins.

    Data in memory is checked in full. Of a `tf.data.Dataset`, the structure and the first batch are
    checked, and degenerate boxes are accepted, since training ignores them.

    Args:
        model: a `Detector`.
        x: inputs as in `check_inputs`, or a data set of `(inputs, targets)`.
        y: targets; None with a data set.

    Raises:
        ValueError, TypeError: as in `check_structure`, and for targets that `check_targets`
            refuses.
    """
    check_structure(model, x, y)
    if is_in_memory(x):
        _check_targets_of(model, x, y, refuse_degenerate=True)
    elif hasattr(x, "element_spec") and not _is_distributed(x):
        for images, targets in x.take(1):
            _check_targets_of(model, images, targets, refuse_degenerate=False)


def _is_distributed(dataset):
    # Its elements are per replica; the step checks their structure when it is traced.
    return type(dataset).__module__.startswith("tensorflow.python.distribute")


def _described(structure):
    import keras

    return keras.tree.map_structure(lambda x: tuple(x.shape), structure)


def _check_targets_of(model, x, y, refuse_degenerate):
    inputs = check_batch(model, x)
    image_sizes = inputs.get("image_sizes")
    check_targets(
        {name: np.asarray(value) for name, value in y.items()},
        image_shape=inputs["images"].shape,
        image_sizes=None if image_sizes is None else np.asarray(image_sizes),
        num_classes=model.num_classes,
        bounding_box_format=model.bounding_box_format,
        refuse_degenerate=refuse_degenerate,
    )


def check_target_structure(targets, batch: int | None = None) -> None:
    """Checks the names and shapes of a ground truth, which may be symbolic.

    Args:
        targets: the ground truth.
        batch: number of images. Defaults to None, unknown.

    Raises:
        ValueError: if it is not `{"boxes": [B, G, 4], "labels": [B, G]}`; the optional fields of
            the input pipeline, "image_ids" and "masks", are accepted as well.
        TypeError: if boxes or labels are not numbers.
    """
    expected = (
        "Targets must be {'boxes': [batch, objects, 4], 'labels': [batch, objects]}; received "
    )
    if not isinstance(targets, dict):
        raise ValueError(f"{expected}{'none' if targets is None else type(targets).__name__}.")
    if set(targets) - {"image_ids", "masks"} != {"boxes", "labels"}:
        raise ValueError(f"{expected}the keys {sorted(map(str, targets))}.")
    for name, shape in (("boxes", "[batch, objects, 4]"), ("labels", "[batch, objects]")):
        check_array(f"{name!r} must be one array {shape}, padded with label -1", targets[name])
        _check_numbers(f"{name!r} must hold numbers", targets[name])
    boxes, labels = tuple(targets["boxes"].shape), tuple(targets["labels"].shape)
    fit = len(boxes) == 3 and len(labels) == 2 and boxes[-1] in (4, None)
    if not fit or any(
        None not in pair and pair[0] != pair[1] for pair in zip(boxes, labels, strict=False)
    ):
        raise ValueError(f"{expected}shapes {boxes} and {labels}.")
    if None not in (batch, boxes[0]) and boxes[0] != batch:
        raise ValueError(
            f"Targets must have one row for each of the {batch} images; received {boxes[0]}."
        )


def check_targets(
    targets,
    image_shape,
    image_sizes,
    num_classes,
    bounding_box_format,
    refuse_degenerate: bool = True,
) -> None:
    """Checks a ground truth in memory.

    Args:
        targets: `{"boxes": [B, G, 4], "labels": [B, G]}` arrays.
        image_shape: `[B, H, W, 3]` of the images.
        image_sizes: `[B, 2]` array, or None if images fill the batch.
        num_classes: labels are in 0..num_classes-1, or -1 in padding rows; None for any class.
        bounding_box_format: format of the boxes.
        refuse_degenerate: whether a box that is not finite or has no area is an error.

    Raises:
        ValueError: for missing keys, wrong shapes, labels out of range, degenerate boxes, and for
            boxes outside their image or all within one pixel, the signs of a wrong format.
    """
    import keras

    from keras_fpn.boxes import convert_boxes

    batch = image_shape[0]
    check_target_structure(targets, batch)
    boxes = np.asarray(targets["boxes"], "float64")
    labels = np.asarray(targets["labels"])
    if labels.size and not np.all(labels == np.floor(labels)):
        raise ValueError(f"Labels must be integers; received dtype {labels.dtype} with fractions.")
    limit = np.inf if num_classes is None else num_classes
    wrong = (labels < -1) | (labels >= limit)
    if wrong.any():
        raise ValueError(
            f"Labels must be in 0..{limit - 1} for {limit} classes, or -1 in padding "
            f"rows; received {labels[wrong][0]} in image {np.argwhere(wrong)[0][0]}."
        )
    real = labels >= 0
    if image_sizes is None:
        image_sizes = np.broadcast_to(np.asarray(image_shape[1:3]), (batch, 2))

    def refuse(mask, expected):
        if mask.any():
            image, row = np.argwhere(mask)[0]
            raise ValueError(
                f"Boxes must {expected}; received {boxes[image, row].tolist()} in image {image}, "
                f"in format {bounding_box_format!r}."
            )

    finite = np.isfinite(boxes).all(-1)
    if refuse_degenerate:
        refuse(real & ~finite, "be finite")
    real &= finite
    xyxy = keras.ops.convert_to_numpy(
        convert_boxes(
            np.where(real[..., None], boxes, 0.0), bounding_box_format, "xyxy", image_sizes
        )
    )
    extent = xyxy[..., 2:] - xyxy[..., :2]
    if refuse_degenerate:
        refuse(real & (extent <= 0).any(-1), "have an area")
    real &= (extent > 0).all(-1)
    limits = np.asarray(image_sizes)[:, None, ::-1]
    # Rounded annotations may exceed the image a little; those in a wrong format exceed it by far.
    slack = 1.0 + 0.01 * limits
    outside = (xyxy[..., :2] < -slack).any(-1) | (xyxy[..., 2:] > limits + slack).any(-1)
    refuse(real & outside, "lie within their image (is `bounding_box_format` right?)")
    if not bounding_box_format.startswith("rel_") and real.any() and boxes[real].max() <= 1.0:
        raise ValueError(
            f"Boxes in format {bounding_box_format!r} must not all lie within one pixel; did you "
            f"mean 'rel_{bounding_box_format}'?"
        )
