import json

import keras
import numpy as np
import pytest
from keras.ops import convert_to_numpy

from keras_fpn.normalization import FrozenBatchNormalization
from keras_fpn.resnet import GroupedConv2D, ResNet


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def trained_layers(model):
    return {layer.name for layer in model.layers if layer.trainable_weights}


def without_values(constructor, *args, **kwargs):
    """A model whose weights have shapes but no values, which take most of the time."""
    with keras.StatelessScope(initialize_variables=False):
        return constructor(*args, **kwargs)


def randomize_norms(model, rng):
    for layer in model.layers:
        if isinstance(layer, FrozenBatchNormalization):
            size = layer.gamma.shape[0]
            gamma, variance = rng.uniform(0.5, 1.5, (2, size))
            beta, mean = rng.normal(size=(2, size))
            layer.set_weights([gamma, beta, mean, variance])


def numpy_convolution(x, kernel, strides):
    """Of one image, one output pixel after the other, with kernel_size // 2 zeros on all sides."""
    size = kernel.shape[0]
    x = np.pad(x, ((size // 2, size // 2), (size // 2, size // 2), (0, 0)))
    height, width = ((n - size) // strides + 1 for n in x.shape[:2])
    y = np.empty((height, width, kernel.shape[-1]))
    for row in range(height):
        for column in range(width):
            top, left = row * strides, column * strides
            y[row, column] = np.tensordot(x[top : top + size, left : left + size], kernel, axes=3)
    return y


def numpy_conv_norm(model, x, conv_name, strides):
    kernel = convert_to_numpy(model.get_layer(conv_name).kernel)
    norm = model.get_layer(conv_name.replace("conv", "norm"))
    gamma, beta, mean, variance = norm.get_weights()
    y = numpy_convolution(x, kernel, strides)
    return gamma * (y - mean) / np.sqrt(variance + norm.epsilon) + beta


def numpy_grouped_convolution(x, kernel, strides, groups):
    """Each group of output channels from its own group of input channels."""
    outputs = [
        numpy_convolution(channels, part, strides)
        for channels, part in zip(
            np.split(x, groups, axis=-1), np.split(kernel, groups, axis=-1), strict=True
        )
    ]
    return np.concatenate(outputs, axis=-1)


class TestGroupedConv2D:
    @pytest.fixture
    def layer(self):
        layer = GroupedConv2D(6, 3, groups=3, padding="same", data_format="channels_last")
        layer.build((None, None, None, 12))
        return layer

    def test_convolves_each_group_by_itself(self, rng, layer):
        x = rng.normal(size=(2, 5, 7, 12)).astype("float32")
        kernel, bias = rng.normal(size=(3, 3, 4, 6)), rng.normal(size=6)
        layer.set_weights([kernel, bias])
        for image, found in zip(x, convert_to_numpy(layer(x)), strict=True):
            expected = numpy_grouped_convolution(image, kernel, 1, 3) + bias
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.skipif(
        keras.backend.backend() != "tensorflow", reason="it is written so for TensorFlow"
    )
    def test_has_gradients_and_leaves_xla_to_the_caller(self, rng, layer):
        import tensorflow as tf

        x, upstream = rng.normal(size=(5, 7, 12)), rng.normal(size=(5, 7, 6))

        @tf.function(input_signature=[tf.TensorSpec((None, None, None, 12))])
        def gradients(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = tf.reduce_sum(layer(x) * upstream.astype("float32"))
            return tape.gradient(y, (x, layer.kernel.value))

        # Linear in each: along any direction the gradient is the function of that direction.
        by_x, by_kernel = map(convert_to_numpy, gradients(x[None].astype("float32")))
        kernel = convert_to_numpy(layer.kernel)
        for direction in rng.normal(size=(3, 5, 7, 12)):
            expected = (numpy_grouped_convolution(direction, kernel, 1, 3) * upstream).sum()
            assert (by_x[0] * direction).sum() == pytest.approx(expected, rel=1e-4, abs=1e-4)
        for direction in rng.normal(size=(3, 3, 3, 4, 6)):
            expected = (numpy_grouped_convolution(x, direction, 1, 3) * upstream).sum()
            assert (by_kernel * direction).sum() == pytest.approx(expected, rel=1e-4, abs=1e-4)

        graph = gradients.get_concrete_function().graph.as_graph_def()
        assert not any(f.attr["_XlaMustCompile"].b for f in graph.library.function)


class TestArithmetic:
    def test_stem_is_convolution_norm_relu_and_max_pool_padded_alike_on_all_sides(self, rng):
        model = ResNet(18, normalization="frozen_batch_norm")
        randomize_norms(model, rng)
        image = rng.normal(size=(11, 14, 3)).astype("float32")
        x = np.maximum(numpy_conv_norm(model, image, "stem_conv", 2), 0)
        x = np.pad(x, ((1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
        expected = [
            [x[i : i + 3, j : j + 3].max(axis=(0, 1)) for j in range(0, x.shape[1] - 2, 2)]
            for i in range(0, x.shape[0] - 2, 2)
        ]
        stem = keras.Model(model.inputs[0], model.get_layer("stem_pool").output)
        np.testing.assert_allclose(
            convert_to_numpy(stem(image[None]))[0], expected, rtol=1e-4, atol=1e-4
        )

    @pytest.mark.parametrize(
        ("depth", "stride_in_1x1", "strides"),
        [(18, False, (2, 1)), (50, False, (1, 2, 1)), (50, True, (2, 1, 1))],
    )
    def test_block_adds_its_convolutions_to_the_projected_shortcut(
        self, rng, depth, stride_in_1x1, strides
    ):
        model = ResNet(depth, stride_in_1x1=stride_in_1x1, normalization="frozen_batch_norm")
        randomize_norms(model, rng)
        c2 = model.output["C2"]
        block = keras.Model(c2, model.get_layer("stage3_block0_relu").output)
        x = rng.normal(size=(5, 6, c2.shape[-1])).astype("float32")

        y = x
        for i, stride in enumerate(strides, start=1):
            y = numpy_conv_norm(model, y, f"stage3_block0_conv{i}", stride)
            if i < len(strides):
                y = np.maximum(y, 0)
        y = np.maximum(y + numpy_conv_norm(model, x, "stage3_block0_shortcut_conv", 2), 0)
        np.testing.assert_allclose(convert_to_numpy(block(x[None]))[0], y, rtol=1e-4, atol=1e-4)

    def test_bottleneck_with_groups(self, rng):
        model = ResNet(50, groups=32, width_per_group=4, normalization="frozen_batch_norm")
        randomize_norms(model, rng)
        c2 = model.output["C2"]
        block = keras.Model(c2, model.get_layer("stage3_block0_relu").output)
        x = rng.normal(size=(5, 6, c2.shape[-1])).astype("float32")

        y = np.maximum(numpy_conv_norm(model, x, "stage3_block0_conv1", 1), 0)
        kernel = convert_to_numpy(model.get_layer("stage3_block0_conv2").kernel)
        assert kernel.shape == (3, 3, 8, 256)
        y = numpy_grouped_convolution(y, kernel, 2, 32)
        gamma, beta, mean, variance = model.get_layer("stage3_block0_norm2").get_weights()
        y = np.maximum(gamma * (y - mean) / np.sqrt(variance + 1e-5) + beta, 0)
        y = numpy_conv_norm(model, y, "stage3_block0_conv3", 1)
        y = np.maximum(y + numpy_conv_norm(model, x, "stage3_block0_shortcut_conv", 2), 0)
        np.testing.assert_allclose(convert_to_numpy(block(x[None]))[0], y, rtol=1e-4, atol=1e-4)

    def test_kernels_are_drawn_from_an_untruncated_normal_of_gain_two_by_fan_out(self):
        model = ResNet(18)
        kernel = convert_to_numpy(model.get_layer("stage4_block1_conv1").kernel)
        other = convert_to_numpy(model.get_layer("stage4_block1_conv2").kernel)
        standard_deviation = np.sqrt(2 / (3 * 3 * 256))
        np.testing.assert_allclose(kernel.std(), standard_deviation, rtol=0.01)
        assert np.abs(kernel).max() > 4 * standard_deviation
        assert not np.array_equal(kernel, other)


class TestFeatureMaps:
    @pytest.mark.parametrize("size", [(75, 101), (32, 33)])
    def test_level_n_is_2_to_the_n_times_smaller_rounded_up(self, rng, size):
        images = rng.normal(size=(2, *size, 3)).astype("float32")
        feature_maps = ResNet(18)(images)
        assert {level: tuple(x.shape) for level, x in feature_maps.items()} == {
            f"C{n}": (2, -(-size[0] // 2**n), -(-size[1] // 2**n), 16 * 2**n) for n in range(2, 6)
        }

    def test_static_image_shape_gives_static_feature_maps(self):
        model = without_values(ResNet, 50, image_shape=(75, 101, 3))
        assert {level: x.shape for level, x in model.output.items()} == {
            "C2": (None, 19, 26, 256),
            "C3": (None, 10, 13, 512),
            "C4": (None, 5, 7, 1024),
            "C5": (None, 3, 4, 2048),
        }

    # torchvision 0.27.1's resnets without their `fc`.
    @pytest.mark.parametrize(
        ("depth", "parameters"),
        [(18, 11176512), (34, 21284672), (50, 23508032), (101, 42500160), (152, 58143808)],
    )
    def test_has_as_many_trained_parameters_as_the_reference(self, depth, parameters):
        model = without_values(ResNet, depth)
        assert sum(np.prod(weight.shape) for weight in model.trainable_weights) == parameters
        assert not any(layer.use_bias for layer in model.layers if hasattr(layer, "use_bias"))

    def test_ends_with_the_last_stage(self, rng):
        whole = ResNet(18, image_shape=(75, 101, 3))
        cut = ResNet(18, image_shape=(75, 101, 3), last_stage=4)
        assert cut.name == whole.name
        names = [layer.name for layer in whole.layers if layer.weights]
        assert [layer.name for layer in cut.layers if layer.weights] == [
            name for name in names if not name.startswith("stage5")
        ]
        cut.set_weights(whole.get_weights()[: len(cut.weights)])
        images = rng.normal(size=(1, 75, 101, 3)).astype("float32")
        maps, expected = cut(images), whole(images)
        assert list(maps) == ["C2", "C3", "C4"]
        for level, x in maps.items():
            np.testing.assert_array_equal(*map(convert_to_numpy, (x, expected[level])))
        stage = cut.stage("C4")(expected["C3"])
        np.testing.assert_array_equal(*map(convert_to_numpy, (stage, expected["C4"])))
        with pytest.raises(ValueError, match=r"`level` .*'C2', 'C3', 'C4'; received 'C5'"):
            cut.stage("C5")

    def test_groups_have_as_many_parameters_as_the_reference(self):
        model = without_values(ResNet, 50, groups=32, width_per_group=4)
        # torchvision 0.27.1's resnext50_32x4d without its `fc`.
        assert sum(np.prod(weight.shape) for weight in model.trainable_weights) == 22979904
        assert model.name == "resnext50_32x4d"

    def test_image_data_format_of_the_keras_configuration_does_not_matter(self, rng):
        images = rng.normal(size=(1, 33, 40, 3)).astype("float32")
        data_format = keras.config.image_data_format()
        keras.config.set_image_data_format("channels_first")
        try:
            model = ResNet(18)
        finally:
            keras.config.set_image_data_format(data_format)
        assert model(images)["C5"].shape == (1, 2, 2, 512)


class TestNormalization:
    def test_group_norm_normalizes_32_groups_of_each_image(self, rng):
        model = ResNet(18, normalization="group_norm")
        x = rng.normal(3, 2, size=(2, 5, 3, 64)).astype("float32")
        groups = x.reshape(2, 15, 32, 2)
        mean, variance = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
        expected = ((groups - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape)
        y = model.get_layer("stem_norm")(x)
        np.testing.assert_allclose(convert_to_numpy(y), expected, rtol=1e-4, atol=1e-4)

    def test_group_norm_takes_images_of_any_size(self, rng):
        model = ResNet(18, normalization="group_norm")
        c5 = model.predict(rng.normal(size=(1, 45, 70, 3)), verbose=0)["C5"]
        assert c5.shape == (1, 2, 3, 512)
        assert np.isfinite(c5).all()

    @pytest.mark.skipif(
        keras.backend.backend() != "tensorflow", reason="Keras synchronizes on TensorFlow only"
    )
    def test_sync_batch_norm_is_keras_batch_norm_synchronized(self):
        model = ResNet(18, normalization="sync_batch_norm")
        norms = [x for x in model.layers if isinstance(x, keras.layers.BatchNormalization)]
        assert len(norms) == 20
        assert all(norm.synchronized and norm.momentum == 0.9 for norm in norms)

    def test_without_normalization_there_are_biases(self, rng):
        model = ResNet(18, normalization=None)
        convolutions = {x.name for x in ResNet(18).layers if "conv" in x.name}
        assert {x.name for x in model.layers if "conv" in x.name} == convolutions
        assert not any("norm" in x.name for x in model.layers)
        stem = model.get_layer("stem_conv")
        kernel, bias = rng.normal(size=(7, 7, 3, 64)), rng.normal(size=64)
        stem.set_weights([kernel, bias])
        image = rng.normal(size=(11, 14, 3)).astype("float32")
        expected = np.maximum(numpy_convolution(image, kernel, 2) + bias, 0)
        found = keras.Model(model.inputs[0], model.get_layer("stem_relu").output)(image[None])
        np.testing.assert_allclose(convert_to_numpy(found)[0], expected, rtol=1e-4, atol=1e-3)
        assert ResNet.from_config(model.get_config()).normalization is None

    def test_epsilon_reaches_every_norm(self):
        for normalization in ("frozen_batch_norm", "batch_norm", "group_norm"):
            model = ResNet(18, normalization=normalization, norm_epsilon=0.0)
            assert {x.epsilon for x in model.layers if x.name.endswith("norm")} == {0.0}


class TestFrozenStages:
    @pytest.mark.parametrize(
        ("normalization", "frozen_stages"),
        [("batch_norm", n) for n in (0, 1, 2, 5)] + [("frozen_batch_norm", 2), ("group_norm", 2)],
    )
    def test_counts_stem_and_stages_from_the_image(self, normalization, frozen_stages):
        model = ResNet(18, normalization=normalization, frozen_stages=frozen_stages)
        trained = {name.split("_")[0] for name in trained_layers(model)}
        stages = ["stem", "stage2", "stage3", "stage4", "stage5"]
        assert trained == set(stages[frozen_stages:])

    def test_batch_norm_of_a_frozen_stage_uses_and_keeps_its_moving_statistics(self, rng):
        model = ResNet(18, frozen_stages=2)
        images = rng.normal(2, 3, size=(2, 33, 33, 3)).astype("float32")
        means = {x.name: x.moving_mean for x in model.layers if "norm" in x.name}
        inference, training = model(images, training=False), model(images, training=True)
        np.testing.assert_array_equal(*map(convert_to_numpy, (inference["C2"], training["C2"])))
        assert np.abs(convert_to_numpy(inference["C3"] - training["C3"])).max() > 1e-3
        updated = {name.split("_")[0] for name, x in means.items() if convert_to_numpy(x).any()}
        assert updated == {"stage3", "stage4", "stage5"}


@pytest.mark.parametrize(("depth", "channels"), [(10, [8, 16]), (50, [32, 64])])
def test_width_scales_the_channels_of_all_stages(depth, channels):
    model = ResNet(depth, width=8, last_stage=3)
    assert [x.shape[-1] for x in model.output.values()] == channels
    assert model.get_layer("stem_conv").filters == 8
    assert model.get_layer("stage2_block0_conv1").filters == 8


class TestSerialization:
    def test_config_rebuilds_the_same_network(self):
        model = ResNet(
            50,
            stride_in_1x1=True,
            groups=4,
            width_per_group=16,
            width=32,
            normalization="group_norm",
            norm_epsilon=1e-3,
            frozen_stages=3,
            image_shape=(64, None, 3),
            last_stage=4,
            name="body",
            dtype="mixed_bfloat16",
        )
        config = json.loads(json.dumps(keras.saving.serialize_keras_object(model)))
        copy = keras.saving.deserialize_keras_object(config)
        assert copy.get_config() == model.get_config()
        assert copy.get_layer("stage2_block0_conv2").groups == 4
        assert copy.name == "body"
        assert copy.get_layer("stem_conv").filters == 32
        assert list(copy.output) == ["C2", "C3", "C4"]
        assert trained_layers(copy) == trained_layers(model)
        assert copy.get_layer("stage2_block0_conv1").compute_dtype == "bfloat16"

    def test_untrained_network_stays_so(self):
        model = ResNet(18)
        model.trainable = False
        copy = ResNet.from_config(model.get_config())
        assert trained_layers(copy) == set()

    def test_saved_inside_another_model_gives_the_same_feature_maps(self, rng, tmp_path):
        backbone = ResNet(18, normalization="frozen_batch_norm", frozen_stages=2)
        randomize_norms(backbone, rng)
        images = keras.Input((None, None, 3))
        model = keras.Model(images, backbone(images))
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")

        x = rng.normal(size=(1, 35, 50, 3)).astype("float32")
        expected, found = model(x), loaded(x)
        for level in ("C2", "C3", "C4", "C5"):
            np.testing.assert_array_equal(*map(convert_to_numpy, (expected[level], found[level])))
        assert len(loaded.trainable_weights) == len(model.trainable_weights)


class TestStages:
    @pytest.fixture(scope="class")
    def model(self):
        model = ResNet(18, normalization="frozen_batch_norm", image_shape=(75, 101, 3))
        randomize_norms(model, np.random.default_rng(0))
        return model

    def test_chained_they_are_the_whole_network(self, model, rng):
        x = images = rng.normal(size=(2, 75, 101, 3)).astype("float32")
        for level, expected in model(images).items():
            x = model.stage(level)(x)
            np.testing.assert_array_equal(convert_to_numpy(x), convert_to_numpy(expected))

    def test_c5_serves_as_a_head_of_regions_whatever_the_image_shape(self, model, rng):
        regions = rng.normal(size=(3, 14, 14, 256)).astype("float32")
        head = model.stage("C5")
        free = ResNet(18, normalization="frozen_batch_norm")
        free.set_weights(model.get_weights())
        block = keras.Model(free.output["C4"], free.output["C5"])
        found = convert_to_numpy(head(regions))
        assert found.shape == (3, 7, 7, 512)
        np.testing.assert_array_equal(found, convert_to_numpy(block(regions)))
        names = {layer.name for layer in head.layers if layer.weights}
        assert names == {x.name for x in model.layers if x.weights and x.name.startswith("stage5")}
        assert all(head.get_layer(name) is model.get_layer(name) for name in names)

    def test_an_unknown_level_is_refused(self, model):
        with pytest.raises(ValueError, match=r"`level` .*'C2', 'C3', 'C4', 'C5'; received 'C6'"):
            model.stage("C6")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 51}, r"`depth` .*\[10, 18, 34, 50, 101, 152\]; received 51"),
        ({"normalization": "batchnorm"}, "`normalization` .*'batchnorm'; did you mean 'batch_norm"),
        ({"norm_epsilon": -1e-5}, "`norm_epsilon` .*; received -1e-05"),
        ({"frozen_stages": 6}, "`frozen_stages` .* 5 .*; received 6"),
        ({"frozen_stages": 5, "last_stage": 4}, "`frozen_stages` .* 4 .* C4.*; received 5"),
        ({"last_stage": 6}, "`last_stage` .* 5; received 6"),
        ({"last_stage": 1}, "`last_stage` .*; received 1"),
        ({"frozen_stages": -1}, "`frozen_stages` .*; received -1"),
        ({"frozen_stages": 2.0}, r"`frozen_stages` .*; received 2\.0"),
        ({"image_shape": (64, 64, 1)}, r"`image_shape` .*; received \(64, 64, 1\)"),
        ({"image_shape": (64, 3)}, r"`image_shape` .*; received \(64, 3\)"),
        ({"depth": 34, "groups": 32}, "`groups` .* depth 34, .*; received 32"),
        ({"depth": 50, "groups": 0}, "`groups` .*; received 0"),
        ({"width": 0}, "`width` .*; received 0"),
        ({"depth": 50, "width_per_group": 4.0}, r"`width_per_group` .*; received 4\.0"),
        ({"depth": 34, "stride_in_1x1": True}, "`stride_in_1x1` .* depth 34, .*; received True"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ResNet(**{"depth": 18, **arguments})
