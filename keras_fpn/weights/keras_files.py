"""Files in Keras's own format, `.keras`, checked before what they describe takes any memory."""

import contextlib
import io
import json
import math
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import keras

from keras_fpn.detector import Detector
from keras_fpn.weights.checkpoints import ZIP_DAMAGE, check_members, read_member
from keras_fpn.weights.deferred import deferred_values, same_random_seeds
from keras_fpn.weights.h5_files import shapes_inside
from keras_fpn.weights.refusal import Refused, damage

CONFIG, WEIGHTS = "config.json", "model.weights.h5"
# That of a ResNet-50 detector has 0.1 MB; parsed, JSON takes up to 25 times its size.
MAX_CONFIG = 2**23
# Numbers by which a model may exceed the weights in its file.
MAX_EXCESS = 2**24


def is_keras_file(path: Path) -> bool:
    """Returns whether a file is a complete archive in Keras's own format."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return {CONFIG, WEIGHTS} <= set(archive.namelist())


def load_keras_file(path: Path) -> Detector:
    """Returns the model in a `.keras` file of any name, uncompiled.

    The CRC-32 of its members is compared, and the model is built without memory first: its weights
    must not be larger than those in the file.

    Raises:
        ValueError: if the file is damaged, its config does not describe a model of keras_fpn, or
            its weights do not fit the config.
    """
    try:
        _check(path)
    except Refused as refused:
        raise ValueError(f"{str(path)!r} {refused}.") from refused.__cause__
    with damage_is_named(path), named(path, "model.keras") as link:
        try:
            return keras.saving.load_model(link, compile=False)
        except ValueError as error:
            raise ValueError(
                f"{str(path)!r} has weights that do not fit its config: {_reason(error)}."
            ) from error


def _check(path: Path) -> None:
    with damage(*ZIP_DAMAGE, OSError):
        archive = zipfile.ZipFile(path)
    with archive:
        check_members(archive, path.stat().st_size)
        if archive.getinfo(CONFIG).file_size > MAX_CONFIG:
            raise Refused(f"has a {CONFIG} of more than {MAX_CONFIG} bytes")
        config, weights = read_member(archive, CONFIG), read_member(archive, WEIGHTS)
    shapes = shapes_inside(io.BytesIO(weights), len(weights))
    del weights
    try:
        with same_random_seeds(), deferred_values():
            model = keras.saving.deserialize_keras_object(
                {**json.loads(config), "compile_config": None}
            )
    # A config calls constructors with any arguments: there is no error that it cannot cause.
    except Exception as error:
        raise Refused(f"has a {CONFIG} that describes no model: {_reason(error)}") from error
    if not isinstance(model, Detector):
        raise Refused(f"must contain a model of keras_fpn; received a {type(model).__name__}")
    needed = sum(math.prod(variable.shape) for variable in model.variables)
    if needed > MAX_EXCESS + sum(map(math.prod, shapes.values())):
        raise Refused(f"describes a model of {needed} weights, and does not contain them")


def _reason(error: BaseException) -> str:
    """Returns the first line of the error that others wrap."""
    while inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = inner
    line = "".join(x for x in str(error).strip().partition("\n")[0] if x.isprintable())
    return f"{type(error).__name__}: {line[:200]}".rstrip(".: ")


@contextlib.contextmanager
def damage_is_named(path: Path) -> Iterator[None]:
    """Turns errors of reading archives and HDF5 files into one that names the file."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError, KeyError, EOFError) as error:
        raise ValueError(f"{str(path)!r} is damaged or incomplete.") from error


@contextlib.contextmanager
def named(path: Path, name: str) -> Iterator[Path]:
    """Yields a link to the file with a name that Keras recognizes; Keras goes by the name."""
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / name
        link.symlink_to(path.resolve())
        yield link
