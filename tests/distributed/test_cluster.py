"""The Ray that a command starts for itself."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.distributed

SCRIPT = """
import os, time, ray
from burnish.train.cluster import connected

@ray.remote(num_cpus=0)
def process():
    time.sleep(1)
    return os.getpid()

with connected(0):
    pids = set(ray.get([process.remote() for _ in range(6)]))
    time.sleep(5)  # by default Ray ends processes that are idle for a second and more than the CPUs
    print(len(pids), sum(os.path.exists(f"/proc/{pid}") for pid in pids))
"""


def test_processes_of_data_tasks_are_kept_while_they_are_idle():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    started, kept = map(int, done.stdout.split())
    assert started == kept > 2
