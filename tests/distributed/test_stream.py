"""The stream on a simulated cluster: the same steps for any number of workers, each row once, resumed at a position."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from burnish.data import pipeline, sources
from burnish.data.pipeline import Cursor
from burnish.train.loop import batches
from burnish.train.model import load_template
from burnish.train.prepare import prepare
from burnish.train.split import OrderedSplit
from tests.conftest import conversation, write_rows

pytestmark = pytest.mark.distributed


def consume(recipe, workers, cursor=None):
    """What each worker receives: a list of steps, each with its meta and this worker's packs."""
    prepared = prepare(recipe)
    windows = list(pipeline.train_windows(recipe, prepared.train, cursor or Cursor()))
    stream = pipeline.stream(windows, prepared.template, recipe, workers)
    shards = OrderedSplit().configure({"train": stream}, workers, None, None)
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda shard: list(batches(shard["train"])), shards))


def steps(received):
    """Per step: the packs of all workers in order, as token ids; and the meta, which every worker must agree on."""
    found = []
    for shares in zip(*received, strict=True):
        assert len({str(share.meta) for share in shares}) == 1
        found.append((shares[0].meta, [ids.tolist() for share in shares for ids, _, _ in share.packs]))
    return found


def test_every_number_of_workers_gets_the_same_steps(cluster, make_recipe):
    recipe = make_recipe(train={"epochs": 2})
    one, two, four = (steps(consume(recipe, workers)) for workers in (1, 2, 4))
    assert one == two == four
    assert len(one) > 4
    assert len({len(packs) for _, packs in one}) == 1, "every step is filled up to the global batch"
    named = [name for meta, _ in one for name in meta.packs]
    assert len(named) == len(set(named))
    assert {epoch for epoch, _, _ in named} == {0, 1}


def test_an_epoch_trains_each_row_once_in_windows_that_are_a_pure_function(cluster, make_recipe):
    recipe = make_recipe()
    received = steps(consume(recipe, 2))
    template = load_template(recipe)
    index = sources.index(recipe.data.train, recipe.data.window_rows)
    expected = Counter(
        tuple(sample.input_ids.tolist())
        for window in index.windows
        for sample in pipeline.render_window(window, 0, template, recipe).samples
    )
    assert expected.total() == 40
    by_name = {}
    for window in index.windows:
        packs, _ = pipeline.pack_window(window, 0, template, recipe)
        by_name |= {(0, window.window, i): pack.input_ids.tolist() for i, pack in enumerate(packs)}
    trained = {}
    for meta, packs in received:
        trained |= dict(zip(meta.packs, [ids for ids in packs if ids], strict=True))
    assert trained == by_name
    assert sum(meta.tokens for meta, _ in received) == sum(len(ids) * n for ids, n in expected.items())
    order = sources.epoch_order(len(index.windows), recipe.data.seed, 0)
    assert [name[1] for name in trained] == sorted((name[1] for name in trained), key=order.index)


@pytest.mark.parametrize("done", [1, 3, 5])
def test_a_stream_that_starts_at_a_cursor_is_the_rest_of_the_whole(cluster, make_recipe, done):
    recipe = make_recipe(train={"epochs": 2})
    whole = steps(consume(recipe, 2))
    rest = steps(consume(recipe, 4, whole[done - 1][0].cursor))
    assert [packs for _, packs in rest] == [packs for _, packs in whole[done:]]
    assert [(m.packs, m.trained_tokens, m.progress, m.cursor) for m, _ in rest] == [
        (m.packs, m.trained_tokens, m.progress, m.cursor) for m, _ in whole[done:]
    ]


def test_refusals_travel_with_their_window_even_when_it_has_nothing_else(cluster, make_recipe, tmp_path):
    good = [conversation(i) for i in range(4)]
    bad = [{"messages": [{"role": "user", "content": str(i)}]} for i in range(4)]
    path = write_rows(tmp_path / "mixed.jsonl", good + bad)
    recipe = make_recipe(data={"train": [{"path": str(path)}], "window_rows": 4, "max_refused": 0.5})
    received = steps(consume(recipe, 2))
    refused = [(row["row"], row["code"]) for meta, _ in received for row in meta.refused]
    assert refused == [(f"{path}#{i}", "no-assistant") for i in range(4, 8)]
    assert sum(meta.rows for meta, _ in received) == 8
    assert all(ids for meta, packs in received for ids in packs[: len(meta.packs)] if meta.packs)


def test_a_fractional_weight_keeps_a_seeded_share_that_differs_by_epoch(cluster, make_recipe, tmp_path):
    path = write_rows(tmp_path / "half.jsonl", [conversation(i) for i in range(60)])
    recipe = make_recipe(data={"train": [{"path": str(path), "weight": 0.5}], "window_rows": 64}, train={"epochs": 2})
    rows = [meta.rows for meta, _ in steps(consume(recipe, 1)) if meta.rows]
    assert len(rows) == 2 and all(15 < count < 45 for count in rows)
    assert steps(consume(recipe, 1)) == steps(consume(recipe, 2))
