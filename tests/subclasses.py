"""Subclasses of `FasterRCNN` whose own methods tests look for in training."""

import keras

from keras_fpn.faster_rcnn import FasterRCNN
from keras_fpn.monitoring import monitor


class DoublesTheBoxLoss(FasterRCNN):
    def compute_losses(self, inputs, targets, training=True):
        losses = super().compute_losses(inputs, targets, training)
        monitor("box_loss_before", losses["box_loss"])
        return losses | {"box_loss": 2 * losses["box_loss"]}


class DoublesTheLoss(FasterRCNN):
    def compute_loss(self, *args, **kwargs):
        return 2 * super().compute_loss(*args, **kwargs)


class DoublesBoth(DoublesTheBoxLoss, DoublesTheLoss):
    pass


class TakesNoStep(FasterRCNN):
    def train_step(self, data):
        return {"loss": keras.ops.cast(keras.ops.shape(data[0])[0], "float32")}


class TakesKerasStep(FasterRCNN):
    """A step as Keras's guide writes it, which leaves the sum over replicas to the optimizer."""

    def train_step(self, data):
        import tensorflow as tf

        inputs, targets = data
        with tf.GradientTape() as tape:
            losses = self.compute_losses(inputs, targets)
            loss = self.compute_loss(inputs, targets, losses)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return self.get_metrics_result()
