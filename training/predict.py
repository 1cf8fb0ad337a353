"""Detects objects in image files and draws them.

    python training/predict.py photo.jpg other.png --model runs/coco --output found

The output folder gets a picture of each image with the boxes drawn, and detections.json with all
detections in COCO's results format, in pixels of the original images; image_id counts the images as
they were given, from 1, and file_name is added.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from keras_fpn.drawing import draw_detections
from keras_fpn.evaluation import coco_results
from training.command_line import exits_on_bad_input
from training.evaluate import report_skipped
from training.image_decoding import decode_image
from training.pipeline import SkipReport, image_batches
from training.recipes import Recipe
from training.run_folder import claim_folder, load_detector


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--model", required=True, help="folder of a run, or a .keras file")
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
    recipe = configuration.get("recipe", {})
    class_names = configuration.get("class_names", [str(i) for i in range(model.num_classes)])
    category_ids = configuration.get("category_ids", list(range(1, model.num_classes + 1)))
    report = SkipReport()
    batches = image_batches(
        options.images,
        1,
        shorter_edge=options.shorter_edge
        or recipe.get("evaluation_shorter_edge", Recipe.evaluation_shorter_edge),
        longest_edge=options.longest_edge or recipe.get("longest_edge", Recipe.longest_edge),
        report=report,
    )
    all_results = []
    for inputs, info in tqdm(batches, total=len(options.images), unit="image"):
        index = int(info["image_ids"][0])
        sizes = {"image_sizes": inputs["image_sizes"], "original_sizes": info["original_sizes"]}
        sizes = {name: np.asarray(value) for name, value in sizes.items()}
        detections = model.predict_on_batch(inputs)
        results = coco_results(detections, [index + 1], category_ids=category_ids, **sizes)
        for result in results:
            result["file_name"] = options.images[index]
        all_results += results
        drawn = [result for result in results if result["score"] >= options.score_threshold]
        corners = np.array([result["bbox"] for result in drawn]).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        picture = draw_detections(
            decode_image(tf.io.read_file(options.images[index])).numpy(),
            {
                "boxes": corners,
                "scores": [result["score"] for result in drawn],
                "labels": [category_ids.index(result["category_id"]) for result in drawn],
            },
            class_names,
        )
        picture.save(output / f"{index + 1:04d}_{Path(options.images[index]).stem}.png")
    (output / "detections.json").write_text(json.dumps(all_results, indent=1))
    report_skipped(report, "images")
    decoded = len(options.images) - len(report.images())
    print(f"{len(all_results)} detections of {decoded} images; pictures in {output}")


if __name__ == "__main__":
    main()
