"""The data plane against its peers, in one run on this machine.

    .venv/bin/python benchmarks/data.py [--rows 3000] [--rounds 3] [--part packing|stream|memory]

Conversations are those of benchmarks/rendering.py. `stream` is what a training worker receives through Ray Data (two data
tasks at a time); `processes` calls the same functions in two plain processes; `TRL` is SFTTrainer's preparation: its chat
template with the assistant mask, then pack_dataset (bfd), with two processes. No cache, except where it says so.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import datasets
import numpy as np
import psutil
import ray
import rendering  # sets the environment of tokenizers
import trl
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from burnish.config import Recipe, parse
from burnish.data import order, pipeline
from burnish.data.packing import pack
from burnish.data.stages import Patience, Stages
from burnish.train.batches import batches
from burnish.train.cluster import connected
from burnish.train.prepare import Prepared, prepare
from burnish.train.split import OrderedSplit

CAPACITY, PROCESSES = 4096, 2


def world(folder: Path, rows: int) -> tuple[Any, list[dict[str, object]]]:
    """A model folder and a file of conversations; the tokenizer and the conversations."""
    corpus = rendering.texts()
    tokenizer = rendering.tokenizer_of(corpus)
    tokenizer.chat_template = (rendering.TEMPLATES / "qwen2_5.jinja").read_text()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=CAPACITY,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    talks = rendering.conversations(corpus, rows)
    with open(folder / "rows.jsonl", "w") as file:
        file.writelines(json.dumps(talk) + "\n" for talk in talks)
    return tokenizer, talks


def recipe_of(folder: Path, rows: str = "rows.jsonl", cache: str | None = None, copies: int = 1) -> Recipe:
    return parse(
        {
            "name": "bench",
            "model": {"path": str(folder / "model")},
            "data": {
                "train": [{"path": str(folder / rows), "weight": copies}],
                "max_length": CAPACITY,
                "cache": cache,
                "max_refused": 1.0,
            },
            "train": {"global_batch_size": 8},
            "checkpoint": {"storage": str(folder / "runs")},
            "scale": {"use_gpu": False},
            "tracking": {"uri": None},
        },
        "benchmark",
    )


def streamed(prepared: Prepared, cursor: order.Cursor, until: int | None = None) -> tuple[int, float, order.Cursor]:
    """Tokens received (of the first `until` steps), seconds to the first batch, and the cursor after the last."""
    start = time.perf_counter()
    windows = order.train_slices(prepared.recipe, prepared.train, cursor)
    stages = Stages()
    stream = pipeline.stream(windows, prepared.rendering(), prepared.rounds(), 1, cursor, stages)
    (shard,) = OrderedSplit().configure({"train": stream}, 1, None, None)
    tokens, first, steps = 0, 0.0, 0
    for batch in batches(shard["train"], prepared.recipe.train.global_batch_size, Patience(3600, stages)):
        first = first or time.perf_counter() - start
        tokens, steps, cursor = tokens + sum(len(ids) for ids, _, _ in batch.packs), steps + 1, batch.meta.cursor
        if steps == until:
            break
    return tokens, first, cursor


_prepared: Prepared | None = None


def _window(window: list[Any]) -> tuple[Any, ...]:
    assert _prepared is not None
    parts = [(part, pipeline.render_slice(part, _prepared.template, _prepared.recipe)) for _, part in window]
    packs, _, _ = order.pack_window(parts, 0, _prepared.recipe)
    return packs.input_ids, packs.labels, packs.seq_lens


def in_processes(prepared: Prepared) -> int:
    """The same functions in plain processes; tokens that reach this one."""
    global _prepared
    _prepared = prepared
    windows = order.train_slices(prepared.recipe, prepared.train, order.Cursor())
    with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
        return sum(len(ids) for ids, _, _ in pool.imap(_window, windows))


def by_trl(tokenizer: Any, talks: list[dict[str, object]]) -> int:
    training = (rendering.TEMPLATES / "qwen2_5_training.jinja").read_text()
    config = SFTConfig(
        output_dir="unused", assistant_only_loss=True, max_length=CAPACITY, packing=True, report_to=[], use_cpu=True, bf16=False,
        dataset_num_proc=PROCESSES,
    )  # fmt: skip
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=training, completion_only_loss=False)
    done = SFTTrainer._prepare_dataset(trainer, datasets.Dataset.from_list(talks), tokenizer, config, True, None, "train")
    return sum(map(len, done["input_ids"]))


def timed(contenders: dict[str, Callable[[], int]], rounds: int, warm: bool) -> dict[str, list[float]]:
    """Units a second of each contender, interleaved; if `warm`, after a round that does not count."""
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(0 if warm else 1, rounds + 1):
        for name, work in contenders.items():
            start = time.perf_counter()
            made = work()
            if number:
                speeds[name].append(made / (time.perf_counter() - start))
    return speeds


def table(title: str, unit: str, speeds: dict[str, list[float]], scale: float) -> None:
    print(f"\n### {title}\n\n| | {unit}: median (least to most) | ratio to the first: median (least to most) |\n|---|---|---|")
    base = next(iter(speeds.values()))
    for name, found in speeds.items():
        ratios = [one / other for one, other in zip(found, base, strict=True)]
        print(
            f"| {name} | {statistics.median(found) / scale:.3g} ({min(found) / scale:.3g} to {max(found) / scale:.3g}) | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )


def packing(rounds: int) -> dict[str, list[float]]:
    """Samples a second, assignment and moving the tokens, over 20,000 samples as long as UltraChat's."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(1000), 0.55, 20_000).astype(np.int32).clip(8, CAPACITY)
    ids = rng.integers(0, 8000, int(lengths.sum())).astype(np.int32)
    cuts = np.cumsum(lengths)[:-1]
    rows = datasets.Dataset.from_dict({"input_ids": np.split(ids, cuts), "labels": np.split(ids, cuts)}).with_format("arrow")
    ends = np.cumsum(lengths)

    def ours() -> int:
        for start in range(0, len(lengths), 4096):
            part = lengths[start : start + 4096]
            tokens = ids[ends[start] - lengths[start] : ends[start + len(part) - 1]]
            pack(tokens, np.ones(len(tokens), bool), part, CAPACITY, np.random.default_rng(0))
        return len(lengths)

    def theirs() -> int:
        trl.pack_dataset(rows, CAPACITY, "bfd")
        return len(lengths)

    return timed({"TRL, pack_dataset bfd": theirs, "burnish, windows of 4,096": ours}, rounds, warm=True)


def memory(folder: Path, copies: int) -> int:
    """Largest resident bytes of a process that streams the rows `copies` times, and of all its children, less shared ones."""
    command = [sys.executable, __file__, "--streams", str(folder), "--copies", str(copies)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    watched, most = psutil.Process(process.pid), 0
    while process.poll() is None:
        total = 0
        for each in (watched, *watched.children(recursive=True)):
            try:
                total += each.memory_full_info().uss
            except psutil.Error:
                continue
        most = max(most, total)
        time.sleep(0.2)
    assert process.returncode == 0
    return most


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=("packing", "stream", "memory"), action="append", help="only this part")
    parser.add_argument("--streams", type=Path, help="only stream the rows of this folder, to be watched")
    parser.add_argument("--copies", type=int, default=1)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    datasets.disable_caching()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    if options.streams:
        prepared = prepare(recipe_of(options.streams, "few.jsonl", copies=options.copies))
        with connected(0):
            streamed(prepared, order.Cursor())
        return
    print(f"trl {trl.__version__}, ray {ray.__version__}, {options.rows} conversations, {options.rounds} rounds")
    parts = options.part or ("packing", "stream", "memory")
    if "packing" in parts:
        table("Packing alone", "thousand samples a second", packing(options.rounds), 1e3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer, talks = world(folder, options.rows)
        if "stream" in parts:
            streams(folder, tokenizer, talks, options.rounds)
        if "memory" in parts:
            sizes(folder, talks[: options.rows // 12])


def streams(folder: Path, tokenizer: Any, talks: list[dict[str, object]], rounds: int) -> None:
    """The stream against its peers, and its seconds to the first batch."""
    prepared = prepare(recipe_of(folder))
    with connected(0):  # two CPUs, for data tasks alone
        speeds = timed(
            {
                "burnish, two plain processes": lambda: in_processes(prepared),
                "burnish, stream of Ray Data": lambda: streamed(prepared, order.Cursor())[0],
                "TRL, two processes": lambda: by_trl(tokenizer, talks),
            },
            rounds,
            warm=False,  # each starts its own processes, every time
        )
        table("Conversations to packed, masked batches", "M tokens a second", speeds, 1e6)
        firsts(prepared, folder)


def sizes(folder: Path, few: list[dict[str, object]]) -> None:
    """The memory of the whole pipeline for a twelfth of the conversations, streamed once, 4 and 16 times."""
    with open(folder / "few.jsonl", "w") as file:
        file.writelines(json.dumps(talk) + "\n" for talk in few)
    most = {copies: memory(folder, copies) for copies in (1, 4, 16)}
    print("\n### Memory\n\n| data set | largest sum of the processes' own memory |\n|---|---|")
    for copies, size in most.items():
        print(f"| {len(few) * copies:,} conversations | {size / 1e6:,.0f} MB, {size / most[1]:.2f} times |")


def firsts(prepared: Prepared, folder: Path) -> None:
    """Seconds to the first batch from the start and from 90% of an epoch, and of a whole epoch with and without the cache."""
    start = time.perf_counter()
    _, first, _ = streamed(prepared, order.Cursor())
    whole = time.perf_counter() - start
    cached = prepare(recipe_of(folder, cache=str(folder / "cache")))
    streamed(cached, order.Cursor())
    start = time.perf_counter()
    streamed(cached, order.Cursor())
    again = time.perf_counter() - start
    windows = len(order.train_slices(prepared.recipe, prepared.train, order.Cursor()))
    late = order.Cursor(0, int(windows * 0.9))
    _, resumed, _ = streamed(prepared, late)
    print("\n### Seconds\n\n| | seconds | share |\n|---|---|---|")
    print(f"| a whole epoch | {whole:.1f} | 1 |")
    print(f"| to the first batch | {first:.1f} | {first / whole:.2f} of the epoch |")
    print(f"| to the first batch, from 90% of the epoch | {resumed:.1f} | {resumed / first:.2f} of that from its start |")
    print(f"| a whole epoch out of the cache | {again:.1f} | {again / whole:.2f} of the epoch |")


if __name__ == "__main__":
    main()
