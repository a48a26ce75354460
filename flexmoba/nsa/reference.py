"""The oracle: a plain, dense and slow implementation of Native Sparse Attention.

The tests compare `flex_nsa` and `nsa_select` with this file, so it shares no code with any of them.
"""

import itertools
from typing import Any

import torch
from torch import Tensor


def nsa_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    *,
    k_cmp: Tensor | None = None,
    v_cmp: Tensor | None = None,
    k_win: Tensor | None = None,
    v_win: Tensor | None = None,
    cmp_block: int = 32,
    cmp_stride: int = 16,
    block_size: int = 64,
    topk: int = 16,
    sink_blocks: int = 1,
    local_blocks: int = 1,
    window: int = 512,
    scale: float | None = None,
    selection: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Computes Native Sparse Attention by dense masked attention, as the definition.

    Implements Eq. 5 to 12 of arXiv 2502.11089, Sec. 3.2 and 3.3. Three branches attend to
    compressed keys, to the keys of selected blocks, and to a window of keys, by three separate
    softmaxes. The output is the sum of their outputs, each multiplied by its gate value (Eq. 5).
    With ``window=0``, there is no window branch, and its gate value has no effect. All steps
    compute in float64 for inputs of any dtype. Time and memory are at least O(Lq * Lk): use this
    function to check results, not to train. It does not validate its arguments.

    Args:
        q: Queries, ``(B, Hq, Lq, D)``, floating point. Query ``i`` has the position
            ``i + Lk - Lq``.
        k: Keys of the selected branch, ``(B, Hkv, Lk, D)``, where ``Hkv`` divides ``Hq``.
        v: Values of the selected branch, ``(B, Hkv, Lk, Dv)``.
        gates: Gate values of the compressed, the selected and the window branch,
            ``(B, Hq or 1, Lq, 3)``.
        k_cmp: Compressed keys, ``(B, Hkv, blocks, D)``; by default the means of the keys of each
            compressed block, rounded to the dtype of k. Compressed block ``i`` holds the tokens
            from ``i * cmp_stride`` to ``i * cmp_stride + cmp_block - 1``.
        v_cmp: Compressed values, ``(B, Hkv, blocks, Dv)``; by default the means of the values.
        k_win: Keys of the window branch, ``(B, Hkv, Lk, D)``, by default k; None with
            ``window=0``.
        v_win: Values of the window branch, ``(B, Hkv, Lk, Dv)``, by default v.
        cmp_block: Tokens in a compressed block.
        cmp_stride: Distance of the first tokens of two consecutive compressed blocks.
        block_size: Keys in a block of the selected branch.
        topk: Number of blocks that each query selects, including the own block.
        sink_blocks: Number of first blocks that are always selected.
        local_blocks: Number of blocks right before the own block that are always selected.
        window: Tokens in the window of a query, including its own; 0 for no window branch.
        scale: Factor on the attention scores, ``1 / sqrt(D)`` by default.
        selection: The selection of the selected branch, int ``(B, Hkv, Lq, topk)``, -1 for none.
            By default, `reference_selection` computes it.
        cu_seqlens: Boundaries of packed documents, int ``(n + 1,)``, rising from 0 to ``Lk``, for a
            batch of 1 and ``Lq == Lk``. Each document is computed alone. ``k_cmp`` and ``v_cmp``
            list the compressed blocks of all documents in order, and block indices of a selection
            count the blocks of all documents in order.
        document_ids: Document of each token, int ``(B, Lk)``. A new document begins wherever the
            value changes.
        key_padding_mask: True for real tokens and False for padding, bool ``(B, Lk)``. The real
            tokens of a row form its sequence.

    Returns:
        The output, ``(B, Hq, Lq, Dv)``, in the dtype of q; zeros for padding.

    Examples:
        >>> import torch
        >>> from flexmoba.nsa import nsa_reference
        >>> q, k, v = torch.randn(3, 1, 2, 100, 8)
        >>> gates = torch.rand(1, 2, 100, 3)
        >>> nsa_reference(q, k, v, gates, block_size=16, topk=4, window=24).shape
        torch.Size([1, 2, 100, 8])
    """
    q_len, kv_len = q.shape[2], k.shape[2]
    if cu_seqlens is not None or document_ids is not None or key_padding_mask is not None:
        return reference_by_sequence(
            *(q, k, v, gates, (k_cmp, v_cmp, k_win, v_win)),
            reference_sequences(k, cu_seqlens, document_ids, key_padding_mask),
            cmp_block=cmp_block,
            cmp_stride=cmp_stride,
            block_size=block_size,
            topk=topk,
            sink_blocks=sink_blocks,
            local_blocks=local_blocks,
            window=window,
            scale=scale,
            selection=selection,
        )
    if k_cmp is None or v_cmp is None:
        k_cmp = reference_means(k, cmp_block, cmp_stride)
        v_cmp = reference_means(v, cmp_block, cmp_stride)
    if k_win is None or v_win is None:
        k_win, v_win = k, v
    if selection is None:
        importance = reference_importance(
            q, k_cmp, kv_len, cmp_block, cmp_stride, block_size, scale=scale
        )
        selected = reference_selection(
            importance, kv_len, block_size, topk, sink_blocks, local_blocks
        )
    else:
        n_blocks = -(-kv_len // block_size)
        selected = (selection[..., None] == torch.arange(n_blocks, device=q.device)).any(-2)
    masks = reference_masks(selected, q_len, kv_len, cmp_block, cmp_stride, block_size, window)
    branches = zip((k_cmp, k, k_win), (v_cmp, v, v_win), masks, strict=True)
    out = torch.zeros((), dtype=torch.float64, device=q.device)
    for c, (keys, values, mask) in enumerate(branches):
        if c == 2 and window == 0:
            break
        o = reference_branch(q.double(), keys.double(), values.double(), mask, scale)[0]
        out = out + gates[..., c, None].double() * o
    return out.to(q.dtype)


def reference_by_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    others: tuple[Tensor | None, ...],
    sequences: list[tuple[int, Tensor]],
    *,
    selection: Tensor | None,
    **options: Any,
) -> Tensor:
    """Computes `nsa_reference` for each sequence alone, from `reference_sequences`."""
    out = torch.zeros((*q.shape[:3], v.shape[-1]), dtype=torch.float64, device=q.device)
    # Differentiable in all inputs, even if all tokens are padding.
    given = [x for x in (q, k, v, gates, *others) if x is not None]
    out = out + sum(x[..., :0].sum() for x in given)
    # In each row, the compressed blocks and blocks of the sequences before.
    compressed_before, blocks_before = [0] * q.shape[0], [0] * q.shape[0]
    for b, tokens in sequences:
        starts = range(0, len(tokens) - options["cmp_block"] + 1, options["cmp_stride"])
        own = torch.arange(len(starts), device=q.device) + compressed_before[b]
        n_blocks, row = -(-len(tokens) // options["block_size"]), slice(b, b + 1)
        selected = None
        if selection is not None:
            selected = selection[row][:, :, tokens] - blocks_before[b]
            selected = torch.where((selected >= 0) & (selected < n_blocks), selected, -1)
        k_cmp, v_cmp, k_win, v_win = (
            None if x is None else x[row][:, :, index]
            for x, index in zip(others, (own, own, tokens, tokens), strict=True)
        )
        alone = nsa_reference(
            *(x[row][:, :, tokens] for x in (q, k, v, gates)),
            k_cmp=k_cmp,
            v_cmp=v_cmp,
            k_win=k_win,
            v_win=v_win,
            selection=selected,
            **options,
        )
        out[b, :, tokens] = alone[0]
        compressed_before[b] += len(starts)
        blocks_before[b] += n_blocks
    return out.to(q.dtype)


def reference_sequences(
    k: Tensor,
    cu_seqlens: Tensor | None,
    document_ids: Tensor | None,
    key_padding_mask: Tensor | None,
) -> list[tuple[int, Tensor]]:
    """Returns the batch row and the tokens, ascending ``(n,)`` int64, of every sequence."""
    sequences = []
    for b in range(k.shape[0]):
        token = torch.arange(k.shape[2], device=k.device)
        if key_padding_mask is not None:
            sequences.append((b, token[key_padding_mask[b]]))
            continue
        if cu_seqlens is not None:
            bounds = cu_seqlens.tolist()
        else:
            assert document_ids is not None
            ids = document_ids[b].tolist()
            begins = [i for i in range(len(ids)) if i == 0 or ids[i] != ids[i - 1]]
            bounds = [*begins, len(ids)]
        pairs = itertools.pairwise(bounds)
        sequences += [(b, token[first:end]) for first, end in pairs if first < end]
    return sequences


def reference_means(x: Tensor, cmp_block: int, cmp_stride: int) -> Tensor:
    """Returns the mean of every compressed block of ``x (B, Hkv, Lk, D)``, in its dtype."""
    starts = range(0, x.shape[2] - cmp_block + 1, cmp_stride)
    means = [x[:, :, i : i + cmp_block].double().mean(2) for i in starts]
    return torch.stack(means, 2).to(x.dtype) if means else x[:, :, :0]


def reference_seen(q_len: int, kv_len: int, cmp_block: int, cmp_stride: int) -> Tensor:
    """Returns which compressed blocks end at or before each query, bool ``(Lq, blocks)``."""
    position = torch.arange(kv_len - q_len, kv_len)
    first_token = torch.arange(max(kv_len - cmp_block + 1, 0))[::cmp_stride]
    return first_token + cmp_block - 1 <= position[:, None]


def reference_importance(
    q: Tensor,
    k_cmp: Tensor,
    kv_len: int,
    cmp_block: int,
    cmp_stride: int,
    block_size: int,
    *,
    scale: float | None = None,
) -> Tensor:
    """Computes the importance of every block, ``(B, Hkv, Lq, blocks)`` float64 (Eq. 8 to 10)."""
    batch, heads, q_len, dim = q.shape
    kv_heads, n_compressed = k_cmp.shape[1:3]
    group, n_blocks = heads // kv_heads, -(-kv_len // block_size)
    scale = dim**-0.5 if scale is None else scale
    keys = k_cmp.detach().double().repeat_interleave(group, dim=1)
    scores = q.detach().double() @ keys.mT * scale
    seen = reference_seen(q_len, kv_len, cmp_block, cmp_stride).to(q.device)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).masked_fill(~seen, 0.0)
    importance = scores.new_zeros(batch, heads, q_len, n_blocks)
    for i in range(n_compressed):
        tokens = range(i * cmp_stride, i * cmp_stride + cmp_block)
        for j in range(n_blocks):
            common = len([s for s in tokens if s // block_size == j])
            importance[..., j] += weights[..., i] * (common / cmp_stride)
    return importance.view(batch, kv_heads, group, q_len, n_blocks).sum(2)


def reference_selection(
    importance: Tensor,
    kv_len: int,
    block_size: int,
    topk: int,
    sink_blocks: int = 1,
    local_blocks: int = 1,
) -> Tensor:
    """Selects the blocks of the highest importance: bools ``(B, Hkv, Lq, blocks)`` (Eq. 11).

    Candidates are the blocks that begin at or before the query. The own block, local blocks and
    sink blocks are always selected and count towards ``topk``. Of equal importances, the later
    block wins.
    """
    batch, kv_heads, q_len, _ = importance.shape
    selected = torch.zeros_like(importance, dtype=torch.bool)
    # NaN ranks as the highest importance, as in torch.sort.
    rows = importance.nan_to_num(nan=float("inf")).tolist()
    for b in range(batch):
        for h in range(kv_heads):
            for i in range(q_len):
                own, row = (i + kv_len - q_len) // block_size, rows[b][h][i]
                always = [j for j in range(own + 1) if j < sink_blocks or j >= own - local_blocks]
                others = [j for j in range(own + 1) if j not in always]
                best_first = sorted(others, key=lambda j: (row[j], j), reverse=True)
                selected[b, h, i, always + best_first[: topk - len(always)]] = True
    return selected


def reference_masks(
    selected: Tensor,
    q_len: int,
    kv_len: int,
    cmp_block: int,
    cmp_stride: int,
    block_size: int,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the masks of the three branches: bools that expand to ``(B, Hkv, Lq, keys)``.

    ``selected`` is bool ``(B, Hkv, Lq, blocks)``, from `reference_selection`.
    """
    token = torch.arange(kv_len, device=selected.device)
    position = token[kv_len - q_len :, None]
    is_past = token <= position
    compressed = reference_seen(q_len, kv_len, cmp_block, cmp_stride).to(selected.device)
    return (
        compressed[None, None],
        selected[..., token // block_size] & is_past,
        (is_past & (token > position - window))[None, None],
    )


def reference_branch(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Computes dense masked attention in the dtype of its inputs (Eq. 2).

    Args:
        q: Queries, ``(B, Hq, Lq, D)``.
        k: Keys, ``(B, Hkv, N, D)``.
        v: Values, ``(B, Hkv, N, Dv)``.
        mask: True for keys that a query attends to, bools that expand to ``(B, Hkv, Lq, N)``.
        scale: Factor on the scores, ``1 / sqrt(D)`` by default.

    Returns:
        The output ``(B, Hq, Lq, Dv)`` and the log-sum-exp ``(B, Hq, Lq)``; zeros and -inf for a
        query that attends to no key.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    mask = mask.expand(-1, k.shape[1] // group, -1, -1).repeat_interleave(group, dim=1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    sees_none = ~mask.any(-1, keepdim=True)
    # A query without keys gets scores of 0 and then weights of 0, because its softmax is NaN.
    scores = scores.masked_fill(~mask, float("-inf")).masked_fill(sees_none, 0.0)
    weights = scores.softmax(-1).masked_fill(sees_none, 0.0)
    if k.shape[2] == 0:
        return weights @ v, (q[..., 0] * 0).masked_fill(sees_none[..., 0], float("-inf"))
    return weights @ v, scores.logsumexp(-1).masked_fill(sees_none[..., 0], float("-inf"))
