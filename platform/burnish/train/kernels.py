"""Norms and gated activations, each as one function that keeps little for its backward pass.

transformers computes them as chains of small operations. Each link reads and writes whole rows, and autograd keeps what it
needs: of a norm a copy of the row in float32, of a gate the activation beside its two inputs. Here a norm keeps its input
and one number a row, a gate its two inputs. On a GPU each is one kernel, where that is faster (`torch.compile`, or Liger's).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch.nn import functional as F

NormKind: TypeAlias = Literal["llama", "olmo2", "gemma"]
"""What is done last: the weight times what was rounded; that the other way round; 1 + the weight, then rounded."""
Activation: TypeAlias = Literal["silu", "gelu", "gelu_tanh"]
NORMS: tuple[NormKind, ...] = ("llama", "olmo2", "gemma")
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh")


@dataclass(frozen=True)
class Kernels:
    """How norms and gates are computed.

    `norm` takes rows [..., width], a weight [width], epsilon and a `NormKind`; `gate` takes two [..., width] and an
    `Activation`. Both are differentiable.
    """

    name: Literal["plain", "compiled", "liger"]
    norm: Callable[[torch.Tensor, torch.Tensor, float, NormKind], torch.Tensor]
    gate: Callable[[torch.Tensor, torch.Tensor, Activation], torch.Tensor]


def plain() -> Kernels:
    """Kernels of torch's own operations, on any device."""
    return _by("plain", lambda function: function)


def compiled(backend: str = "inductor") -> Kernels:
    """The same functions, each compiled when it is first called; on a GPU by Triton.

    One result serves rows of any number and width, others a single row and none.
    """
    return _by("compiled", partial(torch.compile, dynamic=True, backend=backend))


def _by(name: Literal["plain", "compiled"], made: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Kernels:
    norm, gate = (made(normed), made(_norm_gradients)), (made(gated), made(_gate_gradients))
    return Kernels(name, partial(_Norm.apply, norm), partial(_Gate.apply, gate))


def liger() -> Kernels:
    """Liger's kernels (arXiv 2410.10989), for a GPU. Raises ImportError where they are not installed."""
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def norm(inputs: torch.Tensor, weight: torch.Tensor, epsilon: float, kind: NormKind) -> torch.Tensor:
        rounded, offset = "llama" if kind == "llama" else "gemma", float(kind == "gemma")
        # Not in place: what comes from above may be used elsewhere.
        result: torch.Tensor = LigerRMSNormFunction.apply(inputs, weight, epsilon, offset, rounded, False)
        return result

    def gate(gates: torch.Tensor, values: torch.Tensor, activation: Activation) -> torch.Tensor:
        function = {"silu": LigerSiLUMulFunction, "gelu_tanh": LigerGELUMulFunction}.get(activation)
        result: torch.Tensor = function.apply(gates, values) if function else plain().gate(gates, values, activation)
        return result

    return Kernels("liger", norm, gate)


def probe(kind: str, rows: int, width: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Random inputs of a norm or a gate, and a gradient from above; the same at each call."""
    random = torch.Generator(device).manual_seed(0)
    shapes = ((rows, width), (width,) if kind in NORMS else (rows, width), (rows, width))
    return tuple(torch.randn(shape, generator=random, device=device, dtype=torch.float32).to(dtype) for shape in shapes)


class _Norm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + epsilon) times a weight, by rows (RMSNorm, arXiv 1910.07467)."""

    @staticmethod
    def forward(ctx: Any, kernels: Any, inputs: torch.Tensor, weight: torch.Tensor, epsilon: float, kind: NormKind) -> Any:
        output, scale = kernels[0](_rows(inputs), weight.detach(), epsilon, kind)
        ctx.save_for_backward(inputs, weight, scale)
        ctx.backward_kernel, ctx.kind = kernels[1], kind
        return _shaped(output, inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, weight, scale = ctx.saved_tensors
        told = _rows(outer[0]), _rows(inputs), weight.detach(), scale, ctx.kind, ctx.needs_input_grad[2]
        of_inputs, of_weight = ctx.backward_kernel(*told)
        return None, of_inputs.view(inputs.shape), of_weight, None, None


def normed(rows: torch.Tensor, weight: torch.Tensor, epsilon: float, kind: NormKind) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of rows [n, width], and the factor of each row, float32 [n, 1]."""
    wide = _wide(rows)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    if kind == "llama":
        return weight * (wide * scale).to(rows.dtype), scale
    return ((wide * scale) * _factor(weight, kind)).to(rows.dtype), scale


def _norm_gradients(
    outer: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, kind: NormKind, of_weight: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of rows and, where it is wanted, of the weight."""
    unit, gradient = _wide(rows) * scale, _wide(outer)
    summed = (gradient * unit).sum(0).to(weight.dtype) if of_weight else None
    gradient = gradient * _factor(weight, kind)
    along = (gradient * unit).mean(-1, keepdim=True)
    return gradient.addcmul_(unit, along, value=-1).mul_(scale).to(rows.dtype), summed


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """Rows [n, width] without a history, since what is compiled for tensors with one does not serve those without."""
    return tensor.detach().reshape(-1, tensor.shape[-1]).contiguous()


def _shaped(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Rows in the shape of a tensor; no view to autograd, which would refuse to have it changed in place."""
    return torch.ops.aten._unsafe_view(rows, like.shape)  # type: ignore[no-any-return]


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _factor(weight: torch.Tensor, kind: NormKind) -> torch.Tensor:
    return 1.0 + _wide(weight) if kind == "gemma" else weight


class _Gate(torch.autograd.Function):
    """activation(gates) * values."""

    @staticmethod
    def forward(ctx: Any, kernels: Any, gates: torch.Tensor, values: torch.Tensor, activation: Activation) -> Any:
        ctx.save_for_backward(gates, values)
        ctx.backward_kernel, ctx.activation = kernels[1], activation
        return _shaped(kernels[0](_rows(gates), _rows(values), activation), gates)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gates, values = ctx.saved_tensors
        of_gates, of_values = ctx.backward_kernel(_rows(outer[0]), _rows(gates), _rows(values), ctx.activation)
        return None, of_gates.view(gates.shape), of_values.view(gates.shape), None


def gated(gates: torch.Tensor, values: torch.Tensor, activation: Activation) -> torch.Tensor:
    """The product of [n, width]."""
    return _activated(gates, activation) * values


def _gate_gradients(
    outer: torch.Tensor, gates: torch.Tensor, values: torch.Tensor, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of both factors' inputs."""
    of_activated = outer * values
    if activation == "silu":
        of_gates = torch.ops.aten.silu_backward(of_activated, gates)
    else:
        how = "tanh" if activation == "gelu_tanh" else "none"
        of_gates = torch.ops.aten.gelu_backward(of_activated, gates, approximate=how)
    return of_gates, _activated(gates, activation).mul_(outer)


def _activated(gates: torch.Tensor, activation: Activation) -> torch.Tensor:
    if activation == "silu":
        return F.silu(gates)
    return F.gelu(gates, approximate="tanh" if activation == "gelu_tanh" else "none")
