"""What a driver and its workers agree on: an attempt at a run, and how far the run is. Imports nothing heavy."""

from dataclasses import dataclass, field
from pathlib import Path

from burnish.config import Recipe
from burnish.data.order import Cursor
from burnish.data.stages import Patience

STOP_FILE = "STOP"
"""A file of this name in the run folder asks the run to save a checkpoint and end."""


@dataclass(frozen=True)
class Progress:
    """How far a run is: optimizer steps done, and the next pack of the global order."""

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)


@dataclass(frozen=True)
class Attempt:
    """What a worker is told: the recipe, its run folder, the checkpoint to start from, and who is to be told.

    `remains` says whether packs are left to train; a run that was killed after its last step may only lack evaluation.
    """

    recipe: Recipe
    run_folder: Path
    resume: Path | None
    progress: Progress
    remains: bool
    num_rows: int
    behaviour_sha256: str
    run_id: str | None
    cuda: bool
    patience: Patience
