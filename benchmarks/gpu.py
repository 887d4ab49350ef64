"""What a step, the proof at start and a checkpoint cost on one GPU, against transformers in the same run.

    .venv/bin/python benchmarks/gpu.py [--rounds 5] [--folder .]

A Llama with random weights of the shape of Llama 3.2 1B in bfloat16 and conversations of 64 to 4,096 tokens, log-normal
around 500, are trained in batches of at most 8,192 tokens, activations kept, a step of AdamW after each. `burnish` packs
the batch; `transformers, padded` runs it as a Trainer that groups by length does, four samples of like length at a time, each
as wide as the longest of them; `transformers, packed` is what its collator with flattening gives, flash-attn told the borders
by position ids. All take the same samples, interleaved. burnish keeps float32 masters and moments, transformers' AdamW works
in bfloat16. Operations are counted as burnish counts them for balance (6 for each weight and token, 4 for adapters, attention
within samples; what is recomputed is not counted), over a dense peak of 989 TFLOP/s, that of an H100. cuDNN's attention is
off for all of them: it plans anew for each length.
"""

import argparse
import gc
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from burnish.config import Recipe, parse
from burnish.data.packing import Pack, Sample
from burnish.train import engine as ds
from burnish.train import self_test
from burnish.train.architecture import cost
from burnish.train.attempt import Progress
from burnish.train.build import build_model
from burnish.train.home import Home
from burnish.train.objective import Objective
from burnish.train.state import State
from burnish.train.writer import Place, Writer

SHAPE: dict[str, Any] = {
    "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}  # fmt: skip
TOKENS = 8192
PEAK = 989e12


def samples(seed: int) -> list[Sample]:
    """The samples of one micro-batch: as many as fit in its tokens."""
    rng = np.random.default_rng(seed)
    found: list[Sample] = []
    while True:
        length = int(np.clip(rng.lognormal(np.log(500), 0.8), 64, 4096))
        if sum(len(each.input_ids) for each in found) + length > TOKENS:
            return found
        trained = np.arange(length) >= length // 3
        found.append(Sample(rng.integers(0, SHAPE["vocab_size"], length).astype(np.int32), trained, (1,)))


def recipe_of(folder: Path, lora: dict[str, Any] | None, attention: str, zero_stage: int, model: str = "model") -> Recipe:
    return parse(
        {
            "name": "bench",
            "model": {"path": str(folder / model), "dtype": "bfloat16", "attention": attention, "activation_checkpointing": False},
            "lora": lora,
            "data": {"train": [{"path": str(folder / "unused.jsonl")}], "max_length": TOKENS},
            "train": {"global_batch_size": 1},
            "engine": {"zero_stage": zero_stage},
            "checkpoint": {"storage": str(folder)},
            "scale": {"num_workers": 1, "use_gpu": True},
            "tracking": {"uri": None},
        },
        "benchmark",
    )


class Ours:
    """One step of burnish at a time."""

    def __init__(self, recipe: Recipe) -> None:
        self.engine = ds.build_engine(recipe, build_model(recipe, cuda=True), 1)
        self._objective = Objective(self.engine, self.engine.device)

    def step(self, batch: list[Sample]) -> None:
        pack = Pack.of(batch)
        loss = self._objective.loss_sum(pack.input_ids, pack.labels, pack.seq_lens)
        ds.backward(self.engine, loss, pack.trained_tokens, 1)
        ds.step(self.engine)


class Theirs:
    """One step of transformers' model, peft's adapters and torch's AdamW, as its Trainer takes it."""

    def __init__(self, recipe: Recipe, packed: bool) -> None:
        self._packed = packed
        kernel = "flash_attention_2" if packed else "sdpa"
        self._model: Any = LlamaForCausalLM.from_pretrained(recipe.model.path, dtype=torch.bfloat16, attn_implementation=kernel)
        if recipe.lora:
            lora = LoraConfig(r=recipe.lora.rank, target_modules="all-linear", task_type="CAUSAL_LM")
            self._model = get_peft_model(self._model, lora, autocast_adapter_dtype=False)
        self._model = self._model.cuda().train()
        self._optimizer = torch.optim.AdamW([p for p in self._model.parameters() if p.requires_grad], lr=1e-5)

    def step(self, batch: list[Sample]) -> None:
        ordered = sorted(batch, key=lambda each: len(each.input_ids))
        parts = [batch] if self._packed else [ordered[start : start + 4] for start in range(0, len(ordered), 4)]
        for part in parts:
            self._model(**(self._flat(part) if self._packed else self._rows(part)), use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self._model.parameters() if p.requires_grad], 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _flat(self, batch: list[Sample]) -> dict[str, torch.Tensor]:
        pack = Pack.of(batch)
        ids, labels = (torch.from_numpy(each.astype(np.int64))[None].cuda() for each in (pack.input_ids, pack.labels))
        places = torch.cat([torch.arange(int(n)) for n in pack.seq_lens])[None].cuda()
        return {"input_ids": ids, "labels": labels, "position_ids": places}

    def _rows(self, batch: list[Sample]) -> dict[str, torch.Tensor]:
        ids = torch.zeros(len(batch), max(len(each.input_ids) for each in batch), dtype=torch.long)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, each in enumerate(batch):
            n = len(each.input_ids)
            ids[row, :n], mask[row, :n] = torch.from_numpy(each.input_ids.astype(np.int64)), 1
            labels[row, :n] = torch.where(torch.from_numpy(each.trained), ids[row, :n], -100)
        return {"input_ids": ids.cuda(), "labels": labels.cuda(), "attention_mask": mask.cuda()}


def seconds_of(call: Callable[..., object], *arguments: Any, **options: Any) -> float:
    """Wall-clock seconds of a call, with all that it starts on the GPU."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call(*arguments, **options)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def steps(folder: Path, lora: dict[str, Any] | None, kernels: tuple[str, ...], rounds: int) -> None:
    """Prints the table of steps."""
    contenders: dict[str, Any] = {}
    makers: dict[str, Callable[[], Any]] = {
        f"burnish, {kernel}": partial(Ours, recipe_of(folder, lora, kernel, 2)) for kernel in kernels
    }
    plain = recipe_of(folder, lora, "sdpa", 2)
    makers |= {
        "transformers, padded (sdpa)": partial(Theirs, plain, packed=False),
        "transformers, packed (flash-attn)": partial(Theirs, plain, packed=True),
    }
    peak: dict[str, float] = {}
    for name, make in makers.items():
        try:
            held = torch.cuda.memory_allocated()
            contenders[name] = make()
            torch.cuda.reset_peak_memory_stats()
            for seed in (100, 101):
                contenders[name].step(samples(seed))
            peak[name] = (torch.cuda.max_memory_allocated() - held) / 2**30
        except Exception as error:
            contenders.pop(name, None)
            print(f"Left out, {name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for seed in range(rounds):
        batch = samples(seed)
        for name, contender in contenders.items():
            taken[name].append(sum(len(each.input_ids) for each in batch) / seconds_of(contender.step, batch))
    price = cost(LlamaConfig(**SHAPE), adapters=lora is not None)
    lengths = [len(each.input_ids) for each in samples(0)]
    operations = float(price.of(np.array(lengths, np.int32), np.array([0, len(lengths)]))[0]) / sum(lengths)
    print(f"\n#### {'Adapters of rank 16' if lora else 'All weights'}\n")
    print("| | tokens/s: median (least to most) | ratio | TFLOP/s | share of peak | GiB at most |")
    print("|---|---|---|---|---|---|")
    base = statistics.median(taken.get("transformers, padded (sdpa)", [math.nan]))
    for name, speeds in taken.items():
        median = statistics.median(speeds)
        print(
            f"| {name} | {median:,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f}) | {median / base:.2f} | "
            f"{median * operations / 1e12:.0f} | {median * operations / PEAK:.2f} | {peak[name]:.1f} |"
        )
    ours = next((each for name, each in contenders.items() if name.startswith("burnish")), None)
    if ours is None:
        return
    pack = Pack.of(samples(0))
    packs = [(pack.input_ids, pack.labels, pack.seq_lens)]
    proof = seconds_of(self_test.check, ours.engine.module, packs, ours.engine.device)
    print(f"\nThe proof at start: {proof:.2f} s for {len(pack.seq_lens)} samples in {len(pack.input_ids)} tokens")


def checkpoints(folder: Path, lora: dict[str, Any] | None, zero_stage: int) -> None:
    """Prints what a checkpoint holds up training for, beside what it costs when training waits for it."""
    run = folder / f"run-{zero_stage}-{lora is not None}"
    (run / "checkpoints").mkdir(parents=True)
    (run / "contract.json").write_text("{}")
    ours = Ours(recipe_of(folder, lora, "auto", zero_stage, "model" if lora else "six layers"))
    ours.step(samples(0))
    state = State(ours.engine)
    writer = Writer(Place(Home(run), "bench", 1, None, ""), 0, 1)
    rows: dict[str, list[float]] = {"snapshot": [], "until it stands": [], "DeepSpeed": [], "step beside": [], "step": []}
    for number in range(1, 4):
        torch.cuda.synchronize()
        start = time.perf_counter()
        snapshot = state.snapshot({})
        rows["snapshot"].append(time.perf_counter() - start)
        writer.write(Progress(number), {}, snapshot)
        rows["step beside"].append(seconds_of(ours.step, samples(1)))
        writer.wait()
        rows["until it stands"].append(time.perf_counter() - start)
        rows["step"].append(seconds_of(ours.step, samples(1)))
    size = sum(file.stat().st_size for file in (run / "checkpoints").rglob("*") if file.is_file())
    rows["DeepSpeed"].append(
        seconds_of(ours.engine.save_checkpoint, str(run / "ds"), "x", exclude_frozen_parameters=lora is not None)
    )
    print(f"\n| {'adapters' if lora else 'all weights of six layers'}, ZeRO-{zero_stage}, {size / 2**30:.2f} GiB | seconds |")
    print("|---|---|")
    for name, values in rows.items():
        print(f"| {name} | {', '.join(f'{value:.3f}' for value in values)} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    torch.cuda.set_device(0)
    torch.backends.cuda.enable_cudnn_sdp(False)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        dist.init_process_group("nccl", init_method=f"file://{folder}/meet", rank=0, world_size=1)
        torch.manual_seed(0)
        for name, layers in (("model", 16), ("six layers", 6)):  # checkpoints of all weights of the larger one fill the disk
            with torch.device("cuda"):
                made = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": layers})).to(torch.bfloat16)
            made.save_pretrained(folder / name)
            del made
        for lora, kernels in (({"rank": 16}, ("flash", "varlen", "sdpa")), (None, ("auto",))):
            steps(folder, lora, kernels, options.rounds)
            gc.collect()
            torch.cuda.empty_cache()
        for lora in ({"rank": 16}, None):
            checkpoints(folder, lora, 3)
            gc.collect()
            torch.cuda.empty_cache()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
