"""`weights=`: published weights by name, or a file in any known format."""

import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_fpn.data.coco_classes import COCO_CLASS_NAMES, coco_names_by_id
from keras_fpn.detector import Detector
from keras_fpn.weights.checkpoints import read_checkpoint
from keras_fpn.weights.detectron2 import (
    detectron2_architecture,
    fit_detectron2_arrays,
    is_detectron2,
)
from keras_fpn.weights.h5_files import check_h5_file
from keras_fpn.weights.keras_files import damage_is_named, is_keras_file, load_keras_file, named
from keras_fpn.weights.plan import PUBLISHED, read_arrays
from keras_fpn.weights.published import DETECTORS, fetch, first_digits, sha256_of
from keras_fpn.weights.torchvision import (
    fit_torchvision_arrays,
    torchvision_architecture,
    torchvision_arrays,
)

CLASS_LAYER = re.compile(r"(?:^|/)box_head/(?:class_logits|deltas)/")
CLASS_BIAS = re.compile(r"(?:.*/)?box_head/class_logits/vars/1")


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
        fit: checks that the weights of all stages that both have fit a model, whose variables need
            no values yet, and returns a function that loads them; its second argument is whether
            to load the layers that depend on the classes.
        missing_stages: names of stages that the file has no weights of.
    """

    backbone: str | keras.Model | None
    stages: dict[str, Any]
    num_classes: int | None
    default_classes: int | None
    class_names: dict[int, tuple[str, ...]]
    fit: Callable[[Detector, bool], Callable[[], None]]
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

    def fit(model, with_classes):
        return fit_torchvision_arrays(model, arrays, with_classes=with_classes)

    return Pretrained(backbone, stages, num_classes, default_classes, class_names, fit)


def _open_detectron2(contents: Mapping, arrays: Mapping[str, np.ndarray]) -> Pretrained:
    backbone, num_classes, stages = detectron2_architecture(arrays)
    stages["resnet"].setdefault("frozen_stages", 2)
    has_rpn = any(name.startswith("proposal_generator.rpn_head.") for name in arrays)
    class_names = {}
    if "__author__" in contents and num_classes == len(COCO_CLASS_NAMES):
        # Files of its model zoo name their author; 80 classes are COCO's there.
        class_names[num_classes] = COCO_CLASS_NAMES

    def fit(model, with_classes):
        return fit_detectron2_arrays(model, arrays, with_classes=with_classes)

    return Pretrained(
        backbone,
        stages,
        num_classes,
        num_classes,
        class_names,
        fit,
        missing_stages=(
            *(() if has_rpn else ("rpn_head",)),
            *(() if num_classes is not None else ("box_head",)),
        ),
    )


def _open_keras_file(path: Path) -> Pretrained:
    source = load_keras_file(path)
    return Pretrained(
        source.backbone,
        {name: getattr(source, name) for name in source.stage_names if name != "backbone"},
        source.num_classes,
        source.num_classes,
        {len(source.class_names): source.class_names} if source.class_names else {},
        lambda model, with_classes: _fit_stages(source, model, with_classes),
        source.image_shape,
        tuple({"rpn_head", "box_head"} - {*source.stage_names}),
    )


def _open_h5(path: Path) -> Pretrained:
    # Of a compiled model, Keras saves the optimizer too.
    shapes = {
        name: shape
        for name, shape in check_h5_file(path).items()
        if not name.startswith("optimizer/")
    }
    classes = [shape for name, shape in shapes.items() if CLASS_BIAS.fullmatch(name)]
    if not shapes or len(classes) > 1 or any(len(shape) != 1 for shape in classes):
        raise ValueError(
            f"{str(path)!r} must contain the weights of a model of keras_fpn; received others."
        )
    num_classes = classes[0][0] - 1 if classes else None

    def fit(model, with_classes):
        skipped = []
        if num_classes is not None and "box_head" in model.stage_names and not with_classes:
            skipped = model.box_head.class_layers()
        misfit = (
            f"The weights of {str(path)!r} do not fit a model with these arguments; pass those "
            "that it was built with, or its .keras file"
        )
        # Keras silently ignores layers that the model does not have.
        theirs = Counter(
            shape for name, shape in shapes.items() if not (skipped and CLASS_LAYER.search(name))
        )
        ours = Counter(tuple(variable.shape) for variable in model.variables)
        ours -= Counter(tuple(weight.shape) for layer in skipped for weight in layer.weights)
        if ours != theirs:
            raise ValueError(f"{misfit}; {_shown(theirs - ours, ours - theirs)}.")

        def load():
            with damage_is_named(path), named(path, "model.weights.h5") as link:
                try:
                    # The file has been checked: no second time.
                    keras.Model.load_weights(model, link, objects_to_skip=skipped)
                except ValueError as error:
                    raise ValueError(f"{misfit}.") from error

        return load

    # The file does not tell the architecture; the builder's arguments do.
    return Pretrained(None, {}, num_classes, num_classes, {}, fit)


def _shown(theirs: Counter, ours: Counter) -> str:
    """Returns what differs between the shapes of a file and those of a model."""
    parts = (("the file", theirs), ("the model", ours))
    return ", ".join(
        f"only {owner} has {', '.join(map(str, list(shapes)[:3]))}{', ...' * (len(shapes) > 3)}"
        for owner, shapes in parts
        if shapes
    )


def _fit_stages(source: Detector, target: Detector, with_classes: bool) -> Callable[[], None]:
    """Checks that the stages that both have fit; returns a function that copies their weights."""
    pairs: list[tuple] = []
    for stage in target.stage_names:
        if stage not in source.stage_names:
            continue
        theirs, ours = getattr(source, stage), getattr(target, stage)
        found = [(theirs, ours)]
        if stage == "box_head" and not with_classes:
            layers = (theirs.class_independent_layers(), ours.class_independent_layers())
            found = list(itertools.zip_longest(*layers))
        for of, layer in found:
            shapes = [[tuple(w.shape) for w in x.weights] if x else [] for x in (of, layer)]
            if shapes[0] != shapes[1]:
                differ = Counter(shapes[0]), Counter(shapes[1])
                raise ValueError(
                    f"the weights of the {stage} have other shapes: "
                    f"{_shown(differ[0] - differ[1], differ[1] - differ[0])}."
                )
        pairs += found

    def load():
        for of, layer in pairs:
            layer.set_weights(of.get_weights())

    return load
