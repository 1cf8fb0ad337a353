"""Small data sets, made on the spot, as fixtures that several test files share."""

import io
import json
import pathlib

import numpy as np
import pytest
from PIL import Image


def encode(image: np.ndarray | Image.Image, file_format: str = "PNG", **options) -> bytes:
    """The bytes of an image file."""
    stream = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(stream, file_format, **options)
    return stream.getvalue()


def plain(colour: int, height: int = 40, width: int = 60) -> bytes:
    """A PNG of one grey value, by which a test can tell it in a batch."""
    return encode(np.full((height, width, 3), colour, np.uint8))


@pytest.fixture
def coco_folder(tmp_path):
    """A function that writes a folder in COCO's layout and returns its path.

    `files` maps file names to bytes; their image ids are 10, 20, ... in order. `objects` are
    dicts of annotation fields, `bbox` and `image_id` among them.
    """

    def write(files: dict[str, bytes], objects=(), size=(40, 60), split="train", **changes) -> str:
        folder = tmp_path / "coco_layout"
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
                {"id": i, "category_id": 3, "iscrowd": 0} | fields
                for i, fields in enumerate(objects)
            ],
            "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        }
        path = folder / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(content | changes))
        return str(folder)

    return write


@pytest.fixture(scope="session")
def shapes_dir(tmp_path_factory) -> pathlib.Path:
    """The demo data set with 10 and 4 images, prepared by TFDS."""
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
