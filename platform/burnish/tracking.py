"""MLflow, which records a run and never holds it up.

The driver opens a run and logs what is known before training; world rank 0 logs metrics through a queue and a thread.
Where MLflow is out of reach, training goes on, and metrics.jsonl in the run folder has every number.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from burnish.config import Recipe, leaves

# An outage must cost seconds, not the minutes of MLflow's default retries.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)

Outage = (MlflowException, OSError)
"""What an unreachable or broken MLflow raises."""


def resolve(uri: str) -> str:
    """The tracking URI with a relative SQLite or folder path made absolute, since workers run in folders of their own."""
    for prefix in ("sqlite:///", "file:"):
        if uri.startswith(prefix):
            return prefix + str(Path(uri.removeprefix(prefix)).expanduser().absolute())
    return uri if "://" in uri else "file:" + str(Path(uri).expanduser().absolute())


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the lines that the creation of MLflow's database prints."""
    names = ("alembic", "mlflow")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def open_run(recipe: Recipe, known_id: str | None, parent_id: str | None = None) -> str | None:
    """The id of the recipe's MLflow run: the known one gone on with, or a new one. None without MLflow, or in an outage."""
    if recipe.tracking.uri is None:
        return None
    try:
        with quiet():
            client = MlflowClient(resolve(recipe.tracking.uri))
            if known_id is not None:
                client.update_run(known_id, status="RUNNING")
                return known_id
            experiment = client.get_experiment_by_name(recipe.tracking.experiment)
            experiment_id = experiment.experiment_id if experiment else _create_experiment(client, recipe)
            tags = {"burnish.run": recipe.name} | ({"mlflow.parentRunId": parent_id} if parent_id else {})
            run = client.create_run(experiment_id, tags=tags, run_name=recipe.name)
        return str(run.info.run_id)
    except Outage as error:
        logger.warning("MLflow at %s is out of reach; training goes on without it: %s", recipe.tracking.uri, error)
        return None


def _create_experiment(client: MlflowClient, recipe: Recipe) -> str:
    uri = resolve(str(recipe.tracking.uri))
    place = None
    if uri.startswith("sqlite:///"):
        place = (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()
    return str(client.create_experiment(recipe.tracking.experiment, artifact_location=place))


def describe(recipe: Recipe, run_id: str | None, tags: dict[str, str], files: list[Path], digests: dict[str, str]) -> None:
    """Logs the recipe as parameters, tags, files as artifacts, and data sets by digest; an outage is only warned of."""
    if run_id is None or recipe.tracking.uri is None:
        return
    flat = {path: _value(recipe, path) for path, _, _ in leaves(type(recipe))}
    params = [Param(key, str(value)[:500]) for key, value in flat.items() if not key.startswith("sweep.")]
    try:
        with quiet():
            client = MlflowClient(resolve(recipe.tracking.uri))
            client.log_batch(run_id, params=params, tags=[RunTag(key, value) for key, value in tags.items()])
            for file in files:
                client.log_artifact(run_id, str(file))
            client.log_inputs(run_id, [_dataset(name, digest) for name, digest in digests.items()])
    except Outage as error:
        logger.warning("MLflow did not take the description of the run: %s", error)


def _value(recipe: Recipe, path: str) -> Any:
    value: Any = recipe
    for part in path.split("."):
        value = getattr(value, part, None)
    return [str(item.path) for item in value] if path in ("data.train", "data.eval") else value


def _dataset(name: str, digest: str) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    # MLflow holds at most 36 characters of a digest.
    dataset = Dataset(name=name, digest=digest[:32], source_type="local", source=name)
    return DatasetInput(dataset=dataset, tags=[InputTag("mlflow.data.context", name)])


def close_run(recipe: Recipe, run_id: str | None, status: str) -> None:
    """Sets the final status: FINISHED, FAILED or KILLED."""
    if run_id is None or recipe.tracking.uri is None:
        return
    try:
        with quiet():
            MlflowClient(resolve(recipe.tracking.uri)).set_terminated(run_id, status)
    except Outage as error:
        logger.warning("MLflow did not take the end of the run: %s", error)


class Tracker:
    """Metrics of one run on their way to MLflow; `log` returns at once and never raises."""

    def __init__(self, uri: str | None, run_id: str | None) -> None:
        self._queue: queue.Queue[list[Metric] | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        if uri is not None and run_id is not None:
            self._thread = threading.Thread(target=self._deliver, args=(uri, run_id), daemon=True)
            self._thread.start()

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Queues the metrics of a step."""
        if self._thread is None:
            return
        now = int(time.time() * 1000)
        self._queue.put([Metric(key, value, now, step) for key, value in metrics.items()])

    def close(self, timeout_seconds: float = 60.0) -> None:
        """Waits until everything is delivered, at most `timeout_seconds`."""
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(timeout_seconds)

    def _deliver(self, uri: str, run_id: str) -> None:
        client = MlflowClient(resolve(uri))
        while (metrics := self._queue.get()) is not None:
            try:
                client.log_batch(run_id, metrics=metrics)
            except Outage as error:
                logger.warning("MLflow did not take the metrics of step %s: %s", metrics[0].step, error)
