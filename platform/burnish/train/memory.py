"""Memory of the host for what a checkpoint holds, so that training may go on while it is written."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from weakref import finalize

import numpy as np
import torch
from numpy.typing import NDArray


class HostMemory:
    """Room for the tensors of a snapshot, in that of an earlier one if nothing uses it any more.

    Memory that a process gets anew costs several times what copying into it costs (benchmarks/checkpoint.py). For a GPU it
    is page-locked, so that copies run at the speed of the bus and do not wait for each other.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._unused: list[NDArray[np.uint8]] = []

    def copies(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Flat copies of flat tensors, all there when this returns. Their memory is used again when the last one is gone."""
        places: dict[int, torch.Tensor] = {}
        # One call for all tensors of a type: a call for each would take longer than to copy small ones.
        for dtype in {tensor.dtype: None for tensor in tensors}:
            numbers = [number for number, tensor in enumerate(tensors) if tensor.dtype == dtype]
            sizes = [tensors[number].numel() for number in numbers]
            # No block is empty, which could not be viewed as another type.
            block = self._lent(max(1, sum(sizes)) * dtype.itemsize).view(dtype)[: sum(sizes)]
            places |= dict(zip(numbers, torch.split_with_sizes(block, sizes), strict=True))
            if self._device.type == "cpu":
                torch.cat([tensors[number] for number in numbers], out=block)
        if self._device.type == "cuda":
            for number, tensor in enumerate(tensors):
                places[number].copy_(tensor, non_blocking=True)
            torch.cuda.current_stream(self._device).synchronize()
        return [places[number] for number in range(len(tensors))]

    def _lent(self, size: int) -> torch.Tensor:
        """A block of this size, which is unused again when the last tensor that lies in it is gone."""
        fitting = [number for number, block in enumerate(self._unused) if len(block) == size]
        block = self._unused.pop(fitting[0]) if fitting else self._new(size)
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
