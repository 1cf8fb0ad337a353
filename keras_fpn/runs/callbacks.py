"""What happens between the steps of a run: checkpoints, evaluation, monitoring.

Callbacks share a `RunContext` instead of knowing each other. `run_callbacks` creates them in the
order in which `fit` has to call them.
"""

import collections
import contextlib
import csv
import dataclasses
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from keras_fpn.data.coco_metrics import CocoEvaluation
from keras_fpn.data.skip_report import SkipReport
from keras_fpn.data.stored_proposals import Proposals
from keras_fpn.runs.evaluation import Evaluation, format_metrics, report_skipped
from keras_fpn.runs.pictures import detections_beside_truth
from keras_fpn.runs.recipes import Recipe
from keras_fpn.runs.run_state import (
    RunState,
    unwritten,
    write_bytes,
    write_checkpoint,
    write_model,
    write_text,
)
from keras_fpn.runs.stop_signal import Interrupted, StopSignal
from keras_fpn.runs.strategies import num_workers, sum_over_workers, worker_index


@dataclasses.dataclass
class RunContext:
    """What the callbacks of a run share.

    Attributes:
        output: folder of the run.
        model: the model that is trained.
        recipe: the run's hyperparameters.
        steps_per_epoch: steps per epoch.
        batches: function of `start_step`, and optionally `shard` and `num_shards`, to the training
            batches from a step on.
        skipped: report of the training pipeline.
        evaluation: evaluates the model on the validation split.
        stop: signal that ends the run.
        state: progress of the run. `SaveCheckpoints` updates `steps` and `curves` after each step,
            `EvaluateEpochs` the rest after each epoch.
        step: values of the last step: the losses, `gradient_norm`, `rpn_positives`,
            `roi_positives`, `learning_rate`, `images_per_second`. `MeasureSteps` sets it.
        scores: metrics of the last evaluation in this process. `evaluate` sets it.
        results: detections of that evaluation in COCO's results format, or the proposals of an
            RPN. `evaluate` sets it.
    """

    output: Path
    model: keras.Model
    recipe: Recipe
    steps_per_epoch: int
    batches: Callable[..., tf.data.Dataset]
    skipped: SkipReport
    evaluation: Evaluation
    state: RunState
    stop: StopSignal = dataclasses.field(default_factory=StopSignal)
    step: dict[str, float] = dataclasses.field(default_factory=dict)
    scores: CocoEvaluation | None = None
    results: Sequence[Mapping] | Proposals = ()

    @property
    def is_writer(self) -> bool:
        """Whether this worker writes the run's files."""
        return worker_index(self.model.distribute_strategy) == 0

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.recipe.epochs * self.steps_per_epoch

    @property
    def log_every(self) -> int:
        """Steps between two points of a curve: about a thousand points, however long the run."""
        return max(5, self.total_steps // 1000)

    def is_due(self, every: int) -> bool:
        """Whether one of the steps since the last call of `on_step` is a multiple of `every`."""
        return self.state.steps % every < self.recipe.steps_per_execution

    def loss_means(self) -> list[keras.Variable]:
        """Returns the variables of the losses' means over the epoch."""
        return [variable for metric in self.model.metrics for variable in metric.variables]

    def save_checkpoint(self, epoch_is_over: bool = False) -> None:
        """Writes `step-N.keras`; every worker must call it."""
        means = [] if epoch_is_over else [float(v.numpy()) for v in self.loss_means()]
        self.state.means = means
        folder, keep = self.output / "checkpoints", self.recipe.keep_checkpoints
        write_checkpoint(self.model, self.state, folder, keep, self.is_writer)

    def evaluate(self) -> None:
        """Sets `scores` and `results`; every worker must call it."""
        self.scores, self.results = self.evaluation.run()


class RunCallback(keras.callbacks.Callback):
    """Base class of the callbacks of a run.

    A subclass overrides `on_step`, and Keras's `on_epoch_begin` and `on_epoch_end`. They read and
    write `self.run` as `RunContext` says, and may add to `logs`, which the progress bar shows.

    Args:
        run: context of the run.
    """

    def __init__(self, run: RunContext):
        super().__init__()
        self.run = run

    def on_train_batch_end(self, batch, logs=None):
        if logs:  # Steps that an earlier process has taken are skipped with empty logs.
            self.on_step(logs)

    def on_step(self, logs: dict) -> None:
        """Called with the means over the epoch after each training step of this process.

        With `steps_per_execution`, after as many steps.
        """


def run_callbacks(run: RunContext) -> list[RunCallback]:
    """Creates the callbacks of a run, in the order in which they must be called.

    - `MeasureSteps` is first: it sets `run.step`, which the others read.
    - `StopOnNaN` comes before `SaveCheckpoints`: a step that failed is neither counted nor saved.
    - `SaveCheckpoints` counts the step, so that what follows sees the number of steps taken.
    - `EvaluateEpochs` adds the metrics to the logs, which `WriteTensorBoard` reads.
    """
    callbacks = [MeasureSteps(run), StopOnNaN(run), SaveCheckpoints(run), EvaluateEpochs(run)]
    if run.is_writer:
        callbacks += [ReportSkipped(run), WriteTensorBoard(run)]
    return callbacks


class MeasureSteps(RunCallback):
    """Measures learning rate and speed, and shows them with the remaining time.

    The speed is that of the last 50 executions; the remaining time does not include evaluations.
    """

    def __init__(self, run: RunContext):
        super().__init__(run)
        self.times = collections.deque(maxlen=51)

    def on_epoch_begin(self, epoch, logs=None):
        # The time between epochs is not that of a step.
        self.times.clear()

    def on_step(self, logs):
        self.times.append(time.perf_counter())
        logs["learning_rate"] = float(
            keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)
        )
        if len(self.times) > 1:
            steps = (len(self.times) - 1) * self.run.recipe.steps_per_execution
            seconds = (self.times[-1] - self.times[0]) / steps
            logs["images_per_second"] = self.run.recipe.batch_size / seconds
            logs["minutes_left"] = (self.run.total_steps - self.run.state.steps) * seconds / 60
        self.run.step = {**self.model.last_step, **_rates(logs)}

    def on_epoch_end(self, epoch, logs=None):
        logs.update(_rates(self.run.step))


def _rates(values: Mapping) -> dict:
    names = ("learning_rate", "images_per_second")
    return {name: values[name] for name in names if name in values}


class StopOnNaN(RunCallback):
    """Ends the run at a NaN or infinite loss or gradient, and saves the batch that caused it.

    Raises:
        FloatingPointError: it names the ids of the batch's images.
    """

    def on_step(self, logs):
        names = list(self.model.loss_names)
        if not hasattr(self.model.optimizer, "dynamic_scale"):
            # With a loss scale, an overflowing gradient is skipped and the scale lowered.
            names.append("gradient_norm")
        # A `train_step` of its own may not report all of them. The values are those of the last
        # step of an execution; of the steps before it, the means tell.
        values = [(self.run.step.get(name, 0.0), logs.get(name, 0.0)) for name in names]
        is_finite = np.isfinite(np.array(values, float)).all(axis=-1)
        if is_finite.all():
            return
        wrong = [name for name, finite in zip(names, is_finite, strict=True) if not finite]
        first, count = self.run.state.steps, self.run.recipe.steps_per_execution
        ids, files = [], []
        for batch in self.run.batches(start_step=first).take(count):
            inputs, targets = batch
            ids += [int(image_id) for image_id in targets["image_ids"]]
            files.append(self.run.output / f"nan-step-{first + len(files)}.npz")
            if self.run.is_writer:
                arrays = {name: np.asarray(value) for name, value in {**inputs, **targets}.items()}
                content = io.BytesIO()
                np.savez_compressed(content, **arrays)
                write_bytes(files[-1], content.getvalue())
        steps = f"step {first}" if count == 1 else f"one of the steps {first}..{first + count - 1}"
        raise FloatingPointError(
            f"{' and '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} NaN or infinite at {steps}"
            f", with the images of ids {ids}. Inspect {', '.join(map(str, files))}, or try a lower "
            "--learning-rate or --clip-norm 10. The last checkpoint is from before."
        )


class SaveCheckpoints(RunCallback):
    """Counts the steps, writes checkpoints, and ends the run after a signal.

    Raises:
        Interrupted: after the signal was received and a checkpoint is written.
    """

    def on_epoch_begin(self, epoch, logs=None):
        # `fit` has just reset them; the epoch may have begun in an earlier process.
        for variable, value in zip(self.run.loss_means(), self.run.state.means, strict=False):
            variable.assign(value)

    def on_step(self, logs):
        state = self.run.state
        state.steps += self.run.recipe.steps_per_execution
        if self.run.is_due(self.run.log_every):
            state.curves.append({"step": state.steps, **self.run.step})
        stop = self._stop_of_any_worker()
        if stop or self.run.is_due(self.run.recipe.checkpoint_steps):
            self.run.save_checkpoint()
        if stop:
            raise Interrupted(stop, state.steps)

    def _stop_of_any_worker(self) -> int:
        """Returns the signal that any worker received: all stop after the same step."""
        strategy = self.model.distribute_strategy
        received = np.zeros(num_workers(strategy), np.int32)
        received[worker_index(strategy)] = self.run.stop.received
        return int(sum_over_workers(strategy, received).max())


class EvaluateEpochs(RunCallback):
    """Evaluates, saves the best model, writes the tables, and ends the epoch with a checkpoint.

    Another checkpoint before the evaluation holds the epoch's last step, so that a run that dies in
    the evaluation resumes there.
    """

    def on_epoch_end(self, epoch, logs=None):
        run, state = self.run, self.run.state
        # A run resumed between an epoch's last step and its end has no logs of a step.
        logs.update(self.model.get_metrics_result())
        logs.update({name: float(value) for name, value in logs.items()})
        if (epoch + 1) % run.recipe.evaluate_every == 0 or epoch + 1 == run.recipe.epochs:
            run.save_checkpoint()
            with averaged_weights(self.model):
                run.evaluate()
                metrics = run.scores.metrics
                score = metrics[run.evaluation.best_metric]
                best = self.model.inference_copy() if score > state.best_score else None
            state.best_score = max(score, state.best_score)
            logs.update({f"val_{name}": metrics[name] for name in run.evaluation.metric_names})
            if run.is_writer:
                if best is not None:
                    write_model(best, run.output / "checkpoints" / "best.keras")
                named = format_metrics(metrics, run.evaluation.metric_names)
                print(f"\nEpoch {epoch + 1}: {named}", flush=True)
                content = {"epoch": epoch + 1, "best_score": state.best_score, **metrics}
                write_text(run.output / "metrics.json", json.dumps(content, indent=2) + "\n")
        state.history.append({"epoch": epoch + 1, **logs})
        state.epochs = epoch + 1
        if run.is_writer:
            losses = ("loss", *self.model.loss_names, "learning_rate")
            columns = ("epoch", *losses, *(f"val_{name}" for name in run.evaluation.metric_names))
            write_text(run.output / "history.csv", _table(state.history, columns))
            measured = ("gradient_norm", "rpn_positives", "roi_positives", "images_per_second")
            write_text(run.output / "steps.csv", _table(state.curves, ("step", *losses, *measured)))
        run.save_checkpoint(epoch_is_over=True)


def _table(rows: list[dict], columns: tuple[str, ...]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


class ReportSkipped(RunCallback):
    """Reports after each epoch what was skipped of the training data, and writes skipped.json."""

    def on_epoch_end(self, epoch, logs=None):
        report = self.run.skipped
        report_skipped(report, "training data")
        if str(report):
            content = {"images": report.images(), "boxes": report.boxes()}
            write_text(self.run.output / "skipped.json", json.dumps(content, indent=2) + "\n")


class WriteTensorBoard(RunCallback):
    """Writes scalars of steps and evaluations, and pictures of detections beside ground truth."""

    def __init__(self, run: RunContext):
        super().__init__(run)
        with self._writing():
            self.writer = tf.summary.create_file_writer(str(run.output / "logs"))
        drawn = [image["id"] for image in run.evaluation.ground_truth["images"][:4]]
        self.images = run.evaluation.dataset.read_images(drawn)

    def on_step(self, logs):
        if not self.run.is_due(self.run.log_every):
            return
        with self._writing(), self.writer.as_default(self.run.state.steps):
            for name, value in self.run.step.items():
                tf.summary.scalar(f"train/{name}", value)

    def on_epoch_end(self, epoch, logs=None):
        with self._writing(), self.writer.as_default(self.run.state.steps):
            for name, value in logs.items():
                if name.startswith("val_"):
                    tf.summary.scalar(f"validation/{name.removeprefix('val_')}", value)
                else:
                    tf.summary.scalar(f"epoch/{name}", value)
            # Not of an RPN: a thousand boxes show nothing.
            if "val_AP" in logs:
                self._draw()
            self.writer.flush()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Raises an OSError for TensorFlow's error about a file."""
        try:
            yield
        except tf.errors.OpError as error:
            raise unwritten(self.run.output / "logs", error) from error

    def _draw(self):
        evaluation = self.run.evaluation
        for image_id, image in self.images.items():
            picture = detections_beside_truth(
                image,
                [x for x in self.run.results if x["image_id"] == image_id],
                [x for x in evaluation.ground_truth["annotations"] if x["image_id"] == image_id],
                evaluation.dataset.class_names,
                evaluation.dataset.category_ids,
            )
            tf.summary.image(f"detections/{image_id}", np.asarray(picture)[None])


@contextlib.contextmanager
def averaged_weights(model: keras.Model) -> Iterator[None]:
    """Gives the model the moving average of its weights, if its optimizer keeps one."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    if not optimizer.use_ema:
        yield
        return
    weights = [keras.ops.convert_to_numpy(weight) for weight in model.trainable_variables]
    # As `fit` does at its end.
    optimizer.finalize_variable_values(model.trainable_variables)
    try:
        yield
    finally:
        for variable, weight in zip(model.trainable_variables, weights, strict=True):
            variable.assign(weight)
