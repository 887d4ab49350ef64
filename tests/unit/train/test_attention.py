"""Packed equals separate, on five architectures, in logits and in gradients; and the ways in which it would not."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DeepseekV3Config

from burnish.errors import RecipeError
from burnish.train.attention import FLASH, SDPA, VARLEN, packed_flash, packed_sdpa, packed_varlen, register
from burnish.train.objective import packed_inputs
from tests.conftest import tiny_config

LENGTHS = np.array([23, 41, 17], np.int32)
ARCHITECTURES = ["llama", "qwen3", "mistral", "gemma", "deepseek"]
FAST = VARLEN if importlib.util.find_spec("flash_attn") is None else FLASH
"""The kernel that a GPU gets here."""


def config(architecture: str):
    if architecture != "deepseek":
        return tiny_config(architecture, 64)
    return DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, q_lora_rank=16,
        kv_lora_rank=8, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=2, pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip


def model(architecture: str, kernel: str = SDPA):
    register("auto", cuda=False)
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config(architecture), attn_implementation=kernel, dtype=torch.float32)
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


@pytest.mark.parametrize("choice", ["flash", "varlen"])
def test_a_kernel_that_cannot_run_is_refused_by_name(choice):
    with pytest.raises(RecipeError, match=rf"model.attention: {choice} cannot run because no GPU .* write auto"):
        register(choice, cuda=False)
    with pytest.raises(RecipeError, match=rf"{choice} cannot run because model.dtype is float32"):
        register(choice, cuda=True, half=False)
    with pytest.raises(RecipeError, match=r"knows no dropout, and this model's attention has 0\.1"):
        register("varlen", cuda=True, dropout=0.1)
    with pytest.raises(RecipeError, match=r"varlen cannot run because heads are 100 wide, which is no multiple of 8"):
        register("varlen", cuda=True, heads={(100, 100)})


@pytest.mark.parametrize(
    ("heads", "why"),
    [
        ({(192, 128)}, "queries are 192 wide and values 128"),  # DeepSeek-V3
        ({(256, 256), (512, 512)}, "heads of 512 are wider than 256"),  # Gemma 4
        ({(64, 64), (64, 128)}, "queries are 64 wide and values 128"),
    ],
)
def test_heads_that_the_fast_kernels_cannot_take_get_sdpa_and_the_reason_is_said(heads, why, monkeypatch, caplog):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # as where flash-attn is installed
    assert register("auto", cuda=True, heads=heads) == SDPA
    assert (
        f"auto takes sdpa, which is slower: flash cannot run because {why} and varlen cannot run because {why}"
        in caplog.text
    )
    for choice in ("flash", "varlen"):
        with pytest.raises(RecipeError, match=f"model.attention: {choice} cannot run because {why}; write auto"):
            register(choice, cuda=True, heads=heads)


def test_a_flash_attn_that_does_not_load_is_passed_over_and_the_reason_is_said(tmp_path, monkeypatch):
    (tmp_path / "flash_attn.py").write_text("raise OSError('undefined symbol: of another torch')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    assert register("auto", cuda=True) == VARLEN
    with pytest.raises(RecipeError, match=r"flash cannot run because flash-attn does not load: .*another torch; write auto"):
        register("flash", cuda=True)


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize(
    ("dtype", "kind", "heads"),
    [(torch.float32, OnGpu, 4), (torch.bfloat16, OnGpu, 2), (torch.float32, torch.Tensor, 2)],
)
def test_no_kernel_is_asked_for_that_keeps_all_scores(monkeypatch, dtype, kind, heads):
    asked = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, *_, **told: asked.append((k.shape[1], told)) or q)
    query, keys = (torch.empty(1, number, 8, 16, dtype=dtype).as_subclass(kind) for number in (4, 2))
    packed_sdpa(torch.nn.Identity(), query, keys, keys, None, cu_seq_lens_q=torch.tensor([0, 5, 8]))
    assert [(number, told["enable_gqa"]) for number, told in asked] == [(heads, heads == 2)] * 2


@pytest.mark.parametrize("kernel", [SDPA, VARLEN, FLASH])
def test_transformers_loads_a_model_with_each_kernel_as_ours(tmp_path, kernel):
    model("llama").save_pretrained(tmp_path)
    made = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=kernel)
    assert made.config._attn_implementation == kernel


def test_nothing_is_said_where_a_fast_kernel_is_taken_or_none_is_expected(caplog):
    assert (register("auto", cuda=True), register("auto", cuda=False)) == (FAST, SDPA) and not caplog.records


def test_a_torch_whose_kernel_takes_other_arguments_is_not_given_ours(monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda query, key, value, *, scale=None: None)
    with pytest.raises(RecipeError, match=r"varlen cannot run because that of torch .* does not take window_size"):
        register("varlen", cuda=True)
    assert register("auto", cuda=True) != VARLEN
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    with pytest.raises(RecipeError, match=r"varlen cannot run because torch .* has no torch.nn.attention.varlen"):
        register("varlen", cuda=True)


def test_auto_takes_the_fastest_kernel_that_can_run():
    assert register("auto", cuda=True) == FAST
    assert register("auto", cuda=True, heads={(512, 512)}) == register("auto", cuda=True, half=False) == SDPA
    assert register("auto", cuda=True, dropout=0.1) == (FLASH if FAST == FLASH else SDPA)
    assert register("auto", cuda=True, heads={(100, 100)}) == (FLASH if FAST == FLASH else SDPA)
    assert register("auto", cuda=False) == SDPA and register("sdpa", cuda=True) == SDPA


def reference(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """What torch's documentation says of varlen_attn, by plain arithmetic: query [n, heads, d] -> [n, heads, d]."""
    assert max_q == max_k == int(LENGTHS.max()) and query.is_contiguous()
    left, right = window_size
    where = torch.arange(len(query))
    sample = torch.bucketize(where, cu_seq_q[1:].long(), right=True)
    distance = where[:, None] - where[None, :]
    seen = (sample[:, None] == sample[None, :]) & (distance >= -right) & ((distance <= left) | torch.tensor(left < 0))
    group = query.shape[1] // key.shape[1]
    assert enable_gqa is (group > 1)
    key, value = (each.repeat_interleave(group, 1) for each in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("value_width", [5, 8, 11])
def test_sdpa_is_right_where_values_have_another_width_than_queries(window, kv_heads, value_width):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, int(LENGTHS.sum()), width, generator=generator)
        for heads, width in ((4, 8), (kv_heads, 8), (kv_heads, value_width))
    )
    inputs = packed_inputs(LENGTHS, torch.device("cpu"))
    found, _ = packed_sdpa(torch.nn.Identity(), q, k, v, None, scaling=0.3, sliding_window=window, **inputs)
    borders, longest = inputs["cu_seq_lens_q"], int(LENGTHS.max())
    plain = reference(
        *(each[0].transpose(0, 1).contiguous() for each in (q, k, v)), borders, borders, longest, longest,
        scale=0.3, window_size=(-1 if window is None else window - 1, 0), enable_gqa=kv_heads < 4,
    )  # fmt: skip
    assert found.shape == (1, int(LENGTHS.sum()), 4, value_width) and (found[0] - plain).abs().max() < 1e-5


def of_torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
    """As torch 2.11 has it: fewer heads of keys need no word."""
    told = query.shape[1] != key.shape[1]
    return reference(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=told
    )


@pytest.mark.parametrize("of_torch", [reference, of_torch_2_11])
@pytest.mark.parametrize("window", [None, 1, 12])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_varlen_is_called_as_its_documentation_asks(monkeypatch, window, kv_heads, of_torch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", of_torch)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, int(LENGTHS.sum()), 8, generator=generator) for heads in (4, kv_heads, kv_heads))
    inputs = packed_inputs(LENGTHS, torch.device("cpu"))
    one, _ = packed_sdpa(torch.nn.Identity(), q, k, v, None, scaling=0.3, sliding_window=window, **inputs)
    other, _ = packed_varlen(torch.nn.Identity(), q, k, v, None, scaling=0.3, sliding_window=window, **inputs)
    assert one.shape == other.shape and (one - other).abs().max() < 1e-5
    with pytest.raises(RuntimeError, match="knows no dropout"):
        packed_varlen(torch.nn.Identity(), q, k, v, None, dropout=0.1, **inputs)
    with pytest.raises(RuntimeError, match="cu_seq_lens_q"):
        packed_varlen(torch.nn.Identity(), q, k, v, None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [8, 64, 128])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("kernel", [packed_flash, packed_varlen, packed_sdpa])
def test_kernels_and_their_gradients_equal_the_cpu_s_on_a_gpu(kernel, window, kv_heads, width, dtype):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if kernel is packed_flash:
        pytest.importorskip("flash_attn")
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, heads, int(LENGTHS.sum()), width, generator=generator) for heads in (4, kv_heads, kv_heads)]
    outer = torch.randn(1, int(LENGTHS.sum()), 4, width, generator=generator)
    found = {}
    for device, run, kind in (("cpu", packed_sdpa, torch.float32), ("cuda", kernel, dtype)):
        leaves = [each.to(dtype).to(device, kind).requires_grad_() for each in inputs]
        output, _ = run(
            torch.nn.Identity(), *leaves, None, scaling=0.125, sliding_window=window,
            **packed_inputs(LENGTHS, torch.device(device)),
        )  # fmt: skip
        gradients = torch.autograd.grad(output, leaves, outer.to(device, kind))
        found[device] = [each.float().cpu() for each in (output, *gradients)]
    for one, other in zip(found["cpu"], found["cuda"], strict=True):
        assert one.shape == other.shape and (one - other).norm() < 1e-2 * one.norm()
