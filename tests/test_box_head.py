import numpy as np
import pytest
from keras.ops import convert_to_numpy

from keras_fpn.box_head import BoxHead


@pytest.fixture(scope="module")
def head():
    head = BoxHead(num_classes=3, hidden_dim=5)
    head.build((None, 4, 2, 2, 6))
    random = np.random.RandomState(0)
    for variable in head.weights:
        variable.assign(random.normal(size=variable.shape))
    return head


def test_equals_the_matrix_products_by_hand(head):
    pooled = np.random.RandomState(1).normal(size=(2, 4, 2, 2, 6)).astype("float32")
    (w1, b1), (w2, b2), (wc, bc), (wd, bd) = (
        [convert_to_numpy(x).astype("float64") for x in (layer.kernel, layer.bias)]
        for layer in (*head.hidden, head.class_logits, head.deltas)
    )
    x = np.maximum(pooled.reshape(8, 24) @ w1 + b1, 0)
    x = np.maximum(x @ w2 + b2, 0)
    class_logits, deltas = head(pooled)
    np.testing.assert_allclose(
        convert_to_numpy(class_logits), (x @ wc + bc).reshape(2, 4, 4), atol=1e-3
    )
    np.testing.assert_allclose(
        convert_to_numpy(deltas), (x @ wd + bd).reshape(2, 4, 3, 4), atol=1e-3
    )


def test_shapes_and_sizes_of_the_weights(head):
    assert head.compute_output_shape((None, 4, 2, 2, 6)) == ((None, 4, 4), (None, 4, 3, 4))
    assert [tuple(x.shape) for x in head.weights if len(x.shape) == 2] == [
        (24, 5),
        (5, 5),
        (5, 4),
        (5, 12),
    ]


def test_a_region_is_judged_alone(head):
    pooled = np.random.RandomState(2).normal(size=(1, 4, 2, 2, 6)).astype("float32")
    first = [convert_to_numpy(x) for x in head(pooled)]
    changed = pooled.copy()
    changed[0, 1:] = 9
    for before, after in zip(first, head(changed), strict=True):
        np.testing.assert_allclose(convert_to_numpy(after)[0, 0], before[0, 0], rtol=1e-5)


def test_convolutions_come_before_the_hidden_layers():
    """As a second head without them sees what the convolutions make of the regions."""
    arguments = {"num_classes": 3, "hidden_dim": 5, "hidden_layers": 1}
    head = BoxHead(**arguments, convolutions=2, normalization="frozen_batch_norm", norm_epsilon=0.5)
    pooled = np.random.RandomState(3).normal(size=(2, 3, 4, 4, 6)).astype("float32")
    head(pooled)
    random = np.random.RandomState(4)
    for variable in head.weights:
        variable.assign(random.uniform(0.1, 1.0, size=variable.shape))
    convolved = pooled.reshape(6, 4, 4, 6)
    for convolution, norm in zip(head.convolved, head.norms, strict=True):
        assert not convolution.use_bias
        kernel = convert_to_numpy(convolution.kernel)
        padded = np.pad(convolved, [[0, 0], [1, 1], [1, 1], [0, 0]])
        convolved = sum(
            padded[:, row : row + 4, column : column + 4] @ kernel[row, column]
            for row in range(3)
            for column in range(3)
        )
        gamma, beta, mean, variance = (
            convert_to_numpy(x)
            for x in (norm.gamma, norm.beta, norm.moving_mean, norm.moving_variance)
        )
        convolved = gamma * (convolved - mean) / np.sqrt(variance + 0.5) + beta
        convolved = np.maximum(convolved, 0)
    plain = BoxHead(**arguments)
    plain.build((None, 3, 4, 4, 6))
    for ours, theirs in zip(
        [*plain.hidden, *plain.class_layers()], [*head.hidden, *head.class_layers()], strict=True
    ):
        ours.set_weights(theirs.get_weights())
    for expected, found in zip(plain(convolved.reshape(pooled.shape)), head(pooled), strict=True):
        np.testing.assert_allclose(
            convert_to_numpy(found), convert_to_numpy(expected), rtol=1e-4, atol=1e-3
        )


def test_an_unknown_normalization_is_refused():
    with pytest.raises(
        ValueError, match=r"`normalization` .*'batchnorm'; did you mean 'batch_norm'"
    ):
        BoxHead(3, convolutions=1, normalization="batchnorm")
