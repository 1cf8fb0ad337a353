"""Input pipeline: batches of static shape from a detection data set, entirely in tf.data.

Images are grouped into a few padded shapes (buckets) by the size in their headers, and batches are
formed before anything is decoded, so that a waiting image occupies the bytes of its file only.
"""

import functools
import itertools
import math
import os
from collections.abc import Callable, Sequence

import tensorflow as tf

from keras_fpn.data.datasets import DetectionDataset, Record
from keras_fpn.data.image_files import (
    as_one_op,
    bucket_shapes,
    decode_image,
    read_image_size,
    resized_size,
)
from keras_fpn.data.skip_report import SkipReport
from keras_fpn.data.transforms import GeometricTransform
from keras_fpn.validation import check_int


def steps_per_epoch(dataset: DetectionDataset, batch_size: int) -> int:
    """Returns the number of batches of `training_batches` in one epoch."""
    return dataset.num_images // batch_size


@tf.autograph.experimental.do_not_convert
def training_batches(
    dataset: DetectionDataset,
    batch_size: int,
    *,
    shorter_edges: Sequence[int] = (640, 672, 704, 736, 768, 800),
    longest_edge: int = 1333,
    horizontal_flip: bool = True,
    max_boxes: int = 100,
    max_proposals: int = 2000,
    keep_empty_images: bool = False,
    shuffle_buffer: int = 2048,
    seed: int = 0,
    start_step: int = 0,
    shard: int = 0,
    num_shards: int = 1,
    aspect_ratios: Sequence[float] = (4 / 3, 5 / 3),
    report: SkipReport | None = None,
) -> tf.data.Dataset:
    """Returns endless shuffled and augmented batches for `fit`.

    The arguments and the number of a batch determine its content: `start_step=n` yields what a run
    from 0 yields after its first n batches, and decodes none of those. An epoch has
    `steps_per_epoch` batches.

    The images of a batch share a bucket. Images that are left over in the buckets after a pass over
    the split form batches too, as many as their number amounts to: their buckets are drawn at
    random, and each batch is filled up by repeating its images. If images are skipped (no objects,
    unreadable header), another pass in another order completes the epoch. An image that turns out
    to be undecodable is replaced by the next decodable one of its batch or, failing that, by the
    first trainable image of the split at a small size.

    With several workers (`num_shards`), each forms the same global batches but decodes and returns
    only its own rows.

    Args:
        dataset: the split to train on.
        batch_size: images per global batch, over all workers and replicas.
        shorter_edges: target lengths of an image's shorter edge in pixels, one of which is drawn
            for each image.
        longest_edge: limit on the longer edge in pixels; it takes precedence.
        horizontal_flip: whether to flip images with probability 0.5.
        max_boxes: rows of boxes per image; if there are more, the largest are kept.
        max_proposals: rows of proposals per image, for a split whose records have proposals; the
            first are kept.
        keep_empty_images: whether to train on images without objects.
        shuffle_buffer: see `DetectionDataset.records`.
        seed: seed of the order, scale and flip.
        start_step: number of the first batch, counted from the start of training.
        shard: index of this worker. The workers' batches, concatenated in order, are those of a
            single worker.
        num_shards: number of workers, which must divide `batch_size`.
        aspect_ratios: ratios of longer to shorter edge; each gives a landscape and a portrait
            bucket.
        report: collects skipped images and boxes.

    Returns:
        A data set of pairs `(inputs, targets)`, where rows = `batch_size // num_shards` and (H, W)
        is one of `bucket_shapes`. The inputs:

        - `images`: uint8 `[rows, H, W, 3]` RGB, zero outside the image's area.
        - `image_sizes`: int32 `[rows, 2]`, height and width of that area.
        - `proposals`, if the records have them: float32 `[rows, max_proposals, 4]`, xyxy in pixels
          of the padded image, padded with zeros. Proposals without area inside the image are
          dropped. Those in pixels of an image of the very size in `image_sizes` are not rounded.

        The targets:

        - `boxes`: float32 `[rows, max_boxes, 4]`, xyxy in pixels of the padded image.
        - `labels`: int32 `[rows, max_boxes]`, padded with -1.
        - `image_ids`: int64 `[rows]`.
        - `masks`, if the records have them: uint8 `[rows, max_boxes, H, W]`, in the order of
          `boxes`.

    Raises:
        ValueError: if an argument is out of range, or no image of the split can be trained on.
    """
    start_step = check_int("start_step", start_step, minimum=0)
    batch_size = check_int("batch_size", batch_size)
    shard, num_shards = _checked_shard(shard, num_shards)
    if batch_size % num_shards:
        raise ValueError(
            f"`batch_size` must be a multiple of `num_shards`; received {batch_size} and "
            f"{num_shards}."
        )
    steps = steps_per_epoch(dataset, batch_size)
    if steps == 0:
        raise ValueError(
            f"`batch_size` must not exceed the {dataset.num_images} images of split "
            f"{dataset.split!r} of {dataset.name}; received {batch_size}."
        )
    buckets, prepare = _buckets_and_prepare(
        shorter_edges, longest_edge, aspect_ratios, max_boxes, max_proposals, report
    )

    records_of = dataset.records if keep_empty_images else dataset.records_with_objects

    def is_trainable(record: Record) -> tf.Tensor:
        return _is_readable(record) & (keep_empty_images | (record["labels"][0] >= 0))

    def augment(key: tf.Tensor) -> Callable[[Record], Record]:
        def draw(record: Record) -> Record:
            draws = tf.random.stateless_uniform([2], tf.random.fold_in(key, record["image_id"]))
            choice = tf.cast(draws[0] * len(shorter_edges), tf.int32)
            flip = draws[1] < 0.5 if horizontal_flip else tf.constant(False)
            return prepare(record, flip, tf.constant(list(shorter_edges))[choice], longest_edge)

        return draw

    def one_pass(key: tf.Tensor) -> tf.data.Dataset:
        """Groups of encoded records of one pass, each of one bucket; the last may be incomplete."""
        keys = tf.random.split(key, 3)
        records = records_of(keys[0], shuffle_buffer)
        records = _map(records, augment(keys[1])).filter(is_trainable)
        # Incomplete groups are emitted in the order of their keys.
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
        groups = groups.scan(tf.constant(0, tf.int64), _select_groups(batch_size))
        groups = groups.filter(lambda is_selected, group: is_selected).map(lambda _, group: group)
        is_first = tf.cast(epoch == first_epoch, tf.int64)
        return groups.take(steps).skip(is_first * steps_before)

    spare = _first_trainable(dataset, records_of(), prepare, is_trainable, buckets)
    rows = batch_size // num_shards

    def decode(group: Record) -> tuple[Record, Record]:
        number = tf.shape(group["image_id"])[0]
        own = _rows(group, tf.range(shard * rows, (shard + 1) * rows) % number)
        images, is_decoded = _pixels(own, buckets, tf.uint8, report)

        @as_one_op
        def replace() -> tuple[Record, tf.Tensor]:
            repaired = _with_substitutes(group, spare, report)
            repaired = _rows(repaired, tf.range(shard * rows, (shard + 1) * rows) % number)
            return repaired, _pixels(repaired, buckets, tf.uint8, report)[0]

        own, images = tf.cond(tf.reduce_all(is_decoded), lambda: (own, images), replace)
        return tf.nest.map_structure(
            lambda x: tf.ensure_shape(x, [rows, *x.shape[1:]]),
            (_inputs(own, images), _targets(own, buckets)),
        )

    batches = _map_groups(_count(one_epoch, first_epoch), decode, rows)
    batches = batches.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))
    return _with_options(batches)


@tf.autograph.experimental.do_not_convert
def evaluation_batches(
    dataset: DetectionDataset,
    batch_size: int,
    *,
    shorter_edge: int = 800,
    longest_edge: int = 1333,
    max_boxes: int = 100,
    max_proposals: int = 2000,
    shard: int = 0,
    num_shards: int = 1,
    aspect_ratios: Sequence[float] = (4 / 3, 5 / 3),
    report: SkipReport | None = None,
) -> tf.data.Dataset:
    """Returns one pass over a split: every image once, in the split's order within its bucket.

    With several workers (`num_shards`), each gets every `num_shards`-th image starting at `shard`,
    which may be none.

    Args:
        dataset: the split to evaluate on.
        batch_size: images per batch of this worker.
        shorter_edge: target length of an image's shorter edge in pixels.
        longest_edge: as in `training_batches`.
        max_boxes: as in `training_batches`.
        max_proposals: as in `training_batches`.
        shard: number of this worker.
        num_shards: number of workers.
        aspect_ratios: as in `training_batches`.
        report: as in `training_batches`.

    Returns:
        A data set of pairs `(inputs, targets)` as from `training_batches`, except that the images
        are float32 and not rounded, and that the targets also have `original_sizes`, int32
        `[batch, 2]`, height and width before resizing. The boxes include neither crowds nor
        difficult objects. The last batch of a bucket may be smaller, and undecodable images are
        skipped.

    Raises:
        ValueError: if an argument is out of range.
    """
    batch_size = check_int("batch_size", batch_size)
    shard, num_shards = _checked_shard(shard, num_shards)
    buckets, prepare = _buckets_and_prepare(
        [shorter_edge], longest_edge, aspect_ratios, max_boxes, max_proposals, report
    )
    records = _map(
        dataset.records().shard(num_shards, shard),
        lambda record: prepare(record, tf.constant(False), shorter_edge, longest_edge),
    )

    def decode(group: Record) -> tuple[Record, Record]:
        images, is_decoded = _pixels(group, buckets, tf.float32, report)
        group, images = tf.cond(
            tf.reduce_all(is_decoded),
            lambda: (group, images),
            lambda: (_rows(group, tf.where(is_decoded)[:, 0]), tf.boolean_mask(images, is_decoded)),
        )
        targets = _targets(group, buckets) | {"original_sizes": group["size"]}
        return _inputs(group, images), targets

    groups = records.filter(_is_readable).group_by_window(
        lambda record: tf.cast(record["bucket"], tf.int64),
        lambda _, window: window.batch(batch_size),
        window_size=batch_size,
    )
    batches = _map_groups(groups, decode, batch_size)
    return _with_options(batches.filter(lambda inputs, _: tf.shape(inputs["images"])[0] > 0))


def _checked_shard(shard: int, num_shards: int) -> tuple[int, int]:
    shard = check_int("shard", shard, minimum=0)
    num_shards = check_int("num_shards", num_shards)
    if shard >= num_shards:
        raise ValueError(f"`shard` must be less than num_shards={num_shards}; received {shard}.")
    return shard, num_shards


def _buckets_and_prepare(
    shorter_edges: Sequence[int],
    longest_edge: int,
    aspect_ratios: Sequence[float],
    max_boxes: int,
    max_proposals: int,
    report: SkipReport | None,
) -> tuple[list[tuple[int, int]], Callable[..., Record]]:
    """Validates the arguments; returns the bucket shapes, and `_prepare_record` for them."""
    longest_edge = check_int("longest_edge", longest_edge)
    if not shorter_edges:
        raise ValueError(f"`shorter_edges` must not be empty; received {shorter_edges!r}.")
    for edge in shorter_edges:
        check_int("shorter_edges", edge)
    if not aspect_ratios or min(aspect_ratios) < 1:
        raise ValueError(
            "`aspect_ratios` (longer to shorter edge) must be one or more numbers >= 1; received "
            f"{tuple(aspect_ratios)}."
        )
    buckets = bucket_shapes(max(shorter_edges), longest_edge, aspect_ratios)
    return buckets, functools.partial(
        _prepare_record,
        buckets=buckets,
        max_boxes=check_int("max_boxes", max_boxes),
        max_proposals=check_int("max_proposals", max_proposals),
        report=report,
    )


# === Records: everything that is known without decoding ===


def _prepare_record(
    record: Record,
    flip: tf.Tensor,
    shorter_edge: tf.Tensor | int,
    longest_edge: int,
    *,
    buckets: list[tuple[int, int]],
    max_boxes: int,
    max_proposals: int,
    report: SkipReport | None,
) -> Record:
    """Determines the size, bucket and boxes of an image from its header and annotations.

    The bucket of an unreadable image is -1.
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
        report.add_image(record, problem)

    target_size = resized_size(size, shorter_edge, longest_edge)
    fits = tf.reduce_all(target_size <= tf.constant(buckets), axis=1)
    transform = GeometricTransform(size, target_size, flip)
    boxes, kept, skipped = _usable_boxes(record, transform, max_boxes)
    if report is not None:
        report.add_boxes(record, tf.where(is_readable, skipped, 0))
    prepared = {
        "image_id": record["image_id"],
        "file_name": record["file_name"],
        "image_bytes": record["image_bytes"],
        "size": size,
        "target_size": target_size,
        "flip": flip,
        "bucket": tf.where(is_readable, tf.argmax(fits, output_type=tf.int32), -1),
        "boxes": _pad_rows(boxes, max_boxes),
        "labels": _pad_rows(tf.gather(record["labels"], kept), max_boxes, -1),
    }
    if "proposals" in record:
        proposals = transform.proposals(record["proposals"], record["proposals_size"])
        has_area = tf.reduce_all(proposals[:, 2:] > proposals[:, :2], axis=-1)
        proposals = tf.boolean_mask(proposals, has_area)[:max_proposals]
        prepared["proposals"] = _pad_rows(proposals, max_proposals)
    if "masks" in record:
        # Serialized, so that masks of different sizes can be batched.
        prepared["masks"] = tf.io.serialize_tensor(tf.gather(record["masks"], kept))
    return prepared


def _usable_boxes(
    record: Record, transform: GeometricTransform, max_boxes: int
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Transforms the boxes of a record and selects those to train on.

    Returns:
        `boxes`: float32 `[n, 4]`, xyxy in pixels of the resized image, n <= `max_boxes`.
        `kept`: int32 `[n]`, their rows in `record["boxes"]`.
        `skipped`: int64, the number of boxes dropped for each of `BOX_PROBLEMS`.
    """
    boxes = record["boxes"]
    is_object = ~record["is_crowd"]
    is_finite = tf.reduce_all(tf.math.is_finite(boxes), axis=-1)
    has_area = tf.reduce_all(boxes[:, 2:] > boxes[:, :2], axis=-1)
    is_inside = tf.reduce_all((boxes[:, 2:] > 0) & (boxes[:, :2] < 1), axis=-1)

    boxes = transform.boxes(boxes)
    areas = tf.reduce_prod(boxes[:, 2:] - boxes[:, :2], axis=-1)
    # The area of a tiny box can be rounded to zero.
    has_area &= (areas > 0) | ~is_inside
    is_usable = is_object & is_finite & has_area & is_inside

    number = tf.math.count_nonzero(is_usable, dtype=tf.int32)
    largest = tf.math.top_k(tf.where(is_usable, areas, -1.0), tf.minimum(number, max_boxes))
    kept = tf.sort(largest.indices)
    reasons = [~is_finite, is_finite & ~has_area, is_finite & has_area & ~is_inside]
    skipped = tf.math.count_nonzero(is_object & tf.stack(reasons), axis=1)
    over_limit = tf.cast(tf.maximum(number - max_boxes, 0), tf.int64)
    return tf.gather(boxes, kept), kept, tf.concat([skipped, [over_limit]], axis=0)


def _pad_rows(values: tf.Tensor, rows: int, value: int = 0) -> tf.Tensor:
    """Pads the first axis to `rows`."""
    paddings = [[0, rows - tf.shape(values)[0]], *[[0, 0]] * (values.shape.rank - 1)]
    return tf.ensure_shape(
        tf.pad(values, paddings, constant_values=value), [rows, *values.shape[1:]]
    )


def _is_readable(record: Record) -> tf.Tensor:
    return record["bucket"] >= 0


def _select_groups(batch_size: int) -> Callable:
    """Returns a `scan` function that selects one group per `batch_size` images passed.

    It selects every complete group. Of the incomplete ones, in their random order, it selects as
    many as their images amount to, each with a probability proportional to its size.
    """

    def select(images: tf.Tensor, group: Record) -> tuple[tf.Tensor, tuple[tf.Tensor, Record]]:
        total = images + tf.shape(group["image_id"], out_type=tf.int64)[0]
        return total, (total // batch_size > images // batch_size, group)

    return select


def _first_trainable(
    dataset: DetectionDataset,
    records: tf.data.Dataset,
    prepare: Callable[..., Record],
    is_trainable: Callable[[Record], tf.Tensor],
    buckets: list[tuple[int, int]],
) -> Record:
    """Returns the first trainable image of the split, in a size that fits every bucket.

    Raises:
        ValueError: if there is none, in which case the endless data set would never yield a batch.
    """
    edge = min(itertools.chain(*buckets))
    records = _map(records, lambda record: prepare(record, tf.constant(False), edge, edge))
    for record in records.filter(is_trainable):
        if _is_whole(decode_image(record["image_bytes"]), record):
            return record
    raise ValueError(
        f"No image of split {dataset.split!r} of {dataset.name} can be trained on: each of its "
        f"{dataset.num_images} images has no objects or cannot be decoded."
    )


# === Pixels ===


def _transform(record: Record) -> GeometricTransform:
    return GeometricTransform(record["size"], record["target_size"], record["flip"])


def _pixels(
    group: Record, buckets: list[tuple[int, int]], dtype: tf.DType, report: SkipReport | None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Decodes, transforms and pads the images of a group.

    Returns:
        `images`: `[n, H, W, 3]` of `dtype`, (H, W) being the group's bucket; values are rounded if
        `dtype` is an integer type. `is_decoded`: bool `[n]`, false if the file is truncated or
        damaged, in which case the pixels are meaningless.
    """
    shape = tf.constant(buckets)[group["bucket"][0]]

    def pixels(record: Record) -> tuple[tf.Tensor, tf.Tensor]:
        image, is_decoded = _try_to_decode(record, report)
        image = tf.cond(is_decoded, lambda: image, lambda: tf.zeros([1, 1, 3], tf.uint8))
        image = _transform(record).image(image, dtype)
        # One row of pixels at a time: tf.pad is slow if the last axis is short.
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


def _inputs(group: Record, images: tf.Tensor) -> Record:
    """Returns the inputs of a group of prepared records, with the images of `_pixels`."""
    inputs = {"images": images, "image_sizes": group["target_size"]}
    return inputs | {key: group[key] for key in ("proposals",) if key in group}


def _targets(group: Record, buckets: list[tuple[int, int]]) -> Record:
    """Returns the targets of a group of prepared records, for images padded to its bucket."""
    targets = {"boxes": group["boxes"], "labels": group["labels"], "image_ids": group["image_id"]}
    if "masks" in group:
        shape = tf.constant(buckets)[group["bucket"][0]]
        max_boxes = group["boxes"].shape[1]

        def pad(record: Record) -> tf.Tensor:
            masks = tf.ensure_shape(tf.io.parse_tensor(record["masks"], tf.uint8), [None] * 3)
            bottom, right = tf.unstack(shape - record["target_size"])
            masks = tf.pad(_transform(record).masks(masks), [[0, 0], [0, bottom], [0, right]])
            return _pad_rows(masks, max_boxes)

        targets["masks"] = tf.map_fn(
            pad,
            {key: group[key] for key in ("masks", "size", "target_size", "flip")},
            fn_output_signature=tf.TensorSpec([max_boxes, None, None], tf.uint8),
        )
    return targets


def _with_substitutes(group: Record, spare: Record, report: SkipReport | None) -> Record:
    """Replaces each undecodable image of the group by the next decodable one, or by `spare`."""
    number = tf.shape(group["image_id"])[0]
    is_decoded = tf.map_fn(
        lambda record: _try_to_decode(record, report)[1], group, fn_output_signature=tf.bool
    )
    following = (tf.range(number)[:, None] + tf.range(number)) % number
    tries = tf.argmax(tf.gather(is_decoded, following), axis=1, output_type=tf.int32)
    # The spare fits into every bucket, so it takes that of the group.
    spares = {key: tf.repeat(value[None], number, axis=0) for key, value in spare.items()}
    return tf.cond(
        tf.reduce_any(is_decoded),
        lambda: _rows(group, (tf.range(number) + tries) % number),
        lambda: spares | {"bucket": group["bucket"]},
    )


def _try_to_decode(record: Record, report: SkipReport | None) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the pixels, uint8 `[height, width, 3]`, and whether the image can be decoded."""
    image = tf.ensure_shape(decode_image(record["image_bytes"]), [None, None, 3])
    is_decoded = _is_whole(image, record)
    if report is not None:
        report.add_image(record, tf.where(is_decoded, "", "truncated or damaged"))
    return image, is_decoded


def _is_whole(image: tf.Tensor, record: Record) -> tf.Tensor:
    return tf.reduce_all(tf.shape(image)[:2] == record["size"])


def _rows(group: Record, indices: tf.Tensor) -> Record:
    return {key: tf.gather(values, indices) for key, values in group.items()}


# === Data sets ===


def num_cores() -> int:
    """Returns the number of CPU cores available to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _count(function: Callable[[tf.Tensor], tf.data.Dataset], start: int = 0) -> tf.data.Dataset:
    """Concatenates `function(start)`, `function(start + 1)`, ... endlessly."""
    return tf.data.Dataset.range(start, tf.int64.max).flat_map(function)


def _map(dataset: tf.data.Dataset, function: Callable) -> tf.data.Dataset:
    return dataset.map(function, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def _map_groups(groups: tf.data.Dataset, function: Callable, rows: int) -> tf.data.Dataset:
    """Maps `function`, which decodes `rows` images of a group, over groups in parallel."""
    # Enough groups to keep all cores busy, and two more to start when one finishes.
    calls = math.ceil(num_cores() / rows) + 2
    return groups.map(function, num_parallel_calls=calls, deterministic=True)


def _with_options(dataset: tf.data.Dataset) -> tf.data.Dataset:
    options = tf.data.Options()
    options.deterministic = True
    # Workers are sharded by the argument `shard`.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return dataset.with_options(options).prefetch(2)
