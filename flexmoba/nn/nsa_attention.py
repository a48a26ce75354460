"""`NsaAttention`: a self-attention layer of Native Sparse Attention, with projections."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flexmoba.checks import check_documents, check_positive
from flexmoba.nn.block_compress import BlockCompress
from flexmoba.nn.checks import check_heads, check_rotary
from flexmoba.nn.rotary import rotate
from flexmoba.nsa import NsaCache, NsaSizes, check_sizes, check_window, flex_nsa, nsa_layout
from flexmoba.sequence import positions_of


class NsaAttention(nn.Module):
    """Self-attention layer that uses Native Sparse Attention (arXiv 2502.11089, Sec. 3).

    Each branch has its own keys and values (Sec. 3.3.3). `BlockCompress` modules compress those of
    the compressed branch. The gate values are the sigmoid of a linear projection of the token; the
    paper uses a multilayer perceptron (Sec. 3.2). The rotary embedding rotates queries and keys at
    their positions, and a compressed key, after its compression, at the position of the first token
    of its compressed block. The paper leaves this open.

    Args:
        dim: Features of a token.
        heads: Query heads ``Hq``.
        kv_heads: KV heads ``Hkv``, a divisor of ``heads``, which the query heads of a KV head share
            together with its selection.
        head_dim: Head dim ``D`` of queries and keys; ``dim / heads`` by default.
        value_dim: Head dim ``Dv`` of values; ``head_dim`` by default.
        compress: ``"mlp"`` for `BlockCompress` with its perceptron, or ``"mean"`` for the mean.
            The attributes ``compress_k`` and ``compress_v`` may be replaced by other modules with
            the same interface.
        gate: ``"head"`` for gate values of each query head, or ``"token"`` for gate values that all
            heads of a token share.
        rope_base: Base of a rotary position embedding, such as 10000; None for no embedding.
        bias: Whether the projections have a bias. The projection of gate values always has one.
        cmp_block: Tokens in a compressed block.
        cmp_stride: Distance of the first tokens of two consecutive compressed blocks.
        block_size: Keys in a block of the selected branch.
        topk: Number of blocks that each query selects, including the own block.
        sink_blocks: Number of first blocks that are always selected.
        local_blocks: Number of blocks right before the own block that are always selected.
        window: Tokens in the window of a query, including its own; 0 for no window branch. The
            layer then has no projections for it.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        TypeError: A size is not an int.
        ValueError: A size is too small, or sizes do not fit each other.

    Examples:
        >>> import torch
        >>> from flexmoba.nn import NsaAttention
        >>> layer = NsaAttention(64, 8, 2, block_size=16, topk=4, window=32, rope_base=10000)
        >>> x = torch.randn(2, 100, 64)
        >>> out = layer(x)
        >>> out.shape
        torch.Size([2, 100, 64])
        >>> with torch.no_grad():
        ...     cache = layer.make_cache(batch=2, max_len=100)
        ...     outs = [layer(part, cache=cache) for part in x.split([98, 1, 1], dim=1)]
        >>> torch.testing.assert_close(torch.cat(outs, dim=1), out)
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        *,
        head_dim: int | None = None,
        value_dim: int | None = None,
        compress: Literal["mlp", "mean"] = "mlp",
        gate: Literal["head", "token"] = "head",
        rope_base: float | None = None,
        bias: bool = False,
        cmp_block: int = 32,
        cmp_stride: int = 16,
        block_size: int = 64,
        topk: int = 16,
        sink_blocks: int = 1,
        local_blocks: int = 1,
        window: int = 512,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes the projections."""
        super().__init__()
        self.sizes = NsaSizes(cmp_block, cmp_stride, block_size, topk, sink_blocks, local_blocks)
        check_sizes(self.sizes)
        head_dim = check_heads(dim, heads, kv_heads, head_dim)
        check_rotary(head_dim, rope_base)
        value_dim = head_dim if value_dim is None else value_dim
        check_positive("value_dim", value_dim, "pass a number of features or heads")
        check_window(window)
        for name, value, names in (
            ("compress", compress, ("mlp", "mean")),
            ("gate", gate, ("head", "token")),
        ):
            if value not in names:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(repr, names))}, got {value!r}"
                )
        self.head_dim, self.value_dim, self.kv_heads = head_dim, value_dim, kv_heads
        self.window, self.rope_base = window, rope_base
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(dim, heads * head_dim, bias, **factory)
        # The keys of the compressed, the selected and the window branch, in this order.
        self.branches = branches = 3 if window > 0 else 2
        self.k_proj = nn.Linear(dim, branches * kv_heads * head_dim, bias, **factory)
        self.v_proj = nn.Linear(dim, branches * kv_heads * value_dim, bias, **factory)
        self.gate_proj = nn.Linear(dim, branches * (heads if gate == "head" else 1), **factory)
        self.o_proj = nn.Linear(heads * value_dim, dim, bias, **factory)
        compressor: dict[str, Any] = {"mlp": compress == "mlp", **factory}
        self.compress_k = BlockCompress(head_dim, cmp_block, cmp_stride, **compressor)
        self.compress_v = BlockCompress(value_dim, cmp_block, cmp_stride, **compressor)

    def make_cache(
        self,
        batch: int,
        max_len: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> NsaCache:
        """Returns an empty cache for `forward`.

        Args:
            batch: Rows ``B``.
            max_len: Capacity of each row in tokens; None for a cache that grows.
            dtype: Dtype of the keys and values that the projections return; by default, the dtype
                of ``k_proj.weight``.
            device: Device of the cache; by default, the device of ``k_proj.weight``.
        """
        weight = self.k_proj.weight
        return NsaCache(
            *(batch, self.kv_heads, self.head_dim),
            value_dim=self.value_dim,
            cmp_block=self.sizes.cmp_block,
            cmp_stride=self.sizes.cmp_stride,
            block_size=self.sizes.block_size,
            window=self.window,
            compress=self._compress,
            max_len=max_len,
            dtype=weight.dtype if dtype is None else dtype,
            device=weight.device if device is None else device,
        )

    def forward(
        self,
        x: Tensor,
        *,
        cache: NsaCache | None = None,
        cu_seqlens: Tensor | None = None,
        document_ids: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Returns the output of the layer for every token.

        Args:
            x: Tokens, ``(B, L, dim)`` in the dtype of the projections.
            cache: A cache from `make_cache`, for prefill in chunks and for decoding. With a cache,
                ``x`` holds only new tokens, which the call appends. A cache has no gradients, and
                no packed documents.
            cu_seqlens: Boundaries of packed documents, ``(documents + 1,)`` int32 or int64, as in
                `flex_nsa`.
            document_ids: Document of each token, ``(B, L)`` int32 or int64, as in `flex_nsa`.
            key_padding_mask: ``(B, L)`` bool, True for real tokens. The values of padding affect
                neither outputs nor gradients; the attention output there is 0.

        Returns:
            ``(B, L, dim)`` in the dtype of the projections.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: Shapes, dtypes, devices or values do not fit.
        """
        if x.ndim != 3:
            raise ValueError(
                f"x must be (B, L, dim), got {tuple(x.shape)}; pass the input of the projections"
            )
        where: dict[str, Any] = {
            "cu_seqlens": cu_seqlens,
            "document_ids": document_ids,
            "key_padding_mask": key_padding_mask,
        }
        check_documents(x[:, None], x[:, None], **where)
        if key_padding_mask is not None:
            x = x.masked_fill(~key_padding_mask[..., None], 0.0)
        q, keys, values, gates = self._project(x)
        if cache is not None:
            for name in ("cu_seqlens", "document_ids"):
                if where[name] is not None:
                    raise ValueError(
                        f"{name} and cache cannot be combined; give every document its own row of "
                        "the cache"
                    )
            return self._decode(q, keys, values, gates, cache, key_padding_mask)
        k_cmp, v_cmp = self.compress_k(keys[0], **where), self.compress_v(values[0], **where)
        if self.rope_base is not None and x.numel() > 0:
            positions, of_blocks = self._positions(x, where)
            q, keys = self._rotate(q, keys, positions)
            k_cmp = rotate(k_cmp, of_blocks, self.rope_base)
        options: dict[str, Any] = self.sizes._asdict() | where | {"window": self.window}
        options |= _of_window(keys, values)
        out: Tensor = flex_nsa(
            *(q, keys[1], values[1], gates),
            k_cmp=k_cmp,
            v_cmp=v_cmp,
            return_aux=None,
            **options,
        )
        return self._output(out)

    def _decode(
        self,
        q: Tensor,
        keys: tuple[Tensor, ...],
        values: tuple[Tensor, ...],
        gates: Tensor,
        cache: NsaCache,
        mask: Tensor | None,
    ) -> Tensor:
        """Appends new tokens to a cache and returns the output of the layer for them."""
        if self.rope_base is not None:
            q, keys = self._rotate(q, keys, cache.next_positions(q.shape[2], mask))
        positions = cache.append(
            *(keys[1], values[1]),
            k_cmp=keys[0],
            v_cmp=values[0],
            **_of_window(keys, values),
            key_padding_mask=mask,
        )
        sizes = self.sizes
        out, _ = cache.attend(
            *(q, gates, positions),
            topk=sizes.topk,
            sink_blocks=sizes.sink_blocks,
            local_blocks=sizes.local_blocks,
        )
        return self._output(out)

    def _compress(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Compresses blocks ``(N, Hkv, cmp_block, D)`` that begin at ``positions (N,)``."""
        k, v = self.compress_k(k), self.compress_v(v)
        if self.rope_base is not None:
            k = rotate(k, positions[:, None], self.rope_base)
        return k, v

    def _project(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
        """Returns queries, the keys and the values of the branches, and three gate values."""
        c = self.branches
        q = rearrange(self.q_proj(x), "b l (h d) -> b h l d", d=self.head_dim)
        keys = rearrange(self.k_proj(x), "b l (c h d) -> c b h l d", c=c, d=self.head_dim)
        values = rearrange(self.v_proj(x), "b l (c h d) -> c b h l d", c=c, d=self.value_dim)
        gates = rearrange(self.gate_proj(x), "b l (h c) -> b h l c", c=c).sigmoid()
        if c == 2:
            gates = F.pad(gates, (0, 1))  # of the window branch, without effect
        return q, keys.unbind(), values.unbind(), gates

    def _rotate(
        self, q: Tensor, keys: tuple[Tensor, ...], positions: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Rotates queries, and the keys of all branches but the compressed one."""
        assert self.rope_base is not None
        q, *others = (rotate(y, positions, self.rope_base) for y in (q, *keys[1:]))
        return q, (keys[0], *others)

    def _output(self, out: Tensor) -> Tensor:
        projected: Tensor = self.o_proj(rearrange(out, "b h l d -> b l (h d)"))
        return projected

    def _positions(self, x: Tensor, where: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
        """Returns the positions of tokens and of the first tokens of compressed blocks."""
        length, device = x.shape[1], x.device
        if all(given is None for given in where.values()):
            n_blocks = self.sizes.compressed_blocks(length)
            token = torch.arange(length, device=device)[None]
            return token, torch.arange(n_blocks, device=device)[None] * self.sizes.cmp_stride
        layout = nsa_layout(length, self.sizes, *where.values())
        return positions_of(length, **where), layout.compressed_positions(self.sizes)

    def extra_repr(self) -> str:
        """Returns the sizes, for ``repr``."""
        sizes = {"head_dim": self.head_dim, "window": self.window, "rope_base": self.rope_base}
        return ", ".join(f"{name}={x}" for name, x in (sizes | self.sizes._asdict()).items())


def _of_window(keys: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Returns the keys and values of the window branch as arguments; none without the branch."""
    return dict(zip(("k_win", "v_win"), keys[2:] + values[2:], strict=False))
