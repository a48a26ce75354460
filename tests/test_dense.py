"""Full attention by torch's dense kernels, and the calls for which other backends compute it."""

import types
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexmoba import flex_moba
from flexmoba.backends.dense import supports_dense
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
    assert not supports_dense(q, q, with_gradients, call, has_score_mod=False)
    with torch.no_grad():
        assert supports_dense(q, q, with_gradients, call, has_score_mod=False) == supported


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


on_cuda_cases = pytest.mark.parametrize(
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


@pytest.mark.gpu
@on_cuda_cases
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
    assert_as_exact_as_dense(attend, *inputs, mask, gradients=True)  # by FlexAttention


@pytest.mark.gpu
def test_on_cuda_two_runs_are_bitwise_equal():
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
