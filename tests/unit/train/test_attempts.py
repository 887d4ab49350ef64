"""What an attempt starts from, and what a signal means before it has workers that could write a checkpoint."""

import json
import os
import signal
from types import SimpleNamespace

import pytest

from burnish.errors import InfrastructureError, RecipeError, Stopped
from burnish.train import attempts
from burnish.train.home import Home
from burnish.train.prepare import make_run_folder
from tests.unit.train.test_checkpoint import write


def test_a_signal_between_attempts_stops_the_run_and_leaves_nothing_that_stops_the_next(make_recipe, tmp_path, monkeypatch):
    def interrupted(recipe, cuda):
        os.kill(os.getpid(), signal.SIGTERM)  # while it waits for nodes
        return 1

    monkeypatch.setattr(attempts, "width", interrupted)
    before, folder = signal.getsignal(signal.SIGTERM), tmp_path / "run"
    make_run_folder(folder)
    run = attempts.Run(SimpleNamespace(recipe=make_recipe()), Home(folder), None, False, ())
    with pytest.raises(Stopped, match="before an attempt began"):
        attempts.attempt_until_done(run, None)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (folder / attempts.STOP_FILE).exists() and not (folder / "attempts.jsonl").exists()


def test_an_attempt_starts_from_checkpoints_of_its_own_run_alone(tmp_path):
    home = Home(tmp_path)
    make_run_folder(tmp_path)
    path = write(tmp_path / "checkpoints", 10)
    manifest = json.loads((path / "manifest.json").read_text())
    for wrote, own, starts in ((None, None, True), (None, "a", True), ("a", "a", True), ("b", "a", False)):
        (path / "manifest.json").write_text(json.dumps({**manifest, **({"run": wrote} if wrote else {})}))
        (tmp_path / "data.json").write_text(json.dumps({"run": own} if own else {}))
        if starts:
            assert attempts._start(home).progress.step == 10
        else:
            with pytest.raises(RecipeError, match="step-00000010 is a checkpoint of another run"):
                attempts._start(home)


def test_an_attempt_without_the_storage_of_its_checkpoints_begins_nothing_anew(tmp_path):
    make_run_folder(tmp_path)
    (tmp_path / "checkpoints").rename(tmp_path / "unmounted")
    with pytest.raises(InfrastructureError, match="checkpoints is gone"):
        attempts._start(Home(tmp_path))
