"""`burnish sweep` on a Ray of its own, as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from burnish.config import load
from burnish.train.prepare import check_same_recipe
from tests.conftest import Training, as_a_user, conversation, write_rows

pytestmark = pytest.mark.e2e


class Sweep:
    """A sweep of two trials, of which one learns nothing or far too fast; commands run in its folder."""

    def __init__(self, folder: Path, model: Path, make_recipe: Any) -> None:
        held_out = write_rows(folder / "held.jsonl", [conversation(i) for i in range(50, 56)])
        self.folder, self.uri, self.path = folder, f"sqlite:///{folder}/mlflow.db", folder / "sweep.yaml"
        recipe = make_recipe(
            lora={"rank": 2},
            model={"path": os.path.relpath(model, folder)},
            data={"eval": [{"path": str(held_out)}]},
            train={"max_steps": 8, "eval_every_steps": 2, "generations": 0},
            tracking={"uri": self.uri},
            sweep={"space": {"lora.rank": {"choice": [2, 4]}, "optim.learning_rate": {"choice": [1e-8, 1e-1]}}, "trials": 2,
                   "concurrent": 2},
        )  # fmt: skip
        self.path.write_text(recipe.to_yaml())
        self.command = [sys.executable, "-m", "burnish.cli", "sweep", str(self.path)]
        self.run = folder / "runs" / "small"

    def runs(self) -> dict[str, Any]:
        """The runs of MLflow, by their ids."""
        from mlflow.tracking import MlflowClient

        client = MlflowClient(self.uri)
        experiment = client.get_experiment_by_name("burnish")
        return {each.info.run_id: each for each in client.search_runs([experiment.experiment_id])}

    def goes_through(self) -> set[str]:
        """Runs the command to its end, and looks at all that it leaves; the runs of its trials in MLflow."""
        done = subprocess.run(self.command, env=as_a_user(), capture_output=True, text=True, cwd=self.folder)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout.splitlines()[-1])
        assert {"status", "run", "run_id", "steps", "checkpoint", "metrics"} <= set(result)
        reported = [trial for trial in result["trials"] if trial["eval/loss"] is not None]
        assert len(result["trials"]) == 2 and reported
        best = min(reported, key=lambda trial: trial["eval/loss"])
        assert result["best"]["trial"] == best["trial"]
        assert "(best)" in done.stderr and "optim.learning_rate" in done.stderr
        chosen = yaml.safe_load((self.run / "best.yaml").read_text())
        assert chosen["optim"]["learning_rate"] == best["optim.learning_rate"] and chosen["sweep"] is None
        runs = self.runs()
        nested = {name for name, each in runs.items() if each.data.tags.get("mlflow.parentRunId") == result["run_id"]}
        assert set(runs) == {*nested, result["run_id"]}
        assert runs[result["run_id"]].info.status == "FINISHED"
        own = {json.loads(file.read_text())["run_id"] for file in self.run.glob("trials/*/mlflow.json")}
        assert len(own) == 2 and own <= nested
        # A trial that had no checkpoint yet when the sweep was stopped begins anew, also in MLflow.
        assert all(runs[name].info.status in (("FINISHED", "KILLED") if name in own else ("KILLED",)) for name in nested)
        return nested


@pytest.fixture
def sweep(ray_folder, make_recipe, model_folder, tmp_path):
    return Sweep(tmp_path, model_folder, make_recipe)


def test_a_sweep_ranks_its_trials_and_nests_them_in_mlflow(sweep, monkeypatch):
    assert len(sweep.goes_through()) == 2
    monkeypatch.chdir(sweep.folder)
    check_same_recipe(load(sweep.path), sweep.run)  # the same command goes on


@pytest.mark.soak
def test_a_sweep_that_was_stopped_goes_on(sweep):
    with open(sweep.folder / "stopped.log", "w") as said:
        stopped = subprocess.Popen(
            [*sweep.command, "sweep.concurrent=1"], env=as_a_user(), stdout=said, stderr=said, cwd=sweep.folder,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as at a terminal, whoever runs the tests
        )  # fmt: skip
    deadline = time.monotonic() + Training.deadline_seconds
    while not list(sweep.run.glob("trials/*/checkpoints/step-*")):
        assert stopped.poll() is None and time.monotonic() < deadline, (sweep.folder / "stopped.log").read_text()
        time.sleep(0.05)
    stopped.send_signal(signal.SIGINT)
    assert stopped.wait(Training.deadline_seconds) == 75, (sweep.folder / "stopped.log").read_text()
    assert "stopped; the same command goes on" in (sweep.folder / "stopped.log").read_text()
    assert not (sweep.run / "best.yaml").exists(), "what was trained halfway is no result"
    parent = json.loads((sweep.run / "mlflow.json").read_text())["run_id"]
    stood = {name: each.info.status for name, each in sweep.runs().items()}
    assert stood.pop(parent) == "KILLED" and set(stood.values()) <= {"KILLED", "FINISHED"}
    assert set(stood) <= sweep.goes_through()
