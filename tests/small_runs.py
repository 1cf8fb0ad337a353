"""Training runs of models smaller than a recipe's."""

import contextlib
import inspect
import types

import pytest

import keras_fpn
from keras_fpn.runs import training
from keras_fpn.runs.recipes import BUILDERS


@contextlib.contextmanager
def small_models(**replaced):
    """Runs build models with these arguments of the builders, whatever they are asked for.

    Args:
        **replaced: argument to a function that makes its value. Those of a ResNet have no place.
    """

    def smaller(build):
        known = inspect.signature(build).parameters

        def build_small(**arguments):
            if "weights" not in arguments:
                arguments.pop("resnet", None)
                arguments |= {name: make() for name, make in replaced.items() if name in known}
            return build(**arguments)

        return build_small

    builders = {name: smaller(getattr(keras_fpn, name)) for name in BUILDERS.values()}
    package = types.SimpleNamespace(__version__=keras_fpn.__version__, **builders)
    with pytest.MonkeyPatch.context() as patch:
        # Not in the package itself: other tests' models are built at any time.
        patch.setattr(training, "keras_fpn", package)
        yield
