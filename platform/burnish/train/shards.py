"""Frozen weights under ZeRO-3: every worker keeps its part, and a layer is gathered whole while it computes.

DeepSpeed would run hooks on each module of PEFT's, which take longer than what they gather (`benchmarks/zero.py`), and treat
weights that never change as if they did. Here a decoder layer is one flat buffer, gathered by one collective while the layer
before it computes (as FSDP does, arXiv 2304.11277, section 3.3). DeepSpeed has the adapters, under ZeRO-2.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import nn

from burnish.errors import RecipeError
from burnish.train.model import decoder_layers

Read: TypeAlias = Callable[[nn.Parameter], torch.Tensor]
"""Gives the values of a weight that the model has without any."""

_ALIGNED_ELEMENTS = 64
"""Weights start at multiples of so many elements, as kernels for matrices like them."""


@dataclass(frozen=True)
class _Unit:
    """Weights that are gathered together: shape and place of each in a flat buffer, and this worker's part of that."""

    weights: tuple[nn.Parameter, ...]
    shapes: tuple[torch.Size, ...]
    starts: tuple[int, ...]
    part: torch.Tensor
    is_layer: bool

    def put(self, buffer: torch.Tensor | None) -> None:
        """Gives the weights their values, or takes them away."""
        for weight, shape, start in zip(self.weights, self.shapes, self.starts, strict=True):
            weight.data = self.part.new_empty(0) if buffer is None else buffer[start : start + shape.numel()].view(shape)


class Shards:
    """The parts of all frozen weights that one worker keeps, and what of them is whole now: a layer, and the next one."""

    def __init__(
        self, model: nn.Module, device: torch.device, patience_seconds: float = 1800, read: Read | None = None
    ) -> None:
        """Shares out a model that every worker has whole, or, with `read`, one that is empty, which world rank 0 reads.

        Layers, embeddings and head are shared; weights of other modules, which are few, stay whole. A worker waits
        `patience_seconds` for the others. A collective call. Raises RecipeError for a layer made of several others' weights.
        """
        self._group = dist.new_group(timeout=timedelta(seconds=patience_seconds))
        self._live: dict[int, tuple[torch.Tensor, Any]] = {}
        self._units: list[_Unit] = []
        self._stacks: list[ExitStack] = []
        self._modules: list[tuple[int, Any]] = []
        made: dict[nn.Parameter, nn.Parameter] = {}
        numbers: dict[nn.Parameter, int] = {}
        for module, weights, is_layer in list(blocks(model)):
            if not numbers.keys() & set(weights):
                self._units.append(_unit(weights, made, device, read, is_layer))
                numbers |= dict.fromkeys(weights, len(self._units) - 1)
            # A head that shares its weight with the embeddings; a bias of its own stays whole.
            found = {numbers[weight] for weight in weights if weight in numbers}
            if len(found) > 1:
                raise RecipeError(
                    "engine.zero_stage: a layer of this model takes weights of several others, which 3 cannot gather; "
                    "write engine.zero_stage: 2"
                )
            self._hook(module, found.pop())
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is not None and read is not None and weight not in made:
                    made[weight] = nn.Parameter(_everywhere(weight, read, device), weight.requires_grad)
                elif weight is not None and weight not in made and not weight.requires_grad:
                    weight.data = weight.data.clone()  # else it would hold the memory of the whole file that it came from
                module._parameters[name] = made.get(weight, weight) if weight is not None else None

    def recompute(self) -> None:
        """Gathers a layer also when it runs again in the backward pass, where transformers calls no hooks."""
        for number, module in self._modules:
            run = getattr(module, "_gradient_checkpointing_func", None)
            if run is not None:
                module._gradient_checkpointing_func = partial(self._recomputed, number, run)

    def _recomputed(self, number: int, run: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
        def within(*args: Any) -> Any:
            if _is_backward():
                self._units[number].put(self._whole(number))
            return function(*args)

        return run(within, *args)

    def _hook(self, module: Any, number: int) -> None:
        self._modules.append((number, module))
        module.register_forward_pre_hook(lambda module, args: self._enter(number))
        module.register_forward_hook(lambda module, args, output: self._leave(number), always_call=True)

    def _enter(self, number: int) -> None:
        """Gathers a unit for its forward pass. What autograd saves of its weights is gathered again when it is asked for."""
        self._units[number].put(self._whole(number))
        stack = ExitStack()
        # Inside a recomputed layer nothing is saved, or what is saved is used up at once.
        if torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
            stack.enter_context(
                torch.autograd.graph.saved_tensors_hooks(lambda tensor: self._pack(number, tensor), self._unpack)
            )
        self._stacks.append(stack)

    def _leave(self, number: int) -> None:
        self._stacks.pop().close()
        if not _is_backward():  # else what was computed again keeps the weights themselves, until the next layer comes
            self._units[number].put(None)

    def _pack(self, number: int, tensor: torch.Tensor) -> Any:
        buffer, _ = self._live[number]
        if tensor.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr():
            return tensor.detach()  # the tensor itself would hold the node that saves it
        return number, tensor.size(), tensor.stride(), tensor.storage_offset()

    def _unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        number, size, stride, offset = packed
        return self._whole(number).as_strided(size, stride, offset)

    def _whole(self, number: int) -> torch.Tensor:
        """All values of a unit. Those of its neighbour in the direction of the pass are on their way when this returns."""
        ahead = number + (-1 if _is_backward() else 1)
        for other in [other for other in self._live if other not in (number, ahead)]:
            self._arrived(other)
            self._units[other].put(None)
            del self._live[other]
        self._send(number)
        buffer = self._arrived(number)
        if 0 <= ahead < len(self._units) and (self._units[ahead].is_layer or not _is_backward()):
            self._send(ahead)
        return buffer

    def _send(self, number: int) -> None:
        """Begins to gather a unit, unless it is here or on its way."""
        if number not in self._live:
            part = self._units[number].part
            buffer = part.new_empty(len(part) * dist.get_world_size())
            self._live[number] = buffer, dist.all_gather_into_tensor(buffer, part, group=self._group, async_op=True)

    def _arrived(self, number: int) -> torch.Tensor:
        buffer, work = self._live[number]
        if work is not None:
            work.wait()
            self._live[number] = buffer, None
        return buffer


def _is_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def blocks(model: Any) -> Iterator[tuple[nn.Module, list[nn.Parameter], bool]]:
    """What is gathered at once, in the order of the forward pass: modules with their frozen weights, and whether layers."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    dtype = next(model.parameters()).dtype
    ends = [embeddings, head]
    if getattr(model.config.get_text_config(), "hidden_size_per_layer_input", None):
        ends = []  # Gemma 4 reads a row of its embeddings itself
    for module in (embeddings, *decoder_layers(model), head):
        is_layer = module is not embeddings and module is not head
        weights = [each for each in module.parameters(recurse=is_layer) if not each.requires_grad and each.dtype == dtype]
        if weights and (is_layer or module in ends):
            yield module, weights, is_layer


def _unit(
    weights: list[nn.Parameter],
    made: dict[nn.Parameter, nn.Parameter],
    device: torch.device,
    read: Read | None,
    is_layer: bool,
) -> _Unit:
    """This worker's part of some weights, in whose place it makes weights without values."""
    first, world_size = dist.get_rank() == 0, dist.get_world_size()
    ends, shapes = [0], tuple(weight.shape for weight in weights)
    for weight in weights:
        ends.append(ends[-1] + -(-weight.numel() // _ALIGNED_ELEMENTS) * _ALIGNED_ELEMENTS)
    size, dtype = -(-ends[-1] // world_size), weights[0].dtype
    part = torch.empty(size, dtype=dtype, device=device)
    whole = torch.zeros(size * world_size, dtype=dtype, device=device) if first or read is None else part[:0]
    for weight, start in zip(weights, ends[:-1], strict=True):
        if len(whole):
            values = weight.detach() if read is None else read(weight)
            whole[start : start + weight.numel()] = values.reshape(-1)
        made[weight] = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)
        made[weight].ds_shape = weight.shape  # type: ignore[attr-defined]  # where PEFT looks for the shape of what is empty
        if read is None:
            weight.data = weight.data.new_empty(0)  # so that the model goes as its parts come
    if read is None:
        part.copy_(whole[size * dist.get_rank() : size * (dist.get_rank() + 1)])
    else:
        dist.scatter(part, list(whole.view(world_size, size)) if first else None)
    return _Unit(tuple(made[weight] for weight in weights), shapes, tuple(ends[:-1]), part, is_layer)


def _everywhere(weight: nn.Parameter, read: Read, device: torch.device) -> torch.Tensor:
    """The values of a weight, on every worker."""
    values = torch.empty(weight.shape, dtype=weight.dtype, device=device)
    if dist.get_rank() == 0:
        values.copy_(read(weight))
    dist.broadcast(values, 0)
    return values
