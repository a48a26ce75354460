"""The routed backend on CPU: its tables, and its BlockMask in both directions.

FlexAttention's kernels run only on CUDA. Dense attention over the mask that the `BlockMask`
describes replaces them here, since it computes the same function.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexmoba import moba_select
from flexmoba.backends.flex import routed
from flexmoba.backends.flex.block_masks import routed_mask
from flexmoba.backends.flex.routed import routed_attention
from flexmoba.backends.options import AttentionOptions
from flexmoba.backends.routing import max_rows, route
from flexmoba.blocks import TILE, own_block
from flexmoba.reference import reference_attention
from flexmoba.selection import BlockSelection
from tests.conftest import assert_as_exact_as_dense
from tests.problems import Problem, problems


def listed(num: Tensor, indices: Tensor, columns: int) -> Tensor:
    """Returns the entries of a BlockMask's lists as bools ``(rows, columns)``."""
    used = torch.arange(indices.shape[-1]) < num[0, 0, :, None]
    listed = torch.zeros(num.shape[-1], columns, dtype=torch.bool)
    row, entry = used.nonzero(as_tuple=True)
    column = indices[0, 0, row, entry].long()
    assert len(set(zip(row.tolist(), column.tolist(), strict=True))) == len(row), "duplicates"
    listed[row, column] = True
    return listed


def stretches(mask: BlockMask) -> tuple[Tensor, Tensor]:
    """Returns the stretches that each tile visits, partial and full, as bools."""
    columns = mask.seq_lengths[1] // mask.BLOCK_SIZE[1]
    partial = listed(mask.kv_num_blocks, mask.kv_indices, columns)
    return partial, listed(mask.full_kv_num_blocks, mask.full_kv_indices, columns)


def dense_flex(q, k, v, mask: BlockMask, scale, kernel_options, score_mod=None, *, divisible):
    """Computes the result of FlexAttention, and checks that the transposed lists agree."""
    rows, keys = mask.seq_lengths
    tile, stretch = mask.BLOCK_SIZE
    assert (q.shape[2], k.shape[2], rows % tile, keys % stretch) == (rows, keys, 0, 0)
    partial, full = stretches(mask)
    assert not (partial & full).any()
    if mask.q_indices is not None:
        assert torch.equal(listed(mask.q_num_blocks, mask.q_indices, rows // tile).T, partial)
        assert torch.equal(
            listed(mask.full_q_num_blocks, mask.full_q_indices, rows // tile).T, full
        )
    by_row, by_key = torch.arange(rows)[:, None], torch.arange(keys)
    visible = mask.mask_mod(None, None, by_row, by_key)
    partial, full = (
        x.repeat_interleave(tile, 0).repeat_interleave(stretch, 1) for x in (partial, full)
    )
    visible = full | (partial & visible)
    rows = torch.arange(q.shape[2])
    return reference_attention(
        q, k, v, visible, scale=scale, score_mod=score_mod, query_positions=rows
    )


@pytest.fixture(autouse=True)
def _dense(monkeypatch):
    monkeypatch.setattr(routed, "call_flex", dense_flex)
    monkeypatch.setattr(routed, "run_compiled", lambda f, *tensors, **static: f(*tensors, **static))


def check(problem: Problem) -> None:
    """Compares `routed_attention` for an arbitrary selection and for the selection of the gate."""
    for selection in (problem.selection(), gated(problem)):
        own, past = None, selection
        if problem.is_causal:
            own_index = own_block(
                problem.q_len, problem.kv_len, problem.block_size, selection.device
            )
            own = (selection == own_index[:, None]).any(-1)
            past = torch.where(selection < own_index[:, None], selection, -1)

        selected = BlockSelection(past, problem.block_size, own)
        options = AttentionOptions("routed", 0.3, problem.is_causal)

        def attend(q, k, v, selected=selected, options=options):
            return routed_attention(q, k, v, selected, options)

        q, k, v = problem.tensors()
        mask = problem.mask_of(selection)
        # Gradients are accumulated in float32 at most, so that is the dtype of this test.
        assert_as_exact_as_dense(attend, q, k, v, mask, scale=0.3, gradients=True)


def gated(problem: Problem) -> Tensor:
    """Returns the selection of the gate."""
    q, k, _ = problem.tensors()
    return moba_select(q, k, problem.block_size, problem.topk, is_causal=problem.is_causal)


@given(problems(dtype=st.just(torch.float32)))
@settings(max_examples=15)
def test_attends_to_the_selected_blocks(problem):
    # Short blocks are padded to 128 keys, which makes dense attention slow.
    check(replace(problem, batch=1, block_size=problem.block_size + 40))


@pytest.mark.parametrize(
    "changes",
    [
        {"block_size": 128},
        {"block_size": 256, "group": 3},
        {"block_size": 384, "q_len": 300},
        {"block_size": 640, "kv_heads": 2},
    ],
)
def test_blocks_of_several_tiles(changes):
    check(Problem(**({"q_len": 900, "kv_len": 900, "dtype": torch.float32} | changes)))


@pytest.mark.parametrize("limit", [2**12, 2**15])
def test_calls_too_large_for_32_bit_offsets_are_cut(monkeypatch, limit):
    calls = []

    def counted(function, *tensors, **static):
        calls.append(tensors[0].shape)
        return function(*tensors, **static)

    monkeypatch.setattr(routed, "_MAX_ELEMENTS", limit)
    monkeypatch.setattr(routed, "run_compiled", counted)
    sizes = {"batch": 2, "kv_heads": 2, "group": 2, "block_size": 12, "dtype": torch.float32}
    sizes |= {"q_len": 60, "kv_len": 60}
    for is_causal in (True, False):
        check(Problem(**sizes, is_causal=is_causal))
    assert len(calls) > 4
    assert any(shape[2] < 60 for shape in calls) == (
        limit == 2**12
    )  # the queries of a head are split, too


def test_a_block_of_many_tiles_is_visited_in_few_stretches():
    problem = Problem(q_len=5000, kv_len=5000, block_size=4096)
    selection = gated(problem)[..., 1:]
    selected = BlockSelection(selection, 4096)
    tiles = route(selected, 1, 5000, 4096, is_causal=True, fuse=True)
    mask = routed_mask(tiles, (1, 1, 5000, 8), 1, 5000, 4096, 4096, backward=False)
    partial, full = stretches(mask)
    assert mask.BLOCK_SIZE == (TILE, 256)
    own = slice(tiles.n_own_tiles)
    assert (partial[own].sum(1) == 1).all()  # own tiles stop at the diagonal
    assert (full[own].sum(1).view(2, 32) == torch.arange(32) // 2).all()


@given(problems())
def test_shapes_do_not_depend_on_values(problem):
    selection = gated(problem)
    sizes = (problem.kv_heads, problem.kv_len, problem.block_size)
    options = {"is_causal": problem.is_causal}
    if problem.is_causal:
        selection = selection[..., 1:]
    selected = BlockSelection(selection, problem.block_size)
    traced = route(selected, *sizes, **options, fuse=True)
    opaque = route(selected, *sizes, **options, fuse=False)
    fake_mode = torch._subclasses.FakeTensorMode()
    with fake_mode:
        fake_selection = selected._replace(routed=fake_mode.from_tensor(selection))
        fake = route(fake_selection, *sizes, **options, fuse=False)
    for x, y, z in zip(traced[:-2], opaque[:-2], fake[:-2], strict=True):
        assert torch.equal(x, y)
        assert (x.shape, x.dtype) == (z.shape, z.dtype)
    assert traced[-2:] == opaque[-2:] == fake[-2:]
    assert traced.query_of_row.shape[0] == max_rows(selection.shape, *sizes, **options)
