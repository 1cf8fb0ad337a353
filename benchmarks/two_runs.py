"""Starts two processes on one output folder, again and again, and kills the one that trains.

    python benchmarks/two_runs.py --output /tmp/two --times 20

Each time, two `keras-fpn train` start at once with the same new `--output`. One must train; the
other must end with one sentence that names it. Then the first is killed with SIGKILL, and a third
on the same folder must train. Prints a line each time, and fails at the first that is otherwise.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, type=Path, help="new folder for data and runs")
    parser.add_argument("--times", type=int, default=20)
    options = parser.parse_args()
    options.output.mkdir(parents=True)
    data = options.output / "data"
    subprocess.run(
        [sys.executable, "-m", "keras_fpn.data.demo_dataset", "--data-dir", data], check=True
    )
    for number in range(1, options.times + 1):
        folder = options.output / f"run-{number}"
        both = [Program(data, folder, f"{number}-{name}.log") for name in "ab"]
        trains, refused = sorted(both, key=lambda program: program.outcome() != "trains")
        begun = time.time()
        check(trains.outcome() == "trains", trains)
        check(refused.outcome() == "ended", refused)
        check(refused.process.returncode == 1, refused)
        errors = re.findall(r"^error: .*", refused.printed(), re.MULTILINE)
        check(len(errors) == 1 and f"process {trains.process.pid} " in errors[0], refused)
        check("Traceback" not in refused.printed(), refused)
        trains.kill()
        third = Program(data, folder, f"{number}-c.log")
        check(third.outcome() == "trains", third)
        third.kill()
        print(
            f"{number}: one trained, one was refused ({errors[0]}); after a SIGKILL a third "
            f"trained ({time.time() - begun:.0f} s)",
            flush=True,
        )
    print(f"{options.times} times: one trains, one says why not, the next can start")


class Program:
    """A process of `keras-fpn train` with its output in a file."""

    def __init__(self, data: Path, folder: Path, log: str):
        self.log = data.parent / log
        command = [
            *(sys.executable, "-c", "from keras_fpn.runs.command import main; main()", "train"),
            *("--recipe", "demo", "--dataset", "keras_fpn_shapes", "--data-dir", data),
            *("--verbose", "0", "--output", folder),
        ]
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)

    def printed(self) -> str:
        return self.log.read_text()

    def outcome(self) -> str:
        """Waits until the program trains or has ended."""
        while self.process.poll() is None:
            if f"writing to {self.process.args[-1]}" in self.printed():
                return "trains"
            time.sleep(0.1)
        return "ended"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def check(condition: bool, program: Program) -> None:
    if not condition:
        sys.exit(f"{program.log} is not as expected:\n{program.printed()}")


if __name__ == "__main__":
    main()
