"""One function from numbers to a detector."""

import math
import numbers
import os
from collections.abc import Sequence

import keras
import numpy as np

from keras_fpn.anchors import AnchorGenerator
from keras_fpn.backbones import resolve_backbone
from keras_fpn.box_head import BoxHead
from keras_fpn.boxes import check_box_format
from keras_fpn.detections import DetectionGenerator
from keras_fpn.faster_rcnn import FasterRCNN
from keras_fpn.images import ImageNormalizer
from keras_fpn.proposals import ProposalGenerator
from keras_fpn.pyramid import FeaturePyramid
from keras_fpn.roi_pooling import PyramidRoIAlign
from keras_fpn.rpn import RPNHead
from keras_fpn.targets import RoITargets, RPNTargets
from keras_fpn.weights import load_backbone_weights


def build_fpn_faster_rcnn(
    num_classes: int = 80,
    backbone: str | keras.Model = "resnet50",
    backbone_weights: str | os.PathLike | None = None,
    image_shape: Sequence[int | None] = (None, None, 3),
    bounding_box_format: str = "xyxy",
    score_threshold: float = 0.05,
    nms_iou_threshold: float = 0.5,
    max_detections: int = 100,
    *,
    normalization: str | None = None,
    norm_epsilon: float = 1e-5,
    frozen_stages: int | None = None,
    stride_in_1x1: bool = False,
    pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
    pixel_std: Sequence[float] = (58.395, 57.12, 57.375),
    size_divisor: int = 32,
    pyramid_channels: int = 256,
    anchor_sizes: Sequence[int] = (32, 64, 128, 256, 512),
    anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    rpn_pre_nms: int = 1000,
    rpn_post_nms: int = 1000,
    rpn_training_pre_nms: int = 2000,
    rpn_training_post_nms: int = 2000,
    rpn_nms_iou_threshold: float = 0.7,
    rpn_min_size: float = 1e-3,
    rpn_positive_iou: float = 0.7,
    rpn_negative_iou: float = 0.3,
    rpn_samples: int = 256,
    rpn_positive_fraction: float = 0.5,
    rpn_delta_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    roi_canonical_level: int = 4,
    roi_canonical_size: float = 224.0,
    roi_output_size: int = 7,
    roi_sampling_ratio: int = 2,
    roi_positive_iou: float = 0.5,
    roi_samples: int = 512,
    roi_positive_fraction: float = 0.25,
    roi_delta_weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
    head_hidden_dim: int = 1024,
    max_log_scale: float = math.log(1000.0 / 16),
    min_detection_size: float = 1e-2,
    smooth_l1_beta: float = 1.0 / 9,
    seed: int | None = None,
    name: str = "fpn_faster_rcnn",
) -> FasterRCNN:
    """Builds Faster R-CNN on a feature pyramid (Lin et al., CVPR 2017).

    The defaults are those of torchvision's `fasterrcnn_resnet50_fpn`. All sizes are in pixels of
    the batch that the model is given.

    Args:
        num_classes: without the background.
        backbone: "resnet18", "resnet34", "resnet50", "resnet101" or "resnet152"; or a
            `keras.Model` with outputs C2..C5; or a keras-hub, keras-cv or keras.applications
            model (see `keras_fpn.backbones.resolve_backbone`). One that rescales pixels itself
            wants `pixel_mean=(0, 0, 0)` and `pixel_std=(1, 1, 1)`.
        backbone_weights: file of weights for a backbone given by name: a torchvision ResNet state
            dict (`.npz`, `.pth`). None starts from random weights.
        image_shape: height, width (None for any) and 3.
        bounding_box_format: of ground truth and detections: "xyxy", "yxyx", "xywh",
            "center_xywh", "center_yxhw", or one of these after "rel_".
        score_threshold: a detection's score is over this.
        nms_iou_threshold: detections of a class that overlap by more than this compete.
        max_detections: an image keeps this many.
        normalization: of a backbone given by name: "frozen_batch_norm" (the default with
            `backbone_weights`), "batch_norm" (the default without), "sync_batch_norm" or
            "group_norm".
        norm_epsilon: of that normalisation.
        frozen_stages: how many of stem, C2, C3, C4, C5 stay fixed in training: 2 by default with
            `backbone_weights`, 0 without.
        stride_in_1x1: whether bottlenecks stride in their first 1x1 convolution (ResNet v1)
            instead of the 3x3 (v1.5).
        pixel_mean: subtracted from R, G, B in 0..255.
        pixel_std: R, G, B are divided by this.
        size_divisor: batches are padded to a multiple of this.
        pyramid_channels: of P2..P6 and the RPN's convolution.
        anchor_sizes: of P2, P3, ..., one for each C and one for the level above.
        anchor_ratios: height to width.
        rpn_pre_nms: anchors a level before NMS, in inference.
        rpn_post_nms: proposals an image, in inference.
        rpn_training_pre_nms: anchors a level before NMS, in training.
        rpn_training_post_nms: proposals an image, in training.
        rpn_nms_iou_threshold: proposals of a level that overlap by more than this compete.
        rpn_min_size: proposals with a side under this are dropped.
        rpn_positive_iou: an anchor is positive from this overlap with an object on.
        rpn_negative_iou: an anchor is negative under this overlap with every object.
        rpn_samples: anchors an image in the RPN's losses.
        rpn_positive_fraction: the largest share of positives among them.
        rpn_delta_weights: what the RPN's (dx, dy, dw, dh) are multiplied by.
        roi_canonical_level: k0 of Eqn. 1.
        roi_canonical_size: the size of a region on level k0.
        roi_output_size: bins on a side of a pooled region.
        roi_sampling_ratio: points on a side of each bin.
        roi_positive_iou: a region belongs to an object from this overlap on.
        roi_samples: regions an image in the box head's losses.
        roi_positive_fraction: the largest share of positives among them.
        roi_delta_weights: what the box head's (dx, dy, dw, dh) are multiplied by.
        head_hidden_dim: of the box head's two hidden layers.
        max_log_scale: predicted dw and dh count as at most this.
        min_detection_size: detections with a side under this are dropped.
        smooth_l1_beta: of both box losses; 0 is plain L1.
        seed: of the samplers; None for a random one. Initial weights follow
            `keras.utils.set_random_seed`.
        name: of the model.

    Returns:
        A `FasterRCNN`, to be compiled with an optimizer for training.

    Raises:
        ValueError: for an argument out of range, an unknown backbone, or weights that do not fit.
        FileNotFoundError: where `backbone_weights` is no file.
    """
    check_box_format(bounding_box_format)
    _check_positive_integers(
        num_classes=num_classes,
        max_detections=max_detections,
        pyramid_channels=pyramid_channels,
        rpn_pre_nms=rpn_pre_nms,
        rpn_post_nms=rpn_post_nms,
        rpn_training_pre_nms=rpn_training_pre_nms,
        rpn_training_post_nms=rpn_training_post_nms,
        rpn_samples=rpn_samples,
        roi_samples=roi_samples,
        roi_output_size=roi_output_size,
        roi_sampling_ratio=roi_sampling_ratio,
        head_hidden_dim=head_hidden_dim,
        size_divisor=size_divisor,
    )
    _check_fractions(
        score_threshold=score_threshold,
        nms_iou_threshold=nms_iou_threshold,
        rpn_nms_iou_threshold=rpn_nms_iou_threshold,
        rpn_positive_iou=rpn_positive_iou,
        rpn_negative_iou=rpn_negative_iou,
        rpn_positive_fraction=rpn_positive_fraction,
        roi_positive_iou=roi_positive_iou,
        roi_positive_fraction=roi_positive_fraction,
    )
    if rpn_negative_iou > rpn_positive_iou:
        raise ValueError(
            f"`rpn_negative_iou` is at most `rpn_positive_iou`; received {rpn_negative_iou} over "
            f"{rpn_positive_iou}."
        )
    if smooth_l1_beta < 0:
        raise ValueError(f"`smooth_l1_beta` is 0 or more; received {smooth_l1_beta}.")
    if min(*anchor_sizes, *anchor_ratios) <= 0:
        raise ValueError(
            "`anchor_sizes` and `anchor_ratios` are over 0; received "
            f"{tuple(anchor_sizes)} and {tuple(anchor_ratios)}."
        )
    if np.shape(image_shape) != (3,) or image_shape[-1] != 3:
        raise ValueError(
            "`image_shape` is (height, width, 3), height and width None for any; received "
            f"{image_shape!r}."
        )
    padded_shape = [
        None if size is None else size + -size % size_divisor for size in image_shape[:2]
    ]
    bottom_up = resolve_backbone(
        backbone,
        normalization=normalization,
        frozen_stages=frozen_stages,
        pretrained=backbone_weights is not None,
        stride_in_1x1=stride_in_1x1,
        norm_epsilon=norm_epsilon,
        image_shape=(*padded_shape, 3),
    )
    if backbone_weights is not None:
        load_backbone_weights(bottom_up, backbone_weights)
    numbers = sorted(int(level[1:]) for level in bottom_up.output)
    levels = [f"P{number}" for number in (*numbers, numbers[-1] + 1)]
    if len(anchor_sizes) != len(levels):
        raise ValueError(
            f"`anchor_sizes` has one size for each of {', '.join(levels)}; received "
            f"{tuple(anchor_sizes)}."
        )
    anchors_per_location = len(tuple(anchor_ratios))
    return FasterRCNN(
        image_normalizer=ImageNormalizer(
            pixel_mean, pixel_std, size_divisor, name="image_normalizer"
        ),
        backbone=bottom_up,
        feature_pyramid=FeaturePyramid(pyramid_channels, name="feature_pyramid"),
        rpn_head=RPNHead(anchors_per_location, pyramid_channels, name="rpn_head"),
        anchor_generator=AnchorGenerator(
            dict(zip(levels, anchor_sizes, strict=True)), anchor_ratios, name="anchor_generator"
        ),
        proposal_generator=ProposalGenerator(
            rpn_pre_nms,
            rpn_post_nms,
            rpn_training_pre_nms,
            rpn_training_post_nms,
            rpn_nms_iou_threshold,
            rpn_delta_weights,
            max_log_scale,
            rpn_min_size,
            name="proposal_generator",
        ),
        roi_pooling=PyramidRoIAlign(
            roi_output_size,
            roi_sampling_ratio,
            roi_canonical_level,
            roi_canonical_size,
            name="roi_pooling",
        ),
        box_head=BoxHead(num_classes, head_hidden_dim, name="box_head"),
        detection_generator=DetectionGenerator(
            score_threshold,
            nms_iou_threshold,
            max_detections,
            roi_delta_weights,
            max_log_scale,
            min_detection_size,
            bounding_box_format,
            name="detection_generator",
        ),
        rpn_targets=RPNTargets(
            rpn_positive_iou,
            rpn_negative_iou,
            rpn_samples,
            rpn_positive_fraction,
            rpn_delta_weights,
            seed,
            name="rpn_targets",
        ),
        roi_targets=RoITargets(
            roi_positive_iou,
            roi_samples,
            roi_positive_fraction,
            roi_delta_weights,
            None if seed is None else seed + 1,
            name="roi_targets",
        ),
        smooth_l1_beta=smooth_l1_beta,
        image_shape=image_shape,
        name=name,
    )


def _check_positive_integers(**values):
    for name, value in values.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` is a whole number of at least 1; received {value!r}.")


def _check_fractions(**values):
    for name, value in values.items():
        if not isinstance(value, numbers.Real) or not 0 <= value <= 1:
            raise ValueError(f"`{name}` is within 0..1; received {value!r}.")
