"""Tests of `MobaCache`: chunks and steps with a cache equal one call without a cache."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from flexmoba import MobaCache, flex_moba, moba_select
from flexmoba.gate import block_means
from tests.conftest import assert_as_exact_as_dense, assert_bitwise_equal, with_lse
from tests.problems import Problem, problems

pytestmark = pytest.mark.usefixtures("small_pieces")


def cache_for(problem: Problem, max_len: int | None = None) -> MobaCache:
    return MobaCache(
        problem.batch,
        problem.kv_heads,
        problem.head_dim,
        value_dim=problem.value_dim,
        block_size=problem.block_size,
        max_len=max_len,
        dtype=problem.dtype,
    )


def whole(problems_):
    """Returns the problems with as many queries as keys (self-attention)."""
    return problems_.map(lambda p: Problem(**(vars(p) | {"q_len": p.kv_len})))


@given(whole(problems(is_causal=st.just(True))), st.data())
def test_chunks_and_steps_equal_one_call(problem, data):
    q, k, v = problem.tensors()
    cache = cache_for(problem, data.draw(st.sampled_from([None, problem.kv_len])))
    options = {"block_size": problem.block_size, "topk": problem.topk}

    def in_chunks(q, k, v):
        cache.reset()
        parts, start = [], 0
        while start < problem.kv_len:
            n = data.draw(st.integers(1, 3) | st.integers(1, problem.kv_len))
            part = slice(start, start + n)
            parts.append(attend(q[:, :, part], k[:, :, part], v[:, :, part]))
            start += n
        return tuple(torch.cat(x, 2) for x in zip(*parts, strict=True))

    attend = with_lse(flex_moba, **options, cache=cache)
    selection = moba_select(q, k, **options)
    assert_as_exact_as_dense(in_chunks, q, k, v, problem.mask_of(selection))
    assert cache.lengths.tolist() == [problem.kv_len] * problem.batch
    full = problem.kv_len // problem.block_size
    means = block_means(k, problem.block_size)
    assert_bitwise_equal(cache.means[:, :, :full], means[:, :, :full])


@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3)), min_size=1, max_size=4),
    st.sampled_from(["left", "right"]),
)
def test_rows_of_different_lengths_are_sequences_of_their_own(seed, rows, side):
    steps = 3
    problem = Problem(batch=len(rows), kv_heads=2, group=2, q_len=48, kv_len=48, seed=seed, topk=3)
    q, k, v = problem.tensors()
    lengths = torch.tensor([length for length, _ in rows])
    n = int(lengths.max()) + 2
    place = torch.arange(n)
    first = (n - lengths if side == "left" else 0 * lengths)[:, None]
    real = (place >= first) & (place < first + lengths[:, None])
    source = (place - first).clamp(0, n - 1)

    def padded(x):
        index = source[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return x.gather(2, index).masked_fill(~real[:, None, :, None], torch.nan)

    cache = cache_for(problem, max_len=48)
    expected = cache.next_positions(n, real)
    positions = cache.append(padded(k), padded(v), real)
    assert_bitwise_equal(positions, expected)
    out, lse = cache.attend(padded(q), positions, problem.topk)
    options = {"cache": cache_for(problem, max_len=48), "key_padding_mask": real}
    attend = with_lse(flex_moba, problem.block_size, problem.topk, **options)
    for actual, expected in zip(attend(*map(padded, (q, k, v))), (out, lse), strict=True):
        assert_bitwise_equal(actual, expected)
    assert not out[~real[:, None].expand(-1, 4, -1)].any()
    assert (lse[~real[:, None].expand(-1, 4, -1)] == float("-inf")).all()
    for step in range(steps):
        at = (lengths + step)[:, None, None, None]
        now = [x.gather(2, at.expand(-1, x.shape[1], 1, x.shape[3])) for x in (q, k, v)]
        result = flex_moba(*now, problem.block_size, problem.topk, cache=cache)
        for row, length in enumerate(lengths.tolist()):
            alone = [x[row : row + 1, :, : length + step + 1] for x in (q, k, v)]
            expected = flex_moba(*alone, problem.block_size, problem.topk)
            torch.testing.assert_close(result[row, :, 0], expected[0, :, -1])
            if step == 0 and length:
                torch.testing.assert_close(out[row][:, real[row]], expected[0, :, :-1])


@given(
    whole(problems(is_causal=st.just(True), dtype=st.just(torch.float64), max_len=60)), st.data()
)
def test_values_reach_only_queries_that_see_them(problem, data):
    q, k, v = problem.tensors()
    cache = cache_for(problem, data.draw(st.sampled_from([None, problem.kv_len])))
    args = (problem.block_size, problem.topk)
    flex_moba(q, k, torch.full_like(v, torch.nan), *args, cache=cache)
    cache.reset()
    v[:, :, data.draw(st.integers(0, problem.kv_len - 1))] = torch.inf
    expected = flex_moba(q, k, v, *args)
    start = 0
    while start < problem.kv_len:
        part = slice(start, start + data.draw(st.integers(1, 20)))
        out = flex_moba(*(x[:, :, part] for x in (q, k, v)), *args, cache=cache)
        finite = expected[:, :, part].isfinite()
        assert_bitwise_equal(out.isfinite(), finite)
        torch.testing.assert_close(out[finite], expected[:, :, part][finite])
        start = part.stop


def decode(cache, problem, tensors, start, stop):
    outs = []
    for i in range(start, stop):
        now = [x[:, :, i : i + 1] for x in tensors]
        outs.append(flex_moba(*now, problem.block_size, problem.topk, cache=cache))
    return torch.cat(outs, 2)


def test_crop_reset_and_reorder():
    problem = Problem(batch=3, kv_heads=2, group=2, q_len=40, kv_len=40)
    tensors = problem.tensors()
    cache = cache_for(problem)
    expected = decode(cache, problem, tensors, 0, 40)
    for length in (33, 20, 0):
        cache.crop(length)
        assert_bitwise_equal(decode(cache, problem, tensors, length, 40), expected[:, :, length:])
    cache.crop(torch.tensor([10, 10, 50]))
    assert cache.lengths.tolist() == [10, 10, 40]
    cache.reset()
    decode(cache, problem, tensors, 0, 25)
    rows = torch.tensor([2, 0, 0])
    cache.reorder(rows)
    moved = [x[rows] for x in tensors]
    assert_bitwise_equal(decode(cache, problem, moved, 25, 40), expected[rows, :, 25:])
    cache.crop(25)
    fewer = torch.tensor([2, 0])
    cache.reorder(fewer)
    kept = [x[fewer] for x in moved]
    assert_bitwise_equal(decode(cache, problem, kept, 25, 40), expected[rows[fewer], :, 25:])


@pytest.mark.parametrize("max_len", [None, 300])
@pytest.mark.parametrize("gate", ["token", "tile"])
def test_a_cache_of_inference_mode_goes_on_outside(gate, max_len):
    problem = Problem(batch=2, q_len=300, kv_len=300, block_size=128, topk=2)
    q, k, v = problem.tensors()
    rows = torch.tensor([1, 0, 1])
    expected = flex_moba(q, k, v, 128, 2, gate=gate)[rows]

    def attend(tensors, start, end):
        new = (x[:, :, start:end] for x in tensors)
        return flex_moba(*new, 128, 2, gate=gate, cache=cache)

    with torch.inference_mode():
        cache = cache_for(problem, max_len)
        attend((q, k, v), 0, 100)
        attend((q, k, v), 100, 150)  # the storage grows
        cache.reorder(rows)
        cache.crop(140)
    moved = [x[rows] for x in (q, k, v)]
    torch.testing.assert_close(attend(moved, 140, 300), expected[:, :, 140:])
    with torch.inference_mode():
        cache.crop(200)
        torch.testing.assert_close(attend(moved, 200, 300), expected[:, :, 200:])


def test_full_attention_and_a_replayed_step_without_room():
    problem = Problem(q_len=13, kv_len=13, kv_heads=2, group=2)
    q, k, v = problem.tensors()
    cache = cache_for(problem, max_len=12)
    positions = cache.append(k[:, :, :12], v[:, :, :12])
    out, _ = cache.attend(q[:, :, :12], positions, None)
    expected = flex_moba(*(x[:, :, :12] for x in (q, k, v)), problem.block_size, None)
    torch.testing.assert_close(out, expected)
    before = cache.k[:, :, :12].clone()
    with pytest.raises(ValueError, match="12 tokens, of which 12 are taken, so 1 more"):
        cache.append(k[:, :, 12:], v[:, :, 12:])
    cache._longest_row = 0  # a replayed graph does not update this number, so nothing raises
    positions = cache.append(k[:, :, 12:], v[:, :, 12:])
    assert cache.attend(q[:, :, 12:], positions, 3)[0].isnan().all()
    assert_bitwise_equal(cache.k[:, :, :12], before)


def test_a_compiled_step_compiles_once():
    problem = Problem(batch=2, kv_heads=2, group=2, q_len=60, kv_len=60)
    tensors = problem.tensors()
    eager = decode(cache_for(problem, 60), problem, tensors, 0, 60)
    counter = CompileCounter()
    cache = cache_for(problem, 60)

    @torch.compile(fullgraph=True, backend=counter)
    def step(q, k, v):
        return flex_moba(q, k, v, problem.block_size, problem.topk, cache=cache)

    out = [step(*(x[:, :, i : i + 1] for x in tensors)) for i in range(60)]
    assert_bitwise_equal(torch.cat(out, 2), eager)
    assert counter.frame_count == 1


Q = torch.zeros(1, 2, 1, 8, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda c: flex_moba(Q, Q, Q, 5, 2, cache=c), ValueError, "of the cache, 4, got 5"),
        (lambda c: flex_moba(Q, Q, Q, 4, 2, cache=c, impl="routed"), NotImplementedError, "routed"),
        (lambda c: flex_moba(Q, Q, Q, 4, 2, cache=c, is_causal=False), ValueError, "is_causal"),
        (lambda c: flex_moba(Q, Q.expand(1, 2, 3, 8), Q.expand(1, 2, 3, 8), 4, 2, cache=c),
         ValueError, "Lq=1 and Lk=3"),
        (lambda c: c.append(Q[..., :4], Q), ValueError, r"k must be \(1, 2, 1, 8\)"),
        (lambda c: c.append(Q.float(), Q.float()), ValueError, "torch.float64 on cpu"),
        (lambda c: c.append(Q, Q, torch.ones(1, 2).bool()), ValueError, "key_padding_mask"),
        (lambda c: c.attend(Q[:, [0, 0, 0]], c.append(Q, Q), 2), ValueError, "got 3"),
        (lambda c: c.append(Q[:, :, [0, 0, 0]], Q[:, :, [0, 0]]), ValueError,
         r"v must be \(1, 2, 3, 8\)"),
        (lambda c: c.attend(Q.float(), c.append(Q, Q), 2), ValueError, "q must be torch.float64"),
        (lambda c: c.attend(Q, c.append(Q, Q)[0], 2), ValueError, r"and \(1,\)"),
        (lambda c: c.attend(Q, c.append(Q, Q), 2.5), TypeError, "topk"),
        (lambda c: c.attend(Q, c.append(Q, Q), 2, scale="1"), TypeError, "scale"),
        (lambda c: c.crop(-1), ValueError, "-1"),
        (lambda c: c.crop(torch.tensor([-3])), ValueError, "-3"),
        (lambda c: c.crop(2.0), TypeError, "float"),
        (lambda c: flex_moba(Q.clone().requires_grad_(), Q, Q, 4, 2, cache=c),
         NotImplementedError, "no_grad"),
        (lambda c: flex_moba(Q, Q.clone().requires_grad_(), Q, 4, 2, cache=c),
         NotImplementedError, "no_grad"),
        (lambda c: MobaCache(0, 1, 1, block_size=1), ValueError, "batch must be"),
        (lambda c: MobaCache(1, 1, 1, block_size=1, max_len=4.0), TypeError, "max_len must be an"),
        (lambda c: flex_moba(Q, Q, Q, 4, 2, cache=c, cu_seqlens=torch.tensor([0, 1])),
         ValueError, "cu_seqlens and cache"),
    ],
)  # fmt: skip
def test_errors(call, error, text):
    cache = MobaCache(1, 2, 8, block_size=4, dtype=torch.float64)
    with pytest.raises(error, match=text):
        call(cache)


def test_a_refused_call_adds_nothing():
    cache = MobaCache(1, 2, 8, block_size=128, dtype=torch.float64)
    options = {"block_size": 128, "topk": 2, "cache": cache}
    flex_moba(Q, Q, Q, gate="tile", **options)
    for call, error in (
        (lambda: flex_moba(Q.clone().requires_grad_(), Q, Q, **options), NotImplementedError),
        (lambda: flex_moba(Q[:, [0, 1, 0, 1]], Q, Q, gate="tile", **options), ValueError),
        (lambda: cache.append(Q[:, :, [0, 0, 0]], Q), ValueError),
    ):
        with pytest.raises(error):
            call()
        assert cache.lengths.tolist() == [1]
