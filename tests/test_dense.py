"""Full attention by torch's dense kernels, and the calls for which other backends compute it."""

import types
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexmoba import flex_moba
from flexmoba.backends.dense import on_cuda, supports_dense
from flexmoba.backends.dense.operator import needs_equal_gradients
from flexmoba.backends.options import AttentionOptions
from tests.conftest import assert_as_exact_as_dense, assert_bitwise_equal, with_lse
from tests.problems import Problem, problems
from tests.test_operators import Recorder


def everything(problem: Problem, device: str = "cpu") -> Tensor:
    """Returns the mask of full attention."""
    blocks = torch.arange(problem.n_blocks, dtype=torch.int32, device=device)
    return problem.mask_of(blocks.expand(problem.batch, problem.heads, problem.q_len, -1))


def operators_of(attend, *inputs: Tensor) -> set[str]:
    with Recorder() as recorder:
        attend(*inputs)
    return set(recorder.calls)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@given(problems(), st.sampled_from((None, 0.7, -0.4, 0.0)))
def test_is_exact_with_gradients_of_both_results(problem, scale):
    problem = replace(problem, q_len=problem.kv_len)
    attend = with_lse(flex_moba, 16, None, is_causal=problem.is_causal, scale=scale)
    inputs = problem.tensors()
    is_positive = scale is None or scale > 0
    assert ("attend_dense" in operators_of(attend, *inputs)) == is_positive
    mask = everything(problem)
    assert_as_exact_as_dense(attend, *inputs, mask, scale=scale, gradients=True)


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 3, 1, 2), (3, 1, 0, 2), (2, 3, 0, 1)])
def test_any_strides(order):
    problem = Problem(batch=2, kv_heads=2, group=2)
    attend = with_lse(flex_moba, 4, None)
    inputs = problem.tensors(requires_grad=True)
    back = torch.tensor(order).argsort().tolist()
    strided = [x.detach().permute(order).contiguous().permute(back) for x in inputs]
    results = train(attend, [x.requires_grad_() for x in strided])
    for x, y in zip(results, train(attend, inputs), strict=True):
        assert_bitwise_equal(x, y)


def test_a_gradient_of_one_result_alone():
    problem = Problem(kv_heads=2, group=2, value_dim=5)
    inputs = problem.tensors(requires_grad=True)
    out, lse = with_lse(flex_moba, 4, None)(*inputs)
    weights = torch.randn_like(lse)
    loss_of_out, loss_of_lse = out.square().sum(), (lse * weights).sum()
    alone = [torch.autograd.grad(x, inputs, retain_graph=True, allow_unused=True)
             for x in (loss_of_out, loss_of_lse)]  # fmt: skip
    both = torch.autograd.grad(loss_of_out + loss_of_lse, inputs)
    for one, other, total in zip(*alone, both, strict=True):
        torch.testing.assert_close(one + other, total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("large", [float("inf"), float("nan"), 1e38])
def test_large_elements_reach_only_rows_that_see_them(large, dtype):
    problem = Problem(kv_heads=2, group=2, q_len=300, kv_len=300, dtype=dtype)
    upstream = problem.tensors()[0].roll(1, 2)

    def results(at: int | None) -> tuple[Tensor, ...]:
        inputs = problem.tensors()
        for x in inputs[1:]:
            if at is not None:
                x[:, 0, at, 0] = large
        inputs = [x.requires_grad_() for x in inputs]
        out, lse = with_lse(flex_moba, 64, None)(*inputs)
        (q_grad,) = torch.autograd.grad(
            (out, lse), inputs[:1], (upstream, upstream[..., 0].to(lse))
        )
        return out, lse, q_grad

    for x, expected in zip(results(200), results(None), strict=True):
        assert_bitwise_equal(x[:, :, :200], expected[:, :, :200])
        assert_bitwise_equal(x[:, 2:], expected[:, 2:])  # heads of the other KV head
    assert (results(200)[0] != results(None)[0])[:, :2, 200:].any(-1).all()


@pytest.mark.parametrize("is_causal", [True, False])
def test_gradients_of_rows_that_see_a_large_element(is_causal):
    """Compares all gradients with autograd, also of keys before the large element."""
    problem = Problem(kv_heads=2, group=2, q_len=50, kv_len=50, dtype=torch.float64)
    inputs = problem.tensors()
    inputs[2][:, 0, 20, 0] = 1e200  # in float64, so that all results are finite
    inputs = [x.requires_grad_() for x in inputs]

    def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if is_causal:
            scores = scores.masked_fill(torch.ones(50, 50).triu(1).bool(), float("-inf"))
        return scores.softmax(-1) @ v, scores.logsumexp(-1)

    upstream = torch.randn_like(inputs[0]), torch.randn(inputs[0].shape[:3], dtype=torch.float64)
    attend = with_lse(flex_moba, 16, None, is_causal=is_causal)
    grads = torch.autograd.grad(attend(*inputs), inputs, upstream)
    expected = torch.autograd.grad(dense(*inputs), inputs, upstream)
    for x, y in zip(grads, expected, strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {"score_mod": lambda score, *_: score}),
        ({"q_len": 20}, {}),
        ({}, {"cu_seqlens": torch.tensor([0, 10, 24])}),
    ],
    ids=["score_mod", "fewer queries", "documents"],
)
def test_other_calls_have_another_backend(changes, options):
    attend = with_lse(flex_moba, 4, None, **options)
    assert "attend_dense" not in operators_of(attend, *Problem(**changes).tensors())


@pytest.mark.parametrize(
    ("options", "dims", "dtype", "major", "supported"),
    [
        ({}, (64, 64), "half", 8, True),
        ({"impl": "routed"}, (256, 256), "bfloat16", 9, True),
        ({}, (64, 64), "half", 7, False),
        ({"impl": "routed", "kernel_options": {"num_warps": 4}}, (64, 64), "half", 9, False),
        ({"scale": 0.0}, (64, 64), "half", 9, False),
        ({"scale": -1.0}, (64, 64), "half", 9, False),
        ({}, (64, 64), "float32", 9, False),
        ({}, (192, 128), "half", 9, False),
        ({}, (20, 20), "half", 9, False),
        ({}, (264, 264), "half", 9, False),
        ({"impl": "masked"}, (64, 64), "half", 9, False),
        ({"impl": "portable"}, (64, 64), "half", 9, False),
    ],
)
def test_inputs_on_cuda(options, dims, dtype, major, supported, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    properties = types.SimpleNamespace(major=major)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    q, _, v = Problem(head_dim=dims[0], value_dim=dims[1]).tensors()
    q, v = (x.to("meta", getattr(torch, dtype)) for x in (q, v))
    call = AttentionOptions(**({"impl": "fused", "scale": 1.0} | options))
    assert supports_dense(q, q, v, call, has_score_mod=False) == supported
    with_gradients = v.clone().requires_grad_()
    assert supports_dense(q, q, with_gradients, call, has_score_mod=False) == supported
    options = {"has_score_mod": False, "is_deterministic": True}
    assert not supports_dense(q, q, with_gradients, call, **options)
    assert supports_dense(q, q, v, call, **options) == supported
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not supports_dense(q, q, with_gradients, call, has_score_mod=False)
    with torch.no_grad():
        assert supports_dense(q, q, with_gradients, call, has_score_mod=False) == supported


@pytest.mark.parametrize("uses_lse", [False, True])
@pytest.mark.parametrize("by_cudnn", [True, False], ids=["cuDNN", "FlashAttention"])
@pytest.mark.parametrize("group", [1, 2])
def test_the_backward_call_on_cuda(uses_lse, by_cudnn, group, monkeypatch):
    """The arguments of the operators, which a plain computation of the gradients replaces."""
    calls = []

    def backward(grad, q, k, v, out, lse, *rest, scale):
        rest = [x for x in rest if not isinstance(x, Tensor)]
        calls.append((lse.shape, rest, scale))
        lse = lse.reshape(q.shape[:3])
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        with torch.enable_grad():
            keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            mask = torch.ones(q.shape[2], q.shape[2]).triu(1).bool()
            scores = (q @ keys.mT * scale).masked_fill(mask, float("-inf"))
            torch.testing.assert_close(scores.logsumexp(-1), lse)
            result = scores.softmax(-1) @ values
        if out.any():
            torch.testing.assert_close(out, result.detach())
            return torch.autograd.grad(result, (q, k, v), grad)
        # With an output of zero, the kernels do not subtract the mean of the gradients.
        weights = scores.softmax(-1).detach() * (grad @ values.mT)
        return (*torch.autograd.grad(scores, (q, k), weights), torch.zeros_like(v))

    name = f"_scaled_dot_product_{'cudnn' if by_cudnn else 'flash'}_attention_backward"
    monkeypatch.setattr(on_cuda, "_aten", types.SimpleNamespace(**{name: backward}))
    monkeypatch.setattr(on_cuda, "_can_use_cudnn", lambda *_: by_cudnn)
    problem = Problem(
        batch=2, kv_heads=2, group=group, q_len=24, kv_len=24, value_dim=16, head_dim=16
    )
    inputs = problem.tensors(requires_grad=True)
    attend = with_lse(flex_moba, 4, None, scale=0.3)
    results = attend(*inputs)
    upstream = torch.randn_like(results[0]), torch.randn_like(results[1]) * uses_lse
    expected = torch.autograd.grad(results, inputs, upstream)
    out, lse = (x.detach() for x in results)
    grad_lse = upstream[1] if uses_lse else None
    grads = on_cuda.attend_backward_on_cuda(upstream[0], grad_lse, out, lse, inputs, 0.3, True)
    for x, y in zip(grads, expected, strict=True):
        torch.testing.assert_close(x, y)
    shape = (*lse.shape, 1) if by_cudnn else lse.shape
    rest = [None] * (3 if by_cudnn else 2) + [24, 24, 0.0, True]
    assert calls == [(shape, rest, 0.3)] * (2 if uses_lse else 1)


@pytest.mark.parametrize(
    "function", [on_cuda._by_cudnn, on_cuda._by_flash], ids=["cuDNN", "FlashAttention"]
)
def test_operators_of_the_backward_call_accept_the_arguments(function):
    problem = Problem(kv_heads=2, group=2, head_dim=16, value_dim=16)
    q, k, v = (x.to("meta", torch.bfloat16) for x in problem.tensors())
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    grads = function(q, q, (q, k, v), lse, 0.3, True)
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]


def test_compiled_functions_notice_deterministic_algorithms():
    compiled = torch.compile(
        lambda x: x + needs_equal_gradients(x, x, x, False), backend="eager", fullgraph=True
    )
    x = torch.zeros(2)
    trained = x.clone().requires_grad_()
    for enabled in (False, True, False):
        torch.use_deterministic_algorithms(enabled)
        try:
            assert compiled(trained).tolist() == [enabled, enabled]
            assert compiled(x).tolist() == [0, 0]
            with torch.no_grad():
                assert compiled(trained).tolist() == [0, 0]
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("is_causal", [True, False])
def test_compiled(is_causal):
    problem = Problem(kv_heads=2, group=2)
    attend = with_lse(flex_moba, 4, None, is_causal=is_causal)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    inputs = problem.tensors(requires_grad=True)
    for x, y in zip(train(compiled, inputs), train(attend, inputs), strict=True):
        assert_bitwise_equal(x, y)


def train(attend, inputs) -> tuple[Tensor, ...]:
    out, lse = attend(*inputs)
    grads = torch.autograd.grad((out.float().square().sum() + lse.sum()), inputs)
    return out, lse, *grads


# ---- CUDA ---------------------------------------------------------------------------------------

CUDA = Problem(
    batch=2, kv_heads=2, group=2, q_len=777, kv_len=777, head_dim=128, value_dim=128,
    block_size=128, dtype=torch.bfloat16,
)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"is_causal": False, "kv_len": 1000},
        {"head_dim": 64, "value_dim": 64, "group": 1, "dtype": torch.float16},
        {"head_dim": 96, "value_dim": 96, "kv_heads": 1, "group": 8},
        {"head_dim": 256, "value_dim": 256, "batch": 1},
        {"q_len": 1, "kv_len": 1},
    ],
    ids=["causal", "not causal", "64", "96", "256", "one token"],
)
@pytest.mark.parametrize("layout", ["heads first", "tokens first"])
def test_on_cuda(changes, layout):
    problem = replace(CUDA, **changes)
    inputs = problem.tensors("cuda")
    if layout == "tokens first":
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    attend = with_lse(flex_moba, 128, None, is_causal=problem.is_causal)
    assert operators_of(attend, *inputs) == {"attend_dense"}
    mask = everything(problem, "cuda")
    assert_as_exact_as_dense(attend, *inputs, mask)
    assert_as_exact_as_dense(attend, *inputs, mask, gradients=True)


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [True, False])
def test_on_cuda_by_flash_attention(is_causal):
    """Also takes gradients of cuDNN's results, as if determinism were enabled after the forward."""
    problem = replace(CUDA, is_causal=is_causal)
    inputs, mask = problem.tensors("cuda"), everything(problem, "cuda")
    attend = with_lse(flex_moba, 128, None, is_causal=is_causal)

    def enable_cudnn_in(forward: bool, backward: bool):
        def attend_and_switch(*inputs):
            torch.backends.cuda.enable_cudnn_sdp(forward)
            results = attend(*inputs)
            torch.backends.cuda.enable_cudnn_sdp(backward)
            return results

        return attend_and_switch

    try:
        for switches in ((False, False), (True, False), (False, True)):
            assert_as_exact_as_dense(enable_cudnn_in(*switches), *inputs, mask, gradients=True)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [True, False])
def test_on_cuda_with_deterministic_algorithms(is_causal):
    problem = replace(CUDA, is_causal=is_causal)
    inputs, mask = problem.tensors("cuda"), everything(problem, "cuda")

    def attend(*inputs):  # the plain computation beside it multiplies by cuBLAS, which may refuse
        torch.use_deterministic_algorithms(True)
        try:
            return with_lse(flex_moba, 128, None, is_causal=is_causal)(*inputs)
        finally:
            torch.use_deterministic_algorithms(False)

    assert_as_exact_as_dense(attend, *inputs, mask, gradients=True)
    trained = problem.tensors("cuda", requires_grad=True)
    assert operators_of(attend, *inputs) == {"attend_dense"}
    assert "attend_dense" not in operators_of(attend, *trained)


@pytest.mark.gpu
def test_on_cuda_two_runs_are_bitwise_equal(deterministic):
    problem = replace(CUDA, q_len=4096, kv_len=4096)
    attend = with_lse(flex_moba, 128, None)
    inputs, trained = problem.tensors("cuda"), problem.tensors("cuda", requires_grad=True)
    first, first_trained = attend(*inputs), train(attend, trained)
    for _ in range(3):
        for x, y in zip(attend(*inputs), first, strict=True):
            assert_bitwise_equal(x, y)
        for x, y in zip(train(attend, trained), first_trained, strict=True):
            assert_bitwise_equal(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["heads first", "tokens first"])
def test_on_cuda_compiled(layout):
    attend = with_lse(flex_moba, 128, None)
    compiled = torch.compile(attend, fullgraph=True)
    for length in (777, 1024):
        inputs = replace(CUDA, q_len=length, kv_len=length).tensors("cuda")
        if layout == "tokens first":
            inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
        for x, y in zip(compiled(*inputs), attend(*inputs), strict=True):
            assert_bitwise_equal(x, y)
        mask = everything(replace(CUDA, q_len=length, kv_len=length), "cuda")
        assert_as_exact_as_dense(compiled, *inputs, mask, gradients=True)
