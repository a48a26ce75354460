"""The operators among torch's tools: fake tensors, FLOP counts, transforms, `opcheck`."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import AuxRequest

from flexmoba import MobaCache, flex_moba, moba_select, selected_attention
from tests.problems import Problem

PROBLEM = Problem(kv_heads=2, group=2, q_len=150, kv_len=150, block_size=16, topk=3)


def by_place(score, b, h, q_idx, kv_idx):
    return score + torch.sin(0.7 * q_idx - 0.3 * kv_idx + h)


def over_selection(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, topk: int, **options
) -> Tensor:
    selection = torch.arange(topk, dtype=torch.int32).expand(*q.shape[:3], -1)
    return selected_attention(q, k, v, selection, block_size, **options)


# Every argument that has values of its own.
CALLS = {
    "flex_moba": lambda *qkv: flex_moba(*qkv, 16, 3),
    "not causal": lambda *qkv: flex_moba(*qkv, 16, 3, is_causal=False),
    "full": lambda *qkv: flex_moba(*qkv, 16, None),
    "score_mod": lambda *qkv: flex_moba(*qkv, 16, 3, score_mod=by_place),
    "selection": lambda *qkv: over_selection(*qkv, 16, 3),
    "cu_seqlens": lambda *qkv: flex_moba(*qkv, 16, 3, cu_seqlens=torch.tensor([0, 40, 150])),
    "full cu_seqlens": lambda *qkv: flex_moba(
        *qkv, 16, None, cu_seqlens=torch.tensor([0, 40, 150])
    ),
    "key_padding_mask": lambda *qkv: flex_moba(
        *qkv, 16, 3, key_padding_mask=torch.arange(150)[None] > 20
    ),
}


# ---- Fake tensors, which have no values ---------------------------------------------------------

NO_VALUES = pytest.mark.parametrize(
    "mode", [FakeTensorMode, partial(torch.device, "meta")], ids=["fake", "meta"]
)


def empty_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype).requires_grad_(x.requires_grad)


@NO_VALUES
@pytest.mark.parametrize("name", CALLS)
def test_training_without_values_gives_the_shapes(name, mode):
    def train(inputs):
        out = CALLS[name](*inputs)
        return out, *torch.autograd.grad(out.sum(), inputs)

    inputs = PROBLEM.tensors(requires_grad=True)
    expected = train(inputs)
    with mode():
        results = train([empty_like(x) for x in inputs])
    for x, real in zip(results, expected, strict=True):
        assert (x.shape, x.dtype, x.stride()) == (real.shape, real.dtype, real.stride())


@NO_VALUES
@pytest.mark.parametrize("max_len", [200, None])
def test_a_cache_without_values(mode, max_len):
    tensors = PROBLEM.tensors()
    with mode(), torch.no_grad():
        q, k, v = (empty_like(x) for x in tensors)
        cache = MobaCache(1, 2, 8, block_size=16, max_len=max_len, dtype=q.dtype)

        def attend(n: int, **options) -> Tensor:
            return flex_moba(*(x[:, :, :n] for x in (q, k, v)), 16, 3, cache=cache, **options)

        assert attend(150, key_padding_mask=torch.ones(1, 150, dtype=torch.bool)).shape == q.shape
        cache.crop(100)
        cache.crop(torch.tensor([50]))
        cache.reorder(torch.tensor([0]))
        assert attend(150).shape == q.shape  # of which nobody knows whether they fit
        assert attend(1, score_mod=by_place).shape == (1, 4, 1, 8)
        with pytest.raises(NotImplementedError, match=r"fake tensors .* at most 16 tokens"):
            attend(17, score_mod=by_place)


@NO_VALUES
def test_documents_that_values_alone_count_are_refused(mode):
    tensors = PROBLEM.tensors()
    with mode():
        inputs = [empty_like(x) for x in tensors]
        ids = torch.zeros(1, 150, dtype=torch.int32)
        with pytest.raises(
            NotImplementedError, match=r"document_ids .* fake tensors .* cu_seqlens"
        ):
            flex_moba(*inputs, 16, 3, document_ids=ids)
        with pytest.raises(
            NotImplementedError, match=r"document_ids .* fake tensors .* cu_seqlens"
        ):
            moba_select(*inputs[:2], 16, 3, document_ids=ids)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", ["selection", "cu_seqlens", "key_padding_mask"])
def test_traced_calls_read_no_value(name, mode):
    inputs = PROBLEM.tensors()
    traced = make_fx(CALLS[name], tracing_mode=mode)(*inputs)
    assert not [x for x in traced.graph.nodes if "local_scalar_dense" in str(x.target)]
    torch.testing.assert_close(traced(*inputs), CALLS[name](*inputs), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("topk", [3, None])
def test_fake_tensors_on_cuda(topk, dtype):
    with FakeTensorMode():
        inputs = [torch.empty(1, 4, 300, 64, dtype=dtype, device="cuda") for _ in "qkv"]
        inputs = [x.requires_grad_() for x in inputs]
        out, aux = flex_moba(*inputs, 64, topk, return_aux=AuxRequest(lse=True))
        grads = torch.autograd.grad(out.sum() + aux.lse.sum(), inputs)
    assert (out.shape, out.dtype) == (inputs[0].shape, dtype)
    assert all(x.shape == y.shape for x, y in zip(grads, inputs, strict=True))
