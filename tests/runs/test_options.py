"""The options of `keras-fpn train` are the constructors' arguments; what is given is passed on."""

import inspect
import json

import pytest

import keras_fpn
from keras_fpn import builder
from keras_fpn.runs import options, train, training
from keras_fpn.runs.recipes import RECIPES, Recipe

REQUIRED = ["--dataset=x", "--output=y"]


def parse(arguments=""):
    return train.parse_arguments([*REQUIRED, *arguments.split()])


def test_the_stages_read_from_the_source_are_those_of_the_builder():
    classes = {stage: cls.__name__ for stage, cls in builder.STAGES.items()}
    assert options.stage_classes() == classes


@pytest.mark.parametrize("callable_", [*builder.STAGES.values(), builder.build_fpn_faster_rcnn])
def test_arguments_read_from_the_source_are_those_of_the_signature(callable_):
    signature = inspect.signature(callable_).parameters.values()
    expected = {x.name: x.default for x in signature if x.kind is not inspect.Parameter.VAR_KEYWORD}
    read = options.read_arguments("builder", callable_.__name__)
    assert {name: argument.default for name, argument in read.items()} == expected
    assert list(read) == list(expected)
    assert all(argument.doc for argument in read.values())


def test_every_argument_of_every_stage_is_an_option_unless_it_is_derived():
    arguments = options.model_arguments()
    for stage, cls in builder.STAGES.items():
        for name in options.read_arguments("builder", cls.__name__):
            assert (f"{stage}.{name}" in arguments) == (
                name not in {*builder.DERIVED, "bounding_box_format", "seed"}
            )
    everyday = {name for name in arguments if "." not in name}
    assert everyday - {*options.everyday_aliases()} == {
        *("backbone", "backbone_weights", "weights", "single_scale", "pooling")
    }
    assert options.everyday_aliases() == {
        "score_threshold": "detections.score_threshold",
        "nms_iou_threshold": "detections.nms_iou_threshold",
        "max_detections": "detections.max_detections",
        "anchor_sizes": "anchors.sizes",
        "anchor_ratios": "anchors.aspect_ratios",
        "normalization": "resnet.normalization",
        "frozen_stages": "resnet.frozen_stages",
    }
    # A type that the command line cannot parse would be None.
    assert all(argument.type is not None for argument in arguments.values())


def test_what_is_given_is_passed_to_the_builder_and_nothing_else(monkeypatch):
    received = {}
    monkeypatch.setattr(
        keras_fpn, "build_fpn_faster_rcnn", lambda **kwargs: received.update(kwargs)
    )
    # Given, although it is the default, and beside weights.
    _, recipe = parse("--weights best.keras --anchor-sizes 32 64 128 256 512")
    training.build_model(recipe, ["a", "b"])
    assert received == {
        "class_names": ["a", "b"],
        "seed": 0,
        "weights": "best.keras",
        "anchor_sizes": (32, 64, 128, 256, 512),
    }


def test_options_of_stages_reach_their_stages():
    _, recipe = parse(
        "--proposals.post-nms 300 --proposals.pre_nms=1000 --resnet.norm-epsilon 0 "
        "--roi-pooling.aligned --roi-pooling.sampling-ratio None --anchors.no-rounded "
        "--anchors.sizes 32 64"
    )
    assert recipe.model == {
        "proposals": {"post_nms": 300, "pre_nms": 1000},
        "resnet": {"norm_epsilon": 0.0},
        "roi_pooling": {"aligned": True, "sampling_ratio": None},
        "anchors": {"sizes": (32, 64), "rounded": False},
    }


def test_a_model_is_built_from_options_of_every_type():
    _, recipe = parse(
        "--backbone resnet18 --pyramid.channels 8 --box-head.hidden-dim 8 "
        "--roi-pooling.aligned --normalization None --anchor-ratios 1"
    )
    model = training.build_model(recipe, ["a", "b"])
    assert model.roi_pooling.aligned is True
    assert model.anchors.aspect_ratios == (1.0,)
    assert model.backbone.get_config()["normalization"] is None
    assert model.pyramid.channels == 8


def test_the_command_line_replaces_what_the_recipe_says():
    run, recipe = parse("--recipe=demo --learning-rate=0.5 --decay-epochs 2 --pyramid.channels=32")
    assert run.dataset == "x"
    assert (recipe.learning_rate, recipe.decay_epochs) == (0.5, (2,))
    assert recipe.model == RECIPES["demo"].model | {"pyramid": {"channels": 32}}
    assert recipe.epochs == RECIPES["demo"].epochs
    assert parse()[1] == Recipe()


def test_an_argument_of_a_recipe_is_replaced_in_either_spelling():
    _, recipe = parse("--recipe=demo --anchors.sizes 1 2 3 4 5")
    assert "anchor_sizes" not in recipe.model
    assert recipe.model["anchors"] == {"sizes": (1, 2, 3, 4, 5)}
    # The builder's own None would be "not given".
    _, recipe = parse("--recipe demo --normalization None")
    assert "normalization" not in recipe.model
    assert recipe.model["resnet"] == {"normalization": None}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [("", "auto"), ("--jit-compile", True), ("--no-jit-compile", False)],
)
def test_jit_compile_is_auto_unless_given(arguments, expected):
    assert parse(arguments)[0].jit_compile == expected


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_build_what_they_say(name):
    model = RECIPES[name].model
    flat = dict(options.flatten(model))
    assert flat.keys() <= options.model_arguments().keys()
    assert options.merge_model(model, {}) == model
    # As config.json stores it.
    assert json.loads(json.dumps(model)).keys() == model.keys()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--proposals.post-nmss 3", "--proposals.post-nms "),
        ("--proposals.post-nms many", "many"),
        ("--precision float8", "float8"),
        ("--learning-rate 0.1 stray", "stray"),
        ("--recipe demos", "demos"),
    ],
)
def test_a_typing_error_is_named(arguments, named, capsys):
    with pytest.raises(SystemExit) as end:
        parse(arguments)
    assert end.value.code == 2
    printed = "".join(capsys.readouterr())
    assert named in printed


def test_the_help_shows_the_defaults_of_constructors_and_recipes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        train.main(["--recipe", "demo", "--help"])
    assert end.value.code == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--proposals.nms-iou-threshold FLOAT NMS IoU threshold. (default: 0.7)" in printed
    assert "(default: 8 16 32 64 128)" in printed
    assert "--anchors.rounded, --anchors.no-rounded" in printed
    for name in options.model_arguments():
        assert f"--{name.replace('_', '-')}" in printed
