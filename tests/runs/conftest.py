"""Fixtures of the tests of training runs."""

import inspect
import types

import pytest
import tensorflow as tf
from small_detector import tiny_backbone

import keras_fpn
from keras_fpn.runs import training
from keras_fpn.runs.recipes import BUILDERS


@pytest.fixture(scope="module")
def module_runs_eagerly():
    """Steps without tracing, which takes longer than a few of them."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.fixture(scope="module")
def two_levels():
    """Models on C3 and C4 of three convolutions, whatever backbone is asked for.

    Tracing is what takes the time of a run of a few steps.
    """
    builders = {name: on_two_levels(getattr(keras_fpn, name)) for name in BUILDERS.values()}
    package = types.SimpleNamespace(__version__=keras_fpn.__version__, **builders)
    with pytest.MonkeyPatch.context() as patch:
        # Not in the package itself: other tests' models are built at any time.
        patch.setattr(training, "keras_fpn", package)
        yield


def on_two_levels(build):
    def build_small(**arguments):
        if "weights" not in arguments:
            arguments.pop("resnet", None)
            arguments["backbone"] = tiny_backbone(("C3", "C4"))
            if "anchor_sizes" in inspect.signature(build).parameters:
                arguments.setdefault("anchor_sizes", (32, 48, 64))
        return build(**arguments)

    return build_small
