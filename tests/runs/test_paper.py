"""The rows of the paper's tables, and the file of their results."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

import keras_fpn
from keras_fpn.runs import alternating, paper, training
from keras_fpn.runs.recipes import BUILDERS
from keras_fpn.runs.training import build_model

ROOT = Path(__file__).parents[2]


def documented_rows():
    """Returns table and name of each row in docs/paper.md, its options and its figures."""
    rows = {}
    for line in (ROOT / "docs" / "paper.md").read_text().splitlines():
        command = re.search(r"`keras-fpn paper (\d) (\S+)`", line)
        if command and line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            figures = [float(x) for x in cells if re.fullmatch(r"\d+\.\d", x)]
            rows[int(command[1]), command[2]] = (line, tuple(figures))
    return rows


def test_the_rows_are_those_of_the_docs():
    documented = documented_rows()
    assert [(row.table, row.name) for row in paper.ROWS] == list(documented)
    for row in paper.ROWS:
        line, figures = documented[row.table, row.name]
        assert row.figures == figures
        assert len(figures) == (0 if "joint" in row.name else len(paper.METRICS[row.table]))
        if row.table != 5:
            assert row.label in line
    # Of Table 2 of the paper.
    assert documented[2, "c"][1] == (56.9, 33.9, 17.8, 37.7, 45.8)


STAGES = {
    "a": ("SingleScale", {"P4"}, "Conv5Head"),
    "b": ("SingleScale", {"P5"}, "BoxHead"),
    "c": ("FeaturePyramid", {"P2", "P3", "P4", "P5", "P6"}, "BoxHead"),
    "d": ("FeaturePyramid", {"P2", "P3", "P4", "P5", "P6"}, "BoxHead"),
    "e": ("FeaturePyramid", {"P2", "P3", "P4", "P5", "P6"}, "BoxHead"),
    "f": ("FeaturePyramid", {"P2"}, "BoxHead"),
}


@pytest.mark.parametrize("variant", STAGES)
def test_a_row_builds_its_variant(variant):
    row = next(row for row in paper.ROWS if row.variant == variant)
    model = build_model(paper.recipe_of(row, "small", 0), ["circle"])
    pyramid, levels, box_head = STAGES[variant]
    assert type(model.pyramid).__name__ == pyramid
    assert set(model.pyramid.rpn_levels) == levels
    assert type(model.box_head).__name__ == box_head
    assert type(model.roi_pooling).__name__ == "PyramidRoIPool"
    # Fifteen anchors at each place of one map, three of each level's size.
    assert model.anchors.anchors_per_location == (3 if len(levels) > 1 else 15)
    assert getattr(model.pyramid, "top_down", True) == (variant != "d")
    assert getattr(model.pyramid, "lateral", True) == (variant != "e")


@pytest.mark.parametrize("row", paper.ROWS, ids=lambda row: f"{row.table}-{row.name}")
def test_the_full_scale_is_the_paper(row, monkeypatch):
    """Every argument is one of the builder's, and only those of the row are not the recipe's."""
    recipe = paper.recipe_of(row, "full", 3)
    assert (recipe.seed, recipe.epochs, recipe.batch_size, recipe.warmup_steps) == (3, 8, 16, 0)
    assert recipe.model["backbone"] == ("resnet101" if row.name.startswith("101") else "resnet50")
    assert recipe.model["backbone_weights"] == "imagenet"
    assert recipe.model["pooling"] == "max"
    rpn = paper.rpn_recipe_of(row, "full", 3)
    # 30k of 40k steps at the first rate.
    assert (rpn.epochs, rpn.decay_epochs, rpn.images_per_epoch) == (4, (3,), 160_000)
    assert rpn.model == recipe.model
    given = []
    for builder in BUILDERS.values():
        monkeypatch.setattr(keras_fpn, builder, lambda **arguments: given.append(arguments))
    for detector in BUILDERS:
        build_model(alternating.recipe_of_step(recipe, detector, None), ["a"])
    assert len(given) == 3


@pytest.fixture
def trainings(monkeypatch):
    """In place of training, a list of the runs, each of which writes metrics."""
    runs = []

    def train(options, recipe):
        runs.append((str(options.output), recipe, options.proposals))
        options.output.mkdir(parents=True, exist_ok=True)
        if options.output.name == "resnet50-d":
            raise SystemExit(143)
        metrics = {name: 0.01 * len(runs) for names in paper.METRICS.values() for name in names}
        (options.output / "metrics.json").write_text(json.dumps(metrics | {"APs": -1.0}))

    def alternate(options, recipe, *, rpn, steps, num_proposals):
        train(options, recipe)
        for folder, *_ in alternating.STEPS[:steps]:
            train(dataclasses.replace(options, output=options.output / folder), rpn)

    def stored_proposals(options, recipe, folder, num_proposals):
        return folder / "training.npz", folder / "validation.npz"

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(paper, "alternate", alternate)
    monkeypatch.setattr(paper, "stored_proposals", stored_proposals)
    return runs


def run_paper(output, *arguments):
    paper.main([*arguments, "--dataset", "shapes", "--output", str(output)])
    return paper.read_lines(output)


def test_a_row_becomes_a_line_once(trainings, tmp_path, capsys):
    (line,) = run_paper(tmp_path, "1", "c")
    assert len(trainings) == 2
    assert (line["table"], line["row"], line["description"]) == ("1", "c", "FPN")
    # The second of the two runs, in percent, beside the paper's.
    assert (line["AR100"], line["paper AR100"]) == ("2.00", "44.0")
    assert (line["AR1kl"], line["paper AR1kl"]) == ("2.00", "66.2")
    assert (line["AP"], line["paper AP"]) == ("", "")
    assert (line["seed"], line["scale"], line["dataset"]) == ("0", "small", "shapes")
    assert line["version"] == keras_fpn.__version__
    before = (tmp_path / "results.csv").read_bytes()
    run_paper(tmp_path, "1", "c")
    assert "Table 1 (c) has been run" in capsys.readouterr().out
    assert len(trainings) == 2
    assert (tmp_path / "results.csv").read_bytes() == before
    # Another seed is another line, in a folder of its own.
    lines = run_paper(tmp_path, "1", "c", "--seed", "1")
    assert [line["seed"] for line in lines] == ["0", "1"]
    assert len({output for output, *_ in trainings}) == 4
    assert trainings[-1][1].seed == 1


def test_what_rows_have_in_common_is_trained_in_one_folder(trainings, tmp_path):
    folders = {}
    for row in paper.ROWS:
        options = paper.Options(tmp_path, dataset="shapes")
        folders[row.table, row.name] = paper.run_folder(row, options).name
    same = [key for key, folder in folders.items() if folder == folders[1, "c"]]
    assert same == [(1, "c"), (2, "c"), (3, "c"), (5, "50-no"), (5, "50-yes")]
    assert folders[1, "a"] == folders[3, "a"] != folders[2, "a"]
    assert folders[5, "101-no"] == folders[5, "101-yes"] != folders[5, "50-no"]
    # The fixed proposals are those of Table 1 (c).
    run_paper(tmp_path, "2", "a")
    output, recipe, proposals = trainings[-1]
    assert Path(output).name == folders[2, "a"]
    assert proposals.parts[-3:] == (folders[1, "c"], "1-rpn", "training.npz")
    assert recipe.detector == "fast_rcnn"
    assert recipe.model["single_scale"] == "C4"


def test_all_rows_go_on_where_they_were_stopped(trainings, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="143"):
        run_paper(tmp_path, "--all")
    assert [(x["table"], x["row"]) for x in paper.read_lines(tmp_path)] == [
        ("1", "a"),
        ("1", "b"),
        ("1", "c"),
    ]
    monkeypatch.setattr(
        paper, "run_row", lambda row, options: dict.fromkeys(paper.METRICS[row.table], 0.5)
    )
    lines = run_paper(tmp_path, "--all")
    assert [(int(x["table"]), x["row"]) for x in lines] == [(r.table, r.name) for r in paper.ROWS]
    assert lines[0]["AR100"] != lines[3]["AR100"] == "50.00"
    written = (tmp_path / "results.md").read_text()
    assert "| (d) | bottom-up pyramid | 50.0 (37.4) | 50.0 (49.5) |" in written
    assert "| (50-joint) | ResNet-50, joint training | 50.0 | 50.0 | 0 |" in written
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png") == 4
    assert "http" not in page
    assert "<td>50.0 (31.9)</td>" in page


def test_undefined_metrics_are_left_empty(trainings, tmp_path):
    (line,) = run_paper(tmp_path, "2", "c")
    assert (line["APs"], line["paper APs"]) == ("", "17.8")
    assert "| - (17.8) |" in (tmp_path / "results.md").read_text()


def test_what_cannot_be_run_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="Table 1 has the rows a, b, c, d, e, f; received g"):
        run_paper(tmp_path, "1", "g")
    with pytest.raises(SystemExit, match="Either a table or --all is required"):
        run_paper(tmp_path)
    with pytest.raises(SystemExit, match="Either a table or --all is required"):
        run_paper(tmp_path, "1", "--all")
    with pytest.raises(SystemExit, match="--dataset is required at --scale full"):
        paper.main(["1", "c", "--scale", "full", "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())
