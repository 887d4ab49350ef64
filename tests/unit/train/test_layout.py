"""Which layout is chosen, and what is said where none fits."""

from dataclasses import replace

import pytest
from transformers import GemmaConfig, LlamaConfig, Qwen3MoeConfig

from burnish.errors import RecipeError
from burnish.train import footprint as measured
from burnish.train.layout import USABLE, Footprint, Layout, Room, Sizes, choose, footprint, tighter, why
from burnish.train.model import decoder_layers
from burnish.train.shards import blocks

GB = 10**9
LLAMA_8B = Sizes(
    weights=16 * GB,
    trained=42_000_000,
    itemsize=2,
    tokens=8192,
    kept=49 * GB,
    recomputed=4 * GB,
    shared=16 * GB,
    live=2 * GB,
)
"""Llama 3 8B with adapters of rank 16, about."""
WHOLE_8B = replace(LLAMA_8B, trained=8 * GB)


@pytest.fixture
def open_recipe(make_recipe):
    """A recipe that leaves its layout open, unless it is told otherwise."""

    def make(**sections):
        own = {"engine": {"zero_stage": "auto"}, "model": {"activation_checkpointing": "auto"}}
        for name, keys in own.items():
            sections[name] = keys | sections.get(name, {})
        return make_recipe(**sections)

    return make


@pytest.mark.parametrize(
    ("sizes", "capacity", "workers", "chosen"),
    [
        (LLAMA_8B, 141 * GB, 8, Layout(2, False)),
        (LLAMA_8B, 66 * GB, 8, Layout(3, False)),
        (LLAMA_8B, 66 * GB, 1, Layout(2, True)),
        (LLAMA_8B, 40 * GB, 8, Layout(2, True)),
        (LLAMA_8B, 12 * GB, 8, Layout(3, True)),
        (WHOLE_8B, 141 * GB, 8, Layout(2, False)),
        (WHOLE_8B, 80 * GB, 16, Layout(3, False)),
        (WHOLE_8B, 80 * GB, 4, Layout(2, True)),
        (WHOLE_8B, 95 * GB, 2, Layout(3, True)),
    ],
)
def test_the_fastest_layout_that_fits_is_chosen(open_recipe, sizes, capacity, workers, chosen):
    recipe = open_recipe(
        lora={"rank": 16}, engine={"zero_stage": "auto"}, train={"global_batch_size": 16}, scale={"num_workers": workers}
    )
    layout, needed = choose(recipe, sizes, Room(capacity, 500 * GB), workers)
    assert layout == chosen
    assert needed == footprint(sizes, chosen, workers, False) and needed.total <= USABLE * capacity
    decided = layout.of(recipe)
    assert (decided.engine.stage(), decided.model.recomputes()) == (chosen.zero_stage, chosen.activation_checkpointing)
    assert recipe == open_recipe(
        lora={"rank": 16}, engine={"zero_stage": "auto"}, train={"global_batch_size": 16}, scale={"num_workers": workers}
    )


def test_why_a_layout_was_chosen_is_said(open_recipe):
    recipe = open_recipe(
        lora={"rank": 16}, engine={"zero_stage": "auto"}, train={"global_batch_size": 4}, scale={"num_workers": 4}
    )

    def said(capacity: int) -> str:
        room = Room(capacity, 500 * GB)
        return why(recipe, LLAMA_8B, room, 4, choose(recipe, LLAMA_8B, room, 4)[0])

    assert said(141 * GB) == "ZeRO-2, activations kept: the fastest that the recipe leaves open, and it fits"
    first = footprint(LLAMA_8B, Layout(2, False), 4, False).total
    room = int(first / USABLE) - 1
    assert said(room).startswith(
        f"ZeRO-3, activations kept: each worker has {USABLE * room / 1e9:.2f} GB to plan with, and ZeRO-2, activations kept "
        f"would need {first / 1e9:.2f} GB"
    )
    fixed = open_recipe(engine={"zero_stage": 0}, model={"activation_checkpointing": True})
    assert why(fixed, LLAMA_8B, Room(GB), 2, Layout(0, True)) == "ZeRO-0, activations recomputed: as the recipe says"


def test_what_a_recipe_says_is_kept(open_recipe):
    recipe = open_recipe(engine={"zero_stage": 0}, model={"activation_checkpointing": True})
    assert choose(recipe, LLAMA_8B, Room(141 * GB), 2)[0] == Layout(0, True)
    with pytest.raises(RecipeError, match=r"Write engine.zero_stage: auto and model.activation_checkpointing: auto"):
        choose(open_recipe(engine={"zero_stage": 0}, model={"activation_checkpointing": False}), LLAMA_8B, Room(60 * GB), 2)


def test_a_layout_that_just_fits_is_tried(open_recipe):
    needed = footprint(LLAMA_8B, Layout(2, True), 1, False).total
    assert choose(open_recipe(engine={"zero_stage": "auto"}), LLAMA_8B, Room(needed), 1)[0] == Layout(2, True)


@pytest.mark.parametrize(
    ("sections", "sizes", "capacity", "advice"),
    [
        ({}, WHOLE_8B, 80 * GB, r"Write engine\.offload: optimizer, or scale\.num_workers: 4, or lora: \{rank: 16\}$"),
        ({"train": {"global_batch_size": 1}}, WHOLE_8B, 80 * GB, r"scale\.num_workers: 4 with train\.global_batch_size: 4"),
        ({"lora": {"rank": 16}}, LLAMA_8B, 20 * GB, r"scale\.num_workers: 2, or data\.max_length: 2048$"),
        ({"lora": {"rank": 16}}, replace(LLAMA_8B, kept=9**15, recomputed=9**14), GB, "Take a smaller model"),
        (
            {"model": {"dtype": "float32"}},
            Sizes(32 * GB, 10**6, 4, 8192, 9 * GB, 9 * GB, 32 * GB, GB),
            40 * GB,
            r"model\.dtype: bfloat16$",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_refused_with_what_would(open_recipe, sections, sizes, capacity, advice):
    recipe = open_recipe(**{"engine": {"zero_stage": "auto"}, "data": {"max_length": 8192}, **sections})
    with pytest.raises(RecipeError, match=rf"does not fit: each of 1 workers has .* GB and needs at least .*{advice}"):
        choose(recipe, sizes, Room(capacity, 500 * GB), 1)


def test_what_is_loaded_whole_halves_with_the_type_too(open_recipe):
    sizes = Sizes(40 * GB, 10**6, 4, 8192, GB, GB, 40 * GB, 2 * GB, loading=42 * GB)
    recipe = open_recipe(engine={"zero_stage": 3}, scale={"num_workers": 4}, model={"dtype": "float32"}, lora={"rank": 4})
    with pytest.raises(RecipeError, match=r"Write model\.dtype: bfloat16$"):
        choose(recipe, sizes, Room(30 * GB), 4)


@pytest.mark.parametrize(("limit", "cpus"), [("max 100000", 16), ("800000 100000", 8), ("50000 100000", 1)])
def test_a_worker_takes_no_more_cpus_than_its_container_has(tmp_path, monkeypatch, limit, cpus):
    (tmp_path / "cpu.max").write_text(limit + "\n")
    monkeypatch.setattr(measured, "_CPU_LIMIT", tmp_path / "cpu.max")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    assert [measured.cpus_of(workers) for workers in (1, 4)] == [cpus, max(1, cpus // 4)]
    monkeypatch.setattr(measured, "_CPU_LIMIT", tmp_path / "none")
    assert measured.cpus_of(2) == 8


def test_a_layout_that_ran_out_of_memory_is_followed_by_those_that_need_less(open_recipe):
    def after(tried, workers=2, **sections):
        left = tighter(open_recipe(**sections), Layout(*tried), workers)
        return left and (left.engine.zero_stage, left.model.activation_checkpointing)

    assert after((2, False)) == (3, "auto")
    assert after((2, False), workers=1) == after((2, False), model={"quantize": "nf4"}, lora={}) == (2, True)
    assert after((3, False)) == (3, True)
    assert after((2, True)) == (3, "auto")  # what has no room by the numbers is not chosen again
    assert after((3, True)) is after((2, True), workers=1) is None
    assert after((0, False), engine={"zero_stage": 0}) == (0, True)
    assert after((2, False), engine={"zero_stage": 3}) == (3, True), "what a recipe says of sharding stays"
    assert after((2, False), model={"activation_checkpointing": False}, workers=1) is None
    assert after((3, False), engine={"zero_stage": 3}, model={"activation_checkpointing": False}) is None


def test_offloading_saves_nothing_where_the_device_is_the_host(open_recipe):
    open_layout = {"engine": {"zero_stage": "auto", "offload": "optimizer"}}
    whole = footprint(WHOLE_8B, Layout(2, False), 1, False)
    assert choose(open_recipe(**open_layout), WHOLE_8B, Room(200 * GB), 1)[1].optimizer == whole.optimizer > 0
    assert choose(open_recipe(**open_layout), WHOLE_8B, Room(200 * GB, 200 * GB), 1)[1].optimizer == 0
    with pytest.raises(RecipeError, match=r"does not fit: (?!.*offload).*num_workers: [0-9]+ on more nodes"):
        choose(open_recipe(engine={"zero_stage": "auto"}), WHOLE_8B, Room(80 * GB), 1)
    with pytest.raises(
        RecipeError, match=r"engine.offload: the optimizer's state does not fit: .* 90.00 GB .* needs 96.00 GB"
    ):
        choose(open_recipe(**open_layout), WHOLE_8B, Room(200 * GB, 90 * GB), 1)


def test_a_run_that_may_shrink_must_fit_on_the_fewest_workers(open_recipe, monkeypatch):
    monkeypatch.setattr(measured, "measure", lambda recipe: WHOLE_8B)
    recipe = open_recipe(engine={"zero_stage": "auto"}, train={"global_batch_size": 8}, scale={"num_workers": [1, 8]})
    with pytest.raises(RecipeError, match="each of 1 workers"):
        measured.lay_out(recipe, Room(80 * GB), 8)
    fixed = open_recipe(engine={"zero_stage": "auto"}, train={"global_batch_size": 8}, scale={"num_workers": 8})
    assert measured.lay_out(fixed, Room(80 * GB), 8)[0].engine.stage() == 3


def test_bytes_are_those_of_the_paper():
    """ZeRO, arXiv 1910.02054, figure 1: 16 bytes a weight in 16 bits on one device, and what of it 64 devices share."""
    weights = 2 * 75 * GB // 10
    sizes = Sizes(weights, trained=75 * GB // 10, itemsize=2, tokens=1, kept=0, recomputed=0, shared=weights, live=0)

    def states(stage: int) -> float:
        needed = footprint(sizes, Layout(stage, False), 64, False)
        bucket = 2 * 10**8 if stage else 0
        return (needed.weights + needed.gradients - bucket + needed.optimizer) / GB

    assert [round(states(stage), 1) for stage in (0, 1, 2, 3)] == [120.0, 31.4, 16.6, 1.9]
    assert footprint(sizes, Layout(2, False), 64, True).optimizer == 0


def test_gradients_of_several_packs_are_added_up_in_float32_where_they_are_sharded():
    one, many = (replace(LLAMA_8B, trained=GB, packs=packs) for packs in (4, 8))
    for stage, more in ((0, 0), (1, 0), (2, 2 * GB // 4), (3, 2 * GB // 4)):
        few, several = (footprint(sizes, Layout(stage, False), 4, False).gradients for sizes in (one, many))
        assert several - few == more, stage
    assert footprint(replace(many, kept=0, recomputed=0), Layout(2, False), 4, False).activations == 0, "the step adds none"


def test_a_footprint_says_what_it_is_made_of():
    assert str(Footprint(2 * GB, GB, 3 * GB, GB // 2)) == (
        "6.50 GB (weights 2.00, gradients 1.00, optimizer 3.00, activations 0.50)"
    )


def frozen_apart(model, weight) -> bool:
    """Whether a weight stays whole on every worker beside adapters: what is trained, and the last norm."""
    return weight.requires_grad or weight is model.get_decoder().norm.weight


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4),
        GemmaConfig(
            vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, head_dim=16
        ),
        Qwen3MoeConfig(
            vocab_size=1000, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=4, head_dim=16, num_experts=4, num_experts_per_tok=2,
        ),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_sizes_are_those_of_the_model_itself(make_recipe, tmp_path, config, lora):
    from burnish.train.adapters import with_adapters
    from burnish.train.model import load_weights

    config.architectures = [{"llama": "LlamaForCausalLM"}.get(config.model_type, "")]
    config.save_pretrained(tmp_path)
    recipe = make_recipe(model={"path": str(tmp_path), "dtype": "bfloat16"}, lora=lora, data={"max_length": 512})
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_weights(recipe)
    model = with_adapters(model, recipe.lora) if recipe.lora else model
    sizes = measured.measure(recipe)
    assert sizes.trained == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert sizes.weights == sum(each.nbytes for each in {*model.parameters(), *model.buffers()})
    assert sizes.shared == sum(weight.nbytes for weight in model.parameters() if not lora or not frozen_apart(model, weight))
    assert sizes.kept > sizes.recomputed > 512 * 64 * 2 * 4, "at least what goes into each layer is kept"
    longer = measured.measure(
        make_recipe(model={"path": str(tmp_path), "dtype": "bfloat16"}, lora=lora, data={"max_length": 1024})
    )
    assert longer.kept == pytest.approx(2 * sizes.kept, rel=0.1)


def test_the_layers_are_those_of_the_text_where_a_tower_of_vision_comes_first(open_recipe, tmp_path):
    from transformers import AutoModelForCausalLM, Gemma3Config

    text = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    assert len(decoder_layers(model)) == 3 and type(decoder_layers(model)[0]).__name__ == "Gemma3DecoderLayer"
    model.requires_grad_(False)
    shared = {weight for _, weights, _ in blocks(model) for weight in weights}
    assert {weight for layer in model.get_decoder().layers for weight in layer.parameters()} < shared
    assert not shared & set(model.model.vision_tower.parameters())


def test_a_model_that_cannot_be_measured_is_laid_out_cautiously(open_recipe, monkeypatch, caplog):
    def broken(recipe):
        raise NotImplementedError("an operation without shapes")

    monkeypatch.setattr(measured, "measure", broken)
    for room, is_gpu in ((Room(10 * GB), False), (Room(10 * GB, 10 * GB), True)):
        recipe, needed, reason = measured.lay_out(open_recipe(engine={"zero_stage": "auto"}), room, 2)
        assert needed is None and reason is None and recipe.engine.stage() == 3 and recipe.model.recomputes() is is_gpu
    assert "an operation without shapes" in caplog.text
    quantised = open_recipe(engine={"zero_stage": "auto"}, model={"quantize": "nf4"}, lora={"rank": 2})
    assert measured.lay_out(quantised, Room(10 * GB), 2)[0].engine.stage() == 2
