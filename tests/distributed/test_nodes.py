"""Data nodes that feed training nodes: who runs where, and what a killed task, data node or training node costs."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from burnish.train.ledger import lines
from tests.conftest import conversation, nodes_by_role, processes_below, write_model, write_rows

pytestmark = pytest.mark.distributed

DEADLINE_SECONDS = 240


@pytest.fixture
def nodes(ray_folder: None):
    """Two data nodes and two training nodes behind a head that runs no tasks, apart from any other Ray of this process."""
    with nodes_by_role("data", "data", "train", "train") as found:
        yield found


def recipe_of(folder: Path, rows: int, **more: str) -> Path:
    write_model(folder / "model")
    path = write_rows(folder / "rows.jsonl", [conversation(i, 1 + i % 3) for i in range(rows)])
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"""
name: apart
model: {{path: {folder / "model"}, dtype: float32}}
lora: null
data: {{train: [{{path: {path}}}], max_length: 160, window_rows: 32}}
optim: {{learning_rate: 1e-3, warmup_steps: 2}}
train: {{global_batch_size: 4, epochs: 3}}
engine: {{zero_stage: 0}}
scale: {{num_workers: 2, use_gpu: false}}
checkpoint: {{every_steps: 5, storage: {folder / "runs"}}}
tracking: {{uri: null}}
"""
    )
    return recipe


def start(recipe: Path, name: str, address: str | None, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "burnish.cli", "train", str(recipe), f"name={name}", *overrides]
    environment = {**os.environ, **({"RAY_ADDRESS": address} if address else {})}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def ledger(recipe: Path, name: str) -> list:
    return list(lines(recipe.parent / "runs" / name / "ledger.jsonl"))


def roles_of(dashboard: str, names: tuple[str, ...]) -> dict[str, set[str]]:
    """The roles of the nodes on which tasks and actors of these names ran."""
    from ray.util.state import list_actors, list_nodes, list_tasks

    role = {node.node_id: node.labels.get("node-role", "head") for node in list_nodes(address=dashboard, detail=True)}
    ran = [
        *list_tasks(address=dashboard, detail=True, limit=10_000),
        *list_actors(address=dashboard, detail=True, limit=10_000),
    ]
    found: dict[str, set[str]] = {name: set() for name in names}
    for each in ran:
        for name in names:
            if each.node_id and name in str(getattr(each, "class_name", None) or each.name):
                found[name].add(role[each.node_id])
    return found


def drain(address: str, node: Any) -> None:
    """Announces to the cluster that a node is taken away in a while, as a cloud does before it reclaims a spot machine."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = GcsClient(address=address).drain_node(
        node.node_id, reason, "reclaimed", int(time.time() * 1000) + 120_000
    )
    assert accepted, why


def wait_for_step(recipe: Path, name: str, step: int, process: subprocess.Popen) -> None:
    """Returns once the run has trained this many steps."""
    wait_until(lambda: len(ledger(recipe, name)) >= step, process)


def wait_until(done: Callable[[], object], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not done():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.02)


def kill_a_task(name: str, process: subprocess.Popen) -> None:
    """Kills the process in which a task of this name runs, below the nodes that this test started."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        for each in processes_below(os.getpid(), name):
            each.kill()
            return
    raise AssertionError(f"no task {name} ran: {process.stderr.read()}")


def test_data_nodes_feed_training_nodes_and_whoever_is_killed_loses_nothing(nodes, tmp_path):
    cluster, (data, _, train, other), add, dashboard = nodes
    recipe = recipe_of(tmp_path, 96)
    calm = start(recipe, "calm", cluster.address)
    assert calm.wait(DEADLINE_SECONDS) == 0, calm.stderr.read()
    names = ("_slice_task", "_window_task", "_round_task", "RayTrainWorker")
    assert roles_of(dashboard, names) == {**{key: {"data"} for key in names[:3]}, "RayTrainWorker": {"train"}}

    killed = start(recipe, "killed", cluster.address)
    kill_a_task("_slice_task", killed)
    wait_for_step(recipe, "killed", 3, killed)
    cluster.remove_node(data, allow_graceful=False)
    wait_for_step(recipe, "killed", 12, killed)
    cluster.remove_node(train, allow_graceful=False)
    add("train")
    assert killed.wait(DEADLINE_SECONDS) == 0, killed.stderr.read()
    assert "a worker was lost" in killed.stderr.read()
    assert len(ledger(recipe, "calm")) > 20
    assert ledger(recipe, "killed") == ledger(recipe, "calm")

    # A node that is announced to go costs no step, and the run goes on with the workers that have places.
    announced = start(recipe, "announced", cluster.address, "checkpoint.every_steps=null", "scale.num_workers=[1,2]")
    wait_for_step(recipe, "announced", 5, announced)
    drain(cluster.address, other)
    folder = recipe.parent / "runs" / "announced"
    wait_until(lambda: list((folder / "checkpoints").glob("step-*")), announced)
    cluster.remove_node(other, allow_graceful=False)
    assert announced.wait(DEADLINE_SECONDS) == 0, announced.stderr.read()
    assert "a node will be taken away; writing a checkpoint" in announced.stderr.read()
    starts = [line for line in lines(folder / "attempts.jsonl") if line["event"] == "start"]
    assert [line["workers"] for line in starts][:2] == [2, 1] and starts[1]["from_step"] >= 5
    found, wanted = ledger(recipe, "announced"), ledger(recipe, "calm")
    assert [line["packs"] for line in found] == [line["packs"] for line in wanted]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in wanted], rel=1e-4)
