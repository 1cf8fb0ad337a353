"""Holds COCO's metrics against pycocotools: the numbers, and the time.

    python benchmarks/evaluation.py --coco FOLDER

Numbers: the annotations of a folder in COCO's layout are the ground truth, crowds included;
detections are its boxes moved, doubled, left out and given other classes at random, with equal
scores among them. Times: drawn data of 5,000 images with 100 detections each, from the same Python
objects to the twelve numbers, in turns.
"""

import argparse
import contextlib
import io
import json
import statistics
import time
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from keras_fpn.data.coco_metrics import COCO_METRICS, coco_evaluation


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--coco", type=Path, help="folder with annotations/instances_*.json")
    parser.add_argument("--images", type=int, default=5000, help="of the times (default: 5000)")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    for file in sorted(options.coco.glob("annotations/instances_*.json")) if options.coco else []:
        truth = json.loads(file.read_text())
        crowds = sum(annotation["iscrowd"] for annotation in truth["annotations"])
        for seed in range(3):
            results = perturbed(truth, np.random.RandomState(seed))
            ap = coco_evaluation(truth, results).metrics["AP"]
            print(
                f"{file.name}, seed {seed}: {len(truth['images'])} images, {crowds} crowds, "
                f"{len(results)} detections, AP {ap:.4f}: largest difference "
                f"{largest_difference(truth, results):.1e}"
            )
    truth, results = drawn(options.images, np.random.RandomState(0))
    times = {"keras_fpn": [], "pycocotools": []}
    for _ in range(options.turns):
        for name, evaluate in (("keras_fpn", coco_evaluation), ("pycocotools", by_pycocotools)):
            begun = time.perf_counter()
            evaluate(truth, results)
            times[name].append(time.perf_counter() - begun)
    ours, theirs = (statistics.median(times[name]) for name in times)
    print(
        f"{options.images} images, {len(results)} detections, {len(truth['annotations'])} objects: "
        f"{ours:.2f} s, pycocotools {theirs:.2f} s, ratio {ours / theirs:.2f}; largest difference "
        f"{largest_difference(truth, results):.1e}"
    )


def by_pycocotools(truth: dict, results: list[dict]) -> COCOeval:
    """The standard evaluator, from the same objects; it writes into the results it is given."""
    with contextlib.redirect_stdout(io.StringIO()):
        index = COCO()
        index.dataset = dict(truth)
        index.createIndex()
        evaluation = COCOeval(index, index.loadRes([dict(result) for result in results]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def largest_difference(truth: dict, results: list[dict]) -> float:
    """Over the twelve numbers, and over all precisions of all classes."""
    ours, theirs = coco_evaluation(truth, results), by_pycocotools(truth, results)
    numbers = [ours.metrics[name] for name in COCO_METRICS]
    precision = theirs.eval["precision"][:, :, :, 0, -1]
    return max(
        np.abs(np.array(numbers) - theirs.stats).max(), np.abs(ours.precision - precision).max()
    )


def perturbed(truth: dict, random: np.random.RandomState) -> list[dict]:
    """Detections near the ground truth, some of them wrong."""
    categories = [category["id"] for category in truth["categories"]]
    results = []
    for annotation in truth["annotations"]:
        for _ in range(random.randint(0, 4)):
            x, y, width, height = annotation["bbox"]
            shift = random.normal(0, 0.1, 4) * [width, height, width, height]
            box = np.maximum(np.array([x, y, width, height]) + shift, [0, 0, 1, 1])
            is_other = random.rand() < 0.1
            results.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": random.choice(categories)
                    if is_other
                    else annotation["category_id"],
                    "bbox": box.tolist(),
                    # Two digits, so that many are equal.
                    "score": round(random.rand(), 2),
                }
            )
    return results


def drawn(num_images: int, random: np.random.RandomState) -> tuple[dict, list[dict]]:
    """A ground truth of 7 objects an image in 80 classes, and 100 detections an image."""
    images, annotations, results = [], [], []
    for image_id in range(1, num_images + 1):
        images.append({"id": image_id, "height": 480, "width": 640, "file_name": f"{image_id}"})
        boxes = random.uniform(1, [500, 350, 140, 130], (7, 4))
        classes = random.randint(1, 81, 7)
        for box, category_id in zip(boxes.tolist(), classes.tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(random.rand() < 0.02),
                }
            )
        which = random.randint(0, 7, 100)
        found = np.maximum(boxes[which] + random.normal(0, 8, (100, 4)), [0, 0, 1, 1])
        labels = np.where(random.rand(100) < 0.7, classes[which], random.randint(1, 81, 100))
        results += [
            {"image_id": image_id, "category_id": label, "bbox": box, "score": score}
            for label, box, score in zip(
                labels.tolist(), found.tolist(), random.rand(100).tolist(), strict=True
            )
        ]
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, 81)]
    return {"images": images, "annotations": annotations, "categories": categories}, results


if __name__ == "__main__":
    main()
