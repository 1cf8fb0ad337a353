"""The folder of a training run: config.json, and checkpoints/best.keras and step-N.keras."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from keras_fpn.runs.options import flatten
from keras_fpn.runs.recipes import Recipe, check_recipe
from keras_fpn.runs.run_lock import LOCK_FILE, folder_lock
from keras_fpn.runs.run_state import checkpoints, write_text
from keras_fpn.validation import did_you_mean

if TYPE_CHECKING:
    from keras_fpn.detector import Detector

# Entries of config.json that record the environment, or follow from the others.
_NOT_COMPARED = ("recipe", "versions", "data_dir", "stages", "data")
# Those that are known when the data have been read.
_OF_DATA = ("class_names", "category_ids")
# Types of the entries that programs read.
_KINDS = {
    **dict.fromkeys(("dataset", "data_dir", "train_split", "validation_split"), str),
    **dict.fromkeys(("proposals", "validation_proposals"), str),
    **dict.fromkeys(("class_names", "category_ids"), list),
    "data": dict,
}


def claim_folder(path: str | os.PathLike) -> Path:
    """Creates a folder for new output.

    Raises:
        FileExistsError: if the path is a file, or a folder that is not empty.
    """
    path = Path(path)
    _check_free(path, may_hold_run=False)
    path.mkdir(parents=True, exist_ok=True)
    return path


def _check_free(path: Path, may_hold_run: bool) -> None:
    # What a process leaves that is killed at its start counts as empty.
    names = {*os.listdir(path)} - {LOCK_FILE, ".partial-config.json"} if path.is_dir() else set()
    is_run = "config.json" in names
    if (names and not (is_run and may_hold_run)) or (path.exists() and not path.is_dir()):
        holds = "holds another run" if is_run else "is not empty"
        raise FileExistsError(f"--output must be a new or empty folder; {str(path)!r} {holds}.")


@contextlib.contextmanager
def run_lock(path: str | os.PathLike, configuration: dict) -> Iterator[None]:
    """Creates the folder of a run, or opens it, and holds its lock.

    Args:
        path: path of the folder.
        configuration: what was asked for of the run, as far as it is known without reading data.

    Raises:
        FileExistsError: if the path is a file, or a folder of something else.
        BlockingIOError: if another process holds the lock.
        ValueError: if it is the folder of a run of another configuration.
    """
    path = Path(path)
    _check_free(path, may_hold_run=True)
    with folder_lock(path):
        if (path / "config.json").exists():
            theirs = read_configuration(path / "config.json")
            theirs = {name: x for name, x in theirs.items() if name not in _OF_DATA}
            _check_same_run(path, theirs, configuration)
        yield


def claim_run(
    path: str | os.PathLike, configuration: dict, allow_changed_data: bool = False
) -> Path | None:
    """Creates the folder of a run, or opens the one that the same command has created.

    Args:
        path: path of the folder, whose lock the caller holds.
        configuration: configuration of the run, which is written to config.json.
        allow_changed_data: whether the data may be others than those that the run began with.

    Returns:
        The checkpoint to resume from, or None.

    Raises:
        FileExistsError: if the path is a file, or a folder of something else.
        ValueError: if it is the folder of a run of another configuration, or of other data.
    """
    path = Path(path)
    config_file = path / "config.json"
    if not config_file.exists():
        claim_folder(path)
        write_text(config_file, json.dumps(configuration, indent=2) + "\n")
    theirs, ours = read_configuration(config_file), configuration
    if not allow_changed_data:
        _check_same_data(path, theirs.get("data") or {}, ours.get("data") or {})
    _check_same_run(path, theirs, ours)
    (path / "checkpoints").mkdir(exist_ok=True)
    for partial in [*path.glob(".partial-*"), *(path / "checkpoints").glob(".partial-*")]:
        partial.unlink()
    return (checkpoints(path / "checkpoints") or [None])[-1]


def _check_same_data(path: Path, theirs: dict, ours: dict) -> None:
    """Checks the fingerprints of splits by name; an earlier version stored none."""
    for split in theirs.keys() & ours.keys():
        if theirs[split] != ours[split]:
            before, now = (
                f"{x['images']} images ({x['digest'][:8]})" for x in (theirs[split], ours[split])
            )
            raise ValueError(
                f"The data of the run in {str(path)!r} have changed: its {split} split had "
                f"{before} and has {now}. Restore them, give another --output, or go on all the "
                "same with --allow-changed-data."
            )


def _check_same_run(path: Path, theirs: dict, ours: dict) -> None:
    theirs, ours = _compared(theirs), _compared(json.loads(json.dumps(ours)))
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{str(path)!r} holds a run with {name} {theirs.get(name)!r}; received "
                f"{ours.get(name)!r}. Give another --output, or resume that run with --config "
                f"{path / 'config.json'}."
            )


def _compared(configuration: dict) -> dict:
    """Returns what two runs must have in common to be the same run."""
    # What an earlier version did not have is now at its default.
    defaults = json.loads(json.dumps(dataclasses.asdict(Recipe())))
    recipe = {**defaults, **configuration["recipe"]}
    entries = {name: x for name, x in configuration.items() if name not in _NOT_COMPARED}
    return {**recipe, **dict(flatten(recipe.get("model", {}))), **entries, "model": None}


def read_configuration(file: str | os.PathLike) -> dict:
    """Returns the content of a run's config.json.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not the configuration of a run.
    """
    try:
        configuration = json.loads(Path(file).read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"Expected a run's config.json; {str(file)!r} not found.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} is not valid JSON: {error}.") from error
    if not isinstance(configuration, dict) or not isinstance(configuration.get("recipe"), dict):
        raise ValueError(f"{str(file)!r} is not a run's config.json: it has no 'recipe'.")
    for name, kind in _KINDS.items():
        value = configuration.get(name)
        if not isinstance(value, kind | None):
            raise ValueError(
                f"{str(file)!r} must have a {kind.__name__} as {name!r}; received {value!r}."
            )
    for split, found in (configuration.get("data") or {}).items():
        kinds = (
            {name: type(value) for name, value in found.items()} if isinstance(found, dict) else {}
        )
        if kinds != {"images": int, "digest": str}:
            raise ValueError(
                f"'data' in {str(file)!r} must be 'images' and 'digest' of each split; received "
                f"{found!r} for {split!r}."
            )
    try:
        recipe_in(configuration)
    except ValueError as error:
        raise ValueError(f"The recipe in {str(file)!r} cannot be used: {error}") from error
    return configuration


def recipe_in(configuration: dict) -> Recipe:
    """Returns the recipe of a run's configuration.

    Raises:
        ValueError: if it has an unknown entry; further as in `check_recipe`.
    """
    entries = configuration["recipe"]
    known = {field.name for field in dataclasses.fields(Recipe)}
    for name in entries:
        if name not in known:
            raise ValueError(f"unknown entry {name!r}{did_you_mean(name, known)}")
    recipe = Recipe(**{n: tuple(x) if isinstance(x, list) else x for n, x in entries.items()})
    check_recipe(recipe)
    return recipe


def load_detector(path: str | os.PathLike) -> tuple["Detector", dict]:
    """Loads a detector from a run's folder (its best model), a file, or published weights.

    Args:
        path: the folder, or what `build_fpn_faster_rcnn(weights=...)` takes.

    Returns:
        The model, and the run's configuration; outside of a run's folder it holds at most
        `class_names` and `category_ids`, if they are known.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ConnectionError: if published weights cannot be downloaded.
        ValueError: if the file does not hold a detector.
    """
    # The package's public names register all classes with Keras.
    from keras_fpn import build_fpn_faster_rcnn
    from keras_fpn.data.coco_classes import COCO_CLASS_NAMES, COCO_IDS_AND_NAMES
    from keras_fpn.weights.pretrained import is_keras_file, load_keras_file
    from keras_fpn.weights.published import DETECTORS

    file = Path(path)
    if file.is_dir():
        best = file / "checkpoints" / "best.keras"
        file = best if best.exists() else (checkpoints(best.parent) or [None])[-1]
        if file is None:
            raise FileNotFoundError(
                "A run's folder must have checkpoints/best.keras or checkpoints/step-N.keras; "
                f"{str(path)!r} has neither."
            )
    elif not file.is_file() and str(path) not in DETECTORS:
        raise FileNotFoundError(
            f"--model must be a run's folder, a weights file or {' or '.join(map(repr, DETECTORS))}"
            f"; {str(path)!r} not found."
        )
    is_keras = file.is_file() and is_keras_file(file)
    # A checkpoint in a run's folder comes with the run's configuration.
    config_file = file.resolve().parent.parent / "config.json"
    if is_keras and file.parent.name == "checkpoints" and config_file.exists():
        return load_keras_file(file), read_configuration(config_file)
    model = load_keras_file(file) if is_keras else build_fpn_faster_rcnn(weights=file)
    if model.class_names is None:
        return model, {}
    configuration = {"class_names": list(model.class_names)}
    if model.class_names == COCO_CLASS_NAMES:
        configuration["category_ids"] = list(COCO_IDS_AND_NAMES)
    return model, configuration


def evaluation_edges(
    configuration: dict, shorter_edge: int | tuple[int, ...] | None, longest_edge: int | None
) -> dict:
    """Returns the edges to resize images to: those given, else those of the run's evaluation."""
    recipe = configuration.get("recipe", {})
    if shorter_edge is None:
        shorter_edge = recipe.get("evaluation_shorter_edge", Recipe.evaluation_shorter_edge)
    if longest_edge is None:
        longest_edge = recipe.get("longest_edge", Recipe.longest_edge)
    return {"shorter_edge": shorter_edge, "longest_edge": longest_edge}
