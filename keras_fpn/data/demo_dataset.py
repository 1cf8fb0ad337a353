"""Small synthetic detection data sets of drawn shapes.

`make demo` trains on `keras_fpn_shapes`, benchmarks/pyramid_variants.py on `keras_fpn_octaves`.

python -m keras_fpn.data.demo_dataset --data-dir demo/data --unseen-images demo/unseen
"""

import argparse
import functools
import io
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw

CLASS_NAMES = ("circle", "square", "triangle", "star")

_SEED = 20170421
_OVERSAMPLING = 4  # Shapes are drawn at this scale and averaged, for antialiasing.
_MIN_VISIBLE = 0.7  # Fraction of a shape that must not be covered by later shapes.


class KerasFpnShapes(tfds.core.GeneratorBasedBuilder):
    """Drawn shapes, 32 to 150 pixels, on textured backgrounds, with COCO's features."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 - TFDS's convention
    NUM_IMAGES = {"train": 600, "validation": 100}  # noqa: RUF012
    LABELS = CLASS_NAMES

    def draw(self, random: np.random.Generator) -> tuple[np.ndarray, list[tuple]]:
        """Draws one image, as `draw_image` does."""
        return draw_image(random)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "image/filename": tfds.features.Text(),
                    "image/id": np.int64,
                    "objects": tfds.features.Sequence(
                        {
                            "area": np.int64,
                            "bbox": tfds.features.BBoxFeature(),
                            "id": np.int64,
                            "is_crowd": np.bool_,
                            "label": tfds.features.ClassLabel(names=self.LABELS),
                        }
                    ),
                }
            ),
            homepage="https://arxiv.org/abs/1612.03144",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # Nothing is downloaded.
        return {split: self._generate_examples(split) for split in self.NUM_IMAGES}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for number in range(self.NUM_IMAGES[split]):
            pixels, objects = self.draw(_random(split, number))
            height, width = pixels.shape[:2]
            encoded = io.BytesIO()
            Image.fromarray(pixels).save(encoded, "JPEG", quality=92)
            encoded.seek(0)
            yield (
                number,
                {
                    "image": encoded,
                    "image/filename": f"{split}_{number:05d}.jpg",
                    "image/id": number,
                    "objects": [
                        {
                            "area": area,
                            "bbox": tfds.features.BBox(
                                ymin=y1 / height, xmin=x1 / width, ymax=y2 / height, xmax=x2 / width
                            ),
                            "id": number * 100 + position,
                            "is_crowd": False,
                            "label": self.LABELS[label],
                        }
                        for position, (label, (x1, y1, x2, y2), area) in enumerate(objects)
                    ],
                },
            )


class KerasFpnOctaves(KerasFpnShapes):
    """Drawn shapes over five octaves of size, 8 to 256 pixels, by day and by night.

    By day, the sky is lighter than the ground. Around a small object either has one color: only
    the whole image tells its class.
    """

    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES = {"2.0.0": "By day and by night."}  # noqa: RUF012
    NUM_IMAGES = {"train": 1000, "validation": 200}  # noqa: RUF012
    LABELS = ("circle by day", "circle by night", "star by day", "star by night")

    def draw(self, random: np.random.Generator) -> tuple[np.ndarray, list[tuple]]:
        """Draws one image of 256 to 288 pixels; large shapes first, on which small ones may lie."""
        sizes = np.exp(random.uniform(math.log(8), math.log(256), int(random.integers(4, 13))))
        night = int(random.integers(2))
        pixels, objects = draw_image(
            random,
            (257, 289),
            ("circle", "star"),
            -np.sort(-sizes),
            functools.partial(_landscape, night=bool(night)),
        )
        return pixels, [(2 * label + night, *rest) for label, *rest in objects]


def main(arguments: list[str] | None = None) -> None:
    """Makes the data set from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", required=True, help="directory for the TFDS data set")
    parser.add_argument("--unseen-images", help="directory for 12 images outside of all splits")
    options = parser.parse_args(arguments)
    prepare(options.data_dir)
    if options.unseen_images:
        folder = Path(options.unseen_images)
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(12):
            pixels, _ = draw_image(_random("unseen", number))
            Image.fromarray(pixels).save(folder / f"unseen_{number:02d}.png")


def prepare(data_dir: str, dataset: type[KerasFpnShapes] = KerasFpnShapes) -> None:
    """Writes a data set to `data_dir` unless it exists, in a few seconds and offline."""
    tfds.disable_progress_bar()
    dataset(data_dir=data_dir).download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )


def _random(split: str, number: int) -> np.random.Generator:
    # Each image has its own stream, so changing the number of images keeps the first ones.
    return np.random.default_rng([_SEED, zlib.crc32(split.encode()), number])


def draw_image(
    random: np.random.Generator,
    edges: tuple[int, int] = (224, 289),
    names: Sequence[str] = CLASS_NAMES,
    sizes: np.ndarray | None = None,
    background: Callable[..., np.ndarray] | None = None,
) -> tuple[np.ndarray, list[tuple[int, tuple[float, float, float, float], int]]]:
    """Draws one image.

    Args:
        random: generator of everything in it.
        edges: height and width are at least the first and below the second.
        names: the shapes to draw, of `CLASS_NAMES`. A label is an index of them.
        sizes: diameters of the shapes in pixels, in the order of drawing; a shape that does not
            fit is left out. Defaults to None, up to six shapes of 32 to 150 pixels.
        background: function of `(random, height, width)` that draws it. Defaults to None, a
            gradient with texture.

    Returns:
        `pixels`: uint8 `[height, width, 3]`. `objects`: for each shape its label, the tight box
        (x1, y1, x2, y2) of its visible part in pixels, and its visible area in pixels.
    """
    width, height = (int(edge) for edge in random.integers(*edges, 2))
    canvas = (background or _gradient)(random, height, width)
    labels: list[int] = []
    areas: list[float] = []
    visible: list[np.ndarray] = []  # [height, width], fraction of each pixel showing the shape
    target = int(random.integers(1, 7)) if sizes is None else len(sizes)
    done = set()  # Indices of the sizes that have been drawn.
    for attempt in range(8 * target):
        if len(labels) == target:
            break
        if sizes is not None and attempt // 8 in done:
            continue
        label = int(random.integers(len(names)))
        if sizes is None:
            # Log-uniform: each octave of sizes is equally frequent.
            radius = 0.5 * math.exp(random.uniform(math.log(32), math.log(150)))
        else:
            radius = 0.5 * sizes[attempt // 8]
        window, cover = _shape(random, names[label], radius, height, width)
        hidden = [float((shape[window] * cover).sum()) for shape in visible]
        if any(
            shape.sum() - lost < _MIN_VISIBLE * area
            for shape, lost, area in zip(visible, hidden, areas, strict=True)
            if lost > 0
        ):
            continue
        color = _contrasting_color(random, canvas[window], cover)
        canvas[window] += (color - canvas[window]) * cover[..., None]
        for shape in visible:
            shape[window] *= 1 - cover
        shape = np.zeros((height, width), np.float32)
        shape[window] = cover
        visible.append(shape)
        areas.append(float(cover.sum()))
        labels.append(label)
        done.add(attempt // 8)
    objects = [
        (label, _tight_box(shape), round(float(shape.sum())))
        for label, shape in zip(labels, visible, strict=True)
    ]
    return np.clip(np.round(canvas), 0, 255).astype(np.uint8), objects


def _shape(
    random: np.random.Generator, name: str, radius: float, height: int, width: int
) -> tuple[tuple[slice, slice], np.ndarray]:
    """Draws one shape at a random position and rotation.

    Returns:
        `window`: rows and columns of the image. `cover`: float32, the fraction of each pixel of the
        window that the shape covers.
    """
    center_x = random.uniform(radius, width - radius)
    center_y = random.uniform(radius, height - radius)
    # Roughly upright, which a small network with random initial weights learns in minutes.
    angle = random.uniform(-0.25, 0.25) - (math.pi / 4 if name == "square" else math.pi / 2)
    corners, radii = {
        "circle": (90, [radius]),
        "square": (4, [radius]),
        "triangle": (3, [radius]),
        "star": (10, [radius, 0.45 * radius]),
    }[name]
    left, top = math.floor(center_x - radius), math.floor(center_y - radius)
    right = min(math.ceil(center_x + radius) + 1, width)
    bottom = min(math.ceil(center_y + radius) + 1, height)
    points = [
        (
            _OVERSAMPLING * (center_x - left + radii[i % len(radii)] * math.cos(angle + turn)),
            _OVERSAMPLING * (center_y - top + radii[i % len(radii)] * math.sin(angle + turn)),
        )
        for i, turn in enumerate(np.arange(corners) * 2 * math.pi / corners)
    ]
    mask = Image.new("L", ((right - left) * _OVERSAMPLING, (bottom - top) * _OVERSAMPLING))
    ImageDraw.Draw(mask).polygon(points, fill=255)
    cover = np.asarray(mask.reduce(_OVERSAMPLING), np.float32) / 255
    return (slice(top, bottom), slice(left, right)), cover


def _gradient(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draws a gradient between two colors with stripes and noise: float `[height, width, 3]`."""
    first, second = random.uniform(30, 225, (2, 3))
    y, x = np.mgrid[:height, :width]
    direction = random.uniform(0, 2 * math.pi)
    along = x / width * math.cos(direction) + y / height * math.sin(direction)
    blend = (along - along.min()) / np.ptp(along)
    if random.random() < 0.5:
        period, turn = random.uniform(6, 40), random.uniform(0, math.pi)
        stripes = np.sin(2 * math.pi / period * (x * math.cos(turn) + y * math.sin(turn)))
        blend = blend + random.uniform(0.1, 0.4) * stripes
    return _with_noise(random, first + blend[..., None] * (second - first))


def _landscape(random: np.random.Generator, height: int, width: int, *, night: bool) -> np.ndarray:
    """Draws sky and ground of two colors with noise, the sky darker by night."""
    darker = random.uniform(30, 150, 3)
    colors = [darker, darker + random.uniform(40, 80)]
    horizon = round(height * random.uniform(0.4, 0.6))
    canvas = np.empty((height, width, 3))
    canvas[:horizon], canvas[horizon:] = colors if night else colors[::-1]
    return _with_noise(random, canvas)


def _with_noise(random: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    height, width = canvas.shape[:2]
    coarse = random.normal(0, random.uniform(2, 20), (height // 8 + 1, width // 8 + 1, 3))
    canvas = canvas + np.repeat(np.repeat(coarse, 8, axis=0), 8, axis=1)[:height, :width]
    canvas += random.normal(0, random.uniform(1, 12), (height, width, 1))
    return np.clip(canvas, 0, 255)


def _contrasting_color(
    random: np.random.Generator, canvas: np.ndarray, cover: np.ndarray
) -> np.ndarray:
    """Returns a random color that contrasts with what the shape covers."""
    covered = np.average(canvas.reshape(-1, 3), axis=0, weights=cover.reshape(-1))
    colors = random.uniform(0, 255, (16, 3))
    far = np.abs(colors - covered).max(axis=1) > 80
    return colors[np.argmax(far)]


def _tight_box(cover: np.ndarray) -> tuple[float, float, float, float]:
    """Returns the box (x1, y1, x2, y2) of the pixels that a shape covers by at least half."""
    rows, columns = np.flatnonzero((cover >= 0.5).any(1)), np.flatnonzero((cover >= 0.5).any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


if __name__ == "__main__":
    main()
