"""The RPN as a model of its own: the first stage of Faster R-CNN, trained and saved alone."""

import warnings

import keras
import numpy as np
import pytest
from small_detector import (
    arrays,
    assert_same,
    assert_same_next_step,
    copy_stages,
    tiny_detector,
    tiny_fast_rcnn,
    tiny_rpn,
)

import keras_fpn

tensorflow_only = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="fit() needs the TensorFlow backend"
)
LOSSES = keras_fpn.RegionProposalNetwork.loss_names


def assert_same_stages(model, source):
    """That a model has the weights of the stages that another one has too."""
    for stage in {*model.stage_names} & {*source.stage_names}:
        theirs = getattr(source, stage).get_weights()
        for a, b in zip(getattr(model, stage).get_weights(), theirs, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=stage)


@pytest.fixture(scope="module")
def rpn(detector):
    """An RPN with the weights of `detector`, which no test changes."""
    model = tiny_rpn()
    copy_stages(detector, model)
    return model


def test_it_returns_the_proposals_of_faster_rcnn(rpn, detector, images):
    sizes = np.array([[60, 80], [64, 96]], "int32")
    batch, features = detector.extract_features(images, sizes)
    expected = detector.propose_regions(batch, features, sizes)
    inputs = {"images": images, "image_sizes": sizes}
    assert_same(rpn(inputs), {"boxes": expected.boxes, "scores": expected.scores})
    assert_same(rpn.functional_model()(inputs), rpn(inputs))


def test_proposals_are_sorted_inside_their_image_and_padded(images):
    sizes = np.array([[60, 80], [64, 96]], "int32")
    model = tiny_rpn(proposals={"post_nms": 400})
    found = arrays(model({"images": images, "image_sizes": sizes}))
    assert found["boxes"].shape == (2, 400, 4)
    assert (np.diff(found["scores"]) <= 0).all()
    real = found["scores"] >= 0
    assert real.any()
    assert not real.all()
    assert (found["scores"][~real] == -1).all()
    assert (found["boxes"][~real] == 0).all()
    assert (found["boxes"][real][:, 2:] > found["boxes"][real][:, :2]).all()
    assert (found["boxes"] <= sizes[:, None, [1, 0, 1, 0]]).all()


def test_predict_concatenates_batches(rpn, images):
    rpn.run_eagerly = True  # Tracing takes longer than two batches.
    predicted = rpn.predict(images, batch_size=1, verbose=0)
    for name, value in arrays(rpn(images)).items():
        np.testing.assert_allclose(predicted[name], value, atol=1e-4)


def test_the_losses_are_those_of_the_first_stage_whatever_the_labels(rpn, images, targets):
    model = tiny_detector()
    copy_stages(rpn, model)
    both = model.compute_losses(images, targets)
    other_labels = np.where(targets["labels"] >= 0, 700, -1)
    first = rpn.compute_losses(images, targets | {"labels": other_labels}, training=True)
    assert tuple(first) == LOSSES == ("objectness_loss", "rpn_box_loss")
    for name in LOSSES:
        assert float(first[name]) == float(both[name]) > 0


def test_it_has_no_classes(rpn):
    assert (rpn.num_classes, rpn.bounding_box_format) == (None, "xyxy")
    with pytest.raises(TypeError, match="class_names"):
        keras_fpn.build_fpn_rpn(class_names=["a"])


@tensorflow_only
def test_fit_lowers_the_losses_then_saves_loads_and_goes_on(images, targets, tmp_path):
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    model = tiny_rpn()
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), jit_compile=False)
    objects = targets | {"labels": np.where(targets["labels"] >= 0, 700, -1)}
    data = tf.data.Dataset.from_tensors((images, objects)).repeat(8)
    history = model.fit(data, epochs=2, verbose=0).history
    assert set(history) == {"loss", *LOSSES}
    assert history["loss"][1] < history["loss"][0]
    assert 0 < model.last_step["rpn_positives"] <= 0.5

    model.save(tmp_path / "rpn.keras")
    loaded = keras.saving.load_model(tmp_path / "rpn.keras")
    assert type(loaded) is keras_fpn.RegionProposalNetwork
    assert_same(loaded(images), model(images))
    assert_same_next_step(loaded, model, data)


@tensorflow_only
def test_maps_that_no_stage_uses_are_not_trained(images, targets):
    model = tiny_rpn(pyramid=keras_fpn.SingleScale("C4"), anchor_sizes=((8, 16),))
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
    before = [x.numpy() for x in model.trainable_variables]
    model.train_on_batch(images, targets)
    changed = {
        variable.path.split("/")[-2]
        for variable, old in zip(model.trainable_variables, before, strict=True)
        if np.abs(variable.numpy() - old).max() > 0
    }
    kernels = [layer.name for layer in model.backbone.layers if layer.weights]
    assert set(kernels) & changed == set(kernels[:-1])


class TestFilesOfOtherModels:
    """Stages that both models have are loaded; what the file lacks is warned of."""

    def built(self, build, weights, **arguments):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = build(weights=weights, **arguments)
        return model, [str(w.message) for w in caught if w.category is UserWarning]

    def test_an_rpn_of_a_faster_rcnn(self, detector, rpn, images, tmp_path):
        detector.save(tmp_path / "faster.keras")
        model, warned = self.built(keras_fpn.build_fpn_rpn, tmp_path / "faster.keras")
        assert not warned
        assert_same_stages(model, detector)
        assert_same(model(images), rpn(images))

    def test_an_rpn_of_weights_alone(self, rpn, tmp_path):
        rpn.save_weights(tmp_path / "rpn.weights.h5")
        model, warned = self.built(tiny_rpn, tmp_path / "rpn.weights.h5")
        assert not warned
        assert_same_stages(model, rpn)
        with pytest.raises(ValueError, match=r"rpn\.weights\.h5' do not fit a model with these"):
            tiny_detector(weights=tmp_path / "rpn.weights.h5")

    def test_a_faster_rcnn_of_an_rpn(self, rpn, tmp_path):
        rpn.save(tmp_path / "rpn.keras")
        build = keras_fpn.build_fpn_faster_rcnn
        model, warned = self.built(build, tmp_path / "rpn.keras", class_names=["a", "b"])
        (warning,) = warned
        assert warning.endswith("rpn.keras' has no weights of box_head, which are not loaded.")
        assert (model.num_classes, model.class_names) == (2, ("a", "b"))
        assert_same_stages(model, rpn)

    def test_an_rpn_of_a_fast_rcnn(self, tmp_path):
        fast = tiny_fast_rcnn(class_names=["a", "b", "c"])
        fast.save(tmp_path / "fast.keras")
        model, warned = self.built(keras_fpn.build_fpn_rpn, tmp_path / "fast.keras")
        (warning,) = warned
        assert warning.endswith("fast.keras' has no weights of rpn_head, which are not loaded.")
        assert_same_stages(model, fast)
