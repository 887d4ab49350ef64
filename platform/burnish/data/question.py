"""Held-out questions that a model in training answers, so that a person sees what it has learned to say."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from burnish.data.packing import Sample


@dataclass(frozen=True)
class Question:
    """A held-out conversation up to its last trained answer, as a server would feed it, and that answer.

    `prompt` and `reference` are token ids, int32, neither of them empty; `row` names the source row.
    """

    row: str
    prompt: NDArray[np.int32]
    reference: NDArray[np.int32]

    @classmethod
    def of(cls, row: str, sample: Sample) -> "Question":
        """The question of a sample: its last run of trained tokens is the answer, all that stands before is the prompt."""
        last = int(np.flatnonzero(sample.trained)[-1]) + 1
        first = int(np.flatnonzero(~sample.trained[:last])[-1]) + 1
        return cls(row, sample.input_ids[:first], sample.input_ids[first:last])
