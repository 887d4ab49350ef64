"""How fast a step was, and how much of the hardware it used."""

import resource
from dataclasses import dataclass

import numpy as np
import torch

from burnish.data.balance import Cost

PEAK_FLOPS = {
    "B200": 2.25e15, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12,
    "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "A30": 165e12, "A10G": 70e12, "A10": 125e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
"""Dense operations a second in bfloat16 or float16 with sums in float32, by a part of the device's name; the first that
fits. From NVIDIA's data sheets, which print twice as much where they count sparse ones."""


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Floating-point operations a second that a device can do in this type; None where that is not known."""
    if dtype == "float32":
        return None
    words = device_name.replace("-", " ").split()
    for name, peak in PEAK_FLOPS.items():
        wanted = name.split()
        if any(words[at : at + len(wanted)] == wanted for at in range(len(words))):
            return peak
    return None


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that tensors took on a GPU, or this process on the host, since it started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@dataclass(frozen=True)
class Meter:
    """What turns the tokens and seconds of a step into metrics.

    `cost` counts the floating-point operations of a pack that the model itself needs: for each token 6 for a matrix weight,
    4 where only adapters are trained, attention apart, and nothing for what is computed twice (MFU as in PaLM, arXiv
    2204.02311, appendix B). `peak` is that of one worker's device, None where it is not known.
    """

    cost: Cost
    peak: float | None

    def flops(self, packs: list[np.ndarray]) -> float:
        """Operations of packs whose samples have these lengths, each int32 [samples]."""
        lengths, firsts = np.concatenate(packs), np.cumsum([0, *map(len, packs)])
        return float(self.cost.of(lengths, firsts).sum())

    def metrics(self, flops: float, tokens: int, trained_tokens: int, seconds: float, workers: int) -> dict[str, float]:
        """Tokens and trained tokens a second of a step of all workers, and MFU where the device is known."""
        found = {"train/tokens_per_second": tokens / seconds, "train/trained_tokens_per_second": trained_tokens / seconds}
        return found | ({"train/mfu": flops / (seconds * workers * self.peak)} if self.peak else {})
