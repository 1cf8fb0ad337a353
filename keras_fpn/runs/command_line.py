"""What the programs share towards the person who calls them."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def exits_on_bad_input() -> Iterator[None]:
    """Ends the program with the sentence of an error, without a traceback.

    Only around the checks and the loading of what the user named: an error in there is about what
    was named, an error anywhere else is a failure of the program and shows where it happened.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def exit_where_missing(*modules: str) -> None:
    """Ends the program with what to install, where modules that it imports are not there."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"error: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed; "
            "keras_fpn's programs want its extra 'training': pip install '.[training]' in the "
            "folder of the repository."
        )
