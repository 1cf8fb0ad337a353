import keras
import numpy as np
import pytest

from keras_fpn.resnet import GroupedConv2D
from keras_fpn.weights.plan import channels_last_columns, plan_of, read_arrays, resnet_name


@pytest.mark.parametrize(
    ("blocks", "bottleneck", "kernel", "name"),
    [
        ((2, 2, 2, 2), False, (64, 64, 3, 3), "resnet18"),
        ((3, 4, 6, 3), False, (64, 64, 3, 3), "resnet34"),
        ((3, 4, 6, 3), True, (64, 64, 3, 3), "resnet50"),
        ((3, 4, 6, 3), True, (128, 4, 3, 3), "resnext50_32x4d"),
        ((3, 4, 23, 3), True, (64, 64, 3, 3), "resnet101"),
        ((3, 4, 23, 3), True, (256, 8, 3, 3), "resnext101_32x8d"),
        ((3, 8, 36, 3), True, (64, 64, 3, 3), "resnet152"),
    ],
)
def test_the_name_of_a_resnet_by_its_architecture(blocks, bottleneck, kernel, name):
    assert resnet_name(blocks, bottleneck, kernel) == name


def test_a_resnet_of_no_known_architecture():
    with pytest.raises(ValueError, match=r"received .*\(2, 2, 2, 2\) blocks with 3 convolutions"):
        resnet_name((2, 2, 2, 2), True, (64, 64, 3, 3))


def test_a_grouped_convolution_is_a_convolution():
    layer = GroupedConv2D(4, 3, groups=2, use_bias=False, data_format="channels_last")
    layer.build((None, None, None, 6))
    (entry,) = plan_of({"backbone/conv": layer}, {r"(\w+)/conv": r"\1.conv1"})
    assert entry.name == "backbone.conv1.weight"
    # PyTorch's kernels are [out, in / groups, height, width].
    assert entry.convert(np.zeros((4, 3, 3, 3))).shape == tuple(layer.kernel.shape) == (3, 3, 3, 4)


def test_a_layer_that_the_format_does_not_know():
    layer = keras.layers.Dense(1)
    with pytest.raises(ValueError, match="no weights for the layer head/other; nothing was loaded"):
        plan_of({"head/other": layer}, {"head/one": "one"})


def test_columns_become_channels_last():
    # One output reads 2 channels of 3 x 3 pixels; its weights tell channel, row and column.
    channel, row, column = np.meshgrid(range(2), range(3), range(3), indexing="ij")
    weight = (100 * channel + 10 * row + column).reshape(1, 18)
    expected = [100 * c + 10 * r + k for r in range(3) for k in range(3) for c in range(2)]
    assert channels_last_columns(3)(weight).tolist() == [expected]


@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
def test_of_a_training_checkpoint_the_model_is_taken(wrapper):
    arrays = read_arrays({wrapper: {"x": np.ones(2), "n.num_batches_tracked": 3}, "epoch": 5})
    assert list(arrays) == ["x"]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({}, "The mapping must map names to arrays; it is empty"),
        ({"a": "text"}, "names to arrays; a is not an array"),
        ({"a": {"b": np.ones(1)}}, "names to arrays; a is not an array"),
        ([np.ones(1)], "names to arrays; received a list"),
    ],
)
def test_what_maps_no_names_to_arrays(contents, message):
    with pytest.raises(ValueError, match=message):
        read_arrays(contents)
