"""Models for tests."""

import inspect
from collections.abc import Callable

import keras
import numpy as np
import pytest

import keras_fpn

SMALL = {
    "num_classes": 3,
    "backbone": "resnet18",
    "normalization": "frozen_batch_norm",
    "pyramid": {"channels": 16},
    "box_head": {"hidden_dim": 32},
    "proposals": {
        "pre_nms": 50,
        "post_nms": 30,
        "training_pre_nms": 50,
        "training_post_nms": 40,
    },
    "roi_targets": {"num_samples": 32},
    "score_threshold": 0.0,
    "max_detections": 20,
    "seed": 1,
}


def small_detector(**arguments) -> keras_fpn.FasterRCNN:
    """A detector with every stage that builds and runs in seconds.

    Args:
        **arguments: of `build_fpn_faster_rcnn`; dicts of a stage's arguments are merged with those
            of `SMALL`.
    """
    return _small(keras_fpn.build_fpn_faster_rcnn, **arguments)


def tiny_detector(**arguments) -> keras_fpn.FasterRCNN:
    """`small_detector` on five convolutions, for what does not depend on the backbone.

    Tracing is what takes the time of a test, and a ResNet is most of a trace.
    """
    return _small(keras_fpn.build_fpn_faster_rcnn, **_tiny() | arguments)


def two_level_detector(**arguments) -> keras_fpn.FasterRCNN:
    """`tiny_detector` on C3 and C4, for what does not depend on the number of levels."""
    small = {"backbone": tiny_backbone(("C3", "C4")), "anchor_sizes": (32, 64, 128)}
    return tiny_detector(**small | arguments)


def tiny_rpn(**arguments) -> keras_fpn.RegionProposalNetwork:
    """The first stage of `tiny_detector`, with weights of its own."""
    return _small(keras_fpn.build_fpn_rpn, **_tiny() | arguments)


def tiny_fast_rcnn(**arguments) -> keras_fpn.FastRCNN:
    """The second stage of `tiny_detector`, with weights of its own."""
    return _small(keras_fpn.build_fpn_fast_rcnn, **_tiny() | arguments)


def copy_stages(source: keras.Model, target: keras.Model) -> None:
    """Gives a model the weights of the stages that another one has too, seeds of samplers among
    them.
    """
    for stage in {*source.stage_names} & {*target.stage_names}:
        getattr(target, stage).set_weights(getattr(source, stage).get_weights())


def _tiny() -> dict:
    return {"backbone": tiny_backbone(), "normalization": None}


def _small(build: Callable, **arguments):
    """Calls a builder; of `SMALL` it gets what it has an argument for."""
    known = inspect.signature(build).parameters
    small = {name: value for name, value in SMALL.items() if name in known}
    if "single_scale" in arguments:
        del small["pyramid"]  # There are no channels to choose.
    if arguments.get("single_scale") == "C4":
        small.pop("box_head", None)
    merged = small | arguments
    for name, value in small.items():
        if isinstance(value, dict) and isinstance(merged[name], dict):
            merged[name] = value | merged[name]
    return build(**merged)


def tiny_backbone(levels=("C2", "C3", "C4", "C5")) -> keras.Model:
    """A convolution and a ReLU for each of consecutive levels, and one before them."""
    images = keras.Input((None, None, 3))
    strides = 2 ** (int(levels[0][1:]) - 1)
    x = keras.layers.Conv2D(8, 3, strides=strides, padding="same", activation="relu")(images)
    maps = {}
    for level in levels:
        channels = 8 if level in ("C2", "C3") else 16
        x = keras.layers.Conv2D(channels, 3, strides=2, padding="same", activation="relu")(x)
        maps[level] = x
    return keras.Model(images, maps, name="tiny")


def arrays(outputs) -> dict:
    """The outputs of a model as arrays."""
    return {name: keras.ops.convert_to_numpy(value) for name, value in outputs.items()}


def assert_same(outputs, expected) -> None:
    """Holds the outputs of a model against others, bit for bit."""
    outputs, expected = arrays(outputs), arrays(expected)
    assert set(outputs) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(outputs[name], value, err_msg=name)


def assert_same_next_step(loaded: keras.Model, model: keras.Model, data) -> None:
    """That both take the same step, draws of the sampler and momentum included."""
    model.fit(data.take(1), verbose=0)
    loaded.run_eagerly = True  # Tracing takes longer than a step.
    loaded.fit(data.take(1), verbose=0)
    assert loaded.last_step == pytest.approx(model.last_step, rel=1e-3)
    for a, b in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def take_step(
    build: Callable,
    inputs,
    targets: dict,
    devices: int = 1,
    use_fit: bool = True,
    run_eagerly: bool = True,
    **compile_arguments,
) -> tuple[list[np.ndarray], dict, dict]:
    """Changes of the weights of a new model by one step of SGD, its logs and `last_step`.

    Tracing takes longer than a step.
    """
    import tensorflow as tf

    strategy = tf.distribute.get_strategy()
    if devices > 1:
        # Without a graph, TensorFlow's collectives fail in what comes after them.
        reduce = tf.distribute.ReductionToOneDevice() if run_eagerly else None
        names = [f"CPU:{i}" for i in range(devices)]
        strategy = tf.distribute.MirroredStrategy(names, cross_device_ops=reduce)
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = build()
        arguments = {"run_eagerly": run_eagerly, "jit_compile": False, **compile_arguments}
        model.compile(keras.optimizers.SGD(0.1), **arguments)
    before = model.get_weights()
    if use_fit:
        data = tf.data.Dataset.from_tensor_slices((inputs, targets)).batch(2, drop_remainder=True)
        logs = {name: value[0] for name, value in model.fit(data, verbose=0).history.items()}
    else:
        logs = model.train_on_batch(inputs, targets, return_dict=True)
    changes = [a - b for a, b in zip(model.get_weights(), before, strict=True)]
    return changes, logs, model.last_step


def assert_same_changes(changes, expected, scale=1.0) -> None:
    assert max(np.abs(change).max() for change in expected) > 1e-3
    for a, b in zip(changes, expected, strict=True):
        np.testing.assert_allclose(a, scale * b, atol=1e-5)
