"""What a step is said to use of the hardware follows the stated formula."""

import numpy as np
import pytest
import torch

from burnish.data.balance import Cost
from burnish.train.throughput import Meter, peak_flops, peak_memory_bytes


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Tesla T4", None),
    ],
)
def test_a_device_is_known_by_its_name(name, peak):
    assert peak_flops(name, "bfloat16") == peak and peak_flops(name, "float32") is None


def test_a_step_counts_tokens_pairs_and_seconds():
    meter = Meter(Cost(per_token=600.0, per_pair=2.0), peak=1e6)
    flops = meter.flops([np.array([10, 20], np.int32), np.array([], np.int32), np.array([30], np.int32)])
    assert flops == 600 * 60 + 2 * (100 + 400 + 900)
    found = meter.metrics(flops, tokens=60, trained_tokens=15, seconds=0.5, workers=2)
    assert found == {
        "train/tokens_per_second": 120.0, "train/trained_tokens_per_second": 30.0, "train/mfu": flops / (0.5 * 2 * 1e6),
    }  # fmt: skip
    assert "train/mfu" not in Meter(meter.cost, None).metrics(flops, 60, 15, 0.5, 2)


def test_memory_of_the_host_is_in_bytes():
    before = peak_memory_bytes(torch.device("cpu"))
    held = torch.ones(64 << 20, dtype=torch.uint8)
    assert 50 << 20 < before <= peak_memory_bytes(torch.device("cpu")) and held.sum() > 0
