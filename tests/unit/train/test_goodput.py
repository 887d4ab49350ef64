"""What failures cost is counted from the run folder alone."""

import json
import time

import pytest

from burnish.train import goodput


def write(folder, name, entries):
    (folder / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_restarts_lost_steps_recovery_and_goodput(tmp_path):
    write(tmp_path, "attempts.jsonl", [
        {"event": "start", "time": 100.0, "workers": 2, "from_step": 0, "lost_steps": 0},
        {"event": "end", "time": 110.0, "why": "lost: a worker was lost", "recover_seconds": None},
        {"event": "start", "time": 111.0, "workers": 2, "from_step": 4, "lost_steps": 3},
    ])  # fmt: skip
    write(tmp_path, "metrics.jsonl", [
        *({"step": step, "time": 100.0 + step, "train/step_seconds": 0.5} for step in range(1, 5)),
        *({"step": step, "time": 112.0 + step, "train/step_seconds": 0.5} for step in range(5, 9)),
    ])  # fmt: skip
    goodput.end(tmp_path, "finished")
    *_, end = (tmp_path / "attempts.jsonl").read_text().splitlines()
    end = json.loads(end)
    assert end["why"] == "finished" and end["recover_seconds"] == pytest.approx(7.0)
    found = goodput.account(tmp_path)
    assert found["run/restarts"] == 1 and found["run/lost_steps"] == 3 and found["run/recover_seconds"] == pytest.approx(7.0)
    assert found["run/goodput"] == pytest.approx(8 * 0.5 / (10 + end["time"] - 111.0))


def test_a_command_that_was_killed_is_counted_until_its_last_step(tmp_path):
    asked = time.time() - 3.0  # and waited for nodes
    goodput.begin(tmp_path, 0, 2, asked)
    (start,) = map(json.loads, (tmp_path / "attempts.jsonl").read_text().splitlines())
    assert start["time"] == asked
    write(tmp_path, "metrics.jsonl", [{"step": 3, "time": start["time"] + 5, "train/step_seconds": 1.0}])
    write(tmp_path, "ledger.jsonl", [{"step": step} for step in (1, 2, 3)])
    goodput.begin(tmp_path, 2, 4, time.time())
    lines = [json.loads(line) for line in (tmp_path / "attempts.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "end", "start"]
    assert lines[1]["why"] == "the command was killed" and lines[1]["time"] == start["time"] + 5
    assert (lines[2]["lost_steps"], lines[2]["workers"]) == (1, 4)
    assert goodput.account(tmp_path)["run/goodput"] == pytest.approx(1 / 5)


def test_the_end_of_an_attempt_whose_folder_is_gone_hides_nothing(tmp_path):
    goodput.end(tmp_path / "gone", "failed")  # raises nothing in place of what ended it
    assert not (tmp_path / "gone").exists()
