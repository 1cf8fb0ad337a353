"""Evaluation of a model on a split, on one device or many."""

import collections
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from keras_fpn.data.coco_metrics import COCO_METRICS, CocoEvaluation, coco_evaluation, coco_results
from keras_fpn.data.datasets import DetectionDataset
from keras_fpn.data.pipeline import evaluation_batches
from keras_fpn.data.proposal_metrics import PROPOSAL_METRICS, proposal_evaluation
from keras_fpn.data.skip_report import SkipReport
from keras_fpn.data.stored_proposals import Proposals
from keras_fpn.detector import Detector
from keras_fpn.faster_rcnn import FasterRCNN
from keras_fpn.image_pyramid import MERGE_METHODS, merge_scales
from keras_fpn.region_proposal_network import RegionProposalNetwork
from keras_fpn.runs.strategies import (
    gather_from_workers,
    num_workers,
    replicas_of_worker,
    worker_index,
)
from keras_fpn.validation import check_choice, check_int


class Evaluation:
    """Evaluates a model on every image of a split once, each worker on its share.

    Images that cannot be decoded are left out of the ground truth, and are printed.

    Args:
        model: the model, created in the scope of its strategy.
        dataset: the split; for a model that takes proposals, with proposals.
        batch_size: images per batch, over all replicas.
        shorter_edge: images are resized to this shorter edge, in pixels; or several, whose
            detections are merged (`keras_fpn.image_pyramid`).
        longest_edge: upper limit of the longer edge, in pixels.
        merge: how detections at several scales are merged: "nms" or "vote". Defaults to "nms".

    Attributes:
        metric_names: names of the metrics: COCO's of detections, or average recalls of proposals.
        best_metric: name of the metric that the best model has the largest of.
        ground_truth: ground truth in COCO's format; after a run, that of the images in it.

    Raises:
        ValueError: if the model cannot be evaluated at several scales, or `merge` is unknown.
    """

    def __init__(
        self,
        model: Detector,
        dataset: DetectionDataset,
        batch_size: int,
        shorter_edge: int | Sequence[int],
        longest_edge: int,
        merge: str = "nms",
    ):
        self.dataset = dataset
        self.model = model
        self.is_rpn = isinstance(model, RegionProposalNetwork)
        self.metric_names = PROPOSAL_METRICS if self.is_rpn else COCO_METRICS
        self.best_metric = "AR1k" if self.is_rpn else "AP"
        self.merge = check_choice("merge", merge, MERGE_METHODS)
        edges = [shorter_edge] if isinstance(shorter_edge, int) else list(shorter_edge)
        if len(edges) > 1 and not isinstance(model, FasterRCNN):
            raise ValueError(
                f"Only a FasterRCNN is evaluated at several scales; received {edges} for a "
                f"{type(model).__name__}."
            )
        self.strategy = model.distribute_strategy
        batch_size = check_int("batch_size", batch_size)
        self.images_per_replica = max(1, batch_size // self.strategy.num_replicas_in_sync)
        # No more rows than needed: they take time, and their number decides how products of
        # matrices are rounded.
        most = self._most_proposals(dataset)
        self.report = SkipReport()
        self.batches = [
            evaluation_batches(
                dataset,
                self.images_per_replica * replicas_of_worker(self.strategy),
                shorter_edge=edge,
                longest_edge=longest_edge,
                shard=worker_index(self.strategy),
                num_shards=num_workers(self.strategy),
                max_proposals=most,
                report=self.report,
            )
            for edge in edges
        ]
        self.ground_truth = self._of_split = dataset.coco_ground_truth()

        def on_replicas(inputs):
            return self.strategy.run(lambda x: model(x, training=False), args=(inputs,))

        jit_compile = model.jit_compile and self.strategy.num_replicas_in_sync == 1
        self.detect = tf.function(
            on_replicas, reduce_retracing=True, jit_compile=jit_compile, autograph=False
        )

    def run(self) -> tuple[CocoEvaluation, list[dict] | Proposals]:
        """Returns the metrics, and what they are of, on every worker.

        That is the detections in COCO's results format, or the `proposals` of an RPN.
        """
        if self.is_rpn:
            proposals = self.proposals()
            metrics = proposal_evaluation(self.ground_truth, proposals)
            return CocoEvaluation(metrics, np.zeros((10, 101, 0))), proposals
        found, evaluated = zip(*map(self._detections, self.batches), strict=True)
        results = found[0] if len(found) == 1 else self._merged(found)
        self._leave_out_others(evaluated[0])
        return coco_evaluation(self.ground_truth, results), results

    def proposals(self) -> Proposals:
        """Returns an RPN's proposals for all images of the split, on every worker.

        Those of an image that cannot be read are none. It takes less time than `run`: average
        recalls are not computed.
        """
        # Of each image, its id and size; of each proposal, the id of its image, box and score.
        parts = [(np.zeros((0, 3), int), np.zeros((0, 1), int), np.zeros((0, 5), np.float32))]
        for outputs, image_sizes, info in self._outputs(self.batches[0]):
            of_batch = info["image_ids"].numpy()
            real = outputs["scores"][: len(of_batch)] >= 0
            of_images = np.dstack([outputs["boxes"], outputs["scores"]])[: len(of_batch)]
            parts.append(
                (
                    np.column_stack([of_batch, image_sizes]),
                    np.repeat(of_batch, real.sum(axis=1))[:, None],
                    of_images[real],
                )
            )
        images, ids, numbers = (np.concatenate(of_all) for of_all in zip(*parts, strict=True))
        (images,) = self._of_all_workers(images)
        ids, numbers = self._of_all_workers(ids, numbers)
        frames = {image_id: frame for image_id, *frame in images.tolist()}
        of_split = self.dataset.read_image_ids()
        starts = np.searchsorted(ids[:, 0], of_split)
        ends = np.searchsorted(ids[:, 0], of_split, side="right")
        found = [numbers[start:end] for start, end in zip(starts, ends, strict=True)]
        self._leave_out_others(images[:, 0])
        return Proposals.from_images(
            of_split.tolist(),
            [rows[:, :4] for rows in found],
            [rows[:, 4] for rows in found],
            [frames.get(image_id, [0, 0]) for image_id in of_split.tolist()],
        )

    def _leave_out_others(self, evaluated):
        """Restricts the ground truth to these images, and prints which were skipped and why."""
        ids = set(evaluated.tolist())
        truth = dict(self._of_split)
        truth["images"] = [x for x in truth["images"] if x["id"] in ids]
        truth["annotations"] = [x for x in truth["annotations"] if x["image_id"] in ids]
        self.ground_truth = truth
        # Each worker knows its own; text is gathered as bytes.
        skipped = "".join(f"{name} ({why})\0" for name, why in self.report.images().items())
        codes = np.frombuffer(skipped.encode(), np.uint8).astype(np.int64)
        codes = gather_from_workers(self.strategy, codes).astype(np.uint8)
        skipped = sorted(codes.tobytes().decode().split("\0")[:-1])
        if skipped and worker_index(self.strategy) == 0:
            name = f"{self.dataset.name} ({self.dataset.split})"
            print(
                f"\n{name}: left out of the evaluation with their objects: {', '.join(skipped)}",
                flush=True,
            )

    def _outputs(self, batches):
        """Yields the outputs of each batch, with its inputs and its targets, as arrays."""
        for inputs, info in batches:
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
            outputs = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
            yield outputs, inputs["image_sizes"].numpy(), info

    def _detections(self, batches):
        """Returns the detections in COCO's results format, and the ids of the images."""
        results, evaluated = [], [np.zeros(0, np.int64)]
        for outputs, image_sizes, info in self._outputs(batches):
            evaluated.append(info["image_ids"].numpy())
            results += coco_results(
                outputs,
                info["image_ids"].numpy(),
                image_sizes,
                info["original_sizes"].numpy(),
                self.dataset.category_ids,
            )
        ids = np.array([[x["image_id"], x["category_id"]] for x in results], np.int64)
        numbers = np.array([[*x["bbox"], x["score"]] for x in results], np.float64)
        ids, numbers = self._of_all_workers(ids.reshape(-1, 2), numbers.reshape(-1, 5))
        results = [
            {
                "image_id": int(image_id),
                "category_id": int(category_id),
                "bbox": list(map(float, box)),
                "score": float(score),
            }
            for (image_id, category_id), (*box, score) in zip(
                ids.tolist(), numbers.tolist(), strict=True
            )
        ]
        return results, gather_from_workers(self.strategy, np.concatenate(evaluated))

    def _merged(self, found):
        """Merges the detections of all scales, in COCO's results format."""
        labels = {category: label for label, category in enumerate(self.dataset.category_ids)}
        by_image = collections.defaultdict(lambda: [[] for _ in found])
        for scale, results in enumerate(found):
            for result in results:
                by_image[result["image_id"]][scale].append(result)
        merged = []
        for image_id, scales in sorted(by_image.items()):
            detections = []
            for results in scales:
                boxes = np.array([x["bbox"] for x in results]).reshape(-1, 4)
                detections.append(
                    {
                        "boxes": np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]),
                        "scores": np.array([x["score"] for x in results]),
                        "labels": np.array([labels[x["category_id"]] for x in results], int),
                    }
                )
            kept = merge_scales(
                detections,
                nms_iou_threshold=self.model.detections.nms_iou_threshold,
                max_detections=self.model.detections.max_detections,
                method=self.merge,
            )
            size = np.ones((1, 2))  # The boxes are in original pixels already.
            kept = {name: values[None] for name, values in kept.items()}
            merged += coco_results(kept, [image_id], size, size, self.dataset.category_ids)
        return merged

    def _most_proposals(self, dataset):
        """Returns the largest number of proposals of an image, within the pipeline's default."""
        stored = getattr(dataset, "proposals", None)
        if stored is None:
            return 1
        return int(np.clip(np.diff(stored.row_splits).max(initial=1), 1, 2000))

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

    def _of_all_workers(self, *arrays):
        """Returns the rows of all workers, in the order of the ids that begin the first array."""
        gathered = [gather_from_workers(self.strategy, array) for array in arrays]
        order = np.argsort(gathered[0][:, 0], kind="stable")
        return [array[order] for array in gathered]


def format_metrics(metrics: dict[str, float], names: Sequence[str]) -> str:
    """Returns the defined ones of some metrics as one line."""
    return ", ".join(f"{name} {metrics[name]:.3f}" for name in names if metrics[name] >= 0)


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
