"""The replicas of `tf.distribute`, as a step sees them; without a strategy there is one."""

import keras
from keras import ops


def num_replicas() -> int:
    """How many replicas take a step together, those of all workers."""
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    return tf.distribute.get_strategy().num_replicas_in_sync


def sum_over_replicas(values):
    """Sums a tensor, or each of a list of tensors, over all replicas."""
    if num_replicas() == 1:
        return values
    import tensorflow as tf

    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, values)


def rows_of_replica(batch_size):
    """Where this replica's images stand in the batch of all replicas.

    Args:
        batch_size: images of one replica, the same on each.

    Returns:
        int32 `[batch_size]` indices into the `num_replicas() * batch_size` images.
    """
    rows = ops.arange(batch_size, dtype="int32")
    if num_replicas() == 1:
        return rows
    import tensorflow as tf

    replica = tf.distribute.get_replica_context().replica_id_in_sync_group
    return rows + ops.cast(replica, "int32") * batch_size


def expect_summed_gradients(optimizer) -> None:
    """Keeps an optimizer from summing gradients over replicas, which the step has done.

    Keras sums them after clipping and after looking for overflow, so that a clipped norm would be
    that of one replica, and an overflow on another would reach the weights.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    optimizer._all_reduce_sum_gradients = lambda grads_and_vars: grads_and_vars
