"""One step is one step: real DeepSpeed on gloo, for workers x accumulation x ZeRO stage, against one plain big batch."""

import ctypes
import gc
import json
import multiprocessing
import os
import pickle
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM, PhiConfig, Qwen3MoeConfig

from burnish.config import Recipe
from burnish.data.order import Cursor, StepMeta
from burnish.data.packing import IGNORE_INDEX, Pack, Sample
from burnish.train.attempt import Attempt, Progress
from burnish.train.batches import Batch
from burnish.train.footprint import measure
from burnish.train.home import Home
from burnish.train.watchdog import Watchdog
from tests.conftest import free_port, publish, write_model

pytestmark = pytest.mark.distributed

STEPS = 3


def make_packs(packed: bool = True) -> list[list[Pack]]:
    """Three steps of four packs with very uneven targets; the last step has an empty pack, as the end of a run has.

    Not packed, each sample is a pack of its own in the same step, and packs that train nothing fill the steps up to as many,
    which four workers can share: one with tokens and no target, the others empty.
    """
    rng = np.random.default_rng(0)

    def sample() -> Sample:
        length = int(rng.integers(5, 30))
        trained = np.arange(length) >= rng.integers(1, length)
        return Sample(rng.integers(0, 300, length).astype(np.int32), trained, (1,))

    steps = [[[sample() for _ in range(int(rng.integers(1, 4)))] for _ in range(4)] for _ in range(STEPS)]
    steps[-1][3] = []
    if packed:
        return [[Pack.of(samples) for samples in step] for step in steps]
    singles = [[Pack.of([sample]) for samples in step for sample in samples] for step in steps]
    size = -(-max(len(step) + 1 for step in singles) // 4) * 4
    untrained = Pack(np.arange(7, dtype=np.int32), np.full(7, IGNORE_INDEX, np.int32), np.array([7], np.int32))
    return [[*step, untrained, *[Pack.of([])] * (size - 1 - len(step))] for step in singles]


class Trained(NamedTuple):
    """What training gave: losses, whole gradients and their norms, of each step."""

    losses: list[float]
    gradients: list[torch.Tensor]
    norms: list[float]


def plain(recipe: Recipe) -> Trained:
    """One process that never packs, shards, accumulates or recomputes: each step is one big batch."""
    from burnish.train.build import build_model

    model = build_model(recipe, cuda=False)
    model.set_attn_implementation("eager")
    for module in model.modules():
        vars(module).pop("forward", None)  # adapters compute as PEFT has them
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    found = Trained([], [], [])
    for packs in make_packs():
        total, count = torch.zeros(()), sum(pack.trained_tokens for pack in packs)
        for pack in packs:
            for end, length in zip(np.cumsum(pack.seq_lens), pack.seq_lens, strict=True):
                ids = torch.from_numpy(pack.input_ids[end - length : end].astype(np.int64))
                labels = torch.from_numpy(pack.labels[end - length : end].astype(np.int64))
                logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
                total = total + F.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100)
        optimizer.zero_grad()
        (total / count).backward()
        found.losses.append(total.item() / count)
        found.gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        found.norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, recipe.optim.max_grad_norm)))
        optimizer.step()
    return found


class Reads(TorchDispatchMode):
    """Where values of tensors are asked for, which on a GPU the host waits for: file and function."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero"):
            self.found.add(_caller())
        return func(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Where tensors on the device are made of Python's numbers, which on a GPU are copied while the host waits."""

    def __init__(self, found: set[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.tensor, torch.as_tensor) and not torch.is_tensor(args[0]) and "device" in (kwargs or {}):
            self._found.add(_caller())
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    """The innermost call that is neither torch's nor one of a mode."""
    frames = [each for each in traceback.extract_stack()[:-2] if each.name != "__torch_function__"]
    callers = [each for each in frames if "/torch/" not in each.filename]
    return f"{Path(callers[-1].filename).name} {callers[-1].name}"


def _status(name: str) -> int:
    """Bytes that a line of this process's status tells."""
    (line,) = (each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(f"{name}:"))
    return int(line.split()[1]) << 10


class Worker:
    """One worker of a gang that meets at a port of its own."""

    def __init__(self, rank: int, world: int, port: int) -> None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": "0"}
        os.environ |= {"WORLD_SIZE": str(world), "DS_ACCELERATOR": "cpu"}
        self.rank, self.world = rank, world
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo")
        import transformers.models.llama.modeling_llama  # noqa: F401

        import burnish.train.engine  # noqa: F401

        gc.freeze()  # DeepSpeed collects garbage at the start of each ZeRO-3 engine, half a second among all that was imported

    def run(self, runs: list[tuple[Recipe, bool]]) -> list[Trained]:
        return [self.train(recipe, packed) for recipe, packed in runs]

    def go_on(self, recipes: list[Recipe], folder: str, resumes: bool):
        """Writes a checkpoint of each recipe after two steps, or reads it; the masters and moments after the third step."""
        import deepspeed
        from safetensors import safe_open
        from safetensors.torch import load_file

        from burnish.train import checkpoint, writer
        from burnish.train import engine as ds
        from burnish.train.build import build_model
        from burnish.train.state import State, load_optimizer

        ends = []
        for number, recipe in enumerate(recipes):
            saved = Path(folder, str(number))
            model = build_model(recipe, False, self.world, saved / checkpoint.WEIGHTS if resumes else None)
            engine = ds.build_engine(recipe, model, self.world)
            state = State(engine)
            # What is on the host is elsewhere than a GPU, to which some of DeepSpeed's functions would copy it.
            elsewhere = partial(patch.object, deepspeed.accelerator.get_accelerator(), "current_device_name", lambda: "meta")
            apart = elsewhere if recipe.engine.offload == "optimizer" else nullcontext
            if resumes:
                with apart():
                    load_optimizer(engine, saved / checkpoint.OPTIMIZER)
            else:
                self.steps(engine, make_packs()[:2])
                with apart():
                    writer.write_files(saved, state.snapshot({})())
                torch.distributed.barrier()
            self.steps(engine, make_packs()[2:])
            end = Path(folder, f"{number}-end-{self.world}-{resumes}", checkpoint.OPTIMIZER)
            with apart():
                writer.write_files(end.parent, state.snapshot({})())
            torch.distributed.barrier()
            trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
            with deepspeed.zero.GatheredParameters(
                list(trained.values()), enabled=recipe.engine.zero_stage == 3 and not recipe.lora
            ):
                written = load_file(end.parent / checkpoint.WEIGHTS)
                assert set(written) == set(trained) and all(torch.equal(written[name], trained[name]) for name in trained)
            parts = [load_file(file) for file in sorted(end.iterdir())]
            assert len(parts) == self.world
            ends.append({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
            with safe_open(next(end.iterdir()), "pt") as part:
                scale = json.loads(part.metadata()["loss_scale"])
            ends[-1]["loss scale"] = torch.tensor([float(value or 0) for value in scale.values()])
        return ends

    def state(self, recipes: list[Recipe]) -> list[dict[str, int]]:
        """Bytes of each tensor that this worker writes of a checkpoint after a step, by recipe."""
        from burnish.train import engine as ds
        from burnish.train.build import build_model
        from burnish.train.state import State, _stepped

        def tensors(files) -> dict[str, torch.Tensor]:
            return {name: tensor for tensors, _ in files.values() for name, tensor in tensors.items()}

        def blocks_of(tensors: dict[str, torch.Tensor]) -> set[int]:
            return {
                tensor.untyped_storage().data_ptr() for name, tensor in tensors.items() if ":" in name and tensor.numel()
            }

        found = []
        for recipe in recipes:
            engine = ds.build_engine(recipe, build_model(recipe, False, self.world), self.world)
            self.steps(engine, make_packs()[:1])
            state = State(engine)
            if state._group is not None:  # a worker whose storage is slow is waited for
                backend = state._group._get_backend(torch.device("cpu"))
                assert backend.options._timeout.days >= 1
            made = state.snapshot({})
            first = tensors(made())
            found.append({name: tensor.nbytes for name, tensor in first.items()})
            were, blocks = {name: tensor.clone() for name, tensor in first.items()}, blocks_of(first)
            self.steps(engine, make_packs()[1:])
            second = tensors(state.snapshot({})())
            assert all(torch.equal(first[name], were[name]) for name in first), (
                "a snapshot that is being written stays as it is"
            )
            assert not any(torch.equal(second[name], were[name]) for name in second if second[name].numel())
            first.clear()
            third = tensors(state.snapshot({})())
            assert all(torch.equal(third[name], second[name]) for name in third)
            assert blocks_of(third) == blocks, "memory is used again, though the call that made the files is still held"
            if engine.zero_optimization_stage() in (
                0,
                3,
            ):  # in the others DeepSpeed itself keeps to the moments of the first step
                for moments in _stepped(engine).state.values():
                    moments["exp_avg"] = moments["exp_avg"] + 1.0
                fourth = tensors(state.snapshot({})())
                moved = [name for name in fourth if name.endswith(":exp_avg")]
                assert all(torch.equal(fourth[name], third[name] + 1.0) for name in moved), "where it lies now"
        return found

    def losses(self, recipe: Recipe, folder: str, resumes: bool) -> list[float]:
        """Loss and gradient norm of three of the loop's own steps, or of the third from a checkpoint of the first two."""
        from burnish.train import checkpoint, writer
        from burnish.train import engine as ds
        from burnish.train.build import build_model
        from burnish.train.state import State, load_optimizer

        saved = Path(folder, "saved")
        model = build_model(recipe, False, self.world, saved / checkpoint.WEIGHTS if resumes else None)
        engine = ds.build_engine(recipe, model, self.world)
        if resumes:
            load_optimizer(engine, saved / checkpoint.OPTIMIZER)
        state, found = State(engine), []
        with self.stepping(recipe, folder, engine) as train_step:
            for step in (3,) if resumes else (1, 2, 3):
                metrics = train_step(step)
                found += [metrics["train/loss"], metrics["train/grad_norm"]]
                if step == 2:
                    writer.write_files(saved, state.snapshot({})())
                    torch.distributed.barrier()
        return found

    @contextmanager
    def stepping(self, recipe: Recipe, folder: str, engine) -> Iterator[Callable[[int], dict[str, float]]]:
        """Takes one of the steps as the loop does, and gives its metrics."""
        from burnish.train import loop, worker
        from burnish.train.architecture import pack_cost
        from burnish.train.objective import Objective
        from burnish.train.throughput import Meter

        home = Home(Path(folder))
        attempt = Attempt("attempt", recipe, folder, None, Progress(), None, (), (), None, True, 1, "", None, False, None)
        watchdog = Watchdog(home, self.rank, 600.0)
        own = worker.Worker(
            attempt, home, engine, Objective(engine, engine.device), watchdog, Meter(pack_cost(recipe), None)
        )

        def train_step(step: int) -> dict[str, float]:
            packs = make_packs()[step - 1]
            names = tuple((0, 0, index) for index in range(len(packs)))
            tokens, trained = sum(len(pack.input_ids) for pack in packs), sum(pack.trained_tokens for pack in packs)
            meta = StepMeta(names, tokens, trained, step / 4, Cursor(), (), 1, 1.0)
            share = [(pack.input_ids, pack.labels, pack.seq_lens) for pack in packs[self.rank :: self.world]]
            return loop.train_step(own, Batch(share, meta, 0.0), step)[0]

        try:
            yield train_step
        finally:
            watchdog.rest()

    def overflow(self, recipes: list[Recipe], folder: str) -> list[str]:
        """How each run ends where a gradient is infinite in the second step, on the last worker, and the loss is not."""
        from burnish.errors import TrainingError
        from burnish.train import engine as ds
        from burnish.train.build import build_model
        from burnish.train.model import decoder_layers

        ends = []
        for recipe in recipes:
            engine = ds.build_engine(recipe, build_model(recipe, False, self.world), self.world)
            with self.stepping(recipe, folder, engine) as train_step:
                train_step(1)
                if self.rank == self.world - 1:
                    decoder_layers(engine.module)[1].register_forward_pre_hook(
                        lambda _, inputs: inputs[0].register_hook(lambda gradient: gradient * float("inf")) and None
                    )
                try:
                    train_step(2)
                    ends.append("went on")
                except TrainingError as error:
                    ends.append(str(error))
        return ends

    def added(self, recipes: list[Recipe]) -> list[float]:
        """How far the gradient of a step of many packs is from the float32 sum of those that its packs have alone."""
        from deepspeed.utils import safe_get_full_grad

        from burnish.train import engine as ds
        from burnish.train.build import build_model
        from burnish.train.objective import Objective

        rng, found = np.random.default_rng(0), []
        rows = [rng.integers(0, 300, 40).astype(np.int32) for _ in range(recipes[0].train.global_batch_size)]
        packs = [(ids, ids, np.array([25, 15], np.int32)) for ids in rows]
        for recipe in recipes:
            alone = build_model(recipe, False, 1)
            loss_of, right = Objective(alone, torch.device("cpu")).loss_sum, torch.zeros(())
            for pack in packs:
                alone.zero_grad()
                (loss_of(*pack) / len(packs)).backward()
                right = right + torch.cat([p.grad.float().flatten() for p in alone.parameters() if p.requires_grad])
            engine = ds.build_engine(recipe, build_model(recipe, False, self.world), self.world)
            loss_of, own = Objective(engine, engine.device).loss_sum, packs[self.rank :: self.world]
            for number, pack in enumerate(own):
                ds.backward(engine, loss_of(*pack), len(packs), self.world)
                if number == len(own) - 1:
                    trained = [p for p in engine.module.parameters() if p.requires_grad]
                    whole = torch.cat([safe_get_full_grad(p).float().flatten() for p in trained])
                    found.append(float((whole - right).norm() / right.norm()))
                ds.step(engine)
        return found

    def reads(self, recipes: list[Recipe]) -> list[set[str]]:
        """Where the host asks for a value that the device has computed, in `take` of the fourth step of each recipe.

        By then ZeRO-3 knows the order of layers.
        """
        from deepspeed.accelerator import get_accelerator

        from burnish.train import engine as ds
        from burnish.train.build import build_model
        from burnish.train.objective import Objective
        from burnish.train.step import Step, take

        accelerator = get_accelerator()
        found = []
        for recipe in recipes:
            engine = ds.build_engine(recipe, build_model(recipe, False, self.world), self.world)
            objective = Objective(engine, engine.device)
            for number, packs in enumerate([*make_packs(), make_packs()[0]], 1):
                own = [(pack.input_ids, pack.labels, pack.seq_lens) for pack in packs[self.rank :: self.world]]
                told = Step(number, 1e-3, sum(pack.trained_tokens for pack in packs), 0)
                waits = patch.object(accelerator, "synchronize", lambda *_: reads.found.add(_caller()))
                with Reads() as reads, Copies(reads.found), waits:
                    take(engine, objective, own, told)
            found.append(reads.found)
        return found

    def loading(self, recipe: Recipe, *hubs: str) -> tuple[int, bool, dict[str, torch.Tensor]]:
        """Bytes that this process takes more at its peak while the model loads, whether it has its part alone, and all weights.

        Hub models are in a cache for each worker.
        """
        import deepspeed
        from huggingface_hub import constants

        from burnish.train.build import build_model

        gc.collect()
        # What is freed is given back at once, as weights of the size of a large model's always are (mallopt(3), -3).
        ctypes.CDLL(None).mallopt(-3, 1 << 20)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on (proc(5))
        before = _status("VmRSS")
        with patch.object(constants, "HF_HUB_CACHE", hubs[self.rank] if hubs else ""):
            model = build_model(recipe, False, self.world)
        grown = _status("VmHWM") - before
        if recipe.lora is not None:
            return grown, *self.computing(model, bool(recipe.lora.train_tokens))
        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=recipe.engine.zero_stage == 3):
            weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        return grown, all(hasattr(weight, "ds_id") for weight in model.parameters()), weights

    def computing(self, model, whole_ends: bool) -> tuple[bool, dict[str, torch.Tensor]]:
        """Whether the frozen matrices of a model have no values, and those that each layer, embeddings and head compute with.

        Embeddings have values where they are to be whole.
        """
        from burnish.train.model import decoder_layers
        from burnish.train.objective import packed_inputs
        from burnish.train.shards import Shards

        shards = [each for each in gc.get_objects() if isinstance(each, Shards)]
        frozen = [(name, weight) for name, weight in model.named_parameters() if not weight.requires_grad]
        kept = ("model.norm", "embed_tokens") if whole_ends else ("model.norm",)
        parted = [weight for name, weight in frozen if not any(each in name for each in kept)]
        empty = all(not weight.numel() for weight in parted)
        found: dict[str, torch.Tensor] = {}

        def look(module, inputs) -> None:
            assert all(len(each._live) <= 2 for each in shards), "a layer, and the next one"
            for name, weight in frozen:
                if weight.numel() and any(weight is each for each in module.parameters()):
                    plain = name.removeprefix("base_model.model.").replace(".token_adapter", "").replace(".base_layer", "")
                    found[plain] = weight.detach().clone()

        for module in (model.get_input_embeddings(), *decoder_layers(model), model.get_output_embeddings()):
            module.register_forward_pre_hook(look)
        row, device = torch.arange(4)[None], torch.device("cpu")
        loss = model(input_ids=row, **packed_inputs(np.array([4], np.int32), device)).logits.square().mean()
        loss.backward()
        assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)
        return empty and all(not weight.numel() for weight in parted), found

    def agree(self, recipe: Recipe, odd: str) -> tuple[int, bool] | str:
        """The layout that this worker trains with, where the last one can tell nothing, or has no room."""
        from burnish.errors import RecipeError
        from burnish.train import footprint

        measure, room_of = footprint.measure, footprint.room_of
        try:
            if self.rank == self.world - 1 and odd == "unknown":
                footprint.measure = lambda recipe: 1 / 0
            if self.rank == self.world - 1 and odd == "full":
                footprint.room_of = lambda *_: footprint.Room(1000)
            decided, _ = footprint.agree(recipe, False, self.world)
            return decided.engine.stage(), decided.model.recomputes()
        except RecipeError as error:
            return str(error)
        finally:
            footprint.measure, footprint.room_of = measure, room_of

    def leak(self, recipe: Recipe) -> str:
        """The verdict on this worker where only the last one's borders are wrong."""
        from burnish.errors import TrainingError
        from burnish.train import engine as ds
        from burnish.train import objective, self_test
        from burnish.train.build import build_model

        engine, right = ds.build_engine(recipe, build_model(recipe, False, self.world), self.world), objective.packed_inputs
        if self.rank == self.world - 1:
            objective.packed_inputs = lambda seq_lens, device: right(np.array([seq_lens.sum()]), device)
        packs = [(pack.input_ids, pack.labels, pack.seq_lens) for pack in make_packs()[0]]
        try:
            self_test.check(engine.module, packs, engine.device)
        except TrainingError as error:
            return str(error)
        finally:
            objective.packed_inputs = right
        return "passed"

    def steps(self, engine, steps: list[list[Pack]]) -> None:
        from burnish.train import engine as ds
        from burnish.train.objective import Objective

        objective = Objective(engine, engine.device)
        for packs in steps:
            for pack in packs[self.rank :: self.world]:
                loss = objective.loss_sum(pack.input_ids, pack.labels, pack.seq_lens)
                ds.backward(engine, loss, sum(pack.trained_tokens for pack in packs), self.world)
                ds.step(engine)

    def train(self, recipe: Recipe, packed: bool) -> Trained:
        from deepspeed.utils import safe_get_full_grad

        from burnish.train import engine as ds
        from burnish.train import self_test
        from burnish.train.build import build_model
        from burnish.train.model import decoder_layers
        from burnish.train.objective import Objective

        engine = ds.build_engine(recipe, build_model(recipe, False, self.world), self.world)
        objective = Objective(engine, engine.device)
        assert (objective._head is None) == bool(recipe.lora and recipe.lora.train_tokens)
        steps, trained = make_packs(packed), [p for p in engine.module.parameters() if p.requires_grad]
        if packed:  # Changes nothing, so that all below holds with it as without.
            own = [(pack.input_ids, pack.labels, pack.seq_lens) for pack in steps[0][self.rank :: self.world]]
            self_test.check(engine.module, own, engine.device)
        found, ran, layers = Trained([], [], []), [], decoder_layers(engine.module)
        for layer in layers:  # whose own hooks stand around the checkpoint
            next(layer.children()).register_forward_pre_hook(lambda *_: ran.append(1))
        for packs in steps:
            count, total = sum(pack.trained_tokens for pack in packs), torch.zeros(1, dtype=torch.float64)
            for number, pack in enumerate(packs[self.rank :: self.world]):
                loss = objective.loss_sum(pack.input_ids, pack.labels, pack.seq_lens)
                assert loss > 0 if pack.trained_tokens else loss == 0
                ds.backward(engine, loss, count, self.world)
                if number == len(packs) // self.world - 1:
                    found.gradients.append(torch.cat([safe_get_full_grad(p).float().flatten().clone() for p in trained]))
                norm = float(ds.step(engine))
                total += loss.detach()
            torch.distributed.all_reduce(total)
            found.losses.append(total.item() / count)
            found.norms.append(norm)
        times = 2 if recipe.model.activation_checkpointing is True else 1
        assert len(ran) == times * len(layers) * len(steps) * len(steps[0]) // self.world, (
            "only where it is asked for, layers run again"
        )
        return found


def _serve(rank: int, world: int, port: int, orders: Connection) -> None:
    """A worker's process: it calls the methods that it is told, and sends what they return or raise."""
    worker = Worker(rank, world, port)
    while True:
        method, arguments = orders.recv()
        try:
            answer = getattr(worker, method)(*arguments), None
        except Exception as error:
            answer = None, error
        orders.send_bytes(pickle.dumps(answer))  # a tensor as its bytes, and not as memory that is shared


class Gang:
    """Workers that met, each in a process of its own."""

    def __init__(self, world: int) -> None:
        context, port = multiprocessing.get_context("spawn"), free_port()
        ends = [context.Pipe() for _ in range(world)]
        self._orders = [own for own, _ in ends]
        self._processes = [
            context.Process(target=_serve, args=(rank, world, port, other), daemon=True)
            for rank, (_, other) in enumerate(ends)
        ]
        for process, (_, other) in zip(self._processes, ends, strict=True):
            process.start()
            other.close()  # so that the end of a process ends what waits for it

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """What each worker's method gives; raises what the first of them raises, or EOFError where one died."""
        for orders in self._orders:
            orders.send((method, arguments))
        answers: dict[int, Any] = {}
        while len(answers) < len(self._orders):
            for ready in wait([orders for rank, orders in enumerate(self._orders) if rank not in answers]):
                answer, error = pickle.loads(ready.recv_bytes())
                if error is not None:
                    raise error
                answers[self._orders.index(ready)] = answer
        return [answers[rank] for rank in range(len(answers))]

    def end(self) -> None:
        """Ends all of them, whatever they do."""
        for process in self._processes:
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def gang():
    """Calls a method of 1, 2 or 4 workers that met; they load torch and DeepSpeed once for all tests."""
    gangs: dict[int, Gang] = {}

    def call(world: int, method: str, *arguments: Any) -> list[Any]:
        if world not in gangs:
            gangs[world] = Gang(world)
        try:
            return gangs[world].call(method, *arguments)
        except BaseException:
            gangs.pop(world).end()  # the others wait for the one that failed
            raise

    yield call
    for each in gangs.values():
        each.end()


@pytest.mark.parametrize("everywhere", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_losses_and_gradients_equal_one_big_batch(gang, make_recipe, everywhere):
    """Each kind on one, two and four workers; without the soak on two those that are packed or recompute, and on one and
    four ZeRO-2 and 3 of those that are packed, recompute nothing and stay on the device."""
    lora, saved = {"rank": 4}, {"rank": 4, "modules_to_save": ["embed_tokens", "lm_head", "norm"]}
    dora, tokens = {**saved, "variant": "dora"}, {"rank": 4, "train_tokens": ["a", "e"]}
    kinds = [
        *product((tokens,), (0, 3), (True,), (False, True), ("none",)),
        *product((None,), (0, 1, 2, 3), (True, False), (False, True), ("none",)),
        *product((lora,), (0, 3), (True,), (False, True), ("none",)),
        *product((dora,), (0, 3), (True,), (False,), ("none",)),
        *product((saved,), (3,), (True,), (True,), ("none",)),
        *product((None, lora), (2, 3), (True,), (False,), ("optimizer",)),
    ]
    expected = {str(adapters): plain(make_recipe(lora=adapters)) for adapters in (None, lora, saved, dora, tokens)}
    for world in (1, 2, 4):
        asked = [
            (adapters, stage, packed, recomputed, offload)
            for adapters, stage, packed, recomputed, offload in kinds
            if everywhere
            or (world == 2 and (packed or recomputed))
            or (stage >= 2 and packed and not recomputed and offload == "none")
        ]
        runs = [
            make_recipe(
                model={"activation_checkpointing": recomputed},
                lora=adapters,
                train={"global_batch_size": len(make_packs(packed)[0])},
                scale={"num_workers": world},
                engine={"zero_stage": stage, "offload": offload},
            )
            for adapters, stage, packed, recomputed, offload in asked
        ]
        results = gang(world, "run", [(recipe, kind[2]) for recipe, kind in zip(runs, asked, strict=True)])
        for (adapters, stage, packed, recomputed, offload), workers in zip(asked, zip(*results, strict=True), strict=True):
            right = expected[str(adapters)]
            where = f"{world} workers, ZeRO-{stage}, {packed=}, {recomputed=}, {offload=}, lora {adapters}"
            for found in workers:
                assert np.allclose(found.losses, right.losses, rtol=1e-5, atol=0), (where, found.losses, right.losses)
                assert np.allclose(found.norms, right.norms, rtol=1e-5, atol=0), (where, found.norms, right.norms)
                for one, other in zip(found.gradients, right.gradients, strict=True):
                    assert (one - other).norm() / other.norm() < 1e-5, where
    firsts, _, thirds = zip(*(right.losses for right in expected.values()), strict=True)
    assert np.allclose(firsts, firsts[0], rtol=1e-6, atol=0), "fresh adapters change nothing"
    assert len(set(thirds)) == len(expected)


ODD = {
    # A head that shares its weight with the embeddings and has a bias of its own.
    "phi": PhiConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, attention_dropout=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
    ),
    # Matrices the other way round, which PEFT asks for their shape.
    "gpt2": GPT2Config(
        vocab_size=400, n_embd=32, n_inner=48, n_layer=2, n_head=2, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
    ),
    # Experts that are one tensor of three dimensions.
    "qwen3_moe": Qwen3MoeConfig(
        vocab_size=400, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_models_train_alike_when_their_frozen_weights_are_shared_out(gang, make_recipe, tmp_path, name):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(ODD[name]).save_pretrained(tmp_path / name)

    def recipe_of(stage: int, recomputed: bool) -> Recipe:
        model = {"path": str(tmp_path / name), "activation_checkpointing": recomputed}
        return make_recipe(model=model, lora={"rank": 4}, scale={"num_workers": 2}, engine={"zero_stage": stage})

    right = plain(recipe_of(2, False))
    kinds = ((3, False), (3, True), (2, False))
    for kind, *workers in zip(kinds, *gang(2, "run", [(recipe_of(*kind), True) for kind in kinds]), strict=True):
        for found in workers:
            assert np.allclose(found.losses, right.losses, rtol=1e-5, atol=0), (kind, found.losses, right.losses)
            for one, other in zip(found.gradients, right.gradients, strict=True):
                assert (one - other).norm() / other.norm() < 1e-5, kind


def test_a_run_goes_on_with_any_number_of_workers_under_every_stage(gang, make_recipe, tmp_path):
    # 50 dimensions at rank 1 do not divide over 4 workers, so that ZeRO-3 fills its last part up.
    model = write_model(tmp_path / "model", intermediate_size=50)

    def ends(world: int, resumes: bool, kinds: list[tuple[int, str, Any, str]]) -> list[dict[str, torch.Tensor]]:
        recipes = [
            make_recipe(
                model={"path": str(model), "dtype": dtype},
                lora=adapters,
                scale={"num_workers": world},
                engine={"zero_stage": stage, "offload": offload},
            )
            for stage, dtype, adapters, offload in kinds
        ]
        return gang(world, "go_on", recipes, str(tmp_path), resumes)[0]

    lora = {"rank": 1}
    dora = {**lora, "variant": "dora", "modules_to_save": ["lm_head"]}
    kinds = [
        (0, "float32", None), (0, "bfloat16", lora), (1, "float32", lora), (2, "bfloat16", None), (3, "float32", lora),
        (3, "float32", None), (3, "bfloat16", None), (3, "float32", dora),
    ]  # fmt: skip
    kinds += [(3, "float32", {**lora, "train_tokens": ["a"]})]
    kinds = [(*kind, "none") for kind in kinds] + [(2, "bfloat16", lora, "optimizer"), (3, "bfloat16", None, "optimizer")]
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():  # as DeepSpeed asks; its loss scale must go on too
        kinds += [(0, "float16", None, "none"), (1, "float16", lora, "none"), (3, "float16", None, "none")]
    expected = ends(2, False, kinds)
    for world in (1, 2, 4):
        for kind, found, wanted in zip(kinds, ends(world, True, kinds), expected, strict=True):
            assert set(found) == set(wanted) and len(found) > 20
            for name, tensor in wanted.items():
                if world == 2:
                    assert torch.equal(found[name], tensor), (kind, name)
                elif kind[1] != "float16":  # whether a step overflows depends on the number of workers
                    near = 1e-5 if kind[1] == "float32" else 0.1
                    assert (found[name] - tensor).norm() <= near * tensor.norm() + 1e-7, (world, kind, name)


def test_the_state_of_adapters_is_small_and_the_same_on_any_number_of_workers(gang, make_recipe, tmp_path):
    # Two layers of a width at which adapters of rank 16 have a tenth of their weights; as in small models, embeddings outweigh
    # the layers, and the adapters are then a fortieth of all.
    config = LlamaConfig(
        vocab_size=16384, hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")

    def states(world: int, kinds: list[tuple[dict[str, int] | None, int]]) -> list[Counter[str]]:
        recipes = [
            make_recipe(
                model={"path": str(tmp_path / "model")},
                lora=adapters,
                scale={"num_workers": world},
                engine={"zero_stage": stage},
            )
            for adapters, stage in kinds
        ]
        return [sum(map(Counter, parts), Counter()) for parts in zip(*gang(world, "state", recipes), strict=True)]

    lora = {"rank": 16}
    whole, adapters = states(1, [(None, 3), (lora, 3)])
    assert whole.total() == 16 * sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    assert all("lora_" in name for name in adapters) and len(adapters) == 4 * 2 * 7 * 2
    assert adapters.total() <= whole.total() / 20
    for world, stages in ((1, (0,)), (2, (0, 1, 2, 3)), (4, (1, 3))):
        assert states(world, [(lora, stage) for stage in stages]) == [adapters] * len(stages)


def test_gradients_of_16_bits_are_added_up_in_float32(gang, make_recipe):
    kinds = [*product((2, 3), (None, {"rank": 4})), (1, None)]
    for world in (1, 2):
        recipes = [
            make_recipe(
                model={"dtype": "bfloat16"}, lora=adapters, engine={"zero_stage": stage}, scale={"num_workers": world},
                train={"global_batch_size": 32},
            )
            for stage, adapters in kinds
        ]  # fmt: skip
        for *sharded, whole in gang(world, "added", recipes):
            # Of two workers the gradients meet in bfloat16, which rounds at 2^-9.
            assert max(sharded) <= (1e-6 if world == 1 else 2**-9) and whole > 2**-9, (world, sharded, whole)


def test_the_host_asks_for_nothing_that_the_device_computes_within_a_step(gang, make_recipe):
    """`train_step` asks once, for the loss and the norm. DeepSpeed's optimizer of 16 bits without shards asks for every gradient,
    and two others copy a number to the device when they clip, after the last pack."""
    kinds = [
        *product(("float32",), (None, {"rank": 4}), (0, 2, 3)),
        *product(("bfloat16",), (None, {"rank": 4}), (2, 3)), ("bfloat16", {"rank": 4}, 0),
    ]  # fmt: skip
    recipes = [
        make_recipe(model={"dtype": dtype}, lora=adapters, scale={"num_workers": 2}, engine={"zero_stage": stage})
        for dtype, adapters, stage in kinds
    ]
    for found in gang(2, "reads", recipes):
        *others, whole = found
        clips = {("float32", 0): {"utils.py clip_grad_norm_"}}
        clips |= {(dtype, 3): {"stage3.py get_grad_norm_direct"} for dtype in ("float32", "bfloat16")}
        for (dtype, adapters, stage), places in zip(kinds[:-1], others, strict=True):
            by_zero_2 = stage == 3 and adapters is not None
            assert places == (set() if by_zero_2 else clips.get((dtype, stage), set())), (dtype, adapters, stage)
        assert any("has_inf_or_nan" in place or "has_overflow" in place for place in whole), whole


def test_a_gradient_that_is_no_number_ends_the_run_on_every_worker_though_the_loss_is_one(gang, make_recipe, tmp_path):
    kinds = [*product(("float32", "bfloat16"), (None, {"rank": 4}), (0, 1, 2, 3))]
    recipes = [
        make_recipe(model={"dtype": dtype}, lora=adapters, scale={"num_workers": 2}, engine={"zero_stage": stage})
        for dtype, adapters, stage in kinds
    ]
    for ends in gang(2, "overflow", recipes, str(tmp_path)):
        for kind, end in zip(kinds, ends, strict=True):
            assert re.match(r"the loss of step 2 is [0-9.]+, its gradient norm (inf|nan); its packs", end), (kind, end)


def test_dropout_is_that_of_the_pack_after_a_resume_and_on_any_number_of_workers(gang, make_recipe, tmp_path):
    def losses(world: int, dropout: float, resumes: bool = False) -> list[float]:
        folder = tmp_path / f"{world}-{dropout}"
        folder.mkdir(exist_ok=True)
        recipe = make_recipe(
            lora={"rank": 4, "dropout": dropout}, scale={"num_workers": world}, engine={"zero_stage": 3},
            optim={"learning_rate": 1e-2},
        )  # fmt: skip
        first, *others = gang(world, "losses", recipe, str(folder), resumes)
        assert all(other == first for other in others)
        return first

    alone = losses(1, 0.5)
    for world in (1, 2, 4):
        found = losses(world, 0.5)
        assert found == pytest.approx(alone, rel=1e-5, abs=0)
        assert losses(world, 0.5, resumes=True) == found[4:], "bit for bit"
    assert losses(1, 0.0)[2:] != pytest.approx(alone[2:], rel=1e-4, abs=0), "dropout changes what is compared"


@pytest.mark.parametrize(
    "lora",
    [
        None,
        pytest.param({"rank": 4}, marks=pytest.mark.soak),
        {"rank": 4, "train_tokens": ["a"], "modules_to_save": ["norm"]},
    ],
)
def test_a_model_that_loads_under_zero_3_is_never_whole_in_a_worker(gang, make_recipe, tmp_path, lora):
    config = LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=16, num_attention_heads=8,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for folder in ("small", "model"):
        write_model(tmp_path / folder)
    (tmp_path / "model/model.safetensors").unlink()
    model.save_pretrained(tmp_path / "model", max_shard_size="50MB")
    right = dict(model.named_parameters())
    size = sum(weight.nbytes for weight in right.values())
    largest = max(weight.nbytes for weight in right.values())
    # Of what rows are trained every worker has all.
    copied = {"model.embed_tokens.weight"} if lora and "train_tokens" in lora else set()

    def loaded(stage: int) -> list[int]:
        # What libraries take when they are first used is no part of the model.
        small, recipe = (
            make_recipe(
                model={"path": str(tmp_path / name)}, scale={"num_workers": 4}, engine={"zero_stage": stage}, lora=lora,
            )
            for name in ("small", "model")
        )  # fmt: skip
        gang(4, "loading", small)
        found = gang(4, "loading", recipe)
        for _, shared, weights in found:
            wanted = set(right) - ({"model.norm.weight"} if lora else set())
            assert shared == (stage == 3)
            assert set(weights) == wanted and all(torch.equal(weights[name], right[name]) for name in wanted)
        return [grown for grown, _, _ in found]

    shared = loaded(3)
    print(f"{size / 2**20:.0f} MiB, largest {largest / 2**20:.0f}; peaks {[each >> 20 for each in shared]} MiB")
    if lora is None:  # what is measured sees a model that is whole
        assert min(loaded(2)) > 0.9 * size
    # A quarter, what is being read, and its copy on the way to the others: a weight, or a layer where it is frozen.
    block = size // 17 if lora else 0
    assert max(shared) < size / 4 + 2 * max(largest, block) + sum(right[name].nbytes for name in copied)


@pytest.mark.parametrize("odd", ["scale", "twice", "beside"])
def test_files_that_hold_more_than_the_model_are_left_to_transformers(gang, make_recipe, tmp_path, odd):
    folder = write_model(tmp_path / "model")
    right = load_file(folder / "model.safetensors")
    extra = {"model.norm.weight_scale_inv": torch.ones(1)} if odd == "scale" else {"model.norm.weight": torch.zeros(32)}
    save_file(extra, folder / "other.safetensors", metadata={"format": "pt"})
    if odd != "beside":  # as models are that have weights in another form beside them, which transformers does not read
        (folder / "model.safetensors").rename(folder / "one.safetensors")
        files = dict.fromkeys(right, "one.safetensors") | dict.fromkeys(extra, "other.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    recipe = make_recipe(model={"path": str(folder)}, scale={"num_workers": 2}, engine={"zero_stage": 3})
    assert bool(measure(recipe).loading) == (odd != "beside")
    for _, shared, weights in gang(2, "loading", recipe):
        assert shared == (odd == "beside")
        for name in right:
            known = [right[name], extra[name]] if odd == "twice" and name in extra else [right[name]]
            assert any(torch.equal(weights[name], each) for each in known)


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_a_hub_model_under_zero_3_is_downloaded_by_one_worker(gang, make_recipe, tmp_path, monkeypatch, lora):
    folder, hubs = write_model(tmp_path / "model"), [tmp_path / "hub", tmp_path / "other"]
    right = load_file(folder / "model.safetensors")
    publish(folder, hubs[0], "1" * 40)
    (folder / "model.safetensors").unlink()
    publish(folder, hubs[1], "1" * 40)
    recipe = make_recipe(
        model={"path": "owner/name", "revision": "1" * 40}, scale={"num_workers": 2}, engine={"zero_stage": 3}, lora=lora
    )
    for hub in hubs:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
        assert measure(recipe).loading == 0, "what is not here yet is as usual"
    for _, shared, weights in gang(2, "loading", recipe, *map(str, hubs)):
        wanted = set(right) - ({"model.norm.weight"} if lora else set())
        assert shared and set(weights) == wanted and all(torch.equal(weights[name], right[name]) for name in wanted)


def test_all_workers_lay_out_a_run_alike(gang, make_recipe):
    recipe = make_recipe(scale={"num_workers": 2}, engine={"zero_stage": "auto"}, model={"activation_checkpointing": "auto"})
    assert gang(2, "agree", recipe, "nothing") == [(2, False)] * 2
    assert gang(2, "agree", recipe, "unknown") == [(3, False)] * 2, "as the one that can tell nothing"
    found = gang(2, "agree", recipe, "full")
    assert found[0] == found[1] and "does not fit: each of 2 workers has 0.00 GB" in found[0]


def test_a_leak_on_one_worker_ends_all_of_them(gang, make_recipe):
    recipe = make_recipe(scale={"num_workers": 2}, engine={"zero_stage": 3})
    verdicts = gang(2, "leak", recipe)
    assert len(set(verdicts)) == 1 and "gradient of one sample reaches another; layer 0" in verdicts[0]


def test_the_comparison_would_catch_a_mean_of_means(make_recipe):
    # What a loop does that averages each micro-batch's mean loss: wrong where targets are uneven.
    packs = make_packs()[0]
    counts = np.array([pack.trained_tokens for pack in packs], float)
    weights = np.repeat(1 / (len(packs) * counts), counts.astype(int))
    right = np.full(int(counts.sum()), 1 / counts.sum())
    assert np.abs(weights - right).sum() > 0.1
