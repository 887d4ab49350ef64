"""The proof, on the user's own model and first batch, that packed samples do not see each other."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from burnish.errors import TrainingError
from burnish.train import objective
from burnish.train.elementwise import unfused
from burnish.train.model import decoder_layers

Pack: TypeAlias = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]
"""input_ids, labels and seq_lens."""
States: TypeAlias = list[torch.Tensor]
"""Behind each layer, and the logits last: float32 [places, width]."""

TOLERANCE = {torch.float32: (1e-3, 1.0), torch.float16: (0.03, 0.9), torch.bfloat16: (0.1, 0.9)}
"""Largest relative difference of hidden states from those of transformers' own attention, and the share of places that must
keep it, by the type of the weights: in 16 bits a router of experts may choose otherwise at a few."""
_PLACES = 32
"""Places of a sample that are compared, its last one among them."""
_MOST_TOKENS = 8192
"""Tokens of a sample that are run alone: transformers' mask of a sliding window has the square of them."""


def check(model: nn.Module, packs: Sequence[Pack], device: torch.device) -> None:
    """Proves on a pack that none of its samples sees another, with the kernel and the weights of the run.

    The gradient of the middle sample's logits is exactly zero at all others; behind every layer, the hidden states of the
    first, the middle, the last and the longest sample are those of the sample alone in transformers' own attention, which
    knows nothing of packing, and its own norms and gates. Weights, gradients and random numbers stay as they are. A
    collective call, of as many passes on every worker. Raises TrainingError, on all of them, that names the first layer that
    differs.
    """
    input_ids, seq_lens = _samples(packs)
    borders = np.append(0, np.cumsum(seq_lens))
    chosen = (0, len(seq_lens) // 2, len(seq_lens) - 1, int(np.argmax(seq_lens)))
    tested = [(int(borders[i]), int(borders[i + 1])) for i in chosen]
    places = [_places(start, end) for start, end in tested]
    with _without_dropout(model):
        packed, gradient = _packed(model, input_ids, seq_lens, places, device)
        with _plain_attention(model):
            alone = [
                _alone(model, input_ids[start : min(end, start + _MOST_TOKENS)], where - start, device)
                for (start, end), where in zip(tested, places, strict=True)
            ]
    start, end = tested[1]
    crosses = not bool((gradient[:start] == 0).all() and (gradient[end:] == 0).all() and (gradient[start:end] != 0).any())
    tolerance, share = TOLERANCE[next(model.parameters()).dtype]
    errors = [_difference(one, torch.cat(parts), share) for one, *parts in zip(packed, *alone, strict=True)]
    # NaN is within no tolerance.
    differs = next((number for number, error in enumerate(errors) if not error <= tolerance), len(errors))
    verdict = torch.tensor([-float(crosses), float(differs)], device=device)
    if dist.is_initialized():
        dist.all_reduce(verdict, dist.ReduceOp.MIN)
    crosses, differs = bool(verdict[0] < 0), int(verdict[1])
    if crosses or differs < len(errors):
        raise TrainingError(_complaint(model, crosses, differs, len(errors)))


def _complaint(model: nn.Module, crosses: bool, differs: int, count: int) -> str:
    config = _plain(model).config.get_text_config()
    kinds = getattr(config, "layer_types", None) or [type(layer).__name__ for layer in decoder_layers(model)]
    found = ["the gradient of one sample reaches another"] if crosses else []
    if differs < count - 1:
        found.append(f"layer {differs} ({kinds[differs]}) is the first that gives a packed sample other values than alone")
    elif differs == count - 1:
        found.append("the logits of a packed sample are others than alone")
    else:
        found.append(f"the values are those of a sample alone behind all layers ({', '.join(sorted(set(kinds)))})")
    return (
        f"train.self_test: this model cannot be trained on packed samples as it runs here: {'; '.join(found)}. Its "
        f"attention is {config._attn_implementation}; try model.attention: sdpa, model.kernels: plain, or another version "
        "of transformers"
    )


def _samples(packs: Sequence[Pack]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Tokens and lengths of the pack that has the longest sample with others beside it, which a window may cut.

    Of packs that have a single sample each, the longest is cut in two.
    """
    input_ids, _, seq_lens = max(packs, key=lambda pack: (len(pack[2]) > 1, pack[2].max(initial=0), len(pack[2])))
    if len(input_ids) < 2:
        input_ids = np.arange(8, dtype=np.int32)
    if len(seq_lens) < 2:
        half = len(input_ids) // 2
        seq_lens = np.array([half, len(input_ids) - half], np.int32)
    return input_ids, seq_lens


def _places(start: int, end: int) -> NDArray[np.int64]:
    last = min(end, start + _MOST_TOKENS) - 1
    return np.unique(np.linspace(start, last, _PLACES).astype(np.int64))


def _packed(
    model: nn.Module,
    input_ids: NDArray[np.int32],
    seq_lens: NDArray[np.int32],
    places: list[NDArray[np.int64]],
    device: torch.device,
) -> tuple[States, torch.Tensor]:
    """The states at these places of a pack, and the gradient [n, width] of the middle sample's logits at its embeddings."""
    embedded: list[torch.Tensor] = []

    def embed(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = _plain(model).get_input_embeddings().register_forward_hook(embed)
    try:
        with _recorded(model, np.concatenate(places), device) as states:
            logits = _logits(model, input_ids, np.concatenate(places), device, **objective.packed_inputs(seq_lens, device))
            first = len(places[0])
            (gradient,) = torch.autograd.grad(logits[first : first + len(places[1])].mean(), embedded[0])
    finally:
        hook.remove()
    return [*states, logits.detach()], gradient[0]


def _alone(model: nn.Module, input_ids: NDArray[np.int32], places: NDArray[np.int64], device: torch.device) -> States:
    """The states at these places of one sample."""
    with torch.no_grad(), _recorded(model, places, device) as states:
        logits = _logits(model, input_ids, places, device, use_cache=False)
    return [*states, logits]


def _logits(
    model: nn.Module, input_ids: NDArray[np.int32], places: NDArray[np.int64], device: torch.device, **inputs: Any
) -> torch.Tensor:
    row = torch.from_numpy(input_ids.astype(np.int64)).to(device).unsqueeze(0)
    kept = torch.from_numpy(places).to(device)
    logits: torch.Tensor = model(input_ids=row, logits_to_keep=kept, **inputs).logits[0]
    return (logits if len(logits) == len(places) else logits[kept]).float()  # some models give all whatever is asked for


@contextmanager
def _recorded(model: nn.Module, places: NDArray[np.int64], device: torch.device) -> Iterator[States]:
    """Fills a list with what each layer gives at these places, in the forward pass of the block."""
    states: States = []
    layers, kept = decoder_layers(model), torch.from_numpy(places).to(device)

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if len(states) < len(layers):  # activation checkpointing runs them again in the backward pass
            states.append((output[0] if isinstance(output, tuple) else output).detach()[0, kept].float())

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """The model without dropout, but in training mode, in which activations are recomputed as they are in a step."""
    rates: list[tuple[nn.Module, str]] = [(each, "p") for each in model.modules() if isinstance(each, nn.Dropout)]
    # Models call the function with a rate of their own too: `residual_dropout`, `dropout`, `resid_pdrop`, `layerdrop`.
    rates += [
        (each, name)
        for each in model.modules()
        for name, value in vars(each).items()
        if "drop" in name and isinstance(value, int | float)
    ]
    were = [getattr(each, name) for each, name in rates]
    for each, name in rates:
        setattr(each, name, 0.0)
    try:
        yield
    finally:
        for (each, name), was in zip(rates, were, strict=True):
            setattr(each, name, was)


@contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    """The model in transformers' own attention, with its own norms and gates."""
    plain = _plain(model)
    kernel = plain.config._attn_implementation
    plain.set_attn_implementation("sdpa")
    try:
        with unfused(model):
            yield
    finally:
        plain.set_attn_implementation(kernel)


def _plain(model: Any) -> Any:
    """The model below its adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _difference(one: torch.Tensor, other: torch.Tensor, share: float) -> float:
    """The relative difference of two states that this share of the places keeps."""
    relative = (one - other).norm(dim=-1) / other.norm(dim=-1).clamp_min(1e-30)  # padding may embed as zero
    return float(relative.quantile(share))
