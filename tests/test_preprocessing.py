import numpy as np
import pytest
from keras.ops import convert_to_numpy

from keras_fpn.preprocessing import ImageNormalizer


def test_each_channel_is_normalized_and_the_far_sides_are_padded_with_zeros():
    images = np.array([[[[10, 20, 30], [4, 5, 6]]]], "uint8")
    layer = ImageNormalizer(mean=(1, 2, 3), std=(1, 2, 4), size_divisor=4)
    expected = np.zeros((1, 4, 4, 3))
    expected[0, 0, :2] = [[9, 9, 6.75], [3, 1.5, 0.75]]
    x = convert_to_numpy(layer(images, np.array([[1, 2]])))
    assert x.dtype == "float32"
    np.testing.assert_allclose(x, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float16", "float32", "float64"])
def test_pixels_of_any_number_dtype(dtype):
    pixels = np.random.RandomState(0).randint(0, 256, (1, 32, 32, 3))
    x = ImageNormalizer()(pixels.astype(dtype), np.array([[32, 32]]))
    expected = (pixels - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]
    np.testing.assert_allclose(convert_to_numpy(x), expected, atol=1e-5)


def test_an_image_in_a_padded_batch_is_what_it_is_alone():
    random = np.random.RandomState(0)
    image = random.uniform(0, 255, (1, 20, 37, 3)).astype("float32")
    batch = np.full((2, 64, 64, 3), np.nan, "float32")
    batch[1, :20, :37] = image
    alone = convert_to_numpy(ImageNormalizer()(image, np.array([[20, 37]])))
    padded = convert_to_numpy(ImageNormalizer()(batch, np.array([[0, 0], [20, 37]])))
    np.testing.assert_array_equal(padded[1, :32], alone[0])
    assert not padded[1, 32:].any()
    assert not padded[0].any()


@pytest.mark.parametrize(
    ("height", "width", "divisor", "padded"),
    [(64, 96, 32, (64, 96)), (65, 95, 32, (96, 96)), (7, 5, 1, (7, 5)), (1, 1, 32, (32, 32))],
)
def test_padded_sizes(height, width, divisor, padded):
    layer = ImageNormalizer(size_divisor=divisor)
    x = layer(np.zeros((1, height, width, 3)), np.array([[height, width]]))
    assert tuple(x.shape) == (1, *padded, 3)
    assert layer.compute_output_shape((1, height, width, 3), (1, 2)) == (1, *padded, 3)


def test_an_unknown_size_stays_unknown():
    layer = ImageNormalizer()
    assert layer.compute_output_shape((None, None, 33, 3), (None, 2)) == (None, None, 64, 3)


def test_blue_comes_first_for_a_bgr_backbone():
    images = np.array([[[[10, 20, 30], [4, 5, 6]]]], "uint8")
    layer = ImageNormalizer((1, 2, 3), (1, 2, 4), size_divisor=2, channel_order="bgr")
    x = convert_to_numpy(layer(images, np.array([[1, 2]])))
    np.testing.assert_array_equal(x, [[[[6.75, 9, 9], [0.75, 1.5, 3]], [[0, 0, 0], [0, 0, 0]]]])
    assert ImageNormalizer.from_config(layer.get_config()).channel_order == "bgr"
    assert ImageNormalizer().channel_order == "rgb"


def test_unknown_channel_order():
    with pytest.raises(ValueError, match=r"`channel_order` .*'rgb', 'bgr'; received 'BGR'"):
        ImageNormalizer(channel_order="BGR")
