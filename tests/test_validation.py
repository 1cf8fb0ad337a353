import math
import re
from functools import partial

import keras
import numpy as np
import pytest

from keras_fpn.validation import (
    check_choice,
    check_fraction,
    check_inputs,
    check_int,
    check_non_negative,
    check_targets,
    check_training_data,
    did_you_mean,
)

IMAGES = np.zeros((2, 40, 60, 3), "uint8")


class TestNumbers:
    @pytest.mark.parametrize(
        ("check", "value", "expected"),
        [
            (check_int, np.int64(800), 800),
            (check_int, 1, 1),
            (partial(check_int, minimum=0), 0, 0),
            (check_fraction, 0, 0.0),
            (check_fraction, np.float32(0.5), 0.5),
            (check_fraction, 1, 1.0),
            (check_non_negative, 0, 0.0),
            (check_non_negative, np.float64(1e9), 1e9),
        ],
    )
    def test_numbers_become_those_of_python(self, check, value, expected):
        found = check("x", value)
        assert found == expected
        assert type(found) is type(expected)

    @pytest.mark.parametrize(
        ("check", "value"),
        [
            *((check_int, value) for value in (True, 2.0, "3", None, 0, -1, math.nan)),
            (partial(check_int, minimum=0), -1),
            *((check_fraction, value) for value in (-0.1, 1.1, math.nan, "0.5", None)),
            *((check_non_negative, value) for value in (-1e-9, math.inf, math.nan, "1", None)),
        ],
    )
    def test_what_is_refused(self, check, value):
        with pytest.raises(ValueError, match=rf"`x` must be .*; received {re.escape(repr(value))}"):
            check("x", value)

    def test_choices(self):
        assert check_choice("x", "rgb", ("rgb", "bgr")) == "rgb"
        with pytest.raises(ValueError, match=r"`x` .*'rgb', 'bgr'; received 'RGB'\.$"):
            check_choice("x", "RGB", ("rgb", "bgr"))
        with pytest.raises(ValueError, match=r"received 'rbg'; did you mean 'rgb'\?$"):
            check_choice("x", "rbg", iter(("rgb", "yuv")))

    def test_the_nearest_name_is_suggested_if_any_is_near(self):
        assert did_you_mean("post_mns", ("pre_nms", "post_nms")) == "; did you mean 'post_nms'?"
        assert did_you_mean("x", ("pre_nms", "post_nms")) == "."


class TestImages:
    @pytest.mark.parametrize("dtype", ["uint8", "int32", "float16", "float32", "float64"])
    def test_a_batch_of_numbers_is_accepted(self, dtype):
        checked = check_inputs(IMAGES.astype(dtype))
        assert list(checked) == ["images"]
        assert checked["images"].dtype == dtype

    def test_arrays_stay_as_they_are(self):
        inputs = {"images": IMAGES, "image_sizes": np.array([[40, 60], [30, 20]])}
        assert check_inputs(inputs) == inputs
        assert check_inputs({"images": IMAGES, "image_sizes": None}) == {"images": IMAGES}

    def test_lists_are_refused(self):
        inputs = {"images": IMAGES, "proposals": np.zeros((2, 5, 4))}
        wrong = {"images": IMAGES.tolist(), "image_sizes": [[1, 2], [3, 4]], "proposals": [[]]}
        for name, value in wrong.items():
            message = rf"(?i)^'?{name}'? must be .*; received a list of length {len(value)}"
            with pytest.raises(ValueError, match=message):
                check_inputs(inputs | {name: value}, takes_proposals=True)

    def test_proposals_are_for_models_that_take_them(self):
        inputs = {"images": IMAGES, "proposals": np.zeros((2, 5, 4))}
        assert set(check_inputs(inputs, takes_proposals=True)) == {"images", "proposals"}
        with pytest.raises(ValueError, match=r"received the keys \['images', 'proposals'\]"):
            check_inputs(inputs)
        with pytest.raises(ValueError, match=r"'proposals' .* received the keys \['images'\]"):
            check_inputs(IMAGES, takes_proposals=True)
        with pytest.raises(ValueError, match=r"received shape \(2, 4\)"):
            check_inputs(inputs | {"proposals": np.zeros((2, 4))}, takes_proposals=True)

    def test_symbolic_tensors_are_accepted(self):
        images = keras.KerasTensor((None, None, None, 3), "uint8")
        sizes = keras.KerasTensor((None, 2), "int32")
        inputs = {"images": images, "image_sizes": sizes}
        assert check_inputs(inputs) == inputs

    @pytest.mark.parametrize(
        ("inputs", "error", "message"),
        [
            (
                IMAGES[0],
                ValueError,
                r"received shape \(40, 60, 3\) \(add a batch dimension: images\[None\]\)",
            ),
            (IMAGES[None], ValueError, r"received shape \(1, 2, 40, 60, 3\)\.$"),
            (IMAGES[..., :1], ValueError, r"received shape \(2, 40, 60, 1\)"),
            (np.zeros((2, 40, 60, 4)), ValueError, r"received shape \(2, 40, 60, 4\)"),
            (IMAGES[:, :0], ValueError, r"received shape \(2, 0, 60, 3\)"),
            (IMAGES > 0, TypeError, r"^Images .*received dtype bool"),
            (IMAGES.astype(str), TypeError, r"received dtype str"),
            (None, ValueError, r"^Images .*; received None"),
            (
                {"images": IMAGES, "image_sizes": np.array([[40, 60], [60, 40]])},
                ValueError,
                r"'image_sizes' .*\(40, 60\); received \[60, 40\] for image 1",
            ),
            (
                {"images": IMAGES, "image_sizes": np.zeros((2, 2))},
                ValueError,
                r"received \[0.0, 0.0\]",
            ),
            (
                {"image": IMAGES},
                ValueError,
                r"'images' .*'image_sizes'; received the keys \['image'\]",
            ),
            ({"images": IMAGES, "boxes": 0}, ValueError, r"the keys \['boxes', 'images'\]"),
            (
                {"images": IMAGES, "image_sizes": np.array([40, 60])},
                ValueError,
                r"'image_sizes' .*; received shape \(2,\)",
            ),
            (
                {"images": IMAGES, "image_sizes": np.zeros((2, 3))},
                ValueError,
                r"received shape \(2, 3\)",
            ),
            (
                {"images": IMAGES, "image_sizes": np.zeros((3, 2))},
                ValueError,
                r"'image_sizes' .* 2 images; received 3",
            ),
        ],
    )
    def test_what_is_refused(self, inputs, error, message):
        with pytest.raises(error, match=message):
            check_inputs(inputs)

    def test_a_model_of_one_size_takes_that_size(self):
        check_inputs(IMAGES, (40, None, 3))
        with pytest.raises(ValueError, match=r"\(40, 64, 3\) .*received .*\(2, 40, 60, 3\)"):
            check_inputs(IMAGES, (40, 64, 3))


BOXES = [[[5, 6, 30, 20], [0, 0, 60, 40]], [[1, 1, 2, 2], [0, 0, 0, 0]]]
LABELS = [[0, 2], [1, -1]]


def check(boxes=BOXES, labels=LABELS, box_format="xyxy", image_sizes=None):
    targets = {"boxes": np.array(boxes, "float32"), "labels": np.array(labels)}
    check_targets(targets, IMAGES.shape, image_sizes, 3, box_format)


class TestTargets:
    def test_a_ground_truth_is_accepted(self):
        check()
        check(labels=np.array(LABELS, "float32"))
        check(np.zeros((2, 0, 4)), np.zeros((2, 0)))
        check(np.array(BOXES) / 70, box_format="rel_xyxy")

    def test_optional_fields_of_the_pipeline_are_accepted(self):
        optional = dict.fromkeys(("image_ids", "masks"), np.zeros(2))
        check_targets(targets(**optional), IMAGES.shape, None, 3, "xyxy")

    def test_padding_rows_hold_anything(self):
        check([[[np.nan] * 4, [9, 9, 3, 3]], [[-500, 0, 900, 1], [0, 0, 0, 0]]], [[-1, -1]] * 2)

    def test_a_box_may_stick_out_by_a_rounding(self):
        check([[[-0.5, -1, 60.5, 41]], [[0, 0, 60, 40]]], [[0], [0]])

    @pytest.mark.parametrize(
        "keys", [{"boxes"}, {"boxes", "classes"}, {"boxes", "labels", "keypoints"}]
    )
    def test_the_keys_are_fixed(self, keys):
        targets = dict.fromkeys(keys, np.zeros((2, 1, 4)))
        message = rf"Targets .*; received the keys {re.escape(str(sorted(keys)))}"
        with pytest.raises(ValueError, match=message):
            check_targets(targets, IMAGES.shape, None, 3, "xyxy")

    @pytest.mark.parametrize(
        ("boxes", "labels", "message"),
        [
            (np.zeros((2, 4)), np.zeros(2), r"received shapes \(2, 4\) and \(2,\)"),
            (np.zeros((2, 3, 5)), np.zeros((2, 3)), r"received shapes \(2, 3, 5\) and \(2, 3\)"),
            (np.zeros((2, 3, 4)), np.zeros((2, 2)), r"received shapes \(2, 3, 4\) and \(2, 2\)"),
            (np.zeros((3, 1, 4)), np.zeros((3, 1)), r"Targets .* 2 images; received 3"),
            (BOXES, [[0, 0.5], [1, -1]], r"Labels .*; received dtype float64"),
            (
                BOXES,
                [[0, 2], [3, -1]],
                r"Labels .*0\.\.2 .*; received 3 in image 1",
            ),
            (BOXES, [[-2, 0], [1, -1]], r"received -2 in image 0"),
            (
                [[[5, 6, 30, 20]], [[np.nan, 1, 2, 2]]],
                [[0], [0]],
                r"finite; received \[nan, 1.0, 2.0, 2.0\] in image 1, .*'xyxy'",
            ),
            ([[[5, 6, np.inf, 20]], [[1, 1, 2, 2]]], [[0], [0]], r"finite; received .* in image 0"),
            (
                [[[5, 6, 5, 20]], [[1, 1, 2, 2]]],
                [[0], [0]],
                r"area; received \[5.0, 6.0, 5.0, 20.0\] in image 0, .*'xyxy'",
            ),
            ([[[30, 20, 5, 6]], [[1, 1, 2, 2]]], [[0], [0]], r"area; received .* in image 0"),
            (
                [[[5, 6, 30, 20]], [[0, 0, 60, 60]]],
                [[0], [0]],
                r"`bounding_box_format`.*; received \[0.0, 0.0, 60.0, 60.0\] in image 1, .*'xyxy'",
            ),
            ([[[-20, 0, 30, 20]], [[1, 1, 2, 2]]], [[0], [0]], r"within their image .* in image 0"),
        ],
    )
    def test_what_is_refused(self, boxes, labels, message):
        with pytest.raises(ValueError, match=message):
            check(boxes, labels)

    def test_the_format_counts(self):
        corner = [[[40, 30, 15, 8]]] * 2
        check(corner, [[0]] * 2, "xywh")
        with pytest.raises(ValueError, match=r"area; received .* in image 0, in format 'xyxy'"):
            check(corner, [[0]] * 2, "xyxy")
        with pytest.raises(ValueError, match=r"within their image .*'rel_xyxy'"):
            check([[[5, 6, 30, 20]]] * 2, [[0]] * 2, "rel_xyxy")

    def test_in_a_padded_batch_an_image_has_its_own_size(self):
        with pytest.raises(ValueError, match=r"within their image .* in image 0"):
            check(image_sizes=np.array([[20, 30], [40, 60]]))

    def test_relative_boxes_in_an_absolute_format_are_recognized(self):
        with pytest.raises(ValueError, match=r"'xyxy' .*did you mean 'rel_xyxy'\?"):
            check(np.array(BOXES) / 70)

    def test_degenerate_boxes_may_be_let_through_but_not_wrong_labels(self):
        boxes = np.array([[[np.nan, 1, 2, 2]], [[5, 6, 5, 20]]], "float32")
        for labels in ([[0], [1]], [[0], [3]]):
            targets = {"boxes": boxes, "labels": np.array(labels)}
            if labels[1] == [1]:
                check_targets(targets, IMAGES.shape, None, 3, "xyxy", refuse_degenerate=False)
                continue
            with pytest.raises(ValueError, match="received 3 in image 1"):
                check_targets(targets, IMAGES.shape, None, 3, "xyxy", refuse_degenerate=False)


class Detector:
    takes_proposals = False
    """What the checks want to know of a model."""

    num_classes = 3
    bounding_box_format = "xyxy"
    image_shape = (None, None, 3)


def targets(**changes):
    return {"boxes": np.array(BOXES, "float32"), "labels": np.array(LABELS)} | changes


class TestTrainingData:
    def test_targets_in_memory_are_checked_against_the_images(self):
        check_training_data(Detector(), IMAGES, targets())
        check_training_data(Detector(), iter([]), None)
        with pytest.raises(ValueError, match="received 5 in image 0"):
            check_training_data(Detector(), IMAGES, targets(labels=np.full((2, 2), 5)))
        padded = {"images": IMAGES, "image_sizes": np.array([[40, 60], [1, 1]])}
        with pytest.raises(ValueError, match=r"'image_sizes' .* 3 images; received 2"):
            check_training_data(
                Detector(), padded | {"images": np.zeros((3, 40, 60, 3))}, targets()
            )
        outside = targets()
        outside["boxes"][1, 0] = [1, 1, 9, 9]
        with pytest.raises(ValueError, match=r"within their image .* in image 1"):
            check_training_data(Detector(), padded, outside)

    @pytest.mark.parametrize(
        ("wrong", "received"),
        [
            (np.zeros((2, 1, 4)), "ndarray"),
            (None, "none"),
            ((np.zeros((2, 1, 4)), np.zeros((2, 1))), "tuple"),
        ],
    )
    def test_targets_are_a_dictionary(self, wrong, received):
        with pytest.raises(ValueError, match=rf"\{{'boxes': .*\}}; received {received}"):
            check_training_data(Detector(), IMAGES, wrong)

    @pytest.mark.parametrize(
        ("elements", "message"),
        [
            (IMAGES, r"received elements \(2, 40, 60, 3\)"),
            ((IMAGES, BOXES), r"Targets .*; received TensorSpec"),
            ((IMAGES[0], targets()), r"received shape \(40, 60, 3\)"),
            ((IMAGES, targets(labels=np.full((2, 2), 9))), "received 9 in image 0"),
            ((IMAGES, targets(boxes=np.array(BOXES) / 70)), "did you mean 'rel_xyxy'"),
            ((IMAGES, {"boxes": np.zeros((2, 4)), "labels": np.zeros(2)}), r"shapes \(2, 4\)"),
        ],
    )
    def test_structure_and_first_batch_of_a_data_set_are_checked(self, elements, message):
        tf = pytest.importorskip("tensorflow")
        check_training_data(Detector(), tf.data.Dataset.from_tensors((IMAGES, targets())), None)
        with pytest.raises(ValueError, match=message):
            check_training_data(Detector(), tf.data.Dataset.from_tensors(elements), None)
