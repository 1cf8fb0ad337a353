"""The replicas of `tf.distribute` as seen from a training step; without a strategy there is one."""

import contextlib
from collections.abc import Iterator

import keras
from keras import ops

from keras_fpn.typing import Tensor


def num_replicas() -> int:
    """Returns the number of replicas, those of all workers together."""
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    return tf.distribute.get_strategy().num_replicas_in_sync


def sum_over_replicas(values) -> Tensor:
    """Returns the sum over all replicas of a tensor, or of each of a list of tensors."""
    if num_replicas() == 1:
        return values
    import tensorflow as tf

    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, values)


def rows_of_replica(batch_size) -> Tensor:
    """Returns the positions of this replica's images in the global batch.

    Args:
        batch_size: images per replica, the same on each.

    Returns:
        int32 `[batch_size]` indices into the `num_replicas() * batch_size` images.
    """
    rows = ops.arange(batch_size, dtype="int32")
    if num_replicas() == 1:
        return rows
    import tensorflow as tf

    replica = tf.distribute.get_replica_context().replica_id_in_sync_group
    return rows + ops.cast(replica, "int32") * batch_size


@contextlib.contextmanager
def gradients_already_summed(optimizer) -> Iterator[None]:
    """Within it, an optimizer applies gradients without summing them over replicas.

    Keras sums them after clipping and after the check for overflow, so that the clipped norm would
    be that of one replica, and an overflow on another replica would reach the weights.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if not hasattr(optimizer, "_applications_of_sums"):
        optimizer._applications_of_sums = 0
        all_reduce = optimizer._all_reduce_sum_gradients
        optimizer._all_reduce_sum_gradients = lambda grads_and_vars: (
            grads_and_vars if optimizer._applications_of_sums else all_reduce(grads_and_vars)
        )
    # A count: replicas are traced in threads that take turns inside this context.
    optimizer._applications_of_sums += 1
    try:
        yield
    finally:
        optimizer._applications_of_sums -= 1
