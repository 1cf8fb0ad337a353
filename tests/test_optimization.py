"""The optimizer and its schedule, by hand."""

import keras
import numpy as np
import pytest

from keras_fpn.optimization import SGDWithL2, WarmupCosineDecay, WarmupStepDecay


def test_l2_enters_the_velocity_of_kernels_and_leaves_biases_alone():
    kernel = keras.Variable(np.full((1, 2), 2.0, "float32"))
    bias = keras.Variable(np.full((2,), 2.0, "float32"))
    optimizer = SGDWithL2(learning_rate=0.5, momentum=0.9, l2=0.1)
    weight, velocity = 2.0, 0.0
    for _ in range(3):
        optimizer.apply([keras.ops.ones((1, 2)), keras.ops.ones((2,))], [kernel, bias])
        velocity = 0.9 * velocity - 0.5 * (1.0 + 0.1 * weight)
        weight += velocity
    np.testing.assert_allclose(kernel.numpy(), [[weight, weight]], rtol=1e-6)
    # 0.5, then 0.95, then 1.355 of velocity.
    np.testing.assert_allclose(bias.numpy(), 2.0 - (0.5 + 0.95 + 1.355), rtol=1e-6)


def test_the_rate_rises_in_a_line_and_falls_in_steps():
    schedule = WarmupStepDecay(0.02, warmup_steps=4, decay_steps=(10, 20), decay_factor=0.1)
    rates = [float(schedule(step)) for step in (0, 1, 3, 4, 9, 10, 19, 20, 100)]
    expected = [0.005, 0.01, 0.02, 0.02, 0.02, 0.002, 0.002, 0.0002, 0.0002]
    assert rates == pytest.approx(expected, rel=1e-5)


def test_the_rate_rises_in_a_line_and_falls_along_a_cosine():
    schedule = WarmupCosineDecay(0.02, warmup_steps=4, total_steps=60)
    rates = [float(schedule(step)) for step in (0, 20, 30, 40, 60, 100)]
    # Cosines of 0, 60, 90, 120 and 180 degrees.
    expected = [0.02 / 4, 0.02 * 0.75, 0.02 * 0.5, 0.02 * 0.25, 0.0, 0.0]
    assert rates == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_a_cosine_schedule_survives_serialization():
    schedule = WarmupCosineDecay(0.02, 5, 70)
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(schedule))
    assert copy.get_config() == {"learning_rate": 0.02, "warmup_steps": 5, "total_steps": 70}


def test_optimizer_and_steps_survive_serialization():
    optimizer = SGDWithL2(WarmupStepDecay(0.02, 5, (7,)), l2=3e-4)
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer))
    assert copy.get_config() == optimizer.get_config()
    assert copy.l2 == 3e-4
