"""Feature Pyramid Networks with Faster R-CNN (Lin et al., CVPR 2017) for Keras 3.

Importing it registers all classes for `keras.saving.load_model`. In the command `keras-fpn` alone,
that happens when the first name is used: it answers `--help` and typing errors without waiting for
TensorFlow.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING or Path(sys.argv[0]).stem != "keras-fpn":
    from keras_fpn.api import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if not name.startswith("_"):
        api = importlib.import_module("keras_fpn.api")
        if hasattr(api, name):
            return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
