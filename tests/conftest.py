"""Fixtures that several test files share."""

import functools
import gc
import inspect
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
    from keras.src.backend import random

    from keras_fpn import boxes, losses, matcher, nms
    from keras_fpn.stage import Stage

    def numpy_normal(shape, mean=0.0, stddev=1.0, dtype=None, seed=None):
        """Draws initial weights, for each shape of which JAX would compile a generator."""
        values = np.random.default_rng(0).normal(mean, stddev, shape)
        return jax.numpy.asarray(values, dtype or "float32")

    def is_array(leaf):
        return isinstance(leaf, np.ndarray | jax.Array)

    def compiled(function):
        """A function as one computation; JAX would compile each of its operations."""
        computations = {}

        @functools.wraps(function)
        def call(*args, **kwargs):
            leaves, structure = jax.tree.flatten((args, kwargs), is_leaf=lambda leaf: leaf is None)
            arrays = [leaf for leaf in leaves if is_array(leaf)]
            if not arrays or any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
                return function(*args, **kwargs)
            if isinstance(args[0], Stage):
                is_built = args[0].built or type(args[0]).build is keras.layers.Layer.build
                if not is_built or args[0].non_trainable_variables:
                    return function(*args, **kwargs)
            fixed = tuple(None if is_array(leaf) else leaf for leaf in leaves)

            def compute(arrays):
                arrays = iter(arrays)
                filled = [
                    next(arrays) if is_array(leaf) else fixed_leaf
                    for leaf, fixed_leaf in zip(leaves, fixed, strict=True)
                ]
                args, kwargs = jax.tree.unflatten(structure, filled)
                return function(*args, **kwargs)

            key = (structure, fixed, tuple(map(type, leaves)))
            return computations.setdefault(key, jax.jit(compute))(arrays)

        return call

    random.truncated_normal = random.normal = numpy_normal
    Stage.__call__ = compiled(Stage.__call__)
    for module in (boxes, losses, matcher, nms):
        for name, value in vars(module).copy().items():
            if inspect.isfunction(value) and value.__module__ == module.__name__:
                setattr(module, name, compiled(value))

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
