"""Checkpoints from which a run goes on as if it had never stopped."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import tempfile
import warnings
import zipfile
from pathlib import Path

import keras

_STATE_FILE = "training_state.json"
_CHECKPOINT = re.compile(r"step-(\d+)\.keras")


@dataclasses.dataclass
class RunState:
    """What of a run is not in the model: how far it is, and what it has seen.

    The model's part is in the same file: weights, batch norms' statistics, the samplers' seeds and
    the optimizer with its step count. The data need no more than the number of steps
    (`training_batches`).

    Attributes:
        steps: training steps taken.
        epochs: epochs ended, with their evaluation.
        best_AP: of the model in best.keras; -1 before there is one.
        history: losses and metrics of each epoch.
        curves: what was measured at some of the steps.
        means: totals and counts of the losses' means over the epoch so far.
    """

    steps: int = 0
    epochs: int = 0
    best_AP: float = -1.0
    history: list[dict] = dataclasses.field(default_factory=list)
    curves: list[dict] = dataclasses.field(default_factory=list)
    means: list[float] = dataclasses.field(default_factory=list)


def write_checkpoint(
    model: keras.Model, state: RunState, folder: Path, keep: int, is_writer: bool = True
) -> None:
    """Writes `step-N.keras`, whole or not at all, and removes all but the last `keep` of them.

    Every worker calls it, since all have to hand over what they hold; one writes into `folder`.

    Raises:
        OSError: where it cannot be written; those before it are as they were.
    """
    file = folder / f"step-{state.steps:08d}.keras"
    write_model(model, file, is_writer, state)
    if is_writer:
        for old in checkpoints(folder)[:-keep]:
            old.unlink()


def write_model(
    model: keras.Model, file: Path, is_writer: bool = True, state: RunState | None = None
) -> None:
    """Writes a .keras file, whole or not at all.

    Raises:
        OSError: where it cannot be written; what was there before is as it was.
    """
    if not is_writer:
        with tempfile.TemporaryDirectory() as nowhere:
            model.save(Path(nowhere) / "unused.keras")
        return
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
    """Writes a text file, whole or not at all.

    Raises:
        OSError: where it cannot be written; what was there before is as it was.
    """
    partial = file.with_name(f".partial-{file.name}")
    try:
        partial.write_text(text)
        _move_into_place(partial, file)
    except OSError as error:
        _raise_unwritten(error, partial, file)


def _move_into_place(partial: Path, file: Path) -> None:
    # The file is on the disk before it gets its name, and its name before anything follows.
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
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = "the disk is full; make room"
    else:
        reason = f"{error.strerror or error}; put it right"
    raise OSError(
        f"{file} could not be written: {reason} and start the same command again: it goes on from "
        "the last whole checkpoint."
    ) from error


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the last one at the end."""
    found = (file for file in folder.glob("step-*.keras") if _CHECKPOINT.fullmatch(file.name))
    return sorted(found, key=lambda file: int(_CHECKPOINT.fullmatch(file.name)[1]))


def read_checkpoint(model: keras.Model, file: Path) -> RunState:
    """Puts a checkpoint into a compiled model, and gives the state of its run.

    Raises:
        ValueError: where the file is damaged, has no state, or is of another architecture.
    """
    others = [str(other) for other in checkpoints(file.parent) if other != file]
    instead = f"the same command goes on from {others[-1]}" if others else "the run begins anew"
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"{damaged} in it does not have its checksum")
            state = RunState(**json.loads(archive.read(_STATE_FILE)))
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, EOFError) as error:
        raise ValueError(
            f"Checkpoint {file} cannot be read ({error}): move it away, then {instead}."
        ) from error
    try:
        with warnings.catch_warnings():
            # Keras warns where an optimizer's state is left out.
            warnings.filterwarnings("error", message=".*optimizer.*")
            model.load_weights(file)
    except (ValueError, UserWarning, KeyError) as error:
        # What follows names one of the layers and goes on over many lines.
        reason = str(error).strip().splitlines()[0].split(" Example error message")[0]
        raise ValueError(
            f"Checkpoint {file} is of another architecture than the one this run builds: train "
            "into another --output, or give its own run's config.json by --config. Keras says: "
            f"{reason}"
        ) from error
    return state
