"""Detects objects in image files and draws them.

    python training/predict.py photo.jpg other.png --model runs/coco --output found

The output folder gets a picture of each image with the boxes drawn, and detections.json with all
detections in COCO's results format, in pixels of the original images; image_id counts the images as
they were given, from 1, and file_name is added.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from keras_fpn.runs.command_line import exit_where_missing, exits_on_bad_input

exit_where_missing("PIL")

import keras
import tensorflow as tf

from keras_fpn.data.coco_metrics import coco_results
from keras_fpn.data.drawing import draw_detections
from keras_fpn.data.image_files import read_image
from keras_fpn.runs.run_folder import claim_folder, evaluation_edges, load_detector
from keras_fpn.serving.inference import detect


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--model", required=True, help="folder of a run, file of weights, or coco")
    parser.add_argument("--output", required=True, help="new folder for pictures and detections")
    parser.add_argument(
        "--score-threshold", type=float, default=0.5, help="boxes are drawn from this score on"
    )
    parser.add_argument("--shorter-edge", type=int, help="images are resized to this shorter edge")
    parser.add_argument("--longest-edge", type=int, help="no edge is longer than this")
    options = parser.parse_args(arguments)

    with exits_on_bad_input():
        missing = [name for name in options.images if not Path(name).is_file()]
        if missing:
            raise FileNotFoundError(f"There is no image file at {', '.join(map(repr, missing))}.")
        model, configuration = load_detector(options.model)
        output = claim_folder(options.output)
    category_ids = configuration.get("category_ids", list(range(1, model.num_classes + 1)))
    edges = evaluation_edges(configuration, options.shorter_edge, options.longest_edge)
    read = tf.function(read_image, input_signature=[tf.TensorSpec([], tf.string)])
    progress = keras.utils.Progbar(len(options.images), unit_name="image")
    all_results, skipped = [], []
    for number, name in enumerate(options.images, start=1):
        image, problem = (value.numpy() for value in read(tf.io.read_file(name)))
        if problem:
            skipped.append(f"{name} ({problem.decode()})")
        else:
            [found] = detect(model, image, **edges, verbose=0)
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
            picture.save(output / f"{number:04d}_{Path(name).stem}.png")
        progress.update(number)
    (output / "detections.json").write_text(json.dumps(all_results, indent=1))
    if skipped:
        noun = "image" if len(skipped) == 1 else "images"
        print(f"\nskipped {len(skipped)} {noun}: {', '.join(skipped)}")
    decoded = len(options.images) - len(skipped)
    print(f"{len(all_results)} detections of {decoded} images; pictures in {output}")


if __name__ == "__main__":
    main()
