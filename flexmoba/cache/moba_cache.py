"""`MobaCache`: the keys, values and mean keys of one attention layer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flexmoba.backends import ScoreMod
from flexmoba.blocks import TILE
from flexmoba.cache.append import append, next_positions
from flexmoba.cache.attention import CachedTensors, cached_attention
from flexmoba.cache.checks import (
    check_appended,
    check_kept,
    check_no_gradients,
    check_queries,
)
from flexmoba.cache.options import CachedCall
from flexmoba.cache.storage import storage
from flexmoba.checks import (
    GateName,
    check_block_size,
    check_gate,
    check_gate_block_size,
    check_options,
    check_positive,
    check_topk,
)
from flexmoba.gate import GateOptions
from flexmoba.runtime import has_values


class MobaCache:
    """Cache of the keys, values and mean keys of one attention layer.

    Each row of the batch is a separate sequence with its own length. Its blocks begin at its first
    token (arXiv 2502.13189, Sec. 2.2). The cache computes the mean key of a sub-block once, when
    the sub-block is full; the gate needs no mean key of the own block. Pass the cache to
    `flex_moba` with q ``(B, Hq, Lq, D)``, k ``(B, Hkv, Lq, D)`` and v ``(B, Hkv, Lq, Dv)`` of
    ``Lq`` new tokens, or call `append` and `attend`.

    A step of at most 16 tokens does not synchronize a GPU with the host, and reads only the mean
    keys and the selected blocks. With ``max_len``, such steps can be captured in a CUDA graph or
    compiled with ``mode="reduce-overhead"``, and do not recompile as the sequence grows. A longer
    chunk copies the positions of its tokens to the host.

    Args:
        batch: Rows ``B``.
        kv_heads: KV heads ``Hkv``.
        head_dim: Head dim ``D`` of the keys.
        block_size: Keys in a block, at least 1.
        gate_block_size: Keys in a sub-block, as in `moba_select`; ``block_size`` by default.
        value_dim: Head dim ``Dv`` of the values; ``head_dim`` by default.
        max_len: Capacity of each row in tokens, rounded up to full blocks. None to double the
            storage whenever it is full.
        dtype: Dtype of keys and values.
        device: Device of the cache.

    Attributes:
        k: Keys, ``(B, Hkv, N * block_size, D)`` in ``dtype``.
        v: Values, ``(B, Hkv, N * block_size, Dv)`` in ``dtype``.
        means: Mean keys of the full sub-blocks, ``(B, Hkv, N * block_size / gate_block_size, D)``
            in ``dtype``.
        lengths: Tokens in each row, ``(B,)`` int32.

    Raises:
        TypeError: A size is not an int.
        ValueError: A size is not positive, or ``gate_block_size`` does not divide ``block_size``.

    Examples:
        >>> import torch
        >>> from flexmoba import MobaCache, flex_moba
        >>> _ = torch.manual_seed(0)
        >>> q, k, v = torch.randn(3, 2, 4, 100, 16)
        >>> cache = MobaCache(batch=2, kv_heads=4, head_dim=16, block_size=8, max_len=100)
        >>> out = flex_moba(q[:, :, :99], k[:, :, :99], v[:, :, :99], 8, 3, cache=cache)
        >>> last = flex_moba(q[:, :, 99:], k[:, :, 99:], v[:, :, 99:], 8, 3, cache=cache)
        >>> torch.testing.assert_close(last, flex_moba(q, k, v, 8, 3)[:, :, 99:])
        >>> cache.lengths
        tensor([100, 100], dtype=torch.int32)
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        *,
        block_size: int,
        gate_block_size: int | None = None,
        value_dim: int | None = None,
        max_len: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Makes an empty cache."""
        check_block_size(block_size)
        value_dim = head_dim if value_dim is None else value_dim
        sizes = {"batch": batch, "kv_heads": kv_heads, "head_dim": head_dim}
        sizes |= {"value_dim": value_dim, "max_len": 1 if max_len is None else max_len}
        for name, size in sizes.items():
            check_positive(name, size, "pass a number of rows, heads, features or tokens")
        self.sub_blocks = check_gate_block_size(gate_block_size, block_size)
        self.block_size = block_size
        self.grows = max_len is None
        # One more block takes the writes of padding. Nothing reads it.
        n_blocks = -(-(max_len or 1) // block_size) + 1
        # Zeros, because masked keys and values are multiplied by weights of 0, and 0 * NaN is NaN.
        self.k, self.v, self.means = (
            storage((batch, kv_heads, length, dim), dtype, device)
            for length, dim in (
                (n_blocks * block_size, head_dim),
                (n_blocks * block_size, value_dim),
                (n_blocks * self.sub_blocks, head_dim),
            )
        )
        self.lengths = storage((batch,), torch.int32, device)
        # An upper bound of the length of the longest row, known without reading from the device.
        self._longest_row = 0
        # Under gate="tile", the first query of every tile, which selects for all of the tile.
        self._tile_queries: Tensor | None = None
        # An upper bound of the tokens in a row that were not attended with gate="tile".
        self._tokens_without_tile_gate = 0

    @property
    def gate_block_size(self) -> int:
        """Keys in a sub-block; the gate scores the mean key of each sub-block."""
        return self.block_size // self.sub_blocks

    @property
    def capacity(self) -> int:
        """Tokens that each row can hold; a multiple of the block size."""
        return self.k.shape[2] - self.block_size

    def next_positions(self, n: int, key_padding_mask: Tensor | None = None) -> Tensor:
        """Returns the positions that `append` would give to ``n`` new tokens of every row.

        Call it before `append` for operations that depend on the position, such as a rotary
        embedding. In a compiled step, do not compute positions from ``lengths``: inductor may read
        ``lengths`` after `append` has changed them.

        Args:
            n: New tokens of every row.
            key_padding_mask: As in `append`.

        Returns:
            Positions, ``(B, n)`` int32; -1 for padding.
        """
        positions: Tensor = next_positions(self.lengths, n, key_padding_mask)
        return positions

    def append(self, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Appends new tokens to every row, and the mean keys of the sub-blocks that they fill.

        Args:
            k: New keys, ``(B, Hkv, n, D)`` in the dtype of the cache.
            v: New values, ``(B, Hkv, n, Dv)`` in the dtype of the cache.
            key_padding_mask: ``(B, n)`` bool, True for real tokens. The cache omits the others,
                which may be anywhere in the chunk. None if all tokens are real.

        Returns:
            The position of each token in its row, ``(B, n)`` int32; -1 for padding.

        Raises:
            ValueError: Shapes, dtypes or devices do not fit, or the cache is full.
            NotImplementedError: k or v requires gradients.

        Examples:
            >>> import torch
            >>> from flexmoba import MobaCache
            >>> cache = MobaCache(batch=2, kv_heads=1, head_dim=8, block_size=4)
            >>> k, v = torch.randn(2, 2, 1, 3, 8)
            >>> real = torch.tensor([[True, True, True], [False, True, True]])
            >>> cache.append(k, v, key_padding_mask=real)
            tensor([[ 0,  1,  2],
                    [-1,  0,  1]], dtype=torch.int32)
        """
        check_appended(k, v, key_padding_mask, self.k, self.v)
        self._make_room(k.shape[2])
        if not torch.compiler.is_compiling():
            self._longest_row += k.shape[2]
            self._tokens_without_tile_gate += k.shape[2]
        positions: Tensor = append(
            *(self.k, self.v, self.means, self.lengths, k, v, key_padding_mask, self.sub_blocks)
        )
        return positions

    def attend(
        self,
        q: Tensor,
        positions: Tensor,
        topk: int | None,
        *,
        scale: float | None = None,
        score_mod: ScoreMod | None = None,
        gate: GateName = "token",
        sink_blocks: int = 0,
        local_blocks: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Attends from new queries to their own block and to selected past blocks (Eq. 2 to 6).

        Args:
            q: Queries of the tokens that were just appended, ``(B, Hq, n, D)`` in the dtype of the
                cache.
            positions: The positions that `append` returned for these tokens, ``(B, n)`` int32.
            topk: Blocks that each query attends to, its own block included; None for all blocks.
            scale: Factor on the attention scores, ``1 / sqrt(D)`` by default.
            score_mod: As in `flex_moba`. It gets positions in the rows of the cache, which do not
                count padding. With a ``score_mod``, a step on a GPU runs plain tensor operations
                instead of the decoding kernels, and reads the same blocks.
            gate: As in `moba_select`. With ``"tile"``, the query of every token must pass through
                `attend`, since the first query of a tile selects for all of the tile.
            sink_blocks: As in `moba_select`.
            local_blocks: As in `moba_select`.

        Returns:
            The output, ``(B, Hq, n, Dv)`` in the dtype of q, and the log-sum-exp, ``(B, Hq, n)``
            float32 (float64 for float64 q). They are 0 and -inf for padding, and NaN for a query
            beyond the capacity, which a replayed CUDA graph can make.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: Shapes, dtypes or the options of the gate do not fit, or ``gate="tile"``
                lacks the queries of earlier tokens.
            NotImplementedError: q requires gradients, or a chunk of more than 16 tokens has a
                ``score_mod`` inside ``torch.compile``.
        """
        check_queries(q, positions, self.k)
        check_no_gradients(q)
        check_topk(topk, none_allowed=True)
        check_options(scale, score_mod, None, None)
        check_gate(gate, sink_blocks, local_blocks, None, self.block_size, topk, is_causal=True)
        n_blocks = self.k.shape[2] // self.block_size
        topk = n_blocks if topk is None else min(topk, n_blocks)
        topk = max(topk, 1 + sink_blocks + local_blocks)
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        tile_queries = self._keep_tile_queries(q, positions) if gate == "tile" else None
        options = GateOptions(gate, sink_blocks, local_blocks, self.sub_blocks)
        call = CachedCall(topk, scale, options, self.block_size)
        tensors = CachedTensors(self.k, self.v, self.means, tile_queries)
        return cached_attention(q, positions, tensors, call, score_mod)

    def reset(self) -> None:
        """Removes all tokens and keeps the storage."""
        self.lengths.zero_()
        self._longest_row = self._tokens_without_tile_gate = 0

    def crop(self, length: int | Tensor) -> None:
        """Removes all tokens after the first ``length`` tokens of every row.

        Args:
            length: Tokens to keep: an int, or an integer tensor ``(B,)`` with one number per row. A
                row that is shorter stays as it is.

        Raises:
            TypeError: ``length`` is neither an int nor a tensor.
            ValueError: ``length`` is negative. A tensor is checked on CPU only; elsewhere negative
                numbers count as 0.
        """
        check_kept(length)
        if isinstance(length, Tensor):
            kept = length.to(self.lengths).clamp(min=0)
            self.lengths.copy_(torch.minimum(self.lengths, kept))
        else:
            self.lengths.clamp_(max=length)
            self._longest_row = min(self._longest_row, length)
            self._tokens_without_tile_gate = min(self._tokens_without_tile_gate, length)

    def reorder(self, rows: Tensor) -> None:
        """Replaces row ``i`` by a copy of the old row ``rows[i]``, as beam search needs.

        Args:
            rows: Row indices, ``(B,)`` int32 or int64. With another number of indices, the cache
                moves to new storage with that number of rows.
        """
        for name in ("k", "v", "means", "lengths", "_tile_queries"):
            x = getattr(self, name)
            if x is not None:
                moved = x.index_select(0, rows)
                if moved.shape == x.shape:
                    x.copy_(moved)
                else:
                    setattr(self, name, storage(moved.shape, x.dtype, x.device).copy_(moved))

    def check_tiles(self, heads: int, new: int = 0) -> None:
        """Raises unless the cache has the queries that ``gate="tile"`` needs.

        Args:
            heads: Query heads of the call.
            new: Tokens that were appended and not yet attended.

        Raises:
            ValueError: Earlier tokens were attended without that gate, or with another number of
                query heads.
        """
        if self._tokens_without_tile_gate > new:
            missing = self._tokens_without_tile_gate - new
            raise ValueError(
                f'gate="tile" needs the queries of all tokens, but {missing} came without it; use '
                "it from the first token on"
            )
        if self._tile_queries is not None and self._tile_queries.shape[1] != heads:
            raise ValueError(
                f"q must have the {self._tile_queries.shape[1]} heads of the earlier queries, got "
                f"{heads}; make another cache for queries with other heads"
            )

    def check_call(
        self,
        q: Tensor,
        k: Tensor,
        block_size: int,
        gate: GateOptions,
        *,
        is_causal: bool,
        impl: str,
        kernel_options: Mapping[str, Any] | None,
    ) -> None:
        """Raises unless the cache supports these arguments of `flex_moba`. Appends nothing.

        Raises:
            ValueError: Block sizes or lengths do not fit, or the call is not causal.
            NotImplementedError: The call needs gradients, or has options that a cache does not
                support.
        """
        sizes = {"block_size": block_size, "gate_block_size": block_size // gate.sub_blocks}
        for name, size in sizes.items():
            if size != getattr(self, name):
                raise ValueError(
                    f"{name} must be the {name} of the cache, {getattr(self, name)}, got {size}; "
                    "pass the same, or make another cache"
                )
        if q.shape[2] != k.shape[2]:
            raise ValueError(
                f"with a cache, q, k and v must hold the same new tokens, got Lq={q.shape[2]} and "
                f"Lk={k.shape[2]}; pass only the new tokens"
            )
        if not is_causal:
            raise ValueError("is_causal=False and cache cannot be combined; omit one of them")
        if impl != "auto":
            raise NotImplementedError(f'a cache does not support impl="{impl}"; use impl="auto"')
        if kernel_options:
            raise NotImplementedError("a cache does not support kernel_options; omit them")
        check_no_gradients(q)
        if gate.per == "tile":
            self.check_tiles(q.shape[1])

    def _make_room(self, n: int) -> None:
        # A compiled graph does not know the lengths, so its cache must have a fixed capacity.
        if torch.compiler.is_compiling():
            if self.grows:
                raise ValueError("a cache that grows cannot be compiled; make it with max_len")
            return
        if self._longest_row + n > self.capacity and has_values(self.lengths):
            self._longest_row = int(self.lengths.max())  # less after padding, or a crop by a tensor
        if self._longest_row + n <= self.capacity:
            return
        if not self.grows:
            if has_values(self.lengths):
                raise ValueError(
                    f"the cache has room for {self.capacity} tokens, of which {self._longest_row} "
                    f"are taken, so {n} more do not fit; make it with a larger max_len"
                )
            return
        blocks = -(-max(2 * self.capacity, self._longest_row + n) // self.block_size) + 1
        n_blocks = self.k.shape[2] // self.block_size
        for name in ("k", "v", "means", "_tile_queries"):
            x = getattr(self, name)
            if x is not None:
                size = blocks * (x.shape[2] // n_blocks)
                grown = storage((*x.shape[:2], size, x.shape[3]), x.dtype, x.device)
                grown[:, :, : x.shape[2]] = x
                setattr(self, name, grown)

    def _keep_tile_queries(self, q: Tensor, positions: Tensor) -> Tensor:
        batch, heads, n, dim = q.shape
        self.check_tiles(heads, n)
        self._tokens_without_tile_gate = 0
        if self._tile_queries is None:
            tiles = self.k.shape[2] // TILE
            self._tile_queries = storage((batch, heads, tiles, dim), q.dtype, q.device)
        is_first = (positions >= 0) & (positions < self.capacity) & (positions % TILE == 0)
        tile = torch.where(is_first, positions // TILE, self.capacity // TILE)
        self._tile_queries.scatter_(2, tile.long()[:, None, :, None].expand_as(q), q)
        return self._tile_queries
