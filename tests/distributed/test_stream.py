"""The stream on a simulated cluster: the same steps for any number of workers, each row once, resumed at a position."""

import gzip
import json
import logging
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module

import pytest
import ray
from datasets import Dataset

from burnish.data import order, pipeline, sources
from burnish.data.order import Cursor
from burnish.data.slices import windows
from burnish.data.stages import Patience, Stages, Teller
from burnish.data.tokenizer import load_template
from burnish.errors import InfrastructureError
from burnish.sections import SourceSpec
from burnish.train.batches import batches
from burnish.train.prepare import prepare
from burnish.train.split import OrderedSplit
from tests.conftest import conversation, write_rows

pytestmark = pytest.mark.distributed


def consume(recipe, workers, cursor=None, round_steps=None):
    """What each worker receives: a list of steps, each with its meta and this worker's packs."""
    prepared = prepare(recipe)
    windows = order.train_slices(recipe, prepared.train, cursor or Cursor())
    rounds = prepared.rounds()
    rounds = replace(rounds, num_steps=round_steps or rounds.num_steps)
    stages = Stages()
    stream = pipeline.stream(windows, prepared.rendering(), rounds, workers, cursor or Cursor(), stages)
    shards = OrderedSplit().configure({"train": stream}, workers, None, None)
    share = recipe.train.global_batch_size // workers
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda shard: list(batches(shard["train"], share, Patience(300, stages))), shards))


def steps(received):
    """Per step: its packs costliest first, as token ids, however they were dealt; and the meta, on which all workers agree."""
    found = []
    for shares in zip(*received, strict=True):
        assert len({str(share.meta) for share in shares}) == 1
        # Worker w has every W-th pack, so taking one of each worker in turn gives them all in order.
        dealt = zip(*([ids.tolist() for ids, _, _ in share.packs] for share in shares), strict=True)
        found.append((replace(shares[0].meta, balance=0.0), [ids for packs in dealt for ids in packs]))
    return found


def test_every_number_of_workers_gets_the_same_steps(cluster, make_recipe):
    recipe = make_recipe(train={"epochs": 2})
    one, two, four = (steps(consume(recipe, workers, round_steps=3)) for workers in (1, 2, 4))
    assert one == two == four
    assert len(one) > 4
    assert len({len(packs) for _, packs in one}) == 1, "every step is filled up to the global batch"
    named = [name for meta, _ in one for name in meta.packs]
    assert len(named) == len(set(named))
    assert {epoch for epoch, _, _ in named} == {0, 1}
    rounds = [meta.cursor.taken for meta, _ in one]
    assert rounds.count(0) > 1 and rounds.count(1) > 1 and max(rounds) == 2, "several rounds of three steps"


def test_an_epoch_trains_each_row_once_in_windows_that_are_a_pure_function(cluster, make_recipe):
    recipe = make_recipe()
    received = steps(consume(recipe, 2))
    template = load_template(recipe)
    index = sources.index(recipe.data.train, recipe.data.window_rows)
    rendered = [pipeline.render_slice(part, template, recipe) for part in index.slices]
    assert sum(len(each.lengths) for each in rendered) == 40
    by_name = {}
    for position, numbers in enumerate(windows(index.slices, recipe.data.window_rows, recipe.data.seed, 0)):
        packs, _, rows = order.pack_window([(index.slices[n], rendered[n]) for n in numbers], 0, recipe)
        assert rows == (16 if position < 2 else 8)
        by_name |= {(0, position, i): packs[i].input_ids.tolist() for i in range(len(packs))}
    for meta, packs in received:
        assert sorted(by_name[name] for name in meta.packs) == sorted(ids for ids in packs if ids)
        assert list(meta.packs) == sorted(meta.packs), "in global order"
    assert sorted(name for meta, _ in received for name in meta.packs) == sorted(by_name)
    assert sum(meta.tokens for meta, _ in received) == sum(len(each.input_ids) for each in rendered)


def test_a_stream_that_starts_at_a_cursor_is_the_rest_of_the_whole(cluster, make_recipe):
    recipe = make_recipe(train={"epochs": 2})
    whole = steps(consume(recipe, 2, round_steps=3))
    for done in (1, 3, 5):  # in the first round, at its end, and in the middle of the second
        rest = steps(consume(recipe, 4, whole[done - 1][0].cursor, round_steps=3))
        assert [packs for _, packs in rest] == [packs for _, packs in whole[done:]], done
        assert [(m.packs, m.trained_tokens, m.progress, m.cursor) for m, _ in rest] == [
            (m.packs, m.trained_tokens, m.progress, m.cursor) for m, _ in whole[done:]
        ], done


def test_refusals_travel_with_their_window_even_when_it_has_nothing_else(cluster, make_recipe, tmp_path):
    good = [conversation(i) for i in range(4)]
    bad = [{"messages": [{"role": "user", "content": str(i)}]} for i in range(4)]
    path = write_rows(tmp_path / "mixed.jsonl", good + bad)
    recipe = make_recipe(data={"train": [{"path": str(path)}], "window_rows": 4, "max_refused": 0.5})
    received = steps(consume(recipe, 2))
    refused = [(row["row"], row["code"]) for meta, _ in received for row in meta.refused]
    assert sorted(refused) == [(f"{path}#{i}", "no-assistant") for i in range(4, 8)]
    assert sum(meta.rows for meta, _ in received) == 8
    assert all(ids for meta, packs in received for ids in packs[: len(meta.packs)] if meta.packs)


def test_the_first_step_is_there_before_the_source_is_read_to_its_end(cluster, make_recipe, tmp_path):
    lines = [json.dumps(conversation(i)) for i in range(200)]
    (tmp_path / "early.jsonl").write_text("\n".join(lines[:180]))
    late = tmp_path / "late.jsonl.gz"
    written = gzip.compress("\n".join(lines[180:]).encode())
    late.write_bytes(written)
    train = [{"path": str(tmp_path / "early.jsonl")}, {"path": str(late)}]
    data = {"train": train, "window_rows": 32, "cache": None}
    slices = sources.index(make_recipe(data=data).data.train, 32).slices
    # A seed whose last window ends with the compressed file, which is one slice.
    seed = next(seed for seed in range(10_000) if windows(slices, 32, seed, 0)[-1][-1] == len(slices) - 1)
    recipe = make_recipe(data={**data, "seed": seed})
    prepared = prepare(recipe)
    drawn = order.train_slices(recipe, prepared.train, Cursor())
    assert drawn[-1][-1][1].path == str(late)
    late.unlink()
    os.mkfifo(late)  # whoever reads it waits until somebody writes
    rounds = replace(prepared.rounds(), num_steps=2)
    stages = Stages()
    stream = pipeline.stream(drawn, prepared.rendering(), rounds, 1, Cursor(), stages)
    (shard,) = OrderedSplit().configure({"train": stream}, 1, None, None)
    received = batches(shard["train"], recipe.train.global_batch_size, Patience(300, stages))
    tokens = next(received).meta.tokens
    late.write_bytes(written)
    tokens += sum(batch.meta.tokens for batch in received)
    rendered = [pipeline.render_slice(part, prepared.template, recipe) for window in drawn[:-1] for _, part in window]
    assert tokens > sum(len(each.input_ids) for each in rendered)


def test_a_stall_names_the_stage_that_is_starved_and_its_rows(cluster, make_recipe, tmp_path):
    path = write_rows(tmp_path / "stuck.jsonl", [conversation(i) for i in range(8)])
    recipe = make_recipe(data={"train": [{"path": str(path)}], "cache": None})
    prepared = prepare(recipe)
    drawn = order.train_slices(recipe, prepared.train, Cursor())
    written = path.read_bytes()
    path.unlink()
    os.mkfifo(path)  # whoever reads it waits until somebody writes
    stages = Stages()
    stream = pipeline.stream(drawn, prepared.rendering(), prepared.rounds(), 1, Cursor(), stages)
    (shard,) = OrderedSplit().configure({"train": stream}, 1, None, None)
    assert "no data task is running" in stages.say()
    with pytest.raises(InfrastructureError) as caught:
        next(batches(shard["train"], recipe.train.global_batch_size, Patience(30, stages)))
    with open(os.open(path, os.O_RDWR), "wb") as pipe:  # neither waits for the task nor fails without it
        pipe.write(written)
    assert caught.match(rf"no batch for 30 s .*: rendering is at work on {path}#0 and 7 rows behind it for \d+ s on node")


def test_a_data_node_that_is_added_renders_beside_the_others(cluster, make_recipe, tmp_path):
    paths = [tmp_path / f"{number}.jsonl.gz" for number in range(4)]
    for number, path in enumerate(paths):
        path.write_bytes(gzip.compress("\n".join(json.dumps(conversation(8 * number + i)) for i in range(8)).encode()))
    recipe = make_recipe(data={"train": [{"path": str(path)} for path in paths], "window_rows": 32, "cache": None})
    prepared = prepare(recipe)
    drawn = order.train_slices(recipe, prepared.train, Cursor())
    expected = sum(len(pipeline.render_slice(part, prepared.template, recipe).input_ids) for _, part in drawn[0])
    written = {path: path.read_bytes() for path in paths}
    for path in paths:
        path.unlink()
        os.mkfifo(path)  # each of the two tasks waits until somebody writes
    stages = Stages()
    stream = pipeline.stream(drawn, prepared.rendering(), prepared.rounds(), 1, Cursor(), stages)
    (shard,) = OrderedSplit({"node-role": "data"}).configure({"train": stream}, 1, None, None)
    received = batches(shard["train"], recipe.train.global_batch_size, Patience(300, stages))

    def wait_until_at_work(tasks: int) -> str:
        deadline = time.monotonic() + 120
        while not (said := stages.say()).startswith("rendering is at work") or (tasks > 1) != ("1 more task" in said):
            assert time.monotonic() < deadline, said
            time.sleep(0.1)
        return said

    with ThreadPoolExecutor(5) as pool, ExitStack() as nodes:
        tokens = pool.submit(lambda: sum(batch.meta.tokens for batch in received))
        nodes.callback(cluster["add"]())
        assert "1 more" not in wait_until_at_work(1)
        nodes.callback(cluster["add"]())
        wait_until_at_work(2)
        for path, data in written.items():
            pool.submit(path.write_bytes, data)
        assert tokens.result() == expected


def test_a_fractional_weight_keeps_a_seeded_share_that_differs_by_epoch(cluster, make_recipe, tmp_path):
    path = write_rows(tmp_path / "half.jsonl", [conversation(i) for i in range(60)])
    recipe = make_recipe(data={"train": [{"path": str(path), "weight": 0.5}], "window_rows": 64}, train={"epochs": 2})
    template, index = load_template(recipe), sources.index(recipe.data.train, 64)
    parts = [(part, pipeline.render_slice(part, template, recipe)) for part in index.slices]
    epochs = [order.pack_window(parts, epoch, recipe) for epoch in (0, 0, 1)]
    assert all(15 < rows < 45 and len(packs.seq_lens) == rows for packs, _, rows in epochs)
    same, again, other = (set(packs.seq_lens.tolist()) for packs, _, _ in epochs)
    assert same == again != other
    received = steps(consume(recipe, 2))
    assert sum(meta.rows for meta, _ in received) == epochs[0][2] + epochs[2][2]
    assert received == steps(consume(recipe, 1))


@pytest.mark.parametrize("library", ["torch", "datasets"])
def test_a_task_that_is_cancelled_while_it_imports_leaves_a_process_that_works(cluster, tmp_path, library):
    # Defined here, so that its process imports nothing before it runs.
    class Process:
        def twice(self, interrupted, work, *arguments):
            """What work raises where an interrupt comes in the midst of an import, and what it gives the next time."""
            import _thread
            import sys

            assert interrupted not in sys.modules

            class Interrupt:
                def find_spec(self, name, path=None, target=None):
                    if name == interrupted:
                        _thread.interrupt_main()  # as Ray does to cancel a task

            sys.meta_path.insert(0, Interrupt())
            try:
                work(*arguments)
                raised = None
            except KeyboardInterrupt as error:
                raised = type(error)
            sys.meta_path.pop(0)
            return raised, work(*arguments)

    class Torch:
        def __reduce__(self):
            return import_module, ("torch",)

    def unpickle(shared):
        return pipeline.unpickled(shared[0]).tensor([1]).tolist()

    def read(part):
        return [row["n"] for _, row in sources.read(part)]

    # An actor has a process of its own, and runs its methods where a task runs, on the main thread.
    process = ray.remote(Process).remote()
    if library == "torch":
        answer = process.twice.remote("torch.functional", unpickle, [ray.put(pickle.dumps(Torch()))])
    else:
        Dataset.from_list([{"n": 1}]).save_to_disk(tmp_path / "saved")
        (part,) = sources.index([SourceSpec(path=str(tmp_path / "saved"))], 8).slices
        answer = process.twice.remote("datasets.streaming", read, part)
    assert ray.get(answer) == (KeyboardInterrupt, [1])


def test_a_data_task_needs_no_torch(cluster, make_recipe):
    class Process:
        def render(self, shared, part):
            import sys

            rendering = pipeline.unpickled(shared[0])
            rendered = pipeline.render_slice(part, rendering.template, rendering.recipe)
            return len(rendered.lengths), {"torch", "mlflow", "deepspeed"} & set(sys.modules)

    prepared = prepare(make_recipe())
    shared = ray.put(pickle.dumps(prepared.rendering()))
    samples, heavy = ray.get(ray.remote(Process).remote().render.remote([shared], prepared.train.slices[0]))
    assert samples and not heavy, "torch takes two seconds and 300 MB in each of a node's data processes"


def test_warnings_of_workers_reach_their_command_once_and_without_secrets(cluster):
    class Worker:
        def __init__(self, stages):
            logging.getLogger("burnish").addHandler(Teller(stages))
            os.environ["STORE_SECRET"] = "open-sesame"

        def work(self):
            logging.getLogger("burnish.train.writer").info("nobody needs to know")
            logging.getLogger("burnish.train.writer").warning("the disk at %s is gone", "open-sesame@store")

    stages = Stages()
    workers = [ray.remote(Worker).remote(stages) for _ in range(2)]
    ray.get([worker.work.remote() for worker in workers])
    assert stages.told(0, 30) == ["the disk at ***@store is gone"]
    assert stages.told(1, 30) == []
