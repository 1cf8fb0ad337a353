"""Trains a detector with a feature pyramid on a detection data set.

    keras-fpn train --dataset coco/2017 --data-dir ~/tensorflow_datasets --output runs/coco

The data set is the name of one that TensorFlow Datasets has prepared, or a folder in COCO's layout
(annotations/instances_SPLIT.json and SPLIT/). All GPUs are used, also those of other workers if
TF_CONFIG or Slurm name several (--strategy); without a GPU, the CPU.

Rerun the same command to resume a run that was stopped; it ends with the same weights, on a CPU bit
for bit with the same number of threads.

The output folder holds the configuration (config.json, which --config takes), checkpoints
(checkpoints/step-N.keras) and the best model (checkpoints/best.keras), TensorBoard logs (logs/),
losses and metrics of every epoch (history.csv) and of steps (steps.csv), the metrics of the last
evaluation with those of each class (metrics.json), a report with curves, tables and pictures
(report.html), and what could not be read (skipped.json).
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from keras_fpn.runs.command import StrategyName, exits_on_bad_input, given_options, parse
from keras_fpn.runs.options import (
    merge_model,
    model_arguments,
    model_options,
    read_arguments,
)
from keras_fpn.runs.recipes import BUILDERS, RECIPES, Recipe, check_recipe
from keras_fpn.runs.run_folder import read_configuration, recipe_in

SPLITS = ("train_split", "validation_split", "proposals", "validation_proposals")


@dataclasses.dataclass(frozen=True)
class Run:
    """Data, devices and output of the run.

    Attributes:
        output: folder for everything that the run writes: a new one, or that of a run to resume.
        dataset: TFDS name such as coco/2017, or a folder in COCO's layout.
        recipe: recipe to start from; the options below replace parts of it.
        config: config.json of a run, which replaces the recipe and its data.
        data_dir: directory of TFDS's prepared data sets.
        download: let TFDS download and prepare a data set that is missing.
        train_split: split to train on; TFDS's slices such as train[:8] work.
        validation_split: split to evaluate on.
        proposals: file of proposals for the training split, for Fast R-CNN: written by keras-fpn
            evaluate --results, results in COCO's format, or a proposal file of Detectron2.
        validation_proposals: the same for the validation split.
        strategy: devices to use; auto takes all GPUs, of all workers named by TF_CONFIG or Slurm.
        jit_compile: compile with XLA.
        allow_changed_data: resume although the data set is another than the run began with.
        verbose: 1 shows a progress bar, 2 one line per epoch, 0 neither.
    """

    output: Path
    dataset: str
    recipe: Literal[tuple(RECIPES)] = "1x"
    config: Path | None = None
    data_dir: str | None = None
    download: bool = False
    train_split: str = "train"
    validation_split: str = "validation"
    proposals: Path | None = None
    validation_proposals: Path | None = None
    strategy: StrategyName = "auto"
    jit_compile: Annotated[bool, tyro.conf.arg(help_behavior_hint="(default: on one GPU)")] = False
    allow_changed_data: bool = False
    verbose: Literal[0, 1, 2] = 1


def main(arguments: list[str] | None = None) -> None:
    """Runs the program."""
    options, recipe = parse_arguments(arguments)
    from keras_fpn.runs.training import train

    train(options, recipe)


def parse_arguments(
    arguments: list[str] | None, program: str = "train", doc: str = __doc__
) -> tuple[Any, Recipe]:
    """Parses the command line.

    Args:
        arguments: the command line; None is that of the process.
        program: name of the program, whose options are these.
        doc: description of the program.

    Returns:
        The `Run`, whose `jit_compile` is "auto" if it was not given, and the recipe.
    """
    start = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    start.add_argument("--recipe", choices=RECIPES, default="1x")
    start.add_argument("--config")
    start.add_argument("--model", choices=BUILDERS)
    chosen, _ = start.parse_known_args(arguments)
    recipe, data = RECIPES[chosen.recipe], {}
    if chosen.config is not None:
        with exits_on_bad_input():
            configuration = read_configuration(chosen.config)
            recipe = recipe_in(configuration)
        names = ("dataset", "data_dir", *SPLITS)
        data = {name: configuration[name] for name in names if name in configuration}
        for name in ("proposals", "validation_proposals"):
            data[name] = Path(data[name]) if data.get(name) else None
    detector = chosen.model or recipe.detector
    known = read_arguments("builder", BUILDERS[detector])
    # What another model of the same recipe has no use for.
    model = {name: value for name, value in recipe.model.items() if name in known}
    recipe = dataclasses.replace(recipe, model=model, detector=detector)
    everyday, stages = model_options(recipe.model)
    options = dataclasses.make_dataclass(
        "Options",
        [
            ("run", tyro.conf.OmitArgPrefixes[Run]),
            ("recipe", tyro.conf.OmitArgPrefixes[Recipe]),
            ("model", tyro.conf.OmitArgPrefixes[everyday]),
            ("stages", Annotated[stages, tyro.conf.arg(name="")]),
        ],
    )
    required = {"output": tyro.MISSING, "dataset": tyro.MISSING}
    default = options(Run(**required | data), recipe, everyday(), stages())
    parsed = parse(options, arguments, program, doc, default)
    given = {}
    for name in given_options(arguments, model_arguments()):
        stage, _, last = name.rpartition(".")
        given[name] = getattr(getattr(parsed.stages, stage) if stage else parsed.model, last)
    run = parsed.run
    recipe = dataclasses.replace(parsed.recipe, model=merge_model(recipe.model, given))
    with exits_on_bad_input():
        check_recipe(recipe)
    if not given_options(arguments, ["jit_compile"]):
        run = dataclasses.replace(run, jit_compile="auto")
    return run, recipe
