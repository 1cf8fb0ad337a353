"""The folder of a training run: config.json, and checkpoints/best.keras and last.keras."""

import json
import os
import zipfile
from pathlib import Path

import keras

import keras_fpn


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


def load_detector(path: str | os.PathLike) -> tuple[keras_fpn.FasterRCNN, dict]:
    """Loads a detector from a run's folder (its best checkpoint) or from a `.keras` file.

    Returns:
        The model, and the run's configuration: empty for a file outside a run's folder.

    Raises:
        FileNotFoundError: where there is no such checkpoint.
        ValueError: where the file is no `.keras` file of a detector.
    """
    path = Path(path)
    file = path
    if path.is_dir():
        candidates = [path / "checkpoints" / name for name in ("best.keras", "last.keras")]
        file = next((candidate for candidate in candidates if candidate.exists()), None)
        if file is None:
            raise FileNotFoundError(
                "A run's folder has checkpoints/best.keras or checkpoints/last.keras; "
                f"{str(path)!r} has neither."
            )
    elif not path.is_file():
        raise FileNotFoundError(f"There is no run's folder and no .keras file at {str(path)!r}.")
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{str(file)!r} is no whole .keras file.")
    # A file that lies where runs keep theirs has its run's configuration.
    config_file = file.resolve().parent.parent / "config.json"
    configuration = {}
    if file.parent.name == "checkpoints" and config_file.exists():
        try:
            configuration = json.loads(config_file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{str(config_file)!r} is no whole JSON file: {error}.") from error
    model = keras.saving.load_model(file)
    if not isinstance(model, keras_fpn.FasterRCNN):
        raise ValueError(f"{str(file)!r} holds a {type(model).__name__}, not a FasterRCNN.")
    return model, configuration
