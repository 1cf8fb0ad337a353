"""Several workers on loopback, and two devices, train and evaluate as one process does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(__file__).with_name("distributed_program.py")


def start(workers: int, *arguments: str) -> list[subprocess.Popen]:
    """Starts the program in as many processes as there are workers; 0 is a single process."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(workers)]
    addresses = [f"127.0.0.1:{server.getsockname()[1]}" for server in sockets]
    for server in sockets:
        server.close()
    processes = []
    for index in range(max(workers, 1)):
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "2"}
        environment.pop("TF_CONFIG", None)
        if workers:
            task = {"type": "worker", "index": index}
            environment["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
        processes.append(
            subprocess.Popen(
                [sys.executable, PROGRAM, *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes


def finish(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-3000:]


@pytest.fixture(scope="module")
def one(request, tmp_path_factory):
    """The optimizer, and the results of one process with it."""
    file = tmp_path_factory.mktemp("one") / "one.npz"
    finish(start(0, "--output", str(file), "--optimizer", request.param))
    return request.param, np.load(file)


@pytest.mark.parametrize(
    ("one", "workers", "devices"),
    [
        pytest.param("plain", 2, 1, id="2 workers"),
        pytest.param("plain", 3, 1, id="3 workers", marks=pytest.mark.acceptance),
        pytest.param("plain", 0, 2, id="2 devices", marks=pytest.mark.acceptance),
        pytest.param("scaled", 2, 1, id="2 workers, scaled", marks=pytest.mark.acceptance),
        pytest.param("scaled", 0, 2, id="2 devices, scaled", marks=pytest.mark.acceptance),
    ],
    indirect=["one"],
)
def test_it_equals_one_process(one, workers, devices, tmp_path):
    optimizer, one = one
    file = tmp_path / "several.npz"
    arguments = ("--output", str(file), "--optimizer", optimizer, "--devices", str(devices))
    finish(start(workers, *arguments))
    several = np.load(file)
    assert set(several.files) == set(one.files)
    weights = [name for name in one.files if name.startswith("weight")]
    assert len(weights) > 20
    for name in weights:
        np.testing.assert_allclose(several[name], one[name], rtol=0, atol=1e-5, err_msg=name)
    # The weights moved by far more than the tolerance.
    assert max(np.abs(one[f"before{name}"] - one[name]).max() for name in weights) > 1e-2
    np.testing.assert_array_equal(several["loss_scale"], one["loss_scale"])
    if optimizer == "scaled":
        # Some steps were skipped, but not all.
        assert 2.0**107 < one["loss_scale"] < 2.0**127
    assert one["losses"].shape == (12, 4)
    np.testing.assert_allclose(several["losses"], one["losses"], rtol=1e-4, atol=1e-6)
    assert_subclasses_are_honored(one, several)
    # Seven images: neither two nor three divide them.
    np.testing.assert_array_equal(several["evaluated_ids"], one["evaluated_ids"])
    assert set(one["evaluated_ids"]) == set(range(10, 80, 10))
    np.testing.assert_array_equal(several["AP"], one["AP"])
    assert 0 < one["AP"][0] < 1


def assert_subclasses_are_honored(one, several):
    """A model's own losses, step and loss weights have the same effect in both."""
    changes = {name: one[name] for name in one.files if name.startswith("change of ")}
    assert len(changes) == 3
    for name, change in changes.items():
        np.testing.assert_allclose(several[name], change, rtol=0, atol=1e-5, err_msg=name)
    plain, weighted, doubled = changes.values()
    assert np.abs(plain).max() > 1e-2
    assert np.abs(weighted - plain).max() > 5e-5  # Five times the tolerance above.
    # The box loss, then the whole loss.
    np.testing.assert_allclose(doubled, 2 * weighted, rtol=0, atol=1e-5)
