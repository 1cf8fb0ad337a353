r"""Runs the experiments of the paper: the rows of Tables 1, 2, 3 and 5 of FPN (docs/paper.md).

    keras-fpn paper 1 c --dataset coco/2017 --data-dir ~/tensorflow_datasets --scale full \
        --output runs/paper
    keras-fpn paper --all --output runs/paper

A row is trained and evaluated, and becomes a line of results.csv in the output folder, with the
paper's figures beside its own, in percent. results.md and index.html are the tables of all lines,
and plots. Without a row, all rows of the table are run; a row that has a line is not run again.

At --scale full, the recipe is that of the paper. At --scale small, a row takes minutes on two CPU
cores: ResNet-10 of a quarter of the width, from random weights (ResNet-18 in place of ResNet-101),
on images of 128 pixels.

Runs that rows have in common are trained once. Rerun the same command to resume one that was
stopped.
"""

import csv
import dataclasses
import gc
import html
import io
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tyro.conf import Positional

from keras_fpn.runs.alternating import STEPS, alternate, recipe_of_step, stored_proposals
from keras_fpn.runs.command import StrategyName, exits_on_bad_input, exits_on_os_error, parse
from keras_fpn.runs.options import merge_model
from keras_fpn.runs.recipes import RECIPES, Recipe, check_recipe
from keras_fpn.runs.run_lock import folder_lock
from keras_fpn.runs.train import Run

TABLES = {
    1: "Proposals of an RPN",
    2: "Fast R-CNN on fixed proposals",
    3: "Faster R-CNN",
    5: "Sharing features",
}
METRICS = {
    1: ("AR100", "AR1k", "AR1ks", "AR1km", "AR1kl"),
    2: ("AP50", "AP", "APs", "APm", "APl"),
    3: ("AP50", "AP", "APs", "APm", "APl"),
    5: ("AP50", "AP"),
}
# Arguments of the builders, stages' with dotted names.
VARIANTS: dict[str, dict[str, Any]] = {
    "a": {"single_scale": "C4"},
    "b": {"single_scale": "C5"},
    "c": {},
    "d": {"pyramid.top_down": False},
    "e": {"pyramid.lateral": False},
    "f": {"pyramid.finest_only": True},
}


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        table: its number.
        name: its name in the table.
        label: what it is.
        variant: name in `VARIANTS`.
        trained: "rpn"; "fixed", Fast R-CNN on the proposals of Table 1 (c); "separate", Fast R-CNN
            on the proposals of an RPN of the same variant; "alternating", in four steps; or
            "joint", Faster R-CNN with all losses at once.
        figures: the paper's, in percent, one for each of the table's `METRICS`; empty if there are
            none.
        depth: of the ResNet.
    """

    table: int
    name: str
    label: str
    variant: str
    trained: str
    figures: tuple[float, ...]
    depth: int = 50


ROWS = (
    Row(1, "a", "baseline on conv4", "a", "rpn", (36.1, 48.3, 32.0, 58.7, 62.2)),
    Row(1, "b", "baseline on conv5", "b", "rpn", (36.3, 44.9, 25.3, 55.5, 64.2)),
    Row(1, "c", "FPN", "c", "rpn", (44.0, 56.3, 44.9, 63.4, 66.2)),
    Row(1, "d", "bottom-up pyramid", "d", "rpn", (37.4, 49.5, 30.5, 59.9, 68.0)),
    Row(1, "e", "top-down, no lateral", "e", "rpn", (34.5, 46.1, 26.5, 57.4, 64.7)),
    Row(1, "f", "finest level only", "f", "rpn", (38.4, 51.3, 35.1, 59.7, 67.6)),
    Row(2, "a", "baseline on conv4", "a", "fixed", (54.7, 31.9, 15.7, 36.5, 45.5)),
    Row(2, "b", "baseline on conv5", "b", "fixed", (52.9, 28.8, 11.9, 32.4, 43.4)),
    # The fixed proposals are those of its own RPN.
    Row(2, "c", "FPN", "c", "separate", (56.9, 33.9, 17.8, 37.7, 45.8)),
    Row(2, "d", "bottom-up pyramid", "d", "fixed", (44.9, 24.9, 10.9, 24.4, 38.5)),
    Row(2, "e", "top-down, no lateral", "e", "fixed", (54.0, 31.3, 13.3, 35.2, 45.3)),
    Row(2, "f", "finest level only", "f", "fixed", (56.3, 33.4, 17.3, 37.3, 45.6)),
    Row(3, "a", "baseline on conv4", "a", "separate", (53.1, 31.6, 13.2, 35.6, 47.1)),
    Row(3, "b", "baseline on conv5", "b", "separate", (51.7, 28.0, 9.6, 31.9, 43.1)),
    Row(3, "c", "FPN", "c", "separate", (56.9, 33.9, 17.8, 37.7, 45.8)),
    Row(5, "50-no", "ResNet-50, no sharing", "c", "separate", (56.9, 33.9)),
    Row(5, "50-yes", "ResNet-50, 4-step training", "c", "alternating", (57.2, 34.3)),
    Row(5, "50-joint", "ResNet-50, joint training", "c", "joint", ()),
    Row(5, "101-no", "ResNet-101, no sharing", "c", "separate", (58.0, 35.0), 101),
    Row(5, "101-yes", "ResNet-101, 4-step training", "c", "alternating", (58.2, 35.2), 101),
    Row(5, "101-joint", "ResNet-101, joint training", "c", "joint", (), 101),
)

# One map has all anchors; py-faster-rcnn's numbers of those that NMS sees.
ONE_MAP = {"proposals.training_pre_nms": 12000, "proposals.pre_nms": 6000}
_SMALL_SIZES = (8, 16, 32, 64, 128)
SMALL_ONE_MAP = {
    "anchor_sizes": (_SMALL_SIZES,),
    "proposals.training_pre_nms": 1500,
    "proposals.pre_nms": 5000,
}
# 200 steps of 8 images, with the loss of `paper`.
SMALL = Recipe(
    model={
        "normalization": "batch_norm",
        "resnet": {"width": 16},
        "anchor_sizes": _SMALL_SIZES,
        "pooling": "max",
        "pyramid": {"channels": 32},
        "box_head": {"hidden_dim": 128},
        "proposals": {"training_pre_nms": 300, "training_post_nms": 200, "post_nms": 50},
        "roi_targets": {"num_samples": 64},
        "roi_loss": {"smooth_l1_beta": 1.0},
    },
    shorter_edges=(128,),
    evaluation_shorter_edge=128,
    longest_edge=128,
    batch_size=8,
    images_per_epoch=1600,
    epochs=1,
    learning_rate=0.1,
    warmup_steps=50,
    schedule="cosine",
    checkpoint_steps=50,
)
_SMALL_BACKBONES = {50: "resnet10", 101: "resnet18"}

_SETTINGS = ("seed", "dataset", "train_split", "validation_split", "scale")
_ALL_METRICS = tuple(dict.fromkeys(name for names in METRICS.values() for name in names))
COLUMNS = (
    *("table", "row", "description"),
    *(column for name in _ALL_METRICS for column in (name, f"paper {name}")),
    *("seconds", *_SETTINGS, "version"),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `keras-fpn paper`.

    Attributes:
        output: folder for the results and all runs: a new one, or that of earlier rows.
        table: number of the table.
        row: name of the row: a to f, in Table 5 50-no, 50-yes, 50-joint, 101-no and so on.
        all: run all rows of all tables.
        scale: the paper's recipe, or minutes.
        dataset: TFDS name such as coco/2017, or a folder in COCO's layout. At --scale small, drawn
            shapes by default.
        data_dir: directory of TFDS's prepared data sets.
        train_split: split to train on.
        validation_split: split to evaluate on.
        seed: seed of weights, data order, augmentation and samplers.
        strategy: devices to use, as in `keras-fpn train`.
        allow_changed_data: as in `keras-fpn train`.
        verbose: 1 shows a progress bar, 2 one line per epoch, 0 neither.
    """

    output: Path
    table: Positional[Literal[tuple(METRICS)] | None] = None
    row: Positional[str | None] = None
    all: bool = False
    scale: Literal["small", "full"] = "small"
    dataset: str | None = None
    data_dir: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    seed: int = 0
    strategy: StrategyName = "auto"
    allow_changed_data: bool = False
    verbose: Literal[0, 1, 2] = 2


def main(arguments: list[str] | None = None) -> None:
    """Runs the program."""
    options = parse(Options, arguments, "paper", __doc__)
    with exits_on_bad_input():
        rows = chosen_rows(options)
        for row in rows:
            check_recipe(recipe_of(row, options.scale, options.seed))
        if options.dataset is None and options.scale == "full":
            raise ValueError("--dataset is required at --scale full; received none.")
    with exits_on_os_error(), folder_lock(options.output):
        if options.dataset is None:
            options = _with_drawn_shapes(options)
        try:
            for row in rows:
                _add_row(row, options)
        finally:
            # Also of an interrupted command.
            write_pages(options.output)
    print(f"The results are in {options.output / 'results.md'} and {options.output}/index.html.")


def _add_row(row: Row, options: Options) -> None:
    """Runs a row and adds its line to results.csv, unless it is there."""
    lines = read_lines(options.output)
    if any(_is_same(line, line_of(row, options)) for line in lines):
        print(f"Table {row.table} ({row.name}) has been run.")
        return
    print(f"\n=== Table {row.table} ({row.name}): {row.label} ===", flush=True)
    started = time.time()
    metrics = run_row(row, options)
    write_lines(options.output, [*lines, line_of(row, options, metrics, time.time() - started)])


def chosen_rows(options: Options) -> list[Row]:
    """Returns the rows that the command line asks for.

    Raises:
        ValueError: if there is no such row, or no table is given.
    """
    if options.all != (options.table is None):
        raise ValueError(
            f"Either a table or --all is required; received table {options.table} and "
            f"{'--all' if options.all else 'no --all'}."
        )
    rows = [row for row in ROWS if options.all or row.table == options.table]
    named = [row for row in rows if options.row in (None, row.name)]
    if not named:
        raise ValueError(
            f"Table {options.table} has the rows {', '.join(row.name for row in rows)}; received "
            f"{options.row}."
        )
    return named


def _with_drawn_shapes(options: Options) -> Options:
    from keras_fpn.data import demo_dataset

    data_dir = options.data_dir or str(options.output / "data")
    demo_dataset.prepare(data_dir)
    return dataclasses.replace(options, dataset="keras_fpn_shapes", data_dir=data_dir)


# === Running a row ===


def recipe_of(row: Row, scale: str, seed: int) -> Recipe:
    """Returns the recipe of a row, with the arguments of `build_fpn_faster_rcnn`.

    Its model is evaluated once: the last is the best.
    """
    variant = VARIANTS[row.variant]
    recipe = SMALL if scale == "small" else RECIPES["paper"]
    model = {**recipe.model, "backbone": f"resnet{row.depth}"}
    if scale == "small":
        model["backbone"] = _SMALL_BACKBONES[row.depth]
    if row.variant in "abf":
        model = merge_model(model, SMALL_ONE_MAP if scale == "small" else ONE_MAP)
    if row.variant in "ab":
        model.pop("pyramid", None)
    if row.variant == "a" and scale == "small":
        # Each region passes through convolutions of its own.
        del model["box_head"]
        model["roi_targets"] = {"num_samples": 8}
    model = merge_model(model, variant)
    return dataclasses.replace(recipe, model=model, evaluate_every=recipe.epochs, seed=seed)


def rpn_recipe_of(row: Row, scale: str, seed: int) -> Recipe:
    """Returns the recipe of a row's RPN, where one is trained by itself."""
    recipe = recipe_of(row, scale, seed)
    if scale == "small":
        # Enough for AR at 1000.
        model = merge_model(recipe.model, {"proposals.post_nms": 1000})
        return dataclasses.replace(recipe, model=model)
    # FPN, section 5.1: 30k steps at 0.02, then 10k at 0.002.
    return dataclasses.replace(recipe, epochs=4, decay_epochs=(3,), evaluate_every=4)


def run_row(row: Row, options: Options) -> Mapping[str, float]:
    """Trains and evaluates a row, or resumes it; returns its metrics, in 0..1."""
    import keras

    from keras_fpn.runs.training import train

    # What earlier rows have left.
    keras.utils.clear_session()
    gc.collect()
    recipe = recipe_of(row, options.scale, options.seed)
    run = Run(
        output=run_folder(row, options),
        dataset=options.dataset or "",
        data_dir=options.data_dir,
        train_split=options.train_split,
        validation_split=options.validation_split,
        strategy=options.strategy,
        jit_compile="auto",
        allow_changed_data=options.allow_changed_data,
        verbose=options.verbose,
    )
    run.output.parent.mkdir(parents=True, exist_ok=True)
    # Those for training and for testing; in the paper, those of the RPN.
    num_proposals = (200, 50) if options.scale == "small" else None
    result = run.output
    if row.trained == "joint":
        train(run, recipe)
    elif row.trained == "fixed":
        rpn = next(other for other in ROWS if (other.table, other.name) == (1, "c"))
        run_row(rpn, options)
        rpn_folder = run_folder(rpn, options) / STEPS[0][0]
        files = stored_proposals(
            run, rpn_recipe_of(rpn, options.scale, options.seed), rpn_folder, num_proposals
        )
        run = dataclasses.replace(run, proposals=files[0], validation_proposals=files[1])
        train(run, recipe_of_step(recipe, "fast_rcnn", None))
    else:
        steps = {"rpn": 1, "separate": 2, "alternating": 4}[row.trained]
        rpn_recipe = rpn_recipe_of(row, options.scale, options.seed)
        alternate(run, recipe, rpn=rpn_recipe, steps=steps, num_proposals=num_proposals)
        if steps < len(STEPS):
            result = run.output / STEPS[steps - 1][0]
    return json.loads((result / "metrics.json").read_text())


def run_folder(row: Row, options: Options) -> Path:
    """Returns the folder of a row's run. Rows that have steps in common have the same."""
    data = "-".join((options.dataset or "", options.train_split, options.validation_split))
    settings = f"{re.sub('[^A-Za-z0-9]+', '-', data).strip('-')}-{options.scale}-{options.seed}"
    name = f"resnet{row.depth}-{row.variant}"
    if row.trained in ("joint", "fixed"):
        name = f"{name}-{row.trained}"
    return options.output / "runs" / settings / name


# === Results ===


def line_of(
    row: Row, options: Options, metrics: Mapping[str, float] | None = None, seconds: float = 0.0
) -> dict[str, str]:
    """Returns a row's line of results.csv.

    Args:
        row: the row.
        options: where its settings come from.
        metrics: metrics in 0..1, -1 where undefined. Defaults to None, none.
        seconds: time that this command took for it.
    """
    import keras_fpn

    line = {name: str(getattr(options, name)) for name in _SETTINGS}
    line |= {"table": str(row.table), "row": row.name, "description": row.label}
    line |= {"seconds": f"{seconds:.0f}", "version": keras_fpn.__version__}
    for number, name in enumerate(METRICS[row.table]):
        if row.figures:
            line[f"paper {name}"] = str(row.figures[number])
        value = (metrics or {}).get(name, -1)
        line[name] = f"{100 * value:.2f}" if value >= 0 else ""
    return {name: line.get(name, "") for name in COLUMNS}


def _is_same(line: Mapping[str, str], other: Mapping[str, str]) -> bool:
    return all(line[name] == other[name] for name in ("table", "row", *_SETTINGS))


def read_lines(folder: Path) -> list[dict[str, str]]:
    """Returns the lines of results.csv, none if there is no such file."""
    file = folder / "results.csv"
    if not file.exists():
        return []
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def write_lines(folder: Path, lines: Sequence[Mapping[str, str]]) -> None:
    """Writes results.csv."""
    from keras_fpn.runs.run_state import write_text

    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(folder / "results.csv", text.getvalue())


def write_pages(folder: Path) -> None:
    """Writes results.md and index.html from results.csv, if it has lines."""
    from keras_fpn.runs.run_state import write_text

    lines = read_lines(folder)
    if lines:
        write_text(folder / "results.md", results_markdown(lines))
        write_text(folder / "index.html", results_page(lines))


def _tables(lines: Sequence[Mapping[str, str]]) -> list[tuple[str, int, list]]:
    """Returns the data and scale of each table that has lines, its number, and its lines.

    The lines are in the order of the rows, then of the seeds.
    """
    rows = [(str(row.table), row.name) for row in ROWS]
    found: dict[tuple, list] = {}
    for line in lines:
        data = (
            f"{line['dataset']} ({line['train_split']}, {line['validation_split']}), "
            f"scale {line['scale']}"
        )
        found.setdefault((data, int(line["table"])), []).append(line)
    of_row = {row: number for number, row in enumerate(rows)}
    return [
        (
            data,
            table,
            sorted(group, key=lambda x: (of_row[x["table"], x["row"]], int(x["seed"]))),
        )
        for (data, table), group in sorted(found.items())
    ]


def _cells(table: int, lines: Sequence[Mapping[str, str]]) -> tuple[list, list]:
    """Returns the header and the rows of a table, with the paper's figures in parentheses."""
    header = ["row", "", *METRICS[table], "seed", "seconds", "version"]
    rows = []
    for line in lines:
        figures = []
        for name in METRICS[table]:
            own = f"{float(line[name]):.1f}" if line[name] else "-"
            paper = line[f"paper {name}"]
            figures.append(f"{own} ({paper})" if paper else own)
        rows.append(
            [
                f"({line['row']})",
                line["description"],
                *figures,
                line["seed"],
                line["seconds"],
                line["version"],
            ]
        )
    return header, rows


_SUMMARY = (
    "Figures are in percent; the paper's, of COCO's minival with its full recipe, in parentheses."
)


def results_markdown(lines: Sequence[Mapping[str, str]]) -> str:
    """Returns results.md."""
    parts = ["# The paper's experiments", _SUMMARY]
    shown = None
    for data, table, group in _tables(lines):
        if data != shown:
            parts.append(f"## {data}")
            shown = data
        header, rows = _cells(table, group)
        align = ["---", "---", *["---:"] * (len(header) - 2)]
        cells = ["| " + " | ".join(row) + " |" for row in (header, align, *rows)]
        parts += [f"### Table {table}: {TABLES[table]}", "\n".join(cells)]
    return "\n\n".join(parts) + "\n"


def results_page(lines: Sequence[Mapping[str, str]]) -> str:
    """Returns index.html, with its plots embedded."""
    from keras_fpn.runs.report import PAGE, embedded_image, html_table, section

    sections = []
    for data, table, group in _tables(lines):
        header, rows = _cells(table, group)
        plot = embedded_image("png", table_plot(table, group), f"Table {table}")
        heading = f"Table {table}: {TABLES[table]}"
        content = f"<p>{html.escape(data)}</p>\n{plot}\n{html_table(header, rows)}"
        sections.append(section(html.escape(heading), content))
    return PAGE.format(
        title="The paper's experiments",
        summary=html.escape(_SUMMARY),
        sections="\n".join(sections),
    )


def table_plot(table: int, lines: Sequence[Mapping[str, str]]) -> bytes:
    """Draws a bar for each row and metric, the paper's beside it; returns a PNG.

    With several seeds, a bar is their mean, and a line goes from the lowest to the highest.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = list(dict.fromkeys(line["row"] for line in lines))
    figure = Figure(figsize=(2.4 * len(METRICS[table]) + 1, 3.2), layout="constrained")
    panels = figure.subplots(1, len(METRICS[table]), squeeze=False)[0]
    for axes, metric in zip(panels, METRICS[table], strict=True):
        own = [
            [float(line[metric]) for line in lines if line["row"] == name and line[metric]]
            for name in names
        ]
        paper = [
            next(line[f"paper {metric}"] for line in lines if line["row"] == name) for name in names
        ]
        for x, values in enumerate(own):
            if values:
                axes.bar(x - 0.2, sum(values) / len(values), 0.4, color="C0")
            if len(values) > 1:
                axes.plot([x - 0.2] * 2, [min(values), max(values)], color="black")
        given = [(x + 0.2, float(value)) for x, value in enumerate(paper) if value]
        if given:
            axes.bar(*zip(*given, strict=True), 0.4, color="0.75")
        axes.set_title(metric)
        axes.set_xticks(range(len(names)), names, rotation=90 if table == 5 else 0)
        axes.grid(axis="y", alpha=0.3)
        axes.set_ylim(bottom=0)
    handles = [Patch(color=color) for color in ("C0", "0.75")]
    figure.legend(handles, ["here", "paper"], loc="outside upper center", ncols=2, frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()
