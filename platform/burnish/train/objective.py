"""The training objective: summed cross entropy at trained positions, over the trained tokens of the whole step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from burnish.data.packing import IGNORE_INDEX, position_ids

CHUNK_ELEMENTS = 1 << 25
"""Logits that exist at once: 256 tokens of a vocabulary of 131,072, enough rows to keep a matrix product busy."""


class Objective:
    """The loss of packs by one model.

    The head and the loss run together in chunks of tokens, so that [tokens, vocabulary] never exists. That is right only
    where the model gives out what its head gives; known logits are sent through it once, and where they come out changed
    (a softcap, a scale), or the head is no plain linear layer, logits are computed whole, at trained positions only. So
    they are in float16, whose gradients need the scale of the loss before they are rounded.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """A collective call under DeepSpeed, whose engine `model` may be."""
        self._model, self._device = model, device
        module: Any = getattr(model, "module", model)
        head = (module.get_base_model() if hasattr(module, "get_base_model") else module).get_output_embeddings()
        if hasattr(head, "modules_to_save"):  # PEFT's copy of a head that is trained whole beside adapters
            head = head.modules_to_save["default"]
        plain = type(head) is nn.Linear and head.weight.dtype != torch.float16
        self._head: nn.Linear | None = head if plain and self._gives_out(module, head) else None

    def loss_sum(self, input_ids: NDArray[np.int32], labels: NDArray[np.int32], seq_lens: NDArray[np.int32]) -> torch.Tensor:
        """Sum over the pack's trained tokens of -log p(token | tokens before it in its own sample); a scalar in float32.

        An empty pack gives a zero that still runs forward and backward, because every worker must call the same
        collectives. The first token of a sample is never a target.
        """
        if len(input_ids) == 0:
            input_ids, labels, seq_lens = (np.array([v], np.int32) for v in (0, IGNORE_INDEX, 1))
        targets = np.append(labels[1:], np.int32(IGNORE_INDEX))
        predictors = np.flatnonzero(targets != IGNORE_INDEX)
        if len(predictors) == 0:
            predictors = np.zeros(1, np.int64)
        wanted = _moved(targets[predictors], self._device).long()
        inputs = {
            "input_ids": _row(input_ids, self._device),
            "logits_to_keep": _moved(predictors, self._device),
            **packed_inputs(seq_lens, self._device),
        }
        if self._head is None:
            logits = self._model(**inputs).logits[0].float()
            if len(logits) != len(predictors):  # this model gives all of them whatever it is asked for
                logits = logits[inputs["logits_to_keep"]]
            return F.cross_entropy(logits, wanted, ignore_index=IGNORE_INDEX, reduction="sum")
        weight, bias, graded = self._head.weight, self._head.bias, torch.is_grad_enabled()

        def loss(hidden: torch.Tensor) -> torch.Tensor:
            summed: torch.Tensor = _HeadLoss.apply(hidden, weight, bias, wanted, graded)  # type: ignore[no-untyped-call]
            return summed.view(1, 1, 1)

        with _forward(self._head, loss):
            summed: torch.Tensor = self._model(**inputs).logits
        return summed.view(())

    def _gives_out(self, module: nn.Module, head: nn.Linear) -> bool:
        """Whether known logits come out of the model as its head gives them, at the positions that were asked for alone."""
        # In float32, so that a model that rounds its logits is found too.
        known = torch.linspace(-100, 100, head.out_features, device=self._device).view(1, 1, -1)
        row, kept = _row(np.zeros(2, np.int32), self._device), _moved(np.ones(1, np.int64), self._device)
        asked: list[torch.Size] = []

        def answer(hidden: torch.Tensor) -> torch.Tensor:
            asked.append(hidden.shape[:-1])
            return known

        with torch.no_grad(), _forward(head, answer):
            inputs = packed_inputs(np.array([2], np.int32), self._device)
            found = module(input_ids=row, logits_to_keep=kept, **inputs).logits
        return asked == [(1, 1)] and found.dtype == known.dtype and self._same(found, known)

    def _same(self, found: torch.Tensor, known: torch.Tensor) -> bool:
        return torch.equal(found, known)


class _HeadLoss(torch.autograd.Function):
    """The head and the summed cross entropy; gradients are made chunk by chunk in the forward pass, while logits exist."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wanted: torch.Tensor, graded: bool
    ) -> torch.Tensor:
        rows = hidden.flatten(0, -2)
        needs = [graded and needed for needed in ctx.needs_input_grad[:3]]
        of_rows = torch.empty_like(rows) if needs[0] else None
        # Chunks are added up in float32, as one product would add up its rows.
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs[2] else None
        total = torch.zeros((), device=rows.device)
        size = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for part in map(slice, range(0, len(rows), size), range(size, len(rows) + size, size)):
            logits = F.linear(rows[part], weight, bias).float()
            kept = (wanted[part] != IGNORE_INDEX).unsqueeze(1)
            targets = wanted[part].unsqueeze(1).clamp_min(0)
            norm = logits.logsumexp(1, keepdim=True)
            total += ((norm - logits.gather(1, targets)) * kept).sum()
            if not any(needs):
                continue
            # The gradient of -log softmax: probabilities, less one at the target.
            logits.sub_(norm).exp_().scatter_add_(1, targets, torch.full_like(norm, -1.0)).mul_(kept)
            gradient = logits.to(weight.dtype)
            if of_rows is not None:
                of_rows[part] = gradient @ weight
            if of_weight is not None:
                of_weight += gradient.T @ rows[part]
            if of_bias is not None:
                of_bias += logits.sum(0)
        ctx.shape = hidden.shape
        ctx.save_for_backward(
            of_rows,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None or bias is None else of_bias.to(bias.dtype),
        )
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_rows, of_weight, of_bias = (None if each is None else each * outer[0] for each in ctx.saved_tensors)
        return None if of_rows is None else of_rows.view(ctx.shape), of_weight, of_bias, None, None


@contextmanager
def _forward(head: nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """The head with another forward; hooks on it, as DeepSpeed's, stay around the call."""
    before = head.__dict__.get("forward")
    head.forward = function
    try:
        yield
    finally:
        del head.forward
        if before is not None:
            head.forward = before


def packed_inputs(seq_lens: NDArray[np.int32], device: torch.device) -> dict[str, Any]:
    """What the packed attention kernel and the rotary embedding need: positions that restart, and sample borders."""
    borders = _moved(np.append(0, np.cumsum(seq_lens)).astype(np.int32), device)
    longest = int(seq_lens.max())
    return {
        "position_ids": _row(position_ids(seq_lens), device),
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
        "use_cache": False,
    }


def _row(values: NDArray[np.int32], device: torch.device) -> torch.Tensor:
    """One int64 row [1, n] on the device, widened there."""
    return _moved(values, device).long().unsqueeze(0)


def _moved(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """An array on the device; from pinned memory, so that a GPU copies it beside the kernels that run."""
    if device.type == "cuda":
        return torch.from_numpy(values).pin_memory().to(device, non_blocking=True)
    # What Arrow holds may not be written, which a tensor cannot promise.
    return torch.from_numpy(np.array(values))
