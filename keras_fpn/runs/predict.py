"""Detects objects in image files and draws them.

    keras-fpn predict photo.jpg other.png --model runs/coco --output found

The output folder gets a picture of each image with its boxes, and detections.json with all
detections in COCO's results format, in pixels of the original images; image_id counts the images in
the order given, from 1, and file_name is added.
"""

import dataclasses
import json
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from keras_fpn.runs.command import counted, exits_on_bad_input, exits_on_os_error, parse


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `keras-fpn predict`.

    Attributes:
        images: image files.
        model: folder of a run (its best model), a weights file, "coco" or "coco_v2".
        output: new folder for pictures and detections.
        score_threshold: boxes with a score below this are not drawn.
        shorter_edge: images are resized to this shorter edge; the run's own by default. Or several
            scales.
        merge: how detections at several scales are merged: NMS, or box voting after it.
        longest_edge: upper limit of the longer edge after resizing; the run's own by default.
    """

    images: Positional[tuple[str, ...]]
    model: str
    output: Path
    score_threshold: float = 0.5
    shorter_edge: tuple[int, ...] | None = None
    merge: Literal["nms", "vote"] = "nms"
    longest_edge: int | None = None


def main(arguments: list[str] | None = None) -> None:
    """Runs the program."""
    options = parse(Options, arguments, "predict", __doc__)
    import keras
    import tensorflow as tf

    from keras_fpn.data.coco_metrics import coco_results
    from keras_fpn.data.drawing import draw_detections
    from keras_fpn.data.image_files import read_image
    from keras_fpn.faster_rcnn import FasterRCNN
    from keras_fpn.runs.run_folder import claim_folder, evaluation_edges, load_detector
    from keras_fpn.runs.run_state import write_text, writing
    from keras_fpn.serving.inference import detect

    with exits_on_bad_input():
        missing = [name for name in options.images if not Path(name).is_file()]
        if missing or not options.images:
            received = ", ".join(map(repr, missing)) or "none"
            raise FileNotFoundError(f"Images must be existing files; received {received}.")
        model, configuration = load_detector(options.model)
        if not isinstance(model, FasterRCNN):
            raise ValueError(f"--model must be a Faster R-CNN; received a {type(model).__name__}.")
        edges = evaluation_edges(configuration, options.shorter_edge, options.longest_edge)
        output = claim_folder(options.output)
    category_ids = configuration.get("category_ids", list(range(1, model.num_classes + 1)))
    read = tf.function(read_image, input_signature=[tf.TensorSpec([], tf.string)], autograph=False)
    progress = keras.utils.Progbar(len(options.images), unit_name="image")
    all_results, skipped = [], []
    for number, name in enumerate(options.images, start=1):
        image, problem = (value.numpy() for value in read(tf.io.read_file(name)))
        if problem:
            skipped.append(f"{name} ({problem.decode()})")
        else:
            [found] = detect(model, image, **edges, merge=options.merge, verbose=0)
            results = coco_results(
                {key: values[None] for key, values in found.items()},
                [number],
                image_sizes=[image.shape[:2]],
                original_sizes=[image.shape[:2]],
                category_ids=category_ids,
            )
            all_results += [result | {"file_name": name} for result in results]
            picture = draw_detections(
                image, found, configuration.get("class_names"), options.score_threshold
            )
            with exits_on_os_error(), writing(output):
                picture.save(output / f"{number:04d}_{Path(name).stem}.png")
        progress.update(number)
    with exits_on_os_error():
        write_text(output / "detections.json", json.dumps(all_results, indent=1))
    if skipped:
        print(f"\nskipped {counted(len(skipped), 'image')}: {', '.join(skipped)}")
    decoded = counted(len(options.images) - len(skipped), "image")
    print(f"{counted(len(all_results), 'detection')} of {decoded}; pictures in {output}")
