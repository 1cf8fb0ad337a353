"""Report of the images and boxes that an input pipeline skipped."""

import itertools

import tensorflow as tf

from keras_fpn.data.datasets import Record

BOX_PROBLEMS = ("not finite", "without area", "outside the image", "over max_boxes")
_SEPARATOR = "\0"


class SkipReport:
    """The images and boxes that a pipeline skipped, with the reason for each.

    An image counts once, however many epochs are read. Since pipelines prefetch, the report covers
    a few more batches than have been used.
    """

    def __init__(self):
        # Keyed by image id: TensorFlow has no table from strings to strings.
        self._images = tf.lookup.experimental.MutableHashTable(tf.int64, tf.string, "")
        self._boxes = tf.lookup.experimental.MutableHashTable(
            tf.int64, tf.int64, tf.zeros([len(BOX_PROBLEMS)], tf.int64)
        )

    def images(self) -> dict[str, str]:
        """Returns the reason for each skipped image, by file name."""
        texts = sorted(text.decode(errors="replace") for text in self._images.export()[1].numpy())
        return dict(text.split(_SEPARATOR, 1) for text in texts)

    def boxes(self) -> dict[str, int]:
        """Returns the number of skipped boxes for each reason that occurred."""
        counts = self._boxes.export()[1].numpy().sum(axis=0)
        return {problem: int(n) for problem, n in zip(BOX_PROBLEMS, counts, strict=True) if n > 0}

    def __str__(self) -> str:
        """Summarizes the report in one sentence, empty if nothing was skipped."""
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

    def add_image(self, record: Record, problem: tf.Tensor) -> None:
        """Graph op: records the image if the string `problem` is not empty."""
        text = tf.strings.join([record["file_name"], problem], _SEPARATOR)
        tf.cond(
            tf.not_equal(problem, ""),
            lambda: self._images.insert(record["image_id"], text),
            tf.no_op,
        )

    def add_boxes(self, record: Record, counts: tf.Tensor) -> None:
        """Graph op: records the int64 counts of `BOX_PROBLEMS` of an image if any is positive."""
        tf.cond(
            tf.reduce_any(counts > 0),
            lambda: self._boxes.insert(record["image_id"], counts),
            tf.no_op,
        )
