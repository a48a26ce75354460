"""The Triton kernels in Triton's interpreter, on CPU; `test_fused` runs this file.

The file needs its own process, because Triton selects its interpreter when it is imported.
"""

import pytest
import torch

from flexmoba import MobaCache, gate, moba_select
from flexmoba.backends.fused import fused_attention, routing, schedule
from flexmoba.backends.options import AttentionOptions
from flexmoba.cache.append import append_scattered
from flexmoba.cache.decode import attend_gathered
from flexmoba.cache.kernels import append_on_cuda, attend_step_on_cuda
from flexmoba.cache.options import CachedCall
from flexmoba.gate.kernel import select_on_cuda
from flexmoba.selection import BlockSelection
from flexmoba.sequence.kernel import move_on_cuda
from tests.conftest import assert_as_exact_as_dense, assert_bitwise_equal
from tests.problems import Problem

SMALL = Problem(
    kv_heads=2, group=2, q_len=200, kv_len=290, head_dim=16, value_dim=16, block_size=64, topk=3,
    dtype=torch.float16,
)  # fmt: skip


def variant(**changes) -> Problem:
    return Problem(**(vars(SMALL) | changes))


def check(
    problem: Problem,
    selection: torch.Tensor,
    own: torch.Tensor | None = None,
    scale: float = 0.3,
) -> None:
    routed = selection[..., 1:] if problem.is_causal else selection
    q, k, v = problem.tensors()

    def attend(q, k, v):
        selected = BlockSelection(routed, problem.block_size, own)
        return fused_attention(
            q, k, v, selected, AttentionOptions("fused", scale, problem.is_causal)
        )

    if own is not None:
        selection = torch.cat([torch.where(own[..., None], selection[..., :1], -1), routed], -1)
    mask = problem.mask_of(selection)
    assert_as_exact_as_dense(attend, q, k, v, mask, scale=scale, gradients=True)


def gated(problem: Problem) -> torch.Tensor:
    """Returns the selection of the gate."""
    q, k, _ = problem.tensors()
    return moba_select(q, k, problem.block_size, problem.topk, is_causal=problem.is_causal)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"block_size": 50, "head_dim": 24, "value_dim": 33},
        {"block_size": 150, "topk": 2, "batch": 2, "kv_heads": 1},  # blocks of several tiles
        {"block_size": 7, "topk": 5, "group": 1},
        {"topk": 1},
        {"is_causal": False, "block_size": 40},
        {"is_causal": False, "block_size": 150, "topk": 1},
    ],
)
def test_attends_to_the_selected_blocks(changes):
    problem = variant(**changes)
    check(problem, gated(problem))


@pytest.mark.parametrize("scale", [0.0, -0.3])
@pytest.mark.parametrize("block_size", [50, 64, 150])
def test_scale(scale, block_size):
    problem = variant(block_size=block_size)
    check(problem, gated(problem), scale=scale)


def test_some_queries_do_not_attend_to_their_own_block():
    problem = variant()
    selection = gated(problem)
    own = torch.rand(selection.shape[:3], generator=problem.generator()) < 0.6
    drop = torch.rand(selection[..., 1:].shape, generator=problem.generator()) < 0.3
    selection[..., 1:] = torch.where(drop, -1, selection[..., 1:])
    check(problem, selection, own)


@pytest.mark.parametrize(
    ("sorting", "total", "forward", "backward"),
    [
        (0.01, 0.5, [1, 1, 1, 1], [1, 1, 1, 1]),  # groups of one KV head
        (0.01, 0.01, [1] * 32, [1, 1, 1, 1]),  # groups of 64 queries
        (1.0, 0.7, [4], [4]),  # one group, in pieces of one KV head
    ],
)
def test_in_pieces(monkeypatch, sorting, total, forward, backward):
    monkeypatch.setattr(schedule, "_SORTING_SHARE", sorting)
    monkeypatch.setattr(schedule, "_TOTAL_SHARE", total)
    sort_groups = schedule.sort_groups.__wrapped__  # without its cache
    for name in ("forward", "backward"):
        monkeypatch.setattr(f"flexmoba.backends.fused.{name}.sort_groups", sort_groups)
    sizes = schedule.Sizes(2, 4, 2, 200, 290, 64, 2, 16, 16)
    for whole_kv_heads, expected in ((False, forward), (True, backward)):
        groups = sort_groups(sizes, whole_kv_heads=whole_kv_heads)
        assert [len(group.pieces) for group in groups] == expected
    problem = variant(batch=2)
    check(problem, gated(problem))


@pytest.mark.parametrize("rows", [3, 16, 64])
def test_the_tiles_of_blocks_hold_all_rows_once(rows):
    problem = variant(block_size=20)
    routed = gated(problem)[..., 1:].contiguous()
    sizes = schedule.Sizes.of(*problem.tensors(), routed, 20)
    (group,) = schedule.sort_groups(sizes, whole_kv_heads=True)
    bins, _ = routing.sort_pairs(routed, group, sizes)
    first_rows = routing.first_rows_of_bins(bins, group, sizes)
    every_bin = torch.arange(group.n_kv_heads * (sizes.n_blocks + 1) + 1)
    assert_bitwise_equal(first_rows, torch.searchsorted(bins.long(), every_bin, out_int32=True))
    first_tile, block, begin, end = routing.tiles_of_blocks(first_rows, rows, group, sizes)
    tiles = zip(*(x[: first_tile[-1]].tolist() for x in (block, begin, end)), strict=True)
    expected = []
    for i in range(group.n_kv_heads * sizes.n_blocks):
        bin = i + i // sizes.n_blocks
        row, last = first_rows[bin : bin + 2].tolist()
        assert int(first_tile[i]) == len(expected)
        expected += [(i, x, min(x + rows, last)) for x in range(row, last, rows)]
    assert [*tiles] == expected
    assert len(expected) > 10


def test_a_block_that_all_queries_select_is_divided_into_items(monkeypatch):
    monkeypatch.setattr("flexmoba.backends.fused.backward._LEAST_ITEM", 16)
    monkeypatch.setattr("flexmoba.backends.fused.backward._ITEM_FACTOR", 1)
    problem = variant(block_size=32)
    selection = gated(problem)
    selection[..., 1] = torch.where(selection[..., 0] > 0, 0, -1)
    selection[..., 2] = -1
    check(problem, selection)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("block_size", "count", "options"),
    [
        (16, 3, gate.GateOptions()),
        (7, 12, gate.GateOptions(sink_blocks=2, local_blocks=3)),
        (128, 1, gate.GateOptions("tile", sink_blocks=1)),
        (16, 3, gate.GateOptions("group")),
    ],
)
def test_the_gate_kernel_agrees_with_the_plain_gate(block_size, count, options, is_causal):
    problem = variant(block_size=block_size, q_len=100, kv_len=228)
    q, k, _ = problem.tied_tensors()
    means, rows = gate.block_means(k, block_size), gate.gate_rows(q, 2, options)
    if not is_causal:
        options = options._replace(local_blocks=0)
    first = (torch.arange(rows.shape[2]) // 25)[None].int()
    spans = [(None, None), (first, (first + 7).clamp(max=means.shape[2]))]
    if is_causal:
        spans.append((first, None))
    sizes = gate.GateSizes(block_size, count + 5, 128, is_causal)
    scored = sizes.scored(options)
    for span in spans:
        candidates = gate.Candidates(*span)
        expected = gate.select_by_means(rows, means, sizes, options, candidates)
        best = select_on_cuda(rows, means.to(rows.dtype), sizes, options, candidates)
        assert_bitwise_equal(best, expected[..., -scored:])


@pytest.mark.parametrize(
    ("count", "doubles"), [(1, True), (2, True), (7, True), (7, False), (16, True)]
)
def test_the_gate_kernel_selects_any_number_of_blocks(count, doubles, monkeypatch):
    monkeypatch.setattr("flexmoba.gate.kernel._DOUBLES", doubles)
    problem = variant(block_size=2, q_len=70, kv_len=290, kv_heads=1)
    q, k, _ = problem.tied_tensors()
    k[..., 0] += 8.0
    q[0, 1], q[0, 1, :, 0] = 0.0, -4.0  # few different scores, all negative
    q[0, 0, 7] = 0.0  # the scores of all blocks are equal, or NaN
    q[0, 0, 5], k[0, 0, 9], k[0, 0, 21] = torch.nan, torch.inf, -torch.inf
    # A score of NaN, and a later one of inf.
    k[0, 0, 41, 0], q[0, 0, 9], q[0, 0, 9, 0] = torch.inf, 0.0, 1.0
    means, sizes = gate.block_means(k, 2), gate.GateSizes(2, count, 220, is_causal=True)
    expected = gate.select_by_means(q, means, sizes, gate.GateOptions())
    best = select_on_cuda(q, means, sizes, gate.GateOptions(), gate.Candidates())
    assert_bitwise_equal(best, expected)


def test_the_gate_kernel_selects_among_8192_blocks():
    problem = variant(block_size=1, q_len=20, kv_len=8192, kv_heads=1, group=1)
    q, k, _ = problem.tied_tensors()
    sizes = gate.GateSizes(1, 15, 8172, is_causal=True)
    # The last candidates alone, since the interpreter takes 20 seconds for all.
    candidates = gate.Candidates(torch.full((1, 20), 7500, dtype=torch.int32))
    expected = gate.select_by_means(q, k, sizes, gate.GateOptions(), candidates)
    best = select_on_cuda(q, k, sizes, gate.GateOptions(), candidates)
    assert_bitwise_equal(best, expected)
    assert int(expected.max()) > 8100


@pytest.mark.parametrize(
    ("block_size", "topk", "q_len", "n_blocks", "dims", "options"),
    [
        (8, 3, 1, 40, (16, 16), gate.GateOptions()),
        (70, 6, 3, 5, (24, 40), gate.GateOptions("group", 1, 1)),
        (200, 1, 2, 3, (16, 16), gate.GateOptions()),
        (4, 9, 1, 300, (16, 16), gate.GateOptions(sink_blocks=3, local_blocks=2)),
        (8, 6, 2, 40, (16, 16), gate.GateOptions("group", 2, 3)),  # no block is left to score
    ],
)
def test_the_decoding_kernels_agree_with_plain_operations(
    block_size, topk, q_len, n_blocks, dims, options
):
    length = n_blocks * block_size
    problem = variant(
        batch=3, q_len=q_len, kv_len=length, block_size=block_size, head_dim=dims[0],
        value_dim=dims[1], dtype=torch.float32,
    )  # fmt: skip
    q, k, v = problem.tensors()
    means = gate.block_means(k, block_size)
    positions = torch.tensor([[length - q_len], [block_size], [0]]) + torch.arange(q_len)
    positions[1, 0], positions[2, -1] = -1, 2**30  # padding, and a query beyond the last block
    rows = gate.gate_rows(q, 2, options)
    rest = (k, v, means, positions.int(), rows, CachedCall(topk, 0.3, options, block_size))
    plain, plain_lse = attend_gathered(q, *rest)
    assert not plain[1, :, 0].any()
    assert plain[2, :, -1].isnan().all()
    out, lse = attend_step_on_cuda(q, *rest)
    torch.testing.assert_close(out, plain, equal_nan=True)
    torch.testing.assert_close(lse, plain_lse, equal_nan=True)


@pytest.mark.parametrize(("block_size", "n"), [(8, 1), (5, 13), (70, 2)])
def test_the_append_kernel_agrees_with_plain_operations(block_size, n):
    problem = variant(batch=2, kv_len=n, q_len=n, head_dim=24, value_dim=40, dtype=torch.float32)
    _, k, v = problem.tensors()
    plain, kernel = (
        MobaCache(2, 2, 24, value_dim=40, block_size=block_size, max_len=4 * block_size)
        for _ in range(2)
    )
    room = plain.capacity
    for x in (plain, kernel):
        x.lengths.copy_(torch.tensor([block_size - 1, room - n + 1]))
        x.k[:, :, :block_size] = 1.0
    expected = append_scattered(plain.k, plain.v, plain.means, plain.lengths, k, v, None)
    positions = append_on_cuda(kernel.k, kernel.v, kernel.means, kernel.lengths, k, v)
    assert_bitwise_equal(positions, expected)
    assert_bitwise_equal(kernel.lengths, plain.lengths)
    for x, y in ((kernel.k, plain.k), (kernel.v, plain.v)):
        assert_bitwise_equal(x[:, :, :room], y[:, :, :room])
    torch.testing.assert_close(kernel.means[:, :, :-1], plain.means[:, :, :-1])


@pytest.mark.parametrize("dim", [1, 16, 33])
@pytest.mark.parametrize("tokens_first", [True, False])
def test_rows_move(dim, tokens_first):
    x = torch.randn(2, 300, 3, dim).transpose(1, 2)
    x = x if tokens_first else x.contiguous()
    source = torch.randint(-1, 300, (2, 500), dtype=torch.int32)
    expected = x.gather(2, source.clamp(min=0).long()[:, None, :, None].expand(2, 3, 500, dim))
    expected = expected.masked_fill((source < 0)[:, None, :, None], 0.0)
    assert_bitwise_equal(move_on_cuda(x, source), expected)
