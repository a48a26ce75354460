"""`flex_moba` and `selected_attention`: the output and its log-sum-exp."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest

from flexmoba import flex_moba, moba_reference, moba_select, selected_attention
from flexmoba.reference import reference_mask, reference_selection
from tests.conftest import assert_as_exact_as_dense, assert_bitwise_equal, with_lse
from tests.problems import DTYPES, Problem, problems

pytestmark = pytest.mark.usefixtures("small_pieces", "uncompiled_flex")

impls = st.sampled_from(("portable", "masked"))
causal = st.just(True)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def moba_of(problem: Problem, topk: int | None, impl: str = "auto"):
    return with_lse(flex_moba, problem.block_size, topk, is_causal=problem.is_causal, impl=impl)


def select(problem: Problem, q: Tensor, k: Tensor) -> Tensor:
    return moba_select(q, k, problem.block_size, problem.topk, is_causal=problem.is_causal)


def full_mask(problem: Problem) -> Tensor:
    everything = torch.ones(
        problem.batch, problem.heads, problem.q_len, problem.n_blocks, dtype=torch.bool
    )
    return reference_mask(
        everything, problem.block_size, problem.kv_len, is_causal=problem.is_causal
    )


@every_dtype
@given(problems(), impls)
def test_is_as_exact_as_dense_attention_given_the_same_selection(dtype, problem, impl):
    problem = replace(problem, dtype=dtype)
    q, k, v = problem.tensors()
    mask = problem.mask_of(select(problem, q, k))
    assert_as_exact_as_dense(moba_of(problem, problem.topk, impl), q, k, v, mask)


@given(problems(dtype=st.just(torch.float64)), impls)
def test_equals_the_oracle(problem, impl):
    q, k, v = problem.tensors()
    args, options = (problem.block_size, problem.topk), {"is_causal": problem.is_causal}
    selected = reference_selection(q, k, *args, **options)
    mask = reference_mask(selected, problem.block_size, problem.kv_len, **options)
    assert_as_exact_as_dense(moba_of(problem, problem.topk, impl), q, k, v, mask)
    torch.testing.assert_close(
        flex_moba(q, k, v, *args, **options, impl=impl), moba_reference(q, k, v, *args, **options)
    )


@given(problems(topk=st.just(1), is_causal=causal), impls)
def test_topk_1_is_causal_attention_within_each_block(problem, impl):
    q, k, v = problem.tensors()
    query = torch.arange(problem.q_len)[:, None] + problem.offset
    key = torch.arange(problem.kv_len)
    mask = (key <= query) & (key // problem.block_size == query // problem.block_size)
    mask = mask.expand(problem.batch, problem.heads, -1, -1)
    assert_as_exact_as_dense(moba_of(problem, 1, impl), q, k, v, mask)


@given(problems(), st.sampled_from((0, 1, 1000, None)), impls)
def test_all_blocks_are_full_attention(problem, beyond, impl):
    q, k, v = problem.tensors()
    topk = None if beyond is None else problem.n_blocks + beyond
    assert_as_exact_as_dense(moba_of(problem, topk, impl), q, k, v, full_mask(problem))


@example(Problem(q_len=9, kv_len=9, head_dim=16, block_size=2, topk=4), "portable")
@given(problems(), impls)
def test_is_select_followed_by_selected_attention(problem, impl):
    q, k, v = problem.tensors()
    selection = select(problem, q, k)
    options = {"is_causal": problem.is_causal, "impl": impl}
    whole = with_lse(flex_moba, problem.block_size, problem.topk, **options)
    halves = with_lse(selected_attention, selection, problem.block_size, **options)
    if problem.topk < problem.n_blocks:
        for actual, expected in zip(whole(q, k, v), halves(q, k, v), strict=True):
            assert_bitwise_equal(actual, expected)
    else:  # full attention, which `flex_moba` may compute without a selection
        for attend in (whole, halves):
            assert_as_exact_as_dense(attend, q, k, v, full_mask(problem))


@every_dtype
@given(problems(), impls)
def test_any_selection_is_attended_to(dtype, problem, impl):
    problem = replace(problem, dtype=dtype)
    q, k, v = problem.tensors()
    selection = problem.selection()
    attend = with_lse(
        selected_attention,
        selection,
        problem.block_size,
        is_causal=problem.is_causal,
        impl=impl,
    )
    assert_as_exact_as_dense(attend, q, k, v, problem.mask_of(selection))


@given(problems(), impls, st.booleans())
def test_a_selection_that_the_heads_of_a_group_share(problem, impl, packed):
    q, k, v = problem.tensors()
    shared = problem.selection()[:, :: problem.group]
    options = {"is_causal": problem.is_causal, "impl": impl}
    if packed and problem.q_len == problem.kv_len:
        options["key_padding_mask"] = torch.arange(problem.kv_len).expand(problem.batch, -1) > 2
        shared = shared.clamp(max=max(problem.kv_len - 4, 0) // problem.block_size)
        shared[..., 1:] = -1
    results = [
        with_lse(selected_attention, selection, problem.block_size, **options)(q, k, v)
        for selection in (shared, shared.repeat_interleave(problem.group, 1))
    ]
    for actual, expected in zip(*results, strict=True):
        assert_bitwise_equal(actual, expected)


@given(problems(is_causal=causal))
def test_selected_blocks_of_the_future_add_nothing(problem):
    q, k, v = problem.tensors()
    selection = problem.selection()
    own = (torch.arange(problem.q_len) + problem.offset) // problem.block_size
    without = torch.where(selection > own[:, None], -1, selection)
    out, past_out = (
        selected_attention(q, k, v, blocks, problem.block_size) for blocks in (selection, without)
    )
    assert_bitwise_equal(out, past_out)


@given(problems())
def test_a_query_that_selects_nothing_gets_zeros(problem):
    q, k, v = problem.tensors()
    selection = problem.selection()
    blind = torch.rand(selection.shape[:3], generator=problem.generator()) < 0.5
    selection[blind] = -1
    attend = with_lse(
        selected_attention, selection, problem.block_size, is_causal=problem.is_causal
    )
    out, lse = attend(q, k, v)
    assert (out[blind] == 0).all()
    assert (lse[blind] == float("-inf")).all()


# The row of a query in a tile depends on the future queries of the other heads of its group. In
# some libraries, the last bit of a matrix product depends on the row if sizes are odd.
@example(Problem(group=3, q_len=6, kv_len=6, head_dim=33, block_size=1), 5, "portable")
@given(problems(is_causal=causal), st.integers(0, 200), impls)
def test_the_future_never_changes_the_past(problem, t, impl):
    q, k, v = problem.tensors()
    others = (10 * x for x in replace(problem, seed=problem.seed + 1).tensors())
    changed = []
    for x, other in zip((q, k, v), others, strict=True):
        position = torch.arange(x.shape[2]) + problem.kv_len - x.shape[2]
        changed.append(torch.where((position >= t)[:, None], other, x))
    attend = moba_of(problem, problem.topk, impl)
    past = max(t - problem.offset, 0)
    for actual, expected in zip(attend(*changed), attend(q, k, v), strict=True):
        assert_bitwise_equal(actual[:, :, :past], expected[:, :, :past])


@given(problems())
def test_batch_elements_are_independent_and_alike(problem):
    q, k, v = replace(problem, batch=3).tensors()
    order = [2, 0, 1]
    attend = moba_of(problem, problem.topk)
    permuted = attend(q[order], k[order], v[order])
    for actual, expected in zip(permuted, attend(q, k, v), strict=True):
        assert_bitwise_equal(actual, expected[order])


@given(problems())
def test_kv_heads_are_independent_and_alike(problem):
    q, k, v = replace(problem, kv_heads=3).tensors()
    order = torch.tensor([2, 0, 1])
    q_order = (order[:, None] * problem.group + torch.arange(problem.group)).flatten()
    attend = moba_of(problem, problem.topk)
    permuted = attend(q[:, q_order], k[:, order], v[:, order])
    for actual, expected in zip(permuted, attend(q, k, v), strict=True):
        assert_bitwise_equal(actual, expected[:, q_order])


@given(problems(is_causal=causal), st.data(), impls)
def test_chunks_against_a_growing_cache_equal_the_whole(problem, data, impl):
    q, k, v = problem.tied_tensors()  # so that chunks select the same blocks, in every dtype
    cuts = data.draw(st.sets(st.integers(1, problem.q_len), max_size=3), label="cuts")
    edges = [0, *sorted(cuts | {problem.q_len})]

    def in_chunks(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        chunks = []
        for start, stop in pairwise(edges):
            kv_len = problem.offset + stop
            chunk = q[:, :, start:stop], k[:, :, :kv_len], v[:, :, :kv_len]
            chunks.append(moba_of(problem, problem.topk, impl)(*chunk))
        outs, lses = zip(*chunks, strict=True)
        return torch.cat(outs, dim=2), torch.cat(lses, dim=2)

    mask = problem.mask_of(select(problem, q, k))
    assert_as_exact_as_dense(in_chunks, q, k, v, mask)


@given(problems(), st.sampled_from((0, 0.05, 1, 3.5, -1.0)), impls)
def test_scale(problem, scale, impl):
    q, k, v = problem.tensors()
    attend = with_lse(
        flex_moba,
        problem.block_size,
        problem.topk,
        is_causal=problem.is_causal,
        scale=scale,
        impl=impl,
    )
    mask = problem.mask_of(select(problem, q, k))  # the gate is unscaled
    assert_as_exact_as_dense(attend, q, k, v, mask, scale=scale)


@given(problems())
def test_strides_do_not_matter(problem):
    q, k, v = problem.tensors()
    attend = moba_of(problem, problem.topk)
    # (B, L, H, D) storage, as after a linear layer.
    strided = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    for actual, expected in zip(attend(*strided), attend(q, k, v), strict=True):
        assert_bitwise_equal(actual, expected)


@pytest.mark.parametrize("impl", ["portable", "masked"])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("block_size", [24, 25, 2**40])
def test_one_block_of_everything(block_size, is_causal, impl):
    # 2**40: time and memory must not grow with a block that is longer than the sequence.
    problem = Problem(block_size=block_size, group=2, is_causal=is_causal)
    q, k, v = problem.tensors()
    options = {"is_causal": is_causal, "impl": impl}
    selection = moba_select(q, k, block_size, 1, is_causal=is_causal)
    mask = torch.ones(24, 24, dtype=torch.bool)
    mask = (mask.tril() if is_causal else mask).expand(1, 2, 24, 24)
    for attend in (
        with_lse(flex_moba, block_size, 1, **options),
        with_lse(selected_attention, selection, block_size, **options),
    ):
        assert_as_exact_as_dense(attend, q, k, v, mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("topk", [3, None])
def test_autocast_changes_nothing(dtype, topk):
    problem = Problem(q_len=100, kv_len=100, head_dim=16, block_size=8, group=2, dtype=dtype)
    results = []
    for enabled in (False, True):
        inputs = problem.tensors(requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out, lse = with_lse(flex_moba, 8, topk)(*inputs)
            grads = torch.autograd.grad((out.sum(), lse.sum()), inputs)
        results.append((out, lse, *grads))
    for first, second in zip(*results, strict=True):
        assert_bitwise_equal(first, second)


def test_aux_is_returned_on_request():
    q, k, v = Problem().tensors()
    out = flex_moba(q, k, v, 4, 2)
    assert isinstance(out, Tensor)
    same, aux = flex_moba(q, k, v, 4, 2, return_aux=AuxRequest(lse=True))
    assert isinstance(aux, AuxOutput)
    assert aux.lse.shape == out.shape[:3]
    assert_bitwise_equal(same, out)
    _, nothing = flex_moba(q, k, v, 4, 2, return_aux=AuxRequest())
    assert nothing.lse is None
