"""The public builders: one function for each model, from numbers to stages."""

import inspect
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_fpn.anchors import AnchorGenerator
from keras_fpn.backbones import BACKBONES, resolve_backbone
from keras_fpn.box_head import BoxHead
from keras_fpn.conv5_head import Conv5Head
from keras_fpn.data.coco_classes import COCO_CLASS_NAMES
from keras_fpn.detections import DetectionGenerator
from keras_fpn.detector import Detector
from keras_fpn.fast_rcnn import FastRCNN
from keras_fpn.faster_rcnn import FasterRCNN
from keras_fpn.losses import RoILoss, RPNLoss
from keras_fpn.preprocessing import ImageNormalizer
from keras_fpn.proposals import ProposalGenerator
from keras_fpn.pyramid import FeaturePyramid
from keras_fpn.region_proposal_network import RegionProposalNetwork
from keras_fpn.resnet import ResNet
from keras_fpn.roi_align import PyramidRoIAlign
from keras_fpn.roi_pool import PyramidRoIPool
from keras_fpn.rpn import RPNHead
from keras_fpn.single_scale import SingleScale
from keras_fpn.targets import RoITargets, RPNTargets
from keras_fpn.validation import check_choice, check_image_shape, did_you_mean
from keras_fpn.weights.deferred import deferred_values
from keras_fpn.weights.pretrained import Pretrained, open_detector
from keras_fpn.weights.published import find_classifier
from keras_fpn.weights.torchvision import load_backbone_weights

# Name of a stage to the layer that it is by default; `resnet` is a backbone given by name.
STAGES = {
    "preprocessing": ImageNormalizer,
    "resnet": ResNet,
    "pyramid": FeaturePyramid,
    "rpn_head": RPNHead,
    "anchors": AnchorGenerator,
    "proposals": ProposalGenerator,
    "roi_pooling": PyramidRoIAlign,
    "box_head": BoxHead,
    "detections": DetectionGenerator,
    "rpn_targets": RPNTargets,
    "rpn_loss": RPNLoss,
    "roi_targets": RoITargets,
    "roi_loss": RoILoss,
}
# Other layers for some of them, which builders choose by `single_scale` and `pooling`.
ALTERNATIVES = {"pyramid": SingleScale, "box_head": Conv5Head, "roi_pooling": PyramidRoIPool}
COMMON = ("name", "dtype", "trainable")
# Arguments of stages that follow from other stages or from the builder's own arguments.
DERIVED = (
    *COMMON,
    "image_shape",
    "depth",
    "groups",
    "width_per_group",
    "last_stage",
    "anchors_per_location",
    "num_classes",
)

# Everyday arguments of the builders that are a stage's.
EVERYDAY = {
    "bounding_box_format": ("detections", "bounding_box_format"),
    "score_threshold": ("detections", "score_threshold"),
    "nms_iou_threshold": ("detections", "nms_iou_threshold"),
    "max_detections": ("detections", "max_detections"),
    "anchor_sizes": ("anchors", "sizes"),
    "anchor_ratios": ("anchors", "aspect_ratios"),
    "normalization": ("resnet", "normalization"),
    "frozen_stages": ("resnet", "frozen_stages"),
}
# Anchors of all sizes, where one map serves all of them (FPN, Table 1).
ONE_MAP_SIZES = ((32, 64, 128, 256, 512),)


def build_fpn_faster_rcnn(
    num_classes: int | None = None,
    backbone: str | keras.Model | None = None,
    backbone_weights: str | os.PathLike | None = None,
    weights: str | os.PathLike | None = None,
    class_names: Sequence[str] | None = None,
    image_shape: Sequence[int | None] | None = None,
    bounding_box_format: str | None = None,
    score_threshold: float | None = None,
    nms_iou_threshold: float | None = None,
    max_detections: int | None = None,
    *,
    anchor_sizes: Sequence[int | Sequence[int]] | None = None,
    anchor_ratios: Sequence[float | Sequence[float]] | None = None,
    normalization: str | None = None,
    frozen_stages: int | None = None,
    single_scale: str | None = None,
    pooling: str | None = None,
    seed: int | None = None,
    name: str = "fpn_faster_rcnn",
    preprocessing: keras.layers.Layer | Mapping | None = None,
    resnet: Mapping | None = None,
    pyramid: keras.layers.Layer | Mapping | None = None,
    rpn_head: keras.layers.Layer | Mapping | None = None,
    anchors: keras.layers.Layer | Mapping | None = None,
    proposals: keras.layers.Layer | Mapping | None = None,
    roi_pooling: keras.layers.Layer | Mapping | None = None,
    box_head: keras.layers.Layer | Mapping | None = None,
    detections: keras.layers.Layer | Mapping | None = None,
    rpn_targets: keras.layers.Layer | Mapping | None = None,
    rpn_loss: keras.layers.Layer | Mapping | None = None,
    roi_targets: keras.layers.Layer | Mapping | None = None,
    roi_loss: keras.layers.Layer | Mapping | None = None,
) -> FasterRCNN:
    """Builds Faster R-CNN on a feature pyramid (Lin et al., CVPR 2017).

    The everyday arguments come first. Every other number is an argument of the stage that uses it:
    pass a stage, or a dict of its arguments, as in `proposals={"post_nms": 300}`. An argument that
    is None or left out has the default of its stage, which is torchvision's in
    `fasterrcnn_resnet50_fpn`, or with `weights` the value that these were trained with. All sizes
    are in pixels of the batch that the model is given.

    With `weights` of another number of classes, or of classes of other names, all layers but those
    that depend on the classes are loaded, and a warning names the ones that are not:
    `build_fpn_faster_rcnn(num_classes=3, weights="coco")` is ready for fine-tuning.

    Args:
        num_classes: number of classes, without the background. Defaults to that of `class_names`
            or `weights`, else to 80.
        backbone: name of a ResNet ("resnet50" is the default; see `keras_fpn.backbones.BACKBONES`),
            a `keras.Model` with outputs C2..C5, or a keras-hub, keras-cv or keras.applications
            model (see `keras_fpn.backbones.resolve_backbone`). One that rescales pixels itself
            takes `preprocessing={"mean": (0, 0, 0), "std": (1, 1, 1)}`.
        backbone_weights: "imagenet" (torchvision's IMAGENET1K_V1), or a file of a torchvision
            ResNet's state dict, for a backbone given by name. It is then frozen up to C2, with
            frozen batch norm, unless `frozen_stages` and `normalization` say otherwise. Defaults to
            None, random weights.
        weights: weights of the whole detector: "coco" (torchvision's `fasterrcnn_resnet50_fpn`,
            37.0 AP on COCO), "coco_v2" (its `fasterrcnn_resnet50_fpn_v2`, 46.7 AP), or a file:
            `.keras`, `.weights.h5`, a state dict of torchvision (`.pth`) or Detectron2 (`.pkl`,
            `.pth`; with a feature pyramid or on C4), or an `.npz` of either. The format is detected
            from the file's contents; a `.weights.h5` does not tell how its model is built.
            Torchvision's labels are COCO's 90 ids, ten of them unused: the names build a model of
            the 80 in use, and with `num_classes=90` one of all. Defaults to None.
        class_names: name of every label, kept with the model. Defaults to those of `weights`.
        image_shape: height, width and 3; None for any height or width. Defaults to (None, None, 3).
        bounding_box_format: format of ground truth and detections (see `DetectionGenerator`).
        score_threshold: `score_threshold` of `DetectionGenerator`.
        nms_iou_threshold: `nms_iou_threshold` of `DetectionGenerator`.
        max_detections: `max_detections` of `DetectionGenerator`.
        anchor_sizes: `sizes` of `AnchorGenerator`.
        anchor_ratios: `aspect_ratios` of `AnchorGenerator`.
        normalization: `normalization` of `ResNet`.
        frozen_stages: `frozen_stages` of `ResNet`.
        single_scale: "C4" or "C5" for a baseline on that map alone, with all anchor sizes on it
            (FPN, Tables 1 to 3, (a) and (b)). With "C4", the box head is the ResNet's last stage,
            on regions of 14x14. Defaults to None, a pyramid.
        pooling: "align" (`PyramidRoIAlign`) or "max" (`PyramidRoIPool`, as published). Defaults to
            None, "align" or that of `weights`.
        seed: seed of the samplers. Initial weights follow `keras.utils.set_random_seed`. Defaults
            to None, a random one.
        name: name of the model.
        preprocessing: `ImageNormalizer`, or its arguments.
        resnet: arguments of `ResNet` for a backbone given by name.
        pyramid: `FeaturePyramid`, or its arguments.
        rpn_head: `RPNHead`, or its arguments.
        anchors: `AnchorGenerator`, or its arguments.
        proposals: `ProposalGenerator`, or its arguments.
        roi_pooling: `PyramidRoIAlign`, or its arguments.
        box_head: `BoxHead`, or its arguments.
        detections: `DetectionGenerator`, or its arguments.
        rpn_targets: `RPNTargets`, or its arguments.
        rpn_loss: `RPNLoss`, or its arguments.
        roi_targets: `RoITargets`, or its arguments.
        roi_loss: `RoILoss`, or its arguments.

    Returns:
        A `FasterRCNN`, to be compiled with an optimizer for training.

    Raises:
        ValueError: for an argument out of range, unknown or given twice, an unknown backbone, or
            weights that do not fit.
        TypeError: if a stage is neither a layer nor a dict.
        FileNotFoundError: if a path of weights is not a file.
        ConnectionError: if published weights cannot be downloaded.
    """
    return _build_model(FasterRCNN, locals())


def build_fpn_rpn(
    backbone: str | keras.Model | None = None,
    backbone_weights: str | os.PathLike | None = None,
    weights: str | os.PathLike | None = None,
    image_shape: Sequence[int | None] | None = None,
    *,
    anchor_sizes: Sequence[int | Sequence[int]] | None = None,
    anchor_ratios: Sequence[float | Sequence[float]] | None = None,
    normalization: str | None = None,
    frozen_stages: int | None = None,
    single_scale: str | None = None,
    seed: int | None = None,
    name: str = "fpn_rpn",
    preprocessing: keras.layers.Layer | Mapping | None = None,
    resnet: Mapping | None = None,
    pyramid: keras.layers.Layer | Mapping | None = None,
    rpn_head: keras.layers.Layer | Mapping | None = None,
    anchors: keras.layers.Layer | Mapping | None = None,
    proposals: keras.layers.Layer | Mapping | None = None,
    rpn_targets: keras.layers.Layer | Mapping | None = None,
    rpn_loss: keras.layers.Layer | Mapping | None = None,
) -> RegionProposalNetwork:
    """Builds the region proposal network alone (FPN, section 4.1).

    Arguments and errors are those of `build_fpn_faster_rcnn`. `weights` may be of any model of this
    package, of torchvision or of Detectron2, its RPN among them: what the RPN has no use for is
    ignored, and a warning names the stages that the file does not have.

    Returns:
        A `RegionProposalNetwork`.
    """
    return _build_model(RegionProposalNetwork, locals())


def build_fpn_fast_rcnn(
    num_classes: int | None = None,
    backbone: str | keras.Model | None = None,
    backbone_weights: str | os.PathLike | None = None,
    weights: str | os.PathLike | None = None,
    class_names: Sequence[str] | None = None,
    image_shape: Sequence[int | None] | None = None,
    bounding_box_format: str | None = None,
    score_threshold: float | None = None,
    nms_iou_threshold: float | None = None,
    max_detections: int | None = None,
    *,
    normalization: str | None = None,
    frozen_stages: int | None = None,
    single_scale: str | None = None,
    pooling: str | None = None,
    seed: int | None = None,
    name: str = "fpn_fast_rcnn",
    preprocessing: keras.layers.Layer | Mapping | None = None,
    resnet: Mapping | None = None,
    pyramid: keras.layers.Layer | Mapping | None = None,
    roi_pooling: keras.layers.Layer | Mapping | None = None,
    box_head: keras.layers.Layer | Mapping | None = None,
    detections: keras.layers.Layer | Mapping | None = None,
    roi_targets: keras.layers.Layer | Mapping | None = None,
    roi_loss: keras.layers.Layer | Mapping | None = None,
) -> FastRCNN:
    """Builds Fast R-CNN, the second stage alone, on given proposals (FPN, section 4.2).

    Arguments and errors are those of `build_fpn_faster_rcnn`. `weights` may be of any model of this
    package, of torchvision or of Detectron2: an RPN in them is ignored, and a warning names the
    stages that the file does not have.

    Returns:
        A `FastRCNN`.
    """
    return _build_model(FastRCNN, locals())


def _build_model(model_class: type[Detector], given: dict[str, Any]) -> Any:
    """Builds a model from the arguments of its builder."""
    class_names, num_classes = given.get("class_names"), given.get("num_classes")
    if isinstance(class_names, str) or not all(isinstance(x, str) for x in class_names or ()):
        raise ValueError(f"`class_names` must be a sequence of strings; received {class_names!r}.")
    seed, weights = given["seed"], given["weights"]
    everyday = {EVERYDAY[name]: value for name, value in given.items() if name in EVERYDAY}
    everyday |= {("rpn_targets", "seed"): seed}
    everyday |= {("roi_targets", "seed"): None if seed is None else seed + 1}
    classes, numbers = _variant(given["single_scale"], given.get("pooling"))
    has_stage = {"resnet", *model_class.stage_names}
    stages = _merge(
        {stage: value for stage, value in given.items() if stage in STAGES},
        {place: value for place, value in everyday.items() if place[0] in has_stage},
        STAGES | classes,
    )
    for stage, arguments in numbers.items():
        if isinstance(stages.get(stage), dict):
            stages[stage] = arguments | stages[stage]
    box_head = stages.get("box_head")
    if num_classes is None and isinstance(box_head, keras.layers.Layer):
        num_classes = box_head.num_classes
    arguments = {name: given[name] for name in ("image_shape", "name")}
    if "box_head" in has_stage:
        arguments["class_names"] = class_names
    if weights is not None:
        if given["backbone_weights"] is not None:
            raise ValueError(
                "`weights` include the backbone; received `backbone_weights` as well, "
                f"{os.fspath(given['backbone_weights'])!r}."
            )
        return _build_pretrained(
            model_class,
            os.fspath(weights),
            given["backbone"],
            num_classes,
            stages,
            classes,
            arguments,
        )
    if num_classes is None:
        num_classes = 80 if class_names is None else len(class_names)
    return _build(
        model_class,
        given["backbone"] or "resnet50",
        given["backbone_weights"],
        stages,
        STAGES | classes,
        num_classes,
        **arguments,
    )


def _variant(single_scale: str | None, pooling: str | None) -> tuple[dict, dict]:
    """Returns the layers of stages that differ from `STAGES`, and arguments that follow."""
    classes: dict[str, type] = {}
    numbers: dict[str, dict] = {}
    if pooling is not None:
        check_choice("pooling", pooling, ("align", "max"))
        classes["roi_pooling"] = PyramidRoIPool if pooling == "max" else PyramidRoIAlign
    if single_scale is not None:
        check_choice("single_scale", single_scale, ("C4", "C5"))
        classes["pyramid"] = SingleScale
        numbers = {"pyramid": {"level": single_scale}, "anchors": {"sizes": ONE_MAP_SIZES}}
    if single_scale == "C4":
        classes["box_head"] = Conv5Head
        numbers |= {"resnet": {"last_stage": 4}, "roi_pooling": {"output_size": 14}}
    return classes, numbers


def _merge(stages: Mapping, everyday: Mapping, classes: Mapping[str, type]) -> dict:
    """Returns stage name to a stage or its arguments, the everyday ones among them.

    Raises:
        ValueError: for an unknown argument, or one that is given twice.
        TypeError: for a stage that is neither a layer nor a dict.
    """
    merged = {}
    for stage, value in stages.items():
        if isinstance(value, keras.layers.Layer) and stage != "resnet":
            merged[stage] = value
            continue
        if value is not None and not isinstance(value, Mapping):
            raise TypeError(
                f"`{stage}` must be a {classes[stage].__name__} or a dict of its arguments; "
                f"received {type(value).__name__}."
            )
        merged[stage] = dict(value or {})
        known = {*inspect.signature(classes[stage]).parameters, *COMMON}
        known -= {"kwargs", *DERIVED} - {*COMMON}
        for argument in merged[stage]:
            if argument not in known:
                raise ValueError(
                    f"`{stage}` has no argument {argument!r}{did_you_mean(argument, known)}"
                )
    for (stage, argument), value in everyday.items():
        if value is None:
            continue
        if argument != "seed" and (
            not isinstance(merged[stage], dict) or argument in merged[stage]
        ):
            raise ValueError(
                f"`{argument}` of `{stage}` is given twice; received {value!r} beside `{stage}`."
            )
        if isinstance(merged[stage], dict):
            merged[stage].setdefault(argument, value)
    return merged


def _build(
    model_class: type[Detector],
    backbone: str | keras.Model,
    backbone_weights: str | os.PathLike | None,
    given: Mapping[str, Any],
    classes: Mapping[str, type],
    num_classes: int,
    *,
    image_shape: Sequence[int | None] | None,
    **arguments,
) -> Detector:
    """Builds a model from its stages or their arguments.

    Args:
        model_class: the class; its `stage_names` say which stages it has.
        backbone: name or model.
        backbone_weights: as in the public builders.
        given: stage name to a stage or its arguments, from `_merge`.
        classes: stage name to the layer that its arguments are for.
        num_classes: number of classes, for a model with a box head.
        image_shape: height, width and 3, or None.
        **arguments: further arguments of the class.
    """

    def stage(name, **derived):
        value = given[name]
        if isinstance(value, dict):
            return classes[name](**{"name": name, **value, **derived})
        for argument, expected in derived.items():
            if getattr(value, argument, expected) != expected:
                raise ValueError(
                    f"`{name}` must have {argument}={expected}; received one of "
                    f"{getattr(value, argument)}."
                )
        return value

    image_shape = check_image_shape((None, None, 3) if image_shape is None else image_shape)
    resnet = given["resnet"]
    if backbone_weights is not None:
        # What the papers freeze.
        resnet = {"normalization": "frozen_batch_norm", "frozen_stages": 2, **resnet}
    if isinstance(backbone, keras.Model) and "last_stage" in resnet:
        raise ValueError(
            "`single_scale='C4'` must go with a ResNet given by name, whose last stage is the box "
            f"head; received the backbone {backbone.name!r}."
        )
    stages = {"preprocessing": stage("preprocessing")}
    padded = stages["preprocessing"].compute_output_shape((None, *image_shape), (None, 2))[1:]
    stages["backbone"] = resolve_backbone(backbone, resnet, padded)
    classifier = None
    if backbone_weights is not None:
        classifier = find_classifier(backbone, backbone_weights)
    derived = {"box_head": {"num_classes": num_classes}}
    if "anchors" in model_class.stage_names:
        one_map = isinstance(given["pyramid"], dict) and given["pyramid"].get("finest_only")
        if one_map and isinstance(given["anchors"], dict):
            given = {**given, "anchors": {"sizes": ONE_MAP_SIZES, **given["anchors"]}}
        stages["anchors"] = stage("anchors")
        derived["rpn_head"] = {"anchors_per_location": stages["anchors"].anchors_per_location}
    if classes["box_head"] is Conv5Head and isinstance(given.get("box_head"), dict):
        derived["box_head"] |= _resnet_of_head(stages["backbone"], given["box_head"])
    for name in model_class.stage_names:
        if name not in stages:
            stages[name] = stage(name, **derived.get(name, {}))
    model = model_class(**stages, image_shape=image_shape, **arguments)
    if classifier is not None:
        load_backbone_weights(model.backbone, classifier, getattr(model, "box_head", None))
    return model


def _resnet_of_head(backbone: ResNet, given: Mapping) -> dict[str, Any]:
    """Returns the arguments of a `Conv5Head` that are those of its `ResNet`."""
    config = {**backbone.get_config(), **given}
    known = inspect.signature(Conv5Head).parameters
    return {
        name: value for name, value in config.items() if name in known and name != "num_classes"
    }


def _build_pretrained(
    model_class: type[Detector],
    weights: str,
    backbone: str | keras.Model | None,
    num_classes: int | None,
    given: Mapping[str, Any],
    classes: Mapping[str, type],
    arguments: Mapping[str, Any],
) -> Detector:
    """Builds the model that weights were trained in, but for what is given, and loads them."""
    trained = open_detector(weights)
    class_names = arguments.get("class_names")
    default_classes = trained.default_classes or len(COCO_CLASS_NAMES)
    if num_classes is None:
        num_classes = default_classes if class_names is None else len(class_names)
    trained_names = trained.class_names.get(num_classes)
    keeps_classes = num_classes in (trained.num_classes, default_classes) and (
        class_names is None or trained_names is None or tuple(class_names) == tuple(trained_names)
    )
    stages, their_classes = _arguments_of_stages(trained)
    classes = {**STAGES, **their_classes, **classes}
    trained = trained._replace(stages=stages)
    stages = {name: value for name, value in stages.items() if name in given}
    if isinstance(trained.backbone, ResNet):
        trained = trained._replace(backbone=_name_of(trained.backbone))
    if isinstance(backbone or trained.backbone, keras.Model):
        stages["resnet"] = {}
    for stage, value in given.items():
        theirs = stages.get(stage, {})
        if classes.get(stage) is not their_classes.get(stage, STAGES.get(stage)):
            # The box head was made for this many bins, whichever way they are pooled.
            bins = theirs.get("output_size") if isinstance(theirs, dict) else None
            theirs = {} if bins is None else {"output_size": bins}
        if not isinstance(value, dict) or isinstance(theirs, dict):
            stages[stage] = {**theirs, **value} if isinstance(value, dict) else value
        elif value:
            raise ValueError(
                f"The `{stage}` of {weights!r} is a {type(theirs).__name__}; expected a stage to "
                f"replace it, received the arguments {value}."
            )
    arguments = dict(arguments)
    if "class_names" in arguments:
        arguments["class_names"] = class_names or trained_names
    if arguments["image_shape"] is None:
        arguments["image_shape"] = trained.image_shape
    # The file says how large the model is: nothing is allocated before it fits.
    with deferred_values() as allocate:
        model = _build(
            model_class,
            backbone or trained.backbone or "resnet50",
            None,
            stages,
            classes,
            num_classes,
            **arguments,
        )
        try:
            load = trained.fit(model, keeps_classes)
        except ValueError as error:
            changes = _changes(trained, backbone, given)
            if not changes:
                raise
            raise ValueError(f"{weights!r} does not fit a model with {changes}: {error}") from error
    allocate()
    load()
    _warn_of_new_layers(model, weights, trained, keeps_classes)
    return model


def _arguments_of_stages(trained: Pretrained) -> tuple[dict[str, Any], dict[str, type]]:
    """Returns the stages of a trained detector as arguments, custom ones as copies.

    Beside them, the layers that the arguments are for where these are not the default ones.
    """
    stages: dict[str, Any] = dict(trained.stages)
    classes: dict[str, type] = {}
    if isinstance(trained.backbone, ResNet):
        stages["resnet"] = trained.backbone
    for stage, layer in stages.items():
        if isinstance(layer, dict):
            continue
        config = layer.get_config()
        if type(layer) is ALTERNATIVES.get(stage):
            classes[stage] = type(layer)
        elif type(layer) is not STAGES[stage]:
            stages[stage] = type(layer).from_config(config)
            continue
        # `last_stage` is not a command-line option, but a rebuilt model keeps it.
        derived = {*DERIVED} - {"last_stage"}
        stages[stage] = {
            argument: config[argument]
            for argument in inspect.signature(type(layer)).parameters
            if argument in config and argument not in derived
        }
    return stages, classes


def _name_of(resnet: ResNet) -> str | ResNet:
    """Returns the name of a ResNet, or itself if its make has none."""
    for name in BACKBONES:
        make = {"groups": 1, "width_per_group": 64, **BACKBONES[name]}
        if all(getattr(resnet, argument) == value for argument, value in make.items()):
            return name
    return resnet


def _changes(trained: Pretrained, backbone, given: Mapping) -> str:
    """Lists the arguments that were given and differ from those that weights were trained with."""
    changes = []
    if backbone is not None and backbone != trained.backbone:
        changes.append(f"backbone={backbone!r} in place of {trained.backbone!r}")
    for stage, value in given.items():
        if not isinstance(value, dict):
            changes.append(f"a {stage} of its own")
            continue
        theirs = trained.stages.get(stage, {})
        changes += [
            f"{stage} {argument}={received!r} in place of {theirs[argument]!r}"
            for argument, received in value.items()
            if argument in theirs and theirs[argument] != received
        ]
    return ", ".join(changes)


def _warn_of_new_layers(
    model: Detector, weights: str, trained: Pretrained, keeps_classes: bool
) -> None:
    new = [name for name in model.stage_names if name in trained.missing_stages]
    if new:
        warnings.warn(
            f"{weights!r} has no weights of {' and '.join(new)}, which are not loaded.",
            stacklevel=5,
        )
    elif "box_head" in model.stage_names and not keeps_classes:
        new = [f"box_head/{layer.name}" for layer in model.box_head.class_layers()]
        differs = "other classes"
        if model.num_classes != trained.num_classes:
            differs = f"{model.num_classes}"
        warnings.warn(
            f"{weights!r} was trained for {trained.num_classes} classes, the model has {differs}: "
            f"{' and '.join(new)} are not loaded, everything else is.",
            stacklevel=5,
        )
