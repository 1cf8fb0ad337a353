"""Data sets in COCO's layout: `annotations/instances_{split}.json`, images in `{split}/`."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from keras_fpn.data.datasets import DetectionDataset, Record, list_entries, unknown_name
from keras_fpn.data.image_files import read_image_size


@dataclasses.dataclass(frozen=True)
class CocoFolder(DetectionDataset):
    """A split in COCO's layout, with the annotations of all images concatenated.

    The objects of image i are rows `row_splits[i]` to `row_splits[i + 1]`.
    """

    image_dir: str
    image_ids: np.ndarray  # int64 [images]
    file_names: np.ndarray  # str [images]
    sizes: np.ndarray  # int32 [images, 2], height and width
    row_splits: np.ndarray  # int64 [images + 1]
    boxes: np.ndarray  # float64 [objects, 4], xywh in pixels
    labels: np.ndarray  # int32 [objects]
    is_crowd: np.ndarray  # bool [objects]
    areas: np.ndarray  # float32 [objects]

    def records(
        self, shuffle_seed: tf.Tensor | None = None, shuffle_buffer: int = 2048
    ) -> tf.data.Dataset:
        del shuffle_buffer  # The index is shuffled as a whole.
        corners = np.concatenate([self.boxes[:, :2], self.boxes[:, :2] + self.boxes[:, 2:]], axis=1)
        objects_per_image = np.diff(self.row_splits)
        scale = np.maximum(np.repeat(self.sizes, objects_per_image, axis=0), 1)[:, [1, 0, 1, 0]]
        # Eager tensors are captured by an enclosing graph; constants would be copied into it.
        with tf.init_scope():
            image_ids, file_names = tf.constant(self.image_ids), tf.constant(self.file_names)
            sizes, row_splits = tf.constant(self.sizes), tf.constant(self.row_splits)
            objects = {
                "boxes": tf.constant(corners / scale, tf.float32),
                "labels": tf.constant(self.labels),
                "is_crowd": tf.constant(self.is_crowd),
                "area": tf.constant(self.areas),
            }

        def read(index: tf.Tensor) -> Record:
            rows = slice(row_splits[index], row_splits[index + 1])
            return {
                "image_id": image_ids[index],
                "file_name": file_names[index],
                "image_bytes": tf.io.read_file(
                    tf.strings.join([self.image_dir, file_names[index]], os.sep)
                ),
                "size": sizes[index],
                **{key: values[rows] for key, values in objects.items()},
            }

        order = tf.range(self.num_images)
        if shuffle_seed is not None:
            order = tf.random.experimental.stateless_shuffle(order, seed=shuffle_seed)
        return tf.data.Dataset.from_tensor_slices(order).map(
            read, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
        )

    def read_image_ids(self) -> np.ndarray:
        return self.image_ids

    def _annotations(self) -> Iterator[tuple]:
        for i in range(self.num_images):
            rows = slice(self.row_splits[i], self.row_splits[i + 1])
            yield (
                int(self.image_ids[i]),
                str(self.file_names[i]),
                (int(self.sizes[i, 0]), int(self.sizes[i, 1])),
                self.boxes[rows],
                self.labels[rows],
                self.is_crowd[rows],
                self.areas[rows],
            )


def load_coco_folder(name: str, split: str, data_dir: str | None = None) -> CocoFolder:
    """Opens a split in COCO's layout; see `load_dataset` for the arguments and errors."""
    path = pathlib.Path(name).expanduser()
    annotation_file = path / "annotations" / f"instances_{split}.json"
    if path.is_file():
        raise NotADirectoryError(
            f"{name!r} is a file; expected a folder with annotations/instances_{split}.json and "
            f"{split}/, or a TensorFlow Datasets name."
        )
    if not path.is_dir():
        raise FileNotFoundError(f"There is no folder {name!r}.")
    if data_dir is not None:
        raise ValueError(
            f"`data_dir` applies to TensorFlow Datasets only; received data_dir={data_dir!r} with "
            f"the folder {name!r}."
        )
    if not annotation_file.parent.is_dir():
        raise FileNotFoundError(
            f"{name!r} is not in COCO's layout: expected a folder annotations/, found "
            f"{list_entries(path)}."
        )
    if not annotation_file.is_file():
        splits = sorted(
            file.name.removeprefix("instances_").removesuffix(".json")
            for file in annotation_file.parent.glob("instances_*.json")
        )
        raise ValueError(unknown_name("split", split, splits, repr(name)))
    try:
        content = json.loads(annotation_file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{annotation_file} is not valid JSON: {error}.") from None
    images, annotations, categories = (
        _coco_list(content, key, annotation_file) for key in ("images", "annotations", "categories")
    )

    category_ids = _column(categories, "id", int, annotation_file, "category")
    class_names = _column(categories, "name", str, annotation_file, "category")
    by_id = sorted(zip(category_ids, class_names, strict=True))
    category_ids, class_names = [pair[0] for pair in by_id], [pair[1] for pair in by_id]
    label_of = _positions(category_ids, "category", annotation_file)

    image_ids = _column(images, "id", int, annotation_file, "image")
    file_names = _column(images, "file_name", str, annotation_file, "image")
    if not images or not categories:
        raise ValueError(
            f"{annotation_file} has {len(images)} images and {len(categories)} categories; "
            "expected at least one of each."
        )
    position_of = _positions(image_ids, "image", annotation_file)
    image_dir = path / split
    _check_images_exist(image_dir, file_names)
    sizes = np.array([_annotated_size(image, image_dir) for image in images], np.int32)

    image_of_object = np.zeros(len(annotations), np.int64)
    labels = np.zeros(len(annotations), np.int32)
    boxes = np.zeros((len(annotations), 4))
    is_crowd = np.zeros(len(annotations), bool)
    areas = np.full(len(annotations), np.nan, np.float32)
    for i, annotation in enumerate(annotations):
        what = f"annotation {annotation.get('id', f'number {i}')!r} of {annotation_file}"
        for key in ("image_id", "category_id", "bbox"):
            if key not in annotation:
                raise ValueError(f"{what} has no {key!r}.")
        try:
            image_of_object[i] = position_of[annotation["image_id"]]
            labels[i] = label_of[annotation["category_id"]]
        except (KeyError, TypeError):
            raise ValueError(
                f"{what} refers to image {annotation['image_id']!r} and category "
                f"{annotation['category_id']!r}, at least one of which is not in the file."
            ) from None
        box = annotation["bbox"]
        if (
            not isinstance(box, list)
            or len(box) != 4
            or not all(type(number) in (int, float) for number in box)
        ):
            raise ValueError(f"{what} has bbox {box!r}; expected [x, y, width, height].")
        boxes[i] = box
        is_crowd[i] = bool(annotation.get("iscrowd", 0))
        if type(annotation.get("area")) in (int, float):
            areas[i] = annotation["area"]

    order = np.argsort(image_of_object, kind="stable")
    objects_per_image = np.bincount(image_of_object, minlength=len(images))
    return CocoFolder(
        name=name,
        split=split,
        class_names=class_names,
        category_ids=category_ids,
        num_images=len(images),
        image_dir=str(image_dir),
        image_ids=np.array(image_ids, np.int64),
        file_names=np.array(file_names),
        sizes=sizes,
        row_splits=np.concatenate([[0], np.cumsum(objects_per_image)]).astype(np.int64),
        boxes=boxes[order],
        labels=labels[order],
        is_crowd=is_crowd[order],
        areas=areas[order],
    )


def _coco_list(content: Any, key: str, file: pathlib.Path) -> list[dict]:
    if not isinstance(content, dict) or key not in content:
        found = sorted(content) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(
            f"{file} is not in COCO's format: expected an object with 'images', 'annotations' and "
            f"'categories', found {found}."
        )
    values = content[key]
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{file} is not in COCO's format: {key!r} must be a list of objects.")
    return values


def _column(rows: list[dict], key: str, kind: type, file: pathlib.Path, what: str) -> list:
    for i, row in enumerate(rows):
        if type(row.get(key)) is not kind:
            raise ValueError(
                f"{file} is not in COCO's format: {what} number {i} has {key!r} {row.get(key)!r}, "
                f"expected {'an integer' if kind is int else 'a string'}."
            )
    return [row[key] for row in rows]


def _positions(ids: list[int], what: str, file: pathlib.Path) -> dict[int, int]:
    positions = {value: position for position, value in enumerate(ids)}
    if len(positions) < len(ids):
        repeated = next(value for position, value in enumerate(ids) if positions[value] != position)
        raise ValueError(f"{file} has more than one {what} with id {repeated}.")
    return positions


def _check_images_exist(image_dir: pathlib.Path, file_names: list[str]) -> None:
    if not image_dir.is_dir():
        raise FileNotFoundError(f"The image folder {image_dir} does not exist.")
    # One listing instead of a lookup per file, which is slow on network drives.
    present = set(os.listdir(image_dir))
    missing = [
        file_name
        for file_name in file_names
        if file_name not in present and not (image_dir / file_name).is_file()
    ]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(file_names)} annotated images are missing from "
            f"{image_dir}: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}."
        )


def _annotated_size(image: dict, image_dir: pathlib.Path) -> tuple[int, int]:
    """Returns the annotated height and width, else those in the file's header, else (0, 0)."""
    height, width = image.get("height"), image.get("width")
    if type(height) is int and type(width) is int and height > 0 and width > 0:
        return height, width
    height, width = read_image_size(tf.io.read_file(str(image_dir / image["file_name"])))[0].numpy()
    return height, width
