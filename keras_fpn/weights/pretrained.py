"""`weights=`: published weights by name, or a file in any known format."""

import contextlib
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import keras
import numpy as np

from keras_fpn.data.coco_classes import COCO_CLASS_NAMES, coco_names_by_id
from keras_fpn.detector import Detector
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
    """Weights of a trained detector: how its model is built, and how they are loaded.

    Attributes:
        backbone: name of its ResNet, or its backbone model; None if the file does not tell.
        stages: name in `keras_fpn.builder.STAGES` to a stage or its arguments, as far as the file
            tells or its authors' defaults differ.
        num_classes: number of classes that the box head was trained for; None without a box head.
        default_classes: number of classes of a model for it unless another is asked for; None if
            the file does not tell.
        class_names: number of classes to their names, where known.
        image_shape: of the model; None if the file does not tell.
        load: loads the weights of all stages that both have into a model; its second argument is
            whether to load the layers that depend on the classes.
        missing_stages: names of stages that the file has no weights of.
    """

    backbone: str | keras.Model | None
    stages: dict[str, Any]
    num_classes: int | None
    default_classes: int | None
    class_names: dict[int, tuple[str, ...]]
    load: Callable[[Detector, bool], None]
    image_shape: tuple[int | None, ...] | None = None
    missing_stages: tuple[str, ...] = ()


def open_detector(weights: str | os.PathLike) -> Pretrained:
    """Finds, checks and reads the weights of a trained detector.

    Args:
        weights: a name in `DETECTORS`, or a file: `.keras`, `.weights.h5`, or a state dict of
            torchvision or Detectron2 (`.pth`, `.pkl`, `.npz`). The format is detected from the
            file's contents.

    Raises:
        FileNotFoundError: if there is neither such a name nor such a file.
        IsADirectoryError: if it is a folder.
        ConnectionError: if published weights cannot be downloaded.
        ValueError: if the file does not contain a trained detector.
    """
    url = DETECTORS.get(os.fspath(weights))
    path = Path(weights) if url is None else fetch(os.fspath(weights), url)
    if path.is_dir():
        raise IsADirectoryError(
            f"`weights` must be a file; received the folder {os.fspath(weights)!r} (the best model "
            "of a run is its checkpoints/best.keras)."
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"`weights` must be {' or '.join(map(repr, DETECTORS))} or a file; received "
            f"{os.fspath(weights)!r}, which does not exist."
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
    """Opens a state dict of torchvision; `url` is that of the published file, if it is one."""
    arrays = torchvision_arrays(arrays)
    backbone, num_classes, stages = torchvision_architecture(arrays)
    stages["resnet"] = {"normalization": "frozen_batch_norm", "frozen_stages": 2}
    if url == DETECTORS["coco"]:
        # It was trained with frozen norms of epsilon 0, which the file does not tell.
        stages["resnet"]["norm_epsilon"] = 0.0
    default_classes, class_names = num_classes, {}
    if url is not None:
        # Labels are then indices into COCO's 80 classes, as in every COCO data set.
        default_classes = len(COCO_CLASS_NAMES)
        class_names = {len(names): names for names in (COCO_CLASS_NAMES, coco_names_by_id())}

    def load(model, with_classes):
        load_torchvision_arrays(model, arrays, with_classes=with_classes)

    return Pretrained(backbone, stages, num_classes, default_classes, class_names, load)


def _open_detectron2(contents: Mapping, arrays: Mapping[str, np.ndarray]) -> Pretrained:
    backbone, num_classes, stages = detectron2_architecture(arrays)
    stages["resnet"].setdefault("frozen_stages", 2)
    has_rpn = any(name.startswith("proposal_generator.rpn_head.") for name in arrays)
    class_names = {}
    if "__author__" in contents and num_classes == len(COCO_CLASS_NAMES):
        # Files of its model zoo name their author; 80 classes are COCO's there.
        class_names[num_classes] = COCO_CLASS_NAMES

    def load(model, with_classes):
        load_detectron2_arrays(model, arrays, with_classes=with_classes)

    return Pretrained(
        backbone,
        stages,
        num_classes,
        num_classes,
        class_names,
        load,
        missing_stages=(
            *(() if has_rpn else ("rpn_head",)),
            *(() if num_classes is not None else ("box_head",)),
        ),
    )


def is_keras_file(path: Path) -> bool:
    """Returns whether a file is a complete archive in Keras's own format."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return {"config.json", "model.weights.h5"} <= set(archive.namelist())


def load_keras_file(path: Path) -> Detector:
    """Returns the model in a `.keras` file of any name, uncompiled.

    Raises:
        ValueError: if the file is damaged, or holds another model.
    """
    with _damage_is_named(path), _named(path, "model.keras") as named:
        model = keras.saving.load_model(named, compile=False)
    if not isinstance(model, Detector):
        raise ValueError(
            f"{str(path)!r} must contain a model of keras_fpn; received a {type(model).__name__}."
        )
    return model


def _open_keras_file(path: Path) -> Pretrained:
    source = load_keras_file(path)
    return Pretrained(
        source.backbone,
        {name: getattr(source, name) for name in source.stage_names if name != "backbone"},
        source.num_classes,
        source.num_classes,
        {len(source.class_names): source.class_names} if source.class_names else {},
        lambda model, with_classes: _copy_weights(source, model, with_classes),
        source.image_shape,
        tuple({"rpn_head", "box_head"} - {*source.stage_names}),
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
    if not arrays or len(num_classes) > 1:
        raise ValueError(
            f"{str(path)!r} must contain the weights of a model of keras_fpn; received others."
        )
    classes = num_classes[0] if num_classes else None

    def load(model, with_classes):
        config = model.get_config()
        if classes is not None and "box_head" in config:
            config["box_head"]["config"]["num_classes"] = classes
            config["class_names"] = None
        source = type(model).from_config(config)
        misfit = (
            f"The weights of {str(path)!r} do not fit a model with these arguments; pass those "
            "that it was built with, or its .keras file."
        )
        # Keras silently ignores layers that the model does not have.
        if len(arrays) != len(source.variables):
            raise ValueError(misfit)
        with _damage_is_named(path), _named(path, "model.weights.h5") as named:
            try:
                source.load_weights(named)
            except ValueError as error:
                raise ValueError(misfit) from error
        _copy_weights(source, model, with_classes)

    # The file does not tell the architecture; the builder's arguments do.
    return Pretrained(None, {}, classes, classes, {}, load)


def _copy_weights(source: Detector, target: Detector, with_classes: bool) -> None:
    """Copies the weights of all stages that both have."""
    for stage in target.stage_names:
        if stage not in source.stage_names:
            continue
        theirs, ours = getattr(source, stage), getattr(target, stage)
        if stage != "box_head" or with_classes:
            ours.set_weights(theirs.get_weights())
            continue
        for layer, of in zip(
            ours.class_independent_layers(), theirs.class_independent_layers(), strict=True
        ):
            layer.set_weights(of.get_weights())


@contextlib.contextmanager
def _damage_is_named(path: Path) -> Iterator[None]:
    """Turns errors of reading archives and HDF5 files into one that names the file."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError, KeyError, EOFError) as error:
        raise ValueError(f"{str(path)!r} is damaged or incomplete.") from error


@contextlib.contextmanager
def _named(path: Path, name: str) -> Iterator[Path]:
    """Yields a link to the file with a name that Keras recognizes; Keras goes by the name."""
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / name
        link.symlink_to(path.resolve())
        yield link
