"""Fixtures of the tests of training runs."""

import pytest
import tensorflow as tf
from small_detector import tiny_backbone
from small_runs import small_models


@pytest.fixture(scope="module")
def module_runs_eagerly():
    """Steps without tracing, which takes longer than a few of them."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.fixture(scope="module")
def two_levels():
    """Models on C3 and C4 of three convolutions: tracing is what takes the time of a short run."""
    with small_models(
        backbone=lambda: tiny_backbone(("C3", "C4")), anchor_sizes=lambda: (32, 48, 64)
    ):
        yield
