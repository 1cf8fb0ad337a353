"""Trains Faster R-CNN in four steps (Faster R-CNN, section 3.2; FPN, Table 5).

    keras-fpn alternating --dataset coco/2017 --data-dir ~/tensorflow_datasets --output runs/steps

1. The RPN, from the initial weights of the recipe.
2. Fast R-CNN, from the same initial weights, on the proposals of step 1.
3. An RPN on the backbone and the pyramid of step 2, which stay as they are.
4. The box head of step 2 goes on, on the same features and the proposals of step 3.

The RPN of step 3 and the box head of step 4 are one Faster R-CNN: the output folder holds it in
checkpoints/best.keras, with config.json and metrics.json, as that of keras-fpn train does. Each
step is a run of its own, in 1-rpn, 2-fast_rcnn, 3-rpn and 4-fast_rcnn, and hands on its best model.

The options hold for each step, except --model, --frozen, --proposals and --validation-proposals,
which follow from the step and cannot be given.

Rerun the same command to resume one that was stopped; it ends with the same weights, on a CPU bit
for bit with the same number of threads.
"""

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from keras_fpn.runs.command import exits_on_bad_input, exits_on_os_error
from keras_fpn.runs.options import read_arguments
from keras_fpn.runs.recipes import BUILDERS, Recipe
from keras_fpn.runs.train import Run, parse_arguments

if TYPE_CHECKING:
    from keras_fpn.faster_rcnn import FasterRCNN

# The step's folder, its model, and the step whose weights it begins with.
STEPS = (
    ("1-rpn", "rpn", None),
    ("2-fast_rcnn", "fast_rcnn", None),
    ("3-rpn", "rpn", "2-fast_rcnn"),
    ("4-fast_rcnn", "fast_rcnn", "2-fast_rcnn"),
)
SHARED = ("backbone", "pyramid")


def main(arguments: list[str] | None = None) -> None:
    """Runs the program."""
    options, recipe = parse_arguments(arguments, "alternating", __doc__)
    with exits_on_bad_input():
        files = options.proposals or options.validation_proposals
        if recipe.detector != "faster_rcnn" or recipe.frozen or files:
            raise ValueError(
                "keras-fpn alternating takes no --model, --frozen, --proposals and "
                "--validation-proposals, which follow from the step; received one of them."
            )
    alternate(options, recipe)


def alternate(
    options: Run,
    recipe: Recipe,
    *,
    rpn: Recipe | None = None,
    steps: int = len(STEPS),
    num_proposals: Sequence[int] | None = None,
) -> None:
    """Trains step by step, or resumes, and makes one detector of the last two.

    Args:
        options: data, devices and output.
        recipe: recipe of every step, with the arguments of `build_fpn_faster_rcnn`.
        rpn: recipe of the RPN's steps in place of `recipe`. Defaults to None, the same.
        steps: number of steps to run; the detector is written after all four.
        num_proposals: as in `stored_proposals`.
    """
    from keras_fpn.runs.run_folder import claim_run, run_lock
    from keras_fpn.runs.strategies import choose_strategy, num_workers
    from keras_fpn.runs.training import (
        build_model,
        checked_recipe,
        configuration_of,
        images_at_start,
        open_splits,
        outcome_of,
        steps_per_epoch,
    )

    with contextlib.ExitStack() as lock:
        with exits_on_bad_input():
            strategy = choose_strategy(options.strategy)
            if num_workers(strategy) > 1:
                raise ValueError(
                    f"keras-fpn alternating runs on one machine; received {num_workers(strategy)} "
                    "workers."
                )
            recipes = [
                checked_recipe(given, strategy.num_replicas_in_sync, options.jit_compile)
                for given in (recipe, rpn or recipe)
            ]
            configuration = configuration_of(options, recipe)
            if rpn is not None:
                configuration["rpn_recipe"] = dataclasses.asdict(rpn)
            lock.enter_context(run_lock(options.output, configuration))
            train_data, validation_data = open_splits(options, "faster_rcnn")
            for given in recipes:
                steps_per_epoch(given, images_at_start(options, train_data))
            # A wrong argument of the last step's model is found before the first step.
            with strategy.scope():
                model = build_model(recipe, train_data.class_names)
            configuration |= outcome_of(train_data, validation_data, model)
            claim_run(options.output, configuration, options.allow_changed_data)
        with exits_on_os_error():
            _run_steps(options, recipe, rpn or recipe, STEPS[:steps], num_proposals)
            if steps == len(STEPS):
                _write_detector(model, options, recipe)


def _run_steps(
    options: Run,
    recipe: Recipe,
    rpn: Recipe,
    steps: Sequence[tuple],
    num_proposals: Sequence[int] | None,
) -> None:
    """Trains those of the steps that are not complete."""
    from keras_fpn.runs.training import train

    rpn_folder = options.output
    for folder, detector, begins_with in steps:
        weights = None if begins_with is None else best_model(options.output / begins_with)
        of_step = recipe_of_step(rpn if detector == "rpn" else recipe, detector, weights)
        run = dataclasses.replace(options, output=options.output / folder, config=None)
        if detector == "rpn":
            rpn_folder = run.output
        else:
            first, second = stored_proposals(options, of_step, rpn_folder, num_proposals)
            run = dataclasses.replace(run, proposals=first, validation_proposals=second)
        if (run.output / "report.html").exists():
            continue
        print(f"\nStep {folder}:", flush=True)
        with warnings.catch_warnings():
            # Step 3 trains it.
            warnings.filterwarnings("ignore", message=".*has no weights of rpn_head")
            train(run, of_step)


def recipe_of_step(recipe: Recipe, detector: str, weights: Path | None) -> Recipe:
    """Returns the recipe of a step: that of the whole, for one of its models.

    Args:
        recipe: recipe with the arguments of `build_fpn_faster_rcnn`.
        detector: name in `BUILDERS`.
        weights: the model to begin with, whose shared layers stay as they are; None for the initial
            weights of `recipe`.
    """
    known = read_arguments("builder", BUILDERS[detector])
    model = {name: value for name, value in recipe.model.items() if name in known}
    if weights is not None:
        model = {name: value for name, value in model.items() if name != "backbone_weights"}
        model["weights"] = str(weights)
    frozen = () if weights is None else SHARED
    return dataclasses.replace(recipe, model=model, detector=detector, frozen=frozen)


def best_model(folder: Path) -> Path:
    """Returns the path of a run's best model."""
    return folder / "checkpoints" / "best.keras"


def stored_proposals(
    options: Run, recipe: Recipe, rpn_folder: Path, num_proposals: Sequence[int] | None = None
) -> tuple[Path, Path]:
    """Returns the files of an RPN's proposals for both splits, which are written unless they exist.

    Args:
        options: data and devices.
        recipe: sizes of images and batches.
        rpn_folder: folder of the RPN's run, where the files are.
        num_proposals: proposals of a training and of a validation image. Defaults to None,
            `training_post_nms` and `post_nms` of the RPN: 2000 and 1000 in the paper.
    """
    from keras_fpn.data.datasets import load_dataset
    from keras_fpn.data.stored_proposals import write_proposals
    from keras_fpn.runs.evaluation import Evaluation
    from keras_fpn.runs.run_folder import load_detector
    from keras_fpn.runs.run_state import writing
    from keras_fpn.runs.strategies import choose_strategy

    files = (rpn_folder / "proposals-training.npz", rpn_folder / "proposals-validation.npz")
    splits = (options.train_split, options.validation_split)
    for number, (file, split) in enumerate(zip(files, splits, strict=True)):
        if file.exists():
            continue
        strategy = choose_strategy(options.strategy)
        with exits_on_bad_input(), strategy.scope():
            model, _ = load_detector(best_model(rpn_folder))
            data = load_dataset(options.dataset, split, options.data_dir)
        layer = model.proposals
        if number == 0:
            layer.pre_nms, layer.post_nms = layer.training_pre_nms, layer.training_post_nms
        if num_proposals is not None:
            layer.post_nms = num_proposals[number]
        evaluation = Evaluation(
            model,
            data,
            recipe.batch_size or 2 * strategy.num_replicas_in_sync,
            shorter_edge=recipe.evaluation_shorter_edge,
            longest_edge=recipe.longest_edge,
        )
        print(f"Writing the proposals for {split} to {file}", flush=True)
        proposals = evaluation.proposals()
        with writing(file):
            write_proposals(file, proposals)
    return files


def _write_detector(model: "FasterRCNN", options: Run, recipe: Recipe) -> None:
    """Gives a model the last two steps' weights; writes it and its metrics if they are missing."""
    from keras_fpn.data.datasets import load_dataset
    from keras_fpn.runs.evaluation import Evaluation, format_metrics
    from keras_fpn.runs.run_state import write_model, write_text
    from keras_fpn.weights.pretrained import load_keras_file

    file, metrics_file = best_model(options.output), options.output / "metrics.json"
    if metrics_file.exists():
        print(f"{options.output} is complete; its detector is {file}.")
        return
    rpn, fast_rcnn = (load_keras_file(best_model(options.output / name)) for name, *_ in STEPS[2:])
    for name in (*SHARED, "rpn_head", "box_head"):
        source = fast_rcnn if name == "box_head" else rpn
        getattr(model, name).set_weights(getattr(source, name).get_weights())
    write_model(model, file)
    evaluation = Evaluation(
        model,
        load_dataset(options.dataset, options.validation_split, options.data_dir),
        recipe.batch_size or 2 * model.distribute_strategy.num_replicas_in_sync,
        shorter_edge=recipe.evaluation_shorter_edge,
        longest_edge=recipe.longest_edge,
    )
    metrics = evaluation.run()[0].metrics
    write_text(metrics_file, json.dumps(metrics, indent=2) + "\n")
    print(f"{format_metrics(metrics, evaluation.metric_names)}; the detector is {file}.")
