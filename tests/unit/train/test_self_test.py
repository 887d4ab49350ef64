"""The self-test passes where packed samples are apart, and finds each way in which they are not."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config

from burnish.errors import TrainingError
from burnish.sections import LoraSpec
from burnish.train import objective
from burnish.train.adapters import with_adapters
from burnish.train.attention import SDPA, register
from burnish.train.elementwise import fuse, replaceable
from burnish.train.kernels import plain
from burnish.train.self_test import check
from tests.conftest import tiny_config

CPU = torch.device("cpu")
RNG = np.random.default_rng(7)
LENGTHS = np.array([23, 41, 17], np.int32)


def pack(lengths=LENGTHS):
    ids = RNG.integers(0, 64, int(lengths.sum())).astype(np.int32)
    return ids, ids, lengths


def model(architecture: str, kernel: str = SDPA, dtype=torch.float32):
    register("auto", cuda=False)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(architecture, 64), attn_implementation=kernel, dtype=dtype).train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma"])
def test_models_whose_samples_are_apart_pass_and_stay_as_they_are(architecture, dtype):
    made = model(architecture, dtype=dtype)
    before = {name: weight.clone() for name, weight in made.state_dict().items()}
    drawn = torch.get_rng_state()
    check(made, [pack(LENGTHS[:1]), pack(), pack(LENGTHS[:2])], CPU)
    assert torch.equal(drawn, torch.get_rng_state())
    assert made.config._attn_implementation == SDPA and made.training
    assert all(torch.equal(before[name], weight) for name, weight in made.state_dict().items())
    assert all(parameter.grad is None for parameter in made.parameters())
    assert not any(module._forward_hooks for module in made.modules())


@pytest.mark.parametrize("lengths", [[], [1], [2], [40], [1, 1], [1, 39]])
def test_packs_of_any_shape_can_be_tested(lengths):
    made = model("llama")
    check(made, [pack(np.array(lengths, np.int32))], CPU)
    assert made.training and all(parameter.grad is None for parameter in made.parameters())


@pytest.mark.parametrize("broken", [None, "norm", "gate"])
def test_norms_and_gates_of_ours_are_compared_with_those_of_transformers(broken):
    made, right = model("qwen3"), plain()
    wrong = {
        None: right,
        "norm": replace(right, norm=lambda *told: right.norm(*told) * 1.01),
        "gate": replace(right, gate=lambda *told: right.gate(*told) * 1.5),
    }[broken]
    fuse(replaceable(made), wrong)
    fused = {name for name, module in made.named_modules() if "forward" in vars(module)}
    with (
        pytest.raises(TrainingError, match=r"layer 0 .* try model.attention: sdpa, model.kernels: plain")
        if broken
        else nullcontext()
    ):
        check(made, [pack()], CPU)
    assert len(fused) == 11 and {name for name, module in made.named_modules() if "forward" in vars(module)} == fused


def test_adapters_with_dropout_and_recomputed_activations_pass():
    made = with_adapters(model("qwen3"), LoraSpec(rank=4, dropout=0.5))
    made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    made.enable_input_require_grads()
    for module in made.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    check(made, [pack()], CPU)
    assert {module.p for module in made.modules() if isinstance(module, torch.nn.Dropout)} == {0.5}


@pytest.mark.parametrize("kind", ["SeedOssConfig", "OPTConfig", "Starcoder2Config"])
def test_dropout_that_a_model_applies_by_a_function_is_off_for_the_test_and_on_again(kind):
    register("auto", cuda=False)
    rates = {"OPTConfig": {"dropout": 0.3, "ffn_dim": 48, "word_embed_proj_dim": 32}}.get(
        kind, {"residual_dropout": 0.3, "intermediate_size": 48, "num_key_value_heads": 2}
    )
    config = getattr(transformers, kind)(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8, max_position_embeddings=256,
        attention_dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2, **rates,
    )  # fmt: skip
    made = AutoModelForCausalLM.from_config(config, attn_implementation=SDPA).train()
    check(made, [pack()], CPU)
    name = "dropout" if kind == "OPTConfig" else "residual_dropout"
    assert 0.3 in {vars(each).get(name) for each in made.modules()}


def plant(monkeypatch, **changes):
    """What a hand-written loop passes instead of the borders of samples."""
    right = objective.packed_inputs

    def wrong(seq_lens, device):
        inputs = {**right(seq_lens, device), **changes}
        return {name: value for name, value in inputs.items() if value is not None}

    monkeypatch.setattr(objective, "packed_inputs", wrong)


NO_BORDERS = {"cu_seq_lens_q": None, "cu_seq_lens_k": None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {"use_cache": True, **NO_BORDERS},
        {"attention_mask": torch.ones(1, 81, dtype=torch.int64), **NO_BORDERS},
        {"position_ids": torch.arange(81).unsqueeze(0), **NO_BORDERS},
    ],
    ids=["cache left on", "mask of ones", "positions not reset"],
)
def test_the_leaks_of_a_plain_loop_are_found(monkeypatch, changes, dtype):
    check(model("llama", "sdpa", dtype), [pack()], CPU)  # without the plant
    plant(monkeypatch, **changes)
    with pytest.raises(TrainingError, match=r"gradient of one sample reaches another; layer 0 \(.*Layer\)") as found:
        check(model("llama", "sdpa", dtype), [pack()], CPU)
    assert found.value.exit_code == 5


@pytest.mark.parametrize("borders", [[0, 24, 64, 81], [0, 22, 64, 81], [0, 81]])
def test_wrong_borders_are_found(monkeypatch, borders):
    wrong = torch.tensor(borders, dtype=torch.int32)
    plant(monkeypatch, cu_seq_lens_q=wrong, cu_seq_lens_k=wrong)
    with pytest.raises(TrainingError, match="layer 0"):
        check(model("llama"), [pack()], CPU)


@pytest.mark.parametrize("window", [None, 11, 13])
def test_a_wrong_window_is_found_and_its_layer_is_named(window):
    made = model("gemma")
    sliding = made.config.layer_types.index("sliding_attention")
    made.model.layers[sliding].self_attn.sliding_window = window
    with pytest.raises(TrainingError, match=rf"layer {sliding} \(sliding_attention\)"):
        check(made, [pack()], CPU)


def test_the_sample_that_a_window_cuts_is_tested_wherever_it_lies():
    made = model("gemma")  # whose window is 12 tokens
    sliding = made.config.layer_types.index("sliding_attention")
    made.model.layers[sliding].self_attn.sliding_window = None
    short = pack(np.array([5, 6, 7, 5, 6], np.int32))
    check(made, [short], CPU)  # nothing to see here
    with pytest.raises(TrainingError, match=rf"layer {sliding} \(sliding_attention\)"):
        check(made, [short, pack(np.array([5, 40, 6, 5], np.int32)), pack(np.array([60], np.int32))], CPU)


def test_positions_that_are_not_reset_are_found_though_the_borders_are_right(monkeypatch):
    register("auto", cuda=False)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    made = AutoModelForCausalLM.from_config(config, attn_implementation=SDPA).train()
    check(made, [pack()], CPU)
    plant(monkeypatch, position_ids=torch.arange(81).unsqueeze(0))
    with pytest.raises(TrainingError, match="layer 0"):
        check(made, [pack()], CPU)


def test_a_model_that_gives_all_logits_whatever_is_asked_for_is_tested_alike(monkeypatch):
    made = model("llama")
    right = type(made).forward
    monkeypatch.setattr(type(made), "forward", lambda self, *args, logits_to_keep=0, **kw: right(self, *args, **kw))
    check(made, [pack()], CPU)
    whole = torch.tensor([0, 81], dtype=torch.int32)
    plant(monkeypatch, cu_seq_lens_q=whole, cu_seq_lens_k=whole)
    with pytest.raises(TrainingError, match="layer 0"):
        check(made, [pack()], CPU)


def test_values_that_are_no_numbers_are_found():
    made = model("llama")
    with torch.no_grad():
        made.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="layer 1"):
        check(made, [pack()], CPU)
