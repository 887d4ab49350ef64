"""jobs/*.py under `ray job submit` on a real cluster with a dashboard."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from pyarrow.fs import FileSelector
from ray.job_submission import JobStatus, JobSubmissionClient
from safetensors.torch import load_file

from burnish.cli import main
from tests.conftest import ROOT, Training, as_a_user, free_port, processes_below

pytestmark = pytest.mark.e2e


class Jobs:
    """Jobs of jobs/*.py on a cluster, one after the other: the end of one would remove the working directory of another."""

    def __init__(self, dashboard: str) -> None:
        self.client = JobSubmissionClient(dashboard)
        self._runtime = yaml.safe_load((ROOT / "jobs" / "runtime_env.yaml").read_text())
        self._runtime |= {"working_dir": str(ROOT), "py_modules": [str(ROOT / "platform" / "burnish")]}
        self.env: dict[str, str] = self._runtime["env_vars"]

    def submit(self, verb: str, arguments: str) -> str:
        """The id of a job that was submitted as docs say."""
        return self.client.submit_job(entrypoint=f"{sys.executable} jobs/{verb}.py {arguments}", runtime_env=self._runtime)

    def wait_until(self, done: Callable[[], object], job: str) -> None:
        """Returns once something is so."""
        deadline = time.monotonic() + Training.deadline_seconds
        while True:
            began, ended = time.monotonic(), self.client.get_job_status(job).is_terminal()
            if done():
                return
            assert not ended and time.monotonic() < deadline, self.client.get_job_logs(job)
            # Asking is not cheap, for servers on this machine either, and what is waited for needs its cores.
            time.sleep(max(0.3, 4 * (time.monotonic() - began)))

    def end_of(self, job: str) -> tuple[JobStatus, str, int | None]:
        """How a job ended: its status, its log and the exit code of its driver."""
        self.wait_until(lambda: self.client.get_job_status(job).is_terminal(), job)
        info = self.client.get_job_info(job)
        return info.status, self.client.get_job_logs(job), info.driver_exit_code


@pytest.fixture
def jobs(cluster):
    return Jobs(cluster["dashboard"])


def test_jobs_run_under_ray_job_submit_with_code_and_recipe_travelling(jobs, make_recipe):
    model = make_recipe().model.path
    preview = jobs.submit("preview", f"jobs/recipes/quickstart.yaml --json --limit 1 model.path={model} data.max_length=256")
    status, logs, _ = jobs.end_of(preview)
    assert status == JobStatus.SUCCEEDED, logs
    assert json.loads(logs.splitlines()[-1])["row"].endswith("conversations.jsonl#0")
    recipe = ROOT / "runs" / ".job-test.yaml"  # below the working directory, and ignored by it: named absolutely
    recipe.parent.mkdir(exist_ok=True)
    recipe.write_text(make_recipe().to_yaml())
    try:
        status, logs, code = jobs.end_of(jobs.submit("sweep", f"{recipe} name=Wrong"))
    finally:
        recipe.unlink()
    assert (status, code) == (JobStatus.FAILED, 2) and "name: must be lower-case" in logs, logs


@pytest.mark.soak
def test_the_uninterrupted_run_is_a_fair_judge(quiet):
    ledger = quiet.ledger()
    assert [line["step"] for line in ledger] == list(range(1, len(ledger) + 1))
    assert len(ledger) > 40
    packs = [tuple(pack) for line in ledger for pack in line["packs"]]
    assert len(packs) == len(set(packs))
    assert ledger[-1]["loss"] < ledger[0]["loss"] - 0.5


class Far:
    """What stands of a run on an object store."""

    def __init__(self, s3: Any) -> None:
        self._s3 = s3

    def lines(self, name: str) -> list[Any]:
        """A record of the run, a line each."""
        try:
            return [json.loads(line) for line in self.bytes(name).splitlines()]
        except FileNotFoundError:
            return []

    def bytes(self, name: str) -> bytes:
        """A file of the run."""
        with self._s3.open_input_stream(f"bucket/runs/far/{name}") as stream:
            return stream.read()

    def clear(self) -> None:
        """The run is no more."""
        self._s3.delete_dir_contents("bucket/runs/far", missing_dir_ok=True)

    def starts(self) -> list[int]:
        """The steps that its attempts began after."""
        return [line["from_step"] for line in self.lines("attempts.jsonl") if line["event"] == "start"]

    def files(self) -> list[str]:
        """The paths of its files and folders."""
        found = self._s3.get_file_info(FileSelector("bucket/runs/far", recursive=True, allow_not_found=True))
        return [info.path for info in found]

    def newest(self) -> int:
        """The step of its newest checkpoint."""
        whole = [path.split("/")[-2] for path in self.files() if path.endswith("/manifest.json")]
        return max((int(name.removeprefix("step-")) for name in whole), default=0)


@pytest.fixture
def far(s3):
    return Far(s3)


def assert_left_no_files(far: Far, machine: Path) -> None:
    """A run used a folder on a machine, and left neither it nor half a checkpoint nor a claim."""
    assert list(machine.glob("burnish-*/*")) and not list(machine.glob("burnish-*/*/*")), "nothing stays on a machine"
    assert not [path for path in far.files() if "/.part-" in path or path.endswith(("/.claim", "/STOP"))]


PLACE = ["name=far", "checkpoint.storage=s3://bucket/runs?region=us-east-1"]
RUN = "s3://bucket/runs/far?region=us-east-1"


@pytest.mark.soak
def test_a_job_on_an_object_store_loses_a_worker_and_is_stopped_and_ends_as_a_run_on_a_disk_that_nobody_touched(
    jobs, far, quiet, tmp_path, capsys, monkeypatch
):
    for machine in ("a", "b"):
        (tmp_path / machine).mkdir()
    jobs.env |= {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    jobs.env["TMPDIR"] = str(tmp_path / "a")

    # A worker of a job is killed, and then the job is stopped.
    arguments = " ".join([str(quiet.recipe), *PLACE])
    job = jobs.submit("train", arguments)
    jobs.wait_until(far.newest, job)
    workers: list[psutil.Process] = []
    jobs.wait_until(lambda: workers.extend(processes_below(os.getpid(), "RayTrainWorker")) or workers, job)
    workers[-1].kill()
    jobs.wait_until(lambda: len(far.starts()) == 2 and far.newest() > far.starts()[1], job)
    assert jobs.client.stop_job(job)
    status, logs, code = jobs.end_of(job)
    # Ray notes no exit code of a job that it was asked to stop.
    assert (status, code) == (JobStatus.STOPPED, None), logs
    assert "a worker was lost" in logs
    ledger, wanted = far.lines("ledger.jsonl"), quiet.ledger()
    assert ledger == wanted[: len(ledger)] and far.starts()[1] < len(ledger) < len(wanted)
    assert f"stopped after step {len(ledger)}, with a checkpoint; the same command goes on from there" in logs
    assert far.newest() == len(ledger)

    # The same job goes on to the end.
    status, logs, code = jobs.end_of(jobs.submit("train", arguments))
    assert (status, code) == (JobStatus.SUCCEEDED, 0), logs
    result = json.loads(logs.splitlines()[-1])
    assert (result["status"], result["steps"]) == ("finished", len(wanted))
    assert result["checkpoint"].startswith("s3://bucket/runs/far/checkpoints/step-")
    assert result["metrics"]["run/restarts"] == 2
    first, second, third = far.starts()
    assert first == 0 < second and second % 4 == 0 and third == len(ledger)
    assert_left_no_files(far, tmp_path / "a")

    # Anybody with the address of the run reports and exports it.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "b"))
    assert main(["train", str(quiet.recipe), *PLACE]) == 0, "a run that is done is not trained again"
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert main(["report", RUN]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "s3://bucket/runs/far/report.html?region=us-east-1"
    assert main(["export", RUN]) == 2 and "name one behind the run" in capsys.readouterr().err
    folder = tmp_path / "model"
    status, logs, _ = jobs.end_of(jobs.submit("export", f"{RUN} {folder}"))
    assert status == JobStatus.SUCCEEDED and logs.splitlines()[-1] == str(folder), logs

    # Records and weights are those of the run on a disk, bit for bit.
    assert far.lines("ledger.jsonl") == wanted
    assert far.bytes("contract.json") == (quiet.folder / "contract.json").read_bytes()
    trained, weights = load_file(folder / "model.safetensors"), quiet.weights()
    assert set(weights) <= set(trained) and all(torch.equal(trained[name], weights[name]) for name in weights)


@pytest.mark.soak
def test_a_command_that_was_killed_goes_on_from_an_object_store_on_another_machine(far, quiet, tmp_path):
    for machine in ("a", "b"):
        (tmp_path / machine).mkdir()
    far.clear()

    def start(machine: str) -> subprocess.Popen[str]:
        """The command on a Ray of its own, whose workers have what the environment says of the store."""
        with open(tmp_path / f"{machine}.log", "w") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "burnish.cli", "train", str(quiet.recipe), *PLACE], text=True,
                env={**as_a_user(), "TMPDIR": str(tmp_path / machine)}, stdout=said, stderr=said,
            )  # fmt: skip

    killed = start("a")
    deadline = time.monotonic() + Training.deadline_seconds
    while not far.newest():
        assert killed.poll() is None and time.monotonic() < deadline, (tmp_path / "a.log").read_text()
        time.sleep(0.3)
    killed.kill()
    killed.wait()
    at = far.newest()

    assert start("b").wait(Training.deadline_seconds) == 0, (tmp_path / "b.log").read_text()
    result = json.loads(next(line for line in (tmp_path / "b.log").read_text().splitlines() if line.startswith("{")))
    first, second = far.starts()
    assert first == 0 < at <= second and second % 4 == 0 and result["metrics"]["run/restarts"] == 1
    assert_left_no_files(far, tmp_path / "b")
    assert far.lines("ledger.jsonl") == quiet.ledger()
    assert main(["export", RUN, str(tmp_path / "model")]) == 0
    trained, weights = load_file(tmp_path / "model" / "model.safetensors"), quiet.weights()
    assert set(weights) <= set(trained) and all(torch.equal(trained[name], weights[name]) for name in weights)


def test_a_local_cluster_starts_where_no_ray_ever_ran_and_leaves_nothing_behind():
    with tempfile.TemporaryDirectory(prefix="lc-", dir="/tmp") as new:
        environment = {**os.environ, "TMPDIR": new}
        del environment["RAY_TMPDIR"]
        command = [sys.executable, "cluster/local.py", "--nodes", "2", "--dashboard-port", str(free_port())]
        local = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        said = iter(local.stdout.readline, "")
        assert any(line.startswith("End ") for line in said), local.stderr.read()
        local.terminate()
        assert local.wait(Training.deadline_seconds) == 0, local.stderr.read()
        local.stdout.close()
        local.stderr.close()
        # Ray's dashboard leaves empty folders of Python's multiprocessing, with or without us.
        assert [name for name in os.listdir(new) if not name.startswith("pymp-")] == []


def test_what_travels_with_a_job_holds_no_secrets_and_no_outputs(tmp_path):
    from ray._private.runtime_env.packaging import create_package

    project = tmp_path / "project"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(project)], check=True)
    for name in (".env", ".env.local", "runs/x/weights.safetensors", "mlflow.db", ".venv/bin/python"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("secret")
    package = tmp_path / "package.zip"
    create_package(str(project), package, include_gitignore=True)
    names = subprocess.run([sys.executable, "-m", "zipfile", "-l", str(package)], capture_output=True, text=True).stdout
    assert "jobs/train.py" in names and "jobs/quickstart/conversations.jsonl" in names
    assert not [word for word in (".env", "weights.safetensors", "mlflow.db", ".venv") if word in names]
    assert os.path.getsize(package) < 5 << 20
