"""Detection data sets: a folder in COCO's layout, or TensorFlow Datasets (TFDS)."""

import dataclasses
import difflib
import json
import pathlib
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_fpn.data.image_files import read_image

Record = dict[str, tf.Tensor]

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


@dataclasses.dataclass(frozen=True)
class DetectionDataset:
    """One split of a detection data set.

    Attributes:
        name: the name or folder passed to `load_dataset`.
        split: name of the split.
        class_names: class name of each label 0..K-1.
        category_ids: COCO category id of each label, as used in COCO's file formats.
        num_images: number of images, including those without objects.
    """

    name: str
    split: str
    class_names: list[str]
    category_ids: list[int]
    num_images: int

    def records(
        self, shuffle_seed: tf.Tensor | None = None, shuffle_buffer: int = 2048
    ) -> tf.data.Dataset:
        """Returns one pass over the split, with images still encoded.

        Args:
            shuffle_seed: int32 `[2]`, which alone determines the order; it may be a tensor of an
                enclosing graph. Defaults to None, the order of the files.
            shuffle_buffer: size of the shuffle buffer where records cannot be read in random order
                (TFDS). A folder is always shuffled as a whole.

        Returns:
            A data set of dicts:

            - `image_id`: int64.
            - `file_name`: string.
            - `image_bytes`: string, the contents of the image file.
            - `size`: int32 `[2]`, annotated height and width, `[0, 0]` if not annotated.
            - `boxes`: float32 `[n, 4]`, xyxy as fractions of the image's width and height, as
              annotated (neither clipped nor validated).
            - `labels`: int32 `[n]`.
            - `is_crowd`: bool `[n]`, true for crowds and for VOC's difficult objects.
            - `area`: float32 `[n]` in square pixels, NaN if not annotated.
            - `proposals` (optional): float32 `[m, 4]`, stored proposals, best first, xyxy in pixels
              of the image resized to `proposals_size`; see `with_proposals`.
            - `proposals_size` (with `proposals`): int32 `[2]`, height and width, `[0, 0]` for the
              original image.
            - `masks` (optional): uint8 `[n, h, w]`, the mask of each box's object, of the image's
              size.
        """
        raise NotImplementedError

    @tf.autograph.experimental.do_not_convert
    def records_with_objects(
        self, shuffle_seed: tf.Tensor | None = None, shuffle_buffer: int = 2048
    ) -> tf.data.Dataset:
        """Returns `records` without images that have no objects, or only crowds.

        A subclass that knows which before it reads their files may leave them unread.
        """
        records = self.records(shuffle_seed, shuffle_buffer)
        return records.filter(lambda record: tf.reduce_any(~record["is_crowd"]))

    @tf.autograph.experimental.do_not_convert
    def read_image_ids(self) -> np.ndarray:
        """Returns the ids of all images, int64 `[num_images]`, in the order of the files."""
        ids = self.records().map(lambda record: record["image_id"])
        return np.fromiter(ids.as_numpy_iterator(), np.int64)

    @tf.autograph.experimental.do_not_convert
    def read_images(self, image_ids: Sequence[int]) -> dict[int, np.ndarray]:
        """Returns RGB pixels, uint8 `[H, W, 3]`, by image id; undecodable images are omitted."""
        requested = tf.constant(list(image_ids), tf.int64)
        records = self.records().filter(
            lambda record: tf.reduce_any(tf.equal(record["image_id"], requested))
        )
        images = {}
        for record in records.take(len(image_ids)):
            pixels, problem = read_image(record["image_bytes"])
            if problem == b"":
                images[int(record["image_id"])] = pixels.numpy()
        return images

    def coco_ground_truth(self) -> dict[str, list[dict[str, Any]]]:
        """Returns the ground truth in COCO's format, without decoding any image.

        Returns:
            `{"images", "annotations", "categories"}`. Boxes are `[x, y, width, height]` in pixels
            of the original image; crowds and VOC's difficult objects have `iscrowd` 1. Boxes that
            are not finite or have no area are omitted, as are TFDS images whose header cannot be
            read, since their size is unknown.
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
                        # Starts at 1: COCO's evaluators treat annotation id 0 as unmatched.
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
        """Yields id, file name, (height, width), xywh pixel boxes, labels, is_crowd, area."""
        raise NotImplementedError


def load_dataset(
    name: str, split: str, data_dir: str | None = None, *, download: bool = False
) -> DetectionDataset:
    """Opens one split of a detection data set and checks that its files are complete.

    Args:
        name: path of a folder in COCO's layout (`annotations/instances_{split}.json` and the images
            in `{split}/`), or a TFDS name such as `"coco/2017"`, `"voc/2007"` or
            `"keras_fpn_shapes"`, whose features must follow COCO's or VOC's.
        split: name of the split; for TFDS also a slice such as `"train[:8]"`.
        data_dir: directory of TFDS's prepared data sets; None for its default. Not for folders.
        download: whether TFDS may download and prepare a data set that is missing.

    Raises:
        ValueError: if the data set or split is unknown, or is not a detection data set.
        FileNotFoundError: if files are missing, or the data set is not (fully) prepared.
        NotADirectoryError: if a file was given instead of a folder.
        ImportError: if `name` is not a folder and tensorflow-datasets is not installed.
    """
    from keras_fpn.data.coco_folder import load_coco_folder

    path = pathlib.Path(name).expanduser()
    is_path = path.is_absolute() or name.startswith((".", "~")) or path.is_file()
    if is_path or (path / "annotations").is_dir():
        return load_coco_folder(name, split, data_dir)
    try:
        from keras_fpn.data.tfds_dataset import is_tfds_name, load_tfds
    except ImportError as error:
        if path.is_dir():
            return load_coco_folder(name, split, data_dir)
        raise ImportError(
            f"There is no folder {name!r}, and TensorFlow Datasets cannot be imported ({error}); "
            "install it with `pip install 'keras-fpn[training]'`."
        ) from error
    if path.is_dir() and not is_tfds_name(name):
        return load_coco_folder(name, split, data_dir)
    return load_tfds(name, split, data_dir, download)


def read_json(path: pathlib.Path) -> Any:
    """Returns the content of a JSON file.

    Raises:
        ValueError: if it is not valid JSON, or is nested too deeply; the message names the file.
    """
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:
        reason = str(error)
    raise ValueError(f"{str(path)!r} is not valid JSON: {reason}.")


def shortened(value: Any) -> str:
    """Returns the `repr` of a value for an error message, of limited length and depth."""
    return _SHORT.repr(value)


def list_entries(folder: Any) -> str:
    """Returns the first entries of a folder for an error message, "nothing" if it is empty."""
    names = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more or "nothing"


def unknown_name(what: str, name: str, known: list[str], where: str, key: str | None = None) -> str:
    """Returns the error message for an unknown name: the nearest known ones, or all if few."""
    nearest = difflib.get_close_matches(key or name, known, n=3, cutoff=0.5)
    if len(known) <= 12:
        nearest = known
    hint = f"; it has {', '.join(nearest)}" if nearest else ""
    return f"{where} has no {what} {name!r}{hint}."
