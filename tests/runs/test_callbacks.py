"""Callbacks on a model that takes no steps; with steps, they are in test_programs.py."""

import json
import types

import keras
import numpy as np
import pytest
from full_disk import no_file_grows
from small_detector import tiny_detector

from keras_fpn.data.coco_metrics import COCO_METRICS, CocoEvaluation
from keras_fpn.optimization import SGDWithL2
from keras_fpn.runs.callbacks import (
    EvaluateEpochs,
    MeasureSteps,
    RunContext,
    SaveCheckpoints,
    StopOnNaN,
    WriteTensorBoard,
    run_callbacks,
)
from keras_fpn.runs.recipes import Recipe
from keras_fpn.runs.run_state import RunState, checkpoints


@pytest.fixture(scope="module")
def model():
    """A model whose weights no test changes."""
    model = tiny_detector()
    model.compile(SGDWithL2(0.1, use_ema=True), jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.fixture
def run(tmp_path, model):
    """A run of two epochs that keeps a moving average, whose evaluations return set APs."""
    (tmp_path / "checkpoints").mkdir()
    aps = iter([0.5, 0.25])

    def evaluate():
        metrics = dict.fromkeys(COCO_METRICS, 0.0) | {"AP": next(aps)}
        return CocoEvaluation(metrics, np.zeros((10, 101, 3))), []

    evaluation = types.SimpleNamespace(
        run=evaluate, metric_names=COCO_METRICS, best_metric="AP", is_rpn=False
    )
    recipe = Recipe(epochs=2, batch_size=2, average_decay=0.9)
    return RunContext(tmp_path, model, recipe, 3, None, None, evaluation, RunState(steps=3))


def start(callback, model):
    callback.set_model(model)
    return callback


def test_the_best_model_has_the_averaged_weights_and_the_run_keeps_its_own(run):
    model = run.model
    averages = model.optimizer._model_variables_moving_average
    for average in averages:
        average.assign(average + 1)
    expected = [keras.ops.convert_to_numpy(average) for average in averages]
    own = model.get_weights()
    callback = start(EvaluateEpochs(run), model)
    for epoch in (0, 1):
        callback.on_epoch_end(epoch, {})
    for a, b in zip(model.get_weights(), own, strict=True):
        np.testing.assert_array_equal(a, b)
    # The second evaluation was worse.
    best = keras.saving.load_model(run.output / "checkpoints" / "best.keras")
    assert not best.compiled
    for a, b in zip(best.trainable_variables, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (run.state.best_score, run.state.epochs) == (0.5, 2)
    metrics = json.loads((run.output / "metrics.json").read_text())
    assert (metrics["epoch"], metrics["AP"], metrics["best_score"]) == (2, 0.25, 0.5)
    assert [row["val_AP"] for row in run.state.history] == [0.5, 0.25]


def test_steps_of_an_earlier_process_are_not_counted(run):
    run.recipe = Recipe(epochs=2, batch_size=2, checkpoint_steps=4)
    callback = start(SaveCheckpoints(run), run.model)
    callback.on_train_batch_end(0, {})
    assert (run.state.steps, checkpoints(run.output / "checkpoints")) == (3, [])
    callback.on_train_batch_end(1, {"loss": 1.0})
    (file,) = checkpoints(run.output / "checkpoints")
    assert (run.state.steps, file.name) == (4, "step-00000004.keras")


def test_the_steps_of_an_execution_are_counted_and_saved_together(run, monkeypatch):
    saved = []
    monkeypatch.setattr(RunContext, "save_checkpoint", lambda run: saved.append(run.state.steps))
    run.recipe = Recipe(epochs=2, batch_size=2, steps_per_execution=4, checkpoint_steps=6)
    run.state.steps = 0
    callback = start(SaveCheckpoints(run), run.model)
    for _ in range(4):
        callback.on_train_batch_end(0, {"loss": 1.0})
    # After steps 6 and 12; the curve has points after steps 5, 10 and 15.
    assert saved == [8, 12]
    assert [point["step"] for point in run.state.curves] == [8, 12, 16]


def test_a_nan_within_an_execution_ends_the_run_with_all_of_its_batches(run):
    run.recipe = Recipe(epochs=2, batch_size=2, steps_per_execution=2)
    batches = [({}, {"image_ids": np.array([number])}) for number in (41, 42, 43)]
    run.batches = lambda start_step: types.SimpleNamespace(take=lambda n: batches[:n])
    run.step = {"box_loss": 1.0}  # Of the last step.
    with pytest.raises(FloatingPointError, match=r"box_loss is .* steps 3\.\.4, .*\[41, 42\]"):
        start(StopOnNaN(run), run.model).on_train_batch_end(1, {"box_loss": np.nan})
    for step, image_id in ((3, 41), (4, 42)):
        with np.load(run.output / f"nan-step-{step}.npz") as saved:
            assert saved["image_ids"].tolist() == [image_id]


def test_a_step_that_failed_is_neither_counted_nor_saved(run, monkeypatch):
    monkeypatch.setattr(RunContext, "is_writer", False)
    classes = [type(callback) for callback in run_callbacks(run)]
    assert classes == [MeasureSteps, StopOnNaN, SaveCheckpoints, EvaluateEpochs]


@pytest.mark.parametrize(
    ("optimizer", "name", "is_failure"),
    [
        ("sgd", "box_loss", True),
        ("sgd", "gradient_norm", True),
        # The loss scale handles an overflow.
        ("scaled", "gradient_norm", False),
        ("scaled", "class_loss", True),
    ],
)
def test_a_nan_ends_the_run_unless_a_loss_scale_handles_it(
    run, optimizer, name, is_failure, monkeypatch
):
    images = {"images": np.zeros((1, 8, 8, 3)), "image_sizes": np.array([[8, 8]])}
    batch = types.SimpleNamespace(take=lambda n: [(images, {"image_ids": np.array([41])})])
    run.batches = lambda start_step: batch
    run.step = dict.fromkeys([*run.model.loss_names, "gradient_norm"], 1.0) | {name: np.inf}
    if optimizer == "scaled":
        scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
        scaled.build(run.model.trainable_variables)
        monkeypatch.setattr(run.model, "optimizer", scaled)
    callback = start(StopOnNaN(run), run.model)
    if not is_failure:
        callback.on_train_batch_end(0, {"loss": 1.0})
        return
    with pytest.raises(FloatingPointError, match=rf"{name} is .* step 3, .*\[41\]"):
        callback.on_train_batch_end(0, {"loss": 1.0})
    with np.load(run.output / "nan-step-3.npz") as saved:
        assert saved["image_ids"].tolist() == [41]


def test_a_full_disk_is_named_while_tensorboards_file_is_made_and_written(run):
    run.evaluation.ground_truth = {"images": []}
    run.evaluation.dataset = types.SimpleNamespace(read_images=lambda ids: {})
    with no_file_grows(), pytest.raises(OSError, match=r"logs could not be written: .*rerun"):
        WriteTensorBoard(run)
    callback = start(WriteTensorBoard(run), run.model)
    run.state.steps, run.step = 5, {"loss": 1.0}
    with no_file_grows(), pytest.raises(OSError, match=r"logs could not be written: .*rerun"):
        callback.on_step({})


def test_a_full_disk_is_named_while_the_batch_of_a_nan_is_saved(run):
    batch = types.SimpleNamespace(take=lambda n: [({}, {"image_ids": np.array([41])})])
    run.batches = lambda start_step: batch
    run.step = {"box_loss": np.nan}
    with no_file_grows(), pytest.raises(OSError, match=r"nan-step-3\.npz could not be written"):
        start(StopOnNaN(run), run.model).on_step({})


def test_a_train_step_of_its_own_may_report_no_losses(run):
    run.step = {}
    start(StopOnNaN(run), run.model).on_train_batch_end(0, {"loss": 1.0})
