"""Detection data sets, stored proposals, the input pipeline, COCO's metrics and drawing.

    from keras_fpn.data import load_dataset, steps_per_epoch, training_batches

    dataset = load_dataset("path/to/coco", "train2017")
    batches = training_batches(dataset, batch_size=2)
    model.fit(batches, steps_per_epoch=steps_per_epoch(dataset, 2), epochs=12)

Reading a folder in COCO's layout requires TensorFlow only; TensorFlow Datasets, COCO's metrics and
drawing require packages of the `training` extra. The names below are imported on first use.
"""

import importlib
from typing import Any

_MODULES = {
    "COCO_CLASS_NAMES": "coco_classes",
    "COCO_METRICS": "coco_metrics",
    "CocoEvaluation": "coco_metrics",
    "DetectionDataset": "datasets",
    "GeometricTransform": "transforms",
    "PROPOSAL_METRICS": "proposal_metrics",
    "Proposals": "stored_proposals",
    "SkipReport": "skip_report",
    "coco_evaluation": "coco_metrics",
    "coco_results": "coco_metrics",
    "draw_detections": "drawing",
    "evaluation_batches": "pipeline",
    "load_dataset": "datasets",
    "proposal_evaluation": "proposal_metrics",
    "read_image": "image_files",
    "read_proposals": "stored_proposals",
    "steps_per_epoch": "pipeline",
    "training_batches": "pipeline",
    "with_proposals": "stored_proposals",
    "write_proposals": "stored_proposals",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
