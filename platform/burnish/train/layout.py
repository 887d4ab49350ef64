"""How a run lies in the memory of its workers: what it needs there, counted, and what is chosen so that it fits.

Counting needs no device and loads no weight; `footprint` measures the sizes of a model that it starts from.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from burnish.config import Recipe
from burnish.errors import DoesNotFit

BUCKET_ELEMENTS = 100_000_000
"""Gradients that DeepSpeed sends between workers at once. Its default is five times that, a gigabyte of every GPU."""
LIVE_ELEMENTS = 1_000_000_000
"""Weights that a worker may hold whole at once under ZeRO-3; DeepSpeed keeps those that it needs again soon."""
_AVERAGED_ELEMENTS = 500_000_000
"""Gradients that DeepSpeed averages at once where it shards nothing (its engine's MEMORY_OPT_ALLREDUCE_SIZE)."""
USABLE = 0.9
"""Share of a device's memory that a layout may plan with; the rest is the libraries' own and what lies between tensors."""


@dataclass(frozen=True)
class Layout:
    """What of training is shared out over workers, and whether activations are recomputed. Any gives the same losses."""

    zero_stage: int
    activation_checkpointing: bool

    def __str__(self) -> str:
        """In words, as "ZeRO-3, activations kept"."""
        return f"ZeRO-{self.zero_stage}, activations {'recomputed' if self.activation_checkpointing else 'kept'}"

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe with nothing of its layout left open."""
        engine = recipe.engine.model_copy(update={"zero_stage": self.zero_stage})
        model = recipe.model.model_copy(update={"activation_checkpointing": self.activation_checkpointing})
        return recipe.model_copy(update={"engine": engine, "model": model})


@dataclass(frozen=True)
class Sizes:
    """What a model needs whatever its layout.

    `weights` bytes of all weights, adapters among them; `trained` of these, as numbers of `itemsize` bytes; the most bytes
    that a pack of `tokens` takes beside them, forward and backward, with activations `kept` and `recomputed`. ZeRO-3 shares
    out `shared` bytes of the weights, of which `live` are whole at once on every worker; at its start, where workers cannot
    load parts, it takes `loading` bytes. A step has `packs` on all workers together.
    """

    weights: int
    trained: int
    itemsize: int
    tokens: int
    kept: int
    recomputed: int
    shared: int
    live: int
    loading: int = 0
    packs: int = 1


@dataclass(frozen=True)
class Room:
    """Bytes that one worker may fill: of its device, and of its host beside that; None where the device is the host."""

    device: int
    host: int | None = None


@dataclass(frozen=True)
class Footprint:
    """Bytes on one worker's device at its fullest moment, by what they are."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        """In gigabytes, for people."""
        parts = (("weights", self.weights), ("gradients", self.gradients), ("optimizer", self.optimizer))
        named = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in (*parts, ("activations", self.activations)))
        return f"{self.total / 1e9:.2f} GB ({named})"


def footprint(sizes: Sizes, layout: Layout, num_workers: int, offloads: bool) -> Footprint:
    """What a worker's device holds at most under a layout; `offloads` says that the optimizer lives on the host.

    AdamW keeps two float32 moments, and DeepSpeed float32 masters, except where nothing is sharded in float32 (ZeRO, arXiv
    1910.02054, section 3). Where gradients are sharded, those of several packs are added up in float32 (`engine.py`), which
    stage 2 then steps with. Else the step, when the activations are gone, takes float32 gradients beside; the larger of the
    two counts as activations.
    """
    stage, trained, size = layout.zero_stage, sizes.trained, sizes.itemsize
    bucket = min(BUCKET_ELEMENTS, trained) * size
    weights = sizes.weights
    if stage == 3 and num_workers > 1:
        weights += sizes.shared // num_workers + sizes.live - sizes.shared
    optimizer = trained * (8 if stage == 0 and size == 4 else 12) // (num_workers if stage else 1)
    added = 4 if stage >= 2 and sizes.packs > num_workers else size
    gradients = trained * added // (num_workers if stage >= 2 else 1) + (bucket if stage else 0)
    stepping = 0 if size == 4 or (stage == 2 and added == 4) else trained * 4 // (num_workers if stage else 1)
    if stage == 0 and num_workers > 1:  # DeepSpeed's copy of gradients that it averages at once
        stepping += min(trained, _AVERAGED_ELEMENTS) * size
    if offloads:
        optimizer = stepping = 0
    kept = sizes.recomputed if layout.activation_checkpointing else sizes.kept
    loading = sizes.loading - weights - gradients - optimizer if stage == 3 else 0
    return Footprint(weights, gradients, optimizer, max(kept, stepping, loading))


def choose(recipe: Recipe, sizes: Sizes, room: Room, num_workers: int) -> tuple[Layout, Footprint]:
    """The fastest layout that a recipe leaves open and for which each worker has room; what it needs there.

    To recompute activations costs a third to half of the arithmetic, more than to gather shared weights; so what is sharded
    gives way first. Raises DoesNotFit where none does, with what was found and what would fit.
    """
    offloads, state = _offloads(recipe, room), 12 * sizes.trained // num_workers
    if offloads and room.host is not None and state > USABLE * room.host:
        raise DoesNotFit(
            f"engine.offload: the optimizer's state does not fit: each of {num_workers} workers has "
            f"{room.host / 1e9:.2f} GB of its host's memory and needs {state / 1e9:.2f} GB. Take more nodes"
        )
    found = [(each, footprint(sizes, each, num_workers, offloads)) for each in _open(recipe, num_workers)]
    for layout, needed in found:
        if needed.total <= USABLE * room.device:
            return layout, needed
    layout, needed = min(found, key=lambda pair: pair[1].total)
    if needed.total <= room.device:
        return layout, needed
    fitting = list(_fitting(recipe, sizes, room, num_workers))
    advice = f"Write {', or '.join(fitting)}" if fitting else "Take a smaller model, or devices with more memory"
    raise DoesNotFit(
        f"model.path: {recipe.model.path} does not fit: each of {num_workers} workers has {room.device / 1e9:.2f} GB and "
        f"needs at least {needed}, with packs of {sizes.tokens:,} tokens. {advice}"
    )


def why(recipe: Recipe, sizes: Sizes, room: Room, num_workers: int, chosen: Layout) -> str:
    """Why this layout was chosen, in words: what of the recipe was open, and what faster ones would need."""
    every = _open(recipe, num_workers)
    if len(every) == 1:
        return f"{chosen}: as the recipe says"
    faster = every[: every.index(chosen)]
    if not faster:
        return f"{chosen}: the fastest that the recipe leaves open, and it fits"
    offloads = _offloads(recipe, room)
    needs = [f"{each} would need {footprint(sizes, each, num_workers, offloads).total / 1e9:.2f} GB" for each in faster]
    return f"{chosen}: each worker has {USABLE * room.device / 1e9:.2f} GB to plan with, and {', '.join(needs)}"


def tighter(recipe: Recipe, tried: Layout, num_workers: int) -> Recipe | None:
    """The recipe without the layouts that need no less memory than one that ran out of it; None where none is left."""
    stage = recipe.engine.zero_stage
    if stage == "auto" and tried.zero_stage < 3 and num_workers > 1 and recipe.model.quantize is None:
        return recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"zero_stage": 3})})
    if recipe.model.activation_checkpointing == "auto" and not tried.activation_checkpointing:
        return Layout(tried.zero_stage if stage == "auto" else stage, True).of(recipe)
    return None


def fastest(recipe: Recipe, num_workers: int) -> Layout:
    """The layout that would be chosen if memory were no matter."""
    return _open(recipe, num_workers)[0]


def _offloads(recipe: Recipe, room: Room) -> bool:
    return recipe.engine.offload == "optimizer" and room.host is not None


def _open(recipe: Recipe, num_workers: int) -> list[Layout]:
    """The layouts that a recipe leaves open, the fastest first."""
    recomputes, stage = recipe.model.activation_checkpointing, recipe.engine.zero_stage
    shardable = num_workers > 1 and recipe.model.quantize is None
    stages = ((2, 3) if shardable else (2,)) if stage == "auto" else (stage,)
    return [Layout(each, kept) for kept in ((False, True) if recomputes == "auto" else (recomputes,)) for each in stages]


def _fitting(recipe: Recipe, sizes: Sizes, room: Room, num_workers: int) -> Iterator[str]:
    """Single changes of a recipe with which it would fit, those that cost least first."""

    def fits(
        layouts: list[Layout], sizes: Sizes = sizes, workers: int = num_workers, offloads: bool = _offloads(recipe, room)
    ) -> bool:
        return any(footprint(sizes, layout, workers, offloads).total <= USABLE * room.device for layout in layouts)

    every = [Layout(stage, recomputed) for recomputed in (False, True) for stage in (2, 3)]
    own = _open(recipe, num_workers)
    if fits(every) and own != every and recipe.model.quantize is None:
        yield "engine.zero_stage: auto and model.activation_checkpointing: auto"
    if recipe.model.quantize and fits([Layout(2, True)]) and own != every:
        yield "model.activation_checkpointing: auto"
    shardable = [layout for layout in own if layout.zero_stage >= 2]
    held = 12 * sizes.trained // num_workers
    if recipe.engine.offload == "none" and held <= USABLE * (room.host or 0) and fits(shardable, offloads=True):
        yield "engine.offload: optimizer"
    more = (num_workers * 2**power for power in range(1, 10))
    wide = [] if recipe.model.quantize else [Layout(3, layout.activation_checkpointing) for layout in own]
    if workers := next((number for number in more if fits(wide, workers=number)), None):
        beside = "" if recipe.engine.zero_stage in ("auto", 3) else " with engine.zero_stage: 3"
        if room.host is None:  # workers of one host share its memory
            beside += " on more nodes"
        if recipe.train.global_batch_size % workers:
            beside += f" with train.global_batch_size: {workers}"
        yield f"scale.num_workers: {workers}{beside}"
    for tokens in (recipe.data.max_length // 2**power for power in range(1, 6)):
        share = tokens / sizes.tokens
        if fits(own, sizes=replace(sizes, kept=int(sizes.kept * share), recomputed=int(sizes.recomputed * share))):
            yield f"data.max_length: {tokens}"
            break
    if recipe.lora is None and fits(own, sizes=replace(sizes, trained=sizes.trained // 100)):
        yield "lora: {rank: 16}"
    if sizes.itemsize == 4:
        halves = {name: getattr(sizes, name) // 2 for name in ("weights", "kept", "recomputed", "shared", "live", "loading")}
        half = replace(sizes, **halves, itemsize=2)
        if fits(own, sizes=half):
            yield "model.dtype: bfloat16"
