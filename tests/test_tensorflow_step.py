"""Steps with the batches of an iterator."""

import types

import keras
import pytest
import tensorflow as tf

from keras_fpn.tensorflow_step import function_of_iterator

if keras.backend.backend() != "tensorflow":
    pytest.skip("the step is TensorFlow's", allow_module_level=True)


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_step_without_data_is_not_taken(num_devices):
    strategy = tf.distribute.get_strategy()
    if num_devices > 1:
        devices = tf.config.list_logical_devices("CPU")[:num_devices]
        strategy = tf.distribute.MirroredStrategy([device.name for device in devices])
    with strategy.scope():
        # As an optimizer's step, and a sampler's seed.
        taken = tf.Variable(0, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)
        on_read = tf.Variable(
            0,
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )

    def step(data):
        on_read.assign_add(1)
        tf.distribute.get_replica_context().merge_call(
            lambda distribution: distribution.extended.update(taken, lambda x: x.assign_add(1))
        )
        return {"loss": tf.reduce_sum(data)}

    model = types.SimpleNamespace(
        distribute_strategy=strategy, run_eagerly=False, jit_compile=False, steps_per_execution=3
    )
    steps = function_of_iterator(model, step)
    batches = strategy.experimental_distribute_dataset(tf.data.Dataset.range(8).batch(2))
    for _ in range(2):
        iterator = iter(batches)
        for _ in range(2):
            steps(iterator)
    # Two epochs of four batches, each in an execution of three steps and one of what is left.
    assert taken.numpy() == 8
    assert on_read.numpy() == 8
