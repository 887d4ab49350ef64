"""A worker that hangs is ended after it wrote down where it stands; one that waits for data or has ended is left alone."""

import json
import subprocess
import sys
import textwrap

from burnish.train.ledger import lines
from burnish.train.watchdog import EXIT_CODE, hang

BEGIN = """
import sys, time
from pathlib import Path
from burnish.train.home import Home
from burnish.train.watchdog import Watchdog
dog = Watchdog(Home(Path(sys.argv[1])), 1, 0.5)
dog.beat()
"""


def run(folder, code):
    program = BEGIN + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=60)


def test_a_hang_is_ended_and_named(tmp_path):
    assert run(tmp_path, "def stuck():\n    time.sleep(60)\nstuck()").returncode == EXIT_CODE
    (tmp_path / ".hang-00000.json").write_text(
        json.dumps({"world_rank": 0, "node": "n", "seconds": 0.5, "waits": True, "at": "loop.py:1 in f"}) + "\n"
    )
    said = hang(tmp_path, 2)
    assert "worker 1 on" in said and "in stuck" in said and "worker 0" not in said and "scale.stall_seconds" in said
    assert hang(tmp_path, 2) is None


def test_a_worker_that_reads_what_all_computed_waits_for_the_others(tmp_path):
    code = """
    dog.rest()
    from burnish.train import step
    step.dist.all_reduce = lambda shared: None
    class Shared:
        def tolist(self):
            time.sleep(60)  # as numbers of a GPU do that is not done
    def train():
        step.summed(Shared())
    dog.beat()
    train()
    """
    assert run(tmp_path, code).returncode == EXIT_CODE
    (note,) = lines(tmp_path / ".hang-00001.json")
    assert note["waits"], note


def test_a_storage_that_hangs_keeps_no_worker(tmp_path):
    code = """
    from burnish.train import watchdog
    watchdog._NOTE_SECONDS = 0.1
    Home.keep = lambda home: time.sleep(60)
    time.sleep(60)
    """
    assert run(tmp_path, code).returncode == EXIT_CODE


def test_a_worker_that_cannot_even_write_is_named_by_those_that_wait_for_it(tmp_path):
    for world_rank in (0, 2):
        note = {"world_rank": world_rank, "node": "n", "seconds": 9, "waits": True, "at": "loop.py:1 in f"}
        (tmp_path / f".hang-{world_rank:05d}.json").write_text(json.dumps(note) + "\n")
    assert hang(tmp_path, 3).endswith("worker 1 said nothing, so its process hangs as a whole")


def test_a_wait_for_a_storage_is_no_hang_and_wakes_no_dog_that_rests(tmp_path):
    code = """
    for _ in range(12):
        time.sleep(0.1)
        dog.alive()
    dog.rest()
    dog.alive()
    time.sleep(1.2)
    """
    assert run(tmp_path, code).returncode == 0


def test_beats_data_waits_and_the_end_are_no_hang(tmp_path):
    code = """
    def items():
        for i in range(2):
            time.sleep(1.2)
            yield i
    for _ in dog.patient(items()):
        for _ in range(8):
            time.sleep(0.15)
            dog.beat()
    time.sleep(1.2)
    """
    done = run(tmp_path, code)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
