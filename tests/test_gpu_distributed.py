"""Two GPUs, NCCL: exchanges, documents, DTensors, layers and a cache over ranks, equal to one GPU.

`tests/test_context_parallel.py` compares the exchanges with the oracle, also on two GPUs. Several
pairs of processes may share the GPUs: ``pytest -m gpu -n 5``.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

from flexmoba import flex_moba
from flexmoba.cache import MAX_STEP_QUERIES, CachedCall
from flexmoba.distributed import ContextParallel, ShardedMobaCache, context_parallel_moba
from flexmoba.gate import GateOptions, expand_rows
from flexmoba.nn import MobaAttention
from flexmoba.reference import reference_selection
from tests.conftest import assert_bitwise_equal
from tests.problems import Problem, as_bools
from tests.processes import Processes

pytestmark = pytest.mark.gpu
CLOSE = {
    torch.float32: {"rtol": 1e-3, "atol": 1e-4},  # as in test_distributed.py
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}
LENGTHS = (300, 468)


@pytest.fixture(scope="module")
def gpus(tmp_path_factory) -> Iterator[Processes]:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    processes = Processes(2, tmp_path_factory.mktemp("gpus"), "cuda")
    yield processes
    processes.stop()


def run(gpus: Processes, task: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Runs a task, which compares, in both processes. Compilation takes up to a minute."""
    results = gpus.run(task, [arguments] * 2, seconds=180)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def tensors_of(mesh: DeviceMesh, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    device = mesh.device_type
    options = {"device": device, "generator": torch.Generator(device).manual_seed(0)}
    return [torch.randn(1, heads, sum(LENGTHS), 64, **options).to(dtype) for heads in (4, 2, 2)]


def check(results: list[Tensor], expected: list[Tensor], rank: int | None, dim: int) -> None:
    for x, y in zip(results, expected, strict=True):
        y = y if rank is None else y.split(LENGTHS, dim)[rank]
        torch.testing.assert_close(x, y, **CLOSE[x.dtype])


def with_gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]


def bit_for_bit(
    mesh: DeviceMesh, exchange: str, lengths: tuple[int, ...], compiled: bool = False
) -> None:
    """Compares two calls with what one GPU computes for the same calls of `flex_moba`.

    The gradients of keys are summed in float32, in the order of ranks.
    """
    whole = tensors_of(mesh)
    if exchange == "heads":
        inputs = [x.requires_grad_() for x in whole]
        expected = with_gradients(flex_moba(*inputs, 64, 3), inputs)
    else:
        sums = [torch.zeros_like(x, dtype=torch.float32) for x in whole[1:]]
        parts = []
        for q, end in zip(whole[0].split(lengths, 2), accumulate(lengths), strict=True):
            inputs = [x.clone().requires_grad_() for x in (q, *(y[:, :, :end] for y in whole[1:]))]
            out, d_q, *grads = with_gradients(flex_moba(*inputs, 64, 3), inputs)
            parts.append((out, d_q))
            for total, grad in zip(sums, grads, strict=True):
                total[:, :, :end] += grad
        expected = [torch.cat(x, 2) for x in zip(*parts, strict=True)]
        expected += [x.to(whole[0].dtype) for x in sums]
    rank = mesh.get_local_rank()

    def attend(*tensors: Tensor) -> Tensor:
        options = {"mesh": mesh, "exchange": exchange, "lengths": lengths if compiled else None}
        return context_parallel_moba(*tensors, 64, 3, **options)

    if compiled:
        attend = torch.compile(attend, fullgraph=True)
    for _ in range(2):
        mine = [x.detach().split(lengths, 2)[rank].clone().requires_grad_() for x in whole]
        out = attend(*mine)
        for x, y in zip(with_gradients(out, mine), expected, strict=True):
            assert_bitwise_equal(x, y.split(lengths, 2)[rank])


@pytest.mark.parametrize("exchange", ["gather", "heads"])
@pytest.mark.parametrize("lengths", [LENGTHS, (0, 768), (768, 0)], ids=str)
def test_bit_for_bit(gpus, exchange, lengths):
    run(gpus, bit_for_bit, exchange, lengths)


@pytest.mark.parametrize("exchange", ["gather", "heads"])
def test_whole_graph_bit_for_bit(gpus, exchange):
    run(gpus, bit_for_bit, exchange, LENGTHS, True)


def with_blocks(mesh: DeviceMesh) -> None:
    whole, rank, lengths = tensors_of(mesh), mesh.get_local_rank(), (320, 448)
    results = []
    for exchange in ("blocks", "blocks", "gather"):
        mine = [x.split(lengths, 2)[rank].clone().requires_grad_() for x in whole]
        out = context_parallel_moba(*mine, 64, 3, mesh=mesh, exchange=exchange)
        results.append(with_gradients(out, mine))
    for x, y in zip(*results[:2], strict=True):
        assert_bitwise_equal(x, y)
    check(results[0], results[2], None, 2)


def test_blocks(gpus):
    run(gpus, with_blocks)


def with_two_exchanges(mesh: DeviceMesh, sizes: tuple[int, int]) -> None:
    whole, rank, lengths = tensors_of(mesh), mesh.get_local_rank(), (320, 448)
    nodes = init_device_mesh(mesh.device_type, sizes, mesh_dim_names=("node", "gpu"))
    results = []
    for exchange in (("gather", "heads"), ("blocks", "heads"), "gather"):
        mine = [x.split(lengths, 2)[rank].clone().requires_grad_() for x in whole]
        given = mesh if exchange == "gather" else nodes
        out = context_parallel_moba(*mine, 64, 3, mesh=given, exchange=exchange)
        results.append(with_gradients(out, mine))
    for found in results[:2]:
        check(found, results[2], None, 2)


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)], ids=str)
def test_two_exchanges(gpus, sizes):
    run(gpus, with_two_exchanges, sizes)


def with_documents(mesh: DeviceMesh, exchange: str) -> None:
    boundaries = torch.tensor([0, 100, 420, 768], device=mesh.device_type, dtype=torch.int32)
    whole = [x.requires_grad_() for x in tensors_of(mesh)]
    out = flex_moba(*whole, 64, 3, cu_seqlens=boundaries)
    rank = mesh.get_local_rank()
    mine = [x.detach().split(LENGTHS, 2)[rank].clone().requires_grad_() for x in whole]
    options = {"mesh": mesh, "exchange": exchange, "cu_seqlens": boundaries}
    results = with_gradients(context_parallel_moba(*mine, 64, 3, **options), mine)
    check(results, with_gradients(out, whole), rank, 2)


@pytest.mark.parametrize("exchange", ["gather", "heads"])
def test_documents(gpus, exchange):
    run(gpus, with_documents, exchange)


def with_dtensors(mesh: DeviceMesh, dim: int) -> None:
    whole = [x.requires_grad_() for x in tensors_of(mesh)]
    spread = [distribute_tensor(x.detach(), mesh, [Shard(dim)]).requires_grad_() for x in whole]
    out = flex_moba(*spread, 64, 3)
    loss = out.square().sum().full_tensor()
    results = [out.detach(), *torch.autograd.grad(loss, spread)]
    expected = with_gradients(flex_moba(*whole, 64, 3), whole)
    check([x.full_tensor() for x in results], expected, None, 2)


@pytest.mark.parametrize("dim", [1, 2])
def test_dtensors(gpus, dim):
    run(gpus, with_dtensors, dim)


def with_layers(mesh: DeviceMesh, compiled: bool) -> None:
    torch.manual_seed(0)
    options = {"block_size": 64, "topk": 3, "rope_base": 1e4, "key_conv": 3}
    layer = MobaAttention(256, 4, 2, **options, device=mesh.device_type)
    nn.init.normal_(layer.key_conv.weight)
    x = torch.randn(1, sum(LENGTHS), 256, device=mesh.device_type, requires_grad=True)
    expected = with_gradients(layer(x), [x])
    rank = mesh.get_local_rank()
    mine = x.detach().split(LENGTHS, 1)[rank].clone().requires_grad_()
    parallelize_module(layer, mesh, ContextParallel())
    model = torch.compile(layer) if compiled else layer
    check(with_gradients(model(mine), [mine]), expected, rank, 1)


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_layers(gpus, compiled):
    run(gpus, with_layers, compiled)


@torch.no_grad()
def with_cache(mesh: DeviceMesh, dtype: torch.dtype, part: int | None) -> None:
    q, k, v = tensors_of(mesh, dtype)
    expected = flex_moba(q, k, v, 64, 3, gate_block_size=part)
    sizes = {"block_size": 64, "gate_block_size": part, "max_len": sum(LENGTHS)}
    cache = ShardedMobaCache(mesh, 1, 2, 64, **sizes, dtype=dtype)
    rank, prompt = mesh.get_local_rank(), 500
    shards = [x[:, :, :prompt].tensor_split(2, 2)[rank] for x in (k, v)]
    cache.append_shard(*shards)
    outs, begin = [], prompt
    for n in (267, 1):
        new = (x[:, :, begin : begin + n] for x in (q, k, v))
        outs.append(cache.attend(*new, 3)[0])
        begin += n
    torch.testing.assert_close(torch.cat(outs, 2), expected[:, :, prompt:], **CLOSE[dtype])


@pytest.mark.parametrize("part", [None, 16], ids=["", "sub-blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cache(gpus, dtype, part):
    run(gpus, with_cache, dtype, part)


@torch.no_grad()
def with_steps(
    mesh: DeviceMesh, dtype: torch.dtype, size: int, part: int, per: str
) -> list[Tensor]:
    """Compares steps that score splits of the blocks with the oracle, and with one GPU."""
    n, device, rank, topk = 8200, mesh.device_type, mesh.get_local_rank(), 7
    sizes = {"kv_heads": 2, "group": 2, "q_len": n, "kv_len": n, "block_size": part}
    problem = Problem(**sizes, head_dim=64, value_dim=32, dtype=dtype)
    q, k, v = (x.to(device) for x in problem.tied_tensors())  # so that scores are exact
    forced = {"sink_blocks": 1, "local_blocks": 1}
    sizes = {"block_size": size, "gate_block_size": part, "max_len": 9000, "value_dim": 32}
    cache, empty = (ShardedMobaCache(mesh, 1, 2, 64, **sizes, dtype=dtype) for _ in range(2))
    cache.append_shard(*(x[:, :, :8150].tensor_split(2, 2)[rank] for x in (k, v)))
    call, outs = CachedCall(topk, 0.125, GateOptions(per, 1, 1, size // part), size), []
    for first, end in ((8150, 8151), (8151, 8167), (8167, 8184), (8184, n)):
        new, is_step = [x[:, :, first:end] for x in (q, k, v)], end - first <= MAX_STEP_QUERIES
        outs.append(cache.attend(*new, topk, gate=per, **forced)[0])
        with no_synchronization():
            select = cache._select_step if is_step else cache._select_past_blocks
            blocks = select(new[0], call)
        blocks = blocks[1] if is_step else blocks  # after the positions
        n_blocks = -(-end // size)
        selected = as_bools(expand_rows(blocks, 4, end - first, call.gate).cpu(), n_blocks)
        expected = reference_selection(
            *(new[0].cpu(), k[:, :, :end].cpu(), size, topk),
            **{"is_causal": True, "gate": per, "gate_block_size": part, **forced},
        )
        own = torch.arange(first, end) // size
        selected |= as_bools(own[None, None, :, None], n_blocks)
        assert_bitwise_equal(selected, expected)
    with no_synchronization():  # with an empty cache, the last rank has no key
        new = [x[:, :, :1] for x in (q, k, v)]
        outs.append(empty.attend(*new, topk, gate=per, **forced)[0])
    expected = flex_moba(q, k, v, size, topk, gate=per, gate_block_size=part, **forced)
    expected = torch.cat([expected[:, :, 8150:], expected[:, :, :1]], 2)
    torch.testing.assert_close(torch.cat(outs, 2), expected, **CLOSE[dtype])
    return outs


@contextmanager
def no_synchronization() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("size", "part", "per"),
    [(16, 16, "token"), (16, 4, "token"), (16, 4, "group"), (272, 272, "token")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_of_a_cache(gpus, dtype, size, part, per):
    results = run(gpus, with_steps, dtype, size, part, per)
    for x, y in zip(*results, strict=True):
        assert_bitwise_equal(x, y)
