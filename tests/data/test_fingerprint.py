"""The fingerprint of a split is that of its images' index and annotations, wherever they are."""

import shutil

import numpy as np
import pytest

from keras_fpn.data import load_dataset
from keras_fpn.data.fingerprint import fingerprint
from keras_fpn.data.stored_proposals import Proposals, with_proposals

BOX = [1, 2, 10, 12]


@pytest.fixture
def of(tmp_path, coco_folder):
    """Fingerprint of a folder with two images and the objects given."""

    def of_folder(objects, names=("a.png", "b.png")):
        shutil.rmtree(tmp_path / "coco_layout", ignore_errors=True)
        return fingerprint(load_dataset(coco_folder(dict.fromkeys(names, b""), objects), "train"))

    return of_folder


def test_it_changes_with_annotations_names_and_the_number_of_images(of):
    objects = [{"image_id": 10, "bbox": BOX}]
    first = of(objects)
    assert first == of(objects)
    others = [
        of([{"image_id": 20, "bbox": BOX}]),
        of([{"image_id": 10, "bbox": [1, 2, 10, 13]}]),
        of([{"image_id": 10, "bbox": BOX, "category_id": 7}]),
        of([{"image_id": 10, "bbox": BOX, "iscrowd": 1}]),
        of(objects, names=("a.png", "c.png")),
        of(objects, names=("a.png",)),
    ]
    assert len({x["digest"] for x in [first, *others]}) == 7
    assert (first["images"], others[-1]["images"]) == (2, 1)


def test_it_does_not_change_with_the_path(tmp_path, coco_folder):
    first = coco_folder({"a.png": b""})
    second = shutil.copytree(first, tmp_path / "copy")
    assert fingerprint(load_dataset(first, "train")) == fingerprint(
        load_dataset(str(second), "train")
    )


def test_that_of_a_tfds_split_changes_with_the_slice(shapes_dir):
    splits = ("train", "train[:5]", "train[5:]", "validation")
    found = [fingerprint(load_dataset("keras_fpn_shapes", x, str(shapes_dir))) for x in splits]
    assert [x["images"] for x in found] == [10, 5, 5, 4]
    assert len({x["digest"] for x in found}) == 4
    assert found[0] == fingerprint(load_dataset("keras_fpn_shapes", "train", str(shapes_dir)))


def test_stored_proposals_are_part_of_it(coco_folder):
    dataset = load_dataset(coco_folder({"a.png": b""}), "train")
    box = np.array([BOX], "float32")
    with_boxes = [
        fingerprint(with_proposals(dataset, Proposals.from_images([10], [boxes], [np.ones(1)])))
        for boxes in (box, box, box + 1)
    ]
    assert with_boxes[0] == with_boxes[1] != with_boxes[2]
    assert fingerprint(dataset)["digest"] != with_boxes[0]["digest"]
