"""`flex_moba` of tensors on one device: validate, lay out, select, attend, restore token order."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest

from flexmoba.backends import (
    AttentionOptions,
    ImplName,
    ScoreMod,
    attend,
    attend_without_lse,
    resolve,
)
from flexmoba.blocks import ceil_div
from flexmoba.cache import MobaCache
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
from flexmoba.gate import GateOptions, select_for_attention
from flexmoba.sequence import lay_out, packing_of


def attend_on_one_device(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    topk: int | None,
    *,
    is_causal: bool,
    scale: float | None,
    score_mod: ScoreMod | None,
    gate: GateName,
    gate_block_size: int | None,
    sink_blocks: int,
    local_blocks: int,
    impl: ImplName,
    kernel_options: Mapping[str, Any] | None,
    return_aux: AuxRequest | None,
    cache: MobaCache | None,
    cu_seqlens: Tensor | None,
    document_ids: Tensor | None,
    key_padding_mask: Tensor | None,
    max_seqlen: int | None,
) -> Tensor | tuple[Tensor, AuxOutput]:
    """Computes `flex_moba`; the arguments, results and errors are those of `flex_moba`."""
    check_queries_and_keys(q, k)
    check_values(k, v)
    check_no_tangents(q=q, k=k, v=v)
    check_block_size(block_size)
    check_topk(topk, none_allowed=True)
    offset = None if cache is not None else k.shape[2] - q.shape[2]
    check_gate(gate, sink_blocks, local_blocks, offset, block_size, topk, is_causal=is_causal)
    sub_blocks = check_gate_block_size(gate_block_size, block_size)
    check_options(scale, score_mod, kernel_options, return_aux)
    check_documents(q, k, cu_seqlens, document_ids, key_padding_mask, max_seqlen=max_seqlen)
    requested_impl = impl
    sequences = (cu_seqlens, document_ids, key_padding_mask)
    use_tile_gate = gate == "tile" and is_causal and q.is_cuda and cache is None
    impl = resolve(
        *(impl, q, k, v, kernel_options, score_mod),
        use_tile_gate=use_tile_gate,
        has_short_blocks=not is_causal and any(x is not None for x in sequences),
    )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    gate_options = GateOptions(gate, sink_blocks, local_blocks, sub_blocks)
    if cache is not None:
        _check_no_documents(cu_seqlens=cu_seqlens, document_ids=document_ids)
        cache.check_call(
            *(q, k, block_size, gate_options),
            is_causal=is_causal,
            impl=requested_impl,
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
        return with_aux(out, lse, return_aux)
    if q.numel() == 0:
        return with_aux(*empty(q, k, v), return_aux)
    options = AttentionOptions(impl, scale, is_causal, kernel_options)

    # Lay out the sequences, gate, attend, and put the results back.
    packing = packing_of(k.shape[2], cu_seqlens, document_ids, max_seqlen)
    n_blocks = ceil_div(k.shape[2] if packing is None else packing.longest, block_size)
    if topk is None or topk > n_blocks:
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
    call = q, k, v, selection, layout, options, score_mod
    results: tuple[Tensor, Tensor | None]
    if return_aux is not None and return_aux.lse:
        results = attend(*call)
    else:
        results = attend_without_lse(*call), None
    return with_aux(*layout.collect_results(*results), return_aux)


def _check_no_documents(**given: Tensor | None) -> None:
    for name, x in given.items():
        if x is not None:
            raise ValueError(
                f"{name} and cache cannot be combined; give every document its own row of the cache"
            )


def empty(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the empty output and log-sum-exp of no queries, with gradients like any other."""
    nothing = 0 * (q.sum() + k.sum() + v.sum())
    lse = q.new_zeros(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32)) + nothing
    return q.new_zeros((*q.shape[:3], v.shape[-1])) + nothing, lse


def with_aux(
    out: Tensor, lse: Tensor | None, return_aux: AuxRequest | None
) -> Tensor | tuple[Tensor, AuxOutput]:
    """Returns the output, or a pair of it and the ``AuxOutput`` that ``return_aux`` requests."""
    if return_aux is None:
        return out
    return out, AuxOutput(lse=lse if return_aux.lse else None)
