"""How good a model in training is: its held-out loss, the answers that it writes, and whether it still gets better."""

import logging
import math

import ray.train
import torch
import torch.distributed as dist

from burnish.config import Recipe
from burnish.errors import DataError, TrainingError
from burnish.train import engine as ds
from burnish.train.batches import batches
from burnish.train.failure import check_tokens
from burnish.train.generation import greedy
from burnish.train.schedule import evaluations_without_gain
from burnish.train.step import summed
from burnish.train.worker import Records, Worker

logger = logging.getLogger(__name__)


def has_learned(recipe: Recipe, losses: list[float], step: int) -> bool:
    """Whether the held-out loss has not fallen for as many evaluations as the recipe waits; the same on every worker."""
    patience = recipe.train.early_stopping
    if patience is None or evaluations_without_gain(losses) < patience:
        return False
    if dist.get_rank() == 0:
        logger.warning(
            "stopped early at step %d: the held-out loss was %.4f and has not fallen in %d evaluations since",
            step, min(losses), patience,
        )  # fmt: skip
    return True


def generate(worker: Worker, records: Records | None, step: int) -> None:
    """Notes what the model answers to the attempt's questions. A collective call."""
    attempt, engine, template = worker.attempt, worker.engine, worker.attempt.template
    if not attempt.questions:
        return
    engine.eval()
    most, capacity = worker.recipe.train.generation_tokens, worker.recipe.data.max_length
    beat = worker.watchdog.beat
    answers = greedy(engine, attempt.questions, template.stop_ids, most, capacity, engine.device, beat)
    engine.train()
    worker.watchdog.rest()
    if records:
        noted = [
            {
                "row": question.row,
                "prompt": template.decode(question.prompt),
                "reference": template.decode(question.reference),
                "answer": template.decode(answer),
                "stopped": answer[-1] in template.stop_ids,
            }
            for question, answer in zip(attempt.questions, answers, strict=True)
        ]
        records.generate(step, noted)


def evaluate(worker: Worker, records: Records | None, step: int) -> dict[str, float]:
    """Loss and perplexity over all held-out rows, each trained token of them counted once. A collective call."""
    engine = worker.engine
    engine.eval()
    shared = torch.zeros(2, dtype=torch.float64, device=engine.device)
    with torch.no_grad():
        share = worker.recipe.train.global_batch_size // dist.get_world_size()
        held_out = batches(ray.train.get_dataset_shard("eval"), share, worker.attempt.patience)
        for batch in worker.watchdog.patient(held_out):
            for input_ids, labels, seq_lens in batch.packs:
                check_tokens(input_ids, batch.meta, ds.vocabulary(engine))
                shared[0] += worker.objective.loss_sum(input_ids, labels, seq_lens)
                worker.watchdog.beat()
            shared[1] += batch.meta.trained_tokens / dist.get_world_size()
            if records:
                records.refuse(batch.meta)
    engine.train()
    total, count = summed(shared)
    if count == 0:
        raise DataError("data.eval: no token of the held-out rows can be trained, so there is no loss to measure")
    loss = total / count
    if not math.isfinite(loss):
        raise TrainingError(f"the evaluation loss after step {step} is {loss}. Lower optim.learning_rate")
    metrics = {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}
    generate(worker, records, step)
    if records:
        records.measure(step, metrics)
    return metrics
