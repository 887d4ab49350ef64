"""What a run was started from is held fixed while it goes on, wherever it lies."""

import shutil

import pytest
import yaml

from burnish.errors import DataError, RecipeError
from burnish.train.model import with_adapters
from burnish.train.prepare import check_same_run, make_run_folder, prepare, write_run_folder
from tests.conftest import conversation, write_model, write_rows


@pytest.fixture
def started(make_recipe, model_folder, tmp_path):
    """A recipe with a model of its own, and the folder of its run as a first checkpoint leaves it."""
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    recipe = make_recipe(model={"path": str(model)})
    folder = recipe.run_folder()
    make_run_folder(folder)
    write_run_folder(prepare(recipe), folder)
    (folder / "checkpoints" / "step-00000002").mkdir()
    return recipe, folder


def test_the_same_recipe_goes_on_and_the_resolved_one_has_absolute_paths(started, monkeypatch):
    recipe, folder = started
    check_same_run(prepare(recipe), folder)
    monkeypatch.chdir(folder.parent.parent)
    relative = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": "model"})})
    check_same_run(prepare(relative), folder)
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["model"]["path"].startswith("/")


def test_a_model_that_moved_goes_on_and_one_that_changed_does_not(started, tmp_path):
    recipe, folder = started
    (tmp_path / "model").rename(tmp_path / "moved")
    moved = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": str(tmp_path / "moved")})})
    check_same_run(prepare(moved), folder)
    weights = tmp_path / "moved" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(DataError, match=r"have changed since it was started \(model\)"):
        check_same_run(prepare(moved), folder)


def test_rows_or_a_template_that_changed_are_refused(started, tmp_path):
    recipe, folder = started
    template = tmp_path / "other.jinja"
    template.write_text(prepare(recipe).contract.template.replace("{{- m.content }}", "{{- m.content | trim }}"))
    other = recipe.model_copy(update={"template": recipe.template.model_copy(update={"path": str(template)})})
    with pytest.raises(DataError, match="behaves otherwise"):
        check_same_run(prepare(other), folder)
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(DataError, match=r"\(train\)"):
        check_same_run(prepare(recipe), folder)


def test_the_first_rows_of_every_file_are_checked(make_recipe, tmp_path):
    good = write_rows(tmp_path / "good.jsonl", [conversation(i) for i in range(600)])
    bad = write_rows(tmp_path / "bad.jsonl", [{"text": "x"}] * 3)
    with pytest.raises(DataError, match=r"bad.jsonl: none of the first 3 rows"):
        prepare(make_recipe(data={"train": [{"path": str(good)}, {"path": str(bad)}]}))


def test_adapters_on_a_weight_that_input_and_output_share_are_refused(make_recipe, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = write_model(tmp_path / "tied", "gemma")
    recipe = make_recipe(model={"path": str(folder)}, lora={"rank": 2, "target_modules": ["q_proj", "embed_tokens"]})
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.tie_word_embeddings
    with pytest.raises(RecipeError, match="embed_tokens shares its weight"):
        with_adapters(model, recipe.lora)
