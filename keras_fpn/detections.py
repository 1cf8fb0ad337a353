"""Detections: the box head's predictions decoded, thresholded and filtered by NMS per class."""

from collections.abc import Sequence

import keras
from keras import ops

from keras_fpn.boxes import (
    MAX_LOG_SCALE,
    check_box_format,
    check_delta_weights,
    clip_boxes,
    convert_boxes,
    decode_deltas,
    larger_than,
)
from keras_fpn.nms import non_max_suppression
from keras_fpn.ranking import take_rows
from keras_fpn.stage import Float32Stage
from keras_fpn.validation import check_fraction, check_int, check_non_negative


@keras.saving.register_keras_serializable("keras_fpn")
class DetectionGenerator(Float32Stage):
    """Selects the detections of an image among the boxes of all regions and classes.

    Args:
        score_threshold: detections have a score above this. Defaults to 0.05.
        nms_iou_threshold: NMS IoU threshold, per class. Defaults to 0.5.
        max_detections: detections per image, the best of all classes together. Defaults to 100.
        delta_weights: weights of (dx, dy, dw, dh): targets are multiplied, predictions divided by
            them. Defaults to (10, 10, 5, 5).
        max_log_scale: clamp on predicted dw, dh. Defaults to log(1000 / 16).
        min_size: boxes with a side below this many pixels are dropped. Defaults to 1e-2.
        bounding_box_format: format of the detections and of the ground truth: "xyxy" (the
            default), "yxyx", "xywh", "center_xywh", "center_yxhw", or one of these after "rel_".

    Raises:
        ValueError: if a number is out of range, or the format is unknown.
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
        super().__init__(**kwargs)
        self.score_threshold = check_fraction("score_threshold", score_threshold)
        self.nms_iou_threshold = check_fraction("nms_iou_threshold", nms_iou_threshold)
        self.max_detections = check_int("max_detections", max_detections)
        self.delta_weights = check_delta_weights(delta_weights)
        self.max_log_scale = check_non_negative("max_log_scale", max_log_scale)
        self.min_size = check_non_negative("min_size", min_size)
        self.bounding_box_format = check_box_format(bounding_box_format)

    def call(self, class_logits, deltas, proposals, proposal_scores, image_sizes) -> dict:
        """Returns the detections of a batch.

        Args:
            class_logits: `[B, R, num_classes + 1]`, the background last.
            deltas: `[B, R, num_classes, 4]`.
            proposals: `[B, R, 4]` xyxy pixels.
            proposal_scores: `[B, R]`, negative where there is no proposal.
            image_sizes: `[B, 2]`, height and width of each image, which boxes are clipped to.

        Returns:
            `{"boxes": [B, D, 4], "scores": [B, D], "labels": [B, D], "num_detections": [B]}`: boxes
            in `bounding_box_format`, probabilities in descending order, int32 labels; padded with
            zeros and label -1.
        """
        regions, num_classes = deltas.shape[1:3]
        boxes = decode_deltas(
            deltas, proposals[:, :, None, :], self.delta_weights, self.max_log_scale
        )
        boxes = ops.reshape(clip_boxes(boxes, image_sizes), (-1, regions * num_classes, 4))
        scores = ops.softmax(class_logits, axis=-1)[..., :num_classes]
        scores = ops.where(proposal_scores[..., None] >= 0, scores, -float("inf"))
        scores = ops.reshape(scores, (-1, regions * num_classes))
        candidate = ops.logical_and(
            scores > self.score_threshold, larger_than(boxes, self.min_size)
        )
        scores = ops.where(candidate, scores, -float("inf"))
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
