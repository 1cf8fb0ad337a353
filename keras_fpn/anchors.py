"""Anchors: one size per pyramid level, three aspect ratios at every location (FPN, section 4.1)."""

import itertools
from collections.abc import Mapping, Sequence

import keras
import numpy as np
from keras import ops

from keras_fpn.stage import Float32Stage
from keras_fpn.validation import check_positive, check_sequence


@keras.saving.register_keras_serializable("keras_fpn")
class AnchorGenerator(Float32Stage):
    """Places anchors on every location of every feature map.

    Around a location, the anchor of size s and ratio r has height `s * sqrt(r)` and width
    `s / sqrt(r)`, each edge rounded to a whole pixel. Locations are at
    `(column * stride_x, row * stride_y)` with `stride = image size // feature map size`. These are
    torchvision's anchors; Detectron2 has `rounded=False` and the strides of its backbone.

    Args:
        sizes: for each level, finest first, the side in pixels of its square anchor, or a sequence
            of several. Defaults to 32, 64, 128, 256 and 512, those of P2 to P6 in the paper.
        aspect_ratios: height / width, the same at every level, or one sequence for each level.
            Defaults to 0.5, 1 and 2.
        rounded: whether the edges of an anchor around 0 are rounded to whole pixels. Defaults to
            True.
        strides: for each level, pixels between two locations. Defaults to None, the image size
            divided by the size of the feature map.

    Raises:
        ValueError: if a size or a ratio is not a finite number above 0, if levels differ in their
            number of anchors per location, which one RPN head serves, or if there are not as many
            ratios or strides as levels.
    """

    def __init__(
        self,
        sizes: Sequence[int | Sequence[int]] = (32, 64, 128, 256, 512),
        aspect_ratios: Sequence[float | Sequence[float]] = (0.5, 1.0, 2.0),
        rounded: bool = True,
        strides: Sequence[int] | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.sizes = tuple(map(_as_tuple, check_sequence("sizes", sizes)))
        aspect_ratios = check_sequence("aspect_ratios", aspect_ratios)
        nested = any(isinstance(ratio, (list, tuple)) for ratio in aspect_ratios)
        self.aspect_ratios = tuple(map(_as_tuple, aspect_ratios) if nested else aspect_ratios)
        self._ratios = self.aspect_ratios if nested else (self.aspect_ratios,) * len(self.sizes)
        self.rounded = rounded
        self.strides = None if strides is None else check_sequence("strides", strides)
        for argument, values in (("sizes", self.sizes), ("aspect_ratios", self._ratios)):
            if not values or not all(values):
                raise ValueError(f"`{argument}` must not be empty; received {values}.")
            for number in itertools.chain(*values):
                check_positive(argument, number)
        for argument, entries in (("aspect_ratios", self._ratios), ("strides", self.strides)):
            if entries is not None and len(entries) != len(self.sizes):
                raise ValueError(
                    f"`{argument}` must have one entry for each of the {len(self.sizes)} levels "
                    f"of `sizes`; received {entries}."
                )
        counts = {len(s) * len(r) for s, r in zip(self.sizes, self._ratios, strict=True)}
        if len(counts) > 1:
            raise ValueError(
                "Every level must have the same number of anchors per location; received sizes "
                f"{self.sizes} and aspect ratios {self.aspect_ratios}."
            )

    @property
    def anchors_per_location(self) -> int:
        return len(self.sizes[0]) * len(self._ratios[0])

    def call(self, images, features: Mapping) -> dict:
        """Returns the anchors of each level.

        Args:
            images: `[B, H, W, C]`, the padded batch; only its size is used.
            features: level name to `[B, h, w, C]`, finest first, as many as `sizes`.

        Returns:
            Level name to `[h * w * anchors_per_location, 4]` float32 xyxy pixels of the padded
            batch: row by row, at each location size by size, the aspect ratio changing fastest.
        """
        self.check_levels(features)
        image_shape = ops.shape(images)
        anchors = {}
        for index, (level, feature) in enumerate(features.items()):
            height, width = ops.shape(feature)[1:3]
            if self.strides is None:
                stride_y, stride_x = image_shape[1] // height, image_shape[2] // width
            else:
                stride_y = stride_x = self.strides[index]
            rows = ops.arange(height, dtype="int32") * stride_y
            columns = ops.arange(width, dtype="int32") * stride_x
            y, x = ops.meshgrid(rows, columns, indexing="ij")
            centers = ops.cast(ops.stack([x, y, x, y], axis=-1), "float32")
            boxes = ops.reshape(centers, (-1, 1, 4)) + self._cell_anchors(index)
            anchors[level] = ops.reshape(boxes, (-1, 4))
        return anchors

    def compute_output_shape(self, images_shape, features_shape) -> dict:
        self.check_levels(features_shape)

        def count(shape):
            known = shape[1] is not None and shape[2] is not None
            return shape[1] * shape[2] * self.anchors_per_location if known else None

        return {level: (count(shape), 4) for level, shape in features_shape.items()}

    def check_levels(self, features: Mapping) -> None:
        """Checks that there are sizes for each level.

        Raises:
            ValueError: if `features` has more or fewer levels than `sizes`.
        """
        if len(features) != len(self.sizes):
            raise ValueError(
                "AnchorGenerator must have one entry in `sizes` for each feature map; received "
                f"the sizes {self.sizes} and maps of {', '.join(features)}."
            )

    def _cell_anchors(self, index):
        """`[anchors_per_location, 4]` anchors around 0."""
        cells = []
        for size in self.sizes[index]:
            if self.rounded:
                roots = np.sqrt(np.asarray(self._ratios[index], "float32"))
                heights, widths = np.float32(size) * roots, np.float32(size) * (1 / roots)
                cell = np.round(np.stack([-widths, -heights, widths, heights], axis=-1) / 2)
            else:
                ratios = np.asarray(self._ratios[index], "float64")
                widths = np.sqrt(size**2 / ratios)
                heights = ratios * widths
                cell = np.stack([-widths, -heights, widths, heights], axis=-1).astype("float32") / 2
            cells.append(cell)
        return np.concatenate(cells)


def _as_tuple(value):
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)
