"""Checkpoints that are whole are found; broken ones are set aside."""

import hashlib
import json

import pytest

from burnish.train.checkpoint import newest, verify


def write(folder, step, content=b"weights"):

    path = folder / f"step-{step:08d}"
    (path / "engine").mkdir(parents=True)
    files = {"weights.safetensors": content, "engine/state.pt": b"state"}
    for name, data in files.items():
        (path / name).write_bytes(data)
    manifest = {
        "step": step,
        "cursor": {"epoch": 0, "position": 1, "index": 2},
        "num_workers": 2,
        "behaviour_sha256": "x",
        "files": {n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in files.items()},
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_the_newest_whole_checkpoint_is_found(tmp_path):
    assert newest(tmp_path) is None
    write(tmp_path, 10), write(tmp_path, 20)
    (tmp_path / ".step-00000030.partial").mkdir()
    found = newest(tmp_path)
    assert (found.progress.step, found.progress.cursor.index, found.num_workers) == (20, 2, 2)


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "no manifest", "torn manifest", "odd manifest"])
def test_a_broken_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path, damage):
    write(tmp_path, 10)
    path = write(tmp_path, 20)
    if damage == "truncated":
        (path / "weights.safetensors").write_bytes(b"weight")
    elif damage == "changed":
        (path / "engine/state.pt").write_bytes(b"stale")
    elif damage == "missing":
        (path / "engine/state.pt").unlink()
    elif damage == "no manifest":
        (path / "manifest.json").unlink()
    elif damage == "torn manifest":
        (path / "manifest.json").write_text((path / "manifest.json").read_text()[:-20])
    else:
        (path / "manifest.json").write_text("[]")
    assert verify(path) is None
    assert newest(tmp_path).progress.step == 10
    assert (tmp_path / ".broken-step-00000020").is_dir() and not path.exists()
