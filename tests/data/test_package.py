"""`keras_fpn.data` needs TensorFlow Datasets only for its data sets."""

import sys

import pytest

import keras_fpn.data


def test_public_names_are_those_of_the_modules():
    from keras_fpn.data.pipeline import training_batches

    assert keras_fpn.data.training_batches is training_batches
    for name in keras_fpn.data.__all__:
        assert hasattr(keras_fpn.data, name), name
    assert set(keras_fpn.data.__all__) <= set(dir(keras_fpn.data))
    with pytest.raises(AttributeError, match="'trainning_batches'"):
        keras_fpn.data.trainning_batches  # noqa: B018


def test_a_folder_is_read_without_tensorflow_datasets(monkeypatch, coco_folder, plain, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    monkeypatch.delitem(sys.modules, "keras_fpn.data.tfds_dataset", raising=False)
    monkeypatch.delitem(sys.modules, "keras_fpn.data.demo_dataset", raising=False)
    folder = coco_folder({"a.png": plain(1)})
    assert keras_fpn.data.load_dataset(folder, "train").num_images == 1
    assert "keras_fpn.data.tfds_dataset" not in sys.modules
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"'empty' .*annotations/"):
        keras_fpn.data.load_dataset("empty", "train")
    with pytest.raises(ImportError, match=r"'coco/2017'.*keras-fpn\[training\]"):
        keras_fpn.data.load_dataset("coco/2017", "train")
