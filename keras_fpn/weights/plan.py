"""Plans that assign the arrays of a file to the variables of a model: all of them, or none."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import keras
import numpy as np

from keras_fpn.resnet import STAGE_BLOCKS, ResNet
from keras_fpn.weights.checkpoints import read_checkpoint
from keras_fpn.weights.deferred import give_first_value

# Key, among the arrays of a converted file in the cache, of the first digits of the original's
# SHA-256.
PUBLISHED = "published_sha256"


class Entry(NamedTuple):
    """One array of a file.

    Attributes:
        name: its name in the file.
        variable: variable that it is assigned to.
        convert: function from its layout in the file to that of the variable.
    """

    name: str
    variable: keras.Variable
    convert: Callable[[np.ndarray], np.ndarray]


def convolution(
    name: str, layer: keras.layers.Layer, order: Sequence[int] | np.ndarray | None = None
) -> list[Entry]:
    """Returns the entries of a convolution, whose kernel is `[out, in, height, width]` in the file.

    Args:
        name: prefix of the names in the file.
        layer: the convolution.
        order: index in the file of each output. Defaults to None, the same order.
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
    """Returns the entries of a fully connected layer, whose kernel is `[out, in]` in the file.

    Args:
        name: prefix of the names in the file.
        layer: the fully connected layer.
        rows: selects and orders the outputs, of weight and bias.
        columns: orders the inputs of the weight.
    """
    return [
        Entry(f"{name}.weight", layer.kernel, lambda x: columns(rows(x)).T),
        Entry(f"{name}.bias", layer.bias, rows),
    ]


def normalization(name: str, layer: keras.layers.Layer) -> list[Entry]:
    """Returns the entries of a batch norm, statistics included, or of a group norm."""
    parts = {"weight": layer.gamma, "bias": layer.beta}
    if hasattr(layer, "moving_mean"):
        parts |= {"running_mean": layer.moving_mean, "running_var": layer.moving_variance}
    return [Entry(f"{name}.{part}", variable, lambda x: x) for part, variable in parts.items()]


_ENTRIES: dict[type, Callable] = {keras.layers.Conv2D: convolution, keras.layers.Dense: dense}


def layers_with_weights(stages: Mapping[str, keras.layers.Layer]) -> dict[str, keras.layers.Layer]:
    """Returns the layers inside stages that own weights, by "stage/layer"."""
    return {
        f"{name}/{layer.name}": layer
        for name, stage in stages.items()
        for layer in stage._flatten_layers(include_self=False)
        if layer._trainable_variables or layer._non_trainable_variables
    }


def plan_of(
    layers: Mapping[str, keras.layers.Layer],
    names: Mapping[str, str | Callable[[re.Match], str]],
    layouts: Mapping[str, Mapping] | None = None,
) -> list[Entry]:
    """Returns the entries of layers.

    Args:
        layers: from `layers_with_weights`.
        names: regular expression for "stage/layer" to the prefix of the names in the file: a
            template for `re.Match.expand`, or a function of the match.
        layouts: "stage/layer" to arguments of `convolution` or `dense`, where the file's layout
            differs.

    Raises:
        ValueError: for a layer that no expression matches.
    """
    plan = []
    for key, layer in layers.items():
        matches = ((re.fullmatch(pattern, key), name) for pattern, name in names.items())
        found = next(((match, name) for match, name in matches if match), None)
        if found is None:
            raise ValueError(
                f"Files of this format have no weights for the layer {key}; nothing was loaded."
            )
        match, name = found
        name = match.expand(name) if isinstance(name, str) else name(match)
        kinds = (entries for kind, entries in _ENTRIES.items() if isinstance(layer, kind))
        entries = next(kinds, normalization)
        plan += entries(name, layer, **(layouts or {}).get(key, {}))
    return plan


def check_resnet(backbone: keras.layers.Layer, whose: str) -> None:
    """Raises ValueError if a backbone is not a `ResNet`, the only one that weights are known of."""
    if not isinstance(backbone, ResNet):
        raise ValueError(
            f"The backbone must be a ResNet to load {whose}'s weights; received {backbone.name!r} "
            f"of type {type(backbone).__name__}."
        )


def channels_last_columns(bins: int) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function that reorders the inputs of a layer on flattened feature maps.

    It turns weights `[out, channels * bins * bins]` into `[out, bins * bins * channels]`.
    """

    def reorder(weight: np.ndarray) -> np.ndarray:
        outputs, inputs = weight.shape
        weight = weight.reshape(outputs, inputs // bins**2, bins, bins)
        return weight.transpose(0, 2, 3, 1).reshape(outputs, inputs)

    return reorder


def read_arrays(
    state_dict: Mapping | str | os.PathLike, source: str = "The mapping"
) -> dict[str, np.ndarray]:
    """Returns the arrays of a state dict by name, without `num_batches_tracked`.

    Args:
        state_dict: a mapping, or the path of a file that contains one; of a training checkpoint,
            its entry `model` or `state_dict` is read.
        source: name of a mapping in errors.

    Raises:
        FileNotFoundError: if the path is not a file.
        ValueError: if the file cannot be read, or does not map names to arrays.
    """
    if isinstance(state_dict, str | os.PathLike):
        source = repr(os.fspath(state_dict))
        state_dict = read_checkpoint(state_dict)
    for wrapper in ("model", "state_dict"):
        if isinstance(state_dict, Mapping) and isinstance(state_dict.get(wrapper), Mapping):
            state_dict = state_dict[wrapper]
    if not isinstance(state_dict, Mapping):
        raise ValueError(
            f"{source} must map names to arrays; received a {type(state_dict).__name__}."
        )
    arrays = {
        name: value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)
        for name, value in state_dict.items()
        if name != PUBLISHED and not str(name).endswith("num_batches_tracked")
    }
    other = [str(name) for name, array in arrays.items() if array.dtype.kind in "OSU"]
    if other or not arrays:
        raise ValueError(
            f"{source} must map names to arrays; "
            + (f"{_shown(other)} is not an array." if other else "it is empty.")
        )
    return arrays


def count_names(arrays: Mapping[str, np.ndarray], pattern: str) -> int:
    """Returns the number of names that fully match a regular expression."""
    return sum(re.fullmatch(pattern, name) is not None for name in arrays)


def normalization_kind(arrays: Mapping[str, np.ndarray], name: str) -> str | None:
    """Returns the kind of normalization that the arrays under a name are of, or None."""
    if f"{name}.running_var" in arrays:
        return "frozen_batch_norm"
    return "group_norm" if f"{name}.weight" in arrays else None


def resnet_name(blocks: tuple[int, ...], bottleneck: bool, kernel_shape: tuple[int, ...]) -> str:
    """Returns the name of a ResNet or ResNeXt by its architecture.

    Args:
        blocks: number of residual blocks of each of the four stages, or of the first three.
        bottleneck: whether a block has three convolutions rather than two.
        kernel_shape: `[out, in, 3, 3]` of the second convolution; `in` is the width of a group.

    Raises:
        ValueError: if no such network is known.
    """
    depths = [
        depth
        for depth, of_stages in STAGE_BLOCKS.items()
        if of_stages[: len(blocks)] == blocks and (depth >= 50) == bottleneck
    ]
    if not depths or len(kernel_shape) != 4:
        raise ValueError(
            f"Expected the weights of a ResNet; received stages of {blocks} blocks with "
            f"{3 if bottleneck else 2} convolutions each."
        )
    width, group_width = kernel_shape[:2]
    if width == group_width:
        return f"resnet{depths[0]}"
    return f"resnext{depths[0]}_{width // group_width}x{group_width}d"


def fit(plan: Sequence[Entry], arrays: Mapping[str, np.ndarray]) -> Callable[[], None]:
    """Checks that everything fits; of the variables, only the shapes are looked at.

    Variables that have no memory yet will be allocated with their arrays.

    Returns:
        A function that assigns the arrays as planned.

    Raises:
        ValueError: for missing or unexpected names, and for shapes or values that do not fit.
    """
    planned = {entry.name for entry in plan}
    missing = sorted(planned - set(arrays))
    unexpected = sorted(set(arrays) - planned)
    if missing or unexpected:
        raise ValueError(
            f"The weights do not fit: {_named('missing', missing)}, "
            f"{_named('unexpected', unexpected)}; nothing was loaded."
        )
    values: list[np.ndarray] = []
    misfits = []
    for name, variable, convert in plan:
        array = arrays[name]
        try:
            value = convert(array)
            fits = value.shape == tuple(variable.shape)
        except (ValueError, IndexError):
            fits = False
        if not fits:
            misfits.append(f"{name} {array.shape} for {tuple(variable.shape)}")
            continue
        # NumPy's kind of `bfloat16` is "V".
        if array.dtype.kind not in "fV" or not np.isfinite(array.astype("float32")).all():
            misfits.append(f"{name} of dtype {array.dtype} is not finite floats")
        values.append(value)
    if misfits:
        raise ValueError(
            f"The weights do not fit: {'; '.join(misfits[:5])}"
            f"{f' and {len(misfits) - 5} more' if len(misfits) > 5 else ''}; nothing was loaded."
        )

    pairs = [
        (entry.variable, value)
        for entry, value in zip(plan, values, strict=True)
        if not give_first_value(entry.variable, value)
    ]

    def load() -> None:
        for variable, value in pairs:
            variable.assign(value.astype("float32"))

    return load


def _named(what, names):
    return f"{len(names)} {what}" + (f" ({_shown(names)})" if names else "")


def _shown(names):
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
