"""Feature Pyramid Networks with Faster R-CNN (Lin et al., CVPR 2017) for Keras 3.

Importing it registers all classes for `keras.saving.load_model`. In the command `keras-fpn` alone,
names are imported when they are first used: it answers `--help` and typing errors without waiting
for TensorFlow.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keras_fpn.anchors import AnchorGenerator
    from keras_fpn.box_head import BoxHead
    from keras_fpn.boxes import (
        clip_boxes,
        convert_boxes,
        decode_deltas,
        encode_deltas,
        pairwise_iou,
    )
    from keras_fpn.builder import build_fpn_faster_rcnn
    from keras_fpn.data.drawing import draw_detections
    from keras_fpn.detections import DetectionGenerator
    from keras_fpn.detector import Detector
    from keras_fpn.faster_rcnn import FasterRCNN
    from keras_fpn.losses import RoILoss, RPNLoss
    from keras_fpn.matcher import match
    from keras_fpn.nms import non_max_suppression
    from keras_fpn.optimization import SGDWithL2, WarmupCosineDecay, WarmupStepDecay
    from keras_fpn.preprocessing import ImageNormalizer
    from keras_fpn.proposals import ProposalGenerator
    from keras_fpn.pyramid import FeaturePyramid
    from keras_fpn.resnet import ResNet
    from keras_fpn.roi_align import PyramidRoIAlign
    from keras_fpn.rpn import RPNHead
    from keras_fpn.serving.inference import detect
    from keras_fpn.serving.saved_model import export_saved_model
    from keras_fpn.targets import RoITargets, RPNTargets
    from keras_fpn.weights.torchvision import load_torchvision_weights

__version__ = "0.1.0"

_MODULES = {
    "AnchorGenerator": "anchors",
    "BoxHead": "box_head",
    "DetectionGenerator": "detections",
    "Detector": "detector",
    "FasterRCNN": "faster_rcnn",
    "FeaturePyramid": "pyramid",
    "ImageNormalizer": "preprocessing",
    "ProposalGenerator": "proposals",
    "PyramidRoIAlign": "roi_align",
    "RPNHead": "rpn",
    "RPNLoss": "losses",
    "RPNTargets": "targets",
    "ResNet": "resnet",
    "RoILoss": "losses",
    "RoITargets": "targets",
    "SGDWithL2": "optimization",
    "WarmupCosineDecay": "optimization",
    "WarmupStepDecay": "optimization",
    "build_fpn_faster_rcnn": "builder",
    "clip_boxes": "boxes",
    "convert_boxes": "boxes",
    "decode_deltas": "boxes",
    "detect": "serving.inference",
    "draw_detections": "data.drawing",
    "encode_deltas": "boxes",
    "export_saved_model": "serving.saved_model",
    "load_torchvision_weights": "weights.torchvision",
    "match": "matcher",
    "non_max_suppression": "nms",
    "pairwise_iou": "boxes",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # All of them, so that every class is registered.
    for public, module in _MODULES.items():
        globals()[public] = getattr(importlib.import_module(f"keras_fpn.{module}"), public)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


if Path(sys.argv[0]).stem != "keras-fpn":
    __getattr__("build_fpn_faster_rcnn")
