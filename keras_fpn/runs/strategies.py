"""Distribution: `--strategy`, and collectives of arrays between workers."""

import functools
import json
import os
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from keras_fpn.runs.command import StrategyName


def choose_strategy(name: StrategyName) -> tf.distribute.Strategy:
    """Creates a strategy. Call it before anything else of TensorFlow.

    Args:
        name: "auto" is "multi_worker" if TF_CONFIG or Slurm name several workers, else "mirrored"
            if there are several GPUs, else "single"; "single" is one device; "mirrored" all GPUs of
            this machine, or all logical CPU devices without a GPU; "multi_worker" all GPUs of all
            workers in TF_CONFIG or in the Slurm job; "tpu" the TPU named by TPU_NAME, or the local
            one.

    Raises:
        ValueError: if the environment lacks what the strategy needs.
    """
    workers = _workers_of_environment()
    if name == "auto":
        name = "multi_worker" if workers > 1 else "mirrored" if _number_of_gpus() > 1 else "single"
    if name == "multi_worker":
        if workers == 0:
            raise ValueError(
                "--strategy multi_worker needs the addresses of all workers; set TF_CONFIG on each "
                "of them, or start them with Slurm's srun (docs/scaling.md)."
            )
        if "TF_CONFIG" in os.environ:
            resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
        else:
            resolver = tf.distribute.cluster_resolver.SlurmClusterResolver()
        return tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver)
    if name == "mirrored":
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        return tf.distribute.MirroredStrategy([device.name for device in devices])
    if name == "tpu":
        address = os.environ.get("TPU_NAME", "local")
        try:
            resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect(address)
        except (ValueError, tf.errors.OpError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"--strategy tpu finds no TPU at {address!r}: {reason}") from error
        return tf.distribute.TPUStrategy(resolver)
    return tf.distribute.get_strategy()


def _number_of_gpus() -> int:
    return len(tf.config.list_physical_devices("GPU"))


def _workers_of_environment() -> int:
    """Returns the number of workers that TF_CONFIG or Slurm name; 0 if neither does."""
    if "TF_CONFIG" in os.environ:
        try:
            config = json.loads(os.environ["TF_CONFIG"])
            cluster, task = config.get("cluster", {}), config.get("task", {})
            workers = [*cluster.get("chief", []), *cluster.get("worker", [])]
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(
                f"TF_CONFIG must be JSON with 'cluster' and 'task'; received "
                f"{os.environ['TF_CONFIG']!r} ({error})."
            ) from error
        if task.get("type", "worker") not in ("chief", "worker"):
            raise ValueError(
                "The task type in TF_CONFIG must be 'chief' or 'worker'; received "
                f"{task['type']!r}."
            )
        return len(workers)
    if "SLURM_STEP_NUM_TASKS" in os.environ:
        return int(os.environ["SLURM_STEP_NUM_TASKS"])
    return 0


def num_workers(strategy: tf.distribute.Strategy) -> int:
    """Returns the number of processes of a strategy."""
    return len(_workers(strategy)) or 1


def worker_index(strategy: tf.distribute.Strategy) -> int:
    """Returns the index of this process; worker 0 writes the files."""
    workers = _workers(strategy)
    if not workers:
        return 0
    resolver = strategy.cluster_resolver
    return workers.index((resolver.task_type, resolver.task_id))


def _workers(strategy: tf.distribute.Strategy) -> list[tuple[str, int]]:
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return []
    cluster = strategy.cluster_resolver.cluster_spec().as_dict()
    return [(kind, i) for kind in ("chief", "worker") for i in range(len(cluster.get(kind, [])))]


def replicas_of_worker(strategy: tf.distribute.Strategy) -> int:
    """Returns the number of replicas of this process."""
    return strategy.num_replicas_in_sync // num_workers(strategy)


def gather_from_workers(strategy: tf.distribute.Strategy, array: np.ndarray) -> np.ndarray:
    """Concatenates the arrays of all workers along the first axis, on each of them.

    Every worker must call it, with arrays of the same dtype and further axes.
    """
    if num_workers(strategy) == 1:
        return array
    # A sum of arrays with zeros in the others' rows; `Strategy.gather` traces a function per call.
    # The additional row is for empty arrays, on which TensorFlow 2.21 crashes.
    index = worker_index(strategy)
    lengths = np.zeros(num_workers(strategy), np.int64)
    lengths[index] = len(array)
    lengths = sum_over_workers(strategy, lengths)
    rows = np.zeros((lengths.sum() + 1, *array.shape[1:]), array.dtype)
    begin = lengths[:index].sum()
    rows[begin : begin + len(array)] = array
    return sum_over_workers(strategy, rows)[:-1]


def on_first_worker(
    strategy: tf.distribute.Strategy, function: Callable[[], int], refusal: str
) -> int:
    """Returns on every worker what a function returns on worker 0; every worker must call it.

    Args:
        strategy: the strategy.
        function: called by worker 0 alone; returns an integer.
        refusal: what the other workers raise if it fails.

    Raises:
        ValueError: on worker 0 its own error, on the others `refusal`.
        OSError: on worker 0.
    """
    answer, error = 0, None
    if worker_index(strategy) == 0:
        try:
            answer = function()
        except (ValueError, OSError) as raised:
            error = raised
    has_failed, answer = sum_over_workers(strategy, np.array([error is not None, answer], np.int64))
    if error is not None:
        raise error
    if has_failed:
        raise ValueError(refusal)
    return int(answer)


def sum_over_workers(strategy: tf.distribute.Strategy, array: np.ndarray) -> np.ndarray:
    """Sums the workers' arrays, of the same shape and not empty, on each of them."""
    if num_workers(strategy) == 1:
        return array
    replicas = replicas_of_worker(strategy)

    def of_replica(context: tf.distribute.experimental.ValueContext) -> tf.Tensor:
        is_first = context.replica_id_in_sync_group % replicas == 0
        return tf.constant(array if is_first else np.zeros_like(array))

    values = strategy.experimental_distribute_values_from_function(of_replica)
    return _summing_function(strategy)(values).numpy()


@functools.cache
def _summing_function(strategy: tf.distribute.Strategy) -> Callable:
    @tf.function(reduce_retracing=True, autograph=False)
    def add(values):
        def on_replica(value):
            context = tf.distribute.get_replica_context()
            # An argument need not be on the replica's device; its identity is.
            return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(value))

        return strategy.experimental_local_results(strategy.run(on_replica, args=(values,)))[0]

    return add
