"""Batches of equal shape from a detection data set: decode, flip, resize, pad, all in tf.data.

Images are sorted into a few shapes (buckets) by their header, and batches are put together, before
anything is decoded: a waiting image costs its file's bytes, not its pixels.
"""

import itertools
import math
import os
from collections.abc import Callable, Sequence

import tensorflow as tf

from keras_fpn.data.datasets import DetectionDataset
from keras_fpn.data.image_files import (
    as_one_op,
    bucket_shapes,
    decode_image,
    read_image_size,
    resize_image,
    resized_size,
)

_BOX_PROBLEMS = ("not finite", "without area", "outside the image", "over max_boxes")
_SEPARATOR = "\0"

Record = dict[str, tf.Tensor]


class SkipReport:
    """What a pipeline left out, by name and reason. Each image counts once, in however many epochs.

    Pipelines run ahead of the training step: the report covers the images that were read, which are
    a few batches more than those that were used.
    """

    def __init__(self):
        # By image id: TensorFlow has no table from strings to strings.
        self._images = tf.lookup.experimental.MutableHashTable(tf.int64, tf.string, "")
        self._boxes = tf.lookup.experimental.MutableHashTable(
            tf.int64, tf.int64, tf.zeros([len(_BOX_PROBLEMS)], tf.int64)
        )

    def images(self) -> dict[str, str]:
        """The file name of each skipped image, and why it was skipped."""
        texts = sorted(text.decode(errors="replace") for text in self._images.export()[1].numpy())
        return dict(text.split(_SEPARATOR, 1) for text in texts)

    def boxes(self) -> dict[str, int]:
        """The number of boxes left out for each reason that occurred."""
        counts = self._boxes.export()[1].numpy().sum(axis=0)
        return {problem: int(n) for problem, n in zip(_BOX_PROBLEMS, counts, strict=True) if n > 0}

    def __str__(self) -> str:
        """One sentence, empty where nothing was skipped."""
        images, boxes = self.images(), self.boxes()
        parts = []
        if images:
            named = [
                f"{name} ({problem})" for name, problem in itertools.islice(images.items(), 10)
            ]
            more = f" and {len(images) - 10} more" if len(images) > 10 else ""
            noun = "image" if len(images) == 1 else "images"
            parts.append(f"{len(images)} {noun}: {', '.join(named)}{more}")
        if boxes:
            noun = "box" if sum(boxes.values()) == 1 else "boxes"
            reasons = ", ".join(f"{n} {problem}" for problem, n in boxes.items())
            parts.append(f"{sum(boxes.values())} {noun}: {reasons}")
        return f"skipped {'; '.join(parts)}" if parts else ""

    def _note_image(self, record: Record, problem: tf.Tensor) -> None:
        """Graph op: remember the image where `problem` is not empty."""
        text = tf.strings.join([record["file_name"], problem], _SEPARATOR)
        tf.cond(
            tf.not_equal(problem, ""),
            lambda: self._images.insert(record["image_id"], text),
            tf.no_op,
        )

    def _note_boxes(self, record: Record, counts: tf.Tensor) -> None:
        """Graph op: remember int64 `counts`, one for each of `_BOX_PROBLEMS`, where any is set."""
        tf.cond(
            tf.reduce_any(counts > 0),
            lambda: self._boxes.insert(record["image_id"], counts),
            tf.no_op,
        )


def steps_per_epoch(dataset: DetectionDataset, batch_size: int) -> int:
    """Number of batches that `training_batches` counts as one epoch."""
    return dataset.num_images // batch_size


def training_batches(
    dataset: DetectionDataset,
    batch_size: int,
    *,
    shorter_edges: Sequence[int] = (640, 672, 704, 736, 768, 800),
    longest_edge: int = 1333,
    horizontal_flip: bool = True,
    max_boxes: int = 100,
    keep_empty_images: bool = False,
    shuffle_buffer: int = 2048,
    seed: int = 0,
    start_step: int = 0,
    shard: int = 0,
    num_shards: int = 1,
    aspect_ratios: Sequence[float] = (4 / 3, 5 / 3),
    report: SkipReport | None = None,
) -> tf.data.Dataset:
    """Endless shuffled, augmented batches for `FasterRCNN.fit`.

    A batch is a function of the arguments and its number alone: a run that begins with
    `start_step=n` sees what a run from 0 sees after n batches, and nothing of what lies before is
    decoded. An epoch is `steps_per_epoch` batches.

    A batch holds images of one bucket. What is left in the buckets after a pass over the data makes
    up batches too: as many as its images amount to, from buckets drawn by the seed, filled up by
    repeating images of the same bucket. Where images are left out (empty, unreadable header),
    another pass in another order fills the rest of the epoch. In place of an image that turns out
    to be undecodable stands the next one of its batch that is not; where there is none, the first
    image of the split that can be trained on, small.

    Each of several workers (`num_shards`) forms the same global batches, and decodes and gives its
    own rows of them.

    Args:
        dataset: the split to train on.
        batch_size: images in a global batch, of all workers and replicas together.
        shorter_edges: lengths to which an image's shorter edge is resized, in pixels; one is drawn
            for each image.
        longest_edge: limit of the longer edge, in pixels; the shorter one gives way to it.
        horizontal_flip: mirror half of the images.
        max_boxes: rows of boxes for an image; the largest are kept where there are more.
        keep_empty_images: train on images without an object too.
        shuffle_buffer: see `DetectionDataset.records`.
        seed: seed of order, scale and flip.
        start_step: the first batch to give, counted from the start of training.
        shard: the number of this worker. Put together in order, the workers' batches are those
            that one worker alone gets.
        num_shards: the number of workers, among which `batch_size` is divided.
        aspect_ratios: longer to shorter edge, one bucket in each orientation for each.
        report: where skipped images and boxes are noted.

    Returns:
        Pairs of `{"images": uint8 [rows, H, W, 3]` RGB, zero beyond the image's own area,
        `"image_sizes": int32 [rows, 2]` height and width of that area`}` and `{"boxes": float32
        [rows, max_boxes, 4]` xyxy in pixels of the padded image, `"labels": int32 [rows,
        max_boxes]` padded with -1, `"image_ids": int64 [rows]}`, with rows = `batch_size //
        num_shards`. (H, W) is one of `bucket_shapes`.

    Raises:
        ValueError: a number is out of range, `batch_size` is no multiple of `num_shards`, or no
            image of the split can be trained on.
    """
    _check_arguments(batch_size, shorter_edges, longest_edge, aspect_ratios, max_boxes)
    _check_shard(shard, num_shards)
    if batch_size % num_shards:
        raise ValueError(
            f"batch_size is {batch_size}, which {num_shards} workers cannot share equally; a "
            "multiple of their number is wanted."
        )
    if start_step < 0:
        raise ValueError(f"start_step must not be negative, it is {start_step}.")
    steps = steps_per_epoch(dataset, batch_size)
    if steps == 0:
        raise ValueError(
            f"batch_size is {batch_size}, split {dataset.split!r} of {dataset.name} has only "
            f"{dataset.num_images} images; a batch must not be larger than the split."
        )
    buckets = bucket_shapes(max(shorter_edges), longest_edge, aspect_ratios)

    def is_wanted(record: Record) -> tf.Tensor:
        return tf.constant(True) if keep_empty_images else record["labels"][0] >= 0

    def prepare(
        record: Record, shorter_edge: tf.Tensor | int, longest_edge: int, flip: tf.Tensor
    ) -> Record:
        return _prepare_record(
            record,
            shorter_edge=shorter_edge,
            longest_edge=longest_edge,
            flip=flip,
            max_boxes=max_boxes,
            buckets=buckets,
            report=report,
        )

    def augment(key: tf.Tensor) -> Callable[[Record], Record]:
        def draw(record: Record) -> Record:
            draws = tf.random.stateless_uniform([2], tf.random.fold_in(key, record["image_id"]))
            choice = tf.cast(draws[0] * len(shorter_edges), tf.int32)
            flip = draws[1] < 0.5 if horizontal_flip else tf.constant(False)
            return prepare(record, tf.constant(list(shorter_edges))[choice], longest_edge, flip)

        return draw

    def one_pass(key: tf.Tensor) -> tf.data.Dataset:
        """Groups of undecoded records of one pass, each of one bucket; the last ones not full."""
        keys = tf.random.split(key, 3)
        records = dataset.records(keys[0], shuffle_buffer)
        records = _map(records, augment(keys[1])).filter(_is_readable).filter(is_wanted)
        # Groups that are not full come out in the order of their keys.
        order = tf.random.experimental.stateless_shuffle(tf.range(len(buckets)), seed=keys[2])
        return records.group_by_window(
            lambda record: tf.cast(order[record["bucket"]], tf.int64),
            lambda _, window: window.batch(batch_size),
            window_size=batch_size,
        )

    first_epoch, steps_before = divmod(start_step, steps)

    def one_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
        key = tf.random.fold_in(tf.constant([seed, 0]), epoch)
        groups = _count(lambda n: one_pass(tf.random.fold_in(key, n)))
        groups = groups.scan(tf.constant(0, tf.int64), _give_batch_for_each(batch_size))
        groups = groups.filter(lambda is_given, group: is_given).map(lambda _, group: group)
        is_first = tf.cast(epoch == first_epoch, tf.int64)
        return groups.take(steps).skip(is_first * steps_before)

    spare = _first_trainable(dataset, prepare, is_wanted, buckets)
    rows = batch_size // num_shards

    def decode(group: Record) -> tuple[Record, Record]:
        number = tf.shape(group["image_id"])[0]
        own = _rows(group, tf.range(shard * rows, (shard + 1) * rows) % number)
        images, is_decoded = _pixels(own, buckets, tf.uint8, report)

        @as_one_op
        def replace() -> tuple[Record, tf.Tensor]:
            mended = _with_substitutes(group, spare, report)
            mended = _rows(mended, tf.range(shard * rows, (shard + 1) * rows) % number)
            return mended, _pixels(mended, buckets, tf.uint8, report)[0]

        own, images = tf.cond(tf.reduce_all(is_decoded), lambda: (own, images), replace)
        inputs = {"images": images, "image_sizes": own["target_size"]}
        targets = {"boxes": own["boxes"], "labels": own["labels"], "image_ids": own["image_id"]}
        return tf.nest.map_structure(
            lambda x: tf.ensure_shape(x, [rows, *x.shape[1:]]), (inputs, targets)
        )

    batches = _map_groups(_count(one_epoch, first_epoch), decode, rows)
    batches = batches.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))
    return _with_options(batches)


def evaluation_batches(
    dataset: DetectionDataset,
    batch_size: int,
    *,
    shorter_edge: int = 800,
    longest_edge: int = 1333,
    max_boxes: int = 100,
    shard: int = 0,
    num_shards: int = 1,
    aspect_ratios: Sequence[float] = (4 / 3, 5 / 3),
    report: SkipReport | None = None,
) -> tf.data.Dataset:
    """One pass over a split: every image once, in the order of the split within its bucket.

    Each of several workers (`num_shards`) gets every `num_shards`-th image, from `shard` on, which
    may be none.

    Returns:
        Pairs of `{"images", "image_sizes"}` as from `training_batches`, but the images float32 and
        not rounded, and `{"image_ids": int64 [batch]`, `"original_sizes": int32 [batch, 2]` height
        and width before resizing, `"boxes"`, `"labels"` as from `training_batches`, crowds and
        difficult objects left out`}`. The last batch of a bucket may be smaller; images that cannot
        be decoded are left out and noted in `report`.

    Raises:
        ValueError: a number is out of range.
    """
    _check_arguments(batch_size, [shorter_edge], longest_edge, aspect_ratios, max_boxes)
    _check_shard(shard, num_shards)
    buckets = bucket_shapes(shorter_edge, longest_edge, aspect_ratios)

    def prepare(record: Record) -> Record:
        return _prepare_record(
            record,
            shorter_edge=shorter_edge,
            longest_edge=longest_edge,
            flip=tf.constant(False),
            max_boxes=max_boxes,
            buckets=buckets,
            report=report,
        )

    def decode(group: Record) -> tuple[Record, Record]:
        images, is_decoded = _pixels(group, buckets, tf.float32, report)
        group, images = tf.cond(
            tf.reduce_all(is_decoded),
            lambda: (group, images),
            lambda: (_rows(group, tf.where(is_decoded)[:, 0]), tf.boolean_mask(images, is_decoded)),
        )
        return {"images": images, "image_sizes": group["target_size"]}, {
            "image_ids": group["image_id"],
            "original_sizes": group["size"],
            "boxes": group["boxes"],
            "labels": group["labels"],
        }

    groups = (
        _map(dataset.records().shard(num_shards, shard), prepare)
        .filter(_is_readable)
        .group_by_window(
            lambda record: tf.cast(record["bucket"], tf.int64),
            lambda _, window: window.batch(batch_size),
            window_size=batch_size,
        )
    )
    batches = _map_groups(groups, decode, batch_size)
    return _with_options(batches.filter(lambda inputs, _: tf.shape(inputs["images"])[0] > 0))


def _check_arguments(
    batch_size: int,
    shorter_edges: Sequence[int],
    longest_edge: int,
    aspect_ratios: Sequence[float],
    max_boxes: int,
) -> None:
    for name, value in (
        ("batch_size", batch_size),
        ("longest_edge", longest_edge),
        ("max_boxes", max_boxes),
        ("the smallest shorter edge", min(shorter_edges, default=0)),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, it is {value}.")
    if not aspect_ratios or min(aspect_ratios) < 1:
        raise ValueError(
            "aspect_ratios are longer edge / shorter edge, one or more numbers from 1 on; received "
            f"{tuple(aspect_ratios)}."
        )


def _check_shard(shard: int, num_shards: int) -> None:
    if num_shards < 1:
        raise ValueError(f"num_shards must be at least 1, it is {num_shards}.")
    if not 0 <= shard < num_shards:
        raise ValueError(
            f"shard is one of 0..{num_shards - 1}, num_shards being {num_shards}; it is {shard}."
        )


# === Records: everything that is known without decoding ===


def _prepare_record(
    record: Record,
    *,
    shorter_edge: tf.Tensor | int,
    longest_edge: int,
    flip: tf.Tensor,
    max_boxes: int,
    buckets: list[tuple[int, int]],
    report: SkipReport | None,
) -> Record:
    """Decide size, bucket and boxes of an image from its header and annotations.

    An image that cannot be read gets `bucket` -1.
    """
    size, problem = read_image_size(record["image_bytes"])
    annotated = record["size"]
    is_mismatch = tf.equal(problem, "") & (annotated[0] > 0) & tf.reduce_any(annotated != size)
    problem = tf.cond(
        is_mismatch,
        lambda: tf.strings.format(
            "is {}x{}, annotated as {}x{}", (size[1], size[0], annotated[1], annotated[0])
        ),
        lambda: problem,
    )
    is_readable = tf.equal(problem, "")
    if report is not None:
        report._note_image(record, problem)

    target_size = resized_size(size, shorter_edge, longest_edge)
    fits = tf.reduce_all(target_size <= tf.constant(buckets), axis=1)
    boxes, labels, skipped = _usable_boxes(record, target_size, flip, max_boxes)
    if report is not None:
        report._note_boxes(record, tf.where(is_readable, skipped, 0))
    return {
        "image_id": record["image_id"],
        "file_name": record["file_name"],
        "image_bytes": record["image_bytes"],
        "size": size,
        "target_size": target_size,
        "flip": flip,
        "bucket": tf.where(is_readable, tf.argmax(fits, output_type=tf.int32), -1),
        "boxes": boxes,
        "labels": labels,
    }


def _usable_boxes(
    record: Record, target_size: tf.Tensor, flip: tf.Tensor, max_boxes: int
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Boxes of the resized image in pixels, clipped, flipped and padded to `max_boxes` rows.

    Returns:
        `boxes`: float32 `[max_boxes, 4]`; `labels`: int32 `[max_boxes]`, -1 in padding rows;
        `skipped`: int64, the number of boxes left out for each of `_BOX_PROBLEMS`.
    """
    boxes, labels = record["boxes"], record["labels"]
    is_object = ~record["is_crowd"]
    is_finite = tf.reduce_all(tf.math.is_finite(boxes), axis=-1)
    has_area = tf.reduce_all(boxes[:, 2:] > boxes[:, :2], axis=-1)
    is_inside = tf.reduce_all((boxes[:, 2:] > 0) & (boxes[:, :2] < 1), axis=-1)

    boxes = tf.clip_by_value(boxes, 0.0, 1.0)
    mirrored = tf.gather(boxes, [2, 1, 0, 3], axis=1) * [-1.0, 1.0, -1.0, 1.0] + [
        1.0,
        0.0,
        1.0,
        0.0,
    ]
    boxes = tf.where(flip, mirrored, boxes)
    boxes *= tf.cast(tf.tile(target_size[::-1], [2]), tf.float32)
    areas = tf.reduce_prod(boxes[:, 2:] - boxes[:, :2], axis=-1)
    # Rounding can take the last of a tiny box's area.
    has_area &= (areas > 0) | ~is_inside
    is_usable = is_object & is_finite & has_area & is_inside

    number = tf.math.count_nonzero(is_usable, dtype=tf.int32)
    kept = tf.minimum(number, max_boxes)
    largest = tf.sort(tf.math.top_k(tf.where(is_usable, areas, -1.0), kept).indices)
    padding = max_boxes - kept
    reasons = [~is_finite, is_finite & ~has_area, is_finite & has_area & ~is_inside]
    skipped = tf.math.count_nonzero(is_object & tf.stack(reasons), axis=1)
    return (
        tf.ensure_shape(tf.pad(tf.gather(boxes, largest), [[0, padding], [0, 0]]), [max_boxes, 4]),
        tf.ensure_shape(
            tf.pad(tf.gather(labels, largest), [[0, padding]], constant_values=-1), [max_boxes]
        ),
        tf.concat([skipped, [tf.cast(number - kept, tf.int64)]], axis=0),
    )


def _is_readable(record: Record) -> tf.Tensor:
    return record["bucket"] >= 0


def _give_batch_for_each(batch_size: int) -> Callable:
    """A `scan` function that lets a group pass whenever `batch_size` more images have gone by.

    Every full group passes. Of those that are not full, in their drawn order, as many pass as
    their images amount to, and the chance of each is in proportion to its size.
    """

    def give(images: tf.Tensor, group: Record) -> tuple[tf.Tensor, tuple[tf.Tensor, Record]]:
        total = images + tf.shape(group["image_id"], out_type=tf.int64)[0]
        return total, (total // batch_size > images // batch_size, group)

    return give


def _first_trainable(
    dataset: DetectionDataset,
    prepare: Callable[..., Record],
    is_wanted: Callable[[Record], tf.Tensor],
    buckets: list[tuple[int, int]],
) -> Record:
    """The first image of the split that can be trained on, in a size that fits every bucket.

    Raises where there is none: the endless data set would search for ever.
    """
    edge = min(itertools.chain(*buckets))
    records = _map(
        dataset.records(), lambda record: prepare(record, edge, edge, tf.constant(False))
    )
    for record in records.filter(_is_readable).filter(is_wanted):
        if _is_whole(decode_image(record["image_bytes"]), record):
            return record
    raise ValueError(
        f"No image of split {dataset.split!r} of {dataset.name} can be trained on: all "
        f"{dataset.num_images} are without an object or cannot be decoded."
    )


# === Pixels ===


def _pixels(
    group: Record, buckets: list[tuple[int, int]], dtype: tf.DType, report: SkipReport | None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Decode the images of a group, flip, resize and pad them.

    Returns:
        `images`: `[n, H, W, 3]` of `dtype`, (H, W) being the group's bucket, grey values, rounded
        where `dtype` is an integer; `is_decoded`: bool `[n]`, false where a file is truncated or
        damaged, and the image means nothing.
    """
    shape = tf.constant(buckets)[group["bucket"][0]]

    def pixels(record: Record) -> tuple[tf.Tensor, tf.Tensor]:
        image, is_decoded = _try_to_decode(record, report)
        # Any pixels will do for what is dropped.
        image = tf.cond(is_decoded, lambda: image, lambda: tf.zeros([1, 1, 3], tf.uint8))
        # Flipping before resizing moves fewer pixels; the result is the same, half-pixel centres
        # being symmetric.
        image = tf.cond(record["flip"], lambda: tf.reverse(image, [1]), lambda: image)
        if dtype.is_integer:
            # The cast cuts off: this rounds, on fewer pixels than there are after resizing. It is
            # `tf.cast(image, tf.float32) + 0.5` in one op.
            image = tf.bitcast(image, tf.quint8)
            image = tf.quantization.dequantize(image, min_range=0.5, max_range=255.5)
        image = tf.cast(resize_image(image, record["target_size"]), dtype)
        # A row of pixels at a time: tf.pad is slow where the last axis is short.
        height, width = tf.unstack(record["target_size"])
        image = tf.reshape(image, [height, 3 * width])
        image = tf.pad(image, [[0, shape[0] - height], [0, 3 * (shape[1] - width)]])
        return tf.reshape(image, [shape[0], shape[1], 3]), is_decoded

    needed = ("image_id", "file_name", "image_bytes", "size", "target_size", "flip")
    return tf.map_fn(
        pixels,
        {key: group[key] for key in needed},
        fn_output_signature=(
            tf.TensorSpec([None, None, 3], dtype),
            tf.TensorSpec([], tf.bool),
        ),
    )


def _with_substitutes(group: Record, spare: Record, report: SkipReport | None) -> Record:
    """The group with the next image that can be decoded in place of each that cannot.

    Where there is none in the group, `spare` stands in.
    """
    number = tf.shape(group["image_id"])[0]
    is_decoded = tf.map_fn(
        lambda record: _try_to_decode(record, report)[1], group, fn_output_signature=tf.bool
    )
    following = (tf.range(number)[:, None] + tf.range(number)) % number
    tries = tf.argmax(tf.gather(is_decoded, following), axis=1, output_type=tf.int32)
    group = _rows(group, (tf.range(number) + tries) % number)

    def or_spare(key: str) -> tf.Tensor:
        # The bucket is the group's: the spare fits into every one.
        if key == "bucket":
            return group[key]
        stand_in = tf.repeat(spare[key][None], number, axis=0)
        return tf.cond(tf.reduce_any(is_decoded), lambda: group[key], lambda: stand_in)

    return {key: or_spare(key) for key in group}


def _try_to_decode(record: Record, report: SkipReport | None) -> tuple[tf.Tensor, tf.Tensor]:
    """The image's pixels, uint8 `[height, width, 3]`, and whether it can be decoded."""
    image = tf.ensure_shape(decode_image(record["image_bytes"]), [None, None, 3])
    is_decoded = _is_whole(image, record)
    if report is not None:
        report._note_image(record, tf.where(is_decoded, "", "truncated or damaged"))
    return image, is_decoded


def _is_whole(image: tf.Tensor, record: Record) -> tf.Tensor:
    return tf.reduce_all(tf.shape(image)[:2] == record["size"])


def _rows(group: Record, indices: tf.Tensor) -> Record:
    return {key: tf.gather(values, indices) for key, values in group.items()}


# === Data sets ===


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _count(function: Callable[[tf.Tensor], tf.data.Dataset], start: int = 0) -> tf.data.Dataset:
    """`function(start)`, then `function(start + 1)`, and so on without end."""
    return tf.data.Dataset.range(start, tf.int64.max).flat_map(function)


def _map(dataset: tf.data.Dataset, function: Callable) -> tf.data.Dataset:
    return dataset.map(function, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def _map_groups(groups: tf.data.Dataset, function: Callable, rows: int) -> tf.data.Dataset:
    """Map over groups, in each of which `function` decodes `rows` images, side by side."""
    # As many groups as keep all cores at work, and two more, to be begun when one ends.
    calls = math.ceil(num_cores() / rows) + 2
    return groups.map(function, num_parallel_calls=calls, deterministic=True)


def _with_options(dataset: tf.data.Dataset) -> tf.data.Dataset:
    options = tf.data.Options()
    options.deterministic = True
    # Workers take their shares by `shard`.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return dataset.with_options(options).prefetch(2)
