"""Data nodes that feed training nodes: who runs where, and what a killed task, data node or training node costs."""

import random
import time
from typing import Any

import psutil
import pytest

from burnish.train.ledger import lines
from tests.conftest import Training, nodes_by_role

pytestmark = [pytest.mark.distributed, pytest.mark.soak]


@pytest.fixture
def nodes(ray_folder: None):
    """Two data nodes and two training nodes behind a head that runs no tasks, apart from any other Ray of this process."""
    with nodes_by_role("data", "data", "train", "train") as found:
        yield found


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


def node_of(process: psutil.Process, nodes: tuple[Any, ...]) -> Any:
    """The node whose raylet started a process."""
    above = {each.pid for each in process.parents()}
    return next(node for node in nodes if node.all_processes["raylet"][0].process.pid in above)


def assert_close(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Weights that were added up in another order."""
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert (found[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


def test_data_nodes_feed_training_nodes_and_whoever_goes_loses_nothing(quiet, nodes):
    cluster, (*data, train, other), add, dashboard = nodes
    run = Training(quiet.recipe, "nodes-lost", cluster.address, "checkpoint.every_steps=15", "scale.num_workers=[1,2]")
    rng = random.Random(7)
    run.frozen("_slice_task", rng).kill()
    unfinished = run.frozen("_slice_task", rng)
    cluster.remove_node(node_of(unfinished, tuple(data)), allow_graceful=False)
    unfinished.kill()
    add("train")
    run.wait_until(run.checkpoints)
    cluster.remove_node(train, allow_graceful=False)
    run.wait_until(lambda: len(run.attempts()) == 2)
    # Steps that the first attempt trained and lost stand in the records until the second one has its workers.
    metrics, began = run.folder / "metrics.jsonl", run.attempts()[1]["time"]
    run.wait_until(lambda: [line for line in lines(metrics) if line["step"] >= 22 and line["time"] > began])
    # A node that is announced to go costs no step, and the run goes on with the workers that have places.
    drain(cluster.address, other)
    run.wait_until(lambda: [step for step in run.checkpoints() if step % 15])
    cluster.remove_node(other, allow_graceful=False)
    assert run.wait() == 0, run.said()

    assert "a worker was lost" in run.said() and "a node will be taken away; writing a checkpoint" in run.said()
    starts = run.attempts()
    assert [start["workers"] for start in starts] == [2, 2, 1]
    assert starts[1]["from_step"] >= 15 and starts[1]["from_step"] % 15 == 0 and starts[2]["from_step"] >= 22
    names = ("_slice_task", "_window_task", "_round_task", "RayTrainWorker")
    assert roles_of(dashboard, names) == {**{key: {"data"} for key in names[:3]}, "RayTrainWorker": {"train"}}
    found, wanted = run.ledger(), quiet.ledger()
    same = starts[2]["from_step"]
    assert found[:same] == wanted[:same], "bit for bit with as many workers"
    assert [line["packs"] for line in found] == [line["packs"] for line in wanted]
    # Sums of float32 in another order differ by about 1e-7 after 48 steps, resumed or not (losses and weights alike).
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in wanted], rel=1e-5)
    assert_close(run.weights(), quiet.weights())


def test_adapters_go_on_with_fewer_workers_and_with_more_in_the_same_steps(quiet, nodes):
    cluster, (*_, other), add, _ = nodes
    lora = ("lora={rank: 4, dropout: 0.1}", "engine.zero_stage=auto", "train.epochs=8")
    whole = Training(quiet.recipe, "adapters-quiet", cluster.address, *lora)
    assert whole.wait() == 0, whole.said()

    run = Training(quiet.recipe, "adapters-elastic", cluster.address, *lora, "scale.num_workers=[1,2]")
    run.wait_until(run.checkpoints)
    cluster.remove_node(other, allow_graceful=False)
    metrics = run.folder / "metrics.jsonl"

    def trained_by(attempt: int) -> list[int]:
        """The steps of checkpoints that stand since this attempt has trained."""
        starts = run.attempts()
        if len(starts) < attempt:
            return []
        began = starts[attempt - 1]
        own = [line["step"] for line in lines(metrics) if line["time"] > began["time"]]
        return [step for step in run.checkpoints() if own and began["from_step"] < step <= max(own)]

    run.wait_until(lambda: trained_by(2))
    add("train")
    for worker in run.workers(1):
        worker.kill()
    assert run.wait() == 0, run.said()

    starts = run.attempts()
    assert [start["workers"] for start in starts] == [2, 1, 2]
    assert 0 < starts[1]["from_step"] < starts[2]["from_step"] < len(whole.ledger())
    found, wanted = run.ledger(), whole.ledger()
    assert [line["packs"] for line in found] == [line["packs"] for line in wanted]
    assert [line["trained_tokens"] for line in found] == [line["trained_tokens"] for line in wanted]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in wanted], rel=1e-5)
    assert_close(run.weights(), whole.weights())
