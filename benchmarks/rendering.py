"""Tokens a second and core of rendering with masks: burnish, transformers' own mask, and TRL's preparation.

    .venv/bin/python benchmarks/rendering.py [--rows 400] [--rounds 5]

The three run in one process on one thread, interleaved, over the same conversations: text and code of the README files of
installed packages, cut into three turns of about 1,200 tokens together, under a byte-level vocabulary of 8,192 trained on
them. The peers get the template with {% generation %} that TRL swaps in for Qwen2.5; burnish gets the original. For a
template that rewrites history (Qwen3), where the peers train another text than serving shows, burnish stands alone.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

os.environ |= {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "RAYON_NUM_THREADS": "1",
}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from importlib.metadata import distributions

import datasets
import numpy as np
import tokenizers
import torch
import transformers
import trl
from tests.conftest import SPLIT
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from burnish.data.conversation import Conversation
from burnish.data.render import render
from burnish.data.tokenizer import dated

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]


def texts() -> list[str]:
    """The long descriptions of all installed packages."""
    # Where importlib_metadata was imported, a description is a header.
    found = [dist.metadata.get("Description") or dist.metadata.get_payload() for dist in distributions()]
    return sorted(text for text in found if isinstance(text, str) and len(text) > 2000)


def tokenizer_of(corpus: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8192, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def conversations(corpus: list[str], count: int) -> list[dict[str, object]]:
    """Three questions and answers each, cut from the corpus; lengths vary as those of UltraChat do (lognormal)."""
    text, rng = "\n".join(corpus), np.random.default_rng(0)
    rows = []
    for _ in range(count):
        messages = []
        for role, mean in (("user", 300), ("assistant", 1100)) * 3:
            start, size = int(rng.integers(0, len(text) - 20_000)), int(rng.lognormal(np.log(mean), 0.5))
            messages.append({"role": role, "content": text[start : start + size].strip() or "yes"})
        rows.append({"messages": messages})
    return rows


def contenders(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, object]]) -> dict[str, Callable[[], int]]:
    """What is timed, by name; each gives the number of tokens that it made."""
    training = (TEMPLATES / "qwen2_5_training.jinja").read_text()
    config = SFTConfig(
        output_dir="unused", assistant_only_loss=True, max_length=None, report_to=[], use_cpu=True, bf16=False
    )
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=training, completion_only_loss=False)

    def burnish(name: str) -> int:
        source = (TEMPLATES / f"{name}.jinja").read_text()
        template = dated(tokenizer, source, {}, frozenset([tokenizer.eos_token_id]), None)
        return sum(len(sample) for row in rows for sample in render(Conversation.parse(row), template, 1 << 20))

    def own_mask() -> int:
        made = 0
        for row in rows:
            found = tokenizer.apply_chat_template(
                row["messages"], chat_template=training, return_dict=True, return_assistant_tokens_mask=True
            )
            made += len(found["input_ids"])
        return made

    def prepared() -> int:
        fresh = datasets.Dataset.from_list(rows)
        done = SFTTrainer._prepare_dataset(trainer, fresh, tokenizer, config, False, None, "train")
        return sum(map(len, done["input_ids"]))

    return {
        "burnish, Qwen2.5": lambda: burnish("qwen2_5"),
        "transformers, own mask": own_mask,
        "TRL, preparation": prepared,
        "burnish, Qwen3 (a sample a turn)": lambda: burnish("qwen3"),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    datasets.disable_caching()
    torch.set_num_threads(1)
    corpus = texts()
    tokenizer = tokenizer_of(corpus)
    rows = conversations(corpus, options.rows)
    timed = contenders(tokenizer, rows)
    speeds: dict[str, list[float]] = {name: [] for name in timed}
    for work in timed.values():
        work()  # caches warm
    for _ in range(options.rounds):
        for name, work in timed.items():
            start = time.process_time()
            made = work()
            speeds[name].append(made / (time.process_time() - start) / 1e6)
    print(f"trl {trl.__version__}, transformers {transformers.__version__}, tokenizers {tokenizers.__version__}")
    print("| | M tokens/s of one core: median (least to most) | ratio to transformers |\n|---|---|---|")
    base = statistics.median(speeds["transformers, own mask"])
    for name, found in speeds.items():
        median = statistics.median(found)
        print(f"| {name} | {median:.2f} ({min(found):.2f} to {max(found):.2f}) | {median / base:.2f} |")


if __name__ == "__main__":
    main()
