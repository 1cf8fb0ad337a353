"""SIGTERM and Ctrl-C: the run saves a checkpoint and ends."""

import os
import signal
import sys
import threading

from keras_fpn.runs.command import counted

GRACE_SECONDS = 25


class Interrupted(Exception):
    """The run was stopped by a signal, and its checkpoint is written."""

    def __init__(self, signal_number: int, steps: int):
        self.signal_number = signal_number
        super().__init__(
            f"Stopped by {signal.Signals(signal_number).name} after {counted(steps, 'step')}, all "
            "saved; rerun the same command to resume."
        )


class StopSignal:
    """Context manager that records SIGTERM and SIGINT; a second SIGINT ends at once.

    If a step or an evaluation takes longer than `GRACE_SECONDS`, the program ends without waiting
    for it; the last checkpoint is complete.

    Attributes:
        received: number of the signal, 0 before it is received.
    """

    def __init__(self):
        self.received = 0

    def __enter__(self) -> "StopSignal":
        # Python calls a handler between two of its own instructions, not inside a long operation
        # of TensorFlow; the byte of the wakeup file descriptor arrives at once.
        self._ended = threading.Event()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._before = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._writer)

    def _receive(self, number: int, frame) -> None:
        del frame
        if self.received and number == signal.SIGINT:
            os._exit(128 + number)
        self.received = number

    def _watch(self) -> None:
        number = 0
        while number not in (signal.SIGTERM, signal.SIGINT):
            byte = os.read(self._reader, 1)
            if not byte:
                os.close(self._reader)
                return
            number = byte[0]
        if not self._ended.wait(GRACE_SECONDS):
            self._give_up(number)

    def _give_up(self, number: int) -> None:
        print(
            f"\nStopped by {signal.Signals(number).name}: the step did not end in "
            f"{GRACE_SECONDS} s; rerun the same command to resume from the last checkpoint.",
            flush=True,
        )
        sys.stdout.flush()
        os._exit(128 + number)
