"""Steps of burnish against TRL's SFTTrainer at its defaults and tuned, in one run: useful tokens a second at equal loss.

    .venv/bin/python benchmarks/step.py [--rounds 9] [--size tiny|1b|8b] [--all-weights] [--compile]

The same samples of log-normal length, the same random weights and fresh adapters of rank 16 on all linear layers, a step of
AdamW after each batch, interleaved; padding is not counted. `burnish` takes the batch as packs (`train/step.py`), without
Ray; on a GPU also with `model.kernels: plain`. `TRL, defaults` is the collator, batch size (8), checkpointing of activations
and loss of SFTTrainer; `TRL, tuned` recomputes nothing and sorts a batch by length, and on a GPU packs with flash-attn where
that is installed; `--compile` has torch.compile make its model faster, which takes a minute more. On a CPU the model is
tiny and float32, on a GPU of the named size in bfloat16. Losses of the first batch must agree.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

import numpy as np
import torch
import torch.distributed as dist
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from burnish.config import Recipe, parse
from burnish.data.packing import Pack, Sample
from burnish.train import engine as ds
from burnish.train.build import build_model
from burnish.train.objective import Objective
from burnish.train.step import Step, take

CUDA = torch.cuda.is_available()
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2},
    "1b": {"vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8},
    "8b": {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8},
}  # fmt: skip
Samples = list[Sample]


def batch_of(seed: int, capacity: int, vocab_size: int) -> Samples:
    """Samples that together fit into a pack of this capacity."""
    rng, found, left = np.random.default_rng(seed), [], capacity
    while True:
        length = int(np.clip(rng.lognormal(np.log(capacity / 16), 0.8), 8, capacity // 2))
        if length > left:
            return found
        left -= length
        found.append(Sample(rng.integers(0, vocab_size, length).astype(np.int32), np.arange(length) >= length // 3, (1,)))


def recipe_of(folder: Path, capacity: int, lora: bool) -> Recipe:
    return parse(
        {
            "name": "bench",
            "model": {
                "path": str(folder / "model"),
                "dtype": "bfloat16" if CUDA else "float32",
                "activation_checkpointing": False,
            },
            "lora": {"rank": 16, "alpha": 32} if lora else None,
            "data": {"train": [{"path": str(folder / "unused.jsonl")}], "max_length": capacity},
            "train": {"global_batch_size": 1},
            "engine": {"zero_stage": 2},
            "scale": {"num_workers": 1, "use_gpu": CUDA},
            "tracking": {"uri": None},
        },
        "benchmark",
    )


def burnish(recipe: Recipe) -> Callable[[Samples], float]:
    """A step of burnish; gives the mean loss of a trained token."""
    engine = ds.build_engine(recipe, build_model(recipe, CUDA), 1)
    objective = Objective(engine, engine.device)

    def step(batch: Samples) -> float:
        pack = Pack.of(batch)
        told = Step(1, 1e-4, pack.trained_tokens, 0)
        total, _ = take(engine, objective, [(pack.input_ids, pack.labels, pack.seq_lens)], told)
        return float(total) / pack.trained_tokens

    return step


def supervised(recipe: Recipe, folder: Path, tuned: bool, compiled: bool = False) -> Callable[[Samples], float]:
    """A step of TRL's trainer: its collator, its loss, its clipping and AdamW."""
    flat = tuned and CUDA and find_spec("flash_attn") is not None
    vocabulary = {f"t{i}": i for i in range(64)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "t0")), pad_token="t0", eos_token="t1"
    )
    options: dict[str, Any] = {"gradient_checkpointing": False, "padding_free": flat} if tuned else {}
    arguments = SFTConfig(
        str(folder / "trl"), use_cpu=not CUDA, bf16=CUDA, report_to=[], learning_rate=1e-4, weight_decay=0.0,
        max_length=recipe.data.max_length, dataset_kwargs={"skip_prepare_dataset": True}, **options,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        recipe.model.path,
        dtype=getattr(torch, recipe.model.dtype),
        attn_implementation="flash_attention_2" if flat else "sdpa",
    )
    lora = recipe.lora and LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}] * 8)
    trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    trainer.create_optimizer()
    model = trainer.model.train()  # as it is for one process; nothing wraps it
    if compiled:
        model.compile(dynamic=True)
    size = arguments.per_device_train_batch_size

    def step(batch: Samples) -> float:
        ordered = sorted(batch, key=len) if tuned else batch
        parts = [batch] if flat else [ordered[start : start + size] for start in range(0, len(ordered), size)]
        count = sum(int(sample.trained.sum()) for sample in batch)
        total = 0.0
        for part in parts:
            rows = [{"input_ids": each.input_ids.tolist(), "labels": each.labels().tolist()} for each in part]
            inputs = trainer.data_collator(rows)
            # The trainer's own way to the mean over all trained tokens of the step.
            total += float(trainer.training_step(model, inputs, torch.tensor(count)))
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return total

    return step


def measured(
    makers: dict[str, Callable[[], Callable[[Samples], float]]], batches: list[Samples]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Tokens a second and loss of every contender's steps, interleaved; one that fails is left out, with a word why."""
    steps: dict[str, Callable[[Samples], float]] = {}
    taken: dict[str, list[float]] = {name: [] for name in makers}
    losses: dict[str, list[float]] = {name: [] for name in makers}
    for batch in [[], *batches]:  # at first they are made
        for name in list(taken):
            try:
                if not batch:
                    steps[name] = makers[name]()
                    continue
                start = time.perf_counter()
                losses[name].append(steps[name](batch))
                if CUDA:
                    torch.cuda.synchronize()
                taken[name].append(sum(map(len, batch)) / (time.perf_counter() - start))
            except Exception as error:
                if name == "burnish":
                    raise
                print(f"Left out, {name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
                for found in (steps, taken, losses):
                    found.pop(name, None)
    return taken, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--size", choices=SIZES, default="1b" if CUDA else "tiny")
    parser.add_argument("--all-weights", action="store_true")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    shape, capacity = SIZES[arguments.size], 8192 if CUDA else 1024
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        dist.init_process_group("nccl" if CUDA else "gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
        torch.manual_seed(0)
        with torch.device("cuda" if CUDA else "cpu"):
            made = LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16 if CUDA else torch.float32)
        made.save_pretrained(folder / "model")
        del made
        recipe = recipe_of(folder, capacity, not arguments.all_weights)
        plain = recipe.model_copy(update={"model": recipe.model.model_copy(update={"kernels": "plain"})})
        makers: dict[str, Callable[[], Callable[[Samples], float]]] = {
            "burnish": partial(burnish, recipe),
            # Of the largest model four do not fit beside each other.
            **({"burnish, kernels: plain": partial(burnish, plain)} if CUDA and arguments.size == "1b" else {}),
            "TRL, defaults": partial(supervised, recipe, folder, tuned=False),
            "TRL, tuned": partial(supervised, recipe, folder, tuned=True, compiled=arguments.compile),
        }
        batches = [batch_of(number, capacity, shape["vocab_size"]) for number in range(arguments.rounds + 2)]
        taken, losses = measured(makers, batches)
        dist.destroy_process_group()
    firsts = [each[0] for each in losses.values()]
    assert np.allclose(firsts, firsts[0], rtol=2e-2 if CUDA else 1e-4), losses
    device = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}, torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}")
    trained = "all weights" if arguments.all_weights else "adapters of rank 16"
    print(
        f"| {arguments.size}, {trained} | tokens/s: median (least to most) | burnish is faster by | loss of the first batch |"
    )
    print("|---|---|---|---|")
    ours = taken["burnish"][2:]
    for name, speeds in taken.items():
        kept = speeds[2:]  # the first steps allocate
        ratio = statistics.median(one / other for one, other in zip(ours, kept, strict=True))
        print(
            f"| {name} | {statistics.median(kept):,.0f} ({min(kept):,.0f} to {max(kept):,.0f}) | {ratio:.2f} | "
            f"{losses[name][0]:.4f} |"
        )


if __name__ == "__main__":
    main()
