from pathlib import Path

import keras
import numpy as np
import pytest
from keras.ops import convert_to_numpy

from keras_fpn.sampler import draw_samples


def draw(is_positive, is_negative, num_samples, positive_fraction, seed=0):
    generator = keras.random.SeedGenerator(seed)
    drawn = draw_samples(
        np.asarray(is_positive), np.asarray(is_negative), num_samples, positive_fraction, generator
    )
    return tuple(map(convert_to_numpy, drawn))


def masks(positives, negatives, neither=0):
    kind = np.array([1] * positives + [2] * negatives + [0] * neither)[None]
    kind = np.random.RandomState(0).permutation(kind.T).T
    return kind == 1, kind == 2


with np.load(Path(__file__).parent / "reference" / "parts.npz") as archive:
    COUNTS = archive["sampler_counts"]


@pytest.mark.parametrize("row", COUNTS, ids=lambda row: "-".join(f"{x:g}" for x in row[:4]))
def test_as_many_of_each_kind_as_the_reference_takes(row):
    size, fraction, positives, negatives, taken_positives, taken_negatives = row
    is_positive, is_negative = masks(int(positives), int(negatives), 50)
    indices, positive, sampled = (
        x[0] for x in draw(is_positive, is_negative, int(size), float(fraction))
    )
    assert len(indices) == int(size)
    assert positive.sum() == taken_positives
    assert (sampled & ~positive).sum() == taken_negatives
    # Each is of its kind, and none is there twice.
    assert is_positive[0, indices[positive]].all()
    assert is_negative[0, indices[sampled & ~positive]].all()
    assert len(set(indices[sampled])) == sampled.sum()


def test_positives_come_first_then_negatives_then_empty_rows():
    is_positive, is_negative = masks(3, 4, 5)
    _, positive, sampled = draw(is_positive, is_negative, 10, 0.5)
    np.testing.assert_array_equal(positive[0], [True] * 3 + [False] * 7)
    np.testing.assert_array_equal(sampled[0], [True] * 7 + [False] * 3)


def test_images_are_drawn_apart():
    is_positive = np.array([[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]], bool)
    is_negative = np.array([[0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], bool)
    indices, positive, sampled = draw(is_positive, is_negative, 4, 0.5)
    assert set(indices[0, :2]) == {0, 1}
    assert set(indices[0, 2:]) < {2, 3, 4}
    np.testing.assert_array_equal(indices[1, :2], [5, 0])
    np.testing.assert_array_equal(positive.sum(axis=1), [2, 1, 0])
    np.testing.assert_array_equal(sampled.sum(axis=1), [4, 2, 0])


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_a_share_of_none_and_of_all(fraction):
    is_positive, is_negative = masks(6, 6)
    _, positive, sampled = draw(is_positive, is_negative, 4, fraction)
    assert positive.sum() == 4 * fraction
    assert sampled.sum() == 4


def test_every_candidate_is_drawn_as_often():
    # 2,000 images of 5 positives and 5 negatives, of which 2 and 2 are drawn.
    is_positive = np.tile(np.arange(10) % 2 == 0, (2000, 1))
    indices, _, sampled = draw(is_positive, ~is_positive, 4, 0.5)
    assert sampled.all()
    often = np.bincount(indices.reshape(-1), minlength=10)
    # 800 expected; five standard deviations of a binomial draw.
    assert np.all(np.abs(often - 800) < 5 * np.sqrt(2000 * 0.4 * 0.6))


def test_a_seed_decides_the_draws_and_every_call_draws_anew():
    is_positive, is_negative = masks(100, 900)

    def two_draws(seed):
        generator = keras.random.SeedGenerator(seed)
        return [
            convert_to_numpy(draw_samples(is_positive, is_negative, 64, 0.5, generator)[0])
            for _ in range(2)
        ]

    first, second = two_draws(3)
    again, _ = two_draws(3)
    other, _ = two_draws(4)
    np.testing.assert_array_equal(first, again)
    assert (first != second).any()
    assert (first != other).any()
