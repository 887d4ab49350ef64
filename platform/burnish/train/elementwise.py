"""Norms and gated layers of a model as one function each, where transformers computes them by a chain of small operations.

The modules and their weights stay the model's, so that checkpoints and exports know nothing of it.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from burnish.train.kernels import ACTIVATIONS, NORMS, Activation, Kernels, NormKind, gated, normed, probe

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""What a gated layer is made of, down(activation(gate(x)) * up(x)) (GLU variants, arXiv 2002.05202)."""


def replaceable(model: nn.Module) -> dict[nn.Module, NormKind | Activation]:
    """The norms and gated layers for which torch's own operations in `kernels` give the same bits as their own forward.

    That is tried on a small twin of each, on the CPU; what gives something else, or cannot be told, is not among them. A
    model whose code changes what it has given to a norm before the backward pass raises then.
    """
    found: dict[nn.Module, NormKind | Activation] = {}
    for module in model.modules():
        kind = None if "forward" in vars(module) else _norm_kind(module) or _activation(module)
        if kind is not None:
            found[module] = kind
    return found


def fuse(modules: dict[nn.Module, NormKind | Activation], kernels: Kernels) -> None:
    """Has `replaceable` modules compute by `kernels`."""
    for module, kind in modules.items():
        module.forward = _Fused(_norm_forward if kind in NORMS else _gated_forward, module, kernels, kind)


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """The model with the forward of its classes where `fuse` put another one."""
    ours = [(each, each.forward) for each in model.modules() if isinstance(vars(each).get("forward"), _Fused)]
    for module, _ in ours:
        del module.forward
    try:
        yield
    finally:
        for module, forward in ours:
            module.forward = forward


class _Fused(partial[torch.Tensor]):
    """A forward of ours."""


def _norm_forward(module: Any, kernels: Kernels, kind: NormKind, *told: Any, **named: Any) -> Any:
    # A weight that is shared out has its shape only now.
    if named or len(told) != 1 or module.weight.dim() != 1:
        return type(module).forward(module, *told, **named)
    return kernels.norm(told[0], module.weight, _epsilon(module), kind)


def _gated_forward(module: Any, kernels: Kernels, activation: Activation, *told: Any, **named: Any) -> Any:
    if named or len(told) != 1:
        return type(module).forward(module, *told, **named)
    return module.down_proj(kernels.gate(module.gate_proj(*told), module.up_proj(*told), activation))


def _epsilon(module: Any) -> float:
    return float(module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps)


def _norm_kind(module: Any) -> NormKind | None:
    """The kind whose values are bit for bit those of this norm, or None."""
    weight = module._parameters.get("weight")
    if len(module._parameters) != 1 or weight is None or module._modules or not type(module).__name__.endswith("RMSNorm"):
        return None
    drawn, kinds = partial(probe, "llama", 7, 48, torch.device("cpu")), list(NORMS)
    weight = drawn(weight.dtype)[1]
    twin = _twin(module, _parameters={"weight": nn.Parameter(weight, requires_grad=False)})
    try:
        # Where numbers are small, as the second ones are, epsilon shows.
        for dtype, size in product((weight.dtype, torch.bfloat16), (1.0, 1e-3)):
            inputs = drawn(dtype)[0] * size
            right = type(module).forward(twin, inputs)
            kinds = [kind for kind in kinds if _same(normed(inputs, weight, _epsilon(module), kind)[0], right)]
    except Exception:  # any code of any model runs here
        return None
    return next(iter(kinds), None)


def _activation(module: Any) -> Activation | None:
    """The activation with which a gate gives bit for bit what this layer gives, or None."""
    if not set(_PROJECTIONS) <= set(module._modules) <= {*_PROJECTIONS, "act_fn"} or module._parameters:
        return None
    drawn, kinds = partial(probe, "silu", 24, 24, torch.device("cpu")), list(ACTIVATIONS)
    kept = {name: part for name, part in module._modules.items() if name not in _PROJECTIONS}
    try:
        # Where numbers are large, as the second ones are, a limit shows; where they are short, a wider type between.
        for dtype, size in product((torch.float32, torch.bfloat16), (1.0, 1e3)):
            inputs, *weights = drawn(dtype)
            gate, up, down = (partial(F.linear, weight=weight) for weight in (*weights, weights[0].flip(0)))
            twin = _twin(module, _modules=kept | {"gate_proj": gate, "up_proj": up, "down_proj": down})
            inputs = inputs * size
            right = type(module).forward(twin, inputs)
            kinds = [kind for kind in kinds if _same(down(gated(gate(inputs), up(inputs), kind)), right)]
    except Exception:  # any code of any model runs here
        return None
    return next(iter(kinds), None)


def _twin(module: nn.Module, **parts: dict[str, Any]) -> nn.Module:
    """A copy of a module with other weights or parts, in training, where some drop what they give out."""
    twin = copy.copy(module)
    vars(twin).update(parts, training=True)
    return twin


def _same(one: torch.Tensor, other: Any) -> bool:
    return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
