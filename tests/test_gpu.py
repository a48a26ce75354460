"""Tests of the compiled kernels on CUDA, with the tolerance policy of the whole suite.

Every new configuration compiles for about ten seconds, so there are few. Run them with
``pytest -m gpu -n 4``.
"""

import itertools

import pytest
import torch
from torch.nn.attention.flex_attention import AuxRequest, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from flexmoba import (
    MobaCache,
    flex_moba,
    moba_block_mask,
    moba_reference,
    moba_select,
    selected_attention,
)
from flexmoba.backends.flex import compiled as compiled_flex
from flexmoba.backends.flex import routed
from flexmoba.backends.fused import hopper, operator, routing, schedule
from flexmoba.gate import (
    GateOptions,
    GateSizes,
    block_means,
    gate_rows,
    select_by_means,
    select_rows,
)
from flexmoba.gate.scores import top_blocks_in_pieces
from flexmoba.sequence import lay_out
from tests.conftest import assert_as_exact_as_dense, assert_bitwise_equal, with_lse
from tests.problems import DTYPES, Problem
from tests.test_gates import tied

pytestmark = pytest.mark.gpu

BF16 = Problem(
    batch=2,
    kv_heads=2,
    group=2,
    q_len=1024,
    kv_len=1024,
    head_dim=128,
    value_dim=128,
    block_size=128,
    topk=3,
    dtype=torch.bfloat16,
)


def variant(**changes) -> Problem:
    return Problem(**(vars(BF16) | changes))


ROUTED = {
    "aligned": BF16,
    "ragged": variant(q_len=900, kv_len=1111),
    "long blocks": variant(block_size=512, q_len=2500, kv_len=2500, group=3),
    "longer blocks": variant(block_size=4096, topk=2, batch=1, q_len=9000, kv_len=9000),
    "short blocks": variant(block_size=64, topk=6, dtype=torch.float16, head_dim=64, value_dim=64),
    "odd blocks": variant(block_size=100, q_len=777, kv_len=1300, group=1, head_dim=96),
    "own block only": variant(topk=1, block_size=256, value_dim=64),
    "not causal": variant(is_causal=False, q_len=700, kv_len=1111, head_dim=80),
    "wide heads": variant(head_dim=256, value_dim=256, kv_heads=1),
    "wide heads, long blocks": variant(
        head_dim=192, value_dim=128, block_size=512, kv_heads=1, q_len=1500, kv_len=1600
    ),
    "wide heads, short blocks": variant(
        head_dim=256, value_dim=160, block_size=64, kv_heads=1, dtype=torch.float16
    ),
    "float32": variant(dtype=torch.float32, head_dim=64, value_dim=64, kv_heads=1),
    "float32, long blocks": variant(
        dtype=torch.float32, head_dim=80, value_dim=80, block_size=512, batch=1, q_len=2048,
        kv_len=2048,
    ),
}  # fmt: skip


def check(problem: Problem, impl: str, *, gradients: bool = True) -> None:
    q, k, v = problem.tensors("cuda")
    args, options = (problem.block_size, problem.topk), {"is_causal": problem.is_causal}
    mask = problem.mask_of(moba_select(q, k, *args, **options))
    attend = with_lse(flex_moba, *args, **options, impl=impl)
    assert_as_exact_as_dense(attend, q, k, v, mask, gradients=gradients)


@pytest.mark.parametrize("name", ROUTED)
def test_routed(name):
    check(ROUTED[name], "routed")


FUSED = {
    name: problem
    for name, problem in ROUTED.items()
    if problem.dtype in operator._DTYPES and problem.head_dim <= operator._MAX_HEAD_DIM
} | {
    "many heads": variant(batch=1, kv_heads=16, group=1, topk=8, q_len=2048, kv_len=2048),
    "large topk": variant(topk=20, block_size=16, head_dim=32, value_dim=64),
    "one query": variant(q_len=1),
    "not causal, long blocks": variant(is_causal=False, block_size=300, q_len=700, kv_len=1111),
    "not causal, full blocks": variant(is_causal=False, block_size=256, dtype=torch.float16),
    "wide heads in two parts": variant(head_dim=192, value_dim=192, kv_heads=1),
    "wide heads in two parts, odd": variant(
        head_dim=160, value_dim=136, kv_heads=1, block_size=100, q_len=777, kv_len=1300
    ),
}


@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "block_size", "count"),
    [(16, 16, 8192, 128, 7), (16, 16, 16384, 512, 2), (8, 2, 1000, 64, 3), (4, 4, 5000, 128, 8)],
)
def test_pairs_sorted_by_counting(heads, kv_heads, length, block_size, count, monkeypatch):
    q, k = (torch.empty(1, n, length, 128, device="cuda") for n in (heads, kv_heads))
    n_blocks = -(-length // block_size)
    shape = 1, heads, length, count
    routed = torch.randint(-1, n_blocks, shape, device="cuda", dtype=torch.int32)
    sizes = schedule.Sizes.of(q, k, k, routed, block_size)
    (group,) = schedule.sort_groups(sizes, 260 * count)
    bins, rows = routing.sort_pairs(routed, group, sizes)
    monkeypatch.setattr(routing, "_MAX_COUNTS", 0)
    other_bins, other_rows = routing.sort_pairs(routed, group, sizes)
    for x, y in zip((bins, *rows), (other_bins, *other_rows), strict=True):
        assert_bitwise_equal(x, y)


@pytest.mark.parametrize("name", FUSED)
def test_fused(name):
    check(FUSED[name], "fused")


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("block_size", [128, 100, 320])
def test_fused_given_any_selection(block_size, is_causal):
    problem = variant(block_size=block_size, is_causal=is_causal, q_len=900, kv_len=1111)
    q, k, v = problem.tensors("cuda")
    selection = problem.selection("cuda")
    attend = with_lse(selected_attention, selection, block_size, is_causal=is_causal, impl="fused")
    assert_as_exact_as_dense(attend, q, k, v, problem.mask_of(selection), gradients=True)


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_block_index_that_is_too_large_selects_no_block(is_causal):
    q, k, v = BF16.tensors("cuda")
    selection = BF16.selection("cuda")

    def attend(block):
        selection[..., 0] = block
        return selected_attention(q, k, v, selection, BF16.block_size, is_causal=is_causal)

    beyond = BF16.kv_len // BF16.block_size + 1  # would be a block of the next head
    assert_bitwise_equal(attend(beyond), attend(-1))


def divide_into_pieces(monkeypatch, sorting: float, total: float) -> None:
    monkeypatch.setattr(schedule, "_SMALL", 0)
    monkeypatch.setattr(schedule, "_SORTING_SHARE", sorting)
    monkeypatch.setattr(schedule, "_TOTAL_SHARE", total)
    for name in ("forward", "backward"):  # without its cache
        monkeypatch.setattr(
            f"flexmoba.backends.fused.{name}.sort_groups", schedule.sort_groups.__wrapped__
        )


# If queries and keys are in separate passes, queries of small blocks are in another kernel.
@pytest.mark.parametrize(("total", "block_size"), [(0.5, 128), (0.01, 256)])
def test_fused_in_pieces(monkeypatch, total, block_size):
    problem = variant(kv_heads=3, q_len=900, kv_len=1111, block_size=block_size)
    one_piece = run(problem, *problem.tensors("cuda"), impl="fused")
    divide_into_pieces(monkeypatch, 0.01, total)
    pieces = run(problem, *problem.tensors("cuda"), impl="fused")
    for x, y in zip(pieces, one_piece, strict=True):
        assert_bitwise_equal(x, y)


def test_fused_computes_gradients_of_keys_before_those_of_queries(monkeypatch):
    divide_into_pieces(monkeypatch, 0.01, 0.01)
    check(variant(kv_heads=3, q_len=900, kv_len=1111), "fused")


@pytest.mark.parametrize(("block_size", "topk"), [(128, 8), (512, 3)])
def test_fused_needs_little_memory(block_size, topk):
    q, k, v = (torch.randn(1, 16, 65536, 128, device="cuda", dtype=torch.half) for _ in range(3))
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def peak(call) -> int:
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before

    def forward():
        with torch.no_grad():
            return flex_moba(q, k, v, block_size, topk)

    def both():
        return torch.autograd.grad(flex_moba(q, k, v, block_size, topk), inputs, torch.ones_like(q))

    assert peak(forward) - q.nbytes <= 2 * q.nbytes  # the output, then q and the output
    assert peak(both) - q.nbytes <= 1.5 * 2**30  # the gradient of the output is not counted


@pytest.mark.parametrize("block_size", [128, 512])
def test_fused_divides_a_block_that_all_queries_select(monkeypatch, block_size):
    monkeypatch.setattr("flexmoba.backends.fused.backward._LEAST_ITEM", 64)
    monkeypatch.setattr("flexmoba.backends.fused.schedule.ITEM_FACTOR", 1)
    problem = variant(block_size=block_size, q_len=2048, kv_len=2048)
    q, k, v = problem.tensors("cuda")
    q[..., 0], k[..., :block_size, 0] = 100.0, 100.0  # selects the first block
    selection = moba_select(q, k, block_size, 2)
    assert (selection[:, :, block_size:, 1] == 0).all()
    attend = with_lse(flex_moba, block_size, 2, impl="fused")
    assert_as_exact_as_dense(attend, q, k, v, problem.mask_of(selection), gradients=True)


@pytest.mark.parametrize("layout", ["tokens first", "one projection", "odd", "expanded"])
def test_fused_supports_any_strides(layout):
    q, k, v = (x.cuda() for x in BF16.tensors())
    expected = run(BF16, q, k, v, impl="fused")
    if layout == "tokens first":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif layout == "one projection":
        sizes = [q.shape[1], k.shape[1], v.shape[1]]
        q, k, v = (
            torch.cat([q, k, v], 1).transpose(1, 2).contiguous().transpose(1, 2).split(sizes, 1)
        )
    elif layout == "odd":  # unaligned, with gaps
        q, k, v = (torch.nn.functional.pad(x, (3, 2))[..., 3:-2] for x in (q, k, v))
    else:
        k, v = k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1)
        expected = run(BF16, q, k.clone(), v.clone(), impl="fused")
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = flex_moba(*inputs, BF16.block_size, BF16.topk, impl="fused")
    grads = torch.autograd.grad(out, inputs, inputs[0].detach().flip(0))
    for x, y in zip((out, *grads), expected, strict=True):
        assert_bitwise_equal(x, y)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
@pytest.mark.parametrize("block_size", [100, 128])
def test_fused_scale(scale, block_size):
    problem = variant(block_size=block_size)
    q, k, v = problem.tensors("cuda")
    mask = problem.mask_of(moba_select(q, k, block_size, problem.topk))
    attend = with_lse(flex_moba, block_size, problem.topk, impl="fused", scale=scale)
    assert_as_exact_as_dense(attend, q, k, v, mask, scale=scale, gradients=True)


def test_auto_prefers_fused_where_it_supports_the_inputs():
    q, k, v = BF16.tensors("cuda")
    out = flex_moba(q, k, v, 128, 3)
    assert_bitwise_equal(out, flex_moba(q, k, v, 128, 3, impl="fused"))
    wide = [torch.nn.functional.pad(x, (0, 256)) for x in (q, k)]
    for bad in ((q.float(), k.float(), v.float()), (*wide, v)):
        with pytest.raises(NotImplementedError, match='impl="fused" needs'):
            flex_moba(*bad, 128, 3, impl="fused")
    with pytest.raises(NotImplementedError, match="kernel_options"):
        flex_moba(q, k, v, 128, 3, impl="fused", kernel_options={"num_warps": 4})


HOPPER = {
    "256": variant(block_size=256, q_len=2500, kv_len=2500),
    "384, rest of a prompt": variant(block_size=384, q_len=1700, kv_len=3000, group=1),
    "512, 64": variant(block_size=512, topk=4, head_dim=64, value_dim=64, q_len=4096, kv_len=4096),
    "512, float16": variant(block_size=512, dtype=torch.float16, q_len=2500, kv_len=2500, group=8),
    "4096": variant(block_size=4096, topk=2, batch=1, q_len=9000, kv_len=9000),
    "not causal": variant(is_causal=False, block_size=256, q_len=700, kv_len=2048),
}


@pytest.fixture
def launches_on_hopper(monkeypatch):
    """Enables the warp-specialised kernels and lists the names of their launches."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    launches, launch = [], hopper.launch
    monkeypatch.setattr(hopper, "least_block", 256)
    monkeypatch.setattr(hopper, "least_backward_block", 256)
    monkeypatch.setattr(
        hopper, "launch", lambda *x: launches.append(x[0].fn.__name__) or launch(*x)
    )
    return launches


@pytest.mark.parametrize("name", HOPPER)
def test_warp_specialised(name, launches_on_hopper):
    check(HOPPER[name], "fused")
    assert set(launches_on_hopper) == {
        "hopper_attend_kernel", "hopper_key_grads_kernel", "hopper_query_grads_kernel"
    }  # fmt: skip


@pytest.mark.parametrize("layout", ["tokens first", "one projection", "expanded"])
def test_warp_specialised_with_any_strides(layout, launches_on_hopper, monkeypatch):
    block_size = 256
    problem = variant(block_size=block_size, q_len=2000, kv_len=2000)
    q, k, v = problem.tensors("cuda")
    if layout == "tokens first":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif layout == "one projection":
        sizes = [q.shape[1], k.shape[1], v.shape[1]]
        q, k, v = (
            torch.cat([q, k, v], 1).transpose(1, 2).contiguous().transpose(1, 2).split(sizes, 1)
        )
    else:
        k, v = k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1)

    def results(*inputs):
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = flex_moba(*inputs, block_size, 4, impl="fused")
        return out, *torch.autograd.grad(out, inputs, inputs[0].detach().flip(0))

    strided = results(q, k, v)
    assert "hopper_query_grads_kernel" in launches_on_hopper
    plain = [x.contiguous() for x in (q, k, v)]
    for _ in range(3):
        for x, y in zip(strided, results(*plain), strict=True):
            assert_bitwise_equal(x, y)
    monkeypatch.setattr(hopper, "least_block", 512)
    monkeypatch.setattr(hopper, "least_backward_block", 512)
    for x, y in zip(strided, results(q, k, v), strict=True):
        assert (x - y).float().norm() <= 0.01 * y.float().norm()


@pytest.mark.parametrize("name", ["256", "512, 64", "4096"])
def test_warp_specialised_items_do_not_mix(name, launches_on_hopper):
    problem = HOPPER[name]
    q, k, v = problem.tensors("cuda")
    selection = moba_select(q, k, problem.block_size, problem.topk)
    attend = with_lse(selected_attention, selection, problem.block_size, impl="fused")
    is_nan = torch.zeros(q.shape[:3], dtype=torch.bool, device="cuda")
    is_nan[..., ::60] = True
    results = attend(q, k, v), attend(q.masked_fill(is_nan[..., None], float("nan")), k, v)
    for x, y in zip(*results, strict=True):
        assert_bitwise_equal(x[~is_nan], y[~is_nan])
        assert y[is_nan].isnan().all()
    assert launches_on_hopper == ["hopper_attend_kernel"] * 2


def test_warp_specialised_in_pieces_and_given_any_selection(launches_on_hopper, monkeypatch):
    block_size = 256
    problem = variant(block_size=block_size, kv_heads=3, q_len=1800, kv_len=2200, topk=5)
    q, k, v = problem.tensors("cuda")
    selection = problem.selection("cuda")
    attend = with_lse(selected_attention, selection, block_size, impl="fused")
    assert_as_exact_as_dense(attend, q, k, v, problem.mask_of(selection))
    one_piece = attend(q, k, v)
    before = len(launches_on_hopper)
    divide_into_pieces(monkeypatch, 0.01, 0.5)
    for x, y in zip(attend(q, k, v), one_piece, strict=True):
        assert_bitwise_equal(x, y)
    assert len(launches_on_hopper) > before + 1


@pytest.mark.parametrize(
    "changes", [{}, {"block_size": 100, "kv_len": 1100, "dtype": torch.float16}]
)
def test_masked(changes):
    check(variant(**changes), "masked")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [True, False])
def test_portable(dtype, is_causal):
    check(variant(dtype=dtype, is_causal=is_causal, q_len=600, block_size=100), "portable")


def test_full_attention():
    problem = variant(q_len=800, kv_len=1100)
    q, k, v = problem.tensors("cuda")
    everything = torch.arange(problem.n_blocks, dtype=torch.int32, device="cuda")
    mask = problem.mask_of(everything.expand(*q.shape[:3], -1))
    for topk in (None, problem.n_blocks):
        attend = with_lse(flex_moba, problem.block_size, topk)
        assert_as_exact_as_dense(attend, q, k, v, mask, gradients=True)


def test_any_selection():
    q, k, v = BF16.tensors("cuda")
    selection = BF16.selection("cuda")
    attend = with_lse(selected_attention, selection, BF16.block_size)
    assert_as_exact_as_dense(attend, q, k, v, BF16.mask_of(selection), gradients=True)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("block_size", "count"), [(64, 3), (7, 20), (16, 64), (100, 1)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_gate_kernel_agrees_with_the_plain_gate(dtype, block_size, count, is_causal):
    problem = variant(
        dtype=dtype, block_size=block_size, q_len=777, kv_len=1300, head_dim=96, topk=count
    )
    position = torch.arange(777, device="cuda") + 1300 - 777
    n_blocks = -(-1300 // block_size)
    end = position // block_size if is_causal else torch.full_like(position, n_blocks)
    end = end[None]

    def plain(q, k):
        means = block_means(k, block_size)
        return top_blocks_in_pieces(q, means, position.new_zeros(1, 1), end, count)

    def fast(q, k):
        sizes = GateSizes(block_size, count, 1300 - 777, is_causal)
        return select_rows(q, k, sizes, GateOptions())

    q, k, _ = problem.tied_tensors("cuda")
    q[0, 0, 5], k[0, 0, 9] = torch.nan, torch.inf
    assert_bitwise_equal(fast(q, k), plain(q, k))
    # The order of sums differs, which may swap blocks of almost equal scores, and no others.
    q, k, _ = problem.tensors("cuda")
    assert (fast(q, k) != plain(q, k)).any(-1).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block_size", [3, 128, 512, 4096])
def test_mean_keys_are_float32_means_rounded_once(dtype, block_size):
    k = 4 * torch.randn(2, 3, 9001, 72, device="cuda", dtype=dtype)
    n_full = 9001 // block_size * block_size
    full = k[:, :, :n_full].unflatten(2, (-1, block_size)).mean(3, dtype=torch.float32)
    short = k[:, :, n_full:].mean(2, keepdim=True, dtype=torch.float32)
    assert_bitwise_equal(block_means(k, block_size), torch.cat([full, short], 2).to(dtype))


def test_gate_kernel_of_a_group_agrees_with_the_plain_gate():
    """The products drop bits of the sum of the group's queries."""
    problem = variant(q_len=8192, kv_len=8192, group=4, batch=1)
    q, k, _ = problem.tensors("cuda")
    group = GateOptions("group")
    rows, means = gate_rows(q, 2, group), block_means(k, 128)
    selected = select_by_means(rows, means, GateSizes(128, 7, 0, is_causal=True), group)
    end = torch.arange(8192, device="cuda")[None] // 128
    expected = top_blocks_in_pieces(rows, means, end.new_zeros(1, 1), end, 7)
    assert (selected != expected).any(-1).float().mean() < 1e-3


def run(problem: Problem, q, k, v, **options) -> tuple[torch.Tensor, ...]:
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = flex_moba(*inputs, problem.block_size, problem.topk, **options)
    return out.detach(), *torch.autograd.grad(out, inputs, q.detach().flip(0))


@pytest.mark.parametrize("impl", ["fused", "routed"])
@pytest.mark.parametrize("block_size", [128, 512])
def test_two_runs_are_bitwise_equal(block_size, impl):
    problem = variant(block_size=block_size, q_len=2048, kv_len=2048)
    tensors = problem.tensors("cuda")
    first, second = (run(problem, *tensors, impl=impl) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert_bitwise_equal(y, x)


@pytest.mark.parametrize("impl", ["fused", "routed"])
def test_future_tokens_do_not_change_the_past(impl):
    q, k, v = BF16.tensors("cuda")
    now = 700
    before = flex_moba(q, k, v, BF16.block_size, BF16.topk, impl=impl)
    for x in (q, k, v):
        x[:, :, now:] = torch.randn_like(x[:, :, now:])
    after = flex_moba(q, k, v, BF16.block_size, BF16.topk, impl=impl)
    assert_bitwise_equal(after[:, :, :now], before[:, :, :now])
    assert not torch.equal(after, before)


@pytest.mark.parametrize("impl", ["fused", "routed"])
def test_nan_stays_in_its_head_and_future(impl):
    q, k, v = BF16.tensors("cuda")
    before = run(BF16, q, k, v, impl=impl)[0]
    q[0, 0, 300], k[1, 1, 500], v[1, 0, 600] = torch.nan, torch.inf, torch.nan
    after = run(BF16, q, k, v, impl=impl)[0]
    reached = (after != before).any(-1)
    own_block = 600 // BF16.block_size * BF16.block_size  # 0 * NaN reaches earlier rows of the tile
    allowed = torch.zeros_like(reached)
    allowed[0, 0, 300] = True
    allowed[1, 2:, 500:] = True
    allowed[1, :2, own_block:] = True
    assert reached.any()
    assert not (reached & ~allowed).any()


def test_large_calls_are_cut_into_pieces(monkeypatch):
    problem = variant(q_len=1024, kv_len=1024)
    monkeypatch.setattr(routed, "_MAX_ELEMENTS", 2**20)
    check(problem, "routed")


def test_every_query_selects_the_same_block():
    q, k, v = BF16.tensors("cuda")
    q[..., 0], k[..., : BF16.block_size, 0] = 100.0, 100.0  # selects the first block
    attend = with_lse(flex_moba, BF16.block_size, 2)
    selection = moba_select(q, k, BF16.block_size, 2)
    assert (selection[:, :, BF16.block_size :, 1] == 0).all()
    assert_as_exact_as_dense(attend, q, k, v, BF16.mask_of(selection), gradients=True)


def test_block_mask_in_the_callers_attention():
    q, k, v = BF16.tensors("cuda")
    mask = moba_block_mask(q, k, BF16.block_size, BF16.topk)
    compiled = torch.compile(flex_attention, fullgraph=True)

    def attend(q, k, v):
        out, aux = compiled(
            q, k, v, block_mask=mask, enable_gqa=True, return_aux=AuxRequest(lse=True)
        )
        return out, aux.lse

    exact = BF16.mask_of(moba_select(q, k, BF16.block_size, BF16.topk))
    assert_as_exact_as_dense(attend, q, k, v, exact, gradients=True)


def test_lengths_do_not_recompile_without_bound():
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    compiled_flex._compiled.cache_clear()
    before = counters["stats"]["unique_graphs"]
    with torch.no_grad():
        for i in range(20):
            problem = variant(batch=1, q_len=300 + 97 * i, kv_len=300 + 97 * i, topk=2)
            check(problem, "routed", gradients=False)
            check(problem, "fused", gradients=False)  # dynamo does not compile it
    assert 1 <= counters["stats"]["unique_graphs"] - before <= 6


def test_nothing_waits_for_the_device_and_a_graph_can_be_captured():
    q, k, v = BF16.tensors("cuda")
    with torch.no_grad():
        eager = flex_moba(q, k, v, BF16.block_size, BF16.topk)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = flex_moba(q, k, v, BF16.block_size, BF16.topk)
        new = variant(seed=1).tensors("cuda")
        for old, x in zip((q, k, v), new, strict=True):
            old.copy_(x)
        graph.replay()
        assert not torch.equal(captured, eager)
        assert_bitwise_equal(captured, flex_moba(*new, BF16.block_size, BF16.topk))


@pytest.mark.parametrize("topk", [None, 3])
def test_one_flex_attention_call_at_changing_lengths(topk):
    for length in (700, 1024, 1300):
        problem = variant(batch=1, q_len=length, kv_len=length + 128, topk=topk)
        q, k, v = problem.tensors("cuda")
        if topk is None:
            everything = torch.arange(problem.n_blocks, dtype=torch.int32, device="cuda")
            mask = problem.mask_of(everything.expand(*q.shape[:3], -1))
        else:
            mask = problem.mask_of(moba_select(q, k, problem.block_size, topk))
        attend = with_lse(flex_moba, problem.block_size, topk, impl="masked")
        assert_as_exact_as_dense(attend, q, k, v, mask, gradients=True)


@pytest.mark.parametrize(
    "options",
    [{"topk": 3}, {"topk": 3, "impl": "routed"}, {"topk": None}, {"topk": 3, "gate": "tile"}],
    ids=str,
)
def test_each_scale_compiles_at_most_once(options):
    torch._dynamo.reset()  # it counts compilations of a function over all options

    def scaled(q, k, v, scale):
        return flex_moba(q, k, v, BF16.block_size, scale=scale, **options)

    def result_of(function, scale):
        inputs = BF16.tensors("cuda", requires_grad=True)
        out = function(*inputs, scale)
        return out, *torch.autograd.grad(out.float().square().sum(), inputs)

    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    compiled = torch.compile(scaled, fullgraph=True)
    results = [result_of(compiled, scale) for scale in (0.1, 0.3, 1.0, 0.1)]
    assert graphs["unique_graphs"] - before <= 3
    for result, scale in zip(results, (0.1, 0.3, 1.0), strict=False):
        for actual, expected in zip(result, result_of(scaled, scale), strict=True):
            assert (actual - expected).norm() <= 1e-2 * expected.norm()


def test_cuda_graphs_of_a_compiled_function():
    q, k, v = BF16.tensors("cuda")
    compiled = torch.compile(
        lambda q, k, v: flex_moba(q, k, v, 128, 3), mode="reduce-overhead", fullgraph=True
    )
    with torch.no_grad():
        for _ in range(4):  # warms up, records, replays
            torch.compiler.cudagraph_mark_step_begin()
            out = compiled(q, k, v)
        assert_bitwise_equal(out.clone(), flex_moba(q, k, v, 128, 3))


def test_inside_a_compiled_model():
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = torch.nn.Linear(256, 3 * 256, bias=False)

        def forward(self, x):
            q, k, v = self.project(x).unflatten(-1, (3, 2, 128)).permute(2, 0, 3, 1, 4)
            return flex_moba(q, k, v, 128, 3).transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    layer = Layer().cuda().bfloat16()
    x = torch.randn(2, 1000, 256, device="cuda", dtype=torch.bfloat16)
    results = []
    for model in (layer, torch.compile(layer, fullgraph=True)):
        layer.zero_grad()
        out = model(x)
        out.backward(x)
        results.append((out.detach(), layer.project.weight.grad.clone()))
    for eager, compiled in zip(*results, strict=True):
        difference = (compiled - eager).float().norm() / eager.float().norm()
        assert difference < 0.02  # the compiled projection may round differently


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_prefill_in_chunks_and_decoding(dtype):
    problem = variant(dtype=dtype, block_size=100, q_len=1111, kv_len=1111, topk=4)
    q, k, v = problem.tensors("cuda")
    cache = MobaCache(2, 2, 128, block_size=100, max_len=1111, dtype=dtype, device="cuda")
    attend = with_lse(flex_moba, 100, 4, cache=cache)

    def in_chunks(q, k, v):
        cache.reset()
        edges = [0, 500, 507, 1000, *range(1090, 1112)]
        parts = [attend(*(x[:, :, i:j] for x in (q, k, v))) for i, j in itertools.pairwise(edges)]
        return tuple(torch.cat(part, 2) for part in zip(*parts, strict=True))

    selection = moba_select(q, k, 100, 4)
    assert_as_exact_as_dense(in_chunks, q, k, v, problem.mask_of(selection))


@pytest.mark.parametrize("how", ["graph", "reduce-overhead"])
def test_a_captured_step_supports_a_growing_context(how):
    problem = variant(block_size=64, q_len=400, kv_len=400, topk=4)
    q, k, v = problem.tensors("cuda")
    caches = [
        MobaCache(2, 2, 128, block_size=64, max_len=400, dtype=q.dtype, device="cuda")
        for _ in range(2)
    ]
    token = [x[:, :, :1].clone() for x in (q, k, v)]

    def step(cache):
        return flex_moba(*token, 64, 4, cache=cache)

    if how == "graph":
        step(caches[0])  # compiles
        caches[0].reset()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = step(caches[0])
        caches[0].reset()
    else:
        compiled = torch.compile(lambda: step(caches[0]), mode="reduce-overhead", fullgraph=True)
    for i in range(400):
        for x, y in zip(token, (q, k, v), strict=True):
            x.copy_(y[:, :, i : i + 1])
        if how == "graph":
            graph.replay()
        else:
            torch.compiler.cudagraph_mark_step_begin()
            result = compiled()
        assert_bitwise_equal(result, step(caches[1]))


@pytest.mark.parametrize(("impl", "topk"), [("fused", 3), ("routed", 3), ("auto", None)])
def test_packed_documents_equal_each_alone(impl, topk):
    problem = variant(batch=1, q_len=1500, kv_len=1500)
    tensors = problem.tensors("cuda", requires_grad=True)
    edges = [0, 700, 700, 701, 1100, 1500]
    cu_seqlens = torch.tensor(edges, dtype=torch.int32, device="cuda")
    out = flex_moba(*tensors, 128, topk, impl=impl, cu_seqlens=cu_seqlens)
    grads = torch.autograd.grad(out.float().square().sum(), tensors)
    alone = [
        flex_moba(*(x[:, :, i:j] for x in tensors), 128, topk, impl=impl)
        for i, j in itertools.pairwise(edges)
        if j > i
    ]
    expected = torch.cat(alone, 2)
    expected_grads = torch.autograd.grad(expected.float().square().sum(), tensors)
    for x, y in zip((out, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(x, y, rtol=0.02, atol=0.02 * y.abs().max().item())


def test_full_attention_of_packed_documents():
    """One call, compiled or not, allocates little more than its output."""
    inputs = variant(batch=2, q_len=8192, kv_len=8192).tensors("cuda", requires_grad=True)
    token = torch.arange(8192, device="cuda")
    ids = torch.stack([token // 3000, token // 2800])

    def gradients(out):
        return torch.autograd.grad(out.float().square().sum(), inputs)

    out = flex_moba(*inputs, 32, None, document_ids=ids)
    results = out, *gradients(out)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    flex_moba(*inputs, 32, None, document_ids=ids)
    used = torch.cuda.max_memory_allocated() - before
    # With routed blocks, the selection alone would take four times the output.
    assert used < 2 * out.numel() * out.element_size()

    same = (ids[:, :, None] == ids[:, None, :]).tril()[:, None]
    dense = scaled_dot_product_attention(*inputs, attn_mask=same, enable_gqa=True)
    compiled = torch.compile(
        lambda *x: flex_moba(*x[:3], 32, None, cu_seqlens=x[3]), fullgraph=True
    )
    bounds = [torch.arange(0, 8192 + n, n, device="cuda").clamp(max=8192) for n in (3000, 2800)]
    rows = [[x[i : i + 1] for x in inputs] for i in range(2)]
    one_by_one = torch.cat([compiled(*row, cu) for row, cu in zip(rows, bounds, strict=True)])
    for other in (dense, one_by_one):
        for x, y in zip(results, (other, *gradients(other)), strict=True):
            torch.testing.assert_close(x, y, rtol=0.02, atol=0.02 * y.abs().max().item())


@pytest.mark.parametrize(
    ("topk", "options"),
    [
        (None, {"document_ids": torch.arange(1100)[None] // torch.tensor([[300], [200], [500]])}),
        (3, {"impl": "masked"}),
        (3, {"gate": "tile"}),
        (3, {"impl": "routed"}),
    ],
    ids=["windows", "masked", "tile", "routed"],
)
def test_a_batch_of_one_head_without_gradients(topk, options):
    """Tests lists of a mask ``(B, 1, tiles)``, which must be contiguous also without gradients."""
    problem = variant(batch=3, kv_heads=1, group=1, q_len=1100, kv_len=1100, block_size=128)
    inputs = problem.tensors("cuda", requires_grad=True)
    options = {x: y.cuda() if isinstance(y, torch.Tensor) else y for x, y in options.items()}
    expected = flex_moba(*inputs, 128, topk, **options)
    with torch.no_grad():
        assert_bitwise_equal(flex_moba(*inputs, 128, topk, **options), expected.detach())


def short_documents(length: int, n_short: int) -> list[int]:
    """Returns the boundaries of a long document, ``n_short`` short ones, and one for the rest."""
    return [0, 500, *range(500 + 9, 500 + 9 * n_short + 1, 9), length]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_short_documents(dtype, is_causal):
    """Results are as exact as dense attention with the same selection, in every layout."""
    problem = variant(batch=1, q_len=1500, kv_len=1500, dtype=dtype)
    q, k, v = problem.tensors("cuda")
    bounds = short_documents(1500, 40)
    ids = torch.arange(len(bounds) - 1).repeat_interleave(torch.tensor(bounds).diff()).cuda()
    options = {"cu_seqlens": torch.tensor(bounds, device="cuda"), "is_causal": is_causal}
    selection = moba_select(q, k, 128, 3, **options)
    # Means and scores of small integers are exact, and often tied.
    integers = [torch.randint(-2, 3, x.shape).to(dtype) for x in (q, k)]
    on_cpu = moba_select(*integers, 128, 3, **options | {"cu_seqlens": torch.tensor(bounds)})
    on_cuda = moba_select(*(x.cuda() for x in integers), 128, 3, **options)
    assert_bitwise_equal(on_cuda.cpu(), on_cpu)
    token = torch.arange(1500, device="cuda")
    first = torch.tensor(bounds, device="cuda")[ids]
    begins = (token - first) % 128 == 0
    block = begins.cumsum(0) - 1
    mask = (selection[..., None] == block).any(-2) & (ids[:, None] == ids)
    mask = mask.tril() if is_causal else mask
    for impl in ("auto", "routed", "masked"):
        attend = with_lse(flex_moba, 128, 3, impl=impl, **options)
        assert_as_exact_as_dense(attend, q, k, v, mask, gradients=True)
        attend = with_lse(selected_attention, selection, 128, impl=impl, **options)
        assert_as_exact_as_dense(attend, q, k, v, mask, gradients=True)


def test_short_documents_take_memory_in_proportion_to_their_tokens():
    inputs = variant(batch=1, q_len=16384, kv_len=16384).tensors("cuda", requires_grad=True)
    cu_seqlens = torch.arange(0, 16385, 16, device="cuda")
    used, results = {}, {}
    for name, topk, more in (("moba", 3, {}), ("full", None, {}), ("known", 3, {"max_seqlen": 16})):
        for _ in range(2):  # the first call compiles, the second is measured
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            out = flex_moba(*inputs, 512, topk, cu_seqlens=cu_seqlens, **more)
            grads = torch.autograd.grad(out.float().square().sum(), inputs)
            used[name] = torch.cuda.max_memory_allocated() - before
        results[name] = out, *grads
    for x, y in zip(results["known"], results["full"], strict=True):
        assert_bitwise_equal(x, y)
    for x, y in zip(results["moba"], results["full"], strict=True):
        torch.testing.assert_close(x, y, rtol=0.02, atol=0.02 * y.abs().max().item())
    # With documents padded to full blocks there would be 32 times as many tokens.
    assert used["moba"] < 4 * used["full"]
    assert used["known"] < 1.01 * used["full"]


@pytest.mark.parametrize("impl", ["auto", "routed", "masked"])
def test_padding_without_causality(impl):
    problem = variant(q_len=600, kv_len=600, is_causal=False)
    tensors = problem.tensors("cuda", requires_grad=True)
    real = torch.rand(2, 600, generator=torch.Generator().manual_seed(0)) > 0.3
    real = real.cuda()
    attend = with_lse(flex_moba, 128, 3, impl=impl, is_causal=False, key_padding_mask=real)
    out, lse = attend(*tensors)
    grads = torch.autograd.grad(out.float().square().sum() + lse[lse.isfinite()].sum(), tensors)
    for row in range(2):
        alone = [x[row : row + 1, :, real[row]].detach().requires_grad_() for x in tensors]
        selection = moba_select(*alone[:2], 128, 3, is_causal=False)
        expected = with_lse(selected_attention, selection, 128, impl="routed", is_causal=False)
        one, one_lse = expected(*alone)
        torch.testing.assert_close(out[row : row + 1, :, real[row]], one, rtol=0.02, atol=0.02)
        torch.testing.assert_close(lse[row : row + 1, :, real[row]], one_lse, rtol=1e-3, atol=1e-3)
        loss = one.float().square().sum() + one_lse.sum()
        for x, y in zip(grads, torch.autograd.grad(loss, alone), strict=True):
            close = {"rtol": 0.02, "atol": 0.02 * y.abs().max().item()}
            torch.testing.assert_close(x[row : row + 1, :, real[row]], y, **close)


@pytest.mark.parametrize("n", [148, 74])
def test_chunks_of_one_length(n):
    """FlexAttention calls whose number of keys grows and whose number of queries does not."""
    problem = variant(dtype=torch.float32, batch=1, q_len=8 * n, kv_len=8 * n)
    tensors = problem.tensors("cuda")
    cache = MobaCache(1, 2, 128, block_size=128, device="cuda")
    chunks = zip(*(x.split(n, dim=2) for x in tensors), strict=True)
    parts = [flex_moba(*chunk, 128, 3, cache=cache) for chunk in chunks]
    expected = flex_moba(*tensors, 128, 3)
    torch.testing.assert_close(torch.cat(parts, 2), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("length", [1, 100, 130, 256])
def test_windows_of_few_tiles(length):
    problem = variant(batch=1, q_len=length, kv_len=length)
    inputs = problem.tensors("cuda")
    ids = (torch.arange(length, device="cuda") >= length // 3)[None].int()
    mask = (ids[:, :, None] == ids[:, None, :]).tril()[:, None].expand(1, 4, -1, -1)
    attend = with_lse(flex_moba, 128, 3, document_ids=ids)
    assert_as_exact_as_dense(attend, *inputs, mask, gradients=True)


def test_fused_rejects_documents_without_causality():
    q = torch.randn(1, 2, 300, 64, device="cuda", dtype=torch.bfloat16)
    cu_seqlens = torch.tensor([0, 100, 300], device="cuda")
    with pytest.raises(NotImplementedError, match='"fused" does not support documents or padding'):
        flex_moba(q, q, q, 64, 2, impl="fused", is_causal=False, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("impl", ["fused", "routed"])
def test_padding_on_the_left_and_on_the_right(impl):
    problem = variant(q_len=1200, kv_len=1200)
    tensors = problem.tensors("cuda")
    mask = torch.zeros(2, 1200, dtype=torch.bool, device="cuda")
    mask[0, 300:] = True
    mask[1, :901] = True
    padded = [x.masked_fill(~mask[:, None, :, None], float("nan")) for x in tensors]
    out = flex_moba(*padded, 128, 3, impl=impl, key_padding_mask=mask)
    assert not out.masked_select(~mask[:, None, :, None]).any()
    for row in range(2):
        alone = [x[row : row + 1, :, mask[row]] for x in tensors]
        expected = flex_moba(*alone, 128, 3, impl=impl)[0]
        torch.testing.assert_close(out[row][:, mask[row]], expected, rtol=0.02, atol=0.02)


GATES = {
    "group": {"gate": "group"},
    "always": {"sink_blocks": 1, "local_blocks": 1},
    "group, always": {"gate": "group", "sink_blocks": 2, "local_blocks": 1},
    "tile": {"gate": "tile", "sink_blocks": 1},
    "sub-blocks": {"gate_block_size": 16},
    "group, sub-blocks": {"gate": "group", "gate_block_size": 32, "sink_blocks": 1},
}


@pytest.mark.parametrize(
    ("name", "impl"), [*((name, "fused") for name in GATES), ("tile", "auto"), ("group", "routed")]
)
def test_gates(name, impl):
    problem = variant(topk=5, q_len=2000, kv_len=2000)
    q, k, v = problem.tensors("cuda")
    selection = moba_select(q, k, 128, 5, **GATES[name])
    attend = with_lse(flex_moba, 128, 5, impl=impl, **GATES[name])
    assert_as_exact_as_dense(attend, q, k, v, problem.mask_of(selection), gradients=True)
    tied_q, tied_k, _ = tied(problem, GATES[name], "cuda")
    expected = moba_select(tied_q.cpu(), tied_k.cpu(), 128, 5, **GATES[name])
    assert_bitwise_equal(moba_select(tied_q, tied_k, 128, 5, **GATES[name]).cpu(), expected)


@pytest.mark.parametrize("name", GATES)
def test_gates_with_a_cache(name):
    problem = variant(topk=5, q_len=1500, kv_len=1500)
    q, k, v = problem.tensors("cuda")
    cache = MobaCache(
        *(2, 2, 128),
        block_size=128,
        gate_block_size=GATES[name].get("gate_block_size"),
        max_len=1500,
        dtype=q.dtype,
        device="cuda",
    )
    attend = with_lse(flex_moba, 128, 5, cache=cache, **GATES[name])

    def in_chunks(q, k, v):
        cache.reset()
        edges = [0, 500, 507, 1000, *range(1400, 1501, 4)]
        parts = [attend(*(x[:, :, i:j] for x in (q, k, v))) for i, j in itertools.pairwise(edges)]
        return tuple(torch.cat(part, 2) for part in zip(*parts, strict=True))

    selection = moba_select(q, k, 128, 5, **GATES[name])
    assert_as_exact_as_dense(in_chunks, q, k, v, problem.mask_of(selection))


@pytest.mark.parametrize("strides", ["tokens first", "heads first", "odd"])
@pytest.mark.parametrize("dim", [1, 64, 96])
def test_move_kernel_agrees_with_plain_operations(strides, dim):
    x = torch.randn(2, 300, 3, dim + 1, device="cuda", dtype=torch.bfloat16)
    x = x[..., 1:] if strides == "odd" else x[..., :dim].contiguous()
    x = x.transpose(1, 2)
    if strides == "heads first":
        x = x.contiguous()
    x.requires_grad_()
    mask = torch.arange(300, device="cuda") >= torch.tensor([[0], [70]], device="cuda")
    layout = lay_out(300, 64, None, mask, is_causal=True)
    out = layout.spread(x)
    expected = torch.zeros_like(out)
    expected[0], expected[1, :, :230] = x[0], x[1, :, 70:]
    assert_bitwise_equal(out, expected)
    assert_bitwise_equal(layout.collect(out), x * mask[:, None, :, None])
    upstream = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, x, upstream)
    assert_bitwise_equal(grad, layout.collect(upstream))


def test_packed_documents_with_tiles():
    problem = variant(batch=1, q_len=1500, kv_len=1500)
    tensors = problem.tensors("cuda")
    edges = [0, 700, 700, 701, 1100, 1500]
    cu_seqlens = torch.tensor(edges, dtype=torch.int32, device="cuda")
    out = flex_moba(*tensors, 128, 3, gate="tile", cu_seqlens=cu_seqlens)
    for i, j in itertools.pairwise(edges):
        if i < j:
            alone = flex_moba(*(x[:, :, i:j] for x in tensors), 128, 3, gate="tile")
            torch.testing.assert_close(out[:, :, i:j], alone, rtol=0.02, atol=0.02)


SCORE_MODS = {
    "routed": {"block_size": 128},
    "masked": {"impl": "masked", "block_size": 128},
    "tile": {"gate": "tile", "block_size": 256},
    "documents": {"block_size": 128},
    "short documents": {"block_size": 256},
    "short documents, not causal": {"block_size": 256, "is_causal": False},
    "full": {"topk": None, "block_size": 128},
    "full documents": {"topk": None, "block_size": 128},
}


@pytest.mark.parametrize("name", SCORE_MODS)
@pytest.mark.parametrize("q_len", [900, 644])
def test_score_mod(name, q_len):
    """A softcap and a learned bias by head and distance, whose gradient is compared, too."""
    problem = variant(q_len=q_len, kv_len=900, dtype=torch.float32, head_dim=64, value_dim=64)
    inputs = problem.tensors("cuda", requires_grad=True)
    bias = torch.randn(4, 900, device="cuda", requires_grad=True)
    options = {"topk": 3} | SCORE_MODS[name]
    if "documents" in name:
        inputs = [x[:1, :, -q_len:] for x in inputs]
        bounds = short_documents(q_len, 12) if "short" in name else [0, 300, 301, q_len]
        edges = torch.tensor(bounds, device="cuda")
        options["cu_seqlens"] = edges

    def score_mod(score, b, h, q_idx, kv_idx):
        # The function also gets masked keys, after the query.
        distance = (q_idx - kv_idx).clamp(min=0)
        return 10 * torch.tanh(score / 10) + bias[h, distance] + 0.1 * b

    out = flex_moba(*inputs, **options, score_mod=score_mod)
    expected = moba_reference(*inputs, **{x: options[x] for x in options if x != "impl"},
                              score_mod=score_mod)  # fmt: skip
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    upstream = torch.randn_like(out)
    grads, exact = (torch.autograd.grad(x, (*inputs, bias), upstream) for x in (out, expected))
    for x, y in zip(grads, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3 * y.abs().max().item())


def test_score_mod_with_a_cache():
    problem = variant(q_len=700, kv_len=700, dtype=torch.float32, block_size=64)
    tensors = problem.tensors("cuda")

    def score_mod(score, b, h, q_idx, kv_idx):
        return 10 * torch.tanh(score / 10) - 0.01 * (h + 1) * (q_idx - kv_idx) + b

    expected = flex_moba(*tensors, 64, 4, score_mod=score_mod)
    cache = MobaCache(2, 2, 128, block_size=64, max_len=700, dtype=torch.float32, device="cuda")
    for i, j in itertools.pairwise([0, 600, 603, 620, 621, 700]):
        chunk = [x[:, :, i:j] for x in tensors]
        out = flex_moba(*chunk, 64, 4, cache=cache, score_mod=score_mod)
        torch.testing.assert_close(out, expected[:, :, i:j], rtol=1e-3, atol=1e-3)
