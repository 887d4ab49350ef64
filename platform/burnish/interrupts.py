"""Interrupts of a process that is used again: they wait until what cannot be repeated is done."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Lets a task that is cancelled end behind the block instead of within.

    Ray cancels a task by an interrupt of its process, and gives the process to the next task. An import that was broken
    off (of torch, of datasets) cannot always be repeated in the same process, so that every later task there would fail.
    """
    if threading.current_thread() is not threading.main_thread():  # where no interrupt arrives
        yield
        return
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupts:
        raise KeyboardInterrupt
