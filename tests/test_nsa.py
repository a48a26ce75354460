"""Native Sparse Attention: the oracle by hand, and the selection and attention by the oracle."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention.flex_attention import AuxRequest
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from flexmoba.nsa import flex_nsa, nsa_reference, nsa_select
from flexmoba.nsa.branches import block_means_of
from flexmoba.nsa.reference import (
    reference_branch,
    reference_importance,
    reference_masks,
    reference_means,
    reference_selection,
)
from flexmoba.nsa.sizes import NsaSizes
from tests.conftest import assert_as_exact_as, assert_bitwise_equal
from tests.problems import DTYPES, as_bools

pytestmark = pytest.mark.usefixtures("small_pieces", "uncompiled_flex")

NAMES = ("q", "k", "v", "gates", "k_cmp", "v_cmp", "k_win", "v_win")
LSE = AuxRequest(lse=True)


@dataclass(frozen=True)
class Problem:
    """Sizes, options and the seed of one call. Without other values, the sizes of the paper."""

    batch: int = 1
    kv_heads: int = 1
    group: int = 2
    q_len: int = 100
    kv_len: int = 100
    head_dim: int = 8
    value_dim: int = 8
    cmp_block: int = 32
    cmp_stride: int = 16
    block_size: int = 64
    topk: int = 16
    sink_blocks: int = 1
    local_blocks: int = 1
    window: int = 512
    scale: float | None = None
    gate_heads: bool = True
    dtype: torch.dtype = torch.float64
    seed: int = 0

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def n_blocks(self) -> int:
        return -(-self.kv_len // self.block_size)

    @property
    def n_compressed(self) -> int:
        return len(range(0, self.kv_len - self.cmp_block + 1, self.cmp_stride))

    @property
    def blocks(self) -> dict[str, int]:
        """The options that the selection depends on."""
        names = ("cmp_block", "cmp_stride", "block_size", "topk", "sink_blocks", "local_blocks")
        return {name: getattr(self, name) for name in names}

    @property
    def options(self) -> dict:
        return self.blocks | {"window": self.window, "scale": self.scale}

    def named(self, others: Sequence[Tensor]) -> dict[str, Tensor]:
        """Names the tensors after the gates; those of the window branch only if there is one."""
        names = NAMES[4:] if self.window > 0 else NAMES[4:6]
        return dict(zip(names, others, strict=False))

    def tensors(self, device: str = "cpu", *, requires_grad: bool = False) -> tuple[Tensor, ...]:
        """Draws the tensors in the order of `NAMES`, in float64, and rounds them."""
        generator = torch.Generator().manual_seed(self.seed)
        queries, keys = (self.batch, self.heads, self.q_len), (self.batch, self.kv_heads)
        gates = (self.batch, self.heads if self.gate_heads else 1, self.q_len)
        shapes = [(*queries, self.head_dim), (*gates, 3)]
        for length in (self.kv_len, self.n_compressed, self.kv_len):
            shapes += [(*keys, length, dim) for dim in (self.head_dim, self.value_dim)]
        q, gates, k, v, *others = (
            torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
        )
        return tuple(
            x.to(device, self.dtype).requires_grad_(requires_grad)
            for x in (q, k, v, gates.sigmoid(), *others)
        )


@st.composite
def problems(draw: DrawFn, max_len: int = 110) -> Problem:
    """Draws problems in which blocks, compressed blocks and windows are often short."""
    kv_len = draw(st.integers(1, max_len) | st.integers(max_len // 2, max_len))
    stride = draw(st.integers(1, 3) | st.sampled_from((4, 8, 16)))
    sinks, locals_ = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    return Problem(
        batch=draw(st.integers(1, 2)),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        q_len=draw(st.just(kv_len) | st.integers(1, kv_len)),
        kv_len=kv_len,
        head_dim=draw(st.sampled_from((8, 16, 33))),
        value_dim=draw(st.sampled_from((8, 16, 33))),
        cmp_block=stride * draw(st.integers(1, 4)),
        cmp_stride=stride,
        block_size=stride * draw(st.integers(1, 4)),
        topk=1 + sinks + locals_ + draw(st.integers(0, 4) | st.just(14)),
        sink_blocks=sinks,
        local_blocks=locals_,
        window=draw(st.integers(1, 40) | st.sampled_from((0, 512))),
        scale=draw(st.sampled_from((None, 0.3, -1.0, 0.0))),
        gate_heads=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


# The edges that implementations get wrong.
EDGES = {
    "the first 31 tokens": Problem(q_len=31, kv_len=31),
    "the end of the first compressed block": Problem(q_len=32, kv_len=32),
    "one token": Problem(q_len=1, kv_len=1),
    "below a block": Problem(q_len=60, kv_len=60),
    "ragged": Problem(q_len=205, kv_len=205, topk=5, block_size=32, window=20),
    "one query": Problem(q_len=1, kv_len=205, topk=5, block_size=32, window=20),
    "a chunk from inside a stride": Problem(q_len=70, kv_len=205, topk=5, block_size=32, window=50),
    "group of 1": Problem(group=1, topk=5, block_size=16),
    "group of 3": Problem(group=3, topk=5, block_size=16),
    "group of 16": Problem(group=16, topk=5, block_size=16),
    "no power of two": Problem(cmp_block=18, cmp_stride=6, block_size=12, topk=5, window=7),
    "one block for both": Problem(cmp_block=16, cmp_stride=16, block_size=16, topk=5),
    "compressed blocks longer than blocks": Problem(block_size=16, cmp_stride=8, topk=4),
    "compressed blocks of a token": Problem(cmp_block=1, cmp_stride=1, block_size=3, topk=4),
    "head dims that differ": Problem(head_dim=12, value_dim=5, topk=5, block_size=16),
    "window of a token": Problem(window=1),
    "no window": Problem(window=0, topk=5, block_size=16),
}
every_edge = pytest.mark.parametrize("problem", EDGES.values(), ids=EDGES)


def selection_of(problem: Problem, q: Tensor, k_cmp: Tensor) -> Tensor:
    return nsa_select(q, k_cmp, problem.kv_len, **problem.blocks, scale=problem.scale)


def reference_selection_of(problem: Problem, q: Tensor, k_cmp: Tensor) -> Tensor:
    """Returns the selection of the oracle as bools ``(B, Hkv, Lq, blocks)``."""
    p = problem
    importance = reference_importance(
        q, k_cmp, p.kv_len, p.cmp_block, p.cmp_stride, p.block_size, scale=p.scale
    )
    return reference_selection(
        importance, p.kv_len, p.block_size, p.topk, p.sink_blocks, p.local_blocks
    )


def nsa_of(problem: Problem, **options):
    """Returns `flex_nsa` as a map from the tensors to the output and the log-sum-exps."""

    def attend(q, k, v, gates, *others) -> tuple[Tensor, Tensor]:
        tensors = problem.named(others)
        out, aux = flex_nsa(q, k, v, gates, **tensors, **problem.options, return_aux=LSE, **options)
        for x in others[len(tensors) :]:  # differentiable also in tensors of no branch
            out = out + x[..., :0].sum()
        return out, aux.lse

    return attend


def dense_of(problem: Problem, selected: Tensor):
    """Returns the oracle in the dtype of its inputs, given a selection as bools."""

    def attend(q, k, v, gates, k_cmp, v_cmp, k_win, v_win) -> tuple[Tensor, Tensor]:
        p = problem
        masks = reference_masks(
            *(selected, p.q_len, p.kv_len, p.cmp_block, p.cmp_stride, p.block_size, p.window)
        )
        branch = by_kv_head if q.is_cuda else reference_branch
        pairs = zip((k_cmp, k, k_win), (v_cmp, v, v_win), masks, strict=True)
        outs, lses = zip(*(branch(q, *pair, p.scale) for pair in pairs), strict=True)
        return (torch.stack(outs, -1) * gates[..., None, :]).sum(-1), torch.stack(lses, -1)

    return attend


def by_kv_head(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Computes `reference_branch` by KV heads, and again in the backward pass, to save memory."""
    heads = k.shape[1]
    tensors = (x.chunk(heads, 1) for x in (q, k, v, mask.expand(-1, heads, -1, -1)))
    parts = [
        checkpoint(reference_branch, *of_head, scale, use_reentrant=False)
        for of_head in zip(*tensors, strict=True)
    ]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 1), torch.cat(lses, 1)


def assert_exact(
    problem: Problem, device: str = "cpu", *, gradients: bool = True, **options
) -> None:
    """Asserts that `flex_nsa` obeys the tolerance policy, given the same selection."""
    tensors = problem.tensors(device)
    selection = selection_of(problem, tensors[0], tensors[4])
    dense = dense_of(problem, as_bools(selection, problem.n_blocks))
    attend = nsa_of(problem, **options)
    assert_as_exact_as(dense, attend, tensors, gradients=gradients)


def assert_rules(p: Problem, device: str = "cpu") -> None:
    """Asserts the order of a row, and that important blocks come before less important ones."""
    q, *_, k_cmp, _, _, _ = p.tensors(device)
    selection = selection_of(p, q, k_cmp).cpu()
    assert selection.dtype == torch.int32
    assert selection.shape == (p.batch, p.kv_heads, p.q_len, p.topk)
    own = (torch.arange(p.kv_len - p.q_len, p.kv_len) // p.block_size).expand(selection.shape[:3])
    assert torch.equal(selection[..., 0], own.int())
    for i in range(1, p.local_blocks + 1):
        local = torch.where(own - i >= p.sink_blocks, own - i, -1)
        assert torch.equal(selection[..., i], local.int())
    for i in range(p.sink_blocks):
        sink = torch.where(own > i, i, -1)
        assert torch.equal(selection[..., 1 + p.local_blocks + i], sink.int())
    selected = as_bools(selection, p.n_blocks)
    assert torch.equal((selection >= 0).sum(-1), selected.sum(-1))  # no block twice
    assert torch.equal(selected.sum(-1), (own + 1).clamp(max=p.topk))
    assert not (selected & (torch.arange(p.n_blocks) > own[..., None])).any()

    importance = reference_importance(
        *(q.cpu(), k_cmp.cpu(), p.kv_len, p.cmp_block, p.cmp_stride, p.block_size), scale=p.scale
    )
    free = selection[..., 1 + p.local_blocks + p.sink_blocks :].long()
    if free.shape[-1]:
        eps = torch.finfo(torch.promote_types(p.dtype, torch.float32)).eps
        slack = 100 * eps * p.group * p.cmp_block
        values = importance.gather(-1, free.clamp(min=0)).where(free >= 0, -torch.inf)
        assert (values[..., 1:] <= values[..., :-1] + slack).all()
        left_out = importance.masked_fill(selected, -torch.inf)
        left_out = left_out.where(torch.arange(p.n_blocks) <= own[..., None], -torch.inf)
        lowest = values.masked_fill(free < 0, torch.inf).amin(-1)
        assert (left_out.amax(-1) <= lowest + slack).all()


# ---- The oracle ---------------------------------------------------------------------------------


def only(branch: int, q: Tensor) -> Tensor:
    """Returns gates that are 1 for a branch and 0 for the others."""
    return torch.nn.functional.one_hot(torch.tensor(branch), 3).to(q).expand(*q.shape[:3], 3)


@pytest.mark.parametrize("function", [nsa_reference, flex_nsa])
@pytest.mark.parametrize(
    ("branch", "options", "queries"),
    [
        (0, {"cmp_block": 1, "cmp_stride": 1}, 50),  # a compressed block is a token
        (1, {"topk": 4, "block_size": 16}, 50),  # all blocks
        (1, {"topk": 3, "block_size": 16}, 48),  # as long as topk blocks are all
        (2, {"window": 50}, 50),
        (2, {"window": 49}, 49),
    ],
)
def test_branches_that_see_everything_are_full_attention(function, branch, options, queries):
    q, k, v = Problem(q_len=50, kv_len=50).tensors()[:3]
    full = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    out = function(q, k, v, only(branch, q), **options)
    torch.testing.assert_close(out[:, :, :queries], full[:, :, :queries])
    if queries < 50:
        assert (out - full)[:, :, queries:].abs().amax((0, 1, 3)).min() > 1e-6


@pytest.mark.parametrize("function", [nsa_reference, flex_nsa])
def test_the_compressed_branch_by_hand(function):
    """Tests the sizes of the paper: nothing for 31 tokens, then a block every 16 tokens."""
    q, k, v = Problem(q_len=70, kv_len=70).tensors()[:3]
    out = function(q * 0, k, v, only(0, q))
    means = torch.stack([v[:, :, i : i + 32].mean(2) for i in (0, 16, 32)], 2)
    means = means.repeat_interleave(2, dim=1)
    assert (out[:, :, :31] == 0).all()
    for first, end, n in ((31, 47, 1), (47, 63, 2), (63, 70, 3)):
        expected = means[:, :, :n].mean(2, keepdim=True).expand(-1, -1, end - first, -1)
        torch.testing.assert_close(out[:, :, first:end], expected)


@pytest.mark.parametrize("function", [nsa_reference, flex_nsa])
def test_the_window_by_hand(function):
    """Tests that a window of w tokens includes the query's own."""
    q, k, v = Problem(q_len=9, kv_len=9).tensors()[:3]
    out = function(q * 0, k, v, only(2, q), window=3)
    for t in range(9):
        expected = v[:, :, max(0, t - 2) : t + 1].mean(2).expand(-1, 2, -1)
        torch.testing.assert_close(out[:, :, t], expected)


@pytest.mark.parametrize("function", [nsa_reference, flex_nsa])
def test_without_a_window_its_gate_value_has_no_effect(function):
    """Tests NaN, zero gradients, and that the other branches stay."""
    q, k, v, gates = Problem(topk=5, block_size=16).tensors(requires_grad=True)[:4]
    options = {"topk": 5, "block_size": 16}
    no_window = gates * torch.tensor([1.0, 1.0, 0.0])
    expected = function(q, k, v, no_window, **options, window=9)
    without = torch.cat([gates[..., :2], torch.full_like(gates[..., :1], torch.nan)], -1)
    out = function(q, k, v, without, **options, window=0)
    torch.testing.assert_close(out, expected)
    (grad,) = torch.autograd.grad(function(q, k, v, gates, **options, window=0).sum(), gates)
    assert (grad[..., 2] == 0).all()
    assert grad[..., :2].abs().sum() > 0


@pytest.mark.parametrize("function", [nsa_reference, flex_nsa])
def test_gates_are_factors_that_need_not_add_to_one(function):
    q, k, v, gates = Problem(topk=5, block_size=16, window=9).tensors()[:4]
    options = {"topk": 5, "block_size": 16, "window": 9}
    parts = [function(q, k, v, only(i, q), **options) for i in range(3)]
    expected = sum(7 * gates[..., i, None] * x for i, x in enumerate(parts))
    torch.testing.assert_close(function(q, k, v, 7 * gates, **options), expected)


def test_importance_by_hand():
    """Tests Eq. 9 at the sizes of the paper: weights 1 2 2 2 1 for blocks 4j - 1 to 4j + 3."""
    n = (256 - 32) // 16 + 1
    q = torch.eye(n, dtype=torch.float64)[None, None] * 1e4  # query i sees block i alone
    k_cmp = torch.eye(n, dtype=torch.float64)[None, None]
    q = torch.cat([q[:, :, :1].expand(-1, -1, 256 - n, -1), q], dim=2)[:, :, -n:]
    # All queries are near the end, where they see all compressed blocks but the last ones.
    importance = reference_importance(q, k_cmp, 256, 32, 16, 64)[0, 0]
    seen = [i for i in range(n) if i * 16 + 31 <= 256 - n + i]
    assert seen == list(range(15))
    for i in seen:
        expected = [float({-1: 1, 0: 2, 1: 2, 2: 2, 3: 1}.get(i - 4 * j, 0)) for j in range(4)]
        assert importance[i].tolist() == expected


def test_the_oracle_sums_importance_over_the_group():
    problem = Problem(kv_heads=2, group=3, block_size=16)
    q, *_, k_cmp, _, _, _ = problem.tensors()
    whole = reference_importance(q, k_cmp, 100, 32, 16, 16)
    for head in range(2):
        alone = [
            reference_importance(q[:, [h]], k_cmp[:, [head]], 100, 32, 16, 16)
            for h in range(3 * head, 3 * head + 3)
        ]
        torch.testing.assert_close(whole[:, head], sum(alone)[:, 0])


def test_the_oracle_by_kv_heads_is_the_oracle():
    """Tests output, log-sum-exp and gradients, bitwise."""
    q, k, v = Problem(batch=2, kv_heads=3, q_len=40).tensors(requires_grad=True)[:3]
    mask = torch.rand(2, 1, 40, 100, generator=torch.Generator().manual_seed(0)) < 0.5
    results = []
    for branch in (reference_branch, by_kv_head):
        out, lse = branch(q, k, v, mask, 0.3)
        grads = torch.autograd.grad((out.sin() + lse.sin()[..., None]).sum(), (q, k, v))
        results.append((out, lse, *grads))
    for actual, expected in zip(*results, strict=True):
        assert_bitwise_equal(actual, expected)


# ---- The selection ------------------------------------------------------------------------------


@given(problems())
@settings(max_examples=60)
def test_selection_equals_the_oracle(problem):
    q, *_, k_cmp, _, _, _ = problem.tensors()
    selection = selection_of(problem, q, k_cmp)
    expected = reference_selection_of(problem, q, k_cmp)
    assert torch.equal(as_bools(selection, problem.n_blocks), expected)


@every_edge
def test_selection_at_the_edges(problem):
    q, *_, k_cmp, _, _, _ = problem.tensors()
    selection = selection_of(problem, q, k_cmp)
    expected = reference_selection_of(problem, q, k_cmp)
    assert torch.equal(as_bools(selection, problem.n_blocks), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(problems())
@settings(max_examples=25)
def test_rules_of_the_selection(dtype, problem):
    """Tests the order of a row, and that important blocks come before less important ones."""
    assert_rules(replace(problem, dtype=dtype))


def test_the_later_of_equally_important_blocks_wins():
    """Tests zero queries, which weigh all compressed blocks alike, and blocks with weight 0."""
    q, k_cmp = torch.zeros(1, 1, 200, 8), torch.randn(1, 1, 24, 8)
    blocks = {"cmp_block": 16, "cmp_stride": 8, "block_size": 16, "topk": 5}
    selection = nsa_select(q, k_cmp, 200, **blocks)
    # Block 0 has 3 and others have 4 times the weight. Block 11 ends after the query.
    assert selection[0, 0, 191].tolist() == [11, 10, 0, 9, 8]
    # The only compressed block holds 16 tokens, so blocks 4 to 7 have no importance.
    blocks = {"cmp_block": 16, "cmp_stride": 4, "block_size": 4, "topk": 4}
    selection = nsa_select(q[:, :, :18], k_cmp[:, :, :1], 18, **blocks)
    assert selection[0, 0, 17].tolist() == [4, 3, 0, 2]
    selection = nsa_select(
        q[:, :, :15], k_cmp[:, :, :0], 15, **blocks | {"topk": 2}, local_blocks=0
    )
    assert selection[0, 0, 14].tolist() == [3, 0]


def test_blocks_under_the_same_compressed_blocks_tie_exactly():
    """Tests compressed blocks longer than blocks, which give neighbours the same importance."""
    blocks = {"cmp_block": 32, "cmp_stride": 4, "block_size": 4, "topk": 9}
    problem = Problem(q_len=120, kv_len=120, **blocks)
    for seed in range(5):
        q, *_, k_cmp, _, _, _ = replace(problem, seed=seed).tensors()
        actual = as_bools(selection_of(problem, q, k_cmp), 30)
        assert torch.equal(actual, reference_selection_of(problem, q, k_cmp))


def test_nan_is_the_highest_importance():
    q = torch.randn(1, 1, 100, 8)
    k_cmp = torch.randn(1, 1, 5, 8)
    k_cmp[:, :, 4] = torch.nan
    selection = nsa_select(q, k_cmp, 100, block_size=16, topk=4)
    assert selection[0, 0, 95].tolist() == [5, 4, 0, 3]  # all weights are NaN: the later block
    assert torch.equal(
        selection[:, :, :95],
        nsa_select(q, k_cmp.nan_to_num(7.0), 100, block_size=16, topk=4)[:, :, :95],
    )


# ---- The attention ------------------------------------------------------------------------------


@given(problems())
@settings(max_examples=40)
def test_equals_the_oracle(problem):
    q, k, v, gates, *others = problem.tensors()
    tensors = problem.named(others)
    actual = flex_nsa(q, k, v, gates, **tensors, **problem.options)
    expected = nsa_reference(q, k, v, gates, **tensors, **problem.options)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@given(problems())
@settings(max_examples=20)
def test_is_as_exact_as_dense_attention_given_the_selection(dtype, problem):
    """Tests output, log-sum-exps and all eight gradients."""
    assert_exact(replace(problem, dtype=dtype))


@every_edge
def test_exact_at_the_edges(problem):
    assert_exact(problem)
    assert_exact(replace(problem, dtype=torch.bfloat16, kv_heads=2))


@given(problems())
@settings(max_examples=15)
def test_the_masked_backend(problem):
    with torch.no_grad():
        assert_exact(problem, gradients=False, impl="masked")


@example(Problem(q_len=90, kv_len=90, topk=5, block_size=16, window=12), 40)
@given(problems(), st.integers(0, 109))
@settings(max_examples=30)
def test_later_tokens_do_not_change_earlier_outputs_by_a_bit(problem, last):
    p = problem
    last = min(last, p.kv_len - 1)
    before = p.tensors()
    others = replace(p, seed=p.seed + 1).tensors()
    first_query = p.kv_len - p.q_len
    ends = {
        **dict.fromkeys(("q", "gates"), torch.arange(first_query, p.kv_len)),
        **dict.fromkeys(("k", "v", "k_win", "v_win"), torch.arange(p.kv_len)),
        **dict.fromkeys(
            ("k_cmp", "v_cmp"), torch.arange(p.n_compressed) * p.cmp_stride + p.cmp_block - 1
        ),
    }
    seen = slice(0, max(0, last + 1 - first_query))
    expected = [x[:, :, seen] for x in nsa_of(p)(*before)]
    for future in (lambda x: x, lambda x: torch.full_like(x, torch.nan)):
        changed = [
            torch.where((ends[name] <= last)[:, None], x, future(y))
            for name, x, y in zip(NAMES, before, others, strict=True)
        ]
        for actual, x in zip(nsa_of(p)(*changed), expected, strict=True):
            assert_bitwise_equal(actual[:, :, seen], x)


@given(problems(), st.integers(1, 50))
@settings(max_examples=15)
def test_chunks_are_parts_of_the_whole(problem, chunk):
    """Tests chunks, each with all keys up to its last query, against all queries at once."""
    p = replace(problem, q_len=problem.kv_len)
    q, k, v, gates, k_cmp, v_cmp, k_win, v_win = p.tensors()
    whole = nsa_of(p)(q, k, v, gates, k_cmp, v_cmp, k_win, v_win)
    for start in range(0, p.kv_len, max(chunk, p.kv_len // 4)):
        end = min(start + max(chunk, p.kv_len // 4), p.kv_len)
        n = replace(p, kv_len=end).n_compressed
        part = nsa_of(p)(
            *(q[:, :, start:end], k[:, :, :end], v[:, :, :end], gates[:, :, start:end]),
            *(k_cmp[:, :, :n], v_cmp[:, :, :n], k_win[:, :, :end], v_win[:, :, :end]),
        )
        for actual, expected in zip(part, whole, strict=True):
            torch.testing.assert_close(actual, expected[:, :, start:end], rtol=0, atol=1e-10)


def test_queries_that_see_no_compressed_block():
    """Tests zeros, -inf and zero gradients for the first 31 tokens, also if values are NaN."""
    tensors = Problem(q_len=40, kv_len=40).tensors(requires_grad=True)
    q, k, v, _, k_cmp, v_cmp, _, _ = tensors
    named = {"k_cmp": k_cmp, "v_cmp": torch.full_like(v_cmp, torch.nan).requires_grad_()}
    out, aux = flex_nsa(q, k, v, only(0, q), **named, return_aux=LSE)
    assert (out[:, :, :31] == 0).all()
    assert out[:, :, 31:].isnan().all()
    assert (aux.lse[:, :, :31, 0] == -torch.inf).all()
    assert aux.lse[:, :, 31:, 0].isfinite().all()
    out, aux = flex_nsa(q, k, v, only(0, q), k_cmp=k_cmp, v_cmp=v_cmp, return_aux=LSE)
    early = out[:, :, :31].sum() + aux.lse[:, :, :31, 0].exp().sum()
    for grad in torch.autograd.grad(early, (q, k_cmp, v_cmp)):
        assert (grad == 0).all()


def test_a_sequence_without_compressed_blocks_has_zero_gradients_for_them():
    tensors = Problem(q_len=31, kv_len=31).tensors(requires_grad=True)
    out, lse = nsa_of(Problem(q_len=31, kv_len=31))(*tensors)
    grads = torch.autograd.grad(out.sum() + lse[..., 1:].sum(), tensors)
    assert all(x.isfinite().all() for x in (out, lse[..., 1:], *grads))
    assert [x.shape for x in grads] == [x.shape for x in tensors]


def test_the_compressed_branch_alone_trains_the_scores():
    """Tests that no gradient flows through the selection."""
    problem = Problem(topk=5, block_size=16)
    tensors = problem.tensors(requires_grad=True)
    for branch, trained in ((0, True), (1, False), (2, False)):
        gates = only(branch, tensors[0])
        out, _ = nsa_of(problem)(*tensors[:3], gates, *tensors[4:])
        grad = torch.autograd.grad(out.square().sum(), tensors[4])[0]
        assert bool((grad != 0).any()) == trained
    assert not selection_of(problem, tensors[0], tensors[4]).requires_grad


@given(problems())
@settings(max_examples=15)
def test_defaults_are_means_and_the_keys_of_the_selected_branch(problem):
    q, k, v, gates = problem.tensors()[:4]
    means = [reference_means(x, problem.cmp_block, problem.cmp_stride) for x in (k, v)]
    named = problem.named((*means, k, v))
    expected = nsa_reference(q, k, v, gates, **named, **problem.options)
    for function in (flex_nsa, nsa_reference):
        actual = function(q, k, v, gates, **problem.options)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_means_accumulate_precisely(dtype):
    x = (torch.randn(1, 2, 200, 8, dtype=torch.float64) + 100).to(dtype)
    means = block_means_of(x, NsaSizes(32, 16, 64, 16, 1, 1))
    assert means.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(means, reference_means(x, 32, 16), rtol=2 * eps, atol=0)


def test_a_selection_of_ones_own():
    """Tests a selection in any order, with -1 anywhere, of any integer dtype."""
    problem = Problem(kv_heads=2, block_size=16)
    q, k, v, gates = problem.tensors()[:4]
    generator = torch.Generator().manual_seed(0)
    selection = torch.rand(1, 2, 100, 7, generator=generator).argsort(-1)[..., :3]
    selection[torch.rand(selection.shape, generator=generator) < 0.3] = -1
    expected = nsa_reference(q, k, v, gates, block_size=16, selection=selection)
    for dtype in (torch.int32, torch.int64):
        actual = flex_nsa(q, k, v, gates, block_size=16, selection=selection.to(dtype))
        torch.testing.assert_close(actual, expected)


def test_the_log_sum_exps_are_returned_on_request_only():
    q, k, v, gates = Problem().tensors()[:4]
    assert isinstance(flex_nsa(q, k, v, gates), Tensor)
    out, aux = flex_nsa(q, k, v, gates, return_aux=AuxRequest())
    assert aux.lse is None
    out_too, aux = flex_nsa(q, k, v, gates, return_aux=LSE)
    assert_bitwise_equal(out_too, out)
    assert (aux.lse.shape, aux.lse.dtype) == ((1, 2, 100, 3), torch.float64)
    halves = [x.bfloat16() for x in (q, k, v, gates)]
    assert flex_nsa(*halves, return_aux=LSE)[1].lse.dtype == torch.float32


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"q_len": 0}, {"q_len": 0, "kv_len": 0}])
def test_no_queries(sizes):
    problem = Problem(**sizes)
    tensors = problem.tensors(requires_grad=True)
    out, lse = nsa_of(problem)(*tensors)
    assert out.shape == (problem.batch, 2, problem.q_len, 8)
    assert lse.shape == (problem.batch, 2, problem.q_len, 3)
    for x, grad in zip(tensors, torch.autograd.grad(out.sum(), tensors), strict=True):
        assert (grad.shape, grad.abs().sum().item()) == (x.shape, 0)


def test_twice_the_same_bits():
    problem = Problem(kv_heads=2, topk=5, block_size=16, dtype=torch.bfloat16)
    tensors = problem.tensors(requires_grad=True)
    runs = []
    for _ in range(2):
        out, lse = nsa_of(problem)(*tensors)
        grads = torch.autograd.grad(out.square().sum() + lse[:, :, 31:].sum(), tensors)
        runs.append((out, lse, *grads))
    for first, second in zip(*runs, strict=True):
        assert_bitwise_equal(first, second)


def test_gradients_do_not_change_the_result():
    """Tests the order of the branches, which depends on gradients."""
    problem = Problem(kv_heads=2, topk=5, block_size=16, dtype=torch.bfloat16)
    with_gradients = nsa_of(problem)(*problem.tensors(requires_grad=True))
    for x, y in zip(nsa_of(problem)(*problem.tensors()), with_gradients, strict=True):
        assert_bitwise_equal(x, y)


def test_autocast_does_not_change_the_result():
    options = {"cmp_block": 4, "cmp_stride": 2, "block_size": 4, "topk": 9}
    problem = Problem(group=1, q_len=200, kv_len=200, **options, dtype=torch.float32)
    tensors = problem.tensors()
    expected = nsa_of(problem)(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        actual = nsa_of(problem)(*tensors)
    for x, y in zip(actual, expected, strict=True):
        assert_bitwise_equal(x, y)


@pytest.mark.parametrize("window", [20, 0])
def test_compiled_without_a_graph_break(window):
    problem = Problem(kv_heads=2, q_len=70, topk=5, block_size=16, window=window)
    compiled = torch.compile(nsa_of(problem), fullgraph=True, backend="eager")
    for length in (100, 123, 150):  # the second length becomes symbolic
        tensors = replace(problem, kv_len=length).tensors(requires_grad=True)
        results = []
        for function in (compiled, nsa_of(problem)):
            out, lse = function(*tensors)
            loss = out.square().sum() + lse[..., 1:].sum()
            results.append((out, lse, *torch.autograd.grad(loss, tensors)))
        for actual, expected in zip(*results, strict=True):
            assert_bitwise_equal(actual, expected)


# ---- The interface ------------------------------------------------------------------------------

SIZES = "cmp_block=32, cmp_stride=16, block_size=64, topk=16, sink_blocks=1, local_blocks=1"
TENSORS = "(q, k, v, gates, *, k_cmp=None, v_cmp=None, k_win=None, v_win=None"
SEQUENCES = "cu_seqlens=None, document_ids=None, key_padding_mask=None"
SIGNATURES = {
    flex_nsa: (
        f"{TENSORS}, {SIZES}, window=512, scale=None, impl='auto', return_aux=None, "
        f"selection=None, {SEQUENCES})"
    ),
    nsa_reference: f"{TENSORS}, {SIZES}, window=512, scale=None, selection=None, {SEQUENCES})",
    nsa_select: f"(q, k_cmp, kv_len, *, {SIZES}, scale=None, {SEQUENCES})",
}


@pytest.mark.parametrize("function", SIGNATURES)
def test_signature_and_docstring(function):
    signature = inspect.signature(function)
    unannotated = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(unannotated)) == SIGNATURES[function]
    text = inspect.getdoc(function)
    for words in ("``(B, Hq, Lq, D)``", "arXiv 2502.11089", "Eq. ", ">>> ", "topk"):
        assert words in text


def called(**changes):
    """Calls `flex_nsa` with some arguments changed, and the others as in `Problem`."""
    tensors = dict(zip(NAMES, Problem().tensors(), strict=True))
    return flex_nsa(**tensors | changes)


def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
        ({"q": zeros(1, 2, 101, 8)}, ValueError, "Lq=101 and Lk=100; pass all keys"),
        ({"gates": zeros(1, 2, 100, 2)}, ValueError, r"gates.*\(1, 2, 100, 3\), got.*2\); pass"),
        ({"gates": zeros(1, 3, 100, 3)}, ValueError, r"gates.*\(1, 2, 100, 3\), got.*; pass"),
        ({"gates": zeros(1, 2, 100, 3).float()}, ValueError, "q and gates.*float32; cast"),
        ({"gates": None}, TypeError, "gates must be a tensor, got NoneType"),
        ({"k_cmp": zeros(1, 1, 6, 8)}, ValueError, r"k_cmp.*\(1, 1, 5, 8\), got.*6, 8\); pass"),
        ({"v_cmp": zeros(1, 1, 6, 8)}, ValueError, r"v_cmp.*\(1, 1, 5, 8\), got.*6, 8\); pass"),
        ({"k_win": zeros(1, 2, 100, 8)}, ValueError, r"k_win.*\(1, 1, 100, 8\), got.*; pass"),
        ({"v_win": zeros(1, 1, 100, 9)}, ValueError, r"v_win.*\(1, 1, 100, 8\), got.*; pass"),
        ({"v_cmp": None}, ValueError, "v_cmp must be passed with k_cmp, got None; pass both"),
        ({"k_win": None}, ValueError, "k_win must be passed with v_win, got None; pass both"),
        ({"cmp_stride": 12}, ValueError, "cmp_stride=12, cmp_block=32 and block_size=64; use"),
        ({"block_size": 40}, ValueError, "cmp_stride=16, cmp_block=32 and block_size=40; use"),
        ({"cmp_block": 0}, ValueError, "cmp_block must be at least 1, got 0; pass"),
        ({"cmp_stride": 2.0}, TypeError, "cmp_stride must be an int, got 2.0"),
        ({"window": -1}, ValueError, "window must be at least 1, got -1; pass.*or 0"),
        ({"window": 0}, ValueError, "to which k_win and v_win belong; pass neither"),
        ({"topk": 2}, ValueError, "topk=2 is too small.*use at least 3"),
        ({"sink_blocks": -1}, ValueError, "sink_blocks must be at least 0, got -1"),
        ({"scale": "1"}, TypeError, "scale must be a Python number or None, got str; pass"),
        ({"impl": "fast"}, ValueError, "impl must be one of 'auto'.*got 'fast'"),
        (
            {"impl": "fast", "q": zeros(1, 2, 0, 8), "gates": zeros(1, 2, 0, 3)},
            ValueError,
            "impl must be one of 'auto'.*got 'fast'",
        ),
        ({"impl": "fused"}, NotImplementedError, "needs inputs on CUDA, got cpu; use"),
        ({"return_aux": True}, TypeError, "return_aux must be .*got bool"),
        ({"selection": [0]}, TypeError, "selection must be a tensor, got list"),
        (
            {"selection": zeros(1, 2, 100, 3).int()},
            ValueError,
            r"\(1, 1, 100, 'topk'\), got \(1, 2, 100, 3\); pass one row",
        ),
        ({"selection": zeros(1, 1, 100, 3)}, TypeError, "selection must hold int32.*; call"),
        (
            {"selection": torch.full((1, 1, 100, 1), 2)},
            ValueError,
            "block indices from 0 to 1, or -1 for none, got 2; number",
        ),
        ({"cache": None}, TypeError, "unexpected.* 'cache'"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_errors(changes, error, match):
    with pytest.raises(error, match=match):
        called(**changes)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((zeros(1, 2, 99, 8), zeros(1, 1, 5, 8), 98), ValueError, "kv_len=98 and Lq=99; count"),
        ((zeros(1, 2, 99, 8), zeros(1, 1, 5, 8), 0), ValueError, "kv_len must be at least 1"),
        ((zeros(1, 2, 99, 8), zeros(1, 1, 4, 8), 99), ValueError, r"k_cmp.*\(1, 1, 5, 8\), got"),
        ((zeros(1, 3, 99, 8), zeros(1, 2, 5, 8), 99), ValueError, "of k_cmp, got 3 and 2; call"),
        ((zeros(2, 99, 8), zeros(1, 2, 5, 8), 99), ValueError, "q must have four dimensions"),
    ],
)
def test_errors_of_the_selection(arguments, error, match):
    with pytest.raises(error, match=match):
        nsa_select(*arguments)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # a use in torch
@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_raises(name):
    tensors = dict(zip(NAMES, Problem().tensors(), strict=True))
    with forward_ad.dual_level():
        tensors[name] = forward_ad.make_dual(tensors[name], torch.ones_like(tensors[name]))
        with pytest.raises(NotImplementedError, match=f"but {name} has a tangent; use"):
            flex_nsa(**tensors)
