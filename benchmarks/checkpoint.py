"""What a checkpoint costs, in bytes and in time away from training, against its peers in one run on this machine.

    .venv/bin/python benchmarks/checkpoint.py [--rounds 7] [--setups 1-0 2-2 2-3] [--folder .]

A Llama with random weights (hidden 512, 4 layers, a vocabulary of 32,000) is trained in float32 by burnish's engine on real
DeepSpeed: one worker with ZeRO-0, then two on gloo with ZeRO-2 and with ZeRO-3; all weights, then adapters of rank 16 on all
linear layers. Contenders write checkpoints in turn, after the disk has come to rest, and steps follow each. `burnish` is
`State.snapshot` and `Writer.write`, whose thread writes while steps go on; `burnish, waiting` also waits until it stands;
`DeepSpeed` is its own `save_checkpoint`; `Trainer` is what transformers' Trainer does with one worker, `save_pretrained` and
`torch.save` of the optimizer's state. The time is that of the slowest worker. Steps beside a thread that writes are compared
with those that follow `burnish, waiting`, when nothing is written.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DS_ACCELERATOR": "cpu",
}

import deepspeed
import numpy as np
import safetensors
import torch
import torch.distributed as dist
import torch.multiprocessing
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from burnish.config import Recipe, parse
from burnish.train import engine as ds
from burnish.train.attempt import Progress
from burnish.train.build import build_model
from burnish.train.home import Home
from burnish.train.objective import Objective
from burnish.train.state import State
from burnish.train.writer import Place, Writer

TOKENS, STEPS = 128, 2
"""Tokens of a worker's pack, and steps after each checkpoint."""
SHAPE: dict[str, Any] = {
    "vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
SETUPS = {"1-0": "One worker, ZeRO-0", "2-2": "Two workers, ZeRO-2", "2-3": "Two workers, ZeRO-3"}
TRAINED: dict[str, dict[str, Any] | None] = {"all weights": None, "adapters": {"rank": 16}}


def recipe_of(folder: Path, lora: dict[str, Any] | None, workers: int, stage: int) -> Recipe:
    return parse(
        {
            "name": "bench",
            "model": {"path": str(folder / "model"), "dtype": "float32", "activation_checkpointing": False},
            "lora": lora,
            "data": {"train": [{"path": str(folder / "unused.jsonl")}], "max_length": TOKENS},
            "train": {"global_batch_size": workers},
            "engine": {"zero_stage": stage},
            "checkpoint": {"storage": str(folder)},
            "scale": {"num_workers": workers, "use_gpu": False},
            "tracking": {"uri": None},
        },
        "benchmark",
    )


class Worker:
    """One worker's engine, its steps, and the contenders that write its state."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self._folder, self._lora, self._workers = folder, recipe.lora is not None, dist.get_world_size()
        self._engine = ds.build_engine(recipe, build_model(recipe, cuda=False), self._workers)
        self._objective = Objective(self._engine, self._engine.device)
        self._state = State(self._engine)
        self._writer = Writer(Place(Home(folder), "bench", 1, None, ""), dist.get_rank(), self._workers)
        self._number = 0
        self.contenders: dict[str, Callable[[], None]] = {
            "burnish": self._burnish, "burnish, waiting": self._burnish_waiting, "DeepSpeed": self._deepspeed,
        } | ({"Trainer": self._trainer} if self._workers == 1 else {})  # fmt: skip

    def steps(self) -> tuple[list[float], list[float]]:
        """Seconds of each step that a worker's thread wrote beside until its end, and of the others."""
        beside, alone = [], []
        for number in range(STEPS):
            ids = np.random.default_rng(number).integers(0, SHAPE["vocab_size"], TOKENS).astype(np.int32)
            start = time.perf_counter()
            loss = self._objective.loss_sum(ids, ids, np.array([TOKENS], np.int32))
            ds.backward(self._engine, loss, TOKENS * self._workers, self._workers)
            ds.step(self._engine)
            seconds = time.perf_counter() - start
            writing, seconds = _largest(float(not self._writer._pending.done()), seconds)
            (beside if writing else alone).append(seconds)
        self._writer.wait()
        return beside, alone

    def away(self, contender: str) -> float:
        """Seconds away from training for a checkpoint of one contender."""
        dist.barrier()
        if dist.get_rank() == 0:
            os.sync()
        dist.barrier()
        start = time.perf_counter()
        self.contenders[contender]()
        return _largest(time.perf_counter() - start)[0]

    def bytes(self) -> dict[str, int]:
        """Bytes of the newest checkpoint of each contender."""
        folders = {name: self._folder / name.lower() for name in self.contenders}
        folders |= {"burnish": self._folder / "checkpoints"}
        return {
            name: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            for name, folder in folders.items()
            if folder.exists()
        }

    def _burnish(self) -> None:
        self._number += 1
        self._writer.write(Progress(self._number), {}, self._state.snapshot({}))

    def _burnish_waiting(self) -> None:
        self._burnish()
        self._writer.wait()

    def _deepspeed(self) -> None:
        # Frozen weights are left out as transformers' Trainer does for adapters.
        self._engine.save_checkpoint(str(self._folder / "deepspeed"), "newest", exclude_frozen_parameters=self._lora)

    def _trainer(self) -> None:
        self._engine.module.save_pretrained(self._folder / "trainer")
        torch.save(self._engine.optimizer.state_dict(), self._folder / "trainer" / "optimizer.pt")


def _largest(*values: float) -> list[float]:
    """The largest of each value over all workers."""
    shared = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    found: list[float] = shared.tolist()
    return found


def work(rank: int, setup: str, folder: Path, rounds: int) -> None:
    """Measures all contenders; world rank 0 writes what was found."""
    workers, stage = map(int, setup.split("-"))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(workers)}
    torch.set_num_threads(1)  # as Ray sets for a worker with one CPU
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{setup}", rank=rank, world_size=workers)
    found: dict[str, Any] = {}
    for trained, lora in TRAINED.items():
        run = folder / f"{setup}-{trained}"
        if rank == 0:
            (run / "checkpoints").mkdir(parents=True)
            (run / "contract.json").write_text("{}")
        dist.barrier()
        worker = Worker(recipe_of(folder, lora, workers, stage), run)
        for name in worker.contenders:  # pages and caches warm
            worker.away(name)
            worker.steps()
        away: dict[str, list[float]] = {name: [] for name in worker.contenders}
        beside: list[float] = []
        alone: list[float] = []
        for _ in range(rounds):
            for name, seconds in away.items():
                seconds.append(worker.away(name))
                written_beside, others = worker.steps()
                if name == "burnish":
                    beside.append(statistics.median(written_beside) if written_beside else float("nan"))
                elif name == "burnish, waiting":
                    alone.append(statistics.median(others))
        found[trained] = {"away": away, "beside": beside, "alone": alone, "bytes": worker.bytes()}
        dist.barrier()
        if rank == 0:
            shutil.rmtree(run)
    if rank == 0:
        torch.save(found, folder / f"found-{setup}.pt")
    dist.barrier()


def show(setup: str, found: dict[str, Any]) -> None:
    """Prints the tables of one set-up."""
    print(f"\n### {SETUPS[setup]}")
    print("\n| bytes of a checkpoint | all weights | adapters | ratio |\n|---|---|---|---|")
    whole, adapters = (found[trained]["bytes"] for trained in TRAINED)
    for name, size in whole.items():
        print(f"| {name} | {size / 1e6:,.1f} MB | {adapters[name] / 1e6:,.1f} MB | 1/{size / adapters[name]:.0f} |")
    for trained, each in found.items():
        base = each["away"]["burnish, waiting"]
        print(f"\n| {trained}: away from training | seconds: median (least to most) | ratio |\n|---|---|---|")
        for name, seconds in each["away"].items():
            print(f"| {name} | {_spread(seconds, 3)} | {_spread([s / b for s, b in zip(seconds, base, strict=True)], 3)} |")
        slower = [one / other for one, other in zip(each["beside"], each["alone"], strict=True) if one == one]
        print(f"\n| {trained}: a step | seconds: median (least to most) | ratio |\n|---|---|---|")
        print(f"| nothing is written | {_spread(each['alone'], 2)} | 1.00 |")
        if slower:
            written = [seconds for seconds in each["beside"] if seconds == seconds]
            print(f"| beside a thread that writes | {_spread(written, 2)} | {_spread(slower, 2)} |")
        else:
            print("| beside a thread that writes | no write lasted a whole step | |")


def _spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--setups", nargs="+", default=list(SETUPS), choices=list(SETUPS))
    parser.add_argument("--folder", type=Path, help="on a disk; the system's temporary folder where it is not given")
    options = parser.parse_args()
    print(
        f"deepspeed {deepspeed.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"safetensors {safetensors.__version__}"
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name).resolve()
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder / "model")
        for setup in options.setups:
            torch.multiprocessing.spawn(work, (setup, folder, options.rounds), int(setup[0]))
            show(setup, torch.load(folder / f"found-{setup}.pt"))


if __name__ == "__main__":
    main()
