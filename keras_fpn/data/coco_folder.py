"""Data sets in COCO's layout: `annotations/instances_{split}.json`, images in `{split}/`."""

import dataclasses
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from keras_fpn.data.datasets import (
    DetectionDataset,
    Record,
    list_entries,
    read_json,
    shortened,
    unknown_name,
)
from keras_fpn.data.image_files import read_image_size


@dataclasses.dataclass(frozen=True)
class CocoFolder(DetectionDataset):
    """A split in COCO's layout, with the annotations of all images concatenated.

    The objects of image i are rows `row_splits[i]` to `row_splits[i + 1]`.
    """

    image_dir: str
    image_ids: np.ndarray  # int64 [images]
    file_names: list[str]
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
        return self._read(self._order(shuffle_seed))

    def records_with_objects(
        self, shuffle_seed: tf.Tensor | None = None, shuffle_buffer: int = 2048
    ) -> tf.data.Dataset:
        del shuffle_buffer
        # After shuffling, so that the other images keep their order.
        order = self._order(shuffle_seed)
        with tf.init_scope():
            has_object = tf.constant(self._has_object)
        return self._read(tf.boolean_mask(order, tf.gather(has_object, order)))

    def _order(self, shuffle_seed: tf.Tensor | None) -> tf.Tensor:
        order = tf.range(self.num_images)
        if shuffle_seed is None:
            return order
        return tf.random.experimental.stateless_shuffle(order, seed=shuffle_seed)

    def _read(self, order: tf.Tensor) -> tf.data.Dataset:
        """Returns the records of images by their index."""
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

        return tf.data.Dataset.from_tensor_slices(order).map(
            read, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
        )

    @property
    def _has_object(self) -> np.ndarray:
        """Whether each image has an object that is not a crowd, bool `[images]`."""
        objects = np.concatenate([[0], np.cumsum(~self.is_crowd)])
        return np.diff(objects[self.row_splits]) > 0

    def read_image_ids(self) -> np.ndarray:
        return self.image_ids

    def _annotations(self) -> Iterator[tuple]:
        for i in range(self.num_images):
            rows = slice(self.row_splits[i], self.row_splits[i + 1])
            yield (
                int(self.image_ids[i]),
                self.file_names[i],
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
    content = read_json(annotation_file)
    images, annotations, categories = (
        _coco_list(content, key, annotation_file) for key in ("images", "annotations", "categories")
    )
    if not images or not categories:
        raise ValueError(
            f"{annotation_file} has {len(images)} images and {len(categories)} categories; "
            "expected at least one of each."
        )

    category_ids = _column(categories, "category", "id", _ID, annotation_file)
    class_names = _column(categories, "category", "name", _NAME, annotation_file)
    _positions(class_names, "category", "name", annotation_file)
    by_id = sorted(zip(category_ids, class_names, strict=True))
    category_ids, class_names = [pair[0] for pair in by_id], [pair[1] for pair in by_id]
    label_of = _positions(category_ids, "category", "id", annotation_file)

    image_ids = _column(images, "image", "id", _ID, annotation_file)
    position_of = _positions(image_ids, "image", "id", annotation_file)
    file_names = _column(images, "image", "file_name", _FILE_NAME, annotation_file)
    image_dir = path / split
    _check_images_exist(image_dir, file_names)
    heights, widths = (
        _column(images, "image", key, _LENGTH, annotation_file) for key in ("height", "width")
    )
    sizes = [
        (height, width) if height and width else _size_in_header(image_dir / file_name)
        for height, width, file_name in zip(heights, widths, file_names, strict=True)
    ]

    given_ids = [row["id"] for row in annotations if type(row.get("id")) in (int, str)]
    _positions(given_ids, "annotation", "id", annotation_file)

    def of_annotations(key: str, field: _Field) -> list:
        return _column(annotations, "annotation", key, field, annotation_file)

    of_images = of_annotations("image_id", _reference(position_of, "images"))
    image_of_object = np.array([position_of[image_id] for image_id in of_images], np.int64)
    of_categories = of_annotations("category_id", _reference(label_of, "categories"))
    labels = np.array([label_of[category_id] for category_id in of_categories], np.int32)
    boxes = np.array(of_annotations("bbox", _BOX), np.float64).reshape(-1, 4)
    is_crowd = np.array(of_annotations("iscrowd", _FLAG), bool)
    # Those that are not annotated become NaN.
    areas = np.array(of_annotations("area", _AREA), np.float32)

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
        file_names=file_names,
        sizes=np.array(sizes, np.int32),
        row_splits=np.concatenate([[0], np.cumsum(objects_per_image)]).astype(np.int64),
        boxes=boxes[order],
        labels=labels[order],
        is_crowd=is_crowd[order],
        areas=areas[order],
    )


def _coco_list(content: Any, key: str, file: pathlib.Path) -> list[dict]:
    if not isinstance(content, dict) or key not in content:
        found = (
            shortened(sorted(content))
            if isinstance(content, dict)
            else f"a {type(content).__name__}"
        )
        raise ValueError(
            f"{file} is not in COCO's format: expected an object with 'images', 'annotations' and "
            f"'categories', found {found}."
        )
    values = content[key]
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{file} is not in COCO's format: {key!r} must be a list of objects.")
    return values


# === Fields ===


@dataclasses.dataclass(frozen=True)
class _Field:
    """Which values a field may have, in words and as a check."""

    expected: str
    is_valid: Callable[[Any], bool]
    is_required: bool = True


def _is_number(value: Any) -> bool:
    # NaN and infinity are numbers: boxes with them are skipped and counted.
    return type(value) is float or (type(value) is int and abs(value) <= sys.float_info.max)


def _is_text(value: Any) -> bool:
    # JSON can hold halves of surrogate pairs, which cannot be written anywhere.
    return isinstance(value, str) and not any("\ud800" <= x <= "\udfff" for x in value)


def _is_path_within(value: Any) -> bool:
    if not _is_text(value) or os.path.isabs(value):
        return False
    return os.path.normpath(value).split(os.sep)[0] != os.pardir


_ID = _Field("an integer of 64 bits", lambda x: type(x) is int and -(2**63) <= x < 2**63)
_NAME = _Field("a string", _is_text)
_FILE_NAME = _Field("a path relative to the image folder and within it", _is_path_within)
_LENGTH = _Field(
    "a whole number of pixels, 0 if unknown",
    lambda x: _is_number(x) and 0 <= x < 2**31 and x == int(x),
    False,
)
_BOX = _Field(
    "[x, y, width, height]",
    lambda x: isinstance(x, list) and len(x) == 4 and all(map(_is_number, x)),
)
_FLAG = _Field("0 or 1", lambda x: type(x) in (int, float, bool) and x in (0, 1), False)
_AREA = _Field(
    "a number of square pixels",
    lambda x: _is_number(x) and (math.isnan(x) or 0 <= x <= float(np.finfo("float32").max)),
    False,
)


def _reference(positions: dict, of: str) -> _Field:
    # Floats too, which compare by their value; but True is not 1.
    return _Field(f"an id of the file's {of}", lambda x: type(x) in (int, float) and x in positions)


def _column(rows: list[dict], what: str, key: str, field: _Field, file: pathlib.Path) -> list:
    """Returns the values of a field, None where it is not required and missing or null."""
    values = [row.get(key) for row in rows]
    for i, value in enumerate(values):
        if (value is None and not field.is_required) or field.is_valid(value):
            continue
        own_id = rows[i].get("id")
        name = f"{what} {own_id}" if key != "id" and _ID.is_valid(own_id) else f"{what} number {i}"
        found = f"{key!r} {shortened(value)}" if key in rows[i] else f"no {key!r}"
        raise ValueError(f"{name} of {file} has {found}; expected {field.expected}.")
    return values


def _positions(values: list, what: str, key: str, file: pathlib.Path) -> dict[Any, int]:
    positions = {value: position for position, value in enumerate(values)}
    if len(positions) < len(values):
        repeated = next(x for position, x in enumerate(values) if positions[x] != position)
        raise ValueError(f"{file} has more than one {what} with {key} {shortened(repeated)}.")
    return positions


# === Files ===


def _check_images_exist(image_dir: pathlib.Path, file_names: list[str]) -> None:
    if not image_dir.is_dir():
        raise FileNotFoundError(f"The image folder {image_dir} does not exist.")
    # One listing instead of a lookup per file, which is slow on network drives.
    with os.scandir(image_dir) as entries:
        present = {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
    missing = [
        file_name
        for file_name in file_names
        if file_name not in present and not os.path.isfile(os.path.join(image_dir, file_name))
    ]
    if missing:
        named = ", ".join(map(shortened, missing[:3]))
        raise FileNotFoundError(
            f"{len(missing)} of the {len(file_names)} annotated images are missing from "
            f"{image_dir}, or are not files: {named}{', ...' if len(missing) > 3 else ''}."
        )


def _size_in_header(file: pathlib.Path) -> tuple[int, int]:
    """Returns height and width, (0, 0) if the file is not a readable image."""
    height, width = read_image_size(tf.io.read_file(str(file)))[0].numpy()
    return height, width
