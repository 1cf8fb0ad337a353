"""Published weights: downloaded once, verified, and kept in Keras's cache."""

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
# A file name ends in the first 8 hex digits of the file's SHA-256.
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
    """Returns the path of a backbone's ImageNet weights, downloaded if necessary.

    Args:
        backbone: name of a ResNet.
        weights: "imagenet" for torchvision's IMAGENET1K_V1, or the path of a file.

    Raises:
        FileNotFoundError: if there is no such file.
        ConnectionError: if the download fails.
        ValueError: if there are no published weights for this backbone.
    """
    if weights == "imagenet":
        if backbone not in CLASSIFIERS:
            raise ValueError(
                f"`backbone_weights='imagenet'` is available for {', '.join(CLASSIFIERS)}; "
                f"received backbone={backbone!r}."
            )
        return fetch(f"imagenet ({backbone})", CLASSIFIERS[backbone])
    if not os.path.isfile(weights):
        raise FileNotFoundError(
            "`backbone_weights` must be 'imagenet' or the path of a file; there is no file "
            f"{os.fspath(weights)!r}."
        )
    return Path(weights)


def fetch(what: str, url: str) -> Path:
    """Returns the path of a published file's arrays in Keras's cache.

    The first time, the file is downloaded, verified against the SHA-256 in its name, and converted
    to an `.npz` file of the same arrays.

    Args:
        what: name of the weights, for errors.
        url: URL of a `.pth` file.

    Raises:
        ConnectionError: if the download fails or is damaged.
    """
    name, digits = url.rsplit("/", 1)[1], first_digits(url)
    folder = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "keras_fpn"
    converted = folder / (name.removesuffix(".pth") + ".npz")
    if converted.exists() and _is_whole_npz(converted):
        return converted
    weights = f"weights {what!r} from {url}"
    hint = "Pass the path of that file instead if you have it."
    folder.mkdir(parents=True, exist_ok=True)
    # A private folder: other processes may be downloading the same file.
    with tempfile.TemporaryDirectory(prefix="fetching-", dir=folder) as own:
        try:
            path = Path(keras.utils.get_file(name, url, cache_dir=own, cache_subdir="."))
        except Exception as error:  # Keras raises a plain Exception when a download fails.
            reason = str(error).rsplit(" -- ", 1)[-1]
            raise ConnectionError(f"Could not download {weights}: {reason}. {hint}") from error
        if not sha256_of(path).startswith(digits):
            raise ConnectionError(
                f"The download of {weights} is damaged or incomplete: its SHA-256 does not begin "
                f"with {digits}. {hint}"
            )
        arrays = {**read_checkpoint(path), PUBLISHED: np.uint32(int(digits, 16))}
        # Written first, then renamed: a file of this name is complete.
        np.savez(Path(own) / "converted.npz", **arrays)
        os.replace(Path(own) / "converted.npz", converted)
    return converted


def first_digits(url: str) -> str:
    """The leading digits of the file's SHA-256, from its name."""
    return url.removesuffix(".pth").rsplit("-", 1)[1]


def _is_whole_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError):
        return False


def sha256_of(path: Path) -> str:
    """The file's SHA-256 as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
