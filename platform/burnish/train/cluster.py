"""The Ray that a command runs on: the cluster it belongs to, or an embedded one of its own."""

import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.data
from ray._private import ray_constants
from ray._private.authentication.authentication_token_setup import AuthenticationTokenLoader, Config

from burnish.config import Recipe
from burnish.errors import BurnishError, InfrastructureError, RecipeError

DATA_CPUS = 2
"""Logical CPUs that an embedded Ray has beyond those of the training workers, for data tasks."""
ROLE = "node-role"
"""Label of nodes: `data` for those that render and pack, `train` for those that train (k8s/, cluster/)."""
LOOPBACK = "127.0.0.1"
WIDTH_SECONDS = 300.0
"""How long a run waits for its fewest workers after nodes were lost."""
ANSWER_SECONDS = 2.0
"""Within which a node that lives takes a connection."""
KEEP_IDLE = ("RAY_idle_worker_killing_time_threshold_ms", "600000")
"""What a node for data has in its environment. Light data tasks make more processes than there are CPUs; by default Ray ends
those idle for a second, and the next task waits for a new one, which loads the tokenizer again."""


@contextmanager
def connected(num_workers: int, dashboard: bool = False) -> Iterator[None]:
    """Ray, for as long as the block runs: the one already joined, the one of RAY_ADDRESS or of this job, or an own one.

    A sweep needs the `dashboard`: through it Ray frees the places of a trial that was ended early.
    An own one has logical CPUs enough for the workers and for data tasks, whatever cores there are, listens on the loopback
    address, and asks for a token of its own unless RAY_AUTH_MODE is set.
    Raises InfrastructureError where the cluster of RAY_ADDRESS cannot be reached. An error of burnish that was raised in a
    data task leaves the block as itself, without Ray's traceback around it.
    """
    try:
        with _joined(num_workers, dashboard):
            yield
    except ray.exceptions.RayTaskError as error:
        if not isinstance(error.cause, BurnishError):
            raise
        # Ray Data writes advice on its own retries behind the message.
        raise type(error.cause)(str(error.cause).partition("\nFailed to apply UDF")[0]) from None


@contextmanager
def _joined(num_workers: int, dashboard: bool) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    port = _free_port() if dashboard and not address else None
    with _environment(own=not address, dashboard_port=port):
        try:
            if address:
                ray.init(address=address, **options)
            else:
                options |= {"dashboard_host": LOOPBACK, "dashboard_port": port, "include_dashboard": dashboard}
                with _loopback():
                    ray.init(address="local", num_cpus=num_workers + DATA_CPUS, **options)
        except Exception as error:  # Ray raises a bare one where a node does not start in time
            where = f"the Ray cluster at RAY_ADDRESS={address}" if address else "an embedded Ray"
            raise InfrastructureError(f"{where} could not be joined: {error}") from error
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _environment(own: bool, dashboard_port: int | None = None) -> Iterator[None]:
    """What Ray needs in the environment for as long as the block runs; of Ray's, it is as before afterwards.

    An `own` Ray asks for a token that only its processes know, unless RAY_AUTH_MODE is set. Left to itself, Ray writes one
    into the home folder, where later clusters of this user find it.
    """
    before = {key: value for key, value in os.environ.items() if key.startswith("RAY_")}
    if own and "RAY_AUTH_MODE" not in before:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    if dashboard_port is not None:
        # Ray Train asks the first dashboard that it finds whether a trial lives, and takes no from that of another Ray.
        os.environ["RAY_API_SERVER_ADDRESS"] = f"http://{LOOPBACK}:{dashboard_port}"
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault(*KEEP_IDLE)
    try:
        _read_environment()
        yield
    finally:
        for key in [key for key in os.environ if key.startswith("RAY_")]:
            del os.environ[key]
        os.environ |= before
        _read_environment()


def _read_environment() -> None:
    """Has this process's Ray read the environment again; it keeps what it read when it was imported or last connected."""
    Config.initialize("")
    # The token last: a thread of Ray that has not ended yet would ask for one while the mode says so, and abort without.
    AuthenticationTokenLoader.instance().reset_cache()


def _free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as found:
        found.bind((LOOPBACK, 0))
        port: int = found.getsockname()[1]
        return port


@contextmanager
def _loopback() -> Iterator[None]:
    """A Ray that starts in the block listens on the loopback address alone, as it does by itself on macOS.

    `ray.init(_node_ip_address="127.0.0.1")` is no way to it, since Ray takes the machine's own address for that.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def check_resources(recipe: Recipe) -> bool:
    """Whether the recipe trains on GPUs here; raises RecipeError where its workers can never all be placed.

    A node that an autoscaler has not started yet is not counted against the recipe: the check holds for clusters
    without one.
    """
    total = ray.cluster_resources()
    gpus, workers = total.get("GPU", 0.0), recipe.widths()[-1]
    cuda = gpus > 0 if recipe.scale.use_gpu == "auto" else recipe.scale.use_gpu
    if os.environ.get("RAY_CLUSTER_AUTOSCALES"):
        return cuda
    kind = "GPU" if cuda else "CPU"
    places, data = _places(_nodes("train", recipe), kind), _places(_nodes("data", recipe), "CPU")
    # A data task needs a CPU that no training worker holds, or the stream waits for ever.
    apart = role_labels(recipe, "data") is not None
    needed = workers if cuda or apart else workers + 1
    if apart and data == 0:
        raise RecipeError(
            f"scale.placement: no node labelled {ROLE}: data has a CPU; add one, or write scale.placement: any"
        )
    if places < needed:
        more = "" if cuda or apart else " and one more for data"
        where = f"its nodes labelled {ROLE}: train have" if apart else "this cluster has"
        raise RecipeError(
            f"scale.num_workers: {workers} workers need {workers} {kind}s{more}; {where} {places}. "
            f"Write scale.num_workers: {max(1, places - (needed - workers))} or less, or add nodes"
        )
    return cuda


def width(recipe: Recipe, cuda: bool) -> int:
    """How many workers start now: the most of the recipe's numbers that have places on nodes that live and stay.

    Raises InfrastructureError where the fewest find no place for `WIDTH_SECONDS`. A recipe with one number gets it, and Ray
    waits for the places; so does a cluster that brings nodes up by itself.
    """
    widths = recipe.widths()
    if len(widths) == 1 or os.environ.get("RAY_CLUSTER_AUTOSCALES"):
        return widths[0]
    deadline = time.monotonic() + WIDTH_SECONDS
    apart = cuda or role_labels(recipe, "data") is not None
    while True:
        answering = [node for node in _nodes("train", recipe) if _answers(node)]
        places = _places(answering, "GPU" if cuda else "CPU") - (0 if apart else 1)
        fitting = [number for number in widths if number <= places]
        if fitting:
            return fitting[0]
        if time.monotonic() > deadline:
            raise InfrastructureError(
                f"scale.num_workers: the cluster has places for {places} workers and the recipe asks for {widths[-1]} at "
                "least; the same command goes on when nodes are back"
            )
        time.sleep(1)


def draining() -> set[str]:
    """Ids of nodes that are about to be taken away."""
    return set(ray._private.state.state.get_draining_nodes() or {})


def role_labels(recipe: Recipe, role: str) -> dict[str, str] | None:
    """The labels of the nodes that a role ("data" or "train") is bound to; None where it may run on any node."""
    alive = {node["Labels"].get(ROLE) for node in ray.nodes() if node["Alive"]}
    bound = recipe.scale.placement == "by_role" or (recipe.scale.placement == "auto" and {"data", "train"} <= alive)
    return {ROLE: role} if bound else None


def _nodes(role: str, recipe: Recipe) -> list[dict[str, Any]]:
    """The nodes that a role may run on and that stay."""
    labels = role_labels(recipe, role)
    leaving = draining()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    return [node for node in nodes if labels is None or node["Labels"].get(ROLE) == role]


def _places(nodes: list[dict[str, Any]], kind: str) -> int:
    """Units of a resource on some nodes."""
    return sum(int(node["Resources"].get(kind, 0)) for node in nodes)


def _answers(node: dict[str, Any]) -> bool:
    """Whether somebody listens where a node's Ray did.

    Ray counts a node that is gone for a quarter of a minute more, in which workers would be started there and never come.
    """
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=ANSWER_SECONDS):
            return True
    except OSError:
        return False
