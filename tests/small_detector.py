"""A detector for tests."""

import keras_fpn

SMALL = {
    "num_classes": 3,
    "backbone": "resnet18",
    "normalization": "frozen_batch_norm",
    "pyramid": {"channels": 16},
    "box_head": {"hidden_dim": 32},
    "proposals": {
        "pre_nms": 50,
        "post_nms": 30,
        "training_pre_nms": 50,
        "training_post_nms": 40,
    },
    "roi_targets": {"num_samples": 32},
    "score_threshold": 0.0,
    "max_detections": 20,
    "seed": 1,
}


def small_detector(**arguments) -> keras_fpn.FasterRCNN:
    """A detector with every stage that builds and runs in seconds.

    Args:
        **arguments: of `build_fpn_faster_rcnn`; dicts of a stage's arguments are merged with those
            of `SMALL`.
    """
    merged = SMALL | arguments
    for name, value in SMALL.items():
        if isinstance(value, dict) and isinstance(merged[name], dict):
            merged[name] = value | merged[name]
    return keras_fpn.build_fpn_faster_rcnn(**merged)
