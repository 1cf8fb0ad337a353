"""Fast R-CNN as a model of its own: the second stage of Faster R-CNN on given proposals."""

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
SIZES = np.array([[60, 80], [64, 96]], "int32")
LOSSES = keras_fpn.FastRCNN.loss_names


def proposed(detector, images, training=False):
    """The proposals of a Faster R-CNN, `[B, P, 4]`."""
    batch, features = detector.extract_features(images, SIZES)
    boxes = detector.propose_regions(batch, features, SIZES, training).boxes
    return keras.ops.convert_to_numpy(boxes)


@pytest.fixture(scope="module")
def fast(detector):
    """A Fast R-CNN with the weights of `detector`, which no test changes."""
    model = tiny_fast_rcnn()
    copy_stages(detector, model)
    return model


@pytest.fixture(scope="module")
def inputs(detector, images):
    """A padded batch with the proposals of `detector`."""
    return {"images": images, "image_sizes": SIZES, "proposals": proposed(detector, images)}


def test_on_the_proposals_of_faster_rcnn_it_detects_the_same(fast, detector, inputs):
    expected = detector({name: inputs[name] for name in ("images", "image_sizes")})
    assert (arrays(expected)["num_detections"] > 5).all()
    assert_same(fast(inputs), expected)
    assert_same(fast.functional_model()(inputs), expected)


def test_the_losses_are_those_of_the_second_stage(fast, images, targets):
    model = tiny_detector()
    copy_stages(fast, model)
    both = model.compute_losses({"images": images, "image_sizes": SIZES}, targets)
    proposals = proposed(model, images, training=True)
    assert proposals.shape[1] == model.proposals.training_post_nms == 40
    losses = fast.compute_losses(
        {"images": images, "image_sizes": SIZES, "proposals": proposals}, targets
    )
    assert tuple(losses) == LOSSES == ("class_loss", "box_loss")
    for name in LOSSES:
        assert float(losses[name]) == float(both[name]) > 0


# xyxy in an image of 60 x 80.
WITHOUT_AREA = {
    "zeros": [0, 0, 0, 0],
    "a line": [10, 10, 10, 40],
    "turned around": [40, 40, 10, 10],
    "outside": [90, 70, 95, 75],
    "not finite": [np.nan, 0, 5, 5],
}


def with_rows(inputs, rows):
    rows = np.broadcast_to(np.float32(rows), (2, len(rows), 4))
    return inputs | {"proposals": np.concatenate([inputs["proposals"], rows], axis=1)}


def test_proposals_without_an_area_are_padding(fast, inputs, targets):
    inputs = inputs | {"image_sizes": SIZES[[0, 0]]}
    padded = with_rows(inputs, list(WITHOUT_AREA.values()))
    expected, found = arrays(fast(inputs)), arrays(fast(padded))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-4, err_msg=name)
    # Every region is a sample, so that no draw decides.
    model = tiny_fast_rcnn(roi_targets={"num_samples": 200, "positive_fraction": 1.0})
    copy_stages(fast, model)
    losses, of_padded = (model.compute_losses(x, targets) for x in (inputs, padded))
    for name in LOSSES:
        assert float(of_padded[name]) == pytest.approx(float(losses[name]), rel=1e-5)


def test_proposals_are_clipped_to_their_image(fast, inputs):
    beyond = inputs["proposals"] + np.float32([-500, -500, 500, 500])
    whole = np.zeros_like(beyond) + SIZES[:, None, [1, 0, 1, 0]] * np.float32([0, 0, 1, 1])
    assert_same(fast(inputs | {"proposals": beyond}), fast(inputs | {"proposals": whole}))


@pytest.mark.parametrize("rows", [0, 3])
def test_an_image_without_proposals_has_no_detections(fast, inputs, targets, rows):
    none = inputs | {"proposals": np.zeros((2, rows, 4), "float32")}
    found = arrays(fast(none))
    assert (found["num_detections"] == 0).all()
    assert (found["labels"] == -1).all()
    # Training has the ground truth beside the proposals.
    losses = fast.compute_losses(none, targets)
    assert 0 < float(losses["class_loss"]) < np.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"proposals": None}, r"Inputs must have the keys 'images' and 'proposals'.*received"),
        ({"proposals": np.zeros((2, 4))}, r"'proposals' must be boxes .*received shape \(2, 4\)"),
        ({"proposals": np.zeros((2, 7, 5))}, r"received shape \(2, 7, 5\)"),
        ({"proposals": np.zeros((3, 7, 4))}, r"each of the 2 images; received those of 3"),
        ({"boxes": np.zeros((2, 7, 4))}, r"received the keys \['boxes', 'image_sizes'"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(fast, inputs, change, message):
    wrong = {name: x for name, x in (inputs | change).items() if x is not None}
    with pytest.raises(ValueError, match=message):
        fast(wrong)
    with pytest.raises(ValueError, match=message):
        fast.predict(wrong, verbose=0)


def test_proposals_belong_to_fast_rcnn_alone(fast, detector, inputs):
    with pytest.raises(ValueError, match=r"received the keys \['images'\]"):
        fast(inputs["images"])
    with pytest.raises(ValueError, match=r"keys 'images' and.* received .*'proposals'\]"):
        detector(inputs)


def test_files_of_other_models(detector, fast, inputs, tmp_path):
    detector.save(tmp_path / "faster.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = keras_fpn.build_fpn_fast_rcnn(weights=tmp_path / "faster.keras")
    assert_same(model(inputs), fast(inputs))
    rpn = tiny_rpn()
    rpn.save(tmp_path / "rpn.keras")
    with pytest.warns(UserWarning, match="has no weights of box_head, which are not loaded"):
        model = keras_fpn.build_fpn_fast_rcnn(num_classes=3, weights=tmp_path / "rpn.keras")
    for a, b in zip(model.backbone.get_weights(), rpn.backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    fast.save_weights(tmp_path / "fast.weights.h5")
    assert_same(tiny_fast_rcnn(weights=tmp_path / "fast.weights.h5")(inputs), fast(inputs))


@tensorflow_only
def test_it_exports_for_any_number_of_proposals(inputs, tmp_path):
    import tensorflow as tf

    model = tiny_fast_rcnn(pyramid={"top_down": False})
    model.export(tmp_path / "fast", format="tf_saved_model", verbose=False)
    exported = tf.saved_model.load(str(tmp_path / "fast"))
    for count in (30, 3):
        some = inputs | {"proposals": inputs["proposals"][:, :count]}
        some["images"] = some["images"].astype("float32")
        found, expected = arrays(exported.serve(some)), arrays(model(some))
        assert (expected["num_detections"] > 0).all()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=1e-3, err_msg=name)


@tensorflow_only
def test_fit_lowers_the_losses_then_saves_loads_and_goes_on(inputs, targets, tmp_path):
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    model = tiny_fast_rcnn(class_names=["a", "b", "c"])
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), jit_compile=False)
    data = tf.data.Dataset.from_tensors((inputs, targets)).repeat(8)
    history = model.fit(data, epochs=2, verbose=0).history
    assert set(history) == {"loss", *LOSSES}
    assert history["loss"][1] < history["loss"][0]
    assert 0 < model.last_step["roi_positives"] <= 0.25

    model.save(tmp_path / "fast.keras")
    loaded = keras.saving.load_model(tmp_path / "fast.keras")
    assert type(loaded) is keras_fpn.FastRCNN
    assert loaded.class_names == ("a", "b", "c")
    assert_same(loaded(inputs), model(inputs))
    assert_same_next_step(loaded, model, data)
