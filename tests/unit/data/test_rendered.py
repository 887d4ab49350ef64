"""Rendered slices, and the cache of them that runs share."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from burnish.data import pipeline
from burnish.data.contract import Contract
from burnish.data.packing import Sample
from burnish.data.rendered import Cache, Rendered
from burnish.data.tokenizer import load_template
from burnish.train.prepare import prepare
from tests.conftest import CHATML, conversation, write_rows


def rendered(seed: int = 0, samples: int = 5) -> Rendered:
    rng = np.random.default_rng(seed)
    made = []
    for row in range(samples):
        length = int(rng.integers(2, 40))
        made.append((row, Sample(rng.integers(0, 300, length).astype(np.int32), np.arange(length) > 0, (1,))))
    return Rendered.of(made, [{"row": 9, "code": "overlong", "turn": None, "message": "lång"}], 10)


def same(one: Rendered | None, other: Rendered) -> bool:
    assert one is not None
    arrays = ("input_ids", "trained", "lengths", "rows")
    equal = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays)
    kinds = all(getattr(one, name).dtype == getattr(other, name).dtype for name in arrays)
    return equal and kinds and one.refused == other.refused and one.num_rows == other.num_rows


@pytest.mark.parametrize("samples", [0, 5])
def test_a_slice_is_what_it_was_after_arrow_and_after_the_cache(tmp_path, samples):
    one = rendered(samples=samples)
    assert same(Rendered.from_table(one.to_table()), one)
    cache = Cache(str(tmp_path / "cache"), "key")
    assert cache.get("digest") is None
    cache.put("digest", one)
    assert same(cache.get("digest"), one)
    assert cache.get("other") is None
    assert Cache(cache.folder, "other key").get("digest") is None


def entry(cache: Cache) -> Path:
    (path,) = Path(cache.folder).rglob("*.arrow")
    return path


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "short"])
def test_a_damaged_entry_is_no_entry_and_is_made_again(tmp_path, damage):
    cache, one = Cache(str(tmp_path), "key"), rendered()
    cache.put("digest", one)
    data = bytearray(entry(cache).read_bytes())
    data[len(data) // 2] ^= 1
    whole = entry(cache).read_bytes()
    broken = {"torn": whole[: len(whole) // 2], "flipped": bytes(data), "empty": b"", "short": b"abc"}[damage]
    entry(cache).write_bytes(broken)
    assert cache.get("digest") is None
    cache.put("digest", one)
    assert same(cache.get("digest"), one)


def test_many_writers_and_readers_at_once_see_whole_entries(tmp_path):
    cache, slices = Cache(str(tmp_path), "key"), [rendered(seed, 200) for seed in range(4)]

    def work(number: int) -> bool:
        cache.put(str(number % 4), slices[number % 4])
        found = cache.get(str(number % 4))
        return same(found, slices[number % 4])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(64)))
    assert len(list(tmp_path.rglob("*.arrow"))) == 4
    assert not list(tmp_path.rglob("*.partial"))


def test_a_cache_that_cannot_be_written_is_said_and_changes_nothing(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cache = Cache(str(tmp_path / "file" / "cache"), "key")
    cache.put("digest", rendered())
    assert "cannot be written" in caplog.text
    assert cache.get("digest") is None


def test_a_cache_on_another_file_system():
    cache, one = Cache("memory://cache/rows", "key"), rendered()
    assert cache.get("digest") is None
    cache.put("digest", one)
    assert same(cache.get("digest"), one)


def test_the_key_covers_all_that_rendering_depends_on(make_recipe, tmp_path):
    thinks = "{%- if enable_thinking %}{%- endif %}" + CHATML

    def key(source: str = thinks, **sections) -> str:
        path = tmp_path / "chat.jinja"
        path.write_text(source)
        recipe = make_recipe(**{"template": {"path": str(path)}, **sections})
        cache = Cache.of(recipe, Contract.of(load_template(recipe)))
        assert cache is not None
        return cache.key

    others = [
        key(data={"max_length": 255}),
        key(data={"train_on": "last_assistant"}),
        key(data={"history": "last_turn"}),
        key(data={"on_overlong": "truncate_turns"}),
        key(thinks.replace("<think>", "<thinks>")),
        key(template={"path": str(tmp_path / "chat.jinja"), "stop_tokens": ["<|endoftext|>"]}),
        key(template={"path": str(tmp_path / "chat.jinja"), "kwargs": {"enable_thinking": False}}),
    ]
    assert len({key(), *others}) == 1 + len(others)
    assert key() == key(name="other", data={"seed": 5, "window_rows": 99}, optim={"learning_rate": 1.0})
    assert Cache.of(make_recipe(data={"cache": None}), Contract.of(load_template(make_recipe()))) is None


def test_rows_are_rendered_once_for_all_runs(make_recipe, tmp_path):
    recipe = make_recipe()
    prepared = prepare(recipe)
    rendering = prepared.rendering()
    first = [pipeline.rendered_slice(part, rendering) for part in prepared.train.slices]
    assert len(list((tmp_path / "runs" / ".cache").rglob("*.arrow"))) == len(first) > 1
    # The file is another one now, and is not read again: only what it held before is asked for.
    write_rows(tmp_path / "train.jsonl", [conversation(i) for i in range(50, 60)])
    other = prepare(make_recipe(name="other", data={"seed": 3})).rendering()
    again = [pipeline.rendered_slice(part, other) for part in prepared.train.slices]
    assert all(same(one, two) for one, two in zip(first, again, strict=True))
