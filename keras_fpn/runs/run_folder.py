"""The folder of a training run: config.json, and checkpoints/best.keras and step-N.keras."""

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from keras_fpn.runs.options import flatten
from keras_fpn.runs.recipes import Recipe
from keras_fpn.runs.run_state import checkpoints, write_text

if TYPE_CHECKING:
    from keras_fpn.detector import Detector

# Entries of config.json that record the environment, or follow from the others.
_NOT_COMPARED = ("recipe", "versions", "data_dir", "stages")


def claim_folder(path: str | os.PathLike) -> Path:
    """Creates a folder for new output.

    Raises:
        FileExistsError: if the path is a file, or a folder that is not empty.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        holds = "holds another run" if (path / "config.json").exists() else "is not empty"
        raise FileExistsError(f"--output must be a new or empty folder; {str(path)!r} {holds}.")
    path.mkdir(parents=True, exist_ok=True)
    return path


def claim_run(path: str | os.PathLike, configuration: dict) -> Path | None:
    """Creates the folder of a run, or opens the one that the same command has created.

    Args:
        path: path of the folder.
        configuration: configuration of the run, which is written to config.json.

    Returns:
        The checkpoint to resume from, or None.

    Raises:
        FileExistsError: if the path is a file, or a folder of something else.
        ValueError: if it is the folder of a run of another configuration.
    """
    path = Path(path)
    config_file = path / "config.json"
    if not config_file.exists():
        (path / ".partial-config.json").unlink(missing_ok=True)
        claim_folder(path)
        write_text(config_file, json.dumps(configuration, indent=2) + "\n")
    theirs = _compared(read_configuration(config_file))
    ours = _compared(json.loads(json.dumps(configuration)))
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{str(path)!r} holds a run with {name} {theirs.get(name)!r}; received "
                f"{ours.get(name)!r}. Give another --output, or resume that run with --config "
                f"{config_file}."
            )
    (path / "checkpoints").mkdir(exist_ok=True)
    for partial in [*path.glob(".partial-*"), *(path / "checkpoints").glob(".partial-*")]:
        partial.unlink()
    return (checkpoints(path / "checkpoints") or [None])[-1]


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
        configuration = json.loads(Path(file).read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"Expected a run's config.json; {str(file)!r} not found.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(file)!r} is not valid JSON: {error}.") from error
    if not isinstance(configuration, dict) or not isinstance(configuration.get("recipe"), dict):
        raise ValueError(f"{str(file)!r} is not a run's config.json: it has no 'recipe'.")
    known = {field.name for field in dataclasses.fields(Recipe)}
    for name in configuration["recipe"]:
        if name not in known:
            raise ValueError(f"The recipe in {str(file)!r} has an unknown entry {name!r}.")
    return configuration


def recipe_in(configuration: dict) -> Recipe:
    """Returns the recipe of a run's configuration."""
    entries = configuration["recipe"].items()
    return Recipe(**{n: tuple(x) if isinstance(x, list) else x for n, x in entries})


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
