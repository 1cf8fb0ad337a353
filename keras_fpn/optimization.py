"""The papers' optimizer: SGD with momentum and L2 decay, warm-up and steps (FPN, section 5)."""

import math
from collections.abc import Sequence

import keras
from keras import ops


@keras.saving.register_keras_serializable("keras_fpn")
class SGDWithL2(keras.optimizers.SGD):
    """SGD whose weight decay is part of the gradient, as in the papers' code.

    Keras's own `weight_decay` shrinks weights beside the gradient, which momentum then does not
    amplify: at momentum 0.9 it is ten times weaker. Only kernels decay, that is, weights of two or
    more dimensions; biases and the scales and shifts of normalizations do not.

    Args:
        learning_rate: a number or a schedule.
        momentum: of the velocity.
        l2: added to a kernel's gradient: `l2 * kernel`.
        **kwargs: as `keras.optimizers.SGD` has them.
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

    def get_config(self):
        config = super().get_config()
        config.update(l2=self.l2)
        return config


@keras.saving.register_keras_serializable("keras_fpn")
class WarmupStepDecay(keras.optimizers.schedules.LearningRateSchedule):
    """Rises in a line to the base rate, then falls by a factor at given steps.

    Args:
        learning_rate: base rate.
        warmup_steps: the rate is `learning_rate * (step + 1) / warmup_steps` until it is reached.
        decay_steps: from each of these steps on the rate is multiplied by `decay_factor`.
        decay_factor: 0.1 in the papers.
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

    def __call__(self, step):
        step = ops.cast(step, "float32")
        rate = self.learning_rate * ops.minimum((step + 1.0) / max(self.warmup_steps, 1), 1.0)
        for decay_step in self.decay_steps:
            rate = rate * ops.where(step >= decay_step, self.decay_factor, 1.0)
        return rate

    def get_config(self):
        return {
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
            "decay_steps": self.decay_steps,
            "decay_factor": self.decay_factor,
        }


@keras.saving.register_keras_serializable("keras_fpn")
class WarmupCosineDecay(keras.optimizers.schedules.LearningRateSchedule):
    """Rises in a line to the base rate, and falls to 0 along half a cosine.

    Args:
        learning_rate: base rate.
        warmup_steps: as for `WarmupStepDecay`.
        total_steps: the fall is `(1 + cos(pi * step / total_steps)) / 2`, 0 from this step on.
    """

    def __init__(self, learning_rate: float, warmup_steps: int = 0, total_steps: int = 1):
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps

    def __call__(self, step):
        step = ops.cast(step, "float32")
        rise = ops.minimum((step + 1.0) / max(self.warmup_steps, 1), 1.0)
        progress = ops.minimum(step / max(self.total_steps, 1), 1.0)
        return self.learning_rate * rise * 0.5 * (1.0 + ops.cos(math.pi * progress))

    def get_config(self):
        return {
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
            "total_steps": self.total_steps,
        }
