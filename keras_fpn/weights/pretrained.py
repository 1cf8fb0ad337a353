"""What `weights=` may be: a published name, or a file of any known kind."""

import contextlib
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import h5py
import keras
import numpy as np

from keras_fpn.data.coco_classes import COCO_CLASS_NAMES, coco_names_by_id
from keras_fpn.faster_rcnn import FasterRCNN
from keras_fpn.weights.checkpoints import read_checkpoint
from keras_fpn.weights.detectron2 import (
    detectron2_architecture,
    is_detectron2,
    load_detectron2_arrays,
)
from keras_fpn.weights.plan import PUBLISHED, read_arrays
from keras_fpn.weights.published import DETECTORS, fetch, first_digits, sha256_of
from keras_fpn.weights.torchvision import (
    load_torchvision_arrays,
    torchvision_architecture,
    torchvision_arrays,
)


class Pretrained(NamedTuple):
    """A trained detector's file: how a model for it is built, and how it is loaded.

    Attributes:
        arguments: of `build_fpn_faster_rcnn`, where the file decides them.
        model: the detector that a `.keras` file holds, which decides all arguments; else None.
        num_classes: that the box head was trained for; None where there is no box head.
        class_names: number of classes to the names that go with it, where they are known.
        load: takes the model and whether to load its class-dependent layers too.
    """

    arguments: dict
    model: FasterRCNN | None
    num_classes: int | None
    class_names: dict[int, tuple[str, ...]]
    load: Callable[[FasterRCNN, bool], None]


def open_detector(weights: str | os.PathLike) -> Pretrained:
    """Finds, checks and reads a trained detector.

    Args:
        weights: a name in `DETECTORS`, or a file: `.keras`, `.weights.h5`, a state dict of
            torchvision or Detectron2 (`.pth`, `.pkl`, `.npz`). What it is is read from the file.

    Raises:
        FileNotFoundError: where there is neither such a name nor such a file.
        ConnectionError: where the name's file cannot be fetched.
        ValueError: where the file is no trained detector.
    """
    url = DETECTORS.get(os.fspath(weights))
    path = Path(weights) if url is None else fetch(os.fspath(weights), url)
    if path.is_dir():
        raise IsADirectoryError(
            f"`weights` is a file; {os.fspath(weights)!r} is a folder (a run's best model is "
            "checkpoints/best.keras in it)."
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"`weights` is {' or '.join(map(repr, DETECTORS))} or a file; there is none at "
            f"{os.fspath(weights)!r}."
        )
    with path.open("rb") as file:
        beginning = file.read(8)
    if beginning == b"\x89HDF\r\n\x1a\n":
        return _open_h5(path)
    if is_keras_file(path):
        return _open_keras_file(path)
    contents = read_checkpoint(path)
    arrays = read_arrays(contents, source=repr(str(path)))
    if is_detectron2(arrays):
        return _open_detectron2(contents, arrays)
    if url is None:
        digits = f"{int(contents[PUBLISHED]):08x}" if PUBLISHED in contents else sha256_of(path)
        urls = [url for url in DETECTORS.values() if digits.startswith(first_digits(url))]
        url = urls[0] if urls else None
    return _open_torchvision(arrays, url)


def _open_torchvision(arrays: Mapping[str, np.ndarray], url: str | None) -> Pretrained:
    """`url`: that of the published file which this is, or None."""
    arrays = torchvision_arrays(arrays)
    arguments = torchvision_architecture(arrays)
    arguments |= {"normalization": "frozen_batch_norm", "frozen_stages": 2}
    num_classes = arguments["num_classes"]
    if url == DETECTORS["coco"]:
        # It was trained so, with frozen norms; nothing in the file tells.
        arguments["norm_epsilon"] = 0.0
    class_names = {}
    if url is not None:
        # A label is then COCO's place among its 80 classes, as in every other data set of COCO.
        arguments["num_classes"] = len(COCO_CLASS_NAMES)
        class_names = {len(names): names for names in (COCO_CLASS_NAMES, coco_names_by_id())}
    return Pretrained(
        arguments,
        None,
        num_classes,
        class_names,
        lambda model, classes: load_torchvision_arrays(model, arrays, with_classes=classes),
    )


def _open_detectron2(contents: Mapping, arrays: Mapping[str, np.ndarray]) -> Pretrained:
    arguments = {"frozen_stages": 2, **detectron2_architecture(arrays)}
    num_classes = arguments.get("num_classes")
    # Its model zoo signs its files. 80 classes are COCO's there.
    is_coco = "__author__" in contents and num_classes == len(COCO_CLASS_NAMES)
    return Pretrained(
        arguments,
        None,
        num_classes,
        {num_classes: COCO_CLASS_NAMES} if is_coco else {},
        lambda model, classes: load_detectron2_arrays(model, arrays, with_classes=classes),
    )


def is_keras_file(path: Path) -> bool:
    """Whether a file is a whole archive in Keras's own format."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return {"config.json", "model.weights.h5"} <= set(archive.namelist())


def load_keras_file(path: Path) -> FasterRCNN:
    """The detector of a `.keras` file, whatever the file is called, ready for inference.

    Raises:
        ValueError: where the file is damaged, or holds another model.
    """
    with _damage_is_named(path), _named(path, "model.keras") as named:
        model = keras.saving.load_model(named, compile=False)
    if not isinstance(model, FasterRCNN):
        raise ValueError(f"{str(path)!r} holds a {type(model).__name__}, not a FasterRCNN.")
    return model


def _open_keras_file(path: Path) -> Pretrained:
    source = load_keras_file(path)
    return Pretrained(
        {},
        source,
        source.num_classes,
        {source.num_classes: source.class_names} if source.class_names else {},
        lambda model, classes: _copy_weights(source, model, classes),
    )


def _open_h5(path: Path) -> Pretrained:
    num_classes, arrays = [], []

    def visit(name, item):
        if name.endswith("box_head/class_logits/vars/1"):
            num_classes.append(item.shape[0] - 1)
        if isinstance(item, h5py.Dataset):
            arrays.append(name)

    with _damage_is_named(path), h5py.File(path) as file:
        file.visititems(visit)
    if len(num_classes) != 1:
        raise ValueError(f"{str(path)!r} holds no weights of a FasterRCNN.")

    def load(model, with_classes):
        config = model.get_config()
        config["box_head"]["config"]["num_classes"] = num_classes[0]
        config["class_names"] = None
        source = FasterRCNN.from_config(config)
        misfit = (
            f"The weights of {str(path)!r} do not fit a model of these arguments; give those that "
            "it was built with, or its .keras file."
        )
        # Keras loads a part of what a file holds without a word.
        if len(arrays) != len(source.variables):
            raise ValueError(misfit)
        with _damage_is_named(path), _named(path, "model.weights.h5") as named:
            try:
                source.load_weights(named)
            except ValueError as error:
                raise ValueError(misfit) from error
        _copy_weights(source, model, with_classes)

    # The file tells nothing but weights: the builder's arguments say what they are for.
    return Pretrained({}, None, num_classes[0], {}, load)


def _copy_weights(source: FasterRCNN, target: FasterRCNN, with_classes: bool) -> None:
    for stage in ("backbone", "feature_pyramid", "rpn_head"):
        getattr(target, stage).set_weights(getattr(source, stage).get_weights())
    ours, theirs = target.box_head, source.box_head
    for layer, of in zip(
        ours.class_independent_layers(), theirs.class_independent_layers(), strict=True
    ):
        layer.set_weights(of.get_weights())
    if with_classes:
        for layer, of in zip(ours.class_layers(), theirs.class_layers(), strict=True):
            layer.set_weights(of.get_weights())


@contextlib.contextmanager
def _damage_is_named(path: Path) -> Iterator[None]:
    """Errors of reading archives and HDF5 become one that names the file."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError, KeyError, EOFError) as error:
        raise ValueError(f"{str(path)!r} is damaged or incomplete.") from error


@contextlib.contextmanager
def _named(path: Path, name: str) -> Iterator[Path]:
    """The file under a name that Keras recognises; Keras goes by names alone."""
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / name
        link.symlink_to(path.resolve())
        yield link
