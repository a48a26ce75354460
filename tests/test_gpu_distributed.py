"""Two GPUs, NCCL: documents, DTensors, layers and a cache over ranks, equal to one GPU.

`tests/test_context_parallel.py` compares the exchanges themselves on two GPUs.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

from flexmoba import flex_moba
from flexmoba.distributed import ContextParallel, ShardedMobaCache, context_parallel_moba
from flexmoba.nn import MobaAttention
from tests.processes import Processes

pytestmark = pytest.mark.gpu
CLOSE = {"rtol": 1e-3, "atol": 1e-4}  # in float32, as in test_distributed.py
LENGTHS = (300, 468)


@pytest.fixture(scope="module")
def gpus(tmp_path_factory) -> Iterator[Processes]:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    processes = Processes(2, tmp_path_factory.mktemp("gpus"), "cuda")
    yield processes
    processes.stop()


def run(gpus: Processes, task: Callable[..., Any], *arguments: Any) -> None:
    """Runs a task, which compares, in both processes. Compilation takes up to a minute."""
    for result in gpus.run(task, [arguments] * 2, seconds=180):
        if isinstance(result, Exception):
            raise result


def tensors_of(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"device": "cuda", "dtype": dtype, "generator": generator}
    return [torch.randn(1, heads, sum(LENGTHS), 64, **options) for heads in (4, 2, 2)]


def check(results: list[Tensor], expected: list[Tensor], rank: int | None, dim: int) -> None:
    for x, y in zip(results, expected, strict=True):
        y = y if rank is None else y.split(LENGTHS, dim)[rank]
        torch.testing.assert_close(x, y, **CLOSE)


def with_gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]


def with_documents(mesh: DeviceMesh, exchange: str) -> None:
    boundaries = torch.tensor([0, 100, 420, 768], device="cuda", dtype=torch.int32)
    whole = [x.requires_grad_() for x in tensors_of()]
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
    whole = [x.requires_grad_() for x in tensors_of()]
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
    options = {"block_size": 64, "topk": 3, "rope_base": 1e4, "key_conv": 3, "device": "cuda"}
    layer = MobaAttention(256, 4, 2, **options)
    nn.init.normal_(layer.key_conv.weight)
    x = torch.randn(1, sum(LENGTHS), 256, device="cuda", requires_grad=True)
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
def with_cache(mesh: DeviceMesh, dtype: torch.dtype) -> None:
    q, k, v = tensors_of(dtype)
    expected = flex_moba(q, k, v, 64, 3)
    cache = ShardedMobaCache(mesh, 1, 2, 64, block_size=64, max_len=sum(LENGTHS), dtype=dtype)
    rank, prompt = mesh.get_local_rank(), 500
    shards = [x[:, :, :prompt].tensor_split(2, 2)[rank] for x in (k, v)]
    cache.append_shard(*shards)
    outs, begin = [], prompt
    for n in (267, 1):
        new = (x[:, :, begin : begin + n] for x in (q, k, v))
        outs.append(cache.attend(*new, 3)[0])
        begin += n
    close = CLOSE if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(torch.cat(outs, 2), expected[:, :, prompt:], **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cache(gpus, dtype):
    run(gpus, with_cache, dtype)
