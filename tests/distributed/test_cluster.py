"""The Ray that a command starts for itself: what it keeps, and whom it lets in."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.distributed

OWNER = """
import json, os, sys, time
import ray  # before the environment is set, as in a program that uses burnish as a library
from ray.util.state import list_nodes
from ray._raylet import AuthenticationMode, AuthenticationTokenLoader, get_authentication_mode
from burnish.train.cluster import _environment, connected

AUTH = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
before = dict(os.environ)

@ray.remote(num_cpus=0)
def process():
    time.sleep(1)
    return os.getpid()

@ray.remote(num_cpus=0)
def nodes():
    return len(list_nodes())

with connected(0, dashboard=True):
    pids = set(ray.get([process.remote() for _ in range(6)]))
    rows = sorted(row["id"] for row in ray.data.range(8).map(lambda row: row).take_all())
    found = {
        "gcs": ray.get_runtime_context().gcs_address,
        "dashboard": f"http://{ray._private.worker.get_dashboard_url()}",
        "mode": os.environ["RAY_AUTH_MODE"],
        "token": os.environ["RAY_AUTH_TOKEN"],
        "session": ray._private.worker._global_node.get_session_dir_path(),
        "rows": rows,
        "nodes": [len(list_nodes()), ray.get(nodes.remote())],  # ask the dashboard
    }
    time.sleep(5)  # by default Ray ends processes that are idle for a second and more than the CPUs
    found["processes"], found["kept"] = len(pids), sum(os.path.exists(f"/proc/{pid}") for pid in pids)
    print(json.dumps(found), flush=True)
    sys.stdin.readline()

after = dict(os.environ)
loader = AuthenticationTokenLoader.instance()
still = [get_authentication_mode() == AuthenticationMode.TOKEN, loader.has_token(ignore_auth_mode=True)]
found = {"still": still, "changed": sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))}
os.environ["RAY_ADDRESS"] = sys.argv[1]
with connected(0):
    found["joined"] = [ray.get_runtime_context().gcs_address, *map(os.environ.get, AUTH)]
os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "theirs"}
with _environment(own=True):
    found["chosen"] = [*map(os.environ.get, AUTH)]
print(json.dumps(found), flush=True)
"""

CLIENT = """
import sys
from ray._raylet import GcsClient

try:
    client = GcsClient(address=sys.argv[1])
    client.internal_kv_put(b"test", b"in", True, None)
    print("in" if client.internal_kv_get(b"test", None) == b"in" else "odd")
except Exception as error:
    print(type(error).__name__)
"""
"""A client of the protocol that drivers, jobs and workers use."""


@dataclass(frozen=True)
class Seen:
    """What was seen of an embedded Ray while it ran, and in its process after it had ended."""

    inside: dict[str, Any]
    sockets: list[tuple[str, int]]
    told: list[str]
    clients: dict[str, str]
    pages: dict[str, int]
    afterwards: dict[str, Any]
    home: list[Path]


def environment(home: Path, token: str | None = None) -> dict[str, str]:
    """That of a user who knows nothing of tokens, or of one who has this one."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_AUTH", "RAY_ADDRESS"))}
    return plain | {"HOME": str(home)} | ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {})


def page(url: str, token: str | None) -> int:
    """The status of the dashboard's answer to who asks it for its nodes."""
    request = urllib.request.Request(f"{url}/api/v0/nodes", headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def looked_at(owner: psutil.Process, inside: dict[str, Any], home: Path) -> dict[str, Any]:
    """The sockets of a Ray, where its token can be read, and how it answers who has none, another one or its own."""
    listening, told = [], []
    for process in [owner, *owner.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            listening += [each.laddr for each in process.net_connections("inet") if each.status == "LISTEN"]
            told += [line for line in process.cmdline() if inside["token"] in line]
    files = [path for path in Path(inside["session"]).rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 10
    told += [str(path) for path in files if inside["token"].encode() in path.read_bytes()]
    tokens = {"none": None, "another": "0" * 64, "its own": inside["token"]}
    clients = {
        name: subprocess.Popen(
            [sys.executable, "-c", CLIENT, inside["gcs"]], env=environment(home, token), stdout=subprocess.PIPE, text=True
        )
        for name, token in tokens.items()
    }
    return {
        "sockets": [(address.ip.removeprefix("::ffff:"), address.port) for address in listening],
        "told": told,
        "clients": {name: client.communicate(timeout=120)[0].strip() for name, client in clients.items()},
        "pages": {name: page(inside["dashboard"], token) for name, token in tokens.items()},
    }


@pytest.fixture(scope="module")
def seen(cluster: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Seen:
    home = tmp_path_factory.mktemp("home")
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, cluster["gcs"]], env=environment(home), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    line = owner.stdout.readline()
    try:
        assert line, owner.communicate(timeout=120)[1]
        inside = json.loads(line)
        found = looked_at(psutil.Process(owner.pid), inside, home)
    except BaseException:
        owner.kill()
        raise
    out, err = owner.communicate("\n", timeout=120)
    assert owner.returncode == 0, err
    return Seen(inside, **found, afterwards=json.loads(out), home=sorted(home.rglob("*")))


def test_processes_of_data_tasks_are_kept_while_they_are_idle(seen):
    assert seen.inside["processes"] == seen.inside["kept"] > 2


def test_who_has_not_its_token_is_refused_by_an_embedded_ray(seen):
    assert seen.inside["mode"] == "token" and len(seen.inside["token"]) == 64
    assert seen.clients == {"none": "AuthenticationError", "another": "AuthenticationError", "its own": "in"}
    assert seen.pages == {"none": 401, "another": 403, "its own": 200}
    assert seen.told == []


def test_an_embedded_ray_listens_on_the_loopback_address_alone(seen):
    ports = {port for _, port in seen.sockets}
    assert {int(seen.inside[name].rpartition(":")[2]) for name in ("gcs", "dashboard")} <= ports and len(ports) > 5
    assert {ip for ip, _ in seen.sockets} == {"127.0.0.1"}


def test_data_tasks_and_the_state_api_work_under_the_token(seen):
    # The other Ray of this machine, which Ray finds where nobody names one, has three nodes.
    assert (seen.inside["rows"], seen.inside["nodes"]) == (list(range(8)), [1, 1])


def test_an_embedded_ray_leaves_nothing_behind_in_home_or_environment(seen):
    assert (seen.home, seen.afterwards["changed"], seen.afterwards["still"]) == ([], [], [False, False])


def test_who_joins_a_cluster_or_chose_a_mode_gets_no_token(seen, cluster):
    assert seen.afterwards["joined"] == [cluster["gcs"], "disabled", None]
    assert seen.afterwards["chosen"] == ["disabled", "theirs"]
