"""What `pip install` gives: a package that works with its core dependencies alone."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import keras_fpn

ROOT = Path(__file__).parents[1]
# What only training, evaluation and drawing are done with.
EXTRAS = (
    "tensorflow_datasets",
    "faster_coco_eval",
    "pycocotools",
    "matplotlib",
    "tqdm",
    "training",
)
# What training's programs import, and a user may lack.
TRAINING = ("tensorflow_datasets", "simple_parsing", "faster_coco_eval")


def python(code, path, *arguments):
    """What an interpreter prints that sees `path` in place of this repository."""
    code = f"import sys; sys.path.insert(0, {str(path)!r}); {code}"
    return subprocess.run(
        [sys.executable, "-I", "-c", code, *arguments], capture_output=True, text=True, cwd=path
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what the wheel of this checkout installs."""
    folder = tmp_path_factory.mktemp("wheel")
    # A build leaves files where it runs.
    checkout = folder / "checkout"
    shutil.copytree(ROOT / "keras_fpn", checkout / "keras_fpn")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, checkout],
        check=True,
        cwd=folder,
    )
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True, cwd=folder
    )
    return folder / "site"


def test_the_wheel_holds_every_module_and_no_other_package(installed):
    modules = {path.name for path in (ROOT / "keras_fpn").glob("*.py")}
    assert {path.name for path in (installed / "keras_fpn").glob("*.py")} == modules
    packages = {path.name for path in installed.iterdir()}
    assert {name for name in packages if not name.endswith(".dist-info")} == {"keras_fpn"}
    metadata = next(installed.glob("*.dist-info/METADATA")).read_text()
    assert f"Version: {keras_fpn.__version__}\n" in metadata
    wanted = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.MULTILINE)
    assert set(wanted) == {"keras", "tensorflow", "numpy", "h5py", "ml-dtypes"}


def test_the_installed_package_detects_and_imports_nothing_that_it_does_not_need(installed):
    """With every extra made impossible to import."""
    code = f"""
import importlib.abc, os
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {(*EXTRAS, "PIL")}:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import numpy, keras_fpn
assert keras_fpn.__file__.startswith({str(installed)!r}), keras_fpn.__file__
model = keras_fpn.build_fpn_faster_rcnn(num_classes=2, backbone="resnet18", pyramid_channels=8,
                                        head_hidden_dim=8, rpn_pre_nms=9, rpn_post_nms=9)
(found,) = keras_fpn.detect(model, numpy.zeros((40, 50, 3), "uint8"), shorter_edge=40)
print(keras_fpn.__version__, sorted(found))
"""
    run = python("exec(sys.argv[1])", installed, code)
    assert run.stdout == f"{keras_fpn.__version__} ['boxes', 'labels', 'scores']\n", run.stderr


def test_importing_it_imports_no_data_set_library_evaluator_or_plotting_library(installed):
    # Keras imports matplotlib by itself, where it is there.
    code = (
        "import keras; before = {*sys.modules}; import keras_fpn; print(*{*sys.modules} - before)"
    )
    run = python(code, installed)
    assert "keras_fpn.builder" in run.stdout.split(), run.stderr
    assert not set(EXTRAS) & set(run.stdout.split())


@pytest.mark.parametrize("program", ["train", "evaluate"])
def test_a_program_says_what_to_install(program):
    code = f"""
import importlib.util, runpy
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in {TRAINING} else find(name, *a)
sys.argv = ["{program}.py", "--help"]
runpy.run_path("training/{program}.py", run_name="__main__")
"""
    run = python("exec(sys.argv[1])", ROOT, code)
    assert run.returncode == 1
    assert run.stderr.startswith("error: tensorflow_datasets and ")
    assert "pip install '.[training]'" in run.stderr
