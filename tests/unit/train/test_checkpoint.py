"""Checkpoints that are whole are found; broken ones are set aside."""

import errno
import hashlib
import json
import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from burnish.data.order import Cursor
from burnish.errors import InfrastructureError, RecipeError, TrainingError
from burnish.train.attempt import Progress
from burnish.train.checkpoint import best, newest, verify
from burnish.train.home import Home
from burnish.train.memory import HostMemory
from burnish.train.shelf import Shelf
from burnish.train.writer import Place, Writer


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
    assert newest(Shelf(str(tmp_path))) is None
    write(tmp_path, 10), write(tmp_path, 20)
    (tmp_path / ".step-00000030.partial").mkdir()
    found = newest(Shelf(str(tmp_path)))
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
    assert verify(Shelf(str(tmp_path)), path.name) is None
    assert newest(Shelf(str(tmp_path))).progress.step == 10
    assert (tmp_path / ".broken-step-00000020").is_dir() and not path.exists()


def test_a_run_whose_checkpoints_are_all_broken_begins_nothing_anew_until_someone_decides(tmp_path, caplog):
    for step in (10, 20):
        (write(tmp_path, step) / "weights.safetensors").write_bytes(b"torn")
    for _ in range(2):
        with pytest.raises(InfrastructureError, match=r"set aside as .broken-step-00000010, .broken-step-00000020. Bring"):
            newest(Shelf(str(tmp_path)))
    assert "step-00000020 is not what its manifest says; setting it aside as .broken-step-00000020" in caplog.text
    (tmp_path / ".broken-step-00000010/weights.safetensors").write_bytes(b"weights")
    (tmp_path / ".broken-step-00000010").rename(tmp_path / "step-00000010")
    assert newest(Shelf(str(tmp_path))).progress.step == 10


def test_a_storage_that_cannot_be_read_now_says_nothing_of_a_checkpoint(tmp_path, monkeypatch):
    write(tmp_path, 10), write(tmp_path, 20)

    def described(shelf, name, file):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(Shelf, "described", described)
        with pytest.raises(InfrastructureError, match="cannot be read"):
            newest(Shelf(str(tmp_path)))
    assert newest(Shelf(str(tmp_path))).progress.step == 20


def test_a_checkpoint_that_is_a_link_is_refused_and_nothing_begins_anew(tmp_path):
    elsewhere = write(tmp_path / "elsewhere", 20)
    write(tmp_path, 10)
    (tmp_path / "step-00000020").symlink_to(elsewhere)
    with pytest.raises(RecipeError, match=r"step-00000020 is a link, .*move it there"):
        newest(Shelf(str(tmp_path)))


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
    assert verify(Shelf(str(tmp_path)), path.name) is not None or way in ("symlink", "symlinked folder", "no weights named")
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert verify(Shelf(str(tmp_path)), path.name) is None


def place(folder, keep=2, best=None):
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "contract.json").write_text("{}")
    return Place(Home(folder), "attempt-1", keep, best, "x")


def files(value, world_rank=0):
    part = {f"optimizer/{world_rank:05d}-of-00002.safetensors": ({"a:master": torch.full((4,), float(value))}, {})}
    weights = {"weights.safetensors": ({"a": torch.full((8,), float(value))}, {"chat_contract": "x"})}
    return {**part, **(weights if world_rank == 0 else {})}


def test_a_worker_whose_part_is_written_waits_for_the_checkpoint_to_stand(tmp_path, monkeypatch):
    writers = [Writer(place(tmp_path), world_rank, 2) for world_rank in range(2)]
    for writer in writers:
        writer.stand()  # nothing was begun
    writers[1].write(Progress(2), {}, partial(files, 2, 1))
    with ThreadPoolExecutor(1) as pool:
        standing = pool.submit(writers[1].stand)
        writers[1].wait()
        with pytest.raises(TimeoutError):
            standing.result(timeout=0.2)
        writers[0].write(Progress(2), {}, partial(files, 2))
        standing.result(timeout=60)
    assert newest(Shelf(str(tmp_path / "checkpoints"))).progress.step == 2
    monkeypatch.setattr("burnish.storage.RETRY_SECONDS", 0.2)
    writers[1].write(Progress(4), {}, partial(files, 4, 1))
    writers[1].stand()  # no longer than world rank 0 would try


def test_a_second_checkpoint_waits_until_the_first_is_written(tmp_path):
    writer, goes_on, began = Writer(place(tmp_path), 0, 1), threading.Event(), []

    def slow(step):
        began.append(step)
        goes_on.wait()
        return files(step)

    writer.write(Progress(2), {}, partial(slow, 2))
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(writer.write, Progress(4), {}, partial(slow, 4))
        with pytest.raises(TimeoutError):
            second.result(timeout=0.5)
        assert began == [2]
        goes_on.set()
        second.result(timeout=60)
    writer.wait()
    assert began == [2, 4]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_become_no_checkpoint(tmp_path, value):
    writer = Writer(place(tmp_path), 0, 1)
    writer.write(Progress(2), {}, partial(files, 2))
    writer.wait()
    broken = files(4)
    broken["weights.safetensors"][0]["a"][3] = value
    writer.write(Progress(4), {}, lambda: broken)
    with pytest.raises(TrainingError, match=r"weights after step 4 are not finite .*a first"):
        writer.wait()
    assert newest(Shelf(str(tmp_path / "checkpoints"))).progress.step == 2


def test_what_is_written_is_let_go_before_anyone_hears_of_it(tmp_path):
    writer, memory, blocks = Writer(place(tmp_path), 0, 1), HostMemory(torch.device("cpu")), set()
    for step in range(1, 20):
        writer.wait()
        master, weight = memory.copies([torch.full((4,), float(step)), torch.full((8,), float(step))])
        blocks.add(weight.untyped_storage().data_ptr())
        part = {"optimizer/00000-of-00001.safetensors": ({"a:master": master}, {})}
        part["weights.safetensors"] = ({"a": weight}, {})
        writer.write(Progress(step), {}, [part].pop)
        del part, master, weight
    writer.wait()
    assert len(blocks) == 1, "one snapshot's memory is enough"
    written = load_file(tmp_path / "checkpoints" / "step-00000019" / "weights.safetensors")
    assert bool((written["a"] == 19).all())


def test_a_checkpoint_stands_when_every_worker_has_written_its_part_and_the_newest_are_kept(tmp_path):
    writers = [Writer(place(tmp_path), world_rank, 2) for world_rank in range(2)]
    folder = tmp_path / "checkpoints"
    for step in (2, 4, 6):
        writers[0].write(Progress(step, Cursor(1, 2, 3)), {"train/loss": 1.0}, partial(files, step))
        if step == 6:
            writers[0].check()
            assert not (folder / "step-00000006").exists()
        writers[1].write(Progress(step, Cursor(1, 2, 3)), {"train/loss": 1.0}, partial(files, step, 1))
    for writer in writers:
        writer.wait()
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-00000006"]
    found = newest(Shelf(str(folder)))
    assert found.progress == Progress(6, Cursor(1, 2, 3)) and found.num_workers == 2
    path = folder / found.name
    names = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert names == {"contract.json", "manifest.json", *files(6), *files(6, 1)}
    assert float(load_file(path / "weights.safetensors")["a"][0]) == 6.0


def test_the_best_checkpoint_is_kept_beside_the_newest_and_may_be_measured_later(tmp_path):
    writer = Writer(place(tmp_path, keep=1, best="eval/loss"), 0, 1)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None)):
        writer.write(Progress(step), {} if loss is None else {"eval/loss": loss}, partial(files, step))
    writer.wait()
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000004"]
    writer.measure(Progress(4), {"eval/loss": 0.5})
    assert best(Shelf(str(folder)), "eval/loss") == ("step-00000004", 0.5)
    assert [path.name for path in folder.iterdir()] == ["step-00000004"]
    assert newest(Shelf(str(folder))).progress.step == 4
    assert best(Shelf(str(folder)), "train/loss") is None


def test_what_earlier_attempts_left_unfinished_is_cleared_and_never_taken_for_a_part(tmp_path):
    folder = place(tmp_path).home.folder / "checkpoints"
    stale = folder / ".step-00000002.attempt-0.partial"
    stale.mkdir()
    (stale / ".part-attempt-0-00001.json").write_text("{}")
    writer = Writer(place(tmp_path), 0, 2)
    writer.write(Progress(2), {}, partial(files, 2))
    with pytest.raises(TimeoutError):
        writer._pending.result(timeout=0.5)
    Shelf(str(folder)).clear()
    assert list(folder.iterdir()) == [] and newest(Shelf(str(folder))) is None


def test_storage_that_is_gone_for_a_while_costs_no_checkpoint_and_holds_nobody_up(tmp_path):
    writer = Writer(place(tmp_path), 0, 1)
    folder = tmp_path / "checkpoints"
    folder.rename(tmp_path / "unmounted")
    writer.write(Progress(2), {}, partial(files, 2))
    with pytest.raises(TimeoutError):
        writer._pending.result(timeout=1.2)
    writer.check()
    (tmp_path / "unmounted").rename(folder)
    writer.wait()
    assert newest(Shelf(str(folder))).progress.step == 2


@pytest.mark.parametrize("answer", [FileNotFoundError("asked again"), OSError(errno.EIO, "too late")])
def test_a_checkpoint_that_stands_is_no_failure_whatever_comes_after(tmp_path, monkeypatch, answer):
    writer, other = (Writer(place(tmp_path, keep=1), rank, 2) for rank in (0, 1))
    replace, names = os.replace, Shelf.names

    def twice(old, new):
        replace(old, new)
        raise answer

    def unlisted(shelf):
        raise OSError("the listing failed")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda old, new: (twice if Path(old).is_dir() else replace)(old, new))
        patched.setattr(Shelf, "names", unlisted)
        for each in (other, writer):
            each.write(Progress(2), {}, partial(files, 2))
            each.wait()
    assert names(Shelf(str(tmp_path / "checkpoints"))) == ["step-00000002"]
    failed = []

    def read(shelf, name, file):
        if not failed:
            failed.append(name)
            raise OSError("not now")
        return (tmp_path / "checkpoints" / name / file).read_bytes()

    monkeypatch.setattr(Shelf, "read", read)
    writer.measure(Progress(2), {"eval/loss": 0.5})
    assert failed and best(Shelf(str(tmp_path / "checkpoints")), "eval/loss") == ("step-00000002", 0.5)


def test_a_full_disk_is_reported_as_such_at_once_and_the_checkpoint_before_stays(tmp_path):
    writer = Writer(place(tmp_path), 0, 1)
    writer.write(Progress(2), {}, partial(files, 2))
    writer.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file grows beyond this, as on a disk that is full.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        writer.write(Progress(4), {}, lambda: {"weights.safetensors": ({"a": torch.zeros(1 << 20)}, {})})
        with pytest.raises(InfrastructureError, match=r"step 4 could not be written .* Make room") as found:
            writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert found.value.exit_code == 4
    with pytest.raises(InfrastructureError, match="step 4"):
        writer.check()
    assert newest(Shelf(str(tmp_path / "checkpoints"))).progress.step == 2
