"""Recipes: what is accepted, what is refused and with which words."""

import pickle

import pytest
import yaml

from burnish.config import Recipe, differences, load, override, parse
from burnish.errors import RecipeError
from burnish.reference import reference
from tests.conftest import ROOT

SMALL = {"name": "x", "model": {"path": "m"}, "data": {"train": [{"path": "a.jsonl"}]}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora": {"ranks": 8}}, "t.yaml: lora.ranks: no such key (found 8); did you mean 'rank'?"),
        ({"modle": {}}, "t.yaml: modle: no such key; did you mean 'model'?"),
        (
            {"data": {"train": [{"path": "a", "wieght": 3}]}},
            "t.yaml: data.train.0.wieght: no such key (found 3); did you mean 'weight'?",
        ),
        ({"optim": {"learning_rate": "fast"}}, "t.yaml: optim.learning_rate: Input should be a valid number, unable to "
         "parse string as a number (found 'fast')"),
        ({"model": {}}, "t.yaml: model.path: is required and missing"),
        ({"engine": {"zero_stage": 4}}, "t.yaml: engine.zero_stage: Input should be 'auto', 0, 1, 2 or 3 (found 4)"),
        ({"name": "My Run"}, "t.yaml: name: must be lower-case letters, digits and dashes, start with a letter, and have "
         "at most 47 characters (found 'My Run')"),
        ({"train": {"global_batch_size": 7}, "scale": {"num_workers": 2}},
         "t.yaml: train.global_batch_size (7 packs) cannot be divided over scale.num_workers (2); write "
         "train.global_batch_size: 8, or a number of workers that divides 7"),
        ({"train": {"early_stopping": 3, "eval_every_steps": 5}},
         "t.yaml: train.early_stopping (3) needs more; write data.eval: [{path: held-out.jsonl}], checkpoint.best: eval/loss"),
        ({"train": {"early_stopping": True}},
         "t.yaml: train: early_stopping: takes no true or false (found true); write its value, as docs/recipe.md has it"),
        ({"data": {"train": [{"path": "a"}], "filters": {"near_duplicates": True}}},
         "t.yaml: data.filters: near_duplicates: takes no true or false (found true); write its value, as docs/recipe.md has it"),
        ({"optim": {"max_grad_norm": False}},
         "t.yaml: optim: max_grad_norm: takes no true or false (found false); write its value, as docs/recipe.md has it"),
        ({"checkpoint": {"best": "eval/loss"}},
         "t.yaml: checkpoint.best: eval/loss needs held-out rows; write data.eval: [{path: held-out.jsonl}], or take it out"),
        ({"train": {"eval_every_steps": 5}},
         "t.yaml: train.eval_every_steps: 5 needs held-out rows; write data.eval: [{path: held-out.jsonl}], or take it out"),
        ({"data": {"train": [{"path": "/data/clone", "subset": "fr"}]}},
         "t.yaml: data.train.0: subset: belongs to a Hugging Face data set (found 'fr'); name its split too: split: train"),
        ({"sweep": {"space": {"lora.rnk": {"choice": [1]}}}},
         "t.yaml: sweep.space: 'lora.rnk' is no field that a sweep can vary; did you mean 'lora.rank'?"),
        ({"data": {"train": [{"path": "a", "weight": float("inf")}]}},
         "t.yaml: data.train.0.weight: Input should be a finite number (found inf)"),
        ({"sweep": {"space": {"lora.rank": {"choice": [8, 8]}}}},
         "t.yaml: sweep.space.lora.rank: choice names a value twice: [8, 8]"),
        ({"sweep": {"space": {"lora.rank": {"choice": [1], "uniform": [1, 2]}}}},
         "t.yaml: sweep.space.lora.rank: write exactly one of choice, uniform, log_uniform; found ['choice', 'uniform']"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_refused_with_place_find_and_remedy(change, message):
    with pytest.raises(RecipeError) as error:
        parse({**SMALL, **change}, "t.yaml")
    assert str(error.value) == message
    assert error.value.exit_code == 2


def test_overrides_beat_yaml_and_yaml_beats_defaults(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "lora": {"rank": 4}}))
    recipe = load(path, ["lora.rank=8", "optim.learning_rate=1e-4", "engine.zero_stage=2"])
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.optim.learning_rate, recipe.engine.zero_stage) == (8, 32.0, 1e-4, 2)
    assert load(path, ["lora=null"]).lora is None
    assert load(path).lora.rank == 4


@pytest.mark.parametrize("text", ["lora.rank", "=3", "name.x=1", "lora.rank=[1"])
def test_an_override_that_is_none_is_refused(text):
    with pytest.raises(RecipeError, match="override"):
        override(SMALL, [text])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("data: {}\nname: x\ndata: {}", "the key 'data' stands twice"),
        ("- 1", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="no such recipe"):
        load(tmp_path / "absent.yaml")


def test_a_recipe_survives_yaml_json_and_pickle():
    recipe = parse({**SMALL, "sweep": {"space": {"optim.learning_rate": {"log_uniform": ["1e-5", "1e-3"]}}}}, "t")
    assert parse(yaml.safe_load(recipe.to_yaml()), "t") == recipe
    assert Recipe.model_validate(recipe.dump()) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe


def test_differences_are_dotted_paths():
    one, other = parse(SMALL, "t"), parse({**SMALL, "lora": None, "train": {"epochs": 2}}, "t")
    found = differences(one, other)
    assert found["train.epochs"] == (1, 2)
    assert found["lora.rank"] == (16, None)
    assert set(found) == {
        "train.epochs",
        "lora.rank",
        "lora.alpha",
        "lora.train_tokens",
        "lora.dropout",
        "lora.target_modules",
        "lora.variant",
        "lora.modules_to_save",
    }


def test_paths_are_made_absolute_for_workers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    located = parse({**SMALL, "template": {"path": "t.jinja"}}, "t").located()
    assert located.model.path == str(tmp_path / "m")
    assert located.data.train[0].path == str(tmp_path / "a.jsonl")
    assert located.template.path == str(tmp_path / "t.jinja")
    assert located.tracking.uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert located.run_place() == str(tmp_path / "runs" / "x")
    assert parse({**SMALL, "model": {"path": "Qwen/Qwen3-8B"}}, "t").located().model.path == "Qwen/Qwen3-8B"


def test_every_recipe_of_the_project_loads():
    found = sorted((ROOT / "jobs" / "recipes").glob("*.yaml"))
    assert found
    assert all(load(path).name == path.stem for path in found)


def test_the_reference_page_is_made_from_the_schema():
    assert (ROOT / "docs" / "recipe.md").read_text() == reference()
