"""`flex_moba` and `selected_attention`: validate, choose the implementation, run it.

q, k -> gate -> selection -> routing -> masks -> flex -> merge -> out
               |                |                                  |
               |                +-----------> portable ------------+
               +------------------> fused -------------------------+
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest

from flexmoba.checks import (
    GateName,
    check_block_size,
    check_cache,
    check_documents,
    check_gate,
    check_no_tangents,
    check_options,
    check_queries_and_keys,
    check_selected_blocks,
    check_selection,
    check_topk,
    check_values,
    values_readable,
)
from flexmoba.gate import GATE_TILE, Candidates, Gate, choose, own_block, shared_out
from flexmoba.impls import (
    ImplName,
    attend_blocks,
    attend_from,
    attend_fully,
    attend_in_place,
    resolve,
)
from flexmoba.masked import attend_shared
from flexmoba.score_mod import ScoreMod, modifier_of
from flexmoba.sequence import InPlace, arrange, packing_of

if TYPE_CHECKING:
    from flexmoba.cache import MobaCache


@overload
def flex_moba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    topk: int | None,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
    gate: GateName = "token",
    sink_blocks: int = 0,
    local_blocks: int = 0,
    impl: ImplName = "auto",
    kernel_options: Mapping[str, Any] | None = None,
    return_aux: None = None,
    cache: "MobaCache | None" = None,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor: ...


@overload
def flex_moba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    topk: int | None,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
    gate: GateName = "token",
    sink_blocks: int = 0,
    local_blocks: int = 0,
    impl: ImplName = "auto",
    kernel_options: Mapping[str, Any] | None = None,
    return_aux: AuxRequest,
    cache: "MobaCache | None" = None,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, AuxOutput]: ...


def flex_moba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    topk: int | None,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
    gate: GateName = "token",
    sink_blocks: int = 0,
    local_blocks: int = 0,
    impl: ImplName = "auto",
    kernel_options: Mapping[str, Any] | None = None,
    return_aux: AuxRequest | None = None,
    cache: "MobaCache | None" = None,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor | tuple[Tensor, AuxOutput]:
    """Mixture of Block Attention: each query attends to its own and its best past blocks of keys.

    Computes Eq. 2 to 6 of arXiv 2502.13189, Sec. 2.2: `moba_select` picks ``topk`` blocks for
    every query token and head, and the query attends, by ordinary softmax attention, to the keys
    of those blocks that stand at or before its position. ``topk=1`` is causal attention within
    each block; ``topk`` of at least the number of blocks, or None, is full causal attention.
    Differentiable in q, k and v by reverse mode, also through the log-sum-exp; forward and backward
    are deterministic. Inside ``torch.compile`` it does not break the graph; called eagerly on CUDA
    it compiles its kernels at the first call of each configuration: seconds for its own ones, 10
    to 20 seconds for each of FlexAttention's.

    Args:
        q: Queries, ``(B, Hq, Lq, D)``, float16, bfloat16, float32 or float64. Query ``i`` stands
            at position ``i + Lk - Lq``, so a chunk of a longer sequence against the keys so far is
            the same call.
        k: Keys, ``(B, Hkv, Lk, D)``, ``Hkv`` dividing ``Hq`` (grouped-query attention) and
            ``Lk >= Lq``.
        v: Values, ``(B, Hkv, Lk, Dv)``.
        block_size: Keys in a block, at least 1. The last block may be shorter.
        topk: Blocks that each query attends to, its own included, at least 1; None for full
            attention (the paper's Sec. 2.3).
        is_causal: Whether a query sees only keys at or before its position. If not, every block
            is a candidate and the own block is not forced.
        scale: Factor on the attention scores, ``1 / sqrt(D)`` by default. The gate is unscaled.
        score_mod: ``score_mod(score, b, h, q_idx, kv_idx)``, FlexAttention's: what becomes of every
            scaled score, such as a softcap or a bias. It sees the batch row, the query head and
            positions in k, wherever the query is computed. What it captures gets gradients. The
            gate does not know of it. Outside ``torch.compile`` every new function is compiled on
            CUDA, so define it once.
        gate: Whose scores choose: ``"token"``, each query's and head's own, as in the paper;
            ``"group"``, the sums over the query heads of a KV head; ``"tile"``, those of the first
            of 128 queries. See `moba_select`.
        sink_blocks: First blocks that every query attends to, counted in ``topk``.
        local_blocks: Blocks right before the own one that every query attends to, likewise.
        impl: ``"routed"``: queries sorted by block into tiles, one FlexAttention call, parts
            merged by log-sum-exp; CUDA. ``"fused"``: the same by Triton kernels of our own,
            faster and smaller; CUDA, half precision, head dims from 16 to 128. ``"masked"``: one
            FlexAttention call over `moba_block_mask`; CUDA, or CPU without gradients.
            ``"portable"``: the same tiles by plain tensor operations; any device and dtype.
            ``"auto"``: fused where it can serve the inputs, else routed, else portable; masked
            first for ``gate="tile"`` on CUDA. Full attention needs no routing: there fused, routed
            and masked are the same.
        kernel_options: FlexAttention's kernel options, for the impls that call it; given any,
            ``"auto"`` does not choose fused.
        return_aux: ``AuxRequest(lse=True)`` to get the log-sum-exp of the scores, too.
        cache: A `MobaCache` of the same block size, to decode or to prefill in chunks: q, k and v
            are of new tokens only, ``Lq == Lk``. The keys and values are added to the cache, and
            the queries attend to all that it holds up to their positions. Causal only, without
            gradients, and ``impl`` must be ``"auto"``; of the arguments below, only
            ``key_padding_mask``, whose padding is not added.
        cu_seqlens: Where packed documents begin and end, int32 or int64 ``(n + 1,)``, rising from
            0 to ``Lk``; for a batch of 1. Blocks begin anew with every document, and queries see
            nothing of other documents.
        document_ids: The same by each token's document, int32 or int64 ``(B, Lk)``: a new one
            begins wherever the value changes. Waits for the device, and is not for
            ``torch.compile``: no shape says how many documents there are.
        key_padding_mask: Which tokens are real, bool ``(B, Lk)``. The real tokens of a row are its
            sequence, also where padding stands between them: blocks count them alone. Padding gets
            zeros, a log-sum-exp of -inf and zero gradients; its contents have no effect. Of the
            three arguments one may be given, with ``Lq == Lk``; values are checked on CPU.
        max_seqlen: Tokens of the longest of the packed documents, or more. On other devices than
            CPU, where ``cu_seqlens`` are not read, it lets documents of at most ``topk`` blocks be
            served by full attention within documents, the same function and faster. A longer
            document is an error, on the device outside CPU.

    Returns:
        The output ``(B, Hq, Lq, Dv)`` in the dtype of q; with ``return_aux``, a pair of it and an
        ``AuxOutput`` whose ``lse``, if asked for, is ``(B, Hq, Lq)`` float32 (float64 for float64
        inputs), in natural logarithm.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: Shapes, dtypes or devices do not fit, or a value is out of its range.
        NotImplementedError: The named ``impl`` cannot serve these inputs; the text says which can.
            Or forward-mode derivatives were asked for.

    Examples:
        >>> import torch
        >>> from flexmoba import flex_moba
        >>> q = torch.randn(1, 4, 1000, 64, requires_grad=True)
        >>> k, v = torch.randn(2, 1, 2, 1000, 64)
        >>> out = flex_moba(q, k, v, block_size=128, topk=3)
        >>> out.shape
        torch.Size([1, 4, 1000, 64])
        >>> out.sum().backward()
    """
    check_queries_and_keys(q, k)
    check_values(k, v)
    check_no_tangents(q=q, k=k, v=v)
    check_block_size(block_size)
    check_topk(topk, none_allowed=True)
    offset = None if cache is not None else k.shape[2] - q.shape[2]
    check_gate(gate, sink_blocks, local_blocks, offset, block_size, topk, is_causal=is_causal)
    check_options(scale, score_mod, kernel_options, return_aux)
    check_documents(q, k, cu_seqlens, document_ids, key_padding_mask, max_seqlen=max_seqlen)
    named = impl
    tiles_choose = gate == "tile" and is_causal and q.is_cuda and cache is None
    sequences = (cu_seqlens, document_ids, key_padding_mask)
    uneven = not is_causal and any(x is not None for x in sequences)
    impl = resolve(
        impl, q, k, v, kernel_options, score_mod, tiles_choose=tiles_choose, uneven=uneven
    )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    options = Gate(gate, sink_blocks, local_blocks)
    if cache is not None:
        for name, given in (("cu_seqlens", cu_seqlens), ("document_ids", document_ids)):
            if given is not None:
                raise ValueError(
                    f"{name} and cache do not go together; give every document a row of the cache"
                )
        check_cache(cache, q, k, block_size, is_causal, gate, named, kernel_options)
        out, lse = cache.attend(
            q,
            cache.append(k, v, key_padding_mask),
            topk,
            scale=scale,
            score_mod=score_mod,
            gate=gate,
            sink_blocks=sink_blocks,
            local_blocks=local_blocks,
        )
        return _output(out, lse, return_aux)
    if q.numel() == 0:
        return _output(*_empty(q, k, v), return_aux)

    packing = packing_of(k.shape[2], cu_seqlens, document_ids, max_seqlen)
    n_blocks = -(-(k.shape[2] if packing is None else packing.longest) // block_size)
    if topk is None or topk > n_blocks:  # no sequence has more blocks
        topk = n_blocks
    if packing is not None and is_causal and topk == n_blocks:
        first_key = packing.first_token.int().expand(k.shape[0], -1)
        modifier = modifier_of(score_mod, q, k, None)
        out, lse = attend_from(
            q, k, v, first_key, packing.longest, scale, impl, kernel_options, modifier
        )
        return _output(out, lse, return_aux)
    layout = arrange(
        *(k.shape[2], block_size, packing, key_padding_mask),
        is_causal=is_causal,
        stride=options.stride,
    )
    if isinstance(layout, InPlace):
        chosen = choose(
            *(q, layout.full_blocks.spread(k.detach()), layout.full_blocks.block_size, topk - 1),
            *(options, Candidates(layout.first_block, layout.end_block)),
            is_causal=True,
        )
        past = shared_out(chosen, q.shape[1], q.shape[2], options)
        out, lse = attend_in_place(
            q, k, v, past, None, layout, scale, impl, kernel_options, score_mod
        )
        return _output(out, lse, return_aux)
    candidates = Candidates()
    if layout is not None:
        candidates = Candidates(layout.first_block, layout.end_block, layout.keys_of_block)
        block_size = layout.block_size
        q, k, v = layout.spread(q), layout.spread(k), layout.spread(v)
    modifier = modifier_of(score_mod, q, k, None if layout is None else layout.token_of_slot)

    full = topk == n_blocks
    if full and candidates.first is None and candidates.end is None:
        out, lse = attend_fully(q, k, v, scale, impl, kernel_options, is_causal, modifier)
    else:
        wanted = topk - 1 if is_causal else topk
        if full:  # all blocks of a sequence, which needs no scores
            options = options._replace(sink_blocks=wanted, local_blocks=0)
        chosen = choose(q, k, block_size, wanted, options, candidates, is_causal=is_causal)
        if tiles_choose and impl == "masked" and block_size % GATE_TILE == 0:
            out, lse = attend_shared(q, k, v, chosen, block_size, scale, kernel_options, modifier)
        else:
            routed = shared_out(chosen, q.shape[1], q.shape[2], options)
            out, lse = attend_blocks(
                *(q, k, v, routed, None, block_size, scale, impl, kernel_options, is_causal),
                *(modifier, candidates.keys_of_block),
            )
    if layout is not None:
        out, lse = layout.collect(out), layout.collect(lse[..., None])[..., 0]
        lse = lse.masked_fill(layout.is_padding(), float("-inf"))
    return _output(out, lse, return_aux)


@overload
def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Tensor,
    block_size: int,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
    impl: ImplName = "auto",
    kernel_options: Mapping[str, Any] | None = None,
    return_aux: None = None,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor: ...


@overload
def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Tensor,
    block_size: int,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
    impl: ImplName = "auto",
    kernel_options: Mapping[str, Any] | None = None,
    return_aux: AuxRequest,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> tuple[Tensor, AuxOutput]: ...


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Tensor,
    block_size: int,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
    impl: ImplName = "auto",
    kernel_options: Mapping[str, Any] | None = None,
    return_aux: AuxRequest | None = None,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, AuxOutput]:
    """Attention over selected blocks of keys, whatever gate selected them.

    The second half of `flex_moba`, which is `moba_select` followed by this (arXiv 2502.13189,
    Sec. 2.2, Eq. 2). A query attends to the keys of its selected blocks; if causal, to those at or
    before its position, so blocks after its own add nothing. A query that sees no key gets zeros,
    a log-sum-exp of -inf and zero gradients.

    Args:
        q: Queries, ``(B, Hq, Lq, D)``, as in `flex_moba`.
        k: Keys, ``(B, Hkv, Lk, D)``.
        v: Values, ``(B, Hkv, Lk, Dv)``.
        selection: Block indices, ``(B, Hq, Lq, topk)`` int32 or int64, from 0 to the number of
            blocks less one, in any order, without duplicates in a row; -1 for none. On CPU its
            values are checked; on other devices that would wait for the device, so it is left to
            `flexmoba.checks.check_selected_blocks`. Unchecked, a block that does not exist is none.
        block_size: Keys in a block, at least 1.
        is_causal: Whether a query sees only keys at or before its position ``i + Lk - Lq``.
        scale: Factor on the attention scores, ``1 / sqrt(D)`` by default.
        score_mod: As in `flex_moba`.
        impl: As in `flex_moba`.
        kernel_options: As in `flex_moba`.
        return_aux: As in `flex_moba`.
        cu_seqlens: As in `flex_moba`; what is selected as `moba_select` counts it, and blocks of
            other documents add nothing.
        document_ids: As in `flex_moba`; what is selected as with ``cu_seqlens``.
        key_padding_mask: As in `flex_moba`. Blocks count the real tokens of a row.

    Returns:
        As `flex_moba`.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: Shapes, dtypes or devices do not fit, or a value is out of its range.
        NotImplementedError: The named ``impl`` cannot serve these inputs; the text says which can.
            Or forward-mode derivatives were asked for.

    Examples:
        Every query attends to its own block and the first one.

        >>> import torch
        >>> from flexmoba import selected_attention
        >>> q, k, v = torch.randn(3, 1, 2, 256, 16)
        >>> own = torch.arange(256, dtype=torch.int32) // 64
        >>> first = torch.where(own > 0, 0, -1)
        >>> selection = torch.stack([own, first], dim=-1).expand(1, 2, 256, 2)
        >>> selected_attention(q, k, v, selection, block_size=64).shape
        torch.Size([1, 2, 256, 16])
    """
    check_queries_and_keys(q, k)
    check_values(k, v)
    check_no_tangents(q=q, k=k, v=v)
    check_block_size(block_size)
    check_selection(selection, q)
    check_options(scale, score_mod, kernel_options, return_aux)
    check_documents(q, k, cu_seqlens, document_ids, key_padding_mask)
    sequences = (cu_seqlens, document_ids, key_padding_mask)
    uneven = not is_causal and any(x is not None for x in sequences)
    impl = resolve(impl, q, k, v, kernel_options, score_mod, uneven=uneven)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if q.numel() == 0:
        return _output(*_empty(q, k, v), return_aux)
    packing = packing_of(k.shape[2], cu_seqlens, document_ids)
    layout = arrange(*(k.shape[2], block_size, packing, key_padding_mask), is_causal=is_causal)
    if isinstance(layout, InPlace):
        if values_readable(selection):
            last = layout.end_block + layout.other_blocks
            check_selected_blocks(selection, int(last.max()) + 1)
        shift = layout.other_blocks[:, None, :, None]
        first, own_index = (x[:, None, :, None] + shift for x in layout[2:4])
        here = (selection >= first) & (selection < own_index)
        past = torch.where(here, selection - shift, -1).int()
        chosen = (selection == own_index).any(-1)
        out, lse = attend_in_place(
            q, k, v, past, chosen, layout, scale, impl, kernel_options, score_mod
        )
        return _output(out, lse, return_aux)
    keys_of_block = None
    if layout is not None:
        block_size, keys_of_block = layout.block_size, layout.keys_of_block
        q, k, v = layout.spread(q), layout.spread(k), layout.spread(v)
    modifier = modifier_of(score_mod, q, k, None if layout is None else layout.token_of_slot)
    n_blocks = -(-k.shape[2] // block_size)
    if values_readable(selection):
        check_selected_blocks(selection, n_blocks)

    # A block that does not exist, unchecked, must not lead out of the tables.
    selection = torch.where(selection < n_blocks, selection, -1).int()
    if layout is not None:
        selection = layout.spread_selection(selection)
    if block_size >= k.shape[2] and keys_of_block is None:  # one block: all of it, or nothing
        out, lse = attend_fully(q, k, v, scale, impl, kernel_options, is_causal, modifier)
        chosen = (selection == 0).any(-1)
        out = torch.where(chosen[..., None], out, 0.0)
        lse = torch.where(chosen, lse, float("-inf"))
    else:
        own: Tensor | None = None
        routed = selection
        if is_causal:
            here = own_block(q.shape[2], k.shape[2], block_size, q.device)[:, None]
            own = (selection == here).any(-1)
            routed = torch.where(selection < here, selection, -1)
        out, lse = attend_blocks(
            *(q, k, v, routed, own, block_size, scale, impl, kernel_options, is_causal),
            *(modifier, keys_of_block),
        )
    if layout is not None:
        out, lse = layout.collect(out), layout.collect(lse[..., None])[..., 0]
        lse = lse.masked_fill(layout.is_padding(), float("-inf"))
    return _output(out, lse, return_aux)


def _empty(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The result for no queries: nothing, but differentiable like any other."""
    nothing = 0 * (q.sum() + k.sum() + v.sum())
    lse = q.new_zeros(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32)) + nothing
    return q.new_zeros((*q.shape[:3], v.shape[-1])) + nothing, lse


def _output(
    out: Tensor, lse: Tensor, return_aux: AuxRequest | None
) -> Tensor | tuple[Tensor, AuxOutput]:
    if return_aux is None:
        return out
    return out, AuxOutput(lse=lse if return_aux.lse else None)
