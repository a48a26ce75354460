"""`flex_moba` of DTensors: each rank attends with its rows, its heads, or its tokens."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest

from flexmoba.backends import ScoreMod
from flexmoba.checks import check_documents, check_queries_and_keys, check_values
from flexmoba.distributed.attend import shifted
from flexmoba.distributed.context_parallel import context_parallel_moba
from flexmoba.local import attend_on_one_device, with_aux

_ROWS, _HEADS, _TOKENS = 0, 1, 2  # dims of q, k and v
_PLACEMENTS = "Shard(0), Shard(1), Shard(2) or Replicate()"


def attend_to_dtensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    topk: int | None,
    *,
    score_mod: ScoreMod | None,
    return_aux: AuxRequest | None,
    **options: Any,
) -> Tensor | tuple[Tensor, AuxOutput]:
    """Computes `flex_moba` of DTensors that are sharded by rows, heads or tokens.

    Args:
        q: Queries, a DTensor ``(B, Hq, L, D)``.
        k: Keys, a DTensor ``(B, Hkv, L, D)`` of the same mesh and placements.
        v: Values, a DTensor ``(B, Hkv, L, Dv)`` of the same mesh and placements.
        block_size: As in `flex_moba`.
        topk: As in `flex_moba`.
        score_mod: As in `flex_moba`, with rows, heads and positions of the complete tensors.
        return_aux: As in `flex_moba`.
        options: The other keyword arguments of `flex_moba`. Boundaries of documents are a plain
            tensor, the same on all ranks.

    Returns:
        The results of `flex_moba`, DTensors with the placements of q.

    Raises:
        TypeError: Some of q, k and v are DTensors, and some are not.
        ValueError: Meshes or placements differ or are not supported, or an argument is wrong.
        NotImplementedError: DTensors do not support an argument.
    """
    q, k, v = _checked(q, k, v)
    mesh, placements = q.device_mesh, q.placements
    check_queries_and_keys(q, k)
    check_values(k, v)
    _check_heads(k, mesh, placements)
    _check_options(q, k, options)
    if score_mod is not None:
        first_row, first_head = (_first(q, dim) for dim in (_ROWS, _HEADS))
        device = q.to_local().device
        score_mod = shifted(score_mod, device, first_row=first_row, first_head=first_head)
    shards = (q.to_local(), k.to_local(), v.to_local())
    options |= {"score_mod": score_mod, "return_aux": return_aux or AuxRequest()}
    sequence = [dim for dim, placement in enumerate(placements) if placement == Shard(_TOKENS)]
    result: Any
    if sequence:
        for name in ("cache", "document_ids", "key_padding_mask"):
            del options[name]
        context = _mesh_of_dim(mesh, sequence[0])
        result = context_parallel_moba(*shards, block_size, topk, mesh=context, **options)
    else:
        result = attend_on_one_device(*shards, block_size, topk, **options)
    out, aux = result
    shape = torch.Size((*q.shape[:3], v.shape[3]))
    out = _as_dtensor(out, shape, mesh, placements)
    lse = None if aux.lse is None else _as_dtensor(aux.lse, q.shape[:3], mesh, placements)
    return with_aux(out, lse, return_aux)


def _as_dtensor(
    x: Tensor, shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...]
) -> DTensor:
    stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return DTensor.from_local(x, mesh, placements, run_check=False, shape=shape, stride=stride)


def _checked(*tensors: Tensor) -> tuple[DTensor, DTensor, DTensor]:
    """Returns q, k and v; raises unless they are DTensors with one mesh and valid placements."""
    kinds = [type(x).__name__ for x in tensors]
    q, k, v = tensors
    if not (isinstance(q, DTensor) and isinstance(k, DTensor) and isinstance(v, DTensor)):
        raise TypeError(
            f"q, k and v must all be DTensors or all be plain tensors, got {', '.join(kinds)}; "
            "make DTensors of the others with distribute_tensor or DTensor.from_local"
        )
    for name, x in (("k", k), ("v", v)):
        if x.device_mesh != q.device_mesh:
            raise ValueError(
                f"q, k and v must have the same mesh, got {q.device_mesh} for q and "
                f"{x.device_mesh} for {name}; distribute them over one mesh"
            )
        if x.placements != q.placements:
            raise ValueError(
                f"q, k and v must have the same placements, got {_shown(q)} for q and {_shown(x)} "
                f"for {name}; redistribute them"
            )
    for placement in q.placements:
        is_shard = type(placement) is Shard and placement.dim in (_ROWS, _HEADS, _TOKENS)
        if not is_shard and not isinstance(placement, Replicate):
            raise ValueError(
                f"the placements of q, k and v must be {_PLACEMENTS}, got {_shown(q)}; "
                "redistribute them"
            )
    if q.placements.count(Shard(_TOKENS)) > 1:
        raise ValueError(
            f"at most one dimension of the mesh may shard the tokens of q, k and v, got "
            f"{_shown(q)}; make a mesh that has these dimensions as one"
        )
    return q, k, v


def _shown(x: DTensor) -> str:
    return ", ".join(map(repr, x.placements))


def _check_heads(k: DTensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> None:
    """Raises unless each rank has the query heads of its KV heads."""
    sizes = [mesh.size(dim) for dim, x in enumerate(placements) if x == Shard(_HEADS)]
    if k.shape[_HEADS] % math.prod(sizes) != 0:
        raise ValueError(
            f"the number of ranks that shard the heads must divide the KV heads, got "
            f"{math.prod(sizes)} ranks and Hkv={k.shape[_HEADS]}; use fewer ranks, or shard the "
            "tokens by Shard(2)"
        )


def _check_options(q: DTensor, k: DTensor, options: Mapping[str, Any]) -> None:
    """Raises unless DTensors support the options."""
    for name in ("cache", "document_ids", "key_padding_mask"):
        if options[name] is not None:
            raise NotImplementedError(
                f"flex_moba does not support {name} with DTensors; call it with to_local() of q, k "
                "and v, or mark packed documents by cu_seqlens"
            )
    cu_seqlens, max_seqlen = options["cu_seqlens"], options["max_seqlen"]
    check_documents(q, k, cu_seqlens, None, None, max_seqlen=max_seqlen)
    ranks = [q.device_mesh.size(i) for i, x in enumerate(q.placements) if x == Shard(_ROWS)]
    if cu_seqlens is not None and math.prod(ranks) > 1:
        raise ValueError(
            f"packed documents have a batch of 1, which {math.prod(ranks)} ranks cannot shard; "
            "replicate q, k and v over these ranks, or shard the tokens by Shard(2)"
        )


def _first(x: DTensor, dim: int) -> int:
    """Returns the index of the first element of this rank's shard along a dim."""
    first, size = 0, x.shape[dim]
    for mesh_dim, placement in enumerate(x.placements):
        if placement == Shard(dim):  # shards are as long as in torch.chunk
            length = -(-size // x.device_mesh.size(mesh_dim))
            before = min(size, x.device_mesh.get_local_rank(mesh_dim) * length)
            first, size = first + before, min(length, size - before)
    return first


def _mesh_of_dim(mesh: DeviceMesh, dim: int) -> DeviceMesh:
    """Returns one dimension of a mesh."""
    if mesh.ndim == 1:
        return mesh
    if mesh.mesh_dim_names is not None:
        return mesh[mesh.mesh_dim_names[dim]]
    return DeviceMesh.from_group(mesh.get_group(dim), mesh.device_type)
