"""The oracle: MoBA written as plainly as possible, dense and slow.

Every implementation is compared with this file, so it shares no code with any of them.
"""

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

    Returns:
        The attention output, ``(B, Hq, Lq, Dv)``, in the dtype of ``q``. A query that sees no
        key gets zeros.

    Examples:
        >>> import torch
        >>> from flexmoba import moba_reference
        >>> q, k, v = torch.randn(3, 1, 2, 10, 8)
        >>> moba_reference(q, k, v, block_size=4, topk=2).shape
        torch.Size([1, 2, 10, 8])
    """
    selected = reference_selection(q, k, block_size, topk, is_causal=is_causal)
    mask = reference_mask(selected, block_size, k.shape[2], is_causal=is_causal)
    out, _ = reference_attention(q.double(), k.double(), v.double(), mask, scale=scale)
    return out.to(q.dtype)


def reference_selection(
    q: Tensor, k: Tensor, block_size: int, topk: int | None, *, is_causal: bool
) -> Tensor:
    """The gate: which blocks each query selects, as bools ``(B, Hq, Lq, number of blocks)``."""
    batch, heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    n_blocks = -(-kv_len // block_size)
    own = (torch.arange(q_len) + kv_len - q_len) // block_size
    if topk is None:
        return torch.ones(batch, heads, q_len, n_blocks, dtype=torch.bool, device=q.device)

    precise = torch.float64 if q.dtype == torch.float64 else torch.float32
    selected = torch.zeros(batch, heads, q_len, n_blocks, dtype=torch.bool, device=q.device)
    for b in range(batch):
        for h in range(heads):
            keys = k[b, h // (heads // kv_heads)].detach()
            blocks = keys.split(block_size)
            means = torch.stack([block.to(precise).mean(0).to(k.dtype) for block in blocks])
            scores = q[b, h].detach().to(precise) @ means.to(precise).T
            scores = scores.nan_to_num(
                nan=float("inf")
            )  # NaN is highest, then inf, as in torch.sort
            for i, row in enumerate(scores.tolist()):
                candidates = range(int(own[i])) if is_causal else range(n_blocks)
                best_first = sorted(candidates, key=lambda j: (row[j], j), reverse=True)
                chosen = [int(own[i]), *best_first[: topk - 1]] if is_causal else best_first[:topk]
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
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Dense masked attention in the dtype of its inputs: the output and its log-sum-exp."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q @ k.mT * scale).masked_fill(~mask, float("-inf"))
    blind = ~mask.any(-1, keepdim=True)  # softmax over nothing is NaN; defined here as zeros
    weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    lse = scores.masked_fill(blind, 0.0).logsumexp(-1)  # filled, or its gradient would be NaN
    return weights @ v, lse.masked_fill(blind.squeeze(-1), float("-inf"))
