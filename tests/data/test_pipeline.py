"""Batches for training, evaluation and prediction."""

import collections
import itertools
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from keras_fpn.data.datasets import load_dataset
from keras_fpn.data.pipeline import (
    SkipReport,
    evaluation_batches,
    steps_per_epoch,
    training_batches,
)

SMALL = {"longest_edge": 96, "shorter_edges": (32,)}


def bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Slow bilinear resize with half-pixel centres: the mean of four pixels for each output."""
    resized = np.zeros((height, width, image.shape[2]))
    for row, column in np.ndindex(height, width):
        y = (row + 0.5) * image.shape[0] / height - 0.5
        x = (column + 0.5) * image.shape[1] / width - 0.5
        for i, j in np.ndindex(2, 2):
            yi, xi = int(np.floor(y)) + i, int(np.floor(x)) + j
            weight = (1 - abs(y - yi)) * (1 - abs(x - xi))
            yi, xi = np.clip(yi, 0, image.shape[0] - 1), np.clip(xi, 0, image.shape[1] - 1)
            resized[row, column] += weight * image[yi, xi]
    return resized


def colours(images) -> list[int]:
    """The grey value of each image of a batch, by which `plain` images are known."""
    return [round(float(image[0, 0, 0])) for image in images]


@pytest.fixture
def broken_split(coco_folder, plain):
    """A split of 13 `plain` images, image n with id 10 n, and a function that breaks four.

    The first has no object. The last two are the only portraits; they, the second and the fifth
    break.
    """
    sizes = {n: (60, 40) if n >= 12 else (40, 60) for n in range(1, 14)}
    images = [
        {"id": 10 * n, "file_name": f"{n}.png", "height": height, "width": width}
        for n, (height, width) in sizes.items()
    ]
    objects = [{"image_id": 10 * n, "bbox": [1, 2, 30, 20]} for n in range(2, 14)]
    files = {f"{n}.png": plain(n, *size) for n, size in sizes.items()}
    folder = coco_folder(files, objects, images=images)

    def break_images() -> set[int]:
        """Cut the files behind their headers, and return the ids."""
        for n in (2, 5, 12, 13):
            (pathlib.Path(folder) / "train" / f"{n}.png").write_bytes(files[f"{n}.png"][:45])
        return {20, 50, 120, 130}

    return load_dataset(folder, "train"), break_images


def test_images_are_resized_and_padded_and_boxes_go_with_them(coco_folder, encode):
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (20, 33, 3), np.uint8)
    objects = [{"image_id": 10, "bbox": [3, 4, 6, 10], "category_id": 7}]
    folder = coco_folder({"a.png": encode(image)}, objects, size=(20, 33))
    batches = evaluation_batches(load_dataset(folder, "train"), 2, shorter_edge=30, longest_edge=47)
    [(inputs, targets)] = list(batches)
    # min(30 / 20, 47 / 33) = 1.424: 28.5 x 47 is rounded to 28 x 47.
    assert inputs["image_sizes"].numpy().tolist() == [[28, 47]]
    assert inputs["images"].shape == (1, 32, 64, 3)
    wanted = np.zeros((32, 64, 3))
    wanted[:28, :47] = bilinear(image, 28, 47)
    np.testing.assert_allclose(inputs["images"][0], wanted, atol=1e-3)

    assert targets["image_ids"].numpy().tolist() == [10]
    assert targets["original_sizes"].numpy().tolist() == [[20, 33]]
    assert targets["boxes"].shape == (1, 100, 4)
    scale = np.array([47 / 33, 28 / 20, 47 / 33, 28 / 20])
    np.testing.assert_allclose(targets["boxes"][0, 0], [3, 4, 9, 14] * scale, rtol=1e-6)
    assert targets["labels"][0, :2].numpy().tolist() == [1, -1]
    assert not targets["boxes"][0, 1:].numpy().any()


def test_pixels_for_training_are_rounded_to_whole_grey_values(coco_folder, encode):
    image = np.random.default_rng(0).integers(0, 256, (20, 33, 3), np.uint8)
    objects = [{"image_id": 10, "bbox": [3, 4, 6, 10]}]
    folder = coco_folder({"a.png": encode(image)}, objects, size=(20, 33))
    batches = training_batches(
        load_dataset(folder, "train"), 1, shorter_edges=[30], longest_edge=47, horizontal_flip=False
    )
    [(inputs, _)] = list(batches.take(1))
    pixels = inputs["images"][0].numpy()
    assert pixels.dtype == np.uint8
    exact = bilinear(image, 28, 47)
    assert np.abs(pixels[:28, :47] - exact).max() < 0.5 + 1e-3
    assert not pixels[28:].any()
    assert not pixels[:, 47:].any()


def test_a_flip_mirrors_the_image_and_its_boxes(coco_folder, encode):
    image = np.zeros((32, 48, 3), np.uint8)
    image[4:12, 6:18] = 255
    objects = [{"image_id": 10, "bbox": [6, 4, 12, 8]}]
    folder = coco_folder({"a.png": encode(image)}, objects, size=(32, 48))
    seen = set()
    for inputs, targets in training_batches(load_dataset(folder, "train"), 1, **SMALL).take(20):
        is_flipped = bool(inputs["images"][0, 8, 36, 0] > 0)
        seen.add(is_flipped)
        np.testing.assert_array_equal(
            inputs["images"][0, :32, :48], image[:, ::-1] if is_flipped else image
        )
        wanted = [30, 4, 42, 12] if is_flipped else [6, 4, 18, 12]
        np.testing.assert_allclose(targets["boxes"][0, 0], wanted, atol=1e-5)
    assert seen == {False, True}


def test_every_format_becomes_rgb_or_is_skipped_and_named(coco_folder, encode):
    y, x = np.mgrid[:40, :60]
    smooth = Image.fromarray(np.stack([4 * x, 6 * y, 2 * (x + y)], -1).astype(np.uint8))
    grey16 = ((x + 60 * y) * 27).astype(np.uint16)
    jpeg, png = encode(smooth, "JPEG"), encode(smooth)
    huge = (100_000).to_bytes(4, "big")
    good = {
        "rgb.jpg": jpeg,
        "progressive.jpg": encode(smooth, "JPEG", progressive=True),
        "grey.jpg": encode(smooth.convert("L"), "JPEG"),
        "cmyk.jpg": encode(smooth.convert("CMYK"), "JPEG"),
        "rgb.png": png,
        "palette.png": encode(smooth.convert("P")),
        "alpha.png": encode(smooth.convert("RGBA")),
        "bits.png": encode(smooth.convert("1")),
        "grey16.png": encode(grey16),
        "animated.gif": encode(
            smooth.convert("P"), "GIF", save_all=True, append_images=[Image.new("P", (60, 40))]
        ),
        "rgb.bmp": encode(smooth, "BMP"),
        "alpha.bmp": encode(smooth.convert("RGBA"), "BMP"),
        "palette.bmp": encode(smooth.convert("P"), "BMP"),
        "lossy.webp": encode(smooth, "WEBP"),
    }
    bad = {
        "truncated.jpg": (jpeg[:-200], "truncated or damaged"),
        "truncated.png": (png[: len(png) // 2], "truncated or damaged"),
        "beginning.jpg": (jpeg[:20], "damaged header"),
        "text.jpg": (b"This is no image.", "not a JPEG, PNG, GIF, BMP or WebP file"),
        "empty.jpg": (b"", "empty file"),
        "bomb.png": (png[:16] + huge + huge + png[24:], "claims 100000x100000 pixels"),
        "two_colours.bmp": (
            encode(smooth.convert("1"), "BMP"),
            "a BMP of 1 bits a pixel, compression 0, which TensorFlow cannot decode",
        ),
        "turned.png": (encode(smooth.rotate(90, expand=True)), "is 40x60, annotated as 60x40"),
    }
    files = good | {name: content for name, (content, _) in bad.items()}
    report = SkipReport()
    dataset = load_dataset(coco_folder(files), "train")
    decoded = {}
    for inputs, targets in evaluation_batches(
        dataset, 4, shorter_edge=40, longest_edge=64, report=report
    ):
        assert inputs["image_sizes"].numpy().tolist() == [[40, 60]] * len(inputs["images"])
        for image_id, image in zip(targets["image_ids"].numpy(), inputs["images"], strict=True):
            decoded[list(files)[image_id // 10 - 1]] = image[:40, :60].numpy()
    assert sorted(decoded) == sorted(good)
    for name, image in decoded.items():
        if name == "grey16.png":
            wanted = np.repeat(grey16[..., None] / 257, 3, axis=-1)
        else:
            wanted = np.asarray(Image.open(f"{dataset.image_dir}/{name}").convert("RGB"), float)
        # Exact, but for Pillow's other way from CMYK to RGB and from 16 bits to 8.
        atol = 1 if name in ("cmyk.jpg", "grey16.png") else 0
        np.testing.assert_allclose(image, wanted, rtol=0, atol=atol, err_msg=name)

    assert report.images() == {name: problem for name, (_, problem) in bad.items()}
    assert str(report).startswith("skipped 8 images: beginning.jpg (damaged header), bomb.png (")


def test_training_goes_on_without_the_images_that_cannot_be_decoded(coco_folder, encode, plain):
    random = np.random.default_rng(0)
    noise = encode(random.integers(0, 256, (40, 60, 3), np.uint8), "JPEG")
    files = {f"{i}.png": plain(i) for i in range(6)}
    files |= {"broken.jpg": noise[:-300], "text.jpg": b"no image"}
    objects = [{"image_id": 10 * (i + 1), "bbox": [1, 2, 30, 20]} for i in range(8)]
    dataset = load_dataset(coco_folder(files, objects), "train")
    report = SkipReport()
    seen = collections.Counter()
    batches = training_batches(dataset, 2, report=report, **SMALL)
    for inputs, targets in batches.take(5 * steps_per_epoch(dataset, 2)):
        assert inputs["images"].shape == (2, 32, 64, 3)
        assert (targets["labels"][:, 0].numpy() == 0).all()
        seen.update(colours(inputs["images"]))
    assert sorted(seen) == list(range(6))
    assert seen.total() == 40
    assert report.images() == {
        "broken.jpg": "truncated or damaged",
        "text.jpg": "not a JPEG, PNG, GIF, BMP or WebP file",
    }


def test_the_next_of_its_batch_stands_in_for_an_image_that_cannot_be_decoded(broken_split):
    dataset, break_images = broken_split
    whole = list(training_batches(dataset, 6, **SMALL).take(8))
    report = SkipReport()
    broken = break_images()
    batches = list(training_batches(dataset, 6, report=report, **SMALL).take(8))
    numbers_of_groups = set()
    for (inputs, targets), (_, whole_targets) in zip(batches, whole, strict=True):
        ids = whole_targets["image_ids"].numpy().tolist()
        group = list(dict.fromkeys(ids))
        assert ids == [group[i % len(group)] for i in range(6)]
        numbers_of_groups.add(len(group))
        wanted = []
        for i in range(6):
            following = [group[(i + n) % len(group)] for n in range(len(group))]
            # The first image of the split is empty, the second is broken, the third is the spare.
            wanted.append(next((x for x in following if x not in broken), 30))
        assert targets["image_ids"].numpy().tolist() == wanted
        assert colours(inputs["images"]) == [image_id // 10 for image_id in wanted]
        if set(group) <= broken:
            # The spare is a landscape, as large as a portrait batch has room for.
            assert inputs["images"].shape == (6, 64, 32, 3)
            assert inputs["image_sizes"].numpy().tolist() == [[21, 32]] * 6
            np.testing.assert_allclose(
                np.sort(targets["boxes"][:, 0, 1::2] * (40 / 21)), [[2, 22]] * 6, rtol=1e-5
            )
    # Full ones, landscapes that are left over, and the portraits.
    assert numbers_of_groups == {6, 4, 2}
    assert report.images() == {f"{i // 10}.png": "truncated or damaged" for i in broken}


def test_shards_put_together_are_the_batches_of_one_process(broken_split):
    dataset, break_images = broken_split
    break_images()
    whole = list(training_batches(dataset, 6, **SMALL).take(8))
    for num_shards in (2, 3):
        shards = [
            training_batches(dataset, 6, shard=shard, num_shards=num_shards, **SMALL).take(8)
            for shard in range(num_shards)
        ]
        for batch, *parts in zip(whole, *shards, strict=True):
            assert {tensor.shape[0] for tensor in tf.nest.flatten(parts)} == {6 // num_shards}
            together = tf.nest.map_structure(lambda *rows: tf.concat(rows, 0), *parts)
            tf.nest.map_structure(np.testing.assert_array_equal, together, batch)


def test_a_start_at_step_n_is_the_run_from_its_batch_n_on(broken_split):
    dataset, break_images = broken_split
    break_images()
    assert steps_per_epoch(dataset, 6) == 2
    whole = list(training_batches(dataset, 6, **SMALL).take(8))
    for step in (1, 4):
        rest = list(training_batches(dataset, 6, start_step=step, **SMALL).take(8 - step))
        tf.nest.map_structure(np.testing.assert_array_equal, rest, whole[step:])


def test_an_epoch_is_a_function_of_seed_and_number(coco_folder, plain):
    files = {f"{i}.png": plain(i) for i in range(12)}
    objects = [{"image_id": 10 * (i + 1), "bbox": [1, 2, 30, 20]} for i in range(12)]
    dataset = load_dataset(coco_folder(files, objects), "train")
    arguments = {"longest_edge": 96, "shorter_edges": (24, 32)}

    def read(stream):
        return [
            (*colours(x["images"]), x["image_sizes"].numpy().tolist(), y["boxes"].numpy().tolist())
            for x, y in stream
        ]

    assert steps_per_epoch(dataset, 2) == 6
    tf.random.set_seed(1)
    three_epochs = read(training_batches(dataset, 2, **arguments).take(18))
    tf.random.set_seed(2)
    from_the_second = training_batches(dataset, 2, start_step=6, **arguments).take(12)
    assert read(from_the_second) == three_epochs[6:]
    assert read(training_batches(dataset, 2, seed=1, **arguments).take(6)) != three_epochs[:6]
    epochs = [three_epochs[6 * i : 6 * i + 6] for i in range(3)]
    for epoch in epochs:
        assert sorted(colour for batch in epoch for colour in batch[:2]) == list(range(12))
    assert epochs[0] != epochs[1] != epochs[2]
    sizes = {tuple(size) for epoch in epochs for batch in epoch for size in batch[2]}
    assert sizes == {(24, 36), (32, 48)}


def test_images_of_a_rare_shape_are_trained_on_as_often_as_others(coco_folder, plain):
    files = {f"{i}.png": plain(i, 40, 60) for i in range(5)}
    files |= {f"{i}.png": plain(i, 60, 40) for i in range(5, 8)}
    images = [
        {"id": 10 * (i + 1), "file_name": f"{i}.png", "height": 40, "width": 60} for i in range(8)
    ]
    images = [i | {"height": 60, "width": 40} if i["id"] > 50 else i for i in images]
    objects = [{"image_id": 10 * (i + 1), "bbox": [1, 2, 30, 20]} for i in range(8)]
    dataset = load_dataset(coco_folder(files, objects, images=images), "train")
    # Neither the 5 landscape nor the 3 portrait images fill a batch of 8.
    assert steps_per_epoch(dataset, 8) == 1
    seen = collections.Counter()
    for inputs, _ in training_batches(dataset, 8, **SMALL).take(16):
        assert inputs["images"].shape in ((8, 32, 64, 3), (8, 64, 32, 3))
        seen.update(colours(inputs["images"]))
    portrait = sum(seen[i] for i in range(5, 8)) / seen.total()
    assert sorted(seen) == list(range(8))
    assert 0.2 < portrait < 0.8


def test_boxes_that_are_none_are_left_out_and_counted(coco_folder, plain):
    objects = [
        {"image_id": 10, "bbox": [-6, -4, 36, 24]},
        {"image_id": 10, "bbox": [1, 2, float("nan"), 5]},
        {"image_id": 10, "bbox": [1, 2, 0, 5]},
        {"image_id": 10, "bbox": [9, 9, -4, -5]},
        {"image_id": 10, "bbox": [60, 0, 10, 10]},
        {"image_id": 10, "bbox": [0, 0, 60, 40], "iscrowd": 1},
        {"image_id": 10, "bbox": [50, 30, 100, 100], "category_id": 7},
    ]
    report = SkipReport()
    dataset = load_dataset(coco_folder({"a.png": plain(1)}, objects), "train")
    batches = evaluation_batches(dataset, 1, shorter_edge=40, longest_edge=60, report=report)
    for _ in range(2):  # A second pass counts nothing twice.
        [(_, targets)] = list(batches)
    np.testing.assert_allclose(
        targets["boxes"][0, :3], [[0, 0, 30, 20], [50, 30, 60, 40], [0, 0, 0, 0]], atol=1e-5
    )
    assert targets["labels"][0, :3].numpy().tolist() == [0, 1, -1]
    assert report.boxes() == {"not finite": 1, "without area": 2, "outside the image": 1}
    wanted = "skipped 4 boxes: 1 not finite, 2 without area, 1 outside the image"
    assert str(report) == wanted


def test_the_largest_boxes_are_kept_where_there_are_too_many(coco_folder, plain):
    objects = [{"image_id": 10, "bbox": [0, 0, size, size]} for size in (9, 3, 30, 12, 6)]
    report = SkipReport()
    dataset = load_dataset(coco_folder({"a.png": plain(1)}, objects), "train")
    [(_, targets)] = list(
        evaluation_batches(dataset, 1, shorter_edge=40, longest_edge=60, max_boxes=3, report=report)
    )
    np.testing.assert_allclose(targets["boxes"][0, :, 2], [9, 30, 12], atol=1e-5)
    assert report.boxes() == {"over max_boxes": 2}


def test_images_without_objects_are_trained_on_only_when_asked_for(coco_folder, plain):
    files = {f"{i}.png": plain(i) for i in range(4)}
    objects = [
        {"image_id": 10, "bbox": [1, 2, 30, 20]},
        {"image_id": 20, "bbox": [1, 2, 30, 20], "iscrowd": 1},
    ]
    dataset = load_dataset(coco_folder(files, objects), "train")
    batches = training_batches(dataset, 2, **SMALL).take(4)
    assert {colour for x, _ in batches for colour in colours(x["images"])} == {0}
    batches = training_batches(dataset, 2, keep_empty_images=True, **SMALL).take(2)
    assert {colour for x, _ in batches for colour in colours(x["images"])} == {0, 1, 2, 3}


def test_nothing_to_train_on_is_an_error(coco_folder, encode, plain):
    jpeg = encode(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8), "JPEG")
    files = {"empty.png": plain(1), "broken.jpg": jpeg[:-300]}
    dataset = load_dataset(coco_folder(files, [{"image_id": 20, "bbox": [1, 2, 3, 4]}]), "train")
    with pytest.raises(ValueError, match=r"No image of split 'train' .* all 2 are without"):
        training_batches(dataset, 2)
    with pytest.raises(ValueError, match=r"batch_size is 3, .* only 2 images"):
        training_batches(dataset, 3)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, it is 0"),
        ({"max_boxes": 0}, "max_boxes must be"),
        ({"longest_edge": 0}, "longest_edge must be"),
        ({"shorter_edges": ()}, "smallest shorter edge"),
        ({"aspect_ratios": (0.5,)}, r"received \(0\.5,\)"),
        ({"start_step": -1}, "start_step must not be negative, it is -1"),
        ({"num_shards": 0}, "num_shards must be at least 1, it is 0"),
        ({"shard": 2, "num_shards": 2}, r"shard is one of 0\.\.1, .* it is 2"),
        ({"batch_size": 4, "num_shards": 3}, "batch_size is 4, which 3 workers cannot share"),
    ],
)
def test_arguments_out_of_range_are_refused(coco_folder, plain, changes, sentence):
    dataset = load_dataset(coco_folder({"a.png": plain(1)}), "train")
    with pytest.raises(ValueError, match=sentence):
        training_batches(dataset, **({"batch_size": 1} | changes))


def test_evaluation_gives_every_image_once_in_order(shapes_dir):
    dataset = load_dataset("keras_fpn_shapes", "train", str(shapes_dir))
    ids = collections.defaultdict(list)
    for inputs, targets in evaluation_batches(dataset, 3, shorter_edge=64, longest_edge=96):
        ids[tuple(inputs["images"].shape[1:3])] += targets["image_ids"].numpy().tolist()
    order = [int(record["image_id"]) for record in dataset.records().as_numpy_iterator()]
    assert sorted(itertools.chain(*ids.values())) == sorted(order)
    for of_bucket in ids.values():
        assert of_bucket == [image_id for image_id in order if image_id in of_bucket]


@pytest.mark.parametrize("num_shards", [2, 3])
def test_every_image_is_in_one_evaluation_shard(coco_folder, plain, num_shards):
    files = {f"{i}.png": plain(i) for i in range(7)} | {"text.jpg": b"no image"}
    dataset = load_dataset(coco_folder(files), "train")

    def ids(shard: int, num_shards: int) -> list[int]:
        batches = evaluation_batches(
            dataset, 2, shorter_edge=32, longest_edge=48, shard=shard, num_shards=num_shards
        )
        return [image_id for _, targets in batches for image_id in targets["image_ids"].numpy()]

    for shard in range(num_shards):
        assert ids(shard, num_shards) == list(range(10, 80, 10))[shard::num_shards]
    if num_shards == 3:
        assert ids(7, 8) == []


def test_two_replicas_get_the_halves_of_each_batch(shapes_dir):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("tf.distribute needs Keras on TensorFlow")
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    dataset = load_dataset("keras_fpn_shapes", "train", str(shapes_dir))
    report = SkipReport()
    batches = training_batches(dataset, 4, report=report, **SMALL)
    distributed = iter(strategy.experimental_distribute_dataset(batches))
    for inputs, targets in batches.take(4):
        halves = next(distributed)
        for whole, parts in ((inputs, halves[0]), (targets, halves[1])):
            for key, values in whole.items():
                local = strategy.experimental_local_results(parts[key])
                assert [part.shape[0] for part in local] == [2, 2]
                np.testing.assert_array_equal(tf.concat(local, 0), values)


def test_keras_fits_on_the_batches(shapes_dir):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("the model of this test trains on TensorFlow")

    class CountImages(keras.Model):
        def build(self, input_shape):
            self.images = self.add_weight(name="images", shape=(), initializer="zeros")

        def train_step(self, data):
            inputs, targets = data
            self.images.assign_add(float(inputs["images"].shape[0]))
            return {"boxes": tf.reduce_sum(tf.cast(targets["labels"] >= 0, tf.float32))}

    dataset = load_dataset("keras_fpn_shapes", "train", str(shapes_dir))
    model = CountImages()
    model.build(None)
    model.compile()
    history = model.fit(
        training_batches(dataset, 3, **SMALL),
        steps_per_epoch=steps_per_epoch(dataset, 3),
        epochs=2,
        shuffle=False,
        verbose=0,
    )
    assert float(model.images) == 18
    assert min(history.history["boxes"]) > 0
