"""One process at a time holds the lock of a folder, and none that is dead."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from keras_fpn.runs.run_folder import claim_folder, run_lock
from keras_fpn.runs.run_lock import LOCK_FILE, folder_lock

CONFIGURATION = {"recipe": {}}
HOLD = """
import sys
sys.argv[0] = "keras-fpn"
from keras_fpn.runs.run_lock import folder_lock
with folder_lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of a folder."""
    arguments = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_lock_names_its_holder_until_that_is_killed(holder, tmp_path):
    with (
        pytest.raises(BlockingIOError, match=rf"process {holder.pid} on {os.uname().nodename}"),
        run_lock(tmp_path, CONFIGURATION),
    ):
        pass
    holder.kill()
    holder.wait()
    # Its file is still there.
    assert f"process {holder.pid} " in (tmp_path / LOCK_FILE).read_text()
    with run_lock(tmp_path, CONFIGURATION):
        assert f"process {os.getpid()} " in (tmp_path / LOCK_FILE).read_text()


def test_a_lock_file_that_was_deleted_locks_no_more(holder, tmp_path):
    # As a user may do if the machine of the process is lost.
    (tmp_path / LOCK_FILE).unlink()
    with folder_lock(tmp_path):
        holder.communicate()
        # It leaves the file of another.
        assert (tmp_path / LOCK_FILE).exists()


def test_a_lock_leaves_nothing_but_what_was_written_beside_it(tmp_path):
    with folder_lock(tmp_path / "empty"), folder_lock(tmp_path / "full"):
        (tmp_path / "full" / "file").touch()
    (tmp_path / "old").mkdir()
    with folder_lock(tmp_path / "old"):
        pass
    assert {path.name for path in tmp_path.rglob("*")} == {"full", "file", "old"}


def test_a_lock_that_is_released_while_it_is_taken_is_not_held_on_a_removed_file(
    tmp_path, monkeypatch
):
    lock, calls = fcntl.lockf, []

    def lock_after_another_ended(descriptor, operation):
        if not calls:
            (tmp_path / LOCK_FILE).unlink()
        calls.append(lock(descriptor, operation))

    monkeypatch.setattr(fcntl, "lockf", lock_after_another_ended)
    with folder_lock(tmp_path):
        assert (tmp_path / LOCK_FILE).exists()
    assert len(calls) == 2


def test_a_file_system_without_locks_is_named_and_used(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.warns(UserWarning, match=f"{tmp_path.name}.* has no locks"), folder_lock(tmp_path):
        pass


def test_a_foreign_folder_and_a_file_are_not_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"), run_lock(tmp_path, CONFIGURATION):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(FileExistsError, match="is a file"), folder_lock(tmp_path / "notes.txt"):
        pass


def test_what_a_process_killed_at_its_start_leaves_is_no_other_run(tmp_path):
    for name in (LOCK_FILE, ".partial-config.json"):
        (tmp_path / name).touch()
    with run_lock(tmp_path, CONFIGURATION):
        assert claim_folder(tmp_path) == tmp_path
