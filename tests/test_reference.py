"""The oracle: cases computed by hand, and comparisons with the attention of torch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flexmoba import moba_reference
from flexmoba.reference import reference_attention, reference_mask, reference_selection
from tests.problems import Problem, problems

double = st.just(torch.float64)


def one_head(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)[None, None]


def blocks_of(selected: Tensor) -> list[list[int]]:
    """Returns the selected blocks of each query of the only head."""
    return [row.nonzero().flatten().tolist() for row in selected[0, 0]]


# Blocks of two keys with means 1, 3 and 2, and a shorter last block of one key, 9.
KEYS = one_head([[0.0], [2.0], [3.0], [3.0], [4.0], [0.0], [9.0]])


@pytest.mark.parametrize(
    ("query", "topk", "expected"),
    [
        (1.0, 1, [[0], [0], [1], [1], [2], [2], [3]]),
        (1.0, 2, [[0], [0], [0, 1], [0, 1], [1, 2], [1, 2], [1, 3]]),
        (1.0, 3, [[0], [0], [0, 1], [0, 1], [0, 1, 2], [0, 1, 2], [1, 2, 3]]),
        (1.0, 9, [[0], [0], [0, 1], [0, 1], [0, 1, 2], [0, 1, 2], [0, 1, 2, 3]]),
        (-1.0, 2, [[0], [0], [0, 1], [0, 1], [0, 2], [0, 2], [0, 3]]),
        (0.0, 2, [[0], [0], [0, 1], [0, 1], [1, 2], [1, 2], [2, 3]]),  # ties: the more recent
    ],
)
def test_causal_selection_by_hand(query, topk, expected):
    queries = torch.full_like(KEYS, query)
    selected = reference_selection(queries, KEYS, 2, topk, is_causal=True)
    assert blocks_of(selected) == expected
    # Without the other queries, the last three queries have the same positions.
    selected = reference_selection(queries[:, :, 4:], KEYS, 2, topk, is_causal=True)
    assert blocks_of(selected) == expected[4:]


@pytest.mark.parametrize(
    ("query", "topk", "expected"),
    [(1.0, 1, [3]), (1.0, 2, [1, 3]), (-1.0, 2, [0, 2]), (0.0, 3, [1, 2, 3])],
)
def test_non_causal_selection_by_hand(query, topk, expected):
    selected = reference_selection(torch.full_like(KEYS, query), KEYS, 2, topk, is_causal=False)
    assert blocks_of(selected) == [expected] * 7


def test_the_gate_rounds_means_to_the_dtype_of_the_keys():
    # The mean of block 0, 1 + 2**-9, is 1 in bfloat16: a tie with block 1, which is more recent.
    keys = torch.tensor([1.0, 1.0, 1.0, 1.0 + 2**-7, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    keys = keys[None, None, :, None]
    last = torch.ones(1, 1, 1, 1)
    exact = reference_selection(last, keys, 4, 2, is_causal=True)
    rounded = reference_selection(last.bfloat16(), keys.bfloat16(), 4, 2, is_causal=True)
    assert blocks_of(exact) == [[0, 2]]
    assert blocks_of(rounded) == [[1, 2]]


def test_every_query_head_selects_on_its_own():
    queries = torch.cat([torch.ones_like(KEYS), -torch.ones_like(KEYS)], dim=1)
    selected = reference_selection(queries, KEYS, 2, 2, is_causal=True)
    assert blocks_of(selected[:, :1])[-1] == [1, 3]
    assert blocks_of(selected[:, 1:])[-1] == [0, 3]


def test_output_by_hand():
    # With queries of zero, all keys have the same weight, and all scores of blocks are equal.
    queries = torch.zeros_like(KEYS)
    values = one_head([[1.0], [2.0], [4.0], [8.0], [16.0], [32.0], [64.0]])
    out = moba_reference(queries, KEYS, values, 2, 2)
    expected = [1, 3 / 2, 7 / 3, 15 / 4, 28 / 3, 60 / 4, 112 / 3]
    torch.testing.assert_close(out, one_head([[x] for x in expected]))


VALUES = one_head([[1.0], [2.0], [4.0], [8.0], [16.0], [32.0], [64.0]])


@pytest.mark.parametrize(
    "documents",
    [
        {"cu_seqlens": torch.tensor([0, 3, 3, 4, 7], dtype=torch.int32)},
        {"document_ids": torch.tensor([[5, 5, 5, 2, 9, 9, 9]])},
    ],
    ids=lambda documents: next(iter(documents)),
)
def test_packed_documents_by_hand(documents):
    # Documents begin at keys 0, 3 and 4. One document is empty, and one has a single token.
    out = moba_reference(torch.zeros_like(KEYS), KEYS, VALUES, 2, 1, **documents)
    expected = [1, 3 / 2, 4, 8, 16, 48 / 2, 64]
    torch.testing.assert_close(out, one_head([[x] for x in expected]))
    out = moba_reference(torch.zeros_like(KEYS), KEYS, VALUES, 2, 2, **documents)
    expected = [1, 3 / 2, 7 / 3, 8, 16, 48 / 2, 112 / 3]
    torch.testing.assert_close(out, one_head([[x] for x in expected]))


@pytest.mark.parametrize("q_len", [7, 4, 1])
def test_padding_by_hand(q_len):
    # Blocks begin at the first real key, 1, and values of padding have no effect.
    real = torch.tensor([[False, True, True, True, True, False, False]])
    values = VALUES.where(real[0][:, None], float("nan"))
    queries = torch.zeros_like(KEYS)[:, :, -q_len:]
    out = moba_reference(queries, KEYS, values, 2, 1, key_padding_mask=real)
    expected = [0, 2, 6 / 2, 8, 24 / 2, 0, 0][-q_len:]
    torch.testing.assert_close(out, one_head([[x] for x in expected]))
    nothing = moba_reference(queries, KEYS, values, 2, 1, key_padding_mask=real & False)
    assert not nothing.any()


def test_the_oracle_takes_one_description_of_documents():
    ids, real = torch.zeros(1, 7), torch.ones(1, 7, dtype=torch.bool)
    with pytest.raises(ValueError, match="document_ids and key_padding_mask"):
        moba_reference(KEYS, KEYS, VALUES, 2, 1, document_ids=ids, key_padding_mask=real)
    with pytest.raises(ValueError, match=r"document_ids needs .* Lq=3 and Lk=7"):
        moba_reference(KEYS[:, :, 4:], KEYS, VALUES, 2, 1, document_ids=ids)


def test_softmax_and_scale_by_hand():
    query = one_head([[2.0]])
    keys, values = one_head([[1.0], [3.0]]), one_head([[10.0], [20.0]])
    heavy = torch.tensor([2.0, 6.0], dtype=torch.float64).exp()
    expected = (heavy * torch.tensor([10.0, 20.0])).sum() / heavy.sum()
    out = moba_reference(query, keys, values, 2, 1)
    torch.testing.assert_close(out.squeeze(), expected)
    out = moba_reference(query, keys, values, 2, 1, scale=0.0)
    torch.testing.assert_close(out.item(), 15.0)


def test_a_query_without_keys_gets_zeros_and_no_gradient():
    q, k, v = (torch.randn(1, 1, 2, 4, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    mask = torch.tensor([[[[True, False], [False, False]]]])
    out, lse = reference_attention(q, k, v, mask)
    assert (out[0, 0, 1] == 0).all()
    assert lse[0, 0, 1] == float("-inf")
    grads = torch.autograd.grad((out[0, 0, 1].sum(), lse[0, 0, 1]), (q, k, v))
    assert not any(grad.any() for grad in grads)


@given(problems(dtype=double), st.booleans())
def test_all_blocks_are_torchs_full_attention(problem, by_none):
    q, k, v = problem.tensors()
    topk = None if by_none else problem.n_blocks
    out = moba_reference(q, k, v, problem.block_size, topk, is_causal=problem.is_causal)
    mask = torch.ones(problem.q_len, problem.kv_len, dtype=torch.bool)
    if problem.is_causal:
        mask = mask.tril(problem.offset)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(out, expected)


@given(problems(dtype=double, topk=st.just(1), is_causal=st.just(True)))
def test_topk_1_is_torchs_causal_attention_of_each_block(problem):
    q, k, v = problem.tensors()
    out = moba_reference(q, k, v, problem.block_size, 1)
    for start in range(0, problem.kv_len, problem.block_size):
        stop = min(start + problem.block_size, problem.kv_len)
        first = max(start - problem.offset, 0)
        last = stop - problem.offset
        if last <= 0:
            continue
        mask = torch.ones(last - first, stop - start, dtype=torch.bool)
        mask = mask.tril(first + problem.offset - start)
        keys, values = k[:, :, start:stop], v[:, :, start:stop]
        expected = scaled_dot_product_attention(
            q[:, :, first:last], keys, values, attn_mask=mask, enable_gqa=True
        )
        torch.testing.assert_close(out[:, :, first:last], expected)


@given(problems())
def test_mask_is_selected_blocks_and_causality(problem):
    selected = torch.rand(3, problem.q_len, problem.n_blocks, generator=problem.generator()) < 0.5
    mask = reference_mask(
        selected[None], problem.block_size, problem.kv_len, is_causal=problem.is_causal
    )
    for i in range(0, problem.q_len, 7):
        for key in range(0, problem.kv_len, 5):
            visible = not problem.is_causal or key <= i + problem.offset
            seen = selected[:, i, key // problem.block_size] & visible
            assert mask[0, :, i, key].tolist() == seen.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_score_mod_of_float32_keeps_the_dtype(dtype):
    q, k, v = Problem(q_len=5, kv_len=5, dtype=dtype).tensors()
    bias = torch.ones(5)
    mask = torch.ones(*q.shape[:2], 5, 5, dtype=torch.bool)
    out, lse = reference_attention(
        q, k, v, mask, score_mod=lambda score, b, h, query, key: score + bias[key]
    )
    plain, plain_lse = reference_attention(q, k, v, mask)
    assert out.dtype == lse.dtype == dtype
    tolerance = {torch.bfloat16: 0.05, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(out, plain, atol=tolerance, rtol=0)
    torch.testing.assert_close(lse, plain_lse + 1, atol=tolerance, rtol=0)
