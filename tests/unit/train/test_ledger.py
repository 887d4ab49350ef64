"""The run's records: each step once, refusals counted, torn lines dropped."""

import errno
import io
import json
import threading

import pytest

from burnish.data.order import Cursor, StepMeta
from burnish.errors import DataError, InfrastructureError
from burnish.train import ledger as records
from burnish.train.attempt import Wish
from burnish.train.ledger import Ledger, append, lines


def meta(step, refused=()):
    packs = ((0, 0, 2 * step), (0, 0, 2 * step + 1))
    return StepMeta(
        packs, 10, 5, 0.0, Cursor(), tuple({"row": r, "code": c, "turn": None, "message": ""} for r, c in refused), 0, 1.0
    )


def test_a_line_has_exactly_the_keys_of_the_contract(tmp_path):
    Ledger.open(tmp_path, 0, 0).record(1, meta(1), 0.5, {"train/loss": 0.5})
    assert json.loads((tmp_path / "ledger.jsonl").read_text()) == {
        "step": 1, "packs": [[0, 0, 2], [0, 0, 3]], "tokens": 10, "trained_tokens": 5, "loss": 0.5,
    }  # fmt: skip


def test_a_resumed_run_writes_each_step_once(tmp_path):
    ledger = Ledger.open(tmp_path, 0, 9)
    for step in (1, 2, 3):
        ledger.record(step, meta(step, [(f"f#{step}", "no-stop")]), 0.5, {})
    with open(tmp_path / "ledger.jsonl", "a") as file:
        file.write('{"step": 4, "pac')
    resumed = Ledger.open(tmp_path, 2, 9)
    resumed.record(3, meta(3, [("f#3", "no-stop")]), 0.5, {})
    assert [line["step"] for line in lines(tmp_path / "ledger.jsonl")] == [1, 2, 3]
    assert [line["row"] for line in lines(tmp_path / "refused.jsonl")] == ["f#1", "f#2", "f#3"]


def test_answers_of_an_evaluation_stand_once(tmp_path):
    answer = {"row": "f#1", "prompt": "p", "reference": "r", "answer": "a", "stopped": True}
    ledger = Ledger.open(tmp_path, 0, 9)
    for step in (0, 2, 4):
        ledger.generate(step, [answer, {**answer, "row": "f#2"}])
    resumed = Ledger.open(tmp_path, 2, 9)
    for step in (0, 2, 4):
        resumed.generate(step, [answer, {**answer, "row": "f#2"}])
    found = list(lines(tmp_path / "generations.jsonl"))
    assert [(line["step"], line["row"]) for line in found] == [(step, row) for step in (0, 2, 4) for row in ("f#1", "f#2")]
    anew = Ledger.open(tmp_path, 0, 9)
    anew.generate(0, [{**answer, "answer": "of another model"}])
    (line,) = lines(tmp_path / "generations.jsonl")
    assert line["answer"] == "of another model"
    with open(tmp_path / "generations.jsonl", "a") as file:
        file.write('{"step": 2, "torn')
    killed = Ledger.open(tmp_path, 2, 9)
    killed.generate(0, [answer, {**answer, "row": "f#2"}])
    assert [line["row"] for line in lines(tmp_path / "generations.jsonl")] == ["f#1", "f#2"], "what was missing of a step"


def test_too_many_refused_rows_end_the_run_and_overlong_ones_do_not_count(tmp_path):
    ledger = Ledger.open(tmp_path, 0, 1)
    ledger.record(1, meta(1, [("f#1", "no-stop"), ("f#2", "overlong"), ("f#3", "overlong")]), 0.5, {})
    with pytest.raises(DataError, match=r"2 rows were refused, more than the 1 .*no-stop: 1") as error:
        ledger.record(2, meta(2, [("f#4", "bad-row")]), 0.5, {})
    assert error.value.exit_code == 3
    assert len(list(lines(tmp_path / "refused.jsonl"))) == 4


def test_a_storage_that_is_gone_for_a_while_is_waited_for(tmp_path):
    folder, away = tmp_path / "run", tmp_path / "unmounted"
    folder.mkdir()
    append(folder / "ledger.jsonl", {"step": 1})
    folder.rename(away)
    back = threading.Timer(1.0, away.rename, [folder])
    back.start()
    waited = []
    append(folder / "ledger.jsonl", {"step": 2}, lambda: waited.append(1))
    back.join()
    assert waited, "the watchdog hears that nothing hangs"
    assert [line["step"] for line in lines(folder / "ledger.jsonl")] == [1, 2]


@pytest.mark.parametrize(("number", "passes"), [(errno.EIO, True), (errno.ENOSPC, False)])
def test_half_a_line_is_taken_back_before_the_line_is_written_again(tmp_path, monkeypatch, number, passes):
    class Failing(io.FileIO):
        failed = False

        def write(self, data):
            if not Failing.failed:
                Failing.failed = True
                super().write(data[:5])
                raise OSError(number, "not now")
            return super().write(data)

    append(tmp_path / "ledger.jsonl", {"step": 1})
    monkeypatch.setattr(records, "open", lambda path, mode, buffering: Failing(path, "a"), raising=False)
    if passes:
        append(tmp_path / "ledger.jsonl", {"step": 2})
    else:
        with pytest.raises(InfrastructureError, match=r"ledger.jsonl: cannot be written: .*not now"):
            append(tmp_path / "ledger.jsonl", {"step": 2})
    monkeypatch.undo()
    assert Failing.failed
    written = (tmp_path / "ledger.jsonl").read_text()
    assert written == '{"step": 1}\n' + ('{"step": 2}\n' if passes else "")


def test_a_storage_that_cannot_be_asked_wishes_nothing(tmp_path, monkeypatch):
    (tmp_path / "STOP").touch()
    assert Wish.of(tmp_path) is Wish.STOP

    def stat(path, **options):
        raise OSError(errno.EIO, "not now")

    monkeypatch.setattr("pathlib.Path.stat", stat)
    assert Wish.of(tmp_path) is Wish.NOTHING
