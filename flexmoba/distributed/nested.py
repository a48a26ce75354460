"""Two exchanges in one call: by heads within a node, and of keys between nodes.

The ranks of a node then have the tokens of the node, each for its share of the heads, so a rank
receives only the keys of these heads from other nodes.
"""

from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flexmoba.distributed.attend import Attention, shifted
from flexmoba.distributed.blocks import attend_by_blocks, why_not_blocks
from flexmoba.distributed.choice import NestedExchange, Shape, why_not_gather, why_not_heads
from flexmoba.distributed.gather import attend_by_gathering
from flexmoba.distributed.heads import attend_by_heads
from flexmoba.distributed.plan import first_keys, plan_of
from flexmoba.distributed.ranks import Ranks


def attend_in_nodes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention: Attention,
    mesh: DeviceMesh,
    lengths: tuple[int, ...],
    exchange: NestedExchange,
    *,
    with_lse: bool,
    **documents: Any,
) -> tuple[Tensor, Tensor | None]:
    """Computes the attention of this rank's queries; see `context_parallel_moba`.

    Args:
        q: This rank's queries, ``(B, Hq, L, D)``.
        k: This rank's keys, ``(B, Hkv, L, D)``.
        v: This rank's values, ``(B, Hkv, L, Dv)``.
        attention: The attention.
        mesh: The mesh, whose first dimension has the nodes.
        lengths: Number of tokens of each rank, node by node.
        exchange: The exchange between nodes, and ``"heads"``.
        with_lse: Whether to return the log-sum-exp.
        documents: ``cu_seqlens`` and ``max_seqlen`` of the complete sequence.

    Returns:
        The output ``(B, Hq, L, Dv)`` and the log-sum-exp ``(B, Hq, L)`` or None.
    """
    size, node = mesh.size(1), mesh.get_local_rank(0)
    nodes = [lengths[first : first + size] for first in range(0, len(lengths), size)]
    within = Ranks(mesh.get_group(1), mesh.get_local_rank(1), nodes[node])
    between = Ranks(mesh.get_group(0), node, tuple(map(sum, nodes)))
    cu_seqlens, boundaries = documents["cu_seqlens"], None
    if cu_seqlens is not None:
        boundaries = cu_seqlens.tolist()  # waits for the device
    plan = plan_of(between, first_keys(between, boundaries), boundaries, cu_seqlens)
    sizes = q.shape[1], k.shape[1]
    reason = why_not_heads(Shape(*sizes, within.lengths, (), attention.options["gate"]))
    if reason is None and exchange[0] == "gather":
        shape = Shape(*sizes, between.lengths, plan.first_keys, attention.options["gate"])
        reason = why_not_gather(shape)
    elif reason is None:
        has_documents = cu_seqlens is not None
        reason = why_not_blocks(attention, between.lengths, has_documents=has_documents)
    if reason is not None:
        raise NotImplementedError(f"exchange={exchange} {reason}; use a mesh of one dimension")

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, first_head: int, **_: Any
    ) -> tuple[Tensor, Tensor]:
        if exchange[0] == "blocks":
            return attend_by_blocks(q, k, v, attention, between)
        score_mod = attention.score_mod
        if score_mod is not None:
            score_mod = shifted(score_mod, q.device, first_head=first_head)
        of_node = attention._replace(score_mod=score_mod)
        longest = documents["max_seqlen"]
        out, lse = attend_by_gathering(q, k, v, of_node, plan, with_lse=True, max_seqlen=longest)
        assert lse is not None
        return out, lse

    return attend_by_heads(q, k, v, attend, within, with_lse=with_lse, **documents)
