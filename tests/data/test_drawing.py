"""Drawing of boxes, in one color per class, with readable labels."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image, ImageDraw

from keras_fpn.data.drawing import draw_detections

GRAY = np.full((100, 160, 3), 128, "uint8")


def draw(labels, scores=None, boxes=None, image=GRAY, **arguments):
    count = len(labels)
    detections = {
        "boxes": np.array(boxes or [[20, 40, 90, 80]] * count, "float32"),
        "scores": np.array(scores or [0.9] * count),
        "labels": np.array(labels),
    }
    return np.asarray(draw_detections(image, detections, ["cat", "dog"], **arguments))


def changed(picture):
    return (picture != GRAY).any(-1)


@pytest.fixture
def written(monkeypatch):
    """Each drawn text with its bounding box (left, top, right, bottom)."""
    texts = []
    original = ImageDraw.ImageDraw.text

    def text(self, position, content, *args, font, **kwargs):
        texts.append((content, self.textbbox(position, content, font=font)))
        return original(self, position, content, *args, font=font, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return texts


def test_the_outline_is_drawn_and_nothing_inside_it():
    different = changed(draw([0]))
    assert different[60, 20]
    assert different[60, 90]
    assert different[80, 50]
    assert not different[50:70, 30:80].any()
    assert not different[:, 100:].any()


def test_each_class_has_its_own_constant_color():
    cat, dog = draw([0])[60, 20], draw([1])[60, 20]
    assert tuple(cat) != tuple(dog)
    np.testing.assert_array_equal(draw([1, 0], boxes=[[0, 0, 9, 9], [20, 40, 90, 80]])[60, 20], cat)
    colors = set()
    for label in range(80):
        picture = draw_detections(GRAY, {"boxes": [[20, 40, 90, 80]], "labels": [label]})
        colors.add(picture.getpixel((20, 60)))
    assert len(colors) == 80


def test_padding_and_low_scores_are_not_drawn():
    assert not changed(draw([-1, -1])).any()
    assert not changed(draw([0], scores=[0.5])).any()
    assert changed(draw([0], scores=[0.51])).any()
    assert changed(draw([0], scores=[0.2], score_threshold=0.1)).any()
    assert not changed(draw([0], boxes=[[np.nan, 0, 9, 9]])).any()
    assert not changed(draw([])).any()


def test_labels_show_class_and_score(written):
    draw([1], scores=[0.876])
    draw_detections(GRAY, {"boxes": [[20, 40, 90, 80]], "labels": [7], "scores": [0.51]})
    draw_detections(GRAY, {"boxes": [[20, 40, 90, 80]], "labels": [0]}, ["cat"])
    assert [text for text, _ in written] == ["dog 0.88", "7 0.51", "cat"]


@pytest.mark.parametrize("corner", [(0, 0), (150, 0), (0, 90), (150, 90), (-40, -40), (400, 300)])
def test_labels_of_boxes_at_the_edge_stay_within_the_image(written, corner):
    x, y = corner
    draw([1], boxes=[[x, y, x + 9, y + 9]])
    [(text, (left, top, right, bottom))] = written
    assert text == "dog 0.90"
    assert 0 <= left < right <= 160
    assert 0 <= top < bottom <= 100


def test_labels_of_overlapping_boxes_do_not_overlap(written):
    image = np.full((300, 400, 3), 128, "uint8")
    boxes = [[150 + 3 * i, 140 + 2 * i, 230 + 3 * i, 180 + 2 * i] for i in range(12)]
    draw([0, 1] * 6, boxes=boxes, image=image)
    assert len(written) == 12
    for (_, a), (_, b) in itertools.combinations(written, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_without_room_the_highest_scores_keep_their_labels(written):
    scores = np.linspace(0.99, 0.5, 50).tolist()
    draw([0] * 50, scores=scores, boxes=[[40, 40, 60, 60]] * 50)
    assert 3 <= len(written) < 50
    assert "cat 0.99" in [text for text, _ in written]
    for (_, a), (_, b) in itertools.combinations(written, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_long_names_end_in_an_ellipsis_before_the_score(written):
    name = "a name that is longer than anything that a picture has room for"
    draw_detections(GRAY, {"boxes": [[20, 40, 90, 80]], "labels": [0], "scores": [0.7]}, [name])
    [(text, (left, _, right, _))] = written
    assert text.endswith("\N{HORIZONTAL ELLIPSIS} 0.70")
    assert text.startswith("a name")
    assert 0 <= left < right <= 160


@pytest.mark.parametrize("size", [(1, 1), (32, 32), (8, 400), (400, 8), (2000, 3000)])
def test_images_of_any_size(written, size):
    image = np.full((*size, 3), 128, "uint8")
    height, width = size
    boxes = [[0.2 * width, 0.3 * height, 0.7 * width, 0.8 * height]]
    picture = draw([0], boxes=boxes, image=image)
    assert picture.shape == image.shape
    assert (picture != image).any()
    for _, (left, top, right, bottom) in written:
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
    if size == (2000, 3000):
        # Text scales with the image: it is taller than a hundredth of its height.
        assert written[0][1][3] - written[0][1][1] > 20


@pytest.mark.parametrize("value", [0, 128, 255])
def test_lines_are_visible_on_dark_and_light_images(value):
    image = np.full((400, 600, 3), value, "uint8")
    for label in range(12):
        detections = {"boxes": [[100, 100, 400, 300]], "labels": [label], "scores": [0.9]}
        across = np.asarray(draw_detections(image, detections))[200, 90:110].astype(int)
        # Somewhere across the line the brightness differs by a third of the full range.
        brightness = across @ [0.3, 0.59, 0.11]
        assert abs(brightness - value).max() > 85


def test_paths_bytes_pil_images_and_arrays_give_the_same_result(tmp_path):
    Image.fromarray(GRAY).save(tmp_path / "gray.png")
    stream = io.BytesIO()
    Image.fromarray(GRAY).save(stream, "PNG")
    expected = draw([0])
    for image in (
        str(tmp_path / "gray.png"),
        tmp_path / "gray.png",
        stream.getvalue(),
        Image.fromarray(GRAY),
        Image.fromarray(GRAY[..., 0]),
        Image.fromarray(GRAY[..., 0].astype("uint16") * 257),
        GRAY[..., 0],
        GRAY.astype("float32") + 0.3,
    ):
        np.testing.assert_array_equal(draw([0], image=image), expected)


def test_the_input_image_is_not_modified():
    picture = Image.fromarray(GRAY)
    draw([0])
    draw([0], image=picture)
    assert (GRAY == 128).all()
    assert (np.asarray(picture) == 128).all()


def test_invalid_inputs_are_rejected():
    with pytest.raises(ValueError, match=r"`class_names` has 2 .*label 2"):
        draw([2])
    with pytest.raises(
        ValueError, match=r"`detections`.* received shapes \(1, 2, 4\) and \(1, 2\)"
    ):
        draw_detections(GRAY, {"boxes": np.zeros((1, 2, 4)), "labels": np.zeros((1, 2))})
    with pytest.raises(ValueError, match=r"'scores'.* \(2,\); received \(1,\)"):
        draw([0, 1], scores=[0.5])
    with pytest.raises(ValueError, match=r"`image`.* received shape \(3, 8, 8\)"):
        draw([0], image=np.zeros((3, 8, 8)))
