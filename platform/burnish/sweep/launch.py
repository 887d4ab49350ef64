"""A sweep on Ray Tune: each trial is a whole training run; ASHA ends the ones that fall behind."""

import contextlib
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler

from burnish import tracking
from burnish.config import Recipe
from burnish.errors import RecipeError, Stopped, TrainingError
from burnish.sections import SweepSpec
from burnish.sweep.space import Assignment, draw, trial_recipe
from burnish.train import checkpoint
from burnish.train.cluster import DATA_CPUS, connected
from burnish.train.home import Home
from burnish.train.launch import train
from burnish.train.ledger import lines
from burnish.train.prepare import check_same_recipe, prepare, write_json

# A run that only lacks its evaluation reports no training loss, which is no reason to end all others.
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
# Ray Tune would take Ctrl-C for the end of the sweep, and what was trained until then for its result.
os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"

METRICS = ("eval/loss", "eval/perplexity", "train/loss", "train/tokens_per_second")
"""What trials can be ranked by."""
_STOPPED = "stopped.json"
"""The record of a sweep that came to its end: the trials that fell behind, which the same command does not train further."""


@dataclass(frozen=True)
class Trial:
    """How one trial ended: finished, stopped early by ASHA, or failed; `metric` is None where it never reported."""

    name: str
    assignment: Assignment
    status: str
    metric: float | None
    metrics: dict[str, float]


def sweep(recipe: Recipe, show: Callable[[str], None]) -> dict[str, Any]:
    """Runs every trial of the recipe's space and gives the best, also written as `best.yaml` in the sweep's folder.

    One MLflow parent run holds the trials. The same command again goes on: trials that are finished are not trained again,
    nor are those that fell behind in a sweep that came to its end. Raises RecipeError without a space, TrainingError where
    no trial reported the metric, and Stopped where SIGTERM or Ctrl-C ends it.
    """
    spec = recipe.sweep
    if spec is None or not spec.space:
        raise RecipeError("sweep.space: is empty; name at least one axis, for example lora.rank: {choice: [8, 16]}")
    if spec.metric not in METRICS:
        raise RecipeError(f"sweep.metric: {spec.metric!r} is no metric that runs report; write one of {', '.join(METRICS)}")
    if spec.metric.startswith("eval/") and not recipe.data.eval:
        raise RecipeError(f"sweep.metric: {spec.metric} needs data.eval; name held-out rows, or write metric: train/loss")
    recipes = [trial_recipe(recipe, number, assignment) for number, assignment in enumerate(draw(spec, recipe.train.seed))]
    assignments = draw(spec, recipe.train.seed)
    with Home.of(recipe).claimed() as home:
        return _sweep(recipe, spec, recipes, assignments, home, show)


def _sweep(
    recipe: Recipe,
    spec: SweepSpec,
    recipes: list[Recipe],
    assignments: list[Assignment],
    home: Home,
    show: Callable[[str], None],
) -> dict[str, Any]:
    folder = home.folder
    check_same_recipe(recipe, folder)
    prepare(recipes[0])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(recipe.located().to_yaml())
    parent = _open_parent(recipe, folder)
    with connected(recipe.widths()[0] * (spec.concurrent or 1), dashboard=True):
        # More than there is room for would wait for each other: their workers hold what their data tasks need.
        room = len(recipes) if spec.concurrent and os.environ.get("RAY_CLUSTER_AUTOSCALES") else _places(recipe)
        concurrent = min(len(recipes), spec.concurrent or len(recipes), room)
        show(f"{recipe.name}: {len(recipes)} trials, {concurrent} at a time")
        try:
            with _stopped_by_signal():
                results = _tune(spec, list(zip(recipes, assignments, strict=True)), concurrent, parent, folder)
        except KeyboardInterrupt:
            for run in recipes:
                status = "FINISHED" if _record(run, "result.json") else "KILLED"
                tracking.close_run(run, _record(run, "mlflow.json").get("run_id"), status)
            tracking.close_run(recipe, parent, "KILLED")
            raise Stopped(f"{recipe.name}: stopped; the same command goes on with the trials that are not done") from None
    trials = [
        _outcome(spec, number, trial, assignment, results)
        for number, (trial, assignment) in enumerate(zip(recipes, assignments, strict=True))
    ]
    for trial, run in zip(trials, recipes, strict=True):
        if trial.status != "finished":
            known = _record(run, "mlflow.json").get("run_id")
            tracking.close_run(run, known, "KILLED" if trial.status == "stopped" else "FAILED")
    write_json(folder / _STOPPED, [trial.assignment for trial in trials if trial.status == "stopped"])
    ranked = _rank(spec, trials)
    tracking.close_run(recipe, parent, "FINISHED" if ranked else "FAILED")
    if not ranked:
        raise TrainingError(f"no trial of {recipe.name} reported {spec.metric}; their runs are in {home.path('trials')}")
    best = ranked[0]
    chosen = recipes[trials.index(best)].model_copy(
        update={"name": f"{recipe.name[:42]}-best", "checkpoint": recipe.checkpoint}
    )
    (folder / "best.yaml").write_text(chosen.to_yaml())
    show(_table(spec, trials, best))
    show(f"best recipe: {home.path('best.yaml')}")
    finished = _record(recipes[trials.index(best)], "result.json")
    return {
        "status": "finished",
        "run": recipe.name,
        "run_id": parent,
        "steps": int(best.metrics.get("step", 0)),
        "checkpoint": finished.get("checkpoint"),
        "metrics": best.metrics,
        "best": {"trial": best.name, **best.assignment},
        "recipe": home.path("best.yaml"),
        "trials": [{"trial": t.name, "status": t.status, spec.metric: t.metric, **t.assignment} for t in trials],
    }


@contextlib.contextmanager
def _stopped_by_signal() -> Iterator[None]:
    """Has SIGTERM end the block as Ctrl-C does, by a KeyboardInterrupt; only the main thread hears of signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _open_parent(recipe: Recipe, folder: Path) -> str | None:
    """The MLflow run that holds the trials, the same one when a sweep goes on."""
    path = folder / "mlflow.json"
    known = str(json.loads(path.read_text())["run_id"]) if path.exists() else None
    parent = tracking.open_run(recipe, known)
    if parent is not None and parent != known:
        write_json(path, {"run_id": parent})
        tracking.describe(recipe, parent, {"burnish.sweep": recipe.name}, [folder / "recipe.yaml"], {})
    return parent


def _record(trial: Recipe, name: str) -> dict[str, Any]:
    """A JSON record of a trial's run; an empty one where it has none."""
    home = Home.of(trial).arrive()
    try:
        return dict(json.loads((home.folder / name).read_text()))
    except FileNotFoundError:
        return {}
    finally:
        home.leave()


def _evaluations(trial: Recipe, metric: str, all_of_them: bool) -> list[dict[str, float]]:
    """What a trial that goes on measured at its evaluations up to the checkpoint from which it does, in order of steps.

    Raises RecipeError where the trial of that number was one of another recipe, as before the sweep's space was changed.
    """
    home = Home.of(trial).arrive()
    try:
        check_same_recipe(trial, home.folder)
        standing = home.shelf().names()
        measured: dict[int, dict[str, float]] = {}
        for line in lines(home.folder / "metrics.jsonl"):
            measured[line["step"]] = measured.get(line["step"], {}) | line
    finally:
        home.leave()
    reached = standing[-1] if standing else ""
    found = [line for step, line in sorted(measured.items()) if all_of_them or checkpoint.name_of(step) <= reached]
    found = [line for line in found if "eval/loss" in line and metric in line]
    return [{key: value for key, value in line.items() if key != "time"} for line in found]


def _places(recipe: Recipe) -> int:
    """Trials that the cluster can place at the same time, at least one."""
    total = ray.cluster_resources()
    gpus = total.get("GPU", 0.0)
    if gpus and recipe.scale.use_gpu:
        return max(1, int(gpus) // recipe.widths()[0])
    return max(1, int(total.get("CPU", 1) - DATA_CPUS) // recipe.widths()[0])


def _tune(
    spec: SweepSpec, trials: list[tuple[Recipe, Assignment]], concurrent: int, parent: str | None, folder: Path
) -> dict[int, Any]:
    """Runs the trials; Tune's last result of each, by number."""
    fell_behind = json.loads((folder / _STOPPED).read_text()) if (folder / _STOPPED).exists() else []

    def run_trial(config: dict[str, Any]) -> None:
        recipe, assignment = trials[config["trial"]]
        # What was measured before this sweep went on is compared at the steps at which it was measured.
        for measured in _evaluations(recipe, spec.metric, all_of_them=assignment in fell_behind):
            tune.report(measured)
        if assignment in fell_behind:
            return
        result = train(recipe, callbacks=(TuneReportCallback(),), parent_id=parent)
        tune.report({**result.metrics, "step": result.steps})

    first = trials[0][0].train.eval_every_steps or 1
    scheduler = ASHAScheduler(
        time_attr="step",
        metric=spec.metric,
        mode=spec.mode,
        grace_period=first,
        max_t=max(1_000_000, first + 1),
        reduction_factor=3,
    )
    # Tune refuses a trial without any resource; the workers of its run hold the real ones.
    tuner = tune.Tuner(
        tune.with_resources(run_trial, {"CPU": 0.01}),
        param_space={"trial": tune.grid_search(list(range(len(trials))))},
        tune_config=tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=concurrent),
        run_config=tune.RunConfig(name="tune", storage_path=str(folder / ".ray"), verbose=0),
    )
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result
        grid = tuner.fit()
    return {int(result.config["trial"]): result for result in grid if result.config}


def _outcome(spec: SweepSpec, number: int, trial: Recipe, assignment: Assignment, results: dict[int, Any]) -> Trial:
    result, record = results.get(number), _record(trial, "result.json")
    failed = result is None or result.error is not None
    known = dict(result.metrics or {}) if result else {}
    if record and not failed:  # what it told last may be of a step at which it was compared, before it was known to be done
        known |= {**record["metrics"], "step": record["steps"]}
    metrics = {k: v for k, v in known.items() if "/" in k or k == "step"}
    metrics = {k: v for k, v in metrics.items() if isinstance(v, int | float) and not k.startswith("config/")}
    if spec.metric == trial.checkpoint.best:  # what is exported; with early stopping the last one is never the best
        best = checkpoint.best(Home.of(trial).shelf(), spec.metric)
        metrics |= {spec.metric: best[1]} if best else {}
    status = "failed" if failed else "finished" if record else "stopped"
    return Trial(trial.name, assignment, status, metrics.get(spec.metric), metrics)


def _rank(spec: SweepSpec, trials: list[Trial]) -> list[Trial]:
    """Trials that did not fail and reported a finite metric, best first."""
    sign = 1.0 if spec.mode == "min" else -1.0
    ranked = [
        trial for trial in trials if trial.status != "failed" and trial.metric is not None and math.isfinite(trial.metric)
    ]
    return sorted(ranked, key=lambda trial: sign * (trial.metric or 0.0))


def _table(spec: SweepSpec, trials: list[Trial], best: Trial) -> str:
    """The trials as aligned lines, the best marked."""
    head = ["trial", *spec.space, spec.metric, "steps", "status"]
    rows = [head]
    for trial in trials:
        metric = "-" if trial.metric is None else f"{trial.metric:.4f}"
        values = [
            f"{trial.assignment[path]:g}" if isinstance(trial.assignment[path], float) else str(trial.assignment[path])
            for path in spec.space
        ]
        status = trial.status + (" (best)" if trial is best else "")
        rows.append([trial.name, *values, metric, str(int(trial.metrics.get("step", 0))), status])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
