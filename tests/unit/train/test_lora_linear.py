"""A layer and its adapter as one function, against PEFT's own modules."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from burnish.sections import LoraSpec
from burnish.train.adapters import with_adapters
from burnish.train.lora_linear import fuse


class Two(nn.Module):
    """Two linear layers, one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 40, bias=True), nn.Linear(40, 16, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.second(torch.nn.functional.silu(self.first(inputs)))


def models(dtype: torch.dtype = torch.float32, **options) -> tuple[nn.Module, nn.Module]:
    """PEFT's model with adapters that do something, and a fused copy."""
    torch.manual_seed(0)
    told = {"r": 4, "lora_alpha": 6, "target_modules": ["first", "second"], **options}
    plain = get_peft_model(Two().to(dtype), LoraConfig(**told), autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    fused = copy.deepcopy(plain)
    fuse(fused)
    return plain, fused


def is_fused(model: nn.Module) -> list[bool]:
    return ["forward" in vars(module) for name, module in model.named_modules() if name.endswith(("first", "second"))]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
@pytest.mark.parametrize("shape", [(3, 24), (2, 5, 24), (1, 1, 24)])
def test_output_and_gradients_are_those_of_peft(dtype, tolerance, options, shape):
    plain, fused = models(dtype, **options)
    assert is_fused(fused) == [True, True] and is_fused(plain) == [False, False]
    found = []
    for model in (plain, fused):
        inputs = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        output = model(inputs)
        output.float().square().sum().backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
        assert len(gradients) == 4 and all(weight.grad is None for weight in model.parameters() if not weight.requires_grad)
        found.append({"output": output.detach(), "inputs": inputs.grad, **gradients})
    for name, right in found[0].items():
        assert right.abs().max() > 0 and found[1][name].dtype == dtype and found[1][name].shape == right.shape
        assert (found[1][name] - right).norm() <= tolerance * right.norm(), name


def test_no_rows_give_none():
    _, fused = models()
    assert fused(torch.zeros(0, 24)).shape == (0, 16) and fused(torch.zeros(2, 0, 24)).shape == (2, 0, 16)


def test_inputs_without_a_gradient_get_none():
    plain, fused = models()
    inputs = torch.randn(3, 24)
    for model in (plain, fused):
        model(inputs).sum().backward()
    for (name, right), found in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert (right.grad is None) == (found.grad is None), name
        assert right.grad is None or (right.grad - found.grad).norm() <= 1e-6 * right.grad.norm(), name


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}])
def test_what_is_no_plain_adapter_stays_as_it_is(options):
    assert is_fused(models(**options)[1]) == [False, False]


def test_adapters_in_another_type_than_the_weights_stay_as_they_are():
    model = get_peft_model(Two().to(torch.bfloat16), LoraConfig(r=2, target_modules=["first", "second"]))
    fuse(model)  # PEFT keeps these adapters in float32
    assert is_fused(model) == [False, False]


def test_what_a_run_trains_is_fused(model_folder):
    from transformers import AutoModelForCausalLM

    model = with_adapters(AutoModelForCausalLM.from_pretrained(model_folder), LoraSpec(rank=2))
    fuse(model)
    adapted = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert adapted and all("forward" in vars(module) for module in adapted)
