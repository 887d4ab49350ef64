"""What an attempt's failure means: the end of the run, or another attempt. Decided here, done in `launch`."""

import errno
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from ray.exceptions import OutOfMemoryError, RayTaskError
from ray.train import TrainingFailedError

from burnish import storage
from burnish.config import Recipe
from burnish.data.order import StepMeta
from burnish.errors import BurnishError, DataError, InfrastructureError, OutOfMemory, TrainingError
from burnish.train.architecture import unembedded

_FEWEST_TOKENS = 64
"""Trained tokens below which the loss of a step may be anything."""


def check_loss(recipe: Recipe, step: int, meta: StepMeta, loss: float, grad_norm: float, vocabulary: int) -> None:
    """Raises TrainingError, with the packs of the step, where its loss is no number or explodes.

    Guessing among v tokens has a loss of log(v); a model that is twice as bad over a whole step is broken. An infinite
    gradient norm is how float16 finds its loss scale, and no error.
    """
    overflow = not math.isfinite(grad_norm) and recipe.model.dtype != "float16"
    exploded = loss > 2 * math.log(max(2, vocabulary)) and meta.trained_tokens >= _FEWEST_TOKENS
    if math.isfinite(loss) and not overflow and not exploded:
        return
    why = f", twice as bad as guessing among {vocabulary:,} tokens ({math.log(vocabulary):.3g})" if exploded else ""
    packs = ", ".join(map(str, meta.packs))
    raise TrainingError(
        f"the loss of step {step} is {loss:.6g}{why}, its gradient norm {grad_norm:.6g}; its packs (epoch, window, index) "
        f"are {packs}. The weights after step {step - 1} gave it. Lower optim.learning_rate, now "
        f"{recipe.optim.learning_rate:g}, or raise optim.warmup_steps, under a new name; the checkpoints before it stand"
    )


def check_tokens(input_ids: NDArray[np.int32], meta: StepMeta, embedded: int) -> None:
    """Raises DataError, with the packs of the step, where the model has no embedding of a token.

    The first rows of each file are checked before a worker starts; a GPU would end at such a token without saying which.
    """
    token = unembedded(input_ids, embedded)
    if token is not None:
        raise DataError(
            f"the token {token} is in one of the packs (epoch, window, index) {', '.join(map(str, meta.packs))}, and the "
            f"model has embeddings of {embedded:,} tokens: take the tokenizer that it was made with, or a model resized for "
            "this one, under a new name"
        )


@contextmanager
def memory_advice(recipe: Recipe, step: int, tokens: int) -> Iterator[None]:
    """Raises OutOfMemory, with what was tried and what to lower, where the block runs out of memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        tried = f"step {step}, {tokens:,} tokens in a pack, {recipe.model.dtype}, ZeRO-{recipe.engine.stage()}"
        raise OutOfMemory(f"out of memory in {tried}: {last_line(error)}. {memory_options(recipe)}") from error


def memory_options(recipe: Recipe) -> str:
    """What a recipe can change to need less memory on a worker, what costs least first; the rest under a new name."""
    options = []
    if recipe.model.activation_checkpointing is not True:
        options.append("model.activation_checkpointing: true")
    if recipe.engine.zero_stage != 3 and recipe.model.quantize is None:
        options.append("engine.zero_stage: 3")
    renamed = ["model.dtype: bfloat16"] if recipe.model.dtype == "float32" else []
    renamed.append(f"data.max_length: {recipe.data.max_length // 2}")
    if recipe.lora is None:
        renamed.append("lora: {rank: 16}")
    options.append(f"under a new name {', or '.join(renamed)}")
    return f"Write {', or '.join(options)}, or take more workers"


def _is_memory(error: BaseException) -> bool:
    # cuBLAS, NCCL and page-locked memory say it in words alone.
    words = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    said = isinstance(error, RuntimeError) and any(each in str(error) for each in words)
    return said or isinstance(error, MemoryError | torch.OutOfMemoryError)


def decide(error: TrainingFailedError, recipe: Recipe) -> BurnishError | None:
    """What ends the run, or None where a worker or node was lost and another attempt may help.

    An exception of our own says itself what it is. A storage that failed may work again. One of Ray's own means that a
    worker is gone, and then the collectives of the others break. Any other exception raised by the training code would come
    again.
    """
    failures = list(getattr(error, "worker_failures", {}).values())
    causes = [cause for failure in failures for cause in _causes(failure)]
    for cause in causes:
        if type(cause).__module__ == "burnish.errors":
            assert isinstance(cause, BurnishError)
            return cause
        if _is_memory(cause):
            return OutOfMemory(f"out of memory: {last_line(cause)}. {memory_options(recipe)}")
    # pyarrow and transformers raise an OSError without a number for much else, and a file that lacks would lack again.
    refused = [cause for cause in causes if isinstance(cause, OSError) and cause.errno not in (None, errno.ENOENT)]
    final = next((cause for cause in refused if not storage.may_pass(cause)), None)
    if final is not None:
        return InfrastructureError(f"a worker could not write or read: {last_line(final)}; the same command may go on")
    if refused:
        return None
    for cause in causes:
        if type(cause).__name__ == "UserCodeException":  # Ray Data's, around what a data task raised
            return DataError(f"a data task failed: {last_line(cause.__cause__ or cause)}")
    # Where one worker was lost, whatever the others raise is its echo; where a data task failed, a broken collective is.
    tasks = [failure for failure in failures if isinstance(failure, RayTaskError) and not _means_lost(failure)]
    if tasks and not any(_of_ray(failure) for failure in failures):
        cause = tasks[0].cause
        return DataError(f"a data task failed: {type(cause).__name__}: {last_line(cause)}")
    if any(_means_lost(failure) for failure in failures) or not failures:
        return None
    return BurnishError(f"training failed: {error}")


def lost_to_memory(error: TrainingFailedError) -> bool:
    """Whether Ray ended a worker because its node had no memory left."""
    return any(isinstance(failure, OutOfMemoryError) for failure in getattr(error, "worker_failures", {}).values())


def _causes(failure: BaseException) -> list[BaseException]:
    """An exception and what it wraps, the innermost first."""
    chain = [failure]
    while (inner := getattr(chain[-1], "cause", None) or chain[-1].__cause__) is not None and inner not in chain:
        chain.append(inner)
    return chain[::-1]


def _means_lost(failure: BaseException) -> bool:
    """Whether an exception says that another process is gone: Ray's own, or a collective that lost its peer."""
    if isinstance(failure, RayTaskError):
        return _means_lost(failure.cause)
    broken = ("connection closed by peer", "connection reset by peer", "broken pipe", "nccl", "timed out waiting")
    text = str(failure).lower()
    return (
        _of_ray(failure)
        or isinstance(failure, torch.distributed.DistError)
        or (isinstance(failure, RuntimeError) and any(words in text for words in broken))
    )


def _of_ray(failure: BaseException) -> bool:
    """Whether an exception is Ray's own, not one of a task that Ray has wrapped."""
    return type(failure).__module__.startswith("ray.") and not isinstance(failure, RayTaskError)


def last_line(error: BaseException) -> str:
    """The last line of an error's text, where a traceback says what happened."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)[:200]
