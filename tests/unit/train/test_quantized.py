"""A base in 8 or 4 bits: loaded, trained like any other, counted, and refused where it cannot be."""

import importlib.util

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from burnish.config import parse
from burnish.data.packing import IGNORE_INDEX
from burnish.errors import RecipeError
from burnish.train import layout
from burnish.train.build import build_model
from burnish.train.failure import memory_options
from burnish.train.footprint import measure
from burnish.train.objective import Objective
from burnish.train.prepare import prepare
from tests.conftest import write_model

KINDS = ("int8", "nf4")


def recipe_of(make_recipe, kind, **sections):
    model = {"quantize": kind, "dtype": "bfloat16", **sections.pop("model", {})}
    return make_recipe(**{"model": model, "lora": {"rank": 4}, "engine": {"zero_stage": 2}, **sections})


@pytest.mark.parametrize(("kind", "variant"), [("int8", "lora"), ("nf4", "lora"), ("nf4", "dora")])
def test_packed_losses_and_gradients_are_those_of_each_sample_alone(make_recipe, kind, variant):
    recipe = recipe_of(make_recipe, kind, model={"dtype": "float32"}, lora={"rank": 4, "variant": variant})
    model = build_model(recipe, cuda=False)
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
    stored = {weight.dtype for name, weight in model.named_parameters() if "proj.base_layer.weight" in name}
    assert stored == {torch.int8 if kind == "int8" else torch.uint8}
    rng, lengths = np.random.default_rng(0), (9, 1, 14)
    samples = [rng.integers(0, 300, length).astype(np.int32) for length in lengths]
    ids = np.concatenate(samples)
    labels = np.concatenate([np.append(np.int32(IGNORE_INDEX), sample[1:]) for sample in samples])
    loss = Objective(model, torch.device("cpu")).loss_sum(ids, labels, np.array(lengths, np.int32))
    loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    model.zero_grad()
    model.set_attn_implementation("eager")
    total = torch.zeros(())
    for sample in samples:
        row = torch.from_numpy(sample.astype(np.int64))
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
        total = total + F.cross_entropy(logits, row[1:], reduction="sum")
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-3)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            assert (gradients[name] - weight.grad).norm() <= 0.02 * weight.grad.norm() + 1e-6, name
    assert not any(weight.grad is not None for weight in model.parameters() if not weight.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_adapters_have_the_type_of_the_model(make_recipe, kind, dtype):
    model = build_model(recipe_of(make_recipe, kind, model={"dtype": dtype}), cuda=False)
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {getattr(torch, dtype)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_its_weights_are_known(make_recipe, tmp_path, kind):
    folder = write_model(tmp_path / "wide", intermediate_size=4096)
    recipe = recipe_of(make_recipe, kind, model={"path": str(folder)})
    model = build_model(recipe, cuda=False)
    found = sum(each.nbytes for each in {*model.parameters(), *model.buffers()})
    assert measure(recipe).weights == pytest.approx(found, rel=0.05)
    assert found < measure(recipe_of(make_recipe, None, model={"path": str(folder)})).weights * 0.8


def test_its_weights_are_never_shared_out(make_recipe):
    recipe = recipe_of(
        make_recipe,
        "nf4",
        engine={"zero_stage": "auto"},
        scale={"num_workers": 4},
        model={"activation_checkpointing": "auto"},
    )
    sizes = layout.Sizes(
        weights=10**10, trained=10**6, itemsize=2, tokens=64, kept=10**9, recomputed=10**8, shared=10**10, live=10**9
    )
    assert layout.choose(recipe, sizes, layout.Room(11_500_000_000), 4)[0] == layout.Layout(2, True)
    with pytest.raises(RecipeError, match=r"needs at least 10\.\d+ GB.*Take a smaller model"):
        layout.choose(recipe, sizes, layout.Room(5 * 10**9), 4)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"model": {"path": "x", "quantize": "int8"}, "lora": {"variant": "dora"}},
            r"int8 has no dora; write model\.quantize: nf4",
        ),
        ({"lora": None}, r"model\.quantize: nf4 keeps weights that are not trained; write lora: \{rank: 16\}"),
        (
            {"engine": {"zero_stage": 3}},
            r"model\.quantize: nf4 keeps weights whole on each worker; write engine\.zero_stage: auto",
        ),
    ],
)
def test_what_cannot_be_is_refused(make_recipe, sections, message):
    tree = recipe_of(make_recipe, "nf4").dump() | sections
    with pytest.raises(RecipeError, match=message):
        parse(tree, "t.yaml")


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_no_number_is_found_though_it_is_kept_in_fewer_bits(make_recipe, tmp_path, kind):
    folder = write_model(tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not finite"):
        build_model(recipe_of(make_recipe, kind, model={"path": str(folder)}), cuda=False)


def test_without_its_library_nothing_starts(make_recipe, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest)
    )
    with pytest.raises(
        RecipeError, match=r"model\.quantize: int8 needs bitsandbytes, which is not installed; write pip install"
    ):
        prepare(recipe_of(make_recipe, "int8"))


def test_advice_is_what_a_quantised_run_can_follow(make_recipe):
    recipe = recipe_of(make_recipe, "nf4", engine={"zero_stage": "auto"}, model={"activation_checkpointing": False})
    assert "zero_stage" not in memory_options(recipe)
    sizes = layout.Sizes(
        weights=10**9, trained=10**6, itemsize=2, tokens=64, kept=10**11, recomputed=10**8, shared=0, live=0
    )
    with pytest.raises(RecipeError, match=r"Write model.activation_checkpointing: auto"):
        layout.choose(recipe, sizes, layout.Room(4 * 10**9), 1)
