"""Windows packed out of rendered slices, and the places of slices in a run."""

import dataclasses
import errno

import numpy as np

from burnish.data import order, pipeline, sources
from burnish.data.order import Cursor
from burnish.train.prepare import prepare
from tests.conftest import conversation, write_rows


def test_a_row_that_is_too_large_or_unreadable_is_refused_by_its_name(make_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_ROW_BYTES", 2000)
    huge = {"messages": [{"role": "user", "content": "x" * 3000}, {"role": "assistant", "content": "y"}]}
    path = write_rows(tmp_path / "rows.jsonl", [conversation(0), huge, "{broken", [1], conversation(1)])
    recipe = make_recipe(data={"train": [{"path": str(path)}], "max_refused": 1.0})
    prepared = prepare(recipe)
    (part,) = prepared.train.slices
    packs, refused, rows = order.pack_window([(part, pipeline.rendered_slice(part, prepared.rendering()))], 0, recipe)
    assert rows == 5 and len(packs.seq_lens) == 2
    assert [(row["row"], row["code"]) for row in refused] == [(f"{path}#{i}", "bad-row") for i in (1, 2, 3)]
    assert "bytes, more than 2,000" in refused[0]["message"] and "not a JSON object" in refused[2]["message"]


def test_rows_are_read_again_where_their_storage_fails_for_a_while(make_recipe, monkeypatch):
    prepared = prepare(make_recipe(data={"cache": None}))
    part, real, failed = prepared.train.slices[0], sources._read_lines, []

    def fails_in_the_middle(slice_):
        rows = real(slice_)
        yield next(rows)
        if not failed:
            failed.append(1)
            raise OSError(errno.EIO, "Input/output error")
        yield from rows

    right = pipeline.rendered_slice(part, prepared.rendering())
    monkeypatch.setattr(sources, "_read_lines", fails_in_the_middle)
    found = pipeline.rendered_slice(part, prepared.rendering())
    assert failed and len(right.lengths) > 1
    for field in dataclasses.fields(right):
        assert np.array_equal(getattr(found, field.name), getattr(right, field.name)), field.name


def test_windows_from_a_cursor_are_the_rest_and_their_shares_add_up(make_recipe):
    recipe = make_recipe(train={"epochs": 2})
    index = prepare(recipe).train
    whole = order.train_slices(recipe, index, Cursor())
    places = [window[0][0] for window in whole]
    assert [(place.epoch, place.position, place.last) for place in places] == [
        (epoch, position, position == 2) for epoch in (0, 1) for position in range(3)
    ]
    assert np.allclose(np.cumsum([0.0, *(place.share for place in places)])[:-1], [place.before for place in places])
    assert sorted(part.slice for window in whole[:3] for _, part in window) == [part.slice for part in index.slices]
    rest = order.train_slices(recipe, index, Cursor(1, 1, 4, taken=2))
    assert [[part for _, part in window] for window in rest] == [[part for _, part in window] for window in whole[4:]]
    assert [window[0][0].skip for window in rest] == [4, 0]
    assert order.train_slices(recipe, index, Cursor(2)) == [], "an epoch's end is the next one's start"
    assert len(order.train_slices(recipe, index, Cursor(1))) == 3
