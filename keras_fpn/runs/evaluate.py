"""Evaluates a trained detector with COCO's metrics.

    python training/evaluate.py --model runs/coco --dataset coco/2017 --data-dir DIR

The model is a run's folder (its best checkpoint) or a .keras file. Data set, split and image size
are those that the run was evaluated on unless they are given.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from keras_fpn.runs.command_line import exit_where_missing, exits_on_bad_input

exit_where_missing("tensorflow_datasets", "importlib_resources", "faster_coco_eval")

import numpy as np
import tensorflow as tf

import keras_fpn
from keras_fpn.data.coco_metrics import COCO_METRICS, CocoEvaluation, coco_evaluation, coco_results
from keras_fpn.data.datasets import DetectionDataset, load_dataset
from keras_fpn.data.pipeline import SkipReport, evaluation_batches
from keras_fpn.runs.run_folder import evaluation_edges, load_detector
from keras_fpn.runs.strategies import (
    STRATEGIES,
    choose_strategy,
    gather_from_workers,
    num_workers,
    replicas_of_worker,
    worker_index,
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a run, file of weights, or coco")
    parser.add_argument(
        "--dataset", help="TFDS name such as coco/2017, or a folder in COCO's layout"
    )
    parser.add_argument("--data-dir", help="where TFDS keeps its data sets (default: TFDS's own)")
    parser.add_argument("--split", help="split to evaluate on")
    parser.add_argument("--shorter-edge", type=int, help="images are resized to this shorter edge")
    parser.add_argument("--longest-edge", type=int, help="no edge is longer than this")
    parser.add_argument("--batch-size", type=int, default=2, help="images a step (default: 2)")
    parser.add_argument(
        "--strategy", choices=STRATEGIES, default="auto", help="as in train.py (default: auto)"
    )
    parser.add_argument("--results", help="new file for the detections in COCO's results format")
    options = parser.parse_args(arguments)

    with exits_on_bad_input():
        if options.results and Path(options.results).exists():
            raise FileExistsError(f"--results is a new file; {options.results!r} already exists.")
        strategy = choose_strategy(options.strategy)
        with strategy.scope():
            model, configuration = load_detector(options.model)
        dataset = options.dataset or configuration.get("dataset")
        if dataset is None:
            raise ValueError("--dataset is needed where --model is a file outside a run's folder.")
        own_data_dir = configuration.get("data_dir") if options.dataset is None else None
        data = load_dataset(
            dataset,
            options.split or configuration.get("validation_split", "validation"),
            options.data_dir or own_data_dir,
        )
        check_same_classes(
            data,
            configuration.get("class_names", data.class_names),
            configuration.get("category_ids", data.category_ids),
            "the model",
        )
        if model.num_classes != len(data.class_names):
            raise ValueError(
                f"The model has num_classes={model.num_classes}; the data set {data.name!r} has "
                f"{len(data.class_names)} classes."
            )
        edges = evaluation_edges(configuration, options.shorter_edge, options.longest_edge)
        evaluation = Evaluation(model, data, options.batch_size, **edges)
    (metrics, _), results = evaluation.run()
    if worker_index(strategy) > 0:
        return
    print(f"{data.num_images} images of {dataset} ({data.split}), {len(results)} detections")
    for name in (*COCO_METRICS, *(f"AP/{name}" for name in data.class_names)):
        print(f"{name:24s} {metrics[name]:7.4f}" if metrics[name] >= 0 else f"{name:24s}       -")
    if options.results:
        Path(options.results).write_text(json.dumps(results))


def check_same_classes(
    dataset: DetectionDataset, class_names: list[str], category_ids: list[int], whose: str
) -> None:
    """Raises ValueError where labels mean other classes in the data set than elsewhere."""
    own, other = (dataset.class_names, dataset.category_ids), (class_names, category_ids)
    if own != other:
        ours, theirs = (
            f"{len(names)} classes {names[:4]} with ids {ids[:4]}" for names, ids in (own, other)
        )
        raise ValueError(
            f"{dataset.name!r} ({dataset.split}) has {ours}; {whose} has {theirs}: they must "
            "be the same."
        )


class Evaluation:
    """Detects on every image of a split once, each worker on its share, and measures what it found.

    Args:
        model: a detector, made within its strategy's scope.
        dataset: the split.
        batch_size: images at a time, of all replicas of all workers together.
        shorter_edge, longest_edge: what the images are resized to, in pixels.
    """

    def __init__(
        self,
        model: keras_fpn.FasterRCNN,
        dataset: DetectionDataset,
        batch_size: int,
        shorter_edge: int,
        longest_edge: int,
    ):
        self.dataset = dataset
        self.strategy = model.distribute_strategy
        self.images_per_replica = max(1, batch_size // self.strategy.num_replicas_in_sync)
        self.edges = {"shorter_edge": shorter_edge, "longest_edge": longest_edge}
        self.ground_truth = dataset.coco_ground_truth()

        def on_replicas(inputs):
            return self.strategy.run(lambda x: model(x, training=False), args=(inputs,))

        jit_compile = model.jit_compile and self.strategy.num_replicas_in_sync == 1
        self.detect = tf.function(on_replicas, reduce_retracing=True, jit_compile=jit_compile)

    def run(self) -> tuple[CocoEvaluation, list[dict]]:
        """COCO's metrics, and the detections in COCO's results format, on every worker the same."""
        report = SkipReport()
        replicas = replicas_of_worker(self.strategy)
        batches = evaluation_batches(
            self.dataset,
            self.images_per_replica * replicas,
            **self.edges,
            shard=worker_index(self.strategy),
            num_shards=num_workers(self.strategy),
            report=report,
        )
        results = []
        for inputs, info in batches:
            # The last batch of a bucket may be short; another shape would be traced once more.
            rows = np.arange(self.images_per_replica * replicas) % len(info["image_ids"])
            shares = self.strategy.experimental_distribute_values_from_function(
                lambda context, inputs=inputs, rows=rows: self._share(context, inputs, rows)
            )
            found = [
                {name: x.numpy() for name, x in part.items()}
                for part in self._on_each_replica(self.detect(shares))
            ]
            results += coco_results(
                {name: np.concatenate([part[name] for part in found]) for name in found[0]},
                info["image_ids"].numpy(),
                inputs["image_sizes"].numpy(),
                info["original_sizes"].numpy(),
                self.dataset.category_ids,
            )
        # Boxes are not evaluated from the batches: what was left out there does not matter.
        if report.images():
            names = ", ".join(f"{name} ({why})" for name, why in report.images().items())
            name = f"{self.dataset.name} ({self.dataset.split})"
            print(f"\n{name}: not evaluated: {names}", flush=True)
        results = self._of_all_workers(results)
        return coco_evaluation(self.ground_truth, results), results

    def _share(self, context, inputs, rows):
        """The images of one replica."""
        replica = context.replica_id_in_sync_group % replicas_of_worker(self.strategy)
        own = rows[replica * self.images_per_replica :][: self.images_per_replica]
        return {name: tf.gather(x, own) for name, x in inputs.items()}

    def _on_each_replica(self, detections):
        """Detections of the replicas of this worker, one after the other."""
        names = list(detections)
        parts = [self.strategy.experimental_local_results(detections[name]) for name in names]
        return [dict(zip(names, part, strict=True)) for part in zip(*parts, strict=True)]

    def _of_all_workers(self, results):
        ids = np.array([[x["image_id"], x["category_id"]] for x in results], np.int64)
        numbers = np.array([[*x["bbox"], x["score"]] for x in results], np.float64)
        ids = gather_from_workers(self.strategy, ids.reshape(-1, 2))
        numbers = gather_from_workers(self.strategy, numbers.reshape(-1, 5))
        order = np.argsort(ids[:, 0], kind="stable")
        return [
            {
                "image_id": int(image_id),
                "category_id": int(category_id),
                "bbox": list(map(float, box)),
                "score": float(score),
            }
            for (image_id, category_id), (*box, score) in zip(
                ids[order].tolist(), numbers[order].tolist(), strict=True
            )
        ]


def format_metrics(metrics: dict[str, float]) -> str:
    """COCO's metrics in a line."""
    return ", ".join(f"{name} {metrics[name]:.3f}" for name in COCO_METRICS if metrics[name] >= 0)


def report_skipped(report: SkipReport, of: str) -> None:
    """Prints what could not be used, if anything."""
    if str(report):
        print(f"\n{of}: {report}", flush=True)


if __name__ == "__main__":
    main()
