"""One optimizer step of one worker, without Ray: a function that can be measured alone and used by other programs."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from burnish.train import engine as ds
from burnish.train.objective import Objective

Row: TypeAlias = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]
"""A pack: input_ids, labels and seq_lens."""


@dataclass(frozen=True)
class Step:
    """What the workers' shares of a step have in common. Steps count from 1; `trained_tokens` are those of all workers."""

    number: int
    learning_rate: float
    trained_tokens: int
    seed: int


def take(
    engine: ds.Engine, objective: Objective, packs: Sequence[Row], step: Step, beat: Callable[[], None] = lambda: None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and backward of this worker's packs, then the update of the weights by the gradient of one big batch.

    Gives the sum of this worker's losses and the 2-norm of the whole gradient before clipping, float64 scalars on its
    device that may not be computed yet. `beat` is called after each pack. A collective call: every worker has as many packs,
    empty ones among them.
    """
    ds.set_learning_rate(engine, step.learning_rate)
    total = norm = torch.zeros((), dtype=torch.float64, device=engine.device)
    rank, workers = dist.get_rank(), dist.get_world_size()
    for number, (input_ids, labels, seq_lens) in enumerate(packs):
        # Dropout is a function of the pack's place in the run, whatever worker trains it and however often.
        torch.manual_seed(seed_of(step.seed, step.number, rank + number * workers))
        loss = objective.loss_sum(input_ids, labels, seq_lens)
        ds.backward(engine, loss, step.trained_tokens, workers)
        norm = ds.step(engine)
        total = total + loss.detach()
        beat()
    return total, norm


def summed(shared: torch.Tensor) -> list[float]:
    """The sums of some numbers over all workers, on the host, which waits here until all of them have come so far."""
    dist.all_reduce(shared)
    found: list[float] = shared.tolist()
    return found


def seed_of(seed: int, step: int, pack: int) -> int:
    """The seed of the random numbers that a pack of a step draws; the same in every version of Python."""
    digest = hashlib.sha256(f"{seed} {step} {pack}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
