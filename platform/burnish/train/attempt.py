"""What a driver and its workers agree on: an attempt at a run, and how far the run is. Imports nothing heavy."""

from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from burnish.config import Recipe
from burnish.data.order import Cursor
from burnish.data.question import Question
from burnish.data.stages import Patience
from burnish.data.template import Template

STOP_FILE = "STOP"
"""A file of this name in the run folder asks the run to save a checkpoint and end."""
SAVE_FILE = "SAVE"
"""A file of this name in the run folder asks the run to save a checkpoint and go on."""


class Wish(IntEnum):
    """What a run is asked to do after the step that it is at."""

    NOTHING = 0
    SAVE = 1
    STOP = 2

    @classmethod
    def of(cls, run_folder: Path) -> "Wish":
        """What the files of a run folder ask for; nothing where the storage cannot be asked now."""
        try:
            stop, save = (run_folder / STOP_FILE).exists(), (run_folder / SAVE_FILE).exists()
        except OSError:
            return cls.NOTHING
        return cls.STOP if stop else cls.SAVE if save else cls.NOTHING


@dataclass(frozen=True)
class Progress:
    """How far a run is: optimizer steps done, and the next pack of the global order."""

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)


@dataclass(frozen=True)
class Attempt:
    """What a worker is told: the recipe, where its run lives, the checkpoint to start from, and who is to be told.

    `run` is a folder or a place (`train/home.py`), `resume` the name of a checkpoint. `remains` says whether
    packs are left to train; a run that was killed after its last step may only lack evaluation. `best` is the smallest value
    of `checkpoint.best` that a checkpoint of the run has, `losses` are the held-out losses up to it, `questions` what the
    model answers at each evaluation, in tokens of the `template`.
    """

    name: str
    recipe: Recipe
    run: str
    resume: str | None
    progress: Progress
    best: float | None
    losses: tuple[float, ...]
    questions: tuple[Question, ...]
    template: Template
    remains: bool
    num_rows: int
    behaviour_sha256: str
    run_id: str | None
    cuda: bool
    patience: Patience
