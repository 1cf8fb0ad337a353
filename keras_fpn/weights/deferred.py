"""Models whose variables have shapes before they have values, so that sizes cost nothing."""

import contextlib
import random
from collections.abc import Callable, Iterator

import keras
import numpy as np

# Keras's own list of variables without values, which has no public name.
from keras.src.backend.common import global_state

UNINITIALIZED = "uninitialized_variables"


@contextlib.contextmanager
def deferred_values() -> Iterator[Callable[[], None]]:
    """Variables that are made in this scope have shapes, but no memory.

    Yields:
        A function that gives them their initial values, to be called after the scope, or never.
    """
    made: list = []
    earlier = global_state.get_global_attribute(UNINITIALIZED, [])
    global_state.set_global_attribute(UNINITIALIZED, made)

    def allocate() -> None:
        for variable in made:
            variable._deferred_initialize()

    try:
        with keras.StatelessScope(initialize_variables=False):
            yield allocate
    finally:
        # The end of any later scope gives values to all variables of the list.
        global_state.set_global_attribute(UNINITIALIZED, earlier)


def give_first_value(variable: keras.Variable, value: np.ndarray) -> bool:
    """Has a variable without memory start with a value, in place of one that is drawn.

    Returns:
        Whether the variable is without memory.
    """
    if variable._value is not None:
        return False
    # A copy: TensorFlow may write where the array that a variable was made from is.
    variable._initializer = lambda shape, dtype=None: keras.ops.convert_to_tensor(
        value.astype("float32"), dtype
    )
    return True


@contextlib.contextmanager
def same_random_seeds() -> Iterator[None]:
    """Layers that are made in this scope leave no trace in the seeds of those made after it."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)
