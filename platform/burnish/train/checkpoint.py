"""Checkpoints that are whole or absent, found again after any crash, and written while training goes on.

    checkpoints/step-00000050/
        weights.safetensors     the trained weights, gathered: all of them, or the adapter
        optimizer/              float32 masters and moments, each worker's part in a file, for any number of workers
        contract.json           the template contract of the run
        manifest.json           written last: step, cursor, workers, contract, metrics, size and sha256 of every file

A folder is written under a hidden name and renamed when its manifest stands. Nothing is loaded that its manifest does
not vouch for.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, TypeAlias

import ray.train
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential

from burnish.data.order import Cursor
from burnish.errors import InfrastructureError, one_line
from burnish.train.attempt import Progress
from burnish.train.ledger import replace_text

WEIGHTS = "weights.safetensors"
"""The file of a checkpoint with the trained weights."""
OPTIMIZER = "optimizer"
"""The folder of a checkpoint with the state of the optimizer."""
RETRY_SECONDS = 300.0
"""How long a write is tried again where the storage fails in a way that may pass."""
_FINAL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""Answers of a storage that waiting does not change."""

logger = logging.getLogger(__name__)

Files: TypeAlias = dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]]
"""What one worker writes of a checkpoint: tensors in the host's memory and metadata, by the path of a safetensors file."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder: every file was found with the size and sha256 of the manifest."""

    path: Path
    progress: Progress
    num_workers: int
    behaviour_sha256: str


@dataclass(frozen=True)
class Place:
    """Where and how an attempt writes its checkpoints; `attempt` keeps what an earlier one left apart."""

    run_folder: Path
    attempt: str
    keep: int
    best: str | None
    behaviour_sha256: str

    @property
    def folder(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.run_folder / "checkpoints"


class Writer:
    """Writes one worker's files of each checkpoint in a thread, at most one checkpoint at a time.

    Every worker has one and calls it at the same steps. World rank 0 waits for the files of all and makes the checkpoint of
    them. A storage that fails is tried again for `RETRY_SECONDS`, while training goes on; a checkpoint that could not be
    written raises InfrastructureError from the next call, and the ones before it are untouched.
    """

    def __init__(self, place: Place, world_rank: int, num_workers: int) -> None:
        self._place, self._rank, self._num_workers = place, world_rank, num_workers
        self._pending: Future[None] = Future()
        self._pending.set_result(None)

    def write(self, progress: Progress, metrics: dict[str, float], files: Files) -> None:
        """Begins the checkpoint of a step when the one before is written; `files` belong to the writer from then on."""
        self.wait()
        self._pending = _begun(partial(self._write, progress, metrics, files))

    def measure(self, progress: Progress, metrics: dict[str, float]) -> None:
        """Adds metrics to the checkpoint of a step that was just begun, when it is written."""
        self.wait()
        if self._rank == 0:
            path = self._place.folder / f"step-{progress.step:08d}" / "manifest.json"
            manifest = json.loads(path.read_text())
            replace_text(path, json.dumps({**manifest, "metrics": {**manifest["metrics"], **metrics}}, indent=2))
            _keep(self._place)

    def check(self) -> None:
        """Raises what the last write has raised by now; never waits."""
        if self._pending.done():
            self._pending.result()

    def wait(self) -> None:
        """Returns when the last write stands; raises what it raised."""
        self._pending.result()

    def _write(self, progress: Progress, metrics: dict[str, float], files: Files) -> None:
        name = f"step-{progress.step:08d}"
        unfinished = self._place.folder / f".{name}.{self._place.attempt}.partial"
        try:
            for attempt in Retrying(
                retry=retry_if_exception(_may_pass),
                wait=wait_exponential(multiplier=0.5, max=30),
                stop=stop_after_delay(RETRY_SECONDS),
                before_sleep=_say,
                reraise=True,
            ):
                with attempt:
                    _write_part(unfinished, self._rank, files)
                    if self._rank == 0:
                        self._publish(unfinished, progress, metrics)
                        final = self._place.folder / name
                        shutil.rmtree(final, ignore_errors=True)
                        os.replace(unfinished, final)
            if self._rank == 0:
                _keep(self._place)
        except (OSError, SafetensorError) as error:
            folder = self._place.folder
            free = f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB free" if folder.exists() else "which is gone"
            raise InfrastructureError(
                f"the checkpoint of step {progress.step} could not be written to {folder} ({free}): "
                f"{one_line(error)}. Make room; the same command goes on from the checkpoint before"
            ) from error

    def _publish(self, unfinished: Path, progress: Progress, metrics: dict[str, float]) -> None:
        """Writes the manifest, when the parts of all workers stand."""
        shutil.copy(self._place.run_folder / "contract.json", unfinished)
        files = {"contract.json": _described(unfinished / "contract.json")}
        for rank in range(self._num_workers):
            marker = unfinished / f".part-{rank:05d}.json"
            while not marker.exists():
                unfinished.stat()  # raises where the storage is gone
                time.sleep(0.02)
            files |= json.loads(marker.read_text())
        manifest: dict[str, Any] = {
            "step": progress.step,
            "cursor": asdict(progress.cursor),
            "num_workers": self._num_workers,
            "behaviour_sha256": self._place.behaviour_sha256,
            "metrics": metrics,
            "files": files,
        }
        with open(unfinished / "manifest.json", "w") as file:
            json.dump(manifest, file, indent=2)
            file.flush()
            os.fsync(file.fileno())


def report(metrics: dict[str, float]) -> None:
    """Tells Ray Train (and Tune, through it) where the run stands. A barrier: every worker calls it."""
    ray.train.report(metrics)


def clear(folder: Path) -> None:
    """Removes what earlier attempts left unfinished; called where no worker writes."""
    for unfinished in folder.glob(".step-*.partial"):
        shutil.rmtree(unfinished, ignore_errors=True)


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that its manifest vouches for, or None. Broken ones are set aside as `.broken-step-...`."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        found = verify(path)
        if found is not None:
            return found
        aside = path.with_name(f".broken-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    return None


def best(folder: Path, metric: str) -> tuple[Path, float] | None:
    """The checkpoint with the smallest value of a metric and that value, by the manifests alone; None where none has it."""
    found: list[tuple[float, Path]] = []
    for path in folder.glob("step-*"):
        try:
            found.append((float(json.loads((path / "manifest.json").read_text())["metrics"][metric]), path))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    if not found:
        return None
    value, path = min(found)
    return path, value


def verify(path: Path) -> Checkpoint | None:
    """The checkpoint in a folder, or None unless each of its files has the size and sha256 that the manifest says.

    None too where the manifest does not name the weights or a file that is there, or where one lies outside of the folder.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        there = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() and file.name[0] != "."}
        if WEIGHTS not in manifest["files"] or there - {"manifest.json"} - set(manifest["files"]):
            return None
        for name, entry in manifest["files"].items():
            file = path / name
            if not file.resolve().is_relative_to(path.resolve()) or _described(file) != entry:
                return None
        progress = Progress(manifest["step"], Cursor(**manifest["cursor"]))
        return Checkpoint(path, progress, manifest["num_workers"], manifest["behaviour_sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_files(folder: Path, files: Files) -> None:
    """Writes one worker's files of a checkpoint below a folder. Raises OSError or SafetensorError."""
    for name, (tensors, metadata) in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / name, metadata={"format": "pt", **metadata})


def _write_part(unfinished: Path, rank: int, files: Files) -> None:
    """Writes one worker's files, and then what they are, so that world rank 0 knows that they stand."""
    marker = unfinished / f".part-{rank:05d}.json"
    if marker.exists():
        return
    # Not the folder of the checkpoints itself: a mount that is gone must not be written beside.
    unfinished.mkdir(exist_ok=True)
    write_files(unfinished, files)
    replace_text(marker, json.dumps({name: _described(unfinished / name) for name in files}))


def _keep(place: Place) -> None:
    """Removes all but the newest checkpoints and the best one; what cannot be removed now is removed the next time."""
    paths = sorted(place.folder.glob("step-*"))
    leader = best(place.folder, place.best) if place.best else None
    for old in paths[: -place.keep]:
        if leader is None or old != leader[0]:
            gone = old.with_name(f".{old.name}.gone.partial")
            with suppress(OSError):
                old.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
    for marker in paths[-1].glob(".part-*.json"):
        marker.unlink(missing_ok=True)


def _described(file: Path) -> dict[str, Any]:
    with open(file, "rb") as stream:
        return {"bytes": os.fstat(stream.fileno()).st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _begun(work: Callable[[], None]) -> "Future[None]":
    """The work in a thread that does not hold up the end of the process."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def _may_pass(error: BaseException) -> bool:
    """Whether a storage that failed so may work again by itself."""
    if isinstance(error, SafetensorError):
        found = re.search(r"os error (\d+)", str(error))
        return found is not None and int(found[1]) not in _FINAL
    return isinstance(error, OSError) and error.errno not in _FINAL


def _say(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    logger.warning("a checkpoint could not be written yet, trying again: %s", one_line(error) if error else "")
