"""A run that lives on a real S3 server: records are brought over, checkpoints are whole or absent, one command trains."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from tenacity import wait_none

from burnish import storage
from burnish.data import files
from burnish.data.order import Cursor
from burnish.errors import InfrastructureError, RecipeError
from burnish.train import claim
from burnish.train import home as homes
from burnish.train.attempt import Progress
from burnish.train.checkpoint import best, newest, verify
from burnish.train.home import Home
from burnish.train.shelf import MANIFEST, Shelf
from burnish.train.writer import Place, Writer
from tests.conftest import free_port


@pytest.fixture
def place(s3, request):
    """A place of this test's own."""
    return f"s3://bucket/runs/{request.node.name.partition('[')[0].replace('_', '-')[:40]}?region=us-east-1"


@pytest.fixture
def home(place, monkeypatch, tmp_path):
    """Makes homes of this place as other processes on other machines would have them."""
    made = []

    def make() -> Home:
        monkeypatch.setattr(homes, "working_folder", lambda run: tmp_path / f"machine-{len(made)}")
        made.append(Home.at(place))
        return made[-1].arrive()

    return make


def test_records_that_change_are_brought_over_and_those_that_go_are_taken_away(home):
    driver, worker = home(), home()
    (driver.folder / "contract.json").write_text("{}")
    (driver.folder / ".lock").write_text("")
    (driver.folder / "STOP").write_text("")
    (driver.folder / "checkpoints" / "large").write_text("stays here")
    driver.keep()
    worker.look()
    assert sorted(path.name for path in worker.folder.iterdir()) == ["STOP", "checkpoints", "contract.json"]
    assert list((worker.folder / "checkpoints").iterdir()) == []
    (worker.folder / "ledger.jsonl").write_text("1\n")
    worker.keep()
    driver.look("ledger.jsonl")
    assert (driver.folder / "ledger.jsonl").read_text() == "1\n"
    (worker.folder / "ledger.jsonl").write_text("2\n")  # as long as before
    worker.keep()
    driver.look()
    assert (driver.folder / "ledger.jsonl").read_text() == "2\n"
    (driver.folder / "STOP").unlink()
    (driver.folder / "contract.json").write_text('{"newer": 1}')
    driver.look()
    assert not (driver.folder / "STOP").exists(), "what was removed here does not come back"
    assert (driver.folder / "contract.json").read_text() == '{"newer": 1}', "nor does what was there before a change"
    driver.keep()
    worker.look("STOP")
    assert not (worker.folder / "STOP").exists() and (worker.folder / "contract.json").exists()


def test_an_earlier_process_leaves_nothing_that_would_be_kept(home):
    first = home()
    (first.folder / "ledger.jsonl").write_text("of a run that was deleted\n")
    first.arrive()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = first.folder.parent / f"{socket.gethostname()}-{ended.pid}" / "checkpoints"
    left.mkdir(parents=True)
    first.arrive()
    assert [path.name for path in first.folder.iterdir()] == ["checkpoints"]
    assert [path.name for path in first.folder.parent.iterdir()] == [first.folder.name]


def test_a_courier_brings_news_both_ways_and_an_outage_costs_only_news(home, monkeypatch, caplog):
    monkeypatch.setattr(homes, "COURIER_SECONDS", 0.05)
    driver, worker = home(), home()
    out, back = threading.Event(), threading.Event()
    real = files.filesystem

    def filesystem(path):
        if out.is_set():
            back.set()
            raise OSError("the network is down")
        return real(path)

    with driver.courier("metrics.jsonl"), worker.courier("STOP"):
        (worker.folder / "metrics.jsonl").write_text("1\n")
        (driver.folder / "STOP").touch()
        while not ((driver.folder / "metrics.jsonl").exists() and (worker.folder / "STOP").exists()):
            pass  # the timeout of the test ends this where news do not come
        monkeypatch.setattr(files, "filesystem", filesystem)
        out.set()
        assert back.wait(60)
        (worker.folder / "metrics.jsonl").write_text("1\n2\n")
        out.clear()
    later = home()
    assert (later.folder / "metrics.jsonl").read_text() == "1\n2\n"
    assert "cannot be reached: the network is down" in caplog.text


def files_of(value, world_rank=0):
    part = {f"optimizer/{world_rank:05d}-of-00002.safetensors": ({"a:master": torch.full((4,), float(value))}, {})}
    weights = {"weights.safetensors": ({"a": torch.full((8,), float(value))}, {"chat_contract": "x"})}
    return {**part, **(weights if world_rank == 0 else {})}


def write(workers, step, metrics=None, keep=2, attempt="attempt-1"):
    """A checkpoint of two workers on two machines."""
    (workers[0].folder / "contract.json").write_text("{}")
    writers = [Writer(Place(each, attempt, keep, "eval/loss", "x"), rank, 2) for rank, each in enumerate(workers)]
    for rank, writer in enumerate(writers):
        writer.write(Progress(step, Cursor(1, 2, 3)), metrics or {}, partial(files_of, step, rank))
    for writer in writers:
        writer.wait()
    return writers


def test_workers_that_share_no_disk_write_one_checkpoint_and_others_read_it(home, tmp_path):
    workers = [home(), home()]
    (workers[0].folder / "ledger.jsonl").write_text("1\n")
    for step, loss in ((2, 3.0), (4, 1.0), (6, 2.0), (8, 2.0)):
        writers = write(workers, step, {"eval/loss": loss})
    other = home()
    assert (other.folder / "ledger.jsonl").read_text() == "1\n", "records of the steps before stand with the checkpoint"
    shelf = other.shelf()
    assert shelf.names() == ["step-00000004", "step-00000006", "step-00000008"], "the newest two and the best"
    found = newest(shelf)
    assert found.progress == Progress(8, Cursor(1, 2, 3)) and found.num_workers == 2
    assert found.path.endswith("/checkpoints/step-00000008?region=us-east-1")
    assert set(shelf.files(found.name)) == {"contract.json", MANIFEST, *files_of(8), *files_of(8, 1)}
    with shelf.fetched(found.name, tmp_path / "scratch") as folder:
        assert float(load_file(folder / "weights.safetensors")["a"][0]) == 8.0
        assert float(load_file(folder / "optimizer/00001-of-00002.safetensors")["a:master"][0]) == 8.0
    assert not (tmp_path / "scratch").exists()
    shelf.write(found.name, "weights.safetensors", b"other weights")  # since it was verified
    with pytest.raises(InfrastructureError, match=r"weights.safetensors is not what its manifest says"):
        shelf.fetched(found.name, tmp_path / "scratch").__enter__()
    write(workers, 8, {"eval/loss": 2.0})
    assert all(list((each.folder / "checkpoints").iterdir()) == [] for each in workers), "nothing stays on the machines"
    assert best(shelf, "eval/loss") == ("step-00000004", 1.0)
    writers[0].measure(Progress(8), {"eval/loss": 0.5})
    assert best(shelf, "eval/loss") == ("step-00000008", 0.5)
    assert shelf.names() == ["step-00000006", "step-00000008"] and newest(shelf).progress.step == 8


def test_a_checkpoint_is_fetched_though_the_place_fails_for_a_while(home, monkeypatch, tmp_path):
    write([home(), home()], 2)
    shelf, real, failed = home().shelf(), Shelf._download, []

    def fails_once(shelf, name, file, entry, target):
        if file not in failed:
            failed.append(file)
            raise OSError("AWS Error NETWORK_CONNECTION")
        return real(shelf, name, file, entry, target)

    monkeypatch.setattr(storage, "wait_exponential", lambda **_: wait_none())
    monkeypatch.setattr(Shelf, "_download", fails_once)
    with shelf.fetched("step-00000002", tmp_path / "scratch") as folder:
        assert set(failed) == {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert (folder / "weights.safetensors").read_bytes() == shelf.read("step-00000002", "weights.safetensors")


@pytest.mark.parametrize("damage", ["changed", "missing", "torn manifest", "not named", "outside"])
def test_a_broken_checkpoint_is_set_aside_and_the_one_before_is_used(home, s3, damage):
    workers = [home(), home()]
    write(workers, 2), write(workers, 4)
    shelf = home().shelf()
    part, manifest = "optimizer/00001-of-00002.safetensors", json.loads(shelf.read("step-00000004", MANIFEST))
    system, base = files.filesystem(shelf.place)
    if damage == "changed":
        data = shelf.read("step-00000004", part)
        shelf.write("step-00000004", part, data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "missing":
        system.delete_file(f"{base}/step-00000004/{part}")
    elif damage == "torn manifest":
        shelf.write("step-00000004", MANIFEST, json.dumps(manifest).encode()[:-9])
    elif damage == "not named":
        shelf.write("step-00000004", "optimizer/00002-of-00003.safetensors", b"stale")
    else:
        manifest["files"]["../step-00000002/contract.json"] = manifest["files"]["contract.json"]
        shelf.write("step-00000004", MANIFEST, json.dumps(manifest).encode())
    assert verify(shelf, "step-00000004") is None
    assert newest(shelf).progress.step == 2 and shelf.names() == ["step-00000002"]
    shelf.clear()
    assert "weights.safetensors" in shelf.files("step-00000004"), "what was set aside is kept to be looked at"
    write(workers, 4, attempt="attempt-2")
    assert newest(shelf).progress.step == 4 and "broken-manifest.json" not in shelf.files("step-00000004")


def test_what_has_no_manifest_is_no_checkpoint_and_goes(home):
    workers = [home(), home()]
    write(workers, 2)
    Writer(Place(workers[0], "attempt-1", 2, None, "x"), 0, 2)._write_part(4, files_of(4))  # and then it was killed
    shelf = home().shelf()
    assert shelf.names() == ["step-00000002"] and shelf.files("step-00000004")
    shelf.clear()
    assert not shelf.files("step-00000004") and newest(shelf).progress.step == 2


def test_a_server_out_of_reach_is_no_missing_checkpoint(home, monkeypatch):
    write([home(), home()], 2)
    shelf = home().shelf()
    real = files.filesystem
    monkeypatch.setattr(files, "filesystem", lambda path: (_Broken(real(path)[0]), real(path)[1]))
    with pytest.raises(InfrastructureError, match=r"cannot be read: the network is down"):
        newest(shelf)
    monkeypatch.setattr(files, "filesystem", real)
    assert newest(shelf).progress.step == 2


def put(system, path, data: bytes) -> None:
    with system.open_output_stream(path, compression=None) as file:
        file.write(data)


class _Broken:
    """A file system that lists and reads nothing but manifests, as where the network goes down in between."""

    def __init__(self, system):
        self._system = system

    def __getattr__(self, name):
        return getattr(self._system, name)

    def open_input_stream(self, path, **options):
        if not path.endswith(MANIFEST):
            raise OSError("the network is down")
        return self._system.open_input_stream(path, **options)


def test_one_command_trains_at_a_place(home, place, monkeypatch):
    monkeypatch.setattr(claim, "LEASE_SECONDS", 6.0)
    with home().claimed() as first:
        (first.folder / "recipe.yaml").write_text("name: x")
        with pytest.raises(RecipeError, match=rf"process {os.getpid()} on .* trains the run"), home().claimed():
            pass
    with home().claimed() as second:
        assert (second.folder / "recipe.yaml").read_text() == "name: x"
    assert not second.folder.exists(), "nothing stays on the machine"


def test_of_commands_that_claim_a_place_in_the_same_moment_one_trains(place, monkeypatch):
    monkeypatch.setattr(claim, "SETTLE_SECONDS", 6.0)
    begun, ends, refused, trains = threading.Barrier(4), threading.Event(), [], []

    def command() -> None:
        begun.wait()
        try:
            with claim.claimed(place):
                trains.append(1)
                assert ends.wait(120)
        except RecipeError as error:
            refused.append(str(error))
            if len(refused) == 3:
                ends.set()

    commands = [threading.Thread(target=command) for _ in range(4)]
    for each in commands:
        each.start()
    for each in commands:
        each.join()
    assert trains == [1] and len(refused) == 3
    assert all(f"process {os.getpid()} on {socket.gethostname()} trains the run" in why for why in refused)


def test_a_claim_that_cannot_be_read_is_somebodys(home, monkeypatch, caplog):
    monkeypatch.setattr(claim, "LEASE_SECONDS", 3.0)
    system, base = files.filesystem(home().place)
    for nonsense in (b"", b"not json", b"[1]"):
        put(system, f"{base}/{claim.CLAIM}", nonsense)
        with home().claimed():
            assert "process ? on an unknown machine was training" in caplog.text
        caplog.clear()


def test_of_two_commands_that_claimed_a_place_one_stops(home, monkeypatch, caplog):
    monkeypatch.setattr(claim, "LEASE_SECONDS", 3.0)
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        with home().claimed():
            system, base = files.filesystem(home().place)
            other = json.dumps({"host": "another-machine", "process": 1, "command": "x", "renewed": "y"}).encode()
            while not asked.is_set():  # a renewal at the same moment would overwrite it, as the other one's next would this
                put(system, f"{base}/{claim.CLAIM}", other)
                asked.wait(2)
        assert "process 1 on another-machine trains at" in caplog.text
        with system.open_input_stream(f"{base}/{claim.CLAIM}") as stream:
            assert stream.read() == other, "the claim of the other one stands"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_command_that_died_holds_nobody_up_for_long(home, monkeypatch, caplog):
    monkeypatch.setattr(claim, "LEASE_SECONDS", 3.0)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = {"host": socket.gethostname(), "process": ended.pid}
    system, base = files.filesystem(home().place)
    put(system, f"{base}/{claim.CLAIM}", json.dumps(left).encode())
    with home().claimed():
        assert "surely gone" not in caplog.text
    put(system, f"{base}/{claim.CLAIM}", json.dumps({"host": "another-machine", "process": 1}).encode())
    with home().claimed():
        assert "process 1 on another-machine was training" in caplog.text


def test_a_place_that_cannot_be_reached_is_said_so(s3):
    port = free_port()
    gone = f"s3://bucket/runs/x?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:{port}"
    with pytest.raises(
        InfrastructureError, match=r"checkpoint.storage: s3://bucket/runs/x.* cannot be reached: .*credentials"
    ):
        Home.at(gone).arrive()
    with pytest.raises(RecipeError, match=r"checkpoint.storage: nosuch://bucket/runs/x: .*nosuch"):
        Home.at("nosuch://bucket/runs/x").arrive()


def test_storage_that_would_lose_the_run_or_tell_a_secret_is_refused(make_recipe):
    with pytest.raises(RecipeError, match=r"storage: memory://runs is gone with its process"):
        make_recipe(checkpoint={"storage": "memory://runs"})
    for unsafe in ("s3://key:hush@bucket/runs", "s3://bucket/runs?secret_key=hush"):
        with pytest.raises(RecipeError, match=r"storage: holds credentials") as error:
            make_recipe(checkpoint={"storage": unsafe})
        assert "hush" not in str(error.value)


def test_paths_below_a_place_keep_its_options(make_recipe):
    recipe = make_recipe(checkpoint={"storage": "s3://bucket/runs?region=us-east-1"})
    assert recipe.run_place() == "s3://bucket/runs/small?region=us-east-1"
    assert recipe.cache_folder() == "s3://bucket/runs/.cache?region=us-east-1"
    assert recipe.located().checkpoint.storage == recipe.checkpoint.storage
    assert make_recipe(checkpoint={"storage": "file:///shared/runs"}).run_place() == "/shared/runs/small"
