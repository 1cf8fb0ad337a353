"""`build_fpn_faster_rcnn(weights=...)`: the detector that a file wants, with its weights."""

import hashlib
import re
import warnings

import keras
import numpy as np
import pytest
from keras.ops import convert_to_numpy
from small_detector import small_detector
from torchvision_names import torchvision_array, torchvision_shapes, torchvision_variables

import keras_fpn
from keras_fpn.data.coco_classes import COCO_CLASS_NAMES
from keras_fpn.weights import published

# What makes a detector small and cannot be read from a state dict.
SMALL = {
    "proposals": {"pre_nms": 20, "post_nms": 20},
    "roi_targets": {"num_samples": 8},
    "max_detections": 7,
}


def random_weights(shapes, seed=0):
    random = np.random.RandomState(seed)
    return {
        name: random.uniform(0.5, 1.5, shape).astype("float32") for name, shape in shapes.items()
    }


def assert_equal_weights(ours, theirs, but=()):
    assert len(ours.weights) == len(theirs.weights)
    for a, b in zip(ours.weights, theirs.weights, strict=True):
        if "seed_generator" not in a.path and not a.path.startswith(tuple(but)):
            np.testing.assert_array_equal(convert_to_numpy(a), convert_to_numpy(b), err_msg=a.path)


def built_from(path, **arguments):
    """The detector, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = keras_fpn.build_fpn_faster_rcnn(weights=path, **arguments)
    return model, [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


class TestTorchvision:
    @pytest.fixture(scope="class")
    def weights(self):
        """Of a detector in the make of torchvision's second version."""
        model = small_detector(
            num_classes=5,
            pyramid={"normalization": "frozen_batch_norm"},
            rpn_head={"hidden_layers": 2},
            box_head={"convolutions": 4, "normalization": "frozen_batch_norm", "hidden_layers": 1},
        )
        return random_weights(torchvision_shapes(model))

    @pytest.fixture(scope="class")
    def file(self, weights, tmp_path_factory):
        # What a file is does not follow from its name.
        path = tmp_path_factory.mktemp("torchvision") / "detector.weights"
        with path.open("wb") as file:
            np.savez(file, **weights)
        return path

    def test_the_detector_is_built_as_the_file_wants_it(self, file, weights):
        model, warned = built_from(file, **SMALL)
        assert not warned
        assert model.num_classes == 5
        assert (model.backbone.depth, model.backbone.normalization) == (18, "frozen_batch_norm")
        assert model.backbone.frozen_stages == 2
        assert model.pyramid.channels == 16
        assert model.pyramid.normalization == "frozen_batch_norm"
        head = model.box_head
        assert (head.convolutions, head.hidden_layers, head.hidden_dim) == (4, 1, 32)
        assert model.rpn_head.hidden_layers == 2
        assert model.detections.max_detections == 7
        for name, variable in torchvision_variables(model).items():
            expected = weights[name]
            if "bbox_pred" in name and name.startswith("roi"):
                expected = np.concatenate([np.zeros_like(expected[:4]), expected[4:]])
            np.testing.assert_array_equal(torchvision_array(name, variable), expected, err_msg=name)

    def test_other_classes_start_fresh_and_are_named(self, file, weights):
        model, warned = built_from(file, num_classes=3, class_names=["a", "b", "c"], **SMALL)
        assert warned == [
            f"'{file}' was trained for 5 classes, the model has 3: box_head/class_logits and "
            "box_head/deltas are not loaded, everything else is."
        ]
        assert model.class_names == ("a", "b", "c")
        for name, variable in torchvision_variables(model).items():
            if "box_predictor" not in name:
                found = torchvision_array(name, variable)
                np.testing.assert_array_equal(found, weights[name], err_msg=name)
        # A fresh layer has small weights around 0, those of the file are over 0.5.
        assert np.abs(convert_to_numpy(model.box_head.class_logits.kernel)).max() < 0.2

    def test_the_number_of_class_names_is_the_number_of_classes(self, file):
        model, warned = built_from(file, class_names=["a", "b"], **SMALL)
        assert model.num_classes == 2
        assert len(warned) == 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"backbone": "resnet34"}, "backbone='resnet34' in place of 'resnet18': .* missing"),
            (
                {"box_head": {"hidden_dim": 9}, "pyramid": {"channels": 8}},
                "pyramid channels=8 in place of 16, box_head hidden_dim=9 in place of 32: .* for",
            ),
            ({"backbone_weights": "imagenet"}, "`backbone_weights` .*'imagenet'"),
        ],
    )
    def test_arguments_that_contradict_the_weights(self, file, arguments, message):
        with pytest.raises(ValueError, match=message):
            keras_fpn.build_fpn_faster_rcnn(weights=file, **arguments)

    def test_a_classifier_is_no_detector(self, tmp_path):
        np.savez(tmp_path / "x.npz", **{"conv1.weight": np.ones(1), "fc.weight": np.ones(1)})
        message = r"received 2 arrays .* for `backbone_weights`"
        with pytest.raises(ValueError, match=message):
            keras_fpn.build_fpn_faster_rcnn(weights=tmp_path / "x.npz")

    def test_a_folder(self, tmp_path):
        with pytest.raises(
            IsADirectoryError, match=r"`weights` .*received the folder .*best\.keras"
        ):
            keras_fpn.build_fpn_faster_rcnn(weights=tmp_path)

    def test_no_such_file(self, tmp_path):
        message = rf"`weights` .*'coco' or 'coco_v2' .*received '{tmp_path}/x'"
        with pytest.raises(FileNotFoundError, match=message):
            keras_fpn.build_fpn_faster_rcnn(weights=tmp_path / "x")


class TestCoco:
    """The published names, with a file of random weights in the make of the published one."""

    @pytest.fixture(scope="class")
    def weights(self):
        return random_weights(torchvision_shapes(small_detector(num_classes=90)))

    @pytest.fixture
    def coco(self, weights, tmp_path, monkeypatch):
        old_names = {
            re.sub(r"(fpn\.\w+_blocks\.\d)\.0", r"\1", name).replace("conv.0.0", "conv"): value
            for name, value in weights.items()
        }
        file = tmp_path / "whole"
        with file.open("wb") as stream:
            np.savez(stream, **old_names)
        digits = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
        name = f"fasterrcnn_resnet50_fpn_coco-{digits}.pth"
        (tmp_path / "home").mkdir()
        monkeypatch.setenv("KERAS_HOME", str(tmp_path / "home"))
        monkeypatch.setitem(published.DETECTORS, "coco", f"{file.parent.as_uri()}/{name}")
        return file.rename(tmp_path / name)

    def test_the_classes_are_the_80_that_coco_uses(self, coco, weights):
        model, warned = built_from("coco", **SMALL)
        assert not warned
        assert model.num_classes == 80
        assert model.class_names == COCO_CLASS_NAMES
        assert model.backbone.norm_epsilon == 0.0
        # "stop sign" is COCO's id 13 and its twelfth class in use; "background" is the last.
        label = COCO_CLASS_NAMES.index("stop sign")
        assert label == 11
        bias = weights["roi_heads.box_predictor.cls_score.bias"]
        found = convert_to_numpy(model.box_head.class_logits.bias)
        assert (found[label], found[-1]) == (bias[13], bias[0])
        kernel = weights["roi_heads.box_predictor.bbox_pred.weight"]
        found = convert_to_numpy(model.box_head.deltas.kernel).T.reshape(80, 4, -1)
        np.testing.assert_array_equal(found[label], kernel[13 * 4 : 14 * 4])

    def test_all_90_ids(self, coco, weights):
        model, warned = built_from("coco", num_classes=90, **SMALL)
        assert not warned
        assert model.class_names[12] == "stop sign"
        assert model.class_names[11] == "N/A"
        bias = weights["roi_heads.box_predictor.cls_score.bias"]
        found = convert_to_numpy(model.box_head.class_logits.bias)
        np.testing.assert_array_equal(found, np.roll(bias, -1))

    def test_the_published_file_by_its_path_is_the_same(self, coco):
        model, _ = built_from(coco, **SMALL)
        assert model.backbone.norm_epsilon == 0.0
        assert_equal_weights(model, built_from("coco", **SMALL)[0])

    def test_fine_tuning(self, coco):
        model, warned = built_from("coco", num_classes=3, **SMALL)
        assert model.class_names is None
        assert len(warned) == 1
        assert "'coco' was trained for 90 classes, the model has 3" in warned[0]

    def test_the_converted_file_in_the_cache_is_known_too(self, coco, tmp_path):
        built_from("coco", **SMALL)
        (converted,) = (tmp_path / "home" / "keras_fpn").glob("*.npz")
        model, _ = built_from(converted, **SMALL)
        assert (model.num_classes, model.backbone.norm_epsilon) == (80, 0.0)

    def test_eighty_classes_of_ones_own_start_fresh(self, coco):
        names = [f"mine {i}" for i in range(80)]
        model, warned = built_from("coco", class_names=names, **SMALL)
        assert (
            "the model has 80: box_head/class_logits and box_head/deltas are not loaded"
            in warned[0]
        )
        assert model.class_names == tuple(names)
        names = list(COCO_CLASS_NAMES)
        assert not built_from("coco", class_names=names, **SMALL)[1]


class TestKerasFiles:
    @pytest.fixture(scope="class")
    def saved(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("keras")
        model = small_detector(
            class_names=["a", "b", "c"],
            preprocessing={"mean": (1.0, 2.0, 3.0)},
            roi_pooling={"output_size": 5},
            anchor_sizes=(8, 16, 32, 64, 128),
            frozen_stages=2,
        )
        model.save(folder / "model.keras")
        model.save_weights(folder / "model.weights.h5")
        # Names say nothing.
        (folder / "model.keras").rename(folder / "whole")
        (folder / "model.weights.h5").rename(folder / "weights")
        return model, folder

    def test_a_whole_model(self, saved):
        model, folder = saved
        loaded, warned = built_from(folder / "whole")
        assert not warned
        assert_equal_weights(loaded, model)
        assert loaded.get_config() == model.get_config()

    def test_a_whole_model_for_other_classes(self, saved):
        model, folder = saved
        loaded, warned = built_from(folder / "whole", num_classes=2, score_threshold=0.3)
        assert "was trained for 3 classes, the model has 2" in warned[0]
        assert loaded.class_names is None
        assert loaded.detections.score_threshold == 0.3
        assert loaded.preprocessing.mean == (1.0, 2.0, 3.0)
        for ours, theirs in zip(
            loaded.box_head.class_independent_layers(),
            model.box_head.class_independent_layers(),
            strict=True,
        ):
            np.testing.assert_array_equal(
                convert_to_numpy(ours.kernel), convert_to_numpy(theirs.kernel)
            )

    def test_weights_alone(self, saved):
        model, folder = saved
        loaded = small_detector(weights=folder / "weights", roi_pooling={"output_size": 5})
        assert_equal_weights(loaded, model)

    def test_weights_alone_for_other_classes(self, saved):
        model, folder = saved
        with pytest.warns(UserWarning, match="was trained for 3 classes, the model has 2"):
            loaded = small_detector(
                weights=folder / "weights", num_classes=2, roi_pooling={"output_size": 5}
            )
        assert_equal_weights(loaded, model, but=["box_head/class_logits", "box_head/deltas"])

    def test_classes_of_other_names_start_fresh(self, saved):
        _, folder = saved
        loaded, warned = built_from(folder / "whole", class_names=["x", "y", "z"])
        assert (
            "was trained for 3 classes, the model has other classes: box_head/class_log"
            in warned[0]
        )
        assert loaded.class_names == ("x", "y", "z")

    def test_what_is_given_stays_even_where_it_is_the_default(self, saved):
        model, folder = saved
        assert model.anchors.sizes == ((8,), (16,), (32,), (64,), (128,))
        loaded, _ = built_from(
            folder / "whole",
            anchor_sizes=(32, 64, 128, 256, 512),
            score_threshold=0.05,
            frozen_stages=0,
            preprocessing={"mean": np.array([123.675, 116.28, 103.53])},
            roi_targets={"num_samples": 512},
        )
        assert loaded.anchors.sizes == ((32,), (64,), (128,), (256,), (512,))
        assert loaded.detections.score_threshold == 0.05
        assert loaded.backbone.frozen_stages == 0
        assert loaded.preprocessing.mean == (123.675, 116.28, 103.53)
        assert loaded.roi_targets.num_samples == 512
        # What is not given follows the file.
        assert loaded.detections.max_detections == 20
        assert loaded.backbone.normalization == "frozen_batch_norm"
        assert loaded.roi_pooling.output_size == 5

    def test_weights_of_more_layers_than_the_model_has(self, tmp_path):
        small_detector(rpn_head={"hidden_layers": 2}).save_weights(tmp_path / "x.weights.h5")
        with pytest.raises(ValueError, match=r"x\.weights\.h5' do not fit a model with these"):
            small_detector(weights=tmp_path / "x.weights.h5")

    @pytest.mark.parametrize("name", ["whole", "weights"])
    def test_a_damaged_file(self, saved, tmp_path, name):
        content = bytearray((saved[1] / name).read_bytes())
        (tmp_path / "short").write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match="damaged or incomplete"):
            small_detector(weights=tmp_path / "short", roi_pooling={"output_size": 5})

    def test_the_norms_of_a_detector_on_another_backbone_keep_their_epsilon(self, tmp_path):
        images = keras.Input((None, None, 3))
        maps, x = {}, keras.layers.Conv2D(4, 3, strides=2, padding="same")(images)
        for level in range(2, 6):
            x = maps[f"C{level}"] = keras.layers.Conv2D(4, 3, strides=2, padding="same")(x)
        small_detector(
            backbone=keras.Model(images, maps),
            normalization=None,
            pyramid={"normalization": "frozen_batch_norm", "norm_epsilon": 0.5},
        ).save(tmp_path / "x.keras")
        model, _ = built_from(tmp_path / "x.keras")
        assert model.pyramid.lateral_norms["C2"].epsilon == 0.5

    def test_another_model_is_refused(self, tmp_path):
        keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]).save(tmp_path / "x.keras")
        with pytest.raises(ValueError, match=r"model of keras_fpn; .* Sequential"):
            keras_fpn.build_fpn_faster_rcnn(weights=tmp_path / "x.keras")
        keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]).save_weights(
            tmp_path / "x.weights.h5"
        )
        with pytest.raises(ValueError, match="do not fit a model"):
            keras_fpn.build_fpn_faster_rcnn(weights=tmp_path / "x.weights.h5")

    def test_a_stage_of_its_own_is_replaced_by_a_stage_only(self, tmp_path):
        @keras.saving.register_keras_serializable("keras_fpn_tests")
        class Mine(keras_fpn.BoxHead):
            pass

        small_detector(box_head=Mine(3, hidden_dim=8)).save(tmp_path / "mine.keras")
        loaded, _ = built_from(tmp_path / "mine.keras")
        assert (type(loaded.box_head), loaded.box_head.hidden_dim) == (Mine, 8)
        with pytest.raises(ValueError, match=r"`box_head` .* Mine; .*received .*'hidden_dim': 9"):
            built_from(tmp_path / "mine.keras", box_head={"hidden_dim": 9})
        replaced = keras_fpn.BoxHead(3, hidden_dim=8)
        assert built_from(tmp_path / "mine.keras", box_head=replaced)[0].box_head is replaced
