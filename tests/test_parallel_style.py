"""`ContextParallel` in two and three processes: layers equal to one process with all tokens."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

from flexmoba.distributed import ContextParallel
from flexmoba.hybrid import set_attention
from flexmoba.nn import FlexMoba, MobaAttention
from tests.conftest import assert_bitwise_equal
from tests.processes import Processes
from tests.test_context_parallel import lengths_of

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

LENGTHS = (30, 20)


@pytest.fixture(scope="module", params=[2, 3], ids="{} ranks".format)
def ranks(request, tmp_path_factory) -> Iterator[Processes]:
    processes = Processes(request.param, tmp_path_factory.mktemp("style"))
    yield processes
    processes.stop()


class Model(nn.Module):
    """Two layers of random parameters, the same in all processes."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        settings = {"block_size": 8, "topk": 3, "rope_base": 100.0, "key_conv": 5} | options
        self.layers = nn.ModuleList(
            MobaAttention(24, 6, 6, **settings, dtype=torch.float64) for _ in range(2)
        )
        for layer in self.layers:
            if layer.key_conv is not None:
                nn.init.normal_(layer.key_conv.weight)

    def forward(self, x: Tensor, **documents: Any) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, **documents)
        return x


def results_of(model: nn.Module, x: Tensor, upstream: Tensor, **documents: Any) -> list[Tensor]:
    x.requires_grad_()
    out = model(x, **documents)
    parameters = [*model.parameters()]
    grads = torch.autograd.grad(out, [x, *parameters], upstream)
    return [out.detach(), *grads]


def spread(
    mesh: DeviceMesh,
    x: Tensor,
    upstream: Tensor,
    style: dict[str, Any],
    options: dict[str, Any],
    documents: dict[str, Any],
) -> list[Tensor]:
    model = parallelize_module(Model(**options), mesh, ContextParallel(**style))
    return results_of(model, x, upstream, **documents)


def inputs_of(length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    x, upstream = torch.randn(2, 1, length, 24, generator=generator, dtype=torch.float64)
    return x, upstream


def check(
    ranks: Processes,
    lengths: tuple[int, ...],
    style: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    **documents: Any,
) -> None:
    x, upstream = inputs_of(sum(lengths))
    expected = results_of(Model(**options or {}), x.clone(), upstream, **documents)
    shards = zip(x.split(lengths, 1), upstream.split(lengths, 1), strict=True)
    arguments = [
        (*map(Tensor.clone, shard), style or {}, options or {}, documents) for shard in shards
    ]
    results = ranks.run(spread, arguments)
    for result in results:
        if isinstance(result, Exception):
            raise result
    for i, value in enumerate(expected):
        parts = [result[i] for result in results]
        actual = torch.cat(parts, 1) if i < 2 else sum(parts)  # tokens, or a parameter
        torch.testing.assert_close(actual, value)


@settings(max_examples=8)
@given(st.data())
def test_layers_equal_one_process(ranks, data):
    total = data.draw(st.integers(1, 70), label="tokens")
    fraction = st.floats(0, 1) | st.sampled_from((0.0, 0.5, 1.0))
    n = ranks.size - 1
    lengths = lengths_of(total, data.draw(st.lists(fraction, min_size=n, max_size=n), label="cuts"))
    options = {
        "key_conv": data.draw(st.sampled_from((None, 3, 5)), label="key_conv"),
        "rope_base": data.draw(st.sampled_from((None, 100.0)), label="rope_base"),
        "topk": data.draw(st.sampled_from((1, 3, None)), label="topk"),
        "gate_block_size": data.draw(st.sampled_from((None, 1, 4)), label="sub-blocks"),
    }
    documents = {}
    if data.draw(st.booleans(), label="has documents"):
        edges = data.draw(st.lists(st.integers(0, total), max_size=4), label="edges")
        documents["cu_seqlens"] = torch.tensor([0, *sorted(edges), total], dtype=torch.int32)
    check(ranks, lengths, None, options, **documents)


@pytest.mark.parametrize("exchange", ["gather", "heads"])
def test_equal_lengths_are_not_compared(ranks, exchange):
    check(ranks, (20,) * ranks.size, {"exchange": exchange, "equal_lengths": True})


def with_fsdp(mesh: DeviceMesh, x: Tensor, upstream: Tensor) -> list[Tensor]:
    """FSDP over the ranks that share the sequence, and activation checkpointing."""
    model = parallelize_module(Model(), mesh, ContextParallel())
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    out = checkpoint(model, x, use_reentrant=False)
    out.backward(upstream)
    return [out.detach(), *(p.grad.full_tensor() for p in model.parameters())]


def test_sharded_parameters(ranks):
    lengths = (30, 20, 10)[: ranks.size]
    x, upstream = inputs_of(sum(lengths))
    out, _, *grads = results_of(Model(), x.clone(), upstream)
    shards = [*zip(x.split(lengths, 1), upstream.split(lengths, 1), strict=True)]
    results = ranks.run(with_fsdp, [tuple(map(Tensor.clone, shard)) for shard in shards])
    for result in results:
        if isinstance(result, Exception):
            raise result
    torch.testing.assert_close(torch.cat([result[0] for result in results], 1), out)
    for result in results:
        for actual, expected in zip(result[1:], grads, strict=True):
            # FSDP averages over the ranks.
            torch.testing.assert_close(actual * ranks.size, expected)


def in_nodes(_: DeviceMesh, x: Tensor, upstream: Tensor, documents: dict[str, Any]) -> list[Tensor]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "gpu"))
    style = ContextParallel(exchange=("gather", "heads"))
    return results_of(parallelize_module(Model(), mesh, style), x, upstream, **documents)


def test_two_exchanges(tmp_path):
    lengths, documents = (10, 12, 0, 28), {"cu_seqlens": torch.tensor([0, 7, 50])}
    x, upstream = inputs_of(50)
    out, d_x, *grads = results_of(Model(), x.clone(), upstream, **documents)
    processes = Processes(4, tmp_path)
    shards = zip(x.split(lengths, 1), upstream.split(lengths, 1), strict=True)
    try:
        arguments = [(*map(Tensor.clone, shard), documents) for shard in shards]
        results = processes.run(in_nodes, arguments)
    finally:
        processes.stop()
    for result in results:
        if isinstance(result, Exception):
            raise result
    for i, expected in enumerate((out, d_x)):
        actual = torch.cat([result[i] for result in results], 1)
        torch.testing.assert_close(actual, expected)
    for expected, *parts in zip(grads, *(result[2:] for result in results), strict=True):
        torch.testing.assert_close(sum(parts), expected)


def with_hybrid_sharding(_: DeviceMesh, x: Tensor, upstream: Tensor) -> list[Tensor]:
    """Each data rank has a row, whose tokens two ranks share; FSDP shards over data ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("context", "data"))
    row, part = mesh.get_local_rank("data"), mesh.get_local_rank("context")
    x, upstream = (y[row : row + 1].split(LENGTHS, 1)[part].contiguous() for y in (x, upstream))
    model = parallelize_module(Model(), mesh["context"], ContextParallel())
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    out = model(x)
    out.backward(upstream)
    return [out.detach(), *(p.grad.full_tensor() for p in model.parameters())]


def test_parameters_sharded_over_another_dimension_of_the_mesh(tmp_path):
    x, upstream = (torch.cat(y) for y in zip(inputs_of(50), inputs_of(50)[::-1], strict=True))
    out, _, *grads = results_of(Model(), x.clone(), upstream)
    processes = Processes(4, tmp_path)
    try:
        results = processes.run(with_hybrid_sharding, [(x.detach(), upstream)] * 4)
    finally:
        processes.stop()
    for result in results:
        if isinstance(result, Exception):
            raise result
        for actual, expected in zip(result[1:], grads, strict=True):
            torch.testing.assert_close(actual * 4, expected)  # FSDP averages
    # Ranks 0 and 1 have the first tokens of the rows, ranks 2 and 3 the others.
    rows = [torch.cat([results[row][0], results[row + 2][0]], 1) for row in range(2)]
    torch.testing.assert_close(torch.cat(rows), out)


def test_a_module_with_another_topk(ranks):
    x, upstream = inputs_of(60)
    model = Model()
    set_attention(model, topk=None)
    expected = results_of(model, x.clone(), upstream)
    shards = zip(x.split(60 // ranks.size, 1), upstream.split(60 // ranks.size, 1), strict=True)
    results = ranks.run(with_full_attention, [tuple(map(Tensor.clone, shard)) for shard in shards])
    torch.testing.assert_close(torch.cat([result[0] for result in results], 1), expected[0])


def with_full_attention(mesh: DeviceMesh, x: Tensor, upstream: Tensor) -> list[Tensor]:
    model = parallelize_module(Model(), mesh, ContextParallel())
    set_attention(model, topk=None)
    return results_of(model, x, upstream)


def compiled(
    mesh: DeviceMesh, x: Tensor, upstream: Tensor, style: dict[str, Any], options: dict[str, Any]
) -> list[Tensor]:
    """Results of a compiled layer, equal to those of the layer itself."""
    layer = parallelize_module(Model().layers[0], mesh, ContextParallel(**style))
    expected = results_of(layer, x.clone(), upstream)
    layer.compile(**options)
    results = results_of(layer, x, upstream)
    for actual, value in zip(results, expected, strict=True):
        assert_bitwise_equal(actual, value)
    return results


@pytest.mark.parametrize(
    ("lengths", "style", "options"),
    [
        ((30, 20), {}, {"backend": "eager"}),
        ((25, 25), {"equal_lengths": True}, {"backend": "eager", "fullgraph": True}),
    ],
    ids=["broken graph", "whole graph"],
)
def test_compiled_layers(ranks, lengths, style, options):
    if ranks.size > 2:
        pytest.skip("as with two ranks, and compilation takes seconds")
    x, upstream = inputs_of(sum(lengths))
    expected = results_of(Model().layers[0], x.clone(), upstream)
    shards = zip(x.split(lengths, 1), upstream.split(lengths, 1), strict=True)
    arguments = [(*map(Tensor.clone, shard), style, options) for shard in shards]
    results = ranks.run(compiled, arguments)
    for result in results:
        if isinstance(result, Exception):
            raise result
    for i in (0, 1):
        torch.testing.assert_close(torch.cat([result[i] for result in results], 1), expected[i])


def whole_graph(mesh: DeviceMesh, x: Tensor) -> None:
    layer = parallelize_module(Model().layers[0], mesh, ContextParallel())
    layer.compile(backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="with equal_lengths=True"):
        layer(x)


def test_a_whole_graph_needs_equal_lengths(ranks):
    if ranks.size > 2:
        pytest.skip("as with two ranks, and dynamo takes seconds")
    for result in ranks.run(whole_graph, [(inputs_of(20)[0],)] * ranks.size):
        assert result is None, result


def test_different_batches_are_an_error_of_all_ranks(ranks):
    batches = [2 if rank == 1 else 1 for rank in range(ranks.size)]
    tokens = [torch.zeros(batch, 9, 24, dtype=torch.float64) for batch in batches]
    for error in ranks.run(spread, [(x, x, {}, {}, {}) for x in tokens]):
        with pytest.raises(ValueError, match="same batch size, got 1 on rank 0 and 2 on rank 1;"):
            raise error


def flex_moba_of(mesh: DeviceMesh, x: Tensor) -> tuple[Tensor, Tensor]:
    """A FlexMoba alone, of this rank's tokens and of DTensors."""
    attend = parallelize_module(FlexMoba(8, 3), mesh, ContextParallel())
    rank = mesh.get_local_rank()
    out = attend(*(x.tensor_split(mesh.size(), 2)[rank],) * 3)
    return out, attend(*(distribute_tensor(x, mesh, [Shard(2)]),) * 3).full_tensor()


def test_flex_moba_alone(ranks):
    x = torch.randn(1, 3, 30, 4, generator=torch.Generator().manual_seed(0))
    expected = FlexMoba(8, 3)(x, x, x)
    results = ranks.run(flex_moba_of, [(x,)] * ranks.size)
    torch.testing.assert_close(torch.cat([out for out, _ in results], 2), expected)
    for _, whole in results:
        torch.testing.assert_close(whole, expected)


def test_one_rank_is_the_layer():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "context"))
        x, upstream = inputs_of(50)
        model = parallelize_module(Model(), mesh["context"], ContextParallel())
        expected = results_of(Model(), x.clone(), upstream)
        for actual, value in zip(results_of(model, x, upstream), expected, strict=True):
            torch.testing.assert_close(actual, value, rtol=0, atol=0)
        for name, value in {
            "cache": model.layers[0].make_cache(1),
            "document_ids": torch.zeros(1, 50, dtype=torch.int32),
            "key_padding_mask": torch.ones(1, 50, dtype=torch.bool),
        }.items():
            with pytest.raises(NotImplementedError, match=f"does not support {name};"):
                model.layers[0](x, **{name: value})
        with pytest.raises(ValueError, match="found no FlexMoba in Linear"):
            parallelize_module(nn.Linear(1, 1), mesh["context"], ContextParallel())
        with pytest.raises(ValueError, match="exchange must be one of"):
            ContextParallel(exchange="ring")
    finally:
        dist.destroy_process_group()
