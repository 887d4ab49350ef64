"""Memory of the host for what a checkpoint holds, so that training may go on while it is written."""

from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary, finalize

import numpy as np
import torch
from numpy.typing import NDArray

BLOCK_BYTES = 64 << 20
"""Small tensors share a block of this size; a tensor that is larger has one of its own."""

_unused: WeakKeyDictionary[Any, list[NDArray[np.uint8]]] = WeakKeyDictionary()
"""Blocks of each owner that no tensor lies in now."""


class HostMemory:
    """Room for the tensors of one snapshot, in that of an earlier one of the same owner if nothing uses it any more.

    Memory that a process gets anew costs several times what copying into it costs (benchmarks/checkpoint.py). For a GPU it
    is page-locked, so that copies run at the speed of the bus and do not wait for each other.
    """

    def __init__(self, owner: Any, device: torch.device) -> None:
        self._unused = _unused.setdefault(owner, [])
        self._device = device
        self._block = torch.empty(0, dtype=torch.uint8)

    def copied(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of a tensor; one of a GPU is there when `wait` has returned."""
        return self.room(tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True)

    def room(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """An empty tensor."""
        size = shape.numel() * dtype.itemsize
        taken = -(-size // 64) * 64  # so that any type may lie behind it
        block = self._block if taken <= len(self._block) else self._lent(max(taken, BLOCK_BYTES))
        rest = block[taken:]
        if block is self._block or len(rest) > len(self._block):  # what a large tensor leaves may be less than there is
            self._block = rest
        return block[:size].view(dtype).view(shape)

    def wait(self) -> None:
        """Returns when all copies are there."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _lent(self, size: int) -> torch.Tensor:
        """A block of at least this size, which is unused again when the last tensor that lies in it is gone."""
        fitting = [(len(block), number) for number, block in enumerate(self._unused) if len(block) >= size]
        # The smallest, so that a larger one is left for what needs it.
        block = self._unused.pop(min(fitting)[1]) if fitting else self._new(size)
        lent = block[:]
        finalize(lent, self._unused.append, block).atexit = False
        return torch.from_numpy(lent)

    def _new(self, size: int) -> NDArray[np.uint8]:
        block = np.empty(size, np.uint8)
        if self._device.type == "cuda":
            cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            if int(cudart.cudaHostRegister(block.ctypes.data, size, 0)) == 0:
                finalize(block, cudart.cudaHostUnregister, block.ctypes.data).atexit = False
            else:  # it is as it was, and slower; the next kernel would raise what CUDA has noted
                with suppress(RuntimeError):
                    torch.zeros(1, device=self._device)
        return block
