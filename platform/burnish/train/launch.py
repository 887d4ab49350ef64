"""A training run from its recipe to its result: check, open, attempt until it is done."""

import fcntl
import json
import logging
import shutil
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from burnish import tracking
from burnish.config import Recipe
from burnish.data import order, pipeline, survey
from burnish.data.stages import Patience, Stages
from burnish.errors import BurnishError, DataError, InfrastructureError, RecipeError, Stopped
from burnish.report import report
from burnish.train import checkpoint
from burnish.train.attempt import STOP_FILE, Attempt, Progress
from burnish.train.cluster import check_resources, connected, role_labels
from burnish.train.failure import decide, last_line
from burnish.train.ledger import lines
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
from burnish.train.split import OrderedSplit

logger = logging.getLogger(__name__)

MAX_RESTARTS = 3
"""Times that a run is started again after a worker or a node was lost, without progress in between."""
Watch = Callable[[Path, dict[str, Any]], None]
"""Called about once a second with the run folder and facts of the run, to show how far it is."""


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
    prepared = prepare(recipe)
    folder = recipe.run_folder()
    make_run_folder(folder)
    with _alone(folder):
        check_same_run(prepared, folder)
        return _finished(folder) or _train(prepared, folder, watch, callbacks, parent_id)


def _train(
    prepared: Prepared, folder: Path, watch: Watch | None, callbacks: tuple[Any, ...], parent_id: str | None
) -> Result:
    """Trains what is not finished yet, on the cluster or an embedded Ray."""
    recipe = prepared.recipe
    with connected(recipe.scale.num_workers):
        cuda = check_resources(recipe)
        write_run_folder(prepared, folder)
        run_id = _open_tracking(prepared, folder, parent_id)
        labels, cache = role_labels(recipe, "data"), prepared.rendering().cache
        try:
            kept = survey.drop(recipe, prepared.train, prepared.decontaminate, cache, labels)
            check_same_filters(kept, folder)
            _attempt_until_done(replace(prepared, train=kept), folder, run_id, cuda, watch, callbacks)
        except BaseException as error:
            tracking.close_run(recipe, run_id, "KILLED" if isinstance(error, Stopped | KeyboardInterrupt) else "FAILED")
            raise
    result = _finish(recipe, folder, run_id)
    try:
        tracking.add_file(recipe, run_id, report(folder))
    except BurnishError as error:
        logger.warning("the report was not written: %s", error)
    tracking.close_run(recipe, run_id, "FINISHED")
    return result


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
    if run_id is not None and known is None:
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


def _attempt_until_done(
    prepared: Prepared, folder: Path, run_id: str | None, cuda: bool, watch: Watch | None, callbacks: tuple[Any, ...]
) -> None:
    """Attempts from the newest checkpoint on, until one ends by itself or fails for good."""
    failures, reached = 0, -1
    while True:
        start = checkpoint.newest(folder / "checkpoints")
        if start is not None and not (start.path / checkpoint.OPTIMIZER).is_dir():
            raise RecipeError(f"name: {start.path} was written by a version whose checkpoints differ. Choose a new name")
        progress = start.progress if start else Progress()
        failures = failures if progress.step == reached else 0
        reached = progress.step
        try:
            with _stop_on_signal(folder) as asked:
                try:
                    _watched(partial(_fit, prepared, folder, start, run_id, cuda, callbacks), folder, prepared, watch)
                finally:
                    if (folder / STOP_FILE).exists():
                        asked.set()
        except WorkerGroupError as error:
            failures += 1
            reason = decide(error)
            if reason is not None:
                raise reason from error
            if failures > MAX_RESTARTS:
                raise InfrastructureError(
                    f"workers were lost {failures} times after step {reached}: {last_line(error)}"
                ) from error
            if asked.is_set():
                raise Stopped("stopped; a worker was lost meanwhile, the newest checkpoint stands") from error
            logger.warning("a worker was lost (%s); starting again from the newest checkpoint", last_line(error))
            continue
        if asked.is_set():
            last = checkpoint.newest(folder / "checkpoints")
            step = last.progress.step if last else 0
            raise Stopped(f"stopped after step {step}, with a checkpoint; the same command goes on from there")
        return


def _work(config: dict[str, Any]) -> None:
    """A worker's entry: the driver need not import what only workers use."""
    from burnish.train.loop import train_loop

    train_loop(config)


def _fit(
    prepared: Prepared,
    folder: Path,
    start: checkpoint.Checkpoint | None,
    run_id: str | None,
    cuda: bool,
    callbacks: tuple[Any, ...],
) -> None:
    """One attempt: the stream from the checkpoint's cursor on, and the workers."""
    recipe = prepared.recipe
    progress = start.progress if start else Progress()
    windows = order.train_slices(recipe, prepared.train, progress.cursor)
    rendering, rounds, workers = prepared.rendering(), prepared.rounds(), recipe.scale.num_workers
    stages = Stages()
    attempt = Attempt(
        recipe=recipe.located(),
        run_folder=folder,
        resume=start.path if start else None,
        progress=progress,
        remains=bool(windows),
        num_rows=prepared.train.num_rows + (prepared.eval.num_rows if prepared.eval else 0),
        behaviour_sha256=prepared.contract.behaviour_sha256,
        run_id=run_id,
        cuda=cuda,
        patience=Patience(recipe.scale.stall_seconds, stages),
    )
    datasets = {}
    if windows:
        datasets["train"] = pipeline.stream(windows, rendering, rounds, workers, progress.cursor, stages)
    if prepared.eval is not None:
        held_out = order.eval_slices(recipe, prepared.eval)
        datasets["eval"] = pipeline.stream(held_out, rendering, rounds, workers, order.Cursor(), stages)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"attempt": attempt},
        torch_config=TorchConfig(backend="nccl" if cuda else "gloo"),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=cuda, label_selector=role_labels(recipe, "train")),
        # burnish keeps its own checkpoints and restarts; Ray's folder holds nothing that is needed again.
        run_config=RunConfig(
            name=f"attempt-{uuid.uuid4().hex[:8]}",
            storage_path=str(folder / ".ray"),
            failure_config=FailureConfig(max_failures=0),
            callbacks=list(callbacks),
        ),
        datasets=datasets,
        dataset_config=OrderedSplit(role_labels(recipe, "data")),
    )
    trainer.fit()


def _watched(work: Callable[[], None], folder: Path, prepared: Prepared, watch: Watch | None) -> None:
    """Runs the work in a thread, so that this one can show progress and take signals; raises what the work raises."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)
            if not isinstance(error, Exception):
                raise

    # A daemon, so that a second Ctrl-C ends the command whatever the work is waiting for.
    threading.Thread(target=run, daemon=True).start()
    while True:
        finished = wait([future], timeout=0.5).done
        if watch is not None:
            watch(folder, {"max_steps": prepared.recipe.train.max_steps})
        if finished:
            future.result()
            return


@contextmanager
def _stop_on_signal(folder: Path) -> Iterator[threading.Event]:
    """While the block runs, SIGTERM and the first Ctrl-C ask the workers for a checkpoint and an end."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(signum: int, frame: Any) -> None:
        if asked.is_set() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()
        (folder / STOP_FILE).touch()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        (folder / STOP_FILE).unlink(missing_ok=True)


def _finish(recipe: Recipe, folder: Path, run_id: str | None) -> Result:
    """The result of a run that reached its end, also written to result.json, which marks the run as done."""
    last = checkpoint.newest(folder / "checkpoints")
    if last is None:
        raise InfrastructureError(
            f"{folder}: the run ended without a checkpoint that verifies; start it again under a new name"
        )
    metrics: dict[str, float] = {}
    for line in lines(folder / "metrics.jsonl"):
        metrics |= {key: value for key, value in line.items() if key != "step"}
    if last.progress.step == 0:
        raise DataError(f"data.train: no row of run {recipe.name!r} could be trained; see {folder / 'refused.jsonl'}")
    result = Result("finished", recipe.name, run_id, last.progress.step, str(last.path), metrics)
    write_json(folder / "result.json", asdict(result))
    shutil.rmtree(folder / ".ray", ignore_errors=True)
    return result


def _finished(folder: Path) -> Result | None:
    """The result of a run that is done already, where its checkpoint still stands."""
    try:
        result = Result(**json.loads((folder / "result.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return result if Path(result.checkpoint).is_dir() else None
