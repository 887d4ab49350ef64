"""Attention over packed rows in which no sample sees another.

transformers builds its own packed masks only under conditions that a hand-written loop easily misses, and then leaks in
silence. This kernel is registered under one name, takes the borders of samples as `cu_seq_lens_q`, and raises where they
are missing, so there is no silent path.
"""

import importlib.util
import inspect
import logging
from collections.abc import Collection
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

from burnish.errors import RecipeError, one_line

SDPA = "burnish_packed_sdpa"
"""Name of the kernel that runs scaled-dot-product attention sample by sample, on any device."""
FLASH = "burnish_packed_fa2"
"""Name of the kernel that runs flash-attn's variable-length function; bfloat16 or float16 on CUDA. transformers takes any
name with "flash" in it for one of its own kernels."""
VARLEN = "burnish_packed_varlen"
"""Name of the kernel that runs torch's own variable-length function; bfloat16 or float16 on CUDA."""
_EVERY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""What computes scaled-dot-product attention. Not cuDNN, which plans anew for each length, and samples have hundreds."""

logger = logging.getLogger(__name__)


def register(
    choice: str, cuda: bool, half: bool = True, heads: Collection[tuple[int, int]] = ((64, 64),), dropout: float = 0.0
) -> str:
    """Registers the kernels and gives the name of the one to load a model with, for `model.attention`.

    auto takes the first of flash-attn, torch's own variable-length kernel and sdpa that can run, and logs why an earlier one
    cannot where a GPU is used. `half` says whether the weights have 16 bits, `heads` are the widths of queries and values in
    each kind of layer, `dropout` is that of the attention. Raises RecipeError where a kernel is asked for that cannot run.
    """
    kernels = {"flash": (FLASH, packed_flash), "varlen": (VARLEN, packed_varlen), "sdpa": (SDPA, packed_sdpa)}
    for name, kernel in kernels.values():
        AttentionInterface.register(name, kernel)
    missing = {
        "flash": _missing_for_flash(cuda, half, heads),
        "varlen": _missing_for_varlen(cuda, half, heads, dropout),
        "sdpa": None,
    }
    if choice == "auto":
        choice = next(each for each, why in missing.items() if why is None)
        if cuda and choice == "sdpa":
            reasons = " and ".join(f"{each} cannot run because {why}" for each, why in missing.items() if why)
            logger.warning("model.attention: auto takes sdpa, which is slower: %s", reasons)
    if missing[choice] is not None:
        raise RecipeError(f"model.attention: {choice} cannot run because {missing[choice]}; write auto")
    return kernels[choice][0]


def _missing_for_flash(cuda: bool, half: bool, heads: Collection[tuple[int, int]]) -> str | None:
    """Why flash-attn cannot run, or None."""
    if cuda and half and importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed (pip install --no-build-isolation -e '.[gpu]')"
    return _unfit(cuda, half, heads) or _flash_lacks()


def _missing_for_varlen(cuda: bool, half: bool, heads: Collection[tuple[int, int]], dropout: float) -> str | None:
    """Why torch's variable-length kernel cannot run, or None."""
    if dropout:
        return f"it knows no dropout, and this model's attention has {dropout:g}"
    if odd := sorted({width for pair in heads for width in pair if width % 8}):
        return f"heads are {odd[0]} wide, which is no multiple of 8"
    return _unfit(cuda, half, heads) or _torch_lacks()


def _unfit(cuda: bool, half: bool, heads: Collection[tuple[int, int]]) -> str | None:
    """Why neither of the two can run, or None."""
    if not cuda:
        return "no GPU is used"
    if not half:
        return "model.dtype is float32"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "the GPU is older than compute capability 8.0"
    for query, value in sorted(heads):
        if query != value:
            return f"queries are {query} wide and values {value}"
    widest = max(query for query, _ in heads)
    return f"heads of {widest} are wider than 256" if widest > 256 else None


def _flash_lacks() -> str | None:
    """Why the installed flash-attn does not load, as one that was built for another torch, or None."""
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except Exception as error:  # whatever a library that does not fit raises
        return f"flash-attn does not load: {one_line(error)}"
    return None


def _torch_lacks() -> str | None:
    """Why the installed torch has no variable-length kernel that takes what is passed to it, or None."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    lacking = {"scale", "window_size"} - inspect.signature(varlen_attn).parameters.keys()
    return f"that of torch {torch.__version__} does not take {', '.join(sorted(lacking))}" if lacking else None


def packed_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each sample; query [1, heads, n, d], key and value [1, kv_heads, n, d] -> [1, n, heads, d].

    `cu_seq_lens_q` int32 [samples + 1] are the borders. A window w lets a token see itself and the w - 1 before it,
    as transformers does.
    """
    borders = _borders(query, kwargs).tolist()
    outputs = []
    with sdpa_kernel(_EVERY_LENGTH):
        for start, end in pairwise(borders):
            q, k, v = query[:, :, start:end], key[:, :, start:end], value[:, :, start:end]
            mask = None
            # No fused kernel takes fewer heads of keys beside a mask, or in float32 on a GPU; the plain one keeps scores of
            # length squared.
            repeats = q.is_cuda and q.dtype == torch.float32
            if sliding_window is not None and end - start > sliding_window:
                distance = torch.arange(end - start, device=q.device)
                distance = distance[:, None] - distance[None, :]
                mask = (distance >= 0) & (distance < sliding_window)
                repeats = True
            if repeats:
                k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], dim=1) for each in (k, v))
            outputs.append(
                F.scaled_dot_product_attention(
                    q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
                )
            )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def packed_flash(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The same as `packed_sdpa` by flash-attn's variable-length kernel (arXiv 2307.08691)."""
    from flash_attn import flash_attn_varlen_func

    borders = _borders(query, kwargs)
    longest = int(kwargs["max_length_q"])
    window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
    output = flash_attn_varlen_func(
        *(tensor[0].transpose(0, 1) for tensor in (query, key, value)),
        borders, borders, longest, longest,
        dropout_p=dropout, softmax_scale=scaling, causal=True, window_size=window,
    )  # fmt: skip
    return output.unsqueeze(0), None


def packed_varlen(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The same as `packed_sdpa` by torch's variable-length kernel (torch.nn.attention.varlen), without dropout."""
    from torch.nn.attention.varlen import varlen_attn

    borders = _borders(query, kwargs)
    if dropout:
        raise RuntimeError(f"torch's variable-length attention knows no dropout; found {dropout:g}")
    longest = int(kwargs["max_length_q"])
    left = -1 if sliding_window is None else sliding_window - 1
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    # torch 2.11 shares keys among queries without being told.
    told: dict[str, Any] = {}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        told["enable_gqa"] = q.shape[1] != k.shape[1]
    output = varlen_attn(q, k, v, borders, borders, longest, longest, scale=scaling, window_size=(left, 0), **told)
    assert isinstance(output, torch.Tensor)
    return output.unsqueeze(0), None


def _borders(query: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """The borders of samples; raises RuntimeError where they are missing or the model needs what is not supported."""
    borders = kwargs.get("cu_seq_lens_q")
    if borders is None:
        raise RuntimeError("packed attention was called without cu_seq_lens_q; samples would see each other")
    if query.shape[0] != 1:
        raise RuntimeError(f"packed attention takes one flattened row; found a batch of {query.shape[0]}")
    for feature in ("softcap", "s_aux"):
        if kwargs.get(feature) is not None:
            raise RuntimeError(f"packed attention does not support {feature}, which this model uses")
    assert isinstance(borders, torch.Tensor)
    return borders
