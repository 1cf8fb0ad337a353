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
        for layer in (head.hidden1, head.hidden2, head.class_logits, head.deltas)
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
