"""The order in which a run trains its rows: windows of slices, their packs, and a position among them.

The order of packs is a pure function of (recipe, epoch, window); a position in it is a `Cursor`. Packs are trained in rounds
of N steps: round r holds the packs [r * N * G, (r + 1) * N * G) of that order, G being the global batch in packs.
Which of them make a step depends on their costs alone, so that step t is the same for any number of workers that divides G.
Only the last step of a run can be smaller, and empty packs fill it up.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from burnish.config import Recipe
from burnish.data import quality
from burnish.data.packing import Packs, pack
from burnish.data.rendered import Rendered
from burnish.data.slices import Index, Slice, windows

ORDER = "rounds of slices 1"
"""Names the order of packs; a run that was started under another one cannot go on without losing or repeating rows."""


@dataclass(frozen=True)
class Cursor:
    """The next step to train: number `taken` of the round that starts at the `index`-th pack of an epoch's `position`-th
    window."""

    epoch: int = 0
    position: int = 0
    index: int = 0
    taken: int = 0


@dataclass(frozen=True)
class StepMeta:
    """What a worker must know of a whole step, computed where the packs are.

    `packs` are [epoch, window, index] in global order, a window being named by its position in the epoch; `progress` is the
    share of the run's rows that lie before the step; `cursor` is the position after it. The first step of a round has the
    `refused` rows and the number of source `rows` of the windows that begin in the round. `balance` is the mean over the
    largest cost of the workers.
    """

    packs: tuple[tuple[int, int, int], ...]
    tokens: int
    trained_tokens: int
    progress: float
    cursor: Cursor
    refused: tuple[dict[str, Any], ...]
    rows: int
    balance: float

    @classmethod
    def from_json(cls, text: str) -> "StepMeta":
        """The meta column of the first pack that a worker gets for a step."""
        tree = json.loads(text)
        packs = tuple((int(e), int(w), int(i)) for e, w, i in tree["packs"])
        return cls(**{**tree, "packs": packs, "cursor": Cursor(**tree["cursor"]), "refused": tuple(tree["refused"])})


@dataclass(frozen=True)
class Place:
    """Where a slice stands in a run: in window `position` of an epoch, which `last` says is the epoch's last.

    `before` and `share` are the shares of the run's rows that lie before the window and in it; of a window's packs the first
    `skip` are not wanted.
    """

    epoch: int
    position: int
    last: bool
    before: float
    share: float
    skip: int


def pack_window(
    parts: Sequence[tuple[Slice, Rendered]], epoch: int, recipe: Recipe
) -> tuple[Packs, list[dict[str, Any]], int]:
    """The packs of a window in their order, its refusals by row name, and its rows: a pure function of its arguments.

    Of a slice whose weight is a fraction, a seeded share of the rows is taken, another one in each epoch. Rows that
    data.filters leave out are among the refusals.
    """
    ids, trained, lengths, refused = [], [], [], []
    rows = 0
    for part, rendered in parts:
        kept = np.random.default_rng([recipe.data.seed, epoch, part.slice, 1]).random(rendered.num_rows) < part.keep
        rows += int(kept.sum())
        few = quality.too_little(*quality.tokens_of_rows(rendered), recipe.data.filters)
        why = {row: {"code": code, "turn": None, "message": text} for row, code, text in [*few, *part.dropped]}
        for row, each in ({each["row"]: each for each in rendered.refused} | why).items():
            if kept[row]:
                refused.append({**each, "row": part.row_name(part.first_row + row)})
        kept[list(why)] = False
        wanted = kept[rendered.rows]
        tokens = np.repeat(wanted, rendered.lengths)
        ids.append(rendered.input_ids if wanted.all() else rendered.input_ids[tokens])
        trained.append(rendered.trained if wanted.all() else rendered.trained[tokens])
        lengths.append(rendered.lengths[wanted])
    rng = np.random.default_rng([recipe.data.seed, epoch, parts[0][0].slice, 2])
    joined = np.concatenate(ids), np.concatenate(trained), np.concatenate(lengths)
    return pack(*joined, recipe.data.max_length, rng), refused, rows


def train_slices(recipe: Recipe, index: Index, cursor: Cursor) -> list[list[tuple[Place, Slice]]]:
    """Every window from the cursor to the end of the last epoch, in order: its slices, each with its place in the run."""
    found = []
    before, total = 0.0, sum(part.num_rows * part.keep for part in index.slices) * recipe.train.epochs
    for epoch in range(recipe.train.epochs):
        drawn = windows(index.slices, recipe.data.window_rows, recipe.data.seed, epoch)
        for position, numbers in enumerate(drawn):
            parts = [index.slices[number] for number in numbers]
            share = sum(part.num_rows * part.keep for part in parts) / total
            if (epoch, position) >= (cursor.epoch, cursor.position):
                skip = cursor.index if (epoch, position) == (cursor.epoch, cursor.position) else 0
                place = Place(epoch, position, position + 1 == len(drawn), before, share, skip)
                found.append([(place, part) for part in parts])
            before += share
    return found


def eval_slices(recipe: Recipe, index: Index) -> list[list[tuple[Place, Slice]]]:
    """Every window of the held-out files, in file order."""
    drawn = windows(index.slices, recipe.data.window_rows, recipe.data.seed, None)
    return [
        [(Place(0, position, position + 1 == len(drawn), 0.0, 0.0, 0), index.slices[number]) for number in numbers]
        for position, numbers in enumerate(drawn)
    ]
