"""Metrics reach MLflow whole and in order, also after an outage and after a resume that took lines away."""

import json
import threading

import pytest
from mlflow.tracking import MlflowClient

from burnish import tracking
from burnish.train.ledger import Ledger


@pytest.fixture
def run(tmp_path):
    """An MLflow of this test's own, a run in it, and a run folder."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    run_id = client.create_run(client.create_experiment("e")).info.run_id
    folder = tmp_path / "run"
    folder.mkdir()
    return uri, run_id, folder, lambda: [(m.step, m.value) for m in client.get_metric_history(run_id, "x")]


def test_what_was_measured_in_an_outage_is_sent_when_mlflow_is_back(run, tmp_path, monkeypatch, caplog):
    uri, run_id, folder, history = run
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.05)
    said = threading.Event()
    monkeypatch.setattr(tracking.logger, "warning", lambda *words: said.set())
    ledger, database = Ledger.open(folder, 0, 0), tmp_path / "mlflow.db"
    ledger.measure(1, {"x": 1.0})
    database.rename(tmp_path / "gone.db")
    database.mkdir()  # so that no empty database is made in its place
    tracker = tracking.Tracker(uri, run_id, folder)
    assert said.wait(60)
    for step in (2, 3):
        ledger.measure(step, {"x": float(step)})
        tracker.wake()
    database.rmdir()
    (tmp_path / "gone.db").rename(database)
    tracker.close()
    assert history() == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_resume_and_a_late_delivery_send_each_line_once(run, make_recipe):
    uri, run_id, folder, history = run
    ledger = Ledger.open(folder, 0, 0)
    for step in (1, 2, 3):
        ledger.measure(step, {"x": float(step)})
    tracker = tracking.Tracker(uri, run_id, folder)
    tracker.close()
    assert history() == [(1, 1.0), (2, 2.0), (3, 3.0)]
    ledger = Ledger.open(folder, 2, 0)  # no checkpoint holds step 3
    tracking.Tracker(uri, run_id, folder).close()
    for step in (3, 4):
        ledger.measure(step, {"x": step + 0.5})
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "torn')
    recipe = make_recipe(tracking={"uri": uri})
    tracking.deliver(recipe, run_id, folder)
    tracking.deliver(recipe, run_id, folder)
    assert sorted(history()) == [(1, 1.0), (2, 2.0), (3, 3.0), (3, 3.5), (4, 4.5)]


def test_a_run_that_the_server_does_not_have_is_opened_anew(make_recipe, tmp_path):
    recipe = make_recipe(tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db"})
    first = tracking.open_run(recipe, None)
    assert tracking.open_run(recipe, first) == first
    elsewhere = make_recipe(tracking={"uri": f"sqlite:///{tmp_path}/other.db"})
    other = tracking.open_run(elsewhere, first)
    assert other not in (None, first)
    assert tracking.open_run(elsewhere, other) == other


def test_many_lines_are_sent_in_several_batches(run):
    uri, run_id, folder, history = run
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(600):
            file.write(json.dumps({"step": step, "time": float(step), "x": float(step), "y": 1.0, "z": 2.0}) + "\n")
    tracking.Tracker(uri, run_id, folder).close()
    assert history() == [(step, float(step)) for step in range(600)]
