"""A full disk, for tests of what is written."""

import contextlib
import resource


@contextlib.contextmanager
def no_file_grows():
    """Files of this process cannot grow, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
