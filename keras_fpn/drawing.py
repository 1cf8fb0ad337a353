"""Pictures of detections."""

import colorsys
from collections.abc import Mapping, Sequence

import numpy as np


def draw_detections(
    image: np.ndarray, detections: Mapping[str, np.ndarray], class_names: Sequence[str]
):
    """Draws the boxes of one image with class names and scores.

    Args:
        image: `[H, W, 3]` RGB pixels in 0..255.
        detections: `{"boxes": [D, 4], "scores": [D], "labels": [D]}`, xyxy pixels of `image`; rows
            of label -1 are left out.
        class_names: the name of every label.

    Returns:
        A `PIL.Image.Image`. A class has the same colour in every picture.
    """
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.fromarray(np.clip(np.asarray(image), 0, 255).astype("uint8"))
    draw = ImageDraw.Draw(picture)
    line = max(2, round(min(picture.size) / 250))
    font = ImageFont.load_default(size=max(11, round(min(picture.size) / 38)))
    rows = [i for i, label in enumerate(detections["labels"]) if label >= 0]
    # The surest last, on top of the others.
    for i in reversed(rows):
        label = int(detections["labels"][i])
        # Steps of the golden ratio keep the hues of neighbouring labels far apart.
        hue = (label * 0.618034) % 1.0
        colour = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.85, 0.95))
        x1, y1, x2, y2 = (float(edge) for edge in detections["boxes"][i])
        draw.rectangle([x1, y1, max(x1, x2), max(y1, y2)], outline=colour, width=line)
        text = f"{class_names[label]} {float(detections['scores'][i]):.2f}"
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        width, height = right - left + 6, bottom - top + 4
        x = min(max(x1, 0), max(picture.width - width, 0))
        y = y1 - height if y1 >= height else min(y1, picture.height - height)
        draw.rectangle([x, y, x + width, y + height], fill=colour)
        brightness = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]
        ink = "black" if brightness > 140 else "white"
        draw.text((x + 3 - left, y + 2 - top), text, fill=ink, font=font)
    return picture
