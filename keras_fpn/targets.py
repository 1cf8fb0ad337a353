"""Training targets of the RPN and the box head: matching, sampling, encoding."""

import keras
from keras import ops

from keras_fpn.boxes import encode_deltas
from keras_fpn.matcher import match
from keras_fpn.ranking import take_rows
from keras_fpn.sampler import draw_samples
from keras_fpn.stage import Float32Stage
from keras_fpn.validation import check_fraction, check_int


class _SamplingStage(Float32Stage):
    """A stage that samples; the state of its random generator is saved with the model."""

    def __init__(self, num_samples, positive_fraction, seed, **kwargs):
        super().__init__(**kwargs)
        self.num_samples = check_int("num_samples", num_samples)
        self.positive_fraction = check_fraction("positive_fraction", positive_fraction)
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def save_own_variables(self, store):
        super().save_own_variables(store)
        store["seed_generator_state"] = ops.convert_to_numpy(self.seed_generator.state)

    def load_own_variables(self, store):
        self.seed_generator.state.assign(store["seed_generator_state"])


@keras.saving.register_keras_serializable("keras_fpn")
class RPNTargets(_SamplingStage):
    """Samples anchors and computes their targets (FPN, section 4.1).

    Args:
        positive_iou: anchors are positive if their IoU with an object is at least this; so are the
            best anchors of every object. Defaults to 0.7.
        negative_iou: anchors are negative if their IoU with every object is below this. Defaults
            to 0.3.
        num_samples: anchors per image. Defaults to 256.
        positive_fraction: largest fraction of positives among them. Defaults to 0.5.
        seed: seed of the sampling. Defaults to None, a random one.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        positive_iou: float = 0.7,
        negative_iou: float = 0.3,
        num_samples: int = 256,
        positive_fraction: float = 0.5,
        seed: int | None = None,
        **kwargs,
    ):
        super().__init__(num_samples, positive_fraction, seed, **kwargs)
        self.positive_iou = check_fraction("positive_iou", positive_iou)
        self.negative_iou = check_fraction("negative_iou", negative_iou)
        if negative_iou > positive_iou:
            raise ValueError(
                f"`negative_iou` must be at most `positive_iou`; received {negative_iou} and "
                f"{positive_iou}."
            )

    def call(self, anchors, boxes, is_object, delta_weights, training=True) -> dict:
        """Returns the targets of sampled anchors.

        Args:
            anchors: `[N, 4]` of all levels, xyxy pixels.
            boxes: `[B, G, 4]` ground truth; zeros where `is_object` is false.
            is_object: `[B, G]` bool.
            delta_weights: weights of (dx, dy, dw, dh), those of the `ProposalGenerator`.
            training: whether to draw new samples at every call; validation draws the same ones.

        Returns:
            `{"indices": [B, S], "positive": [B, S], "sampled": [B, S], "deltas": [B, S, 4]}`:
            rows of `anchors`, masks, and targets that count where positive.
        """
        matched, is_positive, is_negative = match(
            anchors[None],
            boxes,
            is_object,
            self.positive_iou,
            self.negative_iou,
            keep_best_of_each_object=True,
        )
        indices, positive, sampled = draw_samples(
            is_positive,
            is_negative,
            self.num_samples,
            self.positive_fraction,
            self.seed_generator if training else 0,
        )
        sampled_boxes = take_rows(boxes, take_rows(matched, indices))
        sampled_anchors = ops.take(anchors, indices, axis=0)
        return {
            "indices": indices,
            "positive": positive,
            "sampled": sampled,
            "deltas": encode_deltas(sampled_boxes, sampled_anchors, delta_weights),
        }


@keras.saving.register_keras_serializable("keras_fpn")
class RoITargets(_SamplingStage):
    """Samples regions for the box head and computes their targets (Fast R-CNN, section 2.3).

    The ground truth is added to the proposals, so that there are positives from the first step on.

    Args:
        positive_iou: regions are positive if their largest IoU with an object is at least this,
            and background otherwise. Defaults to 0.5.
        num_samples: regions per image. Defaults to 512.
        positive_fraction: largest fraction of positives among them. Defaults to 0.25.
        seed: seed of the sampling. Defaults to None, a random one.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        positive_iou: float = 0.5,
        num_samples: int = 512,
        positive_fraction: float = 0.25,
        seed: int | None = None,
        **kwargs,
    ):
        super().__init__(num_samples, positive_fraction, seed, **kwargs)
        self.positive_iou = check_fraction("positive_iou", positive_iou)

    def call(
        self, proposals, scores, boxes, labels, is_object, delta_weights, training=True
    ) -> dict:
        """Returns the targets of sampled regions.

        Args:
            proposals: `[B, P, 4]` xyxy pixels.
            scores: `[B, P]`, negative where there is no proposal.
            boxes: `[B, G, 4]` ground truth; zeros where `is_object` is false.
            labels: `[B, G]` int32.
            is_object: `[B, G]` bool.
            delta_weights: weights of (dx, dy, dw, dh), those of the `DetectionGenerator`.
            training: whether to draw new samples at every call; validation draws the same ones.

        Returns:
            `{"regions": [B, S, 4], "labels": [B, S], "positive": [B, S], "sampled": [B, S],
            "deltas": [B, S, 4]}`: labels are -1 for the background, deltas count where positive.
        """
        regions = ops.concatenate([proposals, boxes], axis=1)
        present = ops.concatenate([scores >= 0, is_object], axis=1)
        matched, is_positive, is_negative = match(
            regions,
            boxes,
            is_object,
            self.positive_iou,
            self.positive_iou,
            keep_best_of_each_object=False,
        )
        indices, positive, sampled = draw_samples(
            ops.logical_and(is_positive, present),
            ops.logical_and(is_negative, present),
            self.num_samples,
            self.positive_fraction,
            self.seed_generator if training else 0,
        )
        regions = take_rows(regions, indices)
        objects = take_rows(matched, indices)
        return {
            "regions": regions,
            "labels": ops.where(positive, take_rows(labels, objects), -1),
            "positive": positive,
            "sampled": sampled,
            "deltas": encode_deltas(take_rows(boxes, objects), regions, delta_weights),
        }

    def get_config(self) -> dict:
        config = super().get_config()
        config.update(positive_iou=self.positive_iou)
        return config
