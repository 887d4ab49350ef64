"""Memory of snapshots: given out once at a time, and used again when nothing lies in it any more."""

import gc
from itertools import pairwise

import torch

from burnish.train.memory import BLOCK_BYTES, HostMemory

CPU = torch.device("cpu")
LARGE = BLOCK_BYTES + 4096


class Owner:
    """Something that lives as long as an engine."""


def snapshot(owner: Owner, value: float) -> list[torch.Tensor]:
    """Small tensors around two large ones, as biases, embeddings and heads lie in a model."""
    memory = HostMemory(owner, CPU)
    shapes = [(3,), (LARGE // 4,), (5, 7), (), (LARGE // 2,), (0,), (11, 2)]
    made = [memory.copied(torch.full(shape, value)) for shape in shapes]
    memory.wait()
    return made


def blocks_of(tensors: list[torch.Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def test_tensors_keep_their_values_while_other_snapshots_are_made():
    owner = Owner()
    first, second = snapshot(owner, 1.0), snapshot(owner, 2.0)
    assert not blocks_of(first) & blocks_of(second)
    for made, value in ((first, 1.0), (second, 2.0)):
        assert [tuple(each.shape) for each in made] == [(3,), (LARGE // 4,), (5, 7), (), (LARGE // 2,), (0,), (11, 2)]
        assert all(bool((each == value).all()) and each.is_contiguous() for each in made)
        places = sorted((each.data_ptr(), each.data_ptr() + each.nbytes) for each in made if each.numel())
        assert all(end <= start for (_, end), (start, _) in pairwise(places)), "none lies in another"


def test_memory_is_used_again_by_its_owner_alone_and_when_the_last_tensor_in_it_is_gone():
    owner, other = Owner(), Owner()
    made = snapshot(owner, 1.0)
    blocks, kept = blocks_of(made), made[0]
    of_kept = blocks_of([kept])
    del made
    assert not blocks_of(snapshot(other, 2.0)) & blocks
    again = snapshot(owner, 3.0)
    assert blocks_of(again) & blocks == blocks - of_kept and bool((kept == 1.0).all())


def test_many_snapshots_need_no_more_memory_than_two(monkeypatch):
    taken, new = [], HostMemory._new
    monkeypatch.setattr(HostMemory, "_new", lambda self, size: taken.append(size) or new(self, size))
    owner = Owner()
    held = [snapshot(owner, 0.0)]
    for value in range(1, 6):  # one is being written while the next one is made
        held.append(snapshot(owner, float(value)))
        assert bool((held[0][1] == value - 1).all())
        held.pop(0)
        gc.collect()
    assert len(taken) <= 2 * len(blocks_of(held[0]))
