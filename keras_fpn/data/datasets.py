"""Where images and annotations come from: TensorFlow Datasets, or a folder in COCO's layout."""

import contextlib
import dataclasses
import difflib
import json
import os
import pathlib
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import absl.logging
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

import keras_fpn.data.demo_dataset  # noqa: F401 - makes keras_fpn_shapes known to TFDS
from keras_fpn.data.image_files import read_image, read_image_size

# The ids that COCO's annotation files give to its 80 classes; TFDS numbers them 0..79.
_COCO_CATEGORY_IDS = sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})


@dataclasses.dataclass(frozen=True)
class DetectionDataset:
    """One split of a detection data set.

    Attributes:
        name: what `load_dataset` was asked for.
        split: the name of the split.
        class_names: the name of each label 0..K-1.
        category_ids: the id of each label in files of COCO's formats.
        num_images: the number of images, those without an object included.
    """

    name: str
    split: str
    class_names: list[str]
    category_ids: list[int]
    num_images: int

    def records(
        self, shuffle_seed: tf.Tensor | None = None, shuffle_buffer: int = 2048
    ) -> tf.data.Dataset:
        """Read the split once, images undecoded.

        Args:
            shuffle_seed: int32 `[2]`, or None for the order of the files. The order is a function
                of the seed and of nothing else. May be a tensor of the graph around.
            shuffle_buffer: number of records shuffled at a time where the files cannot be read in
                any order (TFDS). A folder is always shuffled as a whole.

        Returns:
            A data set of dicts: `image_id` int64; `file_name` string; `image_bytes` string;
            `size` int32 `[2]`, height and width as annotated, `[0, 0]` where the annotations do not
            say; `boxes` float32 `[n, 4]`, xyxy in fractions of width and height, as annotated
            (neither clipped nor checked); `labels` int32 `[n]`; `is_crowd` bool `[n]`, true for
            crowds and for VOC's difficult objects; `area` float32 `[n]` in square pixels, NaN where
            the annotations do not say.
        """
        raise NotImplementedError

    def read_images(self, image_ids: Sequence[int]) -> dict[int, np.ndarray]:
        """RGB pixels, uint8 `[H, W, 3]`, of the images of these ids that can be decoded."""
        wanted = tf.constant(list(image_ids), tf.int64)
        records = self.records().filter(
            lambda record: tf.reduce_any(tf.equal(record["image_id"], wanted))
        )
        images = {}
        for record in records.take(len(image_ids)):
            pixels, problem = read_image(record["image_bytes"])
            if problem == b"":
                images[int(record["image_id"])] = pixels.numpy()
        return images

    def coco_ground_truth(self) -> dict[str, list[dict[str, Any]]]:
        """The ground truth in COCO's format, as COCO's evaluators take it.

        Returns:
            `{"images", "annotations", "categories"}`. Boxes are `[x, y, width, height]` in pixels
            of the original image. Crowds and VOC's difficult objects have `iscrowd` 1. Boxes that
            are not finite or have no area are left out, and so are TFDS images whose header cannot
            be read: there is no size to scale their boxes with. No image is decoded.
        """
        images, annotations = [], []
        for image_id, file_name, (height, width), boxes, labels, crowd, area in self._annotations():
            images.append(
                {"id": image_id, "file_name": file_name, "height": height, "width": width}
            )
            for box, label, is_crowd, box_area in zip(boxes, labels, crowd, area, strict=True):
                x, y, box_width, box_height = (float(number) for number in box)
                if not (np.isfinite(box).all() and box_width > 0 and box_height > 0):
                    continue
                annotations.append(
                    {
                        # From 1: COCO's evaluators take an annotation with id 0 for no match.
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": self.category_ids[label],
                        "bbox": [x, y, box_width, box_height],
                        "area": box_width * box_height if np.isnan(box_area) else float(box_area),
                        "iscrowd": int(is_crowd),
                    }
                )
        categories = [
            {"id": category_id, "name": class_name}
            for category_id, class_name in zip(self.category_ids, self.class_names, strict=True)
        ]
        return {"images": images, "annotations": annotations, "categories": categories}

    def _annotations(self) -> Iterator[tuple]:
        """Yield id, file name, (height, width), xywh pixel boxes, labels, is_crowd, area."""
        raise NotImplementedError


def load_dataset(
    name: str, split: str, data_dir: str | None = None, *, download: bool = False
) -> DetectionDataset:
    """Open one split of a detection data set, and check that it is whole.

    Args:
        name: a TensorFlow Datasets name such as "coco/2017", "voc/2007" or "keras_fpn_shapes" (its
            features must follow COCO's or VOC's), or the path of a folder in COCO's layout
            (`annotations/instances_{split}.json` and the images in `{split}/`).
        split: the split's name; with TFDS also a part of it, such as "train[:8]".
        data_dir: where TFDS finds its prepared data sets; None for its default. Not for folders.
        download: let TFDS download and prepare a data set that is not there.

    Raises:
        ValueError: the data set or the split is unknown, or its content is not a detection data
            set's.
        FileNotFoundError: files are missing, or a data set is prepared in part or not at all.
        NotADirectoryError: a file was given for a folder.
    """
    path = pathlib.Path(name).expanduser()
    if (path / "annotations").is_dir() or (path.is_dir() and not _is_tfds_name(name)):
        if data_dir is not None:
            raise ValueError(
                f"data_dir is for TensorFlow Datasets; {name!r} is a folder and already says where "
                f"its images are, but data_dir={data_dir!r} was given."
            )
        return _load_coco_folder(name, path, split)
    if path.is_file():
        raise NotADirectoryError(
            f"{name!r} is a file; a folder with annotations/instances_{split}.json and {split}/ is "
            "wanted, or a TensorFlow Datasets name."
        )
    if path.is_absolute() or name.startswith((".", "~")):
        raise FileNotFoundError(f"There is no folder {name!r}.")
    return _load_tfds(name, split, data_dir, download)


# === A folder in COCO's layout ===


@dataclasses.dataclass(frozen=True)
class _CocoFolder(DetectionDataset):
    """Annotations of all images one after the other; image i has rows `row_splits[i:i+2]`."""

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
        del shuffle_buffer  # The whole index is shuffled.
        corners = np.concatenate([self.boxes[:, :2], self.boxes[:, :2] + self.boxes[:, 2:]], axis=1)
        objects_per_image = np.diff(self.row_splits)
        scale = np.maximum(np.repeat(self.sizes, objects_per_image, axis=0), 1)[:, [1, 0, 1, 0]]
        # Eager tensors, which a graph around refers to; as constants they would be copied into it.
        with tf.init_scope():
            image_ids, file_names = tf.constant(self.image_ids), tf.constant(self.file_names)
            sizes, row_splits = tf.constant(self.sizes), tf.constant(self.row_splits)
            objects = {
                "boxes": tf.constant(corners / scale, tf.float32),
                "labels": tf.constant(self.labels),
                "is_crowd": tf.constant(self.is_crowd),
                "area": tf.constant(self.areas),
            }

        def read(index: tf.Tensor) -> dict[str, tf.Tensor]:
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


def _load_coco_folder(name: str, path: pathlib.Path, split: str) -> DetectionDataset:
    annotation_file = path / "annotations" / f"instances_{split}.json"
    if not (path / "annotations").is_dir():
        raise FileNotFoundError(
            f"{name!r} is not in COCO's layout: it has no folder annotations/, it holds "
            f"{_listing(path)}."
        )
    if not annotation_file.is_file():
        splits = sorted(
            file.name.removeprefix("instances_").removesuffix(".json")
            for file in annotation_file.parent.glob("instances_*.json")
        )
        raise ValueError(_unknown("split", split, splits, f"{name!r}"))
    try:
        content = json.loads(annotation_file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{annotation_file} is not JSON: {error}.") from None
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
            f"{annotation_file} names {len(images)} images and {len(categories)} categories; at "
            "least one of each is wanted."
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
                raise ValueError(f"{what} has no {key!r}, which COCO's instances have.")
        try:
            image_of_object[i] = position_of[annotation["image_id"]]
            labels[i] = label_of[annotation["category_id"]]
        except (KeyError, TypeError):
            raise ValueError(
                f"{what} points to image {annotation['image_id']!r} and category "
                f"{annotation['category_id']!r}; the file does not have both."
            ) from None
        box = annotation["bbox"]
        if (
            not isinstance(box, list)
            or len(box) != 4
            or not all(type(number) in (int, float) for number in box)
        ):
            raise ValueError(f"{what} has bbox {box!r}; four numbers (xywh) are wanted.")
        boxes[i] = box
        is_crowd[i] = bool(annotation.get("iscrowd", 0))
        if type(annotation.get("area")) in (int, float):
            areas[i] = annotation["area"]

    order = np.argsort(image_of_object, kind="stable")
    objects_per_image = np.bincount(image_of_object, minlength=len(images))
    return _CocoFolder(
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
            f"{file} is not COCO's: an object with 'images', 'annotations' and 'categories' is "
            f"wanted, it holds {found}."
        )
    values = content[key]
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{file} is not COCO's: {key!r} must be a list of objects.")
    return values


def _column(rows: list[dict], key: str, kind: type, file: pathlib.Path, what: str) -> list:
    for i, row in enumerate(rows):
        if type(row.get(key)) is not kind:
            raise ValueError(
                f"{file} is not COCO's: {what} number {i} has {key!r} {row.get(key)!r}, "
                f"{'a whole number' if kind is int else 'a string'} is wanted."
            )
    return [row[key] for row in rows]


def _positions(ids: list[int], what: str, file: pathlib.Path) -> dict[int, int]:
    positions = {value: position for position, value in enumerate(ids)}
    if len(positions) < len(ids):
        twice = next(value for position, value in enumerate(ids) if positions[value] != position)
        raise ValueError(f"{file} has more than one {what} with id {twice}.")
    return positions


def _check_images_exist(image_dir: pathlib.Path, file_names: list[str]) -> None:
    if not image_dir.is_dir():
        raise FileNotFoundError(f"The folder of the images is missing: {image_dir}.")
    # One listing instead of a look-up for each file, which is slow on network drives.
    present = set(os.listdir(image_dir))
    missing = [
        file_name
        for file_name in file_names
        if file_name not in present and not (image_dir / file_name).is_file()
    ]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(file_names)} images named in the annotations are missing "
            f"from {image_dir}: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}."
        )


def _annotated_size(image: dict, image_dir: pathlib.Path) -> tuple[int, int]:
    """Height and width as annotated, else from the file's header, (0, 0) where it has none."""
    size = (image.get("height"), image.get("width"))
    if all(type(number) is int and number > 0 for number in size):
        return size
    height, width = read_image_size(tf.io.read_file(str(image_dir / image["file_name"])))[0].numpy()
    return height, width


# === TensorFlow Datasets ===


@dataclasses.dataclass(frozen=True)
class _TfdsDataset(DetectionDataset):
    builder: tfds.core.DatasetBuilder

    def records(
        self, shuffle_seed: tf.Tensor | None = None, shuffle_buffer: int = 2048
    ) -> tf.data.Dataset:
        # TFDS's own reader draws its order from a global state, and starts it anew with each
        # iterator: it cannot give the order of a later epoch, as resuming a run needs.
        file_instructions = self.builder.info.splits[self.split].file_instructions
        starts = np.cumsum([0] + [part.take for part in file_instructions])[:-1]
        parts = {
            "file": tf.constant([os.fspath(part.filename) for part in file_instructions]),
            "skip": tf.constant([part.skip for part in file_instructions], tf.int64),
            "take": tf.constant([part.take for part in file_instructions], tf.int64),
            "start": tf.constant(starts, tf.int64),
        }
        adapter = tfds.core.file_adapters.ADAPTER_FOR_FORMAT[self.builder.info.file_format]

        def read(part: dict[str, tf.Tensor]) -> tf.data.Dataset:
            examples = adapter.make_tf_data(part["file"]).skip(part["skip"]).take(part["take"])
            return examples.enumerate(start=part["start"])

        if shuffle_seed is None:
            examples = tf.data.Dataset.from_tensor_slices(parts).flat_map(read)
        else:
            seeds = tf.random.experimental.stateless_split(shuffle_seed, 2)
            order = tf.random.experimental.stateless_shuffle(
                tf.range(len(file_instructions)), seed=seeds[0]
            )
            parts = {key: tf.gather(values, order) for key, values in parts.items()}
            examples = tf.data.Dataset.from_tensor_slices(parts).interleave(
                read,
                cycle_length=min(16, len(file_instructions)),
                num_parallel_calls=tf.data.AUTOTUNE,
                deterministic=True,
            )
            examples = _shuffle(examples, shuffle_buffer, seeds[1])
        return examples.map(self._parse, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)

    def _parse(self, position: tf.Tensor, serialized: tf.Tensor) -> dict[str, tf.Tensor]:
        features = self.builder.info.features
        decoding = tfds.decode.PartialDecoding(
            {
                "image": features["image"],
                "objects": {
                    key: True
                    for key in ("bbox", "label", "is_crowd", "is_difficult", "area")
                    if key in features["objects"].feature
                },
                **{key: True for key in ("image/id", "image/filename") if key in features},
            },
            decoders={"image": tfds.decode.SkipDecoding()},
        )
        with _quiet_absl():
            features = decoding.extract_features(features)
        example = features.deserialize_example(serialized, decoders=decoding.decoders)
        objects = example["objects"]
        labels = tf.cast(objects["label"], tf.int32)
        no = tf.zeros_like(labels, tf.bool)
        image_id = example.get("image/id", position)
        image_id = tf.cast(image_id, tf.int64) if image_id.dtype.is_integer else position
        unknown_area = tf.fill(tf.shape(labels), np.float32(np.nan))
        return {
            "image_id": image_id,
            "file_name": example.get("image/filename", tf.strings.as_string(image_id)),
            "image_bytes": example["image"],
            "size": tf.zeros([2], tf.int32),
            "boxes": tf.gather(objects["bbox"], [1, 0, 3, 2], axis=-1),
            "labels": labels,
            "is_crowd": objects.get("is_crowd", no) | objects.get("is_difficult", no),
            "area": tf.cast(objects.get("area", unknown_area), tf.float32),
        }

    def _annotations(self) -> Iterator[tuple]:
        def measure(record: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            image_bytes = record.pop("image_bytes")
            return record | {"size": read_image_size(image_bytes)[0]}

        annotations = self.records().map(measure, num_parallel_calls=tf.data.AUTOTUNE)
        for record in annotations.as_numpy_iterator():
            height, width = (int(number) for number in record["size"])
            if height == 0:
                continue
            corners = record["boxes"].astype(np.float64) * [width, height, width, height]
            yield (
                int(record["image_id"]),
                record["file_name"].decode(errors="replace"),
                (height, width),
                np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1),
                record["labels"],
                record["is_crowd"],
                record["area"],
            )


def _shuffle(dataset: tf.data.Dataset, buffer_size: int, seed: tf.Tensor) -> tf.data.Dataset:
    """`dataset.shuffle`, with an order that depends on `seed` alone.

    The method mixes the seed of `tf.random.set_seed` into its own.
    """
    structure = dataset.element_spec
    specs = tf.nest.flatten(structure)
    variant = tf.raw_ops.ShuffleDataset(
        input_dataset=tf.data.experimental.to_variant(dataset),
        buffer_size=tf.constant(buffer_size, tf.int64),
        # Two zeros would ask for a random seed.
        seed=tf.cast(seed[0], tf.int64) + 2**32,
        seed2=tf.cast(seed[1], tf.int64),
        output_types=[spec.dtype for spec in specs],
        output_shapes=[spec.shape for spec in specs],
        reshuffle_each_iteration=False,
    )
    return tf.data.experimental.from_variant(variant, structure)


def _load_tfds(name: str, split: str, data_dir: str | None, download: bool) -> DetectionDataset:
    if data_dir is not None and not tf.io.gfile.isdir(data_dir) and not download:
        if tf.io.gfile.exists(data_dir):
            raise NotADirectoryError(f"data_dir {data_dir!r} is a file; a folder is wanted.")
        raise FileNotFoundError(f"data_dir {data_dir!r} does not exist.")
    builder = _tfds_builder(name, data_dir)
    if download:
        builder.download_and_prepare()
    else:
        _check_prepared(name, builder)
    _check_features(name, builder.info.features)
    splits = builder.info.splits
    try:
        num_images = splits[split].num_examples
    except (KeyError, ValueError):
        raise ValueError(_unknown("split", split, sorted(splits), name)) from None
    if num_images == 0:
        raise ValueError(f"Split {split!r} of {name} holds no image.")
    for part in re.findall(r"[A-Za-z_]\w*(?=\s*(?:\[|\+|$))", split):
        if part in splits:
            _check_shards(name, splits[part])

    class_names = builder.info.features["objects"].feature["label"].names
    is_coco = builder.name == "coco" and len(class_names) == len(_COCO_CATEGORY_IDS)
    return _TfdsDataset(
        name=name,
        split=split,
        class_names=list(class_names),
        category_ids=_COCO_CATEGORY_IDS if is_coco else list(range(1, len(class_names) + 1)),
        num_images=num_images,
        builder=builder,
    )


def _is_tfds_name(name: str) -> bool:
    return name.split("/")[0].split(":")[0] in tfds.list_builders(with_community_datasets=False)


@contextlib.contextmanager
def _quiet_absl() -> Iterator[None]:
    """Keep TFDS from warning of its own internals and of what is raised here as an error."""
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        yield
    finally:
        absl.logging.set_verbosity(verbosity)


def _tfds_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    try:
        with _quiet_absl():
            return tfds.builder(name, data_dir=data_dir, try_gcs=False)
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        raise ValueError(
            _unknown("data set", name, known, "TensorFlow Datasets", key=name.split("/")[0])
            + " There is no folder of that name either."
        ) from None
    except (ValueError, AssertionError) as error:
        builder_name, _, config = name.partition("/")
        configs = []
        with contextlib.suppress(tfds.core.DatasetNotFoundError, ValueError):
            configs = sorted(tfds.builder_cls(builder_name).builder_configs)
        if configs and config.split(":")[0] not in configs:
            known = [f"{builder_name}/{known_config}" for known_config in configs]
            raise ValueError(_unknown("data set", name, known, "TensorFlow Datasets")) from None
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"TensorFlow Datasets cannot open {name!r}: {reason}") from error


def _check_prepared(name: str, builder: tfds.core.DatasetBuilder) -> None:
    """Raise FileNotFoundError where the data set is not there, or not finished."""
    folder = builder.data_path
    how = f"`tfds build {name}`, or train.py with --download, prepares it"
    if builder.name == "keras_fpn_shapes":
        how = "training/demo_dataset.py makes it"
    if not folder.exists():
        unfinished = []
        if folder.parent.exists():
            unfinished = [p.name for p in folder.parent.iterdir() if "incomplete" in p.name]
        if unfinished:
            raise FileNotFoundError(
                f"{name} is prepared in part only: {folder.parent} holds {unfinished[0]} instead "
                f"of {folder.name}; {how}."
            )
        there = next((p for p in folder.parents if p.exists()), None)
        raise FileNotFoundError(
            f"{name} is not prepared: {folder} is wanted, {there} holds "
            f"{_listing(there) if there else 'nothing'}; {how}."
        )
    if not (folder / "dataset_info.json").exists():
        raise FileNotFoundError(
            f"{name} is prepared in part only: {folder} has no dataset_info.json, it holds "
            f"{_listing(folder)}; {how}."
        )


def _check_shards(name: str, split_info: tfds.core.SplitInfo) -> None:
    """Raise where a file of the split is missing or shorter than it was written."""
    files = split_info.filepaths
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(files)} files of split {split_info.name!r} of {name} are "
            f"missing from {files[0].parent}, the first is {missing[0]}."
        )
    if files[0].suffix.startswith(".tfrecord"):
        # A TFRecord adds 16 bytes to each example.
        written = split_info.num_bytes + 16 * split_info.num_examples
        if sum(file.stat().length for file in files) < written:
            for file in files:
                _check_tfrecord(file)


def _check_tfrecord(file: Any) -> None:
    """Raise where the last record of a file is not whole."""
    length = file.stat().length
    position = 0
    with tf.io.gfile.GFile(os.fspath(file), "rb") as stream:
        while position < length:
            stream.seek(position)
            header = stream.read(8)
            position += 16 + (struct.unpack("<Q", header)[0] if len(header) == 8 else 0)
    if position > length or length == 0:
        raise ValueError(
            f"{file} is truncated: it has {length} bytes, its last record ends at byte {position}; "
            "prepare the data set again, or copy it again from where it is whole."
        )


def _check_features(name: str, features: Any) -> None:
    """Raise ValueError where the features are not those of COCO or VOC."""
    found = sorted(features) if hasattr(features, "keys") else [str(features)]
    objects = features["objects"] if "objects" in found else None
    object_features = getattr(objects, "feature", None)
    has_objects = object_features is not None and {"bbox", "label"} <= set(object_features)
    if "image" not in found or not has_objects:
        raise ValueError(
            f"{name} is not a detection data set as COCO and VOC are: 'image' and 'objects' with "
            f"'bbox' and 'label' are wanted, its features are {found}."
        )
    if not isinstance(object_features["label"], tfds.features.ClassLabel):
        raise ValueError(f"The labels of {name} have no names: a ClassLabel feature is wanted.")
    bbox_format = object_features["bbox"].bbox_format
    if getattr(bbox_format, "name", None) != "REL_YXYX":
        raise ValueError(f"The boxes of {name} are {bbox_format}; relative yxyx is wanted.")


def _listing(folder: Any) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return "nothing"
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _unknown(what: str, name: str, known: list[str], where: str, key: str | None = None) -> str:
    """The sentence for a name that is not known: the nearest ones, or all where they are few."""
    nearest = difflib.get_close_matches(key or name, known, n=3, cutoff=0.5)
    if len(known) <= 12:
        nearest = known
    hint = f"; it has {', '.join(nearest)}" if nearest else ""
    return f"{where} has no {what} {name!r}{hint}."
