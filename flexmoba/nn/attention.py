"""`MobaAttention`: a self-attention layer with projections."""

from typing import TYPE_CHECKING, Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from flexmoba.cache import MobaCache
from flexmoba.checks import DTYPES, check_documents
from flexmoba.nn.checks import check_heads, check_rotary
from flexmoba.nn.flex_moba import FlexMoba
from flexmoba.nn.key_conv import KeyConv, KeyConvCache
from flexmoba.nn.rotary import rotate
from flexmoba.runtime import autocast_dtype
from flexmoba.sequence import positions_of, without_padding

if TYPE_CHECKING:
    from flexmoba.distributed import SequenceShards


class MobaAttention(nn.Module):
    """Self-attention layer that uses Mixture of Block Attention (arXiv 2502.13189, Sec. 2.2).

    Applies ``q_proj``, ``k_proj`` and ``v_proj``, the key convolution and the rotary embedding if
    they are set, `flex_moba`, and ``o_proj``. `forward` counts heads by the features that the
    projections return, so tensor parallelism can split the projections by heads.

    Args:
        dim: Features of a token.
        heads: Query heads ``Hq``.
        kv_heads: KV heads ``Hkv``, a divisor of ``heads`` (grouped-query attention); ``heads`` by
            default.
        block_size: Keys in a block, at least 1.
        topk: Blocks that each query attends to, its own block included; None for full attention.
        head_dim: Head dim ``D`` of queries, keys and values; ``dim / heads`` by default.
        rope_base: Base of a rotary position embedding, such as 10000; None for no embedding. The
            embedding rotates dim ``i`` with dim ``i + D / 2``. Positions begin at 0 in every
            document and at the first real token of a row, and continue at the end of a cache.
        bias: Whether the projections have a bias.
        key_conv: Width of a `KeyConv` on the keys before the rotary embedding, 3 or 5; None for no
            convolution.
        eval_topk: ``topk`` outside training (``module.eval()``); ``"same"`` for the value of
            ``topk``.
        dropout: Dropout of attention weights, which must be 0.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        options: Keyword arguments for every call of `flex_moba`, such as ``gate="tile"``.

    Attributes:
        moba: The `FlexMoba` between the projections.

    Raises:
        TypeError: A size is not an int, or `flex_moba` has no such option.
        ValueError: A size is not positive, or sizes do not fit each other.
        NotImplementedError: ``dropout`` is not 0, or the gate does not support the block size.

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
        head_dim = check_heads(dim, heads, kv_heads, head_dim)
        check_rotary(head_dim, rope_base)
        if dropout != 0.0:
            raise NotImplementedError(
                f"dropout of attention weights is not available, got dropout={dropout}; use 0, and "
                "apply nn.Dropout to the output of the layer"
            )
        for name in (
            *("return_aux", "cache", "cu_seqlens", "document_ids", "key_padding_mask"),
            "max_seqlen",
        ):
            if name in options:
                raise TypeError(
                    f"MobaAttention has no option {name!r}; pass it to a call of the layer or of a "
                    "FlexMoba"
                )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.head_dim, self.kv_heads, self.rope_base = head_dim, kv_heads, rope_base
        self.q_proj = nn.Linear(dim, heads * head_dim, bias, **factory)
        self.k_proj = nn.Linear(dim, kv_heads * head_dim, bias, **factory)
        self.v_proj = nn.Linear(dim, kv_heads * head_dim, bias, **factory)
        self.o_proj = nn.Linear(heads * head_dim, dim, bias, **factory)
        self.key_conv = (
            None if key_conv is None else KeyConv(kv_heads * head_dim, key_conv, **factory)
        )
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
        """Returns an empty cache for `forward`.

        Args:
            batch: Rows ``B``.
            max_len: Capacity of each row in tokens; None for a cache that grows.
            kv_heads: KV heads on this device, under tensor parallelism; all by default.
            dtype: Dtype of the keys and values that the projections return. By default, the dtype
                of autocast, or else the dtype of the first floating point tensor of at least 16
                bits among the parameters and buffers of ``k_proj``, then of the layer. Pass it for
                quantized layers that compute in another dtype.
            device: Device of the cache; by default, the device of the first parameter or buffer.

        Returns:
            A `MobaCache`, or a `KeyConvCache` if the layer has a key convolution.

        Raises:
            ValueError: No parameter or buffer determines the dtype or the device.
        """
        tensors = [x for m in (self.k_proj, self) for x in (*m.parameters(), *m.buffers())]
        if dtype is None:
            dtype = next((y for x in tensors if (y := autocast_dtype(x)) in DTYPES), None)
        if device is None:
            device = next((x.device for x in tensors), None)
        if dtype is None or device is None:
            raise ValueError(
                f"make_cache cannot determine the dtype and device of keys from k_proj, a "
                f"{type(self.k_proj).__name__}, got dtype={dtype} and device={device}; pass both"
            )
        return (MobaCache if self.key_conv is None else KeyConvCache)(
            batch,
            self.kv_heads if kv_heads is None else kv_heads,
            self.head_dim,
            block_size=self.moba.block_size,
            gate_block_size=self.moba.options.get("gate_block_size"),
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
        """Returns the output of the layer for every token.

        Args:
            x: Tokens, ``(B, L, dim)`` in the dtype of the projections.
            cache: A cache from `make_cache`, for prefill in chunks and for decoding. With a cache,
                ``x`` holds only new tokens, which the call appends. A cache has no gradients.
            cu_seqlens: Boundaries of packed documents, ``(documents + 1,)`` int32 or int64, as in
                `flex_moba`.
            document_ids: Document of each token, ``(B, L)`` int32 or int64, as in `flex_moba`.
            key_padding_mask: ``(B, L)`` bool, True for real tokens. A cache omits padding. The
                values of padding affect neither outputs nor gradients; the attention output there
                is 0.
            max_seqlen: Length of the longest document in tokens, as in `flex_moba`.

        Returns:
            ``(B, L, dim)`` in the dtype of the projections.

        Raises:
            TypeError: An argument has the wrong type, or a layer with a key convolution got another
                cache.
            ValueError: Shapes, dtypes, devices or values do not fit.
            NotImplementedError: The call has a cache and needs gradients.
        """
        if x.ndim != 3:
            raise ValueError(
                f"x must be (B, L, dim), got {tuple(x.shape)}; pass the input of the projections"
            )
        packing = {
            "cu_seqlens": cu_seqlens,
            "document_ids": document_ids,
            "key_padding_mask": key_padding_mask,
        }
        shards = self.moba.sequence_shards
        if shards is not None:
            shards.check(cache=cache, **packing)
        else:
            check_documents(x[:, None], x[:, None], **packing, max_seqlen=max_seqlen)
        if key_padding_mask is not None:
            x = x.masked_fill(~key_padding_mask[..., None], 0.0)
        q, k, v = (self._heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if shards is not None:
            q, k = self._encode_shard(q, k, shards, cu_seqlens)
        else:
            q, k = self._encode(q, k, cache, **packing)
        out = self.moba(q, k, v, cache=cache, **packing, max_seqlen=max_seqlen)
        projected: Tensor = self.o_proj(rearrange(out, "b h l d -> b l (h d)"))
        return projected

    def _encode(
        self, q: Tensor, k: Tensor, cache: MobaCache | None, **packing: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Applies the key convolution and the rotary embedding."""
        positions = None
        length, key_padding_mask = q.shape[2], packing["key_padding_mask"]
        if cache is not None:
            if cache.lengths.shape[0] != q.shape[0]:
                raise ValueError(
                    f"x and the cache must have the same batch size, got {q.shape[0]} and "
                    f"{cache.lengths.shape[0]}; make a cache for the batch size of x"
                )
            positions = cache.next_positions(length, key_padding_mask)
        elif q.numel() > 0 and any(given is not None for given in packing.values()):
            positions = positions_of(length, **packing)
        if self.key_conv is not None:
            if cache is not None and not isinstance(cache, KeyConvCache):
                raise TypeError(
                    f"a layer with a key convolution needs a KeyConvCache, got "
                    f"{type(cache).__name__}; make it with make_cache of the layer"
                )
            if cache is None and key_padding_mask is not None:  # convolve real tokens alone
                layout = without_padding(key_padding_mask, 1)
                k = layout.collect(self.key_conv(layout.spread(k)))
            else:
                k = self.key_conv(k, positions, cache)
        if self.rope_base is not None:
            if positions is None:
                positions = torch.arange(length, device=q.device)[None]
            q, k = rotate(q, positions, self.rope_base), rotate(k, positions, self.rope_base)
        return q, k

    def _encode_shard(
        self, q: Tensor, k: Tensor, shards: "SequenceShards", cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Computes `_encode` for this rank's tokens of sequences that several ranks share."""
        if self.key_conv is None and self.rope_base is None:
            return q, k
        ranks = shards.ranks(k)
        tokens = slice(ranks.first, ranks.first + ranks.length)
        if cu_seqlens is None:
            positions = torch.arange(tokens.start, tokens.stop, device=q.device)[None]
        else:
            positions = positions_of(ranks.total, cu_seqlens, None, None)[:, tokens]
        if self.key_conv is not None:
            before = shards.before(k, self.key_conv.width - 1, ranks)
            k = self.key_conv(k, positions, before=before)
        if self.rope_base is not None:
            q, k = rotate(q, positions, self.rope_base), rotate(k, positions, self.rope_base)
        return q, k

    def _heads(self, x: Tensor) -> Tensor:
        if x.shape[-1] % self.head_dim != 0:
            raise ValueError(
                f"a projection returned {x.shape[-1]} features on this device, not a multiple of "
                f"head_dim={self.head_dim}; use a number of devices that divides the heads"
            )
        return rearrange(x, "b l (h d) -> b h l d", d=self.head_dim)

    def extra_repr(self) -> str:
        """Returns the sizes, for ``repr``."""
        return f"head_dim={self.head_dim}, rope_base={self.rope_base}"
