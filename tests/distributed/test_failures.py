"""Workers that hang, a storage or MLflow that is gone for a while, a full disk and full memory, really so, on three nodes."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest

from burnish.train.ledger import lines
from tests.conftest import Training, conversation, free_port, write_model, write_rows

pytestmark = [pytest.mark.distributed, pytest.mark.soak]

EVERY = 4
"""Steps between checkpoints of the recipe."""


def unmount(folder: Path, away: Path) -> None:
    """Takes a folder away while no checkpoint is being written, for whose end training would wait at the next one."""
    folder.rename(away)
    while list(away.glob(".step-*.partial")):
        away.rename(folder)
        time.sleep(0.05)
        folder.rename(away)


def test_a_storage_that_comes_back_costs_nothing_and_a_full_disk_ends_the_run_until_there_is_room(quiet):
    run = Training(quiet.recipe, "storage", quiet.address)
    folder, away = run.folder / "checkpoints", run.folder / "unmounted"
    run.wait_until(run.checkpoints)
    unmount(folder, away)
    due = (len(run.ledger()) // EVERY + 1) * EVERY
    run.wait_for_step(due + EVERY // 2)  # training goes on
    assert not folder.exists()
    away.rename(folder)
    run.wait_until(lambda: [step for step in run.verified() if step >= due])
    assert len(run.attempts()) == 1

    # Without the whole folder, its records too, the run waits.
    gone = run.folder.with_name("unmounted")
    unmount(folder, away)
    away.rename(folder)
    run.folder.rename(gone)
    run.wait_until(lambda: "ledger.jsonl could not be written yet, trying again" in run.said())
    assert not run.folder.exists()
    gone.rename(run.folder)
    trained = len(run.ledger())
    run.wait_for_step(trained + EVERY)
    assert len(run.attempts()) == 1

    # No file of a worker grows beyond what its part of a checkpoint needs, as on a disk that is full.
    limit = next(quiet.folder.rglob("weights.safetensors")).stat().st_size // 2
    for worker in run.workers():
        worker.rlimit(psutil.RLIMIT_FSIZE, (limit, limit))
    assert run.wait() == 4, run.said()
    assert "a checkpoint could not be written yet, trying again" in run.said()
    message = rf"the checkpoint of step (\d+) could not be written to {folder} \([\d,]+ MiB free\): .*\. Make room; "
    found = re.search(message + "the same command goes on from the checkpoint before", run.said())
    assert found, run.said()
    standing = run.checkpoints()
    assert due <= standing[-1] == int(found[1]) - EVERY
    assert run.verified() == standing
    assert not (run.folder / "failed.json").exists()

    again = Training(quiet.recipe, "storage", quiet.address)
    assert again.wait() == 0, again.said()
    assert [start["from_step"] for start in again.attempts()] == [0, standing[-1]]
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    again.assert_same(quiet)


def least_size(run: Training, worker: psutil.Process) -> int:
    """The least of a worker's address space during a step; what it needs beyond that, it allocates in each step."""
    step, sizes = len(run.ledger()), []

    def measured() -> bool:
        sizes.append(worker.memory_info().vms)
        return len(run.ledger()) >= step + 2

    run.wait_until(measured)
    return min(sizes)


def test_a_worker_without_memory_ends_the_run_with_advice_and_the_same_command_starts_nothing(quiet, tmp_path):
    # A tensor of 160 tokens in this model has 40 MiB, more than malloc would ever keep of what was freed.
    model = write_model(tmp_path / "wide", intermediate_size=64 << 10)
    run = Training(quiet.recipe, "memory", quiet.address, f"model.path={model}", "model.activation_checkpointing=false")
    run.wait_for_step(1)
    worker = run.workers()[0]
    limit = least_size(run, worker) + (20 << 20)
    worker.rlimit(psutil.RLIMIT_AS, (limit, limit))
    assert run.wait() == 5, run.said()
    found = re.search(r"out of memory in step \d+, \d+ tokens in a pack, float32, ZeRO-3: .*\. (Write .*)", run.said())
    assert found, run.said()
    keys = (
        "model.activation_checkpointing: true",
        "under a new name model.dtype: bfloat16",
        "data.max_length: 80",
        "lora: {rank: 16}",
    )
    assert found[1] == f"Write {', or '.join(keys)}, or take more workers"
    assert json.loads((run.folder / "failed.json").read_text())["error"] == "OutOfMemory"

    attempts, ledger = run.attempts(), run.ledger()
    again = Training(quiet.recipe, "memory", quiet.address, f"model.path={model}", "model.activation_checkpointing=false")
    assert again.wait() == 5, again.said()
    assert found[0] in again.said() and "nothing was started" in again.said()
    assert len(attempts) == 1 and again.attempts() == attempts and again.ledger() == ledger


def test_a_worker_without_memory_goes_on_in_a_smaller_layout_where_the_recipe_leaves_one_open(quiet, tmp_path):
    model = write_model(tmp_path / "wide", intermediate_size=64 << 10)
    run = Training(quiet.recipe, "smaller", quiet.address, f"model.path={model}", "train.max_steps=12")
    run.wait_for_step(EVERY + 1)
    worker = run.workers()[0]
    limit = least_size(run, worker) + (20 << 20)
    worker.rlimit(psutil.RLIMIT_AS, (limit, limit))
    assert run.wait() == 0, run.said()
    said = "out of memory with ZeRO-3, activations kept; going on with engine.zero_stage: 3, "
    assert f"{said}model.activation_checkpointing: true" in run.said()
    starts = run.attempts()
    assert len(starts) == 2 and starts[1]["from_step"] >= EVERY
    told = [line for line in lines(run.folder / "metrics.jsonl") if "engine/activation_checkpointing" in line]
    assert [line["engine/activation_checkpointing"] for line in told] == [0, 1]
    assert [line["step"] for line in run.ledger()] == list(range(1, 13))
    packs = [tuple(pack) for line in run.ledger() for pack in line["packs"]]
    assert len(packs) == len(set(packs))


@contextmanager
def mlflow_server(database: Path, port: int) -> Iterator[None]:
    """A real tracking server that is killed at the end of the block."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{database}", "--port", str(port)]
    command += ["--workers", "1", "--artifacts-destination", str(database.parent / "artifacts")]
    with open(database.with_suffix(".log"), "a") as said:
        server = subprocess.Popen(command, stdout=said, stderr=said)
    try:
        deadline = time.monotonic() + Training.deadline_seconds
        while True:
            assert server.poll() is None and time.monotonic() < deadline, database.with_suffix(".log").read_text()
            with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            time.sleep(0.1)
        yield
    finally:
        for process in [*psutil.Process(server.pid).children(recursive=True), server]:
            process.kill()
        server.wait()


def test_metrics_of_an_outage_of_mlflow_in_which_a_worker_is_killed_arrive_once(quiet, tmp_path):
    from mlflow.tracking import MlflowClient

    database, port = tmp_path / "mlflow.db", free_port()
    with mlflow_server(database, port):
        run = Training(quiet.recipe, "unwatched", quiet.address, f"tracking.uri=http://127.0.0.1:{port}")
        run.wait_until(run.attempts)
    run.wait_for_step(10)
    run.workers()[1].kill()
    run.wait_until(lambda: len(run.attempts()) == 2)
    client = MlflowClient(f"sqlite:///{database}")
    (found,) = client.search_runs([client.get_experiment_by_name("burnish").experiment_id])
    assert not client.get_metric_history(found.info.run_id, "train/loss"), "MLflow was away, and training went on"
    with mlflow_server(database, port):
        assert run.wait() == 0, run.said()
        assert run.result()["status"] == "finished" and run.result()["run_id"] == found.info.run_id
        run.assert_same(quiet)
    losses = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(each.step, each.value) for each in losses] == [(line["step"], line["loss"]) for line in run.ledger()]
    assert client.get_run(found.info.run_id).info.status == "FINISHED"


def test_a_worker_that_hangs_is_named_and_started_again(quiet):
    run = Training(quiet.recipe, "hangs", quiet.address, "scale.stall_seconds=24")
    run.wait_for_step(10)
    run.workers()[1].suspend()
    assert run.wait() == 0, run.said()
    assert re.search(
        r"no step for 30 s .*: worker [01] said nothing, so its process hangs as a whole; starting again", run.said()
    ), run.said()
    run.assert_same(quiet)
    metrics = run.result()["metrics"]
    assert metrics["run/restarts"] == 1 and metrics["run/lost_steps"] >= 0 and metrics["run/recover_seconds"] > 0


def test_a_command_that_is_asked_to_stop_leaves_a_checkpoint_and_goes_on_as_if_it_never_was(quiet):
    run = Training(quiet.recipe, "stopped", quiet.address, "checkpoint.every_steps=1000")
    run.wait_for_step(6)
    run.process.terminate()
    assert run.wait() == 75, run.said()
    (step,) = run.checkpoints()
    assert 6 <= step == len(run.ledger()) < len(quiet.ledger()) and run.verified() == [step]
    assert f"stopped after step {step}, with a checkpoint; the same command goes on from there" in run.said()
    assert not (run.folder / "failed.json").exists() and not (run.folder / "result.json").exists()

    again = Training(quiet.recipe, "stopped", quiet.address, "checkpoint.every_steps=1000")
    assert again.wait() == 0, again.said()
    assert [start["from_step"] for start in again.attempts()] == [0, step]
    again.assert_same(quiet)


def test_a_run_that_was_stopped_ends_early_as_if_it_never_was(quiet):
    # Nothing is learned, so the evaluation after the first step is the best, and the eighth behind it is the last.
    held_out = write_rows(quiet.recipe.parent / "held-out.jsonl", [conversation(i) for i in range(60, 64)])
    waits = (
        f"data.eval=[{{path: {held_out}}}]", "optim.learning_rate=1e-30", "train.eval_every_steps=1",
        "train.early_stopping=8", "train.generations=0", "checkpoint.best=eval/loss", "checkpoint.every_steps=1000",
    )  # fmt: skip
    run = Training(quiet.recipe, "waits", quiet.address, *waits)
    run.wait_for_step(4)
    run.process.terminate()
    assert run.wait() == 75, run.said()
    step = run.checkpoints()[-1]
    assert 4 <= step < 9

    again = Training(quiet.recipe, "waits", quiet.address, *waits)
    assert again.wait() == 0, again.said()
    assert again.result()["steps"] == 9 == len(again.ledger()) and "stopped early at step 9" in again.said()
    assert [start["from_step"] for start in again.attempts()] == [0, step]
