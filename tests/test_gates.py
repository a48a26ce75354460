"""Gates other than the gate of the paper: group, tile, sub-blocks, sink and local blocks."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmoba import MobaCache, flex_moba, moba_reference, moba_select, selected_attention
from flexmoba.reference import reference_selection
from tests.conftest import assert_bitwise_equal
from tests.problems import Problem, as_bools, problems
from tests.test_errors import assert_raises

pytestmark = pytest.mark.usefixtures("small_pieces")

few = settings(max_examples=15)


def sub_blocks(block_size):
    """Draws a ``gate_block_size``, often one of few sub-blocks, or None."""
    divisors = [size for size in range(1, block_size + 1) if block_size % size == 0]
    return st.none() | st.sampled_from(divisors)


@st.composite
def gated(draw, **narrower):
    """Draws a problem whose topk includes all blocks that are always selected, and gate options."""
    problem = draw(problems(**narrower))
    options = {
        "gate": draw(st.sampled_from(["token", "group"])),
        "gate_block_size": draw(sub_blocks(problem.block_size)),
        "sink_blocks": draw(st.integers(0, 3)),
        "local_blocks": draw(st.integers(0, 3)) if problem.is_causal else 0,
    }
    always = options["sink_blocks"] + options["local_blocks"] + problem.is_causal
    return replace(problem, topk=max(problem.topk, always)), options


@st.composite
def tiled(draw, *, is_causal=None):
    """Draws a problem of a few tiles of 128 queries, and gate options."""
    offset, q_len = 128 * draw(st.integers(0, 2)), draw(st.integers(1, 500))
    is_causal = draw(st.booleans()) if is_causal is None else is_causal
    problem = Problem(
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 2)),
        q_len=q_len,
        kv_len=q_len + offset,
        block_size=128 * draw(st.integers(1, 2)),
        topk=draw(st.integers(2, 4)),
        is_causal=is_causal,
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    options = {"gate": "tile", "sink_blocks": draw(st.integers(0, 1))}
    return problem, options | {"gate_block_size": draw(sub_blocks(problem.block_size))}


any_gate = gated() | tiled()


def tied(problem, options, device="cpu"):
    """Returns `Problem.tied_tensors` with ties among the mean keys of sub-blocks."""
    size = options.get("gate_block_size") or problem.block_size
    return replace(problem, block_size=size).tied_tensors(device)


@given(any_gate)
def test_selects_what_the_oracle_selects(drawn):
    problem, options = drawn
    q, k, _ = tied(problem, options)
    args = (problem.block_size, problem.topk)
    selection = moba_select(q, k, *args, is_causal=problem.is_causal, **options)
    assert selection.shape == (*q.shape[:3], problem.topk)
    expected = reference_selection(q, k, *args, is_causal=problem.is_causal, **options)
    assert_bitwise_equal(as_bools(selection, problem.n_blocks), expected)
    blocks = selection.sort(-1).values
    assert not ((blocks[..., 1:] == blocks[..., :-1]) & (blocks[..., 1:] >= 0)).any()


@few
@given(any_gate)
def test_attends_to_what_it_selected(drawn):
    problem, options = drawn
    q, k, v = problem.tensors()
    args, causal = (problem.block_size, problem.topk), {"is_causal": problem.is_causal}
    selection = moba_select(q, k, *args, **causal, **options)
    out = flex_moba(q, k, v, *args, **causal, **options)
    expected = selected_attention(q, k, v, selection, problem.block_size, **causal)
    torch.testing.assert_close(out, expected)


@few
@given(gated(dtype=st.just(torch.float64)) | tiled())
def test_output_and_gradients_are_the_oracles(drawn):
    problem, options = drawn
    inputs = problem.tensors(requires_grad=True)
    args, causal = (problem.block_size, problem.topk), {"is_causal": problem.is_causal}
    out = flex_moba(*inputs, *args, **causal, **options)
    expected = moba_reference(*inputs, *args, **causal, **options)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn(out.shape, generator=problem.generator(), dtype=out.dtype)
    grads = torch.autograd.grad(out, inputs, upstream)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, inputs, upstream))


@few
@given(gated(dtype=st.just(torch.float64)) | tiled(), st.integers(1, 4))
def test_documents_choose_alone(drawn, count):
    problem, options = drawn
    options["is_causal"] = problem.is_causal
    problem = replace(problem, batch=1, q_len=problem.kv_len)
    q, k, v = problem.tensors()
    args = (problem.block_size, problem.topk)
    inner = torch.randint(problem.kv_len + 1, (count - 1,), generator=problem.generator())
    bounds = torch.tensor([0, *inner.sort().values.tolist(), problem.kv_len])
    out = flex_moba(q, k, v, *args, cu_seqlens=bounds, **options)
    for start, end in itertools.pairwise(bounds.tolist()):
        if start < end:
            alone = (x[:, :, start:end] for x in (q, k, v))
            expected = flex_moba(*alone, *args, **options)
            torch.testing.assert_close(out[:, :, start:end], expected)


@few
@given(
    gated(is_causal=st.just(True), dtype=st.just(torch.float64)) | tiled(is_causal=True),
    st.data(),
)
def test_chunks_and_steps_with_a_cache_equal_one_call(drawn, data):
    problem, options = drawn
    problem = replace(problem, q_len=problem.kv_len)
    tensors = problem.tensors()
    args = (problem.block_size, problem.topk)
    cache = MobaCache(
        problem.batch,
        problem.kv_heads,
        problem.head_dim,
        value_dim=problem.value_dim,
        block_size=problem.block_size,
        gate_block_size=options["gate_block_size"],
        dtype=problem.dtype,
    )
    expected = flex_moba(*tensors, *args, **options)
    at = 0
    while at < problem.kv_len:
        size = data.draw(st.sampled_from([1, 3, 40, 150]))
        chunk = [x[:, :, at : at + size] for x in tensors]
        out = flex_moba(*chunk, *args, cache=cache, **options)
        torch.testing.assert_close(out, expected[:, :, at : at + size])
        at += size


@few
@given(any_gate)
def test_sub_blocks_of_the_block_size_change_nothing(drawn):
    problem, options = drawn
    options["is_causal"] = problem.is_causal
    q, k, v = problem.tensors()
    args = (problem.block_size, problem.topk)
    one, none = ({**options, "gate_block_size": x} for x in (problem.block_size, None))
    assert_bitwise_equal(moba_select(q, k, *args, **one), moba_select(q, k, *args, **none))
    assert_bitwise_equal(flex_moba(q, k, v, *args, **one), flex_moba(q, k, v, *args, **none))


@given(
    gated(is_causal=st.just(False), dtype=st.just(torch.float64)),
    st.integers(1, 4),
    st.sampled_from(["cu_seqlens", "key_padding_mask", None]),
)
def test_empty_sub_blocks_do_not_score(drawn, count, where):
    """Every score is negative, so the scores of empty sub-blocks, if 0, would win."""
    problem, options = drawn
    problem = replace(problem, batch=1, q_len=problem.kv_len)
    q, k, v = problem.tensors()
    q, k = q.abs(), -k.abs()
    options["is_causal"], generator = False, problem.generator()
    if where == "cu_seqlens":
        inner = torch.randint(problem.kv_len + 1, (count - 1,), generator=generator)
        options[where] = torch.tensor([0, *inner.sort().values.tolist(), problem.kv_len])
    elif where == "key_padding_mask":
        options[where] = torch.rand(1, problem.kv_len, generator=generator) < 0.9
    out = flex_moba(q, k, v, problem.block_size, problem.topk, **options)
    expected = moba_reference(q, k, v, problem.block_size, problem.topk, **options)
    torch.testing.assert_close(out, expected)


def test_documents_shorter_than_a_block_have_no_sub_blocks():
    """A layout may then shorten the blocks to a size that sub-blocks do not divide."""
    problem = Problem(q_len=21, kv_len=21, is_causal=False)
    options = {"gate_block_size": 16, "cu_seqlens": torch.tensor([0, 10, 21])}
    for is_causal in (True, False):
        out = flex_moba(*problem.tensors(), 64, 2, is_causal=is_causal, **options)
        expected = moba_reference(*problem.tensors(), 64, 2, is_causal=is_causal, **options)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_in_a_sub_block_is_the_highest_score(dtype):
    keys = torch.tensor([1, 2, torch.inf, 0, 3, torch.nan, -torch.inf, -torch.inf, 5], dtype=dtype)
    selection = moba_select(
        torch.ones(1, 1, 1, 1, dtype=dtype), keys[None, None, :, None], 2, 6, gate_block_size=1
    )
    assert selection.flatten().tolist() == [4, 2, 1, 0, 3, -1]


def test_a_cache_has_the_sub_blocks_of_its_calls():
    tensors = Problem(q_len=20, kv_len=20).tensors()
    cache = MobaCache(1, 1, 8, block_size=8, gate_block_size=2, dtype=torch.float64)
    assert cache.gate_block_size == 2
    message = "gate_block_size must be the gate_block_size of the cache, 2, got 8; pass the same"
    assert_raises(ValueError, (message,), lambda: flex_moba(*tensors, 8, 2, cache=cache))
    assert cache.lengths.tolist() == [0]
    flex_moba(*tensors, 8, 2, gate_block_size=2, cache=cache)
    means = tensors[1].unflatten(2, (10, 2)).mean(3)
    torch.testing.assert_close(cache.means[:, :, :10], means)


def test_crop_and_reorder_keep_the_tiles():
    problem = Problem(batch=2, q_len=700, kv_len=700, block_size=128)
    tensors = problem.tensors()
    cache = MobaCache(2, 1, 8, block_size=128, dtype=problem.dtype, max_len=700)
    expected = flex_moba(*tensors, 128, 2, gate="tile")
    flex_moba(*tensors, 128, 2, cache=cache, gate="tile")
    cache.crop(580)
    rows = torch.tensor([1, 1])
    cache.reorder(rows)
    rest = (x[rows][:, :, 580:] for x in tensors)
    out = flex_moba(*rest, 128, 2, cache=cache, gate="tile")
    torch.testing.assert_close(out, expected[rows][:, :, 580:])


def test_a_tile_does_not_see_its_future():
    problem = Problem(q_len=600, kv_len=600, block_size=128)
    q, k, v = problem.tensors()
    out = flex_moba(q, k, v, 128, 2, gate="tile")
    changed = (torch.cat([x[:, :, :400], 3 - 2 * x[:, :, 400:]], 2) for x in (q, k, v))
    assert_bitwise_equal(flex_moba(*changed, 128, 2, gate="tile")[:, :, :400], out[:, :, :400])


@pytest.mark.parametrize(
    ("options", "error", "fragments"),
    [
        ({"gate": "head"}, ValueError, ("gate", "'token'", "'head'")),
        ({"sink_blocks": -1}, ValueError, ("sink_blocks", "-1")),
        ({"local_blocks": 1.0}, TypeError, ("local_blocks", "1.0")),
        ({"sink_blocks": 1, "local_blocks": 2}, ValueError, ("topk=3", "sink_blocks=1", "4")),
        ({"local_blocks": 1, "is_causal": False}, ValueError, ("local_blocks", "is_causal")),
        ({"gate_block_size": 24}, ValueError, ("gate_block_size=24", "block_size=64", "divisor")),
        ({"gate_block_size": 128}, ValueError, ("gate_block_size=128", "block_size=64")),
        ({"gate_block_size": 0}, ValueError, ("gate_block_size", "at least 1", "0")),
        ({"gate_block_size": 8.0}, TypeError, ("gate_block_size", "8.0")),
        ({"gate": "tile"}, NotImplementedError, ('gate="tile"', "block_size=64", "128")),
        (
            {"gate": "tile", "block_size": 128, "q_len": 100},
            NotImplementedError,
            ('gate="tile"', "position 200", "cache"),
        ),
    ],
)
@pytest.mark.parametrize("attends", [True, False])
def test_errors(options, error, fragments, attends):
    options = {"block_size": 64, "topk": 3, "q_len": 300} | options
    q, k, v = Problem(q_len=options.pop("q_len"), kv_len=300).tensors()
    call = (
        (lambda: flex_moba(q, k, v, **options)) if attends else lambda: moba_select(q, k, **options)
    )
    assert_raises(error, fragments, call)


def test_tiles_need_the_queries_of_all_tokens():
    q, k, v = Problem(q_len=20, kv_len=20).tensors()
    cache = MobaCache(1, 1, 8, block_size=128, dtype=torch.float64)
    flex_moba(q, k, v, 128, 2, cache=cache)

    def step():
        return flex_moba(q, k, v, 128, 2, cache=cache, gate="tile")

    assert_raises(ValueError, ('gate="tile"', "20 came without it"), step)
    assert cache.lengths.tolist() == [20]


@pytest.mark.parametrize("forget", [MobaCache.reset, lambda cache: cache.crop(50)])
def test_tiles_are_not_those_of_tokens_before(forget):
    tensors = Problem(q_len=300, kv_len=300).tensors()
    cache = MobaCache(1, 1, 8, block_size=128, dtype=torch.float64)

    def attend(start, end, gate):
        chunk = (x[:, :, start:end] for x in tensors)
        return flex_moba(*chunk, 128, 2, cache=cache, gate=gate)

    attend(0, 300, "tile")
    forget(cache)
    start = int(cache.lengths)
    attend(start, 270, "token")
    with pytest.raises(ValueError, match=f"{270 - start} came without it"):
        attend(270, 300, "tile")
    cache.crop(0)
    expected = flex_moba(*tensors, 128, 2, gate="tile")
    torch.testing.assert_close(attend(0, 300, "tile"), expected)
