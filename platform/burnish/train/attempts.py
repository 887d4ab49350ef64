"""The attempts at a run: from the newest checkpoint on, until one ends by itself or fails for good."""

import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from burnish.data import order, pipeline
from burnish.data.stages import Patience, Stages
from burnish.errors import BurnishError, InfrastructureError, OutOfMemory, RecipeError, Stopped
from burnish.redact import redact
from burnish.train import checkpoint, goodput
from burnish.train.attempt import SAVE_FILE, STOP_FILE, Attempt, Progress
from burnish.train.cluster import draining, role_labels, width
from burnish.train.failure import decide, last_line, lost_to_memory, memory_options
from burnish.train.home import Home
from burnish.train.layout import Layout, tighter
from burnish.train.ledger import append, lines
from burnish.train.prepare import Prepared
from burnish.train.schedule import kept_losses
from burnish.train.shelf import reaching
from burnish.train.split import OrderedSplit
from burnish.train.watchdog import hang

logger = logging.getLogger(__name__)

# Ray's own watcher of nodes that are about to go would be one more process of each attempt; ours also writes a checkpoint.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")

MAX_RESTARTS = 3
"""Times that a run is started again after a worker or a node was lost, without progress in between."""
Watch = Callable[[Path, dict[str, Any]], None]
"""Called about once a second with the run folder and facts of the run, to show how far it is."""


@dataclass(frozen=True)
class Run:
    """What all attempts at a run share."""

    prepared: Prepared
    home: Home
    run_id: str | None
    cuda: bool
    callbacks: tuple[Any, ...]


def attempt_until_done(run: Run, watch: Watch | None) -> None:
    """Attempts from the newest checkpoint on, until one ends by itself.

    Raises Stopped where a stop was asked for, InfrastructureError where workers are lost again and again without a step in
    between, and what an attempt raised that another one would raise again.
    """
    with _stop_on_signal(run.home.folder) as stops:
        _until_done(run, watch, stops)


def _until_done(run: Run, watch: Watch | None, stops: list[int]) -> None:
    failures, reached, folder = 0, -1, run.home.folder
    while True:
        start = _start(run.home)
        step = start.progress.step if start else 0
        failures = failures if step == reached else 0
        reached = step
        since, workers = time.time(), width(run.prepared.recipe, run.cuda)
        if stops:
            raise Stopped("stopped before an attempt began; the newest checkpoint stands")
        goodput.begin(folder, step, workers, since)
        run.home.settle()
        why, stages = "failed", Stages()
        try:
            with run.home.courier("metrics.jsonl"):
                try:
                    _watched(partial(_fit, run, start, workers, stages), run, watch, stages)
                finally:
                    with suppress(InfrastructureError):
                        run.home.look(STOP_FILE)
                    if (folder / STOP_FILE).exists():
                        stops.append(signal.SIGTERM)
            why = "stopped" if stops else "finished"
        except TrainingFailedError as error:
            failures += 1
            run.home.catch_up()
            reason = decide(error, run.prepared.recipe) or _given_up(error, run, step, workers, failures)
            smaller = _smaller(run, workers) if isinstance(reason, OutOfMemory) else None
            if smaller is not None:
                (run, lost), failures = smaller, 0
            elif reason is not None:
                raise reason from error
            else:
                lost = hang(folder, workers) or f"a worker was lost ({last_line(error)})"
            why = f"lost: {lost}"
            if stops:
                raise Stopped("stopped; a worker was lost meanwhile, the newest checkpoint stands") from error
            logger.warning("%s; starting again from the newest checkpoint", lost)
            continue
        finally:
            failing = sys.exc_info()[0] is not None
            with suppress(InfrastructureError, OSError) if failing else nullcontext():  # what failed first is what is told
                _note_end(run.home, step, redact(why))
        if stops:
            last = checkpoint.newest(run.home.shelf())
            step = last.progress.step if last else 0
            raise Stopped(f"stopped after step {step}, with a checkpoint; the same command goes on from there")
        return


def _note_end(home: Home, step: int, why: str) -> None:
    """Notes why an attempt from a step on ended, and what failures cost the run so far where it does not end well."""
    home.catch_up()
    goodput.end(home.folder, why)
    if why != "finished":
        append(home.folder / "metrics.jsonl", {"step": step, "time": time.time(), **goodput.account(home.folder)})
    home.settle()


def _start(home: Home) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from; what earlier attempts left behind is taken away."""
    shelf = home.shelf()
    if not shelf.stands():
        raise InfrastructureError(f"{shelf.place} is gone; the same command goes on when it is back")
    with reaching(shelf.place):
        shelf.clear()
    hang(home.folder, 0)
    (home.folder / SAVE_FILE).unlink(missing_ok=True)
    start = checkpoint.newest(shelf)
    if start is not None and not any(file.startswith(f"{checkpoint.OPTIMIZER}/") for file in start.files):
        raise RecipeError(f"name: {start.path} was written by a version whose checkpoints differ. Choose a new name")
    if start is not None and start.run is not None and home.identity() not in (None, start.run):
        raise RecipeError(f"name: {start.path} is a checkpoint of another run; take it out of the folder")
    return start


def _given_up(error: TrainingFailedError, run: Run, step: int, workers: int, failures: int) -> BurnishError | None:
    """What ends a run whose workers were lost too often without a step in between; None where it may be tried again."""
    if failures <= MAX_RESTARTS:
        return None
    if lost_to_memory(error):
        return OutOfMemory(
            f"out of memory: Ray ended workers {failures} times after step {step}, because their node had none left. "
            f"{memory_options(run.prepared.recipe)}"
        )
    return InfrastructureError(
        f"workers were lost {failures} times after step {step}: {hang(run.home.folder, workers) or last_line(error)}"
    )


def _smaller(run: Run, workers: int) -> tuple[Run, str] | None:
    """The run in a layout that needs less memory than the one it had, and what is said of it; None where there is none."""
    told = [line for line in lines(run.home.folder / "metrics.jsonl") if "engine/zero_stage" in line]
    if not told:
        return None
    tried = Layout(int(told[-1]["engine/zero_stage"]), bool(told[-1]["engine/activation_checkpointing"]))
    recipe = tighter(run.prepared.recipe, tried, workers)
    if recipe is None:
        return None
    kept = "recomputed" if tried.activation_checkpointing else "kept"
    decided = f"engine.zero_stage: {recipe.engine.zero_stage}, model.activation_checkpointing: "
    decided += str(recipe.model.activation_checkpointing).lower()
    said = f"out of memory with ZeRO-{tried.zero_stage}, activations {kept}; going on with {decided}"
    return replace(run, prepared=replace(run.prepared, recipe=recipe)), said


def _work(config: dict[str, Any]) -> None:
    """A worker's entry: the driver need not import what only workers use."""
    # Before DeepSpeed is imported, which would take a GPU of the machine that the run does not use.
    os.environ["DS_ACCELERATOR"] = "cuda" if config["attempt"].cuda else "cpu"
    from burnish.train.loop import train_loop

    train_loop(config)


def _fit(run: Run, start: checkpoint.Checkpoint | None, workers: int, stages: Stages) -> None:
    """One attempt: the stream from the checkpoint's cursor on, and the workers."""
    prepared, recipe = run.prepared, run.prepared.recipe
    progress = start.progress if start else Progress()
    windows = order.train_slices(recipe, prepared.train, progress.cursor)
    rendering, rounds = prepared.rendering(), prepared.rounds()
    metric, measured = recipe.checkpoint.best, lines(run.home.folder / "metrics.jsonl")
    leader = checkpoint.best(run.home.shelf(), metric) if metric else None
    attempt = Attempt(
        name=f"attempt-{uuid.uuid4().hex[:8]}",
        recipe=recipe.located(),
        run=run.home.shown,
        resume=start.name if start else None,
        progress=progress,
        best=leader[1] if leader else None,
        losses=kept_losses(
            [line["eval/loss"] for line in measured if "eval/loss" in line and line["step"] <= progress.step],
            leader[1] if leader else None,
        ),
        questions=prepared.questions,
        template=prepared.template,
        remains=bool(windows),
        num_rows=prepared.train.num_rows + (prepared.eval.num_rows if prepared.eval else 0),
        behaviour_sha256=prepared.contract.behaviour_sha256,
        run_id=run.run_id,
        cuda=run.cuda,
        patience=Patience(recipe.scale.stall_seconds, stages),
    )
    datasets = {}
    if windows:
        datasets["train"] = pipeline.stream(windows, rendering, rounds, workers, progress.cursor, stages)
    if prepared.eval is not None:
        held_out = order.eval_slices(recipe, prepared.eval)
        datasets["eval"] = pipeline.stream(held_out, rendering, rounds, workers, order.Cursor(), stages)
    elastic = len(recipe.widths()) > 1
    trainer = TorchTrainer(
        _work,
        train_loop_config={"attempt": attempt},
        torch_config=TorchConfig(backend="nccl" if run.cuda else "gloo", timeout_s=recipe.scale.patience_seconds()),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=run.cuda, label_selector=role_labels(recipe, "train")),
        # burnish keeps its own checkpoints and restarts; Ray's folder holds nothing that is needed again. Ray waits for ever
        # for nodes that are not there, which is right unless fewer workers would do.
        run_config=RunConfig(
            name=attempt.name,
            storage_path=str(run.home.folder / ".ray"),
            failure_config=FailureConfig(
                max_failures=0, max_preemption_failures=0, controller_failure_limit=0 if elastic else -1
            ),
            callbacks=list(run.callbacks),
        ),
        datasets=datasets,
        dataset_config=OrderedSplit(role_labels(recipe, "data")),
    )
    trainer.fit()


def _watched(work: Callable[[], None], run: Run, watch: Watch | None, stages: Stages) -> None:
    """Runs the work in a thread, so that this one can show progress and take signals; raises what the work raises.

    Warnings of workers are repeated here. Where a node is about to be taken away, the workers are asked for a checkpoint.
    """
    future: Future[None] = Future()

    def begin() -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)
            if not isinstance(error, Exception):
                raise

    # A daemon, so that a second Ctrl-C ends the command whatever the work is waiting for.
    threading.Thread(target=begin, daemon=True).start()
    known, heard = draining(), 0
    while True:
        finished = wait([future], timeout=0.5).done
        for warning in stages.told(heard, 5.0 if finished else 0.2):
            logger.warning("%s", warning)
            heard += 1
        if watch is not None:
            watch(run.home.folder, {"max_steps": run.prepared.recipe.train.max_steps})
        if finished:
            return future.result()
        leaving = draining()
        if leaving - known:
            logger.warning("a node will be taken away; writing a checkpoint")
            (run.home.folder / SAVE_FILE).touch()
        known |= leaving


@contextmanager
def _stop_on_signal(folder: Path) -> Iterator[list[int]]:
    """While the block runs, SIGTERM and the first Ctrl-C ask the workers for a checkpoint and an end; gives the signals.

    A list and not an Event, whose lock a handler would wait for forever where it comes while another one sets it.
    """
    stops: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stops
        return

    def ask(signum: int, frame: Any) -> None:
        if stops and signum == signal.SIGINT:
            raise KeyboardInterrupt
        stops.append(signum)
        (folder / STOP_FILE).touch()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        (folder / STOP_FILE).unlink(missing_ok=True)
