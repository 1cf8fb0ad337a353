"""Image files to RGB pixels, and the sizes that images are resized to, in TensorFlow graphs.

Everything here runs inside `tf.data` and `tf.function`, and none of it raises where a file is
damaged. TensorFlow is needed on every backend: import this module only where files are read.
"""

import math
from collections.abc import Callable, Sequence

import tensorflow as tf

# Pillow's own limit: a file that claims more is taken for a decompression bomb.
MAX_PIXELS = 178_956_970

_HEADER_BYTES = 64
# Of a GIF up to the end of its first frame, at 255 bytes each.
_MAX_GIF_BLOCKS = 100_000
_BUCKET_MULTIPLE = 32  # The stride of P5, the coarsest level that is computed from pixels.


def as_one_op(function: Callable) -> Callable:
    """The function as one op of the graph that calls it, for a branch that is rarely taken.

    TensorFlow writes the ops of both branches of a `tf.cond` into the graph around, and passes over
    each op of the other branch in turn. In the branches here that is 0.1 ms and more an image.
    """
    return tf.function(function, autograph=False, experimental_attributes={"_noinline": True})


# === Files ===


def read_image_size(image_bytes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Read height and width from the header of a file, without decoding it.

    A file whose decoder would take memory for another size than its header's is refused, and so
    are the variants that TensorFlow does not decode.

    Args:
        image_bytes: string scalar, the content of a JPEG, PNG, GIF, BMP or WebP file.

    Returns:
        `size`: int32 `[2]`, height and width in pixels, `[0, 0]` where the file is refused;
        `problem`: string scalar, why the file is refused, empty where it is not.
    """
    # JPEGs apart: libjpeg writes a line to stderr about every other file, and JPEGs, which most
    # files are, need none of the many small ops for the rest.
    size, problem = tf.cond(
        tf.equal(tf.strings.substr(image_bytes, 0, 3), b"\xff\xd8\xff"),
        lambda: _check_size(_jpeg_size(image_bytes), tf.constant("")),
        lambda: _read_other_size(image_bytes),
    )
    size = tf.where(tf.equal(problem, ""), size, tf.zeros_like(size))
    return tf.cast(tf.ensure_shape(size, [2]), tf.int32), tf.ensure_shape(problem, [])


def decode_image(image_bytes: tf.Tensor) -> tf.Tensor:
    """Decode a JPEG, PNG, GIF (its first frame), BMP or still WebP file to RGB.

    Greyscale, palette, CMYK and 16-bit files become 8-bit RGB; an alpha channel is dropped, and the
    orientation that a camera notes beside the pixels (EXIF) is not applied. The pixels of a JPEG
    are those that Pillow decodes. Ask `read_image_size` first: it refuses the files that must not
    reach the decoder. `read_image` does both.

    Args:
        image_bytes: string scalar, the content of the file.

    Returns:
        uint8 `[height, width, 3]`; `[0, 0, 3]` where the file is truncated, damaged or of another
        format.
    """
    # The DCT that Pillow and torchvision use. TensorFlow's default is a rougher one, up to 15 grey
    # values away, and not faster.
    return tf.cond(
        tf.equal(tf.strings.substr(image_bytes, 0, 2), b"\xff\xd8"),
        lambda: _first_success(
            lambda content: tf.io.decode_jpeg(content, channels=3, dct_method="INTEGER_ACCURATE"),
            image_bytes,
            tf.zeros([0, 0, 3], tf.uint8),
        ),
        lambda: _decode_other_image(image_bytes),
    )


def read_image(image_bytes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Decode a file that `read_image_size` admits.

    Args:
        image_bytes: string scalar, the content of the file.

    Returns:
        `image`: uint8 `[height, width, 3]` as from `decode_image`, `[0, 0, 3]` where there is a
        problem; `problem`: string scalar, why the file cannot be read, empty where it can.
    """
    size, problem = read_image_size(image_bytes)
    nothing = tf.zeros([0, 0, 3], tf.uint8)
    image = tf.cond(tf.equal(problem, ""), lambda: decode_image(image_bytes), lambda: nothing)
    is_whole = tf.reduce_all(tf.shape(image)[:2] == size)
    problem = tf.where(is_whole, problem, "truncated or damaged")
    image = tf.cond(tf.equal(problem, ""), lambda: image, lambda: nothing)
    return tf.ensure_shape(image, [None, None, 3]), problem


def _jpeg_size(image_bytes: tf.Tensor) -> tf.Tensor:
    return _first_success(
        lambda content: tf.cast(tf.io.extract_jpeg_shape(content)[:2], tf.int64),
        image_bytes,
        tf.zeros([2], tf.int64),
    )


def _check_size(size: tf.Tensor, problem: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The size, int64 `[2]`, and the problem, or that of a size which no image has."""
    is_empty = tf.reduce_min(size) < 1

    def describe() -> tf.Tensor:
        claim = tf.strings.format("claims {}x{} pixels", (size[1], size[0]))
        return tf.where(is_empty, "damaged header", claim)

    is_possible = ~is_empty & (size[0] * size[1] <= MAX_PIXELS)
    return size, tf.cond(is_possible, lambda: problem, describe)


@as_one_op
def _read_other_size(image_bytes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Height and width, int64 `[2]`, and the problem of a file that is no JPEG."""
    header = tf.strings.substr(image_bytes, 0, _HEADER_BYTES)
    header = tf.strings.substr(header + b"\0" * _HEADER_BYTES, 0, _HEADER_BYTES)
    byte = tf.cast(tf.ensure_shape(tf.io.decode_raw(header, tf.uint8), [_HEADER_BYTES]), tf.int64)

    def number(*positions: int) -> tf.Tensor:
        """The unsigned number whose bytes stand at `positions`, the highest first."""
        return tf.add_n([byte[p] * 256**n for n, p in enumerate(reversed(positions))])

    def has(text: bytes, position: int = 0) -> tf.Tensor:
        return tf.equal(tf.strings.substr(header, position, len(text)), text)

    is_png = has(b"\x89PNG\r\n\x1a\n")
    is_gif = has(b"GIF87a") | has(b"GIF89a")
    is_bmp = has(b"BM")
    is_webp = has(b"RIFF") & has(b"WEBP", 8)
    nothing = tf.zeros([2], tf.int64)

    # TensorFlow's decoder passes over chunks before the one that holds the size.
    png_size = tf.stack([number(20, 21, 22, 23), number(16, 17, 18, 19)])
    png_size = tf.where(has(b"\0\0\0\rIHDR", 8), png_size, 0)
    # The decoder takes the size of the frames, whatever the canvas is.
    gif_size = tf.stack([number(9, 8), number(7, 6)])
    gif_frame = tf.cond(
        is_gif, lambda: _first_gif_frame(image_bytes)[0], lambda: tf.zeros([4], tf.int64)
    )
    # The height of a BMP is negative where its rows run from top to bottom.
    bmp_height = number(25, 24, 23, 22)
    bmp_height = tf.where(bmp_height >= 2**31, 2**32 - bmp_height, bmp_height)
    bmp_bits, bmp_compression = number(29, 28), number(33, 32, 31, 30)
    is_plain_bmp = (number(17, 16, 15, 14) >= 40) & (
        (tf.equal(bmp_bits, 8) & tf.equal(bmp_compression, 0))
        | tf.equal(bmp_bits, 24)
        | tf.equal(bmp_bits, 32)
    )
    # A WebP begins with its canvas (VP8X), or with its only image, lossless (VP8L) or not (VP8).
    # libwebp refuses a still image of another size than its canvas.
    is_canvas = has(b"VP8X", 12)
    lossless_bits = number(24, 23, 22, 21)
    webp_size = nothing
    for is_kind, kind_size in (
        (is_canvas, [1 + number(29, 28, 27), 1 + number(26, 25, 24)]),
        (
            has(b"VP8L", 12) & has(b"\x2f", 20),
            [1 + lossless_bits // 2**14 % 2**14, 1 + lossless_bits % 2**14],
        ),
        (
            has(b"VP8 ", 12) & has(b"\x9d\x01\x2a", 23),
            [number(29, 28) % 2**14, number(27, 26) % 2**14],
        ),
    ):
        webp_size = tf.where(is_kind, tf.stack(kind_size), webp_size)

    size = nothing
    for is_format, format_size in (
        (is_png, png_size),
        (is_gif, tf.where(gif_frame[3] > 0, gif_size, 0)),
        (is_bmp, tf.stack([bmp_height, number(21, 20, 19, 18)])),
        (is_webp, webp_size),
    ):
        size = tf.where(is_format, format_size, size)

    problem = tf.constant("")
    for is_problem, text in (
        (
            is_gif & tf.reduce_any(gif_frame != tf.concat([nothing, gif_size], 0)),
            "a GIF whose first frame does not fill its canvas",
        ),
        (
            is_bmp & ~is_plain_bmp,
            tf.strings.format(
                "a BMP of {} bits a pixel, compression {}, which TensorFlow cannot decode",
                (bmp_bits, bmp_compression),
            ),
        ),
        # TensorFlow reads only those with an alpha channel, and others past the end of its memory
        # where it is asked for any number of channels.
        (
            is_webp & is_canvas & tf.equal(byte[20] // 2 % 2, 1),
            "an animated WebP; a still one is wanted",
        ),
    ):
        problem = tf.where(is_problem, text, problem)
    size, problem = _check_size(size, problem)
    for is_problem, text in (
        (
            ~(is_png | is_gif | is_bmp | is_webp),
            "not a JPEG, PNG, GIF, BMP or WebP file",
        ),
        (tf.strings.length(image_bytes) == 0, "empty file"),
    ):
        problem = tf.where(is_problem, text, problem)
    return size, problem


@as_one_op
def _decode_other_image(image_bytes: tf.Tensor) -> tf.Tensor:
    """Decode a file that is no JPEG, as `decode_image` does."""
    begins = tf.strings.substr(image_bytes, 0, 2)
    failed = tf.zeros([0, 0, 3], tf.uint8)

    def decode(content: tf.Tensor, channels: int = 3) -> tf.Tensor:
        return tf.io.decode_image(content, channels=channels, expand_animations=False)

    def decode_gif() -> tf.Tensor:
        # All frames would be decoded; the file is cut behind the first.
        end = tf.cast(_first_gif_frame(image_bytes)[1], tf.int32)
        first = tf.strings.substr(image_bytes, 0, end) + b";"
        return _first_success(decode, first, failed)

    def decode_webp() -> tf.Tensor:
        # TensorFlow wants to be told beforehand whether there is an alpha channel.
        with_alpha = _first_success(
            lambda content: decode(content, channels=4), image_bytes, tf.zeros([0, 0, 4], tf.uint8)
        )
        return tf.cond(
            tf.size(with_alpha) > 0,
            lambda: with_alpha[..., :3],
            lambda: _first_success(decode, image_bytes, failed),
        )

    return tf.case(
        [
            (tf.equal(begins, b"GI"), decode_gif),
            (tf.equal(begins, b"BM"), lambda: _first_success(_decode_bmp, image_bytes, failed)),
            (tf.equal(begins, b"RI"), decode_webp),
        ],
        default=lambda: _first_success(decode, image_bytes, failed),
    )


def _decode_bmp(content: tf.Tensor) -> tf.Tensor:
    pixels = tf.io.decode_bmp(content)

    def look_up() -> tf.Tensor:
        # TensorFlow gives the indices of 8-bit pixels. The palette stands behind the headers, of
        # 14 bytes and of as many as the second begins with.
        header = tf.io.decode_raw(tf.strings.substr(content, 14, 4), tf.int32)[0]
        palette = tf.strings.substr(content, 14 + header, 4 * 256) + b"\0" * (4 * 256)
        palette = tf.io.decode_raw(tf.strings.substr(palette, 0, 4 * 256), tf.uint8)
        blue_green_red = tf.reshape(palette, [256, 4])[:, :3]
        return tf.gather(blue_green_red[:, ::-1], tf.cast(pixels[..., 0], tf.int32))

    # TensorFlow does not convert the channels of a BMP itself.
    return tf.cond(tf.shape(pixels)[-1] < 3, look_up, lambda: pixels[..., :3])


def _first_gif_frame(image_bytes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Find the first frame of a GIF by walking from block to block.

    Returns:
        `frame`: int64 `[4]`, top, left, height and width, zeros where there is none; `end`: int64,
        the number of bytes up to its end, 0 where that is not in the file.
    """
    byte = tf.io.decode_raw(image_bytes, tf.uint8)
    length = tf.size(byte, tf.int64)

    def at(position: tf.Tensor) -> tf.Tensor:
        """The byte at a position, 0 behind the end of the file."""
        is_inside = position < length
        inside = tf.where(is_inside, position, 0)
        return tf.where(is_inside, tf.cast(byte[inside], tf.int64), 0)

    def table_size(flags: tf.Tensor) -> tf.Tensor:
        return tf.where(flags >= 128, 3 * 2 ** (flags % 8 + 1), 0)

    # Where the walk is: before a block, in the data of an extension or of a frame, at the end.
    before, in_extension, in_frame, at_end = (tf.constant(n, tf.int64) for n in range(4))

    def step(place: tf.Tensor, position: tf.Tensor, frame: tf.Tensor) -> tuple:
        value = at(position)
        is_before = tf.equal(place, before)
        is_extension = is_before & tf.equal(value, 0x21)
        is_frame = is_before & tf.equal(value, 0x2C)
        # Data is a row of blocks, each behind a byte with its length; one of length 0 ends it.
        is_last = ~is_before & tf.equal(value, 0)
        behind = tf.where(tf.equal(place, in_frame), at_end, before)
        return (
            tf.where(
                is_extension,
                in_extension,
                tf.where(is_frame, in_frame, tf.where(is_last, behind, place)),
            ),
            tf.where(
                is_extension,
                position + 2,
                tf.where(
                    is_frame,
                    position + 11 + table_size(at(position + 9)),
                    tf.where(is_before, length, position + 1 + value),
                ),
            ),
            tf.where(is_frame, position, frame),
        )

    place, end, frame = tf.while_loop(
        lambda place, position, frame: (place < at_end) & (position < length),
        step,
        (before, 13 + table_size(at(tf.constant(10, tf.int64))), tf.constant(0, tf.int64)),
        maximum_iterations=_MAX_GIF_BLOCKS,
    )
    numbers = [at(frame + n) + 256 * at(frame + n + 1) for n in (3, 1, 7, 5)]
    return (
        tf.where(frame > 0, tf.stack(numbers), 0),
        tf.where(tf.equal(place, at_end) & (end <= length), end, 0),
    )


def _first_success(
    function: Callable[[tf.Tensor], tf.Tensor], argument: tf.Tensor, fallback: tf.Tensor
) -> tf.Tensor:
    """`function(argument)`, or `fallback` where an op of `function` fails.

    A data set of one element is the only place of a graph that can drop an error. It adds some
    microseconds, and unlike a filter it may stand inside a parallel `map`.
    """
    attempt = tf.data.Dataset.from_tensors(argument).map(function).ignore_errors()
    return attempt.concatenate(tf.data.Dataset.from_tensors(fallback)).take(1).get_single_element()


# === Sizes ===


def resized_size(
    size: tf.Tensor, shorter_edge: tf.Tensor | int, longest_edge: tf.Tensor | int
) -> tf.Tensor:
    """The size to which an image is resized before the model sees it.

    `round(size * min(shorter_edge / min(size), longest_edge / max(size)))`, at least 1.

    Args:
        size: int32 `[..., 2]`, height and width in pixels.
        shorter_edge: wanted length of the shorter edge, in pixels.
        longest_edge: limit of the longer edge, in pixels; the shorter one gives way to it.

    Returns:
        int32 `[..., 2]`.
    """
    edges = tf.cast(tf.maximum(size, 1), tf.float32)
    scale = tf.minimum(
        tf.cast(shorter_edge, tf.float32) / tf.reduce_min(edges, axis=-1, keepdims=True),
        tf.cast(longest_edge, tf.float32) / tf.reduce_max(edges, axis=-1, keepdims=True),
    )
    return tf.maximum(tf.cast(tf.round(edges * scale), tf.int32), 1)


def resize_image(image: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """Resize an image bilinearly, with half-pixel centres and without antialiasing.

    Args:
        image: `[height, width, 3]` of any number dtype.
        size: int32 `[2]`, the wanted height and width.

    Returns:
        float32 `[*size, 3]`.
    """
    # Casting first makes the resize a third faster.
    return tf.image.resize(tf.cast(image, tf.float32), size)


def bucket_shapes(
    shorter_edge: int, longest_edge: int, aspect_ratios: Sequence[float] = (4 / 3, 5 / 3)
) -> list[tuple[int, int]]:
    """The shapes (height, width) that batches can have, the smallest first.

    For each ratio the smallest shape, in multiples of 32, that holds a landscape or portrait image
    of that ratio, resized; the last shape reaches `longest_edge`, so that every image fits.
    """
    short = min(shorter_edge, longest_edge)
    longs = [min(longest_edge, short * ratio) for ratio in sorted(aspect_ratios)[:-1]]
    shapes = set()
    for long in [*longs, longest_edge]:
        height, width = (
            _BUCKET_MULTIPLE * math.ceil(round(edge, 6) / _BUCKET_MULTIPLE)
            for edge in (short, long)
        )
        shapes |= {(height, width), (width, height)}
    return sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape))
