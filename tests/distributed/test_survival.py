"""Kills, real ones: the run goes on, and its ledger and weights are those of a run that nobody touched."""

import os
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


def test_a_killed_worker_is_replaced_and_nothing_is_lost_or_repeated(quiet):
    run = Training(quiet.recipe, "worker-killed", quiet.address)
    run.wait_for_step(10)
    run.workers()[1].kill()
    assert run.wait() == 0, run.said()
    assert run.result()["status"] == "finished" and len(run.attempts()) == 2
    run.assert_same(quiet)


def test_a_killed_command_goes_on_to_the_same_end(quiet):
    run = Training(quiet.recipe, "command-killed", EMBEDDED)
    run.wait_for_step(10)
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    run = Training(quiet.recipe, "command-killed", EMBEDDED)
    assert run.wait() == 0, run.said()
    first, second = (start["from_step"] for start in run.attempts())
    assert first == 0 and second >= 4 and second % 4 == 0
    run.assert_same(quiet)


def test_all_weights_go_on_with_other_numbers_of_workers_in_the_same_steps(quiet):
    run = Training(quiet.recipe, "elastic", quiet.address, "scale.num_workers=4")
    run.wait_for_step(6)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 75, run.said()
    assert "the same command goes on from there" in run.said()
    assert 6 <= len(run.ledger()) < len(quiet.ledger()) - 6
    run = Training(quiet.recipe, "elastic", quiet.address, "scale.num_workers=1")
    assert run.wait() == 0, run.said()
    losses, found_losses = ([line["loss"] for line in each.ledger()] for each in (quiet, run))
    assert [{**line, "loss": 0} for line in run.ledger()] == [{**line, "loss": 0} for line in quiet.ledger()]
    # Sums of float32 in another order differ by about 1e-7 after 48 steps, resumed or not (losses and weights alike).
    assert found_losses == pytest.approx(losses, rel=1e-5, abs=0)
    trained, weights = run.weights(), quiet.weights()
    assert set(trained) == set(weights)
    for name, tensor in weights.items():
        assert (trained[name] - tensor).norm() <= 1e-5 * tensor.norm(), name
