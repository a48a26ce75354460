"""The branches of Native Sparse Attention, each by attention of another room.

Every function returns the output ``(B, Hq, Lq, Dv)`` and the log-sum-exp ``(B, Hq, Lq)``.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest

from flexmoba.attention import flex_moba, selected_attention
from flexmoba.backends import AttentionOptions, ImplName, resolve, window_attention
from flexmoba.blocks import TILE
from flexmoba.nsa.sizes import NsaSizes


class BranchTensors(NamedTuple):
    """The keys and values of the branches.

    Attributes:
        k: Keys of the selected branch, ``(B, Hkv, Lk, D)``.
        v: Values of the selected branch, ``(B, Hkv, Lk, Dv)``.
        k_cmp: Compressed keys, ``(B, Hkv, blocks, D)``.
        v_cmp: Compressed values, ``(B, Hkv, blocks, Dv)``.
        k_win: Keys of the window branch, ``(B, Hkv, tokens, D)``, of the last tokens at least.
        v_win: Values of the window branch, ``(B, Hkv, tokens, Dv)``.
    """

    k: Tensor
    v: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    k_win: Tensor
    v_win: Tensor


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

    The ``cmp_stride`` queries from the end of one compressed block to before the end of the next
    one see the same compressed keys. As query heads of one token, they turn the branch into causal
    full attention over the compressed keys, which computes each pair once. The queries of each
    place in a stride get their own copy of the compressed keys, as KV heads, because FlexAttention
    computes the gradients of a tile of keys of one KV head in one program. With packed documents,
    ``first_block (B, Lq)`` is the first block of each query's document, and the branch is attention
    to windows that begin with the document.
    """
    stride, first_seeing = sizes.cmp_stride, sizes.cmp_block - 1
    q_len, (kv_heads, n_compressed) = q.shape[2], k_cmp.shape[1:3]
    offset = kv_len - q_len
    if n_compressed == 0:
        nothing = k_cmp.sum() + v_cmp.sum()  # 0, with gradients
        out = q.new_zeros((*q.shape[:3], v_cmp.shape[-1])) + nothing
        precise = torch.promote_types(q.dtype, torch.float32)
        return out, q.new_full(q.shape[:3], float("-inf"), dtype=precise) + nothing
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
    heads = rearrange(seeing, "b (h g) (t s) d -> b (h s g) t d", h=kv_heads, s=stride)
    k_cmp, v_cmp = (
        x[:, :, None].expand(-1, -1, stride, -1, -1).flatten(1, 2) for x in (k_cmp, v_cmp)
    )
    if first_block is None:
        out, aux = flex_moba(
            *(heads, k_cmp, v_cmp, TILE, None),
            scale=scale,
            impl=impl,
            return_aux=AuxRequest(lse=True),
        )
        assert aux.lse is not None
        lse = aux.lse
    else:
        # The queries of one token are of one document, but for those that see nothing.
        first_key = first_block[:, first_seeing::stride] * (sizes.block_size // stride)
        key = torch.arange(tokens, dtype=torch.int32, device=q.device)
        options = _options(heads, k_cmp, v_cmp, scale, impl)
        out, lse = window_attention(
            heads, k_cmp, v_cmp, torch.minimum(first_key, key), tokens, options
        )
    out, lse = (
        rearrange(x, "b (h s g) t d -> b (h g) (t s) d", s=stride, h=kv_heads)
        for x in (out, lse[..., None])
    )
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


def window_branch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    first_token: Tensor | None,
    scale: float | None,
    impl: ImplName,
) -> tuple[Tensor, Tensor]:
    """Computes attention to the last ``window`` tokens up to each query, its own included.

    The last query is at the last key, and keys before the first window may be missing. With packed
    documents, ``first_token (B, Lq)`` is the first token of each query's document, and there are as
    many queries as keys.
    """
    q_len, kv_len = q.shape[2], k.shape[2]
    # Windows need as many queries as keys: drop the keys before the first window, and add a query
    # of zeros for each key before the first query.
    missing = min(kv_len - q_len, window - 1)
    first = kv_len - q_len - missing
    k, v = k[:, :, first:], v[:, :, first:]
    if missing > 0:
        q = F.pad(q, (0, 0, missing, 0))  # copies, even if nothing is missing
    position = torch.arange(q.shape[2], dtype=torch.int32, device=q.device)
    first_key = (position - (window - 1)).clamp(min=0).expand(q.shape[0], -1)
    if first_token is not None:
        first_key = torch.maximum(first_key, first_token)
    options = _options(q, k, v, scale, impl)
    out, lse = window_attention(q, k, v, first_key, window, options)
    return out[:, :, missing:], lse[:, :, missing:]


def _options(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, impl: ImplName
) -> AttentionOptions:
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return AttentionOptions(resolve(impl, q, k, v), scale)
