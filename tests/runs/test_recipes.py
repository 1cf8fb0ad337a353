"""Every field of a recipe is checked before a run writes anything."""

import dataclasses
import json
import math

import pytest

from keras_fpn.runs import train
from keras_fpn.runs.recipes import _CHECKS, RECIPES, Recipe, check_recipe
from keras_fpn.runs.run_folder import read_configuration

WRONG = {
    "model": ([], {"proposal": {}}),
    "detector": ("mask_rcnn", ["rpn"]),
    "frozen": ("backbone", [3]),
    "shorter_edges": ("800", (), (0,), (800, 2**20)),
    "evaluation_shorter_edge": (0, -3, 2**20, 800.5, None),
    "longest_edge": (0, math.inf),
    "horizontal_flip": ("yes", 1),
    "keep_empty_images": (None,),
    "precision": ("float8", 16),
    "batch_size": (0, -2, 2.0, "2", True),
    "epochs": (0, -1, 2**40, 1.5, math.nan),
    "images_per_epoch": (-4, 0, 10**400),
    "learning_rate": (-0.1, 0, math.inf, math.nan, 1e300, 10**400, "0.1", True),
    "warmup_steps": (-1, math.inf, 10**20),
    "schedule": ("linear", None),
    "decay_epochs": (8, "8", (-1,), (math.nan,), (2**40,)),
    "momentum": (-0.1, 1.5, math.nan),
    "weight_decay": (-1e-4, math.inf, math.nan),
    "clip_norm": (0, -1, math.inf, math.nan),
    "average_decay": (0, 1, 1.5, math.nan),
    "steps_per_execution": (0, -4, 2.0, True),
    "evaluate_every": (0, 2**40),
    "checkpoint_steps": (0, -5),
    "keep_checkpoints": (0, None),
    "seed": (-1, 2**40, 1.5),
}


def test_every_field_has_a_check_and_every_recipe_passes_it():
    assert list(WRONG) == list(_CHECKS) == [field.name for field in dataclasses.fields(Recipe)]
    for recipe in RECIPES.values():
        check_recipe(recipe)


@pytest.mark.parametrize("name", WRONG)
def test_what_no_run_can_have_is_refused_by_its_name(name):
    for value in WRONG[name]:
        with pytest.raises(ValueError, match=f"`{name}`.*received"):
            check_recipe(dataclasses.replace(Recipe(), **{name: value}))


def test_an_option_is_refused_before_anything_is_written(tmp_path):
    output = tmp_path / "run"
    with pytest.raises(SystemExit, match=r"error: `images_per_epoch` .* received -4"):
        train.main(["--dataset=x", f"--output={output}", "--images-per-epoch=-4"])
    assert not output.exists()


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ({"recipe": {"shorter_edges": "800"}}, "shorter_edges"),
        ({"recipe": {"detector": "mask_rcnn"}}, "mask_rcnn"),
        ({"recipe": {"model": "resnet50"}}, "model"),
        ({"recipe": {"model": {"proposal": {}}}}, "'proposals'"),
        ({"recipe": {"learning_rates": 1}}, "'learning_rate'"),
        ({"recipe": []}, "no 'recipe'"),
        ({"recipe": {}, "dataset": ["x"]}, "'dataset'"),
        ({"recipe": {}, "proposals": 3}, "'proposals'"),
    ],
)
def test_a_configuration_with_a_wrong_entry_is_refused_by_its_file(tmp_path, entries, named):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(entries))
    with pytest.raises(SystemExit, match=f"config.json.*{named}"):
        train.parse_arguments([f"--config={file}", "--dataset=x", "--output=y"])


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b"{"])
def test_a_configuration_that_is_not_json_is_refused_by_its_file(tmp_path, content):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_configuration(file)
