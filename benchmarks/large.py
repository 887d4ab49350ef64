"""A data set ten times Ray's object store, and what a second data node brings.

    .venv/bin/python benchmarks/large.py [--rows 8192] [--store-mb 200]

The conversations and the recipe are those of benchmarks/data.py. First they are repeated until their ids and labels are ten times
the object store, and are rendered once: all later passes come out of the cache, several times as fast as rendering, which is the
harder task for backpressure. Then they go once, without the cache, through a cluster with one data node of one CPU, and through
the same with a second one, twice in turn.
"""

import argparse
import math
import os
import tempfile
import threading
import time
from pathlib import Path

from data import PROCESSES, recipe_of, world  # isort: skip  # sets the environment of tokenizers
import psutil
import ray
import ray.data
from ray._private.internal_api import node_stats
from ray.cluster_utils import Cluster

from burnish.data import order, pipeline
from burnish.data.stages import Patience, Stages
from burnish.train.batches import batches
from burnish.train.prepare import Prepared, prepare
from burnish.train.split import OrderedSplit


class Watch:
    """The largest own memory of this process and its children together, sampled every second."""

    def __init__(self) -> None:
        self.most, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        me = psutil.Process()
        while not self._over.wait(1.0):
            total = 0
            for each in (me, *me.children(recursive=True)):
                try:
                    total += each.memory_full_info().uss
                except psutil.Error:
                    continue
            self.most = max(self.most, total)

    def end(self) -> None:
        self._over.set()
        self._thread.join()


def streamed(prepared: Prepared, watch: Watch | None = None, role: str | None = None) -> dict[str, float]:
    """Seconds to the first batch and to the last, tokens, and own memory when a tenth of the data was there and at the end."""
    start = time.perf_counter()
    windows = order.train_slices(prepared.recipe, prepared.train, order.Cursor())
    stages = Stages()
    stream = pipeline.stream(windows, prepared.rendering(), prepared.rounds(), 1, order.Cursor(), stages)
    (shard,) = OrderedSplit({"node-role": role} if role else None).configure({"train": stream}, 1, None, None)
    seen: dict[str, float] = {"tokens": 0}
    for batch in batches(shard["train"], prepared.recipe.train.global_batch_size, Patience(3600, stages)):
        seen.setdefault("first", time.perf_counter() - start)
        seen["tokens"] += sum(len(ids) for ids, _, _ in batch.packs)
        if watch and batch.meta.progress >= 0.1:
            seen.setdefault("memory at a tenth", watch.most)
    return seen | {"whole": time.perf_counter() - start, "memory": watch.most if watch else 0}


def larger_than_the_store(folder: Path, store_mb: int) -> None:
    once = prepare(recipe_of(folder, cache=str(folder / "cache")))
    tokens = sum(
        pipeline.rendered_slice(part, once.rendering()).lengths.sum()
        for window in order.train_slices(once.recipe, once.train, order.Cursor())
        for _, part in window
    )
    copies = math.ceil(10 * (store_mb << 20) / (8 * tokens))
    prepared = prepare(recipe_of(folder, cache=str(folder / "cache"), copies=copies))
    watch = Watch()
    ray.init(address="local", num_cpus=PROCESSES, object_store_memory=store_mb << 20, log_to_driver=False)
    seen = streamed(prepared, watch)
    (node,) = ray.nodes()
    stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], False).store_stats
    ray.shutdown()
    watch.end()
    assert seen["tokens"] == copies * tokens
    more = seen["memory"] / seen["memory at a tenth"]
    print("\n### Larger than the object store\n\n| | |\n|---|---|")
    print(f"| object store | {(store_mb << 20) / 1e6:,.0f} MB |")
    print(f"| ids and labels | {8 * seen['tokens'] / 1e6:,.0f} MB, {8 * seen['tokens'] / (store_mb << 20):.1f} times |")
    print(f"| spilled to disk | {stats.spilled_bytes_total / 1e6:,.0f} MB |")
    print(f"| own memory of all processes until a tenth | {seen['memory at a tenth'] / 1e6:,.0f} MB |")
    print(f"| own memory of all processes until the end | {seen['memory'] / 1e6:,.0f} MB, {more:.2f} times |")
    print(f"| M tokens a second after the first batch | {seen['tokens'] / 1e6 / (seen['whole'] - seen['first']):.2f} |")


def with_a_node_more(folder: Path) -> None:
    prepared = prepare(recipe_of(folder))
    data = {"num_cpus": 1, "labels": {"node-role": "data"}, "object_store_memory": 200 << 20}
    cluster = Cluster(True, head_node_args={"num_cpus": 0, "object_store_memory": 200 << 20})
    speeds: dict[int, list[float]] = {1: [], 2: []}
    try:
        ray.init(cluster.address, log_to_driver=False)
        cluster.add_node(**data)
        for _ in range(2):
            for count in (1, 2):
                second = cluster.add_node(**data) if count == 2 else None
                cluster.wait_for_nodes()
                seen = streamed(prepared, role="data")
                speeds[count].append(seen["tokens"] / seen["whole"])
                if second:
                    cluster.remove_node(second)
    finally:
        ray.shutdown()
        cluster.shutdown()
    print("\n### Data nodes of one CPU\n\n| | M tokens a second, from the start | ratio |\n|---|---|---|")
    for count, found in speeds.items():
        ratios = ", ".join(f"{speed / one:.2f}" for speed, one in zip(found, speeds[1], strict=True))
        print(f"| {count} | {', '.join(f'{speed / 1e6:.3f}' for speed in found)} | {ratios} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--store-mb", type=int, default=200)
    options = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.data.DataContext.get_current().enable_progress_bars = False
    print(f"ray {ray.__version__}, {options.rows:,} conversations")
    with tempfile.TemporaryDirectory() as name:
        world(Path(name), options.rows)
        larger_than_the_store(Path(name), options.store_mb)
        with_a_node_more(Path(name))


if __name__ == "__main__":
    main()
