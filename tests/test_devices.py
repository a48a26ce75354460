"""Devices other than CPU and CUDA, such as mps and xpu: operators that all devices have.

The test needs no such device. It computes tensors of a pretended device on CPU, and raises an error
for operators that only CPUs have or Apple's GPUs lack, and for operators that wait for the device.
"""

import types

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from flexmoba import MobaCache, flex_moba
from flexmoba.cache.decode import MAX_STEP_QUERIES
from tests.problems import Problem

DEVICE = torch.device("lazy")
COMPOSITE = torch._C.DispatchKey.CompositeExplicitAutograd


class Elsewhere(Tensor):
    """A tensor that reports `DEVICE` as its device."""

    def __new__(cls, here: Tensor) -> "Elsewhere":
        assert here.dtype != torch.float64, "Apple's GPUs have no float64"
        return Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), dtype=here.dtype, device=DEVICE
        )

    def __init__(self, here: Tensor) -> None:
        self.here = here

    @classmethod
    def __torch_dispatch__(cls, func, _, args=(), kwargs=None):
        with Device():
            return func(*args, **(kwargs or {}))


class Device(TorchDispatchMode):
    """Runs operators of tensors on `DEVICE` on CPU."""

    def __torch_dispatch__(self, func, _, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        elsewhere = kwargs.get("device") == DEVICE or any(isinstance(x, Elsewhere) for x in tensors)
        if not elsewhere:
            return func(*args, **kwargs)
        with self:  # composite operators call operators on the same device
            if func.namespace == "flexmoba":
                return func._op_dk(COMPOSITE, *args, **kwargs)
            result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        assert "for_cpu" not in func.name(), f"only CPUs have {func}"
        assert "index_add" not in func.name(), "adds in any order on other devices than CPU"
        assert func is not torch.ops.aten._local_scalar_dense.default, "reads a value"
        alone = [x for x in tensors if not isinstance(x, Elsewhere) and x.ndim > 0]
        assert not alone or func is torch.ops.aten.copy_.default, f"{func} of tensors on CPU"
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        here = tree_map_only(Elsewhere, lambda x: x.here, (args, kwargs))
        result = func(*here[0], **here[1])
        # An operator that updates a tensor returns the same tensor.
        known = {id(x.here): x for x in tensors if isinstance(x, Elsewhere)}
        return tree_map_only(
            Tensor, lambda x: known[id(x)] if id(x) in known else Elsewhere(x), result
        )


PROBLEM = Problem(
    batch=1, kv_heads=2, group=2, q_len=150, kv_len=150, head_dim=16, value_dim=24, block_size=16,
    topk=3, dtype=torch.float32,
)  # fmt: skip


def by_position(score, b, h, q_idx, kv_idx):
    return score + torch.sin(0.7 * q_idx - 0.3 * kv_idx + h)


CALLS = {
    "causal": {},
    "not causal": {"is_causal": False},
    "full": {"topk": None},
    "tile": {"gate": "tile", "block_size": 128, "topk": 2},
    "group": {"gate": "group", "sink_blocks": 1},
    "cu_seqlens": {"cu_seqlens": torch.tensor([0, 40, 150], dtype=torch.int32)},
    "key_padding_mask": {"key_padding_mask": torch.arange(150)[None] > 20},
    "score_mod": {"score_mod": by_position},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_no_operator_of_cpus_and_no_waiting(name, dtype, monkeypatch):
    # torch.utils.checkpoint reads the module of every device.
    monkeypatch.setattr(torch, DEVICE.type, types.SimpleNamespace(), raising=False)
    options = {"block_size": 16, "topk": 3} | CALLS[name]
    inputs = [x.to(dtype).requires_grad_() for x in PROBLEM.tensors()]
    expected = flex_moba(*inputs, **options)
    upstream = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, inputs, upstream)
    with Device():
        moved = [Elsewhere(x.detach()).requires_grad_() for x in inputs]
        options |= {k: Elsewhere(x) for k, x in options.items() if isinstance(x, Tensor)}
        out = flex_moba(*moved, **options)
        moved_grads = torch.autograd.grad(out, moved, Elsewhere(upstream))
    assert out.device == DEVICE
    for actual, wanted in zip((out, *moved_grads), (expected, *grads), strict=True):
        torch.testing.assert_close(actual.here, wanted.detach())


def test_a_cache_there():
    q, k, v = PROBLEM.tensors()
    outs = []
    for move in (lambda x: x, Elsewhere):
        with Device():
            cache = MobaCache(
                1, 2, 16, block_size=16, value_dim=24, max_len=150, device=move(q).device
            )
            steps = []
            for start in range(0, 150, MAX_STEP_QUERIES):
                step = (move(x[:, :, start : start + MAX_STEP_QUERIES]) for x in (q, k, v))
                steps.append(flex_moba(*step, 16, 3, cache=cache))
            outs.append(torch.cat([getattr(x, "here", x) for x in steps], 2))
    torch.testing.assert_close(*outs)
