"""Makes the stored results of torchvision's Faster R-CNN FPN that the tests compare with.

Environment: a virtual environment of its own with torch 2.12.1, torchvision 0.27.1 (CPU) and numpy.
Command:     python tests/reference/make_reference.py     (20 s; writes the .npz files beside it)

Every model is torchvision's ``FasterRCNN(resnet_fpn_backbone(...))`` in float32 with
``FrozenBatchNorm2d`` (epsilon 1e-5: frozen statistics in training too) and all parameters
trainable. Weights and images come from ``weights.py``. Three things about the set-up, none of which
changes torchvision's arithmetic:

- ``GeneralizedRCNNTransform(_skip_resize=True)`` skips resizing only in training mode. It is
  therefore in training mode in the inference cases too: images keep their pixels, and boxes come
  back in them.
- Random sampling is removed by configuration: the samplers' batches are so large that all is taken.
- Intermediate results are recorded by forward hooks, and by one method that is wrapped to note what
  passes through it.

The program also measures how far each decision (threshold, rank, overlap) is from turning out the
other way, and how far the results are from the same computation in float64. It stops if a margin is
too small for a test to rely on. README.md lists what is stored.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
import torchvision
from torchvision.models import detection, resnet
from torchvision.models.detection import FasterRCNN, _utils
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor, resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign, roi_pool
from torchvision.ops import boxes as box_ops
from weights import (
    reference_features,
    reference_image,
    reference_projection,
    reference_uniform,
    reference_weights,
)

HERE = Path(__file__).parent
NUM_CLASSES = 21  # torchvision counts the background, as class 0
TAKE_ALL = 1_000_000
LEVELS = ("P2", "P3", "P4", "P5", "P6")

# How many channels are kept of each map, evenly spaced, and of the RPN's deltas one row and one
# column in so many.
CHANNELS_KEPT = {"2": 4, "3": 8, "4": 16, "5": 32, "6": 32}
DELTA_STEP = {"P2": 3, "P3": 2, "P4": 1, "P5": 1, "P6": 1}
POOLED_ROIS, POOLED_CHANNEL_STEP = 24, 32
CLASSIFIERS = (
    *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    "resnext50_32x4d",
    "resnext101_32x8d",
)
GRADIENT_WHOLE, GRADIENT_SAMPLES = 4096, 256

IOU_TO_SPARE = 2e-4
# The smallest margins that a test may meet; float32 rounding is about 1e-6 of each.
MINIMUM_MARGIN = {
    "objectness logit at the pre-NMS cut": 1e-4,
    "objectness at the post-NMS cut": 1e-4,
    "proposal IoU to the NMS threshold": IOU_TO_SPARE,
    "proposal score gap that NMS relies on": 2e-5,
    "proposal side to the minimum size": 1e-4,
    "RoI level": 1e-4,
    "score to the score threshold": 1e-4,
    "detection side to the minimum size": 1e-4,
    "detection IoU to the NMS threshold": IOU_TO_SPARE,
    "detection score gap that NMS relies on": 5e-5,
    "score at the cut to the most detections": 1e-4,
    "anchor IoU to the matcher's thresholds": 1e-4,
    "anchor IoU of a ground truth's best to its next": 1e-4,
    "RoI IoU to the matcher's threshold": 1e-3,
    "ReLU input to zero (of its layer's std)": 3e-6,
    "max-pool winner to the next (of its layer's std)": 3e-6,
}

SMALL_RPN = {"rpn_pre_nms_top_n_test": 200, "rpn_post_nms_top_n_test": 100}
TRAIN = {
    "rpn_pre_nms_top_n_train": 150,
    "rpn_post_nms_top_n_train": 60,
    "rpn_batch_size_per_image": TAKE_ALL,
    "rpn_positive_fraction": 0.5,
    "box_batch_size_per_image": TAKE_ALL,
    "box_positive_fraction": 0.5,
}

# Images are (seed, height, width); the seeds are those whose margins came out comfortable.
INFERENCE = {
    "odd": {"backbone": "resnet50", "images": [("odd 93", 75, 101)], "arguments": {}},
    "padded_batch": {
        "backbone": "resnet18",
        "images": [("padded 0 38", 90, 130), ("padded 1 38", 121, 77)],
        "arguments": SMALL_RPN,
    },
    "small": {"backbone": "resnet18", "images": [("small 18", 50, 60)], "arguments": SMALL_RPN},
    "v2": {
        "version": 2,
        "backbone": "resnet18",
        "images": [("v2 59", 75, 101)],
        "arguments": SMALL_RPN,
    },
    "no_proposals": {
        "backbone": "resnet18",
        "images": [("no proposals 3", 64, 64)],
        "arguments": SMALL_RPN,
        # dw and dh of -20: every decoded box is far thinner than the smallest that is kept.
        "weights": {"rpn.head.bbox_pred.bias": np.tile(np.float32([0, 0, -20, -20]), 3)},
    },
    "no_detections": {
        "backbone": "resnet18",
        "images": [("no detections 8", 64, 64)],
        "arguments": {**SMALL_RPN, "box_score_thresh": 1.0},
    },
}

# Ground truth in quarters of a pixel, so that overlaps with anchors are exact; labels are
# torchvision's (from 1). The second box is 34 wide around x = 30, midway between two anchor centres
# of P2: two anchors tie as its best.
THREE_BOXES = ([[16.25, 8.5, 70, 55.75], [13, 20.25, 47, 51], [50.5, 6, 88.25, 60.5]], [3, 20, 1])
ONE_BOX = ([[20, 5.25, 80.75, 50]], [7])
NO_BOXES = ([], [])
TRAINING = {
    "train": {
        "images": [("train 0 60", 64, 90), ("train 1 60", 52, 96)],
        "ground_truth": [THREE_BOXES, ONE_BOX],
    },
    "train_no_ground_truth": {
        "images": [("train empty 0 163", 52, 96), ("train empty 1 163", 64, 90)],
        "ground_truth": [NO_BOXES, THREE_BOXES],
    },
    "train_only_empty": {
        "images": [("train only empty 0 65", 64, 90), ("train only empty 1 65", 50, 64)],
        "ground_truth": [NO_BOXES, NO_BOXES],
    },
    # One image and few RoIs: the ReLUs of the box head's convolutions are many, and none of their
    # inputs may be near zero.
    "v2_train": {
        "version": 2,
        "images": [("v2 train 50", 64, 90)],
        "ground_truth": [THREE_BOXES],
        "arguments": TRAIN | {"rpn_post_nms_top_n_train": 5},
    },
}


def build(case):
    """The torchvision model of a case with the reference weights, in float32."""
    if case.get("version") == 2:
        model = second_version(case)
    else:
        backbone = resnet_fpn_backbone(
            backbone_name=case["backbone"], weights=None, trainable_layers=5
        )
        model = FasterRCNN(
            backbone, num_classes=NUM_CLASSES, _skip_resize=True, **case["arguments"]
        )
    weights = reference_weights(
        {name: tuple(value.shape) for name, value in model.state_dict().items()}
    )
    weights.update(case.get("weights", {}))
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    return model


def second_version(case):
    """As `fasterrcnn_resnet50_fpn_v2` puts it together, on the ResNet of the case."""
    norm = torch.nn.BatchNorm2d
    body = getattr(resnet, case["backbone"])(weights=None)
    return FasterRCNN(
        _resnet_fpn_extractor(body, trainable_layers=5, norm_layer=norm),
        num_classes=NUM_CLASSES,
        rpn_head=RPNHead(256, 3, conv_depth=2),
        box_head=FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], norm_layer=norm),
        _skip_resize=True,
        **case["arguments"],
    )


def run(model, case, dtype=torch.float32, training=False):
    """Runs the model on the case's images and returns the record of all stages."""
    record = {}
    model.to(dtype).train(training)
    model.transform.train()
    # The second version's batch norms, fixed as FrozenBatchNorm2d is.
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval().requires_grad_(False)

    def note(name):
        return lambda module, inputs, output: record.__setitem__(name, output)

    hooked = {
        "transform": model.transform,
        "C": model.backbone.body,
        "P": model.backbone,
        "rpn_head": model.rpn.head,
        "anchors": model.rpn.anchor_generator,
        "pooled": model.roi_heads.box_roi_pool,
        "predictor": model.roi_heads.box_predictor,
    }
    handles = [module.register_forward_hook(note(name)) for name, module in hooked.items()]
    handles.append(
        model.roi_heads.box_roi_pool.register_forward_pre_hook(
            lambda module, inputs: record.__setitem__("rois", list(inputs[1]))
        )
    )
    if training:
        handles += watch_kinks(model, record.setdefault("kinks", {}))
    filter_proposals = type(model.rpn).filter_proposals

    def noted_filter(proposals, objectness, image_shapes, counts):
        record["decoded"] = proposals, objectness.detach().reshape(len(image_shapes), -1), counts
        record["proposals"] = filter_proposals(
            model.rpn, proposals, objectness, image_shapes, counts
        )
        return tuple(list(part) for part in record["proposals"])

    model.rpn.filter_proposals = noted_filter
    images = [
        torch.from_numpy(reference_image(*image)).permute(2, 0, 1).to(dtype) / 255
        for image in case["images"]
    ]
    targets = None
    if training:
        targets = [
            {
                "boxes": torch.tensor(boxes, dtype=dtype).reshape(-1, 4),
                "labels": torch.tensor(labels, dtype=torch.int64),
            }
            for boxes, labels in case["ground_truth"]
        ]
        record["targets"] = targets
    with torch.set_grad_enabled(training):
        record["output"] = model(images, targets)
    for handle in handles:
        handle.remove()
    del model.rpn.filter_proposals
    record["features"] = list(record["P"].values())
    record["sizes"] = record["transform"][0].image_sizes
    return record


# === What is stored ===


def configuration(case, record=None, **more):
    images = [
        {
            "seed": seed,
            "height": height,
            "width": width,
            "crc32": zlib.crc32(reference_image(seed, height, width)),
        }
        for seed, height, width in case.get("images", [])
    ]
    described = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    if images:
        described |= {
            "backbone": case["backbone"],
            "num_classes_with_background": NUM_CLASSES,
            "batch_norm_epsilon": 1e-5,
            "images": images,
            "arguments": case["arguments"],
        }
    if "version" in case:
        described["version"] = case["version"]
    if record is not None:
        described["padded_size"] = list(record["transform"][0].tensors.shape[-2:])
    return {"config": np.array(json.dumps(described | more))}


def numbers(tensor, dtype=np.float32):
    return tensor.detach().numpy().astype(dtype)


def mean_and_std(tensor):
    values = numbers(tensor, np.float64)
    return np.array([values.mean(), values.std()]) if values.size else np.zeros(2)


def stored_features(record, levels=LEVELS):
    stored, steps = {}, {}
    maps = {f"C{i}": x for i, x in enumerate(record["C"].values(), start=2)}
    maps |= dict(zip(levels, record["features"], strict=True))
    for name, feature in maps.items():
        steps[name] = feature.shape[1] // CHANNELS_KEPT[name[1]]
        stored[name] = numbers(feature.permute(0, 2, 3, 1)[..., :: steps[name]])
        stored[name + "_mean_std"] = mean_and_std(feature)
    return stored, steps


def stored_rpn(record, levels=LEVELS):
    stored = {}
    for name, logits, deltas in zip(levels, *record["rpn_head"], strict=True):
        step = DELTA_STEP[name]
        stored[f"objectness_{name}"] = numbers(logits.permute(0, 2, 3, 1))
        stored[f"rpn_deltas_{name}"] = numbers(deltas.permute(0, 2, 3, 1)[:, ::step, ::step])
        stored[f"rpn_deltas_{name}_mean_std"] = mean_and_std(deltas)
    counts = record["decoded"][2]
    for name, anchors in zip(levels, record["anchors"][0].split(counts), strict=True):
        stored[f"anchors_{name}"] = numbers(anchors)
    for i, (boxes, scores) in enumerate(zip(*record["proposals"], strict=True)):
        stored[f"proposals_{i}"], stored[f"proposal_scores_{i}"] = numbers(boxes), numbers(scores)
    return stored


def stored_rois(model, record):
    rois = torch.cat(record["rois"])
    sampled = np.unique(np.linspace(0, max(len(rois) - 1, 0), POOLED_ROIS).astype(np.int32))[
        : len(rois)
    ]
    class_logits, deltas = record["predictor"]
    pooled = record["pooled"]
    return {
        "roi_levels": numbers(
            model.roi_heads.box_roi_pool.map_levels(record["rois"]) + 2, np.int32
        ),
        "sampled_rois": sampled,
        "pooled": numbers(pooled.permute(0, 2, 3, 1)[sampled][..., ::POOLED_CHANNEL_STEP]),
        "pooled_mean_std": mean_and_std(pooled),
        "class_logits": numbers(class_logits),
        "box_deltas": numbers(deltas[sampled]),
        "box_deltas_mean_std": mean_and_std(deltas),
    }


def inference_case(name, case):
    model = build(case)
    record = run(model, case)
    stored, steps = stored_features(record)
    stored |= stored_rpn(record) | stored_rois(model, record)
    for i, detections in enumerate(record["output"]):
        stored[f"detection_boxes_{i}"] = numbers(detections["boxes"])
        stored[f"detection_scores_{i}"] = numbers(detections["scores"])
        stored[f"detection_labels_{i}"] = numbers(detections["labels"], np.int32)
    for parameter, value in case.get("weights", {}).items():
        stored[f"weights:{parameter}"] = value
    stored |= configuration(
        case,
        record,
        channel_step=steps,
        delta_step=DELTA_STEP,
        pooled_channel_step=POOLED_CHANNEL_STEP,
    )
    margins = rpn_margins(model, record) | detection_margins(model, record)
    exact = run(model, case, torch.float64)
    differences = compare(record, exact)
    for ours, theirs in zip(record["output"], exact["output"], strict=True):
        assert torch.equal(ours["labels"], theirs["labels"]), "float64 detects otherwise"
        differences["detection box (px)"] = worst(
            differences, "detection box (px)", ours["boxes"], theirs["boxes"]
        )
        differences["detection score"] = worst(
            differences, "detection score", ours["scores"], theirs["scores"]
        )
    counts = {
        "proposals": [len(boxes) for boxes in record["proposals"][0]],
        "detections": [len(detections["boxes"]) for detections in record["output"]],
    }
    save(name, stored, margins, differences, counts)


def training_case(name, case):
    case = {"backbone": "resnet18", "arguments": TRAIN} | case
    model = build(case)
    record = run(model, case, training=True)
    stored = stored_rpn(record) | stored_rois(model, record)
    for key in [key for key in stored if key.startswith(("anchors_", "rpn_deltas_"))]:
        del stored[key]
    for i, target in enumerate(record["targets"]):
        boxes, anchors = target["boxes"], record["anchors"][i]
        stored[f"ground_truth_boxes_{i}"] = numbers(boxes)
        stored[f"ground_truth_labels_{i}"] = numbers(target["labels"], np.int32)
        stored[f"rois_{i}"] = numbers(record["rois"][i])
        for what, candidates, matcher in (
            ("anchor", anchors, model.rpn.proposal_matcher),
            ("roi", record["rois"][i], model.roi_heads.proposal_matcher),
        ):
            # torchvision does not call the matcher without ground truth: all are background.
            matches = torch.full((len(candidates),), matcher.BELOW_LOW_THRESHOLD)
            if len(boxes):
                matches = matcher(box_ops.box_iou(boxes, candidates))
            stored[f"{what}_matches_{i}"] = numbers(matches, np.int32)
            positive = matches >= 0
            targets = candidates.new_zeros((0, 4))
            if positive.any():
                coder = model.rpn.box_coder if what == "anchor" else model.roi_heads.box_coder
                targets = coder.encode_single(boxes[matches[positive]], candidates[positive])
            stored[f"{what}_positive_targets_{i}"] = numbers(targets)

    losses = dict(sorted(record["output"].items()))
    stored |= {loss: numbers(value) for loss, value in losses.items()}
    stored["loss_gradient_norms"] = np.array(
        [
            [float(torch.linalg.vector_norm(gradient.double())) for gradient in gradients]
            for gradients in (
                torch.autograd.grad(
                    loss, record["features"], retain_graph=True, materialize_grads=True
                )
                for loss in losses.values()
            )
        ]
    )
    gradients = parameter_gradients(model, record)
    stored |= stored_gradients(gradients)
    stored |= configuration(
        case,
        record,
        pooled_channel_step=POOLED_CHANNEL_STEP,
        losses=list(losses),
        levels=LEVELS,
        gradient_names=list(gradients),
    )
    margins = rpn_margins(model, record) | training_margins(model, record)
    exact = run(model, case, torch.float64, training=True)
    differences = compare(record, exact)
    for loss, value in losses.items():
        exact_value = float(exact["output"][loss].detach())
        differences[f"{loss} (relative)"] = abs(float(value.detach()) - exact_value) / max(
            abs(exact_value), 1e-12
        )
    relative = {}
    for parameter, gradient in parameter_gradients(model, exact).items():
        norm = float(torch.linalg.vector_norm(gradient))
        error = float(torch.linalg.vector_norm(gradients[parameter].double() - gradient))
        relative[parameter] = error / norm if norm else error
    differences["gradient (relative, worst parameter)"] = max(relative.values())
    differences["gradient (relative, median parameter)"] = float(np.median(list(relative.values())))
    images = range(len(record["targets"]))
    counts = {
        "losses": {loss: round(float(value.detach()), 6) for loss, value in losses.items()},
        "positive anchors": [int((stored[f"anchor_matches_{i}"] >= 0).sum()) for i in images],
        "positive RoIs": [int((stored[f"roi_matches_{i}"] >= 0).sum()) for i in images],
        "RoIs": [len(rois) for rois in record["rois"]],
    }
    save(name, stored, margins, differences, counts)


def parameter_gradients(model, record):
    parameters = {name: x for name, x in model.named_parameters() if x.requires_grad}
    total = sum(record["output"].values())
    gradients = torch.autograd.grad(total, list(parameters.values()), materialize_grads=True)
    return dict(zip(parameters, gradients, strict=True))


def stored_gradients(gradients):
    stored, norms, projections = {}, [], []
    for name, gradient in gradients.items():
        values = numbers(gradient, np.float64)
        norms.append(np.sqrt((values**2).sum()))
        projections.append((values * reference_projection(name, values.shape)).sum())
        if values.size <= GRADIENT_WHOLE:
            stored[f"gradient:{name}"] = values.astype(np.float32)
        else:
            # Odd, so that the samples wander over channels and taps instead of repeating one.
            step = values.size // GRADIENT_SAMPLES | 1
            stored[f"gradient_every_{step}:{name}"] = values.reshape(-1)[::step].astype(np.float32)
    return stored | {
        "gradient_norms": np.array(norms),
        "gradient_projections": np.array(projections),
    }


def anchors_case():
    """Anchors of torchvision's default generator on the maps of padded images of several sizes."""
    sizes, scales = ((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5
    generator, stored = AnchorGenerator(sizes, scales), {}
    frames = [
        (800, 1056),
        (800, 1344),
        (1344, 800),
        (608, 1024),
        (96, 128),
        (32, 32),
        (64, 32),
        (160, 224),
    ]
    for height, width in frames:
        grids = [(height // 2**level, width // 2**level) for level in range(2, 6)]
        grids.append(
            tuple((side + 1) // 2 for side in grids[-1])
        )  # what P6's stride-2 subsample leaves
        images = ImageList(torch.zeros(1, 3, height, width), [(height, width)])
        anchors = generator(images, [torch.zeros(1, 1, *grid) for grid in grids])[0]
        for name, part in zip(LEVELS, anchors.split([3 * h * w for h, w in grids]), strict=True):
            values, key = numbers(part), f"{height}x{width}_{name}"
            rows = np.arange(len(values), dtype=np.float64)[:, None]
            stored[f"{key}_count"] = np.int32(len(values))
            stored[f"{key}_first"], stored[f"{key}_last"] = values[:6], values[-6:]
            stored[f"{key}_every_997"] = values[::997]
            stored[f"{key}_sum"] = values.astype(np.float64).sum(axis=0)
            stored[f"{key}_sum_by_row"] = (values * rows).sum(axis=0)
    stored |= configuration(
        {}, frames=frames, levels=LEVELS, anchor_sizes=sizes, aspect_ratios=scales[0]
    )
    save("anchors", stored, {}, {}, {"frames": len(frames)})


def roi_align_case():
    """MultiScaleRoIAlign alone: two 512x640 frames, four channels, RoIs of every size and place."""
    height, width, channels = 512, 640, 4
    features = {
        str(level - 2): torch.from_numpy(
            reference_features(
                f"roi_align P{level}", 2, height // 2**level, width // 2**level, channels
            )
        )
        .permute(0, 3, 1, 2)
        .requires_grad_()
        for level in range(2, 6)
    }
    hard = [
        [0, 0, 112, 112],  # areas of exactly 112^2, 224^2 and 448^2, where the level changes
        [64, 32, 288, 256],
        [100, 20, 548, 468],
        [0, 0, 448, 112],  # 224^2 again, of another shape
        [10, 10, 121.75, 122],  # just under 112^2
        [50.5, 60.25, 274.25, 284.25],  # just under 224^2
        [0, 0, 640, 512],  # the whole frame
        [30, 40, 30, 40],  # no area at all
        [200, 100, 200, 180],  # no width
        [320, 300, 420, 300],  # no height
        [638.5, 510.5, 639.5, 511.5],  # the last pixel, with sampling points beyond the frame
        [640, 512, 640, 512],
        [0, 0, 0, 0],
        [-20, -12, 60, 70],  # over the border
        [600, 450, 700, 560],
        [-300, -200, -250, -150],  # outside altogether
        [700, 600, 900, 800],
        [-80, 100, 720, 140],  # over both sides
        [300, -60, 340, 572],
        [12.5, 13.25, 12.75, 13.5],  # far thinner than a cell
        [0, 100.5, 640, 101.5],
    ]
    draws = (reference_uniform("roi_align boxes", (43, 4)).astype(np.float64) + 1) / 2
    # Sides from 4 to 600 px, more of the small ones; in quarters of a pixel.
    sides = 4 + 596 * draws[:, 2:] ** 2
    corners = draws[:, :2] * np.maximum([width, height] - sides, 1)
    random = np.round(np.concatenate([corners, corners + sides], axis=1) * 4) / 4
    boxes = torch.tensor(np.concatenate([hard, random]), dtype=torch.float32)
    boxes = [boxes[:40], boxes[40:]]

    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=7, sampling_ratio=2)
    output = pool(features, boxes, [(height, width)] * 2)
    projection = torch.from_numpy(
        reference_uniform("roi_align projection", (len(output), 7, 7, channels))
    )
    (output.permute(0, 2, 3, 1) * projection).sum().backward()
    levels = pool.map_levels(boxes) + 2
    stored = {
        "boxes_0": numbers(boxes[0]),
        "boxes_1": numbers(boxes[1]),
        "levels": numbers(levels, np.int32),
        "output": numbers(output.permute(0, 2, 3, 1)),
    }
    steps = {"P2": 4, "P3": 3, "P4": 2, "P5": 1}
    for (name, step), feature in zip(steps.items(), features.values(), strict=True):
        gradient = numbers(feature.grad.permute(0, 2, 3, 1), np.float64)
        stored[f"gradient_{name}"] = gradient[:, ::step, ::step].astype(np.float32)
        stored[f"gradient_{name}_norm"] = np.sqrt((gradient**2).sum())
        stored[f"gradient_{name}_projection"] = (
            gradient * reference_uniform(f"roi_align P{name[1]} gradient", gradient.shape)
        ).sum()
    stored |= configuration({}, height=height, width=width, channels=channels, gradient_step=steps)

    # A sampling point is dropped below -1 or above the map's side: none may lie where rounding
    # decides it.
    points = []
    for level, (x1, y1, x2, y2) in zip(
        levels.tolist(), torch.cat(boxes).double().tolist(), strict=True
    ):
        for low, high, side in ((x1, x2, width), (y1, y2, height)):
            low, high = low / 2**level, high / 2**level
            at = low + max(high - low, 1.0) * (np.arange(14) + 0.5) / 14
            points.append(np.minimum(abs(at + 1), abs(at - side / 2**level)).min())
    exact_pool = MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=7, sampling_ratio=2)
    doubled = {name: feature.detach().double() for name, feature in features.items()}
    exact = exact_pool(doubled, [part.double() for part in boxes], [(height, width)] * 2)
    differences = {"pooled": float((output - exact).abs().max().detach())}
    assert min(points) > 1e-3, min(points)
    counts = {
        "RoIs a level": np.bincount(stored["levels"])[2:].tolist(),
        "sampling point to a cut": min(points),
    }
    save("roi_align", stored, {}, differences, counts)


def roi_pool_case():
    """roi_pool on each level of two 256x320 frames, with RoIs of every size and place."""
    height, width, channels, bins = 256, 320, 2, 7
    features = {
        level: torch.from_numpy(
            reference_features(
                f"roi_pool P{level}", 2, height // 2**level, width // 2**level, channels
            )
        )
        .permute(0, 3, 1, 2)
        .requires_grad_()
        for level in range(2, 6)
    }
    hard = [
        [0, 0, 320, 256],  # the whole frame
        [0, 100, 320, 104],
        [10, 0, 14, 256],
        [2, 2, 6, 6],  # halves of P2's pixels, which are rounded up
        [-10, -6, 42, 30],  # halves below 0, which are rounded down
        [30, 40, 30, 40],  # a point
        [60, 50, 20, 10],  # turned around
        [-300, -200, -250, -150],  # outside altogether: every bin is empty
        [400, 300, 500, 380],
        [-80, 100, 420, 140],  # over both sides
        [-300, -200, 900, 500],
        [300, 230, 360, 300],
        [12.5, 13.25, 12.75, 13.5],
    ]
    draws = (reference_uniform("roi_pool boxes", (35, 4)).astype(np.float64) + 1) / 2
    sides = 4 + 296 * draws[:, 2:] ** 2
    corners = draws[:, :2] * np.maximum([width, height] - sides, 1)
    random = np.round(np.concatenate([corners, corners + sides], axis=1) * 4) / 4
    boxes = np.float32(np.concatenate([hard, random]))
    area = np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1, dtype=np.float64)
    level = np.clip(np.floor(4 + np.log2(np.sqrt(np.maximum(area, 1e-6)) / 112)), 2, 5).astype(int)
    # With a rounded edge of a bin, one would be a pixel larger: no pixels / 7 * 7 is rounded up.
    whole = np.floor(np.abs(boxes) / 2.0 ** level[:, None] + 0.5) * np.sign(boxes)
    side = np.maximum(whole[:, 2:] - whole[:, :2] + 1, 1)[:, :, None]
    index = np.arange(bins + 1)
    rounded = index.astype(np.float32) * (np.float32(side) / np.float32(bins))
    for edge in (np.floor, np.ceil):
        same = edge(rounded) == edge(index * side / bins)
        assert same.all(), boxes[~same.all(axis=(1, 2))]
    image = (np.arange(len(boxes)) >= 24).astype(np.float32)
    output = torch.zeros(len(boxes), channels, bins, bins)
    exact = output.double()
    for one, feature in features.items():
        rows = np.flatnonzero(level == one)
        regions = torch.from_numpy(np.concatenate([image[rows, None], boxes[rows]], axis=1))
        pooled = roi_pool(feature, regions, bins, 0.5**one)
        output = output.index_copy(0, torch.from_numpy(rows), pooled)
        pooled = roi_pool(feature.detach().double(), regions.double(), bins, 0.5**one)
        exact = exact.index_copy(0, torch.from_numpy(rows), pooled)
    projection = torch.from_numpy(
        reference_uniform("roi_pool projection", (len(output), bins, bins, channels))
    )
    (output.permute(0, 2, 3, 1) * projection).sum().backward()
    stored = {
        "boxes_0": boxes[:24],
        "boxes_1": boxes[24:],
        "levels": np.int32(level),
        "output": numbers(output.permute(0, 2, 3, 1)),
    }
    for one, feature in features.items():
        gradient = numbers(feature.grad.permute(0, 2, 3, 1), np.float64)
        stored[f"gradient_P{one}"] = gradient.astype(np.float32)
    stored |= configuration(
        {}, height=height, width=width, channels=channels, canonical_size=112, output_size=bins
    )
    counts = {
        "RoIs a level": np.bincount(level)[2:].tolist(),
        "empty bins": int((stored["output"] == 0).all(-1).sum()),
    }
    differences = {"pooled": float((output - exact).abs().max().detach())}
    save("roi_pool", stored, {}, differences, counts)


def parts_case():
    """Box coding, matching, NMS, clipping, the loss and the sampler's counts, on hard inputs."""
    stored = {}

    def quarters(name, count, low, high, side):
        draws = (reference_uniform(name, (count, 4)).astype(np.float64) + 1) / 2
        corner = np.floor((low + (high - low) * draws[:, :2]) * 4) / 4
        return np.float32(
            np.concatenate([corner, corner + np.floor(1 + side * 4 * draws[:, 2:]) / 4], axis=1)
        )

    # Box coding: 50 pairs with sides from a quarter pixel to thousands; deltas far past the clamp
    # at log(1000 / 16).
    boxes, anchors = (
        quarters("coder boxes", 50, -50, 700, 300),
        quarters("coder anchors", 50, -50, 700, 300),
    )
    boxes[:4] = [[0, 0, 0.25, 4000], [-2000, 0, 2000, 0.5], [5, 5, 6, 6], [100, 100, 101, 900]]
    anchors[:4] = [
        [0, 0, 3000, 0.25],
        [5, 5, 6, 6],
        [-2000, -2000, 2000, 2000],
        [100, 100, 101, 900],
    ]
    deltas = reference_uniform("coder deltas", (50, 4)) * np.float32([3, 3, 6, 6])
    clip = np.float32(np.log(1000 / 16))
    deltas[:6] = [
        [0, 0, 0, 0],
        [0, 0, clip, clip],
        [1, -1, 4.2, 4.0],
        [0, 0, 50, -50],
        [0, 0, 1e4, -1e4],
        [9, -9, -8, 8],
    ]
    class_deltas = reference_uniform("coder class deltas", (50, 12)) * 12
    stored |= {"coder_boxes": boxes, "coder_anchors": anchors}
    stored |= {"coder_deltas": deltas, "coder_class_deltas": class_deltas}
    for key, weights in (
        ("weights_1", (1.0, 1.0, 1.0, 1.0)),
        ("weights_10_5", (10.0, 10.0, 5.0, 5.0)),
    ):
        coder = _utils.BoxCoder(weights)
        encoded = coder.encode_single(torch.from_numpy(boxes), torch.from_numpy(anchors))
        decoded = coder.decode_single(torch.from_numpy(deltas), torch.from_numpy(anchors))
        by_class = coder.decode(torch.from_numpy(class_deltas), [torch.from_numpy(anchors)])
        stored[f"encoded_{key}"] = numbers(encoded)
        stored[f"decoded_{key}"] = numbers(decoded)
        stored[f"class_decoded_{key}"] = numbers(by_class)

    # Matching on overlaps in 1/16, so that there are ties, with values exactly on both thresholds.
    iou = np.floor((reference_uniform("matcher", (6, 80)) + 1) * 8).astype(np.float32) / 16
    iou[3] *= np.float32(0.25)  # a ground truth whose best overlap is low
    iou[:, 70:] *= np.float32(0.125)
    iou[:, 0], iou[:, 1], iou[:, 2] = 0, 0, 0
    iou[1, 0], iou[2, 1], iou[4, 2] = 0.7, 0.3, 0.5
    iou[0, 3] = iou[5, 3] = 1  # two ground truths tie as the best of one candidate
    without_overlap = iou.copy()
    without_overlap[3] = 0  # a ground truth that overlaps nothing: every candidate ties as its best
    for key, matrix in (("matcher_iou", iou), ("matcher_iou_without_overlap", without_overlap)):
        stored[key] = matrix
        for high, low, allow in ((0.7, 0.3, True), (0.7, 0.3, False), (0.5, 0.5, False)):
            matcher = _utils.Matcher(high, low, allow_low_quality_matches=allow)
            matches = matcher(torch.from_numpy(matrix))
            suffix = f"{high}_{low}" + ("_low_quality" if allow else "")
            stored[key.replace("iou", "matches") + "_" + suffix] = numbers(matches, np.int32)

    # NMS: 300 boxes in clusters, coordinates in quarters (the arithmetic is exact), scores in 1/64
    # (many ties).
    # Twice the same box, and pairs whose overlap is exactly one half, are among them.
    centres = quarters("nms centres", 60, 0, 260, 60)
    jitter = np.floor(reference_uniform("nms jitter", (300, 4)) * 32) / 4
    boxes = np.float32(np.repeat(centres, 5, axis=0) + jitter)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    boxes[10:14] = boxes[14]
    boxes[20], boxes[21] = [200, 200, 240, 240], [200, 200, 240, 220]
    boxes[22], boxes[23] = [200, 0, 230, 30], [210, 0, 240, 30]
    scores = np.floor((reference_uniform("nms scores", (300,)) + 1) * 32).astype(np.float32) / 64
    scores[20:24] = [0.9, 0.8, 0.7, 0.7]
    groups = np.floor((reference_uniform("nms groups", (300,)) + 1) * 2).astype(np.int32)
    stored |= {"nms_boxes": boxes, "nms_scores": scores, "nms_groups": groups}
    tensors = torch.from_numpy(boxes), torch.from_numpy(scores)
    stored["nms_iou"] = numbers(box_ops.box_iou(tensors[0][:40], tensors[0]))
    for threshold in (0.3, 0.5, 0.7):
        stored[f"nms_kept_{threshold}"] = numbers(box_ops.nms(*tensors, threshold), np.int32)
        kept = box_ops.batched_nms(*tensors, torch.from_numpy(groups), threshold)
        stored[f"batched_nms_kept_{threshold}"] = numbers(kept, np.int32)

    # Clipping to a 100 x 120 image, and the removal of small boxes: sides just under, at and over
    # the two minima.
    over = quarters("clip boxes", 40, -60, 160, 80)
    over[:3] = [[-30, -20, -10, -5], [130, 20, 150, 40], [0, 0, 120, 100]]
    clipped = box_ops.clip_boxes_to_image(torch.from_numpy(over), (100, 120))
    stored |= {
        "clip_boxes": over,
        "clip_size": np.int32([100, 120]),
        "clipped_boxes": numbers(clipped),
    }
    sides = np.float32([0, 5e-4, 9.9e-4, 1e-3, 1.01e-3, 5e-3, 9.9e-3, 1e-2, 1.01e-2, 1])
    thin = np.float32([[0, 0, w, h] for w in sides for h in sides])
    stored |= {
        "thin_boxes": thin,
        "negative_boxes": np.float32([[5, 5, 4, 9], [5, 5, 9, 4], [5, 5, 4, 4]]),
    }
    for minimum in (1e-3, 1e-2):
        kept = box_ops.remove_small_boxes(torch.from_numpy(thin), minimum)
        stored[f"thin_kept_{minimum}"] = numbers(kept, np.int32)
    kept = box_ops.remove_small_boxes(torch.from_numpy(stored["negative_boxes"]), 1e-3)
    stored["negative_kept"] = numbers(kept, np.int32)

    # Smooth L1 with beta 1/9: values and gradients around the knee and far from it.
    errors = np.float32([0, 1e-4, 0.05, 0.1, 1 / 9, 0.12, 0.5, 1, 3, 40])
    errors = np.concatenate([-errors[::-1], errors])
    prediction = torch.from_numpy(errors).requires_grad_()
    values = torch.nn.functional.smooth_l1_loss(
        prediction, torch.zeros(len(errors)), beta=1 / 9, reduction="none"
    )
    values.sum().backward()
    stored |= {
        "smooth_l1_errors": errors,
        "smooth_l1": numbers(values),
        "smooth_l1_gradient": numbers(prediction.grad),
    }

    # The sampler: numbers of positives and negatives taken from so many of each.
    rows = []
    for size, fraction in ((256, 0.5), (512, 0.25), (9, 0.5), (10, 0.33)):
        sampler = _utils.BalancedPositiveNegativeSampler(size, fraction)
        for positives, negatives in (
            (0, 1000),
            (3, 1000),
            (400, 1000),
            (400, 20),
            (400, 0),
            (0, 0),
            (2, 3),
        ):
            labels = torch.cat([torch.ones(positives), torch.zeros(negatives), -torch.ones(50)])
            taken = [int(mask[0].sum()) for mask in sampler([labels])]
            rows.append([size, fraction, positives, negatives, *taken])
    stored["sampler_counts"] = np.float64(rows)
    stored |= configuration(
        {}, sampler_columns="batch_size fraction positives negatives taken_positive taken_negative"
    )
    save("parts", stored, {}, {}, {"kept by NMS 0.5": len(stored["nms_kept_0.5"])})


# === How near the decisions are to turning out otherwise ===


def worst(differences, key, ours, exact):
    return max(
        differences.get(key, 0.0), float((ours.double() - exact).abs().max()) if len(ours) else 0.0
    )


def compare(record, exact):
    """Largest differences of a record from the float64 one, which must hold as many proposals."""
    differences = {}
    for name in ("C", "P"):
        for ours, theirs in zip(record[name].values(), exact[name].values(), strict=True):
            relative = float(
                (ours.double() - theirs).abs().max().detach() / theirs.abs().max().detach()
            )
            differences[f"{name} (of the largest)"] = max(
                differences.get(f"{name} (of the largest)", 0.0), relative
            )
    for key, part in (("proposal box (px)", 0), ("proposal score", 1)):
        for ours, theirs in zip(record["proposals"][part], exact["proposals"][part], strict=True):
            assert ours.shape == theirs.shape, "float64 proposes otherwise"
            differences[key] = worst(differences, key, ours, theirs)
    if "predictor" in record:
        differences["class logits"] = worst(
            {}, "", record["predictor"][0].detach(), exact["predictor"][0].detach()
        )
    return differences


def nms_margins(boxes, scores, groups, threshold, at_least=-1.0):
    """How far greedy NMS is from another result among boxes that score at least `at_least`.

    Returns the smallest overlap margin, the smallest score gap and the scores kept. A box that is
    kept shows its largest overlap with a better kept box of its group; one that is suppressed shows
    the largest too, and the largest score gap to a kept box that suppresses it with room to spare.
    """
    order = torch.argsort(scores, descending=True, stable=True)
    boxes, scores, groups = boxes[order].double(), scores[order].double().numpy(), groups[order]
    iou = box_ops.box_iou(boxes, boxes).numpy() * (groups[:, None] == groups).numpy()
    kept, overlap_margin, gap_margin = [], 1.0, 1.0
    for i in range(len(boxes)):
        overlaps = iou[i, kept]
        largest = overlaps.max(initial=0.0)
        if scores[i] >= at_least:
            overlap_margin = min(overlap_margin, abs(largest - threshold))
        if largest <= threshold:
            kept.append(i)
        elif scores[i] >= at_least:
            sure = scores[kept][overlaps > threshold + IOU_TO_SPARE]
            gap_margin = min(gap_margin, sure.max(initial=scores[i]) - scores[i])
    return overlap_margin, gap_margin, scores[kept]


def watch_kinks(model, margins):
    """Notes how near the inputs of ReLUs and the winners of the max-pool are to another derivative.

    One unit on the other side of zero changes a gradient by about 1e-3, whatever the precision.
    """

    def at_relu(inputs):
        values = inputs.detach().double()
        smallest(margins, "ReLU input to zero (of its layer's std)", values / values.std())

    def at_max_pool(module, inputs):
        values = inputs[0].detach().double()
        padded = torch.nn.functional.pad(values, (1, 1, 1, 1))
        windows = padded.unfold(2, 3, 2).unfold(3, 3, 2).flatten(4)
        first, second = windows.topk(2).values.unbind(-1)
        # Ties are left out: they come from the zero padding, where every winner has the same input.
        gaps = (first - second)[(first > 0) & (first > second)] / values.std()
        smallest(margins, "max-pool winner to the next (of its layer's std)", gaps)

    handles = []
    for module in model.modules():
        if isinstance(module, torch.nn.ReLU):
            handles.append(
                module.register_forward_pre_hook(lambda module, inputs: at_relu(inputs[0]))
            )
        elif isinstance(module, torch.nn.MaxPool2d):
            handles.append(module.register_forward_pre_hook(at_max_pool))
    # These two have functions for ReLUs.
    for name, layer in model.roi_heads.box_head.named_children():
        if name in ("fc6", "fc7"):
            handles.append(
                layer.register_forward_hook(lambda module, inputs, output: at_relu(output))
            )
    return handles


def smallest(margins, name, values):
    values = torch.as_tensor(values, dtype=torch.float64).reshape(-1)
    if len(values):
        margins[name] = min(margins.get(name, float("inf")), float(values.abs().min()))


def rpn_margins(model, record):
    decoded, logits, counts = record["decoded"]
    pre, post = model.rpn.pre_nms_top_n(), model.rpn.post_nms_top_n()
    margins = {}
    for i, size in enumerate(record["sizes"]):
        boxes, scores, groups = [], [], []
        for level, (level_boxes, level_logits) in enumerate(
            zip(decoded[i].split(counts), logits[i].split(counts), strict=True)
        ):
            ranked, order = level_logits.sort(descending=True)
            if len(ranked) > pre:
                smallest(
                    margins, "objectness logit at the pre-NMS cut", ranked[pre - 1] - ranked[pre]
                )
            boxes.append(level_boxes[order[:pre]])
            scores.append(ranked[:pre].sigmoid())
            groups += [level] * len(ranked[:pre])
        boxes = box_ops.clip_boxes_to_image(torch.cat(boxes), size)
        scores, groups = torch.cat(scores), torch.tensor(groups)
        smallest(
            margins,
            "proposal side to the minimum size",
            boxes[:, 2:] - boxes[:, :2] - model.rpn.min_size,
        )
        large = box_ops.remove_small_boxes(boxes, model.rpn.min_size)
        if not len(large):
            continue
        boxes, scores, groups = boxes[large], scores[large], groups[large]
        at_least = float(record["proposals"][1][i][-1])
        overlap, gap, kept = nms_margins(boxes, scores, groups, model.rpn.nms_thresh, at_least)
        assert len(kept[:post]) == len(record["proposals"][1][i])
        smallest(margins, "proposal IoU to the NMS threshold", overlap)
        smallest(margins, "proposal score gap that NMS relies on", gap)
        if len(kept) > post:
            smallest(margins, "objectness at the post-NMS cut", kept[post - 1] - kept[post])
    rois = torch.cat(record["rois"]).double()
    if len(rois):
        level = 4 + torch.log2(box_ops.box_area(rois).sqrt() / 224)
        smallest(margins, "RoI level", level[level > 1.5] - level[level > 1.5].round())
    return margins


def detection_margins(model, record):
    heads, margins = model.roi_heads, {}
    class_logits, deltas = record["predictor"]
    decoded = heads.box_coder.decode(deltas, record["rois"])
    counts = [len(rois) for rois in record["rois"]]
    parts = zip(
        decoded.split(counts),
        class_logits.softmax(-1).split(counts),
        record["sizes"],
        record["output"],
        strict=True,
    )
    for boxes, scores, size, detections in parts:
        full = len(detections["scores"]) == heads.detections_per_img
        at_least = float(detections["scores"][-1]) if full else heads.score_thresh - 0.01
        boxes = box_ops.clip_boxes_to_image(boxes, size)[:, 1:].reshape(-1, 4)
        groups = torch.arange(1, scores.shape[1]).expand(len(scores), -1).reshape(-1)
        scores = scores[:, 1:].reshape(-1)
        if not full:
            smallest(margins, "score to the score threshold", scores - heads.score_thresh)
        over = scores > heads.score_thresh
        boxes, scores, groups = boxes[over], scores[over], groups[over]
        sides = (boxes[:, 2:] - boxes[:, :2])[scores >= at_least]
        smallest(margins, "detection side to the minimum size", sides - 1e-2)
        large = box_ops.remove_small_boxes(boxes, 1e-2)
        if not len(large):
            continue
        overlap, gap, kept = nms_margins(
            boxes[large], scores[large], groups[large], heads.nms_thresh, at_least
        )
        assert len(kept[: heads.detections_per_img]) == len(detections["scores"])
        smallest(margins, "detection IoU to the NMS threshold", overlap)
        smallest(margins, "detection score gap that NMS relies on", gap)
        if len(kept) > heads.detections_per_img:
            last = heads.detections_per_img
            smallest(
                margins, "score at the cut to the most detections", kept[last - 1] - kept[last]
            )
    return margins


def training_margins(model, record):
    margins = dict(record["kinks"])
    for target, anchors, rois in zip(
        record["targets"], record["anchors"], record["rois"], strict=True
    ):
        if not len(target["boxes"]):
            continue
        iou = box_ops.box_iou(target["boxes"], anchors)
        best = iou.max(dim=0).values
        smallest(
            margins, "anchor IoU to the matcher's thresholds", torch.stack([best - 0.7, best - 0.3])
        )
        for row in iou:
            distinct = torch.unique(row)
            smallest(
                margins,
                "anchor IoU of a ground truth's best to its next",
                distinct[-1] - distinct[-2],
            )
        roi_best = box_ops.box_iou(target["boxes"], rois).max(dim=0).values
        smallest(margins, "RoI IoU to the matcher's threshold", roi_best - 0.5)
    return margins


def write_names():
    """Names and shapes of the state dicts that torchvision's published files hold."""
    models = {
        name: getattr(detection, name)(weights=None, weights_backbone=None)
        for name in ("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2")
    }
    models |= {name: getattr(resnet, name)(weights=None) for name in CLASSIFIERS}
    save_names("torchvision_names", models)


def save_names(name, models):
    lines = [
        json.dumps(model)
        + ":"
        + json.dumps({k: list(v.shape) for k, v in state.items()}, separators=(",", ":"))
        for model, state in ((key, model.state_dict()) for key, model in models.items())
    ]
    path = HERE / f"{name}.json"
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB, {list(models)}")


def save(name, stored, margins, differences, counts):
    path = HERE / f"{name}.npz"
    np.savez_compressed(path, **stored)
    print(f"{name}.npz: {path.stat().st_size / 1000:.0f} kB, {counts}")
    for key, value in sorted(margins.items()):
        print(f"    margin  {key}: {value:.2e}")
    for key, value in differences.items():
        print(f"    float32 from float64  {key}: {value:.1e}")
    narrow = {key: value for key, value in margins.items() if value < MINIMUM_MARGIN[key]}
    if narrow:
        raise SystemExit(f"{name}: margins too small to rely on, choose other seeds: {narrow}")


def main():
    torch.set_num_threads(1)
    write_names()
    anchors_case()
    parts_case()
    roi_align_case()
    roi_pool_case()
    for name, case in INFERENCE.items():
        inference_case(name, case)
    for name, case in TRAINING.items():
        training_case(name, case)


if __name__ == "__main__":
    main()
