"""Memory of snapshots: given out once at a time, and used again when nothing lies in it any more."""

import gc
from itertools import pairwise

import torch

from burnish.train.memory import HostMemory

NUMELS = [3, 0, 1 << 20, 35, 7]


def sources(value: float) -> list[torch.Tensor]:
    """Tensors of two types among each other, as float32 masters and bfloat16 weights lie in a checkpoint."""
    dtypes = [torch.float32, torch.float32, torch.bfloat16, torch.float32, torch.bfloat16]
    return [torch.full((numel,), value, dtype=dtype) for numel, dtype in zip(NUMELS, dtypes, strict=True)]


def blocks_of(tensors: list[torch.Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


def test_tensors_keep_their_values_while_other_snapshots_are_made():
    memory = HostMemory(torch.device("cpu"))
    first, second = memory.copies(sources(1.0)), memory.copies(sources(2.0))
    assert not blocks_of(first) & blocks_of(second)
    for made, value in ((first, 1.0), (second, 2.0)):
        assert all(torch.equal(each, source) for each, source in zip(made, sources(value), strict=True))
        assert [each.dtype for each in made] == [source.dtype for source in sources(value)]
        places = sorted((each.data_ptr(), each.data_ptr() + each.nbytes) for each in made if each.numel())
        assert all(end <= start for (_, end), (start, _) in pairwise(places)), "none lies in another"


def test_a_worker_with_no_part_of_anything_has_nothing_to_copy():
    memory = HostMemory(torch.device("cpu"))
    assert [len(copy) for copy in memory.copies([torch.empty(0), torch.empty(0)])] == [0, 0]
    assert memory.copies([]) == []


def test_memory_is_used_again_when_the_last_tensor_in_it_is_gone():
    memory = HostMemory(torch.device("cpu"))
    made = memory.copies(sources(1.0))
    blocks, kept = blocks_of(made), made[0]
    of_kept = blocks_of([kept])
    del made
    again = memory.copies(sources(3.0))
    assert blocks_of(again) & blocks == blocks - of_kept and bool((kept == 1.0).all())
    del kept, again
    assert blocks_of(memory.copies(sources(4.0))) >= of_kept


def test_many_snapshots_need_no_more_memory_than_two(monkeypatch):
    taken, new = [], HostMemory._new
    monkeypatch.setattr(HostMemory, "_new", lambda self, size: taken.append(size) or new(self, size))
    memory = HostMemory(torch.device("cpu"))
    held = [memory.copies(sources(0.0))]
    for value in range(1, 6):  # one is being written while the next one is made
        held.append(memory.copies(sources(float(value))))
        assert bool((held[0][2] == value - 1).all())
        held.pop(0)
        gc.collect()
    assert len(taken) == 2 * len(blocks_of(held[0]))
