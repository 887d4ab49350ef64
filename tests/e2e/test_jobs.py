"""Sweeps, and jobs/*.py under `ray job submit` on a real cluster with a dashboard."""

import json
import os
import subprocess
import sys
import tempfile
import time

import pytest
import yaml
from ray.job_submission import JobStatus, JobSubmissionClient

from burnish.cli import main
from tests.conftest import ROOT, conversation, free_ports, write_rows

pytestmark = pytest.mark.e2e


def test_a_sweep_tries_its_space_ranks_the_trials_and_nests_them_in_mlflow(cluster, capsys, make_recipe, tmp_path):
    from mlflow.tracking import MlflowClient

    held_out = write_rows(tmp_path / "held.jsonl", [conversation(i) for i in range(50, 56)])
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    recipe = make_recipe(
        lora={"rank": 2},
        data={"eval": [{"path": str(held_out)}]},
        train={"max_steps": 4, "eval_every_steps": 2},
        tracking={"uri": uri},
        sweep={"space": {"lora.rank": {"choice": [2, 4]}, "optim.learning_rate": {"choice": [1e-8, 1e-1]}}, "trials": 2,
               "concurrent": 2},
    )  # fmt: skip
    path = tmp_path / "sweep.yaml"
    path.write_text(recipe.to_yaml())
    code = main(["sweep", str(path)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    result = json.loads(captured.out.splitlines()[-1])
    assert {"status", "run", "run_id", "steps", "checkpoint", "metrics"} <= set(result)
    reported = [trial for trial in result["trials"] if trial["eval/loss"] is not None]
    assert len(result["trials"]) == 2 and reported
    best = min(reported, key=lambda trial: trial["eval/loss"])
    assert result["best"]["trial"] == best["trial"]
    assert "(best)" in captured.err and "optim.learning_rate" in captured.err
    chosen = yaml.safe_load((tmp_path / "runs/small/best.yaml").read_text())
    assert chosen["optim"]["learning_rate"] == best["optim.learning_rate"] and chosen["sweep"] is None
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("burnish")
    runs = client.search_runs([experiment.experiment_id])
    nested = [each for each in runs if each.data.tags.get("mlflow.parentRunId") == result["run_id"]]
    assert len(runs) == 3 and len(nested) == 2
    assert all(each.info.status in ("FINISHED", "KILLED") for each in runs)


def follow(client: JobSubmissionClient, job: str, seconds: float) -> JobStatus:
    deadline = time.monotonic() + seconds
    while not (status := client.get_job_status(job)).is_terminal():
        assert time.monotonic() < deadline, client.get_job_logs(job)
        time.sleep(0.5)
    return status


def test_jobs_run_under_ray_job_submit_with_code_and_recipe_travelling(cluster, make_recipe, tmp_path):
    client = JobSubmissionClient(cluster["dashboard"])
    env = yaml.safe_load((ROOT / "jobs" / "runtime_env.yaml").read_text())
    env |= {"working_dir": str(ROOT), "py_modules": [str(ROOT / "platform" / "burnish")]}
    recipe = ROOT / "runs" / ".job-test.yaml"  # below the working directory, and ignored by it: named absolutely
    recipe.parent.mkdir(exist_ok=True)
    recipe.write_text(make_recipe(scale={"num_workers": 2}, train={"max_steps": 3}).to_yaml())

    def submit(verb: str, arguments: str) -> tuple[JobStatus, str, int | None]:
        # One after the other: the nodes of a simulated cluster share a folder, in which one job's end would remove the
        # working directory of another.
        job = client.submit_job(entrypoint=f"{sys.executable} jobs/{verb}.py {arguments}", runtime_env=env)
        status = follow(client, job, 240)
        return status, client.get_job_logs(job), client.get_job_info(job).driver_exit_code

    try:
        model = make_recipe().model.path
        status, logs, _ = submit("preview", f"jobs/recipes/quickstart.yaml --json --limit 1 model.path={model}")
        assert status == JobStatus.SUCCEEDED, logs
        assert json.loads(logs.splitlines()[-1])["row"].endswith("conversations.jsonl#0")
        status, logs, code = submit("sweep", f"{recipe} name=Wrong")
        assert (status, code) == (JobStatus.FAILED, 2) and "name: must be lower-case" in logs, logs
        status, logs, _ = submit("train", str(recipe))
        assert status == JobStatus.SUCCEEDED, logs
        result = json.loads(logs.splitlines()[-1])
        assert (result["status"], result["steps"]) == ("finished", 3)
        status, logs, _ = submit("export", f"{tmp_path}/runs/small")
        assert status == JobStatus.SUCCEEDED, logs
        assert (tmp_path / "runs/small/export/model.safetensors").exists()
    finally:
        recipe.unlink()


def test_a_local_cluster_starts_where_no_ray_ever_ran_and_leaves_nothing_behind():
    with tempfile.TemporaryDirectory(prefix="lc-", dir="/tmp") as new:
        environment = {**os.environ, "TMPDIR": new}
        del environment["RAY_TMPDIR"]
        command = [sys.executable, "cluster/local.py", "--nodes", "2", "--dashboard-port", str(free_ports(1)[0])]
        local = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        said = iter(local.stdout.readline, "")
        assert any(line.startswith("End ") for line in said), local.stderr.read()
        local.terminate()
        assert local.wait(60) == 0, local.stderr.read()
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
