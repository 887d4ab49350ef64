"""What only a GPU shows: the engine on NCCL, the proof at start, memory; compared with float32 on the CPU.

One process, so that a machine with one GPU can run it: `python -m pytest -m gpu`.
"""

import os
from functools import partial

import numpy as np
import pytest
import torch

from burnish.errors import TrainingError
from burnish.train import kernel_choice, kernels, memory, objective, self_test
from burnish.train.attention import FLASH, SDPA, VARLEN, register
from burnish.train.failure import memory_advice
from burnish.train.kernel_choice import choose
from burnish.train.objective import Objective
from tests.conftest import Training, conversation, free_port, tiny_config, write_model, write_rows
from tests.distributed.test_engine import STEPS, make_packs, plain

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CUDA = torch.device("cuda")
KERNELS = [SDPA, VARLEN, FLASH]


@pytest.fixture(scope="module", autouse=True)
def alone():
    """A gang of one on NCCL."""
    port = free_port()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    torch.cuda.set_device(0)
    torch.distributed.init_process_group("nccl", device_id=torch.device("cuda:0"))
    yield
    torch.distributed.destroy_process_group()


def model(architecture: str, kernel: str, dtype: torch.dtype = torch.bfloat16):
    from transformers import AutoModelForCausalLM

    if kernel == FLASH:
        pytest.importorskip("flash_attn")
    assert register("auto", cuda=True) in KERNELS
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(tiny_config(architecture, 64), attn_implementation=kernel, dtype=dtype)
    return made.train().to(CUDA)


def trained(recipe, steps, engine=None):
    """An engine after these steps, their losses and their gradients."""
    from deepspeed.utils import safe_get_full_grad

    from burnish.train import engine as ds
    from burnish.train.build import build_model

    engine = engine or ds.build_engine(recipe, build_model(recipe, cuda=True), 1)
    loss_of = Objective(engine, engine.device)
    losses, gradients = [], []
    for packs in steps:
        total, count = 0.0, sum(pack.trained_tokens for pack in packs)
        for number, pack in enumerate(packs):
            loss = loss_of.loss_sum(pack.input_ids, pack.labels, pack.seq_lens)
            ds.backward(engine, loss, count, 1)
            if number == len(packs) - 1:
                grads = [safe_get_full_grad(p) for p in engine.module.parameters() if p.requires_grad]
                gradients.append(torch.cat([grad.float().flatten().cpu() for grad in grads]))
            ds.step(engine)
            total += loss.item()
        losses.append(total / count)
    return engine, losses, gradients


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 5e-2)])
def test_a_step_is_the_plain_step_of_the_cpu(make_recipe, tmp_path, zero_stage, dtype, tolerance):
    sections = {"model": {"path": str(write_model(tmp_path / "model"))}, "optim": {"warmup_steps": 0, "weight_decay": 0.0}}
    wanted = plain(make_recipe(**sections))
    sections["model"]["dtype"] = dtype
    recipe = make_recipe(**sections, engine={"zero_stage": zero_stage}, scale={"num_workers": 1, "use_gpu": True})
    _, losses, gradients = trained(recipe, make_packs())
    assert np.allclose(losses, wanted.losses, rtol=tolerance, atol=0)
    for found, gradient in zip(gradients, wanted.gradients, strict=True):
        assert (found - gradient).norm() < tolerance * gradient.norm()


@pytest.mark.parametrize("chosen", ["plain", "compiled"])
@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_the_host_waits_for_nothing_within_a_step(make_recipe, tmp_path, lora, chosen):
    from burnish.train import engine as ds
    from burnish.train.build import build_model
    from burnish.train.step import Step, take

    recipe = make_recipe(
        model={"path": str(write_model(tmp_path / "model")), "dtype": "bfloat16", "kernels": chosen}, lora=lora,
        engine={"zero_stage": 2}, scale={"use_gpu": True},
    )  # fmt: skip
    engine = ds.build_engine(recipe, build_model(recipe, cuda=True), 1)
    loss_of = Objective(engine, CUDA)
    try:
        for number, packs in enumerate([*make_packs(), *make_packs()], 1):
            rows = [(pack.input_ids, pack.labels, pack.seq_lens) for pack in packs]
            told = Step(number, 1e-3, sum(pack.trained_tokens for pack in packs), 0)
            torch.cuda.set_sync_debug_mode(
                "default" if number <= STEPS else "error"
            )  # the first ones take memory and compile
            loss, norm = take(engine, loss_of, rows, told)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite() and norm.isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["compiled", "liger"])
def test_kernels_of_norms_and_gates_give_torchs_own_values(name, dtype):
    if name == "liger":
        pytest.importorskip("liger_kernel")
    work = kernel_choice.Work(frozenset({*kernels.NORMS, *kernels.ACTIVATIONS}), True, CUDA, dtype, 512, 256, 704)
    made = choose(name, work)  # raises where they differ
    for rows in (1, 5, 700):
        for kind in ("llama", "olmo2", "gemma", "silu", "gelu_tanh"):
            drawn = partial(kernels.probe, kind, rows, 96, CUDA, dtype)
            for one, other in zip(
                kernel_choice._results(made, True, kind, *drawn()),
                kernel_choice._results(kernels.plain(), True, kind, *drawn()),
                strict=True,
            ):
                assert (one - other).float().norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * other.float().norm()


def test_the_fastest_kernels_are_chosen_and_told(caplog):
    with caplog.at_level("INFO", "burnish"):
        made = choose(
            "auto", kernel_choice.Work(frozenset({"llama", "silu"}), False, CUDA, torch.bfloat16, 8192, 4096, 14336)
        )
    (told,) = [record.getMessage() for record in caplog.records if "auto takes" in record.getMessage()]
    print(told)
    assert made.name != "plain" and not any("leaves out" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(("zero_stage", "lora"), [(2, None), (3, None), (2, {"rank": 4})])
def test_a_step_whose_optimizer_is_on_the_host_is_the_plain_step_of_the_cpu(make_recipe, tmp_path, zero_stage, lora):
    sections = {"model": {"path": str(write_model(tmp_path / "model"))}, "lora": lora}
    wanted = plain(make_recipe(**sections))
    engine = {"zero_stage": zero_stage, "offload": "optimizer"}
    _, losses, gradients = trained(make_recipe(**sections, engine=engine, scale={"use_gpu": True}), make_packs())
    assert np.allclose(losses, wanted.losses, rtol=1e-5, atol=0)
    for found, gradient in zip(gradients, wanted.gradients, strict=True):
        assert (found - gradient).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("recomputed", [False, True])
def test_frozen_weights_that_are_gathered_by_layers_train_alike(make_recipe, tmp_path, recomputed):
    from burnish.train.adapters import with_adapters
    from burnish.train.lora_linear import fuse
    from burnish.train.model import load_weights, recompute
    from burnish.train.shards import Shards

    folder = write_model(tmp_path / "model")
    recipe = make_recipe(model={"path": str(folder), "attention": "sdpa"}, lora={"rank": 4})
    kernel, found = register("sdpa", cuda=True, half=False), []
    for shares in (False, True):
        torch.manual_seed(0)
        made = with_adapters(load_weights(recipe, attn_implementation=kernel), recipe.lora)
        shards = Shards(made, CUDA) if shares else None
        fuse(made)
        if recomputed:
            recompute(made)
            if shards is not None:
                shards.recompute()
        made.train().to(CUDA)
        loss_of = Objective(made, CUDA)
        for pack in [pack for packs in make_packs() for pack in packs]:
            loss_of.loss_sum(pack.input_ids, pack.labels, pack.seq_lens).backward()
        found.append(torch.cat([weight.grad.flatten() for weight in made.parameters() if weight.requires_grad]))
    assert (found[1] - found[0]).norm() < 1e-5 * found[0].norm() and found[0].norm() > 0


@pytest.mark.parametrize("lora", [None, {"rank": 16}, {"rank": 16, "variant": "dora"}])
@pytest.mark.parametrize("recomputed", [False, True])
def test_the_memory_of_a_step_is_known_within_a_fifth(make_recipe, tmp_path, lora, recomputed):
    from transformers import LlamaConfig, LlamaForCausalLM

    from burnish.train import engine as ds
    from burnish.train.build import build_model
    from burnish.train.footprint import measure
    from burnish.train.layout import Layout, footprint

    shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 8}
    config = LlamaConfig(vocab_size=32000, num_hidden_layers=8, **shape)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    recipe = make_recipe(
        model={"path": str(tmp_path / "model"), "dtype": "bfloat16", "activation_checkpointing": recomputed}, lora=lora,
        data={"max_length": 4096}, engine={"zero_stage": 2}, scale={"use_gpu": True},
    )  # fmt: skip
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    engine = ds.build_engine(recipe, build_model(recipe, cuda=True), 1)
    loss_of, row = Objective(engine, CUDA), np.random.default_rng(0).integers(0, 32000, 4096).astype(np.int32)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        ds.backward(engine, loss_of.loss_sum(row, row, np.array([2048, 2048], np.int32)), 4096, 1)
        ds.step(engine)
    seen = torch.cuda.max_memory_allocated() - before
    said = footprint(measure(recipe), Layout(2, recomputed), 1, False).total
    print(f"lora {lora}, recomputed {recomputed}: {seen >> 20} MiB seen, {said >> 20} said, {said / seen:.2f}")
    assert 0.8 <= said / seen <= 1.2


@pytest.mark.parametrize(
    ("zero_stage", "offload"), [(0, "none"), (2, "none"), (3, "none"), (2, "optimizer"), (3, "optimizer")]
)
@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_a_checkpoint_of_a_gpu_goes_on_where_it_was(make_recipe, tmp_path, zero_stage, offload, lora):
    from burnish.train import checkpoint, state, writer
    from burnish.train import engine as ds
    from burnish.train.build import build_model

    recipe = make_recipe(
        model={"path": str(write_model(tmp_path / "model")), "dtype": "bfloat16", "attention": "sdpa"},
        engine={"zero_stage": zero_stage, "offload": offload}, lora=lora, scale={"num_workers": 1, "use_gpu": True},
    )  # fmt: skip
    steps = make_packs()
    engine, _, _ = trained(recipe, steps[:1])
    held = state.State(engine)
    held.snapshot({})()
    trained(recipe, steps[1:2], engine)
    files = held.snapshot({})()
    tensors = {name: tensor for held, _ in files.values() for name, tensor in held.items()}
    assert all(tensor.is_cpu for tensor in tensors.values()) and any(tensor.is_pinned() for tensor in tensors.values())
    were = {name: tensor.clone() for name, tensor in tensors.items()}
    engine, quiet, _ = trained(recipe, steps[2:], engine)
    assert all(torch.equal(were[name], tensor) for name, tensor in tensors.items()), "it stays while training goes on"
    writer.write_files(tmp_path / "checkpoint", files)
    fresh = build_model(recipe, True, 1, tmp_path / "checkpoint" / checkpoint.WEIGHTS)
    resumed = ds.build_engine(recipe, fresh, 1)
    state.load_optimizer(resumed, tmp_path / "checkpoint" / checkpoint.OPTIMIZER)
    read = {name: tensor for held, _ in state.State(resumed).snapshot({})().values() for name, tensor in held.items()}
    assert set(read) == set(were) and all(torch.equal(read[name], were[name]) for name in were)
    _, losses, _ = trained(recipe, steps[2:], resumed)
    assert np.allclose(losses, quiet, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma"])
def test_the_proof_at_start_passes_with_each_kernel_and_finds_a_leak(monkeypatch, architecture, kernel):
    made, right = model(architecture, kernel), objective.packed_inputs
    lengths = np.array([23, 41, 17], np.int32)
    ids = np.random.default_rng(7).integers(0, 64, int(lengths.sum())).astype(np.int32)
    self_test.check(made, [(ids, ids, lengths)], CUDA)
    monkeypatch.setattr(objective, "packed_inputs", lambda seq_lens, device: right(np.array([seq_lens.sum()]), device))
    with pytest.raises(TrainingError, match="the gradient of one sample reaches another"):
        self_test.check(made, [(ids, ids, lengths)], CUDA)


def test_the_loss_at_a_vocabulary_of_128k_takes_an_eighth_of_the_memory_of_whole_logits():
    tokens, width, vocabulary = 8192, 1024, 131072
    hidden = torch.randn(1, tokens, width, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    head = torch.nn.Linear(width, vocabulary, bias=False, device=CUDA, dtype=torch.bfloat16)
    head.requires_grad_(False)
    wanted = torch.randint(0, vocabulary, (tokens,), device=CUDA)

    def peak(loss_of) -> tuple[int, torch.Tensor, torch.Tensor]:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = loss_of()
        (gradient,) = torch.autograd.grad(loss, hidden)
        return torch.cuda.max_memory_allocated() - before, loss.detach(), gradient

    chunked, loss, gradient = peak(lambda: objective._HeadLoss.apply(hidden, head.weight, None, wanted, True))
    whole, plain_loss, plain_gradient = peak(
        lambda: torch.nn.functional.cross_entropy(head(hidden)[0].float(), wanted, reduction="sum")
    )
    print(f"peak of the loss: {chunked / 2**20:,.0f} MiB in chunks, {whole / 2**20:,.0f} MiB whole")
    assert chunked <= whole / 8
    assert abs(loss - plain_loss) < 1e-3 * plain_loss
    assert (gradient - plain_gradient).float().norm() < 2e-2 * plain_gradient.float().norm()


def test_memory_that_does_not_suffice_is_named_with_what_to_lower(make_recipe):
    with (
        pytest.raises(TrainingError, match=r"out of memory in step 3, 512 tokens in a pack, .* Write "),
        memory_advice(make_recipe(), 3, 512),
    ):
        torch.empty(1 << 46, device=CUDA)


def test_memory_that_cannot_be_locked_is_used_as_it_is(monkeypatch):
    block, cudart = np.empty(1 << 20, np.uint8), torch.cuda.cudart()
    assert int(cudart.cudaHostRegister(block.ctypes.data, len(block), 0)) == 0
    with monkeypatch.context() as patch:  # CUDA refuses to lock what is locked
        patch.setattr(memory.np, "empty", lambda size, dtype: block[:size])
        source = torch.arange(1 << 18, dtype=torch.float32, device=CUDA)
        (copy,) = memory.HostMemory(CUDA).copies([source])
    assert copy.data_ptr() == block.ctypes.data and torch.equal(copy, source.cpu())
    assert int((source * 2)[3]) == 6, "the next kernel raises nothing"
    del copy
    assert int(cudart.cudaHostUnregister(block.ctypes.data)) == 0


def test_a_run_on_a_gpu_is_stopped_and_goes_on(tmp_path):
    folder = write_model(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", [conversation(i, 1 + i % 3) for i in range(120)])
    held_out = write_rows(tmp_path / "eval.jsonl", [conversation(i, 1) for i in range(900, 910)])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
name: gpu
model: {{path: {folder}}}
lora: {{rank: 4}}
data: {{train: [{{path: {rows}}}], eval: [{{path: {held_out}}}], max_length: 256, window_rows: 32}}
optim: {{learning_rate: 1e-2, warmup_steps: 2}}
train: {{global_batch_size: 2, epochs: 8}}
checkpoint: {{every_steps: 10, storage: {tmp_path / "runs"}}}
tracking: {{uri: null}}
"""
    )
    run = Training(recipe, "gpu", "")
    run.wait_for_step(12)
    run.process.terminate()
    assert run.wait() == 75, run.said()
    run = Training(recipe, "gpu", "")
    assert run.wait() == 0, run.said()
    ledger = run.ledger()
    assert [line["step"] for line in ledger] == list(range(1, len(ledger) + 1)) and len(run.attempts()) == 2
    assert ledger[-1]["loss"] < 0.9 * ledger[0]["loss"]
    print(run.said())
