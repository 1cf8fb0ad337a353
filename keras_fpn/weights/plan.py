"""Plans that assign arrays of a file to variables of a model, all of them or none."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import keras
import numpy as np

from keras_fpn.resnet import STAGE_BLOCKS
from keras_fpn.weights.checkpoints import read_checkpoint

# Beside the arrays of a published file in the cache: the number that its SHA-256 begins with.
PUBLISHED = "published_sha256"


class Entry(NamedTuple):
    """An array's name in the file, the variable that it becomes, and how."""

    name: str
    variable: keras.Variable
    convert: Callable[[np.ndarray], np.ndarray]


def convolution(
    name: str, layer: keras.layers.Layer, order: Sequence[int] | None = None
) -> list[Entry]:
    """Returns the entries of a convolution, `[out, in, height, width]` in the file.

    Args:
        order: for each output, its index in the file. Defaults to None, the same order.
    """
    outputs = slice(None) if order is None else order
    plan = [Entry(f"{name}.weight", layer.kernel, lambda x: x[outputs].transpose(2, 3, 1, 0))]
    if layer.use_bias:
        plan.append(Entry(f"{name}.bias", layer.bias, lambda x: x[outputs]))
    return plan


def dense(
    name: str,
    layer: keras.layers.Layer,
    rows: Callable[[np.ndarray], np.ndarray] = lambda x: x,
    columns: Callable[[np.ndarray], np.ndarray] = lambda x: x,
) -> list[Entry]:
    """The entries of a fully connected layer, `[out, in]` in the file.

    Args:
        rows: picks and orders the outputs, of weight and bias.
        columns: orders the inputs of the weight.
    """
    return [
        Entry(f"{name}.weight", layer.kernel, lambda x: columns(rows(x)).T),
        Entry(f"{name}.bias", layer.bias, rows),
    ]


def normalization(name: str, layer: keras.layers.Layer) -> list[Entry]:
    """The entries of a batch norm, with its statistics, or of a group norm."""
    parts = {"weight": layer.gamma, "bias": layer.beta}
    if hasattr(layer, "moving_mean"):
        parts |= {"running_mean": layer.moving_mean, "running_var": layer.moving_variance}
    return [Entry(f"{name}.{part}", variable, lambda x: x) for part, variable in parts.items()]


def channels_last_columns(bins: int) -> Callable[[np.ndarray], np.ndarray]:
    """Columns of the first hidden layer: `(channel, row, column)` to `(row, column, channel)`."""

    def reorder(weight: np.ndarray) -> np.ndarray:
        outputs, inputs = weight.shape
        weight = weight.reshape(outputs, inputs // bins**2, bins, bins)
        return weight.transpose(0, 2, 3, 1).reshape(outputs, inputs)

    return reorder


def read_arrays(
    state_dict: Mapping | str | os.PathLike, source: str = "The mapping"
) -> dict[str, np.ndarray]:
    """The arrays of a mapping or a file by name, without the counts of batches.

    Of a training checkpoint, its entry `model` or `state_dict` is taken.

    Args:
        state_dict: the mapping, or the path of a file of one.
        source: what a mapping is called in messages.

    Raises:
        FileNotFoundError: where the path is no file.
        ValueError: where the file cannot be read, or is no mapping from names to arrays.
    """
    if isinstance(state_dict, str | os.PathLike):
        source = repr(os.fspath(state_dict))
        state_dict = read_checkpoint(state_dict)
    for wrapper in ("model", "state_dict"):
        if isinstance(state_dict, Mapping) and isinstance(state_dict.get(wrapper), Mapping):
            state_dict = state_dict[wrapper]
    if not isinstance(state_dict, Mapping):
        raise ValueError(
            f"{source} is wanted to map names to arrays; it is a {type(state_dict).__name__}."
        )
    # Batch norm counts its batches; no layer needs the count.
    arrays = {
        name: value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)
        for name, value in state_dict.items()
        if name != PUBLISHED and not str(name).endswith("num_batches_tracked")
    }
    other = [str(name) for name, array in arrays.items() if array.dtype.kind in "OSU"]
    if other or not arrays:
        raise ValueError(
            f"{source} is wanted to map names to arrays; "
            + (f"{_shown(other)} is none." if other else "it is empty.")
        )
    return arrays


def count_names(arrays: Mapping[str, np.ndarray], pattern: str) -> int:
    """How many names match a regular expression from end to end."""
    return sum(re.fullmatch(pattern, name) is not None for name in arrays)


def normalization_kind(arrays: Mapping[str, np.ndarray], name: str) -> str | None:
    """What kind of normalisation the arrays under a name are for; None where there are none."""
    if f"{name}.running_var" in arrays:
        return "frozen_batch_norm"
    return "group_norm" if f"{name}.weight" in arrays else None


def resnet_name(blocks: tuple[int, ...], bottleneck: bool, kernel_shape: tuple[int, ...]) -> str:
    """The name of a ResNet or ResNeXt by its make.

    Args:
        blocks: how many residual blocks each of the four stages has.
        bottleneck: whether a block has three convolutions, not two.
        kernel_shape: `[out, in, 3, 3]` of the second convolution; a group's own channels are `in`.

    Raises:
        ValueError: where there is none of that make.
    """
    depths = [d for d, b in STAGE_BLOCKS.items() if b == blocks and (d >= 50) == bottleneck]
    if not depths or len(kernel_shape) != 4:
        raise ValueError(
            f"There is no ResNet of {blocks} blocks with {3 if bottleneck else 2} convolutions "
            "each."
        )
    width, group_width = kernel_shape[:2]
    if width == group_width:
        return f"resnet{depths[0]}"
    return f"resnext{depths[0]}_{width // group_width}x{group_width}d"


def assign(plan: Sequence[Entry], arrays: Mapping[str, np.ndarray]) -> None:
    """Carries out a plan, unless anything does not fit.

    Raises:
        ValueError: for names that are missing or left over, and shapes or values that do not fit.
    """
    wanted = {entry.name for entry in plan}
    missing = sorted(wanted - set(arrays))
    left_over = sorted(set(arrays) - wanted)
    if missing or left_over:
        raise ValueError(
            f"The weights do not fit: {_named('missing', missing)}, "
            f"{_named('left over', left_over)}; nothing was loaded."
        )
    values, misfits = [], []
    for name, variable, convert in plan:
        array = arrays[name]
        try:
            value = convert(array)
        except (ValueError, IndexError):
            value = None
        if value is None or value.shape != tuple(variable.shape):
            misfits.append(f"{name} {array.shape} for {tuple(variable.shape)}")
        # `bfloat16` is a float to Keras, and of no kind that NumPy knows.
        elif array.dtype.kind not in "fV" or not np.isfinite(array.astype("float32")).all():
            misfits.append(f"{name} of dtype {array.dtype} is not all finite numbers")
        values.append(value)
    if misfits:
        raise ValueError(
            f"The weights do not fit: {'; '.join(misfits[:5])}"
            f"{f' and {len(misfits) - 5} more' if len(misfits) > 5 else ''}; nothing was loaded."
        )
    for entry, value in zip(plan, values, strict=True):
        entry.variable.assign(value.astype("float32"))


def _named(what, names):
    return f"{len(names)} {what}" + (f" ({_shown(names)})" if names else "")


def _shown(names):
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
