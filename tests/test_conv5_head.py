"""The head of the C4 baseline is the last stage of a ResNet."""

import keras
import numpy as np
import pytest
from keras.ops import convert_to_numpy

from keras_fpn.conv5_head import Conv5Head
from keras_fpn.resnet import ResNet


def randomize(layer):
    """Weights of which nothing is zero, one or alike, and that keep activations in bounds."""
    random = np.random.RandomState(0)
    for variable in layer.weights:
        low, high = (0.5, 1.5) if variable.path.endswith(("gamma", "variance")) else (-0.05, 0.05)
        variable.assign(random.uniform(low, high, variable.shape))


def copy_by_name(source, target):
    """Copies the weights of the layers of a model that another has under the same names."""
    layers = {layer.name: layer for layer in source.layers}
    for layer in target.layers:
        layer.set_weights(layers[layer.name].get_weights() if layer.weights else [])


@pytest.fixture(scope="module", params=[(18, {}), (50, {}), (50, {"stride_in_1x1": True})])
def networks(request):
    """A whole network, the one that ends with C4, and the head, all of the same weights."""
    depth, arguments = request.param
    arguments = {"normalization": "frozen_batch_norm", **arguments}
    whole = ResNet(depth, **arguments)
    randomize(whole)
    cut = ResNet(depth, last_stage=4, **arguments)
    copy_by_name(whole, cut)
    head = Conv5Head(3, depth, **arguments)
    head.build((None, 2, 14, 14, cut.output["C4"].shape[-1]))
    copy_by_name(whole, head.conv5)
    return whole, cut, head


def test_with_a_network_cut_at_c4_it_is_the_whole_network(networks):
    whole, cut, head = networks
    images = np.random.RandomState(1).normal(size=(1, 64, 64, 3)).astype("float32")
    expected = whole(images)["C5"]
    assert np.ptp(convert_to_numpy(expected)) > 0.01
    c5 = head.conv5(cut(images)["C4"])
    np.testing.assert_allclose(*map(convert_to_numpy, (c5, expected)), rtol=1e-5, atol=1e-6)
    names = [layer.name for model in (cut, head.conv5) for layer in model.layers if layer.weights]
    assert names == [layer.name for layer in whole.layers if layer.weights]


def test_scores_and_deltas_are_those_of_the_mean_over_7x7(networks):
    whole, _, head = networks
    channels = whole.output["C4"].shape[-1]
    pooled = np.random.RandomState(2).normal(size=(2, 2, 14, 14, channels)).astype("float32")
    last_stage = keras.Model(whole.output["C4"], whole.output["C5"])
    c5 = convert_to_numpy(last_stage(pooled.reshape(4, 14, 14, channels)))
    assert c5.shape[:3] == (4, 7, 7)
    x = c5.astype("float64").mean((1, 2)).reshape(2, 2, -1)
    (wc, bc), (wd, bd) = (layer.get_weights() for layer in head.class_layers())
    class_logits, deltas = head(pooled)
    np.testing.assert_allclose(convert_to_numpy(class_logits), x @ wc + bc, rtol=1e-4, atol=1e-5)
    expected = (x @ wd + bd).reshape(2, 2, 3, 4)
    np.testing.assert_allclose(convert_to_numpy(deltas), expected, rtol=1e-4, atol=1e-5)
    assert head.compute_output_shape(pooled.shape) == (class_logits.shape, deltas.shape)


def small_head(**arguments):
    head = Conv5Head(3, 10, **arguments)
    head.build((None, 2, 14, 14, 256))
    return head


def test_layers_by_whether_they_depend_on_the_classes():
    head = small_head()
    assert [layer.name for layer in head.class_layers()] == ["class_logits", "deltas"]
    names = [layer.name for layer in head.class_independent_layers()]
    assert names[:2] == ["stage5_block0_conv1", "stage5_block0_norm1"]
    assert len(names) == len(set(names)) == 2 * 3
    layers = [*head.class_layers(), *head.class_independent_layers()]
    assert {id(x) for layer in layers for x in layer.weights} == {id(x) for x in head.weights}


def test_each_convolution_goes_with_its_norm():
    for convolution, norm in small_head().normalized_convolutions():
        assert norm.name == convolution.name.replace("conv", "norm")
    assert {norm for _, norm in small_head(normalization=None).normalized_convolutions()} == {None}


def test_norms_follow_the_mode():
    pooled = np.random.RandomState(3).normal(2, 3, size=(1, 2, 14, 14, 256)).astype("float32")
    head = small_head(normalization="batch_norm")
    inference, training = (convert_to_numpy(head(pooled, training=x)[0]) for x in (False, True))
    assert np.abs(inference - training).max() > 1e-3
    head = small_head(normalization="frozen_batch_norm")
    inference, training = (convert_to_numpy(head(pooled, training=x)[0]) for x in (False, True))
    np.testing.assert_array_equal(inference, training)
    assert not [x.path for x in head.trainable_weights if "norm" in x.path]


def test_precision_policy_reaches_every_layer():
    head = small_head(dtype="mixed_bfloat16", normalization="frozen_batch_norm")
    class_logits, deltas = head(np.zeros((1, 2, 14, 14, 256), "float32"))
    assert keras.backend.standardize_dtype(class_logits.dtype) == "bfloat16"
    assert keras.backend.standardize_dtype(deltas.dtype) == "bfloat16"
    policies = {layer.dtype_policy.name for layer in [*head.conv5.layers[1:], *head.class_layers()]}
    assert policies == {"mixed_bfloat16"}


def test_an_untrained_head_stays_so():
    assert not small_head(trainable=False).trainable_weights


def test_saved_in_a_model_it_gives_the_same(tmp_path):
    pooled = keras.Input((2, 14, 14, 256))
    head = Conv5Head(3, 10, normalization="frozen_batch_norm", norm_epsilon=1e-3)
    model = keras.Model(pooled, head(pooled))
    randomize(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    regions = np.random.RandomState(4).normal(size=(1, 2, 14, 14, 256)).astype("float32")
    for found, expected in zip(loaded(regions), model(regions), strict=True):
        np.testing.assert_array_equal(*map(convert_to_numpy, (found, expected)))


def test_config_round_trip():
    head = Conv5Head(
        3,
        depth=101,
        stride_in_1x1=True,
        groups=32,
        width_per_group=8,
        width=32,
        normalization=None,
        norm_epsilon=0.0,
        name="box_head",
    )
    assert Conv5Head.from_config(head.get_config()).get_config() == head.get_config()
    assert head.get_config().items() >= {"num_classes": 3, "depth": 101, "width": 32}.items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 51}, r"`depth` .*; received 51"),
        ({"depth": 18, "groups": 32}, "`groups` .* depth 18, .*; received 32"),
        ({"width": 0}, "`width` .*; received 0"),
        ({"num_classes": 0}, "`num_classes` .*; received 0"),
        ({"normalization": "batchnorm"}, "`normalization` .*'batchnorm'; did you mean 'batch_norm"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Conv5Head(**{"num_classes": 3, **arguments})
