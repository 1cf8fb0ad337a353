"""Makes the stored results of Detectron2's Faster R-CNN and RPN that the tests compare with.

Environment: that of make_reference.py, with Detectron2 0.6 built from its public source
             (`pip install --no-build-isolation --no-deps`, about 8 minutes on two cores).
Command:     python tests/reference/make_detectron2_reference.py     (20 s; writes .npz files)

Every model is Detectron2's own, from its model zoo's configuration files, in float32. Weights are
those of the torchvision model of the same shape (`weights.py`), under Detectron2's names. Images
are given as it wants them (BGR, no resizing), and results are what its modules return. Random
sampling is removed by configuration: the RPN's batch is as large as its candidates are, the box
head's larger. Margins and the distance from float64 are measured as in make_reference.py, from
which all that is not Detectron2's comes; Detectron2's boxes stay float32 in a float64 model.
"""

from contextlib import ExitStack
from unittest import mock

import detectron2
import numpy as np
import torch
from detectron2 import model_zoo
from detectron2.layers import batched_nms
from detectron2.modeling import build_model
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.modeling.proposal_generator import proposal_utils
from detectron2.modeling.roi_heads import fast_rcnn
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from make_reference import (
    DELTA_STEP,
    LEVELS,
    MINIMUM_MARGIN,
    NUM_CLASSES,
    POOLED_CHANNEL_STEP,
    TAKE_ALL,
    compare,
    configuration,
    mean_and_std,
    nms_margins,
    numbers,
    parameter_gradients,
    save,
    save_names,
    smallest,
    stored_features,
    stored_gradients,
    stored_rpn,
    worst,
)
from torchvision.ops import boxes as box_ops
from weights import (
    as_detectron2,
    reference_features,
    reference_image,
    reference_shapes,
    reference_uniform,
    reference_weights,
)

POOLED_ROIS = 24
ZOO = (
    "faster_rcnn_R_50_FPN_1x",
    "faster_rcnn_R_101_FPN_3x",
    "faster_rcnn_X_101_32x8d_FPN_3x",
    "rpn_R_50_FPN_1x",
    "faster_rcnn_R_50_C4_1x",
    "rpn_R_50_C4_1x",
)
MINIMUM_MARGIN["box delta to its target"] = 1e-4  # where the gradient of L1 jumps
SMALL = ["MODEL.RPN.PRE_NMS_TOPK_TEST", 200, "MODEL.RPN.POST_NMS_TOPK_TEST", 100]
CASES = {
    "detectron2": {
        "file": "faster_rcnn_R_50_FPN_1x",
        "backbone": "resnet50",
        "images": [("detectron2 0", 75, 101)],
        "options": [],
        "stem_scale": 1 / 64,
    },
    "detectron2_padded_batch": {
        "file": "faster_rcnn_R_50_FPN_1x",
        "backbone": "resnet50",
        "images": [("detectron2 padded 0 17", 90, 130), ("detectron2 padded 1 17", 121, 77)],
        "options": SMALL,
        "stem_scale": 1 / 64,
    },
    # The zoo's ResNeXt has 101 layers; one of 50 is made the same way in half the time.
    "detectron2_resnext": {
        "file": "faster_rcnn_X_101_32x8d_FPN_3x",
        "backbone": "resnext50_32x4d",
        "images": [("detectron2 resnext 25", 64, 96)],
        "options": [*SMALL, "MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.WIDTH_PER_GROUP", 4],
        "stem_scale": 1,
    },
    # It pads no image: 75x101 pixels are 5x7 places of C4.
    "detectron2_c4": {
        "file": "faster_rcnn_R_50_C4_1x",
        "backbone": "resnet50",
        "images": [("detectron2 c4 23", 75, 101)],
        "options": ["MODEL.RPN.PRE_NMS_TOPK_TEST", 200, "MODEL.RPN.POST_NMS_TOPK_TEST", 12],
        "stem_scale": 1 / 64,
        "pooled_channel_step": 256,
    },
    "detectron2_rpn": {
        "file": "rpn_R_50_FPN_1x",
        "backbone": "resnet18",
        "images": [("detectron2 rpn 28", 75, 101)],
        "options": [*SMALL, "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64],
        "stem_scale": 1 / 64,
    },
}
# No two anchors tie as the best of a box: they are not whole, so rounding would decide.
GROUND_TRUTH = {
    "ground_truth": [
        [16.25, 4.25, 75.5, 57.25],
        [13, 24, 49.75, 55.25],
        [52.75, 9.5, 82.75, 61.25],
    ],
    "labels": [2, 19, 0],
}
# The gradients of stem and C2 are none: its configuration fixes them.
TRAINING = {
    "detectron2_train": {
        "file": "faster_rcnn_R_50_FPN_1x",
        "backbone": "resnet18",
        "images": [("detectron2 train 2", 64, 90)],
        **GROUND_TRUTH,
        "options": [
            *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
            *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 150, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 60),
            # All anchors but those that the matcher leaves out.
            *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 1050, "MODEL.RPN.POSITIVE_FRACTION", 0.5),
            *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", TAKE_ALL),
            *("MODEL.ROI_HEADS.POSITIVE_FRACTION", 0.5),
        ],
        "stem_scale": 1 / 64,
    },
    "detectron2_c4_train": {
        "file": "faster_rcnn_R_50_C4_1x",
        "backbone": "resnet50",
        "images": [("detectron2 c4 train 3", 64, 90)],
        **GROUND_TRUTH,
        "options": [
            *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 150, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 20),
            *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 307, "MODEL.RPN.POSITIVE_FRACTION", 0.5),
            *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", TAKE_ALL),
            *("MODEL.ROI_HEADS.POSITIVE_FRACTION", 0.5),
        ],
        "stem_scale": 1 / 64,
        # Millions of its ReLUs' inputs are nearer to zero than rounding.
        "gradients": False,
    },
}
# Their names in torchvision, under which they are stored.
LOSSES = {
    "loss_box_reg": "loss_box_reg",
    "loss_cls": "loss_classifier",
    "loss_rpn_cls": "loss_objectness",
    "loss_rpn_loc": "loss_rpn_box_reg",
}


def configured(file, *options):
    """Detectron2's configuration of a model of its zoo, on the CPU and without weights."""
    config = model_zoo.get_config(f"COCO-Detection/{file}.yaml")
    config.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *options])
    return config


def write_names():
    """Names and shapes of the state dicts of Detectron2's models; the zoo's files add anchors."""
    models = {file: build_model(configured(file)) for file in ZOO}
    for model in models.values():
        beside = dict(model.named_buffers()).keys() - model.state_dict()
        assert {"pixel_mean", "pixel_std"} < beside, beside
        assert all("pixel_" in name or "cell_anchors" in name for name in beside), beside
    save_names("detectron2_names", models)


def build(case):
    """Detectron2's model of a case with the reference weights, in float32."""
    config = configured(
        case["file"], "MODEL.ROI_HEADS.NUM_CLASSES", NUM_CLASSES - 1, *case["options"]
    )
    model = build_model(config).eval()
    shapes = reference_shapes(case["backbone"], NUM_CLASSES, c4="C4" in case["file"])
    weights = as_detectron2(reference_weights(shapes), case["stem_scale"])
    weights = {
        name: torch.from_numpy(np.ascontiguousarray(x))
        for name, x in weights.items()
        if hasattr(model, name.split(".")[0])
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    # Its own numbers, which are in its state dict beside the weights.
    assert not unexpected, unexpected
    assert all("pixel_" in name or "cell_anchors" in name for name in missing), missing
    return config, model


def run(model, case, dtype=torch.float32, training=False):
    """Runs the model on the case's images and returns the record of all stages."""
    record = {}
    model.to(dtype).train(training)

    def note(name):
        return lambda module, inputs, output: record.__setitem__(name, output)

    bottom_up = getattr(model.backbone, "bottom_up", model.backbone)
    hooked = {
        **{stage: getattr(bottom_up, stage) for stage in bottom_up.stage_names},
        "P": model.backbone,
        "rpn_head": model.proposal_generator.rpn_head,
        "anchors": model.proposal_generator.anchor_generator,
        "proposed": model.proposal_generator,
    }
    if has_regions(model):
        pooler = getattr(model.roi_heads, "box_pooler", None) or model.roi_heads.pooler
        hooked |= {"pooled": pooler, "predictor": model.roi_heads.box_predictor}
    handles = [module.register_forward_hook(note(name)) for name, module in hooked.items()]
    if has_regions(model):
        handles.append(
            pooler.register_forward_pre_hook(
                lambda module, inputs: record.__setitem__("rois", [x.tensor for x in inputs[1]])
            )
        )
    predict_proposals = model.proposal_generator._decode_proposals
    model.proposal_generator._decode_proposals = lambda anchors, deltas: record.setdefault(
        "decoded_boxes", predict_proposals(anchors, deltas)
    )
    images = [
        torch.from_numpy(reference_image(*image)[..., ::-1].copy()).permute(2, 0, 1).float()
        for image in case["images"]
    ]
    inputs = [{"image": image} for image in images]
    if training:
        record["kinks"] = {}
        handles += watch_relus(model, record["kinks"])
        inputs[0]["instances"] = ground_truth(case)
        torch.manual_seed(0)  # the order of the sampled regions
        with EventStorage(), watched_relu(record["kinks"]), nms_in_float32():
            output = model(inputs)
    else:
        with torch.no_grad(), nms_in_float32():
            output = (
                model.inference(inputs, do_postprocess=False)
                if has_regions(model)
                else model(inputs)
            )
    for handle in handles:
        handle.remove()
    model.proposal_generator._decode_proposals = predict_proposals
    proposed = record["proposed"][0]
    record["sizes"] = [instances.image_size for instances in proposed]
    proposals = [instances.proposal_boxes.tensor for instances in proposed]
    record["logits"] = [instances.objectness_logits for instances in proposed]
    record["proposals"] = proposals, [logits.sigmoid() for logits in record["logits"]]
    record["features"] = list(record["P"].values())
    record["levels"] = [f"P{name[-1]}" for name in record["P"]]
    record["C"] = {f"C{stage[-1]}": record[stage] for stage in bottom_up.stage_names}
    record["anchors"] = [boxes.tensor for boxes in record["anchors"]]
    if training:
        record["output"] = {LOSSES[name]: output[name] for name in LOSSES}
        return record
    if not has_regions(model):
        record["rois"], record["output"] = proposals, []
        return record
    record["output"] = [
        {
            "boxes": instances.pred_boxes.tensor,
            "scores": instances.scores,
            "labels": instances.pred_classes,
        }
        for instances in output
    ]
    return record


def has_regions(model):
    return hasattr(model, "roi_heads")


def in_the_order_of(record, exact):
    """The float64 record with its proposals in the order of the other: equal scores may swap."""
    orders = []
    for i in range(len(record["sizes"])):
        # Boxes of two levels coincide where both are the whole image: their scores tell them apart.
        ours, theirs = (
            torch.cat([boxes[i], 1000 * scores[i][:, None]], dim=1).double()
            for boxes, scores in (record["proposals"], exact["proposals"])
        )
        order = torch.cdist(ours, theirs).argmin(dim=1)
        assert len(order.unique()) == len(theirs), "float64 proposes otherwise"
        orders.append(order)
    exact["proposals"] = [
        [values[order] for values, order in zip(part, orders, strict=True)]
        for part in exact["proposals"]
    ]
    counts = [len(order) for order in orders]
    if "predictor" in exact:
        exact["predictor"] = [
            torch.cat([rows[order] for rows, order in zip(part.split(counts), orders, strict=True)])
            for part in exact["predictor"]
        ]
    return exact


def ground_truth(case):
    (image,) = case["images"]
    return Instances(
        image[1:],
        gt_boxes=Boxes(torch.tensor(case["ground_truth"])),
        gt_classes=torch.tensor(case["labels"]),
    )


def near_zero(margins, inputs):
    # Where no gradient passes, neither side of zero matters.
    if inputs.requires_grad:
        values = inputs.detach().double()
        smallest(margins, "ReLU input to zero (of its layer's std)", values / values.std())


def watch_relus(model, margins):
    return [
        module.register_forward_pre_hook(lambda module, inputs: near_zero(margins, inputs[0]))
        for module in model.modules()
        if isinstance(module, torch.nn.ReLU)
    ]


def nms_in_float32():
    """Lets a float64 model run: its boxes are float32, and NMS wants scores of the same type."""

    def of_float32(boxes, scores, *more):
        return batched_nms(boxes, scores.float(), *more)

    stack = ExitStack()
    for module in (proposal_utils, fast_rcnn):
        stack.enter_context(mock.patch.object(module, "batched_nms", of_float32))
    return stack


def watched_relu(margins):
    """Its ResNets call this function, and no layer."""
    relu_ = torch.nn.functional.relu_

    def noted(inputs):
        near_zero(margins, inputs)
        return relu_(inputs)

    return mock.patch.object(torch.nn.functional, "relu_", noted)


def levels_of(rois, levels=LEVELS):
    lowest, highest = int(levels[0][1]), min(int(levels[-1][1]), 5)
    boxes = [Boxes(part) for part in rois]
    return assign_boxes_to_levels(boxes, lowest, highest, 224, 4) + lowest


def stored_rois(record, channel_step=POOLED_CHANNEL_STEP):
    rois = torch.cat(record["rois"])
    largest = torch.argsort(box_ops.box_area(rois), descending=True)[:8].numpy()
    spread = np.linspace(0, len(rois) - 1, POOLED_ROIS - 8).astype(np.int32)
    sampled = np.unique(np.concatenate([largest, spread])).astype(np.int32)
    class_logits, deltas = record["predictor"]
    pooled = record["pooled"]
    return {
        "roi_levels": numbers(levels_of(record["rois"], record["levels"]), np.int32),
        "sampled_rois": sampled,
        "pooled": numbers(pooled.permute(0, 2, 3, 1)[sampled][..., ::channel_step]),
        "pooled_mean_std": mean_and_std(pooled),
        "class_logits": numbers(class_logits),
        "box_deltas": numbers(deltas[sampled]),
        "box_deltas_mean_std": mean_and_std(deltas),
    }


def inference_case(name, case):
    config, model = build(case)
    record = run(model, case)
    levels, step = record["levels"], case.get("pooled_channel_step", POOLED_CHANNEL_STEP)
    if levels == ["P4"]:  # C4 itself.
        stored, steps = stored_features(record | {"features": []}, [])
    else:
        stored, steps = stored_features(record)
    # stored_rpn splits one image's anchors by their numbers a level.
    counts = [len(boxes) for boxes in record["anchors"]]
    stored |= stored_rpn(
        record | {"anchors": [torch.cat(record["anchors"])], "decoded": (None, None, counts)},
        levels,
    )
    if has_regions(model):
        stored |= stored_rois(record, step)
    for i, detections in enumerate(record["output"]):
        stored[f"detection_boxes_{i}"] = numbers(detections["boxes"])
        stored[f"detection_scores_{i}"] = numbers(detections["scores"])
        stored[f"detection_labels_{i}"] = numbers(detections["labels"], np.int32)
    stored |= configuration(
        case | {"arguments": {}},
        channel_step=steps,
        delta_step={level: DELTA_STEP[level] for level in levels},
        pooled_channel_step=step,
        padded_size=padded_size(model, case),
        rpn_pre_nms=config.MODEL.RPN.PRE_NMS_TOPK_TEST,
        rpn_post_nms=config.MODEL.RPN.POST_NMS_TOPK_TEST,
        **described(case),
    )
    topk = config.MODEL.RPN.PRE_NMS_TOPK_TEST, config.MODEL.RPN.POST_NMS_TOPK_TEST
    margins = rpn_margins(config, record, *topk)
    if has_regions(model):
        margins |= detection_margins(config, model, record)
    exact = in_the_order_of(record, run(model, case, torch.float64))
    differences = compare(record, exact)
    for ours, theirs in zip(record["output"], exact["output"], strict=True):
        assert torch.equal(ours["labels"], theirs["labels"]), "float64 detects otherwise"
        for key, part in (("detection box (px)", "boxes"), ("detection score", "scores")):
            differences[key] = worst(differences, key, ours[part], theirs[part])
    found = {
        "proposals": [len(boxes) for boxes in record["rois"]],
        "detections": [len(detections["boxes"]) for detections in record["output"]],
    }
    if has_regions(model):
        rois, bins = torch.cat(record["rois"]), record["pooled"].shape[-1]
        sides = (rois[:, 2:] - rois[:, :2]) / 2.0 ** levels_of(record["rois"], levels)[:, None]
        found["most points a bin"] = [int(n) for n in torch.ceil(sides / bins).max(dim=0).values]
    save(name, stored, margins, differences, found)


def described(case):
    return {
        "detectron2": detectron2.__version__,
        "file": case["file"],
        "stem_scale": case["stem_scale"],
        "background": "last",
    }


def padded_size(model, case):
    sides = zip(*[image[1:] for image in case["images"]], strict=True)
    divisor = model.backbone.size_divisibility or 1
    return [int(np.ceil(max(side) / divisor) * divisor) for side in sides]


def training_case(name, case):
    config, model = build(case)
    record = run(model, case, training=True)
    counts = [len(boxes) for boxes in record["anchors"]]
    anchors = torch.cat(record["anchors"])
    stored, has_gradients = {}, case.get("gradients", True)
    if has_gradients:
        stored |= stored_rpn(record | {"anchors": [anchors], "decoded": (None, None, counts)})
        stored |= stored_rois(record)
    for key in [key for key in stored if key.startswith(("anchors_", "rpn_deltas_"))]:
        del stored[key]
    boxes, rois = Boxes(torch.tensor(case["ground_truth"])), record["rois"][0]
    stored["ground_truth_boxes_0"] = numbers(boxes.tensor)
    stored["ground_truth_labels_0"] = np.int32(case["labels"])
    stored["rois_0"] = numbers(rois)
    errors = {}
    rpn, predictor = model.proposal_generator, model.roi_heads.box_predictor
    for what, candidates, matcher, coder in (
        ("anchor", anchors, rpn.anchor_matcher, rpn.box2box_transform),
        ("roi", rois, model.roi_heads.proposal_matcher, predictor.box2box_transform),
    ):
        indices, labels = matcher(pairwise_iou(boxes, Boxes(candidates)))
        matches = torch.where(labels == 1, indices, labels.long() - 1)
        targets = coder.get_deltas(candidates[labels == 1], boxes[indices[labels == 1]].tensor)
        stored[f"{what}_matches_0"] = numbers(matches, np.int32)
        stored[f"{what}_positive_targets_0"] = numbers(targets)
        if what == "anchor":
            deltas = [x[0].permute(1, 2, 0).reshape(-1, 4) for x in record["rpn_head"][1]]
            deltas = torch.cat(deltas)[labels == 1]
            sampled = int((labels != -1).sum())
        else:
            deltas = record["predictor"][1].reshape(len(rois), -1, 4)
            deltas = deltas[labels == 1, torch.tensor(case["labels"])[indices[labels == 1]]]
        errors[what] = (deltas - targets).detach()
    # It divides by this number, whatever the number of samples is: the same only if this holds.
    assert sampled == config.MODEL.RPN.BATCH_SIZE_PER_IMAGE, sampled

    losses = record["output"]
    stored |= {loss: numbers(value) for loss, value in losses.items()}
    gradients = {}
    if has_gradients:
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
    pre, post = config.MODEL.RPN.PRE_NMS_TOPK_TRAIN, config.MODEL.RPN.POST_NMS_TOPK_TRAIN
    stored |= configuration(
        case | {"arguments": {}},
        padded_size=padded_size(model, case),
        rpn_training_pre_nms=pre,
        rpn_training_post_nms=post,
        rpn_samples=config.MODEL.RPN.BATCH_SIZE_PER_IMAGE,
        pooled_channel_step=POOLED_CHANNEL_STEP,
        losses=list(losses),
        levels=record["levels"],
        gradient_names=list(gradients),
        **described(case),
    )
    margins = rpn_margins(config, record, pre, post)
    if has_gradients:
        margins |= record["kinks"]
        smallest(margins, "box delta to its target", torch.cat(list(errors.values())))
    iou = pairwise_iou(boxes, Boxes(anchors))
    best = iou.max(dim=0).values
    to_thresholds = torch.stack([best - 0.7, best - 0.3])
    smallest(margins, "anchor IoU to the matcher's thresholds", to_thresholds)
    for row in iou.sort(dim=1, descending=True).values:
        smallest(margins, "anchor IoU of a ground truth's best to its next", row[0] - row[1])
    roi_best = pairwise_iou(boxes, Boxes(rois)).max(dim=0).values
    smallest(margins, "RoI IoU to the matcher's threshold", roi_best - 0.5)
    exact = run(model, case, torch.float64, training=True)
    differences = {}
    for loss, value in losses.items():
        exact_value = float(exact["output"][loss].detach())
        differences[f"{loss} (relative)"] = abs(float(value.detach()) / exact_value - 1)
    if has_gradients:
        differences["gradient (relative, worst parameter)"] = max(
            float(torch.linalg.vector_norm(gradients[parameter].double() - gradient))
            / float(torch.linalg.vector_norm(gradient))
            for parameter, gradient in parameter_gradients(model, exact).items()
        )
    found = {
        "losses": {loss: round(float(value.detach()), 6) for loss, value in losses.items()},
        "anchors": sampled,
        "positive anchors": len(errors["anchor"]),
        "RoIs": len(rois),
        "positive RoIs": len(errors["roi"]),
    }
    save(name, stored, margins, differences, found)


def rpn_margins(config, record, pre, post):
    threshold, margins = config.MODEL.RPN.NMS_THRESH, {}
    for i, size in enumerate(record["sizes"]):
        boxes, scores, groups = [], [], []
        for level, decoded in enumerate(record["decoded_boxes"]):
            logits = record["rpn_head"][0][level][i].detach().permute(1, 2, 0).reshape(-1)
            ranked, order = logits.sort(descending=True)
            if len(ranked) > pre:
                smallest(
                    margins, "objectness logit at the pre-NMS cut", ranked[pre - 1] - ranked[pre]
                )
            boxes.append(decoded[i][order[:pre]])
            scores.append(ranked[:pre])
            groups += [level] * len(ranked[:pre])
        boxes = box_ops.clip_boxes_to_image(torch.cat(boxes), size)
        scores, groups = torch.cat(scores), torch.tensor(groups)
        sides = (boxes[:, 2:] - boxes[:, :2]).min(dim=1).values
        # Those without an area lie outside the image, by more than rounding.
        smallest(margins, "proposal side to the minimum size", sides[sides > 0])
        boxes, scores, groups = boxes[sides > 0], scores[sides > 0], groups[sides > 0]
        at_least = float(record["logits"][i][-1])
        overlap, gap, kept = nms_margins(boxes, scores, groups, threshold, at_least)
        assert len(kept[:post]) == len(record["logits"][i])
        smallest(margins, "proposal IoU to the NMS threshold", overlap)
        smallest(margins, "proposal score gap that NMS relies on", gap)
        if len(kept) > post:
            smallest(margins, "objectness at the post-NMS cut", kept[post - 1] - kept[post])
    if len(record["levels"]) == 1:
        return margins
    rois = torch.cat(record["rois"]).double()
    level = 4 + torch.log2(box_ops.box_area(rois).sqrt() / 224)
    smallest(margins, "RoI level", level[level > 1.5] - level[level > 1.5].round())
    return margins


def detection_margins(config, model, record):
    threshold, margins = config.MODEL.ROI_HEADS.SCORE_THRESH_TEST, {}
    nms, most = config.MODEL.ROI_HEADS.NMS_THRESH_TEST, config.TEST.DETECTIONS_PER_IMAGE
    predictor = model.roi_heads.box_predictor
    all_boxes = predictor.predict_boxes(record["predictor"], record["proposed"][0])
    all_scores = predictor.predict_probs(record["predictor"], record["proposed"][0])
    for boxes, scores, size, detections in zip(
        all_boxes, all_scores, record["sizes"], record["output"], strict=True
    ):
        full = len(detections["scores"]) == most
        at_least = float(detections["scores"][-1]) if full else threshold - 0.01
        boxes = box_ops.clip_boxes_to_image(boxes.reshape(-1, 4), size)
        groups = torch.arange(NUM_CLASSES - 1).expand(len(scores), -1).reshape(-1)
        scores = scores[:, :-1].reshape(-1)
        if not full:
            smallest(margins, "score to the score threshold", scores - threshold)
        over = scores > threshold
        overlap, gap, kept = nms_margins(boxes[over], scores[over], groups[over], nms, at_least)
        assert len(kept[:most]) == len(detections["scores"])
        smallest(margins, "detection IoU to the NMS threshold", overlap)
        smallest(margins, "detection score gap that NMS relies on", gap)
        if len(kept) > most:
            smallest(
                margins, "score at the cut to the most detections", kept[most - 1] - kept[most]
            )
    return margins


def roi_align_case():
    """ROIPooler alone, with regions of every size, shape and place."""
    height, width, channels = 512, 640, 4
    features = [
        torch.from_numpy(
            reference_features(
                f"roi_align P{level}", 2, height // 2**level, width // 2**level, channels
            )
        )
        .permute(0, 3, 1, 2)
        .requires_grad_()
        for level in range(2, 6)
    ]
    hard = [
        [0, 0, 640, 512],
        [0, 0, 640, 6],  # on P2, 23 points a bin across and one down
        [3, 0, 11, 512],
        [0, 100.5, 640, 101.5],
        [0, 0, 447, 112],
        [10.25, 20.5, 620.25, 90.75],
        [64, 32, 288, 256],
        [100, 20, 547, 467],
        [638.5, 510.5, 639.5, 511.5],
        [12.5, 13.25, 12.75, 13.5],
        [0, 0, 3, 2],
        [0, 480, 640, 512],
        [600, 0, 640, 512],
    ]
    draws = (reference_uniform("detectron2 boxes", (51, 4)).astype(np.float64) + 1) / 2
    sides = 4 + 596 * draws[:, 2:] ** 2
    corners = draws[:, :2] * np.maximum([width, height] - sides, 1)
    random = np.round(np.concatenate([corners, corners + sides], axis=1) * 4) / 4
    boxes = torch.tensor(np.concatenate([hard, random]), dtype=torch.float32)
    # Rounding must not decide on a point more. It does not where the quotient is whole.
    level = levels_of([boxes])
    bins = (boxes[:, 2:] - boxes[:, :2]).double() / 2.0 ** level[:, None] / 7
    to_whole = (bins - bins.round()).abs()
    assert float(to_whole[to_whole > 0].min()) > 1e-4
    boxes = [boxes[:40], boxes[40:]]
    pool = ROIPooler(7, [1 / 4, 1 / 8, 1 / 16, 1 / 32], 0, "ROIAlignV2")
    output = pool(features, [Boxes(part) for part in boxes])
    projection = torch.from_numpy(
        reference_uniform("roi_align projection", (len(output), 7, 7, channels))
    )
    (output.permute(0, 2, 3, 1) * projection).sum().backward()
    stored = {
        "boxes_0": numbers(boxes[0]),
        "boxes_1": numbers(boxes[1]),
        "levels": numbers(level, np.int32),
        "output": numbers(output.permute(0, 2, 3, 1)),
    }
    steps = {"P2": 4, "P3": 3, "P4": 2, "P5": 1}
    for (name, step), feature in zip(steps.items(), features, strict=True):
        gradient = numbers(feature.grad.permute(0, 2, 3, 1), np.float64)
        stored[f"gradient_{name}"] = gradient[:, ::step, ::step].astype(np.float32)
        stored[f"gradient_{name}_norm"] = np.sqrt((gradient**2).sum())
        stored[f"gradient_{name}_projection"] = (
            gradient * reference_uniform(f"roi_align P{name[1]} gradient", gradient.shape)
        ).sum()
    stored |= configuration({}, height=height, width=width, channels=channels, gradient_step=steps)
    exact = pool([x.detach().double() for x in features], [Boxes(x.double()) for x in boxes])
    differences = {"pooled": float((output - exact).abs().max().detach())}
    counts = {
        "RoIs a level": np.bincount(stored["levels"])[2:].tolist(),
        "most points a bin": float(torch.ceil(bins).max()),
    }
    save("detectron2_roi_align", stored, {}, differences, counts)


if __name__ == "__main__":
    torch.set_num_threads(2)
    write_names()
    roi_align_case()
    for case_name, one_case in CASES.items():
        inference_case(case_name, one_case)
    for case_name, one_case in TRAINING.items():
        training_case(case_name, one_case)
