"""Picking the best rows of a batch with static shapes: what proposals, samplers and NMS share."""

import keras
from keras import ops


def top_k(values, k: int):
    """The k largest values of each row, equal ones in the order of their indices.

    Args:
        values: `[B, N]` float32; -inf marks an absent entry.
        k: how many to return, whatever N is.

    Returns:
        `(values, indices)`, both `[B, k]`. Where N < k the values end in -inf, with index 0.
    """
    size = values.shape[1]
    if size is None or size < k:
        values = ops.pad(values, [[0, 0], [0, k]], constant_values=-float("inf"))
    if keras.backend.backend() == "torch":
        # torch.topk leaves the order of equal values open; its stable sort does not.
        indices = ops.argsort(-values, axis=-1)[:, :k]
        best = ops.take_along_axis(values, indices, axis=-1)
    else:
        best, indices = ops.top_k(values, k)
    indices = ops.cast(indices, "int32")
    return best, ops.where(best > -float("inf"), indices, 0)


def take_rows(x, indices):
    """Rows of each image: `[B, N, ...]` by `[B, K]` indices gives `[B, K, ...]`."""
    shape = ops.shape(x)
    offsets = ops.expand_dims(ops.arange(shape[0], dtype="int32") * shape[1], 1)
    flat = ops.reshape(x, (-1, *x.shape[2:]))
    return ops.take(flat, ops.cast(indices, "int32") + offsets, axis=0)
