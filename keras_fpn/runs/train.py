"""Trains Faster R-CNN with a feature pyramid on a detection data set.

    python training/train.py --dataset coco/2017 --data-dir ~/tensorflow_datasets --output runs/coco

The data set is the name of one that TensorFlow Datasets has prepared, or a folder in COCO's layout
(annotations/instances_SPLIT.json and SPLIT/). All GPUs are used, those of all workers where
TF_CONFIG or Slurm name several (--strategy); without one, the CPU.

The same command goes on with a run that was stopped, by SIGTERM, Ctrl-C or anything else, and ends
with the same weights.

The output folder holds the resolved configuration (config.json, which --config takes), checkpoints
(checkpoints/step-N.keras, the last ones, and checkpoints/best.keras), TensorBoard logs (logs/),
losses and metrics of every epoch (history.csv) and of steps (steps.csv), COCO's metrics of the last
evaluation with those of each class (metrics.json), a page with curves, tables and pictures at the
end (report.html), and what could not be read (skipped.json).
"""

import argparse
import contextlib
import dataclasses
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from keras_fpn.runs.command_line import exit_where_missing, exits_on_bad_input

exit_where_missing(
    "tensorflow_datasets",
    "importlib_resources",
    "simple_parsing",
    "faster_coco_eval",
    "tensorboard",
    "matplotlib",
)

import keras
import numpy as np
import tensorflow as tf
from simple_parsing import ArgumentParser, DashVariant

import keras_fpn
from keras_fpn.builder import arguments_of
from keras_fpn.data.datasets import DetectionDataset, load_dataset
from keras_fpn.data.pipeline import SkipReport, training_batches
from keras_fpn.optimization import SGDWithL2, WarmupCosineDecay, WarmupStepDecay
from keras_fpn.runs.callbacks import (
    EndEpoch,
    KeepState,
    ReportSkipped,
    ShowProgress,
    StopOnNaN,
    WriteTensorBoard,
)
from keras_fpn.runs.evaluate import Evaluation, check_same_classes
from keras_fpn.runs.recipes import RECIPES, Recipe
from keras_fpn.runs.report import write_report
from keras_fpn.runs.run_folder import claim_run, read_configuration
from keras_fpn.runs.run_state import RunState, checkpoints, read_checkpoint
from keras_fpn.runs.stop_signal import Interrupted, StopSignal
from keras_fpn.runs.strategies import (
    STRATEGIES,
    choose_strategy,
    gather_from_workers,
    num_workers,
    worker_index,
)


def main(arguments: list[str] | None = None) -> None:
    options, recipe = parse_arguments(arguments)
    with exits_on_bad_input():
        strategy = choose_strategy(options.strategy)
    keras.utils.set_random_seed(recipe.seed)
    replicas = strategy.num_replicas_in_sync
    is_writer = worker_index(strategy) == 0
    output = Path(options.output)
    report = SkipReport()
    with exits_on_bad_input():
        if recipe.batch_size is None:
            recipe = dataclasses.replace(recipe, batch_size=2 * replicas)
        check_numbers(recipe, replicas)
        if options.jit_compile is True and replicas > 1:
            raise ValueError(f"--jit-compile is for one replica; there are {replicas}.")
        train_data, validation_data = (
            load_dataset(options.dataset, split, options.data_dir, download=options.download)
            for split in (options.train_split, options.validation_split)
        )
        check_same_classes(
            validation_data, train_data.class_names, train_data.category_ids, "the training split"
        )
        steps = (recipe.images_per_epoch or train_data.num_images) // recipe.batch_size
        if steps == 0:
            raise ValueError(
                f"A batch is not larger than an epoch; --batch-size is {recipe.batch_size}, an "
                f"epoch {recipe.images_per_epoch or train_data.num_images} images."
            )

        def batches(start_step: int, shard: int = 0, num_shards: int = 1) -> tf.data.Dataset:
            return training_batches(
                train_data,
                recipe.batch_size,
                shorter_edges=recipe.shorter_edges,
                longest_edge=recipe.longest_edge,
                horizontal_flip=recipe.horizontal_flip,
                keep_empty_images=recipe.keep_empty_images,
                seed=recipe.seed,
                start_step=start_step,
                shard=shard,
                num_shards=num_shards,
                report=report,
            )

        if recipe.precision != "float32":
            keras.config.set_dtype_policy(f"mixed_{recipe.precision}")
        with strategy.scope():
            model = build_model(recipe, train_data.class_names)
            optimizer = build_optimizer(recipe, steps)
            model.compile(optimizer, jit_compile=options.jit_compile)
            model.optimizer.build(model.trainable_variables)
        recipe = resolved_recipe(recipe, model)
        configuration = configuration_of(options, recipe, train_data)
        state = resume(model, strategy, output, configuration)
        data = on_replicas(strategy, recipe.batch_size, state.steps, batches)
        evaluation = Evaluation(
            model,
            validation_data,
            recipe.batch_size,
            recipe.evaluation_shorter_edge,
            recipe.longest_edge,
        )
    total_steps = recipe.epochs * steps
    if is_writer:
        print(
            f"{train_data.num_images} images of {options.dataset} ({options.train_split}), "
            f"{len(train_data.class_names)} classes; {recipe.epochs} epochs of {steps} steps of "
            f"{recipe.batch_size} images on {describe(strategy)}; {model.count_params():,} "
            f"parameters; {f'{state.steps} steps are done; ' if state.steps else ''}"
            f"writing to {output}",
            flush=True,
        )
    if state.epochs == recipe.epochs:
        print(f"The run in {output} has ended; its page is {output / 'report.html'}.")
        return
    started, steps_before = time.time(), state.steps
    with StopSignal() as stop, exits_on_failure(strategy, output):
        keep_state = KeepState(
            state,
            output / "checkpoints",
            every=recipe.checkpoint_steps,
            keep=recipe.keep_checkpoints,
            # About a thousand points, however long the run.
            curve_every=max(5, total_steps // 1000),
            stop=stop,
        )
        end_epoch = EndEpoch(keep_state, evaluation, recipe.evaluate_every, recipe.epochs, output)
        callbacks = [
            ShowProgress(state, recipe.batch_size, total_steps),
            StopOnNaN(state, lambda step: next(iter(batches(step).take(1))), output, is_writer),
            keep_state,
            end_epoch,
        ]
        if is_writer:
            pictured = [image["id"] for image in evaluation.ground_truth["images"][:4]]
            callbacks += [
                ReportSkipped(report, output),
                WriteTensorBoard(
                    end_epoch,
                    output / "logs",
                    every=keep_state.curve_every,
                    images=validation_data.read_images(pictured),
                ),
            ]
        model.fit(
            data,
            initial_epoch=state.epochs,
            initial_step=state.steps - state.epochs * steps,
            epochs=recipe.epochs,
            steps_per_epoch=steps,
            shuffle=False,
            verbose=options.verbose if is_writer else 0,
            callbacks=callbacks,
        )
    seconds = time.time() - started
    if is_writer:
        page = write_report(
            output,
            title=f"{options.dataset}, {recipe.backbone}",
            configuration=configuration,
            steps=state.curves,
            history=state.history,
            evaluation=end_epoch.scores,
            ground_truth=evaluation.ground_truth,
            results=end_epoch.results,
            read_images=validation_data.read_images,
        )
        print(
            f"Trained {state.steps - steps_before} steps in {seconds:.0f} s, evaluations "
            f"included; see {page}."
        )


def parse_arguments(arguments: list[str] | None) -> tuple[argparse.Namespace, Recipe]:
    """The options of the command line, and the recipe that they change."""

    def add_recipe_option(to):
        to.add_argument(
            "--recipe",
            choices=sorted(RECIPES),
            default="1x",
            dest="recipe_name",
            help="where the numbers below start from",
        )
        to.add_argument(
            "--config",
            metavar="FILE",
            help="config.json of a run: its recipe and data, in place of --recipe",
        )

    choice = argparse.ArgumentParser(add_help=False)
    add_recipe_option(choice)
    chosen, _ = choice.parse_known_args(arguments)
    start, given = RECIPES[chosen.recipe_name], {}
    if chosen.config is not None:
        with exits_on_bad_input():
            given = read_configuration(chosen.config)
            start = recipe_of(given, chosen.config)
    parser = ArgumentParser(description=__doc__, add_option_string_dash_variants=DashVariant.DASH)
    add_recipe_option(parser)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset",
        required="dataset" not in given,
        default=given.get("dataset"),
        metavar="NAME",
        help="TFDS name such as coco/2017, or a folder in COCO's layout",
    )
    data.add_argument(
        "--data-dir",
        metavar="DIR",
        default=given.get("data_dir"),
        help="where TFDS keeps its data sets; TFDS's own otherwise",
    )
    data.add_argument(
        "--download", action="store_true", help="let TFDS download and prepare what is not there"
    )
    data.add_argument(
        "--train-split",
        default=given.get("train_split", "train"),
        metavar="SPLIT",
        help="split to train on; TFDS's slices such as train[:8] work",
    )
    data.add_argument(
        "--validation-split",
        default=given.get("validation_split", "validation"),
        metavar="SPLIT",
        help="split to evaluate on",
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="new folder for all that the run writes, or that of the run to go on with",
    )
    run.add_argument(
        "--strategy",
        choices=STRATEGIES,
        default="auto",
        help="what to compute on; auto: all GPUs, of all workers that TF_CONFIG or Slurm name",
    )
    run.add_argument(
        "--jit-compile",
        action=argparse.BooleanOptionalAction,
        default="auto",
        help="compile with XLA; auto: on one GPU",
    )
    run.add_argument(
        "--verbose",
        type=int,
        choices=(0, 1, 2),
        default=1,
        help="1: a progress bar; 2: a line an epoch; 0: neither",
    )
    parser.add_arguments(Recipe, dest="recipe", default=start)
    options = parser.parse_args(arguments)
    return options, options.recipe


def recipe_of(configuration: dict, file: str) -> Recipe:
    """The recipe in a run's configuration."""
    fields = {field.name for field in dataclasses.fields(Recipe)}
    unknown = sorted(set(configuration["recipe"]) - fields)
    if unknown:
        raise ValueError(f"{file!r} has a recipe with {unknown[0]!r}, which is no field of one.")
    return Recipe(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in configuration["recipe"].items()
        }
    )


def check_numbers(recipe: Recipe, replicas: int) -> None:
    """Raises ValueError for numbers of a recipe that make no run."""
    if recipe.batch_size < 1 or recipe.batch_size % replicas:
        raise ValueError(
            f"--batch-size is a multiple of the {replicas} replicas; received {recipe.batch_size}."
        )
    for name in ("epochs", "evaluate_every", "checkpoint_steps", "keep_checkpoints"):
        if getattr(recipe, name) < 1:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} is at least 1; received {getattr(recipe, name)}.")
    if recipe.average_decay is not None and not 0 < recipe.average_decay < 1:
        raise ValueError(f"--average-decay is between 0 and 1; received {recipe.average_decay}.")
    if recipe.clip_norm is not None and not recipe.clip_norm > 0:
        raise ValueError(f"--clip-norm is above 0; received {recipe.clip_norm}.")


def configuration_of(options: argparse.Namespace, recipe: Recipe, data: DetectionDataset) -> dict:
    """What the run was asked for, resolved, and what its labels mean."""
    return {
        "dataset": options.dataset,
        "data_dir": options.data_dir,
        "train_split": options.train_split,
        "validation_split": options.validation_split,
        "recipe": dataclasses.asdict(recipe),
        "class_names": data.class_names,
        "category_ids": data.category_ids,
        "versions": {
            "keras_fpn": keras_fpn.__version__,
            "keras": keras.__version__,
            "tensorflow": tf.__version__,
        },
    }


def resume(
    model: keras_fpn.FasterRCNN,
    strategy: tf.distribute.Strategy,
    output: Path,
    configuration: dict,
) -> RunState:
    """Claims the output folder, and puts its last checkpoint into the model if there is one.

    Worker 0 looks, and tells the others which checkpoint it found.
    """
    refused, none = -2, -1
    answer, error = refused, None
    if worker_index(strategy) == 0:
        try:
            file = claim_run(output, configuration)
            answer = none if file is None else int(file.stem.removeprefix("step-"))
        except (ValueError, OSError) as raised:
            error = raised
    answer = int(gather_from_workers(strategy, np.array([answer], np.int64))[0])
    if error is not None:
        raise error
    if answer == refused:
        raise ValueError(f"Worker 0 refuses --output {str(output)!r}; it says why.")
    if answer == none:
        return RunState()
    files = [file for file in checkpoints(output / "checkpoints") if str(answer) in file.stem]
    if not files:
        raise FileNotFoundError(
            f"Worker 0 goes on from step {answer}; {str(output)!r} has no such checkpoint here: "
            "--output is a folder that all workers share."
        )
    return read_checkpoint(model, files[-1])


def on_replicas(
    strategy: tf.distribute.Strategy,
    batch_size: int,
    start_step: int,
    batches: Callable[[int, int, int], tf.data.Dataset],
) -> tf.data.Dataset | tf.distribute.DistributedDataset:
    """The batches of each replica: its rows of the global ones."""
    replicas = strategy.num_replicas_in_sync
    if replicas == 1:
        return batches(start_step, 0, 1)

    def of_worker(context: tf.distribute.InputContext) -> tf.data.Dataset:
        own = batches(start_step, context.input_pipeline_id, context.num_input_pipelines)
        return own.rebatch(batch_size // replicas, drop_remainder=True).prefetch(2)

    return strategy.distribute_datasets_from_function(of_worker)


def describe(strategy: tf.distribute.Strategy) -> str:
    replicas, workers = strategy.num_replicas_in_sync, num_workers(strategy)
    kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
    if isinstance(strategy, tf.distribute.TPUStrategy):
        kind = "TPU"
    return f"{replicas} {kind} replica(s)" + (f" of {workers} workers" if workers > 1 else "")


@contextlib.contextmanager
def exits_on_failure(strategy: tf.distribute.Strategy, output: Path) -> Iterator[None]:
    """Ends the program with what to do about a failure from outside while it trains."""
    go_on = f"The same command goes on from the last checkpoint in {output / 'checkpoints'}."
    try:
        yield
    except Interrupted as interrupted:
        if worker_index(strategy) == 0:
            print(f"\n{interrupted}", flush=True)
        sys.exit(128 + interrupted.signal_number)
    except (FloatingPointError, OSError) as error:
        sys.exit(f"\nerror: {error}")
    except tf.errors.OpError as error:
        message = error.message or str(error)
        if num_workers(strategy) > 1 and ("ollective" in message or "task" in message):
            lost = ", ".join(
                sorted(set(re.findall(r"/job:\w+/(?:replica:\d+/)?task:\d+", message)))
            )
            exit_now(
                f"error: a worker is lost ({lost or type(error).__name__}). Start all workers "
                f"again with the same command. {go_on}"
            )
        if isinstance(error, _DATA_ERRORS):
            sys.exit(
                f"\nerror: the data can no longer be read: {reason_in(message)}. Bring back the "
                f"data set. {go_on}"
            )
        raise


_DATA_ERRORS = (
    tf.errors.NotFoundError,
    tf.errors.DataLossError,
    tf.errors.PermissionDeniedError,
    tf.errors.FailedPreconditionError,
    tf.errors.UnknownError,
)


def reason_in(message: str) -> str:
    """What went wrong, without TensorFlow's account of where in the graph."""
    where = ("Graph execution error", "Detected at node", "<stack", "File ", "[[")
    lines = (line.strip() for line in message.splitlines())
    reason = next((line for line in lines if line and not line.startswith(where)), message)
    return reason.rsplit("::", 1)[-1].split(": ", 1)[-1]


def exit_now(message: str) -> NoReturn:
    """Ends the process although TensorFlow's threads may wait for a worker that is gone."""
    print(f"\n{message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


# Argument of the builder to the field of a recipe that it comes from.
MODEL_FIELDS = {
    "backbone": "backbone",
    "backbone_weights": "backbone_weights",
    "normalization": "normalization",
    "frozen_stages": "frozen_stages",
    "pyramid_channels": "pyramid_channels",
    "head_hidden_dim": "head_hidden_dim",
    "anchor_sizes": "anchor_sizes",
    "rpn_training_pre_nms": "rpn_training_proposals",
    "rpn_training_post_nms": "rpn_training_proposals",
    "roi_samples": "roi_samples",
}


def build_model(recipe: Recipe, class_names: list[str]) -> keras_fpn.FasterRCNN:
    """The detector of a recipe; `recipe.weights` decide what is left at its default."""
    numbers = {argument: getattr(recipe, field) for argument, field in MODEL_FIELDS.items()}
    if recipe.weights is not None:
        numbers = {
            argument: value
            for argument, value in numbers.items()
            if value != getattr(Recipe, MODEL_FIELDS[argument])
        }
    return keras_fpn.build_fpn_faster_rcnn(
        class_names=class_names, weights=recipe.weights, seed=recipe.seed, **numbers
    )


def resolved_recipe(recipe: Recipe, model: keras_fpn.FasterRCNN) -> Recipe:
    """The recipe with the numbers that its weights decided."""
    arguments = arguments_of(model)
    return dataclasses.replace(
        recipe,
        **{
            field: arguments[argument]
            for argument, field in MODEL_FIELDS.items()
            if isinstance(arguments.get(argument), str | int | tuple)
        },
    )


def build_optimizer(recipe: Recipe, steps_per_epoch: int) -> SGDWithL2:
    """The papers' SGD; rate and warm-up follow the batch by the linear rule."""
    scale = recipe.batch_size / 16
    rate = recipe.learning_rate * scale
    warmup_steps = min(round(recipe.warmup_steps / scale), steps_per_epoch)
    if recipe.schedule == "cosine":
        schedule = WarmupCosineDecay(rate, warmup_steps, recipe.epochs * steps_per_epoch)
    else:
        decay_steps = [epoch * steps_per_epoch for epoch in recipe.decay_epochs]
        schedule = WarmupStepDecay(rate, warmup_steps, decay_steps)
    return SGDWithL2(
        schedule,
        momentum=recipe.momentum,
        l2=recipe.weight_decay,
        global_clipnorm=recipe.clip_norm,
        use_ema=recipe.average_decay is not None,
        ema_momentum=recipe.average_decay or 0.99,
    )


if __name__ == "__main__":
    main()
