"""Steps with the batches of an iterator."""

import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_fpn.tensorflow_step import function_of_iterator

if keras.backend.backend() != "tensorflow":
    pytest.skip("the step is TensorFlow's", allow_module_level=True)


class Steps:
    """Counts steps as an optimizer does, `taken`, and as a sampler's seed, `on_read`."""

    def __init__(self, num_devices=1, **options):
        self.strategy = tf.distribute.get_strategy()
        if num_devices > 1:
            devices = tf.config.list_logical_devices("CPU")[:num_devices]
            self.strategy = tf.distribute.MirroredStrategy([device.name for device in devices])
        first = {"aggregation": tf.VariableAggregation.ONLY_FIRST_REPLICA}
        with self.strategy.scope():
            self.taken = tf.Variable(0, **first)
            self.on_read = tf.Variable(
                0, synchronization=tf.VariableSynchronization.ON_READ, **first
            )
        defaults = {"run_eagerly": False, "jit_compile": False}
        model = types.SimpleNamespace(
            distribute_strategy=self.strategy, **{"num_classes": 3} | defaults | options
        )
        self.function = function_of_iterator(model, self.step)

    def step(self, data):
        self.on_read.assign_add(1)
        tf.distribute.get_replica_context().merge_call(
            lambda distribution: distribution.extended.update(self.taken, lambda x: x.assign_add(1))
        )
        return {"loss": tf.reduce_sum(data[0])}

    def take(self, images, labels, executions):
        data = tf.data.Dataset.from_tensor_slices((images, {"labels": labels})).batch(2)
        iterator = iter(self.strategy.experimental_distribute_dataset(data))
        for _ in range(executions):
            self.function(iterator, 3)
        assert self.on_read.numpy() == self.taken.numpy()
        return self.taken.numpy()


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_step_without_data_is_not_taken(num_devices):
    steps = Steps(num_devices)
    # An execution of three steps, and one of what is left of the four batches.
    assert steps.take(np.zeros((8, 2, 2, 3)), np.zeros((8, 1), "int32"), 2) == 4
    assert steps.take(np.zeros((8, 2, 2, 3)), np.zeros((8, 1), "int32"), 2) == 8


@pytest.mark.parametrize(
    ("options", "labels", "received"),
    [
        ({"num_devices": 2}, np.int32([[0], [3]]), "3"),
        ({"jit_compile": True}, np.int32([[-1], [-2]]), "-2"),
        ({"run_eagerly": True}, np.float32([[0], [1.5]]), r"1\.5"),
        ({}, np.float32([[0], [np.nan]]), "nan"),
        ({}, np.int64([[0], [2**32 + 1]]), "4294967297"),
        ({"num_classes": None}, np.int32([[100], [-7]]), "-7"),
    ],
)
def test_labels_of_no_class_end_training_before_the_step(options, labels, received):
    steps = Steps(**options)
    images = np.zeros((2, 2, 2, 3), "uint8")
    with pytest.raises(ValueError, match=rf"^`labels` .*; received {received}\.$"):
        steps.take(images, labels, 1)
    assert steps.taken.numpy() == steps.on_read.numpy() == 0
    # Classes, and padding.
    assert steps.take(images, np.int32([[2], [-1]]), 1) == 1


def test_an_empty_batch_ends_training_before_the_step():
    steps = Steps()
    with pytest.raises(ValueError, match=r"^A batch must have at least one image"):
        steps.function(iter([(np.zeros((0, 2, 2, 3)), {"labels": np.zeros((0, 1))})]), 1)
    assert steps.taken.numpy() == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_not_finite_end_training_before_the_step(value):
    steps = Steps()
    images = np.zeros((2, 2, 2, 3), "float32")
    images[1, 0, 1, 2] = value
    with pytest.raises(ValueError, match="Pixels must be finite"):
        steps.take(images, np.int32([[0], [0]]), 1)
    assert steps.taken.numpy() == 0
