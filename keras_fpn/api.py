"""The public names of the package; `keras_fpn` has them all."""

from keras_fpn.anchors import AnchorGenerator
from keras_fpn.box_head import BoxHead
from keras_fpn.boxes import (
    clip_boxes,
    convert_boxes,
    decode_deltas,
    encode_deltas,
    pairwise_iou,
)
from keras_fpn.builder import build_fpn_fast_rcnn, build_fpn_faster_rcnn, build_fpn_rpn
from keras_fpn.conv5_head import Conv5Head
from keras_fpn.data.drawing import draw_detections
from keras_fpn.detections import DetectionGenerator
from keras_fpn.detector import Detector
from keras_fpn.fast_rcnn import FastRCNN
from keras_fpn.faster_rcnn import FasterRCNN
from keras_fpn.image_pyramid import merge_scales
from keras_fpn.losses import RoILoss, RPNLoss
from keras_fpn.matcher import match
from keras_fpn.nms import non_max_suppression
from keras_fpn.optimization import SGDWithL2, WarmupCosineDecay, WarmupStepDecay
from keras_fpn.preprocessing import ImageNormalizer
from keras_fpn.proposals import ProposalGenerator
from keras_fpn.pyramid import FeaturePyramid
from keras_fpn.region_proposal_network import RegionProposalNetwork
from keras_fpn.resnet import ResNet
from keras_fpn.roi_align import PyramidRoIAlign
from keras_fpn.roi_pool import PyramidRoIPool
from keras_fpn.rpn import RPNHead
from keras_fpn.serving.inference import detect
from keras_fpn.serving.saved_model import export_saved_model
from keras_fpn.single_scale import SingleScale
from keras_fpn.targets import RoITargets, RPNTargets
from keras_fpn.weights.torchvision import load_torchvision_weights
