"""Every row of the paper's Tables 1 to 3 is a model that trains, saves and loads."""

import keras
import numpy as np
import pytest
from small_detector import arrays, tiny_detector

tensorflow_only = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="fit() needs the TensorFlow backend"
)
VARIANTS = {
    "C4": {
        "single_scale": "C4",
        "backbone": "resnet10",
        # The last stage of a ResNet takes its time on every region.
        "roi_targets": {"num_samples": 8},
        "proposals": {"post_nms": 10},
    },
    "C5": {"single_scale": "C5"},
    "no top-down": {"pyramid": {"top_down": False}},
    "no lateral": {"pyramid": {"lateral": False}},
    "only P2": {"pyramid": {"finest_only": True}},
    "max pooling": {"pooling": "max"},
}
# A padded batch, as functional models take it.
BATCH = {
    "images": np.random.RandomState(0).uniform(0, 255, (2, 64, 96, 3)).astype("float32"),
    "image_sizes": np.array([[64, 96], [60, 80]], "int32"),
}


def assert_close(outputs, expected):
    outputs, expected = arrays(outputs), arrays(expected)
    assert (expected["num_detections"] > 0).all()
    for name, value in expected.items():
        np.testing.assert_allclose(outputs[name], value, atol=1e-4, err_msg=name)


@pytest.fixture(scope="module", params=VARIANTS)
def trained(request, images, targets):
    """A variant after a step, its changes in that step, and the losses."""
    keras.utils.set_random_seed(0)
    model = tiny_detector(**VARIANTS[request.param])
    # Tracing takes longer than a step.
    model.compile(keras.optimizers.SGD(0.01), run_eagerly=True)
    before = [np.array(variable) for variable in model.trainable_variables]
    losses = model.train_on_batch(images, targets, return_dict=True)
    changes = {
        variable.path: np.abs(np.array(variable) - value).max()
        for variable, value in zip(model.trainable_variables, before, strict=True)
    }
    return model, changes, losses


@tensorflow_only
class TestVariants:
    def test_every_weight_takes_part_in_training(self, trained):
        _, changes, losses = trained
        assert all(np.isfinite(loss) and loss > 0 for loss in losses.values())
        assert not [path for path, change in changes.items() if not 0 < change < np.inf]

    def test_it_saves_and_loads(self, trained, tmp_path):
        model, *_ = trained
        model.save(tmp_path / "variant.keras")
        loaded = keras.saving.load_model(tmp_path / "variant.keras")
        assert_close(loaded.functional_model()(BATCH), model(BATCH))
