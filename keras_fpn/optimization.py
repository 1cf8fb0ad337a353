"""The papers' optimizer: SGD with momentum, L2 regularization and step decay (FPN, section 5)."""

import math
from collections.abc import Sequence

import keras
from keras import ops

from keras_fpn.typing import Tensor


@keras.saving.register_keras_serializable("keras_fpn")
class SGDWithL2(keras.optimizers.SGD):
    """SGD with L2 regularization as part of the gradient, as in the papers' code.

    Keras's own `weight_decay` is decoupled from the gradient, so that momentum does not amplify it:
    at momentum 0.9 it is ten times weaker. Only kernels decay, that is, weights of two or more
    dimensions, but not biases nor the scales and shifts of normalization layers.

    Args:
        learning_rate: a number or a schedule. Defaults to 0.02.
        momentum: momentum of the velocity. Defaults to 0.9.
        l2: `l2 * kernel` is added to the gradient of a kernel. Defaults to 1e-4.
        **kwargs: as in `keras.optimizers.SGD`.
    """

    def __init__(self, learning_rate=0.02, momentum: float = 0.9, l2: float = 1e-4, **kwargs):
        super().__init__(learning_rate=learning_rate, momentum=momentum, **kwargs)
        self.l2 = l2

    def update_step(self, gradient, variable, learning_rate):
        if len(variable.shape) > 1:
            gradient = gradient + ops.cast(self.l2, variable.dtype) * ops.convert_to_tensor(
                variable
            )
        super().update_step(gradient, variable, learning_rate)

    def get_config(self) -> dict:
        config = super().get_config()
        config.update(l2=self.l2)
        return config


@keras.saving.register_keras_serializable("keras_fpn")
class WarmupStepDecay(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up, then decay by a factor at given steps.

    Args:
        learning_rate: base learning rate.
        warmup_steps: number of steps of `learning_rate * (step + 1) / warmup_steps`. Defaults to 0.
        decay_steps: steps at which the rate is multiplied by `decay_factor`. Defaults to none.
        decay_factor: factor at each of them. Defaults to 0.1, as in the papers.
    """

    def __init__(
        self,
        learning_rate: float,
        warmup_steps: int = 0,
        decay_steps: Sequence[int] = (),
        decay_factor: float = 0.1,
    ):
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.decay_steps = tuple(decay_steps)
        self.decay_factor = decay_factor

    def __call__(self, step) -> Tensor:
        step = ops.cast(step, "float32")
        rate = self.learning_rate * ops.minimum((step + 1.0) / max(self.warmup_steps, 1), 1.0)
        for decay_step in self.decay_steps:
            rate = rate * ops.where(step >= decay_step, self.decay_factor, 1.0)
        return rate

    def get_config(self) -> dict:
        return {
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
            "decay_steps": self.decay_steps,
            "decay_factor": self.decay_factor,
        }


@keras.saving.register_keras_serializable("keras_fpn")
class WarmupCosineDecay(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up with cosine decay to 0.

    Args:
        learning_rate: base learning rate.
        warmup_steps: as in `WarmupStepDecay`. Defaults to 0.
        total_steps: the decay is `(1 + cos(pi * step / total_steps)) / 2`, and 0 from this step on.
            Defaults to 1.
    """

    def __init__(self, learning_rate: float, warmup_steps: int = 0, total_steps: int = 1):
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps

    def __call__(self, step) -> Tensor:
        step = ops.cast(step, "float32")
        rise = ops.minimum((step + 1.0) / max(self.warmup_steps, 1), 1.0)
        progress = ops.minimum(step / max(self.total_steps, 1), 1.0)
        return self.learning_rate * rise * 0.5 * (1.0 + ops.cos(math.pi * progress))

    def get_config(self) -> dict:
        return {
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
            "total_steps": self.total_steps,
        }
