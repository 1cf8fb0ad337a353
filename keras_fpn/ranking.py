"""Selection of rows with static shapes, for proposals, samplers and NMS."""

import keras
from keras import ops

from keras_fpn.typing import Tensor


def top_k(values, k: int) -> tuple:
    """Returns the k largest values of each row, ties in the order of their indices.

    Args:
        values: `[B, N]` float32; -inf for absent entries.
        k: number of values, which may exceed N.

    Returns:
        `(values, indices)`, both `[B, k]`; absent entries are last, with value -inf and index 0.
    """
    size = values.shape[1]
    if size is None or size < k:
        values = ops.pad(values, [[0, 0], [0, k]], constant_values=-float("inf"))
    if keras.backend.backend() == "torch":
        # torch.topk does not define the order of ties; argsort is stable.
        indices = ops.argsort(-values, axis=-1)[:, :k]
        best = ops.take_along_axis(values, indices, axis=-1)
    else:
        best, indices = ops.top_k(values, k)
    indices = ops.cast(indices, "int32")
    return best, ops.where(best > -float("inf"), indices, 0)


def take_rows(x, indices) -> Tensor:
    """Returns rows of each image: of `[B, N, ...]`, those at `[B, K]` indices, `[B, K, ...]`."""
    shape = ops.shape(x)
    offsets = ops.expand_dims(ops.arange(shape[0], dtype="int32") * shape[1], 1)
    flat = ops.reshape(x, (-1, *x.shape[2:]))
    return ops.take(flat, ops.cast(indices, "int32") + offsets, axis=0)
