"""Frozen weights that are gathered when they are needed, on one worker; on several: tests/distributed/test_engine.py."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from burnish.errors import RecipeError
from burnish.train.shards import Shards
from tests.conftest import free_port

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def alone():
    """A gang of one."""
    port = free_port()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Layer(nn.Module):
    """A frozen matrix, a frozen scale, which autograd saves itself and not a view of, and a gain that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Linear(8, 8)
        self.matrix.requires_grad_(False)
        self.scale = nn.Parameter(torch.rand(8), requires_grad=False)
        self.gain = nn.Parameter(torch.rand(8))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.gain.grad_fn is None and hidden.shape[0] == 0:
            raise ValueError("no rows")
        return hidden + torch.tanh(self.matrix(hidden * self.scale) * self.gain)


class Model(nn.Module):
    """A decoder whose own forward recomputes its layers, as code that a Hub model brings may do."""

    def __init__(self, recomputes: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.recomputes = recomputes
        self.embeddings, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.layers = nn.ModuleList([Layer(), Layer(), Layer()])
        self.embeddings.requires_grad_(False)
        self.head.requires_grad_(False)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embeddings(ids)
        for layer in self.layers:
            run = layer.__call__
            hidden = checkpoint(run, hidden, use_reentrant=False) if self.recomputes else run(hidden)
        return self.head(hidden)


def gradients(model: Model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(torch.arange(10)).square().sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("recomputes", [False, True])
def test_gradients_are_those_of_whole_weights_pass_after_pass(recomputes):
    plain = Model(recomputes)
    shared = copy.deepcopy(plain)
    Shards(shared, CPU)
    for _ in range(3):
        right, found = gradients(plain), gradients(shared)
        assert all(torch.equal(found[name], right[name]) and right[name].abs().sum() > 0 for name in right)
        with torch.no_grad():
            assert torch.equal(shared(torch.arange(10)), plain(torch.arange(10)))
            for name, weight in [*plain.named_parameters(), *shared.named_parameters()]:
                if weight.requires_grad:
                    weight -= 0.1 * right[name]


@pytest.mark.parametrize("recomputes", [False, True])
def test_after_an_error_in_a_layer_the_next_pass_is_right(recomputes):
    plain = Model(recomputes)
    shared = copy.deepcopy(plain)
    Shards(shared, CPU)
    right = gradients(plain)
    with pytest.raises(ValueError, match="no rows"):
        shared(torch.arange(0))
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None, "no hook is left behind"
    found = gradients(shared)
    assert all(torch.equal(found[name], right[name]) for name in right)


def test_a_layer_that_shares_weights_with_another_computes_with_them():
    plain = Model(False)
    plain.layers[2].matrix.weight = plain.layers[0].matrix.weight
    shared = copy.deepcopy(plain)
    Shards(shared, CPU)
    right, found = gradients(plain), gradients(shared)
    assert all(torch.equal(found[name], right[name]) for name in right)
    plain.layers[2].scale = plain.layers[1].scale
    with pytest.raises(RecipeError, match=r"takes weights of several others.*write engine.zero_stage: 2"):
        Shards(plain, CPU)


def test_two_passes_at_once_are_two_passes():
    plain = Model(False)
    shared = copy.deepcopy(plain)
    Shards(shared, CPU)
    for model in (plain, shared):
        (model(torch.arange(10)).square().sum() + model(torch.arange(5)).sum()).backward()
    for right, found in zip(plain.layers, shared.layers, strict=True):
        assert torch.allclose(found.gain.grad, right.gain.grad, rtol=1e-6)
    assert all(not weight.numel() for weight in shared.head.parameters())
