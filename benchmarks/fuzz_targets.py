"""What `fuzz.py` mutates: a function for each target, which sets it up and returns one try.

A try gets a random generator and an empty folder, where it writes what it reads. It raises a
`Refusal`, or returns what its result was held against.
"""

# ruff: noqa: E402 - the helpers of the tests are found once their folder is on the path

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "data")]

import h5py
import keras
import numpy as np
import tensorflow as tf
from data_sets import plain, write_coco_folder
from fuzz_mutations import (
    TOKENS,
    archive_of,
    edit_h5,
    edit_numbers,
    flip_bits,
    insert_bytes,
    mutate_batch,
    mutate_bytes,
    mutate_json,
    mutate_png,
    mutate_value,
    read_members,
    truncate,
)
from PIL import Image
from small_detector import tiny_backbone, tiny_detector
from test_image_files import READABLE, REJECTED

from keras_fpn.data.datasets import load_dataset
from keras_fpn.data.image_files import read_image
from keras_fpn.data.pipeline import training_batches
from keras_fpn.runs import evaluate, export, predict, train
from keras_fpn.runs.recipes import RECIPES, Recipe
from keras_fpn.runs.run_folder import read_configuration, recipe_in
from keras_fpn.runs.training import build_model, build_optimizer, checked_recipe, steps_per_epoch
from keras_fpn.serving.saved_model import export_saved_model
from keras_fpn.weights.checkpoints import read_checkpoint
from keras_fpn.weights.deferred import deferred_values
from keras_fpn.weights.keras_files import load_keras_file
from keras_fpn.weights.pretrained import open_detector

SAME = "as unmutated"
LONGEST_SENTENCE = 1000
Try = Callable[[Random, Path], str]


class Refusal(Exception):
    """The sentence with which an input was refused."""


@contextlib.contextmanager
def refusals(*names: str) -> Iterator[None]:
    """Turns the documented errors into a `Refusal`, if they say why in a sentence with a name."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError) as error:
        sentence = str(error)
        if not is_sentence(sentence, names):
            raise AssertionError(f"not one sentence that names {names}: {sentence!r}") from error
        raise Refusal(sentence) from error


def is_sentence(text: str, names: tuple[str, ...]) -> bool:
    return (
        text.isprintable()
        and len(text) <= LONGEST_SENTENCE
        and text.endswith((".", "?"))
        and (not names or any(name in text for name in names))
    )


# === COCO JSON ===


def coco_json(folder: Path) -> Try:
    """Annotations: the ground truth is that of a plain reader, and the pipeline takes it."""
    files = {f"{name}.png": plain(gray) for gray, name in enumerate("abcd")}
    objects = [
        {"image_id": 10 * (1 + i % 4), "bbox": [i, 2 * i, 10.5, 20], "area": 100 + i}
        for i in range(6)
    ]
    objects[2] |= {"iscrowd": 1, "category_id": 7}
    root = Path(write_coco_folder(folder, files, objects))
    content = json.loads((root / "annotations" / "instances_train.json").read_text())
    whole = plain_reader(json.dumps(content))

    def attempt(random: Random, scratch: Path) -> str:
        (scratch / "annotations").mkdir()
        (scratch / "train").symlink_to(root / "train")
        file = scratch / "annotations" / "instances_train.json"
        file.write_bytes(mutate_json(content, random))
        with refusals(str(file), str(scratch / "train")):
            dataset = load_dataset(str(scratch), "train")
        truth = dataset.coco_ground_truth()
        found = (
            [(x["id"], x["file_name"], x["height"], x["width"]) for x in truth["images"]],
            sorted(
                (x["image_id"], x["category_id"], *x["bbox"], x["iscrowd"], np.float32(x["area"]))
                for x in truth["annotations"]
            ),
            sorted((x["id"], x["name"]) for x in truth["categories"]),
        )
        assert found == plain_reader(file.read_bytes())
        if random.random() < 0.02 and dataset.boxes.size:
            check_batch(dataset)
        return SAME if found == whole else "as by a plain reader"

    return attempt


def plain_reader(text: str | bytes) -> tuple:
    """Images, objects and categories, without any check."""
    content = json.loads(text)
    sizes = [(x.get("height") or 0, x.get("width") or 0) for x in content["images"]]
    objects = []
    for x in content["annotations"]:
        if np.isfinite(x["bbox"]).all() and x["bbox"][2] > 0 and x["bbox"][3] > 0:
            area = x.get("area")
            if area is None or math.isnan(area):
                area = float(x["bbox"][2]) * x["bbox"][3]
            crowd = bool(x.get("iscrowd"))
            objects.append((x["image_id"], x["category_id"], *x["bbox"], crowd, np.float32(area)))
    return (
        [
            (x["id"], x["file_name"], *(size if all(size) else (40, 60)))
            for x, size in zip(content["images"], sizes, strict=True)
        ],
        sorted(objects),
        sorted((x["id"], x["name"]) for x in content["categories"]),
    )


def check_batch(dataset) -> None:
    """Holds a training batch to what the model requires."""
    batches = training_batches(
        dataset, 2, shorter_edges=[32], longest_edge=64, max_boxes=4, keep_empty_images=True
    )
    for inputs, targets in batches.take(1):
        boxes, labels = targets["boxes"].numpy(), targets["labels"].numpy()
        sizes = inputs["image_sizes"].numpy()[:, None, [1, 0, 1, 0]]
        assert ((boxes >= 0) & (boxes <= sizes)).all()
        assert ((boxes[..., 2:] > boxes[..., :2]).all(-1) | (labels < 0)).all()
        assert ((labels >= -1) & (labels < len(dataset.class_names))).all()


# === Recipes and options ===


def recipe(folder: Path) -> Try:
    """`config.json`: what is read makes a model and a schedule."""
    configuration = {
        "dataset": "keras_fpn_shapes",
        "data_dir": None,
        "train_split": "train",
        "recipe": dataclasses.asdict(RECIPES["demo"]),
        "class_names": ["a", "b", "c"],
        "category_ids": [1, 2, 3],
        "data": {"training": {"images": 3, "digest": "0" * 64}},
    }

    def attempt(random: Random, scratch: Path) -> str:
        file = scratch / "config.json"
        if random.random() < 0.3:
            file.write_bytes(mutate_json(configuration, random))
        else:
            changed = mutate_value(configuration["recipe"], random)
            file.write_text(json.dumps(configuration | {"recipe": changed}))
        with refusals(str(file)):
            found = recipe_in(read_configuration(file))
        return check_recipe_runs(found)

    return attempt


def check_recipe_runs(found: Recipe) -> str:
    """Builds the model and the schedule of a recipe that was accepted."""
    if found == RECIPES["demo"]:
        return SAME
    with refusals():
        found = checked_recipe(found, 1, "auto")
        steps = steps_per_epoch(found, 100)
        with deferred_values():
            model = build_model(found, ["a", "b", "c"])
    keras.config.set_dtype_policy("float32")
    rate = build_optimizer(found, steps)._learning_rate
    for step in (0, 1, steps, found.epochs * steps):
        assert 0 <= float(rate(step)) < math.inf, (step, float(rate(step)))
    assert model.get_config()
    return "with a model and a schedule"


def options(folder: Path) -> Try:
    """Command lines of all programs, up to where their model or data would be opened."""
    lines = {
        train: "--recipe demo --dataset x --output run --train-split a --batch-size 8 --epochs 3"
        " --learning-rate 0.1 --decay-epochs 1 2 --shorter-edges 64 96 --no-horizontal-flip"
        " --anchor-sizes 8 16 32 64 128 --pyramid.channels 64 --proposals.post-nms 300"
        " --box-head.hidden-dim 128 --score-threshold 0.1 --precision bfloat16 --clip-norm 10"
        " --frozen backbone --seed 3 --verbose 2 --strategy single",
        evaluate: "--model x.keras --dataset x --split a --shorter-edge 64 96 --merge vote"
        " --longest-edge 128 --batch-size 2 --strategy single --results found.json",
        predict: "x.png --model x.keras --output found --score-threshold 0.3 --shorter-edge 64"
        " --merge nms --longest-edge 128",
        export: "--model x.keras --output models/1 --shorter-edge 64 --precision bfloat16"
        " --frozen --class-names --errors-as-output --max-images 3 --max-pixels 10000",
    }

    def attempt(random: Random, scratch: Path) -> str:
        program = random.choice(list(lines))
        arguments = mutate_arguments(lines[program].split(), random)
        (scratch / "arguments.txt").write_text("\n".join(map(ascii, arguments)))
        os.chdir(scratch)
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                if program is not train:
                    program.main(arguments)
                _, found = train.parse_arguments(arguments)
        except SystemExit as end:
            refusal = end.code if isinstance(end.code, str) else ""
            if end.code == 0 and "usage:" in printed.getvalue():
                return "with its help"
            if end.code == 2 and printed.getvalue():  # The parser's frame of what is wrong.
                raise Refusal(re.sub(r"[╭─│╮╰╯\s]+", " ", printed.getvalue())) from end
            # Of an error of the operating system, the words are its own.
            if refusal.startswith("error: ") and "\n" not in refusal:
                raise Refusal(refusal) from end
            raise
        return check_recipe_runs(found)

    return attempt


def mutate_arguments(arguments: list[str], random: Random) -> list[str]:
    arguments = list(arguments)
    for _ in range(random.choice((1, 1, 1, 3))):
        place = random.randrange(len(arguments))
        change = random.randrange(5)
        if change == 0:
            del arguments[place]
        elif change == 1:
            arguments.insert(place, random.choice(arguments))
        elif change == 2:
            text = arguments[place]
            cut = random.randrange(len(text) + 1)
            arguments[place] = text[:cut] + random.choice("-.=09xé ") + text[cut + 1 :]
        else:
            arguments[place] = random.choice(TOKENS)
    return arguments


# === Weights ===


def pickles(folder: Path) -> Try:
    """`.pth` and `.pkl`: the same values, or others with a warning that nothing protects them."""
    stored = TESTS / "reference" / "checkpoints"
    contents = {x.name: x.read_bytes() for x in sorted(stored.glob("*.p[tk]*"))}
    contents = {name: x for name, x in contents.items() if not name.endswith(".py")}
    with warnings.catch_warnings(action="ignore"):
        whole = {name: list(flatten(read_checkpoint(stored / name))) for name in contents}

    def attempt(random: Random, scratch: Path) -> str:
        name = random.choice(list(contents))
        mutations = (truncate, flip_bits, insert_bytes, edit_numbers, mutate_bytes)
        mutation = random.choice(mutations)
        content = mutation(contents[name], random)
        is_named = content != contents[name] and random.random() < 0.3
        digits = hashlib.sha256(contents[name]).hexdigest()[:12]
        file = scratch / f"x{f'-{digits}' * is_named}{Path(name).suffix}"
        file.write_bytes(content)
        with warnings.catch_warnings(record=True) as warned, refusals(str(file)):
            warnings.simplefilter("always")
            value = read_checkpoint(file)
        assert not is_named, "read despite the SHA-256 in its name"
        if list(flatten(value)) == whole[name]:
            return SAME
        if "zip" in name:
            assert mutation is edit_numbers, "other values of an archive with checksums"
            return "with values edited together with the checksum"
        assert any("without a checksum" in str(x.message) for x in warned)
        return "with a warning that the format has no checksum"

    return attempt


def flatten(value, name: str = "") -> Iterator[tuple]:
    """Every value inside, with its path, type and bits."""
    if isinstance(value, np.ndarray | np.generic):
        yield name, str(value.dtype), value.shape, value.tobytes()
    elif isinstance(value, dict | list | tuple):
        yield name, type(value), len(value)
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flatten(item, f"{name}/{key!r}")
    else:
        yield name, type(value), repr(value)


def small_model() -> keras.Model:
    """As few operations as a detector can have."""
    keras.utils.set_random_seed(0)
    model = tiny_detector(backbone=tiny_backbone(("C3", "C4")), anchor_sizes=(32, 64, 128))
    # No two weights are equal, so that one that is not loaded shows.
    numbers = np.random.RandomState(0)
    model.set_weights([x + numbers.uniform(0, 0.01, x.shape) for x in model.get_weights()])
    return model


def weights_of(model: keras.Model) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in model.get_weights()]


def weights_h5(folder: Path) -> Try:
    """`.weights.h5`: the same weights, or others with a warning that nothing protects them."""
    model = small_model()
    model.save_weights(folder / "whole.weights.h5")
    content = (folder / "whole.weights.h5").read_bytes()
    whole, others = weights_of(model), [x + 1 for x in model.get_weights()]

    def attempt(random: Random, scratch: Path) -> str:
        file = scratch / "x.weights.h5"
        file.write_bytes(content)
        if random.random() < 0.6:
            edit_h5(file, random, is_checked=random.random() < 0.3)
        else:
            file.write_bytes(mutate_bytes(content, random))
        model.set_weights(others)
        with warnings.catch_warnings(record=True) as warned, refusals(str(file)):
            warnings.simplefilter("always")
            open_detector(file).fit(model, True)()
        if weights_of(model) == whole:
            return SAME
        assert any("no checksum" in str(x.message) for x in warned)
        assert_from_file(model, whole, file.read_bytes())
        return "with a warning that it has no checksum"

    return attempt


def assert_from_file(model: keras.Model, whole: list[bytes], content: bytes) -> None:
    """Every weight that is not as in the unmutated file is in this one."""
    stored = set()
    with h5py.File(io.BytesIO(content)) as file, np.errstate(all="ignore"):
        file.visititems(
            lambda _, item: (
                stored.add(item[()].astype("float32").tobytes())
                if isinstance(item, h5py.Dataset)
                else None
            )
        )
    for variable, found, expected in zip(model.weights, weights_of(model), whole, strict=True):
        assert found == expected or found in stored, variable.path


def keras_file(folder: Path) -> Try:
    """`.keras`: the model of the config, with the weights in the file."""
    model = small_model()
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9))
    model.save(folder / "whole.keras")
    content = (folder / "whole.keras").read_bytes()
    members = read_members(content)
    config, whole = json.loads(members["config.json"]), weights_of(model)

    def attempt(random: Random, scratch: Path) -> str:
        file = scratch / "x.keras"
        kind = random.choice(("bytes", "config", "config", "stage", "weights"))
        changed = dict(members)
        if kind == "config":
            changed["config.json"] = mutate_json(config, random)
        elif kind == "stage":
            stage = random.choice(
                [x for x in config["config"] if isinstance(config["config"][x], dict)]
            )
            own = config["config"] | {stage: mutate_value(config["config"][stage], random)}
            changed["config.json"] = json.dumps(config | {"config": own}).encode()
        elif kind == "weights":
            edited = scratch / "x.h5"
            edited.write_bytes(members["model.weights.h5"])
            edit_h5(edited, random)
            changed["model.weights.h5"] = edited.read_bytes()
            edited.unlink()
        file.write_bytes(mutate_bytes(content, random) if kind == "bytes" else archive_of(changed))
        with refusals(str(file)):
            loaded = load_keras_file(file)
        if kind == "weights":
            assert_from_file(loaded, whole, changed["model.weights.h5"])
            return "with the weights in the file"
        same = weights_of(loaded) == whole
        assert same or kind != "bytes", "other weights"
        if kind == "bytes" or loaded.get_config() == model.get_config():
            return SAME
        return "with the model of its config"

    return attempt


# === Images ===


def mutate_image(random: Random) -> bytes:
    content = random.choice([*READABLE.values(), *(content for content, _ in REJECTED.values())])
    if content[:4] == b"\x89PNG" and random.random() < 0.7:
        return mutate_png(content, random)
    return mutate_bytes(content, random)


def images(folder: Path) -> Try:
    """Image files: pixels of the size that the header says, those of Pillow if it reads them."""
    read = tf.function(read_image, input_signature=[tf.TensorSpec([], tf.string)], autograph=False)
    for content in READABLE.values():
        assert read(content)[1] == b""

    def attempt(random: Random, scratch: Path) -> str:
        content = mutate_image(random)
        (scratch / "image").write_bytes(content)
        pixels, problem = (x.numpy() for x in read(content))
        if problem:
            assert pixels.shape == (0, 0, 3)
            assert re.fullmatch(r"[ -~]{5,100}", problem.decode())
            raise Refusal(problem.decode())
        assert pixels.dtype == np.uint8
        assert min(pixels.shape) > 0
        try:
            with warnings.catch_warnings(action="ignore"):
                pillow = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        except Exception:  # Pillow has no type of its own for what it does not read.
            return "of what Pillow does not read"
        if pillow.shape == pixels.shape and (pillow == pixels).all():
            return "as by Pillow"
        # No checksum says which of them takes a damaged header for what it was.
        assert content[:2] == b"BM", "other pixels than Pillow's"
        return "of a BMP that Pillow takes otherwise"

    return attempt


# === SavedModel ===


def saved_model(folder: Path) -> Try:
    """Requests: finite answers, a reason for each bad file, and the others' answers unchanged."""
    export_saved_model(
        small_model(),
        folder / "model" / "1",
        shorter_edge=32,
        longest_edge=64,
        errors_as_output=True,
        max_images=3,
        max_pixels=10_000,
        warm_up=False,
    )
    signatures = tf.saved_model.load(str(folder / "model" / "1")).signatures
    good = plain(200, 40, 60)

    def answer(name: str, **inputs) -> dict:
        # Errors of TensorFlow name the nodes of the graph after the sentence.
        try:
            outputs = signatures[name](**inputs)
        except tf.errors.InvalidArgumentError as error:
            sentence = re.search(r"assertion failed: \[b?'?\"?(.*?)'?\"?\]", error.message)
            if sentence is None or f"`{next(iter(inputs))}`" not in sentence[1]:
                raise
            raise Refusal(sentence[1]) from error
        return {name: value.numpy() for name, value in outputs.items()}

    alone = answer("encoded_images", image_bytes=tf.constant([good]))

    def attempt(random: Random, scratch: Path) -> str:
        if random.random() < 0.3:
            shape = [
                random.choice((0, 1, 1, 2, 3, 4)),
                *(random.choice((0, 1, 5, 40, 99)) for _ in "hw"),
                3,
            ]
            (scratch / "shape.txt").write_text(str(shape))
            pixels = np.frombuffer(random.randbytes(math.prod(shape)), np.uint8).reshape(shape)
            outputs = answer("serving_default", images=tf.constant(pixels))
            check_answer(outputs, shape[0])
            return "with finite detections"
        files = [
            good if random.random() < 0.4 else mutate_image(random)
            for _ in range(random.choice((0, 1, 2, 2, 3, 3, 4)))
        ]
        for number, file in enumerate(files):
            (scratch / f"image{number}").write_bytes(file)
        outputs = answer("encoded_images", image_bytes=tf.constant(files, tf.string))
        errors = [error.decode() for error in outputs.pop("error")]
        check_answer(outputs, len(files))
        # What is damaged behind its header has enlarged the batch like any other image.
        is_alone = sum(error in ("", "truncated or damaged") for error in errors) == 1
        for row, error in enumerate(errors):
            if error:
                assert re.fullmatch(r"[ -~]{5,100}", error)
                assert not any(values[row].any() for values in outputs.values())
            elif files[row] == good and is_alone:
                for name, values in outputs.items():
                    np.testing.assert_allclose(values[row], alone[name][0], atol=1e-5)
        return "with reasons for bad files" if any(errors) else "with finite detections"

    return attempt


def check_answer(outputs: dict, rows: int) -> None:
    boxes, scores = outputs["detection_boxes"], outputs["detection_scores"]
    assert len(boxes) == rows
    assert ((boxes >= 0) & (boxes <= 1)).all()
    assert ((scores >= 0) & (scores <= 1)).all()
    assert (np.diff(scores) <= 0).all()
    assert ((outputs["detection_classes"] >= 0) & (outputs["detection_classes"] < 3)).all()
    np.testing.assert_array_equal((scores > 0).sum(1), outputs["num_detections"])


# === Ground truth ===


def ground_truth(folder: Path) -> Try:
    """Training data: finite losses and weights, or a model left as it was."""
    model = small_model()
    # A graph would be traced anew for most batches.
    model.compile(keras.optimizers.SGD(1e-3, momentum=0.9), run_eagerly=True)
    pixels = np.random.RandomState(0).randint(0, 256, (2, 64, 64, 3)).astype("uint8")
    targets = {
        "boxes": np.array(
            [[[5, 5, 50, 60], [0, 0, 0, 0]], [[20, 20, 60, 60], [3, 3, 40, 50]]], "float32"
        ),
        "labels": np.array([[0, -1], [2, 1]], "int32"),
    }
    model.train_on_batch(pixels, targets)
    variables = [*model.variables, *model.optimizer.variables]
    start = [np.array(x) for x in variables]
    expected = model.train_on_batch(pixels, targets)
    after = [np.array(x) for x in variables]

    def attempt(random: Random, scratch: Path) -> str:
        x, y = mutate_batch(pixels, targets, random)
        entrances = ["train_on_batch", "fit"]
        # Keras itself refuses generators of anything else.
        if all(
            isinstance(x, np.ndarray) and x.dtype.kind in "biuf" for x in keras.tree.flatten((x, y))
        ):
            entrances.append("generator")
        if described((x, y)) == described((pixels, targets)):
            entrances.append("second batch")
        entrance = random.choice(entrances)
        (scratch / "input.pickle").write_bytes(pickle.dumps((entrance, x, y)))
        for variable, value in zip(variables, start, strict=True):
            variable.assign(value)
        try:
            with refusals():
                losses = train_by(entrance, model, x, y, (pixels, targets))
        except Refusal:
            before = after if entrance == "second batch" else start
            for variable, value in zip(variables, before, strict=True):
                np.testing.assert_array_equal(variable, value, err_msg=variable.path)
            raise
        assert np.isfinite(losses).all(), losses
        for variable in variables:
            assert np.isfinite(np.asarray(variable)).all(), variable.path
        is_same = entrance != "second batch" and np.allclose(losses, expected)
        return SAME if is_same else "with finite losses"

    return attempt


def described(batch: tuple) -> str:
    """Structure, shapes and dtypes, which are the same for all batches of a data set."""
    return str(keras.tree.map_structure(lambda x: (np.shape(x), getattr(x, "dtype", None)), batch))


def train_by(entrance: str, model: keras.Model, x, y, good: tuple) -> list[float]:
    """Takes a step with a batch; of a data set, after a step with a good one."""
    if entrance == "train_on_batch":
        return model.train_on_batch(x, y)
    if entrance == "fit":
        history = model.fit(x, y, verbose=0, shuffle=False).history
    elif entrance == "generator":
        history = model.fit((pair for pair in [(x, y)]), verbose=0).history
    else:
        data = tf.data.Dataset.from_tensors(good)
        data = data.concatenate(tf.data.Dataset.from_tensors((x, y)))
        history = model.fit(data, verbose=0).history
    return [values[-1] for values in history.values()]


TARGETS = {
    x.__name__: x
    for x in (
        *(coco_json, recipe, options, pickles, weights_h5, keras_file, images, saved_model),
        ground_truth,
    )
}
