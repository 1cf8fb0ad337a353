"""What `pip install` gives: a package that needs only its core dependencies, and a command."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import keras_fpn
from keras_fpn.runs.command import PROGRAMS

ROOT = Path(__file__).parents[1]
# Modules of the extras, which only programs and drawing need.
EXTRAS = (
    "tensorflow_datasets",
    "importlib_resources",
    "tyro",
    "faster_coco_eval",
    "pycocotools",
    "matplotlib",
    "tensorboard",
    "PIL",
    "tqdm",
)
REFUSE_EXTRAS = f"""
import importlib.abc, importlib.util, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXTRAS}:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in {EXTRAS} else find(name, *a)
"""


def python(code, path, *arguments):
    """Runs an interpreter that finds `path` in place of this repository."""
    code = f"import sys; sys.path.insert(0, {str(path)!r}); {code}"
    return subprocess.run(
        [sys.executable, "-I", "-c", code, *arguments], capture_output=True, text=True, cwd=path
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the installed wheel of this checkout."""
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


def files(root):
    return {
        str(path.relative_to(root)) for path in root.rglob("*") if "__pycache__" not in str(path)
    }


def test_the_wheel_holds_every_module_and_no_other_package(installed):
    assert files(installed / "keras_fpn") == files(ROOT / "keras_fpn")
    assert "py.typed" in files(installed / "keras_fpn")
    assert "runs/train.py" in files(installed / "keras_fpn")
    packages = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert packages == {"keras_fpn", "bin"}
    assert {path.name for path in (installed / "bin").iterdir()} == {"keras-fpn"}
    metadata = next(installed.glob("*.dist-info/METADATA")).read_text()
    assert f"Version: {keras_fpn.__version__}\n" in metadata
    required = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.MULTILINE)
    assert set(required) == {"keras", "tensorflow", "numpy", "h5py", "ml-dtypes"}
    extras = re.findall(r"^Provides-Extra: (\w+)$", metadata, re.MULTILINE)
    assert set(extras) == {"gpu", "training", "export", "test"}


def test_the_installed_package_detects_and_imports_nothing_that_it_does_not_need(installed):
    """With every extra made impossible to import."""
    code = f"""
{REFUSE_EXTRAS}
import numpy, keras_fpn
assert keras_fpn.__file__.startswith({str(installed)!r}), keras_fpn.__file__
model = keras_fpn.build_fpn_faster_rcnn(
    num_classes=2, backbone="resnet18", pyramid={{"channels": 8}}, box_head={{"hidden_dim": 8}},
    proposals={{"pre_nms": 9, "post_nms": 9}})
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


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_says_what_to_install(installed, program):
    code = f"""{REFUSE_EXTRAS}
sys.argv = ["keras-fpn"]
from keras_fpn.runs.command import main
main([{program!r}])
"""
    run = python("exec(sys.argv[1])", installed, code)
    assert run.returncode == 1
    assert run.stderr.startswith("error: tyro ")
    assert all(module in run.stderr for module in PROGRAMS[program][1])
    assert "pip install 'keras-fpn[training]'" in run.stderr


def command(installed, *arguments):
    """Runs `keras-fpn`, and prints which of the slow libraries it imported."""
    code = f"""
import atexit, sys
sys.argv = ["keras-fpn"]
slow = {{"keras", "tensorflow", "tensorflow_datasets", "jax", "matplotlib"}}
atexit.register(lambda: print("IMPORTED", slow & set(sys.modules)))
from keras_fpn.runs.command import main
main({list(arguments)})
"""
    return python("exec(sys.argv[1])", installed, code)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_comes_before_keras_is_imported(installed, program):
    run = command(installed, program, "--help")
    assert run.returncode == 0, run.stderr
    assert f"usage: keras-fpn {program}" in run.stdout
    assert run.stdout.endswith("IMPORTED set()\n")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "--dataset=x", "--output=y", "--epochs", "many"], "many"),
        (["train", "--dataset=x", "--output=y", "--proposals.post-nmss", "3"], "post-nmss"),
        (["predict", "a.jpg", "--model=x"], "--output"),
        (["tran"], "tran"),
        ([], "PROGRAM"),
    ],
)
def test_a_typing_error_is_answered_before_keras_is_imported(installed, arguments, named):
    run = command(installed, *arguments)
    assert run.returncode == 2
    assert named in run.stdout + run.stderr
    assert run.stdout.endswith("IMPORTED set()\n")


def test_a_checkout_has_the_same_programs():
    assert {path.stem for path in (ROOT / "training").glob("*.py")} == set(PROGRAMS)
    run = subprocess.run(
        [sys.executable, ROOT / "training" / "export.py", "--help"], capture_output=True, text=True
    )
    assert "usage: keras-fpn export" in run.stdout


def test_help_lists_the_programs(installed):
    run = command(installed, "--help")
    assert all(program in run.stdout for program in PROGRAMS)
    assert run.stdout.endswith("IMPORTED set()\n")
