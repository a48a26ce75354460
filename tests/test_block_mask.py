"""`moba_block_mask`: its `mask_mod`, its lists of blocks, and calls of `flex_attention` with it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import pad

from flexmoba import moba_block_mask, moba_select
from flexmoba.backends.flex.block_masks import full_mask, selection_mask, window_mask
from flexmoba.backends.flex.range_mask import range_lists, range_mask
from flexmoba.blocks import TILE
from flexmoba.reference import reference_mask, reference_selection
from tests.conftest import assert_as_exact_as_dense, assert_bitwise_equal
from tests.problems import DTYPES, Problem, problems
from tests.test_operators import Recorder

# Lengths above the tile size of the lists (128), and block sizes below and above it.
long_problems = problems(max_len=600, max_block=300)
full = st.booleans()  # topk=None


def block_mask(problem: Problem, q: Tensor, k: Tensor, is_full: bool) -> BlockMask:
    topk = None if is_full else problem.topk
    return moba_block_mask(q, k, problem.block_size, topk, is_causal=problem.is_causal)


def expected_mask(problem: Problem, q: Tensor, k: Tensor, is_full: bool) -> Tensor:
    if q.dtype == torch.float64 or is_full:
        topk = None if is_full else problem.topk
        selected = reference_selection(q, k, problem.block_size, topk, is_causal=problem.is_causal)
        return reference_mask(
            selected, problem.block_size, problem.kv_len, is_causal=problem.is_causal
        )
    selection = moba_select(q, k, problem.block_size, problem.topk, is_causal=problem.is_causal)
    return problem.mask_of(selection)


def evaluate(mask: BlockMask, problem: Problem) -> Tensor:
    """Evaluates the `mask_mod` at every (batch, head, query, key)."""
    sizes = (problem.batch, problem.heads, problem.q_len, problem.kv_len)
    index = torch.meshgrid(*(torch.arange(n, dtype=torch.int32) for n in sizes), indexing="ij")
    return mask.mask_mod(*index)


def by_tile(mask: Tensor, tile: tuple[int, int]) -> Tensor:
    """Reshapes ``(B, H, Lq, Lk)`` to ``(B, H, tiles, tiles, elements)``, padded with False."""
    padded = pad(mask, (0, -mask.shape[3] % tile[1], 0, -mask.shape[2] % tile[0]), value=False)
    tiles = padded.unflatten(3, (-1, tile[1])).unflatten(2, (-1, tile[0]))
    return tiles.transpose(3, 4).flatten(4)


def listed(counts: Tensor | None, indices: Tensor | None, columns: int) -> Tensor | bool:
    """Converts lists of indices to bools, and asserts that the lists are well-formed."""
    if counts is None:
        assert indices is None
        return False
    for x in (counts, indices):
        assert x.dtype == torch.int32
        assert x.is_contiguous()
    valid = torch.arange(indices.shape[-1]) < counts[..., None]
    assert ((indices >= 0) & (indices < columns))[valid].all()
    assert (indices.diff(dim=-1) > 0)[valid[..., 1:]].all(), "ascending, without duplicates"
    return ((indices[..., None] == torch.arange(columns)) & valid[..., None]).any(-2)


@given(problems(), full)
def test_mask_mod_is_the_oracles_mask(problem, is_full):
    q, k, _ = problem.tensors()
    mask = block_mask(problem, q, k, is_full)
    assert mask.seq_lengths == (problem.q_len, problem.kv_len)
    assert_bitwise_equal(evaluate(mask, problem), expected_mask(problem, q, k, is_full))


@given(long_problems, full)
def test_lists_are_exactly_the_tiles_that_any_query_needs(problem, is_full):
    q, k, _ = problem.tensors()
    mask, dense = block_mask(problem, q, k, is_full), expected_mask(problem, q, k, is_full)
    assert_lists_are_exact(mask, dense)


def assert_lists_are_exact(mask: BlockMask, dense: Tensor) -> None:
    needed = by_tile(dense, mask.BLOCK_SIZE).any(-1)
    rows, columns = needed.shape[2:]
    partial = listed(mask.kv_num_blocks, mask.kv_indices, columns)
    full_tiles = listed(mask.full_kv_num_blocks, mask.full_kv_indices, columns)
    assert not (partial & full_tiles).any(), "a tile is either partial or full"
    visited = (partial | full_tiles).expand_as(needed)
    assert_bitwise_equal(visited, needed)
    if mask.kv_indices.shape[-1] == columns:  # `to_dense` assumes lists of this length
        assert_bitwise_equal(mask.to_dense().bool().expand_as(needed), needed)
    if full_tiles is not False:
        # FlexAttention does not mask full tiles, so none may extend beyond the last query or key.
        assert (by_tile(dense, mask.BLOCK_SIZE).all(-1) | ~full_tiles).all()
    # The transposed lists, for the backward pass, hold the same tiles.
    assert_bitwise_equal(listed(mask.q_num_blocks, mask.q_indices, rows).mT, partial)
    transposed_full = listed(mask.full_q_num_blocks, mask.full_q_indices, rows)
    if full_tiles is False:
        assert transposed_full is False
    else:
        assert_bitwise_equal(transposed_full.mT, full_tiles)


@given(st.integers(1, 600), st.integers(1, 6), st.integers(1, 700), st.integers(0, 2**32 - 1))
def test_windows_within_documents(length, count, longest, seed):
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randint(length, (2, 1, count - 1), generator=generator)  # differs between rows
    position = torch.arange(length)
    starts = pad(inner, (1, 0)).unsqueeze(-1)
    first_token = torch.where(starts <= position, starts, 0).amax(2)
    first_seen = first_token.clamp(min=position - longest + 1)
    dense = (position >= first_seen[..., None]) & (position <= position[:, None])
    mask = window_mask(first_seen[:, 0], longest)
    problem = Problem(batch=2, q_len=length, kv_len=length)
    assert_bitwise_equal(evaluate(mask, problem), dense)
    assert_lists_are_exact(mask, dense)


@given(
    *(st.integers(1, 600), st.integers(1, 600), st.integers(0, 600), st.integers(0, 4)),
    st.integers(0, 2**32 - 1),
)
def test_ranges(q_len, kv_len, blind, count, seed):
    """Tests ranges as of compressed keys: some queries see none, some rows have documents."""
    generator = torch.Generator().manual_seed(seed)
    position = torch.arange(q_len, dtype=torch.int32)
    end = ((position - blind) * kv_len // q_len).clamp(max=kv_len)
    first = torch.zeros(1, q_len, dtype=torch.int32)
    if count:
        starts = torch.randint(q_len, (2, count, 1), generator=generator)
        first = torch.where(starts <= position, end[starts.squeeze(-1)][..., None].clamp(min=0), 0)
        first = first.amax(1).int() + 2  # the first two keys of a document belong to none
    key = torch.arange(kv_len)
    dense = ((key < end[:, None]) & (key >= first[..., None]))[:, None]
    mask = range_mask(first if count else None, end, kv_len, backward=True)
    problem = Problem(batch=len(first), q_len=q_len, kv_len=kv_len)
    dense = dense.expand(-1, 2, -1, -1)
    assert_bitwise_equal(evaluate(mask, problem).expand_as(dense), dense)
    alone = range_mask(first if count else None, end, kv_len, backward=False)
    assert alone.q_indices is None
    assert_bitwise_equal(alone.kv_indices, mask.kv_indices)
    assert_bitwise_equal(alone.full_kv_indices, mask.full_kv_indices)
    if not count:
        assert_lists_are_exact(mask, dense[:, :1])
        return
    # A tile of queries of two documents may visit the keys between their ranges.
    rows, columns = by_tile(dense, mask.BLOCK_SIZE).shape[2:4]
    partial = listed(mask.kv_num_blocks, mask.kv_indices, columns)
    full = listed(mask.full_kv_num_blocks, mask.full_kv_indices, columns)
    tiles = by_tile(dense[:, :1], mask.BLOCK_SIZE)
    assert not (partial & full).any()
    assert (partial | full | ~tiles.any(-1)).all()
    assert (tiles.all(-1) | ~full).all()
    for lists, expected in (
        ((mask.q_num_blocks, mask.q_indices), partial),
        ((mask.full_q_num_blocks, mask.full_q_indices), full),
    ):
        assert_bitwise_equal(listed(*lists, rows).mT, expected)


def test_lists_that_differ_between_rows_have_a_fixed_layout():
    """Inductor lays out the result of an operator as it is, other lists with heads outermost."""
    selection = torch.zeros(2, 1, 300, 2, dtype=torch.int32)
    rows = selection[:, 0, :, 0]
    for mask_of, is_fixed in (
        (lambda: window_mask(rows, 100), True),
        (lambda: range_mask(rows, rows[0], 300, backward=True), True),
        (lambda: selection_mask(selection, 300, 64, is_causal=True), True),
        (lambda: full_mask(300, 300, selection.device, is_causal=True), False),  # one list for all
    ):
        with Recorder() as recorder:
            mask = mask_of()
        assert ("materialize_all" in recorder.calls) == is_fixed
        assert mask.kv_indices.stride(0) == mask.kv_indices.stride(1)


# FlexAttention compiles once for each problem, so the test has a few fixed problems.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("problem", "is_full"),
    [
        (Problem(kv_len=300, q_len=300, block_size=70, topk=2, group=3, kv_heads=2), False),
        (Problem(kv_len=300, q_len=40, block_size=32, topk=3, dtype=DTYPES[1]), False),
        (Problem(kv_len=300, q_len=300, block_size=32, group=2, dtype=DTYPES[3]), True),
        (Problem(kv_len=150, q_len=150, block_size=64, topk=1, is_causal=False), False),
    ],
    ids=str,
)
def test_in_ones_own_flex_attention(problem, is_full):
    q, k, v = problem.tensors()
    mask = block_mask(problem, q, k, is_full)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, aux = flex_attention(
            q,
            k,
            v,
            block_mask=mask,
            enable_gqa=problem.group > 1,
            return_aux=AuxRequest(lse=True),
        )
        return out, aux.lse

    assert_as_exact_as_dense(attend, q, k, v, expected_mask(problem, q, k, is_full))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_composes_with_a_score_mod():
    problem = Problem(kv_len=40, q_len=40, block_size=8, topk=2)
    q, k, v = problem.tensors()
    position = torch.arange(40)

    def older_is_less(score, b, h, query, key):
        return score - 0.1 * (query - key)

    out = flex_attention(
        q, k, v, score_mod=older_is_less, block_mask=block_mask(problem, q, k, False)
    )
    scores = q @ k.mT * 8**-0.5 - 0.1 * (position[:, None] - position)
    mask = expected_mask(problem, q, k, False)
    expected = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v
    torch.testing.assert_close(out, expected)


def test_has_no_gradient():
    q, k, _ = Problem().tensors(requires_grad=True)
    mask = moba_block_mask(q, k, 4, 2)
    tables = [cell.cell_contents for cell in mask.mask_mod.__closure__]
    assert not any(isinstance(x, Tensor) and x.requires_grad for x in tables)


@given(
    *(st.sampled_from((1, 4, 8, 16, 32, 64)), st.sampled_from((1, 2, 4))),
    *(st.integers(1, 20), st.integers(0, 3000)),
)
def test_lists_of_ranges_from_key_0_hold_consecutive_tiles(stride, ratio, q_tiles, before):
    """Tests the lists of the compressed branch of NSA, which FlexAttention does not look up."""
    q_len, cmp_block = q_tiles * TILE, stride * ratio
    kv_len = q_len + before
    n_compressed = max(1, (kv_len - cmp_block) // stride + 1)
    end = torch.arange(kv_len - q_len, kv_len, dtype=torch.int32) + 1 - (cmp_block - stride)
    n_keys = n_compressed + -n_compressed % TILE
    lists = range_lists(None, end.div(stride, rounding_mode="floor").int(), n_keys, True)
    for counts, entries in zip(lists[::2], lists[1::2], strict=True):
        steps = entries.diff(dim=-1)
        listed = torch.arange(1, entries.shape[-1]) < counts[..., None]
        assert (steps[listed] == 1).all()
