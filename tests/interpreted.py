"""The Triton kernels in Triton's interpreter, on CPU; `test_fused` runs this file.

The file needs its own process, because Triton selects its interpreter when it is imported.
"""

import functools
import importlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from flexmoba import MobaCache, gate, moba_select, selected_attention
from flexmoba.backends.flex import range_kernel
from flexmoba.backends.flex.range_mask import range_lists
from flexmoba.backends.fused import backward as backward_pass
from flexmoba.backends.fused import forward as forward_pass
from flexmoba.backends.fused import fused_attention, hopper, routing, schedule
from flexmoba.backends.grouped import grouped_attention, launches
from flexmoba.backends.options import AttentionOptions
from flexmoba.cache.append import append_scattered
from flexmoba.cache.append_kernels import append_on_cuda
from flexmoba.cache.decode import attend_gathered
from flexmoba.cache.kernels import (
    attend_step_on_cuda,
    attend_to_selected_on_cuda,
    select_step_on_cuda,
    split_size,
)
from flexmoba.cache.options import CachedCall
from flexmoba.distributed import ShardedMobaCache
from flexmoba.gate.kernel import rows_of_a_tile, select_on_cuda
from flexmoba.nsa import NsaCache, decode_on_cuda
from flexmoba.nsa import kernel as nsa_kernel
from flexmoba.nsa.append import append_scattered as append_to_nsa_scattered
from flexmoba.nsa.append_kernels import append_on_cuda as append_to_nsa_on_cuda
from flexmoba.nsa.branches import compressed_branch
from flexmoba.nsa.decode import attend_gathered as attend_nsa_gathered
from flexmoba.nsa.kernel import select_on_cuda as select_on_cuda_of_nsa
from flexmoba.nsa.select import select_in_slots
from flexmoba.nsa.sizes import NsaSizes
from flexmoba.nsa.tensors import BranchTensors, CacheState
from flexmoba.paged.append import append_scattered as append_to_pages
from flexmoba.paged.append_kernels import append_on_cuda as append_to_pages_on_cuda
from flexmoba.paged.attention import attend_steps_gathered
from flexmoba.paged.kernels import attend_steps_on_cuda
from flexmoba.reference import reference_attention, reference_mask, reference_selection
from flexmoba.selection import BlockSelection
from flexmoba.sequence.kernel import move_on_cuda
from tests import bounds, emulated, interpreter
from tests.conftest import (
    assert_as_exact_as,
    assert_as_exact_as_dense,
    assert_bitwise_equal,
)
from tests.problems import Problem, as_bools
from tests.ragged import Ragged

interpreter.shorten()

SMALL = Problem(
    kv_heads=2, group=2, q_len=200, kv_len=290, head_dim=16, value_dim=16, block_size=64, topk=3,
    dtype=torch.float16,
)  # fmt: skip


@pytest.fixture(autouse=True)
def sorts_by_torch(monkeypatch):
    """Sorts pairs by torch, since Triton's interpreter takes long; tests of the sort reset it."""
    monkeypatch.setattr(routing, "_MAX_COUNTS", 0)


@pytest.fixture(autouse=True)
def checked_bounds():
    """Tests that no kernel accesses memory outside of its arguments."""
    with bounds.checked():
        yield


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
        {"block_size": 100, "head_dim": 192, "value_dim": 128, "q_len": 130, "kv_len": 220},
        {"block_size": 32, "head_dim": 144, "value_dim": 256, "q_len": 130, "kv_len": 220},
        {"block_size": 150, "head_dim": 192, "value_dim": 192, "q_len": 130, "kv_len": 320},
        {"head_dim": 193, "value_dim": 33, "q_len": 70, "kv_len": 70, "group": 1},
        {"block_size": 70, "head_dim": 160, "value_dim": 136, "q_len": 130, "kv_len": 220},
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


@pytest.mark.parametrize(("scale", "block_size"), [(0.0, 50), (-0.3, 64), (-0.3, 150)])
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


@pytest.fixture
def launches_on_hopper(monkeypatch):
    """Emulates the warp-specialised kernels from block 128 on, and lists their names."""
    names = []

    def launch(kernel, *arguments):
        names.append(kernel.fn.__name__)
        emulated.launch(kernel, *arguments, seed=len(names))

    def descriptor(x, place, keys):
        strides = hopper.token_stride(x), 1
        return emulated.Descriptor(x.as_strided(place[:2], strides), (keys, x.shape[3]))

    monkeypatch.setattr(hopper, "_is_hopper", lambda _: True)
    monkeypatch.setattr(hopper, "_programs", lambda _: 3)
    monkeypatch.setattr(hopper, "_descriptor", descriptor)
    monkeypatch.setattr(hopper, "launch", launch)
    monkeypatch.setattr(hopper, "least_block", 128)
    monkeypatch.setattr(hopper, "least_backward_block", 128)
    return names


HOPPER = variant(q_len=400, kv_len=700, head_dim=64, value_dim=64, block_size=256, topk=2)


@pytest.mark.parametrize(
    ("changes", "item_rows"),
    [
        ({}, 1024),
        ({"group": 1, "head_dim": 128, "value_dim": 128}, 1024),
        ({"q_len": 230, "kv_len": 900, "kv_heads": 1, "group": 4}, 128),  # blocks of several items
        ({"batch": 2, "block_size": 384, "q_len": 500, "kv_len": 820, "kv_heads": 1}, 1024),
        ({"is_causal": False, "q_len": 150, "kv_len": 512}, 64),
    ],
)
def test_warp_specialised(changes, item_rows, launches_on_hopper, monkeypatch):
    monkeypatch.setattr(schedule, "ITEM_FACTOR", 0)
    monkeypatch.setattr(backward_pass, "_LEAST_ITEM", item_rows)
    problem = replace(HOPPER, **changes)
    check(problem, gated(problem))
    assert set(launches_on_hopper) == {
        "hopper_attend_kernel", "hopper_key_grads_kernel", "hopper_query_grads_kernel"
    }  # fmt: skip


def test_warp_specialised_with_queries_that_do_not_attend_to_their_own_block(launches_on_hopper):
    selection = gated(HOPPER)
    own = torch.rand(selection.shape[:3], generator=HOPPER.generator()) < 0.6
    drop = torch.rand(selection[..., 1:].shape, generator=HOPPER.generator()) < 0.3
    selection[..., 1:] = torch.where(drop, -1, selection[..., 1:])
    check(HOPPER, selection, own)
    assert "hopper_key_grads_kernel" in launches_on_hopper


@pytest.mark.parametrize(("block_size", "programs"), [(128, 3), (256, 40)])
def test_warp_specialised_items_do_not_mix(block_size, programs, launches_on_hopper, monkeypatch):
    """The first weights of an item are computed beside the last values of its predecessor."""
    monkeypatch.setattr(hopper, "_programs", lambda _: programs)  # 40: some have no item
    problem = replace(HOPPER, block_size=block_size)
    q, k, v = problem.tensors()
    selection = BlockSelection(gated(problem)[..., 1:], block_size)
    is_nan = torch.zeros(q.shape[:3], dtype=torch.bool)
    is_nan[..., ::60] = True
    results = [
        fused_attention(x, k, v, selection, AttentionOptions("fused", 0.3, True))
        for x in (q, q.masked_fill(is_nan[..., None], float("nan")))
    ]
    for x, y in zip(*results, strict=True):
        assert_bitwise_equal(x[~is_nan], y[~is_nan])
        assert y[is_nan].isnan().all()
    assert launches_on_hopper == ["hopper_attend_kernel"] * 2


def test_warp_specialised_in_pieces(launches_on_hopper, monkeypatch):
    for share in ("_SORTING_SHARE", "_TOTAL_SHARE"):
        monkeypatch.setattr(schedule, share, 0.01)
    monkeypatch.setattr(schedule, "_SMALL", 0)
    schedule.sort_groups.cache_clear()
    problem = replace(HOPPER, group=1, q_len=130, kv_len=600)
    check(problem, gated(problem))
    schedule.sort_groups.cache_clear()
    assert launches_on_hopper.count("hopper_query_grads_kernel") > 2


def test_warp_specialised_with_any_strides(launches_on_hopper):
    problem = replace(HOPPER, batch=2, kv_heads=1, q_len=350, kv_len=350)
    strided = [torch.nn.functional.pad(x, (0, 8))[..., :-8] for x in problem.tensors()]
    strided[0] = strided[0].transpose(1, 2).contiguous().transpose(1, 2)  # tokens first
    strided[1:] = (x[:1].expand(2, -1, -1, -1) for x in strided[1:])
    routed = gated(problem)[..., 1:]
    results = []
    for inputs in ([x.contiguous() for x in strided], strided):
        inputs = [x.detach().requires_grad_() for x in inputs]
        selection = BlockSelection(routed, problem.block_size)
        out, lse = fused_attention(*inputs, selection, AttentionOptions("fused", 0.3, True))
        results.append((out, *torch.autograd.grad((out, lse), inputs, (out.cos(), lse.cos()))))
    for x, y in zip(*results, strict=True):
        assert_bitwise_equal(x, y)
    assert launches_on_hopper.count("hopper_query_grads_kernel") == 2


@pytest.mark.parametrize(
    ("length", "block_size", "count", "tiles", "rows"),
    [
        (8192, 128, 7, 1, 1024),  # the least
        (32768, 128, 7, 1, 1792),  # a 2,048th of all
        (65536, 128, 7, 1, 3584),  # four times the average
        (8192, 512, 2, 4, 4096),  # four programs for each item
    ],
)
def test_rows_of_an_item(length, block_size, count, tiles, rows):
    sizes = schedule.Sizes(1, 16, 16, length, length, block_size, count, 128, 128)
    assert backward_pass._item_rows(sizes, tiles) == rows


@pytest.mark.parametrize(
    ("block_size", "sorting", "total", "forward", "backward"),
    [
        # The pieces of each sort group; in the backward pass, of those for keys, then for queries.
        (64, 0.01, 0.6, [1] * 4, [1] * 4),  # groups of one KV head
        (64, 0.01, 0.01, [1] * 12, [1] * 16),  # groups of 64 queries, and of one KV head for keys
        (150, 0.01, 0.01, [1] * 12, [1] * 16),
        (150, 4.0, 0.9, [4], [2]),  # one group, in pieces of KV heads
    ],
)
def test_in_pieces(monkeypatch, block_size, sorting, total, forward, backward):
    problem = variant(batch=2, group=1, q_len=130, kv_len=220, block_size=block_size)
    inputs = [*problem.tensors(), gated(problem)[..., 1:]]
    sizes = schedule.Sizes.of(*inputs, block_size)
    whole = results_of(*inputs, block_size)
    monkeypatch.setattr(schedule, "_SMALL", 0)
    monkeypatch.setattr(schedule, "_SORTING_SHARE", sorting)
    monkeypatch.setattr(schedule, "_TOTAL_SHARE", total)
    schedule.sort_groups.cache_clear()
    groups = schedule.sort_groups(sizes, (2 * sizes.value_dim + 4) * sizes.count)
    assert [len(group.pieces) for group in groups] == forward
    passes = list(backward_pass._passes(sizes, backward_pass._item_rows(sizes, 1)))
    assert [len(step.group.pieces) for step in passes] == backward
    separate = {(step.for_keys, step.for_queries) for step in passes} != {(True, True)}
    pieces = results_of(*inputs, block_size)
    schedule.sort_groups.cache_clear()
    for name, x in pieces.items():
        if name == "d_q" and separate and block_size <= 64:  # another kernel
            check(problem, gated(problem))
        else:
            assert_bitwise_equal(x, whole[name])


def results_of(q, k, v, routed, block_size, attend=fused_attention) -> dict[str, torch.Tensor]:
    """Returns the output, the log-sum-exp and the gradients of a causal call, by name."""
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    selection = BlockSelection(routed, block_size)
    results = attend(*inputs, selection, AttentionOptions("fused", 0.3, True))
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in results]
    names = ("out", "lse", "d_q", "d_k", "d_v")
    return dict(zip(names, (*results, *torch.autograd.grad(results, inputs, grads)), strict=True))


def test_plain_calls_and_operators_give_equal_results():
    inputs = [*SMALL.tensors(), gated(SMALL)[..., 1:]]
    plain = results_of(*inputs, SMALL.block_size)
    with FlopCounterMode(display=False) as counter:  # observes operators, so they are called
        observed = results_of(*inputs, SMALL.block_size)
    counts = counter.get_flop_counts()["Global"]
    operators = torch.ops.flexmoba
    assert {operators.attend_fused, operators.attend_fused_backward} <= set(counts)
    for name, x in observed.items():
        assert_bitwise_equal(x, plain[name])


def test_the_backward_pass_of_a_plain_call_uses_the_sorted_pairs(monkeypatch):
    sorts = []

    def sort(*arguments):
        sorts.append(arguments)
        return sort_pairs(*arguments)

    sort_pairs = routing.sort_pairs
    for module in (forward_pass, backward_pass):
        monkeypatch.setattr(module, "sort_pairs", sort)
    inputs = [*SMALL.tensors(), gated(SMALL)[..., 1:]]
    plain = results_of(*inputs, SMALL.block_size)
    assert len(sorts) == 1
    with FlopCounterMode(display=False):  # observes operators, which keep no pairs
        observed = results_of(*inputs, SMALL.block_size)
    assert len(sorts) == 3
    for name, x in observed.items():
        assert_bitwise_equal(x, plain[name])


def test_compiled_calls_give_the_results_of_plain_calls():
    inputs = [*SMALL.tensors(), gated(SMALL)[..., 1:]]
    plain = results_of(*inputs, SMALL.block_size)
    compiled = torch.compile(fused_attention, backend="aot_eager", fullgraph=True)
    for name, x in results_of(*inputs, SMALL.block_size, attend=compiled).items():
        assert_bitwise_equal(x, plain[name])


def test_plain_calls_can_be_checkpointed():
    inputs = [*SMALL.tensors(), gated(SMALL)[..., 1:]]
    plain = results_of(*inputs, SMALL.block_size)
    attend = functools.partial(checkpoint, fused_attention, use_reentrant=False)
    for name, x in results_of(*inputs, SMALL.block_size, attend=attend).items():
        assert_bitwise_equal(x, plain[name])


def test_plain_calls_have_no_second_derivatives():
    *inputs, routed = *SMALL.tensors(), gated(SMALL)[..., 1:]
    inputs = [x.requires_grad_() for x in inputs]
    selection = BlockSelection(routed, SMALL.block_size)
    out, _ = fused_attention(*inputs, selection, AttentionOptions("fused", 0.3, True))
    (grad,) = torch.autograd.grad(out.sum(), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="attention has no second derivatives"):
        grad.sum().backward()


@given(st.integers(0, 2**31), st.data())
@settings(max_examples=4, deadline=None)
def test_pairs_sorted_by_counting_are_those_of_the_sort(seed, data):
    group, kv_heads, batch = (data.draw(st.integers(1, 2)) for _ in range(3))
    q_len, count = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 4))
    n_blocks = data.draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(seed)
    shape = batch, group * kv_heads, q_len, count
    routed = torch.randint(-1, n_blocks, shape, generator=generator, dtype=torch.int32)
    problem = variant(
        batch=batch, kv_heads=kv_heads, group=group, q_len=q_len, kv_len=max(q_len, 16 * n_blocks)
    )
    sizes = schedule.Sizes.of(*problem.tensors(), routed, -(-problem.kv_len // n_blocks))
    routed = routed.clamp(max=sizes.n_blocks - 1)
    share = data.draw(st.sampled_from((0.01, 0.6, 9.0)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "_SMALL", 0)
        patch.setattr(schedule, "_SORTING_SHARE", share)
        patch.setattr(schedule, "_TOTAL_SHARE", share)
        schedule.sort_groups.cache_clear()
        groups = schedule.sort_groups(sizes, 50)
    schedule.sort_groups.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "_CHUNK", 64)
        for step in groups:
            by_sort = routing.sort_pairs(routed, step, sizes)
            patch.setattr(routing, "_MAX_COUNTS", 2**13)
            by_counting = routing.sort_pairs(routed, step, sizes)
            patch.setattr(routing, "_MAX_COUNTS", 0)
            for x, y in zip(
                (by_counting[0], *by_counting[1]), (by_sort[0], *by_sort[1]), strict=True
            ):
                assert_bitwise_equal(x, y)


def test_a_call_with_pairs_sorted_by_counting(monkeypatch):
    problem = variant(kv_heads=1, q_len=100, kv_len=190)
    inputs = [*problem.tensors(), gated(problem)[..., 1:]]
    expected = results_of(*inputs, problem.block_size)
    monkeypatch.setattr(routing, "_MAX_COUNTS", 2**13)
    monkeypatch.setattr(routing, "_CHUNK", 128)
    for name, x in results_of(*inputs, problem.block_size).items():
        assert_bitwise_equal(x, expected[name])


def sorted_by_block(block_size: int):
    """Returns the sort group of a selection, its sizes, and the first row of each bin."""
    problem = variant(block_size=block_size)
    routed = gated(problem)[..., 1:].contiguous()
    sizes = schedule.Sizes.of(*problem.tensors(), routed, block_size)
    (group,) = schedule.sort_groups(sizes, 0)
    bins, (_, first_rows) = routing.sort_pairs(routed, group, sizes)
    every_bin = torch.arange(group.n_kv_heads * (sizes.n_blocks + 1) + 1)
    assert_bitwise_equal(first_rows, torch.searchsorted(bins.long(), every_bin, out_int32=True))
    return group, sizes, first_rows


@pytest.mark.parametrize("block_size", [7, 20])
@pytest.mark.parametrize("rows", [3, 64])
def test_the_items_of_blocks_hold_all_rows_once(rows, block_size):
    group, sizes, first_rows = sorted_by_block(block_size)
    n_rows = first_rows.diff().view(group.n_kv_heads, -1)[:, :-1].flatten()  # no bin of no block
    items = (n_rows + rows - 1).div(rows, rounding_mode="floor").clamp(min=1)
    extra = torch.where(items > 1, items, 0)
    query_items = (n_rows + 1).div(2, rounding_mode="floor")
    of_keys, first_extra, of_queries = routing.items_of_blocks(first_rows, rows, 2, group, sizes)
    tables = (*of_keys, items), (first_extra, None, extra), (*of_queries, query_items)
    for first, block, counts in tables:
        end = int(counts.sum())
        assert first.tolist() == [0, *counts.cumsum(0).tolist()]
        if block is not None:
            every_block = torch.arange(len(counts), dtype=torch.int32)
            assert_bitwise_equal(block[:end], every_block.repeat_interleave(counts))
    without_queries = routing.items_of_blocks(first_rows, rows, None, group, sizes)
    assert without_queries.of_queries is None
    assert_bitwise_equal(without_queries.first_extra, first_extra)
    for x, y in zip(without_queries.of_keys, of_keys, strict=True):
        assert_bitwise_equal(x[: int(items.sum())], y[: int(items.sum())])


def test_a_block_that_all_queries_select_is_divided_into_items(monkeypatch):
    monkeypatch.setattr("flexmoba.backends.fused.backward._LEAST_ITEM", 16)
    monkeypatch.setattr("flexmoba.backends.fused.schedule.ITEM_FACTOR", 1)
    problem = variant(block_size=32)
    selection = gated(problem)
    selection[..., 1] = torch.where(selection[..., 0] > 0, 0, -1)
    selection[..., 2] = -1
    check(problem, selection)


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 0.3),
        ({"group": 1, "block_size": 20, "head_dim": 24, "value_dim": 33}, -0.3),
        (
            {"group": 17, "kv_heads": 1, "block_size": 70, "kv_len": 90},
            0.3,
        ),  # blocks of two tiles of keys
        ({"is_causal": False, "block_size": 40, "batch": 2, "kv_heads": 1, "q_len": 20}, 0.3),
        ({"q_len": 1, "topk": 5}, 0.0),
        ({"head_dim": 192, "value_dim": 128}, 0.3),
        ({"head_dim": 192, "value_dim": 192, "group": 8, "kv_heads": 1, "kv_len": 30}, -0.3),
        ({"head_dim": 160, "value_dim": 136, "group": 8, "kv_heads": 1, "kv_len": 30}, 0.3),
    ],
)
def test_a_shared_selection(monkeypatch, changes, scale):
    """Tests any selection, its blocks divided into items, and lists that are sorted by block."""
    monkeypatch.setattr("flexmoba.backends.grouped.launches._LEAST_ITEM", 16)
    monkeypatch.setattr("flexmoba.backends.fused.schedule.ITEM_FACTOR", 1)
    problem = variant(**({"q_len": 16, "kv_len": 50, "block_size": 16} | changes))
    q, k, v = problem.tensors()
    selection = problem.selection()[:, :: problem.group].contiguous()
    selection[selection == 1] = -1
    selection[..., 0] = 1  # a block that all tokens select

    def attend(q, k, v):
        options = (problem.block_size, scale, problem.is_causal)
        return grouped_attention(q, k, v, selection, *options)

    mask = problem.mask_of(selection.repeat_interleave(problem.group, 1))
    assert_as_exact_as_dense(attend, q, k, v, mask, scale=scale, gradients=True)


def test_gradients_of_the_output_alone():
    """Tests a loss that does not use the log-sum-exp, which then has no gradient."""
    problem = variant(q_len=16, kv_len=50, block_size=16)
    inputs = problem.tensors(requires_grad=True)
    selection = problem.selection()[:, :: problem.group].contiguous()
    out, lse = grouped_attention(*inputs, selection, 16, 0.3, True)
    alone = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    with_zeros = torch.autograd.grad(out.sum() + 0 * lse.sum(), inputs)
    for first, second in zip(alone, with_zeros, strict=True):
        assert_bitwise_equal(first, second)


@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(0, 40), st.data())
@settings(max_examples=5, deadline=None, phases=[Phase.generate])  # shrinking takes minutes
def test_a_token_does_not_depend_on_its_neighbors(seed, q_len, before, data):
    """Compares bits after all other tokens, the keys that they see, and the columns change."""
    block_size, group = data.draw(st.sampled_from((3, 16, 20))), data.draw(st.sampled_from((2, 16)))
    problem = variant(
        batch=1, kv_heads=1, group=group, q_len=q_len, kv_len=q_len + before,
        block_size=block_size, topk=data.draw(st.integers(1, 4)), seed=seed,
    )  # fmt: skip
    q, k, v = problem.tensors()
    selection = problem.selection()[:, :1].contiguous()
    selection[..., 0] = torch.where((selection == 0).any(-1), -1, 0)  # most share a block
    token = data.draw(st.integers(0, q_len - 1))
    alone, others = torch.arange(q_len) == token, torch.arange(q_len) != token
    # The interpreter takes two seconds for the gradients.
    attend = data.draw(st.sampled_from((attend_with_grads, *3 * [grouped_attention])))
    options = (block_size, 0.3, True)
    expected = attend(q, k, v, selection, *options)

    unseen = ~problem.mask_of(selection)[0, 0, token]
    k, v = (x.masked_fill(unseen[:, None], torch.nan) for x in (k, v))
    q = q.masked_fill(others[:, None], torch.nan)
    changed = replace(problem, seed=seed + 1).selection()[:, :1]
    selection = torch.where(alone[:, None], selection.flip(-1), changed).contiguous()
    for x, y in zip(attend(q, k, v, selection, *options), expected, strict=True):
        assert_bitwise_equal(x[:, :, token], y[:, :, token])


@pytest.mark.parametrize("value_dim", [128, 192])
def test_later_keys_change_no_bits_of_split_head_dims(value_dim):
    """Tests both kinds of kernels, which divide 192 dims into parts."""
    problem = variant(
        kv_heads=1, group=8, q_len=40, kv_len=50, head_dim=192, value_dim=value_dim, block_size=20
    )
    q, k, v = problem.tensors()
    later = torch.arange(problem.kv_len)[:, None] > 33  # the position of query 23
    changed = [torch.where(later, x.flip(2), x) for x in (k, v)]
    selection = problem.selection()[:, :1].contiguous()
    own = torch.arange(problem.offset, problem.kv_len)[:, None] // problem.block_size
    routed = torch.where(selection < own, selection, -1).repeat_interleave(8, 1)

    def attend_fused(q, k, v):
        q = q.detach().requires_grad_()
        options = AttentionOptions("fused", 0.3, True)
        out, lse = fused_attention(q, k, v, BlockSelection(routed, 20), options)
        (d_q,) = torch.autograd.grad(out.square().sum() + lse.sum(), q)
        return out.detach(), lse.detach(), d_q

    def attend_grouped(q, k, v):
        return attend_with_grads(q, k, v, selection, 20, 0.3, True)

    for attend in (attend_fused, attend_grouped):
        for x, y in zip(attend(q, k, v), attend(q, *changed), strict=True):
            assert_bitwise_equal(x[:, :, :24], y[:, :, :24])
            assert (x[:, :, 30:] != y[:, :, 30:]).any()


def attend_with_grads(q, *arguments) -> tuple[torch.Tensor, ...]:
    """Returns the output, the log-sum-exp, and the gradients of the queries."""
    q = q.detach().requires_grad_()
    out, lse = grouped_attention(q, *arguments)
    (d_q,) = torch.autograd.grad(out.square().sum() + lse.sum(), q)
    return out.detach(), lse.detach(), d_q


@pytest.mark.parametrize(("tokens", "count"), [(1, 3), (4, 5), (8, 2)])
def test_the_blocks_of_a_tile_are_listed_once(tokens, count):
    problem = variant(batch=2, kv_heads=1, group=1, q_len=21, kv_len=400, topk=count, block_size=16)
    selection = problem.selection()
    sizes = {"COUNT": count, "TOKENS": tokens, "LIST": tokens * 8, "num_stages": 1}
    entries, lengths = launches._listed_blocks(selection, sizes)
    tiles = [tile for rows in selection[:, 0] for tile in rows.split(tokens)]
    assert lengths.shape == (len(tiles),)
    for tile, row, length in zip(tiles, entries, lengths, strict=True):
        blocks = sorted(set(tile[tile >= 0].tolist()))
        expected = [
            (block << tokens) + sum(1 << i for i, own in enumerate(tile) if block in own)
            for block in blocks
        ]
        assert row[:length].tolist() == expected


def test_the_kernels_for_shared_selections_are_called(monkeypatch):
    """Tests documents in a layout, and head dims above 128."""
    counted = Counted()
    for name in ("attend", "choice"):
        module = importlib.import_module(f"flexmoba.backends.{name}")
        monkeypatch.setattr(module, "supports_grouped", lambda *_, **__: True)
        monkeypatch.setattr(module, "grouped_attention", counted, raising=False)
    problem = variant(q_len=40, kv_len=40, head_dim=144, group=8, kv_heads=1, block_size=16)
    q, k, v = problem.tensors()
    bounds = torch.tensor([0, 25, 40])
    selection = torch.tensor([0, 1, 2]).expand(1, 1, 40, 3)
    options = {"block_size": 16, "cu_seqlens": bounds}
    out = selected_attention(q, k, v, selection, **options)
    assert counted.calls == 1
    repeated = selection.expand(1, 8, 40, 3)
    expected = selected_attention(q, k, v, repeated, **options, impl="portable")
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-3)


class Counted:
    """Counts the calls of `grouped_attention`."""

    calls = 0

    def __call__(self, *arguments):
        self.calls += 1
        return grouped_attention(*arguments)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("block_size", "count", "options"),
    [
        (16, 3, gate.GateOptions()),
        (7, 12, gate.GateOptions(sink_blocks=2, local_blocks=3)),
        (128, 1, gate.GateOptions("tile", sink_blocks=1)),
        (16, 3, gate.GateOptions("group")),
        (16, 3, gate.GateOptions(sink_blocks=1, sub_blocks=4)),
        (30, 2, gate.GateOptions("group", sub_blocks=3)),
    ],
)
def test_the_gate_kernel_agrees_with_the_plain_gate(block_size, count, options, is_causal):
    problem = variant(block_size=block_size, q_len=100, kv_len=228)
    sub_block_size = block_size // options.sub_blocks
    q, k, _ = replace(problem, block_size=sub_block_size).tied_tensors()
    k[:, 0, 35] = torch.nan  # the highest score, in one sub-block
    means = gate.block_means(k, block_size, sub_blocks=options.sub_blocks)
    rows = gate.gate_rows(q, 2, options)
    if not is_causal:
        options = options._replace(local_blocks=0)
    first = (torch.arange(rows.shape[2]) // 25)[None].int()
    spans = [(None, None), (first, (first + 7).clamp(max=problem.n_blocks))]
    if is_causal:
        spans.append((first, None))
    sizes = gate.GateSizes(block_size, count + 5, 128, is_causal)
    scored = sizes.scored(options)
    for span in spans:
        candidates = gate.Candidates(*span)
        expected = gate.select_by_means(rows, means, sizes, options, candidates)
        best = select_on_cuda(rows, means.to(rows.dtype), sizes, options, candidates)
        assert_bitwise_equal(best, expected[..., -scored:])


@pytest.mark.parametrize("options", [gate.GateOptions("group"), gate.GateOptions(sub_blocks=2)])
def test_the_gate_with_tiles_for_99_kib(monkeypatch, options):
    """Tests float32 rows of more than 128 dims, of which a program scores 32 there."""
    monkeypatch.setattr("flexmoba.gate.kernel.has_large_shared_memory", lambda _: False)
    dtype = torch.half if options.per == "group" else torch.float32
    sizes = {"q_len": 100, "kv_len": 228, "block_size": 16, "head_dim": 136, "group": 4}
    q, k, v = variant(**sizes, dtype=dtype).tied_tensors()
    means = gate.block_means(k, 16, sub_blocks=options.sub_blocks)
    rows, sizes = gate.gate_rows(q, 2, options), gate.GateSizes(16, 4, 128, is_causal=True)
    assert (rows_of_a_tile(rows), rows_of_a_tile(rows.half())) == (32, 64)
    expected = gate.select_by_means(rows, means, sizes, options)
    best = select_on_cuda(rows, means, sizes, options, gate.Candidates())
    assert_bitwise_equal(best, expected)
    positions = torch.arange(211, 227, dtype=torch.int32)[None]  # a step of 64 rows a KV head
    rest = k[:, :, :224], v[:, :, :224], means[:, :, : 14 * options.sub_blocks], positions
    rest += gate.gate_rows(q[:, :, :16], 2, options), CachedCall(5, 0.3, options, 16)
    out, lse = attend_step_on_cuda(q[:, :, :16], *rest)
    plain, plain_lse = attend_gathered(q[:, :, :16], *rest)
    torch.testing.assert_close(out, plain, equal_nan=True)
    torch.testing.assert_close(lse, plain_lse, equal_nan=True)


@pytest.mark.parametrize(
    ("count", "doubles"),
    [(1, True), (2, True), (7, True), (7, False), (16, True), (17, True), (31, False)],
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
    ("changes", "sizes"),
    [
        ({}, (8, 4, 16, 6, 1, 1)),
        ({"group": 3, "kv_heads": 1, "q_len": 70}, (6, 6, 6, 9, 2, 0)),
        ({"group": 1, "head_dim": 40, "dtype": torch.float32}, (12, 2, 8, 5, 0, 2)),
        ({"group": 1, "head_dim": 40}, (12, 2, 8, 5, 0, 2)),  # overlaps of two later blocks
        ({"group": 1, "kv_len": 520, "q_len": 20}, (4, 2, 4, 14, 1, 1)),  # three tiles
        (
            {"group": 1, "kv_heads": 1, "q_len": 30, "kv_len": 150},
            (4, 2, 4, 20, 1, 1),
        ),  # more blocks than a list holds
        ({"q_len": 1, "batch": 2}, (32, 16, 64, 5, 1, 1)),
        ({"q_len": 150, "head_dim": 32}, (18, 6, 18, 5, 1, 1)),  # three places for each block
        ({"q_len": 140, "kv_len": 140, "head_dim": 136}, (4, 4, 64, 3, 0, 0)),
        ({"q_len": 140, "kv_len": 140, "head_dim": 192}, (4, 4, 64, 3, 0, 0)),
        ({"q_len": 140, "kv_len": 140, "head_dim": 200}, (4, 4, 64, 3, 0, 0)),
    ],
)
@pytest.mark.parametrize("documents", [False, True])
def test_the_selection_kernels_of_nsa(changes, sizes, documents):
    """Tests the kernels with and without a log-sum-exp against plain operations in float64."""
    problem, sizes = variant(**changes), NsaSizes(*sizes)
    offset, length = problem.kv_len - problem.q_len, problem.kv_len
    q, k, _ = problem.tensors()
    k_cmp = k[:, :, : sizes.compressed_blocks(length)]
    first = None
    if documents:
        position = torch.arange(offset, length)
        first = (position // sizes.block_size // 3 * 3).int().expand(problem.batch, -1)
    options = (length, first, sizes, 0.3)
    expected = select_in_slots(q.double(), k_cmp.double(), *options)
    lse = compressed_branch(
        q.double(), k_cmp.double(), k_cmp.double(), length, None, sizes, 0.3, "portable"
    )[1]
    for known in (None, lse.float()) if first is None else (None,):
        best = select_on_cuda_of_nsa(q, k_cmp, first, known, length, sizes, 0.3)
        assert best.dtype == torch.int32
        assert_bitwise_equal(best, expected)


@pytest.mark.parametrize(
    ("dtype", "dim", "expected"),
    [
        (torch.half, 256, (True, True)),
        (torch.half, 257, (False, False)),
        (torch.float32, 64, (True, True)),
        (torch.float32, 65, (True, False)),
        (torch.float32, 192, (True, False)),
        (torch.float32, 193, (False, False)),
    ],
)
def test_the_selection_kernels_fit_in_shared_memory(monkeypatch, dtype, dim, expected):
    """Tests the limits for 227 and for 99 KiB, as compiled for sm_90; beyond, a call would fail."""
    q, sizes = torch.empty(1, 1, 1, dim, dtype=dtype), NsaSizes(32, 16, 64, 16, 1, 1)
    found = []
    for is_large in (True, False):
        monkeypatch.setattr(nsa_kernel, "has_large_shared_memory", lambda _, x=is_large: x)
        found.append(nsa_kernel.supports(q, sizes))
    assert tuple(found) == expected


def test_the_selection_kernels_with_tiles_for_99_kib(monkeypatch):
    monkeypatch.setattr(nsa_kernel, "has_large_shared_memory", lambda _: False)
    changes = {"q_len": 140, "kv_len": 140, "head_dim": 192}
    test_the_selection_kernels_of_nsa(changes, (4, 4, 64, 3, 0, 0), documents=False)


@given(
    *(st.integers(1, 600), st.integers(1, 1500), st.integers(-200, 600), st.integers(0, 4)),
    *(st.sampled_from((2, 128)), st.integers(0, 2**32 - 1)),
)
@settings(max_examples=25, deadline=None, phases=[Phase.generate])
def test_the_kernel_of_range_lists(q_len, kv_len, blind, count, columns, seed):
    """Tests the lists of every visited and other block, bit for bit, with and without documents."""
    generator = torch.Generator().manual_seed(seed)
    position = torch.arange(q_len, dtype=torch.int32)
    end = ((position - blind) * kv_len // q_len).clamp(max=kv_len)
    first = None
    if count:
        starts = torch.randint(q_len, (2, count, 1), generator=generator)
        first = torch.where(starts <= position, end[starts.squeeze(-1)][..., None].clamp(min=0), 0)
        first = first.amax(1).int() + 2
    expected = range_lists(first, end, kv_len, True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(range_kernel, "_COLUMNS", columns)
        lists = [
            x
            for transposed in (False, True)
            for x in range_kernel.range_lists_on_cuda(first, end, kv_len, transposed=transposed)
        ]
    for actual, x in zip(lists, expected, strict=True):
        assert_bitwise_equal(actual, x)


def test_ties_and_nan_in_the_selection_kernels_of_nsa():
    """Tests equal weights, weights of 0, and NaN, against plain operations."""
    sizes = NsaSizes(8, 4, 16, 8, 1, 1)
    problem = variant(q_len=150, kv_len=150, group=1, dtype=torch.float32)
    q, k, _ = problem.tensors()
    k_cmp = k[:, :, : sizes.compressed_blocks(150)]
    broken = k_cmp.index_fill(2, torch.tensor([30]), torch.nan)
    # The highest scores are often equal, and all other weights are 0.
    one_hot = 1e4 * q.round(), k_cmp.sign()
    for queries, keys in ((q * 0, k_cmp), one_hot, (q, broken)):
        expected = select_in_slots(queries, keys, 150, None, sizes, 0.3)
        best = select_on_cuda_of_nsa(queries, keys, None, None, 150, sizes, 0.3)
        assert_bitwise_equal(best, expected)


@pytest.mark.parametrize(
    ("changes", "sizes", "window"),
    [
        ({}, (8, 4, 16, 6, 1, 1), 20),
        ({"group": 3, "q_len": 3, "head_dim": 24, "value_dim": 40}, (6, 6, 6, 9, 2, 0), 1),
        ({"group": 1, "kv_len": 150}, (12, 2, 8, 5, 0, 2), 300),  # a window of several chunks
        ({"group": 17, "kv_heads": 1}, (32, 16, 160, 3, 1, 1), 33),  # blocks of two chunks
        ({"q_len": 2, "kv_len": 600}, (4, 4, 4, 4, 1, 2), 7),  # no block is left to score
        ({"kv_len": 900, "kv_heads": 1}, (4, 2, 4, 9, 1, 1), 9),  # several splits
        ({"kv_len": 20}, (32, 16, 20, 3, 1, 0), 9),  # no compressed block
        ({"q_len": 2}, (8, 4, 16, 6, 1, 1), 0),
        ({"kv_len": 32}, (8, 4, 16, 6, 1, 1), 20),  # a local block that is a sink block
    ],
)
def test_the_decoding_kernels_of_nsa(monkeypatch, changes, sizes, window):
    """Tests rows of different lengths, padding, a query beyond the capacity, and NaN after rows."""
    monkeypatch.setattr(decode_on_cuda, "_PROGRAMS", 32)
    problem = variant(**({"batch": 3, "q_len": 1, "dtype": torch.float32} | changes))
    sizes, n = NsaSizes(*sizes), problem.q_len
    capacity = problem.kv_len // sizes.block_size * sizes.block_size
    lengths = torch.tensor([capacity, capacity // 2, n])
    positions = (lengths[:, None] + torch.arange(-n, 0)).int()
    positions[1, 0] = -1
    if n > 1:
        positions[2, -1] = 2**30
    generator, heads = problem.generator(), problem.kv_heads
    dims = problem.head_dim, problem.value_dim
    n_compressed, ring = sizes.compressed_blocks(capacity), window + 15 if window else -1
    keys = [capacity + sizes.block_size] * 2 + [n_compressed + 1] * 2 + [ring + 1] * 2
    cache = BranchTensors(
        *(
            torch.randn(3, heads, length, dims[i % 2], generator=generator)
            for i, length in enumerate(keys)
        )
    )
    for row, length in enumerate(lengths.tolist()):
        for i, end in enumerate((length, sizes.compressed_blocks(length), min(length, ring))):
            for x in cache[2 * i : 2 * i + 2]:
                x[row, :, end:] = torch.nan
    q = torch.randn(3, problem.heads, n, dims[0], generator=generator)
    gates = torch.rand(3, problem.heads if n == 1 else 1, n, 3, generator=generator)
    gates[1, :, 0] = torch.nan
    call = (q, gates, positions, cache, sizes, window, -0.3)
    expected = attend_nsa_gathered(*call)
    assert not expected[0][1, :, 0].any()
    assert n == 1 or expected[0][2, :, -1].isnan().all()
    for actual, x in zip(decode_on_cuda.attend_step_on_cuda(*call), expected, strict=True):
        torch.testing.assert_close(actual, x, equal_nan=True)


@pytest.mark.parametrize(
    ("sizes", "n", "lengths"),
    [
        ((32, 16, 32), 1, (0, 31, 63)),  # no token, a first compressed block, the last token
        ((48, 4, 8), 13, (2, 40, 60)),  # several blocks; beyond the capacity
        ((1, 1, 3), 2, (0, 5, 16)),  # no tail
        ((36, 12, 12), 16, (35, 20, 7)),  # a tail of two tiles
    ],
)
@pytest.mark.parametrize(("means", "window"), [(False, 5), (True, 5), (False, 0)])
def test_the_append_kernels_of_nsa_are_plain_operations(sizes, n, lengths, means, window):
    """Tests a compression that depends on the order of tokens and on positions, and means.

    The results are bitwise equal, but for means, which add tokens in another order.
    """

    def weighted(k, v, positions):
        weight = torch.arange(1.0, sizes[0] + 1)[:, None]
        k, v = ((x * weight).sum(2, keepdim=True) for x in (k, v))
        return k + positions.view(-1, 1, 1, 1), v

    compress = None if means else weighted
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    names = ("cmp_block", "cmp_stride", "block_size")
    options = dict(zip(names, sizes, strict=True)) | {"window": window, "value_dim": 12}
    plain, kernels = (NsaCache(3, 2, 24, max_len=60, **options) for _ in range(2))
    results = []
    # As from projections of all branches, with the heads of a token side by side.
    keys, values = (normal(3, n, 3, 2, dim).permute(2, 0, 3, 1, 4) for dim in (24, 12))
    new = BranchTensors(*(x for pair in zip(keys, values, strict=True) for x in pair))
    old = [normal(*x.shape) for x in (*plain._branches, *plain._tail)]
    for cache, append in ((plain, append_to_nsa_scattered), (kernels, append_to_nsa_on_cuda)):
        for x, y in zip((*cache._branches, *cache._tail), old, strict=True):
            x.copy_(y)
        cache.lengths.copy_(torch.tensor(lengths))
        state = CacheState(cache._branches, cache._tail, cache.lengths)
        if append is append_to_nsa_scattered:
            positions, _ = append(state, new, None, cache.sizes, window, compress)
        else:
            positions = append(state, new, cache.sizes, compress)
        results.append([positions, cache.lengths, *cache._tail, *cache._branches])
    # Nothing reads the last block, the last compressed block, and the last entry of the ring.
    ends = [None] * 4 + [-sizes[2]] * 2 + [-1] * 4
    for i, (actual, expected, end) in enumerate(zip(*results, ends, strict=True)):
        if end is not None:
            actual, expected = actual[:, :, :end], expected[:, :, :end]
        if means and i in (6, 7):
            torch.testing.assert_close(actual, expected)
        else:
            assert_bitwise_equal(actual, expected)


@pytest.mark.parametrize(
    ("block_size", "topk", "q_len", "n_blocks", "dims", "options"),
    [
        (8, 3, 1, 40, (16, 16), gate.GateOptions()),
        (70, 6, 3, 5, (24, 40), gate.GateOptions("group", 1, 1)),
        (200, 1, 2, 3, (16, 16), gate.GateOptions()),
        (4, 9, 1, 300, (16, 16), gate.GateOptions(sink_blocks=3, local_blocks=2)),
        (8, 6, 2, 40, (16, 16), gate.GateOptions("group", 2, 3)),  # no block is left to score
        (12, 4, 2, 150, (16, 24), gate.GateOptions(local_blocks=1, sub_blocks=3)),
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
    means = gate.block_means(k, block_size, sub_blocks=options.sub_blocks)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("block_size", "topk", "q_len", "n_blocks", "options"),
    [
        (8, 3, 1, 40, gate.GateOptions()),
        (4, 9, 3, 300, gate.GateOptions(sink_blocks=3, local_blocks=2)),  # three splits
        (4, 6, 16, 7, gate.GateOptions("group", 1, 1)),
        (8, 6, 2, 40, gate.GateOptions("group", 2, 3)),  # no block is left to score
        (8, 19, 1, 140, gate.GateOptions(sink_blocks=1, sub_blocks=4)),
        (12, 4, 14, 150, gate.GateOptions("group", local_blocks=1, sub_blocks=3)),
    ],
)
def test_the_selection_of_a_step_is_that_of_the_gate(
    block_size, topk, q_len, n_blocks, options, dtype
):
    sub_block_size, length = block_size // options.sub_blocks, n_blocks * block_size - 2
    sizes = {"q_len": q_len, "kv_len": length, "block_size": sub_block_size}
    q, k, _ = variant(batch=2, **sizes, dtype=dtype).tied_tensors()
    means = gate.block_means(k, block_size, sub_blocks=options.sub_blocks)
    means = torch.nn.functional.pad(means, (0, 0, 0, options.sub_blocks), value=torch.nan)
    rows, lengths = gate.gate_rows(q, 2, options), (length, length - block_size)
    positions = torch.stack([torch.arange(n - q_len, n, dtype=torch.int32) for n in lengths])
    call = CachedCall(topk, 0.3, options, block_size)
    selected = select_step_on_cuda(rows, means, positions, call)
    for i, n in enumerate(lengths):
        row = slice(i, i + 1)
        sizes = gate.GateSizes(block_size, topk - 1, n - q_len, is_causal=True)
        plain = gate.select_by_means(rows[row], means[row], sizes, options)
        assert_bitwise_equal(selected[row, ..., 1:], plain)
        every_query = gate.expand_rows(selected[row], 4, q_len, options)
        expected = reference_selection(
            *(q[row], k[row, :, :n], block_size, topk),
            is_causal=True,
            gate=options.per,
            gate_block_size=sub_block_size,
            sink_blocks=options.sink_blocks,
            local_blocks=options.local_blocks,
        )
        assert_bitwise_equal(as_bools(every_query, n_blocks - i), expected)
    positions[0], positions[1] = -1, 2**30  # padding, and beyond the last block
    assert (select_step_on_cuda(rows, means, positions, call) == -1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("group", "q_len", "topk", "n_blocks", "options"),
    [
        (1, 1, 2, 20, gate.GateOptions()),  # fewer blocks than a tile, and a slot alone
        (1, 3, 9, 170, gate.GateOptions(sink_blocks=1)),
        (2, 1, 20, 170, gate.GateOptions(local_blocks=1)),
        (3, 1, 64, 170, gate.GateOptions()),
        (1, 2, 64, 90, gate.GateOptions(sub_blocks=4)),  # tiles of 64 blocks
        (5, 1, 9, 33, gate.GateOptions("group")),
        (5, 2, 3, 170, gate.GateOptions(sub_blocks=2)),
        (8, 1, 17, 70, gate.GateOptions(sub_blocks=3)),
        (16, 1, 6, 130, gate.GateOptions(sink_blocks=1)),
        (17, 1, 9, 40, gate.GateOptions()),  # two tiles of queries
    ],
)
def test_a_step_keeps_the_best_blocks_of_every_query(group, q_len, topk, n_blocks, options, dtype):
    """Tests numbers of rows that score the same mean keys, with ties, NaN and infinity."""
    generator = torch.Generator().manual_seed(0)
    heads = 2 * (group if options.per == "token" else 1)

    def integers(*shape):
        return torch.randint(-2, 3, shape, generator=generator).to(dtype)

    rows, means = integers(2, heads, q_len, 16), integers(2, 2, n_blocks * options.sub_blocks, 16)
    means[0, 0, 5 * options.sub_blocks] = torch.nan
    means[0, 1, 7 * options.sub_blocks, 0] = torch.inf
    call = CachedCall(topk, 0.3, options, 4)
    first = torch.tensor([4 * n_blocks - q_len, 30])
    positions = (first[:, None] + torch.arange(q_len)).int()
    selected = select_step_on_cuda(rows, means, positions, call)
    for i, x in enumerate(first.tolist()):
        row = slice(i, i + 1)
        sizes = gate.GateSizes(4, topk - 1, x, is_causal=True)
        plain = gate.select_by_means(rows[row], means[row], sizes, options)
        assert_bitwise_equal(selected[row, ..., 1:], plain)


@pytest.mark.parametrize(("ranks", "prompt"), [(1, 240), (2, 240), (3, 3)])
def test_steps_of_a_cache_over_ranks(monkeypatch, ranks, prompt):
    """Computes the partial output of one rank after the other, and merges them."""
    by_kernels = []

    def attend(q, *rest):
        by_kernels.append(q.shape[2])
        return attend_to_selected_on_cuda(q, *rest)

    monkeypatch.setattr("flexmoba.cache.kernels.attend_to_selected_on_cuda", attend)
    monkeypatch.setattr("flexmoba.cache.kernels._CHUNK", 5)  # a block of 8 keys has two chunks
    monkeypatch.setattr("flexmoba.distributed.cache.MAX_STEP_QUERIES", 6)
    monkeypatch.setattr("flexmoba.distributed.cache.has_kernels", lambda *_: True)
    monkeypatch.setattr("flexmoba.distributed.cache.check_mesh", lambda _: None)
    monkeypatch.setattr(ShardedMobaCache, "_merged", lambda _, *partial: partial)
    problem = variant(
        batch=2, q_len=260, kv_len=260, block_size=2, value_dim=24, dtype=torch.float32
    )
    q, k, v = problem.tied_tensors()
    sizes = {"block_size": 8, "gate_block_size": 2, "max_len": 530, "value_dim": 24}
    caches = []
    for rank in range(ranks):
        mesh = SimpleNamespace(get_local_rank=lambda x=rank: x, size=lambda: ranks)
        caches.append(ShardedMobaCache(mesh, 2, 2, 16, **sizes, device="cpu"))
        caches[-1].k.fill_(torch.nan)
        caches[-1].v.fill_(torch.nan)
        caches[-1]._append(k[:, :, :prompt], v[:, :, :prompt])
    first = prompt
    steps = (1, "token", 5), (6, "group", 5), (7, "token", 5), (3, "token", 5), (2, "token", 65)
    for n, per, topk in steps:
        end = first + n
        new = q[:, :, first:end], k[:, :, first:end], v[:, :, first:end]
        forced = {"gate": per, "sink_blocks": 1, "local_blocks": 1}
        partials = [cache.attend(*new, topk, **forced) for cache in caches]
        outs, lses = (torch.stack(x) for x in zip(*partials, strict=True))
        lse = lses.logsumexp(0)
        out = (outs * (lses - lse).exp()[..., None]).sum(0)
        keys = k[:, :, :end]
        selected = reference_selection(
            new[0], keys, 8, topk, is_causal=True, gate_block_size=2, **forced
        )
        mask = reference_mask(selected, 8, end, is_causal=True)
        expected = reference_attention(new[0], keys, v[:, :, :end], mask)
        for actual, x in zip((out, lse), expected, strict=True):
            torch.testing.assert_close(actual, x)
        first = end
    assert by_kernels == [n for n in (1, 6, 3) for _ in caches]


@pytest.mark.parametrize(
    ("block_size", "n", "sub_blocks"), [(8, 1, 1), (5, 13, 1), (70, 2, 1), (8, 7, 4), (70, 2, 2)]
)
def test_the_append_kernel_agrees_with_plain_operations(block_size, n, sub_blocks):
    problem = variant(batch=2, kv_len=n, q_len=n, head_dim=24, value_dim=40, dtype=torch.float32)
    _, k, v = problem.tensors()
    plain, kernel = (
        MobaCache(
            *(2, 2, 24),
            value_dim=40,
            block_size=block_size,
            gate_block_size=block_size // sub_blocks,
            max_len=4 * block_size,
        )
        for _ in range(2)
    )
    room = plain.capacity
    for x in (plain, kernel):
        x.lengths.copy_(torch.tensor([block_size - 1, room - n + 1]))
        x.k[:, :, :block_size] = 1.0
    expected = append_scattered(
        *(plain.k, plain.v, plain.means, plain.lengths, k, v, None, sub_blocks)
    )
    positions = append_on_cuda(
        *(kernel.k, kernel.v, kernel.means, kernel.lengths, k, v, sub_blocks)
    )
    assert_bitwise_equal(positions, expected)
    assert_bitwise_equal(kernel.lengths, plain.lengths)
    for x, y in ((kernel.k, plain.k), (kernel.v, plain.v)):
        assert_bitwise_equal(x[:, :, :room], y[:, :, :room])
    torch.testing.assert_close(kernel.means[:, :, :-sub_blocks], plain.means[:, :, :-sub_blocks])


STEPS = Ragged(
    sequences=((26, 1), (0, 1), (7, 2)), shared=1, padding=1, kv_heads=1, head_dim=16,
    value_dim=16, dtype=torch.float32,
)  # fmt: skip


@pytest.mark.parametrize(
    ("n_blocks", "sub_blocks", "expected"),
    [(1024, 1, 128), (1024, 8, 64), (256, 8, 32), (256, 3, 64), (4096, 8, 256), (100, 64, 32)],
)
def test_splits_hold_at_least_128_mean_keys_and_a_tile(n_blocks, sub_blocks, expected):
    assert split_size(n_blocks, sub_blocks, 32) == expected
    assert split_size(n_blocks, sub_blocks, 512) == 512


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"kv_heads": 2}, gate.GateOptions()),
        ({"layout": "head-major", "head_dim": 24, "value_dim": 40}, gate.GateOptions("group", 1)),
        ({"layout": "token-major", "group": 3, "topk": 4}, gate.GateOptions("token", 1, 1)),
        ({"block_size": 270, "sequences": ((541, 1),), "topk": 2}, gate.GateOptions()),
        ({"block_size": 1, "sequences": ((40, 1), (19, 2)), "topk": 6}, gate.GateOptions()),
        ({"topk": 2}, gate.GateOptions("token", 1)),  # no block is left to score
        ({"topk": None, "layout": "token-major", "kv_heads": 2}, gate.GateOptions()),
        ({"topk": None, "block_size": 70, "sequences": ((230, 1), (3, 1))}, gate.GateOptions()),
        ({"kv_heads": 2, "gate_block_size": 1}, gate.GateOptions()),
        ({"layout": "token-major", "kv_heads": 2, "gate_block_size": 2},
         gate.GateOptions("group", 1)),
        ({"layout": "head-major", "block_size": 6, "gate_block_size": 2, "sequences": ((260, 3),)},
         gate.GateOptions()),
        ({"block_size": 2, "gate_block_size": 1, "sequences": ((1100, 1),)},  # splits of two tiles
         gate.GateOptions()),
        ({"block_size": 1, "group": 17, "sequences": ((90, 1),), "topk": 5}, gate.GateOptions()),
        ({"block_size": 1, "group": 1, "sequences": ((150, 1),), "topk": 64}, gate.GateOptions()),
    ],
)  # fmt: skip
def test_the_kernels_for_pages_agree_with_plain_operations(monkeypatch, changes, options):
    monkeypatch.setattr("flexmoba.cache.kernels._LEAST_SPLIT", 32)
    monkeypatch.setattr("flexmoba.paged.kernels._PARTS_OF_ALL", 3)
    gates = {"gate": options.per, "sink_blocks": options.sink_blocks}
    gates |= {"local_blocks": options.local_blocks, "shared": 0}
    problem = Ragged(**(vars(STEPS) | changes | gates))
    table, n_pages = problem.table()
    tensors, pages = problem.tensors(), problem.pages(n_pages)
    problem.fill(pages, table, tensors, append_to_pages)
    problem.poison(pages, table, problem.masks(tensors))
    q = problem.queries(tensors)
    options = options._replace(sub_blocks=problem.sub_blocks)
    call = CachedCall(problem.topk or 0, 0.3, options, problem.block_size)
    batch = problem.batch(table, max_query_len=16)
    expected, expected_lse = attend_steps_gathered(q, pages, batch, call)
    features = torch.cat([q, q], 1)[:, : q.shape[1]]  # a view, as of a fused projection
    out, lse = attend_steps_on_cuda(features, pages, batch, call)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("layout", ["head-major", "token-major"])
@pytest.mark.parametrize("sizes", [(5, None), (6, 3), (210, 70)])
def test_the_append_kernel_for_pages_agrees_with_plain_operations(layout, sizes):
    # The last token fills a page whose other keys are old, of its own batch, or in other pages.
    sequences = ((0, 1), (24, 1), (8, 2), (139, 1))
    changes = {"layout": layout, "kv_heads": 2, "sequences": sequences}
    changes |= dict(zip(("block_size", "gate_block_size"), sizes, strict=True))
    problem = Ragged(**(vars(STEPS) | changes))
    table, n_pages = problem.table()
    plain, pages = problem.pages(n_pages), problem.pages(n_pages)
    problem.fill(plain, table, problem.tensors(), append_to_pages)
    problem.fill(pages, table, problem.tensors(), append_to_pages_on_cuda)
    assert_bitwise_equal(pages.k, plain.k)
    assert_bitwise_equal(pages.v, plain.v)
    torch.testing.assert_close(pages.means, plain.means, equal_nan=True)


def test_the_kernels_for_pages_take_half_precision():
    problem = Ragged(**(vars(STEPS) | {"dtype": torch.float16, "gate": "group"}))
    table, n_pages = problem.table()
    tensors, pages = problem.tensors(), problem.pages(n_pages)
    problem.fill(pages, table, tensors, append_to_pages_on_cuda)
    masks, batch = problem.masks(tensors), problem.batch(table, max_query_len=16)

    def attend(*tensors):
        call = CachedCall(problem.topk, 16**-0.5, gate.GateOptions("group"), problem.block_size)
        return attend_steps_on_cuda(problem.queries(tensors), pages, batch, call)

    assert_as_exact_as(lambda *x: problem.dense(masks, *x), attend, tensors)


@pytest.mark.parametrize("dim", [1, 16, 33])
@pytest.mark.parametrize("tokens_first", [True, False])
def test_rows_move(dim, tokens_first):
    x = torch.randn(2, 300, 3, dim).transpose(1, 2)
    x = x if tokens_first else x.contiguous()
    source = torch.randint(-1, 300, (2, 500), dtype=torch.int32)
    expected = x.gather(2, source.clamp(min=0).long()[:, None, :, None].expand(2, 3, 500, dim))
    expected = expected.masked_fill((source < 0)[:, None, :, None], 0.0)
    assert_bitwise_equal(move_on_cuda(x, source), expected)
