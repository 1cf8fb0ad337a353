"""The command `keras-fpn`, and what its programs share on the command line."""

import argparse
import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, Literal

_DATA = ("tensorflow_datasets", "importlib_resources", "faster_coco_eval")
# Name of a program to its summary and the modules of extras that it needs.
PROGRAMS = {
    "train": (
        "train a detector on a data set",
        (*_DATA, "PIL", "matplotlib", "tensorboard"),
    ),
    "evaluate": (
        "evaluate a detector with COCO's metrics",
        _DATA,
    ),
    "alternating": (
        "train Faster R-CNN in four steps",
        (*_DATA, "PIL", "matplotlib", "tensorboard"),
    ),
    "paper": (
        "run the experiments of the paper's tables",
        (*_DATA, "PIL", "matplotlib", "tensorboard"),
    ),
    "predict": ("detect objects in image files", ("PIL",)),
    "export": ("export a detector for TensorFlow Serving", ()),
}
StrategyName = Literal["auto", "single", "mirrored", "multi_worker", "tpu"]


def main(arguments: list[str] | None = None) -> None:
    """Runs `keras-fpn PROGRAM ...`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in PROGRAMS:
        require("tyro", *PROGRAMS[arguments[0]][1])
        importlib.import_module(f"keras_fpn.runs.{arguments[0]}").main(arguments[1:])
        return
    parser = argparse.ArgumentParser(
        prog="keras-fpn", epilog="`keras-fpn PROGRAM --help` lists the options of a program."
    )
    programs = parser.add_subparsers(metavar="PROGRAM", required=True)
    for name, (summary, _) in PROGRAMS.items():
        programs.add_parser(name, help=summary)
    parser.parse_args(arguments)


def parse(
    options: type, arguments: list[str] | None, program: str, doc: str, default: Any = None
) -> Any:
    """Parses the command line of a program, before anything heavy is imported.

    Args:
        options: dataclass whose fields are the options.
        arguments: the command line. Defaults to None, that of the process.
        program: name of the program.
        doc: its description.
        default: an instance that holds the defaults. Defaults to None, those of the dataclass.

    Returns:
        An instance of `options`.
    """
    # Before TensorFlow is imported.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tyro

    default = tyro.MISSING_NONPROP if default is None else default
    prog = f"keras-fpn {program}"
    return tyro.cli(options, args=arguments, prog=prog, description=doc, default=default)


def given_options(arguments: list[str] | None, names: Iterable[str]) -> list[str]:
    """Returns which options occur on the command line, be it with their default value.

    Args:
        arguments: as in `parse`.
        names: the options, named as fields are: `"proposals.post_nms"`.
    """
    given = set()
    for argument in sys.argv[1:] if arguments is None else arguments:
        if argument.startswith("--"):
            name = argument[2:].split("=")[0].replace("-", "_")
            *group, last = name.split(".")
            given |= {name, ".".join([*group, last.removeprefix("no_")])}
    return [name for name in names if name in given]


def counted(number: int, one: str, many: str | None = None) -> str:
    """Returns a number with its noun, "1 epoch" or "2 epochs"."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def require(*modules: str) -> None:
    """Exits with what to install if modules are missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"error: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed; "
            "run pip install 'keras-fpn[training]'."
        )


@contextlib.contextmanager
def exits_on_bad_input() -> Iterator[None]:
    """Exits with the sentence of an error, without a traceback.

    Only for checking and loading what the user named: an error there is about the input, an error
    anywhere else is a bug and keeps its traceback.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


@contextlib.contextmanager
def exits_on_os_error() -> Iterator[None]:
    """Exits with the sentence of an error of the operating system, such as a full disk."""
    try:
        yield
    except OSError as error:
        sys.exit(f"\nerror: {error}")
