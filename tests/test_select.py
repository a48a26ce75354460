"""`moba_select`: the selected blocks and their order."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexmoba import moba_select
from flexmoba.gate import scores as gate
from flexmoba.reference import reference_selection
from tests.conftest import assert_bitwise_equal, assert_near_ties, block_scores
from tests.problems import DTYPES, Problem, as_bools, problems

pytestmark = pytest.mark.usefixtures("small_pieces")


def select(problem: Problem, q: Tensor, k: Tensor) -> Tensor:
    return moba_select(q, k, problem.block_size, problem.topk, is_causal=problem.is_causal)


def oracle(problem: Problem, q: Tensor, k: Tensor) -> Tensor:
    return reference_selection(q, k, problem.block_size, problem.topk, is_causal=problem.is_causal)


@given(problems())
def test_own_block_then_candidates_then_padding(problem):
    q, k, _ = problem.tensors()
    selection = select(problem, q, k)
    assert selection.dtype == torch.int32
    assert selection.shape == (problem.batch, problem.heads, problem.q_len, problem.topk)
    own = (torch.arange(problem.q_len) + problem.offset) // problem.block_size
    candidates = torch.full_like(own, problem.n_blocks)
    if problem.is_causal:
        assert (selection[..., 0] == own).all()
        assert (selection <= own[:, None]).all()
        candidates = own + 1
    filled = torch.arange(problem.topk) < candidates[:, None]
    assert ((selection >= 0) == filled).all()
    assert (selection[~filled.expand_as(selection)] == -1).all()
    counts = as_bools(selection, problem.n_blocks).sum(-1)
    assert (counts == filled.sum(-1)).all()  # no block twice


@given(problems(), st.data())
def test_fewer_blocks_are_the_first_of_more(problem, data):
    """For every topk the sets are equal, so this tests the descending order of scores."""
    q, k, _ = problem.tied_tensors()
    fewer = replace(problem, topk=data.draw(st.integers(1, problem.topk)))
    selection = select(problem, q, k)[..., : fewer.topk]
    assert_bitwise_equal(selection, select(fewer, q, k))
    assert_bitwise_equal(as_bools(selection, fewer.n_blocks), oracle(fewer, q, k))


@given(problems(dtype=st.just(torch.float64)))
def test_float64_equals_the_oracle(problem):
    q, k, _ = problem.tensors()
    selected = as_bools(select(problem, q, k), problem.n_blocks)
    assert_bitwise_equal(selected, oracle(problem, q, k))


@given(problems())
def test_ties_equal_the_oracle_in_every_dtype(problem):
    q, k, _ = problem.tied_tensors()
    selected = as_bools(select(problem, q, k), problem.n_blocks)
    assert_bitwise_equal(selected, oracle(problem, q, k))


def disagreement(problem: Problem, device: str = "cpu") -> float:
    """Returns the share of rows that differ from the oracle; asserts that they are near ties."""
    q, k, _ = problem.tensors(device)
    actual, expected = as_bools(select(problem, q, k), problem.n_blocks), oracle(problem, q, k)
    differ = assert_near_ties(actual, expected, block_scores(q, k, problem.block_size))
    return float(differ.double().mean())


@given(problems())
def test_random_inputs_differ_from_the_oracle_in_near_ties_only(problem):
    disagreement(problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
def test_near_ties_are_rare(dtype, is_causal):
    problem = Problem(
        batch=2,
        kv_heads=2,
        group=2,
        q_len=1000,
        kv_len=1024,
        head_dim=64,
        block_size=24,
        topk=5,
        is_causal=is_causal,
        dtype=dtype,
    )
    assert disagreement(problem) <= (0.0 if dtype == torch.float64 else 0.001)


def test_no_gradient_flows():
    q, k, _ = Problem().tensors(requires_grad=True)
    selection = moba_select(q, k, 4, 2)
    assert not selection.requires_grad
    assert selection.grad_fn is None


@given(problems())
def test_strides_do_not_matter(problem):
    q, k, _ = problem.tied_tensors()
    strided = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    assert_bitwise_equal(select(problem, *strided), select(problem, q, k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_that_are_not_finite_have_their_place(dtype):
    # Blocks have one key. NaN is the highest score, and -inf still ranks before no candidate.
    keys = torch.tensor([float("-inf"), 1.0, float("nan"), float("inf"), 0.0], dtype=dtype)
    query = torch.ones(1, 1, 1, 1, dtype=dtype)
    selection = moba_select(query, keys[None, None, :, None], 1, 6)
    assert selection.flatten().tolist() == [4, 2, 3, 1, 0, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_blocks_are_chosen_like_few(dtype):
    # A count above `_MOST_ROUNDS` uses a sort, a smaller one uses repeated `argmax`.
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-3, 4, (5, 40), generator=generator).to(dtype)
    scores[0, 3:9], scores[1, ::2], scores[2, 5], scores[3, :4] = (
        torch.nan,
        -0.0,
        torch.inf,
        -torch.inf,
    )
    first, end = torch.tensor([0, 0, 3, 0, 38]), torch.tensor([40, 40, 30, 17, 40])
    many = gate.top_blocks(scores, first, end, 50)
    for count in (1, 5, gate._MOST_ROUNDS):
        assert_bitwise_equal(gate.top_blocks(scores, first, end, count), many[:, :count])
    for row, a, b in zip(many, first, end, strict=True):
        assert (row >= 0).sum() == b - a
