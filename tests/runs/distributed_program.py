"""What test_distributed.py runs in each of its processes: 12 steps and an evaluation.

The detector samples all anchors and all proposals, so that a rounding error cannot change which of
several candidates of nearly equal scores are chosen.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from PIL import Image
from small_detector import two_level_detector
from subclasses import DoublesBoth, TakesKerasStep

from keras_fpn.data.coco_metrics import COCO_METRICS
from keras_fpn.data.datasets import load_dataset
from keras_fpn.faster_rcnn import FasterRCNN
from keras_fpn.optimization import SGDWithL2
from keras_fpn.runs.evaluation import Evaluation
from keras_fpn.runs.strategies import choose_strategy, worker_index
from keras_fpn.runs.training import on_replicas

# Over 12 steps the weights move by more than 0.01; rounding errors stay small.
LEARNING_RATE = 0.003
CLIP_NORM = 5.0
ALL_SAMPLES = {
    "rpn_targets": {"num_samples": 513},
    "proposals": {"training_pre_nms": 384, "training_post_nms": 513, "nms_iou_threshold": 1.0},
    "roi_targets": {"num_samples": 516},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--optimizer", choices=("plain", "scaled"), default="plain")
    options = parser.parse_args()
    if options.devices > 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        devices = [tf.config.LogicalDeviceConfiguration()] * options.devices
        tf.config.set_logical_device_configuration(cpu, devices)
    # Optimizing a graph takes longer than running it a few times.
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    strategy = choose_strategy("mirrored" if options.devices > 1 else "auto")
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = two_level_detector(**ALL_SAMPLES)
        # The first loss scale overflows with losses of this size.
        weights = dict.fromkeys(model.loss_names, 64.0 if options.optimizer == "scaled" else 1.0)
        model.compile(optimizer(options.optimizer), loss_weights=weights, jit_compile=False)
    before = model.get_weights()
    metrics, results = evaluate(model)
    losses = KeepLosses()
    data = on_replicas(strategy, 6, 0, batches)
    model.fit(data, epochs=2, steps_per_epoch=6, shuffle=False, verbose=0, callbacks=[losses])
    after = model.get_weights()
    changes = {name: subclass_changes(strategy, name) for name in SUBCLASSES}
    if worker_index(strategy) == 0:
        np.savez(
            options.output,
            losses=np.array(losses.rows),
            loss_scale=getattr(model.optimizer, "dynamic_scale", 1.0),
            AP=np.array([metrics[name] for name in COCO_METRICS]),
            evaluated_ids=np.unique([result["image_id"] for result in results]),
            **{f"weight{i}": weight for i, weight in enumerate(after)},
            **{f"beforeweight{i}": weight for i, weight in enumerate(before)},
            **{f"change of {name}": change for name, change in changes.items()},
        )


# Name to a class and the loss weights it is compiled with.
SUBCLASSES = {
    "train_step": (TakesKerasStep, None),
    "loss_weights": (FasterRCNN, {"box_loss": 2.0}),
    "compute_losses and compute_loss": (DoublesBoth, None),
}


def subclass_changes(strategy: tf.distribute.Strategy, name: str) -> np.ndarray:
    """Returns the change of all weights of a detector by one step of SGD."""
    subclass, loss_weights = SUBCLASSES[name]
    keras.utils.set_random_seed(0)
    with strategy.scope():
        config = two_level_detector(**ALL_SAMPLES).get_config()
        model = subclass.from_config(config)
        model.compile(keras.optimizers.SGD(0.1), loss_weights=loss_weights, jit_compile=False)
    before = np.concatenate([weight.ravel() for weight in model.get_weights()])
    data = on_replicas(strategy, 6, 0, batches)
    model.fit(data, steps_per_epoch=1, shuffle=False, verbose=0)
    return np.concatenate([weight.ravel() for weight in model.get_weights()]) - before


def optimizer(kind: str) -> keras.optimizers.Optimizer:
    """Returns SGD, "scaled" with EMA, and with a loss scale and clipping by the whole gradient.

    The gradient's norm is above `CLIP_NORM`.
    """
    if kind == "plain":
        return keras.optimizers.SGD(LEARNING_RATE, momentum=0.9)
    clipped = SGDWithL2(LEARNING_RATE, global_clipnorm=CLIP_NORM, use_ema=True, ema_momentum=0.8)
    return keras.optimizers.LossScaleOptimizer(clipped, initial_scale=2.0**127)


class KeepLosses(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.rows = []

    def on_train_batch_end(self, batch, logs=None):
        self.rows.append([self.model.last_step[name] for name in self.model.loss_names])


def examples() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns thirty images of noise with three boxes each."""
    random = np.random.RandomState(0)
    images = random.randint(0, 256, (30, 32, 48, 3)).astype("uint8")
    corners = random.uniform(0, 15, (30, 3, 2))
    boxes = np.concatenate([corners, corners + random.uniform(5, 17, (30, 3, 2))], axis=-1)
    return images, {"boxes": boxes.astype("float32"), "labels": random.randint(0, 3, (30, 3))}


def batches(start_step: int, shard: int, num_shards: int) -> tf.data.Dataset:
    """Returns a worker's rows of batches of six images."""
    rows = 6 // num_shards
    data = tf.data.Dataset.from_tensor_slices(examples()).batch(6, drop_remainder=True)
    data = data.map(lambda *batch: tf.nest.map_structure(lambda x: x[shard * rows :][:rows], batch))
    return data.repeat().skip(start_step)


def evaluate(model: keras.Model) -> tuple[dict, list]:
    """Returns COCO's metrics and detections of seven images, with a ground truth near to them.

    An eighth file is not an image.
    """
    images, _ = examples()
    found = {name: np.asarray(value) for name, value in model(images[:7]).items()}
    random = np.random.RandomState(1)
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "val").mkdir()
        (Path(root) / "annotations").mkdir()
        annotations = []
        for i in range(7):
            Image.fromarray(images[i]).save(Path(root) / "val" / f"{i}.png")
            is_found = found["labels"][i] >= 0
            boxes = found["boxes"][i][is_found][::3]
            boxes = boxes + random.uniform(-1.5, 1.5, boxes.shape)
            labels = found["labels"][i][is_found][::3]
            for x1, y1, x2, y2, label in np.column_stack([boxes, labels]).tolist():
                box = [x1, y1, x2 - x1, y2 - y1]
                annotations.append(
                    {"image_id": 10 * (i + 1), "category_id": int(label) + 1, "bbox": box}
                )
        (Path(root) / "val" / "7.png").touch()
        annotations.append({"image_id": 80, "category_id": 1, "bbox": [1, 2, 20, 20]})
        content = {
            "images": [{"id": 10 * (i + 1), "file_name": f"{i}.png"} for i in range(8)],
            "annotations": [{"id": i, **fields} for i, fields in enumerate(annotations)],
            "categories": [{"id": i + 1, "name": f"class {i}"} for i in range(3)],
        }
        file = Path(root) / "annotations" / "instances_val.json"
        file.write_text(json.dumps(content))
        dataset = load_dataset(root, "val")
        evaluation = Evaluation(model, dataset, 6, 32, 48)
        (metrics, _), results = evaluation.run()
    assert [image["id"] for image in evaluation.ground_truth["images"]] == list(range(10, 80, 10))
    assert {x["image_id"] for x in evaluation.ground_truth["annotations"]} <= set(range(10, 80, 10))
    return metrics, results


if __name__ == "__main__":
    main()
