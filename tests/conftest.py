"""Fixtures that several test files share."""

import gc
import os

# Before TensorFlow is imported: tests run on the CPU, with two devices for distribution.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault(
    "XLA_FLAGS",
    # Compiling takes the time: nothing runs often.
    "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    " --xla_llvm_disable_expensive_passes=true",
)

if "PYTEST_XDIST_WORKER" in os.environ:
    # The processes share the cores: one thread each does not wait for another.
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
    os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras
import numpy as np
import pytest
from data_sets import _encode, _plain, coco_folder, shapes_dir  # noqa: F401 - fixtures
from small_detector import tiny_detector

import keras_fpn

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    # Optimizing a graph takes longer than running it a few times.
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)

if keras.backend.backend() == "jax":
    import jax

    from keras_fpn.stage import Stage

    call, compiled = Stage.__call__, {}

    def call_compiled(stage, *args, **kwargs):
        """Calls a stage as one computation; JAX would compile each of its operations."""
        leaves, structure = jax.tree.flatten((args, kwargs))
        is_array = [isinstance(leaf, np.ndarray | jax.Array) for leaf in leaves]
        is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
        is_built = stage.built or type(stage).build is keras.layers.Layer.build
        if is_traced or not is_built or not any(is_array) or stage.non_trainable_variables:
            return call(stage, *args, **kwargs)
        fixed = [None if array else leaf for leaf, array in zip(leaves, is_array, strict=True)]
        key = (stage, structure, str(fixed))

        def compute(arrays):
            arrays = iter(arrays)
            filled = [
                next(arrays) if array else leaf for leaf, array in zip(fixed, is_array, strict=True)
            ]
            args, kwargs = jax.tree.unflatten(structure, filled)
            return call(stage, *args, **kwargs)

        function = compiled.setdefault(key, jax.jit(compute))
        return function([x for x, array in zip(leaves, is_array, strict=True) if array])

    Stage.__call__ = call_compiled

# What the libraries hold stays: collections need not look at it, nor come as often.
gc.freeze()
gc.set_threshold(200_000, 20, 50)


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    """Two images of 64 x 96 random pixels."""
    return np.random.RandomState(0).randint(0, 256, (2, 64, 96, 3)).astype("uint8")


@pytest.fixture(scope="session")
def targets() -> dict:
    """Ground truth for `images`: one object, and two."""
    return {
        "boxes": np.array(
            [[[5, 5, 50, 60], [0, 0, 0, 0]], [[20, 20, 60, 60], [3, 3, 90, 50]]], "float32"
        ),
        "labels": np.array([[0, -1], [2, 1]], "int32"),
    }


@pytest.fixture(scope="session")
def detector() -> keras_fpn.FasterRCNN:
    """A small detector whose weights no test changes."""
    keras.utils.set_random_seed(0)
    return tiny_detector()
