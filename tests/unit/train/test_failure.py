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
