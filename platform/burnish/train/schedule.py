"""The learning rate of a step, and when a run has learned what it can."""

import math
from collections.abc import Sequence

from burnish.sections import OptimSpec


def learning_rate(optim: OptimSpec, step: int, progress: float) -> float:
    """The learning rate of the `step`-th step, counted from 1, when `progress` in [0, 1] of the run is done.

    The share of the run is known from the position in the source rows, so the schedule needs no count of packs, and
    is the same on any number of workers and after any resume. Warm-up: rises over the first `warmup_steps` steps.
    """
    warmup = min(1.0, step / (optim.warmup_steps + 1))
    decay = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[optim.schedule]
    return optim.learning_rate * warmup * decay


def evaluations_without_gain(losses: Sequence[float]) -> int:
    """Evaluations behind the one with the smallest held-out loss; 0 where the newest is better than all before."""
    return len(losses) - 1 - min(range(len(losses)), key=losses.__getitem__) if losses else 0


def kept_losses(losses: Sequence[float], best: float | None) -> tuple[float, ...]:
    """The held-out losses since the last one that is smaller than `best`, the smallest of which a checkpoint stands.

    Weights that were better than all that stand were not kept, as before `checkpoint.best` was written into the recipe; to
    wait for a loss below theirs would end a run with weights that it can still better.
    """
    if best is None:
        return ()
    lost = [number for number, loss in enumerate(losses) if loss < best]
    return tuple(losses[lost[-1] + 1 :] if lost else losses)
