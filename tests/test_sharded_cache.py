"""`ShardedMobaCache` in two and three processes: equal to one process with all tokens."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.attention.flex_attention import AuxRequest

from flexmoba import flex_moba
from flexmoba.distributed import ShardedMobaCache, context_parallel_moba
from flexmoba.gate import block_means
from flexmoba.reference import reference_mask, reference_selection
from tests.conftest import assert_as_exact_as_dense, assert_bitwise_equal, with_lse
from tests.problems import DTYPES, Problem
from tests.processes import Processes
from tests.test_context_parallel import lengths_of
from tests.test_gates import sub_blocks

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module", params=[2, 3], ids="{} ranks".format)
def ranks(request, tmp_path_factory) -> Iterator[Processes]:
    processes = Processes(request.param, tmp_path_factory.mktemp("cache"))
    yield processes
    processes.stop()


def cache_of(mesh: DeviceMesh, problem: Problem, **options: Any) -> ShardedMobaCache:
    sizes = {"block_size": problem.block_size, "max_len": problem.kv_len}
    sizes |= {"value_dim": problem.value_dim, "dtype": problem.dtype}
    heads, dim = problem.kv_heads, problem.head_dim
    return ShardedMobaCache(mesh, problem.batch, heads, dim, **sizes | options)


def fill(
    mesh: DeviceMesh,
    problem: Problem,
    shards: list[tuple[int, ...]],
    chunks: list[int],
    topk: int | None,
    gate_block_size: int | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Appends prompts that are sharded, then attends in chunks.

    Returns the results of the chunks, the mean keys, and the number of keys on this rank.
    """
    cache = cache_of(mesh, problem, gate_block_size=gate_block_size)
    tensors, begin, rank = problem.tensors(), 0, mesh.get_local_rank()
    for lengths in shards:
        first = begin + sum(lengths[:rank])
        own = (x[:, :, first : first + lengths[rank]] for x in tensors[1:])
        cache.append_shard(*own, lengths=lengths if begin else None)
        begin += sum(lengths)
    outs, lses = [], []
    for chunk in chunks:
        new = (x[:, :, begin : begin + chunk] for x in tensors)
        with torch.inference_mode(chunk % 2 == 0):
            out, lse = cache.attend(*new, topk, **options)
        outs.append(out.clone())
        lses.append(lse.clone())
        begin += chunk
    assert cache.length == begin
    return torch.cat(outs, 2), torch.cat(lses, 2), cache.means, cache.k.shape[2]


@settings(max_examples=8)
@given(st.data())
def test_equals_one_process(ranks, data):
    draw = data.draw
    forced = draw(st.sampled_from(((0, 0), (1, 0), (0, 1), (1, 2))), label="forced")
    gate = draw(st.sampled_from(("token", "group")), label="gate")
    topk = draw(st.sampled_from((None, 1, 2, 4, 30)), label="topk")
    topk = topk if topk is None else max(topk, 1 + sum(forced))
    fractions = st.lists(st.floats(0, 1), min_size=ranks.size - 1, max_size=ranks.size - 1)
    prompts = draw(st.lists(st.integers(0, 40), max_size=2), label="prompts")
    shards = [lengths_of(total, draw(fractions, label="cuts")) for total in prompts]
    chunks = draw(st.lists(st.integers(1, 25), min_size=1, max_size=4), label="chunks")
    total = sum(prompts) + sum(chunks)
    size = draw(st.integers(1, 9), label="block size")
    part = draw(sub_blocks(size), label="sub-blocks")
    problem = Problem(
        batch=2, kv_heads=2, group=2, value_dim=6, q_len=total, kv_len=total, block_size=size
    )
    options = {"gate": gate, "sink_blocks": forced[0], "local_blocks": forced[1]}
    moba = with_lse(flex_moba, size, topk, gate_block_size=part, **options)
    expected = moba(*problem.tensors())
    parts = size // (part or size)
    means = block_means(problem.tensors()[1], size, sub_blocks=parts)
    arguments = (problem, shards, chunks, topk, part, options)
    results = ranks.run(fill, [arguments] * ranks.size)
    for result in results:
        if isinstance(result, Exception):
            raise result
        out, lse, found, keys = result
        torch.testing.assert_close(out, expected[0][:, :, sum(prompts) :])
        torch.testing.assert_close(lse, expected[1][:, :, sum(prompts) :])
        full = total // size * parts
        assert_bitwise_equal(found[:, :, :full], means[:, :, :full])
        assert keys <= total / ranks.size + size  # no more than its share
        assert_bitwise_equal(out, results[0][0])


def fill_under_autocast(mesh: DeviceMesh, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, int]:
    with torch.autocast("cpu", torch.bfloat16):
        return fill(mesh, *arguments)


def test_autocast_does_not_change_the_selection(ranks):
    sizes = {"kv_heads": 2, "group": 2, "q_len": 400, "kv_len": 400, "block_size": 4}
    problem = Problem(**sizes, dtype=torch.float32)
    shards = [(200, *[0] * (ranks.size - 2), 100)]
    arguments = (problem, shards, [100], 3, None, {})
    results = ranks.run(fill_under_autocast, [arguments] * ranks.size)
    expected = flex_moba(*problem.tensors(), 4, 3)
    for result in results:
        if isinstance(result, Exception):
            raise result
        torch.testing.assert_close(result[0], expected[:, :, 300:])


def prompt_and_steps(
    mesh: DeviceMesh, problem: Problem, part: int | None, q: Tensor, k: Tensor, v: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Attends from a sharded prompt, from the other tokens but two, and from none; once more.

    At last, a cache that was reset equals a new one.
    """
    cache = cache_of(mesh, problem, gate_block_size=part)
    length, results = 30, []
    prompt = 30 * mesh.size()
    mine = [x[:, :, :prompt].split(length, 2)[mesh.get_local_rank()] for x in (q, k, v)]
    for _ in range(2):
        cache.append_shard(*mine[1:])
        options = {"gate_block_size": part, "return_aux": AuxRequest(lse=True)}
        out, aux = context_parallel_moba(*mine, problem.block_size, 3, mesh=mesh, **options)
        parts = [(out, aux.lse)]
        for first, end in ((prompt, -2), (-2, problem.kv_len), (0, 0)):
            new = (x[:, :, first:end] for x in (q, k, v))
            parts.append(cache.attend(*new, 3))
        results.append(parts)
        cache.reset()
    first = [x[:, :, :9] for x in (q, k, v)]
    anew = cache_of(mesh, problem, gate_block_size=part).attend(*first, 3)
    for x, y in zip(cache.attend(*first, 3), anew, strict=True):
        assert_bitwise_equal(x, y)
    for one, other in zip(*results, strict=True):
        for x, y in zip(one, other, strict=True):
            assert_bitwise_equal(x, y)
    return results[0]


# The scores of single keys, too, are exact in every dtype.
@pytest.mark.parametrize(
    ("dtype", "part"), [*((dtype, None) for dtype in DTYPES), (torch.bfloat16, 1)], ids=str
)
def test_every_dtype(ranks, dtype, part):
    n = 30 * ranks.size + 11
    problem = Problem(kv_heads=2, group=2, q_len=n, kv_len=n, block_size=7, dtype=dtype)
    tensors = problem.tied_tensors()  # so that all dtypes select the same blocks

    def attend(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        inputs = tuple(x.detach() for x in inputs)
        of_dtype = replace(problem, dtype=inputs[0].dtype)
        results = ranks.run(prompt_and_steps, [(of_dtype, part, *inputs)] * ranks.size)
        for result in results:
            if isinstance(result, Exception):
                raise result
        prompt = [result[0] for result in results]
        out, lse = (torch.cat(x, 2) for x in zip(*prompt, *results[0][1:], strict=True))
        return out, lse

    selected = reference_selection(*tensors[:2], 7, 3, is_causal=True, gate_block_size=part)
    mask = reference_mask(selected, 7, n, is_causal=True)
    assert_as_exact_as_dense(attend, *tensors, mask)


@pytest.mark.parametrize("prompt", [13, 25])
def test_one_kv_head(ranks, prompt):
    """The keys of one row and one KV head are adjacent, also those of a part of a block."""
    n = prompt + 3
    problem = Problem(batch=1, kv_heads=1, group=2, q_len=n, kv_len=n, block_size=8)
    shards = [(*[0] * (ranks.size - 1), prompt)]
    results = ranks.run(fill, [(problem, shards, [1, 2], None, None, {})] * ranks.size)
    expected = flex_moba(*problem.tensors(), 8, None)[:, :, prompt:]
    for result in results:
        if isinstance(result, Exception):
            raise result
        torch.testing.assert_close(result[0], expected)


def append_wrong_shard(mesh: DeviceMesh, problem: Problem, k: Tensor, v: Tensor) -> None:
    cache_of(mesh, problem).append_shard(k, v)


def test_all_ranks_raise_an_error_of_one(ranks):
    problem = Problem(q_len=20, kv_len=20, block_size=8)
    _, k, v = problem.tensors()
    arguments = [(problem, k[:, :, :5], v[:, :, :5])] * (ranks.size - 1)
    results = ranks.run(append_wrong_shard, [*arguments, (problem, k[:, :, :5], v[:, :, :4])])
    for result in results[:-1]:
        with pytest.raises(ValueError, match=f"the arguments of rank {ranks.size - 1} are wrong"):
            raise result
    with pytest.raises(ValueError, match="v must be"):
        raise results[-1]


def test_errors():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        problem = Problem(kv_heads=2, q_len=20, kv_len=20, block_size=8)
        q, k, v = problem.tensors()
        cache = cache_of(mesh, problem)
        cache.append_shard(k[:, :, :10], v[:, :, :10])
        with pytest.raises(ValueError, match="room for 20 tokens, of which 10 are taken, so 20"):
            cache.append_shard(k, v)
        with pytest.raises(ValueError, match="room for 20 tokens, of which 10 are taken, so 20"):
            cache.attend(q, k, v, 2)
        new = [x[:, :, 10:] for x in (q, k, v)]
        with pytest.raises(NotImplementedError, match='does not support gate="tile"'):
            cache_of(mesh, problem, block_size=128).attend(*new, 2, gate="tile")
        with pytest.raises(NotImplementedError, match="attention to a cache has no gradients"):
            cache.attend(new[0].clone().requires_grad_(), *new[1:], 2)
        with pytest.raises(ValueError, match="v must be"):
            cache.append_shard(k, v[:, :, :3])
        for lengths, message in (((5,), r"lengths\[0\] must be"), ((5, 5), "got 2 for 1 ranks")):
            with pytest.raises(ValueError, match=message):
                cache.append_shard(new[1], new[2], lengths=lengths)
        with pytest.raises(ValueError, match="topk=1 is too small for sink_blocks=1"):
            cache.attend(*new, 1, sink_blocks=1)
        with pytest.raises(ValueError, match="max_len must be"):
            cache_of(mesh, problem, max_len=0)
        with pytest.raises(ValueError, match="gate_block_size=3 and block_size=8; pass a divisor"):
            cache_of(mesh, problem, gate_block_size=3)
        assert cache_of(mesh, problem, gate_block_size=2).gate_block_size == 2
        assert cache.gate_block_size == 8
        assert cache.length == 10
    finally:
        dist.destroy_process_group()
