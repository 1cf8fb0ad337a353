"""Batches for training and evaluation."""

import collections
import dataclasses
import itertools
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from data_sets import plain, write_coco_folder
from PIL import Image

from keras_fpn.data.datasets import DetectionDataset, load_dataset
from keras_fpn.data.pipeline import evaluation_batches, steps_per_epoch, training_batches
from keras_fpn.data.skip_report import SkipReport

SMALL = {"longest_edge": 96, "shorter_edges": (32,)}


def bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Slow bilinear resize with half-pixel centers: the mean of four pixels for each output."""
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


def grays(images) -> list[int]:
    """Returns the gray level of each image of a batch, which identifies `plain` images."""
    return [round(float(image[0, 0, 0])) for image in images]


@pytest.fixture(scope="module")
def broken_split(tmp_path_factory):
    """A split of 13 `plain` images, image n with id 10 n, with its batches intact and broken.

    The first image has no objects. The last two are the only portraits; they, the second and the
    fifth are then truncated.

    Returns:
        The data set, 8 batches before and 8 after truncation, and the report of the latter.
    """
    sizes = {n: (60, 40) if n >= 12 else (40, 60) for n in range(1, 14)}
    images = [
        {"id": 10 * n, "file_name": f"{n}.png", "height": height, "width": width}
        for n, (height, width) in sizes.items()
    ]
    objects = [{"image_id": 10 * n, "bbox": [1, 2, 30, 20]} for n in range(2, 14)]
    files = {f"{n}.png": plain(n, *size) for n, size in sizes.items()}
    folder = write_coco_folder(tmp_path_factory.mktemp("broken"), files, objects, images=images)
    dataset = load_dataset(folder, "train")
    assert steps_per_epoch(dataset, 6) == 2
    intact = list(training_batches(dataset, 6, **SMALL).take(8))
    for n in (2, 5, 12, 13):
        (pathlib.Path(folder) / "train" / f"{n}.png").write_bytes(files[f"{n}.png"][:45])
    report = SkipReport()
    tf.random.set_seed(1)
    broken = list(training_batches(dataset, 6, report=report, **SMALL).take(8))
    return dataset, intact, broken, report


@pytest.fixture(scope="module")
def shapes(shapes_dir):
    """The demo data set, its training batches of 4, and their report."""
    dataset = load_dataset("keras_fpn_shapes", "train", str(shapes_dir))
    report = SkipReport()
    return dataset, training_batches(dataset, 4, report=report, **SMALL), report


def test_images_are_resized_and_padded_with_their_boxes(coco_folder, encode):
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (20, 33, 3), np.uint8)
    objects = [{"image_id": 10, "bbox": [3, 4, 6, 10], "category_id": 7}]
    folder = coco_folder({"a.png": encode(image)}, objects, size=(20, 33))
    batches = evaluation_batches(load_dataset(folder, "train"), 2, shorter_edge=30, longest_edge=47)
    [(inputs, targets)] = list(batches)
    # min(30 / 20, 47 / 33) = 1.424: 28.5 x 47 is rounded to 28 x 47.
    assert inputs["image_sizes"].numpy().tolist() == [[28, 47]]
    assert inputs["images"].shape == (1, 32, 64, 3)
    expected = np.zeros((32, 64, 3))
    expected[:28, :47] = bilinear(image, 28, 47)
    np.testing.assert_allclose(inputs["images"][0], expected, atol=1e-3)

    assert targets["image_ids"].numpy().tolist() == [10]
    assert targets["original_sizes"].numpy().tolist() == [[20, 33]]
    assert targets["boxes"].shape == (1, 100, 4)
    scale = np.array([47 / 33, 28 / 20, 47 / 33, 28 / 20])
    np.testing.assert_allclose(targets["boxes"][0, 0], [3, 4, 9, 14] * scale, rtol=1e-6)
    assert targets["labels"][0, :2].numpy().tolist() == [1, -1]
    assert not targets["boxes"][0, 1:].numpy().any()


def test_training_flips_images_with_their_boxes_and_rounds_pixels(coco_folder, encode):
    image = np.random.default_rng(0).integers(0, 256, (20, 33, 3), np.uint8)
    objects = [{"image_id": 10, "bbox": [3, 4, 6, 10]}]
    folder = coco_folder({"a.png": encode(image)}, objects, size=(20, 33))
    one, shorter, longest, max_boxes = np.array([1, 30, 47, 100])  # NumPy integers are accepted.
    batches = training_batches(
        load_dataset(folder, "train"),
        one,
        shorter_edges=[shorter],
        longest_edge=longest,
        max_boxes=max_boxes,
    )
    exact = {False: bilinear(image, 28, 47), True: bilinear(image[:, ::-1], 28, 47)}
    scale = np.array([47 / 33, 28 / 20, 47 / 33, 28 / 20])
    boxes = {False: [3, 4, 9, 14] * scale, True: [24, 4, 30, 14] * scale}
    seen = set()
    for inputs, targets in batches.take(20):
        assert set(targets) == {"boxes", "labels", "image_ids"}
        pixels = inputs["images"][0].numpy()
        assert pixels.dtype == np.uint8
        is_flipped = bool(np.abs(pixels[:28, :47] - exact[True]).max() < 1)
        seen.add(is_flipped)
        assert np.abs(pixels[:28, :47] - exact[is_flipped]).max() < 0.5 + 1e-3
        assert not pixels[28:].any()
        assert not pixels[:, 47:].any()
        np.testing.assert_allclose(targets["boxes"][0, 0], boxes[is_flipped], rtol=1e-5)
    assert seen == {False, True}


@dataclasses.dataclass(frozen=True)
class BoxMasks(DetectionDataset):
    """A data set whose masks are the insides of its boxes, with the same proposals for each image.

    The second proposal has no area.
    """

    boxes_only: DetectionDataset

    def records(self, shuffle_seed=None, shuffle_buffer=2048):
        # In pixels of an image of 10 x 20.
        proposals = [
            [2.0, 2, 10, 6],
            [6, 3, 6, 9],
            [10, 5, 30, 20],
            [0, 0, 20, 10],
            [0, 0, 10, 5],
        ]

        def add(record):
            y, x = (
                (tf.range(record["size"][i], dtype=tf.float32) + 0.5)
                / tf.cast(record["size"][i], tf.float32)
                for i in range(2)
            )
            x1, y1, x2, y2 = (edge[:, None] for edge in tf.unstack(record["boxes"], axis=1))
            rows, columns = (y > y1) & (y < y2), (x > x1) & (x < x2)
            masks = tf.cast(rows[:, :, None] & columns[:, None], tf.uint8)
            return record | {
                "masks": masks,
                "proposals": tf.constant(proposals),
                "proposals_size": tf.constant([10, 20]),
            }

        return self.boxes_only.records(shuffle_seed, shuffle_buffer).map(add)


def test_masks_and_proposals_move_with_the_boxes(coco_folder, plain):
    # Images of two sizes, which are doubled and quadrupled, and one that is replaced.
    objects = [
        {"image_id": 10, "bbox": [3, 4, 6, 5]},
        {"image_id": 10, "bbox": [0, 0, 60, 40], "iscrowd": 1},
        {"image_id": 10, "bbox": [10, 5, 40, 30]},
        {"image_id": 10, "bbox": [2, 20, 15, 15]},
        {"image_id": 20, "bbox": [3, 4, 6, 5]},
        {"image_id": 30, "bbox": [3, 4, 6, 5]},
    ]
    files = {"1.png": plain(1), "2.png": plain(2, 20, 30), "3.png": plain(3)[:45]}
    images = [
        {"id": 10 * n, "file_name": f"{n}.png", "height": height, "width": width}
        for n, (height, width) in {1: (40, 60), 2: (20, 30), 3: (40, 60)}.items()
    ]
    folder = load_dataset(coco_folder(files, objects, images=images), "train")
    dataset = BoxMasks("masks", "train", folder.class_names, folder.category_ids, 3, folder)
    sizes = {"longest_edge": 128, "max_boxes": 2, "max_proposals": 4}
    batches = training_batches(dataset, 3, shorter_edges=(80,), **sizes)
    inputs, targets = evaluation_batches(dataset, 3, shorter_edge=80, **sizes).element_spec
    assert targets["masks"].shape[1] == 2
    assert inputs["proposals"].shape[1:] == (4, 4)
    boxes = {10: [[20, 10, 100, 70], [4, 40, 34, 70]], 20: [[12, 16, 36, 36], [0, 0, 0, 0]]}
    proposals = [[12, 16, 60, 48], [60, 40, 120, 80], [0, 0, 120, 80], [0, 0, 60, 40]]
    mirror = np.array([-1, 1, -1, 1])
    seen = set()
    for inputs, targets in batches.take(6):
        assert inputs["images"].shape == (3, 96, 128, 3)
        assert targets["masks"].shape == (3, 2, 96, 128)
        assert targets["masks"].dtype == tf.uint8
        assert inputs["proposals"].shape == (3, 4, 4)
        assert set(targets) == {"boxes", "labels", "image_ids", "masks"}
        for image_id, *received in zip(
            targets["image_ids"].numpy(),
            targets["boxes"].numpy(),
            inputs["proposals"].numpy(),
            targets["masks"].numpy(),
            strict=True,
        ):
            is_flipped = received[1][0, 0] != 12
            seen.add((int(image_id), bool(is_flipped)))
            expected = [np.array(boxes[image_id]), np.array(proposals)]
            if is_flipped:
                expected = [
                    np.where(corners.any(1, keepdims=True), [120, 0, 120, 0] + mirror * corners, 0)
                    for corners in (corners[:, [2, 1, 0, 3]] for corners in expected)
                ]
            np.testing.assert_allclose(received[0], expected[0], atol=1e-4)
            np.testing.assert_allclose(received[1], expected[1], atol=1e-4)
            for mask, (x1, y1, x2, y2) in zip(received[2], expected[0], strict=True):
                inside = np.zeros((96, 128), np.uint8)
                inside[y1:y2, x1:x2] = 1
                np.testing.assert_array_equal(mask, inside)
    assert seen == {(10, False), (10, True), (20, False), (20, True)}


def test_every_format_becomes_rgb_or_is_skipped_and_reported(coco_folder, encode):
    y, x = np.mgrid[:40, :60]
    smooth = Image.fromarray(np.stack([4 * x, 6 * y, 2 * (x + y)], -1).astype(np.uint8))
    gray16 = ((x + 60 * y) * 27).astype(np.uint16)
    jpeg, png = encode(smooth, "JPEG"), encode(smooth)
    huge = (100_000).to_bytes(4, "big")
    good = {
        "rgb.jpg": jpeg,
        "progressive.jpg": encode(smooth, "JPEG", progressive=True),
        "gray.jpg": encode(smooth.convert("L"), "JPEG"),
        "cmyk.jpg": encode(smooth.convert("CMYK"), "JPEG"),
        "rgb.png": png,
        "palette.png": encode(smooth.convert("P")),
        "alpha.png": encode(smooth.convert("RGBA")),
        "bits.png": encode(smooth.convert("1")),
        "gray16.png": encode(gray16),
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
        "two_colors.bmp": (
            encode(smooth.convert("1"), "BMP"),
            "unsupported BMP: 1 bits per pixel, compression 0",
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
        if name == "gray16.png":
            expected = np.repeat(gray16[..., None] / 257, 3, axis=-1)
        else:
            expected = np.asarray(Image.open(f"{dataset.image_dir}/{name}").convert("RGB"), float)
        # Exact, except that Pillow converts CMYK and 16 bits differently.
        atol = 1 if name in ("cmyk.jpg", "gray16.png") else 0
        np.testing.assert_allclose(image, expected, rtol=0, atol=atol, err_msg=name)

    assert report.images() == {name: problem for name, (_, problem) in bad.items()}
    assert str(report).startswith("skipped 8 images: beginning.jpg (damaged header), bomb.png (")


def test_unreadable_and_empty_images_are_not_trained_on(coco_folder, encode, plain):
    random = np.random.default_rng(0)
    noise = encode(random.integers(0, 256, (40, 60, 3), np.uint8), "JPEG")
    files = {f"{i}.png": plain(i) for i in range(6)}
    files |= {"broken.jpg": noise[:-300], "text.jpg": b"no image"}
    files |= {"empty.png": plain(8), "crowd.png": plain(9)}
    objects = [{"image_id": 10 * (i + 1), "bbox": [1, 2, 30, 20]} for i in range(8)]
    objects.append({"image_id": 100, "bbox": [1, 2, 30, 20], "iscrowd": 1})
    dataset = load_dataset(coco_folder(files, objects), "train")
    report = SkipReport()
    seen = collections.Counter()
    batches = training_batches(dataset, 2, report=report, **SMALL)
    for inputs, targets in batches.take(5 * steps_per_epoch(dataset, 2)):
        assert inputs["images"].shape == (2, 32, 64, 3)
        assert (targets["labels"][:, 0].numpy() == 0).all()
        seen.update(grays(inputs["images"]))
    assert sorted(seen) == list(range(6))
    assert seen.total() == 50
    assert report.images() == {
        "broken.jpg": "truncated or damaged",
        "text.jpg": "not a JPEG, PNG, GIF, BMP or WebP file",
    }


def test_images_are_neither_dropped_nor_flipped_if_asked_for(coco_folder, plain):
    files = {f"{i}.png": plain(i) for i in range(4)}
    objects = [
        {"image_id": 10, "bbox": [6, 4, 12, 8]},
        {"image_id": 20, "bbox": [1, 2, 30, 20], "iscrowd": 1},
    ]
    dataset = load_dataset(coco_folder(files, objects), "train")
    batches = training_batches(dataset, 2, keep_empty_images=True, horizontal_flip=False, **SMALL)
    seen = collections.Counter()
    for inputs, targets in batches.take(20):
        seen.update(grays(inputs["images"]))
        for image_id, box in zip(targets["image_ids"], targets["boxes"][:, 0], strict=True):
            expected = [4.8, 3.2, 14.4, 9.6] if image_id == 10 else [0, 0, 0, 0]
            np.testing.assert_allclose(box, expected, rtol=1e-5)
    assert seen == {0: 10, 1: 10, 2: 10, 3: 10}


def test_an_undecodable_image_is_replaced_by_the_next_of_its_batch(broken_split):
    _, intact, batches, report = broken_split
    broken = {20, 50, 120, 130}
    group_sizes = set()
    for (inputs, targets), (_, intact_targets) in zip(batches, intact, strict=True):
        ids = intact_targets["image_ids"].numpy().tolist()
        group = list(dict.fromkeys(ids))
        assert ids == [group[i % len(group)] for i in range(6)]
        assert 10 not in group
        group_sizes.add(len(group))
        expected = []
        for i in range(6):
            following = [group[(i + n) % len(group)] for n in range(len(group))]
            # The first image of the split is empty, the second is broken, the third is the spare.
            expected.append(next((x for x in following if x not in broken), 30))
        assert targets["image_ids"].numpy().tolist() == expected
        assert grays(inputs["images"]) == [image_id // 10 for image_id in expected]
        if set(group) <= broken:
            # The spare is a landscape, as large as fits a portrait batch.
            assert inputs["images"].shape == (6, 64, 32, 3)
            assert inputs["image_sizes"].numpy().tolist() == [[21, 32]] * 6
            np.testing.assert_allclose(
                np.sort(targets["boxes"][:, 0, 1::2] * (40 / 21)), [[2, 22]] * 6, rtol=1e-5
            )
    # Complete groups, the remaining landscapes, and the portraits.
    assert group_sizes == {6, 4, 2}
    assert report.images() == {f"{i // 10}.png": "truncated or damaged" for i in broken}


@pytest.mark.parametrize(("shard", "num_shards", "start_step"), [(0, 2, 1), (2, 3, 4)])
def test_a_worker_gets_its_rows_of_the_global_batches_from_any_step(
    broken_split, shard, num_shards, start_step
):
    dataset, _, batches, _ = broken_split
    tf.random.set_seed(2)  # The pipeline has its own seed.
    received = training_batches(
        dataset, 6, shard=shard, num_shards=num_shards, start_step=start_step, **SMALL
    )
    rows = slice(shard * 6 // num_shards, (shard + 1) * 6 // num_shards)
    for batch, expected in zip(received.take(8 - start_step), batches[start_step:], strict=True):
        tf.nest.map_structure(
            lambda x, y: np.testing.assert_array_equal(x, y[rows]), batch, expected
        )


def test_an_epoch_is_a_function_of_seed_and_number(coco_folder, plain):
    files = {f"{i}.png": plain(i) for i in range(12)}
    objects = [{"image_id": 10 * (i + 1), "bbox": [1, 2, 30, 20]} for i in range(12)]
    dataset = load_dataset(coco_folder(files, objects), "train")
    arguments = {"longest_edge": 96, "shorter_edges": (24, 32)}

    def read(stream):
        return [
            (*grays(x["images"]), x["image_sizes"].numpy().tolist(), y["boxes"].numpy().tolist())
            for x, y in stream
        ]

    assert steps_per_epoch(dataset, 2) == 6
    three_epochs = read(training_batches(dataset, 2, **arguments).take(18))
    assert read(training_batches(dataset, 2, seed=1, **arguments).take(6)) != three_epochs[:6]
    epochs = [three_epochs[6 * i : 6 * i + 6] for i in range(3)]
    for epoch in epochs:
        assert sorted(gray for batch in epoch for gray in batch[:2]) == list(range(12))
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
        seen.update(grays(inputs["images"]))
    portrait = sum(seen[i] for i in range(5, 8)) / seen.total()
    assert sorted(seen) == list(range(8))
    assert 0.2 < portrait < 0.8


def test_invalid_and_surplus_boxes_are_dropped_and_counted(coco_folder, plain):
    objects = [
        {"image_id": 10, "bbox": [-6, -4, 36, 24]},
        {"image_id": 10, "bbox": [1, 2, float("nan"), 5]},
        {"image_id": 10, "bbox": [1, 2, 0, 5]},
        {"image_id": 10, "bbox": [9, 9, -4, -5]},
        {"image_id": 10, "bbox": [60, 0, 10, 10]},
        {"image_id": 10, "bbox": [0, 0, 60, 40], "iscrowd": 1},
        {"image_id": 10, "bbox": [50, 30, 100, 100], "category_id": 7},
        # The largest three are kept, in their order.
        *({"image_id": 20, "bbox": [0, 0, size, size]} for size in (9, 3, 30, 12, 6)),
    ]
    report = SkipReport()
    dataset = load_dataset(coco_folder({"a.png": plain(1), "b.png": plain(2)}, objects), "train")
    batches = evaluation_batches(
        dataset, 2, shorter_edge=40, longest_edge=60, max_boxes=3, report=report
    )
    for _ in range(2):  # A second pass counts nothing twice.
        [(_, targets)] = list(batches)
    np.testing.assert_allclose(
        targets["boxes"][0], [[0, 0, 30, 20], [50, 30, 60, 40], [0, 0, 0, 0]], atol=1e-5
    )
    np.testing.assert_allclose(targets["boxes"][1, :, 2], [9, 30, 12], atol=1e-5)
    assert targets["labels"].numpy().tolist() == [[0, 1, -1], [0, 0, 0]]
    counts = {"not finite": 1, "without area": 2, "outside the image": 1, "over max_boxes": 2}
    assert report.boxes() == counts
    expected = "6 boxes: 1 not finite, 2 without area, 1 outside the image, 2 over max_boxes"
    assert str(report) == f"skipped {expected}"


def test_a_split_without_trainable_images_is_rejected(coco_folder, encode, plain):
    jpeg = encode(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8), "JPEG")
    files = {"empty.png": plain(1), "broken.jpg": jpeg[:-300]}
    dataset = load_dataset(coco_folder(files, [{"image_id": 20, "bbox": [1, 2, 3, 4]}]), "train")
    with pytest.raises(ValueError, match=r"'train' .* 2 images"):
        training_batches(dataset, 2)
    with pytest.raises(ValueError, match=r"`batch_size` .* 2 images .* received 3"):
        training_batches(dataset, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "`batch_size`.* received 0"),
        ({"batch_size": True}, "`batch_size`.* received True"),
        ({"max_boxes": 0}, "`max_boxes`.* received 0"),
        ({"max_proposals": 0}, "`max_proposals`.* received 0"),
        ({"longest_edge": 1.5}, r"`longest_edge`.* received 1\.5"),
        ({"shorter_edges": ()}, r"`shorter_edges`.* received \(\)"),
        ({"shorter_edges": (32, 0)}, "`shorter_edges`.* received 0"),
        ({"aspect_ratios": (0.5,)}, r"`aspect_ratios`.* received \(0\.5,\)"),
        ({"start_step": -1}, "`start_step`.* received -1"),
        ({"num_shards": 0}, "`num_shards`.* received 0"),
        ({"shard": 2, "num_shards": 2}, "`shard`.* num_shards=2; received 2"),
        ({"shard": -1}, "`shard`.* received -1"),
        ({"batch_size": 4, "num_shards": 3}, "`batch_size`.* received 4 and 3"),
    ],
)
def test_invalid_arguments_are_rejected(coco_folder, plain, changes, message):
    dataset = load_dataset(coco_folder({"a.png": plain(1)}), "train")
    with pytest.raises(ValueError, match=message):
        training_batches(dataset, **({"batch_size": 1} | changes))


def test_evaluation_gives_every_image_once_in_order(shapes):
    dataset, _, _ = shapes
    ids = collections.defaultdict(list)
    for inputs, targets in evaluation_batches(dataset, 3, shorter_edge=64, longest_edge=96):
        ids[tuple(inputs["images"].shape[1:3])] += targets["image_ids"].numpy().tolist()
    order = [int(record["image_id"]) for record in dataset.records().as_numpy_iterator()]
    assert sorted(itertools.chain(*ids.values())) == sorted(order)
    for of_bucket in ids.values():
        assert of_bucket == [image_id for image_id in order if image_id in of_bucket]


@pytest.mark.parametrize(("shard", "num_shards"), [(1, 3), (7, 8)])
def test_an_evaluation_shard_is_every_nth_image(coco_folder, plain, shard, num_shards):
    files = {f"{i}.png": plain(i) for i in range(7)} | {"text.jpg": b"no image"}
    batches = evaluation_batches(
        load_dataset(coco_folder(files), "train"),
        2,
        shorter_edge=32,
        longest_edge=48,
        shard=shard,
        num_shards=num_shards,
    )
    ids = [image_id for _, targets in batches for image_id in targets["image_ids"].numpy()]
    assert ids == list(range(10, 80, 10))[shard::num_shards]


def test_two_replicas_get_the_halves_of_each_batch(shapes):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("tf.distribute needs Keras on TensorFlow")
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    _, batches, report = shapes
    distributed = iter(strategy.experimental_distribute_dataset(batches))
    for inputs, targets in batches.take(4):
        halves = next(distributed)
        for whole, parts in ((inputs, halves[0]), (targets, halves[1])):
            for key, values in whole.items():
                local = strategy.experimental_local_results(parts[key])
                assert [part.shape[0] for part in local] == [2, 2]
                np.testing.assert_array_equal(tf.concat(local, 0), values)
    assert report.images() == {}


def test_keras_fits_on_the_batches(shapes):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("the model of this test trains on TensorFlow")

    class CountImages(keras.Model):
        def build(self, input_shape):
            self.images = self.add_weight(name="images", shape=(), initializer="zeros")

        def train_step(self, data):
            inputs, targets = data
            self.images.assign_add(float(inputs["images"].shape[0]))
            return {"boxes": tf.reduce_sum(tf.cast(targets["labels"] >= 0, tf.float32))}

    dataset, batches, _ = shapes
    model = CountImages()
    model.build(None)
    model.compile()
    history = model.fit(
        batches,
        steps_per_epoch=steps_per_epoch(dataset, 4),
        epochs=2,
        shuffle=False,
        verbose=0,
    )
    assert float(model.images) == 16
    assert min(history.history["boxes"]) > 0
