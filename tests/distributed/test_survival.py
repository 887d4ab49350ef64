"""Kills, real ones: the run goes on, and its ledger and weights are those of a run that nobody touched."""

import signal

import pytest

from tests.conftest import Training

pytestmark = pytest.mark.distributed

EMBEDDED = ""
"""The address of a command that starts a Ray of its own."""


def test_the_uninterrupted_run_is_a_fair_judge(quiet):
    ledger = quiet.ledger()
    assert [line["step"] for line in ledger] == list(range(1, len(ledger) + 1))
    assert len(ledger) > 40
    packs = [tuple(pack) for line in ledger for pack in line["packs"]]
    assert len(packs) == len(set(packs))
    assert ledger[-1]["loss"] < ledger[0]["loss"] - 0.5


def test_a_run_whose_worker_is_killed_and_that_is_stopped_loses_and_repeats_nothing(quiet):
    run = Training(quiet.recipe, "stopped", EMBEDDED)
    run.wait_for_step(6)
    run.workers()[1].kill()
    run.wait_for_step(16)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 75, run.said()
    steps = len(run.ledger())
    assert 16 <= steps < len(quiet.ledger()) and run.checkpoints()[-1] == steps
    assert f"stopped after step {steps}, with a checkpoint; the same command goes on from there" in run.said()
    assert "a worker was lost" in run.said()
    run = Training(quiet.recipe, "stopped", EMBEDDED)
    assert run.wait() == 0, run.said()
    assert run.result()["status"] == "finished"
    first, second, third = (start["from_step"] for start in run.attempts())
    assert first == 0 and 4 <= second < steps and third == steps
    run.assert_same(quiet)
