"""What a training run is made of. Every field is an option of `train.py`."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The numbers of a run; the defaults are the schedule that is called 1x: 12 epochs of COCO.

    Attributes:
        weights: of a trained detector to start from: "coco", "coco_v2" or a file; what the numbers
            below leave at its default is then built as the weights want it.
        backbone: name of a ResNet.
        backbone_weights: "imagenet" or a file of its weights, or None to start at random.
        normalization: of the backbone, or None for the builder's choice.
        frozen_stages: of the backbone, or None for the builder's choice.
        pyramid_channels: of every pyramid level.
        head_hidden_dim: of the box head's hidden layers.
        anchor_sizes: of P2 to P6, in pixels.
        rpn_training_proposals: anchors a level before NMS, and proposals an image after it.
        roi_samples: regions an image in the box head's losses.
        shorter_edges: images are resized so that the shorter edge is one of these, at random.
        evaluation_shorter_edge: the same in evaluation.
        longest_edge: no edge is longer than this after resizing.
        horizontal_flip: whether half of the images are mirrored.
        keep_empty_images: whether images without an object are trained on.
        precision: of the layers' arithmetic; boxes, losses and weights are float32 in any case.
        batch_size: images a step, all GPUs together; None for 2 each.
        epochs: passes over the data.
        images_per_epoch: images that count as an epoch, or None for those of the split.
        learning_rate: for a batch of 16 images; the run scales it by its own batch.
        warmup_steps: steps of 16 images over which the rate rises to that, an epoch at the most.
        schedule: how the rate falls: in steps after `decay_epochs`, or along a cosine to 0.
        decay_epochs: the rate falls to a tenth after each of these.
        momentum: of SGD.
        weight_decay: L2, on kernels only.
        clip_norm: gradients of a larger norm, over all weights, are scaled down to it.
        average_decay: of a moving average of the weights, say 0.9998, which is then what is
            evaluated and kept as best.keras.
        evaluate_every: epochs between two evaluations.
        checkpoint_steps: steps between two checkpoints; one more follows each epoch.
        keep_checkpoints: how many of the last ones stay, beside the best.
        seed: of weights, data order, augmentation and samplers.
    """

    weights: str | None = None
    backbone: str = "resnet50"
    backbone_weights: str | None = None
    normalization: str | None = None
    frozen_stages: int | None = None
    pyramid_channels: int = 256
    head_hidden_dim: int = 1024
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    rpn_training_proposals: int = 2000
    roi_samples: int = 512
    shorter_edges: tuple[int, ...] = (800,)
    evaluation_shorter_edge: int = 800
    longest_edge: int = 1333
    horizontal_flip: bool = True
    keep_empty_images: bool = False
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_size: int | None = None
    epochs: int = 12
    images_per_epoch: int | None = None
    learning_rate: float = 0.02
    warmup_steps: int = 500
    schedule: Literal["steps", "cosine"] = "steps"
    decay_epochs: tuple[int, ...] = (8, 11)
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip_norm: float | None = None
    average_decay: float | None = None
    evaluate_every: int = 1
    checkpoint_steps: int = 1000
    keep_checkpoints: int = 3
    seed: int = 0


RECIPES = {
    # FPN, sections 5.1 and 5.2: 60k steps of 16 images at 0.02, then 20k at 0.002, one scale, no
    # warm-up, from ImageNet's weights; 8 GPUs x 2 images. An epoch stands for 10k of these steps.
    "paper": Recipe(
        backbone_weights="imagenet",
        batch_size=16,
        images_per_epoch=160_000,
        epochs=8,
        decay_epochs=(6,),
        warmup_steps=0,
    ),
    # 12 epochs of COCO.
    "1x": Recipe(),
    # Three times as long, at one of six scales.
    "3x": Recipe(shorter_edges=(640, 672, 704, 736, 768, 800), epochs=36, decay_epochs=(27, 33)),
    # From a detector that is trained already, to other classes: a low rate, and less of it.
    "fine_tune": Recipe(
        weights="coco",
        shorter_edges=(640, 672, 704, 736, 768, 800),
        learning_rate=0.01,
        warmup_steps=100,
        schedule="cosine",
        clip_norm=10.0,
    ),
    # Minutes on two CPU cores, from random weights, for `make demo`.
    "demo": Recipe(
        backbone="resnet18",
        normalization="batch_norm",
        pyramid_channels=64,
        head_hidden_dim=256,
        anchor_sizes=(8, 16, 32, 64, 128),
        rpn_training_proposals=300,
        roi_samples=128,
        shorter_edges=(128,),
        evaluation_shorter_edge=128,
        # As long as the shorter edge: all batches have one square shape, and are traced once.
        longest_edge=128,
        batch_size=8,
        epochs=10,
        learning_rate=0.1,
        warmup_steps=50,
        decay_epochs=(8,),
        evaluate_every=10,
        checkpoint_steps=25,
    ),
}
