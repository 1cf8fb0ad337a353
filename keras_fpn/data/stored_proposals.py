"""Stored proposals: files of ours, COCO's and Detectron2's, and data sets with proposals."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_fpn.data.datasets import DetectionDataset, Record, read_json, shortened
from keras_fpn.weights.checkpoints import MAX_GROWTH, PICKLE, read_checkpoint

_EXPECTED = (
    "expected an .npz file written by keras_fpn, results in COCO's format or a proposal file of "
    "Detectron2"
)
# Names in the files of Detectron, and in those of Detectron2.
_DETECTRON_NAMES = {"indexes": "ids", "scores": "objectness_logits"}


@dataclasses.dataclass(frozen=True, eq=False)
class Proposals:
    """The proposals of many images, concatenated; those of an image are sorted by score.

    The proposals of image i are rows `row_splits[i]` to `row_splits[i + 1]`. They are in pixels of
    the image resized to height and width `frames[i]`, or of the original image if that is (0, 0).

    Attributes:
        image_ids: int64 `[N]`, without repetition.
        frames: int32 `[N, 2]`.
        row_splits: int64 `[N + 1]`.
        boxes: float32 `[M, 4]`, xyxy.
        scores: float32 `[M]`.

    Raises:
        ValueError: if an array is not as described, has NaN or infinite values, or does not fit the
            others.
    """

    image_ids: np.ndarray
    frames: np.ndarray
    row_splits: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray

    def __post_init__(self) -> None:
        for name, dtype, shape in (
            ("image_ids", "int64", (-1,)),
            ("frames", "int32", (-1, 2)),
            ("row_splits", "int64", (-1,)),
            ("boxes", "float32", (-1, 4)),
            ("scores", "float32", (-1,)),
        ):
            object.__setattr__(self, name, _converted(name, getattr(self, name), dtype, shape))
        images, rows = len(self.image_ids), len(self.boxes)
        lengths = {"frames": images, "row_splits": images + 1, "scores": rows}
        for name, length in lengths.items():
            if len(getattr(self, name)) != length:
                raise ValueError(
                    f"`{name}` must have {length} rows for {images} images and {rows} boxes; "
                    f"received {len(getattr(self, name))}."
                )
        starts, ends = self.row_splits[:-1], self.row_splits[1:]
        if self.row_splits[0] != 0 or self.row_splits[-1] != rows or (ends < starts).any():
            raise ValueError(f"`row_splits` must rise from 0 to the number of boxes, {rows}.")
        ids, counts = np.unique(self.image_ids, return_counts=True)
        if (counts > 1).any():
            raise ValueError(
                f"`image_ids` must not repeat; received {ids[counts > 1][0]} more than once."
            )
        is_size = (self.frames > 0).all(axis=1) | (self.frames == 0).all(axis=1)
        if not is_size.all():
            raise ValueError(
                "`frames` must be positive heights and widths, or (0, 0) for the original image; "
                f"received {self.frames[~is_size][0].tolist()}."
            )
        rises = self.scores[1:] > self.scores[:-1]
        rises[ends[(ends > 0) & (ends < rows)] - 1] = False  # From one image to the next.
        if rises.any():
            raise ValueError("`scores` must be sorted within each image, the highest first.")

    @classmethod
    def from_images(
        cls,
        image_ids: Sequence[int],
        boxes: Sequence[np.ndarray],
        scores: Sequence[np.ndarray],
        frames: Any = None,
    ) -> "Proposals":
        """Concatenates the proposals of N images, and sorts those of each image by score.

        Args:
            image_ids: N ids.
            boxes: N arrays `[m, 4]`, xyxy in pixels.
            scores: N arrays `[m]`.
            frames: as in the constructor. Defaults to None, the original images.

        Raises:
            ValueError: if the arguments do not fit each other, and as in the constructor.
        """
        if not len(image_ids) == len(boxes) == len(scores):
            raise ValueError(
                "There must be an id, boxes and scores for each image; received "
                f"{len(image_ids)}, {len(boxes)} and {len(scores)}."
            )
        sorted_boxes, sorted_scores = [np.zeros((0, 4), "float32")], [np.zeros(0, "float32")]
        for image_id, of_image, their_scores in zip(image_ids, boxes, scores, strict=True):
            of_image = _converted("boxes", of_image, "float32", (-1, 4))
            their_scores = _converted("scores", their_scores, "float32", (-1,))
            if len(of_image) != len(their_scores):
                raise ValueError(
                    f"Image {image_id} must have as many scores as boxes; received "
                    f"{len(their_scores)} and {len(of_image)}."
                )
            order = np.argsort(-their_scores, kind="stable")
            sorted_boxes.append(of_image[order])
            sorted_scores.append(their_scores[order])
        return cls(
            image_ids=np.asarray(image_ids),
            frames=np.zeros((len(image_ids), 2), "int32") if frames is None else frames,
            row_splits=np.cumsum([len(of_image) for of_image in sorted_boxes]),
            boxes=np.concatenate(sorted_boxes),
            scores=np.concatenate(sorted_scores),
        )

    def coco_results(self, index: int, original_size: Sequence[int] | None = None) -> list[dict]:
        """Returns the proposals of one image in COCO's results format, in original pixels.

        Args:
            index: position of the image in `image_ids`.
            original_size: height and width of the original image; not needed if the proposals are
                in its pixels.

        Returns:
            A list of `{"image_id", "category_id", "bbox": [x, y, width, height], "score"}`, the
            highest score first. The category id is 1.

        Raises:
            ValueError: if `original_size` is None and needed.
        """
        image_id = int(self.image_ids[index])
        rows = slice(self.row_splits[index], self.row_splits[index + 1])
        boxes = self.boxes[rows].astype("float64")
        if self.frames[index].any():
            if original_size is None:
                height, width = self.frames[index]
                raise ValueError(
                    f"The original size of image {image_id} is needed, since its proposals are in "
                    f"pixels of the image resized to {height}x{width} (height x width)."
                )
            scale = np.asarray(original_size, "float64") / self.frames[index]
            boxes *= np.tile(scale[::-1], 2)
        boxes[:, 2:] -= boxes[:, :2]
        return [
            {"image_id": image_id, "category_id": 1, "bbox": box, "score": score}
            for box, score in zip(boxes.tolist(), self.scores[rows].tolist(), strict=True)
        ]


def _converted(name: str, values: Any, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns an array of `dtype` with the values of another.

    Raises:
        ValueError: if `values` has another shape (-1: any size), is not of integers or not of
            numbers as `dtype` demands, or has values that `dtype` cannot hold, NaN or infinity.
    """
    values = np.asarray(values)
    if values.size == 0 and values.ndim == 1:
        values = values.reshape([0, *shape[1:]])  # An empty list of boxes.
    if values.ndim != len(shape) or values.shape[1:] != shape[1:]:
        expected = ", ".join(["n", *map(str, shape[1:])])
        raise ValueError(f"`{name}` must be [{expected}]; received shape {values.shape}.")
    is_integer = dtype.startswith("int")
    if values.size and values.dtype.kind not in ("iu" if is_integer else "iuf"):
        raise ValueError(f"`{name}` must be {dtype}; received {values.dtype}.")
    with np.errstate(over="ignore"):
        converted = values.astype(dtype, copy=False)
    wrong = converted != values if is_integer else ~np.isfinite(converted)
    if wrong.any():
        raise ValueError(f"`{name}` must be finite {dtype}; received {values[wrong][0]}.")
    return converted


# === Files ===


def read_proposals(path: str | os.PathLike) -> Proposals:
    """Reads a file of proposals; the format is detected from its contents.

    The formats are:

    - `.npz` as written by `write_proposals`.
    - COCO's results format, a JSON list of `{"image_id", "bbox": [x, y, width, height], "score"}`
      in pixels of the original images. Categories are ignored.
    - Detectron2's proposal files (`.pkl`), which are read without running anything in them:
      dictionaries of `ids`, `boxes` and `objectness_logits` (in Detectron `indexes` and `scores`),
      each with one entry per image, and `bbox_mode`, 0 for xyxy (the default) or 1 for xywh, in
      pixels of the original images. Pickles have no checksum; see `read_checkpoint`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file has another format, is damaged, or has proposals that do not fit
            each other or are not finite.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; {_EXPECTED}.")
    with path.open("rb") as file:
        beginning = file.read(512)
    is_json = re.match(rb"(?:\xef\xbb\xbf)?\s*[\[{]", beginning) is not None
    if is_json:
        content = read_json(path)
    elif re.match(rb"PK\x03\x04|" + PICKLE, beginning):
        content = read_checkpoint(path)
    else:
        found = f"it begins with {beginning[:16]!r}" if beginning else "it is empty"
        raise ValueError(f"{str(path)!r} is not a proposal file, {found}; {_EXPECTED}.")
    try:
        if is_json:
            return _from_coco(content)
        if isinstance(content, dict) and "row_splits" in content:
            return _from_npz(content)
        return _from_detectron(content, path.stat().st_size)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} cannot be read as proposals: {error}") from None


def _from_npz(content: dict) -> Proposals:
    names = [field.name for field in dataclasses.fields(Proposals)]
    if sorted(content) != sorted(names):
        raise ValueError(f"It must have the arrays {names}; received {list(content)[:8]}.")
    return Proposals(**content)


def _from_coco(content: Any) -> Proposals:
    if not isinstance(content, list):
        raise ValueError(
            "It must have a list of results in COCO's format; received an object with the keys "
            f"{list(content)[:8]}."
        )
    image_ids, numbers = [], np.zeros((len(content), 5))
    for row, result in enumerate(content):
        try:
            image_id, (x, y, width, height) = result["image_id"], result["bbox"]
            score = result["score"]
            if type(image_id) is not int or not -(2**63) <= image_id < 2**63:
                raise ValueError
            # Adding zero refuses text, which NumPy would convert.
            numbers[row] = x + 0.0, y + 0.0, x + width + 0.0, y + height + 0.0, score + 0.0
        except (KeyError, TypeError, ValueError, OverflowError):
            raise ValueError(
                "A result must have an integer 'image_id', a 'bbox' [x, y, width, height] and a "
                f"'score'; received {shortened(result)} for number {row}."
            ) from None
        image_ids.append(image_id)
    ids = np.array(image_ids, "int64")
    order = np.lexsort((-numbers[:, 4], ids))
    unique, starts = np.unique(ids[order], return_index=True)
    return Proposals(
        image_ids=unique,
        frames=np.zeros((len(unique), 2), "int32"),
        row_splits=np.append(starts, len(ids)),
        boxes=numbers[order, :4],
        scores=numbers[order, 4],
    )


def _from_detectron(content: Any, size: int) -> Proposals:
    required = ("ids", "boxes", "objectness_logits")
    if not isinstance(content, dict):
        raise ValueError(
            f"It must have a dictionary of {', '.join(required)}; received "
            f"{type(content).__name__}."
        )
    content = {_DETECTRON_NAMES.get(name, name): value for name, value in content.items()}
    values = [content.get(name) for name in required]
    is_sequence = [
        isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)
        for value in values
    ]
    if not all(is_sequence):
        raise ValueError(
            f"It must have {', '.join(required)} with an entry for each image; received the names "
            f"{shortened(list(content))}."
        )
    ids, boxes, logits = values
    for array in (*boxes, *logits):
        if not isinstance(array, np.ndarray):
            raise ValueError(
                f"The boxes and scores of an image must be arrays; received {type(array).__name__}."
            )
    # A pickle may refer to one array many times.
    if sum(array.nbytes for array in (*boxes, *logits)) > 2**26 + MAX_GROWTH * size:
        raise ValueError(f"Its {size} bytes multiply when they are read.")
    mode = content.get("bbox_mode", 0)
    if not isinstance(mode, int | np.integer) or mode not in (0, 1):
        raise ValueError(
            f"`bbox_mode` must be 0 (xyxy) or 1 (xywh), in absolute pixels; received "
            f"{shortened(mode)}."
        )
    if mode == 1:
        boxes = [_converted("boxes", of_image, "float64", (-1, 4)) for of_image in boxes]
        boxes = [np.concatenate([b[:, :2], b[:, :2] + b[:, 2:]], axis=1) for b in boxes]
    return Proposals.from_images(ids, boxes, logits)


def write_proposals(
    path: str | os.PathLike,
    proposals: Proposals,
    original_sizes: Mapping[int, Sequence[int]] | None = None,
) -> None:
    """Writes proposals to a new file, all of it or nothing.

    Args:
        path: a path that ends in `.npz`, or in `.json` for COCO's results format, which has the
            boxes in pixels of the original images, and category id 1.
        proposals: what to write.
        original_sizes: image id to height and width of the original image. Only for `.json`, and
            only needed for images whose proposals are in pixels of a resized image.

    Raises:
        ValueError: for another suffix, or if an original size is needed and missing.
        FileExistsError: if `path` exists.
        FileNotFoundError: if its folder does not exist.
    """
    path = pathlib.Path(path)
    if path.suffix not in (".npz", ".json"):
        raise ValueError(f"`path` must end in .npz or .json; received {str(path)!r}.")
    if path.exists():
        raise FileExistsError(f"`path` must be a new file; {str(path)!r} exists.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"The folder {str(path.parent)!r} does not exist.")
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        with partial.open("xb") as file:
            if path.suffix == ".npz":
                np.savez(file, **vars(proposals))
            else:
                # One image at a time: all results of a large data set take gigabytes.
                file.writelines(_json_lines(proposals, original_sizes or {}))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()


def _json_lines(
    proposals: Proposals, original_sizes: Mapping[int, Sequence[int]]
) -> Iterator[bytes]:
    separator = "["
    for index, image_id in enumerate(proposals.image_ids.tolist()):
        results = proposals.coco_results(index, original_sizes.get(image_id))
        if results:
            yield f"{separator}{json.dumps(results)[1:-1]}".encode()
            separator = ",\n"
    yield b"[]\n" if separator == "[" else b"]\n"


# === Data sets ===


def with_proposals(dataset: DetectionDataset, proposals: Proposals) -> DetectionDataset:
    """Adds stored proposals to the records of a data set.

    The files of a TFDS split are read once to find its image ids; no image is decoded.

    Args:
        dataset: a split.
        proposals: those of all its images; others are ignored.

    Returns:
        The split, with `proposals` and `proposals_size` in its records.

    Raises:
        ValueError: if an image of the split is not in `proposals`. An image may be there without
            any proposal.
    """
    ids = dataset.read_image_ids()
    missing = ids[~np.isin(ids, proposals.image_ids)]
    if len(missing):
        raise ValueError(
            f"`proposals` must have all images of split {dataset.split!r} of {dataset.name}; "
            f"{len(missing)} of the {len(ids)} are missing, the first being image {missing[0]}."
        )
    return _WithProposals(
        name=dataset.name,
        split=dataset.split,
        class_names=dataset.class_names,
        category_ids=dataset.category_ids,
        num_images=dataset.num_images,
        dataset=dataset,
        proposals=proposals,
    )


@dataclasses.dataclass(frozen=True)
class _WithProposals(DetectionDataset):
    """A split whose records have stored proposals; all else is that of `dataset`."""

    dataset: DetectionDataset
    proposals: Proposals

    def records(
        self, shuffle_seed: tf.Tensor | None = None, shuffle_buffer: int = 2048
    ) -> tf.data.Dataset:
        return self._with_proposals(self.dataset.records(shuffle_seed, shuffle_buffer))

    def records_with_objects(
        self, shuffle_seed: tf.Tensor | None = None, shuffle_buffer: int = 2048
    ) -> tf.data.Dataset:
        return self._with_proposals(self.dataset.records_with_objects(shuffle_seed, shuffle_buffer))

    def _with_proposals(self, records: tf.data.Dataset) -> tf.data.Dataset:
        ids, frames, starts, ends, boxes = self._tensors

        def add(record: Record) -> Record:
            index = tf.searchsorted(ids, record["image_id"][None])[0]
            return record | {
                "proposals": boxes[starts[index] : ends[index]],
                "proposals_size": frames[index],
            }

        return records.map(add, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)

    @functools.cached_property
    def _tensors(self) -> list[tf.Tensor]:
        """Image ids in rising order, their frames, first and last rows, and the boxes of all."""
        stored = self.proposals
        order = np.argsort(stored.image_ids)
        per_image = (stored.image_ids, stored.frames, stored.row_splits[:-1], stored.row_splits[1:])
        # Eager tensors are captured by an enclosing graph; constants would be copied into it. On
        # the CPU, where tf.data runs and gigabytes of boxes fit.
        with tf.init_scope(), tf.device("CPU:0"):
            tensors = [tf.constant(values[order]) for values in per_image]
            return [*tensors, tf.constant(stored.boxes)]

    def read_image_ids(self) -> np.ndarray:
        return self.dataset.read_image_ids()

    def read_images(self, image_ids: Sequence[int]) -> dict[int, np.ndarray]:
        return self.dataset.read_images(image_ids)

    def coco_ground_truth(self) -> dict[str, list[dict[str, Any]]]:
        return self.dataset.coco_ground_truth()

    def _annotations(self) -> Iterator[tuple]:
        return self.dataset._annotations()
