"""Faster R-CNN on a feature pyramid (FPN, section 4.2): the stages, in their order."""

import keras

from keras_fpn.detector import Detector


@keras.saving.register_keras_serializable("keras_fpn")
class FasterRCNN(Detector):
    """Faster R-CNN with a feature pyramid, trained end to end.

    `keras_fpn.build_fpn_faster_rcnn` builds one from numbers; this constructor takes the stages.

    Call it on `images`, `[B, H, W, 3]` RGB pixels in 0..255 of any numeric dtype, or on
    `{"images", "image_sizes"}` if the batch is padded at the bottom and the right; `image_sizes`,
    `[B, 2]`, holds the height and width of each image inside it. It returns `{"boxes": [B, D, 4],
    "scores": [B, D], "labels": [B, D], "num_detections": [B]}`, sorted by score and padded with
    label -1.

    `fit` takes batches of `(images, {"boxes": [B, G, 4], "labels": [B, G]})`, labels in
    0..num_classes-1, padded with label -1, and needs the TensorFlow backend. `compile` takes the
    optimizer and, optionally, `loss_weights`; the losses are the model's own. Boxes are in
    `bounding_box_format`, that of `detections`; `rel_` formats are relative to each image's own
    size, without padding.

    Args:
        preprocessing: `ImageNormalizer`.
        backbone: model from images to `{"C2": [B, H/4, W/4, C], ...}`.
        pyramid: `FeaturePyramid`.
        rpn_head: `RPNHead`.
        anchors: `AnchorGenerator`.
        proposals: `ProposalGenerator`.
        roi_pooling: `PyramidRoIAlign`.
        box_head: `BoxHead`.
        detections: `DetectionGenerator`.
        rpn_targets: `RPNTargets`.
        rpn_loss: `RPNLoss`.
        roi_targets: `RoITargets`.
        roi_loss: `RoILoss`.
        **kwargs: as in `Detector`.
    """

    stage_names = (
        "preprocessing",
        "backbone",
        "pyramid",
        "rpn_head",
        "anchors",
        "proposals",
        "roi_pooling",
        "box_head",
        "detections",
        "rpn_targets",
        "rpn_loss",
        "roi_targets",
        "roi_loss",
    )
    loss_names = ("objectness_loss", "rpn_box_loss", "class_loss", "box_loss")

    @property
    def num_classes(self) -> int:
        return self.box_head.num_classes

    @property
    def bounding_box_format(self) -> str:
        return self.detections.bounding_box_format

    def compute_outputs(self, images, image_sizes, training=None) -> dict:
        images, features = self.extract_features(images, image_sizes, training)
        proposals = self.propose_regions(images, features, image_sizes, training)
        class_logits, deltas = self.classify_regions(features, proposals.boxes, training)
        return self.detections(class_logits, deltas, proposals.boxes, proposals.scores, image_sizes)

    def compute_losses(self, inputs, targets, training: bool = True) -> dict:
        inputs = self.prepare_inputs(inputs)
        truth = self.prepare_targets(targets, inputs["image_sizes"])
        images, features = self.extract_features(**inputs, training=training)
        proposals = self.propose_regions(images, features, inputs["image_sizes"], training)
        return {
            **self.compute_rpn_losses(proposals, truth, training),
            **self.compute_roi_losses(features, proposals.boxes, proposals.scores, truth, training),
        }
