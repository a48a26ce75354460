"""`NsaCache`: chunks and steps give the results of one call, for every row alone."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounter

from flexmoba.nn import NsaAttention
from flexmoba.nsa import NsaCache
from tests.conftest import assert_bitwise_equal
from tests.test_nsa import NAMES, Problem, nsa_of, problems
from tests.test_nsa_nn import layer_of

pytestmark = pytest.mark.usefixtures("small_pieces", "uncompiled_flex")

chunks = st.lists(st.sampled_from((1, 1, 2, 5, 16, 17, 40)), min_size=1, max_size=6)


def cache_of(problem: Problem, **options) -> NsaCache:
    """Returns a cache whose compression sums keys and values, with weights by place."""
    p = problem
    weight = torch.linspace(-1, 2, p.cmp_block, dtype=p.dtype)[:, None]

    def compress(k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        k, v = ((x * weight).sum(2, keepdim=True) for x in (k, v))
        return k + 0.01 * positions.to(k.dtype).view(-1, 1, 1, 1), v

    sizes = {name: p.blocks[name] for name in ("cmp_block", "cmp_stride", "block_size")}
    sizes["window"] = p.window
    options = sizes | {"value_dim": p.value_dim, "dtype": p.dtype, "compress": compress} | options
    return NsaCache(p.batch, p.kv_heads, p.head_dim, **options)


def tokens_of(problem: Problem) -> dict[str, Tensor]:
    """Returns the tensors of a problem; compressed keys and values are inputs of compression."""
    p = replace(problem, cmp_block=1, cmp_stride=1)
    return dict(zip(NAMES, p.tensors(), strict=True))


def whole(problem: Problem, tokens: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Computes all tokens by one call, with the compression of `cache_of`."""
    p = problem
    weight = torch.linspace(-1, 2, p.cmp_block, dtype=p.dtype)[:, None]
    starts = range(0, p.kv_len - p.cmp_block + 1, p.cmp_stride)
    tensors = dict(tokens)
    for name in ("k_cmp", "v_cmp"):
        x = tokens[name]
        parts = [(x[:, :, i : i + p.cmp_block] * weight).sum(2) for i in starts]
        tensors[name] = torch.stack(parts, 2) if parts else x[:, :, :0]
    tensors["k_cmp"] = tensors["k_cmp"] + 0.01 * torch.tensor(list(starts), dtype=p.dtype)[:, None]
    return nsa_of(p)(*tensors.values())


def call(cache: NsaCache, problem: Problem, tokens: dict[str, Tensor], **options):
    """Appends tokens and attends from them."""
    keys = problem.named([tokens[name] for name in NAMES[4:]])
    positions = cache.append(tokens["k"], tokens["v"], **keys, **options)
    names = ("topk", "sink_blocks", "local_blocks")
    return cache.attend(
        *(tokens["q"], tokens["gates"], positions),
        **{name: problem.blocks[name] for name in names},
        scale=problem.scale,
    )


def part(tokens: dict[str, Tensor], start: int, end: int) -> dict[str, Tensor]:
    return {name: x[:, :, start:end] for name, x in tokens.items()}


@given(problems(), chunks, st.booleans())
@example(Problem(block_size=16, topk=5), [40, 1, 1, 1, 17, 1], False)
@settings(max_examples=20)
def test_chunks_and_steps_equal_the_whole(problem, lengths, grows):
    total = sum(lengths)
    problem = replace(problem, q_len=total, kv_len=total)
    tokens, cache = tokens_of(problem), cache_of(problem, max_len=None if grows else total)
    outs, start = [], 0
    for n in lengths:
        outs.append(call(cache, problem, part(tokens, start, start + n)))
        start += n
    for actual, expected in zip(zip(*outs, strict=True), whole(problem, tokens), strict=True):
        torch.testing.assert_close(torch.cat(actual, 2), expected, rtol=0, atol=1e-10)
    assert cache.lengths.tolist() == problem.batch * [total]


@pytest.mark.parametrize("window", [20, 0])
@pytest.mark.parametrize("n", [3, 30])
def test_rows_of_different_lengths(n, window):
    """Tests padding anywhere in a chunk; each row gets the results of a cache of its own."""
    sizes = {"q_len": 90, "kv_len": 90, "block_size": 16, "topk": 5, "window": window}
    problem = Problem(batch=3, kv_heads=2, **sizes)
    tokens, cache = tokens_of(problem), cache_of(problem)
    alone = [cache_of(replace(problem, batch=1)) for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    for start in range(0, 90, n):
        chunk = part(tokens, start, start + n)
        real = torch.rand(3, n, generator=generator) < torch.tensor([[0.9], [0.5], [0.0]])
        real[2] = start == 60
        padded = {name: x.where(real[:, None, :, None], torch.nan) for name, x in chunk.items()}
        out, lse = call(cache, problem, padded, key_padding_mask=real)
        for row in range(3):
            own = {name: x[row : row + 1, :, real[row]] for name, x in chunk.items()}
            if real[row].any():
                expected = call(alone[row], problem, own)
                for actual, x in zip((out, lse), expected, strict=True):
                    torch.testing.assert_close(actual[row, :, real[row]], x[0], rtol=0, atol=1e-10)
            assert (out[row, :, ~real[row]] == 0).all()
            assert (lse[row, :, ~real[row]] == -torch.inf).all()
    assert cache.lengths.tolist() == [x.lengths.item() for x in alone]


def test_reset_and_reorder():
    problem = Problem(batch=2, q_len=60, kv_len=60, block_size=16, topk=5, window=20)
    tokens, cache = tokens_of(problem), cache_of(problem)
    call(cache, problem, {name: x * torch.nan for name, x in part(tokens, 0, 60).items()})
    cache.reset()
    call(cache, problem, part(tokens, 0, 50))
    cache.reorder(torch.tensor([1, 1]))
    second = {name: x[[1, 1]] for name, x in tokens.items()}
    out = call(cache, problem, part(second, 50, 60))[0]
    expected = whole(problem, second)[0][:, :, 50:]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)


def test_later_tokens_of_a_step_do_not_change_earlier_outputs():
    problem = Problem(q_len=40, kv_len=40, block_size=16, topk=5, window=20)
    tokens = tokens_of(problem)
    outs = []
    for later in (1.0, torch.nan):
        cache = cache_of(problem)
        call(cache, problem, part(tokens, 0, 30))
        step = {name: x.clone() for name, x in part(tokens, 30, 40).items()}
        for x in step.values():
            x[:, :, 5:] *= later
        outs.append(call(cache, problem, step)[0][:, :, :5])
    assert_bitwise_equal(*outs)
    assert outs[0].isfinite().all()


def test_a_step_beyond_the_capacity_is_nan():
    """Tests a row that is full, as the replay of a CUDA graph may find it, beside another row."""
    problem = Problem(batch=2, q_len=41, kv_len=41, block_size=16, topk=5, window=20)
    tokens = tokens_of(problem)
    cache = cache_of(problem, max_len=48)
    call(cache, problem, part(tokens, 0, 40))
    cache.lengths[1] = cache.capacity
    out, lse = call(cache, problem, part(tokens, 40, 41))
    assert out[1].isnan().all()
    assert lse[1].isnan().all()
    torch.testing.assert_close(out[0], whole(problem, tokens)[0][0, :, 40:], rtol=0, atol=1e-10)


def test_no_tokens():
    problem = Problem(q_len=40, kv_len=40, block_size=16, topk=5, window=20)
    tokens, cache = tokens_of(problem), cache_of(problem)
    call(cache, problem, part(tokens, 0, 39))
    out, lse = call(cache, problem, part(tokens, 39, 39))
    assert out.shape == (1, 2, 0, 8)
    assert lse.shape == (1, 2, 0, 3)
    out = call(cache, problem, part(tokens, 39, 40))[0]
    torch.testing.assert_close(out, whole(problem, tokens)[0][:, :, 39:], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("window", "kept"), [(20, 20 + 16), (0, 0)])
def test_the_window_branch_keeps_the_tokens_of_windows_alone(window, kept):
    cache = cache_of(Problem(window=window), max_len=10000)
    assert cache._branches.k_win.shape == cache._branches.v_win.shape == (1, 1, kept, 8)


@pytest.mark.parametrize("n", [1, 40])
def test_without_a_window_its_gate_value_has_no_effect(n):
    problem = Problem(batch=2, q_len=n, kv_len=n, block_size=16, topk=5, window=0)
    tokens = tokens_of(problem)
    expected = call(cache_of(problem), problem, tokens)
    tokens["gates"][..., 2] = torch.nan
    for actual, x in zip(call(cache_of(problem), problem, tokens), expected, strict=True):
        assert_bitwise_equal(actual, x)


@pytest.mark.parametrize(
    "options", [{}, {"rope_base": None, "gate": "token"}, {"value_dim": 5}, {"window": 0}]
)
def test_the_layer_with_a_cache(options):
    layer = layer_of(**options)
    x = torch.randn(2, 80, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = layer(x)
        cache = layer.make_cache(2, 80)
        outs = [layer(y, cache=cache) for y in x.split([40, 20, 1, 1, 3, 15], 1)]
        torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=0, atol=1e-9)
        real = torch.arange(80) >= torch.tensor([[0], [30]])
        cache = layer.make_cache(2)
        padded = [
            layer(a, cache=cache, key_padding_mask=b)
            for a, b in zip(x.split(40, 1), real.split(40, 1), strict=True)
        ]
        expected = layer(x, key_padding_mask=real)
        torch.testing.assert_close(torch.cat(padded, 1), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("window", [12, 0])
def test_compiled_steps_are_one_graph(window):
    layer = layer_of(window=window)
    x = torch.randn(2, 60, 32, dtype=torch.float64)
    with torch.no_grad():
        expected, cache = layer(x), layer.make_cache(2, 60)
        outs, counter = [layer(x[:, :50], cache=cache)], CompileCounter()
        step = torch.compile(lambda y: layer(y, cache=cache), fullgraph=True, backend=counter)
        outs += [step(x[:, i : i + 1]) for i in range(50, 60)]
        torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=0, atol=1e-9)
        assert counter.frame_count == 1
        cache = layer.make_cache(2)
        with pytest.raises((Unsupported, ValueError), match="cache that grows cannot be compiled"):
            step(x[:, :1])


def test_errors():
    problem = Problem(block_size=16, topk=5)
    tokens, cache = tokens_of(problem), cache_of(problem, max_len=50)
    with pytest.raises(ValueError, match="room for 64 tokens, of which 0 are taken, so 100 more"):
        call(cache, problem, tokens)
    with pytest.raises(ValueError, match=r"v_win must be \(1, 1, 9, 8\) for this cache"):
        call(cache, problem, part(tokens, 0, 9) | {"v_win": tokens["v_win"]})
    with pytest.raises(ValueError, match=r"k must be torch\.float64 on cpu like the cache"):
        call(cache, problem, {name: x.float() for name, x in part(tokens, 0, 9).items()})
    with pytest.raises(ValueError, match="key_padding_mask must be bool of shape"):
        call(cache, problem, part(tokens, 0, 9), key_padding_mask=torch.ones(1, 8) > 0)
    with pytest.raises(ValueError, match=r"q must be \(1, Hq, n, 8\) and positions"):
        call(cache, problem, part(tokens, 0, 9) | {"q": tokens["q"]})
    with pytest.raises(ValueError, match="multiple of the cache's 2 KV heads, got 3"):
        call(
            cache_of(replace(problem, kv_heads=2)),
            problem,
            tokens_of(replace(problem, kv_heads=2)) | {"q": torch.zeros(1, 3, 100, 8).double()},
        )
    positions = cache.append(*(tokens[name][:, :, :9] for name in ("k", "v")))
    with pytest.raises(ValueError, match="last call of append had 9 tokens, got 5 queries"):
        cache.attend(*(tokens[name][:, :, :5] for name in ("q", "gates")), positions[:, :5])
    with pytest.raises(ValueError, match="to which k_win and v_win belong; pass neither"):
        call(cache_of(problem, window=0), problem, part(tokens, 0, 9))
    tokens["q"].requires_grad_()
    with pytest.raises(NotImplementedError, match="a cache has no gradients"):
        call(cache, problem, part(tokens, 0, 9))
    with pytest.raises(ValueError, match="max_len must be at least 1, got 0"):
        cache_of(problem, max_len=0)
    layer = NsaAttention(32, 4, 2)
    with pytest.raises(ValueError, match="cu_seqlens and cache cannot be combined"):
        layer(torch.randn(1, 9, 32), cache=layer.make_cache(1), cu_seqlens=torch.tensor([0, 9]))
