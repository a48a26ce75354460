"""Tests with two processes: sharded parameters (FSDP2), and heads split over devices (DTensor).

Each test compares outputs and gradients with one process that has the complete model.
"""

import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from flexmoba.hybrid import set_attention
from flexmoba.nn import MobaAttention

RANKS = 2


class Model(nn.Module):
    def __init__(self, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        options = {"block_size": 8, "topk": 3, "rope_base": 10000.0, "bias": True, "key_conv": 3}
        self.layers = nn.ModuleList(
            MobaAttention(64, 4, 2, **options, device=device, dtype=dtype) for _ in range(2)
        )
        for layer in self.layers:
            nn.init.normal_(layer.key_conv.weight)

    def forward(self, x: Tensor, **where: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, **where)
        return x


def sharded(model: Model, mesh: DeviceMesh) -> None:
    """Applies FSDP2: each process has a shard of every parameter, and its own rows of the batch."""
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def split_by_heads(model: Model, mesh: DeviceMesh) -> None:
    """Applies tensor parallelism: each process has its own heads, and the complete batch."""
    for layer in model.layers:
        plan = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
        parallelize_module(layer, mesh, plan | {"o_proj": RowwiseParallel()})
        weight = distribute_tensor(layer.key_conv.weight, mesh, [Shard(0)])
        layer.key_conv.weight = nn.Parameter(weight)


def compare(rank: int, store: str, device: str, backend: str) -> None:
    """Compares parallel models with a single model, in every process."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(minutes=5),  # includes compilation
    )
    try:
        # In float64, rounding cannot hide a wrong result.
        dtype = torch.float64 if device == "cpu" else torch.float32
        close = {} if device == "cpu" else {"rtol": 1e-3, "atol": 1e-4}
        mesh = init_device_mesh(device, (RANKS,))
        torch.manual_seed(0)
        alone = Model(device, dtype)
        x = torch.randn(RANKS, 50, 64, device=device, dtype=dtype)
        real = (torch.arange(50, device=device) >= 7).repeat(RANKS, 1)
        for parallelize, rows in (
            (sharded, slice(rank, rank + 1)),
            (split_by_heads, slice(None)),
        ):
            model = Model(device, dtype)
            model.load_state_dict(alone.state_dict())
            parallelize(model, mesh)
            for topk, where in ((3, {}), (2, {"key_padding_mask": real}), (None, {})):
                for each in (alone, model):
                    set_attention(each, topk=topk)
                    each.zero_grad()
                mine = {name: x[rows] for name, x in where.items()}
                expected, out = alone(x, **where), model(x[rows], **mine)
                torch.testing.assert_close(out, expected[rows], **close)
                for y in (expected, out):  # FSDP averages gradients over processes, as `mean` does
                    y.square().mean().backward()
                for (name, p), q in zip(alone.named_parameters(), model.parameters(), strict=True):
                    actual = q.grad.full_tensor() if hasattr(q.grad, "full_tensor") else q.grad
                    torch.testing.assert_close(actual, p.grad, **close, msg=f"{name}, topk={topk}")
        for inference in (decode, compiled):  # `model` is now the one with split heads
            inference(model.layers[0], alone.layers[0], x, close)
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def decode(layer: MobaAttention, alone: MobaAttention, x: Tensor, close: dict[str, float]) -> None:
    cache = layer.make_cache(RANKS, kv_heads=layer.kv_heads // RANKS, dtype=x.dtype)
    outs = [layer(part, cache=cache) for part in x.split(25, dim=1)]
    torch.testing.assert_close(torch.cat(outs, 1), alone(x), **close)


@torch.no_grad()
def compiled(
    layer: MobaAttention, alone: MobaAttention, x: Tensor, close: dict[str, float]
) -> None:
    # On CUDA, FlexAttention must be compiled by inductor.
    backend = "eager" if x.device.type == "cpu" else "inductor"
    layer = torch.compile(layer, fullgraph=True, backend=backend)
    torch.testing.assert_close(layer(x), alone(x), **close)


def spawn(tmp_path: Path, device: str, backend: str) -> None:
    mp.spawn(compare, (str(tmp_path / "store"), device, backend), nprocs=RANKS)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_equal_one(tmp_path):
    spawn(tmp_path, "cpu", "gloo")


@pytest.mark.gpu
def test_two_gpus_equal_one(tmp_path):
    if torch.cuda.device_count() < RANKS:
        pytest.skip("needs two GPUs")
    spawn(tmp_path, "cuda", "nccl")
