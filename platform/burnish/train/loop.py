"""What one training worker does: the same straight line on every worker, every collective called by all."""

import math
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from burnish.data import pipeline
from burnish.data.order import StepMeta
from burnish.data.stages import Patience
from burnish.errors import DataError, TrainingError
from burnish.tracking import Tracker
from burnish.train import checkpoint, self_test
from burnish.train import engine as ds
from burnish.train.attempt import STOP_FILE, Attempt, Progress
from burnish.train.ledger import Ledger
from burnish.train.model import build_model
from burnish.train.objective import loss_sum
from burnish.train.schedule import learning_rate


@dataclass(frozen=True)
class Batch:
    """One worker's packs of one step, and the meta of the whole step. `wait_seconds` is how long it took to come."""

    packs: list[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]]
    meta: StepMeta
    wait_seconds: float


def train_loop(config: dict[str, Any]) -> None:
    """Trains one worker's share of the recipe, from a checkpoint or from the start, to its end or to a stop."""
    attempt: Attempt = config["attempt"]
    recipe = attempt.recipe
    num_workers = dist.get_world_size()
    share = recipe.train.global_batch_size // num_workers
    # The data tasks start while the model loads.
    with ThreadPoolExecutor(1) as pool:
        stream = batches(ray.train.get_dataset_shard("train"), share, attempt.patience) if attempt.remains else iter(())
        first = pool.submit(next, stream, None)
        engine = build(attempt, num_workers)
    progress = attempt.progress
    records = Records(attempt) if dist.get_rank() == 0 else None
    evaluation: dict[str, float] = {}
    evaluated, saved = -1, progress.step if attempt.resume else -1
    stopped, untested = False, recipe.train.self_test
    for batch in chain(filter(None, [first.result()]), stream):
        if stopped or progress.step == recipe.train.max_steps:
            break
        if not batch.meta.packs:  # nothing but refused rows: no step, so that no weight moves on momentum alone
            progress = Progress(progress.step, batch.meta.cursor)
            if records:
                records.refuse(batch.meta)
            continue
        if untested:
            self_test.check(engine.module, batch.packs, engine.device)
            untested = False
        metrics, stopped = train_step(engine, batch, progress.step + 1, attempt)
        progress = Progress(progress.step + 1, batch.meta.cursor)
        if records:
            records.step(progress.step, batch.meta, metrics)
        if due(progress.step, recipe.train.eval_every_steps) and recipe.data.eval:
            evaluation, evaluated = evaluate(engine, attempt, records, progress.step), progress.step
            checkpoint.report({**metrics, **evaluation, "step": progress.step})
        if due(progress.step, recipe.checkpoint.every_steps) or stopped:
            save(engine, attempt, progress)
            saved = progress.step
    if recipe.data.eval and evaluated != progress.step and not stopped:
        evaluation = evaluate(engine, attempt, records, progress.step)
        checkpoint.report({**evaluation, "step": progress.step})
    if saved != progress.step:
        save(engine, attempt, progress)
    if records:
        records.close()


def build(attempt: Attempt, num_workers: int) -> ds.Engine:
    """The engine at the attempt's checkpoint, or at the start of the run. A collective call."""
    recipe, resume = attempt.recipe, attempt.resume
    model = build_model(recipe, attempt.cuda)
    if resume is None:
        return ds.build_engine(recipe, model, num_workers)
    ds.load_weights(model, resume / checkpoint.WEIGHTS)
    engine = ds.build_engine(recipe, model, num_workers)
    ds.load_optimizer(engine, resume / checkpoint.OPTIMIZER)
    return engine


def train_step(engine: ds.Engine, batch: Batch, step: int, attempt: Attempt) -> tuple[dict[str, float], bool]:
    """One optimizer step; the metrics of the whole step, and whether a stop was asked for. A collective call.

    Raises TrainingError on every worker where the loss of the step is no number; no checkpoint is written after it.
    """
    recipe, meta = attempt.recipe, batch.meta
    started = time.monotonic()
    # Dropout is a function of the step and the worker, so a resumed run draws what the uninterrupted one drew.
    torch.manual_seed(hash((recipe.train.seed, step, dist.get_rank())) % (1 << 63))
    done = (step - 1) / recipe.train.max_steps if recipe.train.max_steps else 0.0
    rate = learning_rate(recipe.optim, step, max(meta.progress, done))
    ds.set_learning_rate(engine, rate)
    # The sum of losses and the wish to stop travel in the one collective that a step adds.
    shared = torch.zeros(2, dtype=torch.float64, device=engine.device)
    grad_norm = 0.0
    for input_ids, labels, seq_lens in batch.packs:
        loss = loss_sum(engine, input_ids, labels, seq_lens, engine.device)
        ds.backward(engine, loss, meta.trained_tokens, dist.get_world_size())
        grad_norm = ds.step(engine)
        shared[0] += loss.detach()
    shared[1] = float((attempt.run_folder / STOP_FILE).exists()) if dist.get_rank() == 0 else 0.0
    dist.all_reduce(shared)
    total, stop = shared.tolist()
    loss_value = total / max(1, meta.trained_tokens)
    if not math.isfinite(loss_value) or (not math.isfinite(grad_norm) and recipe.model.dtype != "float16"):
        packs = ", ".join(map(str, meta.packs))
        raise TrainingError(
            f"the loss of step {step} is {loss_value}, its gradient norm {grad_norm}; "
            f"its packs (epoch, window, index) are {packs}. "
            "Lower optim.learning_rate"
        )
    seconds = time.monotonic() - started
    capacity = len(meta.packs) * recipe.data.max_length
    metrics = {
        "train/loss": loss_value,
        "train/learning_rate": rate,
        "train/grad_norm": grad_norm,
        "train/tokens_per_second": meta.tokens / (seconds + batch.wait_seconds),
        "train/trained_tokens": float(meta.trained_tokens),
        "train/progress": meta.progress,
        "data/packing_efficiency": meta.tokens / max(1, capacity),
        "data/balance": meta.balance,
        "data/tokens": float(meta.tokens),
        "data/wait_share": batch.wait_seconds / (seconds + batch.wait_seconds),
    }
    return metrics, stop > 0


def evaluate(engine: ds.Engine, attempt: Attempt, records: "Records | None", step: int) -> dict[str, float]:
    """Loss and perplexity over all held-out rows, each trained token of them counted once. A collective call."""
    engine.eval()
    shared = torch.zeros(2, dtype=torch.float64, device=engine.device)
    with torch.no_grad():
        share = attempt.recipe.train.global_batch_size // dist.get_world_size()
        for batch in batches(ray.train.get_dataset_shard("eval"), share, attempt.patience):
            for input_ids, labels, seq_lens in batch.packs:
                shared[0] += loss_sum(engine, input_ids, labels, seq_lens, engine.device)
            shared[1] += batch.meta.trained_tokens / dist.get_world_size()
            if records:
                records.refuse(batch.meta)
    engine.train()
    dist.all_reduce(shared)
    total, count = shared.tolist()
    if count == 0:
        raise DataError("data.eval: no token of the held-out rows can be trained, so there is no loss to measure")
    loss = total / count
    if not math.isfinite(loss):
        raise TrainingError(f"the evaluation loss after step {step} is {loss}. Lower optim.learning_rate")
    metrics = {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}
    if records:
        records.measure(step, metrics)
    return metrics


def save(engine: ds.Engine, attempt: Attempt, progress: Progress) -> None:
    """One checkpoint of this run. A collective call."""
    folder, keep = attempt.run_folder / "checkpoints", attempt.recipe.checkpoint.keep
    with checkpoint.writing(folder, progress, keep, attempt.behaviour_sha256) as partial:
        ds.save_optimizer(engine, partial / checkpoint.OPTIMIZER)
        ds.save_weights(engine, partial / checkpoint.WEIGHTS, {"chat_contract": f"sha256:{attempt.behaviour_sha256}"})
        if dist.get_rank() == 0:
            shutil.copy(attempt.run_folder / "contract.json", partial)


def due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens at this one."""
    return every is not None and step % every == 0


def batches(shard: Any, share: int, patience: Patience) -> Iterator[Batch]:
    """This worker's steps in order, `share` packs each; a block of its stream is its part of a round of steps.

    Raises InfrastructureError where `patience` ends.
    """
    rows = None
    # With blocks to prefetch, Ray gives the first one only when it has the others; a round lasts many steps.
    blocks = iter(shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    started = time.monotonic()
    for block in patience.each(blocks):
        rows = rows or block.num_rows
        assert block.num_rows == rows and rows % share == 0, f"a block of {block.num_rows} packs is no part of a round"
        for meta, table in pipeline.steps_of(block, share):
            columns = [table.column(name).combine_chunks() for name in ("input_ids", "labels", "seq_lens")]
            packs = [(_row(columns[0], i), _row(columns[1], i), _row(columns[2], i)) for i in range(share)]
            yield Batch(packs, meta, time.monotonic() - started)
            started = time.monotonic()


def _row(column: Any, i: int) -> NDArray[np.int32]:
    """One list of an Arrow column as a NumPy view."""
    values: NDArray[np.int32] = column[i].values.to_numpy(zero_copy_only=False)
    return values


class Records:
    """World rank 0's records: the run folder's files, and MLflow."""

    def __init__(self, attempt: Attempt) -> None:
        recipe = attempt.recipe
        self._ledger = Ledger.open(attempt.run_folder, attempt.progress.step, recipe.data.max_refused * attempt.num_rows)
        self._tracker = Tracker(recipe.tracking.uri, attempt.run_id)

    def step(self, step: int, meta: StepMeta, metrics: dict[str, float]) -> None:
        """One trained step."""
        self._ledger.record(step, meta, metrics["train/loss"], metrics)
        self._tracker.log({**metrics, **(self._ledger.refused() if meta.refused else {})}, step)

    def refuse(self, meta: StepMeta) -> None:
        """Rows that were refused where no step was trained."""
        self._ledger.refuse(meta.refused)

    def measure(self, step: int, metrics: dict[str, float]) -> None:
        """Measurements after a step."""
        self._ledger.measure(step, metrics)
        self._tracker.log(metrics, step)

    def close(self) -> None:
        """Waits a while for MLflow to take what is left."""
        self._tracker.close()
