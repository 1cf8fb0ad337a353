"""A fixed seed of `benchmarks/fuzz.py`, for about 20 core-seconds over all targets.

That is a smoke test of the suite; what it is for, `benchmarks/fuzz.py --minutes 20` does.
"""

from pathlib import Path

import keras
import pytest

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="files are read and models trained with it"
)

TRIES = {
    "coco_json": 50,
    "recipe": 12,
    "options": 6,
    "pickles": 150,
    "weights_h5": 12,
    "keras_file": 5,
    "images": 200,
    "saved_model": 25,
    "ground_truth": 3,
}


@pytest.fixture(scope="module")
def fuzz():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        import fuzz

        yield fuzz


def test_every_target_is_tried(fuzz):
    assert set(TRIES) == set(fuzz.TARGETS)


@pytest.mark.parametrize("target", TRIES)
def test_mutated_input_is_refused_in_one_sentence_or_has_a_verified_result(
    fuzz, target, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    report = fuzz.fuzz(target, tmp_path, tries=TRIES[target])
    assert not report.failures, "\n".join(report.failures)
