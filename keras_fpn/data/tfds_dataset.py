"""Data sets from TensorFlow Datasets (TFDS) whose features follow COCO's or VOC's."""

import contextlib
import dataclasses
import os
import re
import struct
from collections.abc import Iterator
from typing import Any

import absl.logging
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

import keras_fpn.data.demo_dataset  # noqa: F401 - registers keras_fpn_shapes with TFDS
from keras_fpn.data.coco_classes import COCO_IDS_AND_NAMES
from keras_fpn.data.datasets import DetectionDataset, Record, list_entries, unknown_name
from keras_fpn.data.image_files import read_image_size


@dataclasses.dataclass(frozen=True)
class TfdsDataset(DetectionDataset):
    """A split of a prepared TFDS data set."""

    builder: tfds.core.DatasetBuilder

    def records(
        self, shuffle_seed: tf.Tensor | None = None, shuffle_buffer: int = 2048
    ) -> tf.data.Dataset:
        # TFDS's own reader shuffles from a global state that restarts with each iterator, so it
        # cannot reproduce the order of a later epoch, as resuming a run requires.
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

    def _parse(self, position: tf.Tensor, serialized: tf.Tensor) -> Record:
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
        all_false = tf.zeros_like(labels, tf.bool)
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
            "is_crowd": objects.get("is_crowd", all_false) | objects.get("is_difficult", all_false),
            "area": tf.cast(objects.get("area", unknown_area), tf.float32),
        }

    @tf.autograph.experimental.do_not_convert
    def _annotations(self) -> Iterator[tuple]:
        def measure(record: Record) -> Record:
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
    """Shuffles in an order that depends on `seed` alone.

    `dataset.shuffle` would mix in the seed of `tf.random.set_seed`.
    """
    structure = dataset.element_spec
    specs = tf.nest.flatten(structure)
    variant = tf.raw_ops.ShuffleDataset(
        input_dataset=tf.data.experimental.to_variant(dataset),
        buffer_size=tf.constant(buffer_size, tf.int64),
        # Never (0, 0), which requests a random seed.
        seed=tf.cast(seed[0], tf.int64) + 2**32,
        seed2=tf.cast(seed[1], tf.int64),
        output_types=[spec.dtype for spec in specs],
        output_shapes=[spec.shape for spec in specs],
        reshuffle_each_iteration=False,
    )
    return tf.data.experimental.from_variant(variant, structure)


def load_tfds(name: str, split: str, data_dir: str | None, download: bool) -> TfdsDataset:
    """Opens a split of a TFDS data set; see `load_dataset` for the arguments and errors."""
    if data_dir is not None and not tf.io.gfile.isdir(data_dir) and not download:
        if tf.io.gfile.exists(data_dir):
            raise NotADirectoryError(
                f"`data_dir` must be a folder; received the file {data_dir!r}."
            )
        raise FileNotFoundError(f"`data_dir` does not exist; received {data_dir!r}.")
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
        raise ValueError(unknown_name("split", split, sorted(splits), name)) from None
    if num_images == 0:
        raise ValueError(f"Split {split!r} of {name} has no images.")
    for part in re.findall(r"[A-Za-z_]\w*(?=\s*(?:\[|\+|$))", split):
        if part in splits:
            _check_shards(name, splits[part])

    class_names = builder.info.features["objects"].feature["label"].names
    is_coco = builder.name == "coco" and len(class_names) == len(COCO_IDS_AND_NAMES)
    return TfdsDataset(
        name=name,
        split=split,
        class_names=list(class_names),
        category_ids=list(COCO_IDS_AND_NAMES) if is_coco else list(range(1, len(class_names) + 1)),
        num_images=num_images,
        builder=builder,
    )


def is_tfds_name(name: str) -> bool:
    """Returns whether `name` is that of a TFDS data set, with or without config and version."""
    return name.split("/")[0].split(":")[0] in tfds.list_builders(with_community_datasets=False)


@contextlib.contextmanager
def _quiet_absl() -> Iterator[None]:
    """Silences TFDS's warnings about its internals and about what is raised here as an error."""
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
            unknown_name("data set", name, known, "TensorFlow Datasets", key=name.split("/")[0])
            + " There is no folder of that name either."
        ) from None
    except (ValueError, AssertionError) as error:
        builder_name, _, config = name.partition("/")
        configs = []
        with contextlib.suppress(tfds.core.DatasetNotFoundError, ValueError):
            configs = sorted(tfds.builder_cls(builder_name).builder_configs)
        if configs and config.split(":")[0] not in configs:
            known = [f"{builder_name}/{known_config}" for known_config in configs]
            raise ValueError(unknown_name("data set", name, known, "TensorFlow Datasets")) from None
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"TensorFlow Datasets cannot open {name!r}: {reason}") from error


def _check_prepared(name: str, builder: tfds.core.DatasetBuilder) -> None:
    """Raises FileNotFoundError if the data set is missing or only partially prepared."""
    folder = builder.data_path
    hint = f"prepare it with `tfds build {name}` or `keras-fpn train --download`"
    if builder.name == "keras_fpn_shapes":
        hint = "create it with `python -m keras_fpn.data.demo_dataset`"
    if not folder.exists():
        unfinished = []
        if folder.parent.exists():
            unfinished = [p.name for p in folder.parent.iterdir() if "incomplete" in p.name]
        if unfinished:
            raise FileNotFoundError(
                f"{name} is only partially prepared: expected {folder}, found {unfinished[0]}; "
                f"{hint}."
            )
        parent = next((p for p in folder.parents if p.exists()), None)
        raise FileNotFoundError(
            f"{name} is not prepared: expected {folder}, found "
            f"{list_entries(parent) if parent else 'nothing'} in {parent}; {hint}."
        )
    if not (folder / "dataset_info.json").exists():
        raise FileNotFoundError(
            f"{name} is only partially prepared: {folder} has no dataset_info.json, only "
            f"{list_entries(folder)}; {hint}."
        )


def _check_shards(name: str, split_info: tfds.core.SplitInfo) -> None:
    """Raises if a file of the split is missing or truncated."""
    files = split_info.filepaths
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(files)} files of split {split_info.name!r} of {name} are "
            f"missing from {files[0].parent}, the first being {missing[0]}."
        )
    if files[0].suffix.startswith(".tfrecord"):
        # TFRecord adds 16 bytes per example.
        expected = split_info.num_bytes + 16 * split_info.num_examples
        if sum(file.stat().length for file in files) < expected:
            for file in files:
                _check_tfrecord(file)


def _check_tfrecord(file: Any) -> None:
    """Raises ValueError if the last record of the file is incomplete."""
    length = file.stat().length
    position = 0
    with tf.io.gfile.GFile(os.fspath(file), "rb") as stream:
        while position < length:
            stream.seek(position)
            header = stream.read(8)
            position += 16 + (struct.unpack("<Q", header)[0] if len(header) == 8 else 0)
    if position > length or length == 0:
        raise ValueError(
            f"{file} is truncated: it has {length} bytes, but its last record ends at byte "
            f"{position}; prepare or copy the data set again."
        )


def _check_features(name: str, features: Any) -> None:
    """Raises ValueError unless the features follow COCO's or VOC's."""
    found = sorted(features) if hasattr(features, "keys") else [str(features)]
    objects = features["objects"] if "objects" in found else None
    object_features = getattr(objects, "feature", None)
    if "image" not in found or not object_features or not {"bbox", "label"} <= set(object_features):
        raise ValueError(
            f"{name} is not a detection data set like COCO or VOC: expected features 'image' and "
            f"'objects' with 'bbox' and 'label', found {found}."
        )
    if not isinstance(object_features["label"], tfds.features.ClassLabel):
        raise ValueError(f"The labels of {name} have no names: expected a ClassLabel feature.")
    bbox_format = object_features["bbox"].bbox_format
    if getattr(bbox_format, "name", None) != "REL_YXYX":
        raise ValueError(f"The boxes of {name} are {bbox_format}; expected REL_YXYX.")
