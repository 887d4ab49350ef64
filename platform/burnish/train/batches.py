"""The batches of one worker, as they come off its part of the stream."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from burnish.data import pipeline
from burnish.data.order import StepMeta
from burnish.data.stages import Patience


@dataclass(frozen=True)
class Batch:
    """One worker's packs of one step, and the meta of the whole step. `wait_seconds` is how long it took to come."""

    packs: list[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]]
    meta: StepMeta
    wait_seconds: float


def batches(shard: Any, share: int, patience: Patience) -> Iterator[Batch]:
    """This worker's steps in order, `share` packs each; a block of its stream is its part of a round of steps.

    Raises InfrastructureError where `patience` ends.
    """
    rows = None
    # With blocks to prefetch, Ray gives the first one only when it has the others; a round lasts many steps.
    blocks = iter(shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    started = time.monotonic()
    for block in patience.each(blocks):
        rows = rows or block.num_rows
        assert block.num_rows == rows and rows % share == 0, f"a block of {block.num_rows} packs is no part of a round"
        for meta, table in pipeline.steps_of(block, share):
            columns = [table.column(name).combine_chunks() for name in ("input_ids", "labels", "seq_lens")]
            packs = [(_row(columns[0], i), _row(columns[1], i), _row(columns[2], i)) for i in range(share)]
            yield Batch(packs, meta, time.monotonic() - started)
            started = time.monotonic()


def _row(column: Any, i: int) -> NDArray[np.int32]:
    """One list of an Arrow column as a NumPy view."""
    values: NDArray[np.int32] = column[i].values.to_numpy(zero_copy_only=False)
    return values
