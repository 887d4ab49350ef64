"""A linear layer with its adapter as one function, where PEFT runs five modules one after the other.

PEFT reads and writes a layer's output three times more than the base alone. Here the adapter's output is added by the
product that makes it (LoRAFusion, arXiv 2510.00206, section 3, counts what that saves).
The modules and their weights stay PEFT's, so that checkpoints and exports know nothing of it.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

_ADAPTER = "default"
"""PEFT's name of the only adapter."""


def fuse(model: nn.Module) -> None:
    """Has every linear layer that has a plain adapter compute by one function; others, as DoRA's, stay as they are."""
    from peft.tuners.lora import Linear  # seconds to import, which a run of all weights does without

    for module in model.modules():
        if type(module) is Linear and _is_plain(module):
            module.forward = partial(_forward, module)


def _is_plain(module: Any) -> bool:
    """Whether a linear layer with adapters has one alone, without dropout, bias or a variant of its own."""
    return (
        type(module.base_layer) is nn.Linear
        and set(module.lora_A) == {_ADAPTER}
        and not module.base_layer._forward_pre_hooks  # a head whose weight is gathered when it is called
        and not module.lora_variant
        and isinstance(module.lora_dropout[_ADAPTER], nn.Identity)
        and module.lora_A[_ADAPTER].weight.dtype == module.base_layer.weight.dtype
        and not any(module.lora_bias.values())
    )


def _forward(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    base, down, up = module.base_layer, module.lora_A[_ADAPTER].weight, module.lora_B[_ADAPTER].weight
    weights = base.weight, base.bias, down, up
    output: torch.Tensor = _LoraLinear.apply(inputs, *weights, module.scaling[_ADAPTER])  # type: ignore[no-untyped-call]
    return output


class _LoraLinear(torch.autograd.Function):
    """x W^T + bias + scale (x A^T) B^T, with gradients of x, A and B (LoRA, arXiv 2106.09685, section 4.1)."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        rows = inputs.flatten(0, -2)
        inner = rows @ down.T
        output = F.linear(rows, weight, bias).addmm_(inner, up.T, alpha=scale)
        ctx.save_for_backward(inputs, inner, weight, down, up)
        ctx.scale = scale
        return output.view(*inputs.shape[:-1], output.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, inner, weight, down, up = ctx.saved_tensors
        gradient, rows = outer[0].flatten(0, -2), inputs.flatten(0, -2)
        of_inner = (gradient @ up).mul_(ctx.scale)
        of_inputs = (gradient @ weight).addmm_(of_inner, down).view(inputs.shape) if ctx.needs_input_grad[0] else None
        of_up = (gradient.T @ inner).mul_(ctx.scale)
        return of_inputs, None, None, of_inner.T @ rows, of_up, None
