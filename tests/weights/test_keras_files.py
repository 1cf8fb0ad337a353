"""`.keras` files whose config describes no detector, or one that is not in the file."""

import json
import zipfile

import pytest
from test_h5_files import peak_below

import keras_fpn
from keras_fpn.weights.keras_files import load_keras_file


@pytest.fixture(scope="module")
def members(detector, tmp_path_factory):
    path = tmp_path_factory.mktemp("keras") / "whole.keras"
    detector.save(path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture
def written(members, tmp_path):
    """Writes the members to a file, with another config."""

    def write(config):
        path = tmp_path / "crafted.keras"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in {**members, "config.json": config}.items():
                archive.writestr(name, content)
        return path

    return write


def stage(name, **arguments):
    return lambda config: config["config"][name]["config"].update(arguments)


def put(**entries):
    return lambda config: config.update(entries)


CRAFTED = {
    "an unknown argument": stage("box_head", wings=2),
    "a missing argument": lambda config: config["config"]["box_head"]["config"].pop("num_classes"),
    "a missing stage": lambda config: config["config"].pop("rpn_head"),
    "an unknown stage": lambda config: config["config"].update(wings={}),
    "a stage that is text": lambda config: config["config"].update(pyramid="resnet"),
    "a stage of no class": lambda config: config["config"]["rpn_loss"].pop("class_name"),
    "no stages": put(config=None),
    "stages in a list": put(config=[]),
    "an unknown class": put(class_name="X", registered_name="X", module=None),
    "a class of another module": put(class_name="X", registered_name="X", module="keras.x"),
    "a function": put(class_name="function", config="open", module="builtins"),
    "another model": put(class_name="Dense", module="keras.layers", config={"units": 1}),
    "sizes of text": stage("anchors", sizes="large"),
    "sizes of nothing": stage("anchors", sizes=[None] * 5),
    "no image": lambda config: config["config"].update(image_shape=7.5),
    "names that are numbers": lambda config: config["config"].update(class_names=3),
    "1e400 units": stage("box_head", hidden_dim=10**400),
    "a thousand million units": stage("box_head", hidden_dim=10**9),
    "a thousand million layers": stage("box_head", hidden_layers=10**9),
    "a thousand million convolutions": stage("rpn_head", hidden_layers=10**9),
    "a thousand million anchors": stage("rpn_head", anchors_per_location=10**9),
    "a thousand million channels": stage("pyramid", channels=10**9),
}


@pytest.mark.parametrize("change", CRAFTED.values(), ids=CRAFTED)
def test_a_crafted_config_is_refused_by_the_name_of_its_file(members, written, change):
    config = json.loads(members["config.json"])
    change(config)
    path = written(json.dumps(config))
    with peak_below(60), pytest.raises(ValueError, match=r"crafted\.keras' ") as error:
        keras_fpn.build_fpn_faster_rcnn(weights=path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "config", [b"", b"[]", b"null", b"\xff", b"[" * 100_000, b" " * (2**23 + 1)], ids=len
)
def test_what_is_no_config_is_refused(written, config):
    with pytest.raises(ValueError, match=r"crafted\.keras' (?:has a config|must contain)"):
        load_keras_file(written(config))


def test_weights_that_do_not_fit_the_config_are_refused(members, written):
    config = json.loads(members["config.json"])
    stage("box_head", hidden_dim=33)(config)
    with pytest.raises(ValueError, match=r"crafted\.keras' has weights that do not fit its config"):
        load_keras_file(written(json.dumps(config)))


def test_a_member_before_the_beginning_of_the_file_is_refused(members, written):
    path = written(members["config.json"])
    content = bytearray(path.read_bytes())
    # Where the directory of the archive should be, at 16 of the record that ends it.
    end = content.rindex(b"PK\5\6") + 16
    offset = int.from_bytes(content[end : end + 4], "little")
    content[end : end + 4] = (offset + 1000).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"crafted\.keras' is damaged"):
        load_keras_file(path)


def test_a_changed_weight_is_refused(members, written):
    path = written(members["config.json"])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"crafted\.keras' is damaged"):
        load_keras_file(path)
