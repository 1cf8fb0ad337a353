"""Fingerprints of data sets, by which a resumed run notices that its data have changed."""

import hashlib
import os
from typing import Any

import numpy as np

from keras_fpn.data.datasets import DetectionDataset


def fingerprint(dataset: DetectionDataset) -> dict[str, Any]:
    """Returns the number of images of a split, and a digest of what is known without reading them.

    Of a folder in COCO's layout, these are the ids, names and sizes of the images and all
    annotations; of a TFDS split, its version, files and numbers of examples; and the proposals of a
    data set that has them. Neither the folder's path nor pixels are part of it.

    Returns:
        `{"images": int, "digest": str}`.
    """
    digest = hashlib.blake2b(digest_size=16)
    _add(digest, dataset)
    return {"images": dataset.num_images, "digest": digest.hexdigest()}


def _add(digest: Any, part: Any) -> None:
    for name, value in sorted(vars(part).items()):
        if isinstance(value, np.ndarray):
            digest.update(f"{name} {value.dtype} {value.shape}".encode())
            digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
        elif isinstance(value, list):  # Names of files and classes, and categories' ids.
            digest.update(repr((name, value)).encode())
        elif name == "builder":
            digest.update(repr(_tfds_description(value.info, part.split)).encode())
        elif name in ("dataset", "proposals"):
            _add(digest, value)


def _tfds_description(info: Any, split: str) -> list:
    files = [
        (os.path.basename(part.filename), part.skip, part.take)
        for part in info.splits[split].file_instructions
    ]
    return [info.full_name, int(info.dataset_size), files]
