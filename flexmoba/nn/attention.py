"""`MobaAttention`: self-attention with projections."""

from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from flexmoba.cache import MobaCache
from flexmoba.checks import DTYPES, check_documents, check_positive
from flexmoba.nn.flex_moba import FlexMoba
from flexmoba.nn.key_conv import KeyConv, KeyConvCache
from flexmoba.nn.rotary import rotate
from flexmoba.runtime import autocast_dtype
from flexmoba.sequence import positions_of, without_padding


class MobaAttention(nn.Module):
    """Self-attention with projections, by Mixture of Block Attention (arXiv 2502.13189, Sec. 2.2).

    ``q_proj``, ``k_proj`` and ``v_proj``, then the key convolution and the rotary embedding where
    asked for, `flex_moba`, and ``o_proj``. The heads of a forward pass are counted from what the
    projections give, so these may be split over devices by heads (tensor parallelism).

    Args:
        dim: Features of a token.
        heads: Query heads ``Hq``.
        kv_heads: Key-value heads, dividing ``heads`` (grouped-query attention); ``heads`` by
            default.
        block_size: As in `FlexMoba`.
        topk: As in `FlexMoba`.
        head_dim: Head dim ``D`` of queries, keys and values; ``dim / heads`` by default.
        rope_base: Base of a rotary position embedding, such as 10000; None for none. It turns the
            first half of the dims against the second, and begins anew with every document, at a
            row's first real token, and where a cache ends.
        bias: Whether the projections have one.
        key_conv: Width of a `KeyConv` on the keys before their rotation, 3 or 5; None for none.
        eval_topk: As in `FlexMoba`.
        dropout: Must be 0, there is none.
        device: Where the parameters are.
        dtype: Of the parameters.
        options: As in `FlexMoba`.

    Attributes:
        moba: The `FlexMoba` between the projections.

    Raises:
        TypeError: A size is no integer, or `flex_moba` has no such option.
        ValueError: A size is not positive, or sizes do not fit each other.
        NotImplementedError: ``dropout`` is not 0, or an option cannot serve.

    Examples:
        >>> import torch
        >>> from flexmoba.nn import MobaAttention
        >>> _ = torch.manual_seed(0)
        >>> layer = MobaAttention(64, 4, 2, block_size=16, topk=3, rope_base=10000, key_conv=3)
        >>> x = torch.randn(2, 100, 64)
        >>> out = layer(x)
        >>> with torch.no_grad():
        ...     cache = layer.make_cache(batch=2, max_len=100)
        ...     outs = [layer(part, cache=cache) for part in x.split(75, dim=1)]
        >>> torch.testing.assert_close(torch.cat(outs, dim=1), out)
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        block_size: int,
        topk: int | None,
        head_dim: int | None = None,
        rope_base: float | None = None,
        bias: bool = False,
        key_conv: int | None = None,
        eval_topk: int | Literal["same"] | None = "same",
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        """Makes the projections."""
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        sizes = {"dim": dim, "heads": heads, "kv_heads": kv_heads}
        if head_dim is not None:
            sizes["head_dim"] = head_dim
        for name, size in sizes.items():
            check_positive(name, size, "pass a number of features or heads")
        if heads % kv_heads != 0:
            raise ValueError(
                f"heads must be a multiple of kv_heads, got heads={heads} and kv_heads={kv_heads}"
            )
        if head_dim is None and dim % heads != 0:
            raise ValueError(
                f"dim must be a multiple of heads, got dim={dim} and heads={heads}; or give a "
                "head_dim"
            )
        head_dim = dim // heads if head_dim is None else head_dim
        if rope_base is not None and (head_dim % 2 != 0 or rope_base <= 0):
            raise ValueError(
                f"a rotary embedding needs an even head_dim and a positive rope_base, got "
                f"head_dim={head_dim} and rope_base={rope_base}"
            )
        if dropout != 0.0:
            raise NotImplementedError(
                f"dropout of attention weights is not available, got dropout={dropout}; use 0, and "
                "nn.Dropout on what the layer returns"
            )
        for name in (
            *("return_aux", "cache", "cu_seqlens", "document_ids", "key_padding_mask"),
            "max_seqlen",
        ):
            if name in options:
                raise TypeError(
                    f"MobaAttention has no option {name!r}; it goes with one call, of the layer or "
                    "of a FlexMoba"
                )
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        self.head_dim, self.kv_heads, self.rope_base = head_dim, kv_heads, rope_base
        self.q_proj = nn.Linear(dim, heads * head_dim, bias, **at)
        self.k_proj = nn.Linear(dim, kv_heads * head_dim, bias, **at)
        self.v_proj = nn.Linear(dim, kv_heads * head_dim, bias, **at)
        self.o_proj = nn.Linear(heads * head_dim, dim, bias, **at)
        self.key_conv = None if key_conv is None else KeyConv(kv_heads * head_dim, key_conv, **at)
        self.moba = FlexMoba(block_size, topk, eval_topk=eval_topk, **options)

    def make_cache(
        self,
        batch: int,
        max_len: int | None = None,
        *,
        kv_heads: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> MobaCache:
        """An empty cache for `forward`: a `MobaCache`, of the class that this layer needs.

        Args:
            batch: Rows.
            max_len: Tokens that each row has room for; None to grow as needed.
            kv_heads: KV heads of this device, where they are split over several; all by default.
            dtype: Of keys and values, as the projections give them; that of autocast by default, or
                the first of half, single or double precision among the parameters and buffers of
                ``k_proj``, then of the layer. Quantised layers may compute in another: give it.
            device: Where they are; where the first parameter or buffer is, by default.

        Raises:
            ValueError: The layer holds nothing that tells the dtype or the device.
        """
        held = [x for part in (self.k_proj, self) for x in (*part.parameters(), *part.buffers())]
        if dtype is None:
            dtype = next((y for x in held if (y := autocast_dtype(x)) in DTYPES), None)
        if device is None:
            device = next((x.device for x in held), None)
        if dtype is None or device is None:
            raise ValueError(
                f"make_cache cannot tell where or in what dtype k_proj, a "
                f"{type(self.k_proj).__name__}, gives keys, got dtype={dtype} and device={device}; "
                "pass both"
            )
        return (MobaCache if self.key_conv is None else KeyConvCache)(
            batch,
            self.kv_heads if kv_heads is None else kv_heads,
            self.head_dim,
            block_size=self.moba.block_size,
            max_len=max_len,
            dtype=dtype,
            device=device,
        )

    def forward(
        self,
        x: Tensor,
        *,
        cache: MobaCache | None = None,
        cu_seqlens: Tensor | None = None,
        document_ids: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Attention of every token to itself and those before it.

        Args:
            x: ``(B, L, dim)``.
            cache: What `make_cache` made, to prefill in chunks and to decode: x is of new tokens
                only, which are added to it. Without gradients.
            cu_seqlens: Boundaries of packed documents, as in `flex_moba`.
            document_ids: Each token's document, ``(B, L)``, as in `flex_moba`.
            key_padding_mask: Which tokens are real, bool ``(B, L)``, also with a cache, which adds
                no padding. The contents of padding have no effect, on gradients neither; attention
                gives zeros there.
            max_seqlen: Tokens of the longest document, as in `flex_moba`.

        Returns:
            ``(B, L, dim)``.

        Raises:
            TypeError: An argument is of the wrong type.
            ValueError: Shapes, dtypes or devices do not fit, or values do not.
            NotImplementedError: A cache, and gradients are asked for.
        """
        if x.ndim != 3:
            raise ValueError(f"x must be (B, L, dim), got {tuple(x.shape)}")
        where = {
            "cu_seqlens": cu_seqlens,
            "document_ids": document_ids,
            "key_padding_mask": key_padding_mask,
        }
        check_documents(x[:, None], x[:, None], **where, max_seqlen=max_seqlen)
        if key_padding_mask is not None:
            x = x.masked_fill(~key_padding_mask[..., None], 0.0)
        q, k, v = (self._heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        positions = None
        if cache is not None:
            if cache.lengths.shape[0] != x.shape[0]:
                raise ValueError(
                    f"x and the cache must have the same batch size, got {x.shape[0]} and "
                    f"{cache.lengths.shape[0]}"
                )
            positions = cache.next_positions(x.shape[1], key_padding_mask)
        elif x.numel() > 0 and any(given is not None for given in where.values()):
            positions = positions_of(x.shape[1], **where)
        if self.key_conv is not None:
            if cache is not None and not isinstance(cache, KeyConvCache):
                raise TypeError("a layer with a key convolution needs the cache of its make_cache")
            if cache is None and key_padding_mask is not None:  # neighbours are real tokens
                layout = without_padding(key_padding_mask, 1)
                k = layout.collect(self.key_conv(layout.spread(k)))
            else:
                k = self.key_conv(k, positions, cache)
        if self.rope_base is not None:
            if positions is None:
                positions = torch.arange(x.shape[1], device=x.device)[None]
            q, k = rotate(q, positions, self.rope_base), rotate(k, positions, self.rope_base)
        out = self.moba(q, k, v, cache=cache, **where, max_seqlen=max_seqlen)
        projected: Tensor = self.o_proj(rearrange(out, "b h l d -> b l (h d)"))
        return projected

    def _heads(self, x: Tensor) -> Tensor:
        if x.shape[-1] % self.head_dim != 0:
            raise ValueError(
                f"a projection gave {x.shape[-1]} features here, no whole heads of "
                f"{self.head_dim}; split the model over a number of devices that divides the heads"
            )
        return rearrange(x, "b l (h d) -> b h l d", d=self.head_dim)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"head_dim={self.head_dim}, rope_base={self.rope_base}"
