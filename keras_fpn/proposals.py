"""Proposals: the RPN's predictions decoded, ranked and filtered by NMS (FPN, section 4.1)."""

from collections.abc import Mapping, Sequence

import keras
from keras import ops

from keras_fpn.boxes import (
    MAX_LOG_SCALE,
    check_delta_weights,
    clip_boxes,
    decode_deltas,
    larger_than,
)
from keras_fpn.nms import non_max_suppression
from keras_fpn.ranking import take_rows, top_k
from keras_fpn.stage import Float32Stage
from keras_fpn.validation import check_fraction, check_int, check_non_negative


@keras.saving.register_keras_serializable("keras_fpn")
class ProposalGenerator(Float32Stage):
    """Selects the proposals of an image among the anchors of all levels.

    The `pre_nms` best anchors of each level are decoded and clipped to the image; NMS runs within
    each level; the `post_nms` best of all levels together remain. No gradient passes.

    Args:
        pre_nms: anchors per level before NMS, in inference. Defaults to 1000.
        post_nms: proposals per image, in inference. Defaults to 1000.
        training_pre_nms: anchors per level before NMS, in training. Defaults to 2000.
        training_post_nms: proposals per image, in training. Defaults to 2000.
        nms_iou_threshold: NMS IoU threshold. Defaults to 0.7.
        delta_weights: weights of (dx, dy, dw, dh): targets are multiplied, predictions divided by
            them. Defaults to 1 for all.
        max_log_scale: clamp on predicted dw, dh. Defaults to log(1000 / 16).
        min_size: proposals with a side below this many pixels are dropped. Defaults to 1e-3.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        pre_nms: int = 1000,
        post_nms: int = 1000,
        training_pre_nms: int = 2000,
        training_post_nms: int = 2000,
        nms_iou_threshold: float = 0.7,
        delta_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        max_log_scale: float = MAX_LOG_SCALE,
        min_size: float = 1e-3,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.pre_nms = check_int("pre_nms", pre_nms)
        self.post_nms = check_int("post_nms", post_nms)
        self.training_pre_nms = check_int("training_pre_nms", training_pre_nms)
        self.training_post_nms = check_int("training_post_nms", training_post_nms)
        self.nms_iou_threshold = check_fraction("nms_iou_threshold", nms_iou_threshold)
        self.delta_weights = check_delta_weights(delta_weights)
        self.max_log_scale = check_non_negative("max_log_scale", max_log_scale)
        self.min_size = check_non_negative("min_size", min_size)

    def call(
        self, objectness: Mapping, deltas: Mapping, anchors: Mapping, image_sizes, training=False
    ) -> tuple:
        """Returns the proposals of a batch.

        Args:
            objectness: level name to `[B, h, w, A]` logits.
            deltas: level name to `[B, h, w, 4 * A]`.
            anchors: level name to `[h * w * A, 4]` xyxy pixels.
            image_sizes: `[B, 2]`, height and width of each image, which proposals are clipped to.
            training: whether to use `training_pre_nms` and `training_post_nms`.

        Returns:
            `(boxes, scores)`: `[B, post_nms, 4]` xyxy pixels and `[B, post_nms]` objectness
            probabilities, sorted by score; padded with zero boxes of score -1.
        """
        pre_nms = self.training_pre_nms if training else self.pre_nms
        post_nms = self.training_post_nms if training else self.post_nms
        batch = ops.shape(image_sizes)[0]
        boxes, logits, levels = [], [], []
        for index, level in enumerate(objectness):
            known = objectness[level].shape[1:]
            count = pre_nms if None in known else min(pre_nms, known[0] * known[1] * known[2])
            best, rows = top_k(ops.reshape(objectness[level], (batch, -1)), count)
            level_deltas = take_rows(ops.reshape(deltas[level], (batch, -1, 4)), rows)
            level_anchors = ops.take(anchors[level], rows, axis=0)
            level_boxes = decode_deltas(
                level_deltas, level_anchors, self.delta_weights, self.max_log_scale
            )
            boxes.append(clip_boxes(level_boxes, image_sizes))
            logits.append(best)
            levels += [index] * count
        boxes = ops.concatenate(boxes, axis=1)
        logits = ops.concatenate(logits, axis=1)

        present = ops.logical_and(logits > -float("inf"), larger_than(boxes, self.min_size))
        scores = ops.where(present, ops.sigmoid(logits), -float("inf"))
        kept = non_max_suppression(
            boxes,
            scores,
            ops.convert_to_tensor([levels], "int32"),
            iou_threshold=self.nms_iou_threshold,
            max_output=post_nms,
        )
        found = kept >= 0
        kept = ops.maximum(kept, 0)
        boxes = ops.where(found[..., None], take_rows(boxes, kept), 0.0)
        scores = ops.where(found, take_rows(scores, kept), -1.0)
        return ops.stop_gradient(boxes), ops.stop_gradient(scores)

    def compute_output_shape(
        self,
        objectness_shape,
        deltas_shape,
        anchors_shape,
        image_sizes_shape,
    ) -> tuple:
        batch = image_sizes_shape[0]
        return (batch, self.post_nms, 4), (batch, self.post_nms)
