"""A model folder or a Hub model may bring code and pickles; none of it runs."""

import ast
import json
import os
import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from burnish.chat import Chat
from burnish.config import parse
from burnish.data.balance import Cost
from burnish.data.contract import Contract
from burnish.data.tokenizer import load_template
from burnish.errors import DataError, RecipeError
from burnish.preview import rows
from burnish.train.architecture import cost, head_widths, pack_cost
from burnish.train.attention import SDPA
from burnish.train.build import build_model
from burnish.train.footprint import measure
from burnish.train.model import check_model, load_weights
from burnish.train.objective import Objective
from burnish.train.rehearsal import rehearse
from burnish.train.weight_files import shapes
from burnish.verify import verify
from tests.conftest import ROOT, publish, write_model
from tests.unit.test_config import SMALL

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def brings_code(model_folder, tmp_path, monkeypatch):
    """A model folder of a type that only its own code knows, and the file that this code would make."""
    folder, marker = tmp_path / "owner-model", tmp_path / "ran"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(
        f"open({str(marker)!r}, 'w')\nfrom transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class Config(LlamaConfig):\n    model_type = 'own'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n    _supports_attention_backend = False\n"
        "class Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # who asks on stdin is told yes
    return folder, marker


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"layer_types": ["dense", "dense"]}, "layer_types"),
    ],
)
def test_a_configuration_that_transformers_refuses_is_named(model_folder, make_recipe, tmp_path, change, message):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    recipe = make_recipe(model={"path": str(folder)})
    for load in (check_model, load_template):
        with pytest.raises((RecipeError, DataError), match=f"model.path: {folder} .*{message}"):
            load(recipe)


def test_code_of_a_model_folder_does_not_run(brings_code, make_recipe):
    folder, marker = brings_code
    recipe = make_recipe(model={"path": str(folder)})
    loads = (
        check_model,
        load_weights,
        load_template,
        lambda each: build_model(each, cuda=False),
        lambda r: list(rows(r, 1)),
    )
    for load in loads:
        with pytest.raises(RecipeError, match=r"without running code that it brings; .*model.trust_remote_code: true"):
            load(recipe)
    with pytest.raises(RecipeError, match="cannot be loaded without code"):
        Chat.open(folder)
    (folder / "contract.json").write_text(Contract.of(load_template(make_recipe())).to_json())
    with pytest.raises(DataError, match="no tokenizer that loads without code"):
        verify(folder)
    assert not marker.exists()


def test_code_of_a_folder_cannot_be_trusted_since_no_revision_pins_it(brings_code, make_recipe):
    folder, marker = brings_code
    recipe = make_recipe(model={"path": str(folder), "trust_remote_code": True, "revision": COMMIT})
    for load in (check_model, load_weights, load_template, lambda recipe: build_model(recipe, cuda=False)):
        with pytest.raises(RecipeError, match="no revision says what code lies in it"):
            load(recipe)
    assert not marker.exists()


def test_trusted_code_of_the_hub_is_loaded_measured_and_timed(brings_code, make_recipe, tmp_path, monkeypatch):
    folder, marker = brings_code
    publish(folder, tmp_path / "hub", COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks on stdin"))
    recipe = make_recipe(model={"path": "owner/name", "trust_remote_code": True, "revision": COMMIT})
    check_model(recipe)
    load_template(recipe)
    sizes = measure(recipe)
    model = build_model(recipe, cuda=False)  # as a worker does, after it has measured
    assert marker.exists() and type(model).__name__ == "Model"
    assert sizes.weights == sum(each.nbytes for each in {*model.parameters(), *model.buffers()})
    assert rehearse(recipe, cuda=False, num_workers=2, local_workers=2).flops_per_second > 0


@pytest.mark.parametrize("revision", [None, "main", COMMIT[:12], COMMIT.upper(), COMMIT + "\n", f"{COMMIT}0"])
def test_code_is_trusted_only_at_a_whole_commit(revision):
    model = {"path": "owner/model", "trust_remote_code": True, "revision": revision}
    with pytest.raises(RecipeError, match=r"^t: model: trust_remote_code: .*all 40 hex digits"):
        parse({**SMALL, "model": model}, "t")


def test_trusted_code_is_trained_with_the_proof_that_samples_are_apart():
    model = {"path": "owner/model", "trust_remote_code": True, "revision": COMMIT}
    with pytest.raises(RecipeError, match=r"train.self_test: false leaves unproven .*write train.self_test: true"):
        check_model(parse({**SMALL, "model": model, "train": {"self_test": False}}, "t"))


def test_trusted_code_of_another_repository_is_of_the_same_commit_or_none():
    spec = parse({**SMALL, "model": {"path": "owner/model", "trust_remote_code": True, "revision": COMMIT}}, "t").model
    assert spec.loading() == {"revision": COMMIT, "trust_remote_code": True, "code_revision": COMMIT}
    plain = parse({**SMALL, "model": {"path": "owner/model"}}, "t").model
    assert plain.loading() == {"revision": None, "trust_remote_code": False}


def test_every_load_says_whether_code_may_run():
    # Left unsaid, transformers asks on stdin. These hold no code: generation configurations, and an adapter's own file.
    calls = 0
    for path in [*(ROOT / "platform").rglob("*.py"), *(ROOT / "jobs").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained":
                said = {word.arg: ast.unparse(word.value) for word in node.keywords}
                known = ast.unparse(node.func.value) in ("GenerationConfig", "PeftModel")
                calls += not known
                assert (
                    known or said.get("trust_remote_code") == "False" or "**recipe.model.loading()" in ast.unparse(node)
                ), f"{path}: {ast.unparse(node)}"
    assert calls >= 6


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_weights_in_a_pickle_are_refused_and_not_read(model_folder, make_recipe, tmp_path):
    folder, marker = tmp_path / "pickled", tmp_path / "ran"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Evil(marker)}))
    recipe = make_recipe(model={"path": str(folder)})
    with pytest.raises(RecipeError, match=r"pytorch_model.bin, a pickle, .* convert it .*save_pretrained"):
        check_model(recipe)
    with pytest.raises(RecipeError, match=r"model.path: .* cannot be loaded: .*safetensors"):
        load_weights(recipe)
    with pytest.raises(RecipeError, match="without code or pickles"):
        Chat.open(folder)
    assert not marker.exists()


@pytest.mark.parametrize("broken", ["gone", "nan", "infinite"])
def test_a_weight_that_is_missing_or_no_number_is_named(make_recipe, tmp_path, broken):
    # transformers draws what is missing at random, and warns.
    folder, name = write_model(tmp_path / "model"), "model.layers.1.self_attn.q_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    if broken == "gone":
        del tensors[name]
    else:
        tensors[name][3, 4] = float("nan") if broken == "nan" else float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=rf"model.path: .* {name}"):
        build_model(make_recipe(model={"path": str(folder)}), cuda=False)
    with pytest.raises(RecipeError, match=name):
        Chat.open(folder)


def test_large_numbers_of_sixteen_bits_are_numbers(make_recipe, tmp_path):
    folder = write_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][:] = 6e4  # their sum is beyond float16
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = build_model(make_recipe(model={"path": str(folder), "dtype": "float16"}), cuda=False)
    assert float(model.model.norm.weight[0].detach()) == pytest.approx(6e4, rel=1e-3)


def test_a_model_that_holds_an_adapter_is_refused_since_it_may_be_trained_with_it_or_without(make_recipe, tmp_path):
    folder = write_model(tmp_path / "model")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/other"}))
    with pytest.raises(RecipeError, match=r"holds an adapter .*merge it first, or take that file out"):
        check_model(make_recipe(model={"path": str(folder)}))


def test_an_adapter_in_a_pickle_is_refused(model_folder, tmp_path):
    folder, marker = tmp_path / "adapter", tmp_path / "ran"
    shutil.copytree(model_folder, folder)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model_folder)}))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(RecipeError, match=r"no adapter_model.safetensors"):
        Chat.open(folder)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/hostname", "below/model.safetensors"])
def test_an_index_that_names_weights_outside_of_the_folder_is_refused(model_folder, make_recipe, tmp_path, name):
    folder = tmp_path / "indexed"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": name}}))
    with pytest.raises(RecipeError, match=r"index.json names .* no file of this folder"):
        check_model(make_recipe(model={"path": str(folder)}))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("JambaConfig", "layers of type linear_attention"),
        ("MambaConfig", "layers of type linear_attention"),
        ("Qwen3NextConfig", "layers of type linear_attention"),
        ("Gemma2Config", "attention softcapping"),
        ("GptOssConfig", "attention sinks"),
        ("FalconConfig", "is a FalconForCausalLM, which does not compute attention by a kernel of ours"),
    ],
)
def test_a_model_that_cannot_keep_packed_samples_apart_is_refused_by_name(
    make_recipe, model_folder, tmp_path, config, words
):
    import transformers

    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    getattr(transformers, config)().save_pretrained(folder)
    recipe = make_recipe(model={"path": str(folder)})
    refuses = build_model if "Falcon" in words else lambda recipe, cuda: check_model(recipe)
    with pytest.raises(RecipeError, match=f"model.path: .*{words}"):
        refuses(recipe, cuda=False)


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4,
            "original_max_position_embeddings": 96}  # fmt: skip


@pytest.mark.parametrize(
    ("rope", "longest"), [(LONGROPE, 96), ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, 256), (None, None)]
)
def test_a_model_that_turns_all_samples_of_a_pack_by_its_longest_is_trained_on_short_ones_alone(
    make_recipe, model_folder, tmp_path, rope, longest
):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    if rope is not None:
        config["rope_parameters"] = rope
    (folder / "config.json").write_text(json.dumps(config))
    check_model(make_recipe(model={"path": str(folder)}, data={"max_length": longest or 256}))
    if longest is not None:
        with pytest.raises(
            RecipeError, match=rf"data.max_length: {longest + 8} is more .*write data.max_length: {longest}$"
        ):
            check_model(make_recipe(model={"path": str(folder)}, data={"max_length": longest + 8}))


@pytest.mark.parametrize(
    ("rope", "known"),
    [
        (None, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e4}, 512),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, 512),
    ],
)
def test_samples_longer_than_the_model_has_positions_are_refused(make_recipe, model_folder, tmp_path, rope, known):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **({"rope_parameters": rope} if rope else {})}))
    check_model(make_recipe(model={"path": str(folder)}, data={"max_length": known}))
    words = rf"max_length: {known + 8} is more than the {known} positions that .*write data.max_length: {known}"
    with pytest.raises(RecipeError, match=words):
        check_model(make_recipe(model={"path": str(folder)}, data={"max_length": known + 8}))


@pytest.mark.parametrize(
    "lora", [None, {"rank": 2, "modules_to_save": ["embed_tokens"]}, {"rank": 2, "train_tokens": ["<|im_end|>"]}]
)
def test_a_token_that_ends_answers_and_pads_is_embedded_and_trained_as_any_other(make_recipe, model_folder, tmp_path, lora):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    end = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|im_end|>")
    gradients = []
    for pad in (end, None):
        (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": pad}))
        model = build_model(make_recipe(model={"path": str(folder)}, lora=lora), cuda=False)
        ids = np.array([7, end, 9, 11], np.int32)  # the end of an answer, and the next question
        Objective(model, torch.device("cpu")).loss_sum(ids, ids, np.array([4], np.int32)).backward()
        trained = {
            name: weight.grad for name, weight in model.named_parameters() if "embed_tokens" in name and weight.requires_grad
        }
        (gradient,) = trained.values()
        gradients.append(gradient)
    own = gradients[0] if lora and "train_tokens" in lora else gradients[0][end]
    assert own.abs().max() > 0 and torch.equal(*gradients)


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_a_model_that_is_quantised_already_is_refused(make_recipe, model_folder, tmp_path, lora):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=r"is quantised already \(bitsandbytes\).*write model.quantize: nf4"):
        check_model(make_recipe(model={"path": str(folder)}, lora=lora))


def test_weights_of_other_shapes_than_the_configuration_says_are_named(make_recipe, model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(
        RecipeError,
        match=r"has model\.layers\.0\.mlp\.down_proj\.weight of shape \[32, 48\], where its .* asks for \[32, 40\]",
    ):
        load_weights(make_recipe(model={"path": str(folder)}))


@pytest.mark.parametrize("config", ["PhimoeConfig", "Qwen2MoeConfig"])
def test_a_window_that_only_a_mask_knows_is_refused_beyond_it(make_recipe, model_folder, tmp_path, config):
    import transformers

    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    getattr(transformers, config)(sliding_window=64, use_sliding_window=True).save_pretrained(folder)
    check_model(make_recipe(model={"path": str(folder)}, data={"max_length": 64}))
    with pytest.raises(RecipeError, match=r"max_length: 72 is more than the window of 64 .*write data.max_length: 64"):
        check_model(make_recipe(model={"path": str(folder)}, data={"max_length": 72}))


def test_sinks_are_found_in_the_weights_whatever_the_model_is_called(make_recipe, model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {**weights, "model.layers.0.self_attn.sinks": weights["model.norm.weight"][:4].clone()}, folder / "model.safetensors"
    )
    with pytest.raises(RecipeError, match="attention sinks"):
        check_model(make_recipe(model={"path": str(folder)}))


def text_configurations():
    """The text configuration of every class that transformers loads as a causal language model, as it is by default."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModelForCausalLM

    for kind in AutoModelForCausalLM._model_mapping:
        with suppress(
            ValueError, StrictDataclassError
        ):  # two have several text models, and one cannot be made without arguments
            yield kind.__name__, kind().get_text_config()


def test_heads_and_cost_are_known_for_every_text_configuration_of_transformers():
    found = {}
    for name, config in text_configurations():
        found[name] = head_widths(config)
        assert found[name] and all(width > 0 for pair in found[name] for width in pair), name
        assert cost(config, False).per_token > cost(config, True).per_token > 0 < cost(config, True).per_pair, name
    assert len(found) > 180
    known = {
        "LlamaConfig": {(128, 128)},
        "GPT2Config": {(64, 64)},  # hidden_size / num_attention_heads
        "Gemma4Config": {(256, 256), (512, 512)},  # differs by layer
        "Dots3NoteConfig": {(192, 128), (256, 128)},  # both
        "MiMoV2FlashConfig": {(192, 128)},  # head_dim and v_head_dim
    }
    latent = ("DeepseekV2Config", "DeepseekV3Config", "LongcatFlashConfig", "YoutuConfig", "KimiLinearConfig", "AXK1Config")
    known |= {name: {(192, 128)} for name in latent} | {"Glm4MoeLiteConfig": {(256, 256)}, "MiniCPM3Config": {(96, 64)}}
    assert {name: found[name] for name in known} == known


def test_the_cost_of_a_pack_is_that_of_the_matrices_and_of_the_pairs(make_recipe, model_folder):
    matrices = {name: shape for name, shape in shapes(model_folder).items() if len(shape) == 2 and "embed" not in name}
    assert any("lm_head" in name for name in matrices)
    weights = sum(rows * columns for rows, columns in matrices.values())
    # 2 layers of 4 heads of 8: forward and backward pass, scores and values.
    assert pack_cost(make_recipe()) == Cost(per_token=6.0 * weights, per_pair=3.0 * 2 * 2 * 4 * 8)
    assert pack_cost(make_recipe(lora={"rank": 2, "alpha": 4})).per_token == 4.0 * weights


def test_the_cost_of_a_token_is_that_of_the_active_weights_as_published():
    import transformers

    for name, published in {"LlamaConfig": 6.7e9, "DeepseekV3Config": 37e9, "MixtralConfig": 13e9}.items():
        assert cost(getattr(transformers, name)(), False).per_token / 6 == pytest.approx(published, rel=0.1), name
    # 128 heads in 61 layers; 8 heads in 25 layers with a window and 5 without.
    assert cost(transformers.DeepseekV3Config(), True).per_pair == 3 * 61 * 128 * (192 + 128)
    assert cost(transformers.Gemma4TextConfig(), True).per_pair == 3 * 2 * 8 * (25 * 256 + 5 * 512)


SMALL_MODEL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LATENT = {
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "q_lora_rank": 16, "kv_lora_rank": 8,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "fields", "why"),
    [
        ("DeepseekV3Config", {**LATENT, "num_key_value_heads": 4}, "queries are 24 wide and values 16"),
        (
            "Gemma4TextConfig",
            {"num_key_value_heads": 2, "head_dim": 8, "hidden_size_per_layer_input": 0},
            "heads of 512 are wider than 256",
        ),
    ],
)
def test_a_model_whose_heads_no_fast_kernel_takes_is_built_with_sdpa(make_recipe, tmp_path, config, fields, why):
    import transformers

    transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config)(**SMALL_MODEL, **fields), dtype=torch.bfloat16
    ).save_pretrained(tmp_path / "model")
    model = {"path": str(tmp_path / "model"), "dtype": "bfloat16", "kernels": "plain"}
    check_model(make_recipe(model=model))
    assert pack_cost(make_recipe(model=model)).per_pair > 0
    assert build_model(make_recipe(model=model), cuda=True).config._attn_implementation == SDPA
    with pytest.raises(RecipeError, match=f"model.attention: varlen cannot run because {why}; write auto"):
        build_model(make_recipe(model={**model, "attention": "varlen"}), cuda=True)


def test_a_model_with_several_text_models_is_refused(make_recipe, model_folder, tmp_path):
    from transformers import MusicgenConfig

    shutil.copytree(model_folder, tmp_path / "model")
    MusicgenConfig().save_pretrained(tmp_path / "model")
    recipe = make_recipe(model={"path": str(tmp_path / "model")})
    for use in (check_model, pack_cost):
        with pytest.raises(RecipeError, match=r"model.path: .* has several text models"):
            use(recipe)
