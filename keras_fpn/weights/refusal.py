"""How the reader of weights files says that it does not read one."""

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

T = TypeVar("T")

DAMAGED = "is damaged or incomplete"


class Refused(Exception):
    """Why a file is not read, as the rest of a sentence that begins with its path."""


@contextlib.contextmanager
def damage(*errors: type[Exception]) -> Iterator[None]:
    """Attributes these errors to the file.

    Only for a single call whose errors the bytes of a file can cause. Anything raised elsewhere is
    a bug of the reader and reaches the caller as it is.
    """
    try:
        yield
    except errors as error:
        raise Refused(DAMAGED) from error


def typed(value: Any, expected: type[T]) -> T:
    """`value`, which the file must have given this very type."""
    if type(value) is not expected:
        raise Refused(f"is damaged: it has {kind(value)} where {expected.__name__} is expected")
    return value


def kind(value: Any) -> str:
    """The name of the value's type."""
    return type(value).__name__.lstrip("_")


def shown(name: str) -> str:
    """A name from the file, printable and short."""
    return ascii(name[:100])[1:-1]
