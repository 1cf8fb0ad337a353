"""The synthetic demo data set."""

import io

import numpy as np
from PIL import Image

from keras_fpn.data import demo_dataset
from keras_fpn.data.datasets import load_dataset


def test_contents_of_the_data_set(shapes_dir):
    names = []
    for split, number in (("train", 10), ("validation", 4)):
        dataset = load_dataset("keras_fpn_shapes", split, str(shapes_dir))
        assert dataset.num_images == number
        assert dataset.class_names == ["circle", "square", "triangle", "star"]
        truth = dataset.coco_ground_truth()
        assert len(truth["images"]) == number
        assert {a["image_id"] for a in truth["annotations"]} == {i["id"] for i in truth["images"]}
        assert len(truth["annotations"]) <= 6 * number
        names += [image["file_name"] for image in truth["images"]]
        for record in dataset.records().as_numpy_iterator():
            image = Image.open(io.BytesIO(record["image_bytes"]))
            assert image.mode == "RGB"
            assert 224 <= min(image.size) <= max(image.size) <= 288
    assert len(set(names)) == 14


def test_preparing_twice_gives_the_same_bytes(shapes_dir, tmp_path, monkeypatch):
    numbers = {"train": 10, "validation": 4}
    monkeypatch.setattr(demo_dataset.KerasFpnShapes, "NUM_IMAGES", numbers)
    demo_dataset.prepare(str(tmp_path))
    files = sorted(path.name for path in (tmp_path / "keras_fpn_shapes" / "1.0.0").iterdir())
    assert len(files) == 5
    for name in files:
        one, other = (
            (folder / "keras_fpn_shapes" / "1.0.0" / name).read_bytes()
            for folder in (shapes_dir, tmp_path)
        )
        assert one == other, name


def test_a_prepared_data_set_is_not_written_again(shapes_dir):
    info = shapes_dir / "keras_fpn_shapes" / "1.0.0" / "dataset_info.json"
    written = info.stat().st_mtime_ns
    demo_dataset.prepare(str(shapes_dir))
    assert info.stat().st_mtime_ns == written


def test_boxes_are_tight_around_the_drawn_shapes(monkeypatch):
    # A single white shape on black, whose pixels are the bright ones.
    monkeypatch.setattr(
        demo_dataset, "_gradient", lambda random, height, width: np.zeros((height, width, 3))
    )
    monkeypatch.setattr(demo_dataset, "_contrasting_color", lambda *arguments: np.full(3, 255.0))
    alone, edges = 0, []
    for seed in range(60):
        pixels, objects = demo_dataset.draw_image(np.random.default_rng(seed))
        if len(objects) != 1:
            continue
        alone += 1
        [(_, box, area)] = objects
        rows, columns = np.nonzero(pixels[..., 0] >= 128)
        assert box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert abs(area - pixels[..., 0].sum() / 255) <= 1
    assert alone >= 5
    for seed in range(200):
        _, objects = demo_dataset.draw_image(np.random.default_rng(seed))
        edges += [max(x2 - x1, y2 - y1) for _, (x1, y1, x2, y2), _ in objects]
    # Diameters are log-uniform in 32..150, so their median is the geometric mean, 69. The
    # longer side of a square is a diameter over the root of 2, that of the others up to a diameter.
    assert 32 / 2**0.5 - 1 < min(edges) < 32
    assert 130 < max(edges) < 152
    assert 69 / 2**0.5 < np.median(edges) < 69


def test_the_octaves_have_classes_of_day_and_night():
    for seed in range(8):
        random = np.random.default_rng(seed)
        pixels, objects = demo_dataset.KerasFpnOctaves.draw(None, random)
        # The first and last rows, most of which no shape covers.
        is_night = bool(np.median(pixels[0]) < np.median(pixels[-1]))
        assert {label % 2 for label, _, _ in objects} == {is_night}
        assert all(0 <= label < 4 for label, _, _ in objects)
