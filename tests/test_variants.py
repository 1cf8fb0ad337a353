"""The models, and the variants of the paper's Tables 1 to 3, in what each of them can do."""

import keras
import numpy as np
import pytest
from small_detector import (
    arrays,
    assert_same_changes,
    assert_same_next_step,
    take_step,
    tiny_backbone,
    tiny_detector,
    tiny_fast_rcnn,
    tiny_rpn,
    two_level_detector,
)

tensorflow_only = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="fit() needs the TensorFlow backend"
)
# Enough samples for every positive and negative, so that no draw decides.
ALL_ANCHORS = {"rpn_targets": {"num_samples": 6000}}
ALL_REGIONS = {"roi_targets": {"num_samples": 50}}
ALL_SAMPLES = ALL_ANCHORS | ALL_REGIONS


def variant(**arguments):
    return lambda: two_level_detector(**arguments, **ALL_SAMPLES)


MODELS = {
    "FPN": variant(),
    "RPN": lambda: tiny_rpn(
        backbone=tiny_backbone(("C3", "C4")), anchor_sizes=(32, 64, 128), **ALL_ANCHORS
    ),
    "Fast R-CNN": lambda: tiny_fast_rcnn(
        # Small regions on both levels.
        backbone=tiny_backbone(("C3", "C4")),
        roi_pooling={"canonical_size": 32},
        **ALL_REGIONS,
    ),
    "C4": lambda: tiny_detector(
        single_scale="C4",
        backbone="resnet10",
        resnet={"width": 8},
        # The last stage of a ResNet takes its time on every region.
        proposals={"post_nms": 10, "training_post_nms": 10},
        **ALL_SAMPLES,
    ),
    "C5": lambda: tiny_detector(
        single_scale="C5", backbone=tiny_backbone(("C4", "C5")), **ALL_SAMPLES
    ),
    "no top-down": variant(pyramid={"top_down": False}),
    "no lateral": variant(pyramid={"lateral": False}),
    "finest only": variant(pyramid={"finest_only": True}, anchor_sizes=((32, 64, 128),)),
    "max pooling": variant(pooling="max"),
}
# Where something is traced or compiled, which takes long, the variants are for `-m acceptance`.
TRACED = [
    pytest.param(name, marks=() if name == "FPN" else pytest.mark.acceptance) for name in MODELS
]


def inputs_of(name, images):
    """A padded batch, with the proposals that Fast R-CNN takes."""
    inputs = {"images": images, "image_sizes": np.array([[60, 80], [64, 96]], "int32")}
    if name == "Fast R-CNN":
        random = np.random.RandomState(0)
        corners, sides = random.uniform(0, 20, (2, 20, 2)), random.uniform(5, 40, (2, 20, 2))
        inputs["proposals"] = np.concatenate([corners, corners + sides], -1).astype("float32")
    return inputs


def assert_close(outputs, expected):
    outputs, expected = arrays(outputs), arrays(expected)
    assert (expected["scores"] > 0).any(axis=1).all()
    for name, value in expected.items():
        np.testing.assert_allclose(outputs[name], value, atol=1e-3, err_msg=name)


@pytest.fixture(scope="module", params=MODELS)
def trained(request, images, targets):
    """A model after a step, its inputs, its changes in that step, and the losses."""
    keras.utils.set_random_seed(0)
    model = MODELS[request.param]()
    # Tracing takes longer than a step.
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), run_eagerly=True)
    inputs = inputs_of(request.param, images)
    before = [np.array(variable) for variable in model.trainable_variables]
    losses = model.train_on_batch(inputs, targets, return_dict=True)
    changes = {
        variable.path: np.abs(np.array(variable) - value).max()
        for variable, value in zip(model.trainable_variables, before, strict=True)
    }
    return model, inputs, changes, losses


@tensorflow_only
class TestTrained:
    def test_every_weight_takes_part_in_training(self, trained):
        _, _, changes, losses = trained
        assert all(np.isfinite(loss) and loss > 0 for loss in losses.values())
        assert not [path for path, change in changes.items() if not 0 < change < np.inf]

    def test_it_saves_loads_and_goes_on(self, trained, targets, tmp_path):
        import tensorflow as tf

        model, inputs, *_ = trained
        model.save(tmp_path / "variant.keras")
        loaded = keras.saving.load_model(tmp_path / "variant.keras")
        floats = inputs | {"images": inputs["images"].astype("float32")}
        assert_close(loaded.functional_model()(floats), model(inputs))
        assert_same_next_step(loaded, model, tf.data.Dataset.from_tensors((inputs, targets)))

    def test_bad_input_is_refused(self, trained, targets):
        model, inputs, *_ = trained
        with pytest.raises(ValueError, match=r"received shape \(64, 96, 3\)"):
            model.predict(inputs | {"images": inputs["images"][0]}, verbose=0)
        with pytest.raises(ValueError, match=r"received shapes \(2, 2, 3\)"):
            model.train_on_batch(inputs, targets | {"boxes": targets["boxes"][..., :3]})


@pytest.mark.parametrize("name", MODELS)
def test_mixed_precision_keeps_boxes_and_losses_in_float32(name, images, targets):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = MODELS[name]()
    finally:
        keras.config.set_dtype_policy("float32")
    assert {layer.compute_dtype for layer in model.backbone.layers} >= {"bfloat16"}
    inputs = inputs_of(name, images)
    boxes = model(inputs)["boxes"]
    losses = model.compute_losses(inputs, targets, training=True)
    dtypes = {keras.backend.standardize_dtype(x.dtype) for x in (boxes, *losses.values())}
    assert dtypes == {"float32"}
    assert all(np.isfinite(float(loss)) for loss in losses.values())


@tensorflow_only
@pytest.mark.parametrize("name", TRACED)
def test_xla_gives_the_same_predictions_and_the_same_training_step(name, images, targets):
    inputs = inputs_of(name, images)
    models = []
    for jit_compile in (False, True):
        keras.utils.set_random_seed(0)
        model = MODELS[name]()
        # jit_compile=True refuses any op that XLA cannot compile: it is one program or an error.
        model.compile(keras.optimizers.SGD(0.01), jit_compile=jit_compile)
        model.run_eagerly = not jit_compile  # Tracing takes longer than a step.
        before = model.predict(inputs, verbose=0)
        losses = model.train_on_batch(inputs, targets, return_dict=True)
        models.append((before, losses, model.get_weights()))
    (plain, plain_losses, plain_weights), (xla, xla_losses, xla_weights) = models
    assert_close(xla, plain)
    assert xla_losses == pytest.approx(plain_losses, rel=1e-4)
    for a, b in zip(plain_weights, xla_weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@tensorflow_only
@pytest.mark.parametrize("name", TRACED)
def test_two_replicas_of_one_image_make_the_step_of_one_replica_of_two(name, images, targets):
    inputs = inputs_of(name, images)
    one, one_logs, _ = take_step(MODELS[name], inputs, targets)
    two, logs, _ = take_step(MODELS[name], inputs, targets, devices=2, run_eagerly=False)
    assert logs == pytest.approx(one_logs, rel=1e-4)
    assert_same_changes(two, one)
