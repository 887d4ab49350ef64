"""The Ray Data graph: windows of rows are rendered and packed by CPU tasks and cut into steps for the workers.

The order of packs is a pure function of (recipe, epoch, window); a position in it is a `Cursor`. Step t trains packs
[t * G, (t + 1) * G) of that order for any number of workers that divides G, the global batch in packs; only the last
step of a run can be smaller, and empty packs fill it up.
"""

import json
import pickle
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from burnish.config import Recipe
from burnish.data import formats, sources
from burnish.data.conversation import Conversation, Refused
from burnish.data.packing import Pack, Sample, pack
from burnish.data.render import render
from burnish.data.template import Template

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("seq_lens", pa.list_(pa.int32())),
        ("meta", pa.string()),
    ]
)
"""One row a pack. `meta` is JSON: of the pack before steps are cut, of the whole step after."""


@dataclass(frozen=True)
class Cursor:
    """The next pack to train: the `index`-th of the `position`-th window of an epoch's order."""

    epoch: int = 0
    position: int = 0
    index: int = 0


@dataclass(frozen=True)
class StepMeta:
    """What a worker must know of a whole step, computed where the packs are.

    `packs` are [epoch, window, index] in global order; `progress` is the share of the run's rows that lie before the
    step; `cursor` is the position after it; `refused` and `rows` are the refusals and the number of source rows of the
    windows that begin in it.
    """

    packs: tuple[tuple[int, int, int], ...]
    tokens: int
    trained_tokens: int
    progress: float
    cursor: Cursor
    refused: tuple[dict[str, Any], ...]
    rows: int

    @classmethod
    def from_json(cls, text: str) -> "StepMeta":
        """The meta column of the first pack that a worker gets for a step."""
        tree = json.loads(text)
        packs = tuple((int(e), int(w), int(i)) for e, w, i in tree["packs"])
        return cls(**{**tree, "packs": packs, "cursor": Cursor(**tree["cursor"]), "refused": tuple(tree["refused"])})


@dataclass(frozen=True)
class WindowResult:
    """The samples of one window of rows, and its refusals with their row names `path#index`."""

    samples: tuple[Sample, ...]
    refused: tuple[dict[str, Any], ...]
    rows: int


def render_row(row: Any, name: str, template: Template, recipe: Recipe) -> list[Sample]:
    """The samples of one source row; raises Refused. A line that was no JSON comes as text."""
    if not isinstance(row, dict):
        raise Refused("bad-row", f"{name} is not a JSON object; found {row!r:.80}")
    data = recipe.data
    try:
        conversation = Conversation.parse(formats.messages_form(row))
        return render(conversation, template, data.max_length, data.train_on, data.history, data.on_overlong)
    except RecursionError:
        raise Refused("bad-row", f"{name} is nested too deeply to be read") from None


def render_window(window: sources.Window, epoch: int, template: Template, recipe: Recipe) -> WindowResult:
    """Every row of a window rendered, refusals collected; a seeded share of it where its weight is a fraction.

    Raises DataError where the file cannot be read.
    """
    rng = np.random.default_rng([recipe.data.seed, epoch, window.window, 1])
    samples: list[Sample] = []
    refused: list[dict[str, Any]] = []
    rows = 0
    for index, row in sources.read(window):
        if rng.random() >= window.keep:
            continue
        rows += 1
        name = window.row_name(index)
        try:
            samples += render_row(row, name, template, recipe)
        except Refused as refusal:
            refused.append({"row": name, **refusal.to_json()})
    return WindowResult(tuple(samples), tuple(refused), rows)


def pack_window(window: sources.Window, epoch: int, template: Template, recipe: Recipe) -> tuple[list[Pack], WindowResult]:
    """The packs of one window in their order: a pure function of (recipe, epoch, window)."""
    result = render_window(window, epoch, template, recipe)
    rng = np.random.default_rng([recipe.data.seed, epoch, window.window])
    samples = [result.samples[i] for i in rng.permutation(len(result.samples))]
    return pack(samples, recipe.data.max_length, rng), result


def train_windows(recipe: Recipe, index: sources.Index, cursor: Cursor) -> Iterator[dict[str, Any]]:
    """Every window from the cursor to the end of the last epoch, in order, with its place in the run."""
    rows_before = 0
    total = sum(window.num_rows for window in index.windows) * recipe.train.epochs
    for epoch in range(recipe.train.epochs):
        order = sources.epoch_order(len(index.windows), recipe.data.seed, epoch)
        for position, w in enumerate(order):
            window = index.windows[w]
            if (epoch, position) >= (cursor.epoch, cursor.position):
                skip = cursor.index if (epoch, position) == (cursor.epoch, cursor.position) else 0
                place = {"epoch": epoch, "position": position, "skip": skip, "last": position + 1 == len(order)}
                yield {**window.to_json(), **place, "before": rows_before / total, "share": window.num_rows / total}
            rows_before += window.num_rows


def eval_windows(index: sources.Index) -> Iterator[dict[str, Any]]:
    """Every window of the held-out files, in file order."""
    for position, window in enumerate(index.windows):
        place = {"epoch": 0, "position": position, "skip": 0, "last": position + 1 == len(index.windows)}
        yield {**window.to_json(), **place, "before": 0.0, "share": 0.0}


def stream(windows: list[dict[str, Any]], template: Template, recipe: Recipe, num_workers: int) -> ray.data.Dataset:
    """The lazy graph from windows to worker shares: blocks of G / `num_workers` packs, in global order.

    Block b belongs to worker b % `num_workers`; the first pack of each block carries its step's `StepMeta`.
    """
    assert windows and recipe.train.global_batch_size % num_workers == 0
    shared = ray.put(pickle.dumps((template, recipe)))
    global_batch_size = recipe.train.global_batch_size
    share = global_batch_size // num_workers
    return (
        ray.data.from_items(windows, override_num_blocks=len(windows))
        .map_batches(_window_task, batch_size=None, batch_format="pyarrow", fn_kwargs={"shared": [shared]})
        .repartition(target_num_rows_per_block=global_batch_size, strict=True)
        .map_batches(
            _step_task,
            batch_size=global_batch_size,
            batch_format="pyarrow",
            fn_kwargs={"global_batch_size": global_batch_size, "share": share},
        )
        .repartition(target_num_rows_per_block=share, strict=True)
    )


_unpickled: dict[str, tuple[Template, Recipe]] = {}
"""The template and recipe of the stream that this worker process serves: a large tokenizer takes a second to unpickle."""


def _shared(reference: "ray.ObjectRef[bytes]") -> tuple[Template, Recipe]:
    key = str(reference)
    if key not in _unpickled:
        _unpickled.clear()
        _unpickled[key] = pickle.loads(ray.get(reference))
    return _unpickled[key]


def _window_task(table: pa.Table, shared: list[Any]) -> Iterator[pa.Table]:
    """One block of window descriptions to a table of packs with their meta."""
    template, recipe = _shared(shared[0])
    for place in table.to_pylist():
        window = sources.Window(**{key: place[key] for key in sources.Window.__dataclass_fields__})
        packs, result = pack_window(window, place["epoch"], template, recipe)
        # A window whose rows are all refused gives one empty pack, so that its refusals travel like any other's.
        packs = packs or [Pack.of([])]
        metas = []
        for i, each in enumerate(packs):
            after = Cursor(place["epoch"], place["position"], i + 1)
            if i + 1 == len(packs):
                ended = place["last"]
                after = Cursor(place["epoch"] + 1) if ended else Cursor(place["epoch"], place["position"] + 1)
            meta = StepMeta(
                packs=((place["epoch"], window.window, i),) if len(each.input_ids) else (),
                tokens=len(each.input_ids),
                trained_tokens=each.trained_tokens,
                progress=place["before"] + place["share"] * i / len(packs),
                cursor=after,
                refused=result.refused if i == 0 else (),
                rows=result.rows if i == 0 else 0,
            )
            metas.append(json.dumps(asdict(meta)))
        yield _table(packs, metas).slice(place["skip"])


def _step_task(table: pa.Table, global_batch_size: int, share: int) -> pa.Table:
    """The packs of one step, filled up with empty ones, the step's meta on the first pack of each worker's share."""
    metas = [StepMeta.from_json(text) for text in table["meta"].to_pylist()]
    step = replace(
        metas[-1],
        packs=tuple(name for meta in metas for name in meta.packs),
        tokens=sum(meta.tokens for meta in metas),
        trained_tokens=sum(meta.trained_tokens for meta in metas),
        progress=metas[0].progress,
        refused=tuple(row for meta in metas for row in meta.refused),
        rows=sum(meta.rows for meta in metas),
    )
    text = json.dumps(asdict(step))
    missing = global_batch_size - table.num_rows
    filled = pa.concat_tables([table, _table([Pack.of([])] * missing, [""] * missing)])
    column = pa.array([text if row % share == 0 else "" for row in range(global_batch_size)], pa.string())
    return filled.set_column(filled.schema.get_field_index("meta"), "meta", column)


def _table(packs: list[Pack], metas: list[str]) -> pa.Table:
    """An Arrow table of packs without a detour through Python lists."""

    def column(arrays: list[np.ndarray[Any, np.dtype[np.int32]]]) -> pa.ListArray:
        ends = np.cumsum([0, *(len(array) for array in arrays)]).astype(np.int32)
        values = np.concatenate(arrays) if arrays else np.empty(0, np.int32)
        return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(values, pa.int32()))

    columns = [
        column([p.input_ids for p in packs]),
        column([p.labels for p in packs]),
        column([p.seq_lens for p in packs]),
    ]
    return pa.Table.from_arrays([*columns, pa.array(metas, pa.string())], schema=SCHEMA)
