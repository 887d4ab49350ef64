"""The Ray Data graph: slices of rows are rendered, windows packed and steps cut by CPU tasks, and dealt to the workers."""

import json
import pickle
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import TaskPoolStrategy

from burnish import storage
from burnish.config import Recipe
from burnish.data import balance, formats, sources
from burnish.data.conversation import Conversation, Refused
from burnish.data.order import Cursor, Place, StepMeta, pack_window
from burnish.data.packing import Packs, Sample
from burnish.data.render import render
from burnish.data.rendered import Cache, Rendered
from burnish.data.slices import Slice
from burnish.data.stages import Stages
from burnish.data.template import Template
from burnish.interrupts import uninterrupted

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("seq_lens", pa.list_(pa.int32())),
        ("meta", pa.string()),
    ]
)
"""One row a pack. `meta` is JSON: of the pack before steps are cut, of the whole step after."""
_LIGHT_CPUS, _LIGHT_TASKS = 0, 2
"""CPUs and concurrent tasks of packing windows and cutting rounds. They take a fraction of a second beside a minute of
rendering, but Ray Data deals CPUs to all operators alike, as long as they do not say that they need none."""

_TASK_SLICES = 2
"""Slices that one task renders: between two tasks a CPU waits for Ray."""

_BLOCK_BYTES, _RESERVED = 4 << 20, 0.1
"""Largest block, and share of its memory that Ray Data keeps for each operator apart. With its own 128 MiB and 0.5, a window
in one block is more than an operator may put out, and Ray moves it after ten idle seconds (benchmarks/large.py)."""


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


def render_slice(part: Slice, template: Template, recipe: Recipe) -> Rendered:
    """Every row of a slice rendered, refusals collected. Raises DataError where the file cannot be read."""
    samples: list[tuple[int, Sample]] = []
    refused: list[dict[str, Any]] = []
    for index, row in sources.read(part):
        try:
            samples += [(index - part.first_row, sample) for sample in render_row(row, template, recipe)]
        except Refused as refusal:
            refused.append({**refusal.to_json(), "row": index - part.first_row})
    return Rendered.of(samples, refused, part.num_rows)


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
    windows: list[list[tuple[Place, Slice]]],
    rendering: Rendering,
    rounds: Rounds,
    num_workers: int,
    start: Cursor,
    stages: Stages,
) -> ray.data.Dataset:
    """The lazy graph from slices to worker shares, in global order from `start` on; `steps_of` takes a block apart.

    Its tasks tell `stages` what they are at.

    Each round of N steps is a block for each worker, of N * G / `num_workers` rows: block b belongs to worker
    b % `num_workers`. A block for each step would cost Ray more than rendering costs us.
    """
    recipe = rendering.recipe
    assert windows and recipe.train.global_batch_size % num_workers == 0
    shared = ray.put(pickle.dumps(rendering))
    light: dict[str, Any] = {"num_cpus": _LIGHT_CPUS, "compute": TaskPoolStrategy(_LIGHT_TASKS), "batch_format": "pyarrow"}
    size = recipe.train.global_batch_size
    # A block must be a window, so each has as many slices as the largest, some of them empty, and whole tasks.
    longest = -(-max(map(len, windows)) // _TASK_SLICES) * _TASK_SLICES
    items = [
        {"place": json.dumps(asdict(window[0][0])), "slice": json.dumps(window[i][1].to_json()) if i < len(window) else ""}
        for window in windows
        for i in range(longest)
    ]
    round_packs = size * rounds.num_steps
    rendered = ray.data.from_items(items, override_num_blocks=len(items) // _TASK_SLICES).map_batches(
        _slice_task, batch_size=None, batch_format="pyarrow", fn_kwargs={"shared": [shared], "stages": stages}
    )
    # Tasks end where windows end, so that a batch of `longest` slices is exactly a window.
    told = {"recipe": recipe, "slices": longest, "stages": stages}
    packed = rendered.map_batches(_window_task, batch_size=longest, fn_kwargs=told, **light)
    arguments = {"rounds": rounds, "num_workers": num_workers, "start": start, "stages": stages}
    cut = _cut(packed, round_packs).map_batches(_round_task, batch_size=round_packs, fn_kwargs=arguments, **light)
    shares = _cut(cut, round_packs // num_workers)
    shares.context.target_max_block_size = _BLOCK_BYTES
    shares.context.op_resource_reservation_ratio = _RESERVED
    return shares


def steps_of(block: pa.Table, share: int) -> Iterator[tuple[StepMeta, pa.Table]]:
    """The steps of a worker's block in order: the meta of the whole step, and the worker's `share` packs of it."""
    texts = block.column("meta").to_pylist()
    for first in range(0, block.num_rows, share):
        if texts[first]:  # behind the last step of a round, rows without a meta fill the block
            yield StepMeta.from_json(texts[first]), block.slice(first, share)


def _cut(dataset: ray.data.Dataset, num_rows: int) -> ray.data.Dataset:
    """The same rows in blocks of `num_rows`, the last one apart."""
    cut = dataset.repartition(target_num_rows_per_block=num_rows, strict=True)
    # There is no public way to say that this is light.
    operator = cut._logical_plan.dag
    operator.ray_remote_args["num_cpus"] = _LIGHT_CPUS
    operator.compute.size = _LIGHT_TASKS
    return cut


_unpickled: dict[str, Any] = {}


def unpickled(reference: "ray.ObjectRef[bytes]") -> Any:
    """What all tasks of a stream share, unpickled once in each worker process: a large tokenizer takes a second."""
    key = str(reference)
    if key not in _unpickled:
        payload = ray.get(reference)
        _unpickled.clear()
        with uninterrupted():
            _unpickled[key] = pickle.loads(payload)
    return _unpickled[key]


def _slice_task(table: pa.Table, shared: list[Any], stages: Stages) -> Iterator[pa.Table]:
    """Descriptions of slices to their rendered samples, out of the cache where they are there."""
    rendering: Rendering = unpickled(shared[0])
    for item in table.to_pylist():
        rendered = Rendered.of([], [], 0)
        if item["slice"]:
            part = Slice(**json.loads(item["slice"]))
            with stages.at_work("rendering", f"{part.row_name(part.first_row)} and {part.num_rows - 1} rows behind it"):
                rendered = rendered_slice(part, rendering)
        own = rendered.to_table()
        for name in ("place", "slice"):
            own = own.append_column(name, pa.array([item[name]], pa.string()))
        yield own


def rendered_slice(part: Slice, rendering: Rendering) -> Rendered:
    """The rendered samples of a slice, out of the cache where they are there, else put into it.

    A storage that fails for a while is waited for. Raises DataError where the file cannot be read, InfrastructureError where
    its storage goes on failing.
    """
    cache = rendering.cache
    found = cache.get(part.digest) if cache else None
    if found is None:
        patiently = storage.attempts(f"{part.name} could not be read")
        found = patiently(render_slice, part, rendering.template, rendering.recipe)
        if cache:
            cache.put(part.digest, found)
    return found


def _window_task(table: pa.Table, recipe: Recipe, slices: int, stages: Stages) -> pa.Table:
    """The rendered slices of one window to its packs, each with its meta."""
    assert table.num_rows == slices and len(table.column("place").unique()) == 1, "a batch is a window"
    place = Place(**json.loads(table.column("place")[0].as_py()))
    named = table.column("slice").to_pylist()
    parts = [(Slice(**json.loads(text)), Rendered.from_table(table, row)) for row, text in enumerate(named) if text]
    with stages.at_work("packing", f"window {place.position} of epoch {place.epoch}"):
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


def _round_task(table: pa.Table, rounds: Rounds, num_workers: int, start: Cursor, stages: Stages) -> pa.Table:
    """The packs of a round, cut into steps and dealt to the workers: all steps of the first worker, then of the next.

    The first pack of each worker's share of a step has the meta of the step. Of the round at which the stream starts, the
    steps that `start` says were taken are left out. Every round is filled up to as many rows, with packs that no step has.
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
    with stages.at_work("cutting steps", f"the round from pack {index} of window {position}, epoch {epoch}"):
        cut = balance.steps(costs, np.array([meta["pack"][0] for meta in metas]), size, rng)
    first = start.taken if (epoch, position, index) == (start.epoch, start.position, start.index) else 0
    share = size // num_workers
    order = np.full((num_workers, rounds.num_steps, share), table.num_rows)
    texts = np.full(order.shape, "", object)
    dealt = balance.deal(size, num_workers)
    for number in range(first, len(cut)):
        step = cut[number]
        filled = np.concatenate([step, np.full(size - len(step), table.num_rows)])
        mean, largest = balance.balance(np.append(costs, 0.0)[filled], num_workers)
        after = metas[-1]["after"] if number + 1 == len(cut) else {**_start_of(metas[0]), "taken": number + 1}
        meta = StepMeta(
            packs=tuple(tuple(metas[i]["pack"]) for i in sorted(step) if tokens[i]),
            tokens=int(tokens[step].sum()),
            trained_tokens=sum(metas[i]["trained_tokens"] for i in step),
            progress=metas[number * size]["progress"],
            cursor=Cursor(**after),
            refused=tuple(row for meta in metas for row in meta["refused"]) if number == 0 else (),
            rows=sum(meta["rows"] for meta in metas) if number == 0 else 0,
            balance=mean / largest if largest else 1.0,
        )
        order[:, number - first] = filled[dealt].reshape(num_workers, share)
        texts[:, number - first, 0] = json.dumps(asdict(meta))
    rows = pa.concat_tables([table, _empty([""])]).take(pa.array(order.ravel()))
    return rows.set_column(rows.schema.get_field_index("meta"), "meta", pa.array(texts.ravel(), pa.string()))


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
