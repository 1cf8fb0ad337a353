"""A detector for tests."""

import keras_fpn


def small_detector(**arguments) -> keras_fpn.FasterRCNN:
    """A detector with every stage in place that builds and runs in seconds."""
    numbers = {
        "num_classes": 3,
        "backbone": "resnet18",
        "normalization": "frozen_batch_norm",
        "pyramid_channels": 16,
        "head_hidden_dim": 32,
        "rpn_pre_nms": 50,
        "rpn_post_nms": 30,
        "rpn_training_pre_nms": 50,
        "rpn_training_post_nms": 40,
        "roi_samples": 32,
        "score_threshold": 0.0,
        "max_detections": 20,
        "seed": 1,
    }
    return keras_fpn.build_fpn_faster_rcnn(**(numbers | arguments))
