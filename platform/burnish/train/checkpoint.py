"""Checkpoints that are whole or absent, found again after any crash.

    checkpoints/step-00000050/
        weights.safetensors     the trained weights, gathered: all of them, or the adapter
        optimizer/              float32 masters and moments, each worker's part in a file, for any number of workers
        contract.json           the template contract of the run
        manifest.json           written last: step, cursor, workers, contract, size and sha256 of every file

A folder is written under a hidden name and renamed when its manifest stands. Nothing is loaded that its manifest does
not vouch for.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch.distributed as dist
from safetensors import SafetensorError

from burnish.data.order import Cursor
from burnish.errors import InfrastructureError, one_line
from burnish.train.attempt import Progress

WEIGHTS = "weights.safetensors"
"""The file of a checkpoint with the trained weights."""
OPTIMIZER = "optimizer"
"""The folder of a checkpoint with the state of the optimizer."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder: every file was found with the size and sha256 of the manifest."""

    path: Path
    progress: Progress
    num_workers: int
    behaviour_sha256: str


@contextmanager
def writing(folder: Path, progress: Progress, keep: int, behaviour_sha256: str) -> Iterator[Path]:
    """A folder to write this step's checkpoint into, which becomes one when the block ends. Called by every worker.

    Afterwards the newest `keep` checkpoints stand. Raises InfrastructureError where the storage refuses, with the
    checkpoints before it untouched.
    """
    final = folder / f"step-{progress.step:08d}"
    partial = folder / f".{final.name}.partial"
    first = dist.get_rank() == 0
    try:
        if first:
            for torn in folder.glob(".step-*.partial"):
                shutil.rmtree(torn, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        yield partial
        dist.barrier()
        if first:
            _write_manifest(partial, progress, behaviour_sha256)
            os.replace(partial, final)
            _keep(folder, keep)
        dist.barrier()
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(folder).free / 2**20
        raise InfrastructureError(
            f"the checkpoint of step {progress.step} could not be written to {folder} ({free:,.0f} MiB free): "
            f"{one_line(error)}. Make room; the same command goes on from the checkpoint before"
        ) from error


def report(metrics: dict[str, float]) -> None:
    """Tells Ray Train (and Tune, through it) where the run stands. A barrier: every worker calls it."""
    ray.train.report(metrics)


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
            if not file.resolve().is_relative_to(path.resolve()):
                return None
            if file.stat().st_size != entry["bytes"] or _sha256(file) != entry["sha256"]:
                return None
        progress = Progress(manifest["step"], Cursor(**manifest["cursor"]))
        return Checkpoint(path, progress, manifest["num_workers"], manifest["behaviour_sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write_manifest(folder: Path, progress: Progress, behaviour_sha256: str) -> None:
    files = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    manifest: dict[str, Any] = {
        "step": progress.step,
        "cursor": asdict(progress.cursor),
        "num_workers": dist.get_world_size(),
        "behaviour_sha256": behaviour_sha256,
        "files": files,
    }
    with open(folder / "manifest.json", "w") as file:
        json.dump(manifest, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _keep(folder: Path, keep: int) -> None:
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
