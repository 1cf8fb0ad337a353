"""The losses of both stages (Faster R-CNN, Eq. 1; Fast R-CNN, Eqs. 1 to 3).

Each is a sum over the samples divided by a number of samples that the caller gives, so that under
data parallelism every replica divides by the samples of all of them.
"""

from keras import ops


def objectness_loss(logits, is_positive, is_sampled, num_samples):
    """Log loss of object against background over the sampled anchors.

    Args:
        logits: `[B, S]`.
        is_positive: `[B, S]` bool.
        is_sampled: `[B, S]` bool; other rows do not count.
        num_samples: scalar divisor.

    Returns:
        Scalar.
    """
    targets = ops.cast(is_positive, "float32")
    cross_entropy = ops.softplus(logits) - logits * targets
    return ops.sum(ops.where(is_sampled, cross_entropy, 0.0)) / num_samples


def classification_loss(logits, labels, is_sampled, num_samples):
    """Log loss of the true class over the sampled regions.

    Args:
        logits: `[B, S, num_classes + 1]`, the background last.
        labels: `[B, S]` int32, -1 for the background.
        is_sampled: `[B, S]` bool; other rows do not count.
        num_samples: scalar divisor.

    Returns:
        Scalar.
    """
    labels = ops.where(labels < 0, logits.shape[-1] - 1, labels)
    true_logits = ops.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    cross_entropy = ops.logsumexp(logits, axis=-1) - true_logits
    return ops.sum(ops.where(is_sampled, cross_entropy, 0.0)) / num_samples


def box_loss(deltas, targets, is_positive, num_samples, beta: float = 1.0 / 9):
    """Smooth L1 between deltas and their targets, over the positives.

    Args:
        deltas: `[B, S, 4]`.
        targets: `[B, S, 4]`.
        is_positive: `[B, S]` bool; other rows do not count.
        num_samples: scalar divisor: all samples, not only the positives.
        beta: where the parabola goes over into the straight line; 0 is plain L1.

    Returns:
        Scalar.
    """
    difference = ops.abs(deltas - targets)
    if beta > 0:
        parabola = 0.5 * difference * difference / beta
        difference = ops.where(difference < beta, parabola, difference - 0.5 * beta)
    return ops.sum(ops.where(is_positive[..., None], difference, 0.0)) / num_samples
