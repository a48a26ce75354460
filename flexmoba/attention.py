"""`flex_moba` and `selected_attention`.

`flex_moba` calls `local.py` for tensors on one device, and `distributed/` for DTensors.
"""

from collections.abc import Mapping
from typing import Any, overload

from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest

from flexmoba.backends import (
    AttentionOptions,
    ImplName,
    ScoreMod,
    attend_selected,
    check_selected_values,
    resolve,
    resolve_shared,
)
from flexmoba.cache import MobaCache
from flexmoba.checks import (
    GateName,
    check_block_size,
    check_documents,
    check_no_tangents,
    check_options,
    check_queries_and_keys,
    check_selection,
    check_values,
)
from flexmoba.local import attend_on_one_device, empty, with_aux
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
    gate_block_size: int | None = None,
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
    gate_block_size: int | None = None,
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
    gate_block_size: int | None = None,
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
    """Computes Mixture of Block Attention: each query attends to a few selected blocks of keys.

    Implements Eq. 2 to 6 of arXiv 2502.13189, Sec. 2.2. The gate, `moba_select`, selects ``topk``
    blocks of keys for every query token and head. The query attends, by softmax attention, to the
    keys of these blocks at or before its position. ``topk=1`` is causal attention within each
    block. ``topk`` of at least the number of blocks, or None, is full causal attention.

    The output and the log-sum-exp are differentiable in q, k and v by reverse mode. Forward and
    backward are deterministic, except for gradients of full attention on CUDA: they may differ
    between two runs unless ``torch.use_deterministic_algorithms(True)`` is set. The call does not
    break the graph of ``torch.compile``. Outside ``torch.compile``, the first call of each
    configuration on CUDA compiles its kernels: some seconds for the kernels of flexmoba, 10 to 20
    seconds for each kernel of FlexAttention.

    Args:
        q: Queries, ``(B, Hq, Lq, D)``, float16, bfloat16, float32 or float64. Query ``i`` has the
            position ``i + Lk - Lq``, so the queries may be the last chunk of a longer sequence.
            q, k and v may be DTensors of one mesh with the same placements: sharded by tokens
            (``Shard(2)``, see `flexmoba.distributed.context_parallel_moba`), by heads
            (``Shard(1)``), by rows of the batch (``Shard(0)``), or replicated.
        k: Keys, ``(B, Hkv, Lk, D)``, in the dtype of q. ``Hkv`` divides ``Hq`` (grouped-query
            attention), and ``Lk >= Lq``.
        v: Values, ``(B, Hkv, Lk, Dv)``, in the dtype of q.
        block_size: Keys in a block, at least 1. The last block may be shorter.
        topk: Number of blocks that each query attends to, at least 1. It includes the own block,
            which contains the query's position. None computes full attention (the paper's
            Sec. 2.3).
        is_causal: Whether a query attends only to keys at or before its position. If False, every
            block is a candidate, and the own block is not always selected.
        scale: Factor on the attention scores, ``1 / sqrt(D)`` by default. The gate uses unscaled
            scores.
        score_mod: FlexAttention's ``score_mod(score, b, h, q_idx, kv_idx)``. It returns the
            modified scaled score, for example a score with a softcap or a bias. It gets the batch
            row, the query head and positions in k, with every backend. Captured tensors get
            gradients. The gate ignores it. On CUDA, each new function compiles again outside
            ``torch.compile``, so define it once.
        gate: Scores that select the blocks. ``"token"``: the scores of each query token and head,
            as in the paper. ``"group"``: the sums of the scores over the query heads of a KV head.
            ``"tile"``: the scores of the first of 128 queries. See `moba_select`.
        gate_block_size: Keys in a sub-block, a divisor of ``block_size``. The score of a block is
            the highest score of the mean keys of its sub-blocks. By default, a block is its only
            sub-block, as in the paper.
        sink_blocks: Number of first blocks that are always selected. They count towards ``topk``.
        local_blocks: Number of blocks right before the own block that are always selected. They
            count towards ``topk``.
        impl: The backend. ``"routed"`` sorts queries by block into tiles, computes them in one
            FlexAttention call and merges the partial outputs by their log-sum-exps; it needs CUDA.
            ``"fused"`` does the same in Triton kernels of flexmoba, in less time and memory; it
            needs CUDA, half precision and head dims from 16 to 256. ``"masked"`` makes one
            FlexAttention call with `moba_block_mask`; it needs CUDA, or CPU without gradients.
            ``"portable"`` computes the same tiles by plain tensor operations, on any device and in
            any dtype. ``"auto"`` is the first of fused, routed and portable that supports the
            inputs; with ``gate="tile"`` on CUDA it tries masked first. Full attention needs no
            routing: ``"masked"`` is then a FlexAttention call, and the other backends call torch's
            dense kernels where these support the inputs.
        kernel_options: FlexAttention's kernel options, for the backends that call it. With kernel
            options, ``"auto"`` is never fused.
        return_aux: ``AuxRequest(lse=True)`` also returns the log-sum-exp of the scores.
        cache: A `MobaCache` of the same block sizes, to decode or to prefill in chunks. q, k and v
            then hold new tokens only, with ``Lq == Lk``. The call appends the keys and values to
            the cache, and each query attends to the cached tokens up to its position. The call is
            causal and without gradients, and ``impl`` must be ``"auto"``. Of the arguments below,
            it accepts only ``key_padding_mask``, and does not append padding.
        cu_seqlens: Boundaries of packed documents, int32 or int64 ``(n + 1,)``, rising from 0 to
            ``Lk``, for a batch of 1. Every document begins a new block, and its queries attend to
            no other document.
        document_ids: Document of each token, int32 or int64 ``(B, Lk)``, for any batch size. A new
            document begins wherever the value changes. The call waits for the device to read the
            number of documents, so it does not work inside ``torch.compile``.
        key_padding_mask: True for real tokens and False for padding, bool ``(B, Lk)``. The real
            tokens of a row form its sequence, also with padding between them, and blocks contain
            only real tokens. Padding gets zeros, a log-sum-exp of -inf and zero gradients, and its
            values have no effect. At most one of ``cu_seqlens``, ``document_ids`` and
            ``key_padding_mask`` may be passed, with ``Lq == Lk``. Their values are checked on CPU.
        max_seqlen: Number of tokens of the longest packed document, or more. If no document has
            more than ``topk`` blocks, the call then computes full attention within documents,
            which is the same function and faster. It matters for ``cu_seqlens`` on devices other
            than CPU; otherwise the call reads the lengths. A longer document is an error, which
            these devices assert.

    Returns:
        The output, ``(B, Hq, Lq, Dv)``, in the dtype of q. With ``return_aux``, a pair of the
        output and an ``AuxOutput``. Its ``lse``, if requested, is the log-sum-exp in natural
        logarithm, ``(B, Hq, Lq)``, float32 (float64 for float64 inputs). If q is a DTensor, both
        are DTensors with its placements.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: Shapes, dtypes, devices or placements do not match, or a value is out of range.
        NotImplementedError: The backend that ``impl`` names does not support the inputs, or the
            inputs have forward-mode derivatives. The message names the remedy.

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
    options: dict[str, Any] = {
        "is_causal": is_causal,
        "scale": scale,
        "score_mod": score_mod,
        "gate": gate,
        "gate_block_size": gate_block_size,
        "sink_blocks": sink_blocks,
        "local_blocks": local_blocks,
        "impl": impl,
        "kernel_options": kernel_options,
        "return_aux": return_aux,
        "cache": cache,
        "cu_seqlens": cu_seqlens,
        "document_ids": document_ids,
        "key_padding_mask": key_padding_mask,
        "max_seqlen": max_seqlen,
    }
    if any(hasattr(x, "device_mesh") for x in (q, k, v)):
        from flexmoba.distributed import attend_to_dtensors  # lazily, since the import is slow

        return attend_to_dtensors(q, k, v, block_size, topk, **options)
    return attend_on_one_device(q, k, v, block_size, topk, **options)


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
    """Computes attention over selected blocks of keys, for a selection from any gate.

    `flex_moba` is `moba_select` followed by this function (arXiv 2502.13189, Sec. 2.2, Eq. 2). A
    query attends to the keys of its selected blocks, in causal attention only to keys at or before
    its position: a selected block after its own block adds nothing. A query that attends to no key
    gets zeros, a log-sum-exp of -inf and zero gradients.

    Args:
        q: Queries, ``(B, Hq, Lq, D)``, as in `flex_moba`.
        k: Keys, ``(B, Hkv, Lk, D)``, in the dtype of q.
        v: Values, ``(B, Hkv, Lk, Dv)``, in the dtype of q.
        selection: Block indices, ``(B, Hq, Lq, topk)``, int32 or int64, from 0 to the number of
            blocks minus one, or -1 for none. A row lists its blocks in any order and no block
            twice. The shape ``(B, Hkv, Lq, topk)`` is a selection that the query heads of a KV head
            share. On CPU the call checks the values. On other devices a check would wait for the
            device; call `flexmoba.checks.check_selected_blocks` there. Unchecked indices of
            blocks that do not exist select nothing.
        block_size: Keys in a block, at least 1.
        is_causal: Whether a query attends only to keys at or before its position
            ``i + Lk - Lq``.
        scale: Factor on the attention scores, ``1 / sqrt(D)`` by default.
        score_mod: As in `flex_moba`.
        impl: As in `flex_moba`. For a shared selection and 8 to 128 query heads for each KV head,
            ``"fused"`` has kernels that do not sort queries, for head dims up to 256.
        kernel_options: As in `flex_moba`.
        return_aux: As in `flex_moba`.
        cu_seqlens: As in `flex_moba`. Block indices count the blocks of all documents of the row,
            as in `moba_select`. Selected blocks of other documents add nothing.
        document_ids: As in `flex_moba`. Block indices are as with ``cu_seqlens``.
        key_padding_mask: As in `flex_moba`. Blocks contain only the real tokens of a row.

    Returns:
        As `flex_moba`: the output, ``(B, Hq, Lq, Dv)``, and with ``return_aux`` an ``AuxOutput``.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: Shapes, dtypes or devices do not match, or a value is out of range.
        NotImplementedError: The backend that ``impl`` names does not support the inputs, or the
            inputs have forward-mode derivatives. The message names the remedy.

    Examples:
        Every query attends to its own block and to the first block.

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
    check_selection(selection, q, k.shape[1])
    check_options(scale, score_mod, kernel_options, return_aux)
    check_documents(q, k, cu_seqlens, document_ids, key_padding_mask)
    sequences = (cu_seqlens, document_ids, key_padding_mask)
    has_short_blocks = not is_causal and any(x is not None for x in sequences)
    is_shared = selection.shape[1] != q.shape[1]
    impl = (resolve_shared if is_shared else resolve)(
        *(impl, q, k, v, kernel_options, score_mod), has_short_blocks=has_short_blocks
    )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if q.numel() == 0:
        return with_aux(*empty(q, k, v), return_aux)
    options = AttentionOptions(impl, scale, is_causal, kernel_options)

    packing = packing_of(k.shape[2], cu_seqlens, document_ids)
    layout = lay_out(*(k.shape[2], block_size, packing, key_padding_mask), is_causal=is_causal)
    assert not isinstance(layout, WindowLayout)  # only full attention has windows
    q, k, v = layout.spread(q), layout.spread(k), layout.spread(v)
    check_selected_values(selection, k.shape[2], layout)
    out, lse = attend_selected(q, k, v, selection, layout, options, score_mod)
    return with_aux(*layout.collect_results(out, lse), return_aux)
