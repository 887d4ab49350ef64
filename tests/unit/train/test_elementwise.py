"""Norms and gates as one function, against transformers' own modules."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from burnish.errors import RecipeError
from burnish.train import kernel_choice, kernels
from burnish.train.architecture import layer_widths
from burnish.train.elementwise import fuse, replaceable
from burnish.train.kernel_choice import Work, check, choose, fastest
from burnish.train.kernels import ACTIVATIONS, NORMS, Kernels, compiled, plain

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ARCHITECTURES = {
    "Llama": (5, 2), "Mistral": (5, 2), "Qwen2": (5, 2), "Qwen3": (9, 2), "Gemma": (5, 2), "Gemma2": (9, 2),
    "Gemma3": (13, 2), "Olmo2": (9, 2), "Phi3": (5, 0), "Qwen3Moe": (9, 0), "Starcoder2": (0, 0),
}  # fmt: skip
"""Norms and gated layers of two layers that are one function each."""


def work(dtype: torch.dtype = torch.float32) -> Work:
    return Work(frozenset({*NORMS, *ACTIVATIONS}), True, CPU, dtype, 16, 32, 48)


def made(architecture: str, dtype: torch.dtype, **options) -> nn.Module:
    name = "Gemma3Text" if architecture == "Gemma3" else architecture
    config = getattr(transformers, f"{name}Config")(**SHAPE, **options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).to(dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.normal_(0.8, 0.3)
    return model


def fused(model: nn.Module) -> tuple[int, int]:
    ours = [module for module in model.modules() if "forward" in vars(module)]
    return sum(bool(module._parameters) for module in ours), sum(not module._parameters for module in ours)


def run(model: nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.arange(3, 45).view(2, 21)
    logits = model(input_ids=ids, use_cache=False).logits
    logits.float().square().mean().backward()
    return {
        "logits": logits.detach(),
        **{name: each.grad for name, each in model.named_parameters() if each.grad is not None},
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_values_are_bit_for_bit_those_of_transformers_and_gradients_near_them(architecture, dtype, tolerance):
    model = made(architecture, dtype)
    ours = copy.deepcopy(model)
    fuse(replaceable(ours), plain())
    assert fused(ours) == ARCHITECTURES[architecture] and fused(model) == (0, 0)
    right, found = run(model), run(ours)
    assert torch.equal(found["logits"], right["logits"]) and set(found) == set(right)
    for name, gradient in right.items():
        assert found[name].dtype == gradient.dtype
        assert (found[name] - gradient).float().norm() <= tolerance * gradient.float().norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "olmo2", "gemma", "silu", "gelu", "gelu_tanh"])
def test_gradients_are_those_of_autograd_in_float64(kind, dtype):
    check(plain(), work(dtype))
    first, second, outer = (each.double() for each in kernels.probe(kind, 6, 16, CPU, dtype))

    def chain(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        if kind in ("silu", "gelu", "gelu_tanh"):
            act = nn.SiLU() if kind == "silu" else nn.GELU("tanh" if kind == "gelu_tanh" else "none")
            return act(first) * second
        factor = second + 1 if kind == "gemma" else second
        return factor * first / (first.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    inputs = first.requires_grad_(), second.requires_grad_()
    right = chain(*inputs)
    for one, other in zip(
        kernel_choice._results(plain(), True, kind, *inputs, outer),
        (right, *torch.autograd.grad(right, inputs, outer)),
        strict=True,
    ):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def test_a_kernel_that_gives_other_values_is_found(monkeypatch):
    right = kernels._norm_gradients
    monkeypatch.setattr(kernels, "_norm_gradients", lambda *told: (right(*told)[0] * 1.1, right(*told)[1]))
    with pytest.raises(ArithmeticError, match="plain gemma gives other values"):
        check(plain(), work(torch.bfloat16))


class ScaledRMSNorm(nn.Module):
    """A norm of nobody's kind."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-6

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(inputs, (inputs.shape[-1],), self.weight, self.eps) * 1.01


class ClampedRMSNorm(ScaledRMSNorm):
    """One whose code is of no use on a copy."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Gated(nn.Module):
    """A gated layer, with what may differ."""

    def __init__(self, act_fn: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act_fn, self.scale = act_fn, scale

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(inputs)) * self.up_proj(inputs) * self.scale)


class Limited(Gated):
    """One whose gates have a limit that small numbers do not meet."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(inputs).clamp(max=50.0)) * self.up_proj(inputs))


class Widened(Gated):
    """One that computes the gate in float32."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(inputs).float(), self.up_proj(inputs).float()
        return self.down_proj((self.act_fn(gate) * up).to(inputs.dtype))


class PaperRMSNorm(ScaledRMSNorm):
    """One whose epsilon stands elsewhere, which large numbers in 16 bits do not show."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        wide = inputs.float()
        scale = wide.square().mean(-1, keepdim=True).sqrt() + self.eps
        return self.weight * (wide / scale).to(inputs.dtype)


class BareRMSNorm(nn.RMSNorm):
    """One without a weight."""


@pytest.mark.parametrize(
    ("module", "replaced"),
    [
        (ScaledRMSNorm(), False), (ClampedRMSNorm(), False), (nn.RMSNorm(8), False), (nn.LayerNorm(8), False),
        (Gated(nn.SiLU()), True), (Gated(nn.GELU()), True), (Gated(nn.GELU("tanh")), True), (Gated(nn.SiLU(), 1.5), False),
        (Gated(nn.ReLU()), False), (Gated(nn.Tanh()), False), (Limited(nn.SiLU()), False), (Widened(nn.SiLU()), False),
        (PaperRMSNorm().bfloat16(), False), (PaperRMSNorm(), False), (BareRMSNorm(8, elementwise_affine=False), False),
    ],
)  # fmt: skip
def test_only_what_gives_the_same_bits_is_replaced(module, replaced):
    weight = getattr(module, "weight", None)
    inputs = torch.randn(3, 8) if weight is None else torch.randn(3, len(weight)).to(weight.dtype)
    tree = nn.ModuleList([module])
    right = None if isinstance(module, ClampedRMSNorm) else module(inputs)
    fuse(replaceable(tree), plain())
    assert ("forward" in vars(module)) == replaced
    assert right is None or torch.equal(module(inputs), right)


@pytest.mark.parametrize(("rate", "gates"), [(0.0, 2), (0.3, 0)])
def test_a_layer_that_drops_some_of_its_output_in_training_stays_as_it_is(rate, gates):
    model = made("SeedOss", torch.float32, residual_dropout=rate).eval()
    fuse(replaceable(model), plain())
    assert fused(model) == (5, gates)


def test_a_norm_with_a_weight_for_each_head_and_calls_by_name_compute_as_before():
    class HeadRMSNorm(ScaledRMSNorm):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            wide = hidden.float()
            return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(hidden.dtype)

    one, many = HeadRMSNorm(), HeadRMSNorm()
    many.weight = nn.Parameter(torch.randn(4, 32))
    gated, inputs = Gated(nn.SiLU()), torch.randn(3, 4, 32)
    right = one(inputs), many(inputs), gated(inputs[..., :8])
    fuse(replaceable(nn.ModuleList([one, many, gated])), plain())
    assert all("forward" in vars(module) for module in (one, many, gated))
    assert torch.equal(one(hidden=inputs), right[0]) and torch.equal(one(inputs), right[0])
    assert torch.equal(many(inputs), right[1]) and torch.equal(gated(inputs=inputs[..., :8]), right[2])


def test_what_a_norm_gives_may_be_changed_in_place_as_before():
    model, found = made("Llama", torch.float32), []
    for ours in (False, True):
        if ours:
            fuse(replaceable(model), plain())
        inputs = torch.linspace(-1, 1, 64).view(1, 2, 32).requires_grad_()
        output = model.model.norm(inputs)
        output *= torch.arange(32)
        (gradient,) = torch.autograd.grad(output.square().sum(), inputs)
        found.append(gradient)
    assert (found[0] - found[1]).norm() <= 1e-6 * found[0].norm()


def test_kernels_that_write_over_what_they_were_given_are_right():
    class Overwriting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gates, values, activation):
            ctx.save_for_backward(gates, values)
            ctx.activation = activation
            return kernels.gated(gates, values, activation)

        @staticmethod
        def backward(ctx, outer):
            gates, values = ctx.saved_tensors
            found = kernels._gate_gradients(outer, gates, values, ctx.activation)
            written.append(gates)
            return gates.copy_(found[0]), values.copy_(found[1]), None

    written: list[torch.Tensor] = []
    check(replace(plain(), gate=Overwriting.apply), work())
    assert len(written) == len(ACTIVATIONS) and all(bool(each.isfinite().all()) for each in written)


def test_layers_of_several_widths_have_kernels(make_recipe):
    config = transformers.LlamaConfig(**SHAPE, per_layer_config={1: {"intermediate_size": 96}})
    assert layer_widths(config) == (32, 96) and layer_widths(transformers.GPT2Config(n_embd=32)) == (32, 128)
    model = made("Llama", torch.float32)
    assert kernel_choice.of(make_recipe(), config, False, replaceable(model)).name == "plain"


def test_each_layer_of_a_model_is_looked_at():
    tree = nn.ModuleList([Gated(nn.SiLU()), Gated(nn.ReLU()), Gated(nn.SiLU(), 1.5), Gated(nn.GELU("tanh"))])
    inputs = torch.randn(3, 8)
    right = [module(inputs) for module in tree]
    fuse(replaceable(tree), plain())
    assert ["forward" in vars(module) for module in tree] == [True, False, False, True]
    assert all(torch.equal(module(inputs), output) for module, output in zip(tree, right, strict=True))


def test_random_numbers_stay_as_they_are():
    model = made("Llama", torch.float32)
    torch.manual_seed(5)
    right = torch.rand(1)
    torch.manual_seed(5)
    fuse(replaceable(model), plain())
    assert torch.equal(torch.rand(1), right)


def kept_bytes(model: nn.Module) -> int:
    """Bytes that the forward pass keeps for the backward pass, weights apart."""
    found: dict[int, int] = {}
    weights = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    held = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held.append(model(input_ids=torch.arange(1, 61).view(1, 60), use_cache=False).logits)
    return sum(found.values())


def test_a_step_keeps_less_than_transformers_own():
    model = made("Llama", torch.bfloat16)
    model.model.layers.requires_grad_(False)
    ours = copy.deepcopy(model)
    fuse(replaceable(ours), plain())
    norm, activation = 60 * 32 * 2, 60 * 48 * 2  # a row in bfloat16 instead of float32; a row of the inner width
    assert kept_bytes(model) - kept_bytes(ours) >= 5 * norm + 2 * activation


def test_each_function_is_compiled_whole_and_once_for_rows_of_any_number():
    """What a run calls: packs, single tokens, frozen weights, an evaluation without gradients."""
    torch._dynamo.reset()
    made = compiled("aot_eager")
    for kind in ("llama", "gemma", "silu", "gelu_tanh"):
        for rows, width in ((5, 32), (9, 32), (17, 48), (33, 48), (1, 32), (1, 48)):
            found, right = (
                kernel_choice._results(each, True, kind, *kernels.probe(kind, rows, width, CPU, torch.bfloat16))
                for each in (made, plain())
            )
            assert all(torch.equal(one, other) for one, other in zip(found, right, strict=True))
            first, second, outer = kernels.probe(kind, rows, width, CPU, torch.bfloat16)
            with torch.no_grad():
                alone = made.norm(first, second, 1e-6, kind) if kind in kernels.NORMS else made.gate(first, second, kind)
            assert torch.equal(alone, right[0])
            if kind in kernels.NORMS:
                output = made.norm(first.requires_grad_().expand(2, rows, width), second, 1e-6, kind)
                (gradient,) = torch.autograd.grad(output, first, outer.expand(2, rows, width))
                assert torch.allclose(gradient, 2 * right[1], rtol=2e-2)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs <= 4 * 2 * 2 + 2 * 2 and not torch._dynamo.utils.counters["graph_break"]
    check(made, work())


def test_a_cpu_takes_torchs_own_and_what_cannot_run_is_refused():
    assert choose("auto", work()).name == "plain"
    assert choose("plain", work()).name == "plain"
    with pytest.raises(RecipeError, match=r"model.kernels: liger cannot run here: .*; write auto"):
        choose("liger", work())


def test_the_fastest_that_is_right_is_taken(caplog):
    def slow() -> Kernels:
        def norm(*told: Any) -> torch.Tensor:
            for _ in range(300):
                plain().norm(*told)
            return plain().norm(*told)

        return Kernels("liger", norm, plain().gate)

    def wrong() -> Kernels:
        return Kernels("liger", lambda inputs, weight, *told: inputs * weight, plain().gate)

    def broken() -> Kernels:
        raise OSError("no compiler")

    makers = {"slow": slow, "wrong": wrong, "plain": plain, "broken": broken}
    with caplog.at_level("INFO", "burnish"):
        assert fastest(makers, work()).name == "plain"
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "leaves out wrong: liger gemma gives other values than torch" in said
    assert "leaves out broken: no compiler" in said and "auto takes plain (slow " in said
