"""The compressed and the selected branch of NSA, each by attention of another room.

`flexmoba.window` has the window branch. Every function returns the output ``(B, Hq, Lq, Dv)`` and
the log-sum-exp ``(B, Hq, Lq)``.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest

from flexmoba.attention import flex_moba, selected_attention
from flexmoba.backends import (
    AttentionOptions,
    ImplName,
    range_attention,
    resolve,
    window_attention,
)
from flexmoba.blocks import TILE
from flexmoba.nsa.sizes import NsaSizes


def block_means_of(x: Tensor, sizes: NsaSizes) -> Tensor:
    """Returns the mean of every compressed block of ``x (B, Hkv, Lk, D)``, in its dtype.

    The mean accumulates in float32 (float64 for float64 inputs).
    """
    if x.shape[2] < sizes.cmp_block:
        return x[:, :, :0]
    precise = torch.promote_types(x.dtype, torch.float32)
    return x.unfold(2, sizes.cmp_block, sizes.cmp_stride).mean(-1, dtype=precise).to(x.dtype)


def compressed_branch(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    kv_len: int,
    first_block: Tensor | None,
    sizes: NsaSizes,
    scale: float | None,
    impl: ImplName,
) -> tuple[Tensor, Tensor]:
    """Computes attention to the compressed blocks that end at or before each query (Eq. 7).

    With packed documents, ``first_block (B, Lq)`` is the first block of each query's document.
    """
    if k_cmp.shape[2] == 0:
        nothing = k_cmp.sum() + v_cmp.sum()  # 0, with gradients
        out = q.new_zeros((*q.shape[:3], v_cmp.shape[-1])) + nothing
        precise = torch.promote_types(q.dtype, torch.float32)
        return out, q.new_full(q.shape[:3], float("-inf"), dtype=precise) + nothing
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    options = AttentionOptions(resolve(impl, q, k_cmp, v_cmp), factor)
    if options.impl == "portable":
        return _attend_by_strides(q, k_cmp, v_cmp, kv_len, first_block, sizes, scale, options)
    # Per query, the strides up to it, less those of a compressed block but one.
    end = kv_len + 1 - (sizes.cmp_block - sizes.cmp_stride)
    strides = torch.arange(end - q.shape[2], end, dtype=torch.int32, device=q.device)
    end_key = strides // sizes.cmp_stride
    first_key = None
    if first_block is not None:
        first_key = (first_block * (sizes.block_size // sizes.cmp_stride)).expand(q.shape[0], -1)
    return range_attention(q, k_cmp, v_cmp, first_key, end_key, options)


def _attend_by_strides(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    kv_len: int,
    first_block: Tensor | None,
    sizes: NsaSizes,
    scale: float | None,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Computes `compressed_branch` by the portable backend, from at least one compressed key.

    The ``cmp_stride`` queries from the end of one compressed block to before the end of the next
    one see the same compressed keys. As query heads of one token, they turn the branch into causal
    full attention over the compressed keys, which computes each pair once. With packed documents,
    it is attention to windows that begin with the document.
    """
    stride, first_seeing = sizes.cmp_stride, sizes.cmp_block - 1
    q_len, n_compressed = q.shape[2], k_cmp.shape[2]
    offset = kv_len - q_len
    if first_block is not None:
        position = torch.arange(q_len, device=q.device) - first_block * sizes.block_size
        sees_none = (position < first_seeing)[:, None]
        # Such queries share the tokens of queries of the document before. Its keys may be NaN.
        q = q.masked_fill(sees_none[..., None], 0.0)
    blind = max(first_seeing - offset, 0)  # queries before the end of the first compressed block
    first_token = (offset + blind - first_seeing) // stride
    before = offset + blind - first_seeing - first_token * stride
    tokens = n_compressed - first_token
    after = tokens * stride - before - (q_len - blind)
    seeing = F.pad(q[:, :, blind:], (0, 0, before, after))
    heads = rearrange(seeing, "b h (t s) d -> b (h s) t d", s=stride)
    if first_block is None:
        out, aux = flex_moba(
            *(heads, k_cmp, v_cmp, TILE, None),
            scale=scale,  # not options.scale, which is symbolic in a traced call with None
            impl="portable",
            return_aux=AuxRequest(lse=True),
        )
        assert aux.lse is not None
        lse = aux.lse
    else:
        # The queries of one token are of one document, but for those that see nothing.
        first_key = first_block[:, first_seeing::stride] * (sizes.block_size // stride)
        key = torch.arange(tokens, dtype=torch.int32, device=q.device)
        out, lse = window_attention(
            heads, k_cmp, v_cmp, torch.minimum(first_key, key), tokens, options
        )
    out, lse = (rearrange(x, "b (h s) t d -> b h (t s) d", s=stride) for x in (out, lse[..., None]))
    out, lse = (x[:, :, before : before + q_len - blind] for x in (out, lse[..., 0]))
    out = F.pad(out, (0, 0, blind, 0))
    lse = F.pad(lse, (blind, 0), value=float("-inf"))
    if first_block is not None:
        out = out.masked_fill(sees_none[..., None], 0.0)
        lse = lse.masked_fill(sees_none, float("-inf"))
    return out, lse


def selected_branch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Tensor,
    block_size: int,
    scale: float | None,
    impl: ImplName,
) -> tuple[Tensor, Tensor]:
    """Computes attention to the selected blocks of each KV head (Eq. 12)."""
    out, aux = selected_attention(
        *(q, k, v, selection, block_size),
        scale=scale,
        impl=impl,
        return_aux=AuxRequest(lse=True),
    )
    assert aux.lse is not None
    return out, aux.lse
