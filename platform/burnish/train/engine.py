"""DeepSpeed: the one place that knows how it is configured, stepped and gathered."""

import os
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from burnish.config import Recipe

# Chosen before DeepSpeed is imported: it settles on an accelerator at import.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

# DeepSpeed would compile a shared-memory collective with a C++ compiler at its first start on a CPU. Gloo does the same
# work, and a machine without a compiler can train.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

Engine: TypeAlias = Any
"""A `deepspeed.DeepSpeedEngine`; DeepSpeed has no type hints."""


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


def save_weights(engine: Engine, file: Path, metadata: dict[str, str]) -> None:
    """Writes every trained weight, whole, to one safetensors file on world rank 0. A collective call."""
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in _trained(engine):
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_optimization_stage() == 3):
            if dist.get_rank() == 0:
                weights[name] = parameter.detach().to("cpu", copy=True).contiguous()
    if dist.get_rank() == 0:
        save_file(weights, file, metadata={"format": "pt", **metadata})


def load_weights(model: torch.nn.Module, file: Path) -> None:
    """Puts the weights that `save_weights` wrote into a model that DeepSpeed does not hold yet."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = load_file(file)
    assert set(weights) == set(trained), f"{file} is of another model"
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])


def save_state(engine: Engine, folder: Path) -> None:
    """Writes what DeepSpeed needs to go on, each worker its part; frozen weights are left out. A collective call."""
    engine.save_checkpoint(str(folder), tag="state", save_latest=False, exclude_frozen_parameters=True)


def load_state(engine: Engine, folder: Path) -> None:
    """Reads what `save_state` wrote, with the same number of workers. A collective call.

    The files are pickles: the caller has verified them against a manifest.
    """
    engine.load_checkpoint(str(folder), tag="state", load_module_strict=False)


def save_whole_state(engine: Engine, file: Path) -> None:
    """Writes the float32 master and AdamW's moments of every trained weight, whole, on world rank 0. A collective call.

    It is read back on any number of workers and with any ZeRO stage. All of it goes through the memory of rank 0, so it is
    for adapters.
    """
    if not _stepped(engine).state:
        _begin_moments(engine, 0.0)
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in _trained(engine):
        for key in (_MASTER, *_MOMENTS):
            whole = _gathered(engine, parameter, key)
            if dist.get_rank() == 0:
                tensors[f"{name}:{key}"] = whole.detach().to("cpu", copy=True).contiguous()
    if dist.get_rank() == 0:
        # AdamW counts steps per tensor, and all of them step together (torch.optim.AdamW, bias correction).
        steps = next(float(state["step"]) for state in _stepped(engine).state.values())
        save_file(tensors, file, metadata={"format": "pt", "steps": str(steps)})


def load_whole_state(engine: Engine, file: Path) -> None:
    """Reads what `save_whole_state` wrote. The model had its weights (`load_weights`) before DeepSpeed took it."""
    with safe_open(file, "pt") as stored:
        _begin_moments(engine, float(stored.metadata()["steps"]))
        for name, parameter in _trained(engine):
            for key in (_MASTER, *_MOMENTS):
                _scatter(engine, parameter, key, stored.get_tensor(f"{name}:{key}"))


_MASTER, _MOMENTS = "master", ("exp_avg", "exp_avg_sq")


def _trained(engine: Engine) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]


def _stepped(engine: Engine) -> torch.optim.Optimizer:
    """The AdamW that DeepSpeed steps; its parameters are DeepSpeed's own, a worker's part of them or whole."""
    optimizer: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return optimizer


def _masters(engine: Engine) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Without ZeRO, the tensor that AdamW steps for each trained weight: the weight, or its float32 copy."""
    halves, masters = getattr(engine.optimizer, "fp16_groups", []), getattr(engine.optimizer, "fp32_groups", [])
    copies = {half: master for group in zip(halves, masters, strict=True) for half, master in zip(*group, strict=True)}
    return {parameter: copies.get(parameter, parameter) for _, parameter in _trained(engine)}


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


def _gathered(engine: Engine, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
    """The whole float32 master or moment of a weight, on every worker. A collective call."""
    whole: torch.Tensor
    if engine.zero_optimization_stage() == 0:
        master = _masters(engine)[parameter]
        whole = master if key == _MASTER else _stepped(engine).state[master][key]
    elif key == _MASTER:
        whole = safe_get_full_fp32_param(parameter)
    else:
        whole = safe_get_full_optimizer_state(parameter, key)
    return whole


def _scatter(engine: Engine, parameter: torch.nn.Parameter, key: str, whole: torch.Tensor) -> None:
    """Keeps this worker's part of a whole master or moment."""
    whole = whole.to(engine.device)
    if engine.zero_optimization_stage() == 0:
        _gathered(engine, parameter, key).data.copy_(whole)
    elif engine.zero_optimization_stage() == 3:
        # DeepSpeed's setter of whole values cannot fill the last part where a weight does not divide evenly.
        size, rank = parameter.partition_numel(), dist.get_rank()  # type: ignore[attr-defined]
        padded = torch.nn.functional.pad(whole.flatten(), (0, size * dist.get_world_size() - whole.numel()))
        part = padded[size * rank : size * (rank + 1)]
        if key == _MASTER:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, key)
    elif key == _MASTER:
        safe_set_full_fp32_param(parameter, whole)
    else:
        safe_set_full_optimizer_state(parameter, whole, key)
