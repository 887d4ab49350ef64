"""One step is one step: real DeepSpeed on gloo, for workers x accumulation x ZeRO stage, against one plain big batch."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from torch.nn import functional as F

from burnish.config import Recipe
from burnish.data.packing import Pack, Sample
from tests.conftest import free_ports, write_model

pytestmark = pytest.mark.distributed

STEPS, GLOBAL_BATCH_SIZE = 3, 4


def make_packs() -> list[list[Pack]]:
    """Three steps of four packs with very uneven targets; the last step has an empty pack, as the end of a run has."""
    rng = np.random.default_rng(0)

    def sample() -> Sample:
        length = int(rng.integers(5, 30))
        trained = np.arange(length) >= rng.integers(1, length)
        return Sample(rng.integers(0, 300, length).astype(np.int32), trained, (1,))

    steps = [[Pack.of([sample() for _ in range(int(rng.integers(1, 4)))]) for _ in range(4)] for _ in range(STEPS)]
    steps[-1][3] = Pack.of([])
    return steps


def plain(recipe: Recipe) -> tuple[list[float], torch.Tensor]:
    """Losses of each step, and the gradient of the first, of one process that never packs, shards or accumulates."""
    from burnish.train.model import build_model

    model = build_model(recipe, cuda=False)
    model.set_attn_implementation("eager")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    losses, first = [], None
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
        first = torch.cat([p.grad.flatten() for p in parameters]) if first is None else first
        torch.nn.utils.clip_grad_norm_(parameters, recipe.optim.max_grad_norm)
        optimizer.step()
        losses.append(total.item() / count)
    return losses, first


@ray.remote(num_cpus=1)
class Worker:
    """One worker of a gang that meets at a port of its own."""

    def run(
        self, rank: int, world: int, port: int, recipes: list[Recipe]
    ) -> list[tuple[list[float], torch.Tensor, list[float]]]:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": "0"}
        os.environ |= {"WORLD_SIZE": str(world), "DS_ACCELERATOR": "cpu"}
        torch.distributed.init_process_group("gloo")
        return [self.train(recipe, rank, world) for recipe in recipes]

    def go_on(self, rank: int, world: int, port: int, recipes: list[Recipe], folder: str, resumes: bool):
        """Writes a checkpoint of each recipe after two steps, or reads it; the masters and moments after the third step."""
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": "0"}
        os.environ |= {"WORLD_SIZE": str(world), "DS_ACCELERATOR": "cpu"}
        torch.distributed.init_process_group("gloo")
        from safetensors import safe_open
        from safetensors.torch import load_file

        from burnish.train import checkpoint, writer
        from burnish.train import engine as ds
        from burnish.train.model import build_model

        ends = []
        for number, recipe in enumerate(recipes):
            weights, state = Path(folder, str(number), checkpoint.WEIGHTS), Path(folder, str(number), checkpoint.OPTIMIZER)
            model = build_model(recipe, cuda=False)
            if resumes:
                ds.load_weights(model, weights)
            engine = ds.build_engine(recipe, model, world)
            if resumes:
                ds.load_optimizer(engine, state)
            else:
                self.steps(engine, make_packs()[:2], rank, world)
                writer.write_files(Path(folder, str(number)), ds.snapshot(engine, {}))
                torch.distributed.barrier()
            self.steps(engine, make_packs()[2:], rank, world)
            end = Path(folder, f"{number}-end-{world}-{resumes}", checkpoint.OPTIMIZER)
            writer.write_files(end.parent, ds.snapshot(engine, {}))
            torch.distributed.barrier()
            parts = [load_file(file) for file in sorted(end.iterdir())]
            assert len(parts) == world
            ends.append({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
            with safe_open(next(end.iterdir()), "pt") as part:
                scale = json.loads(part.metadata()["loss_scale"])
            ends[-1]["loss scale"] = torch.tensor([float(value or 0) for value in scale.values()])
        return ends

    def leak(self, rank: int, world: int, port: int, recipe: Recipe) -> str:
        """The verdict on this worker where only the last one's borders are wrong."""
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": "0"}
        os.environ |= {"WORLD_SIZE": str(world), "DS_ACCELERATOR": "cpu"}
        torch.distributed.init_process_group("gloo")
        from burnish.errors import TrainingError
        from burnish.train import engine as ds
        from burnish.train import objective, self_test
        from burnish.train.model import build_model

        engine, right = ds.build_engine(recipe, build_model(recipe, cuda=False), world), objective.packed_inputs
        if rank == world - 1:
            objective.packed_inputs = lambda seq_lens, device: right(np.array([seq_lens.sum()]), device)
        packs = [(pack.input_ids, pack.labels, pack.seq_lens) for pack in make_packs()[0]]
        try:
            self_test.check(engine.module, packs, engine.device)
        except TrainingError as error:
            return str(error)
        return "passed"

    def steps(self, engine, steps: list[list[Pack]], rank: int, world: int) -> None:
        from burnish.train import engine as ds
        from burnish.train.objective import Objective

        share, objective = GLOBAL_BATCH_SIZE // world, Objective(engine, engine.device)
        for packs in steps:
            for pack in packs[rank * share : (rank + 1) * share]:
                loss = objective.loss_sum(pack.input_ids, pack.labels, pack.seq_lens)
                ds.backward(engine, loss, sum(pack.trained_tokens for pack in packs), world)
                ds.step(engine)

    def train(self, recipe: Recipe, rank: int, world: int) -> tuple[list[float], torch.Tensor, list[float]]:
        from deepspeed.utils import safe_get_full_grad

        from burnish.train import engine as ds
        from burnish.train import self_test
        from burnish.train.model import build_model
        from burnish.train.objective import Objective

        engine = ds.build_engine(recipe, build_model(recipe, cuda=False), world)
        objective = Objective(engine, engine.device)
        assert objective._head is not None
        losses, norms, first = [], [], None
        share = GLOBAL_BATCH_SIZE // world
        own = make_packs()[0][rank * share : (rank + 1) * share]
        # Changes nothing, so that all below holds with it as without.
        self_test.check(engine.module, [(pack.input_ids, pack.labels, pack.seq_lens) for pack in own], engine.device)
        for packs in make_packs():
            count, total = sum(pack.trained_tokens for pack in packs), torch.zeros(1, dtype=torch.float64)
            for number, pack in enumerate(packs[rank * share : (rank + 1) * share]):
                loss = objective.loss_sum(pack.input_ids, pack.labels, pack.seq_lens)
                ds.backward(engine, loss, count, world)
                if number == share - 1 and first is None:
                    trained = [p for p in engine.module.parameters() if p.requires_grad]
                    first = torch.cat([safe_get_full_grad(p).float().flatten().clone() for p in trained])
                norm = ds.step(engine)
                total += loss.detach()
            torch.distributed.all_reduce(total)
            losses.append(total.item() / count)
            norms.append(norm)
        return losses, first, norms


def test_losses_and_gradients_equal_one_big_batch(cluster, make_recipe):
    kinds = [(None, stage) for stage in (0, 1, 2, 3)] + [({"rank": 4}, stage) for stage in (0, 3)]
    expected = {bool(lora): plain(make_recipe(lora=lora)) for lora in (None, {"rank": 4})}
    for world in (1, 2, 4):
        recipes = [
            make_recipe(lora=lora, scale={"num_workers": world}, engine={"zero_stage": stage}) for lora, stage in kinds
        ]
        (port,) = free_ports(1)
        workers = [Worker.options(num_cpus=0.1).remote() for _ in range(world)]
        results = ray.get([worker.run.remote(rank, world, port, recipes) for rank, worker in enumerate(workers)])
        for worker in workers:
            ray.kill(worker)
        for (lora, stage), runs in zip(kinds, zip(*results, strict=True), strict=True):
            right, gradient = expected[bool(lora)]
            for losses, found, norms in runs:
                where = f"{world} workers, accumulation {4 // world}, ZeRO-{stage}, lora {lora}"
                assert np.allclose(losses, right, rtol=1e-5), (where, losses, right)
                assert (found - gradient).norm() / gradient.norm() < 1e-5, where
                assert abs(norms[0] - float(gradient.norm())) / norms[0] < 1e-4, where
    assert len({losses[0] for losses, _ in expected.values()}) == 1, "fresh adapters change nothing"
    assert expected[False][0][1] != expected[True][0][1]


def test_a_run_goes_on_with_any_number_of_workers_under_every_stage(cluster, make_recipe, tmp_path):
    # 50 dimensions at rank 1 do not divide over 4 workers, so that ZeRO-3 fills its last part up.
    model = write_model(tmp_path / "model", intermediate_size=50)

    def gang(world: int, resumes: bool, kinds: list[tuple[int, str, bool]]) -> list[dict[str, torch.Tensor]]:
        recipes = [
            make_recipe(
                model={"path": str(model), "dtype": dtype},
                lora={"rank": 1} if adapters else None,
                scale={"num_workers": world},
                engine={"zero_stage": stage},
            )
            for stage, dtype, adapters in kinds
        ]
        (port,) = free_ports(1)
        workers = [Worker.options(num_cpus=0.1).remote() for _ in range(world)]
        results = ray.get(
            [worker.go_on.remote(rank, world, port, recipes, str(tmp_path), resumes) for rank, worker in enumerate(workers)]
        )
        for worker in workers:
            ray.kill(worker)
        return results[0]

    kinds = [
        (0, "float32", False), (0, "bfloat16", True), (1, "float32", True), (2, "bfloat16", False), (3, "float32", True),
        (3, "float32", False), (3, "bfloat16", False),
    ]  # fmt: skip
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():  # as DeepSpeed asks; its loss scale must go on too
        kinds += [(0, "float16", False), (1, "float16", True), (3, "float16", False)]
    expected = gang(2, False, kinds)
    for world in (1, 2, 4):
        for kind, found, wanted in zip(kinds, gang(world, True, kinds), expected, strict=True):
            assert set(found) == set(wanted) and len(found) > 20
            for name, tensor in wanted.items():
                if world == 2:
                    assert torch.equal(found[name], tensor), (kind, name)
                elif kind[1] != "float16":  # whether a step overflows depends on the number of workers
                    near = 1e-5 if kind[1] == "float32" else 0.1
                    assert (found[name] - tensor).norm() <= near * tensor.norm() + 1e-7, (world, kind, name)


def test_a_leak_on_one_worker_ends_all_of_them(cluster, make_recipe):
    recipe = make_recipe(scale={"num_workers": 2}, engine={"zero_stage": 3})
    (port,) = free_ports(1)
    workers = [Worker.options(num_cpus=0.1).remote() for _ in range(2)]
    verdicts = ray.get([worker.leak.remote(rank, 2, port, recipe) for rank, worker in enumerate(workers)])
    for worker in workers:
        ray.kill(worker)
    assert len(set(verdicts)) == 1 and "gradient of one sample reaches another; layer 0" in verdicts[0]


def test_the_comparison_would_catch_a_mean_of_means(make_recipe):
    # What a loop does that averages each micro-batch's mean loss: wrong where targets are uneven.
    packs = make_packs()[0]
    counts = np.array([pack.trained_tokens for pack in packs], float)
    weights = np.repeat(1 / (len(packs) * counts), counts.astype(int))
    right = np.full(int(counts.sum()), 1 / counts.sum())
    assert np.abs(weights - right).sum() > 0.1
