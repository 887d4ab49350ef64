"""What a layout is said to need, against what workers were seen to need."""

import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from burnish.config import Recipe
from burnish.train.footprint import measure
from burnish.train.layout import Layout, footprint
from tests.conftest import free_port

pytestmark = pytest.mark.distributed

WORKERS = 2
TOKENS = 512
CASES = {
    "all weights, ZeRO-0": (None, 0, False, "none"),
    "all weights, ZeRO-2, recomputed": (None, 2, True, "none"),
    "all weights, ZeRO-3": (None, 3, False, "none"),
    "adapters, ZeRO-2": ({"rank": 16}, 2, False, "none"),
    "adapters, ZeRO-2, recomputed": ({"rank": 16}, 2, True, "none"),
    "adapters, ZeRO-3, recomputed": ({"rank": 16}, 3, True, "none"),
    "adapters that need the whole model first, ZeRO-3": ({"rank": 16, "variant": "dora"}, 3, False, "none"),
}


def _status(name: str) -> int:
    """Bytes that a line of this process's status tells."""
    (line,) = (each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(f"{name}:"))
    return int(line.split()[1]) << 10


def _peak(recipe: Recipe, rank: int) -> int:
    """The most memory that two steps of full packs take, loading apart."""
    from burnish.train import engine as ds
    from burnish.train.build import build_model
    from burnish.train.objective import Objective
    from burnish.train.step import Step, take

    gc.collect()
    before = _status("VmRSS")
    engine = ds.build_engine(recipe, build_model(recipe, False, WORKERS), WORKERS)
    objective = Objective(engine, engine.device)
    tokens = recipe.data.max_length
    row = np.random.default_rng(rank).integers(0, 500, tokens).astype(np.int32)
    pack = (row, row, np.array([tokens // 2, tokens - tokens // 2], np.int32))
    Path("/proc/self/clear_refs").write_text("5")  # the largest from here on
    for number in (1, 2):
        take(engine, objective, [pack], Step(number, 1e-3, WORKERS * tokens, 0))
    found = _status("VmHWM") - before
    engine.destroy()
    return found


def _work(rank: int, port: int, recipes: dict[str, Recipe], results: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": "0"}
    os.environ |= {"WORLD_SIZE": str(WORKERS), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    peaks = {name: _peak(recipe, rank) for name, recipe in recipes.items()}
    if rank == 0:
        results.put(peaks)
    torch.distributed.barrier()


def test_what_a_layout_needs_is_known_within_a_fifth(make_recipe, tmp_path, monkeypatch):
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4}
    for name, layers in (("model", 6), ("small", 1)):
        config = LlamaConfig(vocab_size=8192, num_hidden_layers=layers, **shape)
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)

    def recipe_of(lora: Any, stage: int, recomputed: bool, offload: str, name: str = "model") -> Recipe:
        return make_recipe(
            model={"path": str(tmp_path / name), "activation_checkpointing": recomputed}, lora=lora, data={"max_length": TOKENS},
            train={"global_batch_size": WORKERS},            engine={"zero_stage": stage, "offload": offload}, scale={"num_workers": WORKERS},
        )  # fmt: skip

    recipes = {name: recipe_of(*case) for name, case in CASES.items()}
    # What libraries load at their first use is no part of a layout.
    first = {f"first, {stage}": recipe_of({"rank": 1}, stage, False, "none", "small") for stage in (0, 2, 3)}
    # Memory that is freed goes back at once, so that a case is not hidden in that of the one before.
    for key in ("MMAP_THRESHOLD", "TRIM_THRESHOLD"):
        monkeypatch.setenv(f"MALLOC_{key}_", "65536")
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    port = free_port()
    workers = [context.Process(target=_work, args=(rank, port, first | recipes, results)) for rank in range(WORKERS)]
    for worker in workers:
        worker.start()
    peaks = results.get(timeout=300)
    for worker in workers:
        worker.join()
    ratios = {}
    for name, (_, stage, recomputed, offload) in CASES.items():
        needed = footprint(measure(recipes[name]), Layout(stage, recomputed), WORKERS, offload == "optimizer")
        ratios[name] = needed.total / peaks[name]
        print(f"{name}: {peaks[name] >> 20} MiB seen, {needed.total >> 20} said, {ratios[name]:.2f}")
    assert all(0.8 <= ratio <= 1.2 for ratio in ratios.values()), ratios
