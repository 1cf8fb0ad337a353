"""Detections of images of any kind, in the pixels of the image as it was given."""

import pathlib

import keras
import numpy as np
import pytest
from data_sets import encode
from PIL import Image
from pixels import bilinear, noise
from small_detector import two_level_detector

from keras_fpn.image_pyramid import merge_scales
from keras_fpn.serving.inference import detect

EDGES = {"shorter_edge": 64, "longest_edge": 96, "verbose": 0}


@pytest.fixture(scope="module")
def detector():
    """A detector of two levels, traced for batches of any shape."""
    keras.utils.set_random_seed(0)
    model = two_level_detector()
    # The first batch is traced for its own shape, the next for all that differs from it.
    detect(model, [noise(33, 70)] * 2, **EDGES)
    return model


def assert_same(detections, others, **tolerance):
    assert set(detections) == set(others) == {"boxes", "scores", "labels"}
    np.testing.assert_array_equal(detections["labels"], others["labels"])
    np.testing.assert_allclose(detections["scores"], others["scores"], **tolerance)
    np.testing.assert_allclose(detections["boxes"], others["boxes"], **tolerance)


def test_boxes_are_those_of_predict_in_the_pixels_of_the_image_itself(detector):
    image = noise(40, 50)
    # 64 / 40 = 1.6, and 50 * 1.6 = 80.
    predicted = detector.predict(bilinear(image, 64, 80)[None].astype("float32"), verbose=0)
    count = int(predicted["num_detections"][0])
    assert count > 0
    [found] = detect(detector, image, **EDGES)
    np.testing.assert_allclose(found["boxes"], predicted["boxes"][0, :count] / 1.6, atol=1e-3)
    np.testing.assert_allclose(found["scores"], predicted["scores"][0, :count], atol=1e-5)
    np.testing.assert_array_equal(found["labels"], predicted["labels"][0, :count])
    assert [found[name].dtype for name in ("boxes", "scores", "labels")] == [
        "float32",
        "float32",
        "int32",
    ]


def test_height_and_width_have_scales_of_their_own(detector):
    # min(64 / 33, 96 / 70) = 1.371: 45.3 x 96 is rounded to 45 x 96.
    image = noise(33, 70)
    predicted = detector.predict(bilinear(image, 45, 96)[None].astype("float32"), verbose=0)
    count = int(predicted["num_detections"][0])
    [found] = detect(detector, image, **EDGES)
    wanted = predicted["boxes"][0, :count] * [70 / 96, 33 / 45, 70 / 96, 33 / 45]
    np.testing.assert_allclose(found["boxes"], wanted, atol=1e-3)
    assert (found["boxes"] <= [70, 33, 70, 33]).all()
    assert (found["boxes"] >= 0).all()


def test_boxes_are_xyxy_pixels_whatever_the_format_of_the_model(detector):
    relative = two_level_detector(bounding_box_format="rel_yxyx")
    relative.set_weights(detector.get_weights())
    relative.run_eagerly = True  # Tracing takes longer than a batch.
    image = noise(40, 50)
    wanted, found = (detect(model, image, **EDGES)[0] for model in (detector, relative))
    assert len(wanted["labels"]) > 0
    assert_same(found, wanted, atol=1e-3)


def test_paths_bytes_pictures_and_arrays_are_the_same_image(detector, tmp_path):
    image = noise(40, 50)
    (tmp_path / "a.png").write_bytes(encode(image))
    kinds = [
        image,
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        encode(image),
        Image.fromarray(image),
        image.astype("float32"),
        Image.open(tmp_path / "a.png"),
        keras.ops.convert_to_tensor(image),
    ]
    first, *others = detect(detector, kinds, batch_size=1, **EDGES)
    for other in others:
        assert_same(other, first, rtol=0)


def test_grey_and_transparent_images_become_rgb(detector):
    rgb = noise(40, 50)
    grey = rgb[..., 0]
    rgba = Image.fromarray(np.dstack([rgb, rgb[..., :1]]))
    sixteen_bits = Image.fromarray(grey.astype("uint16") * 257)
    kinds = [np.dstack([grey] * 3), grey, Image.fromarray(grey), sixteen_bits, rgb, rgba]
    found = detect(detector, kinds, batch_size=1, **EDGES)
    for one in found[1:4]:
        assert_same(one, found[0], atol=1e-4)
    assert_same(found[5], found[4], rtol=0)


def test_a_batch_gives_what_its_images_give_alone(detector):
    images = np.stack([noise(40, 50, seed) for seed in range(3)])
    together = detect(detector, images, batch_size=3, **EDGES)
    for image, found in zip(images, together, strict=True):
        assert_same(found, detect(detector, image, **EDGES)[0], atol=1e-3)


def test_results_stand_in_the_order_of_the_images(detector):
    # Sorted by shape these share batches in another order: 80 x 64, 64 x 80, 64 x 96, 48 x 96.
    sizes = [(50, 40), (20, 40), (40, 50), (40, 60), (51, 41), (41, 51)]
    images = [noise(*size, seed) for seed, size in enumerate(sizes)]
    alone = [detect(detector, image, **EDGES)[0] for image in images]
    assert len({len(found["scores"]) and float(found["scores"][0]) for found in alone}) == 6
    for found, wanted in zip(detect(detector, images, batch_size=1, **EDGES), alone, strict=True):
        assert_same(found, wanted, rtol=0)
    for found, size in zip(detect(detector, images, batch_size=2, **EDGES), sizes, strict=True):
        assert len(found["boxes"]) > 0
        assert (found["boxes"] <= np.tile(size[::-1], 2)).all()


class Recorder:
    """Stands in for `predict_on_batch` and keeps what it was given."""

    def __init__(self, model, monkeypatch):
        self.batches = []
        self.original = model.predict_on_batch
        monkeypatch.setattr(model, "predict_on_batch", self)

    def __call__(self, inputs):
        self.batches.append(inputs)
        return self.original(inputs)

    def shapes(self):
        return sorted(inputs["images"].shape for inputs in self.batches)


def test_images_of_a_shape_share_batches_padded_to_the_largest(detector, monkeypatch):
    monkeypatch.setattr(detector, "jit_compile", False)
    recorder = Recorder(detector, monkeypatch)
    # Resized: 64 x 77 and 64 x 80 (twice); 77 x 64.
    images = [noise(40, 48), noise(48, 40), noise(40, 50), noise(80, 100)]
    detect(detector, images, batch_size=4, **EDGES)
    assert recorder.shapes() == [(1, 77, 64, 3), (3, 64, 80, 3)]
    [three] = [inputs for inputs in recorder.batches if len(inputs["images"]) == 3]
    assert three["image_sizes"].tolist() == [[64, 77], [64, 80], [64, 80]]
    assert not three["images"][0, :, 77:].any()
    assert three["images"][0, :, :77].any(axis=-1).mean() > 0.9


def test_a_compiled_model_sees_few_shapes(detector, monkeypatch):
    monkeypatch.setattr(type(detector), "jit_compile", True)
    recorder = Recorder(detector, monkeypatch)

    def recorded(inputs):
        recorder.batches.append(inputs)
        detections = {"boxes": np.zeros((2, 1, 4)), "scores": np.zeros((2, 1))}
        return detections | {"labels": np.full((2, 1), -1)}

    monkeypatch.setattr(detector, "predict_on_batch", recorded)
    images = [noise(40, width) for width in (44, 46, 48)]
    images += [noise(width, 40) for width in (56, 58, 60)]
    found = detect(detector, images, batch_size=2, **EDGES)
    # Four thirds of 64 are 85.3, in multiples of 32: 96.
    assert recorder.shapes() == [(2, 64, 96, 3)] * 2 + [(2, 96, 64, 3)] * 2
    assert [len(one["labels"]) for one in found] == [0] * 6


def test_twenty_sizes_are_traced_a_few_times_only(monkeypatch):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("counts the traces of TensorFlow")
    model = two_level_detector()

    def nothing_found(images, *arguments, **options):
        labels = keras.ops.full((keras.ops.shape(images)[0], 1), -1)
        scores = keras.ops.zeros_like(labels)
        return {"boxes": keras.ops.stack([scores] * 4, axis=-1), "scores": scores, "labels": labels}

    # How often does not depend on what is traced.
    monkeypatch.setattr(model, "compute_outputs", nothing_found)
    random = np.random.RandomState(0)
    images = [noise(*random.randint(30, 200, 2), seed) for seed in range(20)]
    assert len(detect(model, images, **EDGES)) == 20
    assert 1 <= model.predict_function.experimental_get_tracing_count() <= 3


def test_detections_above_the_threshold_are_returned_as_by_the_model(detector):
    [found] = detect(detector, noise(40, 50), **EDGES)
    scores = found["scores"]
    threshold = float(scores[len(scores) // 2])
    [fewer] = detect(detector, noise(40, 50), score_threshold=threshold, **EDGES)
    # A score of the threshold itself is not above it.
    kept = scores > threshold
    assert 0 < kept.sum() < (scores >= threshold).sum() < len(kept)
    assert_same(fewer, {name: values[kept] for name, values in found.items()}, rtol=0)


SCALES = (64, 48)


def merged_by_hand(model, image, method):
    """`detect` once for each of `SCALES`, then merged."""
    at_scales = [detect(model, image, **EDGES | {"shorter_edge": edge})[0] for edge in SCALES]
    # The thresholds of `small_detector`.
    return merge_scales(at_scales, nms_iou_threshold=0.5, max_detections=20, method=method)


@pytest.mark.parametrize("merge", ["nms", "vote"])
def test_several_scales_give_what_each_gives_alone_merged(detector, merge):
    # In batches of two, the four images of each scale share batches in another order.
    sizes = [(50, 40), (40, 50), (40, 60), (41, 51)]
    images = [noise(*size, seed) for seed, size in enumerate(sizes)]
    edges = EDGES | {"shorter_edge": SCALES}
    found = detect(detector, images, batch_size=2, merge=merge, **edges)
    for image, one in zip(images, found, strict=True):
        assert len(one["labels"]) == 20
        assert_same(one, merged_by_hand(detector, image, merge), atol=1e-3)


def test_boxes_below_the_threshold_vote_all_the_same(detector):
    image, edges = noise(40, 50), EDGES | {"shorter_edge": SCALES, "merge": "vote"}
    [found] = detect(detector, image, **edges)
    threshold = float(found["scores"][5])
    [fewer] = detect(detector, image, score_threshold=threshold, **edges)
    kept = found["scores"] > threshold
    assert 0 < kept.sum() < len(kept)
    assert_same(fewer, {name: values[kept] for name, values in found.items()}, rtol=0)


def test_a_sequence_of_one_scale_is_that_scale(detector):
    image = noise(40, 50)
    [found] = detect(detector, image, merge="vote", **EDGES | {"shorter_edge": [64]})
    assert_same(found, detect(detector, image, **EDGES)[0], rtol=0)


def test_a_progress_bar_shows_for_many_batches(detector, capsys):
    images = [noise(40, 50)] * 4
    edges = EDGES | {"verbose": "auto"}
    detect(detector, images, batch_size=2, **edges)
    assert capsys.readouterr().out == ""
    detect(detector, images, batch_size=1, **edges)
    assert "4/4" in capsys.readouterr().out
    detect(detector, images, batch_size=1, **EDGES)
    assert capsys.readouterr().out == ""


def test_no_images_have_no_detections(detector):
    assert detect(detector, []) == []


def test_files_that_cannot_be_read_are_named_before_the_model_runs(detector, tmp_path, monkeypatch):
    recorder = Recorder(detector, monkeypatch)
    good, text = tmp_path / "good.png", tmp_path / "text.jpg"
    good.write_bytes(encode(noise(40, 50)))
    text.write_bytes(b"no image")
    gone = tmp_path / "gone.png"
    with pytest.raises(FileNotFoundError, match=r"no image file .*image 1 \('.*gone\.png'\)\."):
        detect(detector, [good, gone])
    with pytest.raises(FileNotFoundError, match="image 0"):
        detect(detector, str(tmp_path))
    with pytest.raises(
        ValueError, match=r"2 of 3 images .* image 1 .*text\.jpg'\): not a JPEG.*; "
    ):
        detect(detector, [good, text, b""])
    with pytest.raises(ValueError, match=r"image 0: .*received an array of shape \(3, 64, 64\)"):
        detect(detector, np.zeros((3, 64, 64)))
    with pytest.raises(TypeError, match=r"image 1 .*received NoneType"):
        detect(detector, [good, None])
    with pytest.raises(TypeError, match=r"image 0 .*received dtype bool"):
        detect(detector, np.zeros((8, 8, 3), bool))
    with pytest.raises(TypeError, match="received int"):
        detect(detector, 3)
    assert recorder.batches == []


def test_a_truncated_file_is_named(detector, tmp_path):
    path = pathlib.Path(tmp_path / "half.png")
    path.write_bytes(encode(noise(40, 50))[:2000])
    with pytest.raises(ValueError, match=r"image 1 \('.*half.png'\) .* truncated or damaged"):
        detect(detector, [noise(40, 50), path], **EDGES)


def test_arguments_out_of_range_are_refused(detector):
    image = noise(8, 8)
    with pytest.raises(ValueError, match=r"`batch_size` .* received 0"):
        detect(detector, image, batch_size=0)
    with pytest.raises(ValueError, match=r"`shorter_edge` .* received 80\.5"):
        detect(detector, image, shorter_edge=80.5)
    with pytest.raises(ValueError, match=r"`shorter_edge` .* received 0"):
        detect(detector, image, shorter_edge=(64, 0))
    with pytest.raises(ValueError, match=r"`shorter_edge` .* received \(\)"):
        detect(detector, image, shorter_edge=())
    with pytest.raises(ValueError, match=r"`merge` .* received 'mean'"):
        detect(detector, image, merge="mean")
    with pytest.raises(ValueError, match=r"`verbose` .* received 'yes'"):
        detect(detector, image, verbose="yes")
    with pytest.raises(TypeError, match=r"`model` .*FasterRCNN; received ndarray"):
        detect(image, detector)


def test_a_model_of_one_shape_gets_that_shape():
    model = two_level_detector(image_shape=(64, 96, 3))
    model.run_eagerly = True  # Tracing takes longer than a few batches.
    found = detect(model, [noise(40, 50), noise(20, 60)], **EDGES)
    assert all(
        (one["boxes"][:, 2] <= width).all() for one, width in zip(found, (50, 60), strict=True)
    )
    [several] = detect(model, noise(40, 50), **EDGES | {"shorter_edge": SCALES})
    assert_same(several, merged_by_hand(model, noise(40, 50), "nms"), atol=1e-3)
    with pytest.raises(ValueError, match=r"\(64, 96, 3\) .*received .* \[80, 64\]"):
        detect(model, noise(50, 40), **EDGES)
    # At the second scale only.
    with pytest.raises(ValueError, match=r"shorter_edge=72 .*received .* \[72, 90\]"):
        detect(model, noise(40, 50), **EDGES | {"shorter_edge": (64, 72)})
