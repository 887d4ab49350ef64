"""What a model needs in memory, measured without a weight of it: one step in which tensors have shapes and no values."""

import logging
import os
import weakref
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface

from burnish.config import Recipe
from burnish.data.tokenizer import trained_token_ids
from burnish.errors import BurnishError, DoesNotFit, RecipeError, one_line
from burnish.train import elementwise, kernels
from burnish.train.adapters import with_adapters
from burnish.train.architecture import fresh
from burnish.train.layout import LIVE_ELEMENTS, Footprint, Layout, Room, Sizes, choose, fastest, why
from burnish.train.model import recompute
from burnish.train.objective import Objective
from burnish.train.quantized import saved_bytes
from burnish.train.shards import blocks
from burnish.train.weight_files import files_of_parts

_KERNEL = "burnish_packed_shapes"
"""Name of the attention that gives out shapes alone."""
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where a container's limit stands (Linux control groups, version 2 and 1)."""
_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")
"""Microseconds of CPU that a container may take, and in how many (Linux control groups, version 2)."""

logger = logging.getLogger(__name__)


def agree(recipe: Recipe, cuda: bool, local_workers: int) -> tuple[Recipe, Footprint | None]:
    """The recipe with its layout decided, for the worker that has least room; the same on all of them. A collective call.

    Raises RecipeError on every worker where the run does not fit.
    """
    device = torch.device("cuda" if cuda else "cpu")
    own = room_of(cuda, local_workers)
    least = torch.tensor([own.device, own.host or 0], device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    room = Room(int(least[0]), None if own.host is None else int(least[1]))
    refusal: RecipeError | None = None
    decided, needed, reason = recipe, None, None
    try:
        decided, needed, reason = lay_out(recipe, room, dist.get_world_size())
    except RecipeError as error:
        refusal = error
    # A worker that could not tell takes a more frugal layout than the others, which then take it, too.
    known = [0, 0] if refusal else [decided.engine.stage(), int(decided.model.recomputes())]
    most = torch.tensor([int(refusal is not None), *known], device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    refused, stage, recomputes = most.tolist()
    if refused:
        raise refusal or DoesNotFit(f"model.path: {recipe.model.path} does not fit on another worker")
    layout = Layout(stage, bool(recomputes))
    if dist.get_rank() == 0 and layout != fastest(recipe, dist.get_world_size()):
        said = reason if layout.of(recipe) == decided else None  # else a worker that could not tell decided
        logger.warning("a slower layout than the recipe leaves open is taken: %s", said or layout)
    return layout.of(recipe), needed


def lay_out(recipe: Recipe, room: Room, num_workers: int) -> tuple[Recipe, Footprint | None, str | None]:
    """The recipe with its layout decided for workers with so much room each, what it will need at most, and why it is that.

    A run that may go on with fewer workers must fit on those, too. A model that cannot be measured is recomputed on a GPU
    and shared out, which is slow and fits most often; then nothing is said of what it needs. Raises RecipeError where the
    run does not fit.
    """
    try:
        sizes = measure(recipe)
    except BurnishError:
        raise
    except Exception as error:  # any code of any model runs here
        logger.warning("what %s needs in memory cannot be told: %s", recipe.model.path, one_line(error))
        recomputes, stage = recipe.model.activation_checkpointing, recipe.engine.zero_stage
        cautious = Layout(
            (3 if num_workers > 1 and recipe.model.quantize is None else 2) if stage == "auto" else stage,
            room.host is not None if recomputes == "auto" else recomputes,
        )
        return cautious.of(recipe), None, None
    if room.host is not None and recipe.lora is not None:  # the host's memory is what loads then, mapped from the files
        sizes = replace(sizes, loading=0)
    choose(recipe, sizes, room, recipe.widths()[-1])
    layout, needed = choose(recipe, sizes, room, num_workers)
    return layout.of(recipe), needed, why(recipe, sizes, room, num_workers, layout)


def room_of(cuda: bool, local_workers: int) -> Room:
    """What a worker may fill: its GPU's memory and its share of the host's, or that alone."""
    limits = [int(text) for file in _LIMITS if file.exists() and (text := file.read_text().strip()).isdigit()]
    host = min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *limits]) // local_workers
    return Room(int(torch.cuda.mem_get_info()[1]), host) if cuda else Room(host)


def cpus_of(local_workers: int) -> int:
    """CPUs that a worker may use: its share of the host's, or of what its container may take of them in a while."""
    quota, _, period = _CPU_LIMIT.read_text().partition(" ") if _CPU_LIMIT.exists() else ("max", "", "")
    own = len(os.sched_getaffinity(0))
    return max(1, (min(own, int(quota) // int(period)) if quota.isdigit() else own) // local_workers)


def measure(recipe: Recipe) -> Sizes:
    """The sizes of a recipe's model at its longest pack, every token trained. Takes seconds, whatever the model's size.

    Raises RecipeError where the configuration cannot be read, or for adapters that the model cannot have.
    """
    model = _skeleton(recipe)
    weights = sum(each.nbytes for each in {*model.parameters(), *model.buffers()})
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    size, tokens = getattr(torch, recipe.model.dtype).itemsize, recipe.data.max_length
    whole = files_of_parts(recipe, _skeleton(recipe, adapted=False), local_files_only=True) is None
    if recipe.lora is None:
        shared = sum(each.nbytes for each in model.parameters())
        live = min(shared, LIVE_ELEMENTS * size)
        loading = weights  # DeepSpeed takes a model that was loaded whole to the device before it shares it out
    else:
        parts = [set(own) for _, own, _ in blocks(model)]
        shared = sum(each.nbytes for each in set().union(*parts))
        *_, second, largest_block = [0, 0, *sorted(sum(each.nbytes for each in own) for own in parts)]
        live, loading = second + largest_block, weights + largest_block
    saved, largest = saved_bytes(recipe, model)
    kept, recomputed = (largest + _most(each, tokens, each is not model) for each in (model, _skeleton(recipe)))
    # Only what is added up in another type shows.
    packs = recipe.train.global_batch_size if recipe.model.dtype == "bfloat16" else 1
    return Sizes(weights - saved, trained, size, tokens, kept, recomputed, shared, live, loading if whole else 0, packs)


def _skeleton(recipe: Recipe, adapted: bool = True) -> Any:
    """The model, with its adapters unless these are not wanted, without any weight."""
    AttentionInterface.register(_KERNEL, _attention)
    with init_empty_weights(include_buffers=True):
        model = fresh(recipe, _KERNEL)
        if recipe.lora is not None and adapted:
            model = with_adapters(model, recipe.lora, trained_token_ids(recipe))
    elementwise.fuse(elementwise.replaceable(model), kernels.plain())  # all kernels keep the same for the backward pass
    return model


def _most(model: Any, tokens: int, checkpointing: bool) -> int:
    """The most bytes that the forward and backward pass of a pack take beside weights and their gradients."""
    # Arrays of the pack are values, which become shapes where they meet the model.
    with FakeTensorMode(allow_non_fake_inputs=True):
        _fill(model)
        if checkpointing:
            recompute(model)
        for weight in model.train().parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(_forget)
        objective = _OfShapes(model, torch.device("cpu"))
        row = np.zeros(tokens, np.int32)
        with _Live({*model.parameters(), *model.buffers()}) as live:
            loss = objective.loss_sum(row, row, np.array([tokens], np.int32))
            torch.autograd.backward(loss)
    most: int = live.most
    return most


def _fill(model: nn.Module) -> None:
    """Gives every weight and buffer of an empty model a device, as far as a tensor without values is on one."""
    made: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:  # tied weights stay one
                shape = torch.empty(weight.shape, dtype=weight.dtype)
                made.setdefault(weight, nn.Parameter(shape, requires_grad=weight.requires_grad))
                module._parameters[name] = made[weight]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _forget(weight: torch.Tensor) -> None:
    """Lets go of a gradient that is made; what is kept of gradients depends on the layout."""
    weight.grad = None


class _OfShapes(Objective):
    """The objective of a model whose tensors have no values."""

    def _same(self, found: torch.Tensor, known: torch.Tensor) -> bool:
        # Logits that a model changes are another tensor.
        return bool(found.untyped_storage()._cdata == known.untyped_storage()._cdata)


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are made while it is entered, and live; `most` is the most at once."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        """`known` tensors do not count, nor do their views."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = self._now = 0
        self._sizes: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._note, result)
        return result

    def _note(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            self._now += storage.nbytes()
            self.most = max(self.most, self._now)
            weakref.finalize(storage, self._free, storage._cdata)
        return tensor

    def _free(self, address: int) -> None:
        self._now -= self._sizes.pop(address)


class _Attention(torch.autograd.Function):
    """What flash attention keeps for its backward pass (arXiv 2307.08691): its inputs, its output, a number a query."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        _, heads, tokens, _ = query.shape
        output = query.new_empty(1, tokens, heads, value.shape[3])
        ctx.save_for_backward(query, key, value, output, query.new_empty(heads, tokens, dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(each) for each in ctx.saved_tensors[:3])


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    output: torch.Tensor = _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return output, None
