"""Evaluates a model: a detector with COCO's metrics, an RPN by its average recall.

    keras-fpn evaluate --model runs/coco --dataset coco/2017 --data-dir ~/tensorflow_datasets

Data set, split, proposals and image size are those of the run's own evaluation unless they are
given. With several --shorter-edge, detections at these scales are merged (--merge).
"""

import dataclasses
import json
from pathlib import Path
from typing import Literal

from keras_fpn.runs.command import (
    StrategyName,
    counted,
    exits_on_bad_input,
    exits_on_os_error,
    parse,
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `keras-fpn evaluate`.

    Attributes:
        model: folder of a run (its best model), a weights file, "coco" or "coco_v2".
        dataset: TFDS name such as coco/2017, or a folder in COCO's layout.
        data_dir: directory of TFDS's prepared data sets.
        split: split to evaluate on.
        proposals: file of proposals for the split, as in `keras-fpn train`, for Fast R-CNN.
        shorter_edge: images are resized to this shorter edge; or several scales.
        merge: how detections at several scales are merged: NMS, or box voting after it.
        longest_edge: upper limit of the longer edge after resizing.
        batch_size: images per step.
        strategy: devices to use, as in `keras-fpn train`.
        results: new file for the detections in COCO's results format; of an RPN, for its proposals:
            .json in the same format, or .npz.
    """

    model: str
    dataset: str | None = None
    data_dir: str | None = None
    split: str | None = None
    proposals: Path | None = None
    shorter_edge: tuple[int, ...] | None = None
    merge: Literal["nms", "vote"] = "nms"
    longest_edge: int | None = None
    batch_size: int = 2
    strategy: StrategyName = "auto"
    results: Path | None = None


def main(arguments: list[str] | None = None) -> None:
    """Runs the program."""
    options = parse(Options, arguments, "evaluate", __doc__)
    from keras_fpn.data.datasets import load_dataset
    from keras_fpn.data.stored_proposals import read_proposals, with_proposals, write_proposals
    from keras_fpn.runs.evaluation import Evaluation, check_same_classes
    from keras_fpn.runs.run_folder import evaluation_edges, load_detector
    from keras_fpn.runs.run_state import write_text, writing
    from keras_fpn.runs.strategies import choose_strategy, worker_index

    with exits_on_bad_input():
        if options.results and options.results.exists():
            raise FileExistsError(f"--results must be a new file; '{options.results}' exists.")
        strategy = choose_strategy(options.strategy)
        with strategy.scope():
            model, configuration = load_detector(options.model)
        dataset = options.dataset or configuration.get("dataset")
        if dataset is None:
            raise ValueError("--dataset is required if --model is not a run's folder.")
        own_data_dir = configuration.get("data_dir") if options.dataset is None else None
        data = load_dataset(
            dataset,
            options.split or configuration.get("validation_split", "validation"),
            options.data_dir or own_data_dir,
        )
        # An RPN has no classes; those of its run do not matter.
        if model.num_classes is not None:
            check_same_classes(
                data,
                configuration.get("class_names", data.class_names),
                configuration.get("category_ids", data.category_ids),
                "the model",
            )
        if model.num_classes not in (None, len(data.class_names)):
            raise ValueError(
                f"The model has num_classes={model.num_classes}; the data set {data.name!r} has "
                f"{len(data.class_names)} classes."
            )
        if model.takes_proposals:
            proposals = options.proposals or configuration.get("validation_proposals")
            if proposals is None:
                raise ValueError("--proposals is required for a model that takes proposals.")
            data = with_proposals(data, read_proposals(proposals))
        edges = evaluation_edges(configuration, options.shorter_edge, options.longest_edge)
        evaluation = Evaluation(model, data, options.batch_size, **edges, merge=options.merge)
    (metrics, _), results = evaluation.run()
    if worker_index(strategy) > 0:
        return
    found = len(results.boxes) if evaluation.is_rpn else len(results)
    found = counted(found, "proposal" if evaluation.is_rpn else "detection")
    evaluated = counted(len(evaluation.ground_truth["images"]), "image")
    print(f"{evaluated} of {dataset} ({data.split}), {found}")
    of_classes = [] if evaluation.is_rpn else [f"AP/{name}" for name in data.class_names]
    for name in (*evaluation.metric_names, *of_classes):
        print(f"{name:24s} {metrics[name]:7.4f}" if metrics[name] >= 0 else f"{name:24s}       -")
    if not options.results:
        return
    with exits_on_os_error():
        if evaluation.is_rpn:
            sizes = {x["id"]: (x["height"], x["width"]) for x in evaluation.ground_truth["images"]}
            with writing(options.results):
                write_proposals(options.results, results, sizes)
        else:
            write_text(options.results, json.dumps(results))
