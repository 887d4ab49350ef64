"""MLflow, which records a run and never holds it up.

The driver opens a run and logs what is known before training; world rank 0 sends metrics from metrics.jsonl in a thread.
Where MLflow is out of reach, training goes on, metrics.jsonl has every number, and what is missing is sent later.

MLflow takes seconds to import, so each function imports what it uses.
"""

import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from burnish.config import Recipe, leaves
from burnish.errors import InfrastructureError, RecipeError, one_line
from burnish.redact import redact, redact_tree
from burnish.train.ledger import replace_text

# An outage must cost seconds, not the minutes of MLflow's default retries.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

logger = logging.getLogger(__name__)

DELIVERED = ".mlflow-delivered"
"""File of a run folder that says how many bytes of metrics.jsonl MLflow has."""
RETRY_SECONDS = 15.0
"""Seconds between tries to reach an MLflow that did not answer."""
_BATCH_BYTES = 16 << 10
"""Bytes of metrics.jsonl sent at once; MLflow takes 1,000 metrics, of which none takes fewer than 20 bytes."""


@contextmanager
def forgiving(what: str) -> Iterator[None]:
    """Turns an unreachable or broken MLflow inside the block into a warning."""
    from mlflow.exceptions import MlflowException

    try:
        with quiet():
            yield
    except (MlflowException, OSError, ImportError, ValueError) as error:
        logger.warning("MLflow: %s failed, training goes on without it: %s", what, one_line(error))


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the chatter of MLflow and its database off the terminal while the block runs."""
    loggers = [logging.getLogger(name) for name in ("alembic", "mlflow")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def resolve(uri: str) -> str:
    """The tracking URI with a relative SQLite or folder path made absolute, since workers run in folders of their own."""
    for prefix in ("sqlite:///", "file:"):
        if uri.startswith(prefix):
            return prefix + str(Path(uri.removeprefix(prefix)).expanduser().absolute())
    return uri if "://" in uri else "file:" + str(Path(uri).expanduser().absolute())


def open_run(recipe: Recipe, known_id: str | None, parent_id: str | None = None) -> str | None:
    """The id of the recipe's MLflow run: the known one gone on with, or a new one where the server has no such run.

    None without MLflow, or in an outage.
    """
    if recipe.tracking.uri is None:
        return None
    with forgiving("opening the run"):
        client = _client(recipe.tracking.uri)
        if known_id is not None and _goes_on(client, known_id):
            return known_id
        experiment = client.get_experiment_by_name(recipe.tracking.experiment)
        experiment_id = experiment.experiment_id if experiment else _create_experiment(client, recipe)
        tags = {"burnish.run": recipe.name} | ({"mlflow.parentRunId": parent_id} if parent_id else {})
        run = client.create_run(experiment_id, tags=tags, run_name=recipe.name)
        return str(run.info.run_id)
    return None


def _goes_on(client: Any, run_id: str) -> bool:
    """Marks a run as running; False where this server never had it. Raises what MLflow raises."""
    from mlflow.exceptions import MlflowException

    try:
        client.update_run(run_id, status="RUNNING")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        logger.warning("MLflow has no run %s at tracking.uri; a new one gets everything", run_id)
        return False
    return True


def describe(recipe: Recipe, run_id: str | None, tags: dict[str, str], files: list[Path], digests: dict[str, str]) -> None:
    """Logs the recipe as parameters, tags, files as artifacts, and data sets by digest."""
    if run_id is None or recipe.tracking.uri is None:
        return
    with forgiving("describing the run"):
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

        flat = {path: _value(recipe, path) for path, _, _ in leaves(type(recipe)) if not path.startswith("sweep.")}
        # MLflow holds at most 36 characters of a digest, and cuts a parameter at 6,000.
        datasets = [
            DatasetInput(Dataset(name, digest[:32], "local", name), [InputTag("mlflow.data.context", name)])
            for name, digest in digests.items()
        ]
        client = _client(recipe.tracking.uri)
        params = [Param(key, redact(str(value))[:5000]) for key, value in redact_tree(flat).items()]
        client.log_batch(run_id, params=params, tags=[RunTag(key, value) for key, value in redact_tree(tags).items()])
        for file in files:
            client.log_artifact(run_id, str(file))
        client.log_inputs(run_id, datasets)


def add_file(recipe: Recipe, run_id: str | None, file: Path) -> None:
    """Adds a file to the run's artifacts."""
    if run_id is not None and recipe.tracking.uri is not None:
        with forgiving(f"sending {file.name}"):
            _client(recipe.tracking.uri).log_artifact(run_id, str(file))


def add_table(recipe: Recipe, run_id: str | None, name: str, rows: list[dict[str, Any]]) -> None:
    """Adds a table to the run's artifacts, with a column for each key of its rows."""
    if run_id is not None and recipe.tracking.uri is not None and rows:
        with forgiving(f"sending {name}"):
            columns = {key: [row[key] for row in rows] for key in rows[0]}
            _client(recipe.tracking.uri).log_table(run_id, columns, name)


def add_scores(recipe: Recipe, run_id: str, scores: dict[str, float]) -> None:
    """Adds metrics that belong to no step."""
    if recipe.tracking.uri is not None:
        with forgiving("sending scores"):
            for name, value in scores.items():
                _client(recipe.tracking.uri).log_metric(run_id, name, value)


def register(recipe: Recipe, run_id: str, folder: Path, name: str, alias: str, place: str) -> str:
    """The version of a registered model that holds a folder, sent below `place` of the run's artifacts; the alias names it.

    A folder that was registered before is not sent again, only named. Raises RecipeError for a name that MLflow does not
    take, InfrastructureError where it cannot be reached; what was sent then is sent again by the same command.
    """
    from mlflow.exceptions import MlflowException

    try:
        with quiet():
            client = _client(str(recipe.tracking.uri))
            source = f"{client.get_run(run_id).info.artifact_uri}/{place}"
            _ensure_registered(client, name)
            versions = [each for each in client.search_model_versions(f"name='{name}'") if each.source == source]
            if not versions:
                client.log_artifacts(run_id, str(folder), place)
                versions = [client.create_model_version(name, source, run_id)]
            client.set_registered_model_alias(name, alias, versions[0].version)
            return str(versions[0].version)
    except MlflowException as error:
        kind = RecipeError if error.error_code == "INVALID_PARAMETER_VALUE" else InfrastructureError
        raise kind(f"--register {name}: MLflow says: {one_line(error)}; the export stands in {folder}") from None
    except OSError as error:
        raise InfrastructureError(f"--register {name}: {one_line(error)}; the export stands in {folder}") from None


def _ensure_registered(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def close_run(recipe: Recipe, run_id: str | None, status: str) -> None:
    """Sets the final status: FINISHED, FAILED or KILLED."""
    if run_id is not None and recipe.tracking.uri is not None:
        with forgiving("ending the run"):
            _client(recipe.tracking.uri).set_terminated(run_id, status)


def _client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(resolve(uri))


def _create_experiment(client: Any, recipe: Recipe) -> str:
    """A new experiment; artifacts of a local database stand beside it, whatever folder a command runs in."""
    uri = resolve(str(recipe.tracking.uri))
    place = None
    if uri.startswith("sqlite:///"):
        place = (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()
    return str(client.create_experiment(recipe.tracking.experiment, artifact_location=place))


def _value(recipe: Recipe, path: str) -> Any:
    value: Any = recipe
    for part in path.split("."):
        value = getattr(value, part, None)
    return [source.path for source in value] if path in ("data.train", "data.eval") else value


class Tracker:
    """Sends metrics.jsonl of a run folder to MLflow in a thread, in order; nobody waits for it before `close`.

    An outage costs nothing: what was not taken is sent when MLflow answers again, by this tracker, by the next attempt or
    by `deliver`.
    """

    def __init__(self, uri: str | None, run_id: str | None, folder: Path) -> None:
        self._news, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        if uri is not None and run_id is not None:
            outbox = _Outbox(folder)
            self._thread = threading.Thread(target=self._deliver, args=(outbox, uri, run_id), daemon=True)
            self._thread.start()

    def wake(self) -> None:
        """Says that metrics.jsonl has new lines."""
        self._news.set()

    def close(self, timeout_seconds: float = 60.0) -> None:
        """Waits until everything is delivered, at most `timeout_seconds`, and not for an MLflow that is out of reach."""
        self._closing.set()
        self._news.set()
        if self._thread is not None:
            self._thread.join(timeout_seconds)

    def _deliver(self, outbox: "_Outbox", uri: str, run_id: str) -> None:
        from mlflow.exceptions import MlflowException

        down = False
        while True:
            last = self._closing.is_set()
            self._news.clear()
            try:
                outbox.send(uri, run_id)
            except (MlflowException, OSError) as error:
                if not down:
                    logger.warning("MLflow is out of reach, metrics wait in metrics.jsonl: %s", one_line(error))
                down = True
                self._closing.wait(RETRY_SECONDS)
            else:
                if down:
                    logger.warning("MLflow is back and has all metrics")
                down = False
                if not last:
                    self._news.wait()
            if last:
                return


class _Outbox:
    """The lines of a run's metrics.jsonl that MLflow has not got; how far it has them stands in the run folder."""

    def __init__(self, folder: Path) -> None:
        self._file, self._state = folder / "metrics.jsonl", folder / DELIVERED
        delivered = int(self._state.read_text()) if self._state.exists() else 0
        # A resume takes lines of steps away that no checkpoint holds; they come again behind the end.
        self._offset = min(delivered, self._file.stat().st_size if self._file.exists() else 0)
        replace_text(self._state, str(self._offset))

    def send(self, uri: str, run_id: str) -> None:
        """Sends what is there. Raises MlflowException or OSError with everything before the failure noted as sent."""
        from mlflow.entities import Metric

        client = _client(uri)
        with quiet(), open(self._file, "rb") as file:
            file.seek(self._offset)
            while batch := [line for line in file.readlines(_BATCH_BYTES) if line.endswith(b"\n")]:
                entries = [json.loads(line) for line in batch]
                metrics = [
                    Metric(key, value, int(entry["time"] * 1000), entry["step"])
                    for entry in entries
                    for key, value in entry.items()
                    if key not in ("step", "time")
                ]
                client.log_batch(run_id, metrics=metrics)
                self._offset += sum(map(len, batch))
                replace_text(self._state, str(self._offset))


def deliver(recipe: Recipe, run_id: str | None, folder: Path) -> None:
    """Sends what MLflow has not got of a run's metrics, trying once; what is left waits for the same command again."""
    if run_id is not None and recipe.tracking.uri is not None:
        with forgiving("sending metrics"):
            _Outbox(folder).send(recipe.tracking.uri, run_id)
