import random

import keras
import numpy as np

from keras_fpn.weights.deferred import deferred_values, give_first_value, same_random_seeds


def test_variables_have_shapes_at_once_and_values_only_on_demand():
    with deferred_values() as allocate:
        layer = keras.layers.Dense(3)
        layer.build((None, 2))
    assert layer.kernel.shape == (2, 3)
    # At the end of a scope, Keras gives values to what it has noted.
    with keras.StatelessScope():
        pass
    assert layer.kernel._value is None
    allocate()
    assert layer.kernel._value.shape == (2, 3)


def test_a_first_value_is_allocated_in_place_of_a_drawn_one():
    value = np.float32([[1, 2, 3], [4, 5, 6]])
    with deferred_values() as allocate:
        layer = keras.layers.Dense(3)
        layer.build((None, 2))
        assert give_first_value(layer.kernel, value)
    assert layer.kernel._value is None
    allocate()
    np.testing.assert_array_equal(layer.kernel, value)
    # It has its memory now.
    assert not give_first_value(layer.kernel, value)


def test_seeds_are_those_without_the_layers_made_in_between():
    random.seed(0)
    expected = random.random()
    random.seed(0)
    with same_random_seeds():
        keras.layers.Dropout(0.5)
        random.random()
    assert random.random() == expected
