"""Values of a training step beside its losses: `monitor` them, find them in `last_step`."""

import contextlib
import threading
from collections.abc import Iterator

_monitored = threading.local()  # Replicas are traced in threads of their own.


def monitor(name: str, value) -> None:
    """Makes a scalar of a training step appear in `Detector.last_step`.

    Anything that runs in a training step may call it: a stage, `compute_losses`, `train_step`. It
    has no effect elsewhere.

    Args:
        name: key in `last_step`.
        value: scalar tensor, the same on all replicas.
    """
    values = getattr(_monitored, "values", None)
    if values is not None:
        values[name] = value


@contextlib.contextmanager
def collect_monitored() -> Iterator[dict]:
    """Yields the dictionary that `monitor` writes to within the context."""
    outer = getattr(_monitored, "values", None)
    _monitored.values = {}
    try:
        yield _monitored.values
    finally:
        _monitored.values = outer
