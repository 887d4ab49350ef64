"""Slices of rows that can be read apart, and the windows in which an epoch draws them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Part = tuple[int, int, int, str]
"""First row, number of rows, byte offset or -1, and sha256 of what will be a slice."""


@dataclass(frozen=True)
class Slice:
    """`num_rows` rows of one file from `first_row` on, of which a seeded share `keep` belongs to an epoch.

    `slice` numbers the slices of a source list from 0; the same files give the same slices on every machine. `name` is the
    file for people, `path` for reading. `offset` is the byte at which the slice starts in an uncompressed JSONL file, else
    -1. `digest` is the sha256 of what it holds, with which a file that changes under a run is noticed; of a Parquet or Arrow
    file, whose slices have no bytes of their own, `stamp` notices it. `dropped` are the rows, from 0 on, that data.filters
    leave out, each with a code and a reason.
    """

    slice: int
    name: str
    path: str
    first_row: int
    num_rows: int
    offset: int
    keep: float
    digest: str
    stamp: str = ""
    dropped: Sequence[tuple[int, str, str]] = ()

    def row_name(self, row: int) -> str:
        """How messages and records name a row of the file: ``path#index``."""
        return f"{self.name}#{row}"

    def to_json(self) -> dict[str, Any]:
        """Plain types for a Ray Data row."""
        return asdict(self)


@dataclass(frozen=True)
class Index:
    """All slices of a list of sources, the number of source rows, and the sha256 of what they hold."""

    slices: tuple[Slice, ...]
    num_rows: int
    digest: str


def windows(slices: Sequence[Slice], window_rows: int, seed: int, epoch: int | None) -> list[list[int]]:
    """The slices of each window of an epoch: all of them in an order that is a pure function of (seed, epoch).

    A window takes slices until it has `window_rows` rows. Without an epoch, the order is that of the files.
    """
    order = range(len(slices)) if epoch is None else np.random.default_rng([seed, epoch]).permutation(len(slices))
    found: list[list[int]] = []
    rows = float(window_rows)
    for number in order:
        if rows >= window_rows:
            found.append([])
            rows = 0.0
        found[-1].append(int(number))
        rows += slices[number].num_rows * slices[number].keep
    return found
