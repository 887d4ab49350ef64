"""What ends a run and what starts another attempt."""

import pytest
import ray
import torch
from ray.train import WorkerGroupError

from burnish.errors import BurnishError, DataError, InfrastructureError, TrainingError
from burnish.train.failure import decide

LOST = ray.exceptions.RayActorError()
ECHO = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:10419")


@pytest.mark.parametrize("failures", [{0: LOST}, {0: ECHO, 1: LOST}, {0: ECHO}, {1: LOST, 0: ValueError("an echo")}, {}])
def test_a_lost_worker_means_another_attempt(failures):
    assert decide(WorkerGroupError("message", failures)) is None


def of_task(cause: Exception) -> Exception:
    """What `ray.get` raises for a task that raised `cause`."""
    error = ray.exceptions.RayTaskError("_slice_task", "Traceback ...", cause)
    return error.as_instanceof_cause()


@pytest.mark.parametrize(
    ("failures", "again"),
    [
        ({0: of_task(ModuleNotFoundError("no torch"))}, False),
        ({0: of_task(ModuleNotFoundError("no torch")), 1: ECHO}, False),
        ({0: of_task(ModuleNotFoundError("no torch")), 1: LOST}, True),
        ({0: of_task(ray.exceptions.ObjectLostError("ref", None, ""))}, True),
        ({0: of_task(ECHO)}, True),
    ],
)
def test_what_a_data_task_raised_by_itself_would_come_again(failures, again):
    reason = decide(WorkerGroupError("message", failures))
    assert (reason is None) is again
    assert again or (type(reason) is DataError and str(reason) == "a data task failed: ModuleNotFoundError: no torch")


@pytest.mark.parametrize(
    ("failures", "kind", "words"),
    [
        ({0: DataError("bad rows")}, DataError, "bad rows"),
        ({0: ECHO, 1: InfrastructureError("disk full")}, InfrastructureError, "disk full"),
        ({0: LOST, 1: TrainingError("nan")}, TrainingError, "nan"),
        ({0: torch.OutOfMemoryError("CUDA out of memory")}, TrainingError, "max_length"),
        ({0: KeyError("x"), 1: KeyError("x")}, BurnishError, "training failed"),
    ],
)
def test_what_would_come_again_ends_the_run(failures, kind, words):
    reason = decide(WorkerGroupError("message", failures))
    assert type(reason) is kind and words in str(reason)


def test_what_a_data_task_raised_is_found_inside_rays_wrapping():
    from ray.data.exceptions import UserCodeException

    def wrapped(cause: Exception) -> Exception:
        try:
            try:
                raise cause
            except Exception as error:
                raise UserCodeException("in a task") from error
        except UserCodeException as error:
            return error

    own = decide(WorkerGroupError("message", {0: wrapped(DataError("rows.jsonl: cannot be read")), 1: LOST}))
    assert type(own) is DataError and str(own) == "rows.jsonl: cannot be read"
    other = decide(WorkerGroupError("message", {0: wrapped(TypeError("odd row"))}))
    assert type(other) is DataError and "odd row" in str(other)
