"""A step of ZeRO-3 with adapters, against PEFT under transformers' automatic DeepSpeed settings, in one run on this machine.

    .venv/bin/python benchmarks/zero.py [--rounds 15] [--layers 8] [--tokens 256]

Two workers on gloo train adapters of rank 16 on all linear layers of a Llama with random weights (hidden 256) in float32, each
on its own rows, in turn: `burnish` is its engine and objective; `PEFT, automatic` is the same model and adapters in
DeepSpeed as transformers' Trainer configures it (`HfTrainerDeepSpeedConfig`, every size "auto") with the model's own loss.
Both see the same tokens; the losses are compared. `ZeRO-2` is burnish's engine with whole weights on every worker.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "DS_ACCELERATOR": "cpu"}

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainingArguments

from burnish.config import Recipe, parse
from burnish.train import engine as ds
from burnish.train.adapters import with_adapters
from burnish.train.build import build_model
from burnish.train.objective import Objective

WORKERS = 2


def recipe_of(folder: Path, stage: int, tokens: int) -> Recipe:
    return parse(
        {
            "name": "bench",
            "model": {"path": str(folder / "model"), "dtype": "float32", "activation_checkpointing": False},
            "lora": {"rank": 16},
            "data": {"train": [{"path": str(folder / "unused.jsonl")}], "max_length": tokens},
            "optim": {"learning_rate": 1e-3},
            "train": {"global_batch_size": WORKERS},
            "engine": {"zero_stage": stage},
            "scale": {"num_workers": WORKERS, "use_gpu": False},
            "tracking": {"uri": None},
        },
        "benchmark",
    )


def burnish(recipe: Recipe) -> Callable[[np.ndarray], float]:
    """A step of burnish's engine on this worker's row; gives the loss of all rows."""
    engine = ds.build_engine(recipe, build_model(recipe, False, WORKERS), WORKERS)
    objective = Objective(engine, engine.device)

    def step(ids: np.ndarray) -> float:
        count = WORKERS * (len(ids) - 1)
        loss = objective.loss_sum(ids, ids, np.array([len(ids)], np.int32))
        ds.backward(engine, loss, count, WORKERS)
        ds.step(engine)
        return float(loss.detach()) / (len(ids) - 1)

    return step


def automatic(recipe: Recipe, folder: Path) -> Callable[[np.ndarray], float]:
    """A step of PEFT in DeepSpeed as transformers' Trainer configures it."""
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    sizes = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    config = HfTrainerDeepSpeedConfig(
        {
            "zero_optimization": {"stage": 3, **dict.fromkeys(sizes, "auto")},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1 << 60,
        }
    )
    arguments = TrainingArguments(str(folder / "trainer"), per_device_train_batch_size=1, use_cpu=True, report_to=[])
    config.trainer_config_process(arguments)
    model = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=torch.float32)
    torch.manual_seed(recipe.train.seed)
    model = with_adapters(model, recipe.lora)
    config.trainer_config_finalize(arguments, model, 1000)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(model=model.train(), optimizer=optimizer, config=config.config)

    def step(ids: np.ndarray) -> float:
        row = torch.from_numpy(ids.astype(np.int64))[None]
        loss = engine(input_ids=row, labels=row, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return step


def work(rank: int, folder: Path, rounds: int, tokens: int, port: int, results: Any) -> None:
    """One worker: every contender takes a step on the same row in turn."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": "0"}
    os.environ["WORLD_SIZE"] = str(WORKERS)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    steps = {
        "burnish": burnish(recipe_of(folder, 3, tokens)),
        "PEFT, automatic": automatic(recipe_of(folder, 3, tokens), folder),
        "burnish, ZeRO-2": burnish(recipe_of(folder, 2, tokens)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        ids = np.random.default_rng([number, rank]).integers(0, 512, tokens).astype(np.int32)
        for name, step in steps.items():
            dist.barrier()
            start = time.perf_counter()
            losses[name].append(step(ids))
            dist.barrier()
            seconds[name].append(time.perf_counter() - start)
    if rank == 0:
        results.put(({name: each[2:] for name, each in seconds.items()}, losses))  # the first steps trace and allocate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--port", type=int, default=29_511)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        torch.manual_seed(0)
        shape = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=512, num_hidden_layers=arguments.layers, **shape)).save_pretrained(
            folder / "model"
        )
        context = torch.multiprocessing.get_context("spawn")
        results = context.Queue()
        told = (folder, arguments.rounds, arguments.tokens, arguments.port, results)
        workers = [context.Process(target=work, args=(rank, *told)) for rank in range(WORKERS)]
        for worker in workers:
            worker.start()
        seconds, losses = results.get()
        for worker in workers:
            worker.join()
    first, second = losses["burnish"], losses["PEFT, automatic"]
    assert np.allclose(first, second, rtol=1e-4), (first, second)
    print(f"torch {torch.__version__}, deepspeed {deepspeed.__version__}, transformers {transformers.__version__}")
    peer = statistics.median(seconds["PEFT, automatic"])
    print("| a step | ms: median (least to most) | times as fast |\n|---|---|---|")
    for name, each in seconds.items():
        middle = statistics.median(each)
        print(f"| {name} | {middle * 1e3:.0f} ({min(each) * 1e3:.0f} to {max(each) * 1e3:.0f}) | {peer / middle:.2f} |")


if __name__ == "__main__":
    main()
