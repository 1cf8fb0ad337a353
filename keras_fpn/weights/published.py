"""Published weights: where they are, fetched once, checked, and kept in Keras's cache."""

import hashlib
import os
import tempfile
import zipfile
from pathlib import Path

import keras
import numpy as np

from keras_fpn.weights.checkpoints import read_checkpoint
from keras_fpn.weights.plan import PUBLISHED

TORCHVISION = "https://download.pytorch.org/models/"
# The digits at the end of a name are the first of the file's SHA-256.
DETECTORS = {
    "coco": TORCHVISION + "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth",
    "coco_v2": TORCHVISION + "fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth",
}
CLASSIFIERS = {
    "resnet18": TORCHVISION + "resnet18-f37072fd.pth",
    "resnet34": TORCHVISION + "resnet34-b627a593.pth",
    "resnet50": TORCHVISION + "resnet50-0676ba61.pth",
    "resnet101": TORCHVISION + "resnet101-63fe2227.pth",
    "resnet152": TORCHVISION + "resnet152-394f9c45.pth",
    "resnext50_32x4d": TORCHVISION + "resnext50_32x4d-7cdf4587.pth",
    "resnext101_32x8d": TORCHVISION + "resnext101_32x8d-8ba56ff5.pth",
}


def find_classifier(backbone: str, weights: str | os.PathLike) -> Path:
    """The file of ImageNet weights for a backbone.

    Args:
        backbone: name of a ResNet.
        weights: "imagenet" for torchvision's IMAGENET1K_V1, or a file.

    Raises:
        FileNotFoundError: where there is no such file.
        ConnectionError: where it cannot be fetched.
        ValueError: where "imagenet" has none for this backbone.
    """
    if weights == "imagenet":
        if backbone not in CLASSIFIERS:
            raise ValueError(
                f"backbone_weights='imagenet' is there for {', '.join(CLASSIFIERS)}; received "
                f"backbone={backbone!r}."
            )
        return fetch(f"imagenet ({backbone})", CLASSIFIERS[backbone])
    if not os.path.isfile(weights):
        raise FileNotFoundError(
            f"`backbone_weights` is 'imagenet' or a file; there is none at {os.fspath(weights)!r}."
        )
    return Path(weights)


def fetch(what: str, url: str) -> Path:
    """The arrays of a published file, in Keras's cache.

    The first time, the file is downloaded, held against the SHA-256 in its name, and kept as an
    `.npz` file of the same arrays under the same names.

    Raises:
        ConnectionError: where it cannot be downloaded, or arrives damaged.
    """
    name, digits = url.rsplit("/", 1)[1], first_digits(url)
    folder = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "keras_fpn"
    converted = folder / (name.removesuffix(".pth") + ".npz")
    if converted.exists() and _is_whole_npz(converted):
        return converted
    wanted = f"weights {what!r} from {url}"
    instead = "Give the path of that file instead if you have it."
    folder.mkdir(parents=True, exist_ok=True)
    # A place of its own: other processes may be fetching the same file.
    with tempfile.TemporaryDirectory(prefix="fetching-", dir=folder) as own:
        try:
            path = Path(keras.utils.get_file(name, url, cache_dir=own, cache_subdir="."))
        except Exception as error:  # Keras raises a plain Exception where a download fails.
            reason = str(error).rsplit(" -- ", 1)[-1]
            raise ConnectionError(f"Could not fetch {wanted}: {reason}. {instead}") from error
        if not sha256_of(path).startswith(digits):
            raise ConnectionError(
                f"What arrived for {wanted} is damaged or incomplete: its SHA-256 does not begin "
                f"with {digits}. {instead}"
            )
        arrays = {**read_checkpoint(path), PUBLISHED: np.uint32(int(digits, 16))}
        # Renamed when it is written: a file of this name is whole.
        np.savez(Path(own) / "converted.npz", **arrays)
        os.replace(Path(own) / "converted.npz", converted)
    return converted


def first_digits(url: str) -> str:
    """The first digits of the file's SHA-256, as its name has them."""
    return url.removesuffix(".pth").rsplit("-", 1)[1]


def _is_whole_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError):
        return False


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
