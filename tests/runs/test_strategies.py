"""The strategy for an environment; several workers are in test_distributed.py."""

import json
import re

import numpy as np
import pytest
import tensorflow as tf

from keras_fpn.runs.strategies import (
    choose_strategy,
    gather_from_workers,
    num_workers,
    replicas_of_worker,
    worker_index,
)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in ("TF_CONFIG", "SLURM_STEP_NUM_TASKS", "TPU_NAME"):
        monkeypatch.delenv(name, raising=False)


def test_auto_on_one_cpu_is_single():
    strategy = choose_strategy("auto")
    assert strategy is tf.distribute.get_strategy()
    assert strategy.num_replicas_in_sync == 1


def test_mirrored_takes_all_logical_devices():
    strategy = choose_strategy("mirrored")
    assert strategy.num_replicas_in_sync == len(tf.config.list_logical_devices("CPU")) == 2
    assert (num_workers(strategy), worker_index(strategy), replicas_of_worker(strategy)) == (
        1,
        0,
        2,
    )
    np.testing.assert_array_equal(gather_from_workers(strategy, np.arange(3)), np.arange(3))


def test_several_workers_need_their_addresses():
    with pytest.raises(ValueError, match=r"--strategy multi_worker .*TF_CONFIG"):
        choose_strategy("multi_worker")


@pytest.mark.parametrize("value", ["no json", "[]", '{"cluster": {"worker": 3}}'])
def test_a_tf_config_that_is_none_is_named(monkeypatch, value):
    monkeypatch.setenv("TF_CONFIG", value)
    with pytest.raises(ValueError, match=f"TF_CONFIG .* received '{re.escape(value)}'"):
        choose_strategy("auto")


def test_a_task_that_does_not_train_is_refused(monkeypatch):
    task = {"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "evaluator", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(task))
    with pytest.raises(ValueError, match="received 'evaluator'"):
        choose_strategy("auto")


def test_a_tpu_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="--strategy tpu finds no TPU at 'local'"):
        choose_strategy("tpu")
