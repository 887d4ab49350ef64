"""Packs: several samples in one row of at most `capacity` tokens, planned on lengths alone.

Best-fit decreasing (Johnson 1973; "Fewer Truncations", arXiv 2404.10830): samples from the longest to the
shortest, each into the fullest pack that still has room.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORE_INDEX = -100
"""Label of a token that bears no loss; the value that torch's cross entropy ignores by default."""


@dataclass(frozen=True)
class Sample:
    """One rendered conversation: token ids, and for each whether the model is trained to emit it.

    Invariant: `input_ids` int32 [n], `trained` bool [n], at least one trained token, the first token never trained
    (nothing stands before it that could predict it). `turns` are the trained assistant messages.
    """

    input_ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    turns: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.input_ids) == len(self.trained) > 1 and self.trained.any() and not self.trained[0]

    def __len__(self) -> int:
        return len(self.input_ids)

    def labels(self) -> NDArray[np.int32]:
        """`input_ids` where trained, else IGNORE_INDEX; int32 [n], not shifted."""
        return np.where(self.trained, self.input_ids, IGNORE_INDEX).astype(np.int32)


@dataclass(frozen=True)
class Pack:
    """Samples laid end to end in one row; `seq_lens` are their lengths, in order.

    Invariant: sum(seq_lens) == len(input_ids) == len(labels); positions restart at 0 with every sample; a pack
    without samples is empty and trains nothing.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    seq_lens: NDArray[np.int32]

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "Pack":
        """One pack of these samples, in this order."""
        none = [np.empty(0, np.int32)]
        return cls(
            np.concatenate([sample.input_ids for sample in samples] or none),
            np.concatenate([sample.labels() for sample in samples] or none),
            np.array([len(sample) for sample in samples], np.int32),
        )

    @property
    def trained_tokens(self) -> int:
        """Labels that bear loss."""
        return int((self.labels != IGNORE_INDEX).sum())


def position_ids(seq_lens: NDArray[np.int32]) -> NDArray[np.int32]:
    """Position of each token inside its own sample, int32 [sum(seq_lens)]; [3, 2] gives [0, 1, 2, 0, 1]."""
    starts = np.repeat(np.cumsum(seq_lens) - seq_lens, seq_lens)
    return (np.arange(int(seq_lens.sum())) - starts).astype(np.int32)


def plan(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Groups of sample positions, each group's lengths summing to at most `capacity`; every sample once.

    Equal lengths keep their order, so the plan is a pure function of its arguments. The number of groups depends
    on the lengths alone, not on their order. Time O(n log n).
    """
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, pack), ascending: the first that fits is the fullest
    for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[sample]
        assert 0 < length <= capacity, (length, capacity)
        at = bisect.bisect_left(rooms, (length, -1))
        if at == len(rooms):
            room, pack = capacity, len(packs)
            packs.append([])
        else:
            room, pack = rooms.pop(at)
        packs[pack].append(sample)
        bisect.insort(rooms, (room - length, pack))
    return packs


def pack(samples: Sequence[Sample], capacity: int, rng: np.random.Generator) -> list[Pack]:
    """The packs of one window in a seeded order: plan, shuffle inside each pack, shuffle the packs."""
    groups = plan([len(sample) for sample in samples], capacity)
    order = rng.permutation(len(groups))
    return [Pack.of([samples[i] for i in rng.permutation(groups[g])]) for g in order]
