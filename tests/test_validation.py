import re

import keras
import numpy as np
import pytest
from keras.ops import convert_to_numpy

from keras_fpn.validation import check_images, check_targets, check_training_data

IMAGES = np.zeros((2, 40, 60, 3), "uint8")


class TestImages:
    @pytest.mark.parametrize("dtype", ["uint8", "int32", "float16", "float32", "float64"])
    def test_a_batch_of_numbers_is_accepted(self, dtype):
        images, sizes = check_images(IMAGES.astype(dtype))
        assert images.dtype == dtype
        assert sizes is None

    def test_a_dictionary_is_split(self):
        sizes = np.array([[40, 60], [30, 20]])
        images, found = check_images({"images": IMAGES, "image_sizes": sizes})
        assert images is IMAGES
        assert found is sizes
        assert check_images({"images": IMAGES})[1] is None

    def test_lists_become_tensors(self):
        images, sizes = check_images({"images": IMAGES.tolist(), "image_sizes": [[1, 2], [3, 4]]})
        assert images.dtype.kind == "i"
        assert tuple(images.shape) == IMAGES.shape
        np.testing.assert_array_equal(convert_to_numpy(sizes), [[1, 2], [3, 4]])

    def test_symbolic_tensors_are_accepted(self):
        images = keras.KerasTensor((None, None, None, 3), "uint8")
        sizes = keras.KerasTensor((None, 2), "int32")
        assert check_images({"images": images, "image_sizes": sizes}) == (images, sizes)

    @pytest.mark.parametrize(
        ("inputs", "error", "message"),
        [
            (
                IMAGES[0],
                ValueError,
                r"a batch \[batch, height, width, 3\] of RGB pixels; received shape "
                r"\(40, 60, 3\) \(add a batch dimension: images\[None\]\)",
            ),
            (IMAGES[None], ValueError, r"received shape \(1, 2, 40, 60, 3\)\.$"),
            (IMAGES[..., :1], ValueError, r"RGB pixels; received shape \(2, 40, 60, 1\)"),
            (np.zeros((2, 40, 60, 4)), ValueError, r"received shape \(2, 40, 60, 4\)"),
            (IMAGES[:, :0], ValueError, r"at least one pixel; received shape \(2, 0, 60, 3\)"),
            (IMAGES > 0, TypeError, r"numbers in 0..255; received dtype bool"),
            (IMAGES.astype(str), TypeError, r"numbers in 0..255; received dtype <U3"),
            (None, ValueError, r"Images are wanted, .*; received None"),
            (
                {"images": IMAGES, "image_sizes": np.array([[40, 60], [60, 40]])},
                ValueError,
                r"within the batch's \(40, 60\); received \[60, 40\] for image 1",
            ),
            (
                {"images": IMAGES, "image_sizes": np.zeros((2, 2))},
                ValueError,
                r"received \[0.0, 0.0\]",
            ),
            (
                {"image": IMAGES},
                ValueError,
                r"the keys 'images' and, for a padded batch, 'image_sizes'; "
                r"received the keys \['image'\]",
            ),
            ({"images": IMAGES, "boxes": 0}, ValueError, r"the keys \['boxes', 'images'\]"),
            (
                {"images": IMAGES, "image_sizes": np.array([40, 60])},
                ValueError,
                r"height and width of each image, \[batch, 2\]; received shape \(2,\)",
            ),
            (
                {"images": IMAGES, "image_sizes": np.zeros((2, 3))},
                ValueError,
                r"received shape \(2, 3\)",
            ),
            (
                {"images": IMAGES, "image_sizes": np.zeros((3, 2))},
                ValueError,
                r"Received 2 images and 'image_sizes' of 3; one row for each image is wanted",
            ),
        ],
    )
    def test_what_is_refused(self, inputs, error, message):
        with pytest.raises(error, match=message):
            check_images(inputs)

    def test_a_model_of_one_size_takes_that_size(self):
        check_images(IMAGES, (40, None, 3))
        with pytest.raises(ValueError, match=r"built for images of shape \(40, 64, 3\)"):
            check_images(IMAGES, (40, 64, 3))


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

    def test_padding_rows_hold_anything(self):
        check([[[np.nan] * 4, [9, 9, 3, 3]], [[-500, 0, 900, 1], [0, 0, 0, 0]]], [[-1, -1]] * 2)

    def test_a_box_may_stick_out_by_a_rounding(self):
        check([[[-0.5, -1, 60.5, 41]], [[0, 0, 60, 40]]], [[0], [0]])

    @pytest.mark.parametrize(
        "keys", [{"boxes"}, {"boxes", "classes"}, {"boxes", "labels", "masks"}]
    )
    def test_the_keys_are_fixed(self, keys):
        targets = dict.fromkeys(keys, np.zeros((2, 1, 4)))
        message = rf"Targets are .*; received the keys {re.escape(str(sorted(keys)))}"
        with pytest.raises(ValueError, match=message):
            check_targets(targets, IMAGES.shape, None, 3, "xyxy")

    @pytest.mark.parametrize(
        ("boxes", "labels", "message"),
        [
            (np.zeros((2, 4)), np.zeros(2), r"received shapes \(2, 4\) and \(2,\)"),
            (np.zeros((2, 3, 5)), np.zeros((2, 3)), r"received shapes \(2, 3, 5\) and \(2, 3\)"),
            (np.zeros((2, 3, 4)), np.zeros((2, 2)), r"received shapes \(2, 3, 4\) and \(2, 2\)"),
            (np.zeros((3, 1, 4)), np.zeros((3, 1)), r"Received 2 images and boxes of 3"),
            (BOXES, [[0, 0.5], [1, -1]], r"whole numbers; received dtype float64 with fractions"),
            (
                BOXES,
                [[0, 2], [3, -1]],
                r"in 0..2, or -1 for padding, in a model of 3 classes; received 3 in image 1",
            ),
            (BOXES, [[-2, 0], [1, -1]], r"received -2 in image 0"),
            (
                [[[5, 6, 30, 20]], [[np.nan, 1, 2, 2]]],
                [[0], [0]],
                r"Box \[nan, 1.0, 2.0, 2.0\] of image 1 is not finite \(format 'xyxy'\)",
            ),
            ([[[5, 6, np.inf, 20]], [[1, 1, 2, 2]]], [[0], [0]], r"of image 0 is not finite"),
            (
                [[[5, 6, 5, 20]], [[1, 1, 2, 2]]],
                [[0], [0]],
                r"Box \[5.0, 6.0, 5.0, 20.0\] of image 0 has no area \(format 'xyxy'\)",
            ),
            ([[[30, 20, 5, 6]], [[1, 1, 2, 2]]], [[0], [0]], r"of image 0 has no area"),
            (
                [[[5, 6, 30, 20]], [[0, 0, 60, 60]]],
                [[0], [0]],
                r"Box \[0.0, 0.0, 60.0, 60.0\] of image 1 lies outside its image: is "
                r"`bounding_box_format` right\? \(format 'xyxy'\)",
            ),
            ([[[-20, 0, 30, 20]], [[1, 1, 2, 2]]], [[0], [0]], r"of image 0 lies outside"),
        ],
    )
    def test_what_is_refused(self, boxes, labels, message):
        with pytest.raises(ValueError, match=message):
            check(boxes, labels)

    def test_the_format_counts(self):
        corner = [[[40, 30, 15, 8]]] * 2
        check(corner, [[0]] * 2, "xywh")
        with pytest.raises(ValueError, match=r"has no area \(format 'xyxy'\)"):
            check(corner, [[0]] * 2, "xyxy")
        with pytest.raises(ValueError, match=r"lies outside its image.*\(format 'rel_xyxy'\)"):
            check([[[5, 6, 30, 20]]] * 2, [[0]] * 2, "rel_xyxy")

    def test_in_a_padded_batch_an_image_has_its_own_size(self):
        with pytest.raises(ValueError, match="of image 0 lies outside its image"):
            check(image_sizes=np.array([[20, 30], [40, 60]]))

    def test_relative_boxes_in_an_absolute_format_are_recognised(self):
        with pytest.raises(ValueError, match=r"within one pixel.*are they 'rel_xyxy'\?"):
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
        with pytest.raises(ValueError, match=r"Received 3 images and 'image_sizes' of 2"):
            check_training_data(
                Detector(), padded | {"images": np.zeros((3, 40, 60, 3))}, targets()
            )
        outside = targets()
        outside["boxes"][1, 0] = [1, 1, 9, 9]
        with pytest.raises(ValueError, match="of image 1 lies outside its image"):
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
            (IMAGES, r"yields pairs .*; received elements \(2, 40, 60, 3\)"),
            ((IMAGES, BOXES), r"Targets are .*; received TensorSpec"),
            ((IMAGES[0], targets()), r"received shape \(40, 60, 3\)"),
            ((IMAGES, targets(labels=np.full((2, 2), 9))), "received 9 in image 0"),
            ((IMAGES, targets(boxes=np.array(BOXES) / 70)), "are they 'rel_xyxy'"),
            ((IMAGES, {"boxes": np.zeros((2, 4)), "labels": np.zeros(2)}), r"shapes \(2, 4\)"),
        ],
    )
    def test_structure_and_first_batch_of_a_data_set_are_checked(self, elements, message):
        tf = pytest.importorskip("tensorflow")
        check_training_data(Detector(), tf.data.Dataset.from_tensors((IMAGES, targets())), None)
        with pytest.raises(ValueError, match=message):
            check_training_data(Detector(), tf.data.Dataset.from_tensors(elements), None)
