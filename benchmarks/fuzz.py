"""Mutates everything that the package reads, and holds it to what it says about bad input.

    python benchmarks/fuzz.py --minutes 20
    python benchmarks/fuzz.py coco_json images --tries 1000 --seed 1
    python benchmarks/fuzz.py coco_json --first 417 --tries 1     # one try once more

Each try mutates valid input. It must be refused, by a ValueError, TypeError or FileNotFoundError
(a program: by its `error:`) in one sentence that names the file or the argument, or have a result
that is verified: that of the input as it was, or one that the target can tell to be right.
Anything else is a failure: another exception, a crash, NaN, weights changed by what was refused, a
try of more than 10 s of CPU time or 1 GB of memory. A failure is printed with its seed and number,
and what was read is kept in --failures.

Every target runs in a process of its own. Prints tries, refusals, results and peak memory of each;
the exit status is 1 if anything failed. tests/test_fuzz.py runs a few tries of each target.
"""

import argparse
import collections
import dataclasses
import faulthandler
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

from fuzz_targets import TARGETS, Refusal

LONGEST_TRY = 10.0  # Seconds of CPU time: the machine may be busy with other things.
MOST_MEMORY = 2**30
HANGS = 300  # Seconds after which a try is ended, with the traceback of where it was.


@dataclasses.dataclass
class Report:
    """What became of the tries of a target."""

    target: str
    tries: int = 0
    refusals: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    results: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    failures: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    slowest: float = 0.0
    growth: int = 0

    def __str__(self) -> str:
        kinds = len({*map(masked, self.refusals)})
        counts = [
            f"{self.refusals.total()} refused in {kinds} different sentences",
            *(f"{count} {result}" for result, count in sorted(self.results.items())),
            f"{len(self.failures)} failed",
        ]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return (
            f"{self.target}: {self.tries} tries in {self.seconds:.0f} s: {', '.join(counts)}; at "
            f"most {self.slowest:.2f} s and {self.growth / 2**20:.0f} MiB for one, "
            f"{peak / 2**10:.0f} MiB in all"
        )


def fuzz(
    target: str,
    folder: Path,
    seed: int = 0,
    tries: int | None = None,
    seconds: float = float("inf"),
    first: int = 0,
    failures: Path | None = None,
) -> Report:
    """Runs the tries of a target, in this process.

    Args:
        target: name in `fuzz_targets.TARGETS`.
        folder: a folder of its own.
        seed: together with the number of a try, all that it depends on.
        tries: their number; None for as many as the time allows.
        seconds: after which no further try begins.
        first: number of the first try.
        failures: folder for what failed; None for none.
    """
    os.chdir(folder)
    started = time.monotonic()
    attempt = TARGETS[target](folder)
    report = Report(target)
    while report.tries != tries and time.monotonic() - started < seconds:
        number = first + report.tries
        scratch = folder / "try"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        (folder / "number").write_text(str(number))
        before, begun = _forget_peak(), time.process_time()
        faulthandler.dump_traceback_later(HANGS, exit=True)
        try:
            report.results[attempt(random.Random(f"{seed} {number}"), scratch)] += 1
            failure = ""
        except Refusal as refusal:
            report.refusals[str(refusal)] += 1
            failure = ""
        except (Exception, SystemExit):
            failure = traceback.format_exc()
        finally:
            faulthandler.cancel_dump_traceback_later()
        spent, grown = time.process_time() - begun, _memory("VmHWM") - before
        if spent > LONGEST_TRY or grown > MOST_MEMORY:
            failure += f"It took {spent:.1f} s of CPU time and {grown / 2**20:.0f} MiB."
        if failure:
            name = f"{target}-{seed}-{number}"
            report.failures.append(f"{name}: {failure}")
            keep(failures, name, scratch, failure)
        report.tries += 1
        report.slowest, report.growth = max(report.slowest, spent), max(report.growth, grown)
    report.seconds = time.monotonic() - started
    return report


def grouped(failures: list[str]) -> list[tuple[int, str]]:
    """Counts failures of one last line, and shows the first of them."""
    groups = collections.defaultdict(list)
    for text in failures:
        groups[masked(text.strip().splitlines()[-1])].append(text)
    return [(len(texts), texts[0][:200] + " ... " + texts[0][-1500:]) for texts in groups.values()]


def masked(text: str) -> str:
    """A sentence without the values in it: what is quoted, or not of letters."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\S*[^\sA-Za-z.,;:`()]\S*", "_", text)


def keep(failures: Path | None, name: str, scratch: Path, failure: str) -> None:
    """Keeps what a failed try has read."""
    if failures is not None:
        shutil.copytree(scratch, failures / name, symlinks=True, dirs_exist_ok=True)
        (failures / name / "failure.txt").write_text(failure, errors="replace")


def _forget_peak() -> int:
    """Resets the process's peak of memory; returns the memory that it has."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(entry: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{entry}:\s+(\d+) kB", status)[1])


def _in_its_process(options: argparse.Namespace, target: str, folder: Path, seconds: float) -> None:
    # libjpeg prints a line for most damaged files.
    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT), 2)
    faulthandler.enable()
    report = fuzz(
        target,
        folder,
        options.seed,
        options.tries,
        seconds,
        options.first,
        options.failures.absolute(),
    )
    for count, text in grouped(report.failures):
        print(f"{text}\n({count} such failures)\n")
    print(report, flush=True)
    if options.sentences:
        print("\n".join(sorted(report.refusals)), flush=True)
    sys.exit(1 if report.failures else 0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--minutes", type=float, help="time of all targets together (default: 1)")
    parser.add_argument("--tries", type=int, help="number for each target, whatever time it takes")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--first", type=int, default=0, help="number of the first try")
    parser.add_argument(
        "--failures", type=Path, default=Path("fuzz_failures"), help="(default: fuzz_failures)"
    )
    parser.add_argument("--sentences", action="store_true", help="print all refusals")
    options = parser.parse_args()
    targets = options.targets or list(TARGETS)
    for name in targets:
        if name not in TARGETS:
            parser.error(f"TARGET must be among {', '.join(TARGETS)}; received {name!r}")
    seconds = float("inf")
    if options.minutes is not None or options.tries is None:
        seconds = 60 * (options.minutes or 1) / len(targets)
    failed = False
    for target in targets:
        with tempfile.TemporaryDirectory() as folder:
            process = multiprocessing.get_context("spawn").Process(
                target=_in_its_process, args=(options, target, Path(folder), seconds)
            )
            process.start()
            process.join()
            failed |= process.exitcode != 0
            if process.exitcode not in (0, 1):
                number = Path(folder, "number").read_text()
                printed = Path(folder, "stderr").read_text(errors="replace")
                failure = f"the process ended with {process.exitcode}: {printed[-3000:]}"
                name = f"{target}-{options.seed}-{number}"
                keep(options.failures, name, Path(folder, "try"), failure)
                print(f"{name}: {failure}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
