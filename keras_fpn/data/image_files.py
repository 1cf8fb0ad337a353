"""Decoding and resizing of image files in TensorFlow graphs.

Everything here runs inside `tf.data` and `tf.function`; a damaged file never raises an error. This
module needs TensorFlow on every backend, so import it only where files are read.
"""

import math
from collections.abc import Callable, Sequence

import tensorflow as tf

# Pillow's limit, above which it considers a file a decompression bomb.
MAX_PIXELS = 178_956_970

_HEADER_BYTES = 64
# Through the end of a GIF's first frame, a fraction of a second. Metadata in XMP takes the most, a
# step per hundred bytes.
_MAX_GIF_STEPS = 2000
_GIF_BLOCKS_PER_STEP = 1024
_BUCKET_MULTIPLE = 32  # The stride of P5, the coarsest level of the backbone.


def as_one_op(function: Callable) -> Callable:
    """Wraps a function as a single op of the calling graph, for branches that are rarely taken.

    TensorFlow inlines both branches of a `tf.cond` and visits every op of the branch not taken,
    which costs 0.1 ms or more per image for the branches here.
    """
    return tf.function(function, autograph=False, experimental_attributes={"_noinline": True})


# === Files ===


def read_image_size(image_bytes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Reads height and width from a file's header without decoding the file.

    Rejects files whose decoder would allocate memory for a size other than the header's, and
    variants that TensorFlow cannot decode.

    Args:
        image_bytes: string scalar, the contents of a JPEG, PNG, GIF, BMP or WebP file.

    Returns:
        `size`: int32 `[2]`, height and width in pixels, `[0, 0]` if the file is rejected.
        `problem`: string scalar, the reason for rejecting the file, empty if it is accepted.
    """
    # JPEGs are handled separately: most files are JPEGs and need none of the many small ops for
    # other formats, and libjpeg prints a warning for any file that is not a JPEG.
    size, problem = tf.cond(
        tf.equal(tf.strings.substr(image_bytes, 0, 3), b"\xff\xd8\xff"),
        lambda: _check_size(_jpeg_size(image_bytes), tf.constant("")),
        lambda: _read_other_size(image_bytes),
    )
    size = tf.where(tf.equal(problem, ""), size, tf.zeros_like(size))
    return tf.cast(tf.ensure_shape(size, [2]), tf.int32), tf.ensure_shape(problem, [])


def decode_image(image_bytes: tf.Tensor) -> tf.Tensor:
    """Decodes a JPEG, PNG, GIF (first frame), BMP or still WebP file to RGB.

    Grayscale, palette, CMYK and 16-bit files are converted to 8-bit RGB; an alpha channel is
    dropped, and the EXIF orientation is not applied. JPEGs decode to the same pixels as in Pillow.
    Call `read_image_size` first, which rejects files that must not reach the decoder; `read_image`
    does both.

    Args:
        image_bytes: string scalar, the contents of the file.

    Returns:
        uint8 `[height, width, 3]`, `[0, 0, 3]` if the file is truncated, damaged or in another
        format.
    """
    # The DCT of Pillow and torchvision. TensorFlow's default is less accurate, by up to 15 levels,
    # and no faster.
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
    """Decodes a file if `read_image_size` accepts it.

    Args:
        image_bytes: string scalar, the contents of the file.

    Returns:
        `image`: uint8 `[height, width, 3]` as from `decode_image`, `[0, 0, 3]` on failure.
        `problem`: string scalar, the reason for the failure, empty on success.
    """
    size, problem = read_image_size(image_bytes)
    no_image = tf.zeros([0, 0, 3], tf.uint8)
    image = tf.cond(tf.equal(problem, ""), lambda: decode_image(image_bytes), lambda: no_image)
    is_whole = tf.reduce_all(tf.shape(image)[:2] == size)
    problem = tf.where(is_whole, problem, "truncated or damaged")
    image = tf.cond(tf.equal(problem, ""), lambda: image, lambda: no_image)
    return tf.ensure_shape(image, [None, None, 3]), problem


def _jpeg_size(image_bytes: tf.Tensor) -> tf.Tensor:
    return _first_success(
        lambda content: tf.cast(tf.io.extract_jpeg_shape(content)[:2], tf.int64),
        image_bytes,
        tf.zeros([2], tf.int64),
    )


def _check_size(size: tf.Tensor, problem: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the size, int64 `[2]`, and the problem, or that of an impossible size."""
    is_empty = tf.reduce_min(size) < 1

    def describe() -> tf.Tensor:
        claim = tf.strings.format("claims {}x{} pixels", (size[1], size[0]))
        return tf.where(is_empty, "damaged header", claim)

    is_possible = ~is_empty & (size[0] * size[1] <= MAX_PIXELS)
    return size, tf.cond(is_possible, lambda: problem, describe)


@as_one_op
def _read_other_size(image_bytes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the size, int64 `[2]`, and the problem of a file that is not a JPEG."""
    header = tf.strings.substr(image_bytes, 0, _HEADER_BYTES)
    header = tf.strings.substr(header + b"\0" * _HEADER_BYTES, 0, _HEADER_BYTES)
    byte = tf.cast(tf.ensure_shape(tf.io.decode_raw(header, tf.uint8), [_HEADER_BYTES]), tf.int64)

    def number(*positions: int) -> tf.Tensor:
        """Returns the unsigned integer with its bytes at `positions`, most significant first."""
        return tf.add_n([byte[p] * 256**n for n, p in enumerate(reversed(positions))])

    def has(text: bytes, position: int = 0) -> tf.Tensor:
        return tf.equal(tf.strings.substr(header, position, len(text)), text)

    is_png = has(b"\x89PNG\r\n\x1a\n")
    is_gif = has(b"GIF87a") | has(b"GIF89a")
    is_bmp = has(b"BM")
    is_webp = has(b"RIFF") & has(b"WEBP", 8)
    nothing = tf.zeros([2], tf.int64)

    # IHDR must come first: TensorFlow's decoder skips other chunks before it.
    png_size = tf.stack([number(20, 21, 22, 23), number(16, 17, 18, 19)])
    png_size = tf.where(has(b"\0\0\0\rIHDR", 8), png_size, 0)
    # The decoder uses the size of the frames, not that of the canvas.
    gif_size = tf.stack([number(9, 8), number(7, 6)])
    gif_frame, gif_data = tf.cond(
        is_gif,
        lambda: _first_gif_frame(image_bytes, whole=False),
        lambda: (tf.zeros([4], tf.int64), tf.constant(0, tf.int64)),
    )
    # The height of a BMP is negative if its rows are stored top to bottom.
    bmp_height = number(25, 24, 23, 22)
    bmp_height = tf.where(bmp_height >= 2**31, 2**32 - bmp_height, bmp_height)
    bmp_bits, bmp_compression = number(29, 28), number(33, 32, 31, 30)
    is_plain_bmp = (number(17, 16, 15, 14) >= 40) & (
        (tf.equal(bmp_bits, 8) & tf.equal(bmp_compression, 0))
        | tf.equal(bmp_bits, 24)
        | tf.equal(bmp_bits, 32)
    )
    # A WebP starts with its canvas (VP8X) or its only image, lossless (VP8L) or lossy (VP8).
    # libwebp rejects a still image whose size differs from its canvas.
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
            "unsupported GIF: the first frame does not fill the canvas",
        ),
        (
            is_bmp & ~is_plain_bmp,
            tf.strings.format(
                "unsupported BMP: {} bits per pixel, compression {}",
                (bmp_bits, bmp_compression),
            ),
        ),
        # TensorFlow can read only those with an alpha channel; for others it reads past the end of
        # its buffer if the number of channels is not specified.
        (
            is_webp & is_canvas & tf.equal(byte[20] // 2 % 2, 1),
            "unsupported WebP: animated",
        ),
    ):
        problem = tf.where(is_problem, text, problem)
    size, problem = _check_size(size, problem)
    for is_problem, text in (
        (
            ~(is_png | is_gif | is_bmp | is_webp),
            "not a JPEG, PNG, GIF, BMP or WebP file",
        ),
        (
            is_gif & (gif_data < 0),
            f"unsupported GIF: over {_MAX_GIF_STEPS} blocks before the first frame",
        ),
        (tf.strings.length(image_bytes) == 0, "empty file"),
    ):
        problem = tf.where(is_problem, text, problem)
    return size, problem


@as_one_op
def _decode_other_image(image_bytes: tf.Tensor) -> tf.Tensor:
    """Decodes a file that is not a JPEG; see `decode_image`."""
    signature = tf.strings.substr(image_bytes, 0, 2)
    failed = tf.zeros([0, 0, 3], tf.uint8)

    def decode(content: tf.Tensor, channels: int = 3) -> tf.Tensor:
        return tf.io.decode_image(content, channels=channels, expand_animations=False)

    def decode_gif() -> tf.Tensor:
        # TensorFlow would decode all frames, so the file is cut after the first.
        end = tf.maximum(_first_gif_frame(image_bytes, whole=True)[1], 0)
        first = tf.strings.substr(image_bytes, tf.zeros_like(end), end) + b";"
        return _first_success(decode, first, failed)

    def decode_webp() -> tf.Tensor:
        # TensorFlow must be told in advance whether there is an alpha channel.
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
            (tf.equal(signature, b"GI"), decode_gif),
            (tf.equal(signature, b"BM"), lambda: _first_success(_decode_bmp, image_bytes, failed)),
            (tf.equal(signature, b"RI"), decode_webp),
        ],
        default=lambda: _first_success(decode, image_bytes, failed),
    )


def _decode_bmp(content: tf.Tensor) -> tf.Tensor:
    pixels = tf.io.decode_bmp(content)

    def look_up() -> tf.Tensor:
        # TensorFlow returns palette indices for 8-bit pixels. The palette follows two headers: one
        # of 14 bytes, and one that starts with its own length.
        header = tf.io.decode_raw(tf.strings.substr(content, 14, 4), tf.int32)[0]
        palette = tf.strings.substr(content, 14 + header, 4 * 256) + b"\0" * (4 * 256)
        palette = tf.io.decode_raw(tf.strings.substr(palette, 0, 4 * 256), tf.uint8)
        blue_green_red = tf.reshape(palette, [256, 4])[:, :3]
        return tf.gather(blue_green_red[:, ::-1], tf.cast(pixels[..., 0], tf.int32))

    # TensorFlow does not convert the channels of a BMP.
    return tf.cond(tf.shape(pixels)[-1] < 3, look_up, lambda: pixels[..., :3])


def _first_gif_frame(image_bytes: tf.Tensor, whole: bool) -> tuple[tf.Tensor, tf.Tensor]:
    """Finds the first frame of a GIF by parsing its blocks.

    Args:
        image_bytes: string scalar, the contents of the file.
        whole: whether to find the frame's end, or its beginning only.

    Returns:
        `frame`: int64 `[4]`, top, left, height and width, zeros if there is none.
        `end`: int64, the offset of the frame's end, or of its data's beginning if `whole` is
            false; 0 if the file ends before it, -1 if it is more than `_MAX_GIF_STEPS` away.
    """
    byte = tf.io.decode_raw(image_bytes, tf.uint8)
    length = tf.size(byte, tf.int64)

    def at(position: tf.Tensor) -> tf.Tensor:
        """Returns the bytes at some positions, 0 past the end of the file."""
        is_inside = position < length
        inside = tf.where(is_inside, position, 0)
        return tf.where(is_inside, tf.cast(tf.gather(byte, inside), tf.int64), 0)

    def table_size(flags: tf.Tensor) -> tf.Tensor:
        return tf.where(flags >= 128, 3 * 2 ** (flags % 8 + 1), 0)

    # The parser's states: before a block, in the data of an extension or frame, at the end.
    before, in_extension, in_frame, at_end = (tf.constant(n, tf.int64) for n in range(4))
    goal = at_end if whole else in_frame

    def step(state: tf.Tensor, position: tf.Tensor, frame: tf.Tensor) -> tuple:
        value = at(position)
        is_before = tf.equal(state, before)
        is_extension = is_before & tf.equal(value, 0x21)
        is_frame = is_before & tf.equal(value, 0x2C)
        # Data is a sequence of length-prefixed blocks, terminated by one of length 0.
        is_last = ~is_before & tf.equal(value, 0)
        following = tf.where(tf.equal(state, in_frame), at_end, before)
        # Encoders write blocks of one length, all of which are one step.
        run = position + (1 + value) * tf.range(_GIF_BLOCKS_PER_STEP, dtype=tf.int64)
        is_other = tf.concat([at(run) != value, [True]], axis=0)
        blocks = tf.where(is_last, tf.ones_like(value), tf.argmax(is_other))
        return (
            tf.where(
                is_extension,
                in_extension,
                tf.where(is_frame, in_frame, tf.where(is_last, following, state)),
            ),
            tf.where(
                is_extension,
                position + 2,
                tf.where(
                    is_frame,
                    position + 11 + table_size(at(position + 9)),
                    tf.where(is_before, length, position + blocks * (1 + value)),
                ),
            ),
            tf.where(is_frame, position, frame),
        )

    def is_on_the_way(state: tf.Tensor, position: tf.Tensor, frame: tf.Tensor) -> tf.Tensor:
        return (state < goal) & (position < length)

    state, end, frame = tf.while_loop(
        is_on_the_way,
        step,
        (before, 13 + table_size(at(tf.constant(10, tf.int64))), tf.constant(0, tf.int64)),
        maximum_iterations=_MAX_GIF_STEPS,
    )
    numbers = [at(frame + n) + 256 * at(frame + n + 1) for n in (3, 1, 7, 5)]
    is_far = is_on_the_way(state, end, frame)
    return (
        tf.where(frame > 0, tf.stack(numbers), 0),
        tf.where(tf.equal(state, goal) & (end <= length), end, -tf.cast(is_far, tf.int64)),
    )


def _first_success(
    function: Callable[[tf.Tensor], tf.Tensor], argument: tf.Tensor, fallback: tf.Tensor
) -> tf.Tensor:
    """Returns `function(argument)`, or `fallback` if an op of `function` fails.

    Only a data set can suppress an error inside a graph. One of a single element costs a few
    microseconds and, unlike a filter, can be used inside a parallel `map`.
    """
    attempt = tf.data.Dataset.from_tensors(argument).map(function).ignore_errors()
    return attempt.concatenate(tf.data.Dataset.from_tensors(fallback)).take(1).get_single_element()


# === Sizes ===


def resized_size(
    size: tf.Tensor, shorter_edge: tf.Tensor | int, longest_edge: tf.Tensor | int
) -> tf.Tensor:
    """Returns the size to which an image is resized for the model.

    `round(size * min(shorter_edge / min(size), longest_edge / max(size)))`, at least 1.

    Args:
        size: int32 `[..., 2]`, height and width in pixels.
        shorter_edge: target length of the shorter edge in pixels.
        longest_edge: limit on the longer edge in pixels; it takes precedence.

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
    """Resizes an image bilinearly, with half-pixel centers and without antialiasing.

    Args:
        image: `[height, width, 3]` of any numeric dtype.
        size: int32 `[2]`, target height and width.

    Returns:
        float32 `[*size, 3]`.
    """
    # Casting first makes resizing a third faster.
    return tf.image.resize(tf.cast(image, tf.float32), size)


def bucket_shapes(
    shorter_edge: int, longest_edge: int, aspect_ratios: Sequence[float] = (4 / 3, 5 / 3)
) -> list[tuple[int, int]]:
    """Returns the possible shapes (height, width) of batches, smallest first.

    For each aspect ratio this is the smallest multiple of 32 that holds a resized landscape or
    portrait image of that ratio; the last shape extends to `longest_edge`, so that every image
    fits.
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
