"""Which packs make a step, so that no worker waits for another: packs of about equal cost, dealt by cost.

Attention is quadratic in the length of a sample, so that packs that are equally full differ in cost, and a step waits for
the slowest worker. Packs are taken in rounds of some steps, sorted by cost and cut into steps; inside a step the workers get
packs of neighbouring cost, micro-batch by micro-batch (WLB-LLM, OSDI 2025, balances the same cost).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ROUND_STEPS, _ROUND_PACKS = 16, 512
"""Least steps and packs of a round: more of them balance better, and let the first step wait longer. With 512 packs the mean
over the largest cost of 8 workers is 0.99 on lengths with a tail to 32k tokens (tests/unit/data/test_balance.py)."""


@dataclass(frozen=True)
class Cost:
    """Relative time of a pack: `per_token` for each token, `per_pair` for each pair of tokens that see each other.

    `sliding` is the share of the layers in which a token sees `window` tokens at most.
    """

    per_token: float
    per_pair: float
    sliding: float = 0.0
    window: int = 1

    def of(self, seq_lens: NDArray[np.int32], firsts: NDArray[np.integer]) -> NDArray[np.float64]:
        """The cost of each pack; pack p has the samples [firsts[p], firsts[p + 1]), firsts int [packs + 1]."""
        lengths = seq_lens.astype(np.float64)
        pairs = (1 - self.sliding) * lengths**2 + self.sliding * lengths * np.minimum(lengths, self.window)
        sums = np.concatenate([[0.0], np.cumsum(self.per_token * lengths + self.per_pair * pairs)])
        costs: NDArray[np.float64] = np.diff(sums[firsts])
        return costs


def round_steps(global_batch_size: int) -> int:
    """Steps in a round."""
    return max(_ROUND_STEPS, -(-_ROUND_PACKS // global_batch_size))


def steps(
    costs: NDArray[np.float64], epochs: NDArray[np.integer], global_batch_size: int, rng: np.random.Generator
) -> list[NDArray[np.intp]]:
    """The packs of each step of a round, costliest first; steps in a seeded order, epoch after epoch, a short one last.

    Each step has packs of neighbouring cost. The cheapest packs of an epoch that make no whole step share one with the
    cheapest of the next. A pure function of its arguments, blind to the number of workers.
    """
    found: list[NDArray[np.intp]] = []
    left = np.empty(0, np.intp)
    for epoch in np.unique(epochs):
        own = np.flatnonzero(epochs == epoch)
        order = own[np.argsort(-costs[own], kind="stable")]
        if len(left):
            order, fill = np.split(order, [max(0, len(order) - (global_batch_size - len(left)))])
            left = np.concatenate([left, fill])
            left = left[np.argsort(-costs[left], kind="stable")]
            if len(left) < global_batch_size:
                continue
            found.append(left)
        whole = len(order) // global_batch_size * global_batch_size
        cut = order[:whole].reshape(-1, global_batch_size)
        found += list(cut[rng.permutation(len(cut))])
        left = order[whole:]
    return found + ([left] if len(left) else [])


def deal(global_batch_size: int, num_workers: int) -> NDArray[np.intp]:
    """Places of a step's packs (costliest first) in the order of workers: worker w trains w, w + workers, and so on."""
    return np.arange(global_batch_size).reshape(-1, num_workers).T.ravel()


def balance(costs: NDArray[np.float64], num_workers: int) -> tuple[float, float]:
    """Mean and largest cost over workers, summed over the micro-batches of a step dealt by `deal`; costs costliest first."""
    rounds = costs.reshape(-1, num_workers)
    return float(rounds.mean(axis=1).sum()), float(rounds.max(axis=1).sum())
