"""Image files decode to the same pixels as in Pillow, or are rejected with a reason, in graphs."""

import io
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from keras_fpn.data.image_files import (
    MAX_PIXELS,
    bucket_shapes,
    decode_image,
    read_image,
    read_image_size,
    resize_image,
    resized_size,
)

Y, X = np.mgrid[:40, :60]
SMOOTH = Image.fromarray(np.stack([4 * X, 6 * Y, 2 * (X + Y)], -1).astype(np.uint8))
TRANSLUCENT = SMOOTH.copy()
TRANSLUCENT.putalpha(Image.fromarray((4 * X).astype(np.uint8)))
TURNED = Image.Exif()
TURNED[0x0112] = 6  # Rotated by 90 degrees.
GRAY16 = ((X + 60 * Y) * 27).astype(np.uint16)


def encode(image: Image.Image, file_format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def replaced(content: bytes, position: int, patch: bytes) -> bytes:
    return content[:position] + patch + content[position + len(patch) :]


JPEG, PNG, BMP = (encode(SMOOTH, name) for name in ("JPEG", "PNG", "BMP"))
WEBP, LOSSLESS = encode(SMOOTH, "WEBP"), encode(SMOOTH, "WEBP", lossless=True)
CANVAS = encode(TRANSLUCENT, "WEBP")
PALETTE = SMOOTH.convert("P")
GIF = encode(PALETTE, "GIF")
GIF_FRAME = GIF.index(b",\0\0\0\0" + struct.pack("<HH", 60, 40))
SECOND = Image.new("P", (60, 40), 3)
ANIMATED = encode(PALETTE, "GIF", save_all=True, append_images=[SECOND])
SOF = JPEG.index(b"\xff\xc0")
READABLE = {
    "rgb.jpg": JPEG,
    "progressive.jpg": encode(SMOOTH, "JPEG", progressive=True),
    "gray.jpg": encode(SMOOTH.convert("L"), "JPEG"),
    "turned.jpg": encode(SMOOTH, "JPEG", exif=TURNED),
    "rgb.png": PNG,
    "palette.png": encode(PALETTE, "PNG"),
    "alpha.png": encode(TRANSLUCENT, "PNG"),
    "bits.png": encode(SMOOTH.convert("1"), "PNG"),
    "interlaced.gif": encode(PALETTE, "GIF", interlace=1),
    "comment.gif": encode(PALETTE, "GIF", comment=b"made for a test" * 40),
    "small_blocks.gif": GIF[:GIF_FRAME] + b"!\xfe" + b"\1a" * 5000 + b"\0" + GIF[GIF_FRAME:],
    "animated.gif": ANIMATED,
    "rgb.bmp": BMP,
    "top_down.bmp": replaced(
        BMP[:54] + b"".join(BMP[54 + 180 * row : 234 + 180 * row] for row in range(39, -1, -1)),
        22,
        struct.pack("<i", -40),
    ),
    "alpha.bmp": encode(TRANSLUCENT, "BMP"),
    "palette.bmp": encode(PALETTE, "BMP"),
    "gray.bmp": encode(SMOOTH.convert("L"), "BMP"),
    "lossy.webp": WEBP,
    "lossless.webp": LOSSLESS,
    "alpha.webp": CANVAS,
    "alpha_lossless.webp": encode(TRANSLUCENT, "WEBP", lossless=True),
}
REJECTED = {
    "empty": (b"", "empty file"),
    "text": (b"This is no image.", "not a JPEG, PNG, GIF, BMP or WebP file"),
    "beginning of a JPEG": (JPEG[:20], "damaged header"),
    "beginning of a WebP": (WEBP[:26], "damaged header"),
    "two colors": (
        encode(SMOOTH.convert("1"), "BMP"),
        "unsupported BMP: 1 bits per pixel, compression 0",
    ),
    "animated WebP": (
        encode(SMOOTH, "WEBP", save_all=True, append_images=[SECOND.convert("RGB")]),
        "unsupported WebP: animated",
    ),
    # Headers that claim more than MAX_PIXELS.
    "JPEG bomb": (
        replaced(JPEG, SOF + 5, struct.pack(">HH", 65000, 64000)),
        "claims 64000x65000 pixels",
    ),
    "PNG bomb": (
        replaced(PNG, 16, struct.pack(">II", 100_000, 100_000)),
        "claims 100000x100000 pixels",
    ),
    "GIF bomb": (
        replaced(replaced(GIF, 6, b"\xff\xff\xff\xff"), GIF_FRAME, b",\0\0\0\0\xff\xff\xff\xff"),
        "claims 65535x65535 pixels",
    ),
    # The time to find the first frame is bounded.
    "GIF of empty blocks": (
        GIF[:GIF_FRAME] + b"!\xfe\0" * 1001 + GIF[GIF_FRAME:],
        "unsupported GIF: over 2000 blocks before the first frame",
    ),
    "BMP bomb": (
        replaced(BMP, 18, struct.pack("<ii", 100_000, -100_000)),
        "claims 100000x100000 pixels",
    ),
    "WebP bomb": (replaced(WEBP, 26, b"\xff\x3f\xff\x3f"), "claims 16383x16383 pixels"),
    "lossless WebP bomb": (
        replaced(LOSSLESS, 21, b"\xff\xff\xff\x0f"),
        "claims 16384x16384 pixels",
    ),
    "WebP canvas bomb": (replaced(CANVAS, 24, b"\xff" * 6), "claims 16777216x16777216 pixels"),
    # Headers that claim less than the decoder would decode.
    "JPEG with two sizes": (
        JPEG[:SOF] + replaced(JPEG[SOF : SOF + 19], 5, struct.pack(">HH", 4, 3)) + JPEG[SOF:],
        "damaged header",
    ),
    "PNG with a chunk before its size": (
        replaced(PNG[:8] + png_chunk(b"teSt", bytes(13)) + PNG[8:], 16, struct.pack(">II", 4, 4)),
        "damaged header",
    ),
    "GIF with a frame over its canvas": (
        replaced(GIF, 6, struct.pack("<HH", 10, 10)),
        "unsupported GIF: the first frame does not fill the canvas",
    ),
    "GIF with a frame beside its corner": (
        replaced(GIF, GIF_FRAME + 1, struct.pack("<H", 3)),
        "unsupported GIF: the first frame does not fill the canvas",
    ),
}
# The header is valid, but the rest is incomplete or of another size.
DAMAGED = {
    "truncated JPEG": JPEG[:-200],
    "truncated PNG": PNG[: len(PNG) // 2],
    "truncated GIF": GIF[: len(GIF) // 2],
    "truncated BMP": BMP[:-10],
    "truncated WebP": WEBP[:-20],
    "WebP over its canvas": replaced(CANVAS, 24, b"\x09\0\0\x09\0\0"),
}


@pytest.fixture(scope="module")
def read():
    """Results of `read_image` in a data set's graph, where programs call it."""
    files = [*READABLE.values(), *(content for content, _ in REJECTED.values()), *DAMAGED.values()]
    names = [*READABLE, *REJECTED, *DAMAGED]
    results = tf.data.Dataset.from_tensor_slices(files).map(
        lambda content: (*read_image(content), read_image_size(content)[0]), num_parallel_calls=2
    )
    return dict(zip(names, results.as_numpy_iterator(), strict=True))


@pytest.mark.parametrize("name", READABLE)
def test_pixels_are_those_of_pillow(read, name):
    image, problem, size = read[name]
    with Image.open(io.BytesIO(READABLE[name])) as picture:
        expected = np.asarray(picture.convert("RGB"))
    assert problem == b""
    np.testing.assert_array_equal(size, [40, 60])
    np.testing.assert_array_equal(image, expected)


def test_sixteen_bits_become_eight():
    image, problem = read_image(encode(Image.fromarray(GRAY16), "PNG"))
    assert problem == b""
    np.testing.assert_allclose(image, np.repeat(GRAY16[..., None] / 257, 3, axis=-1), atol=1)


@pytest.mark.parametrize("name", REJECTED)
def test_a_header_is_rejected_with_the_reason(read, name):
    image, problem, size = read[name]
    assert problem.decode() == REJECTED[name][1]
    assert image.shape == (0, 0, 3)
    np.testing.assert_array_equal(size, [0, 0])


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_has_no_pixels(read, name):
    image, problem, _ = read[name]
    assert problem == b"truncated or damaged"
    assert image.shape == (0, 0, 3)


def test_the_limit_applies_to_pixels_not_edges():
    def claiming(width, height):
        return replaced(PNG, 16, struct.pack(">II", width, height))

    size, problem = read_image_size(claiming(MAX_PIXELS, 1))
    assert problem == b""
    np.testing.assert_array_equal(size, [1, MAX_PIXELS])
    assert read_image_size(claiming(MAX_PIXELS + 1, 1))[1] == b"claims 178956971x1 pixels"


def test_only_the_first_frame_of_a_gif_is_decoded():
    # The second frame claims four billion pixels.
    frame = ANIMATED.rindex(b",\0\0\0\0" + struct.pack("<HH", 60, 40))
    assert frame > GIF_FRAME
    bomb = replaced(ANIMATED, frame, b",\0\0\0\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(decode_image(bomb), np.asarray(PALETTE.convert("RGB")))


def test_the_shorter_edge_is_resized_unless_the_longer_exceeds_its_limit():
    sizes = [[480, 640], [640, 427], [100, 1000], [1, 5000], [1600, 1600]]
    # 640 * 800 / 480 = 1066.7; 640 * 800 / 427 = 1199.1; 100 * 1333 / 1000 = 133.3.
    expected = [[800, 1067], [1199, 800], [133, 1333], [1, 1333], [800, 800]]
    np.testing.assert_array_equal(resized_size(tf.constant(sizes), 800, 1333), expected)
    for size, one in zip(sizes, expected, strict=True):
        np.testing.assert_array_equal(resized_size(tf.constant(size), 800, 1333), one)


def test_resizing_is_bilinear_with_half_pixel_centers():
    image = np.zeros((1, 2, 3), np.uint8)
    image[0, 1] = 200
    # From two pixels to four, whose centers are at -0.25, 0.25, 0.75 and 1.25.
    resized = resize_image(image, [1, 4])
    np.testing.assert_allclose(resized[0, :, 0], [0, 50, 150, 200])
    # Without antialiasing, from four pixels to one: the mean of those next to its center.
    row = np.repeat(np.array([[9, 100, 200, 9]], np.uint8)[..., None], 3, axis=-1)
    np.testing.assert_allclose(resize_image(row, [1, 1])[0, 0], [150] * 3)


def test_bucket_shapes():
    # 800 * 4/3 = 1066.7 and 1333, rounded up to multiples of 32.
    expected = [(800, 1088), (1088, 800), (800, 1344), (1344, 800)]
    assert bucket_shapes(800, 1333, (4 / 3, 5 / 3)) == expected
    assert bucket_shapes(256, 256, (4 / 3,)) == [(256, 256)]
    assert bucket_shapes(800, 1333, (1.0, 2.0)) == [(800, 800), (800, 1344), (1344, 800)]
