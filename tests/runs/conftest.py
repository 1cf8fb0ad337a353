"""Fixtures of the tests of training runs."""

import pytest
import tensorflow as tf


@pytest.fixture(scope="module")
def module_runs_eagerly():
    """Steps without tracing, which takes longer than a few of them."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)
