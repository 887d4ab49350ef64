"""Which files a model's weights are in, and whether parts of them can be loaded."""

import errno
import json

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from burnish.errors import InfrastructureError, RecipeError
from burnish.train import weight_files
from burnish.train.architecture import fresh
from burnish.train.build import _read
from burnish.train.weight_files import files_of_parts
from tests.conftest import write_model

HUB = {"path": "owner/name", "revision": "1" * 40}


def test_files_that_the_configuration_names_itself_are_left_to_transformers(make_recipe, model_folder):
    recipe = make_recipe(model={"path": str(model_folder)})
    model = fresh(recipe, "eager")
    found = files_of_parts(recipe, model)
    assert found and set(found) == {name for name, _ in model.named_parameters()}
    model.config.transformers_weights = "other.safetensors"
    assert files_of_parts(recipe, model) is None
    dora = make_recipe(model={"path": str(model_folder)}, lora={"variant": "dora"})
    assert files_of_parts(dora, fresh(dora, "eager")) is None


@pytest.mark.parametrize(
    ("raised", "seen", "words"),
    [
        (LocalEntryNotFoundError("no answer"), InfrastructureError, r"^model.path: owner/name cannot be downloaded now: no answer"),
        (OSError("a gated repository"), RecipeError, r"^model.path: owner/name cannot be loaded: .*a gated repository"),
        (OSError(errno.ENOSPC, "no space"), OSError, "no space"),
    ],
)  # fmt: skip
def test_a_hub_that_does_not_give_the_files_is_no_reason_to_load_all_of_them(
    make_recipe, model_folder, monkeypatch, raised, seen, words
):
    def download(*_, **__):
        raise raised

    model = fresh(make_recipe(model={"path": str(model_folder)}), "eager")
    monkeypatch.setattr(weight_files, "hf_hub_download", download)
    monkeypatch.setattr(weight_files, "is_offline_mode", lambda: False)
    recipe = make_recipe(model=HUB)
    with pytest.raises(seen, match=words):
        files_of_parts(recipe, model)
    if seen is InfrastructureError:
        assert files_of_parts(recipe, model, local_files_only=True) == {}, "what is not here yet is as usual"


def test_an_index_without_one_of_its_files_names_none(make_recipe, tmp_path):
    folder = write_model(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    weights = dict.fromkeys(load_file(folder / "a.safetensors"), "a.safetensors") | {"lm_head.weight": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    recipe = make_recipe(model={"path": str(folder)})
    assert files_of_parts(recipe, fresh(recipe, "eager")) is None


def test_a_weight_that_its_type_cannot_hold_is_refused(tmp_path):
    save_file({"a": torch.tensor([1e6])}, tmp_path / "model.safetensors")
    assert _read(tmp_path / "model.safetensors", "a", torch.bfloat16).isfinite()
    with pytest.raises(RecipeError, match="a is not finite"):
        _read(tmp_path / "model.safetensors", "a", torch.float16)
