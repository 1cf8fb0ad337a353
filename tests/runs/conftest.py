"""Fixtures of the tests of training runs."""

import pytest

from keras_fpn.resnet import STAGE_BLOCKS


@pytest.fixture(scope="module", autouse=True)
def short_resnet():
    """Gives ResNet-18 one block per stage: tracing it is what takes the time of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STAGE_BLOCKS, 18, (1, 1, 1, 1))
        yield
