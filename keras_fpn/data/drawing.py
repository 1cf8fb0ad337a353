"""Drawing of detections."""

import colorsys
import io
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

_DARK, _LIGHT = (0, 0, 0), (255, 255, 255)
_LONGEST_NAME = 32  # Characters; longer names end in an ellipsis.
_SMALLEST_FONT = 10  # Pixels.
_FARTHEST_ROW = 8  # Maximum distance of a label from its box, in label heights.


def draw_detections(
    image: Any,
    detections: Mapping[str, np.ndarray],
    class_names: Sequence[str] | None = None,
    score_threshold: float = 0.5,
) -> "Image.Image":
    """Draws the boxes of one image with class names and scores.

    Each class has the same color in every image. Lines have a dark and a light border and labels
    their own background, so that both are visible on any image. Labels are placed at their box if
    there is room, else nearby with a leader line, and always within the image. Detections with
    higher scores are placed first; if there is no room left, a label is omitted, but not its box.

    Args:
        image: a path, the bytes of an image file, a PIL image, or an array of pixels in 0..255,
            `[H, W, 3]` RGB or `[H, W]` grayscale.
        detections: `{"boxes": [D, 4], "scores": [D], "labels": [D]}` of this image, as returned by
            `detect`, boxes as xyxy in pixels of `image`. Rows of label -1 are ignored. Without
            "scores" (ground truth) all boxes are drawn.
        class_names: class name of each label. Defaults to None, which shows the labels themselves.
        score_threshold: boxes with a score above this are drawn.

    Returns:
        A new `PIL.Image.Image` in RGB, of the size of `image`.

    Raises:
        ValueError: if the detections are not those of a single image, a label has no name, or an
            array is not an image.
        ImportError: if Pillow is not installed.
    """
    try:
        from PIL import ImageDraw, ImageFont
    except ImportError as error:
        raise ImportError(
            "Drawing requires Pillow; install it with `pip install Pillow`."
        ) from error

    picture = _rgb_picture(image)
    boxes, scores, labels = _drawn_rows(detections, score_threshold)
    line = max(1, round(min(picture.size) / 240))
    font: Any = ImageFont.load_default(size=max(_SMALLEST_FONT, round(min(picture.size) / 34)))
    margin = max(2, line)
    texts = [
        _fitting_text(
            _class_name(label, class_names),
            "" if scores is None else f" {scores[row]:.2f}",
            font,
            picture.width - 2 * margin,
        )
        for row, label in enumerate(labels)
    ]
    height = sum(font.getmetrics()) + 2
    sizes = [
        (int(np.ceil(font.getlength(text))) + 2 * margin, height) if text else (0, 0)
        for text in texts
    ]
    corners = np.clip(np.round(boxes), 0, np.tile(picture.size, 2) - 1).astype(int)
    corners[:, 2:] = np.maximum(corners[:, 2:], corners[:, :2])
    places = _label_places(corners, sizes, picture.size)

    draw = ImageDraw.Draw(picture)
    colors = [_class_color(label) for label in labels]
    # Highest scores last, on top of the others.
    rows = list(reversed(range(len(labels))))
    for row in rows:
        x1, y1, x2, y2 = (int(edge) for edge in corners[row])
        # A dark border outside the line, a light one inside.
        for grow, color in ((1, _DARK), (-line, _LIGHT)):
            rim = (x1 - grow, y1 - grow, x2 + grow, y2 + grow)
            if line > 1 and rim[0] < rim[2] and rim[1] < rim[3]:
                draw.rectangle(rim, outline=color)
        draw.rectangle((x1, y1, x2, y2), outline=colors[row], width=line)
    placed = [(row, place) for row in rows if (place := places[row]) is not None]
    for row, place in placed:
        ends = _leader(place, corners[row])
        if ends is not None:
            draw.line(ends, fill=_DARK, width=line + 2)
            draw.line(ends, fill=colors[row], width=line)
    for row, (left, top, right, bottom) in placed:
        draw.rectangle((left, top, right - 1, bottom - 1), fill=colors[row], outline=_DARK)
        draw.text((left + margin, top + 1), texts[row], fill=_ink(colors[row]), font=font)
    return picture


# === Inputs ===


def _rgb_picture(image: Any):
    """Returns a new PIL image in RGB."""
    from PIL import Image

    if isinstance(image, (str, os.PathLike, bytes)):
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            opened.load()
            image = opened
    if isinstance(image, Image.Image):
        if image.mode.startswith("I;16"):
            # Pillow would clip 16-bit values at 255.
            image = Image.fromarray((np.asarray(image) // 257).astype("uint8"))
        return image.copy() if image.mode == "RGB" else image.convert("RGB")
    pixels = np.asarray(image)
    if pixels.ndim not in (2, 3) or 0 in pixels.shape or pixels.shape[2:] not in ((), (3,)):
        raise ValueError(
            "`image` must be a path, the bytes of a file, a PIL image or an array [H, W, 3] or "
            f"[H, W]; received shape {pixels.shape}."
        )
    pixels = np.clip(np.round(pixels.astype("float32")), 0, 255).astype("uint8")
    return Image.fromarray(pixels).convert("RGB")


def _drawn_rows(detections: Mapping, score_threshold: float) -> tuple:
    """Returns boxes `[N, 4]`, scores `[N]` or None, and labels `[N]`, highest scores first."""
    labels = np.asarray(detections["labels"])
    boxes = np.asarray(detections["boxes"], "float64")
    scores = detections.get("scores")
    scores = None if scores is None else np.asarray(scores, "float64")
    if boxes.size == 0 and labels.size == 0:
        boxes = boxes.reshape(0, 4)
    if labels.ndim != 1 or boxes.shape != (len(labels), 4):
        raise ValueError(
            "`detections` must be those of one image, 'boxes' [D, 4] and 'labels' [D]; received "
            f"shapes {boxes.shape} and {labels.shape}."
        )
    if scores is not None and scores.shape != labels.shape:
        raise ValueError(
            f"'scores' must have the shape of 'labels', ({len(labels)},); received {scores.shape}."
        )
    drawn = (labels >= 0) & np.isfinite(boxes).all(axis=1)
    if scores is None:
        return boxes[drawn], None, labels[drawn].astype(int)
    rows = np.flatnonzero(drawn & (scores > score_threshold))
    rows = rows[np.argsort(-scores[rows], kind="stable")]
    return boxes[rows], scores[rows], labels[rows].astype(int)


def _class_name(label: int, class_names: Sequence[str] | None) -> str:
    if class_names is None:
        return str(label)
    if label >= len(class_names):
        raise ValueError(f"`class_names` has {len(class_names)} names; received label {label}.")
    return str(class_names[label])


def _fitting_text(name: str, score: str, font: Any, width: int) -> str:
    """Returns name and score, shortened to fit into `width` pixels."""
    for end, fewest in ((score, 4), ("", 1)):
        for length in range(min(len(name), _LONGEST_NAME), min(len(name), fewest) - 1, -1):
            text = (
                name if length == len(name) else f"{name[:length].rstrip()}\N{HORIZONTAL ELLIPSIS}"
            )
            if font.getlength(text + end) <= width:
                return text + end
    return ""


def _class_color(label: int) -> tuple[int, int, int]:
    # Golden-ratio steps keep the hues of neighboring labels far apart.
    hue = (label * 0.618034) % 1.0
    value = (1.0, 0.8, 0.9)[label % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _ink(color: tuple[int, int, int]) -> tuple[int, int, int]:
    """Returns black or white, whichever is more readable on a color."""
    brightness = 0.3 * color[0] + 0.59 * color[1] + 0.11 * color[2]
    return _DARK if brightness > 140 else _LIGHT


# === Label placement ===


def _label_places(
    boxes: np.ndarray, sizes: Sequence[tuple[int, int]], picture_size: tuple[int, int]
) -> list[tuple[int, int, int, int] | None]:
    """Places labels (left, top, right, bottom), in order.

    Args:
        boxes: int `[N, 4]` xyxy pixels.
        sizes: width and height of each label, (0, 0) for none.
        picture_size: width and height.

    Returns:
        N places within the image, None if a label would cover other labels anywhere.
    """
    areas = np.prod(boxes[:, 2:] - boxes[:, :2] + 1, axis=1)
    taken = np.zeros((0, 4))
    places: list = []
    for row, (width, height) in enumerate(sizes):
        places.append(None)
        if width == 0 or width > picture_size[0] or height > picture_size[1]:
            continue
        corners, cost = _candidates(boxes[row], width, height)
        corners = np.clip(corners, 0, np.subtract(picture_size, (width, height)))
        candidates = np.concatenate([corners, np.add(corners, (width, height))], axis=1)
        # Discourages hiding an object, the label's own or another.
        cost = cost + (_overlap(candidates, boxes) / areas).sum(axis=1)
        cost[(_overlap(candidates, taken) > 0).any(axis=1)] = np.inf
        best = int(np.argmin(cost))
        if np.isfinite(cost[best]):
            places[row] = tuple(int(edge) for edge in candidates[best])
            taken = np.concatenate([taken, candidates[best : best + 1]])
    return places


def _candidates(box: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns candidates for the top left corner of a label, `[C, 2]`, and their costs."""
    x1, y1, x2, y2 = (int(edge) for edge in box)
    left, right, middle = x1, x2 + 1 - width, (x1 + x2 + 1 - width) // 2
    above, below = y1 - height, y2 + 1
    corners = [(left, above), (right, above), (left, y1), (right, y1)]
    corners += [(left, below), (right, below), (left, below - height), (right, below - height)]
    corners += [(x2 + 1, y1), (x1 - width, y1), (x2 + 1, below - height)]
    corners += [(x1 - width, below - height), (middle, above), (middle, below), (middle, y1)]
    cost = list(0.02 * np.arange(len(corners)))
    for row in range(1, _FARTHEST_ROW + 1):
        for x in (left, right, x2 + 1, x1 - width):
            for y in (above - row * height, below + row * height):
                corners.append((x, y))
                cost.append(0.5 + 0.1 * row)
    return np.array(corners), np.array(cost)


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the intersection areas `[N, M]` of `a` `[N, 4]` and `b` `[M, 4]`."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    return np.prod(np.maximum(high - low, 0), axis=-1)


def _leader(place: Sequence[int], box: Sequence[int]) -> list[tuple[int, int]] | None:
    """Returns the ends of the line from a label to its box, None if they touch."""
    left, top, right, bottom = (int(edge) for edge in place)
    x1, y1, x2, y2 = (int(edge) for edge in box)
    if left <= x2 + 1 and right >= x1 and top <= y2 + 1 and bottom >= y1:
        return None
    from_x, to_x = _nearest((left, right - 1), (x1, x2))
    from_y, to_y = _nearest((top, bottom - 1), (y1, y2))
    return [(from_x, from_y), (to_x, to_y)]


def _nearest(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    """Returns the closest points of two intervals."""
    if a[1] < b[0]:
        return a[1], b[0]
    if b[1] < a[0]:
        return a[0], b[1]
    shared = (max(a[0], b[0]) + min(a[1], b[1])) // 2
    return shared, shared
