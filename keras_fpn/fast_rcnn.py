"""Fast R-CNN on a feature pyramid (FPN, section 4.2): the second stage alone."""

import keras
from keras import ops

from keras_fpn.boxes import clip_boxes
from keras_fpn.detector import Detector

# Proposals of an image in a graph that leaves their number undefined.
MAX_PROPOSALS = 2000


@keras.saving.register_keras_serializable("keras_fpn")
class FastRCNN(Detector):
    """Fast R-CNN with a feature pyramid, on proposals of any origin.

    `keras_fpn.build_fpn_fast_rcnn` builds one from numbers; this constructor takes the stages.
    Inputs are `{"images", "image_sizes", "proposals"}`: `proposals`, `[B, P, 4]`, are xyxy pixels
    of the batch, padded with boxes without area. In a graph that leaves their number undefined,
    such as an exported one, the first 2000 of an image count. Ground truth and outputs are those of
    `FasterRCNN`.

    Args:
        preprocessing: `ImageNormalizer`.
        backbone: model from images to `{"C2": [B, H/4, W/4, C], ...}`.
        pyramid: `FeaturePyramid`.
        roi_pooling: `PyramidRoIAlign` or `PyramidRoIPool`.
        box_head: `BoxHead`.
        detections: `DetectionGenerator`.
        roi_targets: `RoITargets`.
        roi_loss: `RoILoss`.
        **kwargs: as in `Detector`.
    """

    stage_names = (
        "preprocessing",
        "backbone",
        "pyramid",
        "roi_pooling",
        "box_head",
        "detections",
        "roi_targets",
        "roi_loss",
    )
    loss_names = ("class_loss", "box_loss")
    takes_proposals = True

    @property
    def num_classes(self) -> int:
        return self.box_head.num_classes

    @property
    def bounding_box_format(self) -> str:
        return self.detections.bounding_box_format

    def compute_outputs(  # type: ignore[override]
        self, images, image_sizes, proposals, training=None
    ) -> dict:
        _, features = self.extract_features(images, image_sizes, training)
        boxes, scores = self.prepare_proposals(proposals, image_sizes)
        class_logits, deltas = self.classify_regions(features, boxes, training)
        return self.detections(class_logits, deltas, boxes, scores, image_sizes)

    def compute_losses(self, inputs, targets, training: bool = True) -> dict:
        inputs = self.prepare_inputs(inputs)
        image_sizes = inputs["image_sizes"]
        truth = self.prepare_targets(targets, image_sizes)
        _, features = self.extract_features(inputs["images"], image_sizes, training)
        boxes, scores = self.prepare_proposals(inputs["proposals"], image_sizes)
        return self.compute_roi_losses(features, boxes, scores, truth, training)

    def prepare_proposals(self, proposals, image_sizes) -> tuple:
        """Returns the proposals clipped to their images, and 1 for each with an area, else -1.

        Those without an area, or with an edge that is not a number, become zeros.
        """
        boxes = ops.cast(proposals, "float32")
        count = boxes.shape[1]
        if not count:
            # All that follows has a static shape, of at least one row.
            rows = MAX_PROPOSALS if count is None else 1
            boxes = ops.pad(boxes, [[0, 0], [0, rows], [0, 0]])
            boxes = ops.take(boxes, ops.arange(rows), axis=1)
        boxes = clip_boxes(boxes, image_sizes)
        has_area = ops.all(boxes[..., 2:] > boxes[..., :2], axis=-1)
        return ops.where(has_area[..., None], boxes, 0.0), ops.where(has_area, 1.0, -1.0)
