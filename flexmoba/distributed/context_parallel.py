"""`context_parallel_moba`: attention of a sequence whose tokens are spread over several ranks."""

from collections.abc import Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest

from flexmoba.backends import ImplName, ScoreMod, resolve
from flexmoba.checks import (
    GateName,
    check_block_size,
    check_documents,
    check_gate,
    check_gate_block_size,
    check_no_tangents,
    check_options,
    check_queries_and_keys,
    check_topk,
    check_values,
)
from flexmoba.distributed.agreement import agree, describe
from flexmoba.distributed.attend import Attention
from flexmoba.distributed.blocks import attend_by_blocks, why_not_blocks
from flexmoba.distributed.choice import (
    ExchangeName,
    NestedExchange,
    Shape,
    check_exchange_name,
    resolve_exchange,
)
from flexmoba.distributed.gather import attend_by_gathering
from flexmoba.distributed.heads import attend_by_heads
from flexmoba.distributed.nested import attend_in_nodes
from flexmoba.distributed.plan import first_keys, plan_of
from flexmoba.distributed.ranks import Ranks, all_ranks, check_lengths, check_mesh, ranks_of
from flexmoba.distributed.traced import attend_in_a_graph, graph_must_be_whole
from flexmoba.local import with_aux


@overload
def context_parallel_moba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    topk: int | None,
    *,
    mesh: DeviceMesh,
    exchange: ExchangeName | NestedExchange = "auto",
    lengths: Sequence[int] | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
    gate: GateName = "token",
    gate_block_size: int | None = None,
    sink_blocks: int = 0,
    local_blocks: int = 0,
    impl: ImplName = "auto",
    kernel_options: Mapping[str, Any] | None = None,
    return_aux: None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor: ...


@overload
def context_parallel_moba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    topk: int | None,
    *,
    mesh: DeviceMesh,
    exchange: ExchangeName | NestedExchange = "auto",
    lengths: Sequence[int] | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
    gate: GateName = "token",
    gate_block_size: int | None = None,
    sink_blocks: int = 0,
    local_blocks: int = 0,
    impl: ImplName = "auto",
    kernel_options: Mapping[str, Any] | None = None,
    return_aux: AuxRequest,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, AuxOutput]: ...


def context_parallel_moba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    topk: int | None,
    *,
    mesh: DeviceMesh,
    exchange: ExchangeName | NestedExchange = "auto",
    lengths: Sequence[int] | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
    gate: GateName = "token",
    gate_block_size: int | None = None,
    sink_blocks: int = 0,
    local_blocks: int = 0,
    impl: ImplName = "auto",
    kernel_options: Mapping[str, Any] | None = None,
    return_aux: AuxRequest | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor | tuple[Tensor, AuxOutput]:
    """Computes `flex_moba` of a sequence that is spread over the ranks of a mesh.

    Computes Eq. 2 to 6 of arXiv 2502.13189, Sec. 2.2, for a sequence of ``L = L_0 + L_1 + ...``
    tokens. Rank ``r`` of the mesh holds the next ``L_r`` tokens after those of rank ``r - 1``, and
    gets their output. The lengths may differ, need not be multiples of the block size, and may be
    0. The result is the result of `flex_moba` for the complete sequence.

    All ranks of the mesh must make the call, and all or none of them the backward pass. The output
    and the log-sum-exp are differentiable in q, k and v, and two runs give the same bits.
    The graph of ``torch.compile`` breaks at the call. With ``fullgraph=True``, the graph contains
    the call, which then needs ``lengths``, no ``score_mod``, and for ``cu_seqlens`` ``"heads"``.

    Args:
        q: This rank's queries, ``(B, Hq, L_r, D)``, float16, bfloat16, float32 or float64.
        k: This rank's keys, ``(B, Hkv, L_r, D)``, in the dtype of q, where ``Hkv`` divides ``Hq``.
        v: This rank's values, ``(B, Hkv, L_r, Dv)``, in the dtype of q.
        block_size: Keys in a block, as in `flex_moba`. Blocks count from the first token of rank 0.
        topk: Number of blocks that each query attends to, as in `flex_moba`. None computes full
            attention.
        mesh: A mesh of one dimension, or one dimension of a larger mesh, such as
            ``mesh["context"]``. Its ranks hold the tokens in their order. For a pair of exchanges,
            a mesh of two dimensions.
        exchange: The tensors that the ranks send to each other. ``"gather"``: keys and values. Each
            rank gets those before its first token, some KV heads at a time; the backward gathers
            them again. ``"heads"``: q, k, v and the output. Each rank gets all tokens for its share
            of the heads. The number of ranks must divide ``Hkv``, or it must divide ``Hq`` and be a
            multiple of ``Hkv``. ``"auto"``: ``"heads"`` if only it supports the call, or if it
            takes less time to receive its tensors than ``"gather"`` to copy keys into place, at
            rates measured in one node; otherwise ``"gather"``. ``"heads"`` needs more memory.
            ``"blocks"``: the blocks that the rank's queries select. It needs shards that begin at
            multiples of the block size, a topk, and neither ``cu_seqlens`` nor ``score_mod`` nor
            ``gate="tile"``. The host waits for the device. ``"auto"`` is never ``"blocks"``.
            ``("gather", "heads")`` or ``("blocks", "heads")``: the first exchange over the first
            dimension of the mesh, the nodes, and ``"heads"`` over the second one, the ranks of a
            node.
        lengths: The lengths ``L_0, L_1, ...``, the same on all ranks. With them, the ranks do not
            compare their arguments before they send tensors. The host then does not wait for the
            device, but arguments that differ between ranks have undefined results, or the ranks
            wait for each other until the timeout of the process group.
        is_causal: Must be True.
        scale: As in `flex_moba`.
        score_mod: As in `flex_moba`, with heads and positions of the complete sequence. With
            ``"gather"``, captured tensors must not require gradients. With ``"heads"``, the
            gradient of a captured tensor is that of this rank's heads; sum it over the ranks.
        gate: As in `flex_moba`. ``"tile"`` with ``"gather"`` needs shards that begin at multiples
            of 128 of their sequence or document, and ``"group"`` with ``"heads"`` a number of ranks
            that divides ``Hkv``.
        gate_block_size: As in `flex_moba`.
        sink_blocks: As in `flex_moba`.
        local_blocks: As in `flex_moba`.
        impl: As in `flex_moba`.
        kernel_options: As in `flex_moba`.
        return_aux: ``AuxRequest(lse=True)`` also returns the log-sum-exp of the scores.
        cu_seqlens: Boundaries of packed documents in the complete sequence, int32 or int64
            ``(n + 1,)``, rising from 0 to ``L``, the same on all ranks, for a batch of 1.
            Documents may span ranks. With ``"gather"``, the host reads the boundaries, which waits
            for the device; a rank receives only the keys of the document that its first token
            belongs to, and no rank sends anything if no document spans ranks.
        max_seqlen: Number of tokens of the longest packed document, or more, as in `flex_moba`.

    Returns:
        The output of this rank's queries, ``(B, Hq, L_r, Dv)``, in the dtype of q. With
        ``return_aux``, a pair of the output and an ``AuxOutput``, whose ``lse``, if requested, is
        ``(B, Hq, L_r)``, float32 (float64 for float64 inputs).

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: Shapes, dtypes or devices do not match, or a value is out of range, on this
            rank or on another one, or the arguments of the ranks differ. All ranks raise an error.
        NotImplementedError: The exchange or the backend does not support the inputs. The message
            names the remedy.

    Examples:
        One rank has the complete sequence.

        >>> import torch
        >>> import torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from flexmoba.distributed import context_parallel_moba
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = init_device_mesh("cpu", (1,))
        >>> q, k, v = torch.randn(3, 1, 2, 300, 16)
        >>> context_parallel_moba(q, k, v, block_size=64, topk=3, mesh=mesh).shape
        torch.Size([1, 2, 300, 16])
        >>> dist.destroy_process_group()
    """
    options = {
        "scale": scale,
        "gate": gate,
        "gate_block_size": gate_block_size,
        "sink_blocks": sink_blocks,
        "local_blocks": local_blocks,
        "impl": impl,
        "kernel_options": kernel_options,
    }
    documents: dict[str, Any] = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
    attention = Attention(block_size, topk, score_mod, is_causal, options)
    can_be_traced = lengths is not None and score_mod is None
    can_be_traced &= exchange in ("auto", "gather", "heads")
    can_be_traced &= cu_seqlens is None or exchange == "heads"
    # Outside the graph, communication is hidden, and few gathered keys exist at a time.
    is_traced = torch.compiler.is_compiling() and can_be_traced and graph_must_be_whole()
    call = _call if is_traced else _call_eagerly
    result: Tensor | tuple[Tensor, AuxOutput] = call(
        (q, k, v), attention, documents, return_aux, mesh=mesh, exchange=exchange, lengths=lengths
    )
    return result


def _call(
    tensors: tuple[Tensor, Tensor, Tensor],
    attention: Attention,
    documents: dict[str, Any],
    return_aux: AuxRequest | None,
    *,
    mesh: DeviceMesh,
    exchange: ExchangeName | NestedExchange,
    lengths: Sequence[int] | None,
) -> Tensor | tuple[Tensor, AuxOutput]:
    """Checks the arguments on all ranks, and computes `context_parallel_moba`."""
    q, k, v = tensors
    check_mesh(mesh, 2 if isinstance(exchange, tuple) else 1)
    every_rank = all_ranks(mesh)
    needs_lse = return_aux is not None and return_aux.lse

    def check() -> None:
        check_exchange_name(exchange)
        _check_causal(attention.is_causal)
        _check_shard(q, k, v, mesh, return_aux, attention)

    if lengths is not None:
        check()
        check_lengths(lengths, q.shape[2], every_rank)
    else:
        mine: dict[str, Any] | Exception
        try:
            check()
            others = {"exchange": exchange, "lse": needs_lse}
            mine = describe(q, k, v, attention.described | others | documents)
        except (TypeError, ValueError, NotImplementedError) as error:
            mine = error
        lengths = agree(mine, every_rank)
    ranks = ranks_of(every_rank, lengths)
    if any(x is not None for x in documents.values()):
        _check_documents(q, k, ranks, documents)
    if ranks.size == 1 or ranks.total == 0 or q.shape[0] == 0:  # nothing is sent
        return with_aux(*attention(q, k, v, **documents), return_aux)
    if isinstance(exchange, tuple):
        out, lse = attend_in_nodes(
            *(q, k, v, attention, mesh, ranks.lengths, exchange), with_lse=needs_lse, **documents
        )
    else:
        out, lse = _attend(q, k, v, attention, ranks, exchange, needs_lse, documents)
    return with_aux(out, lse, return_aux)


_call_eagerly = torch.compiler.disable(
    _call,
    reason="torch.compile traces context_parallel_moba with lengths= and one exchange other than "
    '"blocks", without score_mod, and with cu_seqlens only by exchange="heads"',
)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention: Attention,
    ranks: Ranks,
    exchange: ExchangeName,
    needs_lse: bool,
    documents: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Chooses the exchange, and returns output and log-sum-exp."""
    if exchange == "blocks":
        has_documents = documents["cu_seqlens"] is not None
        reason = why_not_blocks(attention, ranks.lengths, has_documents=has_documents)
        if reason is not None:
            raise NotImplementedError(f'exchange="blocks" {reason}; use exchange="gather"')
        return attend_by_blocks(q, k, v, attention, ranks)
    cu_seqlens, boundaries = documents["cu_seqlens"], None
    if cu_seqlens is not None and exchange != "heads":
        boundaries = cu_seqlens.tolist()  # waits for the device
    needed = first_keys(ranks, boundaries)
    shape = Shape(q.shape[1], k.shape[1], ranks.lengths, needed, attention.options["gate"])
    if resolve_exchange(exchange, shape) == "heads":
        return attend_by_heads(q, k, v, attention, ranks, with_lse=needs_lse, **documents)
    plan = plan_of(ranks, needed, boundaries, cu_seqlens)
    if torch.compiler.is_compiling() and not plan.sends_nothing:
        return attend_in_a_graph(q, k, v, attention, plan)
    longest = documents["max_seqlen"]
    return attend_by_gathering(q, k, v, attention, plan, with_lse=needs_lse, max_seqlen=longest)


def _check_causal(is_causal: bool) -> None:
    if not is_causal:
        raise NotImplementedError(
            "context_parallel_moba does not support is_causal=False; gather q, k and v and call "
            "flex_moba"
        )


def _check_shard(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mesh: DeviceMesh,
    return_aux: AuxRequest | None,
    attention: Attention,
) -> None:
    """Raises unless the arguments of this rank are valid by themselves."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if isinstance(x, DTensor):
            raise TypeError(
                f"{name} must be this rank's shard, got a DTensor; pass to_local() of it"
            )
    check_queries_and_keys(q, k)
    check_values(k, v)
    check_no_tangents(q=q, k=k, v=v)
    if q.device.type != mesh.device_type:
        raise ValueError(
            f"q must be on the device of the mesh, got {q.device} and a mesh of "
            f"{mesh.device_type}; move q, k and v, or make a mesh for their device"
        )
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q and k must hold the same tokens on each rank, got {q.shape[2]} queries and "
            f"{k.shape[2]} keys; pass this rank's shard of each"
        )
    options = attention.options
    check_block_size(attention.block_size)
    check_topk(attention.topk, none_allowed=True)
    check_gate(
        *(options["gate"], options["sink_blocks"], options["local_blocks"]),
        *(None, attention.block_size, attention.topk),
        is_causal=True,
    )
    check_gate_block_size(options["gate_block_size"], attention.block_size)
    check_options(options["scale"], attention.score_mod, options["kernel_options"], return_aux)
    resolve(options["impl"], q, k, v, options["kernel_options"], attention.score_mod)


def _check_documents(q: Tensor, k: Tensor, ranks: Ranks, documents: dict[str, Any]) -> None:
    """Raises unless the boundaries of documents are valid for the complete sequence."""
    whole_q, whole_k = (
        x.new_empty(1).expand(x.shape[0], x.shape[1], ranks.total, x.shape[3]) for x in (q, k)
    )
    cu_seqlens, max_seqlen = documents["cu_seqlens"], documents["max_seqlen"]
    check_documents(whole_q, whole_k, cu_seqlens, None, None, max_seqlen=max_seqlen)
