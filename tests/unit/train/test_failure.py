"""What ends a run and what starts another attempt."""

import errno

import numpy as np
import pytest
import ray
import torch
from ray.train import WorkerGroupError

from burnish.data.order import Cursor, StepMeta
from burnish.errors import BurnishError, DataError, InfrastructureError, OutOfMemory, TrainingError
from burnish.train.failure import check_loss, check_tokens, decide, memory_advice


@pytest.fixture
def recipe(make_recipe):
    return make_recipe(data={"max_length": 64})


LOST = ray.exceptions.RayActorError()
ECHO = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:10419")


STALE = OSError(errno.ESTALE, "Stale file handle")


@pytest.mark.parametrize(
    "failures",
    [{0: LOST}, {0: ECHO, 1: LOST}, {0: ECHO}, {1: LOST, 0: ValueError("an echo")}, {}, {0: STALE}, {0: ECHO, 1: STALE}],
)
def test_a_lost_worker_means_another_attempt(failures, recipe):
    assert decide(WorkerGroupError("message", failures), recipe) is None


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
def test_what_a_data_task_raised_by_itself_would_come_again(failures, again, recipe):
    reason = decide(WorkerGroupError("message", failures), recipe)
    assert (reason is None) is again
    assert again or (type(reason) is DataError and str(reason) == "a data task failed: ModuleNotFoundError: no torch")


@pytest.mark.parametrize(
    ("failures", "kind", "words"),
    [
        ({0: DataError("bad rows")}, DataError, "bad rows"),
        ({0: ECHO, 1: InfrastructureError("disk full")}, InfrastructureError, "disk full"),
        ({0: LOST, 1: TrainingError("nan")}, TrainingError, "nan"),
        ({0: torch.OutOfMemoryError("CUDA out of memory")}, OutOfMemory, "max_length"),
        ({0: RuntimeError("CUDA error: out of memory")}, OutOfMemory, "max_length"),
        ({0: RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling")}, OutOfMemory, "max_length"),
        ({0: torch.distributed.DistBackendError("NCCL: Cuda failure 2 'out of memory'")}, OutOfMemory, "max_length"),
        ({0: KeyError("x"), 1: KeyError("x")}, BurnishError, "training failed"),
        ({0: FileNotFoundError(errno.ENOENT, "No such file", "kernel.so")}, BurnishError, "training failed"),
        ({0: OSError("no number, so no storage")}, BurnishError, "training failed"),
        ({0: OSError(errno.ENOSPC, "No space left", "/runs/x"), 1: ECHO}, InfrastructureError, "No space left"),
    ],
)
def test_what_would_come_again_ends_the_run(failures, kind, words, recipe):
    reason = decide(WorkerGroupError("message", failures), recipe)
    assert type(reason) is kind and words in str(reason)


def test_what_a_data_task_raised_is_found_inside_rays_wrapping(recipe):
    from ray.data.exceptions import UserCodeException

    def wrapped(cause: Exception) -> Exception:
        try:
            try:
                raise cause
            except Exception as error:
                raise UserCodeException("in a task") from error
        except UserCodeException as error:
            return error

    own = decide(WorkerGroupError("message", {0: wrapped(DataError("rows.jsonl: cannot be read")), 1: LOST}), recipe)
    assert type(own) is DataError and str(own) == "rows.jsonl: cannot be read"
    other = decide(WorkerGroupError("message", {0: wrapped(TypeError("odd row"))}), recipe)
    assert type(other) is DataError and "odd row" in str(other)


def meta(trained_tokens=100):
    return StepMeta(((0, 3, 1), (0, 3, 7)), 200, trained_tokens, 0.5, Cursor(), (), 4, 1.0)


@pytest.mark.parametrize(
    ("loss", "grad_norm", "tokens"),
    [
        (float("nan"), 1.0, 100),
        (float("inf"), 1.0, 100),
        (2.0, float("nan"), 100),
        (12.1, 1.0, 64),
        (2.0, float("inf"), 100),
    ],
)
def test_a_loss_that_is_no_number_or_explodes_ends_the_run_and_names_its_packs(recipe, loss, grad_norm, tokens):
    with pytest.raises(
        TrainingError,
        match=r"loss of step 7 is .*\(0, 3, 1\), \(0, 3, 7\)\. The weights after step 6 gave it\. Lower optim.learning_rate, now",
    ):
        check_loss(recipe, 7, meta(tokens), loss, grad_norm, 400)


def test_a_loss_that_a_model_may_have_ends_nothing(make_recipe, recipe):
    check_loss(recipe, 7, meta(), 11.9, 300.0, 400)  # guessing among 400 has 5.99
    check_loss(recipe, 7, meta(63), 40.0, 1.0, 400)  # a few odd tokens
    half = make_recipe(model={"dtype": "float16"})
    check_loss(half, 7, meta(), 2.0, float("inf"), 400)  # how float16 finds its loss scale


def test_no_memory_says_what_was_tried_and_what_to_write_and_other_errors_pass(make_recipe):
    recipe = make_recipe(engine={"zero_stage": 0}, data={"max_length": 64})
    words = r"out of memory in step 3, 60 tokens in a pack, float32, ZeRO-0: .*can't allocate.* Write "
    words += r"model.activation_checkpointing: true, or engine.zero_stage: 3, or under a new name model.dtype: bfloat16, "
    with (
        pytest.raises(OutOfMemory, match=words + r"or data.max_length: 32, or lora: \{rank: 16\}, or take more workers"),
        memory_advice(recipe, 3, 60),
    ):
        torch.empty(1 << 50)
    with pytest.raises(RuntimeError, match="odd"), memory_advice(recipe, 3, 60):
        raise RuntimeError("odd")


def test_a_token_without_an_embedding_is_named_with_its_packs():
    meta = StepMeta(((0, 1, 2),), 3, 3, 0.5, Cursor(), (), 1, 1.0)
    check_tokens(np.array([1, 2, 9], np.int32), meta, 10)
    check_tokens(np.array([], np.int32), meta, 10)
    with pytest.raises(
        DataError, match=r"the token 10 is in one of the packs .* \(0, 1, 2\), and the model has embeddings of 10 "
    ):
        check_tokens(np.array([1, 10, 9], np.int32), meta, 10)
