"""DeepSpeed: the one place that knows how it is configured and stepped; `state` knows where it keeps what."""

import os
import sys
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch

from burnish.config import Recipe
from burnish.train.layout import BUCKET_ELEMENTS, LIVE_ELEMENTS

# Chosen before DeepSpeed is imported: it settles on an accelerator at import.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

# Its autotuner, which nothing here uses, would import MLflow, an eighth of the time in which a worker starts.
_unneeded = "mlflow" not in sys.modules
if _unneeded:
    sys.modules["mlflow"] = None  # type: ignore[assignment]
try:
    import deepspeed as deepspeed  # `state` reads with it
    from deepspeed.runtime import compiler
    from deepspeed.runtime.zero import stage3, stage_1_and_2
finally:
    if _unneeded:
        del sys.modules["mlflow"]

# Its Muon optimizer, which nothing here uses either, is loaded with every engine and compiles functions where it is,
# which loads TorchInductor into every worker.
_compile, compiler.compile = compiler.compile, lambda: lambda function: function
try:
    import deepspeed.runtime.zero.muon.original_muon
finally:
    compiler.compile = _compile

# DeepSpeed would compile a shared-memory collective with a C++ compiler at its first start on a CPU. Gloo does the same
# work, and a machine without a compiler can train.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# A gradient that is no number has an infinite norm (its `combine_grad_norm_groups`), which ends a run
# (`failure.check_loss`); in float16 it looks at the gradients themselves. So it need not wait for the device to ask.
stage_1_and_2.is_invalid_grad_norm = stage3.is_invalid_grad_norm = lambda norm: False
# That function finds norms that are no numbers, so that nothing need stand for them, which would be copied to the device.
stage_1_and_2.mask_nan_or_inf_with_val_inplace = lambda norm, device: None

Engine: TypeAlias = Any
"""A `deepspeed.DeepSpeedEngine`; DeepSpeed has no type hints."""


def build_engine(recipe: Recipe, model: torch.nn.Module, num_workers: int) -> Engine:
    """The model under DeepSpeed with AdamW on its trainable weights; called by every worker."""
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=recipe.optim.learning_rate,
        weight_decay=recipe.optim.weight_decay,
        fused=True,  # one pass over the state, and no copies of it
    )
    config = configuration(recipe, num_workers)
    # DeepSpeed takes memory for a whole bucket, of adapters too.
    trained = sum(getattr(each, "ds_numel", each.numel()) for each in model.parameters() if each.requires_grad)
    config["zero_optimization"]["reduce_bucket_size"] = min(BUCKET_ELEMENTS, trained)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


class _Weights(torch.nn.Module):
    """Stands for a model towards DeepSpeed, which takes one parameter after the other from it."""

    def __init__(self, weights: Iterator[torch.nn.Parameter]) -> None:
        super().__init__()
        self._weights = weights

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        """The weights, each made when it is asked for."""
        return self._weights


def share_out(weights: Iterator[torch.nn.Parameter], recipe: Recipe, num_workers: int) -> None:
    """Leaves each worker its part of every weight under ZeRO-3, and takes the next one when the one before is shared out.

    World rank 0's values count; on the other workers any tensor of the shape will do. A collective call.
    """
    deepspeed.zero.Init(module=_Weights(weights), config_dict_or_path=configuration(recipe, num_workers))


def configuration(recipe: Recipe, num_workers: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a recipe. One pack is one micro-batch."""
    accumulation = recipe.train.global_batch_size // num_workers
    offload = {"device": "cpu", "pin_memory": os.environ["DS_ACCELERATOR"] == "cuda"}
    # Gradients of a step's packs are added in float32. In stage 1 DeepSpeed would take an optimizer that keeps its state
    # where `state` does not look.
    widens = accumulation > 1 and recipe.model.dtype == "bfloat16" and recipe.engine.stage() >= 2
    return {
        "data_types": {"grad_accum_dtype": "fp32" if widens else None},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        # DeepSpeed 0.19 clips to 1.0 where the key is absent.
        "gradient_clipping": recipe.optim.max_grad_norm,
        "zero_optimization": {
            # Frozen weights are shared out by `shards`.
            "stage": recipe.engine.stage() if recipe.lora is None else min(recipe.engine.stage(), 2),
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "stage3_max_live_parameters": LIVE_ELEMENTS,
            "stage3_max_reuse_distance": LIVE_ELEMENTS,
            **({"offload_optimizer": offload} if recipe.engine.offload == "optimizer" else {}),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's own AdamW needs no compiler
        "bf16": {"enabled": recipe.model.dtype == "bfloat16", "check_grad_overflow": False},
        "fp16": {"enabled": recipe.model.dtype == "float16"},
        "steps_per_print": 1 << 60,
        "timers": {"throughput": {"enabled": False}},  # which wait for the device around every pack
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


def step(engine: Engine) -> torch.Tensor:
    """Ends a micro-batch; after the last of a step, updates the weights. The 2-norm of the gradient before clipping.

    The norm is a scalar on the device, which is not waited for, and 0.0 inside a step. DeepSpeed does not report it for
    ZeRO-0 in float32, where each worker holds the whole averaged gradient.
    """
    last = engine.is_gradient_accumulation_boundary()
    whole = engine.module.parameters() if last and engine.zero_optimization_stage() == 0 else ()
    gradients = [weight.grad for weight in whole if weight.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=engine.device)
    engine.step()
    reported = engine.get_global_grad_norm() if last else None
    return torch.as_tensor(norm if reported is None else reported, dtype=torch.float64, device=engine.device)


def vocabulary(engine: Engine) -> int:
    """Tokens that the model tells apart."""
    return int(engine.module.config.get_text_config().vocab_size)
