"""Evaluation of a detector on a split, on one device or many."""

import numpy as np
import tensorflow as tf

from keras_fpn.data.coco_metrics import COCO_METRICS, CocoEvaluation, coco_evaluation, coco_results
from keras_fpn.data.datasets import DetectionDataset
from keras_fpn.data.pipeline import evaluation_batches
from keras_fpn.data.skip_report import SkipReport
from keras_fpn.faster_rcnn import FasterRCNN
from keras_fpn.runs.strategies import (
    gather_from_workers,
    num_workers,
    replicas_of_worker,
    worker_index,
)


class Evaluation:
    """Evaluates a detector on every image of a split once, each worker on its share.

    Args:
        model: the detector, created in the scope of its strategy.
        dataset: the split.
        batch_size: images per batch, over all replicas.
        shorter_edge: images are resized to this shorter edge, in pixels.
        longest_edge: upper limit of the longer edge, in pixels.
    """

    def __init__(
        self,
        model: FasterRCNN,
        dataset: DetectionDataset,
        batch_size: int,
        shorter_edge: int,
        longest_edge: int,
    ):
        self.dataset = dataset
        self.strategy = model.distribute_strategy
        self.images_per_replica = max(1, batch_size // self.strategy.num_replicas_in_sync)
        self.report = SkipReport()
        self.batches = evaluation_batches(
            dataset,
            self.images_per_replica * replicas_of_worker(self.strategy),
            shorter_edge=shorter_edge,
            longest_edge=longest_edge,
            shard=worker_index(self.strategy),
            num_shards=num_workers(self.strategy),
            report=self.report,
        )
        self.ground_truth = dataset.coco_ground_truth()

        def on_replicas(inputs):
            return self.strategy.run(lambda x: model(x, training=False), args=(inputs,))

        jit_compile = model.jit_compile and self.strategy.num_replicas_in_sync == 1
        self.detect = tf.function(on_replicas, reduce_retracing=True, jit_compile=jit_compile)

    def run(self) -> tuple[CocoEvaluation, list[dict]]:
        """Returns COCO's metrics and the detections in COCO's results format, on every worker."""
        results = []
        for inputs, info in self.batches:
            # The last batch of a bucket may be short; filling it up avoids another trace.
            rows = np.arange(self.images_per_replica * replicas_of_worker(self.strategy))
            rows %= len(info["image_ids"])
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
        # Boxes skipped in the batches do not matter: the ground truth is read elsewhere.
        if self.report.images():
            names = ", ".join(f"{name} ({why})" for name, why in self.report.images().items())
            name = f"{self.dataset.name} ({self.dataset.split})"
            print(f"\n{name}: not evaluated: {names}", flush=True)
        results = self._of_all_workers(results)
        return coco_evaluation(self.ground_truth, results), results

    def _share(self, context, inputs, rows):
        """Returns the images of one replica."""
        replica = context.replica_id_in_sync_group % replicas_of_worker(self.strategy)
        own = rows[replica * self.images_per_replica :][: self.images_per_replica]
        return {name: tf.gather(x, own) for name, x in inputs.items()}

    def _on_each_replica(self, detections):
        """Returns the detections of each replica of this worker."""
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
    """Returns COCO's metrics as one line."""
    return ", ".join(f"{name} {metrics[name]:.3f}" for name in COCO_METRICS if metrics[name] >= 0)


def report_skipped(report: SkipReport, of: str) -> None:
    """Prints what was skipped, if anything."""
    if str(report):
        print(f"\n{of}: {report}", flush=True)


def check_same_classes(
    dataset: DetectionDataset, class_names: list[str], category_ids: list[int], whose: str
) -> None:
    """Checks that labels mean the same classes in a data set and elsewhere.

    Raises:
        ValueError: if they do not.
    """
    own, other = (dataset.class_names, dataset.category_ids), (class_names, category_ids)
    if own != other:
        ours, theirs = (
            f"{len(names)} classes {names[:4]} with ids {ids[:4]}" for names, ids in (own, other)
        )
        raise ValueError(
            f"{dataset.name!r} ({dataset.split}) has {ours}; {whose} has {theirs}; they must "
            "be the same."
        )
