"""What one training worker does: the same straight line on every worker, every collective called by all."""

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any

import ray.train
import torch
import torch.distributed as dist

from burnish.config import Recipe
from burnish.data.stages import Teller
from burnish.errors import DataError, TrainingError
from burnish.train import checkpoint, self_test
from burnish.train import engine as ds
from burnish.train.architecture import pack_cost
from burnish.train.attempt import SAVE_FILE, STOP_FILE, Attempt, Progress, Wish
from burnish.train.batches import Batch, batches
from burnish.train.build import build_model
from burnish.train.evaluation import evaluate, generate, has_learned
from burnish.train.failure import check_loss, check_tokens, memory_advice
from burnish.train.footprint import agree, cpus_of
from burnish.train.home import Home
from burnish.train.layout import Footprint
from burnish.train.objective import Objective
from burnish.train.schedule import learning_rate
from burnish.train.state import State, load_optimizer
from burnish.train.step import Step, summed, take
from burnish.train.throughput import Meter, peak_flops, peak_memory_bytes
from burnish.train.watchdog import Watchdog
from burnish.train.worker import Records, Worker
from burnish.train.writer import Place, Writer


def train_loop(config: dict[str, Any]) -> None:
    """Trains one worker's share of the recipe, from a checkpoint or from the start, to its end or to a stop."""
    attempt: Attempt = config["attempt"]
    logging.getLogger("burnish").addHandler(Teller(attempt.patience.stages))
    home = Home.at(attempt.run).arrive()
    with home.courier(STOP_FILE, SAVE_FILE) if dist.get_rank() == 0 else nullcontext():
        _train(attempt, home)
    home.leave()


def _train(attempt: Attempt, home: Home) -> None:
    num_workers = dist.get_world_size()
    local_workers = ray.train.get_context().get_local_world_size()
    if attempt.cuda and attempt.recipe.engine.offload != "none":  # Ray leaves a thread to who holds no CPU of its
        torch.set_num_threads(cpus_of(local_workers))
    recipe, needed = agree(attempt.recipe, attempt.cuda, local_workers)
    attempt = replace(attempt, recipe=recipe)
    watchdog = Watchdog(home, dist.get_rank(), recipe.scale.stall_seconds * 1.25)
    records = Records(attempt, home, watchdog) if dist.get_rank() == 0 else None
    if records and needed:  # before anything takes memory, since what was tried decides what follows
        records.measure(attempt.progress.step, told(recipe, needed))
    share = recipe.train.global_batch_size // num_workers
    # The data tasks start while the model loads.
    with ThreadPoolExecutor(1) as pool:
        stream = batches(ray.train.get_dataset_shard("train"), share, attempt.patience) if attempt.remains else iter(())
        first = pool.submit(next, stream, None)
        engine = build(attempt, home, num_workers)
        objective = Objective(engine, engine.device)
    progress = attempt.progress
    device = torch.cuda.get_device_name(engine.device) if attempt.cuda else "CPU"
    meter = Meter(pack_cost(recipe), peak_flops(device, recipe.model.dtype))
    worker = Worker(attempt, home, engine, objective, watchdog, meter)
    saver = Saver(worker)
    measured: dict[str, float] = {}
    losses, wish, untested = list(attempt.losses), Wish.NOTHING, recipe.train.self_test
    evaluated = -1
    if progress.step == 0:
        generate(worker, records, 0)
    with saver.standing():
        for batch in chain(filter(None, [first.result()]), watchdog.patient(stream)):
            if wish is Wish.STOP or progress.step == recipe.train.max_steps or has_learned(recipe, losses, progress.step):
                break
            if not batch.meta.packs:  # nothing but refused rows: no step, so that no weight moves on momentum alone
                progress = Progress(progress.step, batch.meta.cursor)
                if records:
                    records.refuse(batch.meta)
                continue
            if untested:
                self_test.check(engine.module, batch.packs, engine.device)
                untested = False
            measured, wish = train_step(worker, batch, progress.step + 1)
            progress = Progress(progress.step + 1, batch.meta.cursor)
            if records:
                records.step(progress.step, batch.meta, measured)
            if due(progress.step, recipe.train.eval_every_steps) and recipe.data.eval:
                measured |= evaluate(worker, records, progress.step)
                evaluated = progress.step
                losses.append(measured["eval/loss"])
                checkpoint.report({**measured, "step": progress.step})
            if due(progress.step, recipe.checkpoint.every_steps) or wish is not Wish.NOTHING or saver.improves(measured):
                saver.save(progress, measured)
            saver.check()
    saver.keep(progress, measured)  # whatever becomes of the evaluation
    with saver.standing():
        if recipe.data.eval and evaluated != progress.step and wish is not Wish.STOP:
            measured |= evaluate(worker, records, progress.step)
            checkpoint.report({**measured, "step": progress.step})
    watchdog.beat()  # the last upload may hang as any before
    saver.finish(progress, measured)
    watchdog.rest()
    if records:
        records.close()


def told(recipe: Recipe, needed: Footprint) -> dict[str, float]:
    """What was decided of the layout, as metrics."""
    return {
        "engine/zero_stage": float(recipe.engine.stage()),
        "engine/activation_checkpointing": float(recipe.model.recomputes()),
        "engine/estimated_memory_gib": needed.total / 2**30,
    }


def build(attempt: Attempt, home: Home, num_workers: int) -> ds.Engine:
    """The engine at the attempt's checkpoint, or at the start of the run. A collective call."""
    recipe, resume = attempt.recipe, attempt.resume
    if resume is None:
        return ds.build_engine(recipe, build_model(recipe, attempt.cuda, num_workers), num_workers)
    with home.shelf().fetched(resume, home.folder.parent / f".{attempt.name}") as folder:
        model = build_model(recipe, attempt.cuda, num_workers, folder / checkpoint.WEIGHTS)
        engine = ds.build_engine(recipe, model, num_workers)
        load_optimizer(engine, folder / checkpoint.OPTIMIZER)
        dist.barrier()  # whoever leaves first takes the copies of a remote checkpoint away
    return engine


def train_step(worker: Worker, batch: Batch, step: int) -> tuple[dict[str, float], Wish]:
    """One optimizer step; the metrics of the whole step, and what the run is asked to do next. A collective call.

    Raises TrainingError on every worker where the loss of the step is no number or explodes, and where memory does not
    suffice; no checkpoint is written after it.
    """
    recipe, meta, engine = worker.recipe, batch.meta, worker.engine
    started = time.monotonic()
    done = (step - 1) / recipe.train.max_steps if recipe.train.max_steps else 0.0
    rate = learning_rate(recipe.optim, step, max(meta.progress, done))
    for input_ids, _, _ in batch.packs:
        check_tokens(input_ids, meta, ds.vocabulary(engine))
    # The sum of losses, what the run is asked to do, what was computed and world rank 0's norm of the gradient travel in the
    # one collective that a step adds, and reach the host in one copy.
    shared = torch.zeros(4, dtype=torch.float64, device=engine.device)
    with memory_advice(recipe, step, max(len(input_ids) for input_ids, _, _ in batch.packs)):
        told = Step(step, rate, meta.trained_tokens, recipe.train.seed)
        shared[0], shared[3] = take(engine, worker.objective, batch.packs, told, worker.watchdog.beat)
    if dist.get_rank() == 0:
        shared[1] = float(Wish.of(worker.home.folder))
    else:
        shared[3] = 0.0
    shared[2] = worker.meter.flops([seq_lens for _, _, seq_lens in batch.packs])
    total, wish, flops, grad_norm = summed(shared)
    loss_value = total / max(1, meta.trained_tokens)
    check_loss(recipe, step, meta, loss_value, grad_norm, ds.vocabulary(engine))
    seconds = time.monotonic() - started
    capacity = len(meta.packs) * recipe.data.max_length
    metrics = {
        "train/loss": loss_value,
        "train/learning_rate": rate,
        "train/grad_norm": grad_norm,
        "train/step_seconds": seconds,
        **worker.meter.metrics(flops, meta.tokens, meta.trained_tokens, seconds + batch.wait_seconds, dist.get_world_size()),
        "train/peak_memory_gib": peak_memory_bytes(engine.device) / 2**30,
        "train/trained_tokens": float(meta.trained_tokens),
        "train/progress": meta.progress,
        "data/packing_efficiency": meta.tokens / max(1, capacity),
        "data/balance": meta.balance,
        "data/tokens": float(meta.tokens),
        "data/wait_share": batch.wait_seconds / (seconds + batch.wait_seconds),
    }
    return metrics, Wish(int(wish))


class Saver:
    """The checkpoints of this attempt; every worker has one and calls it at the same steps. Made by a collective call."""

    def __init__(self, worker: Worker) -> None:
        spec, attempt = worker.recipe.checkpoint, worker.attempt
        place = Place(worker.home, attempt.name, spec.keep, spec.best, attempt.behaviour_sha256)
        self._writer = Writer(place, dist.get_rank(), dist.get_world_size(), worker.watchdog.alive)
        self._worker, self._best = worker, attempt.best
        self._state = State(worker.engine)
        self._saved = attempt.progress.step if attempt.resume else -1
        self._noted: dict[str, float] = {}

    def improves(self, measured: dict[str, float]) -> bool:
        """Whether an evaluation is better than at all checkpoints before; the same on every worker."""
        metric = self._worker.recipe.checkpoint.best
        return metric == "eval/loss" and metric in measured and (self._best is None or measured[metric] < self._best)

    def save(self, progress: Progress, measured: dict[str, float]) -> None:
        """Begins one checkpoint, which training does not wait for. A collective call."""
        metadata = {"chat_contract": f"sha256:{self._worker.attempt.behaviour_sha256}"}
        self._writer.wait()  # before the snapshot, which then takes the memory of the one before
        self._writer.write(progress, measured, self._state.snapshot(metadata))
        self._saved, self._noted = progress.step, dict(measured)
        self._note(measured)
        if dist.get_rank() == 0:
            (self._worker.home.folder / SAVE_FILE).unlink(missing_ok=True)

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Lets an error that ends the run for good leave the block when the checkpoint that was begun stands."""
        try:
            yield
        except (TrainingError, DataError):
            self._writer.stand()
            raise

    def check(self) -> None:
        """Raises InfrastructureError where the last checkpoint could not be written."""
        self._writer.check()

    def keep(self, progress: Progress, measured: dict[str, float]) -> None:
        """Begins the checkpoint of a step unless it was begun. A collective call."""
        if self._saved != progress.step:
            self.save(progress, measured)

    def finish(self, progress: Progress, measured: dict[str, float]) -> None:
        """Returns when the checkpoint of the last step, which was begun, stands with what was measured at it."""
        if measured != self._noted and measured:
            self._writer.measure(progress, measured)
        self._writer.wait()

    def _note(self, measured: dict[str, float]) -> None:
        value = measured.get(self._worker.recipe.checkpoint.best or "")
        if value is not None:
            self._best = value if self._best is None else min(value, self._best)


def due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens at this one."""
    return every is not None and step % every == 0
