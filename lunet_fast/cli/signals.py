"""SIGINT and SIGTERM while a command trains."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lunet_fast.training.loop import Stop


class Signals(Stop):
    """A :class:`Stop` that signals ask; ``last`` is the number of the last one."""

    last = int(signal.SIGINT)

    @property
    def exit_code(self) -> int:
        """Of a process that ends because of it, as shells have it."""
        return 128 + self.last


@contextmanager
def heard() -> Iterator[Signals]:
    """Inside, SIGINT and SIGTERM ask the training to stop after its step.

    A second one, or one while nothing is trained, interrupts at once: ``KeyboardInterrupt``.
    """
    stop = Signals()

    def hear(number: int, frame: FrameType | None) -> None:
        stop.last = number
        if not stop.ask():
            raise KeyboardInterrupt

    former = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
