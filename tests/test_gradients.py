"""Gradients of q, k and v, through the output and through the log-sum-exp."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from flexmoba import flex_moba, moba_select, selected_attention
from tests.conftest import assert_as_exact_as_dense, assert_bitwise_equal, with_lse
from tests.problems import DTYPES, Problem, problems

pytestmark = pytest.mark.usefixtures("small_pieces")

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def gradients(problem: Problem, loss_of) -> tuple[Tensor, ...]:
    """Returns the gradients of ``loss_of(out, lse)`` with respect to q, k and v."""
    inputs = problem.tensors(requires_grad=True)
    attend = with_lse(flex_moba, problem.block_size, problem.topk, is_causal=problem.is_causal)
    return torch.autograd.grad(loss_of(*attend(*inputs)), inputs)


@every_dtype
@given(problems())
def test_are_as_exact_as_dense_attentions(dtype, problem):
    problem = replace(problem, dtype=dtype)
    q, k, v = problem.tensors()
    args, options = (problem.block_size, problem.topk), {"is_causal": problem.is_causal}
    mask = problem.mask_of(moba_select(q, k, *args, **options))
    attend = with_lse(flex_moba, *args, **options)
    assert_as_exact_as_dense(attend, q, k, v, mask, gradients=True)


@given(problems())
def test_of_full_attention(problem):
    q, k, v = problem.tensors()
    everything = torch.arange(problem.n_blocks, dtype=torch.int32)
    mask = problem.mask_of(everything.expand(*q.shape[:3], -1))
    attend = with_lse(flex_moba, problem.block_size, None, is_causal=problem.is_causal)
    assert_as_exact_as_dense(attend, q, k, v, mask, gradients=True)


@every_dtype
@given(problems(), st.sampled_from((None, 0.3, -0.5)))
def test_of_any_selection(dtype, problem, scale):
    problem = replace(problem, dtype=dtype)
    q, k, v = problem.tensors()
    selection = problem.selection()
    attend = with_lse(
        selected_attention,
        selection,
        problem.block_size,
        is_causal=problem.is_causal,
        scale=scale,
    )
    mask = problem.mask_of(selection)
    assert_as_exact_as_dense(attend, q, k, v, mask, scale=scale, gradients=True)


@given(problems())
def test_of_a_query_that_selects_nothing_are_zero(problem):
    q, k, v = problem.tensors(requires_grad=True)
    blind = torch.rand(q.shape[:3], generator=problem.generator()) < 0.5
    selection = problem.selection()
    selection[blind] = -1
    out, lse = with_lse(
        selected_attention, selection, problem.block_size, is_causal=problem.is_causal
    )(q, k, v)
    grads = torch.autograd.grad((out[blind].sum(), lse[blind].sum()), (q, k, v), retain_graph=True)
    assert not any(grad.any() for grad in grads)
    (q_grad,) = torch.autograd.grad((out.sum(), lse.sum()), q)
    assert not q_grad[blind].any()


@given(problems(is_causal=st.just(True)), st.data())
def test_of_the_past_do_not_reach_the_future(problem, data):
    t = data.draw(st.integers(0, problem.q_len), label="first query of the future")
    grads = gradients(problem, lambda out, lse: out[:, :, :t].sum() + lse[:, :, :t].sum())
    for grad in grads:
        assert not grad[:, :, grad.shape[2] - problem.q_len + t :].any()


@given(problems(dtype=st.just(torch.float64)))
def test_strides_of_the_incoming_gradient_do_not_matter(problem):
    ones = problem.tensors()[0].new_ones(problem.value_dim, problem.q_len)
    expanded = gradients(problem, lambda out, lse: out.sum())
    transposed = gradients(problem, lambda out, lse: (out.mT * ones).sum())
    for one, other in zip(expanded, transposed, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qv", "kv"])
def test_of_some_inputs_only(wanted):
    problem = Problem(kv_heads=2, group=2)
    everything = gradients(problem, lambda out, lse: out.sum() + lse.sum())
    inputs = dict(zip("qkv", problem.tensors(), strict=True))
    for name in wanted:
        inputs[name].requires_grad_()
    out, lse = with_lse(flex_moba, 4, 2)(*inputs.values())
    (out.sum() + lse.sum()).backward()
    for (name, x), expected in zip(inputs.items(), everything, strict=True):
        if name in wanted:
            assert_bitwise_equal(x.grad, expected)
        else:
            assert x.grad is None


GRADCHECK = [
    Problem(kv_len=13, q_len=13, group=2),
    Problem(kv_len=13, q_len=5, block_size=3, topk=3, kv_heads=2, value_dim=3),
    Problem(kv_len=11, q_len=11, topk=1, batch=2, head_dim=3),
    Problem(kv_len=11, q_len=11, is_causal=False),
    Problem(kv_len=9, q_len=9, block_size=5, topk=5),
]
TINY = Problem(kv_len=7, q_len=6, block_size=2, group=2, head_dim=2, value_dim=2)


@pytest.mark.parametrize("problem", GRADCHECK, ids=str)
def test_gradcheck(problem):
    assert gradcheck(problem, fast_mode=True)


def test_gradcheck_of_every_element():
    assert gradcheck(TINY, fast_mode=False)


def gradcheck(problem: Problem, *, fast_mode: bool) -> bool:
    attend = with_lse(
        flex_moba,
        problem.block_size,
        problem.topk,
        is_causal=problem.is_causal,
        impl="portable",
    )
    inputs = problem.tensors(requires_grad=True)
    return torch.autograd.gradcheck(attend, inputs, fast_mode=fast_mode)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # a race needs more than one thread
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("dtype", "is_causal"),
    [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)],
    ids=str,
)
def test_two_runs_are_bitwise_equal(dtype, is_causal, monkeypatch):
    monkeypatch.setattr(
        "flexmoba.backends.portable.operator._SCORES_AT_ONCE", 2**20
    )  # several tiles of a block
    problem = Problem(
        batch=2,
        kv_heads=2,
        group=2,
        q_len=500,
        kv_len=600,
        head_dim=33,
        block_size=48,
        topk=4,
        is_causal=is_causal,
        dtype=dtype,
    )
    results = []
    for _ in range(2):
        inputs = problem.tensors(requires_grad=True)
        out, lse = with_lse(flex_moba, 48, 4, is_causal=is_causal)(*inputs)
        (out.square().sum() + lse.sum()).backward()
        results.append((out, lse, *(x.grad for x in inputs)))
    for first, second in zip(*results, strict=True):
        assert_bitwise_equal(first, second)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # a use in torch
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("halves", [False, True], ids=["flex_moba", "selected_attention"])
def test_forward_mode_is_refused(name, halves):
    tensors = dict(zip("qkv", Problem().tensors(), strict=True))

    def attend(x):
        inputs = tensors | {name: x}
        if halves:
            selection = moba_select(inputs["q"], inputs["k"], 4, 2)
            return selected_attention(**inputs, selection=selection, block_size=4)
        return flex_moba(**inputs, block_size=4, topk=2)

    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match=f"{name} has a tangent"),
    ):
        attend(forward_ad.make_dual(tensors[name], tensors[name]))
