"""Which kernels compute a model's norms and gates: torch's own, compiled ones or Liger's, timed on the device of the run."""

import importlib.util
import logging
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from burnish.config import Recipe
from burnish.errors import RecipeError, one_line
from burnish.train.architecture import layer_widths
from burnish.train.kernels import (
    ACTIVATIONS,
    NORMS,
    Activation,
    Kernels,
    NormKind,
    compiled,
    gated,
    liger,
    normed,
    plain,
    probe,
)

_CHECKED = 37
"""Rows that are compared with torch's own."""
_TIMED = 8192
"""Rows that are timed at most, so that a device with room for one pack has room for them."""
_ROUNDS = 10
"""Times that each way is timed; the median counts."""

logger = logging.getLogger(__name__)

_MAKERS: dict[str, Callable[[], Kernels]] = {"plain": plain, "compiled": compiled, "liger": liger}


@dataclass(frozen=True)
class Work:
    """What kernels are chosen for: norms of rows [rows, width] and gates of [rows, inner], of these kinds in a model.

    `trains` says whether the weights of norms are trained.
    """

    kinds: frozenset[NormKind | Activation]
    trains: bool
    device: torch.device
    dtype: torch.dtype
    rows: int
    width: int
    inner: int

    def probes(self, rows: int | None = None) -> dict[NormKind | Activation, tuple[torch.Tensor, ...]]:
        """Inputs of each kind, of all rows or so many."""
        sizes = {kind: self.width if kind in NORMS else self.inner for kind in sorted(self.kinds)}
        return {kind: probe(kind, rows or self.rows, size, self.device, self.dtype) for kind, size in sizes.items()}


def of(recipe: Recipe, text: Any, cuda: bool, modules: dict[nn.Module, NormKind | Activation]) -> Kernels:
    """The kernels for modules of a recipe's model with this text configuration, at the size of its packs. A collective call.

    Raises RecipeError where `model.kernels` asks for what cannot run.
    """
    device = torch.device("cuda" if cuda else "cpu")
    trains = any(weight.requires_grad for module in modules for weight in module._parameters.values() if weight is not None)
    dtype, rows = getattr(torch, recipe.model.dtype), min(recipe.data.max_length, _TIMED)
    return choose(recipe.model.kernels, Work(frozenset(modules.values()), trains, device, dtype, rows, *layer_widths(text)))


def choose(wanted: str, work: Work) -> Kernels:
    """The kernels of `model.kernels`; auto takes the `fastest` on a GPU and torch's own operations elsewhere.

    A collective call on a GPU. Raises RecipeError where kernels are asked for that cannot run, or give other values than
    torch's own.
    """
    if wanted == "auto" and work.device.type == "cuda" and work.kinds:
        return fastest(_MAKERS, work)
    if wanted in ("auto", "plain"):
        return plain()
    try:
        made = _MAKERS[wanted]()
        check(made, work)
    except Exception as error:  # a compiler and other people's kernels run here
        raise RecipeError(f"model.kernels: {wanted} cannot run here: {one_line(error)}; write auto") from None
    return made


def fastest(makers: dict[str, Callable[[], Kernels]], work: Work) -> Kernels:
    """The kernels that take the least time for some work, forward and backward.

    They are compiled before, which takes seconds, and less where an earlier start left its result on disk. Those that fail
    or give other values than torch's own are left out with a warning; Liger without one where it is not installed. A
    collective call: all workers take the same.
    """
    started = time.perf_counter()
    made: dict[str, Kernels] = {}
    seconds = dict.fromkeys(makers, math.inf)
    for name, make in makers.items():
        if name == "liger" and importlib.util.find_spec("liger_kernel") is None:
            continue
        try:
            made[name] = make()
            check(made[name], work)
            seconds[name] = _seconds(made[name], work)
        except Exception as error:  # a compiler and other people's kernels run here
            logger.warning("model.kernels: auto leaves out %s: %s", name, one_line(error))
    slowest = torch.tensor(list(seconds.values()), device=work.device)
    if dist.is_initialized():
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
    found = {name: each for name, each in zip(seconds, slowest.tolist(), strict=True) if each < math.inf}
    best = min(found, key=lambda name: found[name], default="plain")
    told = ", ".join(f"{name} {1000 * each:.2f} ms" for name, each in found.items())
    logger.info("model.kernels: auto takes %s (%s), found in %.1f s", best, told, time.perf_counter() - started)
    return made[best]


def check(kernels: Kernels, work: Work) -> None:
    """Raises ArithmeticError unless values are those of torch's operations in float64, and gradients those of autograd."""
    tolerance = 1e-5 if work.dtype == torch.float32 else 2e-2
    chains = Kernels("plain", lambda *told: normed(*told)[0], gated)
    if kernels.name == "compiled":  # for any number of rows, but laid out for as many as come first
        for kind, drawn in work.probes().items():
            _results(kernels, work.trains, kind, *drawn)
    for kind, drawn in work.probes(_CHECKED).items():
        # Before, since Liger writes gradients over what it was given.
        right = _results(chains, work.trains, kind, *(each.double() for each in drawn))
        found = _results(kernels, work.trains, kind, *drawn)
        for one, other in zip(found, right, strict=True):
            if not (one.double() - other).norm() <= tolerance * other.norm():
                raise ArithmeticError(f"{kernels.name} {kind} gives other values than torch")


def _results(
    kernels: Kernels, trains: bool, kind: Any, first: torch.Tensor, second: torch.Tensor, outer: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The output of a norm or a gate, and its gradients, that of a norm's weight where it trains."""
    first, second = first.detach().requires_grad_(), second.detach().requires_grad_(trains or kind in ACTIVATIONS)
    output = kernels.norm(first, second, 1e-6, kind) if kind in NORMS else kernels.gate(first, second, kind)
    wanted = [each for each in (first, second) if each.requires_grad]
    return output.detach(), *torch.autograd.grad(output, wanted, outer)


def _seconds(kernels: Kernels, work: Work) -> float:
    """The time of one norm and one gate of each kind, forward and backward, compiled before."""
    drawn, times = work.probes(), []
    for _ in range(_ROUNDS + 2):  # the first ones compile and take memory
        _wait(work.device)
        started = time.perf_counter()
        for kind, tensors in drawn.items():
            _results(kernels, work.trains, kind, *tensors)
        _wait(work.device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
