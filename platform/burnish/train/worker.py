"""What one training worker has: its engine, its objective, and on world rank 0 the records of the run."""

from dataclasses import dataclass
from typing import Any

from burnish.config import Recipe
from burnish.data.order import StepMeta
from burnish.tracking import Tracker
from burnish.train import engine as ds
from burnish.train.attempt import Attempt
from burnish.train.home import Home
from burnish.train.ledger import Ledger
from burnish.train.objective import Objective
from burnish.train.throughput import Meter
from burnish.train.watchdog import Watchdog


@dataclass(frozen=True)
class Worker:
    """What one worker trains with. Every worker has one, and calls what takes it at the same steps as all others."""

    attempt: Attempt
    home: Home
    engine: ds.Engine
    objective: Objective
    watchdog: Watchdog
    meter: Meter

    @property
    def recipe(self) -> Recipe:
        """The recipe of the run."""
        return self.attempt.recipe


class Records:
    """World rank 0's records: the run folder's files, and MLflow."""

    def __init__(self, attempt: Attempt, home: Home, watchdog: Watchdog) -> None:
        recipe, folder = attempt.recipe, home.folder
        allowed = recipe.data.max_refused * attempt.num_rows
        self._ledger = Ledger.open(folder, attempt.progress.step, allowed, home.path("refused.jsonl"), watchdog.alive)
        self._tracker = Tracker(recipe.tracking.uri, attempt.run_id, folder)

    def step(self, step: int, meta: StepMeta, metrics: dict[str, float]) -> None:
        """One trained step."""
        self._ledger.record(step, meta, metrics["train/loss"], metrics)
        self._tracker.wake()

    def refuse(self, meta: StepMeta) -> None:
        """Rows that were refused where no step was trained."""
        self._ledger.refuse(meta.refused)

    def measure(self, step: int, metrics: dict[str, float]) -> None:
        """Measurements after a step."""
        self._ledger.measure(step, metrics)
        self._tracker.wake()

    def generate(self, step: int, answers: list[dict[str, Any]]) -> None:
        """What the model answered after a step."""
        self._ledger.generate(step, answers)

    def close(self) -> None:
        """Waits a while for MLflow to take what is left."""
        self._tracker.close()
