"""Recipes: the hyperparameters of a training run. Every field is an option of `keras-fpn train`."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import tyro

# Name of a model to that of its builder.
BUILDERS = {
    "faster_rcnn": "build_fpn_faster_rcnn",
    "rpn": "build_fpn_rpn",
    "fast_rcnn": "build_fpn_fast_rcnn",
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Hyperparameters of the run. The defaults are the 1x schedule: 12 epochs of COCO.

    Attributes:
        model: arguments of the model's builder, those of stages in dicts. Only what is in here is
            passed; everything else follows its `"weights"`, or is the builder's default.
        detector: Faster R-CNN, the RPN alone, or Fast R-CNN on stored proposals.
        frozen: stages whose weights stay as they are, such as backbone pyramid.
        shorter_edges: training images are resized so that the shorter edge is one of these, chosen
            at random.
        evaluation_shorter_edge: the same for evaluation.
        longest_edge: upper limit of the longer edge after resizing.
        horizontal_flip: whether half of the training images are flipped.
        keep_empty_images: whether to train on images without objects.
        precision: compute dtype of the layers; boxes, losses and weights are always float32.
        batch_size: images per step, over all replicas; None is 2 per replica.
        epochs: number of epochs.
        images_per_epoch: images per epoch; None is those of the split.
        learning_rate: for a batch of 16 images; scaled linearly with the batch size.
        warmup_steps: warm-up steps for a batch of 16 images, at most one epoch.
        schedule: learning rate schedule: step decay after `decay_epochs`, or cosine decay to 0.
        decay_epochs: epochs after which the learning rate is divided by 10.
        momentum: momentum of SGD.
        weight_decay: L2 weight decay, of kernels only.
        clip_norm: gradients are clipped to this global norm; None is no clipping.
        average_decay: decay of a moving average of the weights, such as 0.9998, which is then
            evaluated and saved as best.keras; None is no average.
        evaluate_every: epochs between evaluations.
        checkpoint_steps: steps between checkpoints; there is another one after each epoch.
        keep_checkpoints: number of latest checkpoints to keep, besides the best model.
        seed: seed of weights, data order, augmentation and samplers.
    """

    model: Annotated[Mapping[str, Any], tyro.conf.Suppress] = dataclasses.field(
        default_factory=dict
    )
    detector: Annotated[Literal[tuple(BUILDERS)], tyro.conf.arg(name="model")] = "faster_rcnn"
    frozen: tuple[str, ...] = ()
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
    # warm-up, from ImageNet weights; 8 GPUs x 2 images. An epoch stands for 10k of these steps.
    # Regions are pooled and their box loss is smooth L1 as in Fast R-CNN; docs/paper.md has all.
    "paper": Recipe(
        model={
            "backbone_weights": "imagenet",
            "pooling": "max",
            "roi_loss": {"smooth_l1_beta": 1.0},
        },
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
    # From a trained detector to other classes: a lower rate with cosine decay.
    "fine_tune": Recipe(
        model={"weights": "coco"},
        shorter_edges=(640, 672, 704, 736, 768, 800),
        learning_rate=0.01,
        warmup_steps=100,
        schedule="cosine",
        clip_norm=10.0,
    ),
    # Minutes on two CPU cores, from random weights, for `make demo`.
    "demo": Recipe(
        model={
            "backbone": "resnet18",
            "normalization": "batch_norm",
            "anchor_sizes": (8, 16, 32, 64, 128),
            "pyramid": {"channels": 64},
            "box_head": {"hidden_dim": 256},
            "proposals": {"training_pre_nms": 300, "training_post_nms": 300},
            "roi_targets": {"num_samples": 128},
        },
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
