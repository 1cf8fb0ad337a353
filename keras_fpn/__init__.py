"""Feature Pyramid Networks with Faster R-CNN (Lin et al., CVPR 2017) for Keras 3."""

from keras_fpn.builder import build_fpn_faster_rcnn
from keras_fpn.data.drawing import draw_detections
from keras_fpn.faster_rcnn import FasterRCNN
from keras_fpn.optimization import SGDWithL2, WarmupStepDecay
from keras_fpn.serving.inference import detect
from keras_fpn.serving.saved_model import export_saved_model
from keras_fpn.weights.torchvision import load_torchvision_weights

__version__ = "0.1.0"

__all__ = [
    "FasterRCNN",
    "SGDWithL2",
    "WarmupStepDecay",
    "build_fpn_faster_rcnn",
    "detect",
    "draw_detections",
    "export_saved_model",
    "load_torchvision_weights",
]
