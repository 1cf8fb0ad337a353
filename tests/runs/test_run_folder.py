"""The folder of a run is that of one recipe and of one data set."""

import dataclasses
import json

import pytest

from keras_fpn.data.datasets import DetectionDataset
from keras_fpn.runs.recipes import Recipe
from keras_fpn.runs.run_folder import claim_run, read_configuration, run_lock
from keras_fpn.runs.train import Run
from keras_fpn.runs.training import images_at_start, steps_per_epoch

TWELVE = {"images": 12, "digest": "a" * 32}
EIGHT = {"images": 8, "digest": "b" * 32}


def configuration(training=TWELVE, validation=TWELVE):
    recipe = dataclasses.asdict(Recipe(batch_size=4))
    return {"recipe": recipe, "data": {"training": training, "validation": validation}}


@pytest.mark.parametrize(
    ("changed", "split"), [({"training": EIGHT}, "training"), ({"validation": EIGHT}, "validation")]
)
def test_data_that_changed_are_refused_unless_they_are_allowed(tmp_path, changed, split):
    claim_run(tmp_path, configuration())
    claim_run(tmp_path, configuration())
    with pytest.raises(ValueError, match=rf"{split} split had 12 images .* has 8 .*--allow-"):
        claim_run(tmp_path, configuration(**changed))
    claim_run(tmp_path, configuration(**changed), True)
    # What the run began with stays.
    assert read_configuration(tmp_path / "config.json") == json.loads(json.dumps(configuration()))


def test_the_classes_of_a_run_are_refused_when_they_are_known(tmp_path):
    claim_run(tmp_path, configuration() | {"class_names": ["bolt"], "category_ids": [3]})
    with run_lock(tmp_path, configuration()), pytest.raises(ValueError, match="class_names"):
        claim_run(tmp_path, configuration() | {"class_names": ["nut"], "category_ids": [3]})


def test_a_run_of_a_version_without_fingerprints_is_resumed(tmp_path):
    older = configuration()
    del older["data"]
    claim_run(tmp_path, older)
    claim_run(tmp_path, configuration())


def test_epochs_keep_their_steps_when_changed_data_are_allowed(tmp_path):
    claim_run(tmp_path, configuration())
    eight = DetectionDataset("x", "train", ["a"], [1], num_images=8)
    options = Run(output=tmp_path, dataset="x")
    assert images_at_start(options, eight) == 8
    allowed = dataclasses.replace(options, allow_changed_data=True)
    assert steps_per_epoch(Recipe(batch_size=4), images_at_start(allowed, eight)) == 3
    new = dataclasses.replace(allowed, output=tmp_path / "new")
    assert images_at_start(new, eight) == 8


@pytest.mark.parametrize("data", [[], {"training": 12}, {"training": {"images": "12"}}])
def test_a_damaged_fingerprint_is_refused_by_its_file(tmp_path, data):
    claim_run(tmp_path, configuration() | {"data": {}})
    file = tmp_path / "config.json"
    file.write_text(json.dumps(configuration() | {"data": data}))
    with pytest.raises(ValueError, match=r"config\.json.*data|data.*config\.json"):
        read_configuration(file)
