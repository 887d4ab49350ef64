"""What a checkpoint holds of an engine: copied while training waits, made into files while it goes on, and put back."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.distributed_c10d import _set_pg_timeout

from burnish.train.checkpoint import OPTIMIZER, WEIGHTS, Files
from burnish.train.engine import Engine
from burnish.train.memory import HostMemory

Trained: TypeAlias = list[tuple[str, torch.nn.Parameter]]
"""The weights that are trained, by name, in the order of the model."""
Flat: TypeAlias = dict[str, torch.Tensor]
"""Flat tensors by name."""

_MASTER, _MOMENTS = "master", ("exp_avg", "exp_avg_sq")
_BUCKET_BYTES = 64 << 20
"""Weights that world rank 0 gathers at once, so that hundreds of small ones do not cost as many round trips."""


class State:
    """The state of an engine, which every worker has and takes snapshots of at the same steps. Made by a collective call.

    World rank 0 writes every trained weight, whole. Every worker writes its part of AdamW's float32 masters and moments:
    flat ranges that are the whole tensor laid end to end in the order of the workers, so that any number of workers can
    read them, each no more than it keeps.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._memory = HostMemory(engine.device)
        self._trained = _trained(engine)
        # What is gathered is in the host's memory, by a thread, while training uses the workers' own group.
        shared = _stage(engine) == 3 and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if shared else None
        if shared:  # it waits for a worker whose storage is slow, as long as the watchdog lets that one live
            _set_pg_timeout(timedelta(days=7), self._group)
        self._places: list[int] = []
        self._sources: Flat = {}

    @torch.no_grad()
    def snapshot(self, metadata: dict[str, str]) -> Callable[[], Files]:
        """Copies this worker's state to the host's memory, so that training may go on. What is returned makes files of it.

        That is called once, by a thread that holds up nobody: under ZeRO-3 it gathers the weights, a collective call. World
        rank 0's file of weights has `metadata`.
        """
        if not _stepped(self._engine).state:
            _begin_moments(self._engine, 0.0)
        # To look for hundreds of small tensors takes longer than to copy them. They stay where they are, unless one moves.
        places = _places(self._engine, self._trained)
        if places != self._places:
            self._sources, self._places = self._found(), places
        copies = dict(zip(self._sources, self._memory.copies(list(self._sources.values())), strict=True))
        # AdamW counts steps per tensor, and all of them step together (torch.optim.AdamW, bias correction).
        steps = next(float(state["step"]) for state in _stepped(self._engine).state.values())
        about = {"steps": str(steps), "loss_scale": json.dumps(_loss_scale(self._engine))}
        return partial(self._files, copies, about, metadata)

    def _found(self) -> Flat:
        """What this worker copies: ranges of masters and moments; on world rank 0 the weights, where it has them whole."""
        world_size, sources = dist.get_world_size(), {}
        for name, _, part in _parts(self._engine, self._trained):
            if _stage(self._engine) == 0:  # all workers have the same
                size = -(-part.numel() // world_size)
                part = part[size * dist.get_rank() : size * (dist.get_rank() + 1)]
            sources[name] = part
        if _stage(self._engine) < 3 and dist.get_rank() == 0:
            sources |= {name: weight.detach().view(-1) for name, weight in self._trained}
        return sources

    def _files(self, copies: Flat, about: dict[str, str], metadata: dict[str, str]) -> Files:
        names = {name for name, _ in self._trained}
        parts = {name: copy for name, copy in copies.items() if name not in names}
        files: Files = {f"{OPTIMIZER}/{dist.get_rank():05d}-of-{dist.get_world_size():05d}.safetensors": (parts, about)}
        if _stage(self._engine) == 3:
            weights = self._gathered(parts)
        else:
            weights = {name: copies[name].view(weight.shape) for name, weight in self._trained if name in copies}
        if dist.get_rank() == 0:
            files[WEIGHTS] = (weights, metadata)
        copies.clear()  # whoever still holds the call that made these files no longer holds their memory
        return files

    def _gathered(self, parts: Flat) -> dict[str, torch.Tensor]:
        """Every weight on world rank 0, made of all workers' masters; nothing on the others. A collective call.

        DeepSpeed itself rounds each weight of its master in every step.
        """
        first = dist.get_rank() == 0
        weights: dict[str, torch.Tensor] = {}
        for bucket in _buckets(self._trained):
            # The last parts are filled up where a weight does not divide evenly.
            sizes = [weight.partition_numel() for _, weight in bucket]  # type: ignore[attr-defined]
            own = torch.zeros(sum(sizes), dtype=bucket[0][1].dtype)
            for (name, _), place in zip(bucket, torch.split_with_sizes(own, sizes), strict=True):
                master = parts[f"{name}:{_MASTER}"]
                place[: len(master)] = master
            whole = own[None]
            if self._group is not None:
                whole = own.new_empty(dist.get_world_size(), len(own)) if first else whole
                dist.gather(own, list(whole) if first else None, group=self._group)
            if not first:
                continue
            for (name, weight), shares in zip(bucket, torch.split_with_sizes(whole, sizes, 1), strict=True):
                numel, shape = weight.ds_numel, weight.ds_shape  # type: ignore[attr-defined]
                weights[name] = shares.reshape(-1)[:numel].view(shape)
        return weights


def load_optimizer(engine: Engine, folder: Path) -> None:
    """Reads what any number of workers wrote. The model had its weights (`build_model`) before DeepSpeed took it."""
    with ExitStack() as stack, torch.no_grad():
        files = [stack.enter_context(safe_open(file, "pt")) for file in _parts_in(folder)]
        about = files[0].metadata()
        _begin_moments(engine, float(about["steps"]))
        for name, start, part in _parts(engine, _trained(engine)):
            part.copy_(_range(files, name, start, start + part.numel()))
        for name, value in json.loads(about["loss_scale"]).items():
            setattr(_scaler(engine), name, value)


def _parts_in(folder: Path) -> list[Path]:
    """The files of an optimizer's state; a hidden one is what a file server left, and no manifest vouches for it."""
    return sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))


def _buckets(trained: Trained) -> Iterator[Trained]:
    """Weights of one type that travel together, no more than `_BUCKET_BYTES` of them, or one that is larger."""
    bucket: Trained = []
    size = 0
    for name, weight in trained:
        taken = weight.ds_numel * weight.dtype.itemsize  # type: ignore[attr-defined]
        if bucket and (size + taken > _BUCKET_BYTES or weight.dtype != bucket[0][1].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append((name, weight))
        size += taken
    if bucket:
        yield bucket


def _stage(engine: Engine) -> int:
    return int(engine.zero_optimization_stage())


def _trained(engine: Engine) -> Trained:
    return [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]


def _stepped(engine: Engine) -> torch.optim.Optimizer:
    """The AdamW that DeepSpeed steps; its parameters are DeepSpeed's own, a worker's part of them or whole."""
    optimizer: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return optimizer


def _stepped_tensors(engine: Engine) -> list[torch.Tensor]:
    """The float32 masters as AdamW steps them."""
    if _stage(engine) == 3:  # its AdamW has parameters within a step only
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [tensor for group in _stepped(engine).param_groups for tensor in group["params"]]


def _places(engine: Engine, trained: Trained) -> list[int]:
    """Addresses of all that a snapshot copies."""
    tensors = _stepped_tensors(engine) + ([weight for _, weight in trained] if _stage(engine) < 3 else [])
    tensors += [state[key] for state in _stepped(engine).state.values() for key in _MOMENTS]
    return [tensor.data_ptr() for tensor in tensors]


def _masters(engine: Engine, trained: Trained) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Without ZeRO, the tensor that AdamW steps for each trained weight: the weight, or its float32 copy."""
    halves, masters = getattr(engine.optimizer, "fp16_groups", []), getattr(engine.optimizer, "fp32_groups", [])
    copies = {half: master for group in zip(halves, masters, strict=True) for half, master in zip(*group, strict=True)}
    return {parameter: copies.get(parameter, parameter) for _, parameter in trained}


def _begin_moments(engine: Engine, steps: float) -> None:
    """Gives AdamW the state that it has after its first step, all zeros, so that it can be filled or read."""
    for part in _stepped_tensors(engine):
        moments = {key: torch.zeros_like(part) for key in _MOMENTS}
        _stepped(engine).state[part] = {"step": torch.tensor(steps, device=part.device), **moments}
    if _stage(engine) in (1, 2):  # else DeepSpeed does it in its first step
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _parts(engine: Engine, trained: Trained) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Of each float32 master and moment the name, where this worker's flat range begins, and the range, to be written to."""
    stage = _stage(engine)
    masters = _masters(engine, trained) if stage == 0 else {}
    for name, weight in trained:
        for key in (_MASTER, *_MOMENTS):
            if stage == 0:
                master = masters[weight]
                start, part = 0, (master.detach() if key == _MASTER else _stepped(engine).state[master][key]).view(-1)
            elif stage == 3:
                start, part = _sharded(weight, key)
            else:
                start, part = _fragment(weight, key)
            yield f"{name}:{key}", start, part


def _sharded(weight: Any, key: str) -> tuple[int, torch.Tensor]:
    """Start and range under ZeRO-3, where workers share each weight."""
    # What DeepSpeed's public functions give of an optimizer on the host is a copy on the device, and not what it steps.
    own, _ = weight._z3_optimizer._get_fp32_opt_state_partition(
        weight, release_swap_buffers=False, optim_state_key=None if key == _MASTER else key
    )
    start = weight.partition_numel() * dist.get_rank()
    # The last parts are filled up where a weight does not divide evenly.
    return start, own.detach()[: max(0, weight.ds_numel - start)]


def _fragment(weight: Any, key: str) -> tuple[int, torch.Tensor]:
    """Start and range under ZeRO-1 and 2, where workers share all weights laid end to end: none of most of them."""
    mapping = weight._hp_mapping
    if mapping is None:
        return 0, torch.empty(0)
    return mapping.lp_fragment_address.start, mapping.get_hp_fragment(None if key == _MASTER else key).detach()


def _range(files: list[Any], name: str, start: int, end: int) -> torch.Tensor:
    """Elements `start` to `end` of a flat tensor whose parts lie in these files, or as many as there are."""
    found, at = [torch.empty(0)], 0
    for file in files:
        part = file.get_slice(name)
        (size,) = part.get_shape()
        if at < end and start < at + size:
            found.append(part[max(start - at, 0) : min(end - at, size)])
        at += size
    return torch.cat(found)


def _scaler(engine: Engine) -> Any:
    """What holds the scale of float16's loss: DeepSpeed's scaler with ZeRO, its wrapper of AdamW without; else nothing."""
    return getattr(engine.optimizer, "loss_scaler", getattr(engine.optimizer, "loss_scale_config", None))


def _loss_scale(engine: Engine) -> dict[str, float | None]:
    """The scale of float16's loss, and what decides when it changes; every worker has the same."""
    names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
    return {name: getattr(_scaler(engine), name) for name in names if hasattr(_scaler(engine), name)}
