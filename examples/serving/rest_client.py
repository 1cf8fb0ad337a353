"""Requests detections from TensorFlow Serving over REST and draws them.

    python rest_client.py photo.jpg other.png --output found

Needs Pillow, but neither TensorFlow nor keras_fpn.
"""

import argparse
import base64
import colorsys
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--url", default="http://localhost:8501/v1/models/detector")
    parser.add_argument("--output", required=True, help="folder for the drawings")
    parser.add_argument("--score-threshold", type=float, default=0.5)
    options = parser.parse_args()

    # JSON has no byte strings: the server decodes {"b64": ...}.
    files = [base64.b64encode(Path(name).read_bytes()).decode() for name in options.images]
    body = {
        "signature_name": "encoded_images",
        "inputs": {"image_bytes": [{"b64": content} for content in files]},
    }
    request = urllib.request.Request(f"{options.url}:predict", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request) as response:
            outputs = json.load(response)["outputs"]
    except urllib.error.HTTPError as error:
        sys.exit(f"error: {json.load(error)['error']}")
    except urllib.error.URLError as error:
        sys.exit(f"error: no response from {options.url}: {error.reason}")
    draw_answer(options.images, outputs, options.output, options.score_threshold)


def draw_answer(images: list[str], outputs: dict, folder: str, score_threshold: float) -> None:
    """Prints and draws the detections of each image, or prints why the server refused it.

    Args:
        images: paths of the images.
        outputs: of the server, as nested lists or arrays.
        folder: where the drawings are written.
        score_threshold: detections with a score above this are drawn.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    for row, name in enumerate(images):
        if "error" in outputs and outputs["error"][row]:
            print(f"{name}: error: {outputs['error'][row]}")
            continue
        picture = Image.open(name).convert("RGB")
        draw = ImageDraw.Draw(picture)
        font = ImageFont.load_default(size=max(12, picture.height // 40))
        for i in range(int(outputs["num_detections"][row])):
            score = float(outputs["detection_scores"][row][i])
            if score <= score_threshold:
                break  # Detections are sorted by score.
            label = int(outputs["detection_classes"][row][i])
            named = outputs.get("detection_class_names")
            text = f"class {label}" if named is None else named[row][i]
            # Boxes are top, left, bottom, right, relative to the image.
            top, left, bottom, right = (
                float(edge) * size
                for edge, size in zip(
                    outputs["detection_boxes"][row][i], picture.size[::-1] * 2, strict=True
                )
            )
            print(f"{name}: {text} {score:.2f} at {left:.0f},{top:.0f},{right:.0f},{bottom:.0f}")
            color = colorsys.hsv_to_rgb(label * 0.618034 % 1.0, 0.9, 0.75)
            color = tuple(round(255 * channel) for channel in color)
            draw.rectangle((left, top, right, bottom), outline=color, width=3)
            text = f" {text} {score:.2f} "
            width, height = draw.textbbox((0, 0), text, font=font)[2:]
            corner = (
                max(0, min(left, picture.width - width)),
                top - height if top > height else top,
            )
            background = (*corner, corner[0] + width, corner[1] + height)
            draw.rectangle(background, fill=color)
            draw.text(corner, text, fill="white", font=font)
        picture.save(Path(folder) / f"{row + 1:04d}_{Path(name).stem}.png")


if __name__ == "__main__":
    main()
