"""A detector for tests."""

import keras

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


def tiny_detector(**arguments) -> keras_fpn.FasterRCNN:
    """`small_detector` on five convolutions, for what does not depend on the backbone.

    Tracing is what takes the time of a test, and a ResNet is most of a trace.
    """
    return small_detector(**{"backbone": tiny_backbone(), "normalization": None} | arguments)


def tiny_backbone() -> keras.Model:
    """A convolution and a ReLU for each of C2..C5."""
    images = keras.Input((None, None, 3))
    x = keras.layers.Conv2D(8, 3, strides=2, padding="same", activation="relu")(images)
    maps = {}
    for level, channels in (("C2", 8), ("C3", 8), ("C4", 16), ("C5", 16)):
        x = keras.layers.Conv2D(channels, 3, strides=2, padding="same", activation="relu")(x)
        maps[level] = x
    return keras.Model(images, maps, name="tiny")
