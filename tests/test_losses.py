from pathlib import Path

import keras
import numpy as np
import pytest
from keras.ops import convert_to_tensor

from keras_fpn.losses import RoILoss, RPNLoss, box_loss, classification_loss, objectness_loss

with np.load(Path(__file__).parent / "reference" / "parts.npz") as archive:
    STORED = {name: archive[name] for name in archive.files if name.startswith("smooth_l1")}


def test_objectness_by_hand():
    logits = convert_to_tensor(np.array([[0.0, 2.0, -1.0, 5.0]], "float32"))
    positive = convert_to_tensor(np.array([[True, True, False, False]]))
    sampled = convert_to_tensor(np.array([[True, True, True, False]]))
    expected = -np.log(0.5) - np.log(1 / (1 + np.exp(-2))) - np.log(1 - 1 / (1 + np.exp(1)))
    assert float(objectness_loss(logits, positive, sampled, 4.0)) == pytest.approx(expected / 4)


def test_objectness_of_large_logits_is_finite():
    logits = convert_to_tensor(np.array([[1000.0, -1000.0]], "float32"))
    sampled = convert_to_tensor(np.array([[True, True]]))
    right = objectness_loss(logits, convert_to_tensor([[True, False]]), sampled, 1.0)
    wrong = objectness_loss(logits, convert_to_tensor([[False, True]]), sampled, 1.0)
    assert float(right) == pytest.approx(0)
    assert float(wrong) == pytest.approx(2000)


def test_classification_by_hand():
    # Probabilities 1/2, 1/4, 1/4 of two classes and the background.
    logits = convert_to_tensor(
        np.log(np.array([[[2, 1, 1], [2, 1, 1], [2, 1, 1], [9, 1, 1]]], "float32"))
    )
    labels = convert_to_tensor(np.array([[0, 1, -1, 0]]))
    sampled = convert_to_tensor(np.array([[True, True, True, False]]))
    loss = classification_loss(logits, labels, sampled, 3.0)
    assert float(loss) == pytest.approx((np.log(2) + np.log(4) + np.log(4)) / 3)


def test_smooth_l1_by_hand():
    deltas = convert_to_tensor(np.array([[[0.5, -0.5, 2, 0], [7, 7, 7, 7]]], "float32"))
    targets = convert_to_tensor(np.array([[[0, 0, 0, 0.25], [0, 0, 0, 0]]], "float32"))
    positive = convert_to_tensor(np.array([[True, False]]))
    # beta 1: half the square under 1, less a half over it.
    loss = box_loss(deltas, targets, positive, 10.0, beta=1.0)
    assert float(loss) == pytest.approx((0.125 + 0.125 + 1.5 + 0.03125) / 10)
    # beta 0: the absolute value.
    loss = box_loss(deltas, targets, positive, 10.0, beta=0.0)
    assert float(loss) == pytest.approx((0.5 + 0.5 + 2 + 0.25) / 10)


def test_smooth_l1_equals_the_reference():
    for error, expected in zip(STORED["smooth_l1_errors"], STORED["smooth_l1"], strict=True):
        deltas = convert_to_tensor(np.array([[[error, 0, 0, 0]]], "float32"))
        loss = box_loss(deltas, deltas * 0, convert_to_tensor([[True]]), 1.0, 1 / 9)
        assert float(loss) == pytest.approx(expected, rel=1e-6, abs=0)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="gradients are taken with TensorFlow's GradientTape",
)
def test_gradient_of_smooth_l1_equals_the_reference():
    import tensorflow as tf

    deltas = tf.Variable(STORED["smooth_l1_errors"].reshape(1, -1, 4))
    with tf.GradientTape() as tape:
        loss = box_loss(deltas, tf.zeros(deltas.shape), tf.ones(deltas.shape[:2], bool), 1.0, 1 / 9)
    gradient = tape.gradient(loss, deltas).numpy().reshape(-1)
    # |x| has no derivative at 0, where both sides of the parabola give 0.
    np.testing.assert_allclose(gradient, STORED["smooth_l1_gradient"], rtol=1e-6)


def test_without_samples_the_losses_are_zero():
    nothing = convert_to_tensor(np.zeros((2, 3), bool))
    logits = convert_to_tensor(np.ones((2, 3, 5), "float32"))
    background = convert_to_tensor(np.full((2, 3), -1))
    assert float(objectness_loss(logits[..., 0], nothing, nothing, 1.0)) == 0
    assert float(classification_loss(logits, background, nothing, 1.0)) == 0
    assert float(box_loss(logits[..., :4], logits[..., :4] * 0, nothing, 1.0, 1.0)) == 0


def test_rpn_losses_of_all_levels_by_hand():
    # Two anchors on each of two pixels of P2 and one of P3; samples are anchors 1, 2 and 5.
    objectness = {
        "P2": np.array([[[[0.0, 1.0], [2.0, 0.0]]]], "float32"),
        "P3": np.array([[[[0.0, 3.0]]]], "float32"),
    }
    deltas = {"P2": np.zeros((1, 1, 2, 8), "float32"), "P3": np.zeros((1, 1, 1, 8), "float32")}
    deltas["P3"][0, 0, 0, 4:] = [1, 2, 3, 4]
    targets = {
        "indices": np.array([[5, 1, 2, 0]]),
        "positive": np.array([[True, False, False, False]]),
        "sampled": np.array([[True, True, True, False]]),
        "deltas": np.zeros((1, 4, 4), "float32"),
    }
    losses = RPNLoss(smooth_l1_beta=0.0)(objectness, deltas, targets)
    expected = np.log1p(np.exp(-3)) + np.log1p(np.exp(1)) + np.log1p(np.exp(2))
    assert float(losses["objectness_loss"]) == pytest.approx(expected / 3, rel=1e-6)
    assert float(losses["rpn_box_loss"]) == pytest.approx(10 / 3, rel=1e-6)


def test_roi_losses_by_hand():
    # Two classes and the background, all as probable; the true class's deltas alone count.
    deltas = np.array([[[[9.0] * 4, [1, 0, 2, 0]], [[7.0] * 4, [7.0] * 4]]], "float32")
    targets = {
        "labels": np.array([[1, -1]]),
        "positive": np.array([[True, False]]),
        "sampled": np.array([[True, True]]),
        "deltas": np.zeros((1, 2, 4), "float32"),
    }
    losses = RoILoss(smooth_l1_beta=1.0)(np.zeros((1, 2, 3), "float32"), deltas, targets)
    assert float(losses["class_loss"]) == pytest.approx(np.log(3), rel=1e-6)
    assert float(losses["box_loss"]) == pytest.approx((0.5 + 1.5) / 2, rel=1e-6)
    assert RPNLoss().smooth_l1_beta == RoILoss().smooth_l1_beta == 1 / 9
