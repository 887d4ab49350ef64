"""The loss of a pack is the sum over its trained tokens, whatever else is in the row."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from burnish.data.packing import Pack, Sample
from burnish.train import objective
from burnish.train.attention import register
from burnish.train.objective import Objective
from tests.unit.train.test_attention import model

CPU = torch.device("cpu")


def sample(seed: int, length: int, trained: set[int]) -> Sample:
    ids = np.random.default_rng(seed).integers(0, 64, length).astype(np.int32)
    return Sample(ids, np.array([i in trained for i in range(length)]), (1,))


SAMPLES = [sample(0, 9, {4, 5, 8}), sample(1, 5, {1, 2}), sample(2, 7, {6})]


def separate(made, one: Sample) -> torch.Tensor:
    made.set_attn_implementation("eager")
    ids = torch.from_numpy(one.input_ids.astype(np.int64))
    logits = made(input_ids=ids[None], use_cache=False).logits[0, :-1]
    losses = F.cross_entropy(logits, ids[1:], reduction="none")
    made.set_attn_implementation("burnish_packed_sdpa")
    return losses[torch.from_numpy(one.trained[1:])].sum()


def test_the_loss_and_gradient_of_a_pack_are_the_sums_of_its_samples():
    made = model("llama")
    pack = Pack.of(SAMPLES)
    loss = Objective(made, CPU).loss_sum(pack.input_ids, pack.labels, pack.seq_lens)
    loss.backward()
    together = torch.cat([p.grad.flatten() for p in made.parameters()])
    made.zero_grad()
    expected = sum(separate(made, one) for one in SAMPLES)
    expected.backward()
    apart = torch.cat([p.grad.flatten() for p in made.parameters()])
    assert abs(loss.item() - expected.item()) / expected.item() < 1e-6
    assert (together - apart).norm() / apart.norm() < 1e-5


def test_a_pack_without_samples_or_targets_gives_zero_and_runs_backward():
    made = model("llama")
    for pack in (Pack.of([]), Pack(SAMPLES[0].input_ids, np.full(9, -100, np.int32), np.array([9], np.int32))):
        made.zero_grad()
        loss = Objective(made, CPU).loss_sum(pack.input_ids, pack.labels, pack.seq_lens)
        loss.backward()
        assert loss.item() == 0.0
        assert all(p.grad is not None and float(p.grad.abs().max()) == 0.0 for p in made.parameters())


def test_the_first_token_of_a_sample_is_never_a_target_of_the_one_before():
    made = model("llama")
    pack = Pack.of([SAMPLES[0], SAMPLES[1]])
    labels = pack.labels.copy()
    assert labels[9] == -100
    alone = Objective(made, CPU).loss_sum(pack.input_ids, labels, pack.seq_lens)
    labels[9] = pack.input_ids[9]
    assert Objective(made, CPU).loss_sum(pack.input_ids, labels, pack.seq_lens) > alone  # the loss would show a label there


def gradients(made, chunked: bool, dtype=torch.float32):
    """Loss and gradients of a pack, in chunks or with whole logits."""
    made.zero_grad()
    loss_of = Objective(made, CPU)
    assert loss_of._head is not None
    if not chunked:
        loss_of._head = None
    pack = Pack.of(SAMPLES)
    loss = loss_of.loss_sum(pack.input_ids, pack.labels, pack.seq_lens)
    (loss * 0.25).backward()
    assert "forward" not in made.get_output_embeddings().__dict__
    return loss.detach(), {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("tied", "bias", "frozen"), [(False, False, False), (True, False, False), (False, True, False), (False, True, True)]
)
def test_chunks_give_the_loss_and_gradients_of_whole_logits(monkeypatch, rows, tied, bias, frozen):
    made = model("llama")
    if bias:
        made.lm_head = torch.nn.Linear(made.config.hidden_size, made.config.vocab_size)
    if tied:
        made.lm_head.weight = made.model.embed_tokens.weight
    made.lm_head.requires_grad_(not frozen)
    whole, expected = gradients(made, chunked=False)
    monkeypatch.setattr(objective, "CHUNK_ELEMENTS", rows * made.config.vocab_size)
    loss, found = gradients(made, chunked=True)
    assert abs(loss - whole) <= 1e-6 * whole
    assert set(found) == set(expected) and any("lm_head" in name for name in found) is (not tied and not frozen)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 2e-6 * gradient.norm(), name
    with torch.no_grad():
        pack = Pack.of(SAMPLES)
        assert abs(Objective(made, CPU).loss_sum(pack.input_ids, pack.labels, pack.seq_lens) - whole) <= 1e-6 * whole


def test_chunks_in_16_bits_are_as_near_as_16_bits_are(monkeypatch):
    made = model("llama").to(torch.bfloat16)
    whole, expected = gradients(made, chunked=False)
    monkeypatch.setattr(objective, "CHUNK_ELEMENTS", 2 * made.config.vocab_size)
    loss, found = gradients(made, chunked=True)
    assert loss.dtype == torch.float32 and abs(loss - whole) <= 1e-3 * whole
    for name, gradient in expected.items():
        assert found[name].dtype == torch.bfloat16
        assert (found[name] - gradient).norm() <= 0.02 * gradient.norm(), name


def test_a_model_that_changes_its_logits_is_found_and_its_loss_is_exact():
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, logits_scaling=0.125,
        attn_implementation=register("auto", cuda=False), pad_token_id=0,
    )  # fmt: skip
    made = GraniteForCausalLM(config)
    loss_of = Objective(made, CPU)
    assert loss_of._head is None
    pack = Pack.of(SAMPLES)
    expected = sum(separate(made, one) for one in SAMPLES)
    assert abs(loss_of.loss_sum(pack.input_ids, pack.labels, pack.seq_lens) - expected) <= 1e-6 * expected


MEMORY = """
import re, sys
from pathlib import Path
import numpy as np, torch
from transformers import LlamaConfig, LlamaForCausalLM
from burnish.train.attention import register
from burnish.train.objective import Objective
config = LlamaConfig(vocab_size=131072, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
                     attn_implementation=register("auto", cuda=False))
loss_of = Objective(LlamaForCausalLM(config), torch.device("cpu"))
if sys.argv[1] == "whole":
    loss_of._head = None
def train(n):
    ids = np.arange(n, dtype=np.int32)
    loss_of.loss_sum(ids, ids, np.array([n], np.int32)).backward()
    # Not ru_maxrss, which begins with what the process had that started this one.
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
few = train(2)
print(train(3072) - few)
"""


def test_the_loss_at_a_vocabulary_of_128k_takes_an_eighth_of_the_memory_of_whole_logits():
    peak = {
        way: int(subprocess.run([sys.executable, "-c", MEMORY, way], capture_output=True, text=True, check=True).stdout)
        for way in ("chunked", "whole")
    }
    assert peak["whole"] * 1024 > 2 * 3072 * 131072 * 4, peak
    assert peak["chunked"] <= peak["whole"] / 8, peak
    print(peak)


@pytest.mark.parametrize("way", ["ignores logits_to_keep", "rounds"])
def test_a_model_that_gives_other_rows_or_rounds_them_is_found_and_its_loss_is_exact(way):
    made = model("llama")
    plain = made.forward

    def forward(logits_to_keep=0, **inputs):
        output = plain(**inputs, logits_to_keep=0 if way == "ignores logits_to_keep" else logits_to_keep)
        output.logits = output.logits.to(torch.bfloat16) if way == "rounds" else output.logits
        return output

    made.forward = forward
    loss_of = Objective(made, CPU)
    assert loss_of._head is None
    one = sample(2, 7, {6})
    pack = Pack.of([one])
    loss = loss_of.loss_sum(pack.input_ids, pack.labels, pack.seq_lens)
    made.forward = plain
    assert loss.dtype == torch.float32
    assert abs(loss - separate(made, one)) <= (1e-6 if way != "rounds" else 1e-2) * loss


def test_float16_gives_its_head_whole_logits():
    assert Objective(model("llama").to(torch.float16), CPU)._head is None
