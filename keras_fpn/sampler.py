"""Sampling of the candidates that the losses are computed on."""

import keras
from keras import ops

from keras_fpn.ranking import take_rows, top_k
from keras_fpn.replicas import rows_of_replica


def draw_samples(
    is_positive,
    is_negative,
    num_samples: int,
    positive_fraction: float,
    seed: keras.random.SeedGenerator | int,
) -> tuple:
    """Samples candidates at random, with at most a given fraction of positives.

    If there are fewer positives, negatives take their place (Faster R-CNN, section 3.1.3; Fast
    R-CNN, section 2.3).

    Args:
        is_positive: `[B, N]` bool.
        is_negative: `[B, N]` bool; a candidate that is neither is never drawn.
        num_samples: samples per image.
        positive_fraction: largest fraction of positives.
        seed: seed generator, or an integer for the same samples at every call.

    Returns:
        `(indices, positive, sampled)`, each `[B, num_samples]`: indices into N, positives first;
        whether a row is positive; whether it is a sample, which the last rows are not if there are
        too few candidates.
    """
    absent = -float("inf")
    batch_size, num_candidates = ops.shape(is_positive)
    noise = _noise(batch_size, num_candidates, seed)
    max_positives = int(num_samples * positive_fraction)
    drawn, positives = top_k(ops.where(is_positive, noise, absent), max_positives)
    positive_drawn = drawn > absent
    drawn, negatives = top_k(ops.where(is_negative, noise, absent), num_samples)
    place = ops.arange(num_samples, dtype="int32")[None, :]
    num_positives = ops.sum(ops.cast(positive_drawn, "int32"), axis=-1, keepdims=True)
    negative_drawn = ops.logical_and(drawn > absent, place < num_samples - num_positives)

    indices = ops.concatenate([positives, negatives], axis=-1)
    sampled = ops.concatenate([positive_drawn, negative_drawn], axis=-1)
    present, front = top_k(ops.where(sampled, 0.0, absent), num_samples)
    sampled = present > absent
    return take_rows(indices, front), ops.logical_and(place < num_positives, sampled), sampled


def _noise(batch_size, num_candidates, seed):
    """Returns `[B, N]` draws from 0..1 that depend on an image's place in the global batch.

    So two replicas of one image draw what one replica of two draws. Every replica draws the same
    two numbers per candidate, and image i adds i times the second to the first, modulo 1: uniform
    draws, independent within an image and between any two, at a cost that does not depend on the
    number of replicas.
    """
    first, second = ops.unstack(keras.random.uniform((2, num_candidates), seed=seed), 2)
    rows = ops.cast(rows_of_replica(batch_size), "float32")[:, None]
    return ops.mod(first + ops.mod(rows * second, 1.0), 1.0)
