"""The loss of a pack is the sum over its trained tokens, whatever else is in the row."""

import numpy as np
import torch
from torch.nn import functional as F

from burnish.data.packing import Pack, Sample
from burnish.train.objective import loss_sum
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
    loss = loss_sum(made, pack.input_ids, pack.labels, pack.seq_lens, CPU)
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
        loss = loss_sum(made, pack.input_ids, pack.labels, pack.seq_lens, CPU)
        loss.backward()
        assert loss.item() == 0.0
        assert all(p.grad is not None and float(p.grad.abs().max()) == 0.0 for p in made.parameters())


def test_the_first_token_of_a_sample_is_never_a_target_of_the_one_before():
    made = model("llama")
    pack = Pack.of([SAMPLES[0], SAMPLES[1]])
    labels = pack.labels.copy()
    assert labels[9] == -100
    alone = loss_sum(made, pack.input_ids, labels, pack.seq_lens, CPU)
    labels[9] = pack.input_ids[9]
    assert loss_sum(made, pack.input_ids, labels, pack.seq_lens, CPU) > alone  # the loss would show a label there
