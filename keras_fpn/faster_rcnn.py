"""Faster R-CNN on a feature pyramid: the stages put together, and how they are trained."""

from collections.abc import Sequence

import keras
from keras import ops

from keras_fpn.boxes import convert_boxes
from keras_fpn.losses import box_loss, classification_loss, objectness_loss
from keras_fpn.matcher import real_objects
from keras_fpn.ranking import take_rows
from keras_fpn.replicas import expect_summed_gradients, num_replicas, sum_over_replicas
from keras_fpn.validation import check_images, check_target_structure, check_training_data

LOSS_NAMES = ("objectness_loss", "rpn_box_loss", "class_loss", "box_loss")


@keras.saving.register_keras_serializable("keras_fpn")
class FasterRCNN(keras.Model):
    """A functional model from a batch of images to their detections, trained end to end.

    `keras_fpn.build_fpn_faster_rcnn` makes one from numbers; this constructor takes the stages.

    Call it on `images`, `[B, H, W, 3]` RGB pixels in 0..255 of any number dtype, or on
    `{"images", "image_sizes"}` where the batch is padded at the bottom and the right and
    `image_sizes`, `[B, 2]`, holds height and width of each image inside it. It returns
    `{"boxes": [B, D, 4], "scores": [B, D], "labels": [B, D], "num_detections": [B]}`, sorted by
    score and padded with label -1.

    `fit` takes batches of `(images, {"boxes": [B, G, 4], "labels": [B, G]})`, labels in
    0..num_classes-1, rows padded with label -1, and needs the TensorFlow backend. `compile` takes
    the optimizer; the losses are the model's own. Boxes are in `bounding_box_format`, that of the
    `detection_generator`; `rel_` formats are relative to each image's own size, without padding.

    Args:
        image_normalizer: `ImageNormalizer`.
        backbone: model from images to `{"C2": [B, H/4, W/4, C], ...}`.
        feature_pyramid: `FeaturePyramid`.
        rpn_head: `RPNHead`.
        anchor_generator: `AnchorGenerator`.
        proposal_generator: `ProposalGenerator`.
        roi_pooling: `PyramidRoIAlign`.
        box_head: `BoxHead`.
        detection_generator: `DetectionGenerator`.
        rpn_targets: `RPNTargets`.
        roi_targets: `RoITargets`.
        smooth_l1_beta: of both box losses; 0 is plain L1.
        image_shape: height, width (None for any) and 3.
        class_names: the name of every label, or None.
    """

    def __init__(
        self,
        image_normalizer: keras.layers.Layer,
        backbone: keras.Model,
        feature_pyramid: keras.layers.Layer,
        rpn_head: keras.layers.Layer,
        anchor_generator: keras.layers.Layer,
        proposal_generator: keras.layers.Layer,
        roi_pooling: keras.layers.Layer,
        box_head: keras.layers.Layer,
        detection_generator: keras.layers.Layer,
        rpn_targets: keras.layers.Layer,
        roi_targets: keras.layers.Layer,
        smooth_l1_beta: float = 1.0 / 9,
        image_shape: Sequence[int | None] = (None, None, 3),
        class_names: Sequence[str] | None = None,
        **kwargs,
    ):
        if class_names is not None and len(class_names) != box_head.num_classes:
            raise ValueError(
                f"`class_names` has a name for each of the {box_head.num_classes} classes; "
                f"received {len(class_names)} names."
            )
        # === Functional Model ===
        images = keras.Input(image_shape, name="images")
        image_sizes = keras.Input((2,), dtype="int32", name="image_sizes")
        normalized = image_normalizer(images, image_sizes)
        pyramid = feature_pyramid(backbone(normalized))
        objectness, deltas = rpn_head(pyramid)
        anchors = anchor_generator(normalized, pyramid)
        proposals, scores = proposal_generator(objectness, deltas, anchors, image_sizes)
        pooled = roi_pooling(_without_coarsest(pyramid), proposals)
        class_logits, box_deltas = box_head(pooled)
        detections = detection_generator(class_logits, box_deltas, proposals, scores, image_sizes)
        super().__init__(
            inputs={"images": images, "image_sizes": image_sizes}, outputs=detections, **kwargs
        )
        # `call` completes and checks what it is given before the graph sees it.
        self.input_spec = None

        # === Layers ===
        self.image_normalizer = image_normalizer
        self.backbone = backbone
        self.feature_pyramid = feature_pyramid
        self.rpn_head = rpn_head
        self.anchor_generator = anchor_generator
        self.proposal_generator = proposal_generator
        self.roi_pooling = roi_pooling
        self.box_head = box_head
        self.detection_generator = detection_generator
        self.rpn_targets = rpn_targets
        self.roi_targets = roi_targets
        self.total_loss_tracker = keras.metrics.Mean(name="loss")
        self.loss_trackers = [keras.metrics.Mean(name=name) for name in LOSS_NAMES]
        self._last_step = {}
        self._steps_to_pass_over = 0

        # === Config ===
        self.smooth_l1_beta = smooth_l1_beta
        self.image_shape = tuple(image_shape)
        self.class_names = None if class_names is None else tuple(class_names)

    @property
    def num_classes(self) -> int:
        return self.box_head.num_classes

    @property
    def bounding_box_format(self) -> str:
        return self.detection_generator.bounding_box_format

    @property
    def metrics(self):
        return [self.total_loss_tracker, *self.loss_trackers]

    def call(self, inputs, training=None, mask=None):
        return super().call(self._with_image_sizes(inputs), training=training)

    def compute_output_spec(self, inputs, training=None, mask=None):
        images, _ = check_images(inputs, self.image_shape)
        image_sizes = keras.KerasTensor((images.shape[0], 2), "int32")
        return super().compute_output_spec({"images": images, "image_sizes": image_sizes})

    def compute_losses(self, inputs, targets, training: bool = True) -> dict:
        """The four losses of a batch (Faster R-CNN, Eq. 1, for either stage).

        Args:
            inputs: as for a call: images, or `{"images", "image_sizes"}`.
            targets: `{"boxes": [B, G, 4], "labels": [B, G]}` in `bounding_box_format`, rows padded
                with label -1. A row whose box is not finite or has no area does not count.
            training: as layers have it; it also picks the number of proposals.

        Returns:
            Name in `LOSS_NAMES` to a scalar. Each is a sum over this batch's samples, divided by
            the number of samples of all replicas together: gradients of replicas are to be summed.
        """
        return self._losses_and_shares(inputs, targets, training)[0]

    def _losses_and_shares(self, inputs, targets, training):
        """The losses, and the share of positives among the samples of either stage."""
        check_target_structure(targets)
        inputs = self._with_image_sizes(inputs)
        image_sizes = inputs["image_sizes"]
        # One row of padding more, so that a batch without a single row has something to match with.
        labels = ops.pad(ops.cast(targets["labels"], "int32"), [[0, 0], [0, 1]], constant_values=-1)
        boxes = ops.pad(ops.cast(targets["boxes"], "float32"), [[0, 0], [0, 1], [0, 0]])
        boxes = convert_boxes(boxes, self.bounding_box_format, "xyxy", image_sizes)
        is_object = real_objects(boxes, labels)
        boxes = ops.where(is_object[..., None], boxes, 0.0)

        normalized = self.image_normalizer(inputs["images"], image_sizes)
        maps = self.backbone(normalized, training=training)
        pyramid = self.feature_pyramid(maps, training=training)
        objectness, deltas = self.rpn_head(pyramid)
        anchors = self.anchor_generator(normalized, pyramid)
        proposals, scores = self.proposal_generator(
            objectness, deltas, anchors, image_sizes, training=training
        )

        all_anchors = ops.concatenate([anchors[level] for level in objectness], axis=0)
        rpn = self.rpn_targets(all_anchors, boxes, is_object, training=training)
        logits = take_rows(_all_levels(objectness, 1)[..., 0], rpn["indices"])
        deltas = take_rows(_all_levels(deltas, 4), rpn["indices"])
        num_anchors = _count_over_replicas(rpn["sampled"])

        roi = self.roi_targets(proposals, scores, boxes, labels, is_object, training=training)
        pooled = self.roi_pooling(_without_coarsest(pyramid), roi["regions"])
        class_logits, class_deltas = self.box_head(pooled, training=training)
        class_logits = ops.cast(class_logits, "float32")
        own_class = ops.maximum(roi["labels"], 0)[..., None, None]
        box_deltas = ops.take_along_axis(ops.cast(class_deltas, "float32"), own_class, axis=2)
        num_regions = _count_over_replicas(roi["sampled"])

        losses = (
            objectness_loss(logits, rpn["positive"], rpn["sampled"], num_anchors),
            box_loss(deltas, rpn["deltas"], rpn["positive"], num_anchors, self.smooth_l1_beta),
            classification_loss(class_logits, roi["labels"], roi["sampled"], num_regions),
            box_loss(
                box_deltas[:, :, 0],
                roi["deltas"],
                roi["positive"],
                num_regions,
                self.smooth_l1_beta,
            ),
        )
        shares = {
            "rpn_positives": _number(rpn["positive"]) / num_anchors,
            "roi_positives": _number(roi["positive"]) / num_regions,
        }
        return dict(zip(LOSS_NAMES, losses, strict=True)), shares

    def fit(self, x=None, y=None, *args, validation_data=None, initial_step=0, **kwargs):
        """Trains as `keras.Model.fit` does, after a look at the data.

        It works under `tf.distribute.MultiWorkerMirroredStrategy` too, every worker calling it.

        Args:
            initial_step: steps of the first epoch that an earlier run has taken. They are passed
                over, with empty logs, and take nothing from the data.
            **kwargs: and the arguments before: as `keras.Model.fit` has them.

        Raises:
            ValueError: for data that cannot be right (see `keras_fpn.validation`), sample weights,
                or where the model was compiled with a loss.
            NotImplementedError: on another backend than TensorFlow.
        """
        _require_tensorflow()
        if self.loss is not None:
            raise ValueError(
                "FasterRCNN computes its own four losses; compile it without `loss` "
                f"(received loss={self.loss!r})."
            )
        for argument in ("sample_weight", "class_weight"):
            if kwargs.get(argument) is not None:
                raise ValueError(f"The losses take no weights; received `{argument}`.")
        check_training_data(self, x, y)
        if isinstance(validation_data, tuple):
            check_training_data(self, *validation_data)
        elif validation_data is not None:
            check_training_data(self, validation_data, None)
        self._steps_to_pass_over = initial_step
        return super().fit(x, y, *args, validation_data=validation_data, **kwargs)

    def predict(self, x, *args, **kwargs):
        """Detects as `keras.Model.predict` does; images in memory are checked first."""
        if isinstance(x, dict) or hasattr(x, "__array__"):
            check_images(x, self.image_shape)
        return super().predict(x, *args, **kwargs)

    @property
    def last_step(self) -> dict:
        """What the last training step measured, over all replicas.

        Name to scalar: `loss` and the four of `LOSS_NAMES`, of this step alone (the logs are means
        over the epoch); `rpn_positives` and `roi_positives`, the share of positives among the
        samples; `gradient_norm`, before clipping. Empty before the first step.
        """
        return {name: float(value) for name, value in self._last_step.items()}

    def train_step(self, data):
        return self._train_step(data)[0]

    def _train_step(self, data):
        """Logs of the epoch so far, and what `last_step` gives."""
        _require_tensorflow()
        import tensorflow as tf

        inputs, targets, _ = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            losses, shares = self._losses_and_shares(inputs, targets, training=True)
            total = sum(losses.values()) + sum(self.losses) / num_replicas()
            scaled = self.optimizer.scale_loss(total)
        variables = self.trainable_variables
        gradients = sum_over_replicas(tape.gradient(scaled, variables))
        scale = ops.cast(self.optimizer.scale_loss(1.0), "float32")
        norm = tf.linalg.global_norm([tf.cast(gradient, tf.float32) for gradient in gradients])
        self.optimizer.apply(gradients, variables)
        measured = self._sum_over_replicas({"loss": total, **losses, **shares})
        logs = self._update_loss_trackers(inputs, measured)
        return logs, {**measured, "gradient_norm": norm / scale}

    def test_step(self, data):
        _require_tensorflow()
        inputs, targets, _ = keras.utils.unpack_x_y_sample_weight(data)
        losses = self.compute_losses(inputs, targets, training=False)
        total = sum(losses.values()) + sum(self.losses) / num_replicas()
        return self._update_loss_trackers(
            inputs, self._sum_over_replicas({"loss": total, **losses})
        )

    def _sum_over_replicas(self, values):
        # One message for all of them.
        summed = sum_over_replicas(ops.stack([ops.cast(x, "float32") for x in values.values()]))
        return dict(zip(values, ops.unstack(summed, len(values)), strict=True))

    def _update_loss_trackers(self, inputs, losses):
        images = inputs["images"] if isinstance(inputs, dict) else inputs
        for tracker in self.metrics:
            tracker.update_state(losses[tracker.name], sample_weight=ops.shape(images)[0])
        return {tracker.name: tracker.result() for tracker in self.metrics}

    def make_train_function(self, force=False):
        if self.train_function is not None and not force:
            return
        step = self._function_of_iterator(self._train_step)

        def train_function(iterator):
            if self._steps_to_pass_over > 0:
                self._steps_to_pass_over -= 1
                return {}
            logs, self._last_step = step(iterator)
            return logs

        expect_summed_gradients(self.optimizer)
        self.train_function = train_function

    def make_test_function(self, force=False):
        if self.test_function is None or force:
            self.test_function = self._function_of_iterator(self.test_step)

    def _function_of_iterator(self, step_function):
        """A step on every replica with the next batch of an iterator, `steps_per_execution` times.

        Keras reduces what replicas return in a way that fails on several workers (its issue 20585).
        Here every replica returns what has been summed over all of them, so that any will do.
        """
        import tensorflow as tf

        strategy = self.distribute_strategy

        def step_on_replicas(data):
            outputs = strategy.run(step_function, args=(data,))
            return tf.nest.map_structure(
                lambda value: strategy.experimental_local_results(value)[0], outputs
            )

        def step_on_iterator(iterator):
            return step_on_replicas(iterator.get_next())

        if not self.run_eagerly:
            step_on_replicas = tf.function(
                step_on_replicas, reduce_retracing=True, jit_compile=self.jit_compile
            )
            step_on_iterator = tf.function(step_on_iterator, reduce_retracing=True)

        def one_step(iterator):
            # `train_on_batch` and its like give a generator.
            if hasattr(iterator, "get_next"):
                return step_on_iterator(iterator)
            return step_on_replicas(next(iterator))

        def steps(iterator):
            outputs = one_step(iterator)
            for _ in range(self.steps_per_execution - 1):
                try:
                    outputs = one_step(iterator)
                except (StopIteration, tf.errors.OutOfRangeError):
                    break
            return outputs

        return steps

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        # Under a strategy Keras builds from a batch reduced over the replicas, which fails on
        # several workers. This model is built; what is left are the optimizer's variables.
        if self.optimizer is not None and not self.optimizer.built:
            with self.distribute_strategy.scope():
                self.optimizer.build(self.trainable_variables)

    def _with_image_sizes(self, inputs):
        """Checked `{"images", "image_sizes"}`; a plain batch of images fills its whole area."""
        images, image_sizes = check_images(inputs, self.image_shape)
        shape = ops.shape(images)
        whole = ops.cast(ops.stack([shape[1], shape[2]]), "int32")
        if image_sizes is None:
            image_sizes = ops.broadcast_to(whole, (shape[0], 2))
        # No image is larger than its batch, so nothing is found outside of it.
        image_sizes = ops.clip(ops.cast(image_sizes, "int32"), 1, whole)
        return {"images": images, "image_sizes": image_sizes}

    def get_config(self):
        stages = (
            "image_normalizer",
            "backbone",
            "feature_pyramid",
            "rpn_head",
            "anchor_generator",
            "proposal_generator",
            "roi_pooling",
            "box_head",
            "detection_generator",
            "rpn_targets",
            "roi_targets",
        )
        config = {
            stage: keras.saving.serialize_keras_object(getattr(self, stage)) for stage in stages
        }
        config.update(
            smooth_l1_beta=self.smooth_l1_beta,
            image_shape=self.image_shape,
            class_names=self.class_names,
            name=self.name,
            trainable=self.trainable,
        )
        return config

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = {
            name: keras.saving.deserialize_keras_object(value, custom_objects=custom_objects)
            if isinstance(value, dict)
            else value
            for name, value in config.items()
        }
        return cls(**config)


def _require_tensorflow():
    if keras.backend.backend() != "tensorflow":
        raise NotImplementedError(
            "fit() and evaluate() need the TensorFlow backend; this is the "
            f"{keras.backend.backend()} backend, which can call and predict."
        )


def _without_coarsest(pyramid):
    # The level above the backbone's coarsest is for the RPN only (FPN, section 4.1).
    return {level: pyramid[level] for level in sorted(pyramid)[:-1]}


def _all_levels(predictions, size):
    """Predictions of all levels as `[B, N, size]` float32, in the order of the anchors."""
    flat = [ops.reshape(x, (ops.shape(x)[0], -1, size)) for x in predictions.values()]
    return ops.cast(ops.concatenate(flat, axis=1), "float32")


def _number(mask):
    return ops.sum(ops.cast(mask, "float32"))


def _count_over_replicas(mask):
    """How many entries are true on all replicas together, at least 1, as float32."""
    return ops.maximum(sum_over_replicas(_number(mask)), 1.0)
