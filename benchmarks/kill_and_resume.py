r"""Kills a run at random, resumes it each time, and compares it with one left alone.

    python benchmarks/kill_and_resume.py --output /tmp/kills --kills 20
    python benchmarks/kill_and_resume.py --output /tmp/workers --kills 2 --workers 2
    python benchmarks/kill_and_resume.py --output /tmp/small --steps-per-execution 4 \
        --average-decay 0.99 --precision float16 --backbone resnet10 --resnet.width 16 \
        --pyramid.channels 16 --box-head.hidden-dim 32 --shorter-edges 64 --longest-edge 64 \
        --evaluation-shorter-edge 64 --validation-split "validation[:8]" --evaluate-every 2 \
        --batch-size 2 --images-per-epoch 160 --epochs 10 --checkpoint-steps 8

Two runs of the demo recipe train on the demo data set. One is left alone. The other is killed with
SIGKILL, half of the times at a random moment after its start and half of the times while it writes
a checkpoint, and resumed with the same command. With several workers, on loopback, one is killed,
and the time until the others end by themselves is measured. Finally every array of both last
checkpoints is compared bit for bit: weights, moving statistics, moving averages, momentum, loss
scale, step count and seeds. Unknown options are passed to `keras-fpn train`.
"""

import argparse
import contextlib
import io
import json
import os
import random
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, type=Path, help="new folder for data and runs")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--longest-life", type=float, default=60, help="seconds until a kill, at most (default: 60)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    options, of_training = parser.parse_known_args()
    options.output.mkdir(parents=True)
    data = options.output / "data"
    finish([start_program("-m", "keras_fpn.data.demo_dataset", "--data-dir", data)])
    command = [
        *("-c", "from keras_fpn.runs.command import main; main()", "train", "--recipe", "demo"),
        *("--dataset", "keras_fpn_shapes", "--data-dir", data),
        *("--verbose", "0", *of_training, "--output"),
    ]

    started = time.time()
    finish(start_workers(options.workers, *command, options.output / "alone"))
    print(f"undisturbed: {time.time() - started:.0f} s", flush=True)

    moments = random.Random(options.seed)
    killed = options.output / "killed"
    counts = {"at a random moment": 0, "while a checkpoint was written": 0}
    started = time.time()
    for number in range(options.kills):
        begun = time.time()
        processes = start_workers(options.workers, *command, killed)
        kind = list(counts)[number % 2]
        if kind == "at a random moment":
            end = begun + moments.uniform(0, options.longest_life)
            wait(processes, lambda end=end: time.time() > end)
        else:
            wait_for_writing(processes, killed, begun, moments.randint(1, 3))
            time.sleep(moments.uniform(0, 0.03))
        if any(process.poll() is not None for process in processes):
            print(f"the run ended after {number} kills")
            break
        # Worker 0 is the one that writes.
        victim = 0 if number % 2 else options.workers - 1
        processes[victim].kill()
        unfinished = unfinished_checkpoints(killed, begun)
        at = time.time()
        codes = [process.wait() for process in processes]
        others = ""
        if options.workers > 1:
            others = f" (worker {victim}; the others ended after {time.time() - at:.0f} s: {codes})"
        counts[kind] += 1
        last = max((file.name for file in killed.glob("checkpoints/step-*")), default="none")
        print(
            f"kill {number + 1} {kind}{others}; last whole checkpoint: {last}"
            f"{'; one left unfinished' if unfinished else ''}",
            flush=True,
        )
    finish(start_workers(options.workers, *command, killed))
    print(f"disturbed: {time.time() - started:.0f} s", flush=True)

    alone, disturbed = (last_checkpoint(options.output / name) for name in ("alone", "killed"))
    differing = [
        name
        for name in sorted(alone.keys() | disturbed.keys())
        if name not in alone
        or name not in disturbed
        or alone[name].tobytes() != disturbed[name].tobytes()
    ]
    print(
        f"{sum(counts.values())} SIGKILLs ("
        + ", ".join(f"{count} {kind}" for kind, count in counts.items())
        + f"): {len(alone) - len(differing)} of {len(alone)} arrays bit-identical"
    )
    sys.exit(f"different: {differing}" if differing else 0)


def start_program(*arguments: str | Path, tf_config: dict | None = None) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "TF_CONFIG"}
    if tf_config is not None:
        environment["TF_CONFIG"] = json.dumps(tf_config)
    return subprocess.Popen([sys.executable, *map(str, arguments)], env=environment)


def start_workers(number: int, *command: str | Path) -> list[subprocess.Popen]:
    """Starts one process, or the workers of a cluster on loopback."""
    if number == 1:
        return [start_program(*command)]
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    workers = [f"127.0.0.1:{server.getsockname()[1]}" for server in servers]
    for server in servers:
        server.close()
    return [
        start_program(
            *command,
            tf_config={"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}},
        )
        for index in range(number)
    ]


def finish(processes: list[subprocess.Popen]) -> None:
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit(f"a program ended with code {codes}")


def wait(processes: list[subprocess.Popen], is_time: Callable[[], bool]) -> None:
    """Waits until it is time, or one of the processes has ended."""
    while not is_time() and all(process.poll() is None for process in processes):
        time.sleep(0.001)


def wait_for_writing(
    processes: list[subprocess.Popen], run: Path, begun: float, number: int
) -> None:
    """Waits until the processes write their `number`-th checkpoint since a time."""
    seen = set()

    def is_time() -> bool:
        seen.update(file.name for file in unfinished_checkpoints(run, begun))
        return len(seen) >= number

    wait(processes, is_time)


def unfinished_checkpoints(run: Path, since: float) -> list[Path]:
    """Returns checkpoints begun after a time that do not have their final name yet."""
    found = []
    for file in run.glob("checkpoints/.partial-step-*"):
        # It may be renamed meanwhile.
        with contextlib.suppress(FileNotFoundError):
            if file.stat().st_mtime >= since:
                found.append(file)
    return found


def last_checkpoint(run: Path) -> dict[str, np.ndarray]:
    """Returns every array of a run's last checkpoint by its name."""
    file = max(run.glob("checkpoints/step-*.keras"))
    arrays = {}
    with zipfile.ZipFile(file) as archive:
        content = io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(content) as weights:
        weights.visititems(
            lambda name, item: (
                arrays.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None
            )
        )
    return arrays


if __name__ == "__main__":
    main()
