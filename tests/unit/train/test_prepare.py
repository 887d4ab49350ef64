"""What a run was started from is held fixed while it goes on, wherever it lies."""

import datetime
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from burnish.config import load
from burnish.data import pipeline
from burnish.data.contract import difference
from burnish.errors import DataError, RecipeError
from burnish.train.adapters import with_adapters
from burnish.train.home import Home
from burnish.train.prepare import (
    check_same_filters,
    check_same_recipe,
    check_same_run,
    make_run_folder,
    prepare,
    write_run_folder,
)
from tests.conftest import CHATML, conversation, publish, write_model, write_rows


@pytest.fixture
def started(make_recipe, model_folder, tmp_path):
    """A recipe with a model of its own, and the folder of its run as a first checkpoint leaves it."""
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    recipe = make_recipe(model={"path": str(model)})
    folder = Path(recipe.run_place())
    make_run_folder(folder)
    write_run_folder(prepare(recipe), Home(folder))
    (folder / "checkpoints" / "step-00000002").mkdir()
    return recipe, folder


def test_the_same_recipe_goes_on_and_the_resolved_one_has_absolute_paths(started, monkeypatch):
    recipe, folder = started
    check_same_run(prepare(recipe), Home(folder))
    monkeypatch.chdir(folder.parent.parent)
    relative = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": "model"})})
    check_same_run(prepare(relative), Home(folder))
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["model"]["path"].startswith("/")


@pytest.mark.parametrize("change", [{"train_on": "last_assistant"}, {"seed": 1}, {"window_rows": 8}])
def test_a_recipe_that_trains_otherwise_is_refused(started, change):
    recipe, folder = started
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update=change)})
    with pytest.raises(RecipeError, match=f"another recipe .data.{next(iter(change))}: "):
        check_same_run(prepare(other), Home(folder))


def test_a_run_does_not_go_on_with_code_that_it_was_not_started_with(started):
    recipe, folder = started
    written = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert written["model"].pop("trust_remote_code") is False
    (folder / "recipe.yaml").write_text(yaml.safe_dump(written))
    check_same_recipe(recipe, folder)  # written before there was such a key
    trusting = recipe.model.model_copy(update={"trust_remote_code": True, "revision": "0" * 40})
    with pytest.raises(RecipeError, match=r"another recipe .*model.trust_remote_code: False became True"):
        check_same_recipe(recipe.model_copy(update={"model": trusting}), folder)


def test_a_hub_model_stays_at_the_commit_with_which_its_run_started(make_recipe, model_folder, tmp_path, monkeypatch):
    hub = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    publish(model_folder, hub, "1" * 40)
    recipe = make_recipe(model={"path": "owner/name"})
    prepared, home = prepare(recipe), Home.of(recipe)
    assert prepared.recipe.model.revision == "1" * 40
    make_run_folder(home.folder)
    write_run_folder(prepared, home)
    publish(model_folder, hub, "2" * 40)
    assert prepare(recipe).recipe.model.revision == "2" * 40, "nothing is trained yet"
    (home.folder / "checkpoints" / "step-00000002").mkdir()
    again = prepare(recipe)
    assert again.recipe.model.revision == "1" * 40
    check_same_run(again, home)
    with pytest.raises(RecipeError, match=r"model.revision: '1+' became '2+'"):
        check_same_run(prepare(make_recipe(model={"path": "owner/name", "revision": "2" * 40})), home)


def test_filters_that_leave_out_other_rows_when_a_run_goes_on_are_refused(started):
    recipe, folder = started
    index = prepare(recipe).train
    first = replace(index.slices[0], dropped=((1, "near-duplicate", "says what a says"),))
    found = replace(index, slices=(first, *index.slices[1:]))
    check_same_filters(found, Home(folder))
    reworded = replace(first, dropped=((1, "near-duplicate", "says what b says"),))
    check_same_filters(replace(index, slices=(reworded, *index.slices[1:])), Home(folder))
    with pytest.raises(DataError, match="leave out other rows than at the start"):
        check_same_filters(index, Home(folder))
    (folder / "checkpoints" / "step-00000002").rmdir()
    check_same_filters(index, Home(folder))  # what has not trained yet may still change


def test_a_model_that_moved_goes_on_and_one_that_changed_does_not(started, tmp_path):
    recipe, folder = started
    (tmp_path / "model").rename(tmp_path / "moved")
    moved = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": str(tmp_path / "moved")})})
    check_same_run(prepare(moved), Home(folder))
    weights = tmp_path / "moved" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(DataError, match=r"has changed since it was started \(model\)"):
        check_same_run(prepare(moved), Home(folder))


def test_rows_or_a_template_that_changed_are_refused(started, tmp_path):
    recipe, folder = started
    template = tmp_path / "other.jinja"
    template.write_text(prepare(recipe).contract.template.replace("{{- m.content }}", "{{- m.content | trim }}"))
    other = recipe.model_copy(update={"template": recipe.template.model_copy(update={"path": str(template)})})
    with pytest.raises(DataError, match=r"behaves otherwise than at its start: the probe spaces .* expected .* found"):
        check_same_run(prepare(other), Home(folder))
    template.write_text("{# only a comment #}" + prepare(recipe).contract.template)
    check_same_run(prepare(other), Home(folder))
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write("\n")
    check_same_run(prepare(recipe), Home(folder))
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write(json.dumps(conversation(7)) + "\n")
    with pytest.raises(DataError, match=r"\(train\)"):
        check_same_run(prepare(recipe), Home(folder))


def test_a_cosmetic_edit_of_the_models_own_template_goes_on_and_a_tokenizer_that_behaves_otherwise_does_not(
    started, tmp_path
):
    recipe, folder = started
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text("{# a comment #}" + template.read_text())
    check_same_run(prepare(recipe), Home(folder))
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_start|> "))
    with pytest.raises(DataError, match="the probe one turn"):
        check_same_run(prepare(recipe), Home(folder))


def test_a_run_under_a_clock_keeps_the_day_on_which_it_started(make_recipe, tmp_path):
    clock = tmp_path / "clock.jinja"
    clock.write_text("{{ strftime_now('%d %b %Y') }}" + CHATML)
    recipe = make_recipe(template={"path": str(clock)})
    assert prepare(recipe).contract.date == datetime.date.today().isoformat()
    first = make_recipe(template={"path": str(clock), "date": "2020-02-03"})
    folder = Path(recipe.run_place())
    make_run_folder(folder)
    write_run_folder(prepare(first), Home(folder))
    (folder / "checkpoints" / "step-00000002").mkdir()
    assert prepare(recipe).contract.date == "2020-02-03"
    assert "03 Feb 2020<|im_start|>" in prepare(recipe).contract.probes[0].text
    rows = [pipeline.render_row(conversation(0), prepare(recipe).template, recipe)]
    assert prepare(recipe).template.decode(rows[0][0].input_ids).startswith("03 Feb 2020")
    copy = pickle.loads(pickle.dumps(prepare(recipe).template))
    assert copy.decode(pipeline.render_row(conversation(0), copy, recipe)[0].input_ids).startswith("03 Feb 2020")


def test_a_token_that_the_model_has_no_embedding_of_is_named_with_its_row(make_recipe, tmp_path):
    from transformers import AutoTokenizer

    folder = write_model(tmp_path / "grown")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = len(tokenizer)
    tokenizer.add_tokens(["<|bronze|>", "<|tin|>"])
    tokenizer.save_pretrained(folder)
    recipe = make_recipe(model={"path": str(folder)})
    prepare(recipe)  # no row has one of them
    rows = [conversation(0), {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "<|tin|>"}]}]
    write_rows(tmp_path / "train.jsonl", rows)
    with pytest.raises(RecipeError, match=rf"train.jsonl#1 has the token '<\|tin\|>' \({size + 1}\), .* of {size} tokens"):
        prepare(recipe)


def test_the_contract_remembers_the_first_rows(make_recipe, tmp_path):
    contract = prepare(make_recipe()).contract
    assert list(contract.rows) == [f"{tmp_path / 'train.jsonl'}#{i}" for i in range(40)]
    assert contract.masks["rows"] == 40 and 0 < contract.masks["trained_tokens"] < contract.masks["tokens"]
    other = replace(contract, rows={**contract.rows, next(iter(contract.rows)): "0" * 64})
    assert "train.jsonl#0 has other tokens" in difference(other, contract)


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


def test_a_run_that_goes_on_notes_what_was_free_to_change(started):
    recipe, folder = started
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "recipe.yaml"}
    other = recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"best": "train/loss"})})
    check_same_run(prepare(other), Home(folder))
    write_run_folder(prepare(other), Home(folder))
    assert load(folder / "recipe.yaml") == other.located()
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name in before} == before


def test_the_first_held_out_rows_that_can_be_trained_are_asked(make_recipe, tmp_path):
    rows = write_rows(tmp_path / "eval.jsonl", [conversation(1, 2), {"messages": []}, conversation(2), conversation(3)])
    data = {"eval": [{"path": str(rows)}], "max_refused": 0.5}
    prepared = prepare(make_recipe(data=data, train={"generations": 2}))
    assert [question.row for question in prepared.questions] == [f"{rows}#0", f"{rows}#2"]
    template, last = prepared.template, conversation(1, 2)["messages"][-1]["content"]
    assert template.decode(prepared.questions[0].reference) == last + "<|im_end|>"
    assert template.decode(prepared.questions[0].prompt).endswith("<|im_start|>assistant\n")
    assert prepare(make_recipe(data=data, train={"generations": 0})).questions == ()
