"""The Ray Data graph: slices of rows are rendered, windows packed and steps cut by CPU tasks, and dealt to the workers.

The order of packs is a pure function of (recipe, epoch, window); a position in it is a `Cursor`. Packs are trained in rounds
of N steps: round r holds the packs [r * N * G, (r + 1) * N * G) of that order, G being the global batch in packs.
Which of them make a step depends on their costs alone, so that step t is the same for any number of workers that divides G.
Only the last step of a run can be smaller, and empty packs fill it up.
"""

import json
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray

from burnish.config import Recipe
from burnish.data import balance, formats, sources
from burnish.data.conversation import Conversation, Refused
from burnish.data.packing import Packs, Sample, pack
from burnish.data.render import render
from burnish.data.rendered import Cache, Rendered
from burnish.data.template import Template

ORDER = "rounds of slices 1"
"""Names the order of packs; a run that was started under another one cannot go on without losing or repeating rows."""
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("seq_lens", pa.list_(pa.int32())),
        ("meta", pa.string()),
    ]
)
"""One row a pack. `meta` is JSON: of the pack before steps are cut, of the whole step after."""
_LIGHT = {"num_cpus": 0, "concurrency": 8}
"""How packing a window and cutting a round are placed. They take a fraction of a second beside a minute of rendering, but
Ray Data deals CPUs to all operators alike, as long as they do not say that they need none."""


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

    `packs` are [epoch, window, index], costliest first, a window being named by its position in the epoch; `progress` is the
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


def render_row(row: Any, template: Template, recipe: Recipe) -> list[Sample]:
    """The samples of one source row; raises Refused. A row that could not be read comes as its Refused."""
    if isinstance(row, Refused):
        raise row
    if not isinstance(row, dict):
        raise Refused("bad-row", f"the row is not a JSON object; found {row!r:.80}")
    data = recipe.data
    try:
        conversation = Conversation.parse(formats.messages_form(row))
        return render(conversation, template, data.max_length, data.train_on, data.history, data.on_overlong)
    except RecursionError:
        raise Refused("bad-row", "the row is nested too deeply to be read") from None


def render_slice(part: sources.Slice, template: Template, recipe: Recipe) -> Rendered:
    """Every row of a slice rendered, refusals collected. Raises DataError where the file cannot be read."""
    samples: list[tuple[int, Sample]] = []
    refused: list[dict[str, Any]] = []
    for index, row in sources.read(part):
        try:
            samples += [(index - part.first_row, sample) for sample in render_row(row, template, recipe)]
        except Refused as refusal:
            refused.append({**refusal.to_json(), "row": index - part.first_row})
    return Rendered.of(samples, refused, part.num_rows)


def pack_window(
    parts: Sequence[tuple[sources.Slice, Rendered]], epoch: int, recipe: Recipe
) -> tuple[Packs, list[dict[str, Any]], int]:
    """The packs of a window in their order, its refusals by row name, and its rows: a pure function of its arguments.

    Of a slice whose weight is a fraction, a seeded share of the rows is taken, another one in each epoch.
    """
    ids, trained, lengths, refused = [], [], [], []
    rows = 0
    for part, rendered in parts:
        kept = np.random.default_rng([recipe.data.seed, epoch, part.slice, 1]).random(rendered.num_rows) < part.keep
        rows += int(kept.sum())
        for each in rendered.refused:
            if kept[each["row"]]:
                refused.append({**each, "row": part.row_name(part.first_row + each["row"])})
        wanted = kept[rendered.rows]
        tokens = np.repeat(wanted, rendered.lengths)
        ids.append(rendered.input_ids if wanted.all() else rendered.input_ids[tokens])
        trained.append(rendered.trained if wanted.all() else rendered.trained[tokens])
        lengths.append(rendered.lengths[wanted])
    rng = np.random.default_rng([recipe.data.seed, epoch, parts[0][0].slice, 2])
    joined = np.concatenate(ids), np.concatenate(trained), np.concatenate(lengths)
    return pack(*joined, recipe.data.max_length, rng), refused, rows


def train_slices(recipe: Recipe, index: sources.Index, cursor: Cursor) -> list[list[tuple[Place, sources.Slice]]]:
    """Every window from the cursor to the end of the last epoch, in order: its slices, each with its place in the run."""
    found = []
    before, total = 0.0, sum(part.num_rows * part.keep for part in index.slices) * recipe.train.epochs
    for epoch in range(recipe.train.epochs):
        windows = sources.windows(index.slices, recipe.data.window_rows, recipe.data.seed, epoch)
        for position, numbers in enumerate(windows):
            parts = [index.slices[number] for number in numbers]
            share = sum(part.num_rows * part.keep for part in parts) / total
            if (epoch, position) >= (cursor.epoch, cursor.position):
                skip = cursor.index if (epoch, position) == (cursor.epoch, cursor.position) else 0
                place = Place(epoch, position, position + 1 == len(windows), before, share, skip)
                found.append([(place, part) for part in parts])
            before += share
    return found


def eval_slices(recipe: Recipe, index: sources.Index) -> list[list[tuple[Place, sources.Slice]]]:
    """Every window of the held-out files, in file order."""
    windows = sources.windows(index.slices, recipe.data.window_rows, recipe.data.seed, None)
    return [
        [(Place(0, position, position + 1 == len(windows), 0.0, 0.0, 0), index.slices[number]) for number in numbers]
        for position, numbers in enumerate(windows)
    ]


@dataclass(frozen=True)
class Rendering:
    """What rendering needs beside its rows."""

    template: Template
    recipe: Recipe
    cache: Cache | None


@dataclass(frozen=True)
class Rounds:
    """What packing and the cutting of steps need; without a tokenizer, which takes seconds to load."""

    recipe: Recipe
    cost: balance.Cost
    num_steps: int


def stream(
    windows: list[list[tuple[Place, sources.Slice]]], rendering: Rendering, rounds: Rounds, num_workers: int, start: Cursor
) -> ray.data.Dataset:
    """The lazy graph from slices to worker shares: blocks of G / `num_workers` packs, in global order from `start` on.

    Block b belongs to worker b % `num_workers`; the first pack of each block carries its step's `StepMeta`.
    """
    recipe = rendering.recipe
    assert windows and recipe.train.global_batch_size % num_workers == 0
    shared = ray.put(pickle.dumps(rendering))
    light: dict[str, Any] = {**_LIGHT, "batch_format": "pyarrow"}
    size = recipe.train.global_batch_size
    # A block must be a window, so each has as many slices as the largest, some of them empty.
    longest = max(map(len, windows))
    items = [
        {"place": json.dumps(asdict(window[0][0])), "slice": json.dumps(window[i][1].to_json()) if i < len(window) else ""}
        for window in windows
        for i in range(longest)
    ]
    round_packs = size * rounds.num_steps
    rendered = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _slice_task, batch_size=None, batch_format="pyarrow", fn_kwargs={"shared": [shared]}
    )
    # Each block is one slice, so that a batch of as many is exactly a window.
    packed = rendered.map_batches(_window_task, batch_size=longest, fn_kwargs={"recipe": recipe}, **light)
    arguments = {"rounds": rounds, "num_workers": num_workers, "start": start}
    cut = _cut(packed, round_packs).map_batches(_round_task, batch_size=round_packs, fn_kwargs=arguments, **light)
    return _cut(cut, size // num_workers)


def _cut(dataset: ray.data.Dataset, num_rows: int) -> ray.data.Dataset:
    """The same rows in blocks of `num_rows`, the last one apart."""
    cut = dataset.repartition(target_num_rows_per_block=num_rows, strict=True)
    # There is no public way to say that this is light.
    operator = cut._logical_plan.dag
    operator.ray_remote_args["num_cpus"] = _LIGHT["num_cpus"]
    operator.compute.size = _LIGHT["concurrency"]
    return cut


_unpickled: dict[str, Rendering] = {}
"""The rendering of the stream that this worker process serves: a large tokenizer takes a second to unpickle."""


def _shared(reference: "ray.ObjectRef[bytes]") -> Rendering:
    key = str(reference)
    if key not in _unpickled:
        _unpickled.clear()
        _unpickled[key] = pickle.loads(ray.get(reference))
    return _unpickled[key]


def _slice_task(table: pa.Table, shared: list[Any]) -> Iterator[pa.Table]:
    """Descriptions of slices to their rendered samples, out of the cache where they are there."""
    rendering = _shared(shared[0])
    for item in table.to_pylist():
        rendered = (
            rendered_slice(sources.Slice(**json.loads(item["slice"])), rendering)
            if item["slice"]
            else Rendered.of([], [], 0)
        )
        own = rendered.to_table()
        for name in ("place", "slice"):
            own = own.append_column(name, pa.array([item[name]], pa.string()))
        yield own


def rendered_slice(part: sources.Slice, rendering: Rendering) -> Rendered:
    """The rendered samples of a slice, out of the cache where they are there, else put into it.

    Raises DataError where the file cannot be read.
    """
    cache = rendering.cache
    found = cache.get(part.digest) if cache else None
    if found is None:
        found = render_slice(part, rendering.template, rendering.recipe)
        if cache:
            cache.put(part.digest, found)
    return found


def _window_task(table: pa.Table, recipe: Recipe) -> pa.Table:
    """The rendered slices of one window to its packs, each with its meta."""
    place = Place(**json.loads(table.column("place")[0].as_py()))
    named = table.column("slice").to_pylist()
    parts = [(sources.Slice(**json.loads(text)), Rendered.from_table(table, row)) for row, text in enumerate(named) if text]
    packs, refused, rows = pack_window(parts, place.epoch, recipe)
    trained = packs.trained_tokens()
    # A window whose rows are all refused gives one empty pack, so that its refusals travel like any other's.
    count = max(1, len(packs))
    metas = []
    for i in range(count):
        after = Cursor(place.epoch, place.position, i + 1)
        if i + 1 == count:
            after = Cursor(place.epoch + 1) if place.last else Cursor(place.epoch, place.position + 1)
        meta = {
            "pack": [place.epoch, place.position, i],
            "trained_tokens": int(trained[i]) if len(packs) else 0,
            "progress": place.before + place.share * i / count,
            "after": asdict(after),
            "refused": refused if i == 0 else [],
            "rows": rows if i == 0 else 0,
        }
        metas.append(json.dumps(meta))
    return (_table(packs, metas) if len(packs) else _empty(metas)).slice(place.skip)


def _round_task(table: pa.Table, rounds: Rounds, num_workers: int, start: Cursor) -> pa.Table:
    """The packs of a round, cut into steps and dealt to the workers; each share's first pack has its step's meta.

    Of the round at which the stream starts, the steps that `start` says were taken are left out.
    """
    size = rounds.recipe.train.global_batch_size
    metas = [json.loads(text) for text in table.column("meta").to_pylist()]
    epoch, position, index = metas[0]["pack"]
    seq_lens = table.column("seq_lens").combine_chunks()
    firsts = seq_lens.offsets.to_numpy() - seq_lens.offsets[0].as_py()
    lengths = seq_lens.flatten().to_numpy(zero_copy_only=False)
    costs = rounds.cost.of(lengths, firsts)
    sums = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    tokens = np.diff(sums[firsts])
    rng = np.random.default_rng([rounds.recipe.data.seed, epoch, position, index])
    cut = balance.steps(costs, np.array([meta["pack"][0] for meta in metas]), size, rng)
    first = start.taken if (epoch, position, index) == (start.epoch, start.position, start.index) else 0
    order: list[NDArray[np.intp]] = []
    texts: list[str] = []
    dealt = balance.deal(size, num_workers)
    for number in range(first, len(cut)):
        step = cut[number]
        filled = np.concatenate([step, np.full(size - len(step), table.num_rows)])
        mean, largest = balance.balance(np.append(costs, 0.0)[filled], num_workers)
        after = metas[-1]["after"] if number + 1 == len(cut) else {**_start_of(metas[0]), "taken": number + 1}
        meta = StepMeta(
            packs=tuple(tuple(metas[i]["pack"]) for i in step if tokens[i]),
            tokens=int(tokens[step].sum()),
            trained_tokens=sum(metas[i]["trained_tokens"] for i in step),
            progress=metas[number * size]["progress"],
            cursor=Cursor(**after),
            refused=tuple(row for meta in metas for row in meta["refused"]) if number == 0 else (),
            rows=sum(meta["rows"] for meta in metas) if number == 0 else 0,
            balance=mean / largest if largest else 1.0,
        )
        order.append(filled[dealt])
        texts += [json.dumps(asdict(meta)) if place % (size // num_workers) == 0 else "" for place in range(size)]
    rows = pa.concat_tables([table, _empty([""])]).take(pa.array(np.concatenate(order)))
    return rows.set_column(rows.schema.get_field_index("meta"), "meta", pa.array(texts, pa.string()))


def _start_of(meta: dict[str, Any]) -> dict[str, int]:
    """The cursor at a pack, from its meta."""
    epoch, position, index = meta["pack"]
    return {"epoch": epoch, "position": position, "index": index}


def _table(packs: Packs, metas: list[str]) -> pa.Table:
    """An Arrow table of packs without a detour through Python lists."""
    tokens, samples = packs.starts.astype(np.int32), packs.firsts.astype(np.int32)
    columns = [
        pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(values, pa.int32()))
        for ends, values in ((tokens, packs.input_ids), (tokens, packs.labels), (samples, packs.seq_lens))
    ]
    return pa.Table.from_arrays([*columns, pa.array(metas, pa.string())], schema=SCHEMA)


def _empty(metas: list[str]) -> pa.Table:
    """A table of packs that train nothing."""
    nothing = [pa.array([[]] * len(metas), pa.list_(pa.int32()))] * 3
    return pa.Table.from_arrays([*nothing, pa.array(metas, pa.string())], schema=SCHEMA)
