"""The report of a run: curves, COCO's metrics, the best and the worst images."""

import base64
import html
import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from keras_fpn.data.coco_metrics import CocoEvaluation
from keras_fpn.runs.command import counted
from keras_fpn.runs.pictures import detections_beside_truth
from keras_fpn.runs.run_state import write_text

_SCORE = 0.5  # Detections with a score of at least this count in the F1 score of an image.
_IMAGES = 4  # Number of best images, and of worst ones.


def write_report(
    folder: Path,
    *,
    title: str,
    configuration: dict,
    steps: Sequence[dict],
    history: Sequence[dict],
    evaluation: CocoEvaluation,
    ground_truth: dict,
    results: Sequence[dict] | None,
    metric_names: Sequence[str],
    read_images: Callable[[list[int]], dict[int, np.ndarray]],
) -> Path:
    """Writes `report.html`, with its pictures embedded.

    Args:
        folder: folder of the run.
        title: title of the page.
        configuration: configuration of the run.
        steps: values of some of the steps, each with `"step"`.
        history: losses and `"val_..."` metrics of each epoch, each with `"epoch"`.
        evaluation: metrics after the last epoch.
        ground_truth: ground truth in COCO's format.
        results: detections of that evaluation, in COCO's results format; None for an RPN, of
            which no classes and images are shown.
        metric_names: names of the metrics, without those of classes.
        read_images: image ids to RGB pixels, by image id; unreadable images are omitted.

    Returns:
        The path of the file.
    """
    recipe = {**configuration["recipe"]}
    recipe |= {f"model.{name}": value for name, value in recipe.pop("model", {}).items()}
    of_detections = []
    if results is not None:
        of_detections = [
            section("Precision and recall", _precision_figure(evaluation.precision)),
            section("Classes", _classes_table(evaluation.metrics)),
            *_image_sections(configuration, ground_truth, results, read_images),
        ]
    sections = [
        section("Losses", _figure(lambda axes: _draw_losses(axes, steps)) if steps else ""),
        section(
            "COCO metrics",
            _metrics_table(evaluation.metrics, metric_names)
            + _epochs_figure(history, metric_names),
        ),
        *of_detections,
        section("Recipe", html_table(("", ""), sorted((k, str(v)) for k, v in recipe.items()))),
    ]
    data = f"{configuration['dataset']}: {configuration['train_split']}, evaluated on "
    page = PAGE.format(
        title=html.escape(title),
        summary=html.escape(
            f"{data}{configuration['validation_split']}; "
            f"{counted(recipe['epochs'], 'epoch')}, batches of "
            f"{recipe['batch_size']}, {recipe['precision']}."
        ),
        sections="\n".join(sections),
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def image_scores(ground_truth: dict, results: Sequence[dict]) -> dict[int, float]:
    """Returns the F1 score of each image, of its detections with a score of at least 0.5.

    A detection is correct if its IoU with an object of its class is at least 0.5 and no detection
    of a higher score has matched that object. Crowds do not count: a detection that lies in one by
    half is ignored. Images without objects and detections have no score.
    """
    truth, crowds, found = defaultdict(list), defaultdict(list), defaultdict(list)
    for annotation in ground_truth["annotations"]:
        (crowds if annotation["iscrowd"] else truth)[annotation["image_id"]].append(annotation)
    for result in results:
        if result["score"] >= _SCORE:
            found[result["image_id"]].append(result)
    scores = {}
    for image_id in sorted(truth.keys() | found.keys()):
        left, right, counted = list(truth[image_id]), 0, 0
        for detection in sorted(found[image_id], key=lambda x: -x["score"]):
            overlaps = [_iou(detection, other) for other in left]
            best = int(np.argmax(overlaps)) if overlaps else -1
            if best >= 0 and overlaps[best] >= 0.5:
                left.pop(best)
                right += 1
            elif any(_iou(detection, crowd, of_first=True) >= 0.5 for crowd in crowds[image_id]):
                continue
            counted += 1
        if counted + len(truth[image_id]):
            scores[image_id] = 2 * right / (counted + len(truth[image_id]))
    return scores


def _iou(a: dict, b: dict, of_first: bool = False) -> float:
    """Returns the IoU of two boxes in COCO's format, 0 if their classes differ."""
    if a["category_id"] != b["category_id"]:
        return 0.0
    (ax, ay, aw, ah), (bx, by, bw, bh) = a["bbox"], b["bbox"]
    width = max(0.0, min(ax + aw, bx + bw) - max(ax, bx))
    height = max(0.0, min(ay + ah, by + bh) - max(ay, by))
    whole = aw * ah if of_first else aw * ah + bw * bh - width * height
    return width * height / whole if whole > 0 else 0.0


def _image_sections(configuration, ground_truth, results, read_images) -> list[str]:
    scores = image_scores(ground_truth, results)
    ranked = sorted(scores, key=lambda image_id: (-scores[image_id], image_id))
    best = ranked[:_IMAGES]
    worst = [image_id for image_id in reversed(ranked) if image_id not in best][:_IMAGES]
    pixels = read_images([*best, *worst]) if ranked else {}
    names = {image["id"]: image["file_name"] for image in ground_truth["images"]}
    sections = []
    for heading, ids in (("Best images", best), ("Worst images", worst)):
        parts = [
            f"<p>Detections (score &ge; {_SCORE}) on the left, ground truth on the right. "
            "Ranked by F1 at IoU 0.5.</p>"
        ]
        for image_id in ids:
            caption = html.escape(f"{names[image_id]} (id {image_id}): F1 {scores[image_id]:.2f}")
            if image_id in pixels:
                picture = detections_beside_truth(
                    pixels[image_id],
                    [x for x in results if x["image_id"] == image_id],
                    [x for x in ground_truth["annotations"] if x["image_id"] == image_id],
                    configuration["class_names"],
                    configuration["category_ids"],
                )
                stream = io.BytesIO()
                picture.save(stream, "JPEG", quality=90)
                parts.append(embedded_image("jpeg", stream.getvalue(), caption))
            else:
                parts.append(f"<p>{caption}: the image can no longer be read.</p>")
        sections.append(section(heading, "\n".join(parts) if ids else ""))
    return sections


def _draw_losses(axes, steps) -> None:
    for name in (name for name in steps[0] if name.endswith("loss")):
        points = [(row["step"], row[name]) for row in steps if name in row]
        axes.plot(*zip(*points, strict=True), label=name, linewidth=2 if name == "loss" else 1)
    axes.set_xlabel("step")
    axes.set_yscale("log")
    axes.set_ylabel("loss")
    points = [(row["step"], row["learning_rate"]) for row in steps if "learning_rate" in row]
    if points:
        rate = axes.twinx()
        rate.plot(*zip(*points, strict=True), color="0.6", linestyle=":", label="learning rate")
        rate.set_ylabel("learning rate (dotted)")
    # Above the axes, where it does not cover the curves.
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(axes.lines), frameon=False)


def _epochs_figure(history, metric_names) -> str:
    drawn = metric_names[:3]
    rows = [row for row in history if row.get(f"val_{drawn[0]}", -1) >= 0]
    if len(rows) < 2:  # A single point is in the table.
        return ""

    def draw(axes):
        for name in drawn:
            values = [row[f"val_{name}"] for row in rows]
            axes.plot([row["epoch"] for row in rows], values, label=name, marker="o")
        axes.set_xlabel("epoch")
        axes.set_xticks(
            sorted({rows[0]["epoch"], rows[-1]["epoch"], rows[len(rows) // 2]["epoch"]})
        )
        axes.set_ylim(0, 1)
        axes.legend()

    return _figure(draw)


def _precision_figure(precision: np.ndarray) -> str:
    """Draws the mean curves over the classes that have objects."""
    precision = precision[:, :, (precision > -1).any(axis=(0, 1))]
    if not precision.size:
        return ""

    def draw(axes):
        recalls = np.linspace(0, 1, precision.shape[1])
        axes.plot(recalls, precision[0].mean(axis=-1), label="IoU 0.50")
        axes.plot(recalls, precision[5].mean(axis=-1), label="IoU 0.75")
        axes.plot(recalls, precision.mean(axis=(0, 2)), label="mean of IoU 0.50 to 0.95")
        axes.set_xlabel("recall")
        axes.set_ylabel("precision")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.legend()

    return _figure(draw)


def _metrics_table(metrics, names) -> str:
    return html_table(names, [[_number(metrics[name]) for name in names]])


def _classes_table(metrics) -> str:
    prefix = "AP/"
    classes = {name[len(prefix) :]: ap for name, ap in metrics.items() if name.startswith(prefix)}
    ranked = sorted(classes, key=lambda name: (-classes[name], name))
    # Side by side, so that COCO's 80 fit on a page.
    columns = min(4, max(1, -(-len(ranked) // 10)))
    length = -(-len(ranked) // columns)
    rows = [
        [cell for name in ranked[i::length] for cell in (name, _number(classes[name]))]
        for i in range(length)
    ]
    return html_table(("class", "AP") * columns, rows) if ranked else ""


def _number(value: float) -> str:
    return f"{value:.3f}" if value >= 0 else "-"


def _figure(draw: Callable) -> str:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    draw(axes)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return embedded_image("png", stream.getvalue(), "")


def embedded_image(kind: str, content: bytes, caption: str) -> str:
    """Returns a figure with a picture inside the page; `kind` is "png" or "jpeg"."""
    encoded = base64.b64encode(content).decode()
    label = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure><img alt="{caption}" src="data:image/{kind};base64,{encoded}">{label}</figure>'


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table; without its first row if all of `header` is empty."""
    lines = ["<table>"]
    if any(header):
        lines.append("<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in header) + "</tr>")
    for row in rows:
        lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
    return "\n".join([*lines, "</table>"])


def section(heading: str, content: str) -> str:
    """Returns a heading and what follows it, "No data." if that is empty."""
    return f"<h2>{heading}</h2>\n{content or '<p>No data.</p>'}"


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; color: #222; }}
h1, h2 {{ font-weight: 600; }}
h2 {{ margin-top: 2.5rem; border-bottom: 1px solid #ddd; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }}
th, td {{ padding: 0.15rem 0.7rem; text-align: left; border-bottom: 1px solid #eee; }}
figure {{ margin: 1rem 0; }}
img {{ max-width: 100%; }}
figcaption {{ color: #555; font-size: 0.9rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
{sections}
</body>
</html>
"""
