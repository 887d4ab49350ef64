"""Adapters are what the recipe names: nothing else is trained, and a name that nothing has is refused."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Dots1Config, GPTNeoXConfig, PhiConfig

from burnish.data.tokenizer import trained_token_ids
from burnish.errors import DataError, RecipeError
from burnish.sections import LoraSpec
from burnish.train.adapters import check_adapters, with_adapters
from burnish.train.attention import SDPA, register
from burnish.train.build import build_model
from burnish.train.footprint import measure
from burnish.train.objective import Objective
from burnish.train.prepare import prepare
from burnish.train.weight_files import shapes
from tests.conftest import write_model


def model(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def trained(made) -> set[str]:
    return {name for name, parameter in made.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("variant", "factor"), [("lora", 32 / 4), ("rslora", 32 / 2), ("dora", 32 / 4)])
def test_variants_scale_what_they_say_and_keep_the_models_dtype(model_folder, variant, factor):
    made = with_adapters(model(model_folder, torch.bfloat16), LoraSpec(rank=4, variant=variant))
    layer = made.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling == {"default": factor}
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}
    kinds = {name.split(".")[-3 if name.endswith(".weight") else -2] for name in trained(made)}
    assert kinds == {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if variant == "dora" else set())


def test_dora_is_the_published_formula(model_folder):
    made = with_adapters(model(model_folder), LoraSpec(rank=4, variant="dora"))
    layer = made.get_base_model().model.layers[0].mlp.up_proj
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
            parameter.copy_(torch.randn_like(parameter))
        magnitude = layer.lora_magnitude_vector["default"].weight
        magnitude.mul_(1.5)
        # Rows of W + s B A at the lengths m (DoRA, arXiv 2402.09353, equation 5).
        directed = layer.base_layer.weight + 8.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        wanted = magnitude[:, None] * directed / directed.norm(dim=1, keepdim=True)
        x = torch.randn(3, directed.shape[1])
        assert torch.allclose(layer(x), x @ wanted.T, rtol=1e-4, atol=1e-4)


def test_modules_that_are_named_are_trained_whole_and_no_others(model_folder):
    made = with_adapters(model(model_folder), LoraSpec(rank=4, modules_to_save=("norm", "lm_head", "embed_tokens")))
    whole = {name for name in trained(made) if "lora_" not in name}
    inside = ("model.norm", "lm_head", "model.embed_tokens")
    assert whole == {f"base_model.model.{name}.modules_to_save.default.weight" for name in inside}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"modules_to_save": ("lm_haed",)}, r"lora.modules_to_save: the model has no 'lm_haed'; write some of .*lm_head"),
        ({"modules_to_save": ("q_proj",)}, r"lora.modules_to_save: 'q_proj' has an adapter already"),
        ({"modules_to_save": ("self_attn.q_proj",), "target_modules": ("q_proj",)}, r"'self_attn.q_proj' has an adapter"),
        ({"modules_to_save": ("proj",)}, r"the model has no 'proj'"),
        ({"target_modules": ("qproj",)}, r"lora.target_modules: .*qproj"),
    ],
)
def test_names_that_the_model_does_not_have_or_names_twice_are_refused(model_folder, keys, message):
    spec = LoraSpec(rank=4, **keys)
    with pytest.raises(RecipeError, match=message):
        check_adapters(spec, shapes(model_folder))  # before a worker starts, from the headers of the files
    with pytest.raises(RecipeError, match=message):
        with_adapters(model(model_folder), spec)


def test_a_name_that_no_module_has_is_refused_whatever_was_known_of_the_files(model_folder):
    # As of a Hub model, whose files are not looked at before; PEFT alone would train q_proj and say nothing.
    with pytest.raises(RecipeError, match=r"no 'qkv_proj'; write all-linear or some of down_proj, gate_proj, k_proj"):
        with_adapters(model(model_folder), LoraSpec(rank=4, target_modules=("q_proj", "qkv_proj")))


def test_linear_layers_that_get_no_adapter_are_told(model_folder, caplog):
    with_adapters(model(model_folder), LoraSpec(rank=4))
    assert not caplog.text
    # PEFT takes gate_proj, up_proj and down_proj of these models for parts of the experts' weights, wherever they are.
    config = Dots1Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, n_shared_experts=1, first_k_dense_replace=1, pad_token_id=0,
    )  # fmt: skip
    made = with_adapters(AutoModelForCausalLM.from_config(config), LoraSpec(rank=4))
    left = [name for name, each in made.named_modules() if type(each) is torch.nn.Linear and "lora_" not in name]
    left = [name for name in left if "base_layer" not in name and "lm_head" not in name]
    assert f"{len(left)} linear layers get no adapter from PEFT (down_proj, gate_proj, up_proj)" in caplog.text, left


def test_what_may_be_named_is_not_refused(model_folder):
    for spec in (
        LoraSpec(rank=4, modules_to_save=("lm_head", "embed_tokens", "input_layernorm")),
        LoraSpec(rank=4, modules_to_save=("o_proj",), target_modules=("q_proj", "mlp.up_proj")),
    ):
        check_adapters(spec, shapes(model_folder))
        assert trained(with_adapters(model(model_folder), spec))


def test_a_module_that_shares_its_weight_is_not_trained_whole(tmp_path):
    folder = write_model(tmp_path / "tied", "gemma")
    for name in ("embed_tokens", "model.embed_tokens"):
        with pytest.raises(RecipeError, match=r"lora.modules_to_save: .*embed_tokens.* shares its weight"):
            with_adapters(model(folder), LoraSpec(rank=2, modules_to_save=(name,)))


def test_what_is_shared_is_known_by_what_it_is_and_not_by_its_name():
    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for tied in (True, False):
        made = AutoModelForCausalLM.from_config(GPTNeoXConfig(tie_word_embeddings=tied, **shape))
        for name in ("embed_in", "lm_head"):
            spec = LoraSpec(rank=2, modules_to_save=(name,))
            with pytest.raises(RecipeError, match=f"{name} shares its weight") if tied else nullcontext():
                with_adapters(copy.deepcopy(made), spec)


def test_a_head_that_is_trained_whole_beside_adapters_has_its_loss_in_chunks(model_folder):
    assert register("sdpa", cuda=False) == SDPA
    made = with_adapters(model(model_folder), LoraSpec(rank=4, modules_to_save=("lm_head",)))
    made.get_base_model().set_attn_implementation(SDPA)
    ids = np.arange(3, 40, dtype=np.int32)
    found = []
    for whole in (False, True):
        objective = Objective(made, torch.device("cpu"))
        assert objective._head is made.get_base_model().lm_head.modules_to_save["default"]
        objective._head = None if whole else objective._head
        loss = objective.loss_sum(ids, ids, np.array([20, 17], np.int32))
        found.append((loss.detach(), *torch.autograd.grad(loss, [p for p in made.parameters() if p.requires_grad])))
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in zip(*found, strict=True))
    assert any(bool(gradient.abs().max() > 0) for gradient in found[0][1:])


def test_a_plan_counts_what_is_trained(make_recipe, model_folder):
    for lora in (
        {"rank": 4},
        {"rank": 4, "target_modules": ["q_proj", "mlp.up_proj"]},
        {"rank": 4, "variant": "dora"},
        {"rank": 4, "modules_to_save": ["lm_head", "model.norm"]},
    ):
        recipe = make_recipe(lora=lora)
        made = with_adapters(model(model_folder), recipe.lora)
        assert measure(recipe).trained == sum(p.numel() for p in made.parameters() if p.requires_grad)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_named_tokens_are_trained_and_no_others(make_recipe, tmp_path, tied, dtype):
    """In embeddings and head, which stay one where they are one, and as much when they are merged."""
    folder = write_model(tmp_path / "model", "gemma" if tied else "llama")
    names = ("<|im_start|>", "a")
    recipe = make_recipe(model={"path": str(folder), "dtype": dtype}, lora={"rank": 2, "train_tokens": names})
    ids = trained_token_ids(recipe)
    assert len(ids) == 2 == len(set(ids)) and list(ids) == sorted(ids)
    made = build_model(recipe, cuda=False)
    rows = [weight for name, weight in made.named_parameters() if weight.requires_grad and "lora_" not in name]
    assert [tuple(weight.shape) for weight in rows] == [(2, 32)] * (1 if tied else 2)
    assert measure(recipe).trained == sum(weight.numel() for weight in made.parameters() if weight.requires_grad)
    row = np.array([5, ids[0], 6, ids[1], 7, 8], np.int32)
    loss = Objective(made, torch.device("cpu")).loss_sum(row, row, np.array([6], np.int32))
    loss.backward()
    assert all(weight.grad is not None and weight.grad.abs().sum(dim=1).gt(0).all() for weight in rows)
    before = {name: weight.clone() for name, weight in model(folder, getattr(torch, dtype)).named_parameters()}
    with torch.no_grad():
        for weight in rows:
            weight += 1
        for name, weight in made.named_parameters():
            if "lora_" in name:
                weight.zero_()
    merged = made.merge_and_unload()
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    for name, weight in merged.named_parameters():
        wanted = before[name].clone()
        if "embed_tokens" in name or "lm_head" in name:
            wanted[list(ids)] += 1
        assert torch.equal(weight, wanted), name


def test_a_token_that_is_none_is_refused(make_recipe):
    with pytest.raises(DataError, match=r"lora.train_tokens: '<\|nothing\|>' is \d+ tokens in this vocabulary"):
        trained_token_ids(make_recipe(lora={"train_tokens": ["<|nothing|>"]}))
    with pytest.raises(RecipeError, match=r"train_tokens: embed_tokens is trained by modules_to_save; take one of them out"):
        make_recipe(lora={"train_tokens": ["a"], "modules_to_save": ["embed_tokens"]})
    with pytest.raises(RecipeError, match=r"train_tokens: lm_head is trained by target_modules; take one of them out"):
        make_recipe(lora={"train_tokens": ["a"], "target_modules": ["q_proj", "lm_head"]})
    with pytest.raises(DataError, match=r"lora.train_tokens: '<\|nothing\|>'"):
        prepare(make_recipe(lora={"train_tokens": ["<|nothing|>"]}))


def test_a_head_with_a_bias_is_no_place_for_trained_tokens(tmp_path):
    config = PhiConfig(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(RecipeError, match=r"train_tokens: the head of this model has a bias; write lora.modules_to_save"):
        with_adapters(AutoModelForCausalLM.from_config(config), LoraSpec(rank=2), (5,))


def test_a_token_beyond_the_embeddings_is_refused(make_recipe, monkeypatch):
    from burnish.train import prepare as module

    monkeypatch.setattr(module, "embedded_tokens", lambda recipe: 3)
    with pytest.raises(RecipeError, match=r"lies beyond the model's 3 embeddings; take a model that was resized"):
        prepare(make_recipe(lora={"train_tokens": ["a"]}))


def test_what_is_kept_in_fewer_bits_is_not_trained_whole(model_folder):
    spec = LoraSpec(target_modules=("q_proj",), modules_to_save=("o_proj",))
    check_adapters(spec, shapes(model_folder))
    with pytest.raises(RecipeError, match=r"modules_to_save: 'o_proj' is kept in nf4, which cannot be trained; take it out"):
        check_adapters(spec, shapes(model_folder), "nf4")
    check_adapters(LoraSpec(target_modules=("q_proj",), modules_to_save=("lm_head", "norm")), shapes(model_folder), "nf4")
