"""What a signal means before an attempt has workers that could write a checkpoint."""

import os
import signal
from types import SimpleNamespace

import pytest

from burnish.errors import Stopped
from burnish.train import attempts
from burnish.train.home import Home
from burnish.train.prepare import make_run_folder


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
