"""A live line for a training run, read from the run folder's metrics; plain lines when nobody looks at a terminal."""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.status import Status

from burnish.config import Recipe

PLAIN_SECONDS = 5.0
"""Seconds between plain lines."""


class ProgressLine:
    """Shows the newest metrics of a run on stderr each time it is called; stdout stays for results."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._console = Console(file=sys.stderr, highlight=False)
        self._status: Status | None = None
        self._printed = time.monotonic()
        self._shown = ""
        self._announced = False
        self._file, self._offset = 0, 0
        self._newest: dict[str, float] = {}
        self._first: tuple[int, float, float] | None = None

    def __enter__(self) -> "ProgressLine":
        if self._console.is_terminal:
            self._status = self._console.status(f"{self._recipe.name}: checking model, template and rows")
            self._status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._status is not None:
            self._status.stop()
        if self._shown and kind is None:
            self._print(self._shown)

    def __call__(self, folder: Path, facts: dict[str, Any]) -> None:
        """Reads the run folder and shows where the run stands; the first call says that workers are starting."""
        if not self._announced:
            self._announced = True
            self._announce()
        text = self._text(folder, facts["max_steps"])
        if text is None or text == self._shown:
            return
        self._shown = text
        if self._status is not None:
            self._status.update(text)
        elif time.monotonic() - self._printed >= PLAIN_SECONDS:
            self._print(text)
            self._printed = time.monotonic()

    def _announce(self) -> None:
        starting = f"{self._recipe.name}: starting, workers: {self._recipe.scale.num_workers}"
        if self._status is not None:
            self._status.update(starting)
        else:
            self._print(starting)

    def _text(self, folder: Path, max_steps: int | None) -> str | None:
        """One line of the newest metrics, or None before the first step."""
        newest = self._read(folder / "metrics.jsonl")
        if "train/loss" not in newest:
            return None
        step = int(newest["step"])
        share = max(newest["train/progress"], step / max_steps if max_steps else 0.0)
        self._first = self._first or (step, share, time.monotonic())
        parts = [
            f"{self._recipe.name}: step {step}",
            f"{share:.0%}",
            f"loss {newest['train/loss']:.3f}",
            f"lr {newest['train/learning_rate']:.2g}",
            f"grad norm {newest['train/grad_norm']:.2g}",
            f"{newest['train/tokens_per_second']:,.0f} tokens/s",
            f"data wait {newest['data/wait_share']:.0%}",
        ]
        if "eval/loss" in newest:
            parts.insert(3, f"eval loss {newest['eval/loss']:.3f}")
        first_step, first_share, first_time = self._first
        if step > first_step and first_share < share < 1:
            left = (time.monotonic() - first_time) * (1 - share) / (share - first_share)
            parts.append(f"about {left:.0f} s left")
        return "  ".join(parts)

    def _read(self, path: Path) -> dict[str, float]:
        """The newest value of every metric; only what was written since the last look is read."""
        try:
            with open(path, "rb") as file:
                state = os.fstat(file.fileno())
                # An attempt began with a new file, which may be longer by now than what was read of the old one.
                if state.st_ino != self._file or state.st_size < self._offset:
                    self._file, self._offset = state.st_ino, 0
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return self._newest
        complete, newline, _ = data.rpartition(b"\n")
        self._offset += len(complete + newline)
        for line in complete.splitlines():
            with suppress(ValueError):  # a display ends no run
                self._newest |= json.loads(line)
        return self._newest

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)
