"""The losses of both stages (Faster R-CNN, Eq. 1; Fast R-CNN, Eqs. 1 to 3).

Each is a sum over samples divided by the number of samples of all replicas together, so that
losses and gradients of replicas are to be summed.
"""

from collections.abc import Mapping

import keras
from keras import ops

from keras_fpn.monitoring import monitor
from keras_fpn.ranking import take_rows
from keras_fpn.replicas import sum_over_replicas
from keras_fpn.stage import Float32Stage
from keras_fpn.typing import Tensor
from keras_fpn.validation import check_non_negative


@keras.saving.register_keras_serializable("keras_fpn")
class RPNLoss(Float32Stage):
    """Losses of the RPN over the sampled anchors.

    Args:
        smooth_l1_beta: where smooth L1 changes from a parabola to a line; 0 is L1. Defaults to
            1/9.

    Raises:
        ValueError: if `smooth_l1_beta` is negative.
    """

    def __init__(self, smooth_l1_beta: float = 1.0 / 9, **kwargs):
        super().__init__(**kwargs)
        self.smooth_l1_beta = check_non_negative("smooth_l1_beta", smooth_l1_beta)

    def call(self, objectness: Mapping, deltas: Mapping, targets: Mapping) -> dict:
        """Returns the losses.

        Args:
            objectness: level name to `[B, h, w, A]` logits, in the order of the anchors.
            deltas: level name to `[B, h, w, 4 * A]`.
            targets: what `RPNTargets` returns.

        Returns:
            `{"objectness_loss", "rpn_box_loss"}`, scalars.
        """
        logits = take_rows(_all_levels(objectness, 1)[..., 0], targets["indices"])
        deltas = take_rows(_all_levels(deltas, 4), targets["indices"])
        positive, sampled = targets["positive"], targets["sampled"]
        num_samples = _count_samples("rpn_positives", positive, sampled)
        return {
            "objectness_loss": objectness_loss(logits, positive, sampled, num_samples),
            "rpn_box_loss": box_loss(
                deltas, targets["deltas"], positive, num_samples, self.smooth_l1_beta
            ),
        }


@keras.saving.register_keras_serializable("keras_fpn")
class RoILoss(Float32Stage):
    """Losses of the box head over the sampled regions.

    Args:
        smooth_l1_beta: where smooth L1 changes from a parabola to a line; 0 is L1. Defaults to
            1/9.

    Raises:
        ValueError: if `smooth_l1_beta` is negative.
    """

    def __init__(self, smooth_l1_beta: float = 1.0 / 9, **kwargs):
        super().__init__(**kwargs)
        self.smooth_l1_beta = check_non_negative("smooth_l1_beta", smooth_l1_beta)

    def call(self, class_logits, deltas, targets: Mapping) -> dict:
        """Returns the losses.

        Args:
            class_logits: `[B, S, num_classes + 1]` of the sampled regions, the background last.
            deltas: `[B, S, num_classes, 4]`; those of the true class count.
            targets: what `RoITargets` returns.

        Returns:
            `{"class_loss", "box_loss"}`, scalars.
        """
        labels, positive = targets["labels"], targets["positive"]
        true_class = ops.maximum(labels, 0)[..., None, None]
        deltas = ops.take_along_axis(deltas, true_class, axis=2)[:, :, 0]
        num_samples = _count_samples("roi_positives", positive, targets["sampled"])
        return {
            "class_loss": classification_loss(
                class_logits, labels, targets["sampled"], num_samples
            ),
            "box_loss": box_loss(
                deltas, targets["deltas"], positive, num_samples, self.smooth_l1_beta
            ),
        }


def objectness_loss(logits, is_positive, is_sampled, num_samples) -> Tensor:
    """Returns the binary cross-entropy of object against background over the sampled anchors.

    Args:
        logits: `[B, S]`.
        is_positive: `[B, S]` bool.
        is_sampled: `[B, S]` bool; other rows are ignored.
        num_samples: scalar divisor.

    Returns:
        Scalar.
    """
    targets = ops.cast(is_positive, "float32")
    cross_entropy = ops.softplus(logits) - logits * targets
    return ops.sum(ops.where(is_sampled, cross_entropy, 0.0)) / num_samples


def classification_loss(logits, labels, is_sampled, num_samples) -> Tensor:
    """Returns the cross-entropy of the true class over the sampled regions.

    Args:
        logits: `[B, S, num_classes + 1]`, the background last.
        labels: `[B, S]` int32, -1 for the background.
        is_sampled: `[B, S]` bool; other rows are ignored.
        num_samples: scalar divisor.

    Returns:
        Scalar.
    """
    labels = ops.where(labels < 0, logits.shape[-1] - 1, labels)
    true_logits = ops.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    cross_entropy = ops.logsumexp(logits, axis=-1) - true_logits
    return ops.sum(ops.where(is_sampled, cross_entropy, 0.0)) / num_samples


def box_loss(deltas, targets, is_positive, num_samples, beta: float) -> Tensor:
    """Returns the smooth L1 loss between deltas and their targets over the positives.

    Args:
        deltas: `[B, S, 4]`.
        targets: `[B, S, 4]`.
        is_positive: `[B, S]` bool; other rows are ignored.
        num_samples: scalar divisor: all samples, not only the positives.
        beta: where the parabola changes to a line; 0 is L1.

    Returns:
        Scalar.
    """
    difference = ops.abs(deltas - targets)
    if beta > 0:
        parabola = 0.5 * difference * difference / beta
        difference = ops.where(difference < beta, parabola, difference - 0.5 * beta)
    return ops.sum(ops.where(is_positive[..., None], difference, 0.0)) / num_samples


def _all_levels(predictions, size):
    """Predictions of all levels as `[B, N, size]` float32, in the order of the anchors."""
    flat = [ops.reshape(x, (ops.shape(x)[0], -1, size)) for x in predictions.values()]
    return ops.cast(ops.concatenate(flat, axis=1), "float32")


def _count_samples(name, is_positive, is_sampled):
    """The number of samples of all replicas, at least 1; monitors the fraction of positives."""
    counts = ops.stack([ops.sum(ops.cast(x, "float32")) for x in (is_positive, is_sampled)])
    num_positives, num_samples = ops.unstack(sum_over_replicas(counts), 2)
    num_samples = ops.maximum(num_samples, 1.0)
    monitor(name, num_positives / num_samples)
    return num_samples
