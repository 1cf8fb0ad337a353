"""The lock of an output folder: one program at a time writes to it."""

import contextlib
import errno
import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

LOCK_FILE = ".lock"


@contextlib.contextmanager
def folder_lock(folder: str | os.PathLike) -> Iterator[None]:
    """Holds the lock of a folder, which is created if it does not exist.

    A folder that it created is removed at the end if it is still empty.

    It is a POSIX lock on `.lock`. The kernel releases it when the process ends, however it ends; on
    NFS the server keeps it (version 4; version 3 with lockd), also for processes on other machines.
    The file names process and machine, and is removed at the end.

    Args:
        folder: path of the folder.

    Raises:
        BlockingIOError: if another process holds it.
        FileExistsError: if the path is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"--output must be a folder; {str(folder)!r} is a file.")
    is_new = not folder.exists()
    file = folder / LOCK_FILE
    descriptor = _lock(file)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        os.fsync(descriptor)  # Other machines see it.
        yield
    finally:
        if _is_at(descriptor, file):
            file.unlink()
        if is_new:
            with contextlib.suppress(OSError):  # It is not empty.
                folder.rmdir()
        os.close(descriptor)


def _lock(file: Path) -> int:
    """Returns the descriptor of a lock file that this process has locked."""
    while True:
        # A process that ends may have removed it.
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            if error.errno in (errno.EAGAIN, errno.EACCES):
                os.close(descriptor)
                raise BlockingIOError(
                    f"{str(file.parent)!r} is in use by {holder or 'another process'}; wait until "
                    "it ends, or give another --output. If its machine no longer exists, delete "
                    f"{file}."
                ) from None
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                os.close(descriptor)
                raise
            warnings.warn(
                f"The file system of {str(file.parent)!r} has no locks ({error.strerror}): do not "
                "start a second program on this folder, it would not notice.",
                stacklevel=3,
            )
        if _is_at(descriptor, file):
            return descriptor
        # The process that held it has removed it between the two calls.
        os.close(descriptor)


def _is_at(descriptor: int, file: Path) -> bool:
    """Whether a file is still the one that was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False
