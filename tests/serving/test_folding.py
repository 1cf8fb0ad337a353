import numpy as np
import pytest
from keras.ops import convert_to_numpy
from small_detector import small_detector

from keras_fpn.normalization import FrozenBatchNormalization
from keras_fpn.serving.folding import fold_normalization


@pytest.fixture(scope="module")
def model():
    """A detector with every norm that folds, and statistics unlike those of a fresh one."""
    model = small_detector(
        backbone="resnet10",
        resnet={"norm_epsilon": 1e-3, "width": 16},
        pyramid={"normalization": "batch_norm", "norm_epsilon": 1e-3},
        box_head={
            "convolutions": 2,
            "normalization": "frozen_batch_norm",
            "hidden_layers": 1,
            "norm_epsilon": 1e-3,
        },
    )
    model.run_eagerly = True  # Tracing takes longer than a batch.
    random = np.random.RandomState(0)
    for variable in model.weights:
        if variable.path.endswith(("gamma", "moving_variance")):
            variable.assign(random.uniform(0.5, 1.5, variable.shape))
        if variable.path.endswith(("beta", "moving_mean")):
            variable.assign(random.uniform(-0.2, 0.2, variable.shape))
    return model


def norms_of(model):
    layers = model._flatten_layers(include_self=False)
    return [layer for layer in layers if "Normalization" in type(layer).__name__]


def test_the_folded_detector_computes_the_same(model, images):
    folded = fold_normalization(model)
    folded.run_eagerly = True
    assert norms_of(model)
    assert not norms_of(folded)
    ours, theirs = model.predict_on_batch(images), folded.predict_on_batch(images)
    np.testing.assert_array_equal(ours["labels"], theirs["labels"])
    np.testing.assert_allclose(ours["scores"], theirs["scores"], atol=1e-5)
    np.testing.assert_allclose(ours["boxes"], theirs["boxes"], atol=1e-2)
    normalized = np.random.RandomState(1).normal(size=(1, 64, 64, 3)).astype("float32")
    for level, value in model.pyramid(model.backbone(normalized)).items():
        value = convert_to_numpy(value)
        found = convert_to_numpy(folded.pyramid(folded.backbone(normalized))[level])
        np.testing.assert_allclose(found, value, atol=1e-5 * np.abs(value).max())


def test_the_original_is_left_as_it_was(model):
    assert isinstance(model.backbone.get_layer("stem_norm"), FrozenBatchNormalization)
    assert model.backbone.normalization == "frozen_batch_norm"


def test_group_norm_stays():
    model = small_detector(backbone="resnet10", normalization="group_norm")
    folded = fold_normalization(model)
    assert len(norms_of(folded)) == len(norms_of(model))
    for ours, theirs in zip(model.weights, folded.weights, strict=True):
        np.testing.assert_array_equal(convert_to_numpy(ours), convert_to_numpy(theirs))
