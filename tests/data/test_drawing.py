"""Boxes are drawn where they are, in one colour a class, with labels that can be read."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image, ImageDraw

from keras_fpn.data.drawing import draw_detections

GREY = np.full((100, 160, 3), 128, "uint8")


def draw(labels, scores=None, boxes=None, image=GREY, **arguments):
    count = len(labels)
    detections = {
        "boxes": np.array(boxes or [[20, 40, 90, 80]] * count, "float32"),
        "scores": np.array(scores or [0.9] * count),
        "labels": np.array(labels),
    }
    return np.asarray(draw_detections(image, detections, ["cat", "dog"], **arguments))


def changed(picture):
    return (picture != GREY).any(-1)


@pytest.fixture
def written(monkeypatch):
    """Each text that is drawn, and the pixels (left, top, right, bottom) of its ink."""
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


def test_classes_have_colours_of_their_own_that_stay():
    cat, dog = draw([0])[60, 20], draw([1])[60, 20]
    assert tuple(cat) != tuple(dog)
    np.testing.assert_array_equal(draw([1, 0], boxes=[[0, 0, 9, 9], [20, 40, 90, 80]])[60, 20], cat)
    colours = set()
    for label in range(80):
        picture = draw_detections(GREY, {"boxes": [[20, 40, 90, 80]], "labels": [label]})
        colours.add(picture.getpixel((20, 60)))
    assert len(colours) == 80


def test_padding_rows_and_unsure_detections_are_left_out():
    assert not changed(draw([-1, -1])).any()
    assert not changed(draw([0], scores=[0.49])).any()
    assert changed(draw([0], scores=[0.5])).any()
    assert changed(draw([0], scores=[0.2], score_threshold=0.1)).any()
    assert not changed(draw([0], boxes=[[np.nan, 0, 9, 9]])).any()
    assert not changed(draw([])).any()


def test_labels_say_class_and_score(written):
    draw([1], scores=[0.876])
    draw_detections(GREY, {"boxes": [[20, 40, 90, 80]], "labels": [7], "scores": [0.5]})
    draw_detections(GREY, {"boxes": [[20, 40, 90, 80]], "labels": [0]}, ["cat"])
    assert [text for text, _ in written] == ["dog 0.88", "7 0.50", "cat"]


@pytest.mark.parametrize("corner", [(0, 0), (150, 0), (0, 90), (150, 90), (-40, -40), (400, 300)])
def test_labels_of_boxes_at_the_edge_stay_in_the_picture(written, corner):
    x, y = corner
    draw([1], boxes=[[x, y, x + 9, y + 9]])
    [(text, (left, top, right, bottom))] = written
    assert text == "dog 0.90"
    assert 0 <= left < right <= 160
    assert 0 <= top < bottom <= 100


def test_labels_of_boxes_in_one_place_do_not_cover_each_other(written):
    image = np.full((300, 400, 3), 128, "uint8")
    boxes = [[150 + 3 * i, 140 + 2 * i, 230 + 3 * i, 180 + 2 * i] for i in range(12)]
    draw([0, 1] * 6, boxes=boxes, image=image)
    assert len(written) == 12
    for (_, a), (_, b) in itertools.combinations(written, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_in_a_crowd_the_surest_keep_their_labels(written):
    scores = np.linspace(0.99, 0.5, 50).tolist()
    draw([0] * 50, scores=scores, boxes=[[40, 40, 60, 60]] * 50)
    assert 3 <= len(written) < 50
    assert "cat 0.99" in [text for text, _ in written]
    for (_, a), (_, b) in itertools.combinations(written, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_long_names_end_in_dots_before_the_score(written):
    name = "a name that is longer than anything that a picture has room for"
    draw_detections(GREY, {"boxes": [[20, 40, 90, 80]], "labels": [0], "scores": [0.7]}, [name])
    [(text, (left, _, right, _))] = written
    assert text.endswith("\N{HORIZONTAL ELLIPSIS} 0.70")
    assert text.startswith("a name")
    assert 0 <= left < right <= 160


@pytest.mark.parametrize("size", [(1, 1), (32, 32), (8, 400), (400, 8), (2000, 3000)])
def test_pictures_of_any_size_are_drawn_on(written, size):
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
        # Text grows with the picture: it is over a hundredth of its height.
        assert written[0][1][3] - written[0][1][1] > 20


@pytest.mark.parametrize("value", [0, 128, 255])
def test_lines_and_labels_show_on_dark_and_on_light(value):
    image = np.full((400, 600, 3), value, "uint8")
    for label in range(12):
        detections = {"boxes": [[100, 100, 400, 300]], "labels": [label], "scores": [0.9]}
        across = np.asarray(draw_detections(image, detections))[200, 90:110].astype(int)
        # Somewhere across the line the brightness differs by a third of the range.
        brightness = across @ [0.3, 0.59, 0.11]
        assert abs(brightness - value).max() > 85


def test_paths_bytes_pictures_and_arrays_are_drawn_on_alike(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "grey.png")
    stream = io.BytesIO()
    Image.fromarray(GREY).save(stream, "PNG")
    wanted = draw([0])
    for image in (
        str(tmp_path / "grey.png"),
        tmp_path / "grey.png",
        stream.getvalue(),
        Image.fromarray(GREY),
        Image.fromarray(GREY[..., 0]),
        Image.fromarray(GREY[..., 0].astype("uint16") * 257),
        GREY[..., 0],
        GREY.astype("float32") + 0.3,
    ):
        np.testing.assert_array_equal(draw([0], image=image), wanted)


def test_the_image_itself_is_left_as_it_was():
    picture = Image.fromarray(GREY)
    draw([0])
    draw([0], image=picture)
    assert (GREY == 128).all()
    assert (np.asarray(picture) == 128).all()


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="Label 2 has no name: `class_names` has 2"):
        draw([2])
    with pytest.raises(ValueError, match=r"one image .* received shapes \(1, 2, 4\) and \(1, 2\)"):
        draw_detections(GREY, {"boxes": np.zeros((1, 2, 4)), "labels": np.zeros((1, 2))})
    with pytest.raises(ValueError, match=r"2 'labels' and 'scores' of shape \(1,\)"):
        draw([0, 1], scores=[0.5])
    with pytest.raises(ValueError, match=r"received shape \(3, 8, 8\)"):
        draw([0], image=np.zeros((3, 8, 8)))
