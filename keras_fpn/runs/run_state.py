"""Checkpoints from which a run resumes as if it had never stopped."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from keras_fpn.validation import check_int

if TYPE_CHECKING:
    import keras

_STATE_FILE = "training_state.json"
_CHECKPOINT = re.compile(r"step-(\d+)\.keras")
# What reading a damaged archive raises; a RecursionError is a RuntimeError.
_DAMAGES = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError)
_DAMAGES += (KeyError, TypeError)


@dataclasses.dataclass
class RunState:
    """Progress of a run.

    It is stored in the checkpoint, beside the weights, the moving statistics, the samplers' seeds
    and the optimizer with its step count. The data follow from the number of steps
    (`training_batches(start_step=)`).

    Attributes:
        steps: training steps taken.
        epochs: epochs completed, with their evaluation.
        best_score: AP of best.keras, AR1k of an RPN; -1 before there is one.
        history: losses and metrics of each epoch.
        curves: values of some of the steps.
        means: totals and counts of the losses' means over the current epoch.
    """

    steps: int = 0
    epochs: int = 0
    best_score: float = -1.0
    history: list[dict] = dataclasses.field(default_factory=list)
    curves: list[dict] = dataclasses.field(default_factory=list)
    means: list[float] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        check_int("steps", self.steps, minimum=0)
        check_int("epochs", self.epochs, minimum=0, maximum=self.steps)
        if not _is_number(self.best_score):
            raise ValueError(f"`best_score` must be a number; received {self.best_score!r}.")
        for name in ("history", "curves"):
            rows = getattr(self, name)
            is_table = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
            if not is_table or not all(_is_number(x) for row in rows for x in row.values()):
                raise ValueError(f"`{name}` must be a list of numbers by name; received others.")
        if not isinstance(self.means, list) or not all(map(_is_number, self.means)):
            raise ValueError(f"`means` must be a list of numbers; received {self.means!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def checkpoint_file(folder: Path, steps: int) -> Path:
    """Returns the path of the checkpoint after a number of steps."""
    return folder / f"step-{steps:08d}.keras"


def write_checkpoint(
    model: "keras.Model", state: RunState, folder: Path, keep: int, is_writer: bool = True
) -> None:
    """Writes `step-N.keras` atomically, and removes all but the `keep` latest checkpoints.

    Every worker must call it, since reading the weights may be collective; one writes to `folder`.

    Raises:
        OSError: if it cannot be written; earlier checkpoints are left as they are.
    """
    if not is_writer:
        with tempfile.TemporaryDirectory() as unused:
            file = Path(unused) / "unused.keras"
            with writing(file):
                model.save(file)
        return
    write_model(model, checkpoint_file(folder, state.steps), state)
    for old in checkpoints(folder)[:-keep]:
        old.unlink()


def write_model(model: "keras.Model", file: Path, state: RunState | None = None) -> None:
    """Writes a `.keras` file atomically.

    Raises:
        OSError: if it cannot be written; an earlier file is left as it is.
    """
    partial = file.with_name(f".partial-{file.name}")
    try:
        model.save(partial)
        if state is not None:
            with zipfile.ZipFile(partial, "a") as archive:
                archive.writestr(_STATE_FILE, json.dumps(dataclasses.asdict(state)))
        _move_into_place(partial, file)
    except OSError as error:
        _raise_unwritten(error, partial, file)


def write_text(file: Path, text: str) -> None:
    """Writes a text file atomically.

    Raises:
        OSError: if it cannot be written; an earlier file is left as it is.
    """
    write_bytes(file, text.encode())


def write_bytes(file: Path, content: bytes) -> None:
    """Writes a file atomically.

    Raises:
        OSError: if it cannot be written; an earlier file is left as it is.
    """
    partial = file.with_name(f".partial-{file.name}")
    try:
        partial.write_bytes(content)
        _move_into_place(partial, file)
    except OSError as error:
        _raise_unwritten(error, partial, file)


def _move_into_place(partial: Path, file: Path) -> None:
    # The contents are on disk before the file gets its name, and the name before this returns.
    for path, flags in ((partial, os.O_RDWR), (file.parent, os.O_RDONLY)):
        descriptor = os.open(path, flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if path == partial:
            os.replace(partial, file)


def _raise_unwritten(error: OSError, partial: Path, file: Path) -> None:
    with contextlib.suppress(OSError):
        partial.unlink()
    raise unwritten(file, error) from error


@contextlib.contextmanager
def writing(file: Path) -> Iterator[None]:
    """Raises the error of `unwritten` for one of the operating system."""
    try:
        yield
    except OSError as error:
        raise unwritten(file, error) from error


def unwritten(file: Path, error: Exception) -> OSError:
    """Returns the error of a file that cannot be written, which says what to do.

    Args:
        file: the file, or the folder of several.
        error: the reason, an error of the operating system, HDF5 or TensorFlow.
    """
    text = str(error)
    if any(os.strerror(number) in text for number in (errno.ENOSPC, errno.EDQUOT)):
        reason = "the disk is full; free some space"
    else:
        reason = f"{getattr(error, 'strerror', None) or text.splitlines()[0]}; fix this"
    return OSError(f"{file} could not be written: {reason} and rerun the same command.")


def checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints of a run, the latest one last."""
    found = (file for file in folder.glob("step-*.keras") if _CHECKPOINT.fullmatch(file.name))
    return sorted(found, key=lambda file: int(_CHECKPOINT.fullmatch(file.name)[1]))


def read_checkpoint(model: "keras.Model", file: Path) -> RunState:
    """Loads a checkpoint into a compiled model, and returns the state of its run.

    Raises:
        ValueError: if the file is damaged, has no state, or is of another architecture.
    """
    others = [str(other) for other in checkpoints(file.parent) if other != file]
    resume = f"resume from {others[-1]}" if others else "start again"
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"bad checksum of {damaged}")
            state = RunState(**json.loads(archive.read(_STATE_FILE)))
        if checkpoint_file(file.parent, state.steps) != file:
            raise ValueError(f"it is of step {state.steps}")
    except _DAMAGES as error:
        raise ValueError(
            f"Checkpoint {file} cannot be read ({error}); move it away and rerun the same command "
            f"to {resume}."
        ) from error
    try:
        with warnings.catch_warnings():
            # Keras only warns if an optimizer's state does not fit.
            warnings.filterwarnings("error", message=".*optimizer.*")
            model.load_weights(file)
    except (ValueError, UserWarning, KeyError) as error:
        # The first line names a layer; many more follow.
        reason = str(error).strip().splitlines()[0].split(" Example error message")[0]
        raise ValueError(
            f"Checkpoint {file} has another architecture than the model of this run; give another "
            f"--output, or the checkpoint's own config.json as --config. Keras says: {reason}"
        ) from error
    return state
