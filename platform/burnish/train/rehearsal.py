"""How long a run will compute, from steps of one and of two layers of its model on one worker's device."""

import copy
import logging
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from burnish.config import Recipe
from burnish.data.tokenizer import trained_token_ids
from burnish.errors import one_line
from burnish.train import attention, elementwise, kernel_choice
from burnish.train.adapters import with_adapters
from burnish.train.architecture import attention_dropout, configuration, fresh, head_widths, pack_cost
from burnish.train.footprint import lay_out, room_of
from burnish.train.layout import Footprint, Room
from burnish.train.lora_linear import fuse
from burnish.train.model import recompute
from burnish.train.objective import Objective

_SAMPLES = 4
"""Samples in the pack that is timed."""
_MOST_FLOPS = 2e12
"""What a core of a CPU computes in a minute or two."""
_ROUNDS = 3
"""Steps of which the fastest counts; the first one plans kernels and takes memory."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rehearsal:
    """What one worker's device is, the recipe with its layout decided there, why, what it needs, and how fast it computes.

    `flops_per_second` are those that the model itself needs (`train/architecture.py:cost`), forward and backward; the
    collectives between workers and the optimizer's step are not in it. `room`, `needed`, `reason` and that are None where
    they cannot be told.
    """

    device: str
    room: Room | None
    recipe: Recipe
    needed: Footprint | None
    reason: str | None
    flops_per_second: float | None


def rehearse(recipe: Recipe, cuda: bool, num_workers: int, local_workers: int) -> Rehearsal:
    """Decides the layout for this process's device and times a pack on it. Raises RecipeError where the run does not fit.

    One and two layers with random weights are timed, and what the second one adds counts for each of the others.
    """
    room = room_of(cuda, local_workers)
    recipe, needed, reason = lay_out(recipe, room, num_workers)
    device = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name(device) if cuda else "CPU"
    try:
        rate = _flops_per_second(recipe, device)
    except Exception as error:  # any code of any model runs here
        logger.warning("the time of %s cannot be told: %s", recipe.model.path, one_line(error))
        rate = None
    return Rehearsal(name, room, recipe, needed, reason, rate)


def _flops_per_second(recipe: Recipe, device: torch.device) -> float | None:
    """None where it would not be that of the run, or take a CPU minutes."""
    config = configuration(recipe)
    layers = int(config.get_text_config().num_hidden_layers)
    lengths = _lengths(recipe)
    flops = float(pack_cost(recipe).of(lengths, np.array([0, len(lengths)])).sum())
    if recipe.model.quantize or (device.type == "cpu" and flops * 2 / layers * _ROUNDS > _MOST_FLOPS):
        return None
    one, two = (_seconds(recipe, _with_layers(config, number), device) for number in (1, 2))
    return flops / (one + max(two - one, 0.0) * (layers - 1))


def _lengths(recipe: Recipe) -> NDArray[np.int32]:
    """Lengths of the samples of a full pack, int32."""
    borders = np.linspace(0, recipe.data.max_length, _SAMPLES + 1).astype(np.int32)
    return np.array([end - start for start, end in pairwise(borders)], np.int32)


def _with_layers(config: Any, number: int) -> Any:
    """The configuration of a model of so many layers, those that come first."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = number
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:number]
    return config


def _seconds(recipe: Recipe, config: Any, device: torch.device) -> float:
    """The time of the forward and backward pass of a full pack, all of it trained."""
    text, dtype = config.get_text_config(), getattr(torch, recipe.model.dtype)
    kernel = attention.register(
        recipe.model.attention, device.type == "cuda", dtype != torch.float32, head_widths(text), attention_dropout(text)
    )
    with torch.device(device):
        model = fresh(recipe, kernel, config)
        if recipe.lora is not None:
            model = with_adapters(model, recipe.lora, trained_token_ids(recipe))
            fuse(model)
    modules = elementwise.replaceable(model)
    elementwise.fuse(modules, kernel_choice.of(recipe, text, device.type == "cuda", modules))
    if recipe.model.recomputes():
        recompute(model)
    objective = Objective(model.train(), device)
    row, lengths = np.zeros(recipe.data.max_length, np.int32), _lengths(recipe)
    times = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        torch.autograd.backward(objective.loss_sum(row, row, lengths))
        times.append(time.perf_counter() - started)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            times[-1] = time.perf_counter() - started
        model.zero_grad(set_to_none=True)
    return min(times)
