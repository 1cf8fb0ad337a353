"""One function from numbers to a detector."""

import functools
import inspect
import math
import numbers
import os
import warnings
from collections.abc import Callable, Sequence

import keras
import numpy as np

from keras_fpn.anchors import AnchorGenerator
from keras_fpn.backbones import resolve_backbone
from keras_fpn.box_head import BoxHead
from keras_fpn.boxes import check_box_format
from keras_fpn.detections import DetectionGenerator
from keras_fpn.faster_rcnn import FasterRCNN
from keras_fpn.preprocessing import ImageNormalizer
from keras_fpn.proposals import ProposalGenerator
from keras_fpn.pyramid import FeaturePyramid
from keras_fpn.resnet import ResNet
from keras_fpn.roi_align import PyramidRoIAlign
from keras_fpn.rpn import RPNHead
from keras_fpn.targets import RoITargets, RPNTargets
from keras_fpn.weights.pretrained import open_detector
from keras_fpn.weights.published import find_classifier
from keras_fpn.weights.torchvision import load_backbone_weights


def _follows_weights(build: Callable[..., FasterRCNN]) -> Callable[..., FasterRCNN]:
    """`build`, with what is not given taken from `weights`, and these loaded."""

    @functools.wraps(build)
    def follow(*args, **kwargs):
        given = inspect.signature(build).bind(*args, **kwargs).arguments
        if given.get("weights") is None:
            return build(*args, **kwargs)
        return _build_pretrained(**given)

    return follow


@_follows_weights
def build_fpn_faster_rcnn(
    num_classes: int | None = None,
    backbone: str | keras.Model = "resnet50",
    backbone_weights: str | os.PathLike | None = None,
    weights: str | os.PathLike | None = None,
    class_names: Sequence[str] | None = None,
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
    channel_order: str = "rgb",
    pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
    pixel_std: Sequence[float] = (58.395, 57.12, 57.375),
    size_divisor: int = 32,
    pyramid_channels: int = 256,
    pyramid_normalization: str | None = None,
    anchor_sizes: Sequence[int] = (32, 64, 128, 256, 512),
    anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    anchor_strides: Sequence[int] | None = None,
    round_anchors: bool = True,
    rpn_hidden_layers: int = 1,
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
    roi_sampling_ratio: int | None = 2,
    roi_aligned: bool = False,
    roi_positive_iou: float = 0.5,
    roi_samples: int = 512,
    roi_positive_fraction: float = 0.25,
    roi_delta_weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
    head_convolutions: int = 0,
    head_normalization: str | None = None,
    head_hidden_layers: int = 2,
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

    With `weights`, the detector is built as the weights want it: an argument that is not given
    follows them. Where they were trained for another number of classes, or for classes of other
    names, all but the layers that depend on the classes is loaded, and a warning names what starts
    fresh: `build_fpn_faster_rcnn(num_classes=3, weights="coco")` is ready for
    fine-tuning.

    Args:
        num_classes: without the background. By default as many as `class_names` or else the
            `weights` have, and 80 without either.
        backbone: "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d"
            or "resnext101_32x8d"; or a `keras.Model` with outputs C2..C5; or a keras-hub, keras-cv
            or keras.applications model (see `keras_fpn.backbones.resolve_backbone`). One that
            rescales pixels itself wants `pixel_mean=(0, 0, 0)` and `pixel_std=(1, 1, 1)`.
        backbone_weights: for a backbone given by name: "imagenet" (torchvision's IMAGENET1K_V1) or
            a file of a torchvision ResNet's state dict. None starts from random weights.
        weights: of the whole detector: "coco" (torchvision's `fasterrcnn_resnet50_fpn`, 37.0 AP on
            COCO), "coco_v2" (its `fasterrcnn_resnet50_fpn_v2`, 46.7 AP), or a file: `.keras`,
            `.weights.h5`, a state dict of torchvision (`.pth`) or Detectron2 (`.pkl`, `.pth`), or
            an `.npz` of either. What a file is is read from it, not from its name; a `.weights.h5`
            alone does not tell how its model is built. Torchvision's labels are COCO's 90 ids, ten
            of them unused: the names give a model of the 80 that are used, and `num_classes=90`
            one of all.
        class_names: the name of every label, kept with the model. By default those of `weights`.
        image_shape: height, width (None for any) and 3.
        bounding_box_format: of ground truth and detections: "xyxy", "yxyx", "xywh",
            "center_xywh", "center_yxhw", or one of these after "rel_".
        score_threshold: a detection's score is over this.
        nms_iou_threshold: detections of a class that overlap by more than this compete.
        max_detections: an image keeps this many.
        normalization: of a backbone given by name: "frozen_batch_norm" (the default with
            `backbone_weights`), "batch_norm" (the default without), "sync_batch_norm" or
            "group_norm".
        norm_epsilon: of that normalisation, and of those of pyramid and box head.
        frozen_stages: how many of stem, C2, C3, C4, C5 stay fixed in training: 2 by default with
            `backbone_weights`, 0 without.
        stride_in_1x1: whether bottlenecks stride in their first 1x1 convolution (ResNet v1)
            instead of the 3x3 (v1.5).
        channel_order: "rgb" or "bgr", in which the backbone reads the channels. Images are RGB,
            and `pixel_mean` and `pixel_std` are of R, G, B, either way.
        pixel_mean: subtracted from R, G, B in 0..255.
        pixel_std: R, G, B are divided by this.
        size_divisor: batches are padded to a multiple of this.
        pyramid_channels: of P2..P6 and the RPN's convolution.
        pyramid_normalization: after each of the pyramid's convolutions, one of those of the
            backbone; None for none, as in the paper.
        anchor_sizes: of P2, P3, ..., one for each C and one for the level above.
        anchor_ratios: height to width.
        anchor_strides: of P2, P3, ..., in pixels; None for image size // map size.
        round_anchors: whether the edges of an anchor around 0 are rounded to whole pixels.
        rpn_hidden_layers: 3x3 convolutions before objectness and deltas.
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
        roi_sampling_ratio: points on a side of each bin; None for one at most a pixel of the
            region's level.
        roi_aligned: whether the centre of a pixel is half a pixel from its edge.
        roi_positive_iou: a region belongs to an object from this overlap on.
        roi_samples: regions an image in the box head's losses.
        roi_positive_fraction: the largest share of positives among them.
        roi_delta_weights: what the box head's (dx, dy, dw, dh) are multiplied by.
        head_convolutions: 3x3 convolutions of the box head, before its hidden layers.
        head_normalization: after each of those, one of those of the backbone; None for none.
        head_hidden_layers: fully connected hidden layers of the box head.
        head_hidden_dim: of each of those.
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
        FileNotFoundError: where a path of weights is no file.
        ConnectionError: where published weights cannot be fetched.
    """
    if isinstance(class_names, str) or not all(isinstance(x, str) for x in class_names or ()):
        raise ValueError(
            f"`class_names` is a sequence of the names of the classes; received {class_names!r}."
        )
    if num_classes is None:
        num_classes = 80 if class_names is None else len(class_names)
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
        rpn_hidden_layers=rpn_hidden_layers,
        head_hidden_layers=head_hidden_layers,
        head_hidden_dim=head_hidden_dim,
        size_divisor=size_divisor,
    )
    if roi_sampling_ratio is not None:
        _check_positive_integers(roi_sampling_ratio=roi_sampling_ratio)
    if head_convolutions != 0:
        _check_positive_integers(head_convolutions=head_convolutions)
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
        load_backbone_weights(bottom_up, find_classifier(backbone, backbone_weights))
    numbers = sorted(int(level[1:]) for level in bottom_up.output)
    levels = [f"P{number}" for number in (*numbers, numbers[-1] + 1)]
    if len(anchor_sizes) != len(levels):
        raise ValueError(
            f"`anchor_sizes` has one size for each of {', '.join(levels)}; received "
            f"{tuple(anchor_sizes)}."
        )
    if anchor_strides is not None and len(anchor_strides) != len(levels):
        raise ValueError(
            f"`anchor_strides` has one stride for each of {', '.join(levels)}; received "
            f"{tuple(anchor_strides)}."
        )
    anchors_per_location = len(tuple(anchor_ratios))
    return FasterRCNN(
        image_normalizer=ImageNormalizer(
            pixel_mean, pixel_std, size_divisor, channel_order, name="image_normalizer"
        ),
        backbone=bottom_up,
        feature_pyramid=FeaturePyramid(
            pyramid_channels, pyramid_normalization, norm_epsilon, name="feature_pyramid"
        ),
        rpn_head=RPNHead(
            anchors_per_location, pyramid_channels, rpn_hidden_layers, name="rpn_head"
        ),
        anchor_generator=AnchorGenerator(
            dict(zip(levels, anchor_sizes, strict=True)),
            anchor_ratios,
            strides=None
            if anchor_strides is None
            else dict(zip(levels, anchor_strides, strict=True)),
            rounded=round_anchors,
            name="anchor_generator",
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
            aligned=roi_aligned,
            name="roi_pooling",
        ),
        box_head=BoxHead(
            num_classes,
            head_hidden_dim,
            head_hidden_layers,
            head_convolutions,
            head_normalization,
            norm_epsilon,
            name="box_head",
        ),
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
        class_names=class_names,
        name=name,
    )


# What the shapes of weights follow from: it must be as the weights have it.
_STRUCTURE = (
    "backbone",
    "pyramid_channels",
    "rpn_hidden_layers",
    "roi_output_size",
    "head_convolutions",
    "head_hidden_layers",
    "head_hidden_dim",
)


def _build_pretrained(weights, backbone_weights=None, **arguments) -> FasterRCNN:
    if backbone_weights is not None:
        raise ValueError(
            "`weights` are of the backbone too; received `backbone_weights` beside them."
        )
    pretrained = open_detector(weights)
    theirs = dict(pretrained.arguments)
    if pretrained.model is not None:
        theirs = arguments_of(pretrained.model)
    trained_classes = theirs.pop("num_classes", pretrained.num_classes)
    for name in _STRUCTURE:
        if name in theirs and arguments.get(name, theirs[name]) != theirs[name]:
            raise ValueError(
                f"The weights {os.fspath(weights)!r} have {name}={theirs[name]!r}; received "
                f"{arguments[name]!r}."
            )
    names = arguments.get("class_names")
    num_classes = arguments.get("num_classes")
    if num_classes is None:
        num_classes = len(names) if names is not None else trained_classes
    trained_names = pretrained.class_names.get(num_classes)
    arguments |= {"num_classes": num_classes, "class_names": names or trained_names}
    keeps_classes = num_classes in (pretrained.num_classes, trained_classes)
    if keeps_classes and names is not None and trained_names is not None:
        keeps_classes = tuple(names) == tuple(trained_names)

    model = build_fpn_faster_rcnn(**theirs | arguments)
    pretrained.load(model, keeps_classes)
    if pretrained.num_classes is None:
        warnings.warn(
            f"{os.fspath(weights)!r} has no box head: box_head starts fresh.", stacklevel=4
        )
    elif not keeps_classes:
        fresh = " and ".join(f"box_head/{layer.name}" for layer in model.box_head.class_layers())
        has = f"has {num_classes}" if num_classes != pretrained.num_classes else "has others"
        warnings.warn(
            f"{os.fspath(weights)!r} was trained for {pretrained.num_classes} classes, the model "
            f"{has}: {fresh} start fresh, all else is loaded.",
            stacklevel=4,
        )
    return model


def arguments_of(model: FasterRCNN) -> dict:
    """The arguments of `build_fpn_faster_rcnn` that build such a model."""
    backbone = {"backbone": model.backbone}
    if isinstance(model.backbone, ResNet):
        depth, groups = model.backbone.depth, model.backbone.groups
        width = model.backbone.width_per_group
        backbone = {
            "backbone": f"resnet{depth}" if groups == 1 else f"resnext{depth}_{groups}x{width}d",
            "normalization": model.backbone.normalization,
            "frozen_stages": model.backbone.frozen_stages,
            "stride_in_1x1": model.backbone.stride_in_1x1,
        }
    anchors, proposals = model.anchor_generator, model.proposal_generator
    pooling, head, detections = model.roi_pooling, model.box_head, model.detection_generator
    rpn_targets, roi_targets = model.rpn_targets, model.roi_targets
    strides = anchors.strides
    return {
        **backbone,
        "num_classes": model.num_classes,
        "image_shape": model.image_shape,
        "smooth_l1_beta": model.smooth_l1_beta,
        "name": model.name,
        "pixel_mean": model.image_normalizer.mean,
        "pixel_std": model.image_normalizer.std,
        "size_divisor": model.image_normalizer.size_divisor,
        "channel_order": model.image_normalizer.channel_order,
        "norm_epsilon": model.feature_pyramid.norm_epsilon,
        "pyramid_channels": model.feature_pyramid.channels,
        "pyramid_normalization": model.feature_pyramid.normalization,
        "anchor_sizes": tuple(anchors.sizes.values()),
        "anchor_ratios": anchors.aspect_ratios,
        "anchor_strides": None if strides is None else tuple(strides.values()),
        "round_anchors": anchors.rounded,
        "rpn_hidden_layers": model.rpn_head.hidden_layers,
        "rpn_pre_nms": proposals.pre_nms,
        "rpn_post_nms": proposals.post_nms,
        "rpn_training_pre_nms": proposals.training_pre_nms,
        "rpn_training_post_nms": proposals.training_post_nms,
        "rpn_nms_iou_threshold": proposals.nms_iou_threshold,
        "rpn_delta_weights": proposals.delta_weights,
        "rpn_min_size": proposals.min_size,
        "max_log_scale": proposals.max_log_scale,
        "rpn_positive_iou": rpn_targets.positive_iou,
        "rpn_negative_iou": rpn_targets.negative_iou,
        "rpn_samples": rpn_targets.num_samples,
        "rpn_positive_fraction": rpn_targets.positive_fraction,
        "seed": rpn_targets.seed,
        "roi_canonical_level": pooling.canonical_level,
        "roi_canonical_size": pooling.canonical_size,
        "roi_output_size": pooling.output_size,
        "roi_sampling_ratio": pooling.sampling_ratio,
        "roi_aligned": pooling.aligned,
        "roi_positive_iou": roi_targets.positive_iou,
        "roi_samples": roi_targets.num_samples,
        "roi_positive_fraction": roi_targets.positive_fraction,
        "roi_delta_weights": detections.delta_weights,
        "head_convolutions": head.convolutions,
        "head_normalization": head.normalization,
        "head_hidden_layers": head.hidden_layers,
        "head_hidden_dim": head.hidden_dim,
        "score_threshold": detections.score_threshold,
        "nms_iou_threshold": detections.nms_iou_threshold,
        "max_detections": detections.max_detections,
        "min_detection_size": detections.min_size,
        "bounding_box_format": detections.bounding_box_format,
    }


def _check_positive_integers(**values):
    for name, value in values.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` is a whole number of at least 1; received {value!r}.")


def _check_fractions(**values):
    for name, value in values.items():
        if not isinstance(value, numbers.Real) or not 0 <= value <= 1:
            raise ValueError(f"`{name}` is within 0..1; received {value!r}.")
