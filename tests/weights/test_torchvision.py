"""Weights from torchvision, loaded whole or not at all."""

import warnings

import keras
import numpy as np
import pytest
from keras.ops import convert_to_numpy
from small_detector import small_detector
from torchvision_names import torchvision_array, torchvision_shapes, torchvision_variables

import keras_fpn
from keras_fpn.box_head import BoxHead
from keras_fpn.conv5_head import Conv5Head
from keras_fpn.resnet import ResNet
from keras_fpn.weights.torchvision import load_backbone_weights, load_torchvision_weights


@pytest.fixture(scope="module")
def model():
    """Its weights change from test to test; each test that looks at them loads its own."""
    return small_detector()


def random_weights(model, seed):
    random = np.random.RandomState(seed)
    return {
        name: random.uniform(0.5, 1.5, shape).astype("float32")
        for name, shape in torchvision_shapes(model).items()
    }


def assert_holds(model, weights):
    for name, variable in torchvision_variables(model).items():
        expected = weights[name]
        if name.startswith("roi_heads.box_predictor.bbox_pred"):
            expected = np.concatenate([np.zeros_like(expected[:4]), expected[4:]])
        np.testing.assert_array_equal(torchvision_array(name, variable), expected, err_msg=name)


def test_every_weight_goes_to_its_place(model):
    weights = random_weights(model, 1)
    load_torchvision_weights(model, weights)
    assert_holds(model, weights)
    # Nothing of the model is left as it was.
    assert len(torchvision_variables(model)) == len(
        [variable for variable in model.weights if "seed" not in variable.path]
    )


def test_with_two_sizes_per_level_the_rows_of_an_anchor_stay_its_own():
    sizes, ratios = np.array([16, 48]), np.array([0.5, 1.0, 2.0])
    model = small_detector(anchor_sizes=(tuple(sizes),) * 5)
    weights = random_weights(model, 8)
    load_torchvision_weights(model, weights)
    # Torchvision's `generate_anchors`, in which the size changes fastest.
    heights = (np.sqrt(ratios)[:, None] * sizes).reshape(-1)
    widths = (1 / np.sqrt(ratios)[:, None] * sizes).reshape(-1)
    theirs = np.round(np.stack([-widths, -heights, widths, heights], axis=1) / 2).tolist()
    pixel = {f"P{level}": np.zeros((1, 1, 1, 1)) for level in range(2, 7)}
    ours = convert_to_numpy(model.anchors(np.zeros((1, 8, 8, 3)), pixel)["P2"]).tolist()
    assert sorted(ours) == sorted(theirs) != ours
    order = [theirs.index(anchor) for anchor in ours]
    head = model.rpn_head
    for name, layer in (("cls_logits", head.objectness), ("bbox_pred", head.deltas)):
        kernel, bias = (weights[f"rpn.head.{name}.{part}"] for part in ("weight", "bias"))
        channels = kernel.shape[1]
        found = convert_to_numpy(layer.kernel).reshape(channels, 6, -1)
        expected = kernel.reshape(6, -1, channels)[order].transpose(2, 0, 1)
        np.testing.assert_array_equal(found, expected)
        found = convert_to_numpy(layer.bias).reshape(6, -1)
        np.testing.assert_array_equal(found, bias.reshape(6, -1)[order])


def test_names_of_old_checkpoints_and_counts_of_batches_are_accepted(model):
    weights = random_weights(model, 2)
    old = {}
    for name, value in weights.items():
        if "fpn" in name:
            name = name.replace(".0.weight", ".weight").replace(".0.bias", ".bias")
        old[name.replace("rpn.head.conv.0.0", "rpn.head.conv")] = value
    assert set(old) - set(weights)
    old["backbone.body.bn1.num_batches_tracked"] = np.array(7)
    load_torchvision_weights(model, old)
    assert_holds(model, weights)


def test_a_file_of_arrays(model, tmp_path):
    weights = random_weights(model, 3)
    np.savez(tmp_path / "detector.npz", **weights)
    load_torchvision_weights(model, tmp_path / "detector.npz")
    assert_holds(model, weights)
    load_torchvision_weights(model, random_weights(model, 4))
    load_torchvision_weights(model, str(tmp_path / "detector.npz"))
    assert_holds(model, weights)


def test_tensors_are_accepted(model):
    class Tensor:
        def __init__(self, array):
            self.array = array

        def detach(self):
            return self

        cpu = detach

        def numpy(self):
            return self.array

    weights = random_weights(model, 5)
    load_torchvision_weights(model, {name: Tensor(array) for name, array in weights.items()})
    assert_holds(model, weights)


@pytest.mark.parametrize("build", [keras_fpn.build_fpn_rpn, keras_fpn.build_fpn_fast_rcnn])
def test_half_a_detector_of_the_file_of_a_whole_one(model, tmp_path, build):
    weights = random_weights(model, 9)
    np.savez(tmp_path / "detector.npz", **weights)
    load_torchvision_weights(model, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        half = build(weights=tmp_path / "detector.npz")
    assert half.num_classes == (None if build is keras_fpn.build_fpn_rpn else 3)
    for stage in {*half.stage_names} & {*model.stage_names}:
        theirs = getattr(model, stage).get_weights()
        for a, b in zip(getattr(half, stage).get_weights(), theirs, strict=True):
            if a.dtype.kind == "f":  # Not the seeds of samplers.
                np.testing.assert_array_equal(a, b, err_msg=stage)
    # The same by the function for a model that is there already.
    for variable in half.weights:
        if "seed" not in variable.path:
            variable.assign(np.zeros(variable.shape))
    load_torchvision_weights(half, weights)
    np.testing.assert_array_equal(half.pyramid.get_weights()[0], model.pyramid.get_weights()[0])


class TestWhatDoesNotFit:
    @pytest.fixture(autouse=True)
    def nothing_is_loaded(self, model):
        before = [convert_to_numpy(variable) for variable in model.weights]
        yield
        for variable, value in zip(model.weights, before, strict=True):
            np.testing.assert_array_equal(convert_to_numpy(variable), value, err_msg=variable.path)

    def test_names_that_are_missing(self, model):
        weights = random_weights(model, 6)
        del weights["rpn.head.conv.0.0.bias"], weights["backbone.body.conv1.weight"]
        message = (
            r"2 missing \(backbone.body.conv1.weight, rpn.head.conv.0.0.bias\), 0 unexpected; "
            "nothing was loaded"
        )
        with pytest.raises(ValueError, match=message):
            load_torchvision_weights(model, weights)

    def test_names_that_are_unexpected(self, model):
        weights = random_weights(model, 6) | {f"mask.{i}": np.zeros(1) for i in range(7)}
        message = r"0 missing, 7 unexpected \(mask.0, mask.1, mask.2, mask.3, mask.4, \.\.\.\)"
        with pytest.raises(ValueError, match=message):
            load_torchvision_weights(model, weights)

    def test_another_backbone(self, model):
        weights = random_weights(model, 6)
        weights["backbone.body.layer1.0.conv3.weight"] = np.zeros((256, 64, 1, 1), "float32")
        message = r"1 unexpected \(backbone.body.layer1.0.conv3.weight\)"
        with pytest.raises(ValueError, match=message):
            load_torchvision_weights(model, weights)

    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("backbone.body.layer2.0.conv1.weight", (128, 64, 5, 5)),
            ("backbone.body.bn1.running_var", (32,)),
            ("backbone.fpn.layer_blocks.3.0.bias", (8,)),
            ("roi_heads.box_head.fc6.weight", (32, 49 * 16 + 1)),
            ("roi_heads.box_head.fc6.weight", (32,)),
            ("roi_heads.box_head.fc7.weight", (32, 31)),
            ("roi_heads.box_predictor.bbox_pred.weight", (12, 32)),
            ("rpn.head.bbox_pred.weight", (12,)),
        ],
    )
    def test_shapes(self, model, name, shape):
        weights = random_weights(model, 6) | {name: np.zeros(shape, "float32")}
        received = str(shape).replace("(", r"\(").replace(")", r"\)")
        with pytest.raises(ValueError, match=rf"do not fit: {name} {received} for .*nothing was"):
            load_torchvision_weights(model, weights)

    def test_a_long_list_of_shapes_is_cut(self, model):
        weights = {name: np.zeros(9) for name in random_weights(model, 6)}
        weights["roi_heads.box_predictor.cls_score.bias"] = np.zeros(4)
        with pytest.raises(ValueError, match=r"and \d+ more; nothing was loaded"):
            load_torchvision_weights(model, weights)

    def test_a_background_less_or_a_class_more(self, model):
        weights = random_weights(model, 6)
        weights["roi_heads.box_predictor.cls_score.bias"] = np.zeros(91, "float32")
        message = r"model's 3 classes; received .* 90 classes and the background"
        with pytest.raises(ValueError, match=message):
            load_torchvision_weights(model, weights)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_values_that_are_not_finite(self, model, value):
        weights = random_weights(model, 6)
        weights["rpn.head.cls_logits.bias"][1] = value
        message = r"rpn.head.cls_logits.bias of dtype float32 is not finite floats"
        with pytest.raises(ValueError, match=message):
            load_torchvision_weights(model, weights)

    def test_values_that_are_no_numbers(self, model):
        weights = random_weights(model, 6)
        weights["rpn.head.cls_logits.bias"] = np.array(["a", "b", "c"])
        message = "must map names to arrays; rpn.head.cls_logits.bias is not an array"
        with pytest.raises(ValueError, match=message):
            load_torchvision_weights(model, weights)

    def test_integers(self, model):
        weights = random_weights(model, 6)
        weights["rpn.head.cls_logits.bias"] = np.zeros(3, "int32")
        message = r"rpn.head.cls_logits.bias of dtype int32 is not finite floats"
        with pytest.raises(ValueError, match=message):
            load_torchvision_weights(model, weights)

    def test_no_file(self, model, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"missing\.npz"):
            load_torchvision_weights(model, tmp_path / "missing.npz")
        with pytest.raises(ValueError, match=f"'{tmp_path}' is a folder"):
            load_torchvision_weights(model, tmp_path)


def test_another_kind_of_backbone_is_refused():
    images = keras.Input((None, None, 3))
    maps, x = {}, keras.layers.Conv2D(4, 3, strides=2, padding="same")(images)
    for level in range(2, 6):
        x = maps[f"C{level}"] = keras.layers.Conv2D(4, 3, strides=2, padding="same")(x)
    model = small_detector(
        backbone=keras.Model(images, maps, name="plain"),
        normalization=None,
        pyramid={"channels": 4},
    )
    message = r"must be a ResNet .*; received 'plain' of type Functional"
    with pytest.raises(ValueError, match=message):
        load_torchvision_weights(model, {"x": np.ones(1)})


class TestBackboneWeights:
    @pytest.fixture(scope="class")
    def backbone(self):
        return ResNet(18)

    @pytest.fixture
    def weights(self, model):
        prefix = "backbone.body."
        return {
            name.removeprefix(prefix): value
            for name, value in random_weights(model, 7).items()
            if name.startswith(prefix)
        }

    def test_a_classifier_without_its_last_layer(self, backbone, weights, model):
        classifier = weights | {"fc.weight": np.zeros((1000, 512)), "fc.bias": np.zeros(1000)}
        load_backbone_weights(backbone, classifier)
        kernel = backbone.get_layer("stage4_block0_shortcut_conv").kernel
        np.testing.assert_array_equal(
            torchvision_array("", kernel), weights["layer3.0.downsample.0.weight"]
        )
        variance = backbone.get_layer("stage5_block1_norm2").moving_variance
        np.testing.assert_array_equal(
            convert_to_numpy(variance), weights["layer4.1.bn2.running_var"]
        )

    def test_names_that_do_not_fit(self, backbone, weights):
        del weights["conv1.weight"]
        with pytest.raises(ValueError, match=r"1 missing \(conv1.weight\), 0 unexpected"):
            load_backbone_weights(backbone, weights)

    def test_the_last_stage_goes_to_the_head_of_a_network_that_ends_with_c4(self, weights):
        cut, head = ResNet(18, last_stage=4), Conv5Head(3, 18)
        head.build((None, 2, 14, 14, 256))
        predictors = [layer.get_weights() for layer in head.class_layers()]
        load_backbone_weights(cut, weights, head)
        loaded = {layer.name: layer for layer in [*cut.layers, *head.conv5.layers]}
        # torchvision's layer4 is stage 5.
        for ours, theirs in [
            ("stage4_block1_conv2", "layer3.1.conv2"),
            ("stage5_block0_shortcut_conv", "layer4.0.downsample.0"),
            ("stage5_block1_conv1", "layer4.1.conv1"),
        ]:
            np.testing.assert_array_equal(
                torchvision_array("", loaded[ours].kernel), weights[f"{theirs}.weight"]
            )
        variance = convert_to_numpy(loaded["stage5_block1_norm2"].moving_variance)
        np.testing.assert_array_equal(variance, weights["layer4.1.bn2.running_var"])
        assert sum(len(layer.weights) for layer in loaded.values()) == len(weights)
        for layer, (kernel, bias) in zip(head.class_layers(), predictors, strict=True):
            np.testing.assert_array_equal(convert_to_numpy(layer.kernel), kernel)
            np.testing.assert_array_equal(convert_to_numpy(layer.bias), bias)

    def test_the_last_stage_is_left_out_where_nothing_takes_it(self, weights):
        cut = ResNet(18, last_stage=4)
        load_backbone_weights(cut, weights, BoxHead(3))
        np.testing.assert_array_equal(
            torchvision_array("", cut.get_layer("stem_conv").kernel), weights["conv1.weight"]
        )

    def test_network_and_head_are_loaded_together_or_not_at_all(self, weights):
        cut, head = ResNet(18, last_stage=4), Conv5Head(3, 18)
        head.build((None, 2, 14, 14, 256))
        before = [*cut.get_weights(), *head.get_weights()]
        for name in ("conv1.weight", "layer4.1.conv1.weight"):
            misfit = weights | {name: np.zeros((1, 1, 1, 1), "float32")}
            with pytest.raises(ValueError, match=f"do not fit: {name}.* nothing was loaded"):
                load_backbone_weights(cut, misfit, head)
        for array, kept in zip([*cut.get_weights(), *head.get_weights()], before, strict=True):
            np.testing.assert_array_equal(array, kept)

    def test_the_builder_loads_them_and_freezes_what_the_papers_freeze(self, weights, tmp_path):
        path = tmp_path / "resnet18.npz"
        np.savez(path, **weights)
        model = small_detector(backbone_weights=path, normalization=None)
        np.testing.assert_array_equal(
            torchvision_array("", model.backbone.get_layer("stem_conv").kernel),
            weights["conv1.weight"],
        )
        trained = {layer.name for layer in model.backbone.layers if layer.trainable_weights}
        assert "stage3_block0_conv1" in trained
        assert not {name for name in trained if name.startswith(("stem", "stage2"))}
        assert not {name for name in trained if "norm" in name}
        # Unless told otherwise, also where that is the default without these weights.
        model = small_detector(backbone_weights=path, normalization="batch_norm", frozen_stages=0)
        assert (model.backbone.normalization, model.backbone.frozen_stages) == ("batch_norm", 0)

    def test_the_builder_says_where_there_is_no_file(self, tmp_path):
        with pytest.raises(
            FileNotFoundError, match=r"`backbone_weights` .*'imagenet' .*resnet18\.npz'"
        ):
            keras_fpn.build_fpn_faster_rcnn(
                backbone="resnet18", backbone_weights=tmp_path / "resnet18.npz"
            )
