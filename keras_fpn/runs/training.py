"""A training run, from its options and recipe to its report."""

import contextlib
import dataclasses
import functools
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import keras
import numpy as np
import tensorflow as tf

import keras_fpn
from keras_fpn.data.datasets import DetectionDataset, load_dataset
from keras_fpn.data.fingerprint import fingerprint
from keras_fpn.data.pipeline import training_batches
from keras_fpn.data.skip_report import SkipReport
from keras_fpn.data.stored_proposals import read_proposals, with_proposals
from keras_fpn.detector import Detector
from keras_fpn.optimization import SGDWithL2, WarmupCosineDecay, WarmupStepDecay
from keras_fpn.runs.callbacks import RunContext, averaged_weights, run_callbacks
from keras_fpn.runs.command import counted, exits_on_bad_input
from keras_fpn.runs.evaluation import Evaluation, check_same_classes
from keras_fpn.runs.options import read_arguments
from keras_fpn.runs.recipes import BUILDERS, Recipe, check_recipe
from keras_fpn.runs.report import write_report
from keras_fpn.runs.run_folder import claim_run, read_configuration, run_lock
from keras_fpn.runs.run_state import RunState, checkpoint_file, checkpoints, read_checkpoint
from keras_fpn.runs.stop_signal import Interrupted
from keras_fpn.runs.strategies import (
    choose_strategy,
    num_workers,
    on_first_worker,
    sum_over_workers,
)
from keras_fpn.runs.train import Run


def train(options: Run, recipe: Recipe) -> None:
    """Trains, or resumes training, and writes the report."""
    with contextlib.ExitStack() as lock:
        _train(options, recipe, lock)


def _train(options: Run, recipe: Recipe, lock: contextlib.ExitStack) -> None:
    """Trains as `train` does, and enters the lock of the run's folder into a stack."""
    with exits_on_bad_input():
        strategy = choose_strategy(options.strategy)
        recipe = checked_recipe(recipe, strategy.num_replicas_in_sync, options.jit_compile)
        configuration = configuration_of(options, recipe)
        lock_on_first_worker(strategy, options.output, configuration, lock)
        train_data, validation_data = open_splits(options, recipe.detector)
        steps = steps_per_epoch(recipe, images_at_start(options, train_data))
        with strategy.scope():
            model = build_model(recipe, train_data.class_names)
    # An error in here is a bug, not bad input.
    with strategy.scope():
        model.compile(
            build_optimizer(recipe, steps),
            jit_compile=options.jit_compile,
            steps_per_execution=recipe.steps_per_execution,
        )
        model.optimizer.build(model.trainable_variables)
    configuration |= outcome_of(train_data, validation_data, model)
    edges = {"shorter_edge": recipe.evaluation_shorter_edge, "longest_edge": recipe.longest_edge}
    skipped = SkipReport()
    batches = functools.partial(
        training_batches,
        train_data,
        recipe.batch_size,
        shorter_edges=recipe.shorter_edges,
        longest_edge=recipe.longest_edge,
        horizontal_flip=recipe.horizontal_flip,
        keep_empty_images=recipe.keep_empty_images,
        seed=recipe.seed,
        report=skipped,
    )
    with exits_on_bad_input():
        evaluation = Evaluation(model, validation_data, recipe.batch_size, **edges)
        state = resume(model, options.output, configuration, options.allow_changed_data)
        if not 0 <= state.steps - state.epochs * steps <= steps:
            raise ValueError(
                f"The run in {str(options.output)!r} has taken {counted(state.steps, 'step')} in "
                f"{counted(state.epochs, 'epoch')}, which does not fit epochs of "
                f"{counted(steps, 'step')}; are its data those that it began with?"
            )
        data = on_replicas(strategy, recipe.batch_size, state.steps, batches)
    run = RunContext(options.output, model, recipe, steps, batches, skipped, evaluation, state)
    steps_before, started = state.steps, time.time()
    if run.is_writer:
        print(
            f"{counted(train_data.num_images, 'image')} of {options.dataset} "
            f"({options.train_split}), {counted(len(train_data.class_names), 'class', 'classes')}; "
            f"{counted(recipe.epochs, 'epoch')} of {counted(steps, 'step')} of "
            f"{counted(recipe.batch_size, 'image')} on {describe(strategy)}; "
            f"{model.count_params():,} parameters; "
            f"{counted(state.steps, 'step')} done; writing to {options.output}",
            flush=True,
        )
    if state.epochs < recipe.epochs:
        fit(run, data, options.verbose if run.is_writer else 0)
    elif not is_report_missing(run):
        print(f"The run in {options.output} is complete; see {options.output / 'report.html'}.")
        return
    else:
        with exits_on_failure(run), averaged_weights(model):
            run.evaluate()
    if run.is_writer:
        with exits_on_failure(run):
            page = write_report(
                options.output,
                title=f"{options.dataset}, {model.backbone.name}",
                configuration=configuration,
                steps=state.curves,
                history=state.history,
                evaluation=run.scores,
                ground_truth=evaluation.ground_truth,
                results=None if evaluation.is_rpn else run.results,
                metric_names=evaluation.metric_names,
                read_images=validation_data.read_images,
            )
        seconds = time.time() - started
        print(
            f"Trained {counted(state.steps - steps_before, 'step')} in {seconds:.0f} s, including "
            f"evaluation; see {page}."
        )
    if run.stop.received:
        # After the last step: the run is complete, but the next step of 4-step training must wait.
        sys.exit(128 + run.stop.received)


def checked_recipe(recipe: Recipe, replicas: int, jit_compile: bool | str) -> Recipe:
    """Checks a recipe, and resolves its batch size.

    Raises:
        ValueError: as in `check_recipe`, or if it does not fit the number of replicas.
    """
    check_recipe(recipe)
    if recipe.batch_size is None:
        recipe = dataclasses.replace(recipe, batch_size=2 * replicas)
    if recipe.batch_size % replicas:
        raise ValueError(
            f"--batch-size must be a multiple of the {replicas} replicas; received "
            f"{recipe.batch_size}."
        )
    if jit_compile is True and replicas > 1:
        raise ValueError(f"--jit-compile works with one replica; received {replicas}.")
    return recipe


def open_splits(options: Run, detector: str) -> tuple[DetectionDataset, DetectionDataset]:
    """Opens the splits for training and validation, with proposals for Fast R-CNN.

    Raises:
        ValueError: if they have different classes, or proposals are missing or not needed; further
            as in `load_dataset` and `read_proposals`.
    """
    train_data, validation_data = (
        load_dataset(options.dataset, split, options.data_dir, download=options.download)
        for split in (options.train_split, options.validation_split)
    )
    check_same_classes(
        validation_data, train_data.class_names, train_data.category_ids, "the training split"
    )
    files = (options.proposals, options.validation_proposals)
    if (detector == "fast_rcnn") != all(files) or any(files) != all(files):
        raise ValueError(
            "--proposals and --validation-proposals are for --model fast_rcnn, which needs both; "
            f"received {files[0]} and {files[1]} for {detector}."
        )
    if detector == "fast_rcnn":
        train_data = with_proposals(train_data, read_proposals(files[0]))
        validation_data = with_proposals(validation_data, read_proposals(files[1]))
    return train_data, validation_data


def images_at_start(options: Run, data: DetectionDataset) -> int:
    """Returns the number of training images that the run began with.

    Only with --allow-changed-data it may be another than that of the data: epochs and schedule
    remain those of the run.

    Raises:
        ValueError: if the run's config.json is damaged.
    """
    file = options.output / "config.json"
    if options.allow_changed_data and file.exists():
        data_at_start = read_configuration(file).get("data") or {}
        return data_at_start.get("training", {}).get("images", data.num_images)
    return data.num_images


def steps_per_epoch(recipe: Recipe, num_images: int) -> int:
    """Returns the number of steps per epoch, on a split of a number of images.

    Raises:
        ValueError: if an epoch has less than one batch, or less than `steps_per_execution`.
    """
    images = recipe.images_per_epoch or num_images
    if images < recipe.batch_size:
        raise ValueError(
            f"--batch-size must be at most the {images} images per epoch; received "
            f"{recipe.batch_size}."
        )
    steps = images // recipe.batch_size
    if steps < recipe.steps_per_execution:
        raise ValueError(
            f"--steps-per-execution must be at most the {steps} steps per epoch; received "
            f"{recipe.steps_per_execution}."
        )
    return steps - steps % recipe.steps_per_execution


def build_model(recipe: Recipe, class_names: list[str]) -> Detector:
    """Builds the model of a recipe, from its seed, in its precision, with its stages frozen.

    Raises:
        ValueError: if it has no such argument or stage; further as in the builder.
    """
    keras.utils.set_random_seed(recipe.seed)
    if recipe.precision != "float32":
        keras.config.set_dtype_policy(f"mixed_{recipe.precision}")
    build = getattr(keras_fpn, BUILDERS[recipe.detector])
    arguments = {"class_names": class_names, "seed": recipe.seed, **recipe.model}
    known = read_arguments("builder", BUILDERS[recipe.detector])
    if recipe.detector == "rpn":
        del arguments["class_names"]
    for name in arguments:
        if name not in known:
            raise ValueError(f"--model {recipe.detector} has no {name}; received it.")
    model = build(**arguments)
    for name in recipe.frozen:
        if name not in model.stage_names:
            raise ValueError(
                f"--frozen must name stages among {', '.join(model.stage_names)}; received {name}."
            )
        getattr(model, name).trainable = False
    if recipe.frozen and not model.trainable_variables:
        raise ValueError(
            f"--frozen must leave a stage to train; received {', '.join(recipe.frozen)}."
        )
    return model


def build_optimizer(recipe: Recipe, steps_per_epoch: int) -> SGDWithL2:
    """Builds the papers' SGD; rate and warm-up follow the batch size by the linear rule."""
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


def configuration_of(options: Run, recipe: Recipe) -> dict:
    """Returns what goes into config.json of what was asked for."""
    return {
        "dataset": options.dataset,
        "data_dir": options.data_dir,
        "train_split": options.train_split,
        "validation_split": options.validation_split,
        **{
            name: str(path)
            for name in ("proposals", "validation_proposals")
            if (path := getattr(options, name)) is not None
        },
        "recipe": dataclasses.asdict(recipe),
    }


def outcome_of(
    train_data: DetectionDataset, validation_data: DetectionDataset, model: Detector
) -> dict:
    """Returns what else goes into config.json: what the data and the model turned out to be."""
    return {
        "class_names": train_data.class_names,
        "category_ids": train_data.category_ids,
        "stages": {name: getattr(model, name).get_config() for name in model.stage_names},
        "versions": {
            "keras_fpn": keras_fpn.__version__,
            "keras": keras.__version__,
            "tensorflow": tf.__version__,
        },
        "data": {
            "training": fingerprint(train_data),
            "validation": fingerprint(validation_data),
        },
    }


def lock_on_first_worker(
    strategy: tf.distribute.Strategy,
    output: Path,
    configuration: dict,
    lock: contextlib.ExitStack,
) -> None:
    """Worker 0, which writes the files, enters the lock of the output folder.

    Raises:
        ValueError: if the folder is of another run; on the other workers, if worker 0 cannot.
        OSError: if the folder cannot be used, or another process holds its lock.
    """

    def enter() -> int:
        lock.enter_context(run_lock(output, configuration))
        return 0

    on_first_worker(strategy, enter, _refusal(output))


def _refusal(output: Path) -> str:
    return f"Worker 0 refuses --output {str(output)!r}; see its own error."


def resume(
    model: Detector, output: Path, configuration: dict, allow_changed_data: bool = False
) -> RunState:
    """Claims the output folder, and loads its last checkpoint if there is one.

    Worker 0 tells the others which checkpoint it found.

    Raises:
        ValueError: if the folder is of another run or of other data, or the checkpoint does not
            fit.
        OSError: if the folder cannot be used, or is not shared by all workers.
    """
    none = -1

    def claim() -> int:
        file = claim_run(output, configuration, allow_changed_data)
        return none if file is None else int(file.stem.removeprefix("step-"))

    answer = on_first_worker(model.distribute_strategy, claim, _refusal(output))
    if answer == none:
        return RunState()
    file = checkpoint_file(output / "checkpoints", answer)
    if file not in checkpoints(file.parent):
        raise FileNotFoundError(
            f"Worker 0 resumes from step {answer}, of which {str(output)!r} has no checkpoint on "
            "this worker; --output must be a folder that all workers share."
        )
    return read_checkpoint(model, file)


def fit(run: RunContext, data: tf.data.Dataset | tf.distribute.DistributedDataset, verbose: int):
    """Trains until the last epoch; exits if the run is stopped, or fails for outside reasons."""
    with run.stop, exits_on_failure(run):
        run.model.fit(
            data,
            initial_epoch=run.state.epochs,
            initial_step=run.state.steps - run.state.epochs * run.steps_per_epoch,
            epochs=run.recipe.epochs,
            steps_per_epoch=run.steps_per_epoch,
            shuffle=False,
            verbose=verbose,
            callbacks=run_callbacks(run),
        )


def on_replicas(
    strategy: tf.distribute.Strategy,
    batch_size: int,
    start_step: int,
    batches: Callable[..., tf.data.Dataset],
) -> tf.data.Dataset | tf.distribute.DistributedDataset:
    """Returns the batches of each replica: its rows of the global ones.

    Args:
        strategy: the strategy.
        batch_size: images per step, over all replicas.
        start_step: step of the first batch.
        batches: as in `RunContext`.
    """
    replicas = strategy.num_replicas_in_sync
    if replicas == 1:
        return batches(start_step=start_step, shard=0, num_shards=1)

    def of_worker(context: tf.distribute.InputContext) -> tf.data.Dataset:
        own = batches(
            start_step=start_step,
            shard=context.input_pipeline_id,
            num_shards=context.num_input_pipelines,
        )
        return own.rebatch(batch_size // replicas, drop_remainder=True).prefetch(2)

    return strategy.distribute_datasets_from_function(of_worker)


def is_report_missing(run: RunContext) -> bool:
    """Whether worker 0 finds no report.html; every worker must call it."""
    missing = run.is_writer and not (run.output / "report.html").exists()
    return bool(sum_over_workers(run.model.distribute_strategy, np.array([missing], np.int32))[0])


def describe(strategy: tf.distribute.Strategy) -> str:
    """Describes the devices of a strategy."""
    replicas, workers = strategy.num_replicas_in_sync, num_workers(strategy)
    kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
    if isinstance(strategy, tf.distribute.TPUStrategy):
        kind = "TPU"
    return counted(replicas, f"{kind} replica") + (f" of {workers} workers" if workers > 1 else "")


@contextlib.contextmanager
def exits_on_failure(run: RunContext) -> Iterator[None]:
    """Exits with what to do about a failure from outside during training."""
    resume = f"rerun the same command to resume from the last one in {run.output / 'checkpoints'}"
    strategy = run.model.distribute_strategy
    try:
        yield
    except Interrupted as interrupted:
        if run.is_writer:
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
                f"error: lost a worker ({lost or type(error).__name__}). Checkpoints are kept: on "
                f"all workers, {resume}."
            )
        if isinstance(error, _DATA_ERRORS):
            sys.exit(
                f"\nerror: the data can no longer be read: {reason_in(message)}. Restore the data "
                f"set. Checkpoints are kept: {resume}."
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
    """Returns the reason in an error of TensorFlow, without the location in the graph."""
    where = ("Graph execution error", "Detected at node", "<stack", "File ", "[[")
    lines = (line.strip() for line in message.splitlines())
    reason = next((line for line in lines if line and not line.startswith(where)), message)
    return reason.rsplit("::", 1)[-1].split(": ", 1)[-1]


def exit_now(message: str) -> NoReturn:
    """Ends the process although threads of TensorFlow may wait for a lost worker."""
    print(f"\n{message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
