"""What failures cost a run: its attempts, the steps that were lost, the time to recover, and the share of time that trained.

attempts.jsonl   {"event": "start", "time": t, "workers": n, "from_step": s, "lost_steps": n}
                 {"event": "end", "time": t, "why": "finished", "recover_seconds": x}
"""

import time
from pathlib import Path
from statistics import fmean
from typing import Any

from burnish.train.ledger import append, lines

_FILE = "attempts.jsonl"


def begin(folder: Path, from_step: int, workers: int, since: float) -> None:
    """Notes that an attempt starts behind a step; an earlier one that nobody ended was killed with its command.

    `since` is when it began to wait for its workers, in seconds since 1970.
    """
    noted = list(lines(folder / _FILE))
    if noted and noted[-1]["event"] == "start":
        at = max([noted[-1]["time"], *(line["time"] for line in lines(folder / "metrics.jsonl"))])
        append(folder / _FILE, {"event": "end", "time": at, "why": "the command was killed", "recover_seconds": None})
    reached = max((line["step"] for line in lines(folder / "ledger.jsonl")), default=0)
    lost = max(0, reached - from_step)
    start = {"event": "start", "time": since, "workers": workers, "from_step": from_step, "lost_steps": lost}
    append(folder / _FILE, start)


def end(folder: Path, why: str) -> None:
    """Notes why the attempt ended, and how long it took from the loss before it to its first step."""
    noted = list(lines(folder / _FILE))
    if not noted:  # the folder is gone
        return
    start, before = noted[-1], noted[-2] if len(noted) > 1 else None
    recover = None
    if before is not None and before["why"].startswith("lost"):
        first = (line["time"] for line in lines(folder / "metrics.jsonl") if line["step"] > start["from_step"])
        recover = next((at - before["time"] for at in first if at > before["time"]), None)
    append(folder / _FILE, {"event": "end", "time": time.time(), "why": why, "recover_seconds": recover})


def account(folder: Path) -> dict[str, float]:
    """Restarts, lost steps, mean seconds to recover, and goodput of a run so far.

    Goodput is the time in steps that count over the time of all attempts (ETTR, ByteRobust, arXiv 2509.16293).
    """
    noted: list[dict[str, Any]] = list(lines(folder / _FILE))
    starts, ends = ([line for line in noted if line["event"] == event] for event in ("start", "end"))
    wall = sum(last["time"] - first["time"] for first, last in zip(starts, ends, strict=False))
    productive = sum(line.get("train/step_seconds", 0.0) for line in lines(folder / "metrics.jsonl"))
    recoveries = [line["recover_seconds"] for line in ends if line["recover_seconds"] is not None]
    found = {"run/restarts": float(max(0, len(starts) - 1)), "run/lost_steps": float(sum(s["lost_steps"] for s in starts))}
    if recoveries:
        found["run/recover_seconds"] = fmean(recoveries)
    return {**found, **({"run/goodput": productive / wall} if wall > 0 else {})}
