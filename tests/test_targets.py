import keras
import numpy as np
import pytest
from keras.ops import convert_to_numpy
from small_detector import small_detector

from keras_fpn.targets import RoITargets, RPNTargets

# Two objects and a padding row; an image without objects.
BOXES = np.array([[[0, 0, 20, 20], [40, 40, 60, 80], [0, 0, 0, 0]], [[0, 0, 0, 0]] * 3], "float32")
LABELS = np.array([[2, 0, -1], [-1, -1, -1]])
IS_OBJECT = LABELS >= 0


PLAIN = (1.0, 1.0, 1.0, 1.0)


def to_numpy(targets):
    return {name: convert_to_numpy(value) for name, value in targets.items()}


class TestRPNTargets:
    ANCHORS = np.array(
        [
            [0, 0, 20, 20],  # the first object
            [100, 100, 120, 120],  # background
            [0, 0, 20, 40],  # half over the first: neither
            [40, 40, 60, 68],  # 0.7 of the second
            [40, 50, 60, 68],  # 0.45 of the second: neither
            [200, 200, 220, 220],  # background
        ],
        "float32",
    )

    def targets(self, num_samples, weights=PLAIN):
        layer = RPNTargets(num_samples=num_samples, seed=0)
        return to_numpy(layer(self.ANCHORS, BOXES, IS_OBJECT, delta_weights=weights))

    def test_by_hand(self):
        targets = self.targets(6)
        assert set(targets) == {"indices", "positive", "sampled", "deltas"}
        assert set(targets["indices"][0, :2]) == {0, 3}
        np.testing.assert_array_equal(targets["positive"][0], [1, 1, 0, 0, 0, 0])
        assert set(targets["indices"][0, 2:4]) == {1, 5}
        np.testing.assert_array_equal(targets["sampled"][0], [1, 1, 1, 1, 0, 0])
        of = dict(zip(targets["indices"][0, :2], targets["deltas"][0, :2], strict=True))
        np.testing.assert_allclose(of[0], [0, 0, 0, 0], atol=1e-6)
        # From a center of 54 to 60 on a height of 28; the height grows by 40 / 28.
        np.testing.assert_allclose(of[3], [0, 6 / 28, 0, np.log(40 / 28)], atol=1e-6)

    def test_without_objects_all_anchors_are_background(self):
        targets = self.targets(6)
        assert set(targets["indices"][1]) == set(range(6))
        assert not targets["positive"][1].any()
        assert targets["sampled"][1].all()
        assert np.isfinite(targets["deltas"]).all()

    def test_the_best_anchor_of_an_object_is_positive_however_little_it_overlaps(self):
        anchors = np.array([[0, 0, 200, 200], [0, 0, 5, 5], [90, 90, 99, 99]], "float32")
        boxes = np.array([[[0, 0, 20, 20]]], "float32")
        layer = RPNTargets(num_samples=3, seed=0)
        targets = to_numpy(layer(anchors, boxes, np.array([[True]]), delta_weights=PLAIN))
        assert targets["indices"][0, 0] == 1
        np.testing.assert_array_equal(targets["positive"][0], [True, False, False])

    def test_deltas_carry_the_weights(self):
        weights = (10.0, 10.0, 5.0, 5.0)
        plain, weighted = self.targets(2), self.targets(2, weights)
        np.testing.assert_array_equal(plain["indices"], weighted["indices"])
        np.testing.assert_allclose(weighted["deltas"], plain["deltas"] * weights, rtol=1e-6)


class TestRoITargets:
    PROPOSALS = np.array(
        [
            [
                [0, 0, 20, 10],  # half of the first object
                [0, 0, 20, 9],  # less
                [100, 0, 120, 20],
                [0, 0, 20, 20],  # not there: its score is negative
            ]
        ]
        * 2,
        "float32",
    )
    SCORES = np.array([[0.9, 0.8, 0.7, -1]] * 2, "float32")

    @pytest.fixture(scope="class")
    def targets(self):
        layer = RoITargets(num_samples=8, positive_fraction=0.5, seed=0)
        weights = (10.0, 10.0, 5.0, 5.0)
        return to_numpy(
            layer(self.PROPOSALS, self.SCORES, BOXES, LABELS, IS_OBJECT, delta_weights=weights)
        )

    def test_positives_are_the_objects_themselves_and_what_overlaps_them_by_half(self, targets):
        np.testing.assert_array_equal(targets["positive"][0], [1, 1, 1, 0, 0, 0, 0, 0])
        found = {
            tuple(region): (label, deltas)
            for region, label, deltas in zip(
                targets["regions"][0, :3], targets["labels"][0], targets["deltas"][0], strict=False
            )
        }
        assert set(found) == {(0, 0, 20, 10), (0, 0, 20, 20), (40, 40, 60, 80)}
        assert [found[tuple(box)][0] for box in BOXES[0, :2]] == [2, 0]
        np.testing.assert_allclose(found[(0, 0, 20, 20)][1], 0, atol=1e-6)
        label, deltas = found[(0, 0, 20, 10)]
        assert label == 2
        np.testing.assert_allclose(deltas, [0, 10 * 5 / 10, 0, 5 * np.log(2)], rtol=1e-6)

    def test_the_rest_is_background_and_nothing_is_sampled_that_is_not_there(self, targets):
        np.testing.assert_array_equal(targets["sampled"][0], [1, 1, 1, 1, 1, 0, 0, 0])
        rest = {tuple(region) for region in targets["regions"][0, 3:5]}
        assert rest == {(0, 0, 20, 9), (100, 0, 120, 20)}
        assert np.all(targets["labels"][0, 3:] == -1)

    def test_without_objects_all_regions_are_background(self, targets):
        assert targets["sampled"][1].sum() == 3
        assert not targets["positive"][1].any()
        assert np.all(targets["labels"][1] == -1)
        assert np.isfinite(targets["deltas"]).all()


class TestRowsThatAreNoObjects:
    """They change nothing: neither the losses nor, by a NaN, the gradients."""

    DEGENERATE = np.array(
        [
            [np.nan, 5, 50, 60],
            [np.nan] * 4,
            [0, 0, np.inf, np.inf],
            [10, 10, 10, 40],
            [30, 30, 20, 20],
            [-1e30, -1e30, 1e30, 1e30],
        ],
        "float32",
    )

    @pytest.fixture(scope="class")
    def model(self):
        # The samplers take everything, so that the losses are not random.
        keras.utils.set_random_seed(0)
        return small_detector(
            rpn_targets={"num_samples": 4000},
            roi_targets={"num_samples": 200, "positive_fraction": 0.5},
        )

    def targets_with_degenerate_rows(self, targets):
        count = len(self.DEGENERATE)
        boxes = np.concatenate([np.stack([self.DEGENERATE] * 2), targets["boxes"]], axis=1)
        labels = np.concatenate([np.ones((2, count), "int32"), targets["labels"]], axis=1)
        return {"boxes": boxes, "labels": labels}

    def test_losses(self, model, images, targets):
        clean = model.compute_losses(images, targets)
        dirty = model.compute_losses(images, self.targets_with_degenerate_rows(targets))
        for name, loss in clean.items():
            value = float(convert_to_numpy(loss))
            assert value > 0
            assert float(convert_to_numpy(dirty[name])) == pytest.approx(value, rel=1e-5), name

    @pytest.mark.skipif(
        keras.backend.backend() != "tensorflow",
        reason="gradients are taken with TensorFlow's GradientTape",
    )
    @pytest.mark.parametrize("objects", ["some", "none"])
    def test_gradients_are_finite(self, model, images, targets, objects):
        import tensorflow as tf

        targets = self.targets_with_degenerate_rows(targets)
        if objects == "none":
            count = len(self.DEGENERATE)
            targets = {name: value[:, :count] for name, value in targets.items()}
        with tf.GradientTape() as tape:
            total = sum(model.compute_losses(images, targets).values())
        gradients = tape.gradient(total, model.trainable_variables)
        for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
            assert gradient is not None, variable.path
            assert np.isfinite(gradient).all(), variable.path
            if objects == "some" or "deltas" not in variable.path:
                assert np.abs(gradient).max() > 0, variable.path

    def test_no_rows_at_all(self, model, images):
        empty = {"boxes": np.zeros((2, 0, 4), "float32"), "labels": np.zeros((2, 0), "int32")}
        padded = {"boxes": np.zeros((2, 1, 4), "float32"), "labels": np.full((2, 1), -1, "int32")}
        expected = model.compute_losses(images, padded)
        for name, loss in model.compute_losses(images, empty).items():
            value = float(convert_to_numpy(expected[name]))
            assert float(convert_to_numpy(loss)) == pytest.approx(value, rel=1e-5)
