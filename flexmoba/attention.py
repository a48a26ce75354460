"""`flex_moba` and `selected_attention`: validate, lay out, gate, attend, put back."""

from collections.abc import Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest

from flexmoba.backends import (
    AttentionOptions,
    ImplName,
    ScoreMod,
    attend,
    attend_selected,
    check_selected_values,
    resolve,
)
from flexmoba.blocks import ceil_div
from flexmoba.cache import MobaCache
from flexmoba.checks import (
    GateName,
    check_block_size,
    check_documents,
    check_gate,
    check_no_tangents,
    check_options,
    check_queries_and_keys,
    check_selection,
    check_topk,
    check_values,
)
from flexmoba.gate import GateOptions, select_for_attention
from flexmoba.sequence import WindowLayout, lay_out, packing_of


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
    cache: MobaCache | None = None,
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
    cache: MobaCache | None = None,
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
    cache: MobaCache | None = None,
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
    sequences = (cu_seqlens, document_ids, key_padding_mask)
    use_tile_gate = gate == "tile" and is_causal and q.is_cuda and cache is None
    impl = resolve(
        *(impl, q, k, v, kernel_options, score_mod),
        use_tile_gate=use_tile_gate,
        has_short_blocks=not is_causal and any(x is not None for x in sequences),
    )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if cache is not None:
        _check_no_documents(cu_seqlens=cu_seqlens, document_ids=document_ids)
        cache.check_call(
            *(q, k, block_size),
            is_causal=is_causal,
            gate=gate,
            impl=named,
            kernel_options=kernel_options,
        )
        positions = cache.append(k, v, key_padding_mask)
        out, lse = cache.attend(
            *(q, positions, topk),
            scale=scale,
            score_mod=score_mod,
            gate=gate,
            sink_blocks=sink_blocks,
            local_blocks=local_blocks,
        )
        return _output(out, lse, return_aux)
    if q.numel() == 0:
        return _output(*_empty(q, k, v), return_aux)
    options = AttentionOptions(impl, scale, is_causal, kernel_options)
    gate_options = GateOptions(gate, sink_blocks, local_blocks)

    packing = packing_of(k.shape[2], cu_seqlens, document_ids, max_seqlen)
    n_blocks = ceil_div(k.shape[2] if packing is None else packing.longest, block_size)
    if topk is None or topk > n_blocks:  # no sequence has more blocks
        topk = n_blocks
    layout = lay_out(
        *(k.shape[2], block_size, packing, key_padding_mask),
        is_causal=is_causal,
        is_full=topk == n_blocks,
        stride=gate_options.stride,
    )
    q, k, v = layout.spread(q), layout.spread(k), layout.spread(v)
    selection = select_for_attention(
        *(q, k, layout, topk, gate_options),
        is_causal=is_causal,
        is_full=topk == n_blocks,
        per_tile=use_tile_gate and impl == "masked",
    )
    out, lse = attend(q, k, v, selection, layout, options, score_mod)
    return _output(*layout.collect_results(out, lse), return_aux)


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
    has_short_blocks = not is_causal and any(x is not None for x in sequences)
    impl = resolve(*(impl, q, k, v, kernel_options, score_mod), has_short_blocks=has_short_blocks)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if q.numel() == 0:
        return _output(*_empty(q, k, v), return_aux)
    options = AttentionOptions(impl, scale, is_causal, kernel_options)

    packing = packing_of(k.shape[2], cu_seqlens, document_ids)
    layout = lay_out(*(k.shape[2], block_size, packing, key_padding_mask), is_causal=is_causal)
    assert not isinstance(layout, WindowLayout)  # they are of full attention
    q, k, v = layout.spread(q), layout.spread(k), layout.spread(v)
    check_selected_values(selection, k.shape[2], layout)
    out, lse = attend_selected(q, k, v, selection, layout, options, score_mod)
    return _output(*layout.collect_results(out, lse), return_aux)


def _check_no_documents(**given: Tensor | None) -> None:
    for name, x in given.items():
        if x is not None:
            raise ValueError(
                f"{name} and cache do not go together; give every document a row of the cache"
            )


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
