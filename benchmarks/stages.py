"""Time of each stage of Faster R-CNN, in inference and in training, on TensorFlow.

    python benchmarks/stages.py --height 800 --width 1333

Each row is a stage compiled as a graph of its own, on the inputs that it has in the model, without
and with the gradient. Medians over turns in which every row runs once: core-seconds (user and
system time of all threads) and wall time. On a shared machine core-seconds are the steadier figure.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import keras_fpn


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="resnet50", help="default: resnet50")
    parser.add_argument("--height", type=int, default=800, help="default: 800")
    parser.add_argument("--width", type=int, default=1333, help="default: 1333")
    parser.add_argument("--inference-batch", type=int, default=1, help="default: 1")
    parser.add_argument("--training-batch", type=int, default=2, help="default: 2")
    parser.add_argument("--objects", type=int, default=8, help="per image (default: 8)")
    parser.add_argument("--turns", type=int, default=5, help="default: 5")
    options = parser.parse_args()

    keras.utils.set_random_seed(0)
    model = keras_fpn.build_fpn_faster_rcnn(
        backbone=options.backbone, normalization="frozen_batch_norm", frozen_stages=2
    )
    model.compile(keras_fpn.SGDWithL2(0.0), jit_compile=False)
    size = options.height, options.width
    print(
        f"{options.backbone}-FPN, {size[0]}x{size[1]}, TensorFlow {tf.__version__}, Keras "
        f"{keras.__version__}, {len(os.sched_getaffinity(0))} cores, medians of {options.turns} "
        "turns"
    )
    report(
        f"Inference, batch of {options.inference_batch}",
        inference_rows(model, images(options.inference_batch, size)),
        options.turns,
    )
    report(
        f"Training, batch of {options.training_batch}, stem and C2 frozen",
        training_rows(
            model,
            images(options.training_batch, size),
            targets(options.training_batch, size, options.objects),
        ),
        options.turns,
    )


def images(batch: int, size: tuple[int, int]) -> dict[str, tf.Tensor]:
    pixels = np.random.RandomState(0).randint(0, 256, (batch, *size, 3)).astype("uint8")
    return {"images": tf.constant(pixels), "image_sizes": tf.constant([size] * batch, tf.int32)}


def targets(batch: int, size: tuple[int, int], objects: int) -> dict[str, tf.Tensor]:
    random = np.random.RandomState(1)
    corners = random.uniform(0, 0.6, (batch, objects, 2)) * size[::-1]
    sides = random.uniform(0.05, 0.4, (batch, objects, 2)) * size[::-1]
    boxes = np.concatenate([corners, corners + sides], axis=-1).astype("float32")
    labels = random.randint(0, 80, (batch, objects)).astype("int32")
    return {"boxes": tf.constant(boxes), "labels": tf.constant(labels)}


def inference_rows(model: keras_fpn.Detector, inputs: dict) -> dict[str, Callable]:
    """Each stage that `compute_outputs` calls, with its arguments there."""
    arguments = inputs["images"], inputs["image_sizes"]
    calls = calls_of_stages(model, model.compute_outputs, *arguments)
    rows = {name: as_graph(getattr(model, name), *call) for name, call in calls.items()}
    return rows | {"whole model": as_graph(model.compute_outputs, arguments, {})}


def training_rows(model: keras_fpn.Detector, inputs: dict, truth: dict) -> dict[str, Callable]:
    """Each stage that `compute_losses` calls, forward and backward, and the training step.

    The gradient of a stage is that of the sum of its outputs, by its inputs and its weights. The
    pixels have none.
    """
    calls = calls_of_stages(model, model.compute_losses, inputs, truth)
    rows = {}
    for name, call in calls.items():
        stage = getattr(model, name)
        weights = [variable.value for variable in stage.trainable_variables]
        rows[name] = as_graph(with_gradient(stage, weights, name != "backbone"), *call)
    iterator = iter(tf.data.Dataset.from_tensors((inputs, truth)).repeat())
    model.make_train_function()
    return rows | {"training step": lambda: model.train_function(iterator)}


def calls_of_stages(model: keras_fpn.Detector, function: Callable, *arguments) -> dict[str, tuple]:
    """Returns stage name to the arguments it is called with in `function(*arguments)`."""
    calls = {}

    class Recorded:
        def __init__(self, name, stage):
            self.name, self.stage = name, stage

        def __getattr__(self, attribute):
            return getattr(self.stage, attribute)

        def __call__(self, *args, **kwargs):
            calls[self.name] = args, kwargs
            return self.stage(*args, **kwargs)

    stages = {name: vars(model)[name] for name in model.stage_names}
    # Not by setattr, by which Keras would track them.
    vars(model).update({name: Recorded(name, stage) for name, stage in stages.items()})
    function(*arguments)
    vars(model).update(stages)
    return calls


def as_graph(function: Callable, args: tuple, kwargs: dict) -> Callable:
    tensors = [x for x in tf.nest.flatten((args, kwargs)) if tf.is_tensor(x)]

    @tf.function(autograph=False)
    def graph(tensors):
        # Numbers and flags stay what they are.
        values = iter(tensors)
        replaced = tf.nest.map_structure(
            lambda x: next(values) if tf.is_tensor(x) else x, (args, kwargs)
        )
        return function(*replaced[0], **replaced[1])

    return lambda: graph(tensors)


def with_gradient(function: Callable, weights: list, of_inputs: bool) -> Callable:
    """`function`, and the gradient of the sum of its outputs by its inputs and `weights`."""

    def forward_and_backward(*args, **kwargs):
        inputs = [x for x in tf.nest.flatten((args, kwargs)) if tf.is_tensor(x)]
        sources = [*(x for x in inputs if of_inputs and x.dtype.is_floating), *weights]
        with tf.GradientTape() as tape:
            tape.watch(sources)
            outputs = tf.nest.flatten(function(*args, **kwargs))
            total = tf.add_n([tf.reduce_sum(x) for x in outputs if x.dtype.is_floating])
        return total, tape.gradient(total, sources)

    return forward_and_backward


def report(title: str, rows: dict[str, Callable], turns: int) -> None:
    for run in rows.values():
        wait_for(run())  # Tracing.
    measured = {name: [] for name in rows}
    for _ in range(turns):
        for name, run in rows.items():
            cores, wall = time.process_time(), time.perf_counter()
            wait_for(run())
            measured[name].append((time.process_time() - cores, time.perf_counter() - wall))
    print(f"\n{title}\n{'':40s}{'core-s':>9s}{'wall s':>9s}{'share':>8s}")
    medians = {
        name: [statistics.median(column) for column in zip(*values, strict=True)]
        for name, values in measured.items()
    }
    whole = list(medians.values())[-1][0]
    for name, (cores, wall) in medians.items():
        print(f"{name:40s}{cores:9.3f}{wall:9.3f}{cores / whole:8.0%}")


def wait_for(outputs) -> None:
    for value in tf.nest.flatten(outputs):
        if hasattr(value, "numpy"):
            value.numpy()


if __name__ == "__main__":
    main()
