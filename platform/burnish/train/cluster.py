"""The Ray that a command runs on: the cluster it belongs to, or an embedded one of its own."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray
import ray.data

from burnish.config import Recipe
from burnish.errors import InfrastructureError, RecipeError

DATA_CPUS = 2
"""Logical CPUs that an embedded Ray has beyond those of the training workers, for data tasks."""


@contextmanager
def connected(num_workers: int, dashboard: bool = False) -> Iterator[None]:
    """Ray, for as long as the block runs: the one already joined, the one of RAY_ADDRESS or of this job, or an own one.

    A sweep needs the `dashboard`: through it Ray frees the places of a trial that was ended early.
    An own one has logical CPUs enough for the workers and for data tasks, whatever cores there are.
    Raises InfrastructureError where the cluster of RAY_ADDRESS cannot be reached.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    # Without this a local Ray turns token authentication on for every later cluster of this user.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options = {"log_to_driver": False, "logging_level": logging.WARNING}
    try:
        if address:
            ray.init(address=address, **options)
        else:
            ray.init(address="local", num_cpus=num_workers + DATA_CPUS, include_dashboard=dashboard, **options)
    except (ConnectionError, RuntimeError, TimeoutError) as error:
        where = f"the Ray cluster at RAY_ADDRESS={address}" if address else "an embedded Ray"
        raise InfrastructureError(f"{where} could not be joined: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def check_resources(recipe: Recipe) -> bool:
    """Whether the recipe trains on GPUs here; raises RecipeError where its workers can never all be placed.

    A node that an autoscaler has not started yet is not counted against the recipe: the check holds for clusters
    without one.
    """
    total = ray.cluster_resources()
    gpus, workers = total.get("GPU", 0.0), recipe.scale.num_workers
    cuda = gpus > 0 if recipe.scale.use_gpu == "auto" else recipe.scale.use_gpu
    kind = "GPU" if cuda else "CPU"
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    places = sum(int(node.get(kind, 0)) for node in nodes)
    # A data task needs a CPU that no training worker holds, or the stream waits for ever.
    needed = workers if cuda else workers + 1
    if places < needed and not os.environ.get("RAY_CLUSTER_AUTOSCALES"):
        more = "" if cuda else " and one more for data"
        raise RecipeError(
            f"scale.num_workers: {workers} workers need {workers} {kind}s{more}; this cluster has {places}. "
            f"Write scale.num_workers: {max(1, places - (0 if cuda else 1))} or less, or add nodes"
        )
    return cuda
