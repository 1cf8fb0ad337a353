"""Measures the input pipeline of training against raw decode-and-resize, and against the step.

    python benchmarks/input_pipeline.py --dataset coco/2017 --data-dir ~/tensorflow_datasets
    python benchmarks/input_pipeline.py --dataset coco/2017 --data-dir ~/tensorflow_datasets \
        --recipe 1x --shorter-edge 800 --longest-edge 1333 --batch-size 2

The floor decodes and resizes the same files, from memory, in the same order to the same sizes, in
one `Dataset.map` with a thread for each core, and does nothing else: `tf.io.decode_jpeg`, then
`tf.image.resize`. "float floor" is the same with a cast to float in between, as in the pipeline,
which makes TensorFlow's resize faster. Floors and pipeline are measured in turns, each turn over
one epoch, then the step, one batch at a time; what is printed are medians.
"""

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf

from keras_fpn.data.datasets import DetectionDataset, load_dataset
from keras_fpn.data.image_files import resize_image
from keras_fpn.data.pipeline import num_cores, steps_per_epoch, training_batches
from keras_fpn.runs.recipes import RECIPES, Recipe


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="coco/2017", help="as train.py takes it")
    parser.add_argument("--data-dir")
    parser.add_argument("--split", default="train")
    parser.add_argument(
        "--recipe", choices=RECIPES, default="demo", help="see keras_fpn/runs/recipes.py"
    )
    parser.add_argument("--shorter-edge", type=int, help="(default: the recipe's)")
    parser.add_argument("--longest-edge", type=int, help="(default: the recipe's)")
    parser.add_argument("--batch-size", type=int, help="(default: the recipe's, or 2)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of the rates; 0 for none")
    parser.add_argument("--epochs", type=int, default=10, help="of the measured memory")
    parser.add_argument("--skip-step", action="store_true", help="do not measure the step")
    options = parser.parse_args()
    recipe = with_options(RECIPES[options.recipe], options)
    data = load_dataset(options.dataset, options.split, options.data_dir)
    batches = training_batches(
        data,
        recipe.batch_size,
        shorter_edges=recipe.shorter_edges,
        longest_edge=recipe.longest_edge,
        horizontal_flip=recipe.horizontal_flip,
        keep_empty_images=recipe.keep_empty_images,
        seed=recipe.seed,
    )
    steps = steps_per_epoch(data, recipe.batch_size)
    print(
        f"{data.num_images} images of {data.name} ({data.split}) at {recipe.shorter_edges} / "
        f"{recipe.longest_edge}, in batches of {recipe.batch_size}, on {num_cores()} cores"
    )
    measure_memory(batches, steps, options.epochs)
    if options.rounds:
        measure_rates(data, recipe, batches, steps, options)


def with_options(recipe: Recipe, options: argparse.Namespace) -> Recipe:
    """Returns the recipe with the command line's values and random weights, without downloads."""
    edge = options.shorter_edge
    return dataclasses.replace(
        recipe,
        model={k: v for k, v in recipe.model.items() if k not in ("weights", "backbone_weights")},
        shorter_edges=(edge,) if edge else recipe.shorter_edges,
        longest_edge=options.longest_edge or recipe.longest_edge,
        batch_size=options.batch_size or recipe.batch_size or 2,
    )


def measure_memory(batches: tf.data.Dataset, steps: int, epochs: int) -> None:
    iterator = iter(batches)
    sizes = []
    for _ in range(epochs):
        for _ in range(steps):
            next(iterator)
        sizes.append(resident())
    if sizes:
        print("resident MB after each epoch:", ", ".join(f"{size:.0f}" for size in sizes))


def measure_rates(
    data: DetectionDataset,
    recipe: Recipe,
    batches: tf.data.Dataset,
    steps: int,
    options: argparse.Namespace,
) -> None:
    ready = batches_ahead(recipe.batch_size)
    rows = [row for batch in batches.take(ready + steps).skip(ready) for row in rows_of(*batch)]
    calls = {
        "floor": lambda: rate(raw_images(data, rows, tf.image.resize), 2 * num_cores(), len(rows)),
        "float floor": lambda: rate(
            raw_images(data, rows, resize_image), 2 * num_cores(), len(rows)
        ),
        "pipeline": lambda: rate(batches, ready, steps) * recipe.batch_size,
    }
    rates = in_turns(calls, options.rounds)
    if not options.skip_step:
        rates |= in_turns(
            {"step": training_step(data, recipe, next(iter(batches)))}, options.rounds
        )
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, median in medians.items():
        spread = f"{min(rates[name]):.1f}..{max(rates[name]):.1f}"
        print(f"{name:11s} {median:7.1f} images/s ({spread})")
    for floor in ("floor", "float floor"):
        # Of each turn: what else runs on the machine changes from turn to turn.
        shares = [p / f for p, f in zip(rates["pipeline"], rates[floor], strict=True)]
        print(
            f"the pipeline has {statistics.median(shares):.1%} of the rate of the {floor} "
            f"({min(shares):.1%}..{max(shares):.1%})"
        )
    if not options.skip_step:
        print(f"and feeds {medians['pipeline'] / medians['step']:.1f} such steps at a time")


def in_turns(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, tuple[float, ...]]:
    """What each call gives in each round, after one to warm up."""
    rounds_of_calls = [[call() for call in calls.values()] for _ in range(rounds + 1)]
    return dict(zip(calls, zip(*rounds_of_calls[1:], strict=True), strict=True))


def rate(dataset: Iterable, ready: int, number: int) -> float:
    """Elements a second over `number` of them, once the `ready` first are out of the buffers."""
    iterator = iter(dataset)
    for _ in range(ready):
        next(iterator)
    started = time.perf_counter()
    for _ in range(number):
        next(iterator)
    return number / (time.perf_counter() - started)


def batches_ahead(batch_size: int) -> int:
    """More batches than the pipeline can have ready before they are asked for."""
    return 8 + 2 * num_cores() // batch_size


def rows_of(inputs: dict, targets: dict) -> list[tuple[int, tuple[int, int]]]:
    """Id and size of each image of a batch."""
    ids, sizes = targets["image_ids"].numpy(), inputs["image_sizes"].numpy()
    return [(int(i), (int(h), int(w))) for i, (h, w) in zip(ids, sizes, strict=True)]


def raw_images(
    data: DetectionDataset, rows: list[tuple[int, tuple[int, int]]], resize: Callable
) -> tf.data.Dataset:
    """A floor: these images from memory, decoded and resized."""
    if not FILES:
        FILES.update({int(x["image_id"]): x["image_bytes"] for x in data.records()})
    files = tf.stack([FILES[image_id] for image_id, _ in rows])
    sizes = tf.constant([size for _, size in rows])

    def decode(content: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
        # The DCT as in decode_image; it decides the pixels.
        image = tf.io.decode_jpeg(content, channels=3, dct_method="INTEGER_ACCURATE")
        return resize(image, size)

    images = tf.data.Dataset.from_tensor_slices((files, sizes)).repeat()
    options = tf.data.Options()
    options.threading.private_threadpool_size = num_cores()
    options.threading.max_intra_op_parallelism = 1
    return images.map(decode, num_parallel_calls=num_cores()).with_options(options)


FILES = {}  # The file of each image id, read once.


def training_step(data: DetectionDataset, recipe: Recipe, batch: tuple) -> Callable[[], float]:
    """A function that takes one training step and returns its images a second."""
    from keras_fpn.runs.training import build_model, build_optimizer

    model = build_model(recipe, data.class_names)
    model.compile(build_optimizer(recipe, steps_per_epoch(data, recipe.batch_size)))

    def take_step() -> float:
        started = time.perf_counter()
        model.train_on_batch(*batch)
        return recipe.batch_size / (time.perf_counter() - started)

    return take_step


def resident() -> float:
    """Megabytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    main()
