"""What a run refuses before it reads data and builds a model, and the length of its epochs."""

import dataclasses
import errno
import fcntl
import os

import pytest

from keras_fpn.runs import training
from keras_fpn.runs.alternating import alternate
from keras_fpn.runs.recipes import Recipe
from keras_fpn.runs.run_folder import claim_run
from keras_fpn.runs.run_lock import LOCK_FILE
from keras_fpn.runs.train import Run

RECIPE = Recipe(model={"proposals": {"post_nms": 50}}, batch_size=4)


@pytest.fixture
def options(tmp_path, monkeypatch):
    """Options of a run that ends with an error of its own where it reads data."""

    def read(*_):
        raise NotImplementedError("reads data")

    monkeypatch.setattr(training, "open_splits", read)
    return Run(output=tmp_path / "run", dataset="x", strategy="single")


@pytest.mark.parametrize("run", [training.train, alternate])
def test_a_folder_in_use_is_refused_before_data_are_read(run, options, monkeypatch):
    def held(descriptor, operation):
        os.write(descriptor, b"process 7 on node-3")
        os.lseek(descriptor, 0, os.SEEK_SET)
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(fcntl, "lockf", held)
    with pytest.raises(SystemExit, match="in use by process 7 on node-3"):
        run(options, RECIPE)


@pytest.mark.parametrize("run", [training.train, alternate])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": 0.5}, r"learning_rate 0\.02; received 0\.5"),
        ({"model": {"proposals": {"post_nms": 60}}}, r"proposals\.post_nms 50; received 60"),
        ({"model": {}}, r"proposals\.post_nms 50; received None"),
        ({"steps_per_execution": 4}, "steps_per_execution 1; received 4"),
    ],
)
def test_another_recipe_is_refused_before_data_are_read(run, options, changed, message):
    claim_run(options.output, training.configuration_of(options, RECIPE) | {"class_names": ["a"]})
    with pytest.raises(NotImplementedError, match="reads data"):
        run(options, RECIPE)
    with pytest.raises(SystemExit, match=message):
        run(options, dataclasses.replace(RECIPE, **changed))
    assert not (options.output / LOCK_FILE).exists()


def test_another_data_set_is_refused_before_it_is_read(options):
    claim_run(options.output, training.configuration_of(options, RECIPE))
    with pytest.raises(SystemExit, match="dataset 'x'; received 'y'"):
        training.train(dataclasses.replace(options, dataset="y"), RECIPE)


def test_an_epoch_is_a_number_of_executions():
    recipe = Recipe(batch_size=4, steps_per_execution=4)
    assert training.steps_per_epoch(recipe, 47) == 8
    with pytest.raises(ValueError, match=r"--steps-per-execution .* 3 steps per epoch; received 4"):
        training.steps_per_epoch(recipe, 15)
