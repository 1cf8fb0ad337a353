import numpy as np
import pytest
from keras.ops import convert_to_numpy

from keras_fpn.ranking import take_rows, top_k

INF = float("inf")


def test_equal_values_come_in_the_order_of_their_indices():
    random = np.random.RandomState(0)
    values = random.randint(0, 5, (3, 200)).astype("float32")
    best, indices = top_k(values, 150)
    order = np.argsort(-values, axis=-1, kind="stable")[:, :150]
    np.testing.assert_array_equal(convert_to_numpy(indices), order)
    np.testing.assert_array_equal(
        convert_to_numpy(best), np.take_along_axis(values, order, axis=-1)
    )


@pytest.mark.parametrize("k", [3, 5, 9])
def test_absent_entries_come_last_with_index_0(k):
    best, indices = top_k(np.array([[-INF, 4, 7], [-INF, -INF, -INF]], "float32"), k)
    filling = k - 3
    np.testing.assert_array_equal(
        convert_to_numpy(best), [[7, 4, *[-INF] * (1 + filling)], [-INF] * k]
    )
    np.testing.assert_array_equal(
        convert_to_numpy(indices), [[2, 1, *[0] * (1 + filling)], [0] * k]
    )


def test_each_image_takes_rows_of_its_own():
    x = np.arange(2 * 4 * 3).reshape(2, 4, 3)
    indices = np.array([[3, 0, 0, 1, 2], [1, 1, 2, 3, 0]])
    np.testing.assert_array_equal(
        convert_to_numpy(take_rows(x, indices)), np.stack([x[0][indices[0]], x[1][indices[1]]])
    )
    np.testing.assert_array_equal(
        convert_to_numpy(take_rows(x[..., 0], indices)),
        np.stack([x[0][indices[0], 0], x[1][indices[1], 0]]),
    )
