"""The trials of a sweep."""

import math

import pytest

from burnish.errors import RecipeError
from burnish.sections import SweepSpec
from burnish.sweep.launch import Trial, _rank
from burnish.sweep.space import draw, trial_recipe


def spec(trials, **axes):
    return SweepSpec(trials=trials, space=axes)


def test_a_small_grid_is_tried_whole_and_a_large_one_drawn_without_repeats():
    grid = draw(spec(6, **{"lora.rank": {"choice": [4, 8]}, "lora.alpha": {"choice": [16, 32, 64]}}), 0)
    assert len(grid) == 6 and {(t["lora.rank"], t["lora.alpha"]) for t in grid} == {
        (r, a) for r in (4, 8) for a in (16, 32, 64)
    }
    drawn = draw(spec(4, **{"lora.rank": {"choice": [4, 8]}, "lora.alpha": {"choice": [16, 32, 64]}}), 0)
    assert len({tuple(t.values()) for t in drawn}) == 4


def test_numbers_stay_in_their_bounds_and_follow_the_seed():
    space = spec(50, **{"optim.learning_rate": {"log_uniform": [1e-5, 1e-3]}, "lora.dropout": {"uniform": [0.0, 0.1]}})
    one, same, other = draw(space, 1), draw(space, 1), draw(space, 2)
    assert one == same != other
    assert all(1e-5 <= t["optim.learning_rate"] <= 1e-3 and 0 <= t["lora.dropout"] <= 0.1 for t in one)
    assert sum(t["optim.learning_rate"] < 1e-4 for t in one) in range(15, 36)  # half lies below the middle of the logarithm


def test_a_range_of_hardly_any_values_gives_those_that_it_has():
    found = draw(spec(8, **{"optim.learning_rate": {"log_uniform": [1e-4, 1.002e-4]}}), 0)
    assert {trial["optim.learning_rate"] for trial in found} == {1e-4, 1.001e-4, 1.002e-4}


def test_a_trial_that_diverged_or_failed_never_wins():
    trials = [
        Trial(name, {}, status, metric, {})
        for name, status, metric in (
            ("nan", "finished", math.nan),
            ("good", "finished", 0.0),
            ("failed", "failed", -1.0),
            ("worse", "stopped", 2.0),
            ("silent", "stopped", None),
        )
    ]
    assert [trial.name for trial in _rank(SweepSpec(mode="min"), trials)] == ["good", "worse"]
    assert [trial.name for trial in _rank(SweepSpec(mode="max"), trials)] == ["worse", "good"]


def test_a_path_on_an_axis_is_found_from_the_folder_of_a_trial_too(make_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/a").mkdir(parents=True)
    recipe = make_recipe(sweep={"space": {"model.path": {"choice": ["models/a", "models/b"]}}})
    assert trial_recipe(recipe, 0, {"model.path": "models/a"}).model.path == str(tmp_path / "models/a")


def test_a_trial_is_a_recipe_of_its_own_below_the_sweep(make_recipe, tmp_path):
    recipe = make_recipe(lora={"rank": 4}, sweep={"space": {"lora.rank": {"choice": [4, 8]}}})
    trial = trial_recipe(recipe, 3, {"lora.rank": 8, "optim.learning_rate": 1e-5})
    assert (trial.name, trial.lora.rank, trial.optim.learning_rate, trial.sweep) == ("trial-003", 8, 1e-5, None)
    assert trial.run_place() == str(tmp_path / "runs" / "small" / "trials" / "trial-003")
    with pytest.raises(RecipeError, match=r"trial 0 of small: lora.rank"):
        trial_recipe(recipe, 0, {"lora.rank": "many"})
