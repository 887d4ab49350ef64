"""Checkpoints that are whole or absent, and found again after any crash.

    checkpoints/step-00000050/
        weights.safetensors     the trained weights, gathered: all of them, or the adapter
        optimizer/              float32 masters and moments, each worker's part in a file, for any number of workers
        contract.json           the template contract of the run
        manifest.json           written last: run, step, cursor, workers, contract, metrics, size and sha256 of every file

Nothing is loaded that its manifest does not vouch for. `writer` writes them.
"""

import json
import logging
from dataclasses import dataclass
from typing import TypeAlias

import pyarrow as pa
import ray.train
import torch

from burnish.data.order import Cursor
from burnish.errors import InfrastructureError, one_line
from burnish.train.attempt import Progress
from burnish.train.shelf import MANIFEST, Shelf

WEIGHTS = "weights.safetensors"
"""The file of a checkpoint with the trained weights."""
OPTIMIZER = "optimizer"
"""The folder of a checkpoint with the state of the optimizer."""

Files: TypeAlias = dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]]
"""What one worker writes of a checkpoint: tensors in the host's memory and metadata, by the path of a safetensors file."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: every file was found with the size and sha256 of the manifest. `path` is for people."""

    name: str
    path: str
    progress: Progress
    num_workers: int
    behaviour_sha256: str
    run: str | None
    files: tuple[str, ...]
    metrics: dict[str, float]


def name_of(step: int) -> str:
    """The name of the checkpoint of a step; later ones sort behind it."""
    return f"step-{step:08d}"


def report(metrics: dict[str, float]) -> None:
    """Tells Ray Train (and Tune, through it) where the run stands. A barrier: every worker calls it."""
    ray.train.report(metrics)


def newest(shelf: Shelf) -> Checkpoint | None:
    """The newest checkpoint that its manifest vouches for, or None where the run has none. Broken ones are set aside.

    Raises InfrastructureError where none of those that the run had is whole, or where the storage cannot be read.
    """
    try:
        for name in reversed(shelf.names()):
            found = verify(shelf, name)
            if found is not None:
                return found
            logger.warning(
                "%s is not what its manifest says; setting it aside as %s", shelf.path(name), shelf.set_aside(name)
            )
        broken = shelf.broken()
    except (OSError, pa.ArrowException) as error:
        raise InfrastructureError(f"{shelf.place} cannot be read: {one_line(error)}; the same command may go on") from error
    if broken:
        raise InfrastructureError(
            f"no checkpoint of the run is whole: those in {shelf.place} are not what their manifests say, and were set "
            f"aside as {', '.join(broken)}. Bring one back as it was, or delete them to train from the start"
        )
    return None


def best(shelf: Shelf, metric: str) -> tuple[str, float] | None:
    """The checkpoint with the smallest value of a metric and that value, by the manifests alone; None where none has it."""
    found: list[tuple[float, str]] = []
    for name in shelf.names():
        try:
            found.append((float(json.loads(shelf.read(name, MANIFEST))["metrics"][metric]), name))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    if not found:
        return None
    value, name = min(found)
    return name, value


def verify(shelf: Shelf, name: str) -> Checkpoint | None:
    """A checkpoint by its name, or None unless each of its files has the size and sha256 that the manifest says.

    None too where the manifest does not name the weights or a file that is there, or where one lies outside of the folder.
    Raises OSError where a file system fails in another way than by not having a file, which tells nothing of it.
    """
    try:
        manifest = json.loads(shelf.read(name, MANIFEST))
        files = manifest["files"]
        if WEIGHTS not in files or set(shelf.files(name)) - {MANIFEST} - set(files):
            return None
        for file, entry in files.items():
            if not shelf.holds(name, file) or shelf.described(name, file) != entry:
                return None
        progress = Progress(manifest["step"], Cursor(**manifest["cursor"]))
        about = manifest["num_workers"], manifest["behaviour_sha256"], manifest.get("run")
        return Checkpoint(name, shelf.path(name), progress, *about, tuple(files), dict(manifest.get("metrics", {})))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None
