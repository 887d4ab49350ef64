"""Checkpoints that are whole are found; broken ones are set aside."""

import hashlib
import json

import pytest
from safetensors import SafetensorError

from burnish.data.order import Cursor
from burnish.errors import InfrastructureError
from burnish.train.attempt import Progress
from burnish.train.checkpoint import newest, verify, writing
from tests.conftest import free_ports


def write(folder, step, content=b"weights"):

    path = folder / f"step-{step:08d}"
    (path / "optimizer").mkdir(parents=True)
    files = {"weights.safetensors": content, "optimizer/0": b"state"}
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
        (path / "optimizer/0").write_bytes(b"stale")
    elif damage == "missing":
        (path / "optimizer/0").unlink()
    elif damage == "no manifest":
        (path / "manifest.json").unlink()
    elif damage == "torn manifest":
        (path / "manifest.json").write_text((path / "manifest.json").read_text()[:-20])
    else:
        (path / "manifest.json").write_text("[]")
    assert verify(path) is None
    assert newest(tmp_path).progress.step == 10
    assert (tmp_path / ".broken-step-00000020").is_dir() and not path.exists()


@pytest.mark.parametrize("way", ["above", "absolute", "symlink", "symlinked folder", "not named", "no weights named"])
def test_a_checkpoint_is_what_its_manifest_names_in_its_own_folder_and_nothing_else(tmp_path, way):
    outside = tmp_path / "outside" / "0"
    outside.parent.mkdir()
    outside.write_bytes(b"state")
    path = write(tmp_path, 10)
    manifest = json.loads((path / "manifest.json").read_text())
    entry = manifest["files"]["optimizer/0"]
    if way == "above":
        manifest["files"]["../outside/0"] = entry
    elif way == "absolute":
        manifest["files"][str(outside)] = entry
    elif way == "symlink":
        (path / "optimizer/0").unlink()
        (path / "optimizer/0").symlink_to(outside)
    elif way == "symlinked folder":
        (path / "optimizer/0").unlink()
        (path / "optimizer").rmdir()
        (path / "optimizer").symlink_to(outside.parent)
    elif way == "not named":
        del manifest["files"]["optimizer/0"]
    else:
        manifest["files"] = {}
        (path / "weights.safetensors").unlink(), (path / "optimizer/0").unlink()
    assert verify(path) is not None or way in ("symlink", "symlinked folder", "no weights named")
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert verify(path) is None


@pytest.fixture
def alone():
    """A process group of one."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_ports(1)[0]}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_checkpoint_appears_when_its_block_ends_and_the_newest_are_kept(tmp_path, alone):
    (tmp_path / ".step-00000001.partial").mkdir()
    for step in (2, 4, 6):
        with writing(tmp_path, Progress(step, Cursor(1, 2, 3)), keep=2, behaviour_sha256="x") as partial:
            (partial / "weights.safetensors").write_bytes(bytes(step))
            assert not (tmp_path / f"step-{step:08d}").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000006"]
    assert newest(tmp_path).progress == Progress(6, Cursor(1, 2, 3))


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("Error while serializing: I/O error: No space left on device")],
)
def test_a_full_disk_is_reported_as_such_and_the_checkpoint_before_stays(tmp_path, alone, error):
    write(tmp_path, 2)
    with (
        pytest.raises(InfrastructureError, match=r"step 4 could not be written .* Make room") as found,
        writing(tmp_path, Progress(4), keep=1, behaviour_sha256="x"),
    ):
        raise error
    assert found.value.exit_code == 4
    assert newest(tmp_path).progress.step == 2
    with pytest.raises(RuntimeError, match="a worker is gone"), writing(tmp_path, Progress(4), 1, "x"):
        raise RuntimeError("a worker is gone")
