"""`flex_moba` of DTensors in three and four processes: equal to one process."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.nn.attention.flex_attention import AuxRequest

from flexmoba import MobaCache, flex_moba
from tests.problems import Problem
from tests.processes import Processes

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
LSE = AuxRequest(lse=True)
MESHES: dict[tuple, DeviceMesh] = {}  # of a process; making one is a collective


@pytest.fixture(scope="module", params=[3, 4], ids="{} ranks".format)
def ranks(request, tmp_path_factory) -> Iterator[Processes]:
    processes = Processes(request.param, tmp_path_factory.mktemp("dtensors"))
    yield processes
    processes.stop()


def mesh_of(sizes: tuple[int, ...], names: tuple[str, ...] | None = None) -> DeviceMesh:
    key = (sizes, names)
    if key not in MESHES:
        MESHES[key] = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    return MESHES[key]


def by_position(score, b, h, q_idx, kv_idx):
    return score + 0.1 * h + 0.01 * (q_idx - kv_idx) * (h + 1) + b


def positional(use_score_mod: bool) -> dict[str, Any]:
    return {"score_mod": by_position} if use_score_mod else {}


def results_of(tensors: tuple[Tensor, ...], use_score_mod: bool, **options: Any) -> list[Tensor]:
    """Output, log-sum-exp, and the gradients of a sum that weighs them by position."""
    out, aux = flex_moba(*tensors, 8, 3, return_aux=LSE, **positional(use_score_mod), **options)
    loss = (out * out).sum() + aux.lse.cos().sum()
    if isinstance(loss, DTensor):
        loss = loss.full_tensor()
    return [out, aux.lse, *torch.autograd.grad(loss, tensors)]


def spread(
    _: DeviceMesh,
    problem: Problem,
    sizes: tuple[int, ...],
    names: tuple[str, ...] | None,
    placements: list,
    use_score_mod: bool,
    options: dict[str, Any],
) -> list[tuple[str, Tensor]]:
    """The placements and the complete tensors of the results."""
    mesh = mesh_of(sizes, names)
    tensors = [distribute_tensor(x, mesh, placements).requires_grad_() for x in problem.tensors()]
    results = results_of(tensors, use_score_mod, **options)
    assert [x.shape for x in results[2:]] == [x.shape for x in tensors]
    return [(repr(x.placements), x.full_tensor().detach()) for x in results]


def check(
    ranks: Processes,
    problem: Problem,
    sizes: tuple[int, ...],
    placements: list,
    names: tuple[str, ...] | None = None,
    use_score_mod: bool = False,
    **options: Any,
) -> None:
    arguments = (problem, sizes, names, placements, use_score_mod, options)
    expected = results_of(problem.tensors(requires_grad=True), use_score_mod, **options)
    for results in ranks.run(spread, [arguments] * ranks.size):
        if isinstance(results, Exception):
            raise results
        for (shown, actual), value in zip(results, expected, strict=True):
            assert shown == repr(tuple(placements))
            torch.testing.assert_close(actual, value)


def problem_of(ranks: Processes, **sizes: Any) -> Problem:
    sizes = {"batch": 5, "kv_heads": ranks.size, "group": 2, "head_dim": 4, "value_dim": 6} | sizes
    return Problem(**sizes, q_len=50, kv_len=50)


@pytest.mark.parametrize("use_score_mod", [False, True], ids=["", "score_mod"])
@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Shard(2), Replicate()], ids=repr)
def test_one_dimension(ranks, placement, use_score_mod):
    check(ranks, problem_of(ranks), (ranks.size,), [placement], use_score_mod=use_score_mod)


PAIRS = [
    pair
    for pair in product((Shard(0), Shard(1), Shard(2), Replicate()), repeat=2)
    if pair != (Shard(2), Shard(2))
]


@pytest.mark.parametrize("placements", PAIRS, ids=repr)
def test_two_dimensions(ranks, placements):
    names = None if placements[0] == Shard(0) else ("first", "second")
    sizes = (2, 2) if ranks.size == 4 else (1, ranks.size)
    check(ranks, problem_of(ranks), sizes, [*placements], names, use_score_mod=True)


def test_fewer_tokens_than_ranks_need(ranks):
    # torch.chunk leaves the last ranks without tokens
    problem = Problem(kv_heads=ranks.size, q_len=ranks.size + 1, kv_len=ranks.size + 1)
    check(ranks, problem, (ranks.size,), [Shard(2)])


@pytest.mark.parametrize("placement", [Shard(1), Shard(2), Replicate()], ids=repr)
def test_documents(ranks, placement):
    cu_seqlens = torch.tensor([0, 3, 31, 31, 50], dtype=torch.int32)
    check(
        *(ranks, problem_of(ranks, batch=1), (ranks.size,), [placement]),
        cu_seqlens=cu_seqlens,
        max_seqlen=28,
    )


def test_not_causal(ranks):
    problem = problem_of(ranks)
    check(ranks, problem, (ranks.size,), [Shard(1)], is_causal=False)
    with pytest.raises(NotImplementedError, match="does not support is_causal=False"):
        check(ranks, problem, (ranks.size,), [Shard(2)], is_causal=False)


# ---- Errors -------------------------------------------------------------------------------------


def attempt(mesh: DeviceMesh, name: str) -> None:
    rank_size = mesh.size()
    two = mesh_of((1, rank_size), None)
    q, k, v = torch.randn(3, 1, rank_size, 20, 4)
    options: dict[str, Any] = {}
    places = [Shard(2)]
    if name in ("tokens twice",):
        q, k, v = (distribute_tensor(x, two, [Shard(2), Shard(2)]) for x in (q, k, v))
    elif name == "features":
        q, k, v = (DTensor.from_local(x, mesh, [Shard(3)]) for x in (q, k, v))
    elif name == "partial":
        q, k, v = (DTensor.from_local(x, mesh, [Partial()]) for x in (q, k, v))
    elif name == "heads":
        k, v = torch.randn(2, 1, 1, 20, 4)
        q, k, v = (distribute_tensor(x, mesh, [Shard(1)]) for x in (q, k, v))
    else:
        if name == "rows of documents":
            places = [Shard(0)]
            options["cu_seqlens"] = torch.tensor([0, 20])
        q, k, v = (distribute_tensor(x, mesh, places) for x in (q, k, v))
    if name == "mixed":
        k = k.to_local()
    if name == "meshes":
        v = distribute_tensor(torch.randn(v.shape), two, [Replicate(), Shard(2)])
    if name == "placements":
        k = k.redistribute(mesh, [Replicate()])
    if name == "cache":
        options["cache"] = MobaCache(1, rank_size, 4, block_size=8)
    if name == "document_ids":
        options["document_ids"] = torch.zeros(1, 20, dtype=torch.int32)
    flex_moba(q, k, v, 8, 2, **options)


ERRORS = {
    "mixed": (TypeError, "must all be DTensors or all be plain tensors, got DTensor, Tensor"),
    "meshes": (ValueError, r"the same mesh, got DeviceMesh\(.*for q and DeviceMesh\(.* for v;"),
    "placements": (
        ValueError,
        r"the same placements, got Shard\(dim=2\) for q and Replicate\(\) for k;",
    ),
    "partial": (ValueError, r"must be Shard\(0\), Shard\(1\), Shard\(2\) or .*, got Partial\(sum"),
    "features": (ValueError, r"must be Shard\(0\), .*, got Shard\(dim=3\); redistribute them"),
    "tokens twice": (
        ValueError,
        r"at most one .* may shard the tokens .*got Shard\(dim=2\), Shard\(dim=2\);",
    ),
    "heads": (ValueError, r"must divide the KV heads, got \d ranks and Hkv=1;"),
    "rows of documents": (ValueError, r"a batch of 1, which \d ranks cannot shard;"),
    "cache": (NotImplementedError, "does not support cache with DTensors;"),
    "document_ids": (NotImplementedError, "does not support document_ids with DTensors;"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(ranks, name):
    kind, message = ERRORS[name]
    for error in ranks.run(attempt, [(name,)] * ranks.size):
        with pytest.raises(kind, match=message):
            raise error
