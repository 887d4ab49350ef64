"""Checkpoints are written while training goes on, each whole or not at all.

A folder is written under a hidden name and renamed when its manifest stands; on a remote file system every worker uploads
its files, and the manifest, which comes last, makes the checkpoint.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeAlias
from weakref import finalize

import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from burnish import storage
from burnish.errors import InfrastructureError, TrainingError, one_line
from burnish.train.attempt import Progress
from burnish.train.checkpoint import WEIGHTS, Files, best, name_of
from burnish.train.home import Home
from burnish.train.ledger import replace_text
from burnish.train.model import is_finite
from burnish.train.shelf import MANIFEST

_Order: TypeAlias = "tuple[Callable[[], None], Future[None]]"
"""Work for the thread of a writer, and what is told when it is done."""


@dataclass(frozen=True)
class Place:
    """Where and how an attempt writes its checkpoints; `attempt` keeps what an earlier one left apart."""

    home: Home
    attempt: str
    keep: int
    best: str | None
    behaviour_sha256: str

    def unfinished(self, step: int) -> Path:
        """The folder in which a worker puts its files of a checkpoint first; the shelf's own where all nodes share that."""
        return self.home.folder / "checkpoints" / f".{name_of(step)}.{self.attempt}.partial"


class Writer:
    """Writes one worker's files of each checkpoint in a thread, at most one checkpoint at a time.

    Every worker has one and calls it at the same steps. World rank 0 waits for the files of all and makes the checkpoint of
    them. A storage that fails is tried again for `storage.RETRY_SECONDS`, while training goes on; a checkpoint that could
    not be written raises InfrastructureError from the next call, TrainingError where its weights are no numbers, and the
    ones before it are untouched. `alive` is called while a storage is waited for, and after each file that it took.
    """

    def __init__(self, place: Place, world_rank: int, num_workers: int, alive: Callable[[], None] | None = None) -> None:
        self._place, self._rank, self._num_workers = place, world_rank, num_workers
        self._alive = alive
        self._shelf, self._run = place.home.shelf(), place.home.identity()
        self._pending: Future[None] = Future()
        self._pending.set_result(None)
        # A thread that begins keeps the interpreter for 5 ms, longer than it takes to copy adapters; one that waits does
        # not. It does not hold up the end of the process.
        self._orders: SimpleQueue[_Order | None] = SimpleQueue()
        Thread(target=_work_off, args=(self._orders,), daemon=True).start()
        finalize(self, self._orders.put, None)
        self._last: str | None = None
        self._manifest = ""

    def write(self, progress: Progress, metrics: dict[str, float], snapshot: Callable[[], Files]) -> None:
        """Begins the checkpoint of a step when the one before is written. `snapshot` is called once, by the thread."""
        self.wait()
        self._last = name_of(progress.step)
        self._pending = Future()
        self._orders.put((partial(self._write, progress, metrics, snapshot), self._pending))

    def measure(self, progress: Progress, metrics: dict[str, float]) -> None:
        """Adds metrics to the checkpoint of a step that was just begun, when it is written."""
        self.wait()
        if self._rank == 0:
            with self._failing_as(f"what was measured at step {progress.step}"):
                for attempt in storage.attempts("a checkpoint could not be written", self._alive):
                    with attempt:
                        self._add(name_of(progress.step), metrics)
            self._sweep()

    def _add(self, name: str, metrics: dict[str, float]) -> None:
        manifest = json.loads(self._shelf.read(name, MANIFEST))
        manifest["metrics"] |= metrics
        self._shelf.write(name, MANIFEST, json.dumps(manifest, indent=2).encode())

    def check(self) -> None:
        """Raises what the last write has raised by now; never waits."""
        if self._pending.done():
            self._pending.result()

    def wait(self) -> None:
        """Returns when the last write stands; raises what it raised."""
        self._pending.result()

    def stand(self) -> None:
        """Returns when the last checkpoint that was begun stands, though world rank 0 may write the last of it.

        Nobody waits longer than world rank 0 tries; where it fails it raises, which ends all workers.
        """
        self.wait()
        deadline = time.monotonic() + storage.RETRY_SECONDS
        with suppress(OSError, pa.ArrowException):
            while self._last and self._last not in self._shelf.names() and time.monotonic() < deadline:
                time.sleep(0.5 if self._shelf.remote else 0.02)

    def _write(self, progress: Progress, metrics: dict[str, float], snapshot: Callable[[], Files]) -> None:
        files = snapshot()
        _check_finite(progress.step, files.get(WEIGHTS, ({}, {}))[0])
        with self._failing_as(f"the checkpoint of step {progress.step}"):
            for attempt in storage.attempts("a checkpoint could not be written", self._alive):
                with attempt:
                    if not self._renamed(progress.step):
                        self._write_part(progress.step, files)
                        if self._rank == 0:
                            self._publish(progress, metrics)
        if self._rank == 0:
            self._sweep()

    def _renamed(self, step: int) -> bool:
        """Whether the shared folder of this checkpoint has its name already, though the server that gave it said otherwise.

        One that was asked again finds nothing to rename, and one that answers too late counts as failed (EIO).
        """
        if not self._manifest:
            return False
        with suppress(FileNotFoundError):
            return Path(self._shelf.place, name_of(step), MANIFEST).read_text() == self._manifest
        return False

    @contextmanager
    def _failing_as(self, what: str) -> Iterator[None]:
        """Raises InfrastructureError, with what could not be written, where the storage fails for good."""
        try:
            yield
        except (OSError, SafetensorError, pa.ArrowException) as error:
            raise InfrastructureError(
                f"{what} could not be written to {self._shelf.place} ({self._free()}): {one_line(error)}. Make room; the "
                "same command goes on from the checkpoint before"
            ) from error

    def _free(self) -> str:
        """What the storage has left, as far as it says so."""
        if self._shelf.remote:
            return "a remote file system"
        folder = Path(self._shelf.place)
        return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB free" if folder.exists() else "which is gone"

    def _write_part(self, step: int, files: Files) -> None:
        """Writes this worker's files, and then what they are, so that world rank 0 knows that they stand."""
        unfinished, name = self._place.unfinished(step), self._marker(self._rank)
        if not (unfinished / name).exists():
            # Not the folder of the checkpoints itself: a mount that is gone must not be written beside.
            unfinished.mkdir(exist_ok=True)
            write_files(unfinished, files)
            replace_text(unfinished / name, json.dumps({file: _described(unfinished / file) for file in files}))
        if self._shelf.remote:
            for file in (*files, name):
                self._shelf.upload(unfinished, name_of(step), file)
                if self._alive is not None:
                    self._alive()
            shutil.rmtree(unfinished)

    def _part(self, step: int, world_rank: int) -> dict[str, Any]:
        """What a worker has written, when it has."""
        name, unfinished = self._marker(world_rank), self._place.unfinished(step)
        while True:
            try:
                text = self._shelf.read(name_of(step), name) if self._shelf.remote else (unfinished / name).read_bytes()
                return dict(json.loads(text))
            except FileNotFoundError:
                if not self._shelf.remote:
                    unfinished.stat()  # raises where the storage is gone
            time.sleep(0.5 if self._shelf.remote else 0.02)

    def _marker(self, world_rank: int) -> str:
        return f".part-{self._place.attempt}-{world_rank:05d}.json"

    def _publish(self, progress: Progress, metrics: dict[str, float]) -> None:
        """Writes the manifest, when the parts of all workers stand; with it the checkpoint is whole."""
        contract = self._place.home.folder / "contract.json"
        files = {"contract.json": _described(contract)}
        for world_rank in range(self._num_workers):
            files |= self._part(progress.step, world_rank)
        manifest: dict[str, Any] = {
            "step": progress.step,
            "run": self._run,
            "cursor": asdict(progress.cursor),
            "num_workers": self._num_workers,
            "behaviour_sha256": self._place.behaviour_sha256,
            "metrics": metrics,
            "files": files,
        }
        text, name = json.dumps(manifest, indent=2), name_of(progress.step)
        if self._shelf.remote:
            self._shelf.write(name, "contract.json", contract.read_bytes())
            self._place.home.keep()  # a run that goes on from here needs the records of the steps before
            self._shelf.complete(name, files, text)
            return
        unfinished = self._place.unfinished(progress.step)
        shutil.copy(contract, unfinished)
        with open(unfinished / MANIFEST, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        final = Path(self._shelf.place, name)
        shutil.rmtree(final, ignore_errors=True)
        self._manifest = text
        os.replace(unfinished, final)
        for marker in final.glob(".part-*.json"):
            with suppress(OSError):
                marker.unlink()

    def _sweep(self) -> None:
        """Removes all but the newest checkpoints and the best one; what cannot be removed now is removed the next time."""
        with suppress(OSError, pa.ArrowException):
            leader = best(self._shelf, self._place.best) if self._place.best else None
            for old in self._shelf.names()[: -self._place.keep]:
                if leader is None or old != leader[0]:
                    with suppress(OSError):
                        self._shelf.remove(old)


def write_files(folder: Path, files: Files) -> None:
    """Writes one worker's files of a checkpoint below a folder. Raises OSError or SafetensorError."""
    for name, (tensors, metadata) in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / name, metadata={"format": "pt", **metadata})


def _described(file: Path) -> dict[str, Any]:
    with open(file, "rb") as stream:
        return {"bytes": os.fstat(stream.fileno()).st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _check_finite(step: int, weights: dict[str, torch.Tensor]) -> None:
    """Raises TrainingError where a weight is no number; the loss of the next step would say so too late."""
    for name, weight in weights.items():
        if not is_finite(weight):
            raise TrainingError(
                f"the weights after step {step} are not finite (NaN or infinite, {name} first), and no checkpoint was "
                "written of them. Lower optim.learning_rate, or raise optim.warmup_steps, under a new name; the checkpoints "
                "before it stand"
            )


def _work_off(orders: "SimpleQueue[_Order | None]") -> None:
    while order := orders.get():
        work, done = order
        try:
            work()
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)
        del order, work, done  # the memory of what was written is used again, though this thread waits
