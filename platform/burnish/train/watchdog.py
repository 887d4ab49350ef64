"""Ends a worker that makes no step any more, after it wrote down where it stands, so that the run can start again."""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from burnish.errors import InfrastructureError
from burnish.train.home import Home
from burnish.train.ledger import lines, replace_text

EXIT_CODE = 70
"""What a worker ends with that the watchdog ended."""
_GRACE = 0.1
"""Share of the limit that a worker waits before it ends, so that the others can write down where they stand too."""
_NOTE_SECONDS = 60.0
"""Seconds in which a storage must have taken such a note."""
_COLLECTIVES = (
    "torch/distributed/",
    "deepspeed/comm/",
    "train/step.py summed",
    "zero/stage3.py independent_gradient_partition_epilogue",
    "zero/stage3.py __reduce_and_partition_ipg_grads",
    "zero/stage_1_and_2.py complete_grad_norm_calculation_for_cpu_offload",
    "zero/stage_1_and_2.py has_overflow",
)
"""Files, or functions in them, in which a worker waits for others; a GPU's collectives return before they are done."""
_FRAMES = 12
"""Innermost calls that tell what a worker is at; a collective is called from below a few of its own."""
_Item = TypeVar("_Item")


class Watchdog:
    """Watches the thread that made it, from its first `beat` on; after `seconds` without another, the process ends.

    A worker that hangs inside a library may hold Python's lock, so that its own watchdog cannot run; those of the workers
    that wait for it can.
    """

    def __init__(self, home: Home, world_rank: int, seconds: float) -> None:
        self._home, self._file, self._seconds = home, home.folder / f".hang-{world_rank:05d}.json", seconds
        self._about = {"world_rank": world_rank, "node": os.uname().nodename, "seconds": seconds}
        self._watched = threading.get_ident()
        self._beat: float | None = None
        threading.Thread(target=self._watch, daemon=True).start()

    def beat(self) -> None:
        """Says that the watched thread is alive."""
        self._beat = time.monotonic()

    def alive(self) -> None:
        """As `beat` for a thread that is watched now, and nothing for one that rests; any thread may call it."""
        if self._beat is not None:
            self._beat = time.monotonic()

    def rest(self) -> None:
        """Stops watching until the next beat."""
        self._beat = None

    def patient(self, items: Iterator[_Item]) -> Iterator[_Item]:
        """The same items; waiting for the next one is not watched."""
        while True:
            self.rest()
            item = next(items, None)
            self.beat()
            if item is None:
                return self.rest()
            yield item

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self._seconds / 10))
            beat = self._beat
            if beat is not None and time.monotonic() - beat > self._seconds:
                # In a thread, since what hangs may be the storage to which the note goes.
                note = threading.Thread(target=self._note, daemon=True)
                note.start()
                note.join(_NOTE_SECONDS)
                time.sleep(self._seconds * _GRACE)
                os._exit(EXIT_CODE)

    def _note(self) -> None:
        calls = traceback.extract_stack(sys._current_frames()[self._watched])[-_FRAMES:]
        within = [any(part in f"{call.filename} {call.name}" for part in _COLLECTIVES) for call in calls]
        inner = [call for call, waits in zip(calls, within, strict=True) if not waits]
        at = f"{inner[-1].filename}:{inner[-1].lineno} in {inner[-1].name}" if inner else "a collective"
        replace_text(self._file, json.dumps({**self._about, "waits": any(within), "at": at}) + "\n")
        with suppress(InfrastructureError):
            self._home.keep()


def hang(folder: Path, num_workers: int) -> str | None:
    """Which workers of a run hung, and where, or None where none did; what they wrote down is taken away."""
    notes = [note for path in sorted(folder.glob(".hang-*.json")) for note in lines(path)]
    for path in folder.glob(".hang-*.json"):
        path.unlink(missing_ok=True)
    if not notes:
        return None
    hung = [f"worker {note['world_rank']} on {note['node']} stood at {note['at']}" for note in notes if not note["waits"]]
    silent = sorted(set(range(num_workers)) - {note["world_rank"] for note in notes})
    hung += [f"worker {world_rank} said nothing, so its process hangs as a whole" for world_rank in silent]
    hung = hung or [f"every worker waited for the others, worker {note['world_rank']} at {note['at']}" for note in notes[:1]]
    return f"no step for {notes[0]['seconds']:.0f} s (scale.stall_seconds, and a quarter more): {'; '.join(hung)}"
