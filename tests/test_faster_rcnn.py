"""The detector as a Keras model: call, fit, save, subclasses."""

import keras
import numpy as np
import pytest
from small_detector import (
    assert_same_changes,
    small_detector,
    take_step,
    tiny_detector,
    two_level_detector,
)
from subclasses import DoublesBoth, TakesKerasStep, TakesNoStep

from keras_fpn.faster_rcnn import FasterRCNN

tensorflow_only = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="fit() needs the TensorFlow backend"
)

# Enough samples for every positive and negative, so that no draw decides.
ALL_SAMPLES = {"rpn_targets": {"num_samples": 6000}, "roi_targets": {"num_samples": 100}}
LOSSES = FasterRCNN.loss_names


def arrays(detections):
    return {name: keras.ops.convert_to_numpy(value) for name, value in detections.items()}


def assert_same_detections(a, b, pixels=1e-3, score=1e-5):
    a, b = arrays(a), arrays(b)
    np.testing.assert_array_equal(a["num_detections"], b["num_detections"])
    np.testing.assert_array_equal(a["labels"], b["labels"])
    np.testing.assert_allclose(a["scores"], b["scores"], atol=score)
    np.testing.assert_allclose(a["boxes"], b["boxes"], atol=pixels)


def test_detections_are_sorted_inside_the_image_and_padded(detector, images):
    detections = arrays(detector(images))
    assert {name: value.shape for name, value in detections.items()} == {
        "boxes": (2, 20, 4),
        "scores": (2, 20),
        "labels": (2, 20),
        "num_detections": (2,),
    }
    assert (np.diff(detections["scores"]) <= 0).all()
    assert (detections["boxes"] >= 0).all()
    assert (detections["boxes"] <= [96, 64, 96, 64]).all()
    for count, labels in zip(detections["num_detections"], detections["labels"], strict=True):
        assert count > 0
        assert (labels[:count] >= 0).all()
        assert (labels[count:] == -1).all()


def test_symbolic_shapes_are_those_of_the_result(detector):
    outputs = detector(keras.Input((None, None, 3)))
    assert outputs["boxes"].shape == (None, 20, 4)
    assert keras.backend.standardize_dtype(outputs["labels"].dtype) == "int32"


def test_any_number_dtype_and_call_style_gives_the_same(detector, images):
    expected = detector(images)
    sizes = np.array([[64, 96], [64, 96]])
    assert_same_detections(detector(images.astype("float32")), expected)
    assert_same_detections(detector({"images": images, "image_sizes": sizes}), expected)
    assert_same_detections(detector({"images": images}), expected)


def test_an_image_in_a_padded_batch_is_detected_as_alone(detector, images):
    alone = images[:1, :60, :80]
    padded = images.copy()
    padded[0, 60:], padded[0, :, 80:] = 7, 9
    together = detector({"images": padded, "image_sizes": np.array([[60, 80], [64, 96]])})
    assert_same_detections(
        {name: value[:1] for name, value in arrays(together).items()}, detector(alone)
    )


def test_predict_concatenates_batches_of_a_data_set(detector, images):
    predicted = detector.predict(np.concatenate([images, images[:1]]), batch_size=1, verbose=0)
    assert_same_detections({name: value[:2] for name, value in predicted.items()}, detector(images))
    assert_same_detections(
        {name: value[2:] for name, value in predicted.items()}, detector(images[:1])
    )


@pytest.mark.parametrize("bounding_box_format", ["rel_yxyx", "center_xywh"])
def test_detections_come_in_the_format_asked_for(detector, images, bounding_box_format):
    other = tiny_detector(bounding_box_format=bounding_box_format)
    other.set_weights(detector.get_weights())
    expected = arrays(detector(images))["boxes"]
    boxes = arrays(other(images))["boxes"]
    x1, y1, x2, y2 = np.split(expected, 4, -1)
    if bounding_box_format == "rel_yxyx":
        wanted = np.concatenate([y1 / 64, x1 / 96, y2 / 64, x2 / 96], -1)
    else:
        wanted = np.concatenate([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], -1)
    np.testing.assert_allclose(boxes, wanted, atol=1e-4)


def test_the_losses_of_every_backend_are_finite_and_positive(images, targets):
    losses = tiny_detector().compute_losses(images, targets)
    values = {name: float(keras.ops.convert_to_numpy(loss)) for name, loss in losses.items()}
    assert tuple(values) == LOSSES
    assert all(np.isfinite(value) and value >= 0 for value in values.values())
    # Untrained: as good as guessing between 2 and among 4.
    assert values["objectness_loss"] == pytest.approx(np.log(2), abs=0.2)
    assert values["class_loss"] == pytest.approx(np.log(4), abs=0.7)


@tensorflow_only
def test_fit_lowers_the_losses_then_saves_loads_and_goes_on(images, targets, tmp_path):
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    model = two_level_detector(pyramid={"normalization": "batch_norm"})
    model.compile(keras.optimizers.SGD(0.005, momentum=0.9), jit_compile=False)
    data = tf.data.Dataset.from_tensors((images, targets)).repeat(8)
    history = model.fit(data, epochs=2, validation_data=data.take(1), verbose=0).history
    assert {"loss", *LOSSES, "val_loss", *(f"val_{name}" for name in LOSSES)} == set(history)
    assert history["loss"][-1] < history["loss"][0]
    total = sum(history[name][-1] for name in LOSSES)
    assert history["loss"][-1] == pytest.approx(total, rel=1e-4)

    model.save(tmp_path / "detector.keras")
    loaded = keras.saving.load_model(tmp_path / "detector.keras")
    loaded.run_eagerly = True  # Tracing takes longer than a few steps.
    assert_same_detections(loaded.predict(images, verbose=0), model.predict(images, verbose=0))
    assert loaded.optimizer.iterations.numpy() == 16
    continued = loaded.fit(data.take(2), verbose=0).history["loss"][-1]
    assert continued < history["loss"][0]


def test_sizes_beyond_the_batch_do_not_put_boxes_there(detector, images):
    # As tensors, whose values a call cannot look at; arrays are refused.
    inputs = {"images": images, "image_sizes": [[640, 960], [640, 960]]}
    tensors = {name: keras.ops.convert_to_tensor(value) for name, value in inputs.items()}
    found = arrays(detector(tensors))
    assert (found["boxes"] <= [96, 64, 96, 64]).all()


@tensorflow_only
def test_fit_refuses_what_it_would_ignore(images, targets):
    model = tiny_detector()
    model.compile(keras.optimizers.SGD(0.01), jit_compile=False)
    with pytest.raises(ValueError, match="`sample_weight`"):
        model.fit(images, targets, sample_weight=np.ones(2), verbose=0)
    wrong = targets | {"labels": targets["labels"] + 50}
    with pytest.raises(ValueError, match="received 50 in image 0"):
        model.fit(images, targets, validation_data=(images, wrong), verbose=0)
    with pytest.raises(ValueError, match="received shape"):
        model.predict(images[0], verbose=0)


@pytest.mark.parametrize(
    ("argument", "value", "named"),
    [
        ("loss", "mse", r"`loss`; received 'mse'"),
        ("metrics", ["accuracy"], "`metrics`"),
        ("weighted_metrics", ["accuracy"], "`weighted_metrics`"),
        ("loss_weights", {"box_los": 2.0}, "'box_los'; did you mean 'box_loss'"),
        ("loss_weights", {"box_loss": -1.0}, "-1.0 for 'box_loss'"),
        ("loss_weights", {"box_loss": np.nan}, "nan for 'box_loss'"),
    ],
)
def test_compile_refuses_what_it_would_ignore(detector, argument, value, named):
    with pytest.raises(ValueError, match=named):
        detector.compile("sgd", **{argument: value})


def test_stages_are_those_that_the_model_declares(detector):
    stages = {name: getattr(detector, name) for name in FasterRCNN.stage_names}
    del stages["proposals"]
    with pytest.raises(TypeError, match="'proposals' is missing"):
        FasterRCNN(**stages)
    with pytest.raises(TypeError, match="'propsals' is unknown; did you mean 'proposals'"):
        FasterRCNN(**stages, proposals=detector.proposals, propsals=detector.proposals)


def test_heads_and_anchors_that_do_not_fit_are_refused(detector):
    config = detector.get_config()
    config["anchors"]["config"]["aspect_ratios"] = (1.0,)
    with pytest.raises(ValueError, match=r"`anchors` has 1 .*`rpn_head` predicts 3"):
        FasterRCNN.from_config(config)


def test_a_clone_is_a_detector_that_predicts(detector, images):
    clone = keras.models.clone_model(detector)
    assert type(clone) is FasterRCNN
    clone.set_weights(detector.get_weights())
    clone.run_eagerly = True  # Tracing takes longer than a batch.
    assert_same_detections(clone.predict(images, verbose=0), detector(images))


def test_the_functional_model_shares_the_layers(detector, images):
    model = detector.functional_model()
    sizes = np.array([[64, 96], [64, 96]], "int32")
    assert_same_detections(model({"images": images, "image_sizes": sizes}), detector(images))
    pooled = keras.Model(model.input, model.get_layer("roi_pooling").output)
    assert pooled({"images": images, "image_sizes": sizes}).shape == (2, 30, 7, 7, 16)


def steps(model_class, *arguments, **options):
    """`take_step` of a small model of a class."""
    config = two_level_detector(**ALL_SAMPLES).get_config()
    return take_step(lambda: model_class.from_config(config), *arguments, **options)


@pytest.fixture(scope="module")
def plain_step(images, targets):
    """The changes of a step of the model as it is."""
    return steps(FasterRCNN, images, targets, run_eagerly=False)


@tensorflow_only
@pytest.mark.parametrize("devices", [1, 2])
class TestSubclasses:
    def test_compute_losses_compute_loss_and_loss_weights(
        self, images, targets, plain_step, devices
    ):
        weighted, weighted_logs, _ = steps(
            FasterRCNN, images, targets, devices, loss_weights={"box_loss": 2.0}
        )
        doubled, logs, last = steps(DoublesBoth, images, targets, devices)
        plain, plain_logs, _ = plain_step
        assert max(np.abs(a - b).max() for a, b in zip(weighted, plain, strict=True)) > 1e-4
        # The box loss doubled, and the sum of the losses doubled again.
        assert_same_changes(doubled, weighted, scale=2.0)
        box_loss = plain_logs["box_loss"]
        assert logs["box_loss"] == pytest.approx(2 * box_loss, rel=1e-4)
        # The logs show each loss as it is, and the weighted sum.
        assert weighted_logs["box_loss"] == pytest.approx(box_loss, rel=1e-4)
        total = plain_logs["loss"] + box_loss
        assert weighted_logs["loss"] == pytest.approx(total, rel=1e-4)
        assert logs["loss"] == pytest.approx(2 * total, rel=1e-4)
        assert "box_loss_before" in last

    def test_train_step(self, images, targets, devices):
        changes, logs, last = steps(TakesNoStep, images, targets, devices)
        assert not any(change.any() for change in changes)
        assert logs["loss"] == 2 / devices
        assert last == {}

    def test_a_train_step_that_leaves_sums_to_the_optimizer(
        self, images, targets, plain_step, devices
    ):
        changes, _, _ = steps(TakesKerasStep, images, targets, devices)
        assert_same_changes(changes, plain_step[0])


@tensorflow_only
def test_train_on_batch_takes_the_step_of_the_subclass(images, targets):
    changes, logs, _ = steps(TakesNoStep, images, targets, use_fit=False)
    assert not any(change.any() for change in changes)
    assert logs == {"loss": 2.0}


@tensorflow_only
def test_loss_weights_are_saved(images, targets, tmp_path):
    model = tiny_detector()
    model.compile(keras.optimizers.SGD(0.01), loss_weights={"class_loss": 0.5}, jit_compile=False)
    model.save(tmp_path / "detector.keras")
    assert keras.saving.load_model(tmp_path / "detector.keras").loss_weights == {"class_loss": 0.5}


@tensorflow_only
def test_an_inference_copy_has_the_weights_and_no_optimizer(images, targets):
    model = two_level_detector()
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), run_eagerly=True)
    model.train_on_batch(images, targets)
    copy = model.inference_copy()
    assert not copy.compiled
    assert_same_detections(copy(images), model(images))


@tensorflow_only
def test_the_samplers_go_on_where_they_were_saved(images, targets, tmp_path):
    model = two_level_detector()
    model.compile(keras.optimizers.SGD(0.01), run_eagerly=True)
    model.train_on_batch(images, targets)

    def states(of):
        return [t.seed_generator.state.numpy().tolist() for t in (of.rpn_targets, of.roi_targets)]

    moved = states(model)
    assert moved != states(two_level_detector())
    # Validation draws the same each time and leaves the training's draws alone.
    first = model.test_on_batch(images, targets, return_dict=True)
    assert model.test_on_batch(images, targets, return_dict=True) == pytest.approx(first)
    assert states(model) == moved
    model.save(tmp_path / "detector.keras")
    assert states(keras.saving.load_model(tmp_path / "detector.keras")) == moved


@tensorflow_only
def test_degenerate_and_missing_objects_leave_loss_and_weights_finite(images):
    import tensorflow as tf

    bad = np.array(
        [
            [[10, 10, 10, 30], [40, 40, 30, 50], [np.nan, 0, 5, 5], [0, 0, np.inf, 9]],
            [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
        ],
        "float32",
    )
    labels = np.array([[0, 1, 2, 0], [-1, -1, -1, -1]])
    model = two_level_detector()
    model.compile(keras.optimizers.SGD(0.01), run_eagerly=True)
    data = tf.data.Dataset.from_tensors((images, {"boxes": bad, "labels": labels}))
    history = model.fit(data, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    # No object is left, so there is nothing to regress to.
    assert history["rpn_box_loss"] == [0.0]
    assert history["box_loss"] == [0.0]
    assert all(np.isfinite(weight).all() for weight in model.get_weights())


@tensorflow_only
def test_frozen_stages_stay_as_they_are(images, targets):
    model = small_detector(frozen_stages=2)
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
    frozen = [model.backbone.get_layer(n) for n in ("stem_conv", "stage2_block1_conv2")]
    free = model.backbone.get_layer("stage3_block0_conv1")
    before = [layer.get_weights()[0] for layer in (*frozen, free)]
    model.train_on_batch(images, targets)
    after = [layer.get_weights()[0] for layer in (*frozen, free)]
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[1], after[1])
    assert np.abs(before[2] - after[2]).max() > 0
