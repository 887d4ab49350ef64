"""DeepSpeed: the one place that knows how it is configured, stepped and gathered."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file

from burnish.config import Recipe
from burnish.train.checkpoint import OPTIMIZER, WEIGHTS, Files
from burnish.train.memory import HostMemory

# Chosen before DeepSpeed is imported: it settles on an accelerator at import.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

# Its autotuner, which nothing here uses, would import MLflow, an eighth of the time in which a worker starts.
_unneeded = "mlflow" not in sys.modules
if _unneeded:
    sys.modules["mlflow"] = None  # type: ignore[assignment]
try:
    import deepspeed
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state
finally:
    if _unneeded:
        del sys.modules["mlflow"]

# DeepSpeed would compile a shared-memory collective with a C++ compiler at its first start on a CPU. Gloo does the same
# work, and a machine without a compiler can train.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

Engine: TypeAlias = Any
"""A `deepspeed.DeepSpeedEngine`; DeepSpeed has no type hints."""
Trained: TypeAlias = list[tuple[str, torch.nn.Parameter]]
"""The weights that are trained, by name, in the order of the model."""


def build_engine(recipe: Recipe, model: torch.nn.Module, num_workers: int) -> Engine:
    """The model under DeepSpeed with AdamW on its trainable weights; called by every worker."""
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=recipe.optim.learning_rate,
        weight_decay=recipe.optim.weight_decay,
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=configuration(recipe, num_workers))
    return engine


def configuration(recipe: Recipe, num_workers: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a recipe. One pack is one micro-batch."""
    accumulation = recipe.train.global_batch_size // num_workers
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        # DeepSpeed 0.19 clips to 1.0 where the key is absent.
        "gradient_clipping": recipe.optim.max_grad_norm,
        "zero_optimization": {"stage": recipe.engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": recipe.model.dtype == "bfloat16"},
        "fp16": {"enabled": recipe.model.dtype == "float16"},
        "steps_per_print": 1 << 60,
    }


def backward(engine: Engine, loss_sum: torch.Tensor, trained_tokens: int, num_workers: int) -> None:
    """Accumulates the gradient of one micro-batch's share of the step's loss.

    The step's gradient is that of sum(loss) / `trained_tokens` over all workers: DeepSpeed averages over workers, so
    the sum is scaled by their number, and not divided by the accumulation steps.
    """
    engine.backward(loss_sum * (num_workers / max(1, trained_tokens)), scale_wrt_gas=False)


def set_learning_rate(engine: Engine, learning_rate: float) -> None:
    """The learning rate of the next optimizer step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def step(engine: Engine) -> float:
    """Ends a micro-batch; after the last of a step, updates the weights. The 2-norm of the gradient before clipping.

    The norm is 0.0 inside a step. DeepSpeed does not report it for ZeRO-0 in float32, where each worker holds the
    whole averaged gradient.
    """
    last = engine.is_gradient_accumulation_boundary()
    whole = [p.grad for p in engine.module.parameters() if p.grad is not None] if last else []
    norm = float(torch.nn.utils.get_total_norm(whole)) if whole and engine.zero_optimization_stage() == 0 else 0.0
    engine.step()
    reported = engine.get_global_grad_norm() if last else None
    return norm if reported is None else float(reported)


def vocabulary(engine: Engine) -> int:
    """Tokens that the model tells apart."""
    return int(engine.module.config.get_text_config().vocab_size)


@torch.no_grad()
def snapshot(engine: Engine, metadata: dict[str, str]) -> Files:
    """This worker's files of a checkpoint, copied to the host's memory, so that training may go on. A collective call.

    World rank 0 has every trained weight, whole, with `metadata`. Every worker has its part of AdamW's float32 masters and
    moments: flat ranges that are the whole tensor laid end to end in the order of the workers, so that any number of
    workers can read them, each no more than it keeps.
    """
    memory, trained = HostMemory(engine, engine.device), _trained(engine)
    part = f"{OPTIMIZER}/{dist.get_rank():05d}-of-{dist.get_world_size():05d}.safetensors"
    try:
        weights = _gathered(engine, trained, memory)
        files: Files = {part: _optimizer_part(engine, trained, memory)}
    finally:
        memory.wait()
    if dist.get_rank() == 0:
        files[WEIGHTS] = (weights, metadata)
    return files


def load_weights(model: torch.nn.Module, file: Path) -> None:
    """Puts the weights of a checkpoint into a model that DeepSpeed does not hold yet."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = load_file(file)
    assert set(weights) == set(trained), f"{file} is of another model"
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])


def load_optimizer(engine: Engine, folder: Path) -> None:
    """Reads what any number of workers wrote. The model had its weights (`load_weights`) before DeepSpeed took it."""
    with ExitStack() as stack, torch.no_grad():
        files = [stack.enter_context(safe_open(file, "pt")) for file in sorted(folder.glob("*.safetensors"))]
        about = files[0].metadata()
        _begin_moments(engine, float(about["steps"]))
        for name, start, part in _parts(engine, _trained(engine)):
            part.copy_(_range(files, name, start, start + part.numel()))
        for name, value in json.loads(about["loss_scale"]).items():
            setattr(_scaler(engine), name, value)


_MASTER, _MOMENTS = "master", ("exp_avg", "exp_avg_sq")
_BUCKET_BYTES = 64 << 20
"""Weights that world rank 0 gathers at once, so that hundreds of small ones do not cost as many round trips."""


def _gathered(engine: Engine, trained: Trained, memory: HostMemory) -> dict[str, torch.Tensor]:
    """Every trained weight on world rank 0, nothing on the others. A collective call."""
    first = dist.get_rank() == 0
    if engine.zero_optimization_stage() < 3:
        return {name: memory.copied(weight) for name, weight in trained} if first else {}
    weights: dict[str, torch.Tensor] = {}
    for bucket in _buckets(trained):
        # DeepSpeed would gather them on every worker.
        pieces = [safe_get_local_fp32_param(weight).to(weight.dtype) for _, weight in bucket]
        own = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        parts: torch.Tensor | None = None
        if first:
            shape = torch.Size([dist.get_world_size(), own.numel()])
            parts = memory.room(shape, own.dtype) if own.is_cpu and len(bucket) == 1 else own.new_empty(shape)
        dist.gather(own, None if parts is None else list(parts))
        start = 0
        for name, weight in bucket if parts is not None else []:
            end = start + weight.partition_numel()  # type: ignore[attr-defined]
            # The last parts are filled up where a weight does not divide evenly.
            whole = parts[:, start:end].reshape(-1)[: weight.ds_numel]  # type: ignore[attr-defined,index]
            whole = whole.view(weight.ds_shape)  # type: ignore[attr-defined]
            weights[name] = whole if whole.is_cpu and len(bucket) == 1 else memory.copied(whole)
            start = end
    return weights


def _buckets(trained: Trained) -> Iterator[Trained]:
    """Weights of one type that travel together, no more than `_BUCKET_BYTES` of them, or one that is larger."""
    bucket: Trained = []
    size = 0
    for name, weight in trained:
        taken = weight.ds_numel * weight.dtype.itemsize  # type: ignore[attr-defined]
        if bucket and (size + taken > _BUCKET_BYTES or weight.dtype != bucket[0][1].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append((name, weight))
        size += taken
    if bucket:
        yield bucket


def _optimizer_part(engine: Engine, trained: Trained, memory: HostMemory) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """This worker's flat parts of masters and moments, and what all workers share."""
    if not _stepped(engine).state:
        _begin_moments(engine, 0.0)
    parts = {}
    for name, _, part in _parts(engine, trained):
        if engine.zero_optimization_stage() == 0:  # all workers have the same
            size = -(-part.numel() // dist.get_world_size())
            part = part[size * dist.get_rank() : size * (dist.get_rank() + 1)]
        parts[name] = memory.copied(part)
    # AdamW counts steps per tensor, and all of them step together (torch.optim.AdamW, bias correction).
    steps = next(float(state["step"]) for state in _stepped(engine).state.values())
    return parts, {"steps": str(steps), "loss_scale": json.dumps(_loss_scale(engine))}


def _trained(engine: Engine) -> Trained:
    return [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]


def _stepped(engine: Engine) -> torch.optim.Optimizer:
    """The AdamW that DeepSpeed steps; its parameters are DeepSpeed's own, a worker's part of them or whole."""
    optimizer: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return optimizer


def _masters(engine: Engine, trained: Trained) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Without ZeRO, the tensor that AdamW steps for each trained weight: the weight, or its float32 copy."""
    halves, masters = getattr(engine.optimizer, "fp16_groups", []), getattr(engine.optimizer, "fp32_groups", [])
    copies = {half: master for group in zip(halves, masters, strict=True) for half, master in zip(*group, strict=True)}
    return {parameter: copies.get(parameter, parameter) for _, parameter in trained}


def _begin_moments(engine: Engine, steps: float) -> None:
    """Gives AdamW the state that it has after its first step, all zeros, so that it can be filled or read."""
    if engine.zero_optimization_stage() == 3:  # its AdamW has parameters within a step only
        parts = engine.optimizer.fp32_partitioned_groups_flat
    else:
        parts = [part for group in _stepped(engine).param_groups for part in group["params"]]
    for part in parts:
        moments = {key: torch.zeros_like(part) for key in _MOMENTS}
        _stepped(engine).state[part] = {"step": torch.tensor(steps), **moments}
    if engine.zero_optimization_stage() in (1, 2):  # else DeepSpeed does it in its first step
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _parts(engine: Engine, trained: Trained) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Of each float32 master and moment the name, where this worker's flat range begins, and the range, to be written to."""
    stage = engine.zero_optimization_stage()
    masters = _masters(engine, trained) if stage == 0 else {}
    for name, weight in trained:
        for key in (_MASTER, *_MOMENTS):
            if stage == 0:
                master = masters[weight]
                start, part = 0, (master.detach() if key == _MASTER else _stepped(engine).state[master][key]).view(-1)
            elif stage == 3:
                start, part = _sharded(weight, key)
            else:
                start, part = _fragment(weight, key)
            yield f"{name}:{key}", start, part


def _sharded(weight: Any, key: str) -> tuple[int, torch.Tensor]:
    """Start and range under ZeRO-3, where workers share each weight."""
    own = safe_get_local_fp32_param(weight) if key == _MASTER else safe_get_local_optimizer_state(weight, key)
    start = weight.partition_numel() * dist.get_rank()
    # The last parts are filled up where a weight does not divide evenly.
    return start, own[: max(0, weight.ds_numel - start)]


def _fragment(weight: Any, key: str) -> tuple[int, torch.Tensor]:
    """Start and range under ZeRO-1 and 2, where workers share all weights laid end to end: none of most of them."""
    mapping = weight._hp_mapping
    if mapping is None:
        return 0, torch.empty(0)
    return mapping.lp_fragment_address.start, mapping.get_hp_fragment(None if key == _MASTER else key).detach()


def _range(files: list[Any], name: str, start: int, end: int) -> torch.Tensor:
    """Elements `start` to `end` of a flat tensor whose parts lie in these files, or as many as there are."""
    found, at = [torch.empty(0)], 0
    for file in files:
        part = file.get_slice(name)
        (size,) = part.get_shape()
        if at < end and start < at + size:
            found.append(part[max(start - at, 0) : min(end - at, size)])
        at += size
    return torch.cat(found)


def _scaler(engine: Engine) -> Any:
    """What holds the scale of float16's loss: DeepSpeed's scaler with ZeRO, its wrapper of AdamW without; else nothing."""
    return getattr(engine.optimizer, "loss_scaler", getattr(engine.optimizer, "loss_scale_config", None))


def _loss_scale(engine: Engine) -> dict[str, float | None]:
    """The scale of float16's loss, and what decides when it changes; every worker has the same."""
    names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
    return {name: getattr(_scaler(engine), name) for name in names if hasattr(_scaler(engine), name)}
