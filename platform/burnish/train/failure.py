"""What an attempt's failure means: the end of the run, or another attempt. Decided here, done in `launch`."""

import torch
from ray.exceptions import RayTaskError
from ray.train import WorkerGroupError

from burnish.errors import BurnishError, DataError, TrainingError


def decide(error: WorkerGroupError) -> BurnishError | None:
    """What ends the run, or None where a worker or node was lost and another attempt may help.

    An exception of our own says itself what it is. One of Ray's own means that a worker is gone, and then the
    collectives of the others break. Any other exception raised by the training code would come again.
    """
    failures = list(error.worker_failures.values())
    for cause in (cause for failure in failures for cause in _causes(failure)):
        if type(cause).__module__ == "burnish.errors":
            assert isinstance(cause, BurnishError)
            return cause
        if isinstance(cause, MemoryError | torch.OutOfMemoryError):
            return TrainingError(f"out of memory: {last_line(cause)}. Lower data.max_length, or raise engine.zero_stage")
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
