"""Packed equals separate, on four architectures, in logits and in gradients; and the ways in which it would not."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from burnish.errors import RecipeError
from burnish.train.attention import SDPA, packed_sdpa, register
from burnish.train.objective import packed_inputs
from tests.conftest import tiny_config

LENGTHS = np.array([23, 41, 17], np.int32)
ARCHITECTURES = ["llama", "qwen3", "mistral", "gemma"]


def model(architecture: str, kernel: str = SDPA):
    register("auto", cuda=False)
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(tiny_config(architecture, 64), attn_implementation=kernel, dtype=torch.float32)
    return made.train()


def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 64, (1, int(n)), generator=generator) for n in LENGTHS]


def gradient(made, losses) -> torch.Tensor:
    made.zero_grad()
    sum(losses).backward()
    return torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None])


def packed_and_separate(made, **call):
    """Logits and gradients of the three samples in one row, and each alone by the eager attention of transformers."""
    inputs = packed_inputs(LENGTHS, torch.device("cpu")) | call
    inputs = {key: value for key, value in inputs.items() if value is not None}
    logits = made(input_ids=torch.cat(rows(), dim=1), **inputs).logits[0]
    together = gradient(made, [logits.logsumexp(-1).square().sum()])
    kernel = made.config._attn_implementation
    made.set_attn_implementation("eager")
    alone = [made(input_ids=row, use_cache=False).logits[0] for row in rows()]
    apart = gradient(made, [part.logsumexp(-1).square().sum() for part in alone])
    made.set_attn_implementation(kernel)
    return logits, torch.cat(alone), together, apart


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_logits_and_gradients_equal_separate_ones(architecture):
    logits, alone, together, apart = packed_and_separate(model(architecture))
    assert (logits - alone).abs().max() < 1e-5
    assert (together - apart).norm() / apart.norm() < 1e-5


@pytest.mark.parametrize("architecture", ["mistral", "gemma"])
def test_the_sliding_window_of_these_models_matters_here(architecture):
    made = model(architecture)
    logits, *_ = packed_and_separate(made)
    if architecture == "mistral":
        made.config.sliding_window = None
    for layer in made.model.layers:
        layer.self_attn.sliding_window = None
    without, *_ = packed_and_separate(made)
    assert (logits - without).abs().max() > 1e-3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_gradient_crosses_from_one_sample_to_another(architecture):
    made = model(architecture)
    embeddings = made.get_input_embeddings()(torch.cat(rows(), dim=1)).detach().requires_grad_()
    inputs = packed_inputs(LENGTHS, torch.device("cpu"))
    logits = made(inputs_embeds=embeddings, **inputs).logits[0]
    start, end = int(LENGTHS[0]), int(LENGTHS[:2].sum())
    (found,) = torch.autograd.grad(logits[start:end].sum(), embeddings)
    assert found[0, :start].abs().max() == 0 and found[0, end:].abs().max() == 0
    assert found[0, start:end].abs().max() > 0


def test_the_comparison_catches_the_leak_of_a_plain_loop():
    # transformers' own kernel, called as a hand-written loop calls it: with its cache left on.
    logits, alone, *_ = packed_and_separate(model("llama", "sdpa"), use_cache=True, cu_seq_lens_q=None, cu_seq_lens_k=None)
    assert (logits - alone).abs().max() > 0.1


def test_borders_that_are_wrong_by_one_token_are_caught():
    wrong = torch.tensor([0, 24, 64, 81], dtype=torch.int32)
    logits, alone, *_ = packed_and_separate(model("llama"), cu_seq_lens_q=wrong)
    assert (logits - alone).abs().max() > 1e-2


def test_a_call_without_borders_raises():
    with pytest.raises(RuntimeError, match="cu_seq_lens_q"):
        model("llama")(input_ids=rows()[0], use_cache=False)


@pytest.mark.parametrize("feature", ["softcap", "s_aux"])
def test_what_the_kernel_does_not_support_raises(feature):
    q = torch.zeros(1, 2, 3, 4)
    borders = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=feature):
        packed_sdpa(torch.nn.Identity(), q, q, q, None, cu_seq_lens_q=borders, **{feature: 1.0})
    with pytest.raises(RuntimeError, match="a batch of 2"):
        packed_sdpa(torch.nn.Identity(), q.expand(2, 2, 3, 4), q, q, None, cu_seq_lens_q=borders)


def test_flash_without_a_gpu_is_refused_by_name():
    with pytest.raises(RecipeError, match=r"model.attention: flash .* write auto"):
        register("flash", cuda=False)


@pytest.mark.gpu
def test_flash_equals_sdpa_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("flash_attn")
    from burnish.train.attention import packed_flash

    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, 81, 64, device="cuda", dtype=torch.bfloat16, generator=generator) for heads in (4, 2, 2)
    )
    inputs = packed_inputs(LENGTHS, torch.device("cuda"))
    for window in (None, 12):
        one, _ = packed_sdpa(torch.nn.Identity(), q, k, v, None, scaling=0.125, sliding_window=window, **inputs)
        other, _ = packed_flash(torch.nn.Identity(), q, k, v, None, scaling=0.125, sliding_window=window, **inputs)
        assert (one - other).abs().max() < 2e-2
