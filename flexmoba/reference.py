"""The oracle: MoBA written as plainly as possible, dense and slow.

Every implementation is compared with this file, so it shares no code with any of them.
"""

import itertools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor


def moba_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    topk: int | None,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    score_mod: Callable[..., Tensor] | None = None,
    gate: Literal["token", "group", "tile"] = "token",
    sink_blocks: int = 0,
    local_blocks: int = 0,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Mixture of Block Attention by dense masked attention: the definition, not a fast path.

    Computes Eq. 2 to 6 of arXiv 2502.13189, Sec. 2.2: the gate picks blocks of keys for every
    query token and head, and the token attends to the keys of those blocks that it may see. The
    attention is computed in float64, whatever the inputs' dtype. Time and memory are
    O(Lq * Lk); use it to check, not to train.

    Args:
        q: Queries, ``(B, Hq, Lq, D)``, floating point. Query ``i`` stands at position
            ``i + Lk - Lq``.
        k: Keys, ``(B, Hkv, Lk, D)``, where ``Hkv`` divides ``Hq``.
        v: Values, ``(B, Hkv, Lk, Dv)``.
        block_size: Keys in a block. The last block may be shorter.
        topk: Blocks that each query attends to, its own included; ``None`` for all of them
            (full attention).
        is_causal: Whether a query sees only keys at or before its position. If not, every block
            is a candidate and the own block is not forced.
        scale: Factor on the attention scores, ``1 / sqrt(D)`` by default. The gate is unscaled.
        score_mod: ``score_mod(score, b, h, q_idx, kv_idx)``: what becomes of the scaled scores.
            It is called once for all of them, with indices that broadcast; positions are those in
            ``k``.
        gate: ``"token"``, every query head chooses for every token; ``"group"``, the query heads
            of a KV head choose together, by the sum of their scores; ``"tile"``, the queries at
            positions ``128 * i`` to ``128 * i + 127`` take the choice of the first of them.
        sink_blocks: First blocks that are always chosen, counted in ``topk``.
        local_blocks: Blocks right before the own one that are always chosen, likewise.
        cu_seqlens: Where packed documents begin and end, int ``(n + 1,)``, from 0 to ``Lk``; the
            batch size is 1 and ``Lq == Lk``. Each document is attended to alone.
        document_ids: Or the document of each token, int ``(B, Lk)``: a new one begins wherever
            the value changes.
        key_padding_mask: Or which keys are real, bool ``(B, Lk)``. The real tokens of a row are
            attended to as a sequence of their own, whatever padding stands between them.

    Returns:
        The attention output, ``(B, Hq, Lq, Dv)``, in the dtype of ``q``. A query that sees no
        key, as padding does, gets zeros.

    Raises:
        ValueError: More than one of the arguments that say where documents are.

    Examples:
        >>> import torch
        >>> from flexmoba import moba_reference
        >>> q, k, v = torch.randn(3, 1, 2, 10, 8)
        >>> moba_reference(q, k, v, block_size=4, topk=2).shape
        torch.Size([1, 2, 10, 8])
    """
    first_query = k.shape[2] - q.shape[2]
    out = q.new_zeros((*q.shape[:3], v.shape[-1]), dtype=torch.float64)
    out = out + sum(x[..., :0].sum() for x in (q, k, v))  # differentiable, if all is padding, too
    documents = reference_documents(q, k, cu_seqlens, document_ids, key_padding_mask)
    for b, keys in documents:
        queries = keys[keys >= first_query] - first_query
        q_alone, k_alone, v_alone = (
            q[b : b + 1, :, queries],
            k[b : b + 1, :, keys],
            v[b : b + 1, :, keys],
        )
        selected = reference_selection(
            q_alone,
            k_alone,
            block_size,
            topk,
            is_causal=is_causal,
            gate=gate,
            sink_blocks=sink_blocks,
            local_blocks=local_blocks,
        )
        mask = reference_mask(selected, block_size, len(keys), is_causal=is_causal)
        q_alone, k_alone, v_alone = q_alone.double(), k_alone.double(), v_alone.double()
        out[b, :, queries] = reference_attention(
            *(q_alone, k_alone, v_alone, mask),
            scale=scale,
            score_mod=score_mod,
            first_row=b,
            query_positions=queries + first_query,
            key_positions=keys,
        )[0][0]
    return out.to(q.dtype)


def reference_documents(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> list[tuple[int, Tensor]]:
    """The keys of every sequence: its batch row and their positions, ascending ``(n,)`` int64."""
    given = {
        "cu_seqlens": cu_seqlens,
        "document_ids": document_ids,
        "key_padding_mask": key_padding_mask,
    }
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"{names[0]} and {names[1]} both say where sequences are; pass one")
    batch, kv_len = k.shape[0], k.shape[2]
    documents = []
    for b in range(batch):
        if cu_seqlens is not None:
            bounds = cu_seqlens.tolist()
        elif document_ids is not None:
            ids = document_ids[b].tolist()
            starts = [i for i in range(1, kv_len) if ids[i] != ids[i - 1]]
            bounds = [0, *starts, kv_len]
        elif key_padding_mask is not None:
            documents.append((b, key_padding_mask[b].nonzero()[:, 0]))
            continue
        else:
            bounds = [0, kv_len]
        position = torch.arange(kv_len, device=k.device)
        documents += [(b, position[start:end]) for start, end in itertools.pairwise(bounds)]
    if names and names[0] != "key_padding_mask" and q.shape[2] != kv_len:
        raise ValueError(
            f"{names[0]} needs as many queries as keys, got Lq={q.shape[2]} and Lk={kv_len}"
        )
    return [(b, keys) for b, keys in documents if len(keys) > 0]


def reference_selection(
    q: Tensor,
    k: Tensor,
    block_size: int,
    topk: int | None,
    *,
    is_causal: bool,
    gate: str = "token",
    sink_blocks: int = 0,
    local_blocks: int = 0,
) -> Tensor:
    """The gate: which blocks each query selects, as bools ``(B, Hq, Lq, number of blocks)``."""
    batch, heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    n_blocks, group = -(-kv_len // block_size), heads // kv_heads
    if topk is None:
        return torch.ones(batch, heads, q_len, n_blocks, dtype=torch.bool, device=q.device)

    precise = torch.float64 if q.dtype == torch.float64 else torch.float32
    selected = torch.zeros(batch, heads, q_len, n_blocks, dtype=torch.bool, device=q.device)
    for b in range(batch):
        scores_of_head = []
        for h in range(heads):
            blocks = k[b, h // group].detach().split(block_size)
            means = torch.stack([block.to(precise).mean(0).to(k.dtype) for block in blocks])
            scores_of_head.append(q[b, h].detach().to(precise) @ means.to(precise).T)
        for h in range(heads):
            scores = scores_of_head[h]
            if gate == "group":
                first_head = h // group * group
                scores = torch.stack(scores_of_head[first_head : first_head + group]).sum(0)
            scores = scores.nan_to_num(
                nan=float("inf")
            )  # NaN is highest, then inf, as in torch.sort
            rows = scores.tolist()
            for i in range(q_len):
                position = i + kv_len - q_len
                chooser = i - position % 128 if gate == "tile" else i
                own, row = position // block_size, rows[chooser]
                past = range(own if is_causal else n_blocks)
                always = [j for j in past if j < sink_blocks or j >= own - local_blocks]
                if not is_causal:
                    always = [j for j in past if j < sink_blocks]
                best_first = sorted(
                    (j for j in past if j not in always), key=lambda j: (row[j], j), reverse=True
                )
                left = topk - int(is_causal) - sink_blocks - local_blocks
                chosen = [*always, *best_first[: max(left, 0)], *([own] if is_causal else [])]
                selected[b, h, i, chosen] = True
    return selected


def reference_mask(selected: Tensor, block_size: int, kv_len: int, *, is_causal: bool) -> Tensor:
    """Which keys each query sees, ``(B, Hq, Lq, Lk)`` bools, given the blocks it selected."""
    mask = selected.repeat_interleave(block_size, dim=-1)[..., :kv_len]
    if is_causal:
        q_len = selected.shape[2]
        position = torch.arange(q_len, device=mask.device) + kv_len - q_len
        mask = mask & (torch.arange(kv_len, device=mask.device) <= position[:, None])
    return mask


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    score_mod: Callable[..., Tensor] | None = None,
    first_row: int = 0,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense masked attention in the dtype of its inputs: the output and its log-sum-exp.

    A ``score_mod`` sees batch rows from ``first_row`` on and the positions ``(Lq,)`` and ``(Lk,)``,
    by default those of keys from 0 to ``Lk - 1`` and of queries that are the last ``Lq`` of them.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q @ k.mT * scale
    if score_mod is not None:
        if key_positions is None:
            key_positions = torch.arange(k.shape[2], device=q.device)
        if query_positions is None:
            query_positions = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)
        scores = score_mod(
            scores,
            torch.arange(q.shape[0], device=q.device)[:, None, None, None] + first_row,
            torch.arange(q.shape[1], device=q.device)[:, None, None],
            query_positions[:, None],
            key_positions,
        )
    scores = scores.masked_fill(~mask, float("-inf"))
    blind = ~mask.any(-1, keepdim=True)  # softmax over nothing is NaN; defined here as zeros
    weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    lse = scores.masked_fill(blind, 0.0).logsumexp(-1)  # filled, or its gradient would be NaN
    return weights @ v, lse.masked_fill(blind.squeeze(-1), float("-inf"))
