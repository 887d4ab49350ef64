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


@dataclass(frozen=True)
class Packs:
    """Packs laid end to end: pack p has tokens [starts[p], starts[p + 1]) and samples [firsts[p], firsts[p + 1]).

    Invariant: `input_ids` and `labels` int32 [n], `seq_lens` int32 [samples], `starts` and `firsts` int64 [packs + 1].
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    seq_lens: NDArray[np.int32]
    starts: NDArray[np.int64]
    firsts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> Pack:
        tokens = slice(self.starts[number], self.starts[number + 1])
        samples = slice(self.firsts[number], self.firsts[number + 1])
        return Pack(self.input_ids[tokens], self.labels[tokens], self.seq_lens[samples])

    def trained_tokens(self) -> NDArray[np.int64]:
        """Labels of each pack that bear loss, int64 [packs]."""
        sums = np.concatenate([[0], np.cumsum(self.labels != IGNORE_INDEX)])
        counts: NDArray[np.int64] = np.diff(sums[self.starts])
        return counts


def pack(
    input_ids: NDArray[np.int32],
    trained: NDArray[np.bool_],
    lengths: NDArray[np.int32],
    capacity: int,
    rng: np.random.Generator,
) -> Packs:
    """The packs of samples laid end to end, in a seeded order: planned on lengths alone, tokens moved once."""
    drawn = rng.permutation(len(lengths))
    groups = plan(lengths[drawn].tolist(), capacity)
    groups = [groups[g] for g in rng.permutation(len(groups))]
    firsts = np.cumsum([0, *map(len, groups)], dtype=np.int64)
    order = drawn[np.array([i for group in groups for i in group], np.intp)]
    ends = np.cumsum(lengths, dtype=np.int64)
    pieces = [slice(ends[i] - lengths[i], ends[i]) for i in order]
    ids = np.concatenate([input_ids[piece] for piece in pieces] or [np.empty(0, np.int32)])
    bearing = np.concatenate([trained[piece] for piece in pieces] or [np.empty(0, bool)])
    seq_lens = lengths[order].astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(seq_lens, dtype=np.int64)])[firsts]
    return Packs(ids, np.where(bearing, ids, np.int32(IGNORE_INDEX)), seq_lens, starts, firsts)
