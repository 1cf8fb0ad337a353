"""Recipes: the hyperparameters of a training run. Every field is an option of `keras-fpn train`."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_args

import tyro

from keras_fpn.runs.options import read_arguments
from keras_fpn.validation import (
    check_choice,
    check_fraction,
    check_int,
    check_non_negative,
    check_positive,
    did_you_mean,
)

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
        steps_per_execution: steps between two looks at losses, signals and checkpoints, so that a
            GPU need not wait after each; epochs have a multiple of it.
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
    steps_per_execution: int = 1
    evaluate_every: int = 1
    checkpoint_steps: int = 1000
    keep_checkpoints: int = 3
    seed: int = 0


def check_recipe(recipe: Recipe) -> None:
    """Checks the type and the range of every field; values in `model` are checked by their stages.

    Raises:
        ValueError: for the first field that no run can have.
    """
    for name, check in _CHECKS.items():
        check(name, getattr(recipe, name))


def _check_model(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"`{name}` must be arguments by name; received {value!r}.")
    known = {name for builder in BUILDERS.values() for name in read_arguments("builder", builder)}
    for argument in value:
        if argument not in known:
            raise ValueError(
                f"`{name}` must have arguments of {', '.join(BUILDERS.values())}; received "
                f"{argument!r}{did_you_mean(argument, known)}"
            )


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be true or false; received {value!r}.")


def _check_name(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"`{name}` must be a list of names; received {value!r} in it.")


def _check_average_decay(name: str, value: Any) -> None:
    if not 0 < check_fraction(name, value) < 1:
        raise ValueError(f"`{name}` must be between 0 and 1; received {value!r}.")


def _optional(check: Callable) -> Callable:
    return lambda name, value: None if value is None else check(name, value)


def _list_of(check: Callable, minimum: int = 0) -> Callable:
    def check_list(name, values):
        if not isinstance(values, (tuple, list)) or len(values) < minimum:
            expected = "a list" if minimum == 0 else f"a list of at least {minimum}"
            raise ValueError(f"`{name}` must be {expected}; received {values!r}.")
        for value in values:
            check(name, value)

    return check_list


def _choices_of(name: str) -> tuple[str, ...]:
    return get_args(Recipe.__annotations__[name])


# TensorFlow counts and seeds in int32.
_check_count = functools.partial(check_int, maximum=2**31 - 1)
_check_number = functools.partial(check_int, minimum=0, maximum=2**31 - 1)
# A square image of this length takes 3.2 GB in float32.
_check_edge = functools.partial(check_int, maximum=2**14)

_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "model": _check_model,
    "detector": functools.partial(check_choice, choices=BUILDERS),
    "frozen": _list_of(_check_name),
    "shorter_edges": _list_of(_check_edge, minimum=1),
    "evaluation_shorter_edge": _check_edge,
    "longest_edge": _check_edge,
    "horizontal_flip": _check_bool,
    "keep_empty_images": _check_bool,
    "precision": functools.partial(check_choice, choices=_choices_of("precision")),
    "batch_size": _optional(_check_count),
    "epochs": _check_count,
    "images_per_epoch": _optional(_check_count),
    "learning_rate": check_positive,
    "warmup_steps": _check_number,
    "schedule": functools.partial(check_choice, choices=_choices_of("schedule")),
    "decay_epochs": _list_of(_check_count),
    "momentum": check_fraction,
    "weight_decay": check_non_negative,
    "clip_norm": _optional(check_positive),
    "average_decay": _optional(_check_average_decay),
    "steps_per_execution": _check_count,
    "evaluate_every": _check_count,
    "checkpoint_steps": _check_count,
    "keep_checkpoints": _check_count,
    "seed": _check_number,
}


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
