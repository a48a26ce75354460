"""The forward pass: launches its kernels, one piece after another."""

import math

import torch
from torch import Tensor

from flexmoba.backends.fused import hopper
from flexmoba.backends.fused.forward_kernels import attend_kernel, finish_kernel
from flexmoba.backends.fused.routing import Rows, sort_pairs
from flexmoba.backends.fused.schedule import Sizes, sort_groups
from flexmoba.backends.fused.strides import head_strides, token_stride
from flexmoba.backends.fused.tile_sizes import forward_constants
from flexmoba.blocks import ceil_div
from flexmoba.runtime import has_large_shared_memory
from flexmoba.runtime.triton_launch import aligned, launch, on_device_of, packed
from flexmoba.selection import BlockSelection


def attend_on_cuda(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor, Rows | None]:
    """Computes `fused_attention` for a scale that is not negative.

    Args:
        q: Queries, ``(B, Hq, Lq, D)``, float16 or bfloat16.
        k: Keys, ``(B, Hkv, Lk, D)``.
        v: Values, ``(B, Hkv, Lk, Dv)``.
        selection: The blocks of each query.
        scale: Factor on the scores, at least 0.
        is_causal: Whether queries attend to their own blocks.

    Returns:
        The output ``(B, Hq, Lq, Dv)``, the log-sum-exp ``(B, Hq, Lq)`` float32, and the sorted
        pairs of all queries, or None if they were not sorted together.
    """
    q, k, v = (aligned(x) for x in (q, k, v))
    routed, own = packed(selection.routed), None if selection.own is None else packed(selection.own)
    sizes = Sizes.of(q, k, v, routed, selection.block_size)
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    strides, unit = head_strides(q, k, v)
    layout = unit, *(token_stride(x) for x in (q, k, v))
    tile, finish = forward_constants(
        sizes, layout, is_causal, own is not None, has_large_shared_memory(q.device)
    )
    factor = scale / math.log(2)
    use_hopper = hopper.supports(q, k, v, sizes, is_causal=is_causal)
    with on_device_of(q):
        # A partial output in half precision and a float32 log-sum-exp for each pair.
        groups = sort_groups(sizes, (2 * sizes.value_dim + 4) * sizes.count)
        for group in groups:
            if sizes.count:
                bins, (pairs, first_rows) = sort_pairs(routed, group, sizes)
                if use_hopper:
                    tables = (pairs, first_rows, *hopper.items_of(first_rows, group, sizes))
            # Allocated after the sort, which has then freed its buffers.
            rows = group.max_queries * sizes.count
            partial_out, partial_lse = q.new_empty(rows, sizes.value_dim), lse.new_empty(rows)
            for piece in group.pieces:
                if use_hopper:
                    partial = partial_out, partial_lse
                    hopper.attend_on_hopper((q, k, v), partial, tables, group, piece, sizes, factor)
                    del partial  # or the buffers live until the next ones are allocated
                elif sizes.count:
                    first_row = (piece.first_query - group.first_query) * sizes.count
                    n_rows = piece.n_queries * sizes.count
                    launch(
                        attend_kernel,
                        ceil_div(n_rows, tile["SHARE"]),
                        (
                            *(q, k, v, partial_out, partial_lse, pairs, bins, first_rows, *strides),
                            *(first_row, first_row + n_rows),
                            *(group.first_query, group.first_kv_head),
                            *(first_row, sizes.kv_heads, sizes.q_len, sizes.kv_len),
                            *(sizes.n_blocks, factor),
                        ),
                        tile,
                        (q.dtype, bins.dtype),
                    )
                launch(
                    finish_kernel,
                    piece.n_tiles,
                    (
                        *(q, k, v, partial_out, partial_lse, routed, own, out, lse, *strides),
                        *(piece.first_tile, piece.first_query, sizes.heads, sizes.kv_heads),
                        *(sizes.q_len, sizes.kv_len, factor),
                    ),
                    finish,
                    (q.dtype,),
                )
            del partial_out, partial_lse  # before the next sort group allocates its buffers
    return out, lse, Rows(pairs, first_rows) if sizes.count and len(groups) == 1 else None
