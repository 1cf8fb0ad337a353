"""The programs on an RPN, its stored proposals, and a Fast R-CNN on these."""

import contextlib
import io
import json
import shutil

import numpy as np
import pytest
from data_sets import encode, write_coco_folder

import keras_fpn
from keras_fpn.data.proposal_metrics import PROPOSAL_METRICS
from keras_fpn.data.stored_proposals import read_proposals
from keras_fpn.runs import evaluate, predict, train

BROKEN = 50

pytestmark = pytest.mark.usefixtures("module_runs_eagerly", "two_levels")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four images, each with a bright rectangle and a crowd, and a file that is not an image."""
    random = np.random.RandomState(0)
    files, objects = {}, []
    for i in range(5):
        pixels = random.randint(0, 60, (48, 64, 3)).astype("uint8")
        x, y = random.randint(0, 30), random.randint(0, 20)
        pixels[y : y + 20, x : x + 24] = 250
        files[f"{i}.png"] = encode(pixels)
        box = {"image_id": 10 * (i + 1), "category_id": (1, 2)[i % 2], "area": 480}
        # Pycocotools takes an object of id 0 for one that is not found.
        objects.append(box | {"id": 2 * i + 1, "bbox": [x, y, 24, 20]})
        objects.append(box | {"id": 2 * i + 2, "bbox": [2, 2, 50, 40], "iscrowd": 1})
    files["4.png"] = b"this is not an image"
    categories = [{"id": 1, "name": "bolt"}, {"id": 2, "name": "nut"}]
    root = tmp_path_factory.mktemp("coco")
    return write_coco_folder(root, files, objects, (48, 64), categories=categories)


def train_arguments(folder, output, *more):
    return [
        *f"--dataset {folder} --train-split train --validation-split train --output {output} "
        "--backbone resnet10 --resnet.width 16 --pyramid.channels 8 --shorter-edges 96 "
        "--evaluation-shorter-edge 96 "
        "--longest-edge 128 --batch-size 2 --epochs 1 --verbose 0 --no-jit-compile".split(),
        *more,
    ]


def printed_metrics(printed):
    lines = [line.split() for line in printed.splitlines()]
    return {line[0]: line[-1] for line in lines if len(line) == 2}


@pytest.fixture(scope="module")
def rpn_run(folder, tmp_path_factory):
    """The folder of a run of two steps."""
    output = tmp_path_factory.mktemp("runs") / "rpn"
    numbers = (
        "--proposals.post-nms 150 --proposals.training-pre-nms 20 --rpn-targets.num-samples 64"
    )
    train.main(train_arguments(folder, output, "--model", "rpn", *numbers.split()))
    return output


@pytest.fixture(scope="module")
def stored(rpn_run, folder, tmp_path_factory):
    """Files of the proposals of `rpn_run`, compact and in COCO's format; and what was printed.

    The second is of a data set of other classes, which an RPN does not care about.
    """
    root = tmp_path_factory.mktemp("proposals")
    other = shutil.copytree(folder, root / "other")
    annotations = other / "annotations" / "instances_train.json"
    annotations.write_text(annotations.read_text().replace("bolt", "screw"))
    files = root / "proposals.npz", root / "proposals.json"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        evaluate.main(["--model", str(rpn_run), "--results", str(files[0])])
        arguments = ["--model", str(rpn_run), "--dataset", str(other), "--split", "train"]
        evaluate.main([*arguments, "--results", str(files[1])])
    return *files, printed.getvalue()


def test_a_run_of_an_rpn_leaves_its_average_recall(rpn_run):
    configuration = json.loads((rpn_run / "config.json").read_text())
    assert configuration["recipe"]["detector"] == "rpn"
    assert configuration["class_names"] == ["bolt", "nut"]
    metrics = json.loads((rpn_run / "metrics.json").read_text())
    assert set(PROPOSAL_METRICS) <= set(metrics)
    header, *epochs = (rpn_run / "history.csv").read_text().splitlines()
    assert {"loss", "rpn_box_loss", "val_AR1k"} <= set(header.split(","))
    assert len(epochs) == 1
    page = (rpn_run / "report.html").read_text()
    assert "AR1k" in page
    assert "class_loss" not in page
    model = keras_fpn.build_fpn_rpn(weights=rpn_run / "checkpoints" / "best.keras")
    assert model.proposals.post_nms == 150


def test_printed_recall_is_pycocotools_of_the_file(folder, stored):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    _, file, printed = stored
    assert "4 images of " in printed
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(f"{folder}/annotations/instances_train.json")
        evaluation = COCOeval(truth, truth.loadRes(str(file)), "bbox")
        evaluation.params.imgIds = [10, 20, 30, 40]  # Those that can be read.
        evaluation.params.useCats = 0
        evaluation.params.maxDets = [100, 1000]
        evaluation.evaluate()
        evaluation.accumulate()
    found = printed_metrics(printed)
    recall = evaluation.eval["recall"][:, 0].mean(axis=0)
    # Rows are all, small, medium and large objects.
    expected = [*recall[0], *recall[1:].T.ravel()]
    assert 0 < expected[1] < 1
    for name, value in zip(PROPOSAL_METRICS, expected, strict=True):
        assert found[name] == (f"{value:.4f}" if value >= 0 else "-"), name


def test_both_files_hold_the_same_and_no_proposal_of_the_file_that_is_no_image(stored):
    npz, results, printed = stored
    compact = read_proposals(npz)
    assert compact.image_ids.tolist() == [10, 20, 30, 40, BROKEN]
    assert compact.frames.tolist() == [[96, 128]] * 4 + [[0, 0]]
    assert compact.row_splits[-2] == compact.row_splits[-1]
    assert "4.png (not a JPEG, PNG, GIF, BMP or WebP file)" in printed
    coco = json.loads(results.read_text())
    assert len(coco) == len(compact.boxes) > 0
    # From 96 x 128 pixels to the original 48 x 64.
    boxes = np.array([x["bbox"] for x in coco])
    boxes[:, 2:] += boxes[:, :2]
    np.testing.assert_allclose(boxes, compact.boxes / 2, atol=1e-4)
    np.testing.assert_allclose([x["score"] for x in coco], compact.scores)


@pytest.fixture(scope="module")
def fast_run(folder, stored, tmp_path_factory):
    """The folder of a run of two steps on the proposals of `stored`."""
    output = tmp_path_factory.mktemp("runs") / "fast"
    of_splits = ("--proposals", str(stored[0]), "--validation-proposals", str(stored[0]))
    numbers = ("--box-head.hidden-dim", "8", "--roi-targets.num-samples", "16")
    train.main(train_arguments(folder, output, "--model", "fast_rcnn", *of_splits, *numbers))
    return output


def test_a_run_of_fast_rcnn_on_stored_proposals(fast_run, stored, capsys):
    configuration = json.loads((fast_run / "config.json").read_text())
    assert configuration["recipe"]["detector"] == "fast_rcnn"
    assert configuration["validation_proposals"] == str(stored[0])
    header = (fast_run / "history.csv").read_text().splitlines()[0]
    assert {"class_loss", "val_AP"} <= set(header.split(","))
    assert "rpn_box_loss" not in header
    # The same metrics again, on the proposals that the run was evaluated on.
    evaluate.main(["--model", str(fast_run)])
    found = printed_metrics(capsys.readouterr().out)
    metrics = json.loads((fast_run / "metrics.json").read_text())
    assert float(found["AP50"]) == pytest.approx(metrics["AP50"], abs=1e-4)
    assert {"AP/bolt", "AP/nut"} <= set(found)


def test_what_the_models_have_no_use_for_is_refused(rpn_run, stored, folder, tmp_path):
    needs_both = r"are for --model fast_rcnn, which needs both; received .* for "
    one = ("--proposals", str(stored[0]))
    for detector, files in (("fast_rcnn", ()), ("fast_rcnn", one), ("rpn", one)):
        with pytest.raises(SystemExit, match=f"{needs_both}{detector}"):
            train.main(train_arguments(folder, tmp_path / "x", "--model", detector, *files))
    with pytest.raises(SystemExit, match=r"--results must be a new file; .* exists"):
        evaluate.main(["--model", str(rpn_run), "--results", str(stored[0])])
    image, output = f"{folder}/train/0.png", str(tmp_path / "y")
    with pytest.raises(SystemExit, match="must be a Faster R-CNN; received a RegionProposalNet"):
        predict.main([image, "--model", str(rpn_run), "--output", output])
    with pytest.raises(SystemExit, match=r"evaluated at several scales; received \[48, 96\]"):
        evaluate.main(["--model", str(rpn_run), "--shorter-edge", "48", "96"])
    assert not list(tmp_path.iterdir())
