"""The oracle: a plain, dense and slow implementation of MoBA.

The tests compare every backend with this file, so it shares no code with any of them.
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
    gate_block_size: int | None = None,
    sink_blocks: int = 0,
    local_blocks: int = 0,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Computes Mixture of Block Attention by dense masked attention, as the definition.

    Implements Eq. 2 to 6 of arXiv 2502.13189, Sec. 2.2. The gate selects blocks of keys for every
    query token and head, and the query attends to the keys of these blocks, in causal attention
    only to keys at or before its position. The attention is computed in float64 for inputs of any
    dtype. Time and memory are O(Lq * Lk): use this function to check results, not to train.

    Args:
        q: Queries, ``(B, Hq, Lq, D)``, floating point. Query ``i`` has the position
            ``i + Lk - Lq``.
        k: Keys, ``(B, Hkv, Lk, D)``, where ``Hkv`` divides ``Hq``.
        v: Values, ``(B, Hkv, Lk, Dv)``.
        block_size: Keys in a block. The last block may be shorter.
        topk: Number of blocks that each query attends to, including the own block, which contains
            the query's position. None selects all blocks (full attention).
        is_causal: Whether a query attends only to keys at or before its position. If False, every
            block is a candidate, and the own block is not always selected.
        scale: Factor on the attention scores, ``1 / sqrt(D)`` by default. The gate uses unscaled
            scores.
        score_mod: ``score_mod(score, b, h, q_idx, kv_idx)``, which returns the modified scaled
            scores. It gets all scores in one call, with indices that broadcast. Indices of queries
            and keys are positions in k.
        gate: Scores that select the blocks. ``"token"``: the scores of each query token and head.
            ``"group"``: the sums of the scores over the query heads of a KV head. ``"tile"``: for
            the queries at positions ``128 * i`` to ``128 * i + 127``, the scores of the first one.
        gate_block_size: Keys in a sub-block, a divisor of ``block_size``, which it is by default.
            Each block consists of sub-blocks; the last one may be shorter. The score of a block is
            the highest score of the mean keys of its sub-blocks.
        sink_blocks: Number of first blocks that are always selected. They count towards ``topk``.
        local_blocks: Number of blocks right before the own block that are always selected. They
            count towards ``topk``.
        cu_seqlens: Boundaries of packed documents, int ``(n + 1,)``, rising from 0 to ``Lk``, for
            a batch of 1 and ``Lq == Lk``. Attention is computed for each document separately.
        document_ids: Document of each token, int ``(B, Lk)``. A new document begins wherever the
            value changes.
        key_padding_mask: True for real keys and False for padding, bool ``(B, Lk)``. The real
            tokens of a row form its sequence, also with padding between them.

    Returns:
        The output, ``(B, Hq, Lq, Dv)``, in the dtype of q. A query that attends to no key, such as
        padding, gets zeros.

    Raises:
        ValueError: More than one of the arguments for documents and padding was passed, or
            documents with fewer queries than keys.

    Examples:
        >>> import torch
        >>> from flexmoba import moba_reference
        >>> q, k, v = torch.randn(3, 1, 2, 10, 8)
        >>> moba_reference(q, k, v, block_size=4, topk=2).shape
        torch.Size([1, 2, 10, 8])
    """
    first_query = k.shape[2] - q.shape[2]
    out = q.new_zeros((*q.shape[:3], v.shape[-1]), dtype=torch.float64)
    # Differentiable in all inputs, even if all tokens are padding.
    out = out + sum(x[..., :0].sum() for x in (q, k, v))
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
            gate_block_size=gate_block_size,
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
    """Returns the batch row and the keys, ascending ``(n,)`` int64, of every sequence."""
    given = {
        "cu_seqlens": cu_seqlens,
        "document_ids": document_ids,
        "key_padding_mask": key_padding_mask,
    }
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(
            f"{names[0]} and {names[1]} both define the sequences of a row; pass one of them"
        )
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
            f"{names[0]} needs as many queries as keys, got Lq={q.shape[2]} and Lk={kv_len}; "
            "pass one query for every key"
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
    gate_block_size: int | None = None,
    sink_blocks: int = 0,
    local_blocks: int = 0,
) -> Tensor:
    """Selects blocks by the gate: bools ``(B, Hq, Lq, blocks)``, True for selected blocks."""
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
            parts = [block.split(gate_block_size or block_size) for block in blocks]
            means = [part.to(precise).mean(0).to(k.dtype) for block in parts for part in block]
            parts_of_block = [len(block) for block in parts]
            scores_of_head.append(q[b, h].detach().to(precise) @ torch.stack(means).to(precise).T)
        for h in range(heads):
            scores = scores_of_head[h]
            if gate == "group":
                first_head = h // group * group
                scores = torch.stack(scores_of_head[first_head : first_head + group]).sum(0)
            scores = torch.stack([x.amax(1) for x in scores.split(parts_of_block, 1)], 1)
            # NaN ranks as the highest score, as in torch.sort.
            scores = scores.nan_to_num(nan=float("inf"))
            rows = scores.tolist()
            for i in range(q_len):
                position = i + kv_len - q_len
                selecting = i - position % 128 if gate == "tile" else i
                own, row = position // block_size, rows[selecting]
                candidates = range(own if is_causal else n_blocks)
                always = [j for j in candidates if j < sink_blocks or j >= own - local_blocks]
                if not is_causal:
                    always = [j for j in candidates if j < sink_blocks]
                best_first = sorted(
                    (j for j in candidates if j not in always),
                    key=lambda j: (row[j], j),
                    reverse=True,
                )
                rest = topk - int(is_causal) - sink_blocks - local_blocks
                blocks = [*always, *best_first[: max(rest, 0)], *([own] if is_causal else [])]
                selected[b, h, i, blocks] = True
    return selected


def reference_mask(selected: Tensor, block_size: int, kv_len: int, *, is_causal: bool) -> Tensor:
    """Returns a mask of the keys that each query attends to, bool ``(B, Hq, Lq, Lk)``.

    ``selected`` is bool ``(B, Hq, Lq, blocks)``, from `reference_selection`.
    """
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
    """Computes dense masked attention in the dtype of its inputs.

    Args:
        q: Queries, ``(B, Hq, Lq, D)``.
        k: Keys, ``(B, Hkv, Lk, D)``.
        v: Values, ``(B, Hkv, Lk, Dv)``.
        mask: True for keys that a query attends to, bool ``(B, Hq, Lq, Lk)``.
        scale: Factor on the scores, ``1 / sqrt(D)`` by default.
        score_mod: As in `moba_reference`.
        first_row: The batch index that ``score_mod`` gets for the first row.
        query_positions: ``(Lq,)`` ints for ``score_mod``, by default the last ``Lq`` positions.
        key_positions: ``(Lk,)`` ints for ``score_mod``, by default from 0 to ``Lk - 1``.

    Returns:
        The output ``(B, Hq, Lq, Dv)`` and the log-sum-exp ``(B, Hq, Lq)``.
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
        ).to(q.dtype)  # a score_mod that adds float32 tensors promotes lower precisions
    scores = scores.masked_fill(~mask, float("-inf"))
    # The softmax of a query without keys would be NaN; it is defined as zeros here.
    blind = ~mask.any(-1, keepdim=True)
    weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    lse = scores.masked_fill(blind, 0.0).logsumexp(-1)  # without the fill, gradients are NaN
    return weights @ v, lse.masked_fill(blind.squeeze(-1), float("-inf"))
