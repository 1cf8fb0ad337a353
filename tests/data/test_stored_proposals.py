"""Proposals are the same from every file format, and reach the batches to the bit."""

import itertools
import json
import os
import pickle

import numpy as np
import pytest

from keras_fpn.data.datasets import load_dataset
from keras_fpn.data.pipeline import evaluation_batches, training_batches
from keras_fpn.data.stored_proposals import (
    Proposals,
    read_proposals,
    with_proposals,
    write_proposals,
)

pytestmark = pytest.mark.filterwarnings("ignore:.* is of a format without a checksum")

# Two images of 40 x 60 pixels, the second without proposals, and one of 20 x 30.
IDS = [20, 10, 30]
BOXES = [[[1, 2, 31, 22], [0.1, 0.2, 5.3, 7.7]], [], [[3, 4, 9, 14]]]
SCORES = [[0.75, 0.5], [], [-1.5]]


def stored(frames=None) -> Proposals:
    return Proposals.from_images(IDS, BOXES, SCORES, frames)


def detectron2(**changes) -> bytes:
    """What Detectron2's `COCOEvaluator` writes for proposals."""
    boxes = [np.array(of_image, "float32").reshape(-1, 4) for of_image in BOXES]
    content = {
        "boxes": boxes,
        "objectness_logits": [np.array(of_image, "float32") for of_image in SCORES],
        "ids": IDS,
        "bbox_mode": 0,
    }
    return pickle.dumps(content | changes)


def coco(*changes) -> bytes:
    """The same proposals as a list of COCO's results, in any order."""
    results = [
        {"image_id": 30, "category_id": 1, "bbox": [3, 4, 6, 10], "score": -1.5},
        {"image_id": 20, "category_id": 1, "bbox": [0.1, 0.2, 5.2, 7.5], "score": 0.5},
        {"image_id": 20, "category_id": 1, "bbox": [1, 2, 30, 20], "score": 0.75},
    ]
    return json.dumps([*results, *changes]).encode()


def by_image(proposals: Proposals) -> dict:
    splits = itertools.pairwise(proposals.row_splits)
    return {
        int(image_id): (proposals.boxes[start:end].tolist(), proposals.scores[start:end].tolist())
        for image_id, (start, end) in zip(proposals.image_ids, splits, strict=True)
    }


def assert_same(received: Proposals, expected: Proposals):
    for name, values in vars(expected).items():
        assert getattr(received, name).dtype == values.dtype
        np.testing.assert_array_equal(getattr(received, name), values)


# === Files ===


def test_the_proposals_of_an_image_are_sorted_by_score():
    boxes = np.arange(16).reshape(4, 4)
    proposals = Proposals.from_images([7], [boxes], [np.array([1, 3, 2, 3])], [(50, 60)])
    assert proposals.boxes.tolist() == boxes[[1, 3, 2, 0]].tolist()
    assert proposals.scores.tolist() == [3, 3, 2, 1]
    assert proposals.row_splits.tolist() == [0, 4]
    assert proposals.frames.tolist() == [[50, 60]]
    dtypes = [str(values.dtype) for values in vars(proposals).values()]
    assert dtypes == ["int64", "int32", "int64", "float32", "float32"]


@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_detectron2s_pickles_are_read(tmp_path, mode, protocol):
    content = pickle.loads(detectron2(bbox_mode=mode))
    if mode == 1:
        for boxes in content["boxes"]:
            boxes[:, 2:] -= boxes[:, :2]
    (tmp_path / "box_proposals.pkl").write_bytes(pickle.dumps(content, protocol))
    received = by_image(read_proposals(tmp_path / "box_proposals.pkl"))
    assert list(received) == IDS
    for image_id, boxes, scores in zip(IDS, BOXES, SCORES, strict=True):
        np.testing.assert_allclose(
            np.reshape(received[image_id][0], (-1, 4)), np.reshape(boxes, (-1, 4)), rtol=1e-6
        )
        assert received[image_id][1] == scores


def test_detectrons_names_are_read(tmp_path):
    content = pickle.loads(detectron2())
    old = {"boxes": content["boxes"], "scores": content["objectness_logits"], "cfg": "MODEL: 1"}
    for name in ("ids", "indexes"):
        (tmp_path / "rpn.pkl").write_bytes(pickle.dumps(old | {name: np.array(IDS)}))
        assert_same(read_proposals(tmp_path / "rpn.pkl"), stored())


def test_cocos_results_are_read(tmp_path):
    (tmp_path / "results.json").write_bytes(coco())
    # Images without proposals are not in the file; the others are sorted by their ids.
    assert_same(
        read_proposals(tmp_path / "results.json"),
        Proposals.from_images([20, 30], [BOXES[0], BOXES[2]], [SCORES[0], SCORES[2]]),
    )
    (tmp_path / "none.json").write_text("[]")
    assert len(read_proposals(tmp_path / "none.json").image_ids) == 0


def test_an_npz_file_keeps_everything(tmp_path):
    proposals = stored(frames=[(0, 0), (80, 120), (1, 1)])
    write_proposals(tmp_path / "proposals.npz", proposals)
    assert_same(read_proposals(tmp_path / "proposals.npz"), proposals)
    # Without pickles, as NumPy reads it.
    with np.load(tmp_path / "proposals.npz") as file:
        assert sorted(file) == ["boxes", "frames", "image_ids", "row_splits", "scores"]
    assert os.listdir(tmp_path) == ["proposals.npz"]


def test_written_results_are_in_original_pixels(tmp_path):
    # The first image was halved in height, the third is as it was.
    proposals = stored(frames=[(20, 60), (20, 60), (0, 0)])
    write_proposals(tmp_path / "r.json", proposals, {20: (40, 60), 10: (40, 60)})
    first, second, third = json.loads((tmp_path / "r.json").read_bytes())
    assert first == {"image_id": 20, "category_id": 1, "bbox": [1, 4, 30, 40], "score": 0.75}
    assert second["bbox"] == pytest.approx([0.1, 0.4, 5.2, 15], rel=1e-6)
    assert third == {"image_id": 30, "category_id": 1, "bbox": [3, 4, 6, 10], "score": -1.5}
    write_proposals(tmp_path / "none.json", Proposals.from_images([5], [[]], [[]]))
    assert json.loads((tmp_path / "none.json").read_bytes()) == []


def test_results_keep_float32_boxes_to_the_bit(tmp_path):
    random = np.random.default_rng(0)
    corners = random.uniform(0, 1333, (40, 2, 2)) * random.choice([1, 1e-3], (40, 2, 2))
    boxes = np.sort(corners, axis=1).reshape(1, 40, 4)
    proposals = Proposals.from_images([3], boxes, random.uniform(0, 1, (1, 40)))
    write_proposals(tmp_path / "r.json", proposals)
    assert_same(read_proposals(tmp_path / "r.json"), proposals)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    with pytest.raises(ValueError, match=r"original size of image 10 .* 80x120"):
        write_proposals(
            tmp_path / "r.json", Proposals.from_images([10], [BOXES[2]], [[1]], [(80, 120)])
        )
    assert os.listdir(tmp_path) == []
    (tmp_path / "old.npz").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"`path`.*old\.npz"):
        write_proposals(tmp_path / "old.npz", stored())
    assert (tmp_path / "old.npz").read_bytes() == b"mine"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_proposals(tmp_path / "nowhere" / "r.npz", stored())
    with pytest.raises(ValueError, match=r"\.npz or \.json; received .*r\.pkl"):
        write_proposals(tmp_path / "r.pkl", stored())


ONE = np.zeros((1, 4), "float32")
NAN = np.full((1, 4), np.nan, "float32")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"boxes: none", "begins with b'boxes: none'; expected an .npz"),
        (b"[1, 2", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"images": [], "annotations": []}', r"\['images', 'annotations'\]"),
        (b"[3]", "received 3 for number 0"),
        (coco({"image_id": 20, "bbox": [1, 2, 3], "score": 1}), "number 3"),
        (coco({"image_id": 20, "bbox": [1, 2, 3, "4"], "score": 1}), "number 3"),
        (coco({"image_id": 20, "bbox": [1, 2, 3, 4]}), "number 3"),
        (coco({"image_id": 2.5, "bbox": [1, 2, 3, 4], "score": 1}), "integer 'image_id'"),
        (coco({"image_id": 2**63, "bbox": [1, 2, 3, 4], "score": 1}), "integer 'image_id'"),
        (coco({"image_id": 20, "bbox": [10**400, 2, 3, 4], "score": 1}), "number 3"),
        (coco({"image_id": 20, "bbox": [1e300, 2, 3, 4], "score": 1}), r"`boxes`.* 1e\+300"),
        (coco({"image_id": 20, "bbox": [1, 2, 3, 4], "score": np.nan}), "`scores`.* nan"),
        (pickle.dumps([1, 2]), "dictionary of ids, boxes, objectness_logits; received list"),
        (pickle.dumps({"boxes": [ONE], "ids": [1]}), r"received the names \['boxes', 'ids'\]"),
        (detectron2(ids=7), "with an entry for each image"),
        (detectron2(boxes=[[1, 2, 3, 4]] * 3), "must be arrays; received list"),
        (detectron2(boxes=[ONE]), "received 3, 1 and 3"),
        (detectron2(boxes=[ONE] * 3), "scores as boxes; received 2 and 1"),
        (detectron2(boxes=[np.zeros(4, "float32")] * 3), r"`boxes` must be \[n, 4\]"),
        (detectron2(boxes=[np.array([["a"] * 4])] * 3), "`boxes` must be float32"),
        (detectron2(boxes=[NAN] * 3, objectness_logits=[np.ones(1)] * 3), "`boxes`.* nan"),
        (detectron2(objectness_logits=[np.full(len(s), np.inf) for s in SCORES]), "`scores`.*inf"),
        (detectron2(ids=[20, 10, 20]), "`image_ids` must not repeat; received 20"),
        (detectron2(ids=["a", "b", "c"]), "`image_ids` must be int64; received <U1"),
        (detectron2(ids=[2**80, 1, 2]), "`image_ids` must be int64"),
        (detectron2(bbox_mode=4), "`bbox_mode` .* received 4"),
        (detectron2(bbox_mode=[0]), r"`bbox_mode` .* received \[0\]"),
        (pickle.dumps(os.getcwd), "getcwd"),
    ],
)
def test_hostile_files_are_refused_by_name(tmp_path, content, message):
    (tmp_path / "stored.x").write_bytes(content)
    with pytest.raises(ValueError, match=rf"stored\.x' .*{message}"):
        read_proposals(tmp_path / "stored.x")


def test_a_pickle_that_multiplies_itself_is_refused(tmp_path):
    boxes = np.zeros((100_000, 4), "float32")
    logits = np.zeros(100_000, "float32")
    content = {"ids": [*range(10_000)], "boxes": [boxes] * 10_000}
    (tmp_path / "p.pkl").write_bytes(
        pickle.dumps(content | {"objectness_logits": [logits] * 10_000})
    )
    with pytest.raises(ValueError, match=r"p\.pkl' .* bytes multiply"):
        read_proposals(tmp_path / "p.pkl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": np.zeros(1)}, "It must have the arrays .* 'extra'"),
        ({"row_splits": np.array([0, 2])}, "`row_splits` must have 4 rows .* received 2"),
        ({"row_splits": np.array([0, 2, 1, 3])}, "`row_splits` must rise from 0"),
        ({"row_splits": np.array([0, 2, 2, 10**12])}, "`row_splits` must rise from 0"),
        ({"row_splits": np.array([1, 2, 2, 3])}, "`row_splits` must rise from 0"),
        ({"row_splits": np.zeros((4, 1), int)}, r"`row_splits` must be \[n\]"),
        ({"row_splits": np.array([0.0, 2, 2, 3])}, "`row_splits` must be int64"),
        ({"image_ids": np.array([1, 2, 2**63], "uint64")}, "`image_ids`.* 9223372036854775808"),
        ({"frames": np.full((3, 2), -5)}, r"`frames`.* \[-5, -5\]"),
        ({"frames": np.full((3, 2), 2**40)}, "`frames`.* int32"),
        ({"frames": np.array([[0, 0], [0, 7], [0, 0]])}, r"`frames`.* \[0, 7\]"),
        ({"frames": np.zeros((2, 2), int)}, "`frames` must have 3 rows"),
        ({"scores": np.zeros(2)}, "`scores` must have 3 rows"),
        ({"scores": np.array([1.0, 2.0, 3.0])}, "`scores` must be sorted"),
        ({"boxes": np.zeros((3, 5))}, r"`boxes` must be \[n, 4\]"),
    ],
)
def test_arrays_that_do_not_fit_each_other_are_refused(tmp_path, changes, message):
    np.savez(tmp_path / "p.npz", **(vars(stored()) | changes))
    with pytest.raises(ValueError, match=rf"p\.npz' .*{message}"):
        read_proposals(tmp_path / "p.npz")


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.npz"):
        read_proposals(tmp_path / "nothing.npz")
    with pytest.raises(ValueError, match="is a folder; expected"):
        read_proposals(tmp_path)


# === Data sets ===


@pytest.fixture
def folder(coco_folder, plain):
    """A folder of three images of 40 x 60 pixels with one object each."""
    objects = [{"image_id": image_id, "bbox": [1, 2, 30, 20]} for image_id in (10, 20, 30)]
    return load_dataset(coco_folder({f"{i}.png": plain(i) for i in range(3)}, objects), "train")


def test_records_get_the_proposals_of_their_image(folder):
    proposals = Proposals.from_images(
        [*IDS, 99], [*BOXES, ONE], [*SCORES, [1]], [(20, 30), (0, 0), (80, 120), (7, 7)]
    )
    dataset = with_proposals(folder, proposals)
    for record, plain in zip(
        dataset.records().as_numpy_iterator(), folder.records().as_numpy_iterator(), strict=True
    ):
        index = IDS.index(record["image_id"])
        np.testing.assert_array_equal(
            record.pop("proposals"), np.array(BOXES[index], "float32").reshape(-1, 4)
        )
        assert record.pop("proposals_size").tolist() == [[20, 30], [0, 0], [80, 120]][index]
        np.testing.assert_equal(record, plain)
    assert dataset.num_images == 3
    assert dataset.class_names == folder.class_names
    assert dataset.coco_ground_truth() == folder.coco_ground_truth()
    assert dataset.read_images([20])[20].shape == (40, 60, 3)
    assert dataset.read_image_ids().tolist() == [10, 20, 30]


def test_images_without_an_entry_are_refused(folder):
    with pytest.raises(ValueError, match=r"'train' .* 2 of the 3 .* image 10\."):
        with_proposals(folder, Proposals.from_images([20], [ONE], [[1]]))


def test_a_tfds_split_gets_proposals(shapes_dir):
    dataset = load_dataset("keras_fpn_shapes", "validation", str(shapes_dir))
    ids = [int(record["image_id"]) for record in dataset.records().as_numpy_iterator()]
    assert dataset.read_image_ids().tolist() == ids
    proposals = Proposals.from_images(ids, [ONE + i for i in ids], [[1]] * 4)
    for record in with_proposals(dataset, proposals).records().as_numpy_iterator():
        assert record["proposals"].tolist() == [[record["image_id"]] * 4]


def test_proposals_of_the_batchs_own_size_arrive_to_the_bit(folder):
    # 40 x 60 is resized to 47 x 70.
    random = np.random.default_rng(0)
    corners = np.sort(random.uniform(0, 1, (3, 50, 2, 2)) * [70, 47], axis=2)
    proposals = Proposals.from_images(
        [10, 20, 30], corners.reshape(3, 50, 4), random.normal(size=(3, 50)), [(47, 70)] * 3
    )
    sizes = {"longest_edge": 70, "max_proposals": 51}
    dataset = with_proposals(folder, proposals)
    [(inputs, targets)] = evaluation_batches(dataset, 3, shorter_edge=47, **sizes)
    assert inputs["image_sizes"].numpy().tolist() == [[47, 70]] * 3
    assert set(targets) == {"boxes", "labels", "image_ids", "original_sizes"}
    expected = np.pad(proposals.boxes.reshape(3, 50, 4), [(0, 0), (0, 1), (0, 0)])
    np.testing.assert_array_equal(inputs["proposals"], expected)


def test_batches_with_proposals_are_those_without_from_any_step_and_worker(folder):
    boxes = [[[0, 0, image_id, image_id]] for image_id in (10, 20, 50)]
    dataset = with_proposals(folder, Proposals.from_images([10, 20, 30], boxes, [[1]] * 3))
    arguments = {"shorter_edges": (40,), "longest_edge": 60, "max_proposals": 2}
    whole = training_batches(folder, 2, **arguments).skip(2)
    resumed = training_batches(dataset, 2, start_step=2, shard=1, num_shards=2, **arguments)
    for (inputs, targets), expected in zip(resumed.take(3), whole, strict=False):
        proposals = inputs.pop("proposals").numpy()
        for received, plain in zip((inputs, targets), expected, strict=True):
            assert received.keys() == plain.keys()
            for name in received:
                np.testing.assert_array_equal(received[name], plain[name][1:])
        # Clipped to the image, 60 wide and 40 high.
        size = {10: [10, 10], 20: [20, 20], 30: [50, 40]}[int(targets["image_ids"][0])]
        np.testing.assert_allclose(proposals[0, 0, 2:] - proposals[0, 0, :2], size)
        assert not proposals[0, 1].any()
