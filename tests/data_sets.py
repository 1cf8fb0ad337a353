"""Small generated data sets, as fixtures that several test files share."""

import functools
import io
import json
import pathlib

import numpy as np
import pytest
from PIL import Image


def encode(image: np.ndarray | Image.Image, file_format: str = "PNG", **options) -> bytes:
    """Returns the bytes of an image file."""
    stream = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(stream, file_format, **options)
    return stream.getvalue()


def plain(gray: int, height: int = 40, width: int = 60) -> bytes:
    """Returns a PNG of a single gray level, which identifies the image in a batch."""
    return encode(np.full((height, width, 3), gray, np.uint8))


def write_coco_folder(
    root: pathlib.Path,
    files: dict[str, bytes],
    objects=(),
    size=(40, 60),
    split="train",
    **changes,
) -> str:
    """Writes a folder in COCO's layout and returns its path.

    Args:
        root: parent of the folder.
        files: contents of the image files by name. Their image ids are 10, 20, ... in order.
        objects: dicts of annotation fields, including `bbox` and `image_id`.
        size: annotated height and width of all images.
        split: name of the split.
        **changes: replaced keys of the annotation file.
    """
    folder = root / "coco_layout"
    (folder / split).mkdir(parents=True)
    (folder / "annotations").mkdir()
    for name, content in files.items():
        (folder / split / name).write_bytes(content)
    content = {
        "images": [
            {"id": 10 * (i + 1), "file_name": name, "height": size[0], "width": size[1]}
            for i, name in enumerate(files)
        ],
        "annotations": [
            {"id": i, "category_id": 3, "iscrowd": 0} | fields for i, fields in enumerate(objects)
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    }
    path = folder / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps(content | changes))
    return str(folder)


@pytest.fixture
def coco_folder(tmp_path):
    """`write_coco_folder` into `tmp_path`."""
    return functools.partial(write_coco_folder, tmp_path)


@pytest.fixture(scope="session")
def shapes_dir(tmp_path_factory) -> pathlib.Path:
    """Directory with the demo data set of 10 and 4 images, prepared by TFDS."""
    from keras_fpn.data import demo_dataset

    data_dir = tmp_path_factory.mktemp("shapes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_dataset.KerasFpnShapes, "NUM_IMAGES", {"train": 10, "validation": 4})
        demo_dataset.prepare(str(data_dir))
    return data_dir


@pytest.fixture(name="encode")
def _encode():
    return encode


@pytest.fixture(name="plain")
def _plain():
    return plain
