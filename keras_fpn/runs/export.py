"""Exports a detector for TensorFlow Serving.

    keras-fpn export --model runs/coco --output models/detector/1

The name of the output folder is the version under which the server knows the model. Images are
resized as in the run's evaluation unless sizes are given. examples/serving/README.md shows how to
start the server and send requests.
"""

import dataclasses
import os
from pathlib import Path
from typing import Literal

from keras_fpn.runs.command import exits_on_bad_input, parse


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `keras-fpn export`.

    Attributes:
        model: folder of a run (its best model), a weights file, "coco" or "coco_v2".
        output: new folder, such as models/detector/1.
        shorter_edge: images are resized to this shorter edge; the run's own by default.
        longest_edge: upper limit of the longer edge after resizing; the run's own by default.
        precision: dtype of weights and features.
        frozen: store the weights as constants of the graph instead of variables.
        class_names: add the output detection_class_names.
        errors_as_output: add the output error, for files that cannot be read, which otherwise fail
            their whole request.
        max_images: limit of the images in a request.
        max_pixels: limit of the pixels of all images in a request, at about 15 bytes each; by
            default 178,956,970, which is also the limit of one image.
        warm_up: add requests that warm the server up.
    """

    model: str
    output: Path
    shorter_edge: int | None = None
    longest_edge: int | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    frozen: bool = False
    class_names: bool = False
    errors_as_output: bool = False
    max_images: int = 8
    max_pixels: int | None = None
    warm_up: bool = True


def main(arguments: list[str] | None = None) -> None:
    """Runs the program."""
    options = parse(Options, arguments, "export", __doc__)
    from keras_fpn.runs.run_folder import evaluation_edges, load_detector
    from keras_fpn.runs.run_state import writing
    from keras_fpn.serving.saved_model import export_saved_model

    with exits_on_bad_input():
        if os.path.lexists(options.output):
            raise FileExistsError(f"--output must be a new folder; '{options.output}' exists.")
        model, configuration = load_detector(options.model)
        class_names = configuration.get("class_names") if options.class_names else None
        if options.class_names and class_names is None:
            raise ValueError(f"--class-names: {options.model!r} has no class names.")
        edges = evaluation_edges(configuration, options.shorter_edge, options.longest_edge)
        with writing(options.output):
            export_saved_model(
                model,
                options.output,
                **edges,
                frozen=options.frozen,
                precision=options.precision,
                class_names=class_names,
                errors_as_output=options.errors_as_output,
                max_images=options.max_images,
                max_pixels=options.max_pixels,
                warm_up=options.warm_up,
            )
    files = [path for path in options.output.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(f"{options.output}: {model.num_classes} classes, {size / 1e6:.0f} MB")
