"""`window_attention`: attention of each query to the last tokens up to it."""

from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest

from flexmoba import backends
from flexmoba.backends import AttentionOptions, ImplName, resolve
from flexmoba.checks import (
    check_documents,
    check_no_tangents,
    check_options,
    check_positive,
    check_queries_and_keys,
    check_values,
)
from flexmoba.local import empty, with_aux
from flexmoba.sequence import WindowLayout, lay_out, packing_of


@overload
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    *,
    scale: float | None = None,
    impl: ImplName = "auto",
    return_aux: None = None,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor: ...


@overload
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    *,
    scale: float | None = None,
    impl: ImplName = "auto",
    return_aux: AuxRequest,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> tuple[Tensor, AuxOutput]: ...


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    *,
    scale: float | None = None,
    impl: ImplName = "auto",
    return_aux: AuxRequest | None = None,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, AuxOutput]:
    """Computes attention to a sliding window: the last ``window`` tokens up to each query.

    This is the window branch of arXiv 2502.11089, Sec. 3.3.3, alone. The window of a query includes
    the query's own token. The time is proportional to the length times the window. On CUDA, the
    call uses FlexAttention. The output and the log-sum-exp are differentiable by reverse mode;
    forward and backward are deterministic.

    Args:
        q: Queries, ``(B, Hq, Lq, D)``, as in `flex_moba`. Query ``i`` has the position
            ``i + Lk - Lq``.
        k: Keys, ``(B, Hkv, Lk, D)``, in the dtype of q.
        v: Values, ``(B, Hkv, Lk, Dv)``, in the dtype of q.
        window: Tokens in a window, at least 1.
        scale: Factor on the attention scores, ``1 / sqrt(D)`` by default.
        impl: As in `flex_moba`. All backends but ``"portable"`` call FlexAttention.
        return_aux: As in `flex_moba`.
        cu_seqlens: As in `flex_moba`. Windows begin with their document.
        document_ids: As in `flex_moba`.
        key_padding_mask: As in `flex_moba`. Windows count only the real tokens of a row.

    Returns:
        As `flex_moba`: the output, ``(B, Hq, Lq, Dv)``, and with ``return_aux`` an ``AuxOutput``.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: Shapes, dtypes or devices do not match, or a value is out of range.
        NotImplementedError: The backend that ``impl`` names does not support the inputs, or the
            inputs have forward-mode derivatives. The message names the remedy.

    Examples:
        >>> import torch
        >>> from flexmoba import window_attention
        >>> q, k, v = torch.randn(3, 1, 2, 256, 16)
        >>> out = window_attention(q, k, v, window=100)
        >>> same = window_attention(q[:, :, -1:], k[:, :, -100:], v[:, :, -100:], window=100)
        >>> torch.testing.assert_close(out[:, :, -1:], same)
    """
    check_queries_and_keys(q, k)
    check_values(k, v)
    check_no_tangents(q=q, k=k, v=v)
    check_positive("window", window, "pass the number of tokens in a window, with the query's own")
    check_options(scale, None, None, return_aux)
    check_documents(q, k, cu_seqlens, document_ids, key_padding_mask)
    resolve(impl, q, k, v)  # raises, also if there are no queries
    if q.numel() == 0:
        return with_aux(*empty(q, k, v), return_aux)
    packing = packing_of(k.shape[2], cu_seqlens, document_ids)
    layout = lay_out(
        k.shape[2], k.shape[2], packing, key_padding_mask, is_causal=True, is_full=True
    )
    first_token = layout.first_key if isinstance(layout, WindowLayout) else None
    q, k, v = (layout.spread(x) for x in (q, k, v))
    out, lse = attend_to_window(q, k, v, window, first_token, scale, impl)
    return with_aux(*layout.collect_results(out, lse), return_aux)


def attend_to_window(
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
    end = q.shape[2] + 1 - window
    first_key = torch.arange(1 - window, end, dtype=torch.int32, device=q.device)
    first_key = first_key.clamp(min=0).expand(q.shape[0], -1)
    if first_token is not None:
        first_key = torch.maximum(first_key, first_token)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    options = AttentionOptions(resolve(impl, q, k, v), scale)
    out, lse = backends.window_attention(q, k, v, first_key, window, options)
    return out[:, :, missing:], lse[:, :, missing:]
