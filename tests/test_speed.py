"""Tests that flex_moba is faster than torch's attention on an otherwise idle CPU."""

import time

import pytest
import torch
import torch.nn.functional as F

from flexmoba import flex_moba

pytestmark = pytest.mark.slow


def fastest(function, calls: int = 4) -> float:
    function()
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times)


@pytest.mark.parametrize(("backward", "factor"), [(False, 3.0), (True, 2.0)])
def test_faster_than_full_attention(backward, factor):
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, 4, 16384, 64, generator=generator).requires_grad_(backward) for _ in range(3)
    ]

    def run(attention):
        out = attention(*inputs)
        if backward:
            torch.autograd.grad(out, inputs, out.detach())

    full = fastest(lambda: run(lambda *x: F.scaled_dot_product_attention(*x, is_causal=True)))
    sparse = fastest(lambda: run(lambda *x: flex_moba(*x, 512, 3)))
    assert full / sparse >= factor, f"{full:.3f} s against {sparse:.3f} s"
