"""What the parts of the pyramid are worth on objects over five octaves of size.

    python benchmarks/pyramid_variants.py --output variants --seeds 0 1 2 --steps 400

Trains each variant on keras_fpn_octaves with the same budget, data and order: the RPN alone with
FPN (c) and on C4 (a), compared by the recall of small objects, and Faster R-CNN with FPN (c),
without the top-down pathway (d) and without lateral connections (e), compared by AP. As in the
paper, the backbone has first been trained to classify images, here to tell which of the classes are
in them; the variants of a seed share its weights. Every run adds a line to OUTPUT/results.jsonl; a
rerun goes on where it was stopped. At the end it prints the mean and the range over the seeds, and
for each comparison whether the ranges are apart.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import keras

import keras_fpn
from keras_fpn.data import demo_dataset
from keras_fpn.data.datasets import load_dataset
from keras_fpn.data.pipeline import training_batches
from keras_fpn.optimization import WarmupStepDecay
from keras_fpn.preprocessing import ImageNormalizer
from keras_fpn.runs.evaluation import Evaluation

VARIANTS = {
    "c": partial(keras_fpn.FeaturePyramid, 32),
    "a": partial(keras_fpn.SingleScale, "C4"),
    "d": partial(keras_fpn.FeaturePyramid, 32, top_down=False),
    "e": partial(keras_fpn.FeaturePyramid, 32, lateral=False),
}
# Model, metric, and the variants of which the first is expected to be above the others.
COMPARISONS = (("rpn", "AR100s", ("c", "a")), ("faster_rcnn", "AP", ("c", "d", "e")))
# Octaves of the objects, 8 to 256 pixels in images of 256 to 288, after resizing to `--edge`.
ANCHORS_AT_256 = (12, 24, 48, 96, 192)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--pretraining-steps", type=int, default=400, help="of 16 images")
    parser.add_argument("--batch-size", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=0.001)
    parser.add_argument("--edge", type=int, default=192, help="shorter and longer edge, in pixels")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    data_dir = str(options.output / "data")
    demo_dataset.prepare(data_dir, demo_dataset.KerasFpnOctaves)
    file = options.output / "results.jsonl"
    file.touch()
    for seed in options.seeds:
        for model, _, variants in COMPARISONS:
            for variant in variants:
                key = {
                    "model": model,
                    "variant": variant,
                    "seed": seed,
                    "steps": options.steps,
                    "pretraining_steps": options.pretraining_steps,
                    "batch_size": options.batch_size,
                    "learning_rate": options.learning_rate,
                    "edge": options.edge,
                }
                rows = [json.loads(line) for line in file.read_text().splitlines()]
                if any(row.items() >= key.items() for row in rows):
                    continue
                row = key | run(key, data_dir, options.output)
                with file.open("a") as stream:
                    stream.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    report([json.loads(line) for line in file.read_text().splitlines()], vars(options))


def run(key: dict, data_dir: str, output: Path) -> dict:
    """Trains and evaluates one variant with one seed."""
    train, validation = (
        load_dataset("keras_fpn_octaves", split, data_dir) for split in ("train", "validation")
    )
    keras.utils.clear_session()
    network = pretrained_backbone(key, train, output)
    keras.utils.set_random_seed(key["seed"])
    model = build(
        key["model"], network, VARIANTS[key["variant"]](), key["edge"], key["seed"], train
    )
    rate = WarmupStepDecay(key["learning_rate"], 50, [key["steps"] * 3 // 4])
    model.compile(keras.optimizers.Adam(rate), jit_compile=False)
    batches = training_batches(
        train,
        key["batch_size"],
        shorter_edges=(key["edge"],),
        longest_edge=key["edge"],
        seed=key["seed"],
    )
    started, core_started = time.time(), time.process_time()
    history = model.fit(batches, steps_per_epoch=key["steps"] // 4, epochs=4, verbose=0)
    core_seconds, seconds = time.process_time() - core_started, time.time() - started
    evaluation = Evaluation(model, validation, 8, key["edge"], key["edge"])
    scores, _ = evaluation.run()
    return {
        **{name: scores.metrics[name] for name in evaluation.metric_names},
        "losses": history.history["loss"],
        "seconds": seconds,
        "core_seconds": core_seconds,
    }


def backbone() -> keras.Model:
    """Builds two convolutions for each stride from 4 to 32, after one of stride 2."""
    images = x = keras.Input((None, None, 3))
    maps = {}
    for stage, channels in enumerate((16, 32, 64, 128, 128), start=1):
        for stride in (2,) if stage == 1 else (2, 1):
            x = keras.layers.Conv2D(channels, 3, stride, "same", use_bias=False)(x)
            x = keras.layers.GroupNormalization(8)(x)
            x = keras.layers.ReLU()(x)
        if stage > 1:
            maps[f"C{stage}"] = x
    return keras.Model(images, maps)


def pretrained_backbone(key: dict, train, output: Path) -> keras.Model:
    """Returns the backbone of a seed, trained to tell which classes are in an image."""
    keras.utils.set_random_seed(key["seed"])
    network = backbone()
    name = f"backbone-{key['seed']}-{key['pretraining_steps']}-{key['edge']}.weights.h5"
    if not (output / name).exists():
        images = keras.Input((None, None, 3), name="images")
        sizes = keras.Input((2,), dtype="int32", name="image_sizes")
        features = network(ImageNormalizer()(images, sizes))["C5"]
        features = keras.layers.GlobalAveragePooling2D()(features)
        present = keras.layers.Dense(len(train.class_names), "sigmoid")(features)
        classifier = keras.Model({"images": images, "image_sizes": sizes}, present)
        classifier.compile(
            keras.optimizers.Adam(key["learning_rate"]),
            loss="binary_crossentropy",
            metrics=["binary_accuracy"],
        )
        batches = training_batches(
            train, 16, shorter_edges=(key["edge"],), longest_edge=key["edge"], seed=key["seed"]
        )

        def with_presence(inputs, targets):
            return inputs, keras.ops.max(
                keras.ops.one_hot(targets["labels"], len(train.class_names)), axis=1
            )

        steps = key["pretraining_steps"]
        history = classifier.fit(
            batches.map(with_presence), steps_per_epoch=steps // 4, epochs=4, verbose=0
        )
        accuracy = history.history["binary_accuracy"][-1]
        print(f"backbone of seed {key['seed']}: {accuracy:.3f} of presences right", flush=True)
        network.save_weights(output / name)
    network.load_weights(output / name)
    return network


def build(
    model: str, network: keras.Model, pyramid, edge: int, seed: int, train
) -> keras_fpn.Detector:
    """Builds a variant; whatever is not the variant's is the same for all."""
    sizes = tuple(size * edge // 256 for size in ANCHORS_AT_256)
    arguments = {
        "backbone": network,
        "pyramid": pyramid,
        # A single map has the anchors of all sizes.
        "anchor_sizes": (sizes,) if isinstance(pyramid, keras_fpn.SingleScale) else sizes,
        "seed": seed,
    }
    if model == "rpn":
        fewer = {"training_pre_nms": 50, "training_post_nms": 50}
        return keras_fpn.build_fpn_rpn(proposals=fewer, **arguments)
    number = 300
    return keras_fpn.build_fpn_faster_rcnn(
        class_names=train.class_names,
        proposals={
            "pre_nms": number,
            "post_nms": number,
            "training_pre_nms": number,
            "training_post_nms": number,
        },
        # Eqn. 1 for images of this size in place of 800 pixels.
        roi_pooling={"canonical_size": 224 * edge / 800},
        roi_targets={"num_samples": 64},
        box_head={"hidden_dim": 128},
        **arguments,
    )


def report(rows: list[dict], options: dict) -> None:
    """Prints mean and range of each variant, and whether the ranges are apart."""
    same = ("steps", "pretraining_steps", "batch_size", "learning_rate", "edge")
    rows = [
        row
        for row in rows
        if row["seed"] in options["seeds"] and all(row[name] == options[name] for name in same)
    ]
    for model, metric, variants in COMPARISONS:
        print(f"\n{model}, {metric}")
        values = {
            variant: [
                row[metric] for row in rows if (row["model"], row["variant"]) == (model, variant)
            ]
            for variant in variants
        }
        for variant, numbers in values.items():
            mean = sum(numbers) / len(numbers)
            print(f"  {variant}: {mean:.3f} ({min(numbers):.3f} to {max(numbers):.3f})")
        first, *others = variants
        for other in others:
            apart = min(values[first]) > max(values[other])
            print(f"  {first} above {other} with every seed: {'yes' if apart else 'no'}")


if __name__ == "__main__":
    main()
