"""What a sweep compares: metrics that runs report, at the steps at which they were measured, of what is exported."""

import json
from types import SimpleNamespace

import pytest

from burnish.errors import RecipeError
from burnish.sections import SweepSpec
from burnish.sweep.launch import _evaluations, _outcome, sweep
from burnish.sweep.space import trial_recipe
from tests.conftest import conversation, write_rows
from tests.unit.train.test_checkpoint import write


@pytest.fixture
def trial(make_recipe, tmp_path):
    """A trial that keeps its best checkpoint, and its folder with checkpoints of steps 4 and 6."""
    held_out = write_rows(tmp_path / "held.jsonl", [conversation(1)])
    recipe = make_recipe(
        lora={"rank": 2},
        data={"eval": [{"path": str(held_out)}]},
        checkpoint={"best": "eval/loss"},
        sweep={"space": {"lora.rank": {"choice": [2, 4]}}},
    )
    made = trial_recipe(recipe, 0, {"lora.rank": 4})
    folder = tmp_path / "runs/small/trials/trial-000"
    assert made.run_place() == str(folder)
    for step, loss in ((4, 1.0), (6, 1.5)):
        path = write(folder / "checkpoints", step)
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({**manifest, "metrics": {"eval/loss": loss}}))
    return made, folder


def test_a_metric_that_runs_do_not_report_is_refused(make_recipe):
    recipe = make_recipe(sweep={"space": {"optim.learning_rate": {"choice": [1e-3]}}, "metric": "eval/acuracy"})
    with pytest.raises(
        RecipeError, match=r"sweep.metric: 'eval/acuracy' is no metric that runs report; write one of eval/loss"
    ):
        sweep(recipe, print)


def test_evaluations_up_to_the_newest_checkpoint_are_told_again_in_order(trial):
    recipe, folder = trial
    assert _evaluations(recipe, "eval/loss", False) == []
    lines = [
        {"step": 2, "time": 1.0, "train/loss": 3.0},
        {"step": 2, "time": 1.0, "eval/loss": 2.0, "eval/perplexity": 7.4},
        {"step": 4, "time": 2.0, "eval/loss": 1.0},
        {"step": 8, "time": 3.0, "eval/loss": 0.1},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = _evaluations(recipe, "eval/loss", False)
    assert [(line["step"], line["eval/loss"]) for line in found] == [(2, 2.0), (4, 1.0)] and "time" not in found[0]
    assert [line["step"] for line in _evaluations(recipe, "eval/loss", True)] == [2, 4, 8]
    assert [(line["step"], line["train/loss"]) for line in _evaluations(recipe, "train/loss", False)] == [(2, 3.0)]


def test_a_trial_of_another_recipe_tells_nothing(trial):
    recipe, folder = trial
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    _evaluations(recipe, "eval/loss", True)
    changed = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"rank": 8})})
    with pytest.raises(RecipeError, match=r"lora.rank: 4 became 8"):
        _evaluations(changed, "eval/loss", True)


def test_a_trial_is_worth_what_its_best_checkpoint_is(trial):
    recipe, _ = trial
    last = SimpleNamespace(metrics={"eval/loss": 1.5, "step": 6}, error=None)
    assert _outcome(SweepSpec(), 0, recipe, {}, {0: last}).metric == 1.0
    other = recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"best": None})})
    assert _outcome(SweepSpec(), 0, other, {}, {0: last}).metric == 1.5


def test_a_trial_that_is_done_is_worth_what_it_ended_with_and_one_that_failed_nothing(trial):
    recipe, folder = trial
    other = recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"best": None})})
    result = {"metrics": {"eval/loss": 0.9}, "steps": 50}
    (folder / "result.json").write_text(json.dumps(result))
    compared = SimpleNamespace(metrics={"eval/loss": 2.0, "step": 5}, error=None)  # ended by ASHA as it told of its past
    found = _outcome(SweepSpec(), 0, other, {}, {0: compared})
    assert (found.status, found.metric, found.metrics["step"]) == ("finished", 0.9, 50)
    failed = SimpleNamespace(metrics={"eval/loss": 2.0, "step": 5}, error=RecipeError("another recipe"))
    assert _outcome(SweepSpec(), 0, other, {}, {0: failed}).status == "failed"
    assert _outcome(SweepSpec(), 0, other, {}, {}).status == "failed"
