"""A Ray cluster of several nodes on this machine, to try what needs more than one: jobs, placement, lost nodes.

    python cluster/local.py --nodes 3

The first node is the head and runs no tasks; the second has the label of data nodes, the others that of training
nodes. Ctrl-C, or SIGTERM, ends every node.
"""

import argparse
import os
import secrets
import signal
import sys
import tempfile
from pathlib import Path
from queue import SimpleQueue

# Ray reads these when it is imported. It listens on this machine's own address, where without a token every
# neighbour could run code; a token of this process alone leaves no file that later clusters would find.
if "RAY_AUTH_MODE" not in os.environ:
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
# The `python` of a job is the one that has Ray.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

from ray._private.utils import write_ray_address
from ray.cluster_utils import Cluster

LOOPBACK = "127.0.0.1"
MEMORY = 200 << 20
"""Bytes of each node's object store, which all share this machine's memory."""


def start(nodes: int, cpus: int, dashboard: int, folder: str) -> Cluster:
    """A cluster whose nodes have all joined; `folder` is short, because Unix sockets lie in it."""
    # Ray keeps what no node's own folder has under this one, and does not make it.
    # Data tasks find their processes again (train/cluster.py:KEEP_IDLE).
    os.environ |= {"RAY_TMPDIR": folder, "RAY_idle_worker_killing_time_threshold_ms": "600000"}
    Path(folder, "ray").mkdir()
    # Ray's own default of an agent's port collides where another Ray runs; with 0 each process takes a free one itself.
    head = {
        "num_cpus": 0, "object_store_memory": MEMORY, "temp_dir": folder, "include_dashboard": True,
        "dashboard_host": LOOPBACK, "dashboard_port": dashboard, "dashboard_agent_listen_port": 0,
    }  # fmt: skip
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for number in range(1, nodes):
            role = {"node-role": "data" if number == 1 else "train"}
            cluster.add_node(num_cpus=cpus, labels=role, object_store_memory=MEMORY)
        cluster.wait_for_nodes()
        # A job looks for its cluster in this file; without it, it joins any Ray that it finds on the machine.
        write_ray_address(cluster.address, folder)
    except BaseException:
        cluster.shutdown()
        raise
    return cluster


def main() -> int:
    """Starts the cluster, says how to use it, and waits for the signal that ends it."""
    parser = argparse.ArgumentParser(description="A Ray cluster of several nodes on this machine.")
    parser.add_argument("--nodes", type=int, default=3, help="nodes with the head; at least 2 (default 3)")
    parser.add_argument("--cpus", type=int, default=2, help="logical CPUs of each worker node (default 2)")
    parser.add_argument("--dashboard-port", type=int, default=8265)
    arguments = parser.parse_args()
    if arguments.nodes < 2 or arguments.cpus < 1:
        parser.error("a cluster needs 2 nodes, since the head runs no tasks, and 1 CPU on each")

    # Not an Event: a handler that sets one which this thread is about to wait for can wait for its lock forever.
    signals: SimpleQueue[int] = SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="burnish-", ignore_cleanup_errors=True) as folder:
        cluster = start(arguments.nodes, arguments.cpus, arguments.dashboard_port, folder)
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda signum, _: signals.put(signum))
            url = f"http://{LOOPBACK}:{arguments.dashboard_port}"
            # A job runs in a folder of its own, without what git ignores: the model that `make demo` makes stays here.
            here = Path.cwd()
            kept = f"model.path={here}/runs/quickstart-base checkpoint.storage={here}/runs tracking.uri=null"
            submit = f"--runtime-env jobs/runtime_env.yaml -- python jobs/train.py jobs/recipes/quickstart.yaml {kept}"
            if token := os.environ.get("RAY_AUTH_TOKEN"):
                print(f"Token      export RAY_AUTH_MODE=token RAY_AUTH_TOKEN={token}")
            print(f"Cluster    export RAY_ADDRESS={cluster.address}  ({arguments.nodes} nodes, head without tasks)")
            print(f"Dashboard  {url}")
            print(f"Submit     ray job submit --address {url} {submit}")
            print("End        Ctrl-C", flush=True)
            signals.get()
        finally:
            cluster.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
