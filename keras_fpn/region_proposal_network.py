"""The RPN alone (FPN, section 4.1): class-agnostic proposals on the feature pyramid."""

import keras

from keras_fpn.detector import Detector


@keras.saving.register_keras_serializable("keras_fpn")
class RegionProposalNetwork(Detector):
    """The region proposal network on a feature pyramid.

    `keras_fpn.build_fpn_rpn` builds one from numbers; this constructor takes the stages. Inputs and
    ground truth are those of `FasterRCNN`; labels other than -1 are all objects. It returns
    `{"boxes": [B, P, 4], "scores": [B, P]}`, xyxy pixels of the batch and objectness probabilities,
    sorted by score and padded with zero boxes of score -1.

    Args:
        preprocessing: `ImageNormalizer`.
        backbone: model from images to `{"C2": [B, H/4, W/4, C], ...}`.
        pyramid: `FeaturePyramid`.
        rpn_head: `RPNHead`.
        anchors: `AnchorGenerator`.
        proposals: `ProposalGenerator`.
        rpn_targets: `RPNTargets`.
        rpn_loss: `RPNLoss`.
        **kwargs: as in `Detector`.
    """

    stage_names = (
        "preprocessing",
        "backbone",
        "pyramid",
        "rpn_head",
        "anchors",
        "proposals",
        "rpn_targets",
        "rpn_loss",
    )
    loss_names = ("objectness_loss", "rpn_box_loss")
    num_classes = None
    bounding_box_format = "xyxy"

    def compute_outputs(self, images, image_sizes, training=None) -> dict:
        images, features = self.extract_features(images, image_sizes, training)
        proposals = self.propose_regions(images, features, image_sizes, training)
        return {"boxes": proposals.boxes, "scores": proposals.scores}

    def compute_losses(self, inputs, targets, training: bool = True) -> dict:
        inputs = self.prepare_inputs(inputs)
        truth = self.prepare_targets(targets, inputs["image_sizes"])
        images, features = self.extract_features(**inputs, training=training)
        proposals = self.propose_regions(images, features, inputs["image_sizes"], training)
        return self.compute_rpn_losses(proposals, truth, training)
