"""The stages give the reference's results on the other backends too.

A backend is chosen before Keras is imported: the tests of the stages run again in a process of
their own.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import pytest

TESTS = Path(__file__).parent
STAGES = ("boxes", "nms", "proposals", "roi_align", "roi_pool", "detections", "matcher", "losses")
# JAX compiles each operation for each shape: of cases that differ in shapes alone a few are run.
SELECTION = {
    "jax": "(padded_batch and not detectron2) or not (test_reference or every_format"
    " or loops_at_other or format_of_the_caller or mixed or numbers_of_their_own or config_holds"
    " or gradient_of_adaptive or what_is_not_a_box or (test_roi_pool and any_shape and (4 or 15))"
    " or (textbook_loop and not 64-64) or (obvious and (20-25 or 5-3 or 0.4-10 or 0.999)))",
    "torch": "not TestGradients",
}


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="started from the TensorFlow backend only"
)
@pytest.mark.parametrize("backend", SELECTION)
def test_stages_and_detections_equal_the_reference(backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    files = [TESTS / f"test_{name}.py" for name in ("reference", *STAGES)]
    command = [sys.executable, "-m", "pytest", "-q", "-k", SELECTION[backend], *map(str, files)]
    environment = os.environ | {"KERAS_BACKEND": backend}
    run = subprocess.run(
        command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False
    )
    output = run.stdout + run.stderr
    assert run.returncode == 0, output
    assert re.search(r"[1-9]\d* passed", output), output
