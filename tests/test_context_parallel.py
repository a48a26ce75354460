"""`context_parallel_moba` in two and three processes: equal to one process with all tokens.

The processes start once for each number of ranks, and run the calls of all tests.
"""

import inspect
import os
import time
import typing
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, pairwise, product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest
from torch.utils.checkpoint import checkpoint

from flexmoba import flex_moba
from flexmoba.distributed import blocks, context_parallel_moba, gather, heads
from flexmoba.distributed.choice import Shape, resolve_exchange
from flexmoba.distributed.plan import first_keys, plan_of
from flexmoba.distributed.ranks import Pending, Ranks
from flexmoba.local import attend_on_one_device
from flexmoba.reference import moba_reference, reference_mask, reference_selection
from tests.conftest import (
    Attend,
    assert_as_exact_as_dense,
    assert_bitwise_equal,
    make_pieces_small,
    with_lse,
)
from tests.problems import DTYPES, Problem, problems
from tests.processes import SECONDS, Processes
from tests.test_gates import sub_blocks

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
LSE = AuxRequest(lse=True)
few = settings(max_examples=25)


@pytest.fixture(scope="module", params=[2, 3], ids="{} ranks".format)
def ranks(request, tmp_path_factory) -> Iterator[Processes]:
    processes = Processes(request.param, tmp_path_factory.mktemp("ranks"))
    processes.run(small_pieces, [()] * processes.size)
    yield processes
    processes.stop()


def small_pieces(mesh: DeviceMesh) -> None:
    make_pieces_small(pytest.MonkeyPatch())


@dataclass(frozen=True)
class Call:
    """Arguments of `context_parallel_moba`, and the length of each rank."""

    lengths: tuple[int, ...]
    block_size: int = 4
    topk: int | None = 2
    exchange: str = "gather"
    options: dict[str, Any] = field(default_factory=dict)

    def shard(self, x: Tensor, rank: int, dim: int = 2) -> Tensor:
        return x.split(self.lengths, dim=dim)[rank].detach().clone()

    def __call__(self, mesh: DeviceMesh, *tensors: Tensor, **options: Any) -> Any:
        return context_parallel_moba(
            *(*tensors, self.block_size, self.topk),
            **({"mesh": mesh, "exchange": self.exchange} | self.options | options),
        )


def forward(mesh: DeviceMesh, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = (x.to(mesh.device_type) for x in (q, k, v))
    out, aux = call(mesh, q, k, v, return_aux=LSE)
    return out, aux.lse


def backward(
    mesh: DeviceMesh, call: Call, q: Tensor, k: Tensor, v: Tensor, *upstream: Tensor
) -> tuple[Tensor, ...]:
    inputs = [x.requires_grad_() for x in (q, k, v)]
    results = forward(mesh, call, *inputs)
    return torch.autograd.grad(results, inputs, [x.to(mesh.device_type) for x in upstream])


def run(ranks: Processes, task: Callable, call: Call, *tensors: Tensor) -> list[Any]:
    """Runs a task with each rank's shards; raises the exception of a rank."""
    shards = [
        (call, *(call.shard(x, rank).requires_grad_(x.requires_grad) for x in tensors))
        for rank in range(ranks.size)
    ]
    results = ranks.run(task, shards)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def joined(ranks: Processes, task: Callable, call: Call, *tensors: Tensor) -> list[Tensor]:
    """Runs a task that returns tensors of a rank's tokens, and joins those of all ranks."""
    return [torch.cat(x, 2) for x in zip(*run(ranks, task, call, *tensors), strict=True)]


class Spread(torch.autograd.Function):
    """The call in all processes, as a differentiable function in this process."""

    @staticmethod
    def forward(ctx, ranks: Processes, call: Call, *inputs: Tensor):
        ctx.save_for_backward(*inputs)
        ctx.ranks, ctx.call = ranks, call
        return tuple(joined(ranks, forward, call, *inputs))

    @staticmethod
    def backward(ctx, *upstream: Tensor):
        return None, None, *joined(ctx.ranks, backward, ctx.call, *ctx.saved_tensors, *upstream)


def spread(ranks: Processes, call: Call) -> Attend:
    return lambda *inputs: Spread.apply(ranks, call, *inputs)


def lengths_of(total: int, cuts: list[float]) -> tuple[int, ...]:
    """Divides ``total`` tokens at fractions of it."""
    edges = [0, *sorted(int(cut * total) for cut in cuts), total]
    return tuple(end - start for start, end in pairwise(edges))


def cuts(ranks: Processes) -> st.SearchStrategy[list[float]]:
    fraction = st.floats(0, 1) | st.sampled_from((0.0, 0.5, 1.0))
    return st.lists(fraction, min_size=ranks.size - 1, max_size=ranks.size - 1)


def exchanges(problem: Problem, ranks: Processes) -> st.SearchStrategy[str]:
    has_heads = problem.kv_heads % ranks.size == 0
    return st.sampled_from(("gather", "heads", "auto") if has_heads else ("gather", "auto"))


def square(problem: Problem, ranks: Processes, data: st.DataObject) -> Problem:
    """Gives a problem as many queries as keys, and often KV heads that the ranks divide."""
    heads = data.draw(st.sampled_from((1, 2, ranks.size)), label="KV heads")
    return replace(problem, q_len=problem.kv_len, kv_heads=heads)


drawn = problems(max_len=100, max_block=40, dtype=st.just(torch.float64), is_causal=st.just(True))


# ---- Results ------------------------------------------------------------------------------------


@few
@given(drawn, st.data())
def test_equals_the_oracle(ranks, problem, data):
    problem = square(problem, ranks, data)
    forced = data.draw(st.sampled_from(((0, 0), (0, 0), (1, 0), (0, 1), (1, 1))), label="forced")
    gate = data.draw(st.sampled_from(("token", "group")), label="gate")
    full = data.draw(st.integers(0, 4), label="full") == 0
    topk = None if full else max(problem.topk, 1 + sum(forced))
    options = {"gate": gate, "sink_blocks": forced[0], "local_blocks": forced[1]}
    options["gate_block_size"] = data.draw(sub_blocks(problem.block_size), label="sub-blocks")
    q, k, v = problem.tensors()
    selected = reference_selection(q, k, problem.block_size, topk, is_causal=True, **options)
    mask = reference_mask(selected, problem.block_size, problem.kv_len, is_causal=True)
    lengths = lengths_of(problem.kv_len, data.draw(cuts(ranks), label="cuts"))
    exchange = data.draw(exchanges(problem, ranks), label="exchange")
    call = Call(lengths, problem.block_size, topk, exchange, options)
    assert_as_exact_as_dense(spread(ranks, call), q, k, v, mask, gradients=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("exchange", ["gather", "heads"])
@pytest.mark.parametrize("topk", [3, None])
def test_every_dtype(ranks, dtype, exchange, topk):
    problem = Problem(kv_heads=ranks.size, group=2, q_len=90, kv_len=90, block_size=7, dtype=dtype)
    q, k, v = problem.tied_tensors()  # so that all dtypes select the same blocks
    selected = reference_selection(q, k, 7, topk, is_causal=True)
    mask = reference_mask(selected, 7, 90, is_causal=True)
    call = Call(lengths_of(90, [0.3, 0.8][: ranks.size - 1]), 7, topk, exchange)
    assert_as_exact_as_dense(spread(ranks, call), q, k, v, mask, scale=None, gradients=True)


def problem_of(ranks: Processes, **options: Any) -> tuple[Problem, tuple[int, ...]]:
    sizes = {"kv_heads": ranks.size, "group": 2, "q_len": 50, "kv_len": 50, "value_dim": 6}
    return Problem(**sizes | options), (17, 33) if ranks.size == 2 else (17, 9, 24)


def upstream_of(problem: Problem) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(problem.seed + 1)
    shape = (problem.batch, problem.heads, problem.q_len)
    lse_dtype = torch.promote_types(problem.dtype, torch.float32)
    return (
        torch.randn(*shape, problem.value_dim, generator=generator).to(problem.dtype),
        torch.randn(shape, generator=generator).to(lse_dtype),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("topk", [3, None])
def test_gather_is_flex_moba_from_each_shard(ranks, dtype, topk):
    # Bit for bit, also the sum of gradients: in float32, in the order of ranks, rounded once.
    problem, lengths = problem_of(ranks, dtype=dtype, batch=2)
    tensors, upstream = problem.tensors(), upstream_of(problem)
    call = Call(lengths, 4, topk)
    results = []
    sums = [torch.zeros_like(x, dtype=torch.float32) for x in tensors[1:]]
    for rank, end in enumerate(accumulate(lengths)):
        q, k, v = (
            x.detach().requires_grad_()
            for x in (call.shard(tensors[0], rank), *(y[:, :, :end] for y in tensors[1:]))
        )
        out, lse = with_lse(flex_moba, 4, topk)(q, k, v)
        ups = [call.shard(x, rank) for x in upstream]
        dq, *others = torch.autograd.grad((out, lse), (q, k, v), ups)
        for total, grad in zip(sums, others, strict=True):
            total[:, :, :end] += grad
        results.append((out, lse, dq))
    expected = [torch.cat(x, 2) for x in zip(*results, strict=True)]
    actual = joined(ranks, forward, call, *tensors)
    actual += joined(ranks, backward, call, *tensors, *upstream)
    for x, y in zip(actual, [*expected, *(x.to(dtype) for x in sums)], strict=True):
        assert_bitwise_equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("exchange", "documents"),
    [("heads", None), ("heads", [0, 50]), ("heads", [0, 20, 50, 50]), ("heads", [0, 3, 3, 29, 50])],
    ids=str,
)
def test_heads_is_flex_moba_of_all_tokens(ranks, dtype, exchange, documents):
    problem, lengths = problem_of(ranks, dtype=dtype)
    options = {}
    if documents is not None:
        options = {"cu_seqlens": torch.tensor(documents, dtype=torch.int32), "max_seqlen": 50}
    q, k, v = tensors = problem.tensors(requires_grad=True)
    upstream = upstream_of(problem)
    out, lse = with_lse(flex_moba, 4, 3, **options)(q, k, v)
    expected = (out, lse, *torch.autograd.grad((out, lse), tensors, upstream))
    call = Call(lengths, 4, 3, exchange, options)
    actual = joined(ranks, forward, call, *tensors)
    actual += joined(ranks, backward, call, *tensors, *upstream)
    for x, y in zip(actual, expected, strict=True):
        assert_bitwise_equal(x, y)


@few
@given(drawn, st.data())
def test_documents_with_gather(ranks, problem, data):
    problem = replace(square(problem, ranks, data), batch=1)
    total = problem.kv_len
    edges = data.draw(st.lists(st.integers(0, total), max_size=5), label="edges")
    options = {"cu_seqlens": torch.tensor([0, *sorted(edges), total], dtype=torch.int32)}
    topk = data.draw(st.sampled_from((None, problem.topk)), label="topk")
    if data.draw(st.booleans(), label="score_mod"):
        options["score_mod"] = by_head_and_position
    lengths = lengths_of(total, data.draw(cuts(ranks), label="cuts"))
    call = Call(lengths, problem.block_size, topk, "gather", options)
    tensors, upstream = problem.tensors(requires_grad=True), upstream_of(problem)
    exact = moba_reference(*tensors, problem.block_size, topk or total, **options)
    expected = with_lse(flex_moba, problem.block_size, topk, **options)(*tensors)
    torch.testing.assert_close(expected[0], exact)
    expected = (*expected, *torch.autograd.grad(expected, tensors, upstream))
    actual = joined(ranks, forward, call, *tensors)
    actual += joined(ranks, backward, call, *tensors, *upstream)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_tiles_of_documents(ranks):
    problem, _ = problem_of(ranks, q_len=500, kv_len=500)
    lengths = ((188, 312), (188, 256, 56))[ranks.size - 2]
    options = {"gate": "tile", "cu_seqlens": torch.tensor([0, 60, 500])}
    expected = flex_moba(*problem.tensors(), 128, 2, **options)
    call = Call(lengths, 128, 2, "gather", options)
    torch.testing.assert_close(joined(ranks, forward, call, *problem.tensors())[0], expected)


def test_documents_that_end_with_shards_are_not_sent(ranks):
    problem, lengths = problem_of(ranks)
    edges = torch.tensor([0, 5, *accumulate(lengths)])
    options = {"cu_seqlens": edges, "score_mod": by_head_and_position}
    call = Call(lengths, 4, 2, "auto", options)
    expected = flex_moba(*problem.tensors(), 4, 2, **options)
    shards = [(call, *(call.shard(x, r) for x in problem.tensors())) for r in range(ranks.size)]
    results = ranks.run(without_sending, [(forward, *shard) for shard in shards])
    torch.testing.assert_close(torch.cat([out for out, _ in results], 2), expected)


def elements_sent(mesh: DeviceMesh, call: Call, *inputs: Tensor) -> list[list[int]]:
    """Returns the number of elements that this rank sends to each rank, by exchange."""
    sent, function = [], gather.all_to_all

    def record(x: Tensor, sizes: list[int], *others: Any) -> Any:
        sent.append(sizes)
        return function(x, sizes, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "all_to_all", record)
        patch.setattr(gather, "BYTES_AT_ONCE", 2**40)
        call(mesh, *(x.requires_grad_() for x in inputs)).sum().backward()
    return sent


@pytest.mark.parametrize("documents", [None, [0, 8, 45, 50]], ids=str)
def test_only_keys_of_later_queries_are_sent(ranks, documents):
    problem, lengths = problem_of(ranks)
    options = {} if documents is None else {"cu_seqlens": torch.tensor(documents)}
    call = Call(lengths, options=options)
    features = problem.kv_heads * (problem.head_dim + problem.value_dim)
    begin = 0 if documents is None else 8
    counts = [
        end - max(begin, end - n) for n, end in zip(lengths, accumulate(lengths), strict=True)
    ]
    for rank, sent in enumerate(run(ranks, elements_sent, call, *problem.tensors())):
        later = [0] * (rank + 1) + [features * counts[rank]] * (ranks.size - rank - 1)
        earlier = [features * n for n in counts[:rank]] + [0] * (ranks.size - rank)
        assert sent == [later, later, earlier]  # forward, gathered again, gradients


def test_ranks_share_a_kv_head(ranks):
    problem, lengths = problem_of(ranks, kv_heads=1, group=2 * ranks.size)
    q, k, v = problem.tensors()
    mask = reference_mask(
        reference_selection(q, k, 4, 3, is_causal=True), 4, problem.kv_len, is_causal=True
    )
    call = Call(lengths, 4, 3, "heads")
    assert_as_exact_as_dense(spread(ranks, call), q, k, v, mask, gradients=True)


@pytest.mark.parametrize("exchange", ["gather", "heads"])
def test_tiles(ranks, exchange):
    problem, _ = problem_of(ranks, q_len=500, kv_len=500)
    lengths = ((128, 372), (128, 256, 116))[ranks.size - 2]
    q, k, v = problem.tensors()
    selected = reference_selection(q, k, 128, 2, is_causal=True, gate="tile")
    mask = reference_mask(selected, 128, 500, is_causal=True)
    call = Call(lengths, 128, 2, exchange, {"gate": "tile"})
    assert_as_exact_as_dense(spread(ranks, call), q, k, v, mask, gradients=True)


@pytest.mark.parametrize("exchange", ["gather", "heads"])
@pytest.mark.parametrize("empty", [0, 1, -1, "all", "all but one", "batch"], ids=str)
def test_ranks_without_tokens(ranks, exchange, empty):
    problem, lengths = problem_of(ranks)
    total = 0 if empty == "all" else 50
    if empty == "all":
        lengths = (0,) * ranks.size
    elif empty == "batch":
        problem = replace(problem, batch=0)
    elif empty == "all but one":
        lengths = (0,) * (ranks.size - 1) + (50,)
    else:
        lengths = [*lengths]
        lengths[empty] = 0
        lengths[empty - 1] += 50 - sum(lengths)
    problem = replace(problem, q_len=total, kv_len=total)
    tensors, upstream = problem.tensors(requires_grad=True), upstream_of(problem)
    out, lse = with_lse(flex_moba, 4, 2)(*tensors)
    expected = (out, lse, *torch.autograd.grad((out, lse), tensors, upstream))
    call = Call(tuple(lengths), 4, 2, exchange)
    actual = joined(ranks, forward, call, *tensors)
    actual += joined(ranks, backward, call, *tensors, *upstream)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("exchange", ["gather", "heads"])
def test_two_runs_are_bitwise_equal(ranks, exchange):
    problem, lengths = problem_of(ranks, dtype=torch.bfloat16)
    call, tensors = Call(lengths, 4, 3, exchange), (*problem.tensors(), *upstream_of(problem))
    first, second = (joined(ranks, backward, call, *tensors) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert_bitwise_equal(x, y)


def without_sending(mesh: DeviceMesh, task: Callable, *arguments: Any) -> Any:
    """Runs a task in which no rank may send shards; ranks may compare their arguments."""

    def sends(*_: Any) -> None:
        raise AssertionError("a rank sends its shard")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "all_to_all", sends)
        patch.setattr(heads, "all_to_all", sends)
        patch.setattr(blocks, "all_to_all", sends)
        return task(mesh, *arguments)


@pytest.mark.parametrize("exchange", ["gather", "heads"])
@pytest.mark.parametrize("sizes", [{"q_len": 0, "kv_len": 0}, {"batch": 0}], ids=str)
def test_nothing_is_sent_without_tokens(ranks, exchange, sizes):
    problem, lengths = problem_of(ranks, **sizes)
    call = Call((0,) * ranks.size if "q_len" in sizes else lengths, exchange=exchange)
    shards = [(call, *(call.shard(x, r) for x in problem.tensors())) for r in range(ranks.size)]
    results = ranks.run(without_sending, [(forward, *shard) for shard in shards])
    for rank, (out, lse) in enumerate(results):
        assert out.shape == (problem.batch, problem.heads, call.lengths[rank], problem.value_dim)
        assert lse.shape == out.shape[:3]


def by_head_and_position(score, b, h, q_idx, kv_idx):
    return score + 0.1 * h + 0.01 * (q_idx - kv_idx) * (h + 1) + b + 0.3 * (kv_idx % 7)


# ---- Only the selected blocks -------------------------------------------------------------------


@settings(max_examples=12)
@given(drawn, st.data())
def test_blocks_equals_gather(ranks, problem, data):
    """Bit for bit if no rank selects all blocks before its own, which is full attention."""
    forced = data.draw(st.sampled_from(((0, 0), (1, 0), (0, 1), (1, 1))), label="forced")
    gate = data.draw(st.sampled_from(("token", "group")), label="gate")
    size = problem.block_size
    counts = data.draw(st.tuples(*[st.integers(0, 60 // size) for _ in range(ranks.size)]))
    last = data.draw(st.integers(0, size), label="tokens of a block that is not full")
    lengths = [n * size for n in counts]
    lengths[-1] += last
    total = sum(lengths)
    problem = replace(problem, q_len=total, kv_len=total)
    options = {"gate": gate, "sink_blocks": forced[0], "local_blocks": forced[1]}
    options["gate_block_size"] = data.draw(sub_blocks(size), label="sub-blocks")
    topk = max(problem.topk, 1 + sum(forced))
    tensors = (*problem.tensors(), *upstream_of(problem))
    results = [
        joined(ranks, task, Call(tuple(lengths), size, topk, exchange, options), *inputs)
        for exchange in ("gather", "blocks")
        for task, inputs in ((forward, tensors[:3]), (backward, tensors))
    ]
    is_full = any(0 < end <= topk * size for end in accumulate(lengths))
    compare = torch.testing.assert_close if is_full else assert_bitwise_equal
    for x, y in zip([*results[0], *results[1]], [*results[2], *results[3]], strict=True):
        compare(y, x)


def under_autocast(mesh: DeviceMesh, call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
    with torch.autocast("cpu", torch.bfloat16):
        return backward(mesh, call, *tensors)


def test_blocks_under_autocast_selects_as_gather(ranks):
    problem, _ = problem_of(ranks, dtype=torch.float32, q_len=400, kv_len=400)
    lengths = (200, *[0] * (ranks.size - 2), 200)
    tensors = (*problem.tensors(), *upstream_of(problem))
    by_gather, by_blocks = (
        joined(ranks, under_autocast, Call(lengths, 4, 3, exchange), *tensors)
        for exchange in ("gather", "blocks")
    )
    for x, y in zip(by_blocks, by_gather, strict=True):
        assert_bitwise_equal(x, y)


def blocks_sent(mesh: DeviceMesh, call: Call, *inputs: Tensor) -> list[list[int]]:
    sent, function = [], blocks.all_to_all

    def record(x: Tensor, sizes: list[int], *others: Any) -> Any:
        sent.append(sizes)
        return function(x, sizes, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "all_to_all", record)
        patch.setattr(gather, "BYTES_AT_ONCE", 2**40)
        call(mesh, *(x.requires_grad_() for x in inputs)).sum().backward()
    return sent


def test_only_selected_blocks_are_sent(ranks):
    problem, _ = problem_of(ranks, kv_heads=1, group=1, q_len=96, kv_len=96)
    lengths = (48,) * 2 if ranks.size == 2 else (48, 0, 48)
    q, k, v = problem.tensors()
    q[:, :, 48:] = k[:, :, 8:12].mean(2, keepdim=True) * 9  # block 2
    selected = reference_selection(q, k, 4, 2, is_causal=True)[0, 0, 48:, :12].any(0)
    assert 0 < selected.sum() < 4
    features = problem.head_dim + problem.value_dim
    size = 4 * features * int(selected.sum())
    sent = run(ranks, blocks_sent, Call(lengths, 4, 2, "blocks"), q, k, v)
    nothing, last = [0] * ranks.size, ranks.size - 1
    to_last, to_first = [*nothing], [*nothing]
    to_last[last], to_first[0] = size, size
    # The wanted blocks, one byte for each, then keys and values, then their gradients.
    assert sent[0] == [nothing, to_last, nothing]
    assert sent[last] == [[12, *nothing[1:]], nothing, to_first]


@pytest.mark.parametrize(
    ("lengths", "changes", "message"),
    [
        ((22, 28), {}, r"needs shards that begin at multiples of block_size=4, got lengths \[22"),
        ((24, 26), {"cu_seqlens": torch.tensor([0, 50])}, "does not support cu_seqlens"),
        ((24, 26), {"gate": "tile"}, 'does not support gate="tile"'),
        ((24, 26), {"score_mod": by_head_and_position}, "does not support score_mod"),
        ((24, 26), {"best": None}, "needs a topk, got None"),
    ],
    ids=["lengths", "documents", "tiles", "score_mod", "topk"],
)
def test_blocks_is_refused(ranks, lengths, changes, message):
    lengths = (*lengths, *[0] * (ranks.size - 2))
    topk = changes.get("best", 2)
    options = {name: x for name, x in changes.items() if name != "best"}
    block_size = 128 if "gate" in changes else 4
    lengths = lengths if block_size == 4 else (128, *[0] * (ranks.size - 1))
    problem = Problem(q_len=sum(lengths), kv_len=sum(lengths))
    call = Call(lengths, block_size, topk, "blocks", options)
    shards = [(call, *(call.shard(x, r) for x in problem.tensors())) for r in range(ranks.size)]
    for error in ranks.run(without_sending, [(forward, *shard) for shard in shards]):
        with pytest.raises(
            NotImplementedError, match=f'"blocks" {message}.*; use exchange="gather"'
        ):
            raise error


# ---- score_mod ----------------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", ["gather", "heads"])
@pytest.mark.parametrize("topk", [3, None])
def test_score_mod_gets_heads_and_positions_of_the_sequence(ranks, exchange, topk):
    problem, lengths = problem_of(ranks, batch=2)
    q, k, v = problem.tensors()
    selected = reference_selection(q, k, 4, topk, is_causal=True)
    mask = reference_mask(selected, 4, 50, is_causal=True)
    options = {"score_mod": by_head_and_position, "scale": 0.5}
    call = Call(lengths, 4, topk, exchange, options)
    assert_as_exact_as_dense(spread(ranks, call), q, k, v, mask, gradients=True, **options)


def with_bias(mesh: DeviceMesh, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    bias = torch.linspace(0, 1, q.shape[1], dtype=q.dtype, requires_grad=True)
    out = call(mesh, q, k, v, score_mod=lambda s, b, h, i, j: s + bias[h] * (i - j))
    return torch.autograd.grad(out.sum(), bias)


def test_captured_tensors(ranks):
    problem, lengths = problem_of(ranks)
    q, k, v = problem.tensors()
    call = Call(lengths, exchange="heads")
    bias = torch.linspace(0, 1, q.shape[1], dtype=q.dtype, requires_grad=True)
    out = flex_moba(q, k, v, 4, 2, score_mod=lambda s, b, h, i, j: s + bias[h] * (i - j))
    (expected,) = torch.autograd.grad(out.sum(), bias)
    grads = run(ranks, with_bias, call, q, k, v)
    torch.testing.assert_close(sum(grad for (grad,) in grads), expected)
    q.requires_grad_()
    with pytest.raises(NotImplementedError, match=r'captures, got one of shape \(\d,\).*"heads"'):
        run(ranks, with_bias, replace(call, exchange="gather"), q, k, v)


# ---- Two exchanges in one call ------------------------------------------------------------------


NODES: list[DeviceMesh] = []  # of a process; making one is a collective


def in_nodes(mesh: DeviceMesh, task: Callable, call: Call, *inputs: Tensor) -> Any:
    """Runs a task on two nodes of two ranks."""
    if not NODES:
        NODES.append(init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "gpu")))
    return task(NODES[0], call, *inputs)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory) -> Iterator[Processes]:
    processes = Processes(4, tmp_path_factory.mktemp("nodes"))
    processes.run(small_pieces, [()] * processes.size)
    yield processes
    processes.stop()


NESTED = {
    "gather": {},
    "uneven": {"lengths": (5, 0, 31, 14)},
    "no tokens on a node": {"lengths": (0, 0, 20, 30)},
    "full": {"topk": None},
    "documents": {"cu_seqlens": torch.tensor([0, 3, 33, 50])},
    "score_mod": {"score_mod": by_head_and_position},
    "group": {"gate": "group", "sink_blocks": 1},
    "blocks": {"exchange": ("blocks", "heads")},
}


@pytest.mark.parametrize("name", NESTED)
def test_two_exchanges(nodes, name):
    options = dict(NESTED[name])
    lengths = options.pop("lengths", (10, 14, 13, 13))
    topk, exchange = options.pop("topk", 3), options.pop("exchange", ("gather", "heads"))
    problem = Problem(kv_heads=2, group=2, q_len=50, kv_len=50, value_dim=6)
    tensors, upstream = problem.tensors(requires_grad=True), upstream_of(problem)
    expected = with_lse(flex_moba, 4, topk, **options)(*tensors)
    expected = (*expected, *torch.autograd.grad(expected, tensors, upstream))
    call = Call(lengths, 4, topk, exchange, options)
    actual = []
    for task, inputs in ((forward, tensors), (backward, (*tensors, *upstream))):
        shards = [
            (task, call, *(call.shard(x, rank) for x in inputs)) for rank in range(nodes.size)
        ]
        results = nodes.run(in_nodes, shards)
        for result in results:
            if isinstance(result, Exception):
                raise result
        actual += [torch.cat(x, 2) for x in zip(*results, strict=True)]
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("sizes", "lengths", "exchange", "message"),
    [
        ({"kv_heads": 3, "group": 1}, (10,) * 4, ("gather", "heads"), "needs a number of ranks"),
        ({"kv_heads": 2}, (10,) * 4, ("blocks", "heads"), r"needs shards .* lengths \[20, 20\]"),
        ({"kv_heads": 2}, (10,) * 4, ("heads", "heads"), "exchange must be one of"),
        ({"kv_heads": 2}, (10,) * 4, "gather", "mesh must have one dimension"),
    ],
    ids=["heads", "lengths", "names", "mesh"],
)
def test_two_exchanges_are_refused(nodes, sizes, lengths, exchange, message):
    problem = Problem(**sizes, q_len=40, kv_len=40)
    call = Call(lengths, 8, 2, exchange)
    shards = [
        (forward, call, *(call.shard(x, rank) for x in problem.tensors())) for rank in range(4)
    ]
    for error in nodes.run(in_nodes, shards):
        with pytest.raises((NotImplementedError, ValueError), match=message):
            raise error


def test_two_exchanges_need_two_dimensions(ranks):
    problem, lengths = problem_of(ranks)
    call = Call(lengths, exchange=("gather", "heads"))
    shards = [(call, *(call.shard(x, r) for x in problem.tensors())) for r in range(ranks.size)]
    for error in ranks.run(without_sending, [(forward, *shard) for shard in shards]):
        with pytest.raises(ValueError, match="mesh must have two dimensions with names"):
            raise error


# ---- Training and inference ---------------------------------------------------------------------


def by_checkpoint(mesh: DeviceMesh, call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
    inputs, upstream = [x.requires_grad_() for x in tensors[:3]], tensors[3:]
    results = checkpoint(lambda *x: forward(mesh, call, *x), *inputs, use_reentrant=False)
    return torch.autograd.grad(results, inputs, upstream)


def twice(mesh: DeviceMesh, call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
    inputs, upstream = [x.requires_grad_() for x in tensors[:3]], tensors[3:]
    results = forward(mesh, call, *inputs)
    torch.autograd.grad(results, inputs, upstream, retain_graph=True)
    return torch.autograd.grad(results, inputs, upstream)


def in_parts(mesh: DeviceMesh, call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
    grads = []
    for i in range(3):
        inputs = [x.detach().requires_grad_(i == j) for j, x in enumerate(tensors[:3])]
        results = forward(mesh, call, *inputs)
        grads.append(torch.autograd.grad(results, inputs[i], tensors[3:])[0])
    return tuple(grads)


def compiled(mesh: DeviceMesh, call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
    inputs, upstream = [x.requires_grad_() for x in tensors[:3]], tensors[3:]

    def model(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = forward(mesh, call, q * 1, k, v)
        return out + 0, lse

    results = torch.compile(model, backend="eager")(*inputs)
    return torch.autograd.grad(results, inputs, upstream)


@pytest.mark.parametrize(
    ("exchange", "task"),
    [*product(("gather", "heads"), (by_checkpoint, twice, in_parts)), ("gather", compiled)],
)
def test_gradients_are_the_same(ranks, exchange, task):
    problem, lengths = problem_of(ranks, dtype=torch.float32)
    call, tensors = Call(lengths, 4, 3, exchange), (*problem.tensors(), *upstream_of(problem))
    actual, expected = (joined(ranks, each, call, *tensors) for each in (task, backward))
    for x, y in zip(actual, expected, strict=True):
        assert_bitwise_equal(x, y)


def turned(x: Tensor) -> Tensor:
    """Saves the result of the first product, which is neither an input nor an output."""
    turn = torch.eye(x.shape[-1], dtype=x.dtype).roll(1, 0)
    return x @ turn @ (x @ turn).mT @ x


def with_a_compiled_function(
    mesh: DeviceMesh, call: Call, *tensors: Tensor, is_compiled: bool
) -> tuple[Tensor, ...]:
    function = torch.compile(turned, backend="aot_eager") if is_compiled else turned
    alone = tensors[0].detach().requires_grad_()
    function(alone).sum().backward()  # compiles the backward of a graph that is not retained

    def attend(q: Tensor, *args: Any, **options: Any) -> Any:
        return attend_on_one_device(function(q), *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flexmoba.distributed.attend.attend_on_one_device", attend)
        grads = backward(mesh, call, *tensors)
        if is_compiled:
            with pytest.raises(RuntimeError, match="donated buffers"):  # as on one device
                twice(mesh, call, *tensors)
    return grads


def test_a_compiled_backend_may_overwrite_what_it_saved(ranks):
    """On CUDA, compiled FlexAttention does so in float32 and with a ``score_mod``."""
    if ranks.size > 2:
        pytest.skip("as with two ranks, and compilation takes seconds")
    problem, _ = problem_of(ranks, dtype=torch.float32)
    lengths = (problem.q_len // 2,) * 2  # one compilation
    call, tensors = Call(lengths, 4, 3), (*problem.tensors(), *upstream_of(problem))
    actual, expected = (
        joined(ranks, partial(with_a_compiled_function, is_compiled=x), call, *tensors)
        for x in (True, False)
    )
    for x, y in zip(actual, expected, strict=True):
        assert_bitwise_equal(x, y)


def second_derivative(mesh: DeviceMesh, call: Call, *inputs: Tensor) -> None:
    q, k, v = (x.requires_grad_() for x in inputs)
    for wanted in (q, v):
        (grad,) = torch.autograd.grad(call(mesh, q, k, v).sum(), wanted, create_graph=True)
        with pytest.raises(NotImplementedError, match="attention has no second derivatives"):
            torch.autograd.grad(grad.sum(), k)


@pytest.mark.parametrize("exchange", ["gather", "heads"])
def test_second_derivatives_are_refused(ranks, exchange):
    problem, lengths = problem_of(ranks)
    run(ranks, second_derivative, Call(lengths, exchange=exchange), *problem.tensors())


def whole_graph(mesh: DeviceMesh, call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
    inputs, upstream = [x.requires_grad_() for x in tensors[:3]], tensors[3:]

    def model(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, aux = call(mesh, q * 1, k, v, return_aux=LSE, lengths=call.lengths)
        return out + 0, aux.lse

    results = torch.compile(model, backend="aot_eager", fullgraph=True)(*inputs)
    return *results, *torch.autograd.grad(results, inputs, upstream)


@pytest.mark.parametrize(
    ("exchange", "options"),
    [("gather", {}), ("heads", {"cu_seqlens": torch.tensor([0, 20, 50])})],
    ids=["gather", "heads, documents"],
)
def test_a_whole_graph_has_the_same_results(ranks, exchange, options):
    if ranks.size > 2:
        pytest.skip("as with two ranks, and compilation takes seconds")
    problem, lengths = problem_of(ranks, dtype=torch.float32)
    call = Call(lengths, 4, 3, exchange, options)
    tensors = problem.tensors()
    expected = joined(ranks, forward, call, *tensors)
    tensors = (*tensors, *upstream_of(problem))
    expected += joined(ranks, backward, call, *tensors)
    for x, y in zip(joined(ranks, whole_graph, call, *tensors), expected, strict=True):
        assert_bitwise_equal(x, y)


def no_whole_graph(mesh: DeviceMesh, call: Call, options: dict[str, Any], *inputs: Tensor) -> None:
    model = torch.compile(lambda *x: call(mesh, *x, **options), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="traces context_parallel_moba with le"):
        model(*inputs)


def test_whole_graphs_that_are_refused(ranks):
    if ranks.size > 2:
        pytest.skip("as with two ranks, and dynamo takes seconds")
    problem, lengths = problem_of(ranks)
    for options in (
        {},
        {"lengths": lengths, "score_mod": by_head_and_position},
        {"lengths": lengths, "cu_seqlens": torch.tensor([0, 50])},
    ):
        shards = [
            (Call(lengths), options, *(Call(lengths).shard(x, r) for x in problem.tensors()))
            for r in range(ranks.size)
        ]
        assert ranks.run(no_whole_graph, shards) == [None] * ranks.size


def length_of_saved(mesh: DeviceMesh, call: Call, *inputs: Tensor) -> int:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        call(mesh, *(x.requires_grad_() for x in inputs))
    return max(x.shape[2] for x in saved if x.ndim == 4)


def test_hooks_see_the_saved_tensors_and_none_is_gathered(ranks):
    problem, lengths = problem_of(ranks)
    sizes = run(ranks, length_of_saved, Call(lengths), *problem.tensors())
    assert sizes == [*lengths]


def outputs_saved(mesh: DeviceMesh, call: Call, *inputs: Tensor) -> tuple[int, int]:
    """Returns the number of elements saved in the shape of a part of the output, and its own."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = call(mesh, *(x.requires_grad_() for x in inputs))
    sizes = [x.numel() for x in saved if x.ndim == 4 and x.shape[3] == out.shape[3]]
    return sum(sizes), out.numel()


def test_the_output_is_saved_once(ranks):
    problem, lengths = problem_of(ranks, value_dim=5, batch=2)
    for saved, output in run(ranks, outputs_saved, Call(lengths), *problem.tensors()):
        values = output // problem.group
        assert saved == output + values


def largest_memory(mesh: DeviceMesh, call: Call, *inputs: Tensor) -> tuple[int, int]:
    """Returns the largest number of chunks of keys that exist at one time, and of all chunks."""
    chunks, largest = [], 0

    def track(function: Callable) -> Callable:
        def tracked(*args: Any) -> Any:
            nonlocal largest
            result = function(*args)
            tensors = [x for x in result if isinstance(x, Tensor) and x.numel() > 0]
            chunks.extend(weakref.ref(x.untyped_storage()) for x in tensors[:1])
            deadline = time.perf_counter() + 1  # a thread of gloo may release tensors a bit later
            while (alive := sum(x() is not None for x in chunks)) > 2:
                if time.perf_counter() > deadline:
                    break
                time.sleep(0.001)
            largest = max(largest, alive)
            return result

        return tracked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "start_gathering", track(gather.start_gathering))
        patch.setattr(gather, "arranged", track(gather.arranged))
        patch.setattr(gather, "BYTES_AT_ONCE", 1)
        out = call(mesh, *(x.requires_grad_() for x in inputs))
        out.sum().backward()
    return largest, len(chunks)


def test_at_most_two_chunks_of_gathered_keys_exist(ranks):
    problem, lengths = problem_of(ranks, kv_heads=5)
    for largest, all_chunks in run(ranks, largest_memory, Call(lengths), *problem.tensors()):
        assert (largest, all_chunks) == (2, 5 * 2 * 2)


def test_contiguous_tensors_are_joined(monkeypatch):
    """torch joins others on CUDA by a slow kernel, which no communication hides."""
    joined, cat = [], torch.cat

    def spy(tensors: list[Tensor], *args: Any, **options: Any) -> Tensor:
        joined.extend(tensors)
        return cat(tensors, *args, **options)

    def nothing_arrives(x: Tensor, sizes: list[int], received: list[int], group: Any) -> Pending:
        return Pending(None, x.new_zeros(sum(received)), x)

    monkeypatch.setattr(torch, "cat", spy)
    monkeypatch.setattr(gather, "all_to_all", nothing_arrives)
    lengths = (5, 5, 5)
    for rank in range(3):
        plan = plan_of(Ranks(None, rank, lengths), (0, 0, 0), None, None)
        k, v = torch.randn(2, 1, 8, 5, 4).unbind(0)
        k, v = k[:, 2:3], v[:, 2:3]  # a chunk of one KV head
        received = gather.start_gathering(k, v, plan).received
        whole = gather.arranged(received, k, v, plan)
        assert whole[0].shape == (1, 1, 5 * (rank + 1), 4)
        gather.start_reducing(*whole, plan)
    assert len(joined) > 20
    assert all(x.is_contiguous() for x in joined)


def several(mesh: DeviceMesh, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Returns results that must be equal, without gradients."""
    out = call(mesh, q, k, v)
    assert isinstance(out, Tensor)
    same, aux = call(mesh, q, k, v, return_aux=AuxRequest())
    assert isinstance(aux, AuxOutput)
    assert aux.lse is None
    known = call(mesh, q, k, v, lengths=call.lengths)
    part = init_device_mesh("cpu", (1, mesh.size()), mesh_dim_names=("data", "context"))["context"]
    in_part = call(part, q, k, v)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "BYTES_AT_ONCE", 2**40)
        at_once = call(mesh, q, k, v)
    with torch.inference_mode():
        inferred = call(mesh, q, k, v)
    needs_grad = call(mesh, q.requires_grad_(), k, v).detach()
    return out, same, known, in_part, at_once, inferred, needs_grad


@pytest.mark.parametrize("exchange", ["gather", "heads"])
@pytest.mark.parametrize(
    "options",
    [{}, {"score_mod": by_head_and_position}, {"gate_block_size": 2}],
    ids=["", "score_mod", "gate_block_size"],
)
def test_ways_to_make_the_same_call(ranks, exchange, options):
    problem, lengths = problem_of(ranks)
    results = joined(ranks, several, Call(lengths, 4, 3, exchange, options), *problem.tensors())
    expected = flex_moba(*problem.tensors(), 4, 3, **options)
    torch.testing.assert_close(results[0], expected)
    for other in results[1:]:
        assert_bitwise_equal(other, results[0])


# ---- Errors -------------------------------------------------------------------------------------


def attempt(mesh: DeviceMesh, call: Call, sizes: dict[str, Any], changes: dict[str, Any]) -> None:
    q, k, v = Problem(**sizes).tensors()
    if "dtensor" in changes:
        q = DTensor.from_local(q, mesh)
    if "cast" in changes:
        k = k.to(changes["cast"])
    if "queries" in changes:
        q = q[:, :, : changes["queries"]]
    if "causal" in changes:
        call = replace(call, options={"is_causal": changes["causal"]})
    q.requires_grad_(bool(changes.get("requires_grad")))
    others = ("dtensor", "cast", "causal", "tangent", "queries", "requires_grad")
    with forward_ad.dual_level():
        if "tangent" in changes:
            q = forward_ad.make_dual(q, q)
        call(mesh, q, k, v, **{name: x for name, x in changes.items() if name not in others})


def fails(ranks: Processes, last: dict[str, Any], others: dict[str, Any] | None = None) -> list:
    """Returns the errors of all ranks if the last one has other arguments, soon."""
    sizes = {"kv_heads": ranks.size, "q_len": 20, "kv_len": 20}
    names = {x for x in last if x in Problem.__dataclass_fields__}
    last_sizes = sizes | {name: last[name] for name in names}
    changes = {name: x for name, x in last.items() if name not in names}
    call = Call((20,) * ranks.size)
    block_size, topk = changes.pop("blocks", 4), changes.pop("best", 2)
    last_call = replace(call, block_size=block_size, topk=topk)
    arguments = [(call, sizes, others or {})] * (ranks.size - 1) + [
        (last_call, last_sizes, changes)
    ]
    began = time.perf_counter()
    errors = ranks.run(without_sending, [(attempt, *mine) for mine in arguments])
    assert time.perf_counter() - began < SECONDS / 4, "the ranks waited for each other"
    assert all(isinstance(error, Exception) for error in errors), errors
    assert not any(isinstance(error, AssertionError) for error in errors), errors
    # The ranks are ready for another call.
    results = ranks.run(attempt, [(call, sizes, {})] * ranks.size)
    assert results == [None] * ranks.size
    return errors


MISMATCHES = {
    "batch": ({"batch": 2}, "batch size, got 1 on rank 0 and 2 on rank"),
    "heads": ({"group": 2}, "number of query heads, got"),
    "head dim": ({"head_dim": 4}, "head dim, got 8 on rank 0 and 4"),
    "value dim": ({"value_dim": 4}, "head dim of values, got 8 on rank 0 and 4"),
    "dtype": ({"dtype": torch.float32}, "dtype, got 'torch.float64' on rank 0 and 'torch.float32'"),
    "block_size": ({"blocks": 8}, "block_size, got 4 on rank 0 and 8"),
    "topk": ({"best": None}, "topk, got 2 on rank 0 and None"),
    "exchange": ({"exchange": "heads"}, "exchange, got 'gather' on rank 0 and 'heads'"),
    "scale": ({"scale": 2.0}, "scale, got None on rank 0 and 2.0"),
    "gate": ({"gate": "group"}, "gate, got 'token' on rank 0 and 'group'"),
    "sub-blocks": ({"gate_block_size": 2}, "gate_block_size, got None on rank 0 and 2"),
    "sinks": ({"sink_blocks": 1}, "sink_blocks, got 0 on rank 0 and 1"),
    "local": ({"local_blocks": 1}, "local_blocks, got 0 on rank 0 and 1"),
    "impl": ({"impl": "portable"}, "impl, got 'auto' on rank 0 and 'portable'"),
    "lse": ({"return_aux": LSE}, "lse, got False on rank 0 and True"),
    "requires_grad": ({"requires_grad": True}, r"requires_grad of q, k and v, got \[False"),
    "score_mod": ({"score_mod": by_head_and_position}, "score_mod, got None on rank 0 and 'a"),
    "kernel_options": ({"kernel_options": {"x": 1}}, "kernel_options, got None on rank 0 and 'a"),
    "cu_seqlens": ({"cu_seqlens": torch.tensor([0, 40])}, r"cu_seqlens, got None on rank 0 and \["),
    "max_seqlen": ({"max_seqlen": 7}, "max_seqlen, got None on rank 0 and 7"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_different_arguments_raise_the_same_error_on_all_ranks(ranks, name):
    changes, message = MISMATCHES[name]
    errors = fails(ranks, changes)
    assert {type(error) for error in errors} == {ValueError}
    assert len({str(error) for error in errors}) == 1
    with pytest.raises(ValueError, match=f"must pass the same {message}.* {ranks.size - 1};"):
        raise errors[0]


WRONG = {
    "tangent": ({"tangent": True}, NotImplementedError, "q has a tangent"),
    "mixed dtypes": ({"cast": torch.bfloat16}, ValueError, "must have the same dtype"),
    "DTensor": ({"dtensor": True}, TypeError, "q must be this rank's shard, got a DTensor"),
    "queries": ({"queries": 7}, ValueError, "same tokens on each rank, got 7 queries and 20 keys"),
    "blocks": ({"blocks": 0}, ValueError, "block_size must be at least 1"),
    "exchange": ({"exchange": "ring"}, ValueError, "exchange must be one of .*, got 'ring'"),
    "causal": ({"causal": False}, NotImplementedError, "does not support is_causal=False"),
    "impl": ({"impl": "fused"}, NotImplementedError, "needs inputs on CUDA"),
    "scale": ({"scale": "1"}, TypeError, "scale must be a Python number"),
    "long": ({"scale": torch.inf, "gate": "é" * 9000}, ValueError, "gate must be one of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_error_of_one_rank_is_an_error_of_all(ranks, name):
    changes, kind, message = WRONG[name]
    *others, last = fails(ranks, changes)
    assert type(last) is kind
    for error in others:
        assert type(error) is ValueError
        assert f"the arguments of rank {ranks.size - 1} are wrong: " in str(error)
    with pytest.raises(kind, match=message):
        raise last
    if name != "long":
        with pytest.raises(ValueError, match=message):
            raise others[0]


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"cu_seqlens": torch.tensor([0, 7]), "exchange": "heads"},
            ValueError,
            "cu_seqlens must rise from 0",
        ),
        ({"cu_seqlens": torch.tensor([0, 7])}, ValueError, "cu_seqlens must rise from 0"),
        ({"max_seqlen": 7, "exchange": "heads"}, ValueError, "max_seqlen=7 needs packed documents"),
        ({"lengths": (20,)}, ValueError, "lengths must have one length for each rank, got 1"),
        ({"lengths": (1, 2, 3)}, ValueError, "lengths"),
    ],
    ids=str,
)
def test_the_same_error_on_all_ranks(ranks, changes, kind, message):
    if ranks.size == 2 and changes.get("lengths") == (1, 2, 3):
        changes = {"lengths": (1, 2)}
    for error in fails(ranks, changes, changes):
        with pytest.raises(kind, match=message):
            raise error


def die(mesh: DeviceMesh, call: Call, when: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    def last_rank_ends(*_: Any) -> None:
        if mesh.get_local_rank() == mesh.size() - 1:
            os._exit(1)

    if when == "before":
        last_rank_ends()
    out = call(mesh, q.requires_grad_(), k, v)
    out.register_hook(last_rank_ends)
    out.sum().backward()


@pytest.mark.parametrize("when", ["before", "backward"])
@pytest.mark.parametrize("exchange", ["gather", "heads"])
def test_the_end_of_a_rank_is_an_error_of_the_others(when, exchange, tmp_path):
    processes = Processes(2, tmp_path)
    try:
        began = time.perf_counter()
        tensors = Problem(kv_heads=2).tensors()
        arguments = [(Call((24, 24), exchange=exchange), when, *tensors)] * 2
        alive, ended = processes.run(die, arguments)
        assert isinstance(alive, RuntimeError)
        assert isinstance(ended, EOFError)
        assert time.perf_counter() - began < SECONDS / 2
    finally:
        processes.stop()


def test_a_mesh_of_one_dimension_is_needed():
    x = torch.randn(1, 1, 8, 4)
    with pytest.raises(TypeError, match=r"mesh must be a torch\.distributed"):
        context_parallel_moba(x, x, x, 4, 2, mesh=None)
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "context"))
        with pytest.raises(ValueError, match=r"one dimension.*got 2 \(\('data', 'context'\)\)"):
            context_parallel_moba(x, x, x, 4, 2, mesh=mesh)
        meta = x.to("meta")
        with pytest.raises(ValueError, match="device of the mesh, got meta and a mesh of cpu"):
            context_parallel_moba(meta, meta, meta, 4, 2, mesh=mesh["context"])
    finally:
        dist.destroy_process_group()


def test_arguments_are_those_of_flex_moba():
    ours, theirs = (inspect.signature(f).parameters for f in (context_parallel_moba, flex_moba))
    missing = {"cache", "document_ids", "key_padding_mask"}
    added = {"mesh", "exchange", "lengths"}
    assert {*ours} == {*theirs} - missing | added
    assert all(ours[name] == theirs[name] for name in {*ours} - added)
    without, with_aux = map(inspect.signature, typing.get_overloads(context_parallel_moba))
    assert without.return_annotation is Tensor
    assert with_aux.return_annotation == tuple[Tensor, AuxOutput]
    for overload in (without, with_aux):
        aux = {"return_aux": ours["return_aux"]}
        assert list((overload.parameters | aux).values()) == list(ours.values())


# ---- The choice of the exchange -----------------------------------------------------------------


def shape_of(
    heads: int,
    kv_heads: int,
    lengths: tuple[int, ...],
    gate: str = "token",
    boundaries: list[int] | None = None,
) -> Shape:
    needed = first_keys(Ranks(None, 0, lengths), boundaries)
    return Shape(heads, kv_heads, lengths, needed, gate)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "gate", "expected"),
    [
        (32, 8, 2, "token", "heads"),  # measured, as the next one: docs/distributed.md
        (32, 8, 4, "token", "heads"),
        (8, 8, 2, "token", "heads"),
        (32, 4, 2, "token", "gather"),
        (32, 4, 4, "token", "gather"),
        (32, 4, 8, "token", "heads"),
        (32, 8, 8, "token", "heads"),
        (32, 8, 16, "token", "heads"),  # two ranks share a KV head
        (32, 8, 16, "group", "gather"),
        (32, 8, 3, "token", "gather"),
        (4, 4, 2, "tile", "heads"),  # the shards do not begin at tiles
        (4, 3, 2, "tile", None),
    ],
)
def test_auto(heads, kv_heads, ranks, gate, expected):
    shape = shape_of(heads, kv_heads, (100,) * ranks, gate)
    if expected is None:
        with pytest.raises(NotImplementedError, match=r'"gather" with .*, and exchange="heads"'):
            resolve_exchange("auto", shape)
    else:
        assert resolve_exchange("auto", shape) == expected
        assert resolve_exchange(expected, shape) == expected


def test_auto_counts_the_keys_of_documents():
    lengths = (100,) * 8
    assert resolve_exchange("auto", shape_of(32, 8, lengths, "token", [0, 800])) == "heads"
    assert resolve_exchange("auto", shape_of(32, 8, lengths, "token", [0, 750, 800])) == "heads"
    ends = [*range(50, 800, 100), 800]  # each rank needs 50 keys of the rank before
    assert resolve_exchange("auto", shape_of(32, 8, lengths, "token", [0, *ends])) == "gather"
    # Tiles begin at documents.
    for start, expected in ((22, "gather"), (23, "heads")):
        shape = shape_of(8, 1, (150, 50), "tile", [0, start, 200])
        assert resolve_exchange("auto", shape) == expected


def test_a_named_exchange_is_never_another():
    with pytest.raises(NotImplementedError, match=r"got 3 ranks, Hq=4 and Hkv=2; use exchange"):
        resolve_exchange("heads", shape_of(4, 2, (5, 5, 5)))
    with pytest.raises(NotImplementedError, match=r'"heads" with gate="group" needs .* Hkv=1'):
        resolve_exchange("heads", shape_of(4, 1, (5, 5), "group"))
    with pytest.raises(NotImplementedError, match=r"multiples of 128 .*, got lengths \[5, 0, 5\]"):
        resolve_exchange("gather", shape_of(4, 1, (5, 0, 5), "tile"))
    shape = shape_of(4, 1, (128, 0, 5, 0), "tile")
    assert resolve_exchange("gather", shape) == "gather"


# ---- On GPUs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpus(tmp_path_factory) -> Iterator[Processes]:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    processes = Processes(2, tmp_path_factory.mktemp("gpus"), "cuda")
    yield processes
    processes.stop()


@pytest.mark.gpu
@pytest.mark.parametrize("exchange", ["gather", "heads"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"score_mod": by_head_and_position}], ids=["", "score_mod"]
)
def test_two_gpus_equal_one(gpus, exchange, dtype, options):
    sizes = {"q_len": 1000, "kv_len": 1000, "head_dim": 64, "value_dim": 64, "block_size": 64}
    q, k, v = Problem(kv_heads=2, group=2, dtype=dtype, **sizes).tied_tensors()
    mask = reference_mask(
        reference_selection(q, k, 64, 3, is_causal=True), 64, 1000, is_causal=True
    )
    call = Call((300, 700), 64, 3, exchange, options)
    assert_as_exact_as_dense(spread(gpus, call), q, k, v, mask, gradients=True, **options)
