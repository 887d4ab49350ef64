"""A run on an object store, where no disk is shared: killed, gone on with on another machine, exported and reported."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from burnish.cli import main
from burnish.data import files
from burnish.train.ledger import lines

pytestmark = pytest.mark.distributed

DEADLINE_SECONDS = 600


def burnish(*arguments: str, machine: Path) -> subprocess.Popen:
    """A command on a machine: a temporary folder of its own."""
    machine.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "burnish.cli", *arguments]
    environment = {**os.environ, "TMPDIR": str(machine)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def checkpointed(s3) -> int:
    """The step of the newest checkpoint that stands on the object store."""
    found = s3.get_file_info(files.fs.FileSelector("bucket/runs/far/checkpoints", recursive=True, allow_not_found=True))
    whole = [info.path.split("/")[-2] for info in found if info.base_name == "manifest.json"]
    return max((int(name.removeprefix("step-")) for name in whole), default=0)


def wait_for_checkpoint(s3, after: int, process: subprocess.Popen) -> None:
    """Returns once a checkpoint of a later step stands; several others follow, each of which takes requests."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while checkpointed(s3) <= after:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_on_an_object_store_is_killed_and_ends_as_one_on_a_disk(s3, quiet, tmp_path, capsys, monkeypatch):
    recipe, near = str(quiet.recipe), quiet.folder
    place = ["name=far", "checkpoint.storage=s3://bucket/runs?region=us-east-1"]

    killed = burnish("train", recipe, *place, machine=tmp_path / "a")
    wait_for_checkpoint(s3, 0, killed)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait(DEADLINE_SECONDS)
    at = checkpointed(s3)
    ended = burnish("train", recipe, *place, "scale.num_workers=1", machine=tmp_path / "b")
    assert ended.wait(DEADLINE_SECONDS) == 0, ended.stderr.read()
    result = json.loads(ended.stdout.read())
    assert result["checkpoint"].startswith("s3://bucket/runs/far/checkpoints/step-") and result["status"] == "finished"
    assert result["metrics"]["run/restarts"] == 1
    assert not list((tmp_path / "b").glob("burnish-*/*/*")), "nothing stays on a machine"

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "c"))
    (tmp_path / "c").mkdir()
    run = "s3://bucket/runs/far?region=us-east-1"
    assert main(["train", recipe, *place]) == 0, "a run that is done is not trained again"
    assert json.loads(capsys.readouterr().out) == result
    assert main(["report", run]) == 0
    assert capsys.readouterr().out == "s3://bucket/runs/far/report.html?region=us-east-1\n"
    assert main(["export", run]) == 2 and "name one behind the run" in capsys.readouterr().err
    folder = tmp_path / "model"
    assert main(["export", run, str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}\n"

    # Records and weights are those of the quiet run on a disk: the last part was trained by one worker instead of two.
    (tmp_path / "far").mkdir()
    for name in ("ledger.jsonl", "contract.json", "data.json", "result.json", "report.html", "attempts.jsonl"):
        with s3.open_input_stream(f"bucket/runs/far/{name}") as stream:
            (tmp_path / "far" / name).write_bytes(stream.read())
    found, wanted = (list(lines(each / "ledger.jsonl")) for each in (tmp_path / "far", near))
    assert [{**line, "loss": 0} for line in found] == [{**line, "loss": 0} for line in wanted] and len(found) > 20
    assert found[:at] == wanted[:at], "bit for bit with the same number of workers"
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in wanted], rel=1e-5)
    assert (tmp_path / "far" / "contract.json").read_bytes() == (near / "contract.json").read_bytes()
    shelf_files = {info.path for info in s3.get_file_info(files.fs.FileSelector("bucket/runs/far", recursive=True))}
    assert not [path for path in shelf_files if "/.part-" in path or path.endswith(("/.claim", "/STOP"))]
    (weights,) = near.glob(f"checkpoints/step-{len(wanted):08d}/weights.safetensors")
    trained = load_file(folder / "model.safetensors")
    for name, tensor in load_file(weights).items():
        assert (trained[name] - tensor).norm() <= 1e-5 * tensor.norm(), name
