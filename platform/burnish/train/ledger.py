"""The run's own records, written by world rank 0: what each step trained, what was refused, what was measured.

    ledger.jsonl     {"step": t, "packs": [[epoch, window, index], ...], "tokens": n, "trained_tokens": n, "loss": x}
    refused.jsonl    {"row": "path#index", "code": ..., "turn": ..., "message": ...}
    metrics.jsonl    {"step": t, "time": seconds since 1970, "train/loss": x, ...}
    generations.jsonl   {"step": t, "row": "path#index", "prompt": ..., "reference": ..., "answer": ..., "stopped": true}

Steps count from 1. Each step stands once: after a resume, lines of steps that the checkpoint does not hold are gone
before they are written again.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from burnish import storage
from burnish.data.order import StepMeta
from burnish.data.quality import LEFT_OUT
from burnish.errors import DataError, InfrastructureError


@dataclass
class Ledger:
    """Append-only records of one run, open for writing; `seen` are the rows that were refused so far."""

    folder: Path
    seen: dict[str, str]
    max_refused_rows: float
    reasons: str
    """What a person would write to name the file of refused rows."""
    alive: Callable[[], None] | None = None
    """Called while the storage is waited for."""

    @classmethod
    def open(
        cls,
        folder: Path,
        step: int,
        max_refused_rows: float,
        reasons: str = "refused.jsonl",
        alive: Callable[[], None] | None = None,
    ) -> "Ledger":
        """The records of a run that goes on after `step`; lines of later steps and torn lines are removed."""
        for name in ("ledger.jsonl", "metrics.jsonl", "generations.jsonl"):
            kept = [line for line in lines(folder / name) if line["step"] <= step]
            # A run that begins anew may be asked other questions, or ask another model.
            _rewrite(folder / name, kept if step or name != "generations.jsonl" else [])
        refused = list(lines(folder / "refused.jsonl")) if step else []
        _rewrite(folder / "refused.jsonl", refused)
        return cls(folder, {line["row"]: line["code"] for line in refused}, max_refused_rows, reasons, alive)

    def record(self, step: int, meta: StepMeta, loss: float, metrics: dict[str, float]) -> None:
        """Appends one step to all records. Raises DataError when more rows are refused than the recipe allows."""
        entry = {
            "step": step,
            "packs": meta.packs,
            "tokens": meta.tokens,
            "trained_tokens": meta.trained_tokens,
            "loss": loss,
        }
        self.refuse(meta.refused)
        append(self.folder / "ledger.jsonl", entry, self.alive)
        self.measure(step, {**metrics, **(self.refused() if meta.refused else {})})

    def measure(self, step: int, metrics: dict[str, float]) -> None:
        """Appends measurements of a step, and when they were made."""
        append(self.folder / "metrics.jsonl", {"step": step, "time": time.time(), **metrics}, self.alive)

    def generate(self, step: int, answers: list[dict[str, Any]]) -> None:
        """Appends what the model answered after a step, unless an attempt before has noted it."""
        noted = {(line["step"], line["row"]) for line in lines(self.folder / "generations.jsonl")}
        for answer in answers:
            if (step, answer["row"]) not in noted:
                append(self.folder / "generations.jsonl", {"step": step, **answer}, self.alive)

    def refuse(self, refusals: tuple[dict[str, Any], ...]) -> None:
        """Appends rows that were refused for the first time in this run."""
        for refusal in refusals:
            if refusal["row"] not in self.seen:
                self.seen[refusal["row"]] = refusal["code"]
                append(self.folder / "refused.jsonl", refusal, self.alive)
        check_refused(Counter(self.seen.values()), self.max_refused_rows, self.reasons)

    def refused(self) -> dict[str, float]:
        """Rows refused so far, by code, as metrics."""
        return {f"data/refused/{code}": float(count) for code, count in Counter(self.seen.values()).items()}


def append(path: Path, entry: dict[str, Any], alive: Callable[[], None] | None = None) -> None:
    """Appends a line to a JSONL file, or nothing. A storage that fails for a while is waited for, with calls of `alive`.

    Raises InfrastructureError where it is full, or fails for `storage.RETRY_SECONDS`.
    """
    line = (json.dumps(entry, ensure_ascii=False) + "\n").encode()
    try:
        for attempt in storage.attempts(f"{path.name} could not be written", alive):
            with attempt:
                _append(path, line)
    except OSError as error:
        raise InfrastructureError(f"{path}: cannot be written: {error}; the same command may go on") from error


def _append(path: Path, line: bytes) -> None:
    with open(path, "ab", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        try:
            written = file.write(line)
            while written < len(line):
                written += file.write(line[written:])
        except OSError:
            with suppress(OSError):
                file.truncate(end)  # the next attempt would stand behind half a line
            raise


def check_refused(codes: "Counter[str]", max_refused_rows: float, where: str) -> None:
    """Raises DataError where more rows are refused than allowed; rows that the recipe leaves out on purpose do not count."""
    count = sum(number for code, number in codes.items() if code not in LEFT_OUT)
    if count > max_refused_rows:
        shown = ", ".join(f"{code}: {number}" for code, number in codes.most_common())
        raise DataError(
            f"{count} rows were refused, more than the {max_refused_rows:g} that data.max_refused allows ({shown}). "
            f"The reasons stand in {where}; mend the rows, or raise data.max_refused to train without them"
        )


def lines(path: Path) -> Iterator[Any]:
    """The objects of a JSONL file that may be missing or end in a torn line."""
    try:
        with open(path) as file:
            yield from _parsed(file)
    except FileNotFoundError:
        return


def _parsed(file: IO[str]) -> Iterator[Any]:
    for line in file:
        try:
            yield json.loads(line)
        except ValueError:
            return


def replace_text(path: Path, text: str) -> None:
    """Replaces a file in one step, so that a crash leaves the old or the new one."""
    unfinished = path.with_name(f".{path.name}.partial")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def _rewrite(path: Path, entries: list[Any]) -> None:
    replace_text(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
