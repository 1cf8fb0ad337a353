"""What the evaluation of a split collects, from one device or two, at one scale or several."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from data_sets import encode, write_coco_folder
from small_detector import copy_stages, tiny_detector, tiny_fast_rcnn, tiny_rpn

from keras_fpn.data.coco_metrics import coco_evaluation
from keras_fpn.data.datasets import load_dataset
from keras_fpn.data.proposal_metrics import PROPOSAL_METRICS, proposal_evaluation
from keras_fpn.data.stored_proposals import read_proposals, with_proposals, write_proposals
from keras_fpn.image_pyramid import merge_scales
from keras_fpn.runs import evaluation as runs_evaluation
from keras_fpn.runs.evaluation import Evaluation

BROKEN = 40
# Images of 48 x 64 pixels are resized to 72 x 96.
EDGES = {"shorter_edge": 72, "longest_edge": 96}

pytestmark = pytest.mark.usefixtures("module_runs_eagerly")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Three images and a file that is not an image, with two objects each."""
    random = np.random.RandomState(0)
    files, objects = {}, []
    for i in range(3):
        files[f"{i}.png"] = encode(random.randint(0, 256, (48, 64, 3)).astype("uint8"))
    files["broken.png"] = b"this is not an image"
    for image_id in range(10, 50, 10):
        for category_id in (3, 7):
            x, y, width, height = (
                random.randint(0, 25, 2).tolist() + random.randint(15, 24, 2).tolist()
            )
            objects.append(
                {
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": [x, y, width, height],
                    "area": width * height,
                }
            )
    folder = write_coco_folder(tmp_path_factory.mktemp("evaluation"), files, objects, (48, 64))
    return load_dataset(folder, "train")


@pytest.fixture(scope="module")
def faster():
    keras.utils.set_random_seed(0)
    return tiny_detector(num_classes=2, proposals={"post_nms": 20})


@pytest.fixture(scope="module")
def rpn(faster):
    model = tiny_rpn(proposals={"post_nms": 20})
    copy_stages(faster, model)
    return model


@pytest.fixture(scope="module")
def evaluation(rpn, dataset):
    return Evaluation(rpn, dataset, 4, **EDGES)


@pytest.fixture(scope="module")
def proposals(evaluation):
    """The metrics and the proposals of `evaluation`."""
    (metrics, _), found = evaluation.run()
    return metrics, found


def test_proposals_are_those_of_the_model_in_pixels_of_the_resized_image(
    proposals, rpn, evaluation
):
    _, found = proposals
    assert found.image_ids.tolist() == [10, 20, 30, BROKEN]
    assert found.frames.tolist() == [[72, 96]] * 3 + [[0, 0]]
    for inputs, info in evaluation.batches[0]:
        outputs = {name: x.numpy() for name, x in rpn(inputs).items()}
        for image, image_id in enumerate(info["image_ids"].numpy()):
            index = found.image_ids.tolist().index(image_id)
            rows = slice(*found.row_splits[index : index + 2])
            real = outputs["scores"][image] >= 0
            for name in ("boxes", "scores"):
                expected = outputs[name][image][real]
                np.testing.assert_allclose(getattr(found, name)[rows], expected, atol=1e-3)


def test_an_image_that_cannot_be_read_has_no_proposals(proposals):
    _, found = proposals
    assert found.row_splits[-1] == found.row_splits[-2] == len(found.boxes) > 0


def test_proposals_alone_are_not_evaluated(evaluation, monkeypatch):
    monkeypatch.setattr(runs_evaluation, "proposal_evaluation", None)
    monkeypatch.setattr(evaluation, "ground_truth", evaluation.ground_truth)
    monkeypatch.setattr(evaluation, "_outputs", lambda batches: iter(()))
    assert evaluation.proposals().image_ids.tolist() == [10, 20, 30, BROKEN]


def test_fast_rcnn_on_stored_proposals_detects_what_faster_rcnn_does(
    faster, proposals, dataset, tmp_path
):
    # With as many rows, products of matrices are rounded in the same way.
    assert np.diff(proposals[1].row_splits).max() == faster.proposals.post_nms == 20
    write_proposals(tmp_path / "proposals.npz", proposals[1])
    stored = with_proposals(dataset, read_proposals(tmp_path / "proposals.npz"))
    fast = tiny_fast_rcnn(num_classes=2)
    copy_stages(faster, fast)
    (expected, _), detections = Evaluation(faster, dataset, 4, **EDGES).run()
    (metrics, _), found = Evaluation(fast, stored, 2, **EDGES).run()
    assert len({x["image_id"] for x in found}) == 3
    assert found == detections  # Bit for bit.
    assert metrics == expected


def test_two_devices_find_what_one_does(proposals, rpn, dataset):
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model = tiny_rpn(proposals={"post_nms": 20})
        model.set_weights(rpn.get_weights())
    (of_two, _), found = Evaluation(model, dataset, 4, **EDGES).run()
    metrics, expected = proposals
    assert of_two == pytest.approx(metrics, abs=1e-9)
    assert set(metrics) == set(PROPOSAL_METRICS)
    assert 0 < metrics["AR1k"] < 1
    for name in ("image_ids", "frames", "row_splits"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-3)


def part_of(dataset, first, end):
    """The images of a split from `first` to `end`."""
    splits = dataset.row_splits[first : end + 1]
    of_images, of_objects = slice(first, end), slice(splits[0], splits[-1])
    parts = {x: getattr(dataset, x)[of_images] for x in ("image_ids", "file_names", "sizes")}
    for name in ("boxes", "labels", "is_crowd", "areas"):
        parts[name] = getattr(dataset, name)[of_objects]
    splits = splits - splits[0]
    return dataclasses.replace(dataset, num_images=end - first, row_splits=splits, **parts)


def test_objects_of_images_that_cannot_be_read_are_not_misses(
    faster, rpn, dataset, proposals, capsys
):
    intact = part_of(dataset, 0, 3).coco_ground_truth()
    evaluation = Evaluation(faster, dataset, 4, **EDGES)
    capsys.readouterr()
    (metrics, _), found = evaluation.run()
    assert "broken.png (not a JPEG" in capsys.readouterr().out
    assert metrics == coco_evaluation(intact, found).metrics
    assert metrics != coco_evaluation(dataset.coco_ground_truth(), found).metrics
    assert evaluation.ground_truth == intact
    assert proposals[0] == proposal_evaluation(intact, proposals[1])
    assert proposals[0] != proposal_evaluation(dataset.coco_ground_truth(), proposals[1])


def test_a_split_without_a_readable_image_has_no_metrics(faster, dataset):
    (metrics, _), found = Evaluation(faster, part_of(dataset, 3, 4), 4, **EDGES).run()
    assert found == []
    assert set(metrics.values()) == {-1}


def of_image(results, image_id):
    """Results in COCO's format as detections of one image."""
    own = [x for x in results if x["image_id"] == image_id]
    boxes = np.array([x["bbox"] for x in own])
    boxes[:, 2:] += boxes[:, :2]
    return {
        "boxes": boxes,
        "scores": np.array([x["score"] for x in own]),
        "labels": np.array([[7, 3].index(x["category_id"]) for x in own]),
    }


def test_scales_are_merged_image_by_image(faster, dataset):
    scales = Evaluation(faster, dataset, 4, (48, 72), 96, merge="vote")
    _, merged = scales.run()
    # The same scales one by one.
    one_by_one = []
    for batches in list(scales.batches):
        scales.batches = [batches]
        one_by_one.append(scales.run()[1])
    assert {x["image_id"] for x in merged} == {10, 20, 30}
    for image_id in (10, 20, 30):
        wanted = merge_scales(
            [of_image(results, image_id) for results in one_by_one],
            nms_iou_threshold=0.5,
            max_detections=20,
            method="vote",
        )
        found = of_image(merged, image_id)
        for name, values in wanted.items():
            np.testing.assert_allclose(found[name], values, atol=1e-4, err_msg=name)


def test_several_scales_are_for_faster_rcnn_alone(rpn, dataset):
    message = r"Only a FasterRCNN .* received \[48, 72\] for a RegionProposalNetwork"
    with pytest.raises(ValueError, match=message):
        Evaluation(rpn, dataset, 4, (48, 72), 96)
    with pytest.raises(ValueError, match="`merge` must be one of 'nms', 'vote'; received 'vot'"):
        Evaluation(rpn, dataset, 4, 48, 96, merge="vot")
