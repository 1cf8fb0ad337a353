"""The folder of a training run: config.json, and checkpoints/best.keras and step-N.keras."""

import json
import os
from pathlib import Path

import keras_fpn
from keras_fpn.data.coco_classes import COCO_CLASS_NAMES, COCO_IDS_AND_NAMES
from keras_fpn.runs.recipes import Recipe
from keras_fpn.runs.run_state import checkpoints, write_text
from keras_fpn.weights.pretrained import is_keras_file, load_keras_file
from keras_fpn.weights.published import DETECTORS


def claim_folder(path: str | os.PathLike) -> Path:
    """Makes a folder for new output.

    Raises:
        FileExistsError: where the folder holds anything, or is a file.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        holds = "holds another run" if (path / "config.json").exists() else "is there and not empty"
        raise FileExistsError(
            f"--output is a new or empty folder, so that nothing is lost; {str(path)!r} {holds}."
        )
    path.mkdir(parents=True, exist_ok=True)
    return path


def claim_run(path: str | os.PathLike, configuration: dict) -> Path | None:
    """Makes the folder of a run, or finds the one that the same command has begun.

    Args:
        path: of the folder.
        configuration: of the run; it becomes config.json.

    Returns:
        The checkpoint to go on from, None where there is none.

    Raises:
        FileExistsError: where the folder holds something else, or is a file.
        ValueError: where it holds a run of another configuration.
    """
    path = Path(path)
    config_file = path / "config.json"
    if not config_file.exists():
        if path.is_dir():
            for partial in path.glob(".partial-config.json"):
                partial.unlink()
        claim_folder(path)
        write_text(config_file, json.dumps(configuration, indent=2) + "\n")
    begun = read_configuration(config_file)
    for part in ("recipe", None):
        ours, theirs = (c.get(part, {}) if part else c for c in (configuration, begun))
        for name, value in json.loads(json.dumps(ours)).items():
            if name not in ("recipe", "versions", "data_dir") and value != theirs.get(name):
                raise ValueError(
                    f"{str(path)!r} holds a run with {name} {theirs.get(name)!r}, this command "
                    f"says {value!r}: give another --output, or go on with the run as it is by "
                    f"--config {config_file}."
                )
    (path / "checkpoints").mkdir(exist_ok=True)
    for partial in [*path.glob(".partial-*"), *(path / "checkpoints").glob(".partial-*")]:
        partial.unlink()
    return (checkpoints(path / "checkpoints") or [None])[-1]


def read_configuration(file: str | os.PathLike) -> dict:
    """The content of a run's config.json.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where it is no run's configuration.
    """
    try:
        configuration = json.loads(Path(file).read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"A run's config.json is wanted; {str(file)!r} is none.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(file)!r} is no whole JSON file: {error}.") from error
    if not isinstance(configuration, dict) or not isinstance(configuration.get("recipe"), dict):
        raise ValueError(f"{str(file)!r} is no run's configuration: it has no 'recipe'.")
    return configuration


def load_detector(path: str | os.PathLike) -> tuple[keras_fpn.FasterRCNN, dict]:
    """Loads a detector from a run's folder (its best checkpoint), a file, or published weights.

    Args:
        path: the folder, or what `build_fpn_faster_rcnn(weights=...)` takes.

    Returns:
        The model, and the run's configuration; outside a run's folder it has no more than
        `class_names` and `category_ids`, where they are known.

    Raises:
        FileNotFoundError: where there is no such checkpoint.
        ConnectionError: where published weights cannot be fetched.
        ValueError: where the file is no detector.
    """
    file = Path(path)
    if file.is_dir():
        best = file / "checkpoints" / "best.keras"
        file = best if best.exists() else (checkpoints(best.parent) or [None])[-1]
        if file is None:
            raise FileNotFoundError(
                "A run's folder has checkpoints/best.keras or checkpoints/step-N.keras; "
                f"{str(path)!r} has neither."
            )
    elif not file.is_file() and str(path) not in DETECTORS:
        raise FileNotFoundError(
            f"A run's folder, a file of weights or {' or '.join(map(repr, DETECTORS))} is wanted; "
            f"there is none at {str(path)!r}."
        )
    # A file that lies where runs keep theirs has its run's configuration.
    config_file = file.resolve().parent.parent / "config.json"
    is_of_run = file.parent.name == "checkpoints" and config_file.exists()
    if is_of_run and is_keras_file(file):
        return load_keras_file(file), read_configuration(config_file)
    if file.is_file() and is_keras_file(file):
        model = load_keras_file(file)
    else:
        model = keras_fpn.build_fpn_faster_rcnn(weights=file)
    if model.class_names is None:
        return model, {}
    configuration = {"class_names": list(model.class_names)}
    if model.class_names == COCO_CLASS_NAMES:
        configuration["category_ids"] = list(COCO_IDS_AND_NAMES)
    return model, configuration


def evaluation_edges(
    configuration: dict, shorter_edge: int | None, longest_edge: int | None
) -> dict[str, int]:
    """The edges to resize to: those given, else those that the run was evaluated with."""
    recipe = configuration.get("recipe", {})
    if shorter_edge is None:
        shorter_edge = recipe.get("evaluation_shorter_edge", Recipe.evaluation_shorter_edge)
    if longest_edge is None:
        longest_edge = recipe.get("longest_edge", Recipe.longest_edge)
    return {"shorter_edge": shorter_edge, "longest_edge": longest_edge}
