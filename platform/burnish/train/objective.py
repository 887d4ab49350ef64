"""The training objective: summed cross entropy at trained positions, over the trained tokens of the whole step."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from burnish.data.packing import IGNORE_INDEX, position_ids


def loss_sum(
    model: torch.nn.Module,
    input_ids: NDArray[np.int32],
    labels: NDArray[np.int32],
    seq_lens: NDArray[np.int32],
    device: torch.device,
) -> torch.Tensor:
    """Sum over the pack's trained tokens of -log p(token | tokens before it in its own sample); a scalar in float32.

    Logits exist at trained positions only. An empty pack gives a zero that still runs forward and backward, because
    every worker must call the same collectives. The first token of a sample is never a target.
    """
    if len(input_ids) == 0:
        input_ids, labels, seq_lens = (np.array([v], np.int32) for v in (0, IGNORE_INDEX, 1))
    targets = np.append(labels[1:], np.int32(IGNORE_INDEX))
    predictors = np.flatnonzero(targets != IGNORE_INDEX)
    if len(predictors) == 0:
        predictors = np.zeros(1, np.int64)
    kept = _moved(predictors, device)
    output: Any = model(input_ids=_row(input_ids, device), logits_to_keep=kept, **packed_inputs(seq_lens, device))
    wanted = _moved(targets[predictors], device).long()
    return F.cross_entropy(output.logits[0].float(), wanted, ignore_index=IGNORE_INDEX, reduction="sum")


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
