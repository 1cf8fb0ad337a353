"""What happens beside the steps of a run: checkpoints, evaluation, what a person sees."""

import collections
import contextlib
import csv
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from keras_fpn.data.coco_metrics import COCO_METRICS
from keras_fpn.data.pipeline import SkipReport
from keras_fpn.faster_rcnn import LOSS_NAMES
from keras_fpn.runs.evaluate import Evaluation, format_metrics, report_skipped
from keras_fpn.runs.pictures import detections_beside_truth
from keras_fpn.runs.run_state import RunState, write_checkpoint, write_model, write_text
from keras_fpn.runs.stop_signal import Interrupted, StopSignal
from keras_fpn.runs.strategies import num_workers, sum_over_workers, worker_index


class ShowProgress(keras.callbacks.Callback):
    """Adds learning rate, images per second and minutes left to what the progress bar shows.

    Speed is that of the last 50 steps; minutes left count steps, not evaluations.
    """

    def __init__(self, state: RunState, batch_size: int, total_steps: int):
        super().__init__()
        self.state = state
        self.batch_size = batch_size
        self.total_steps = total_steps
        self.times = collections.deque(maxlen=51)

    def on_epoch_begin(self, epoch, logs=None):
        # What lies between two epochs is no step.
        self.times.clear()

    def on_train_batch_end(self, batch, logs=None):
        if not logs:
            return
        self.times.append(time.perf_counter())
        logs["learning_rate"] = learning_rate(self.model)
        if len(self.times) > 1:
            seconds = (self.times[-1] - self.times[0]) / (len(self.times) - 1)
            logs["images_per_second"] = self.batch_size / seconds
            logs["minutes_left"] = (self.total_steps - self.state.steps) * seconds / 60
        self.shown = dict(logs)

    def on_epoch_end(self, epoch, logs=None):
        for name in ("learning_rate", "images_per_second"):
            if name in getattr(self, "shown", {}):
                logs[name] = self.shown[name]


class StopOnNaN(keras.callbacks.Callback):
    """Ends the run at a loss or gradient that is not finite, and keeps the batch it came from.

    Args:
        state: the run's.
        batch_at: the batch of a step, as the pipeline makes it.
        folder: where `nan-step-N.npz` goes.
        is_writer: whether this process writes.

    Raises:
        FloatingPointError: with the ids of the batch's images.
    """

    def __init__(self, state: RunState, batch_at: Callable, folder: Path, is_writer: bool):
        super().__init__()
        self.state = state
        self.batch_at = batch_at
        self.folder = folder
        self.is_writer = is_writer

    def on_train_batch_end(self, batch, logs=None):
        if not logs:
            return
        measured = self.model.last_step
        names = list(LOSS_NAMES)
        if not hasattr(self.model.optimizer, "dynamic_scale"):
            # With a loss scale a gradient that overflows is left out, and the scale lowered.
            names.append("gradient_norm")
        wrong = [name for name in names if not np.isfinite(measured[name])]
        if not wrong:
            return
        inputs, targets = self.batch_at(self.state.steps)
        ids = [int(image_id) for image_id in targets["image_ids"]]
        file = self.folder / f"nan-step-{self.state.steps}.npz"
        if self.is_writer:
            arrays = {name: np.asarray(value) for name, value in {**inputs, **targets}.items()}
            content = io.BytesIO()
            np.savez_compressed(content, **arrays)
            file.write_bytes(content.getvalue())
        raise FloatingPointError(
            f"{' and '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} not finite at step "
            f"{self.state.steps}, in the batch of the images with ids {ids}, which is kept in "
            f"{file}: look at it, or try a lower --learning-rate or --clip-norm 10. The last "
            "checkpoint is from before."
        )


class KeepState(keras.callbacks.Callback):
    """Counts the run's steps, writes its checkpoints, and ends it when a signal asks for it.

    Args:
        state: the run's; it changes here.
        folder: where the checkpoints go.
        every: steps between two checkpoints; one more follows each epoch.
        keep: how many of the last ones stay.
        curve_every: steps between two rows of `state.curves`.
        stop: the signal.

    Raises:
        Interrupted: when `stop` has come, after the checkpoint is written.
    """

    def __init__(
        self,
        state: RunState,
        folder: Path,
        every: int,
        keep: int,
        curve_every: int,
        stop: StopSignal,
    ):
        super().__init__()
        self.state = state
        self.folder = folder
        self.every = every
        self.keep = keep
        self.curve_every = curve_every
        self.stop = stop

    def on_epoch_begin(self, epoch, logs=None):
        # `fit` has just set them to zero, and the epoch may have begun in an earlier process.
        for variable, value in zip(self._means(), self.state.means, strict=False):
            variable.assign(value)

    def _means(self) -> list[keras.Variable]:
        return [variable for metric in self.model.metrics for variable in metric.variables]

    def on_train_batch_end(self, batch, logs=None):
        if not logs:
            return
        self.state.steps += 1
        if self.state.steps % self.curve_every == 0:
            row = {"step": self.state.steps, **self.model.last_step}
            names = ("learning_rate", "images_per_second")
            row.update({name: logs[name] for name in names if name in logs})
            self.state.curves.append(row)
        stop = self._stop_of_any_worker()
        if stop or self.state.steps % self.every == 0:
            self.write()
        if stop:
            raise Interrupted(stop, self.state.steps)

    def write(self, epoch_is_over: bool = False):
        self.state.means = [] if epoch_is_over else [float(v.numpy()) for v in self._means()]
        is_writer = worker_index(self.model.distribute_strategy) == 0
        write_checkpoint(self.model, self.state, self.folder, self.keep, is_writer)

    def _stop_of_any_worker(self) -> int:
        """All workers stop after the same step, at the signal of any."""
        strategy = self.model.distribute_strategy
        received = np.zeros(num_workers(strategy), np.int32)
        received[worker_index(strategy)] = self.stop.received
        return int(sum_over_workers(strategy, received).max())


class EndEpoch(keras.callbacks.Callback):
    """Evaluates, keeps the model of the best AP, and closes the epoch with a checkpoint.

    A checkpoint before the evaluation holds the epoch's last step, so that a run which dies in the
    evaluation begins again with it.
    """

    def __init__(
        self,
        keep_state: KeepState,
        evaluation: Evaluation,
        evaluate_every: int,
        total_epochs: int,
        output: Path,
    ):
        super().__init__()
        self.keep_state = keep_state
        self.evaluation = evaluation
        self.evaluate_every = evaluate_every
        self.total_epochs = total_epochs
        self.output = output

    def on_epoch_end(self, epoch, logs=None):
        state = self.keep_state.state
        is_writer = worker_index(self.model.distribute_strategy) == 0
        # A run that was resumed between an epoch's last step and its end has no logs of a step.
        logs.update(self.model.get_metrics_result())
        logs.update({name: float(value) for name, value in logs.items()})
        if (epoch + 1) % self.evaluate_every == 0 or epoch + 1 == self.total_epochs:
            self.keep_state.write()
            with averaged_weights(self.model):
                scores, self.results = self.evaluation.run()
                metrics = scores.metrics
                is_best = metrics["AP"] > state.best_AP
                if is_best:
                    state.best_AP = metrics["AP"]
                    best = self.output / "checkpoints" / "best.keras"
                    write_model(self.model, best, is_writer)
            logs.update({f"val_{name}": metrics[name] for name in COCO_METRICS})
            if is_writer:
                print(f"\nEpoch {epoch + 1}: {format_metrics(metrics)}", flush=True)
                content = {"epoch": epoch + 1, "best_AP": state.best_AP, **metrics}
                write_text(self.output / "metrics.json", json.dumps(content, indent=2) + "\n")
            self.scores = scores
        state.history.append({"epoch": epoch + 1, **logs})
        state.epochs = epoch + 1
        if is_writer:
            write_text(self.output / "history.csv", _table(state.history, HISTORY_COLUMNS))
            write_text(self.output / "steps.csv", _table(state.curves, CURVE_COLUMNS))
        self.keep_state.write(epoch_is_over=True)


HISTORY_COLUMNS = (
    "epoch",
    "loss",
    *LOSS_NAMES,
    "learning_rate",
    *(f"val_{name}" for name in COCO_METRICS),
)
CURVE_COLUMNS = (
    "step",
    "loss",
    *LOSS_NAMES,
    "learning_rate",
    "gradient_norm",
    "rpn_positives",
    "roi_positives",
    "images_per_second",
)


def _table(rows: list[dict], columns: tuple[str, ...]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


class ReportSkipped(keras.callbacks.Callback):
    """Says at the end of each epoch what of the training data could not be used.

    The whole list of images is in skipped.json, which is not there where nothing was skipped.
    """

    def __init__(self, report: SkipReport, output: Path):
        super().__init__()
        self.report = report
        self.output = output

    def on_epoch_end(self, epoch, logs=None):
        report_skipped(self.report, "training data")
        if str(self.report):
            skipped = {"images": self.report.images(), "boxes": self.report.boxes()}
            write_text(self.output / "skipped.json", json.dumps(skipped, indent=2) + "\n")


class WriteTensorBoard(keras.callbacks.Callback):
    """Scalars of the steps and of the evaluations, and pictures of detections beside the truth.

    Args:
        end_epoch: the callback that evaluates, earlier in the list.
        folder: of the logs.
        every: steps between two points.
        images: a few images of the evaluation, id to RGB array.
    """

    def __init__(self, end_epoch: EndEpoch, folder: Path, every: int, images: dict):
        super().__init__()
        self.end_epoch = end_epoch
        self.state = end_epoch.keep_state.state
        self.writer = tf.summary.create_file_writer(str(folder))
        self.every = every
        self.images = images

    def on_train_batch_end(self, batch, logs=None):
        if not logs or self.state.steps % self.every:
            return
        scalars = self.model.last_step
        names = ("learning_rate", "images_per_second")
        scalars.update({name: logs[name] for name in names if name in logs})
        with self.writer.as_default(self.state.steps):
            for name, value in scalars.items():
                tf.summary.scalar(f"train/{name}", value)

    def on_epoch_end(self, epoch, logs=None):
        with self.writer.as_default(self.state.steps):
            for name, value in logs.items():
                if name.startswith("val_"):
                    tf.summary.scalar(f"validation/{name.removeprefix('val_')}", value)
                else:
                    tf.summary.scalar(f"epoch/{name}", value)
            if "val_AP" in logs:
                self._draw()
        self.writer.flush()

    def _draw(self):
        evaluation = self.end_epoch.evaluation
        for image_id, image in self.images.items():
            picture = detections_beside_truth(
                image,
                [x for x in self.end_epoch.results if x["image_id"] == image_id],
                [x for x in evaluation.ground_truth["annotations"] if x["image_id"] == image_id],
                evaluation.dataset.class_names,
                evaluation.dataset.category_ids,
            )
            tf.summary.image(f"detections/{image_id}", np.asarray(picture)[None])


def learning_rate(model: keras.Model) -> float:
    """The rate of the step to come."""
    return float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))


@contextlib.contextmanager
def averaged_weights(model: keras.Model) -> Iterator[None]:
    """Within it the model has the moving average of its weights, where its optimizer keeps one."""
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
