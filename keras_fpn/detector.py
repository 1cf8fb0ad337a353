"""What all models of this package share: stages, pieces of the forward pass, training, saving."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_fpn.boxes import convert_boxes
from keras_fpn.matcher import real_objects
from keras_fpn.replicas import num_replicas
from keras_fpn.typing import Tensor
from keras_fpn.validation import (
    check_batch,
    check_image_shape,
    check_inputs,
    check_structure,
    check_target_structure,
    check_training_data,
    did_you_mean,
    is_in_memory,
)


class GroundTruth(NamedTuple):
    """The ground truth of a batch.

    Attributes:
        boxes: `[B, G, 4]` float32 xyxy pixels; zeros where there is no object.
        labels: `[B, G]` int32.
        is_object: `[B, G]` bool.
    """

    boxes: Any
    labels: Any
    is_object: Any


class Proposals(NamedTuple):
    """The proposals of a batch, and the RPN's predictions that they come from.

    Attributes:
        boxes: `[B, P, 4]` xyxy pixels.
        scores: `[B, P]`, -1 in padding rows.
        objectness: level name to `[B, h, w, A]` logits.
        deltas: level name to `[B, h, w, 4 * A]`.
        anchors: level name to `[h * w * A, 4]` xyxy pixels.
    """

    boxes: Any
    scores: Any
    objectness: Mapping
    deltas: Mapping
    anchors: Mapping


class Detector(keras.Model):
    """Base class of the models.

    A model declares the names of its stages and losses, and implements `compute_outputs` and
    `compute_losses` with the pieces of the forward pass below, which work on Keras tensors and on
    arrays alike. Every stage is a constructor argument, an attribute, and saved with its own
    config. `docs/architecture.md` has an example.

    A subclass may override `compute_losses`, `compute_loss` or `train_step`; `fit` and
    `train_on_batch` call them on one device, several devices and several workers alike. Losses and
    gradients are those of this replica's images divided by the samples of all replicas, so
    replicas are summed, never averaged.

    Class attributes:
        stage_names: names of the stages, in the order of the forward pass.
        takes_proposals: whether "proposals" are an input beside "images" and "image_sizes".
        loss_names: names of the losses that `compute_losses` returns.

    Args:
        image_shape: `(height, width, 3)` of the images; None for any height or width.
        class_names: name of every label. Defaults to None, no names.
        name: name of the model.
        trainable: whether any weight is trained. Defaults to True.
        **stages: one layer for each of `stage_names`.

    Raises:
        TypeError: if a stage is missing, unknown or not a layer.
        ValueError: if `image_shape` or `class_names` do not fit.
    """

    stage_names: tuple[str, ...] = ()
    takes_proposals = False
    loss_names: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        image_shape: Sequence[int | None] = (None, None, 3),
        class_names: Sequence[str] | None = None,
        name: str | None = None,
        trainable: bool = True,
        **stages: keras.layers.Layer,
    ):
        # Images keep their dtype: `preprocessing` casts them to float32 whatever the policy.
        super().__init__(name=name, autocast=False)
        for stage in (*self.stage_names, *stages):
            if stage not in stages or stage not in self.stage_names:
                problem = "is missing" if stage not in stages else "is unknown"
                raise TypeError(
                    f"{type(self).__name__} has the stages {', '.join(self.stage_names)}; "
                    f"{stage!r} {problem}{did_you_mean(stage, self.stage_names)}"
                )
        self.image_shape = check_image_shape(image_shape)

        # === Layers ===
        for stage in self.stage_names:
            if not isinstance(stages[stage], keras.layers.Layer):
                received = type(stages[stage]).__name__
                raise TypeError(f"`{stage}` must be a layer; received a {received}.")
            setattr(self, stage, stages[stage])
        self.loss_metrics = [keras.metrics.Mean(name=n) for n in ("loss", *self.loss_names)]
        self.loss_weights: dict[str, float] | None = None
        self._last_step = {}
        self._steps_to_skip = 0

        # === Config ===
        self.class_names = None if class_names is None else tuple(class_names)
        if class_names is not None and len(class_names) != self.num_classes:
            raise ValueError(
                f"`class_names` must have one name for each of the {self.num_classes} classes; "
                f"received {len(class_names)} names."
            )
        # === Functional Model ===
        inputs = {
            "images": keras.Input(self.image_shape, name="images"),
            "image_sizes": keras.Input((2,), dtype="int32", name="image_sizes"),
        }
        if self.takes_proposals:
            inputs["proposals"] = keras.Input((None, 4), name="proposals")
        functional = keras.Model(inputs, self.compute_outputs(**inputs), name=self.name)
        # As an attribute, Keras would save its layers a second time.
        self._functional_model = lambda: functional
        self.built = True
        if not trainable:
            self.trainable = False

    @property
    def num_classes(self) -> int | None:
        """Number of classes, without the background; None if labels are ignored."""
        raise NotImplementedError

    @property
    def bounding_box_format(self) -> str:
        """Format of the ground truth and of the boxes in the outputs."""
        raise NotImplementedError

    def functional_model(self) -> keras.Model:
        """Returns a functional model of the same layers, from padded batches to the outputs.

        Its input is `{"images": [B, H, W, 3], "image_sizes": [B, 2]}`, and "proposals" if the model
        takes them. Use it to plot the graph, or to build models on the outputs of stages:
        `keras.Model(functional.input, functional.get_layer("pyramid").output)`.
        """
        return self._functional_model()

    # === Forward pass ===

    def compute_outputs(self, images, image_sizes, training: bool | None = None) -> dict:
        """Returns what the model returns for a padded batch.

        A model that takes proposals has `proposals` as its third argument: `[B, P, 4]` xyxy pixels,
        padded with boxes of zeros.

        Args:
            images: `[B, H, W, 3]`.
            image_sizes: `[B, 2]` int32, height and width of each image inside the batch.
            training: whether layers run in training mode.
        """
        raise NotImplementedError

    def extract_features(self, images, image_sizes, training: bool | None = None) -> tuple:
        """Returns the preprocessed batch, `[B, H', W', 3]`, and its feature pyramid."""
        images = self.preprocessing(images, image_sizes)
        maps = self.backbone(images, training=training)
        return images, self.pyramid(maps, training=training)

    def propose_regions(
        self, images, features: Mapping, image_sizes, training: bool | None = None
    ) -> Proposals:
        """Returns the proposals of the RPN, the first stage.

        Args:
            images: `[B, H', W', 3]`, the preprocessed batch; only its size is used.
            features: the feature pyramid.
            image_sizes: `[B, 2]` int32.
            training: whether to use the numbers of proposals for training.
        """
        features = {level: features[level] for level in self.pyramid.rpn_levels}
        # Here, since Keras adds lines to what a layer's call raises.
        self.anchors.check_levels(features)
        objectness, deltas = self.rpn_head(features)
        anchors = self.anchors(images, features)
        for level, logits in objectness.items():
            if logits.shape[-1] != self.anchors.anchors_per_location:
                raise ValueError(
                    f"`anchors` has {self.anchors.anchors_per_location} anchors per location, "
                    f"`rpn_head` predicts {logits.shape[-1]} on {level}."
                )
        boxes, scores = self.proposals(objectness, deltas, anchors, image_sizes, training=training)
        return Proposals(boxes, scores, objectness, deltas, anchors)

    def classify_regions(self, features: Mapping, regions, training: bool | None = None) -> tuple:
        """Returns the class logits and box deltas of regions: the second stage.

        Args:
            features: the feature pyramid.
            regions: `[B, R, 4]` xyxy pixels.
            training: whether layers run in training mode.

        Returns:
            `(class_logits, deltas)`: `[B, R, num_classes + 1]` and `[B, R, num_classes, 4]`.
        """
        features = {level: features[level] for level in self.pyramid.roi_levels}
        return self.box_head(self.roi_pooling(features, regions), training=training)

    def call(self, inputs, training=None) -> dict:
        return self.compute_outputs(**self.prepare_inputs(inputs), training=training)

    def compute_output_spec(self, inputs, training=None) -> dict:
        checked = check_inputs(inputs, self.image_shape, self.takes_proposals)
        sizes = keras.KerasTensor((checked["images"].shape[0], 2), "int32")
        return self.compute_outputs(**{**checked, "image_sizes": sizes})

    def predict(self, x, *args, **kwargs) -> dict:
        """Detects as `keras.Model.predict` does; images in memory are checked first."""
        if is_in_memory(x):
            check_batch(self, x)
        return super().predict(x, *args, **kwargs)

    def prepare_inputs(self, inputs) -> dict:
        """Returns the checked arguments of `compute_outputs`; sizes default to the whole batch.

        Args:
            inputs: `[B, H, W, 3]` images, or a dict of "images", "image_sizes" and, if the model
                takes them, "proposals".

        Raises:
            ValueError, TypeError: see `keras_fpn.validation.check_inputs`.
        """
        checked = check_inputs(inputs, self.image_shape, self.takes_proposals)
        shape = ops.shape(checked["images"])
        whole = ops.cast(ops.stack([shape[1], shape[2]]), "int32")
        sizes = checked.get("image_sizes")
        if sizes is None:
            sizes = ops.broadcast_to(whole, (shape[0], 2))
        # No image is larger than its batch, so nothing is found outside of it.
        return checked | {"image_sizes": ops.clip(ops.cast(sizes, "int32"), 1, whole)}

    # === Losses ===

    def compute_losses(self, inputs, targets, training: bool = True) -> dict:
        """Returns the losses of a batch.

        Args:
            inputs: as in a call.
            targets: `{"boxes": [B, G, 4], "labels": [B, G]}` in `bounding_box_format`, padded with
                label -1. Boxes that are not finite or have no area are ignored.
            training: whether layers run in training mode and samples are drawn anew.

        Returns:
            Name in `loss_names` to a scalar: the sum over this replica's samples divided by the
            number of samples of all replicas.
        """
        raise NotImplementedError

    def compute_rpn_losses(self, proposals: Proposals, truth: GroundTruth, training: bool) -> dict:
        """Returns the losses of the first stage."""
        targets = self.rpn_targets(
            ops.concatenate([proposals.anchors[level] for level in proposals.objectness], axis=0),
            truth.boxes,
            truth.is_object,
            delta_weights=self.proposals.delta_weights,
            training=training,
        )
        return self.rpn_loss(proposals.objectness, proposals.deltas, targets)

    def compute_roi_losses(
        self, features: Mapping, boxes, scores, truth: GroundTruth, training: bool
    ) -> dict:
        """Returns the losses of the second stage for proposals, whose scores say which are real."""
        targets = self.roi_targets(
            boxes,
            scores,
            truth.boxes,
            truth.labels,
            truth.is_object,
            delta_weights=self.detections.delta_weights,
            training=training,
        )
        class_logits, deltas = self.classify_regions(features, targets["regions"], training)
        return self.roi_loss(class_logits, deltas, targets)

    def prepare_targets(self, targets, image_sizes) -> GroundTruth:
        """Returns the ground truth that `compute_losses` was given, checked and converted.

        Raises:
            ValueError: see `keras_fpn.validation.check_target_structure`.
        """
        check_target_structure(targets)
        # One more row of padding, so that a batch without any row has one to match with.
        labels = ops.pad(ops.cast(targets["labels"], "int32"), [[0, 0], [0, 1]], constant_values=-1)
        boxes = ops.pad(ops.cast(targets["boxes"], "float32"), [[0, 0], [0, 1], [0, 0]])
        boxes = convert_boxes(boxes, self.bounding_box_format, "xyxy", image_sizes)
        is_object = real_objects(boxes, labels)
        return GroundTruth(ops.where(is_object[..., None], boxes, 0.0), labels, is_object)

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ) -> Tensor:
        """Returns the total loss of this replica: the weighted losses and the regularization.

        Args:
            x: inputs of `compute_losses`.
            y: targets of `compute_losses`.
            y_pred: the losses that `compute_losses` returned.
            sample_weight: not supported.
            training: as in `compute_losses`.
        """
        weights = self.loss_weights or {}
        total = sum(loss * weights.get(name, 1.0) for name, loss in y_pred.items())
        return total + sum(self.losses) / num_replicas()

    # === Training ===

    def compile(
        self,
        optimizer="rmsprop",
        *,
        loss_weights: Mapping[str, float] | None = None,
        loss=None,
        metrics=None,
        weighted_metrics=None,
        **kwargs,
    ):
        """Configures the model for training.

        Args:
            optimizer: a `keras.optimizers.Optimizer`, or its name.
            loss_weights: weights of the losses in the total loss, by their names in `loss_names`;
                1 for those that are not given. Defaults to None, 1 for all.
            loss: not supported: the losses are the model's own.
            metrics: not supported.
            weighted_metrics: not supported.
            **kwargs: `run_eagerly`, `steps_per_execution`, `jit_compile`, `auto_scale_loss`, as in
                `keras.Model.compile`.

        Raises:
            ValueError: if `loss` or metrics are given, or for weights of unknown losses.
        """
        refused = {"loss": loss, "metrics": metrics, "weighted_metrics": weighted_metrics}
        for argument, value in refused.items():
            if value:
                raise ValueError(
                    f"{type(self).__name__} computes its own losses {', '.join(self.loss_names)} "
                    f"and takes no `{argument}`; received {value!r}."
                )
        for loss_name, weight in (loss_weights or {}).items():
            if loss_name not in self.loss_names:
                raise ValueError(
                    f"`loss_weights` must have keys among {', '.join(self.loss_names)}; received "
                    f"{loss_name!r}{did_you_mean(loss_name, self.loss_names)}"
                )
            if not 0 <= weight < float("inf"):
                raise ValueError(
                    f"`loss_weights` must be finite and >= 0; received {weight!r} for "
                    f"{loss_name!r}."
                )
        super().compile(optimizer, **kwargs)
        self.loss_weights = None if loss_weights is None else dict(loss_weights)

    def get_compile_config(self) -> dict:
        config = super().get_compile_config()
        return config and {**config, "loss_weights": self.loss_weights}

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def fit(
        self, x=None, y=None, *args, validation_data=None, initial_step: int = 0, **kwargs
    ) -> keras.callbacks.History:
        """Trains as `keras.Model.fit` does, after checking the data.

        It works under `tf.distribute.MultiWorkerMirroredStrategy` too, every worker calling it.

        Args:
            x: images, `{"images", "image_sizes"}`, or a `tf.data.Dataset` of `(images, targets)`.
            y: targets, `{"boxes": [B, G, 4], "labels": [B, G]}`, where `x` is in memory.
            validation_data: `(x, y)`, or a data set.
            initial_step: number of steps of the first epoch that an earlier run has taken. They
                are skipped, with empty logs and without reading data. Defaults to 0.
            *args: as in `keras.Model.fit`.
            **kwargs: as in `keras.Model.fit`.

        Raises:
            ValueError, TypeError: for data that cannot be right (see `keras_fpn.validation`), and
                for sample or class weights, which are not supported.
            NotImplementedError: on another backend than TensorFlow.
        """
        _require_tensorflow()
        _refuse_weights(kwargs)
        check_training_data(self, x, y)
        if isinstance(validation_data, tuple):
            check_training_data(self, *validation_data)
        elif validation_data is not None:
            check_training_data(self, validation_data, None)
        self._steps_to_skip = initial_step
        return super().fit(x, y, *args, validation_data=validation_data, **kwargs)

    def evaluate(self, x=None, y=None, *args, **kwargs) -> Any:
        """Computes the losses as `keras.Model.evaluate` does; `x` and `y` are as in `fit`.

        Raises:
            ValueError, TypeError: for another structure; for weights, as in `fit`.
        """
        _refuse_weights(kwargs)
        check_structure(self, x, y)
        return super().evaluate(x, y, *args, **kwargs)

    def train_on_batch(self, x, y=None, **kwargs) -> Any:
        """Takes a step as `keras.Model.train_on_batch` does; errors as in `evaluate`."""
        _refuse_weights(kwargs)
        check_structure(self, x, y)
        return super().train_on_batch(x, y, **kwargs)

    def test_on_batch(self, x, y=None, **kwargs) -> Any:
        """Computes losses as `keras.Model.test_on_batch` does; errors as in `evaluate`."""
        _refuse_weights(kwargs)
        check_structure(self, x, y)
        return super().test_on_batch(x, y, **kwargs)

    @property
    def last_step(self) -> dict[str, float]:
        """Values of the last training step, over all replicas; empty before the first.

        `loss` and the losses of this step alone (the logs are means over the epoch),
        `gradient_norm` before clipping, and what stages monitor (`keras_fpn.monitoring`):
        `rpn_positives` and `roi_positives`, the fractions of positives among the samples.
        """
        return {name: float(value) for name, value in self._last_step.items()}

    @property
    def metrics(self) -> list:
        others = [m for m in super().metrics if m is not self._loss_tracker]
        return [*self.loss_metrics, *(m for m in others if m not in self.loss_metrics)]

    def update_loss_metrics(self, losses: Mapping, batch_size) -> dict:
        """Updates the means over the epoch with the losses of a step; returns the logs.

        Args:
            losses: "loss" and the names in `loss_names` to scalars, over all replicas.
            batch_size: images of this replica.
        """
        for metric in self.loss_metrics:
            metric.update_state(losses[metric.name], sample_weight=batch_size)
        return self.get_metrics_result()

    def train_step(self, data) -> dict:
        _require_tensorflow()
        from keras_fpn import tensorflow_step

        return tensorflow_step.train_step(self, data)

    def test_step(self, data) -> dict:
        _require_tensorflow()
        from keras_fpn import tensorflow_step

        return tensorflow_step.test_step(self, data)

    def make_train_function(self, force=False):
        if self.train_function is not None and not force:
            return
        from keras_fpn import tensorflow_step

        steps = tensorflow_step.function_of_iterator(self, self.train_step)

        def train_function(iterator):
            skipped = min(self._steps_to_skip, self.steps_per_execution)
            self._steps_to_skip -= skipped
            if skipped == self.steps_per_execution:
                return {}
            logs, self._last_step = steps(iterator, self.steps_per_execution - skipped)
            return logs

        self.train_function = train_function

    def make_test_function(self, force=False):
        if self.test_function is not None and not force:
            return
        from keras_fpn import tensorflow_step

        steps = tensorflow_step.function_of_iterator(self, self.test_step)
        self.test_function = lambda iterator: steps(iterator, self.steps_per_execution)[0]

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        # Under a strategy, Keras builds from a batch reduced over the replicas, which fails on
        # several workers. This model is built; only the optimizer's variables are missing.
        if self.optimizer is not None and not self.optimizer.built:
            with self.distribute_strategy.scope():
                self.optimizer.build(self.trainable_variables)

    # === Saving ===

    def get_config(self) -> dict:
        config = {
            stage: keras.saving.serialize_keras_object(getattr(self, stage))
            for stage in self.stage_names
        }
        return config | {
            "image_shape": self.image_shape,
            "class_names": self.class_names,
            "name": self.name,
            "trainable": self.trainable,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None) -> "Detector":
        stages = {
            stage: keras.saving.deserialize_keras_object(
                config[stage], custom_objects=custom_objects
            )
            for stage in cls.stage_names
            if stage in config
        }
        return cls(**config | stages)

    def save_weights(self, filepath, *args, **kwargs) -> None:
        """Saves the weights as `keras.Model.save_weights` does, with a checksum in `.weights.h5`.

        Shards and files that are not local have none.
        """
        from keras_fpn.weights.h5_files import add_checksum

        super().save_weights(filepath, *args, **kwargs)
        if os.path.isfile(filepath):
            add_checksum(filepath)

    def load_weights(self, filepath, *args, **kwargs) -> None:
        """Loads weights as `keras.Model.load_weights` does, if they have not been damaged.

        The checksum of a `.weights.h5` is compared, and a warning says if it has none.

        Raises:
            ValueError: if the file is damaged.
        """
        from keras_fpn.weights.h5_files import check_h5_file

        if str(filepath).endswith(".weights.h5") and os.path.isfile(filepath):
            check_h5_file(filepath)
        super().load_weights(filepath, *args, **kwargs)

    def export(self, filepath, *args, **kwargs) -> None:
        """Exports `functional_model` as `keras.Model.export` does: any format, no call needed."""
        model = self.functional_model()
        model(model.input)  # Keras's ONNX exporter requires a model that has been called.
        model.export(filepath, *args, **kwargs)

    def inference_copy(self) -> "Detector":
        """Returns an uncompiled copy with the same weights, without the optimizer's state."""
        copy = type(self).from_config(self.get_config())
        copy.set_weights(self.get_weights())
        return copy


def _refuse_weights(kwargs):
    for argument in ("sample_weight", "class_weight"):
        if kwargs.get(argument) is not None:
            raise ValueError(f"`{argument}` is not supported; received one.")


def _require_tensorflow():
    if keras.backend.backend() != "tensorflow":
        raise NotImplementedError(
            "fit() and evaluate() need the TensorFlow backend; received the "
            f"{keras.backend.backend()} backend, which can call and predict."
        )
