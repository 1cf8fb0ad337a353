import keras
import numpy as np
import pytest
from keras.ops import convert_to_numpy

from keras_fpn.pyramid import FeaturePyramid


def identity_pyramid(features, **arguments):
    """A pyramid whose every convolution hands its input on."""
    channels = next(iter(features.values())).shape[-1]
    layer = FeaturePyramid(channels, **arguments)
    layer.build({level: x.shape for level, x in features.items()})
    for convolution in layer.laterals.values():
        convolution.kernel.assign(np.eye(channels)[None, None])
    for convolution in layer.outputs.values():
        kernel = np.zeros((3, 3, channels, channels))
        kernel[1, 1] = np.eye(channels)
        convolution.kernel.assign(kernel)
    return layer


def nearest(x, height, width):
    rows = [i * x.shape[1] // height for i in range(height)]
    columns = [j * x.shape[2] // width for j in range(width)]
    return x[:, rows][:, :, columns]


def random_features(sizes):
    random = np.random.RandomState(0)
    return {
        level: random.randint(-8, 9, (2, *size, 3)).astype("float32")
        for level, size in sizes.items()
    }


SIZES = {
    "doubling": {"C2": (16, 24), "C3": (8, 12), "C4": (4, 6), "C5": (2, 3)},
    "odd": {"C2": (13, 18), "C3": (7, 9), "C4": (4, 5), "C5": (2, 3)},
    "one pixel at the top": {"C2": (5, 8), "C3": (3, 4), "C4": (2, 2), "C5": (1, 1)},
    "of unpadded convolutions": {"C2": (15, 23), "C3": (7, 10), "C4": (3, 5), "C5": (1, 2)},
}


@pytest.mark.parametrize("name", SIZES)
def test_every_level_is_the_sum_of_all_above_it_upsampled_to_its_own_size(name):
    features = random_features(SIZES[name])
    expected = {"P5": features["C5"]}
    for level in (4, 3, 2):
        lateral = features[f"C{level}"]
        expected[f"P{level}"] = lateral + nearest(expected[f"P{level + 1}"], *lateral.shape[1:3])
    expected["P6"] = features["C5"][:, ::2, ::2]
    layer = identity_pyramid(features)
    pyramid = layer(features)
    assert list(pyramid) == ["P2", "P3", "P4", "P5", "P6"]
    assert layer.rpn_levels == ("P2", "P3", "P4", "P5", "P6")
    assert layer.roi_levels == ("P2", "P3", "P4", "P5")
    for level, x in pyramid.items():
        np.testing.assert_array_equal(convert_to_numpy(x), expected[level], err_msg=level)
    shapes = layer.compute_output_shape({level: x.shape for level, x in features.items()})
    assert shapes == {level: x.shape for level, x in expected.items()}


def shapes_of(maps):
    return {level: x.shape for level, x in maps.items()}


def test_bottom_up_pyramid_adds_nothing():
    features = random_features(SIZES["odd"])
    layer = identity_pyramid(features, top_down=False)
    pyramid = layer(features)
    assert tuple(pyramid) == layer.rpn_levels == ("P2", "P3", "P4", "P5", "P6")
    assert layer.roi_levels == ("P2", "P3", "P4", "P5")
    expected = {f"P{level}": features[f"C{level}"] for level in (2, 3, 4, 5)}
    expected["P6"] = features["C5"][:, ::2, ::2]
    for level, x in pyramid.items():
        np.testing.assert_array_equal(convert_to_numpy(x), expected[level], err_msg=level)
    assert layer.compute_output_shape(shapes_of(features)) == shapes_of(expected)
    # A 1x1 and a 3x3 for each level, as with the top-down pathway.
    assert layer.count_params() == identity_pyramid(features).count_params()


@pytest.mark.parametrize("name", SIZES)
def test_without_laterals_every_level_comes_from_the_coarsest_map(name):
    features = random_features(SIZES[name])
    layer = identity_pyramid(features, lateral=False)
    pyramid = layer(features)
    assert tuple(pyramid) == layer.rpn_levels == ("P2", "P3", "P4", "P5", "P6")
    assert layer.roi_levels == ("P2", "P3", "P4", "P5")
    expected = {"P5": features["C5"], "P6": features["C5"][:, ::2, ::2]}
    for level in (4, 3, 2):
        size = features[f"C{level}"].shape[1:3]
        expected[f"P{level}"] = nearest(expected[f"P{level + 1}"], *size)
    for level, x in pyramid.items():
        np.testing.assert_array_equal(convert_to_numpy(x), expected[level], err_msg=level)
    assert layer.compute_output_shape(shapes_of(features)) == shapes_of(expected)
    assert list(layer.laterals) == ["C5"]
    convolutions = [convolution.name for convolution, _ in layer.normalized_convolutions()]
    assert convolutions == ["lateral_C5", "output_C2", "output_C3", "output_C4", "output_C5"]


@pytest.mark.parametrize("lateral", [True, False])
def test_the_finest_level_alone(lateral):
    features = random_features(SIZES["odd"])
    whole = identity_pyramid(features, lateral=lateral)
    layer = identity_pyramid(features, lateral=lateral, finest_only=True)
    pyramid = layer(features)
    assert tuple(pyramid) == layer.rpn_levels == layer.roi_levels == ("P2",)
    np.testing.assert_array_equal(*map(convert_to_numpy, (pyramid["P2"], whole(features)["P2"])))
    assert layer.compute_output_shape(shapes_of(features)) == shapes_of(pyramid)
    assert list(layer.laterals) == list(whole.laterals)
    assert list(layer.outputs) == ["C2"]


def test_norms_follow_the_convolutions_that_there_are():
    features = random_features(SIZES["odd"])
    layer = FeaturePyramid(3, "frozen_batch_norm", lateral=False, finest_only=True)
    layer(features)
    names = [(a.name, b.name) for a, b in layer.normalized_convolutions()]
    assert names == [("lateral_C5", "lateral_norm_C5"), ("output_C2", "output_norm_C2")]


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize(
    "variant", [{}, {"top_down": False}, {"lateral": False}, {"finest_only": True}]
)
def test_config_round_trip(variant, built):
    layer = FeaturePyramid(3, name="pyramid", **variant)
    if built:
        layer(random_features(SIZES["odd"]))
    config = {"top_down": True, "lateral": True, "finest_only": False} | variant
    assert layer.get_config().items() >= config.items()
    assert FeaturePyramid.from_config(layer.get_config()).get_config() == layer.get_config()


@pytest.mark.parametrize("other", [{"lateral": False}, {"finest_only": True}])
def test_levels_that_nothing_connects_are_refused(other):
    with pytest.raises(ValueError, match=r"`top_down` must be True .*; received top_down=False"):
        FeaturePyramid(top_down=False, **other)


def test_any_run_of_levels():
    features = random_features({"C3": (4, 4), "C4": (2, 2)})
    layer = identity_pyramid(features)
    pyramid = layer(features)
    assert tuple(pyramid) == layer.rpn_levels == ("P3", "P4", "P5")
    assert layer.roi_levels == ("P3", "P4")
    np.testing.assert_array_equal(convert_to_numpy(pyramid["P5"]), features["C4"][:, ::2, ::2])


def test_there_is_no_non_linearity():
    features = random_features(SIZES["doubling"])
    layer = FeaturePyramid(4)
    positive = layer(features)
    negative = layer({level: -x for level, x in features.items()})
    for level, x in positive.items():
        np.testing.assert_allclose(
            convert_to_numpy(x), -convert_to_numpy(negative[level]), atol=1e-5
        )


def test_an_output_convolution_sees_3x3_and_a_lateral_one_pixel():
    features = {level: np.zeros_like(x) for level, x in random_features(SIZES["doubling"]).items()}
    features["C2"][0, 8, 12] = 1
    touched = np.argwhere(convert_to_numpy(FeaturePyramid(4)(features)["P2"])[0].any(-1))
    np.testing.assert_array_equal(touched.min(0), [7, 11])
    np.testing.assert_array_equal(touched.max(0), [9, 13])


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="sizes known at run time only are TensorFlow's"
)
@pytest.mark.parametrize("name", SIZES)
def test_sizes_that_are_known_at_run_time_only(name):
    import tensorflow as tf

    features = random_features(SIZES[name])
    layer = identity_pyramid(features)
    signature = {level: tf.TensorSpec((None, None, None, 3)) for level in features}
    traced = tf.function(layer, input_signature=[signature])(features)
    for level, x in layer(features).items():
        np.testing.assert_array_equal(traced[level], x)


def test_unknown_channels_are_refused():
    with pytest.raises(ValueError, match=r"channels of C2 .* received shape \(None, 8, 8, None\)"):
        FeaturePyramid(4).build({"C2": (None, 8, 8, None)})


def test_a_normalization_follows_each_convolution():
    features = random_features({"C2": (4, 6), "C3": (2, 3)})
    pyramid = identity_pyramid(features)
    normalized = FeaturePyramid(3, normalization="frozen_batch_norm", norm_epsilon=1.0)
    normalized.build({level: x.shape for level, x in features.items()})
    for level in features:
        for name in ("laterals", "outputs"):
            layer = getattr(normalized, name)[level]
            assert not layer.use_bias
            layer.kernel.assign(getattr(pyramid, name)[level].kernel)
        # (x - 1) / sqrt(3 + 1) * 4 = 2 x - 2 after the laterals, x + 5 after the outputs.
        norm = normalized.lateral_norms[level]
        for variable, value in zip(norm.weights, (4, 0, 1, 3), strict=True):
            variable.assign(np.full(3, value))
        normalized.output_norms[level].beta.assign(np.full(3, 5))
        normalized.output_norms[level].moving_variance.assign(np.zeros(3))
    laterals = {level: 2 * x - 2 for level, x in features.items()}
    expected = {"P3": laterals["C3"] + 5}
    expected["P2"] = laterals["C2"] + nearest(laterals["C3"], 4, 6) + 5
    found = normalized(features)
    for level, value in expected.items():
        np.testing.assert_allclose(convert_to_numpy(found[level]), value, rtol=1e-6)


def test_an_unknown_normalization_is_refused():
    with pytest.raises(ValueError, match=r"`normalization` .*'group'; did you mean 'group_norm'"):
        FeaturePyramid(3, normalization="group")
