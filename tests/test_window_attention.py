"""`window_attention` against masked attention of the oracle."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexmoba import window_attention
from flexmoba.reference import reference_attention
from tests.conftest import assert_as_exact_as_dense, with_lse
from tests.problems import DTYPES, Problem

pytestmark = pytest.mark.usefixtures("small_pieces", "uncompiled_flex")


def mask_of(q_len: int, kv_len: int, window: int) -> Tensor:
    token = torch.arange(kv_len)
    position = token[kv_len - q_len :, None]
    return ((token <= position) & (token > position - window))[None, None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    st.integers(1, 90), st.integers(0, 50), st.integers(1, 60) | st.just(512),
    st.sampled_from((None, -0.4)), st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=25)
def test_equals_the_oracle(dtype, q_len, more, window, scale, seed):
    problem = Problem(
        batch=2, kv_heads=2, group=2, q_len=q_len, kv_len=q_len + more, value_dim=12, dtype=dtype,
        seed=seed,
    )  # fmt: skip
    attend = with_lse(window_attention, window, scale=scale)
    mask = mask_of(q_len, q_len + more, window)
    assert_as_exact_as_dense(attend, *problem.tensors(), mask, scale=scale, gradients=True)
    with torch.no_grad():
        masked = with_lse(window_attention, window, scale=scale, impl="masked")
        assert_as_exact_as_dense(masked, *problem.tensors(), mask, scale=scale)


@pytest.mark.parametrize("window", [1, 7, 100])
def test_documents_are_alone(window):
    q, k, v = Problem(batch=1, kv_heads=2, group=2, q_len=70, kv_len=70).tensors()
    bounds = torch.tensor([0, 3, 40, 70])
    attend = with_lse(window_attention, window)
    results = [with_lse(window_attention, window, cu_seqlens=bounds)(q, k, v)]
    ids = torch.bucketize(torch.arange(70), bounds[1:], right=True)[None]
    results.append(with_lse(window_attention, window, document_ids=ids)(q, k, v))
    for start, end in itertools.pairwise(bounds.tolist()):
        expected = attend(*(x[:, :, start:end] for x in (q, k, v)))
        for actual in results:
            for x, y in zip(actual, expected, strict=True):
                torch.testing.assert_close(x[:, :, start:end], y, rtol=0, atol=1e-12)


def test_padding_does_not_count():
    q, k, v = Problem(batch=2, kv_heads=1, q_len=60, kv_len=60).tensors()
    real = torch.rand(2, 60, generator=torch.Generator().manual_seed(0)) < 0.6
    padded = [x.where(real[:, None, :, None], torch.nan) for x in (q, k, v)]
    out, lse = with_lse(window_attention, 9, key_padding_mask=real)(*padded)
    for row in range(2):
        alone = [x[row : row + 1, :, real[row]] for x in (q, k, v)]
        expected = with_lse(window_attention, 9)(*alone)
        for actual, x in zip((out, lse), expected, strict=True):
            torch.testing.assert_close(actual[row, :, real[row]], x[0], rtol=0, atol=1e-12)
        assert (out[row, :, ~real[row]] == 0).all()
        assert (lse[row, :, ~real[row]] == -torch.inf).all()


def test_no_queries_and_errors():
    q, k, v = Problem(group=2, q_len=20, kv_len=20).tensors(requires_grad=True)
    out = window_attention(q[:, :, :0], k, v, 5)
    assert out.shape == (1, 2, 0, 8)
    assert not torch.autograd.grad(out.sum(), k)[0].any()
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        window_attention(q, k, v, 0)
    with pytest.raises(TypeError, match=r"window must be an int, got 2\.0"):
        window_attention(q, k, v, 2.0)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(1000, 1000), (1, 900), (300, 1111)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_cuda(dtype, lengths):
    problem = Problem(
        batch=2, kv_heads=1, group=3, q_len=lengths[0], kv_len=lengths[1], head_dim=64,
        value_dim=64, dtype=dtype,
    )  # fmt: skip
    mask = mask_of(*lengths, 200).to("cuda")
    attend = with_lse(window_attention, 200)
    assert_as_exact_as_dense(attend, *problem.tensors("cuda"), mask, gradients=True)
    with torch.no_grad():  # keys that are a part of longer tensors, as in a cache
        q, k, v = problem.tensors("cuda")
        longer = (torch.cat([x, x], 2)[:, :, : lengths[1]] for x in (k, v))
        out = window_attention(q, *longer, 200)
        exact = reference_attention(*(x.double() for x in (q, k, v)), mask)[0]
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-2)
