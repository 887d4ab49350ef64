"""A training run from its recipe to its result: check, open, attempt until it is done."""

import fcntl
import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from burnish import tracking
from burnish.config import Recipe
from burnish.data import survey
from burnish.errors import BurnishError, DataError, InfrastructureError, RecipeError, Stopped, TrainingError
from burnish.report import report
from burnish.train import checkpoint, goodput, tombstone
from burnish.train.attempts import Run, Watch, attempt_until_done
from burnish.train.cluster import check_resources, connected, role_labels
from burnish.train.home import Home
from burnish.train.ledger import append, lines
from burnish.train.prepare import (
    Prepared,
    check_same_filters,
    check_same_run,
    digests,
    make_run_folder,
    prepare,
    write_json,
    write_run_folder,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """How a run ended; the last line that `burnish train` prints."""

    status: str
    run: str
    run_id: str | None
    steps: int
    checkpoint: str
    metrics: dict[str, float]

    def to_json(self) -> str:
        """One line of JSON: status, run, run_id, steps, checkpoint and the final metrics."""
        return json.dumps(asdict(self))


def train(
    recipe: Recipe, watch: Watch | None = None, callbacks: tuple[Any, ...] = (), parent_id: str | None = None
) -> Result:
    """Trains a recipe to its end, or goes on with the run of its name. The run folder then holds all that it did.

    Raises RecipeError, DataError, InfrastructureError, TrainingError, or Stopped where a stop was asked for.
    """
    with Home.of(recipe).claimed() as home:
        prepared = prepare(recipe, home)
        make_run_folder(home.folder)
        with _alone(home.folder):
            return _train_once(prepared, home, watch, callbacks, parent_id)


def _train_once(
    prepared: Prepared, home: Home, watch: Watch | None, callbacks: tuple[Any, ...], parent_id: str | None
) -> Result:
    """Trains a run that nobody else trains now, unless it is done, or has failed for good."""
    folder = home.folder
    check_same_run(prepared, home)
    finished = _finished(home)
    if finished is not None:
        return _delivered(finished, prepared, home, parent_id)
    started_from = tombstone.fingerprint(prepared.recipe.located().to_yaml(), digests(prepared))
    tombstone.check(folder, started_from, home.path(tombstone.FILE))
    try:
        return _train(prepared, home, watch, callbacks, parent_id)
    except BurnishError as error:
        tombstone.bury(folder, error, started_from)
        raise


def _train(prepared: Prepared, home: Home, watch: Watch | None, callbacks: tuple[Any, ...], parent_id: str | None) -> Result:
    """Trains what is not finished yet, on the cluster or an embedded Ray."""
    recipe, folder = prepared.recipe, home.folder
    with connected(recipe.widths()[0]):
        cuda = check_resources(recipe)
        write_run_folder(prepared, home)
        run_id = _open_tracking(prepared, folder, parent_id)
        labels, cache = role_labels(recipe, "data"), prepared.rendering().cache
        try:
            kept = survey.drop(recipe, prepared.train, prepared.decontaminate, cache, labels)
            check_same_filters(kept, home)
            attempt_until_done(Run(replace(prepared, train=kept), home, run_id, cuda, callbacks), watch)
        except BaseException as error:
            if isinstance(error, TrainingError):  # how it came to that is of use
                _illustrate(recipe, run_id, folder)
            tracking.close_run(recipe, run_id, "KILLED" if isinstance(error, Stopped | KeyboardInterrupt) else "FAILED")
            raise
    run_id = run_id or _open_tracking(prepared, folder, parent_id)  # MLflow may have come back meanwhile
    result = _finish(recipe, home, run_id)
    tracking.deliver(recipe, run_id, folder)
    _illustrate(recipe, run_id, folder)
    tracking.close_run(recipe, run_id, "FINISHED")
    return result


def _illustrate(recipe: Recipe, run_id: str | None, folder: Path) -> None:
    """Writes the report, and adds it, all evaluations and the answers to held-out questions to the run in MLflow."""
    columns = ("step", "eval/loss", "eval/perplexity")
    measured = [line for line in lines(folder / "metrics.jsonl") if "eval/loss" in line]
    tracking.add_table(recipe, run_id, "evaluations.json", [{key: line[key] for key in columns} for line in measured])
    tracking.add_table(recipe, run_id, "generations.json", list(lines(folder / "generations.jsonl")))
    try:
        tracking.add_file(recipe, run_id, report(folder))
    except BurnishError as error:
        logger.warning("the report was not written: %s", error)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the run folder for this process; raises RecipeError where another process trains this run."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecipeError(f"name: another command is training the run in {folder}; wait for it or stop it") from None
        yield


def _open_tracking(prepared: Prepared, folder: Path, parent_id: str | None) -> str | None:
    """The MLflow run of this folder, opened again or created and described."""
    path = folder / "mlflow.json"
    known = json.loads(path.read_text())["run_id"] if path.exists() else None
    run_id = tracking.open_run(prepared.recipe, known, parent_id)
    if run_id is not None and run_id != known:
        (folder / tracking.DELIVERED).unlink(missing_ok=True)
        write_json(path, {"run_id": run_id})
        contract = prepared.contract
        tags = {
            "template.source_sha256": contract.source_sha256,
            "template.syntax_sha256": contract.syntax_sha256,
            "template.behaviour_sha256": contract.behaviour_sha256,
            "template.tokenizer_sha256": contract.tokenizer_sha256,
            "contract.sha256": contract.sha256(),
        }
        data = digests(prepared)
        tags["data.order"] = data.pop("order")
        tags |= {"model.sha256": data.pop("model")} if "model" in data else {}
        files = [folder / name for name in ("recipe.yaml", "contract.json", "chat_template.jinja")]
        tracking.describe(prepared.recipe, run_id, tags, files, data)
    return run_id


def _finish(recipe: Recipe, home: Home, run_id: str | None) -> Result:
    """The result of a run that reached its end, also written to result.json, which marks the run as done."""
    folder, last = home.folder, checkpoint.newest(home.shelf())
    if last is None:
        raise InfrastructureError(
            f"{recipe.run_place()}: the run ended without a checkpoint that verifies; start it again under a new name"
        )
    if last.progress.step == 0:
        raise DataError(f"data.train: no row of run {recipe.name!r} could be trained; see {home.path('refused.jsonl')}")
    append(folder / "metrics.jsonl", {"step": last.progress.step, "time": time.time(), **goodput.account(folder)})
    metrics: dict[str, float] = {}
    for line in lines(folder / "metrics.jsonl"):
        metrics |= {key: value for key, value in line.items() if key not in ("step", "time")}
    result = Result("finished", recipe.name, run_id, last.progress.step, last.path, metrics)
    write_json(folder / "result.json", asdict(result))
    shutil.rmtree(folder / ".ray", ignore_errors=True)
    return result


def _delivered(result: Result, prepared: Prepared, home: Home, parent_id: str | None) -> Result:
    """The result of a run that is done, with MLflow told what it has not got, as after an outage."""
    folder = home.folder
    run_id = result.run_id or _open_tracking(prepared, folder, parent_id)
    tracking.deliver(prepared.recipe, run_id, folder)
    if run_id != result.run_id:
        result = replace(result, run_id=run_id)
        write_json(folder / "result.json", asdict(result))
        _illustrate(prepared.recipe, run_id, folder)
        tracking.close_run(prepared.recipe, run_id, "FINISHED")
    return result


def _finished(home: Home) -> Result | None:
    """The result of a run that is done already, where its checkpoint still stands."""
    try:
        result = Result(**json.loads((home.folder / "result.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    shelf = home.shelf()
    return result if result.checkpoint in [shelf.path(name) for name in shelf.names()] else None
