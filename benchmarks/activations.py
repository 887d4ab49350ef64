"""What a step keeps for its backward pass, with transformers' own norms and gates and with burnish's; no weight is made.

    .venv/bin/python benchmarks/activations.py

A Llama of the widths of 8B with 8 of its 32 layers, in bfloat16, a pack of 8,192 tokens that are all trained. Bytes are
those that `burnish plan` counts (`train/footprint.py`).
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from burnish.config import Recipe, parse
from burnish.train import elementwise
from burnish.train.footprint import measure

SHAPE: dict[str, Any] = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 8,
    "num_attention_heads": 32, "num_key_value_heads": 8, "architectures": ["LlamaForCausalLM"],
}  # fmt: skip


def recipe_of(folder: Path, lora: dict[str, int] | None) -> Recipe:
    return parse(
        {
            "name": "bench",
            "model": {"path": str(folder)},
            "lora": lora,
            "data": {"train": [{"path": str(folder / "unused.jsonl")}], "max_length": 8192},
            "train": {"global_batch_size": 1},
        },
        "benchmark",
    )


@contextmanager
def transformers_own() -> Iterator[None]:
    """The model as transformers has it."""
    right = elementwise.replaceable
    elementwise.replaceable = lambda model: {}
    try:
        yield
    finally:
        elementwise.replaceable = right


def main() -> None:
    print("| GiB kept | transformers' norms and gates | burnish | ratio |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        LlamaConfig(**SHAPE).save_pretrained(place)
        for name, lora in (("adapters of rank 16", {"rank": 16}), ("all weights", None)):
            recipe = recipe_of(Path(place), lora)
            with transformers_own():
                theirs = measure(recipe).kept / 2**30
            ours = measure(recipe).kept / 2**30
            print(f"| {name} | {theirs:.1f} | {ours:.1f} | {ours / theirs:.2f} |")


if __name__ == "__main__":
    main()
