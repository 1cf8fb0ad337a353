import re

import keras
import numpy as np
import pytest
from keras.ops import convert_to_numpy
from small_detector import small_detector

from keras_fpn.backbones import resolve_backbone
from keras_fpn.resnet import ResNet

LEVELS = ["C2", "C3", "C4", "C5"]


@pytest.fixture
def images():
    return np.random.default_rng(0).uniform(0, 255, (1, 75, 101, 3)).astype("float32")


def keras_hub_resnet():
    keras_hub = pytest.importorskip("keras_hub", reason="keras-hub is not installed")
    return keras_hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64, 8, 16, 24],
        stackwise_num_blocks=[1, 1, 1, 1],
        stackwise_num_strides=[1, 2, 2, 2],
        block_type="basic_block",
        use_pre_activation=True,
    )


def keras_cv_resnet():
    keras_cv = pytest.importorskip("keras_cv", reason="keras-cv is not installed")
    return keras_cv.models.ResNetBackbone(
        stackwise_filters=[64, 8, 16, 24],
        stackwise_blocks=[1, 1, 1, 1],
        stackwise_strides=[1, 2, 2, 2],
        include_rescaling=True,
        block_type="basic_block",
    )


def mobilenet():
    return keras.applications.MobileNetV2(
        input_shape=(None, None, 3), alpha=0.35, include_top=False, weights=None
    )


def pyramid_of_convolutions(strides=(4, 2, 2, 2)):
    """Feature maps of strides 4, 8, 16 and 32, the k-th with k channels."""
    x = images = keras.Input((None, None, 3))
    feature_maps = []
    for channels, stride in enumerate(strides, start=1):
        x = keras.layers.Conv2D(channels, stride, stride, padding="same")(x)
        feature_maps.append(x)
    return images, feature_maps


@keras.saving.register_keras_serializable("keras_fpn_tests")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.convolutions = [
            keras.layers.Conv2D(k, stride, stride, padding="same")
            for k, stride in enumerate((4, 2, 2, 2), start=1)
        ]

    def call(self, images):
        feature_maps = {"image": images}
        x = images
        for level, convolution in zip(LEVELS, self.convolutions, strict=True):
            x = feature_maps[level] = convolution(x)
        return feature_maps


class TestNames:
    def test_a_name_is_a_resnet_with_its_defaults(self):
        backbone = resolve_backbone("resnet34")
        assert isinstance(backbone, ResNet)
        assert (backbone.name, backbone.depth) == ("resnet34", 34)
        assert (backbone.normalization, backbone.frozen_stages) == ("batch_norm", 0)

    def test_what_is_given_reaches_the_network(self):
        arguments = {
            "normalization": "group_norm",
            "frozen_stages": 1,
            "stride_in_1x1": True,
            "norm_epsilon": 0.0,
        }
        backbone = resolve_backbone("resnet50", arguments, image_shape=(64, 96, 3))
        assert {name: getattr(backbone, name) for name in arguments} == arguments
        assert backbone.output["C5"].shape == (None, 2, 3, 2048)

    def test_resnext(self):
        with keras.StatelessScope(initialize_variables=False):  # Values take most of the time.
            backbone = resolve_backbone("resnext101_32x8d")
        assert backbone.name == "resnext101_32x8d"
        # torchvision 0.27.1's without its `fc`.
        assert sum(np.prod(weight.shape) for weight in backbone.trainable_weights) == 86742336

    @pytest.mark.parametrize(
        ("name", "nearest"),
        [
            ("resnet51", "; did you mean 'resnet50'?"),
            ("resnext101_32x4d", "; did you mean 'resnext101_32x8d'?"),
            ("vgg", "."),
        ],
    )
    def test_nearest_names_are_suggested(self, name, nearest):
        message = f"`backbone` .*'resnet18', .*received {re.escape(repr(name) + nearest)}$"
        with pytest.raises(ValueError, match=message):
            resolve_backbone(name)


class TestKerasHub:
    def test_gives_the_feature_maps_of_pyramid_outputs(self, images):
        given = keras_hub_resnet()
        expected = keras.Model(given.inputs[0], given.pyramid_outputs)(images)
        found = resolve_backbone(given)(images)
        assert list(found) == LEVELS
        for n, channels in zip(range(2, 6), (64, 8, 16, 24), strict=True):
            assert found[f"C{n}"].shape == (1, -(-75 // 2**n), -(-101 // 2**n), channels)
            np.testing.assert_array_equal(
                convert_to_numpy(found[f"C{n}"]), convert_to_numpy(expected[f"P{n}"])
            )


class TestKerasCV:
    def test_gives_the_feature_maps_of_pyramid_level_inputs(self, images):
        given = keras_cv_resnet()
        found = resolve_backbone(given)(images)
        assert list(found) == LEVELS
        for n, channels in zip(range(2, 6), (64, 8, 16, 24), strict=True):
            layer = given.get_layer(given.pyramid_level_inputs[f"P{n}"])
            expected = keras.Model(given.inputs[0], layer.output)(images)
            assert found[f"C{n}"].shape == (1, -(-75 // 2**n), -(-101 // 2**n), channels)
            np.testing.assert_array_equal(
                convert_to_numpy(found[f"C{n}"]), convert_to_numpy(expected)
            )


class TestKerasApplications:
    def test_gives_the_feature_maps_of_the_model_without_its_tail(self, images):
        given = keras.applications.ResNet50(weights=None, input_shape=(75, 101, 3), classes=10)
        backbone = resolve_backbone(given, image_shape=(75, 101, 3))
        found = backbone(images)
        names = ("conv2_block3_out", "conv3_block4_out", "conv4_block6_out", "conv5_block3_out")
        for n, name in zip(range(2, 6), names, strict=True):
            expected = keras.Model(given.inputs[0], given.get_layer(name).output)(images)
            assert found[f"C{n}"].shape == (1, -(-75 // 2**n), -(-101 // 2**n), 64 * 2**n)
            np.testing.assert_array_equal(
                convert_to_numpy(found[f"C{n}"]), convert_to_numpy(expected)
            )
        assert not any(
            isinstance(layer, (keras.layers.GlobalAveragePooling2D, keras.layers.Dense))
            for layer in backbone.layers
        )

    # By the plans of these networks: the last layer at each stride that all paths go through.
    @pytest.mark.parametrize(
        ("model", "names"),
        [
            (
                "MobileNetV2",
                ["block_3_expand_relu", "block_6_expand_relu", "block_13_expand_relu", "out_relu"],
            ),
            (
                "EfficientNetB0",
                [
                    "block3a_expand_activation",
                    "block4a_expand_activation",
                    "block6a_expand_activation",
                    "top_activation",
                ],
            ),
            # The block that strides pads and pools inside its branches.
            (
                "ResNet50V2",
                ["conv2_block2_out", "conv3_block3_out", "conv4_block5_out", "post_relu"],
            ),
            ("DenseNet121", ["pool2_conv", "pool3_conv", "pool4_conv", "relu"]),
            ("VGG16", ["block3_conv3", "block4_conv3", "block5_conv3", "block5_pool"]),
            # Without padding its maps are smaller than a quarter, an eighth, .. of the image.
            ("InceptionV3", [None, "mixed2", "mixed7", "mixed10"]),
        ],
    )
    def test_takes_the_last_feature_map_of_the_trunk_at_each_stride(self, model, names):
        given = getattr(keras.applications, model)(
            include_top=False, weights=None, input_shape=(None, None, 3)
        )
        output = resolve_backbone(given).output
        for level, name in zip(LEVELS, names, strict=True):
            if name is not None:
                assert output[level] is given.get_layer(name).output

    def test_classifier_of_a_fixed_size_needs_that_image_shape(self):
        given = keras.applications.MobileNetV2(weights=None, alpha=0.35, input_shape=(96, 96, 3))
        assert resolve_backbone(given, image_shape=(96, 96, 3)).output["C5"].shape[1:3] == (3, 3)
        with pytest.raises(ValueError, match=r"\(None, None, 3\); received .* \(96, 96, 3\)"):
            resolve_backbone(given)


class TestModels:
    def test_model_that_yields_c2_to_c5_is_used_as_it_is(self):
        given = ResNet(18)
        assert resolve_backbone(given) is given

    def test_other_keys_are_left_out(self, images):
        inputs, (c2, c3, c4, c5) = pyramid_of_convolutions()
        given = keras.Model(inputs, {"C1": inputs, "C2": c2, "C3": c3, "C4": c4, "C5": c5})
        found, expected = resolve_backbone(given)(images), given(images)
        assert list(found) == LEVELS
        for level in LEVELS:
            np.testing.assert_array_equal(*map(convert_to_numpy, (found[level], expected[level])))

    @pytest.mark.parametrize("structure", ["list in reverse", "tuple", "dict of other names"])
    def test_several_outputs_are_named_by_their_strides(self, structure):
        inputs, feature_maps = pyramid_of_convolutions((2, 2, 2, 2, 2))
        outputs = {
            "list in reverse": feature_maps[::-1],
            "tuple": tuple(feature_maps),
            "dict of other names": {f"P{n}": x for n, x in enumerate(feature_maps, start=1)},
        }
        output = resolve_backbone(keras.Model(inputs, outputs[structure])).output
        assert {level: x.shape[-1] for level, x in output.items()} == {
            f"C{n}": n for n in range(2, 6)
        }

    def test_map_padded_for_the_next_stride_is_not_taken(self):
        x = inputs = keras.Input((None, None, 3))
        for _ in range(5):
            x = keras.layers.ZeroPadding2D(1)(x)
            x = kept = keras.layers.Conv2D(2, 3, strides=2)(x)
        output = resolve_backbone(
            keras.Model(inputs, keras.ops.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))))
        ).output
        assert output["C5"] is kept

    def test_sequential_model(self):
        given = keras.Sequential(
            [keras.Input((None, None, 3))]
            + [keras.layers.Conv2D(k, 3, 2, padding="same") for k in range(1, 6)]
            + [keras.layers.GlobalAveragePooling2D()]
        )
        output = resolve_backbone(given).output
        assert [output[level].shape[-1] for level in LEVELS] == [2, 3, 4, 5]

    def test_subclassed_model(self, images):
        given = Subclassed()
        found, expected = resolve_backbone(given)(images), given(images)
        assert list(found) == LEVELS
        for level in LEVELS:
            np.testing.assert_array_equal(*map(convert_to_numpy, (found[level], expected[level])))

    def test_layers_are_shared_with_the_given_model(self):
        given = mobilenet()
        given.get_layer("Conv1").trainable = False
        backbone = resolve_backbone(given)
        assert backbone.get_layer("Conv1") is given.get_layer("Conv1")
        assert len(backbone.trainable_weights) == len(given.trainable_weights)


@pytest.mark.parametrize(
    "given", [keras_hub_resnet, keras_cv_resnet, mobilenet, Subclassed], ids=lambda f: f.__name__
)
def test_saved_inside_another_model_gives_the_same_feature_maps(given, images, tmp_path):
    backbone = resolve_backbone(given())
    inputs = keras.Input((None, None, 3))
    model = keras.Model(inputs, backbone(inputs))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")

    expected, found = model(images), loaded(images)
    assert list(found) == LEVELS
    for level in LEVELS:
        np.testing.assert_array_equal(*map(convert_to_numpy, (expected[level], found[level])))
    assert resolve_backbone(loaded.layers[-1]) is loaded.layers[-1]


class TestThreeLevels:
    """A detector on a backbone without the finest or the coarsest level."""

    @pytest.fixture(scope="class", params=[("C3", "C4", "C5"), ("C2", "C3", "C4")])
    def model(self, request):
        inputs, maps = pyramid_of_convolutions()
        outputs = {
            level: x for level, x in zip(LEVELS, maps, strict=True) if level in request.param
        }
        return small_detector(
            backbone=keras.Model(inputs, outputs),
            normalization=None,
            score_threshold=0.0,
            anchor_sizes=(16, 32, 64, 128),
        )

    def test_detects(self, model, images):
        assert len(model.pyramid.roi_levels) == 3
        assert len(model.pyramid.rpn_levels) == 4
        found = {name: convert_to_numpy(x) for name, x in model(images).items()}
        assert found["num_detections"][0] > 0
        assert np.isfinite(found["boxes"]).all()

    def test_a_region_is_pooled_from_its_level_or_the_nearest(self, model):
        levels = [int(level[1:]) for level in model.pyramid.roi_levels]
        # Every pixel of level k holds k.
        features = {
            f"P{level}": np.full((1, 2048 >> level, 2048 >> level, 1), level, "float32")
            for level in levels
        }
        regions = np.array([[[0, 0, side, side] for side in (50, 150, 300, 1000)]], "float32")
        pooled = convert_to_numpy(model.roi_pooling(features, regions))
        # Eqn. 1 of the paper: 2, 3, 4 and 6.
        expected = np.clip([2, 3, 4, 6], levels[0], levels[-1])
        np.testing.assert_allclose(pooled.mean(axis=(2, 3, 4)), [expected], rtol=1e-6)


class TestErrors:
    @pytest.mark.parametrize("given", [None, 50, ResNet, keras.layers.ReLU()])
    def test_neither_name_nor_model(self, given):
        with pytest.raises(TypeError, match=r"must be a name such as 'resnet50' or a keras\.Model"):
            resolve_backbone(given)

    def test_arguments_for_names_given_with_a_model(self):
        given = keras.Model(*pyramid_of_convolutions(), name="mine")
        with pytest.raises(ValueError, match="received the model 'mine' and 'frozen_stages'"):
            resolve_backbone(given, {"frozen_stages": 2})
        assert resolve_backbone(given, {})

    @pytest.mark.parametrize("strides", [(4, 4, 2), (32,)])
    def test_strides_that_are_no_run(self, strides):
        inputs, maps = pyramid_of_convolutions(strides)
        given = keras.Model(inputs, maps, name="gaps")
        with pytest.raises(ValueError, match=r"'gaps' .*; received strides \["):
            resolve_backbone(given)

    def test_model_that_hides_another(self):
        inner = keras.Model(*pyramid_of_convolutions(), name="inner")
        images = keras.Input((None, None, 3))
        outputs = keras.layers.GlobalAveragePooling2D()(inner(images)[-1])
        with pytest.raises(ValueError, match=r"received strides \[1, 32\] \(it .*'inner'"):
            resolve_backbone(keras.Model(images, outputs))

    def test_no_feature_maps(self):
        images = keras.Input((32, 32, 3))
        given = keras.Model(images, [keras.layers.Flatten()(images)] * 2)
        with pytest.raises(ValueError, match="received strides none"):
            resolve_backbone(given, image_shape=(32, 32, 3))

    @pytest.mark.parametrize("shape", [(3, None, None), (None, None, 1), (None, 3)])
    def test_images_that_are_not_channels_last_rgb(self, shape):
        images = keras.Input(shape)
        given = keras.Model(images, keras.layers.ReLU()(images))
        with pytest.raises(ValueError, match=r"channels-last batch .*; received inputs \(None, "):
            resolve_backbone(given)

    def test_several_inputs(self):
        inputs = [keras.Input((None, None, 3)), keras.Input((None, None, 3))]
        with pytest.raises(
            ValueError, match=r"one channels-last batch .*; received inputs .* and "
        ):
            resolve_backbone(keras.Model(inputs, keras.layers.add(inputs)))
