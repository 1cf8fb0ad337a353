"""Training and evaluation steps on TensorFlow, under any `tf.distribute` strategy."""

import itertools
import re
from collections.abc import Callable

import keras
import tensorflow as tf
from keras import ops

from keras_fpn.monitoring import collect_monitored, monitor
from keras_fpn.replicas import gradients_already_summed, sum_over_replicas

_REFUSED = "Refused by keras_fpn: "  # Marks what `check_values` says in TensorFlow's error.


def train_step(model, data) -> dict:
    """Takes a training step with this replica's batch; returns the logs of the epoch so far.

    Everything that depends on the number of replicas is summed here: the gradients, before they
    are clipped and before the loss scale checks them, and the losses.
    """
    inputs, targets, _ = keras.utils.unpack_x_y_sample_weight(data)
    with tf.GradientTape() as tape:
        losses = model.compute_losses(inputs, targets, training=True)
        loss = model.compute_loss(inputs, targets, losses, training=True)
        scaled = model.optimizer.scale_loss(loss)
    gradients = tape.gradient(scaled, model.trainable_variables)
    # Maps of the backbone that no stage uses have none.
    used = [gradient is not None for gradient in gradients]
    variables = list(itertools.compress(model.trainable_variables, used))
    gradients = sum_over_replicas(list(itertools.compress(gradients, used)))
    scale = ops.cast(model.optimizer.scale_loss(1.0), "float32")
    norm = tf.linalg.global_norm([tf.cast(gradient, tf.float32) for gradient in gradients])
    with gradients_already_summed(model.optimizer):
        model.optimizer.apply(gradients, variables)
    losses = _sum_losses({"loss": loss, **losses})
    for name, value in losses.items():
        monitor(name, value)
    monitor("gradient_norm", norm / scale)
    return model.update_loss_metrics(losses, _batch_size(inputs))


def test_step(model, data) -> dict:
    """Computes the losses of this replica's batch; returns the logs of the evaluation so far."""
    inputs, targets, _ = keras.utils.unpack_x_y_sample_weight(data)
    losses = model.compute_losses(inputs, targets, training=False)
    loss = model.compute_loss(inputs, targets, losses, training=False)
    return model.update_loss_metrics(_sum_losses({"loss": loss, **losses}), _batch_size(inputs))


def _sum_losses(losses):
    # One message for all of them.
    summed = sum_over_replicas(ops.stack([ops.cast(x, "float32") for x in losses.values()]))
    return dict(zip(losses, ops.unstack(summed, len(losses)), strict=True))


def _batch_size(inputs):
    return ops.shape(inputs["images"] if isinstance(inputs, dict) else inputs)[0]


def function_of_iterator(model, step: Callable) -> Callable:
    """Returns a function that takes a number of steps with the batches of an iterator.

    Keras's own reduces the replicas' logs in a way that fails on several workers (keras issue
    20585). Here logs have been summed over the replicas by the step, so any replica's will do.

    Args:
        model: a compiled `Detector`.
        step: the model's `train_step` or `test_step`.

    Returns:
        Function from an iterator and the number of steps to `(logs, monitored)` of the last one;
        with fewer batches, as many steps.
    """
    strategy = model.distribute_strategy

    def after(data):
        # When no data are left, what does not use them, such as the optimizer's step counter,
        # must not go on either.
        leaves = tf.nest.flatten(data, expand_composites=True)
        return tf.control_dependencies([leaf for leaf in leaves if leaf is not None])

    def monitored_step(data):
        with after(data), collect_monitored() as monitored:
            logs = step(data)
        return logs, monitored

    def step_on_replicas(data):
        with after(data):
            outputs = strategy.run(monitored_step, args=(data,))
        return tf.nest.map_structure(
            lambda value: strategy.experimental_local_results(value)[0], outputs
        )

    def step_on_iterator(iterator):
        # Outside of what XLA compiles, which would drop assertions.
        return step_on_replicas(checked(iterator.get_next()))

    def checked(data):
        return strategy.run(lambda data: check_values(model, data), args=(data,))

    if not model.run_eagerly:
        step_on_replicas = tf.function(
            step_on_replicas, reduce_retracing=True, jit_compile=model.jit_compile, autograph=False
        )
        checked = tf.function(checked, reduce_retracing=True, autograph=False)
        step_on_iterator = tf.function(step_on_iterator, reduce_retracing=True, autograph=False)

    def one_step(iterator):
        # `train_on_batch` and its like pass a generator.
        if hasattr(iterator, "get_next"):
            return step_on_iterator(iterator)
        return step_on_replicas(checked(next(iterator)))

    def steps(iterator, number):
        try:
            outputs = one_step(iterator)
            for _ in range(number - 1):
                try:
                    outputs = one_step(iterator)
                except (StopIteration, tf.errors.OutOfRangeError):
                    break
        except tf.errors.InvalidArgumentError as error:
            if found := re.search(rf"{_REFUSED}(.*?\.)['\]]", error.message):
                raise ValueError(found[1]) from error
            raise
        return outputs

    return steps


def check_values(model, data) -> tuple:
    """Returns a batch that fails to be computed where training would silently go wrong.

    Only the values are checked that a step, unlike the first batch of `fit`, cannot check for free
    in Python: there is an image, pixels are finite, labels are integers from -1 to those of the
    last class.
    """
    # Without a graph, `train_on_batch` passes arrays.
    data = tf.nest.map_structure(lambda x: x if x is None else tf.convert_to_tensor(x), data)
    inputs, targets, _ = keras.utils.unpack_x_y_sample_weight(data)
    images = inputs["images"] if isinstance(inputs, dict) else inputs
    labels = tf.cast(targets["labels"], tf.float64)
    wrong = (labels != tf.floor(labels)) | (labels < -1)
    expected = "integers >= 0"
    if model.num_classes is not None:
        wrong |= labels >= model.num_classes
        expected = f"integers in 0..{model.num_classes - 1}"
    first = tf.boolean_mask(targets["labels"], wrong)[:1]
    checks = [
        tf.debugging.Assert(
            tf.shape(images)[0] > 0,
            [f"{_REFUSED}A batch must have at least one image; received none."],
        ),
        tf.debugging.Assert(
            ~tf.reduce_any(wrong),
            [
                f"{_REFUSED}`labels` must be {expected}, or -1 for padding; received "
                + tf.strings.reduce_join(
                    tf.strings.as_string(first, shortest=first.dtype.is_floating)
                )
                + "."
            ],
        ),
    ]
    if images.dtype.is_floating:
        is_finite = tf.reduce_all(tf.math.is_finite(images))
        message = f"{_REFUSED}Pixels must be finite; received NaN or infinite ones."
        checks.append(tf.debugging.Assert(is_finite, [message]))
    with tf.control_dependencies([check for check in checks if check is not None]):
        return tf.nest.map_structure(lambda x: x if x is None else tf.identity(x), data)
