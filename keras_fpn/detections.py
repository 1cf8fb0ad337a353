"""From the box head's predictions to the detections of an image."""

from collections.abc import Sequence

import keras
from keras import ops

from keras_fpn.boxes import (
    MAX_LOG_SCALE,
    check_box_format,
    clip_boxes,
    convert_boxes,
    decode_deltas,
    larger_than,
)
from keras_fpn.nms import non_max_suppression
from keras_fpn.ranking import take_rows


@keras.saving.register_keras_serializable("keras_fpn")
class DetectionGenerator(keras.layers.Layer):
    """Decodes the boxes of every class, drops the unlikely ones, and thins out each class.

    Args:
        score_threshold: a detection's score is over this.
        nms_iou_threshold: boxes of a class that overlap by more than this compete.
        max_detections: an image keeps this many, the best of all classes together.
        delta_weights: what the head's (dx, dy, dw, dh) are divided by.
        max_log_scale: dw and dh count as at most this.
        min_size: a box with a side under this many pixels is dropped.
        bounding_box_format: of the detections.
    """

    def __init__(
        self,
        score_threshold: float = 0.05,
        nms_iou_threshold: float = 0.5,
        max_detections: int = 100,
        delta_weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
        max_log_scale: float = MAX_LOG_SCALE,
        min_size: float = 1e-2,
        bounding_box_format: str = "xyxy",
        **kwargs,
    ):
        kwargs.setdefault("dtype", "float32")
        super().__init__(**kwargs)
        self.score_threshold = score_threshold
        self.nms_iou_threshold = nms_iou_threshold
        self.max_detections = max_detections
        self.delta_weights = tuple(delta_weights)
        self.max_log_scale = max_log_scale
        self.min_size = min_size
        self.bounding_box_format = check_box_format(bounding_box_format)

    def call(self, class_logits, deltas, proposals, proposal_scores, image_sizes) -> dict:
        """Detections of a batch.

        Args:
            class_logits: `[B, R, num_classes + 1]`, the background last.
            deltas: `[B, R, num_classes, 4]`.
            proposals: `[B, R, 4]` xyxy pixels.
            proposal_scores: `[B, R]`, negative where there is no proposal.
            image_sizes: `[B, 2]` height and width that the boxes are clipped to.

        Returns:
            `{"boxes": [B, D, 4], "scores": [B, D], "labels": [B, D], "num_detections": [B]}`: boxes
            in `bounding_box_format`, probabilities in falling order, int32; rows without a
            detection have label -1 and zeros.
        """
        regions, num_classes = deltas.shape[1:3]
        boxes = decode_deltas(
            deltas, proposals[:, :, None, :], self.delta_weights, self.max_log_scale
        )
        boxes = ops.reshape(clip_boxes(boxes, image_sizes), (-1, regions * num_classes, 4))
        scores = ops.softmax(class_logits, axis=-1)[..., :num_classes]
        scores = ops.where(proposal_scores[..., None] >= 0, scores, -float("inf"))
        scores = ops.reshape(scores, (-1, regions * num_classes))
        wanted = ops.logical_and(scores > self.score_threshold, larger_than(boxes, self.min_size))
        scores = ops.where(wanted, scores, -float("inf"))
        labels = ops.tile(ops.arange(num_classes, dtype="int32"), [regions])[None, :]

        kept = non_max_suppression(
            boxes,
            scores,
            labels,
            iou_threshold=self.nms_iou_threshold,
            max_output=self.max_detections,
        )
        found = kept >= 0
        kept = ops.maximum(kept, 0)
        boxes = convert_boxes(take_rows(boxes, kept), "xyxy", self.bounding_box_format, image_sizes)
        return {
            "boxes": ops.where(found[..., None], boxes, 0.0),
            "scores": ops.where(found, take_rows(scores, kept), 0.0),
            "labels": ops.where(found, kept % num_classes, -1),
            "num_detections": ops.sum(ops.cast(found, "int32"), axis=-1),
        }

    def compute_output_spec(self, class_logits, *args) -> dict:
        batch, kept = class_logits.shape[0], self.max_detections
        return {
            "boxes": keras.KerasTensor((batch, kept, 4), "float32"),
            "scores": keras.KerasTensor((batch, kept), "float32"),
            "labels": keras.KerasTensor((batch, kept), "int32"),
            "num_detections": keras.KerasTensor((batch,), "int32"),
        }

    def get_config(self):
        config = super().get_config()
        config.update(
            score_threshold=self.score_threshold,
            nms_iou_threshold=self.nms_iou_threshold,
            max_detections=self.max_detections,
            delta_weights=self.delta_weights,
            max_log_scale=self.max_log_scale,
            min_size=self.min_size,
            bounding_box_format=self.bounding_box_format,
        )
        return config
