import numpy as np
import pytest
from keras.ops import convert_to_numpy

from keras_fpn.rpn import RPNHead


@pytest.fixture(scope="module")
def features():
    random = np.random.RandomState(0)
    return {
        "P2": random.normal(size=(2, 5, 6, 4)).astype("float32"),
        "P3": random.normal(size=(2, 3, 3, 4)).astype("float32"),
    }


def test_shapes(features):
    head = RPNHead(anchors_per_location=3, channels=8)
    objectness, deltas = head(features)
    assert {level: tuple(x.shape) for level, x in objectness.items()} == {
        "P2": (2, 5, 6, 3),
        "P3": (2, 3, 3, 3),
    }
    assert {level: tuple(x.shape) for level, x in deltas.items()} == {
        "P2": (2, 5, 6, 12),
        "P3": (2, 3, 3, 12),
    }
    shapes = head.compute_output_shape({level: x.shape for level, x in features.items()})
    assert shapes == (
        {level: tuple(x.shape) for level, x in objectness.items()},
        {level: tuple(x.shape) for level, x in deltas.items()},
    )


def test_one_pixel_by_hand(features):
    head = RPNHead(anchors_per_location=2, channels=8)
    head.build({level: x.shape for level, x in features.items()})
    random = np.random.RandomState(1)
    for variable in head.weights:
        variable.assign(random.normal(size=variable.shape))
    objectness, deltas = head(features)
    hidden, logits, boxes = (
        [convert_to_numpy(x) for x in (layer.kernel, layer.bias)]
        for layer in (*head.hidden, head.objectness, head.deltas)
    )
    window = features["P2"][1, 1:4, 2:5]
    x = np.maximum(np.tensordot(window, hidden[0], axes=3) + hidden[1], 0)
    np.testing.assert_allclose(
        convert_to_numpy(objectness["P2"])[1, 2, 3], x @ logits[0][0, 0] + logits[1], rtol=1e-4
    )
    np.testing.assert_allclose(
        convert_to_numpy(deltas["P2"])[1, 2, 3], x @ boxes[0][0, 0] + boxes[1], rtol=1e-4
    )


def test_all_levels_share_one_head(features):
    head = RPNHead(3, channels=8)
    same = {"P2": features["P2"], "P3": features["P2"]}
    for predictions in head(same):
        np.testing.assert_array_equal(
            convert_to_numpy(predictions["P2"]), convert_to_numpy(predictions["P3"])
        )
    assert len(head.weights) == 6


def test_more_convolutions_follow_one_another(features):
    head = RPNHead(3, channels=8, hidden_layers=2)
    objectness, _ = head(features)
    first, second = head.hidden
    expected = head.objectness(second(first(features["P3"])))
    np.testing.assert_array_equal(convert_to_numpy(objectness["P3"]), convert_to_numpy(expected))
    assert len(head.weights) == 8


def test_the_channels_are_those_of_the_input_unless_given(features):
    head, given = RPNHead(3), RPNHead(3, channels=8)
    head(features), given(features)
    assert [layer.filters for layer in (*head.hidden, *given.hidden)] == [4, 8]
    assert RPNHead.from_config(head.get_config()).channels is None
