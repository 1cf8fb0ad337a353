"""Reading folders in COCO's layout and TFDS data sets."""

import io
import json
import math
import os
import pathlib
import shutil

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from keras_fpn.data.datasets import load_dataset


def read(dataset, *arguments):
    return list(dataset.records(*arguments).as_numpy_iterator())


def ids_with_objects(dataset, *arguments):
    records = dataset.records_with_objects(*arguments).as_numpy_iterator()
    return [record["image_id"] for record in records]


def prepare_tfds(name, data_dir, examples, split="train"):
    """Has TFDS write `examples` as the data set `name`, without downloading."""
    builder = tfds.builder(name, data_dir=str(data_dir))
    builder._split_generators = lambda manager: {split: iter(enumerate(examples))}
    tfds.disable_progress_bar()
    builder.download_and_prepare()


# === A folder in COCO's layout ===


def test_records_of_a_folder_match_its_annotations(coco_folder, plain):
    objects = [
        {"image_id": 20, "bbox": [6, 4, 30, 20], "category_id": 7, "area": 431.5},
        {"image_id": 10, "bbox": [0, 0, 60, 40], "category_id": 3, "iscrowd": 1},
        {"image_id": 20, "bbox": [0, 0, 15, 10], "category_id": 3},
    ]
    files = {"a.png": plain(1), "b.png": plain(2), "c.png": plain(3)}
    dataset = load_dataset(coco_folder(files, objects), "train")
    assert dataset.class_names == ["cat", "dog"]
    assert dataset.category_ids == [3, 7]
    assert dataset.num_images == 3

    first, second, third = read(dataset)
    assert [r["image_id"] for r in (first, second, third)] == [10, 20, 30]
    assert second["file_name"] == b"b.png"
    assert second["image_bytes"] == files["b.png"]
    assert second["size"].tolist() == [40, 60]
    np.testing.assert_allclose(second["boxes"], [[0.1, 0.1, 0.6, 0.6], [0, 0, 0.25, 0.25]])
    assert second["labels"].tolist() == [1, 0]
    assert second["area"][0] == 431.5
    assert math.isnan(second["area"][1])
    assert first["is_crowd"].tolist() == [True]
    assert third["boxes"].shape == (0, 4)


def test_the_ground_truth_of_a_folder_is_in_original_pixels(coco_folder, plain):
    objects = [
        {"image_id": 20, "bbox": [6.5, 4, 30, 20], "category_id": 7, "area": 431.5},
        {"image_id": 10, "bbox": [1, 2, 8, 5], "iscrowd": 1},
        {"image_id": 10, "bbox": [1, 2, 0, 5]},
        {"image_id": 10, "bbox": [1, 2, math.nan, 5]},
    ]
    folder = coco_folder({"a.png": plain(1), "b.png": plain(2)}, objects)
    truth = load_dataset(folder, "train").coco_ground_truth()
    assert truth["images"] == [
        {"id": 10, "file_name": "a.png", "height": 40, "width": 60},
        {"id": 20, "file_name": "b.png", "height": 40, "width": 60},
    ]
    assert truth["categories"] == [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    assert truth["annotations"] == [
        {"id": 1, "image_id": 10, "category_id": 3, "bbox": [1, 2, 8, 5], "area": 40, "iscrowd": 1},
        {
            "id": 2,
            "image_id": 20,
            "category_id": 7,
            "bbox": [6.5, 4, 30, 20],
            "area": 431.5,
            "iscrowd": 0,
        },
    ]


def test_a_missing_annotated_size_is_read_from_the_header(coco_folder, plain):
    images = [{"id": 1, "file_name": "a.png"}]
    objects = [{"image_id": 1, "bbox": [6, 4, 30, 20]}]
    folder = coco_folder({"a.png": plain(1, 20, 30)}, objects, images=images)
    [record] = read(load_dataset(folder, "train"))
    assert record["size"].tolist() == [20, 30]
    np.testing.assert_allclose(record["boxes"], [[0.2, 0.2, 1.2, 1.2]])


def test_the_order_is_a_function_of_the_seed_alone(coco_folder, plain, shapes_dir):
    folder = load_dataset(coco_folder({f"{i}.png": plain(i) for i in range(10)}), "train")
    shapes = load_dataset("keras_fpn_shapes", "train", str(shapes_dir))
    for dataset in (folder, shapes):
        in_order = [r["image_id"] for r in read(dataset)]
        tf.random.set_seed(1)
        one = [r["image_id"] for r in read(dataset, tf.constant([3, 4]))]
        tf.random.set_seed(2)
        again = [r["image_id"] for r in read(dataset, tf.constant([3, 4]))]
        other = [r["image_id"] for r in read(dataset, tf.constant([3, 5]))]
        assert one == again
        assert one != other
        assert one != in_order
        assert sorted(one) == sorted(other) == sorted(in_order)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"annotations": None}, ValueError, "'annotations'"),
        ({"images": []}, ValueError, "0 images"),
        ({"images": [{"id": "one", "file_name": "a.png"}]}, ValueError, "'id' 'one'"),
        ({"images": [{"id": 1, "file_name": "a.png"}] * 2}, ValueError, "more than one image"),
        ({"images": [{"id": 1, "file_name": "z.png"}]}, FileNotFoundError, r"1 of the 1 .*'z\.png"),
        ({"annotations": [{"id": 5, "image_id": 10}]}, ValueError, "annotation 5 .* 'category_id'"),
        (
            {"annotations": [{"id": 5, "image_id": 11, "category_id": 3, "bbox": [1, 2, 3, 4]}]},
            ValueError,
            "annotation 5 .* 'image_id' 11;",
        ),
        (
            {"annotations": [{"id": 5, "image_id": 10, "category_id": 4, "bbox": [1, 2, 3, 4]}]},
            ValueError,
            "annotation 5 .* 'category_id' 4;",
        ),
        (
            {"annotations": [{"id": 5, "image_id": 10, "category_id": 3, "bbox": [1, 2, 3]}]},
            ValueError,
            r"'bbox' \[1, 2, 3\]",
        ),
        (
            {"annotations": [{"id": 5, "image_id": 10, "category_id": 3, "bbox": [1, 2, 3, "4"]}]},
            ValueError,
            r"'bbox' \[1, 2, 3, '4'\]",
        ),
    ],
)
def test_annotations_in_another_format_are_rejected(coco_folder, plain, changes, error, message):
    folder = coco_folder({"a.png": plain(1)}, **changes)
    with pytest.raises(error, match=message):
        load_dataset(folder, "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [', "JSON"),
        (100_000 * '{"images": [', "nested too deeply"),
        ("[1, 2]", "'images'.* list"),
        ('{"captions": []}', r"\['captions'\]"),
    ],
)
def test_an_annotation_file_of_another_kind_is_rejected(coco_folder, plain, content, message):
    folder = coco_folder({"a.png": plain(1)})
    pathlib.Path(folder, "annotations", "instances_train.json").write_text(content)
    with pytest.raises(ValueError, match=rf"instances_train\.json'? .*{message}"):
        load_dataset(folder, "train")


VALID = {
    "images": {"id": 10, "file_name": "a.png", "height": 40, "width": 60},
    "annotations": {"id": 5, "image_id": 10, "category_id": 3, "bbox": [1, 2, 3, 4]},
    "categories": {"id": 3, "name": "cat"},
}
HUGE = 10**400


@pytest.mark.parametrize(
    ("where", "key", "values"),
    [
        ("images", "id", [None, 1.5, True, "1", 2**63, -(2**63) - 1, HUGE]),
        ("images", "file_name", [None, 3, ["a.png"], "/a.png", "../a.png", "b/../../a.png"]),
        ("images", "file_name", ["\ud800.png"]),  # Half of a surrogate pair.
        ("images", "height", ["40", -40, 40.5, True, math.nan, math.inf, 2**31, HUGE, [40]]),
        ("images", "width", [-60, HUGE]),
        ("annotations", "image_id", [None, True, "10", math.nan, 2**63, HUGE, [10], {}]),
        ("annotations", "category_id", [None, True, "3", math.inf, -HUGE, [3]]),
        ("annotations", "bbox", [None, 4, "1234", {}, [1, 2, 3, True], [1, 2, 3, None]]),
        ("annotations", "bbox", [[1, 2, 3, HUGE], [1, 2, 3, [4]], [1, 2, 3, 4, 5]]),
        ("annotations", "iscrowd", ["0", "1", 2, -1, 0.5, math.nan, HUGE, []]),
        ("annotations", "area", ["12", -1, math.inf, 1e39, HUGE, False, [12]]),
        ("categories", "id", [None, 1.5, False, "3", 2**63, HUGE]),
        ("categories", "name", [None, 3, ["cat"], "\ud800"]),
    ],
)
def test_a_value_that_a_field_cannot_have_is_named_with_its_file(
    coco_folder, plain, where, key, values
):
    file = pathlib.Path(coco_folder({"a.png": plain(1)}), "annotations", "instances_train.json")
    for value in values:
        content = {name: [fields] for name, fields in VALID.items()}
        content[where] = [VALID[where] | {key: value}]
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"{file.name} has '{key}' .*; expected ") as caught:
            load_dataset(str(file.parents[1]), "train")
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("key", ["id", "name"])
def test_what_must_be_unique_is_not_repeated(coco_folder, plain, key):
    file = pathlib.Path(coco_folder({"a.png": plain(1)}), "annotations", "instances_train.json")
    other = {"id": 6, "name": "dog"}
    for where, what in (("annotations", "annotation"), ("categories", "category")):
        if key in VALID[where]:
            rows = [VALID[where], VALID[where] | {x: other[x] for x in other if x != key}]
            file.write_text(json.dumps({name: [x] for name, x in VALID.items()} | {where: rows}))
            message = rf"{file.name} has more than one {what} with {key} {VALID[where][key]!r}\."
            with pytest.raises(ValueError, match=message):
                load_dataset(str(file.parents[1]), "train")


def test_optional_fields_may_be_null_or_of_another_number_type(coco_folder, plain):
    nothing = {"iscrowd": None, "area": None}
    objects = [
        {"image_id": 10.0, "bbox": [1, 2, 3, 4], "iscrowd": False, "area": math.nan},
        {"image_id": 20, "bbox": [1, 2, 3, 4], **nothing},
    ]
    images = [
        {"id": 10, "file_name": "./a.png", "height": 40.0, "width": 60},
        {"id": 20, "file_name": "b.png", "height": None, "width": 0},
    ]
    folder = coco_folder({"a.png": plain(1), "b.png": plain(2)}, objects, images=images)
    truth = load_dataset(folder, "train").coco_ground_truth()
    assert [(x["height"], x["width"]) for x in truth["images"]] == [(40, 60)] * 2
    assert [(x["area"], x["iscrowd"]) for x in truth["annotations"]] == [(12, 0)] * 2


def test_what_is_not_a_file_is_missing(coco_folder, plain):
    names = ["link.png", "dangling.png", "loop.png", "folder.png", "pipe.png", 300 * "a", "a\0.png"]
    names += ["", "a.png/"]
    images = [{"id": i, "file_name": name} for i, name in enumerate(["a.png", *names])]
    folder = coco_folder({"a.png": plain(1)}, images=images)
    train = pathlib.Path(folder, "train")
    (train / "link.png").symlink_to("a.png")
    (train / "dangling.png").symlink_to("nowhere.png")
    (train / "loop.png").symlink_to("loop.png")
    (train / "folder.png").mkdir()
    os.mkfifo(train / "pipe.png")
    with pytest.raises(
        FileNotFoundError, match=r"8 of the 10 .* 'dangling.png', 'loop.png', 'folder.png', \.\.\."
    ):
        load_dataset(folder, "train")


def test_records_with_objects_alone_keep_their_order_and_read_no_other_file(coco_folder, plain):
    objects = [{"image_id": i, "bbox": [1, 2, 3, 4], "iscrowd": int(i == 30)} for i in (20, 30, 50)]
    folder = coco_folder({f"{i}.png": plain(i) for i in range(1, 7)}, objects)
    dataset = load_dataset(folder, "train")
    seed = tf.constant([1, 2])
    whole = [record["image_id"] for record in read(dataset, seed)]
    for i in (1, 3, 4, 6):
        pathlib.Path(folder, "train", f"{i}.png").unlink()
    found = ids_with_objects(dataset, seed)
    assert found == [image_id for image_id in whole if image_id in (20, 50)]
    assert ids_with_objects(dataset) == [20, 50]


def test_a_folder_in_another_layout_is_rejected(coco_folder, plain, tmp_path):
    folder = coco_folder({"a.png": plain(1)})
    with pytest.raises(ValueError, match=r"split 'trian'.* train"):
        load_dataset(folder, "trian")
    with pytest.raises(ValueError, match=f"`data_dir`.*{tmp_path}"):
        load_dataset(folder, "train", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"/train'.* annotations/.* a\.png"):
        load_dataset(f"{folder}/train", "train")
    with pytest.raises(NotADirectoryError, match=r"a\.png"):
        load_dataset(f"{folder}/train/a.png", "train")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_dataset(str(tmp_path / "nowhere"), "train")
    shutil.rmtree(f"{folder}/train")
    with pytest.raises(FileNotFoundError, match="coco_layout/train "):
        load_dataset(folder, "train")


# === TensorFlow Datasets ===


def test_coco_from_tfds_equals_coco_from_a_folder(coco_folder, encode, tmp_path):
    random = np.random.default_rng(0)
    file = encode(random.integers(0, 256, (40, 60, 3), np.uint8), "JPEG")
    # A stop sign has label 11 and category id 13, since id 12 is unused; a toothbrush 79 and 90.
    boxes, labels, ids = [[6, 4, 30, 20], [1.5, 2, 3, 4]], [11, 79], [13, 90]
    objects = [
        {"image_id": 10, "bbox": box, "category_id": category, "area": 50, "iscrowd": crowd}
        for box, category, crowd in zip(boxes, ids, (0, 1), strict=True)
    ]
    names = tfds.builder("coco/2017", data_dir=str(tmp_path)).info.features["objects"]["label"]
    categories = [{"id": i, "name": names.int2str(n)} for n, i in zip(labels, ids, strict=True)]
    folder = load_dataset(coco_folder({"a.jpg": file}, objects, categories=categories), "train")
    prepare_tfds(
        "coco/2017",
        tmp_path,
        [
            {
                "image": io.BytesIO(file),
                "image/filename": "a.jpg",
                "image/id": 10,
                "objects": [
                    {
                        "area": 50,
                        "bbox": tfds.features.BBox(
                            ymin=y / 40, xmin=x / 60, ymax=(y + h) / 40, xmax=(x + w) / 60
                        ),
                        "id": 0,
                        "is_crowd": bool(crowd),
                        "label": label,
                    }
                    for (x, y, w, h), label, crowd in zip(boxes, labels, (0, 1), strict=True)
                ],
            }
        ],
    )
    from_tfds = load_dataset("coco/2017", "train", str(tmp_path))
    assert len(from_tfds.category_ids) == 80
    assert [from_tfds.category_ids[label] for label in (0, *labels)] == [1, 13, 90]

    [record], [expected] = read(from_tfds), read(folder)
    assert record["labels"].tolist() == labels
    for key in ("image_id", "file_name", "image_bytes", "is_crowd", "area"):
        np.testing.assert_array_equal(record[key], expected[key])
    np.testing.assert_allclose(record["boxes"], expected["boxes"], atol=1e-6)

    truth, expected = from_tfds.coco_ground_truth(), folder.coco_ground_truth()
    assert truth["images"] == expected["images"]
    for one, other in zip(truth["annotations"], expected["annotations"], strict=True):
        assert one.pop("bbox") == pytest.approx(other.pop("bbox"), abs=1e-4)
        assert one == other


def test_difficult_objects_of_voc_count_as_crowds(plain, tmp_path):
    objects = [
        {
            "bbox": tfds.features.BBox(ymin=0.1, xmin=0.2, ymax=0.5, xmax=0.4),
            "is_difficult": is_difficult,
            "is_truncated": False,
            "label": "dog",
            "pose": "left",
        }
        for is_difficult in (False, True)
    ]
    example = {
        "image": io.BytesIO(plain(1)),
        "image/filename": "000005.jpg",
        "labels": ["dog"],
        "labels_no_difficult": ["dog"],
        "objects": objects,
    }
    prepare_tfds("voc/2007", tmp_path, [example, example | {"objects": []}])
    dataset = load_dataset("voc/2007", "train", str(tmp_path))
    assert dataset.category_ids == list(range(1, 21))
    # VOC has no image ids, so they are positions in the split.
    records = read(dataset)
    assert sorted(r["image_id"] for r in records) == [0, 1]
    [record] = [r for r in records if len(r["labels"])]
    assert record["is_crowd"].tolist() == [False, True]
    # The other image has no objects.
    assert ids_with_objects(dataset) == [record["image_id"]]
    assert np.isnan(record["area"]).all()
    annotations = dataset.coco_ground_truth()["annotations"]
    assert [a["iscrowd"] for a in annotations] == [0, 1]
    assert annotations[0]["bbox"] == pytest.approx([12, 4, 12, 16], abs=1e-4)
    assert annotations[0]["area"] == pytest.approx(192, abs=1e-3)


def test_a_slice_of_a_split(shapes_dir):
    whole = load_dataset("keras_fpn_shapes", "train", str(shapes_dir))
    part = load_dataset("keras_fpn_shapes", "train[2:6]", str(shapes_dir))
    assert part.num_images == 4
    expected = [r["image_id"] for r in read(whole)[2:6]]
    assert [r["image_id"] for r in read(part)] == expected
    assert sorted(r["image_id"] for r in read(part, tf.constant([1, 2]))) == sorted(expected)


def test_unknown_names_are_rejected_with_the_nearest(shapes_dir, tmp_path):
    with pytest.raises(ValueError, match=r"'cocco/2017'.* coco,"):
        load_dataset("cocco/2017", "train")
    with pytest.raises(ValueError, match=r"'coco/2018'.* coco/2017"):
        load_dataset("coco/2018", "train")
    with pytest.raises(ValueError, match="'a name'"):
        load_dataset("a name", "train")
    with pytest.raises(ValueError, match=r"split 'test'.* train, validation"):
        load_dataset("keras_fpn_shapes", "test", str(shapes_dir))


def test_a_data_set_without_boxes_is_rejected(tmp_path):
    image = np.zeros((28, 28, 1), np.uint8)
    prepare_tfds("mnist", tmp_path, [{"image": image, "label": 1}])
    with pytest.raises(ValueError, match=r"'objects' .* \['image', 'label'\]"):
        load_dataset("mnist", "train", str(tmp_path))


def test_a_data_set_that_is_not_prepared_is_not_downloaded(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`data_dir`.*nowhere"):
        load_dataset("coco/2017", "train", str(tmp_path / "nowhere"))
    with pytest.raises(
        FileNotFoundError, match=r"coco/2017 .*nothing.*`tfds build coco/2017`.* --download"
    ):
        load_dataset("coco/2017", "train", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"python -m keras_fpn\.data\.demo_dataset"):
        load_dataset("keras_fpn_shapes", "train", str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"`data_dir`.*file"):
        load_dataset("coco/2017", "train", str(tmp_path / "file"))


def test_an_incomplete_data_set_is_rejected(shapes_dir, tmp_path):
    folder = tmp_path / "keras_fpn_shapes" / "1.0.0"
    shutil.copytree(shapes_dir, tmp_path, dirs_exist_ok=True)
    shard = next(folder.glob("*-train.tfrecord*"))
    content = shard.read_bytes()

    def load():
        return load_dataset("keras_fpn_shapes", "train", str(tmp_path))

    shard.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=f"{shard.name} .*{len(content) - 100} bytes"):
        load()
    shard.write_bytes(b"")
    with pytest.raises(ValueError, match=f"{shard.name} .* 0 bytes"):
        load()
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"1 of the 1 files .*{shard.name}"):
        load()
    shard.write_bytes(content)
    assert load().num_images == 10

    info = json.loads((folder / "dataset_info.json").read_text())
    assert info["name"] == "keras_fpn_shapes"
    (folder / "dataset_info.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"dataset_info\.json"):
        load()
    folder.rename(folder.parent / "incomplete.ABC_1.0.0")
    with pytest.raises(FileNotFoundError, match=r"incomplete\.ABC_1\.0\.0"):
        load()
