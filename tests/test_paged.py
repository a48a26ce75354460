"""Tests of paged attention: a ragged batch equals the oracle for each of its sequences."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmoba.gate import block_means
from flexmoba.paged import Pages, append_paged, attend_paged, paged_batch
from tests.conftest import assert_as_exact_as, assert_bitwise_equal
from tests.ragged import LAYOUTS, Ragged, ragged

pytestmark = pytest.mark.usefixtures("small_pieces")


def attend(problem: Ragged, *tensors, max_query_len: int | None = None):
    table, n_pages = problem.table()
    pages = problem.pages(n_pages)
    problem.fill(pages, table, tensors)
    batch = problem.batch(table, max_query_len)
    return attend_paged(problem.queries(tensors), pages, batch, **problem.options)


@given(ragged())
def test_a_ragged_batch_equals_the_oracle_for_each_sequence(problem):
    tensors = problem.tensors()
    masks = problem.masks(tensors)
    assert_as_exact_as(lambda *x: problem.dense(masks, *x), lambda *x: attend(problem, *x), tensors)


@given(ragged(), st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_the_order_and_layout_of_pages_do_not_matter(problem, seed):
    tensors = problem.tensors()
    expected = attend(problem, *tensors)
    layouts = [x for x in LAYOUTS if x != "token-major" or problem.value_dim == problem.head_dim]
    for layout in layouts:
        moved = replace(problem, layout=layout, seed=seed)
        for actual, x in zip(attend(moved, *tensors), expected, strict=True):
            torch.testing.assert_close(actual, x)


@given(ragged())
@settings(max_examples=20)
def test_append_writes_slots_and_means_of_full_sub_blocks_and_nothing_else(problem):
    table, n_pages = problem.table()
    pages, tensors = problem.pages(n_pages), problem.tensors()
    problem.fill(pages, table, tensors)
    size, used = problem.block_size, torch.zeros(n_pages, dtype=torch.int64)
    sub_size = size // problem.sub_blocks
    for i, (k, v) in enumerate(zip(tensors[1::3], tensors[2::3], strict=True)):
        length = k.shape[1]
        own = table[i, : -(-length // size)].long()
        for x, y in ((pages.k, k), (pages.v, v)):
            assert_bitwise_equal(x[own].transpose(0, 1).flatten(1, 2)[:, :length], y)
        full = length // sub_size
        means = pages.means_of_sub_blocks[own].transpose(0, 1).flatten(1, 2)
        torch.testing.assert_close(means[:, :full], block_means(k[None], sub_size)[0, :, :full])
        used[own] = (length - torch.arange(len(own)) * size).clamp(max=size)
    for page, count in enumerate(used.tolist()):
        assert pages.k[page, :, count:].isnan().all()
        assert pages.v[page, :, count:].isnan().all()
        full = count // sub_size
        assert pages.means_of_sub_blocks[page, :, full:].isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, layout):
    problem = Ragged(layout=layout, dtype=dtype, block_size=8, topk=2, sequences=((50, 1), (9, 30)))
    tensors = problem.tensors()
    masks = problem.masks(tensors)
    assert_as_exact_as(lambda *x: problem.dense(masks, *x), lambda *x: attend(problem, *x), tensors)


@given(ragged(torch.float64))
@settings(max_examples=20)
def test_a_step_reads_only_means_and_selected_pages(problem):
    sequences = tuple((old + (new == 0), min(new, 1) or 1) for old, new in problem.sequences)
    problem = replace(problem, sequences=sequences, shared=0)
    table, n_pages = problem.table()
    tensors, pages = problem.tensors(), problem.pages(n_pages)
    problem.fill(pages, table, tensors)
    batch, q = problem.batch(table), problem.queries(tensors)
    expected = attend_paged(q, pages, batch, **problem.options)
    problem.poison(pages, table, problem.masks(tensors))
    for actual, x in zip(attend_paged(q, pages, batch, **problem.options), expected, strict=True):
        assert_bitwise_equal(actual, x)


def test_a_bound_of_the_new_tokens_changes_nothing():
    problem = Ragged(sequences=((40, 1), (3, 4), (22, 1)))
    tensors = problem.tensors()
    for actual, expected in zip(
        attend(problem, *tensors, max_query_len=4), attend(problem, *tensors), strict=True
    ):
        assert_bitwise_equal(actual, expected)


def test_a_dimension_of_one_sub_block_changes_nothing():
    problem = Ragged()
    tensors = problem.tensors()
    one = attend(replace(problem, gate_block_size=problem.block_size), *tensors)
    for actual, expected in zip(one, attend(problem, *tensors), strict=True):
        assert_bitwise_equal(actual, expected)


def test_the_gate_scores_sub_blocks():
    # The second key of block 1 agrees with the query, and its other key cancels it in the mean.
    k = torch.tensor([3.0, 3.0, -9.0, 9.0, 1.0, 1.0, 0.0]).view(7, 1, 1)
    v, q = torch.arange(7.0).view(7, 1, 1), torch.ones(1, 1, 1)
    batch = batch_of(lengths=(7,), table=((0, 1, 2, 3),))
    for sub_blocks, block in ((1, 0), (2, 1)):
        pages = Pages(*(torch.zeros(4, 1, n, 1) for n in (2, 2, sub_blocks)))
        append_paged(k, v, pages, torch.arange(7))
        out, _ = attend_paged(q, pages, batch, 2)
        seen = [2 * block, 2 * block + 1, 6]
        weights = k[seen, 0, 0].softmax(0)
        torch.testing.assert_close(out[0, 0, 0], (weights * v[seen, 0, 0]).sum())


def test_a_batch_without_tokens_or_sequences():
    pages = Pages(torch.zeros(3, 2, 4, 8), torch.zeros(3, 2, 4, 8), torch.zeros(3, 2, 8))
    none = torch.zeros(0, dtype=torch.int32)
    batch = paged_batch(torch.zeros(1).int(), none, none.view(0, 5), tokens=2)
    out, lse = attend_paged(torch.zeros(2, 4, 8), pages, batch, 3)
    assert not out.any()
    assert (lse == float("-inf")).all()
    batch = paged_batch(torch.zeros(1).int(), none, none.view(0, 5), tokens=0)
    assert attend_paged(torch.zeros(0, 4, 8), pages, batch, 3)[0].shape == (0, 4, 8)


PAGES = Pages(torch.zeros(3, 2, 4, 8), torch.zeros(3, 2, 4, 8), torch.zeros(3, 2, 8))
X, SLOT = torch.zeros(1, 2, 8), torch.zeros(1, dtype=torch.int64)


def batch_of(new=(0, 1), lengths=(5,), table=((0, 1),), tokens=1, dtype=torch.int32):
    tensors = (torch.tensor(x, dtype=dtype) for x in (new, lengths, table))
    return paged_batch(*tensors, tokens=tokens)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: batch_of(dtype=torch.int64), ValueError, "query_start_loc must be int32.*int64"),
        (lambda: batch_of(lengths=(5, 5)), ValueError, r"got \(2,\), \(2,\) and \(1, 2\)"),
        (lambda: batch_of(new=(0, 2)), ValueError, r"at most 1 tokens.*\[0, 2\] and \[5\]"),
        (lambda: batch_of(new=(0, 2), lengths=(1,), tokens=2), ValueError, r"and \[1\]; count"),
        (lambda: attend_paged(X, PAGES, batch_of(tokens=2), 2), ValueError, "2 tokens.*got 1"),
        (lambda: attend_paged(X, PAGES, batch_of(lengths=(9,)), 2), ValueError, "2 pages.*n 8 "),
        (lambda: attend_paged(X, PAGES, batch_of(table=((0, 3),)), 2), ValueError, "0 to 2, got 0"),
        (lambda: attend_paged(X[:, :1], PAGES, batch_of(), 2), ValueError, r"multiple of 2 heads"),
        (lambda: attend_paged(X.half(), PAGES, batch_of(), 2), ValueError, "float32 on cpu like"),
        (lambda: attend_paged(X, PAGES, batch_of(), 2, gate="tile"), NotImplementedError, "tile"),
        (lambda: attend_paged(X, PAGES, batch_of(), 1, sink_blocks=1), ValueError, "topk=1"),
        (lambda: attend_paged(X, PAGES, batch_of(), 2.0), TypeError, "topk"),
        (lambda: attend_paged(X, PAGES._replace(v=PAGES.v.half()), batch_of(), 2), ValueError,
         "torch.float16 on cpu"),
        (lambda: attend_paged(X, PAGES._replace(k=PAGES.k[:2]), batch_of(), 2), ValueError,
         r"\(2, 2, 4, 8\), \(3, 2, 4, 8\)"),
        (lambda: attend_paged(X, PAGES._replace(k=torch.zeros(3, 2, 8, 4).mT), batch_of(), 2),
         ValueError, r"last strides \[4, 1, 1\]"),
        (lambda: attend_paged(X, PAGES._replace(means=torch.zeros(3, 2, 8, 8)), batch_of(), 2),
         ValueError, "page of 4 keys must divide .* mean keys of 8; allocate block_size / gate_"),
        (lambda: append_paged(X, X, PAGES._replace(means=torch.zeros(3, 2, 0, 8)), SLOT),
         ValueError, "mean keys of 0; allocate"),
        (lambda: append_paged(X, X, PAGES._replace(k=PAGES.k[:, :, :0], v=PAGES.v[:, :, :0]), SLOT),
         ValueError, r"at least one key, got keys of shape \(3, 2, 0, 8\); allocate"),
        (lambda: append_paged(X, X, PAGES._replace(means=torch.zeros(3, 1, 2, 8)), SLOT),
         ValueError, r"or \(pages, Hkv, sub_blocks, D\), got .*\(3, 1, 2, 8\); call"),
        (lambda: append_paged(X, X, PAGES, SLOT.int()), ValueError, "got torch.int32 of shape"),
        (lambda: append_paged(X, X[..., :4], PAGES, SLOT), ValueError, r"v must be .tokens"),
        (lambda: append_paged(X.clone().requires_grad_(), X, PAGES, SLOT), NotImplementedError,
         "no_grad"),
    ],
)  # fmt: skip
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()
