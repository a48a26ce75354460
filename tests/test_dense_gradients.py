"""Gradients of full attention on CUDA, by `scaled_dot_product_attention`, and their use."""

import functools
import sys
import types
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest

from flexmoba import flex_moba
from flexmoba.backends.dense import (
    dense_with_gradients,
    supports_dense_gradients,
    with_gradients,
)
from flexmoba.backends.dense.on_cuda import has_exact_cudnn
from flexmoba.backends.dense.operator import has_gradients
from flexmoba.backends.options import AttentionOptions
from flexmoba.reference import reference_attention
from tests.conftest import assert_as_exact_as, assert_bitwise_equal
from tests.problems import Problem, problems
from tests.test_dense import CUDA, everything, on_cuda_cases, operators_of

attend_module = sys.modules["flexmoba.backends.attend"]  # its package exports a function `attend`


def assert_output_alone_is_exact(attend, inputs: list[Tensor], mask: Tensor, scale=None) -> None:
    """Compares output and gradients of ``attend(q, k, v)``, which returns no log-sum-exp."""

    def with_zero_lse(function):
        def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            out = function(q, k, v)
            return out, 0 * out[..., 0].to(torch.promote_types(q.dtype, torch.float32))

        return call

    def dense(*inputs: Tensor) -> Tensor:
        return reference_attention(*inputs, mask, scale=scale)[0]

    assert_as_exact_as(with_zero_lse(dense), with_zero_lse(attend), inputs, gradients=True)


@pytest.fixture
def on_cuda(monkeypatch):
    """Tensors pass as tensors on a GPU that has torch's dense kernels."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    properties = types.SimpleNamespace(major=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(with_gradients, "has_exact_cudnn", lambda: True)


@pytest.mark.parametrize(
    ("changes", "supported"),
    [
        ({}, True),
        ({"trained": False}, False),
        ({"has_score_mod": True}, False),
        ({"is_deterministic": True}, False),
        ({"has_exact_cudnn": False}, False),
        ({"scale": -1.0}, False),
        ({"impl": "masked"}, False),
        ({"dtype": torch.float32}, False),
        ({"value_dim": 32}, False),
    ],
)
def test_inputs(changes, supported, on_cuda, monkeypatch):
    case = {
        "trained": True, "has_score_mod": False, "is_deterministic": False, "impl": "fused",
        "has_exact_cudnn": True, "scale": 1.0, "dtype": torch.bfloat16, "value_dim": 64,
    } | changes  # fmt: skip
    q, _, v = Problem(head_dim=64, value_dim=case["value_dim"]).tensors()
    q, v = (x.to("meta", case["dtype"]) for x in (q, v))
    q.requires_grad_(case["trained"])
    monkeypatch.setattr(with_gradients, "has_exact_cudnn", lambda: case["has_exact_cudnn"])
    is_deterministic = case["is_deterministic"]
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: is_deterministic)
    options = AttentionOptions(case["impl"], case["scale"])

    def is_supported() -> bool:
        return supports_dense_gradients(q, q, v, options, has_score_mod=case["has_score_mod"])

    assert is_supported() == supported
    with torch.no_grad():
        assert not is_supported()


@given(problems(), st.sampled_from((0.3, 1.7)), st.booleans())
def test_the_call_with_gradients_is_exact(problem, scale, has_strided_rows):
    """The function that CUDA calls; here on CPU, where other functions compute these calls."""
    problem = replace(problem, q_len=problem.kv_len, value_dim=problem.head_dim)
    inputs = problem.tensors()
    if has_strided_rows:
        inputs = [x.mT.contiguous().mT for x in inputs]
    options = AttentionOptions("fused", scale, problem.is_causal)
    mask = everything(problem)
    attend = functools.partial(dense_with_gradients, options=options)
    assert_output_alone_is_exact(attend, inputs, mask, scale=scale)


def test_the_call_with_gradients_under_autocast():
    sizes = {"kv_heads": 2, "group": 2, "value_dim": 16, "head_dim": 16}
    q, k, v = Problem(**sizes, dtype=torch.float32).tensors()
    options = AttentionOptions("fused", 0.3)
    expected = dense_with_gradients(q, k, v, options)
    with torch.autocast("cpu", torch.bfloat16):
        assert_bitwise_equal(dense_with_gradients(q, k, v, options), expected)


def test_only_calls_without_lse_have_gradients_of_dense_kernels(monkeypatch):
    monkeypatch.setattr(attend_module, "supports_dense_gradients", lambda *_, **__: True)
    monkeypatch.setattr(
        attend_module, "dense_with_gradients", lambda q, k, v, options: torch.full_like(q, 7)
    )
    inputs = Problem(head_dim=16, value_dim=16).tensors()
    assert (flex_moba(*inputs, 4, None) == 7).all()
    out, aux = flex_moba(*inputs, 4, None, return_aux=AuxRequest())
    assert (out == 7).all()
    assert aux.lse is None
    padded = torch.ones(inputs[0].shape[0], inputs[0].shape[2]).bool()
    padded[:, -3:] = False
    out = flex_moba(*inputs, 4, None, key_padding_mask=padded)
    assert (out[:, :, :-3] == 7).all()
    assert (out[:, :, -3:] == 0).all()
    for options in (
        {"return_aux": AuxRequest(lse=True)},
        {"cu_seqlens": torch.tensor([0, 9, inputs[0].shape[2]])},
    ):
        result = flex_moba(*inputs, 4, None, **options)
        out = result[0] if isinstance(result, tuple) else result
        assert (out != 7).any()


def test_compiled_functions_notice_deterministic_algorithms():
    def is_fast(x: Tensor) -> bool:
        is_free = not torch.are_deterministic_algorithms_enabled()
        return has_gradients(x, x, x) and is_free and not has_exact_cudnn()

    compiled = torch.compile(lambda x: x + is_fast(x), backend="eager", fullgraph=True)
    x = torch.zeros(2)
    trained = x.clone().requires_grad_()
    for enabled in (False, True, False):
        torch.use_deterministic_algorithms(enabled)
        try:
            assert compiled(trained).tolist() == 2 * [not enabled]
            assert compiled(x).tolist() == [0, 0]
        finally:
            torch.use_deterministic_algorithms(False)


# ---- CUDA ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@on_cuda_cases
@pytest.mark.parametrize("layout", ["heads first", "tokens first", "strided rows"])
def test_on_cuda(changes, layout):
    problem = replace(CUDA, **changes)
    inputs = problem.tensors("cuda")
    if layout == "tokens first":
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    elif layout == "strided rows":
        inputs = [x.mT.contiguous().mT for x in inputs]

    def attend(*inputs: Tensor) -> Tensor:
        return flex_moba(*inputs, 128, None, is_causal=problem.is_causal)

    trained = [x.clone().requires_grad_() for x in inputs]
    assert operators_of(attend, *trained) == set()
    assert_output_alone_is_exact(attend, inputs, everything(problem, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["heads first", "tokens first"])
def test_on_cuda_compiled(layout):
    compiled = torch.compile(lambda *x: flex_moba(*x, 128, None), fullgraph=True)
    for length in (777, 1024):
        problem = replace(CUDA, q_len=length, kv_len=length)
        inputs = problem.tensors("cuda")
        if layout == "tokens first":
            inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
        assert_output_alone_is_exact(compiled, inputs, everything(problem, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("by", ["cuDNN", "FlashAttention"])
def test_gradients_on_cuda_by_both_kernels(by):
    inputs, mask = CUDA.tensors("cuda"), everything(CUDA, "cuda")
    backend = SDPBackend.CUDNN_ATTENTION if by == "cuDNN" else SDPBackend.FLASH_ATTENTION
    with sdpa_kernel(backend):
        assert_output_alone_is_exact(lambda *x: flex_moba(*x, 128, None), inputs, mask)


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [True, False])
def test_gradients_on_cuda_with_deterministic_algorithms(is_causal):
    problem = replace(CUDA, is_causal=is_causal)
    inputs = problem.tensors("cuda", requires_grad=True)

    def train_alone() -> tuple[Tensor, ...]:
        out = flex_moba(*inputs, 128, None, is_causal=is_causal)
        return out, *torch.autograd.grad(out.float().square().sum(), inputs)

    with_default = train_alone()
    torch.use_deterministic_algorithms(True)
    try:
        first = train_alone()
        for _ in range(3):
            for x, y in zip(train_alone(), first, strict=True):
                assert_bitwise_equal(x, y)
    finally:
        torch.use_deterministic_algorithms(False)
    for x, y in zip(with_default, first, strict=True):
        torch.testing.assert_close(x, y, rtol=0.05, atol=float(0.02 * y.detach().abs().max()))


@pytest.mark.gpu
def test_gradients_on_cuda_are_those_of_torch_without_a_matrix_of_scores():
    problem = replace(CUDA, q_len=8192, kv_len=8192, batch=1)
    inputs = problem.tensors("cuda", requires_grad=True)
    out = flex_moba(*inputs, 128, None)
    assert "ScaledDotProduct" in type(out.grad_fn).__name__
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(out.sum(), inputs)
    scores = 4 * 8192 * 8192 * 2  # bytes in half precision
    assert torch.cuda.max_memory_allocated() - before < scores / 2
