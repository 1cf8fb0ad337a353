"""Image files to RGB pixels inside tf.data graphs, without an exception where a file is damaged."""

from collections.abc import Callable

import tensorflow as tf

# Pillow's own limit: a file that claims more is taken for a decompression bomb.
MAX_PIXELS = 178_956_970

_HEADER_BYTES = 32


def read_image_size(image_bytes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Read height and width from the header of a JPEG, PNG, GIF or BMP file, without decoding it.

    Args:
        image_bytes: string scalar, the content of the file.

    Returns:
        `size`: int32 `[2]`, height and width in pixels, `[0, 0]` where the file is refused;
        `problem`: string scalar, why the file is refused, empty where it is not.
    """
    head = tf.strings.substr(image_bytes, 0, _HEADER_BYTES)
    padded = tf.strings.substr(head + b"\0" * _HEADER_BYTES, 0, _HEADER_BYTES)
    byte = tf.cast(tf.ensure_shape(tf.io.decode_raw(padded, tf.uint8), [_HEADER_BYTES]), tf.int64)

    def number(*positions: int) -> tf.Tensor:
        """The unsigned number whose bytes stand at `positions`, the highest first."""
        return tf.add_n([byte[p] * 256**n for n, p in enumerate(reversed(positions))])

    def starts_with(*magic: bytes) -> tf.Tensor:
        return tf.reduce_any([tf.strings.substr(padded, 0, len(m)) == m for m in magic])

    is_jpeg = starts_with(b"\xff\xd8\xff")
    is_png = starts_with(b"\x89PNG\r\n\x1a\n")
    is_gif = starts_with(b"GIF87a", b"GIF89a")
    is_bmp = starts_with(b"BM")
    # Asked only of JPEGs: libjpeg writes a line to stderr about every other file.
    jpeg_size = tf.cond(
        is_jpeg,
        lambda: _first_success(
            lambda content: tf.cast(tf.io.extract_jpeg_shape(content)[:2], tf.int64),
            image_bytes,
            tf.zeros([2], tf.int64),
        ),
        lambda: tf.zeros([2], tf.int64),
    )
    # The height of a BMP is negative where its rows run from top to bottom.
    bmp_height = number(25, 24, 23, 22)
    bmp_height = tf.where(bmp_height >= 2**31, 2**32 - bmp_height, bmp_height)
    size = tf.zeros([2], tf.int64)
    for is_format, format_size in (
        (is_jpeg, jpeg_size),
        (is_png, tf.stack([number(20, 21, 22, 23), number(16, 17, 18, 19)])),
        (is_gif, tf.stack([number(9, 8), number(7, 6)])),
        (is_bmp, tf.stack([bmp_height, number(21, 20, 19, 18)])),
    ):
        size = tf.where(is_format, format_size, size)

    problem = tf.constant("")
    for is_problem, text in (
        (
            size[0] * size[1] > MAX_PIXELS,
            tf.strings.format("claims {}x{} pixels", (size[1], size[0])),
        ),
        (is_bmp & (number(29, 28) < 24), "a BMP with a palette, which TensorFlow cannot decode"),
        (tf.reduce_min(size) < 1, "damaged header"),
        (~(is_jpeg | is_png | is_gif | is_bmp), "not a JPEG, PNG, GIF or BMP file"),
        (tf.strings.length(image_bytes) == 0, "empty file"),
    ):
        problem = tf.where(is_problem, text, problem)
    size = tf.where(tf.equal(problem, ""), size, tf.zeros_like(size))
    return tf.cast(size, tf.int32), problem


def decode_image(image_bytes: tf.Tensor) -> tf.Tensor:
    """Decode a JPEG, PNG, GIF (its first frame) or BMP file to RGB.

    Greyscale, palette, CMYK and 16-bit files become 8-bit RGB; an alpha channel is dropped. The
    pixels of a JPEG are those that Pillow decodes. Ask
    `read_image_size` first: it refuses the files that must not reach the decoder.

    Args:
        image_bytes: string scalar, the content of the file.

    Returns:
        uint8 `[height, width, 3]`; `[0, 0, 3]` where the file is truncated, damaged or of another
        format.
    """

    def decode(content: tf.Tensor) -> tf.Tensor:
        begins = tf.strings.substr(content, 0, 2)
        return tf.case(
            [
                # The DCT that Pillow and torchvision use. TensorFlow's default is a rougher one, up
                # to 15 grey values away, and not faster.
                (
                    tf.equal(begins, b"\xff\xd8"),
                    lambda: tf.io.decode_jpeg(content, channels=3, dct_method="INTEGER_ACCURATE"),
                ),
                # TensorFlow does not convert the channels of a BMP itself.
                (tf.equal(begins, b"BM"), lambda: tf.io.decode_bmp(content)[..., :3]),
            ],
            default=lambda: tf.io.decode_image(content, channels=3, expand_animations=False),
        )

    return _first_success(decode, image_bytes, tf.zeros([0, 0, 3], tf.uint8))


def _first_success(
    function: Callable[[tf.Tensor], tf.Tensor], argument: tf.Tensor, fallback: tf.Tensor
) -> tf.Tensor:
    """`function(argument)`, or `fallback` where an op of `function` fails.

    A data set of one element is the only place of a graph that can drop an error. It adds some
    microseconds, and unlike a filter it may stand inside a parallel `map`.
    """
    attempt = tf.data.Dataset.from_tensors(argument).map(function).ignore_errors()
    return attempt.concatenate(tf.data.Dataset.from_tensors(fallback)).take(1).get_single_element()
