"""`MobaCache`: the keys, values and mean keys of one attention layer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flexmoba.backends import ScoreMod
from flexmoba.blocks import TILE
from flexmoba.cache.append import append, next_positions
from flexmoba.cache.attention import CachedTensors, cached_attention
from flexmoba.cache.checks import check_like_cache, check_new, check_no_gradients
from flexmoba.cache.options import CachedCall
from flexmoba.cache.storage import storage
from flexmoba.checks import (
    GateName,
    check_block_size,
    check_gate,
    check_options,
    check_positive,
    check_topk,
)
from flexmoba.gate import GateOptions
from flexmoba.runtime import has_values, values_readable


class MobaCache:
    """Keys, values and the mean keys of full blocks, of one attention layer.

    Rows of the batch may differ in length: each is a sequence of its own, whose blocks are counted
    from its first token (arXiv 2502.13189, Sec. 2.2). A block's mean is computed once, when the
    block is full; the gate never needs that of the block that a query stands in. Pass the cache to
    `flex_moba` with q ``(B, Hq, Lq, D)``, k and v of new tokens, or call `append` and `attend`.

    Steps of at most 16 tokens wait for nothing on a GPU: with ``max_len`` given, they can be
    captured in a CUDA graph and compiled with ``mode="reduce-overhead"``, and never compile again
    as the sequence grows. They read the mean keys and the selected blocks only. Longer chunks read
    the lengths back to the host.

    Args:
        batch: Rows.
        kv_heads: KV heads.
        head_dim: Head dim ``D`` of the keys.
        block_size: Keys in a block, at least 1.
        value_dim: Head dim ``Dv`` of the values; ``head_dim`` by default.
        max_len: Tokens that each row has room for. None to grow as needed, by doubling.
        dtype: Of keys and values.
        device: Where they are.

    Raises:
        TypeError: A size is no integer.
        ValueError: A size is not positive.

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
            check_positive(name, size, "pass the size of what is to be kept")
        self.block_size = block_size
        self.grows = max_len is None
        # One block more, where padding goes: written, never read.
        n_blocks = -(-(max_len or 1) // block_size) + 1
        # Zeros, as what is not seen is multiplied by weights of 0.
        self.k, self.v, self.means = (
            storage((batch, kv_heads, length, dim), dtype, device)
            for length, dim in (
                (n_blocks * block_size, head_dim),
                (n_blocks * block_size, value_dim),
                (n_blocks, head_dim),
            )
        )
        self.lengths = storage((batch,), torch.int32, device)
        self._most = 0  # tokens of the longest row, or more; known without asking the device
        # Under gate="tile", the first query of every tile: it chooses for those still to come.
        self._tile_queries: Tensor | None = None
        self._untiled = 0  # tokens whose queries were not kept that way, or more

    @property
    def capacity(self) -> int:
        """Tokens that each row has room for; a multiple of the block size."""
        return self.k.shape[2] - self.block_size

    def next_positions(self, n: int, key_padding_mask: Tensor | None = None) -> Tensor:
        """Where `append` would put ``n`` new tokens: for what depends on that, such as rotation.

        In a compiled step take it from here, not from `lengths`: inductor may read these again
        when they have changed.

        Args:
            n: New tokens of every row.
            key_padding_mask: As in `append`.

        Returns:
            ``(B, n)`` int32; -1 for padding.
        """
        positions: Tensor = next_positions(self.lengths, n, key_padding_mask)
        return positions

    def append(self, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Adds new tokens to every row, and the means of the blocks that they fill.

        Args:
            k: New keys, ``(B, Hkv, n, D)``.
            v: New values, ``(B, Hkv, n, Dv)``.
            key_padding_mask: ``(B, n)`` bool, which of them are real; the others, wherever they
                stand, are left out. All of them by default.

        Returns:
            Where each token stands in its row, ``(B, n)`` int32; -1 for padding.

        Raises:
            ValueError: Shapes, dtypes or devices do not fit, or there is no room left.
            NotImplementedError: k or v requires gradients.
        """
        self._check(k, v, key_padding_mask)
        self._make_room(k.shape[2])
        if not torch.compiler.is_compiling():
            self._most += k.shape[2]
            self._untiled += k.shape[2]
        positions: Tensor = append(self.k, self.v, self.means, self.lengths, k, v, key_padding_mask)
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
        """Attention of new queries to their own and their best past blocks (Eq. 2 to 6).

        Args:
            q: ``(B, Hq, n, D)``.
            positions: What `append` returned for the same tokens, ``(B, n)`` int32.
            topk: Blocks that each query attends to, its own included; None for all of them.
            scale: Factor on the attention scores, ``1 / sqrt(D)`` by default.
            score_mod: As in `flex_moba`; it sees the positions in each row of the cache, which
                counts no padding. Without one, steps on a GPU run kernels that cannot call it:
                with one, they are plain tensor operations, which read the same blocks.
            gate: As in `moba_select`. With ``"tile"``, every token must come through `attend`, as
                the first query of a tile chooses for all of it.
            sink_blocks: As in `moba_select`.
            local_blocks: As in `moba_select`.

        Returns:
            The output ``(B, Hq, n, Dv)`` and the log-sum-exp ``(B, Hq, n)``. Queries of padding
            get zeros and -inf. A query beyond the capacity, as a replayed CUDA graph may make,
            gets NaN.

        Raises:
            TypeError: An argument is of the wrong type.
            ValueError: Shapes, dtypes or the gate's options do not fit, or tokens were added
                before ``gate="tile"`` could keep their tile's query.
            NotImplementedError: q requires gradients, or a chunk of more than 16 tokens has a
                ``score_mod`` inside ``torch.compile``.
        """
        batch, heads, n, dim = q.shape
        if (batch, dim) != self.k.shape[::3] or (batch, n) != positions.shape:
            raise ValueError(
                f"q must be ({self.k.shape[0]}, Hq, n, {self.k.shape[3]}) and positions "
                f"({self.k.shape[0]}, n) for this cache, got {tuple(q.shape)} and "
                f"{tuple(positions.shape)}"
            )
        if heads == 0 or heads % self.k.shape[1] != 0:
            raise ValueError(
                f"the number of query heads must be a positive multiple of the cache's "
                f"{self.k.shape[1]} KV heads, got {heads}"
            )
        check_like_cache("q", q, self.k)
        check_no_gradients(q)
        check_topk(topk, none_allowed=True)
        check_options(scale, score_mod, None, None)
        check_gate(gate, sink_blocks, local_blocks, None, self.block_size, topk, is_causal=True)
        n_blocks = self.means.shape[2]
        topk = n_blocks if topk is None else min(topk, n_blocks)  # no fewer are full attention
        topk = max(topk, 1 + sink_blocks + local_blocks)
        scale = dim**-0.5 if scale is None else float(scale)
        tile_queries = self._keep_tile_queries(q, positions) if gate == "tile" else None
        call = CachedCall(
            topk, scale, GateOptions(gate, sink_blocks, local_blocks), self.block_size
        )
        tensors = CachedTensors(self.k, self.v, self.means, tile_queries)
        return cached_attention(q, positions, tensors, call, score_mod)

    def reset(self) -> None:
        """Forgets all tokens."""
        self.lengths.zero_()
        self._most = self._untiled = 0

    def crop(self, length: int | Tensor) -> None:
        """Forgets all but the first ``length`` tokens of every row; an int, or ``(B,)`` ints.

        Raises:
            TypeError: ``length`` is neither.
            ValueError: It is negative. On other devices than CPU a tensor is not read, and what
                is negative counts as 0.
        """
        if isinstance(length, Tensor):
            if values_readable(length) and bool((length < 0).any()):
                raise ValueError(f"length must be at least 0, got {length.tolist()}")
            left = length.to(self.lengths).clamp(min=0)
            self.lengths.copy_(torch.minimum(self.lengths, left))
        elif isinstance(length, int):
            if length < 0:
                raise ValueError(f"length must be at least 0, got {length}")
            self.lengths.clamp_(max=length)
            self._most, self._untiled = min(self._most, length), min(self._untiled, length)
        else:
            raise TypeError(
                f"length must be an int or a tensor of ints, got {type(length).__name__}"
            )

    def reorder(self, rows: Tensor) -> None:
        """Makes row ``i`` what row ``rows[i]`` was, ``(B,)`` ints: for beam search.

        With another number of ints the cache has that many rows from then on, in new storage.
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
        """That ``gate="tile"`` can go on: it kept the queries of all but the ``new`` tokens.

        Raises:
            ValueError: Tokens came without that gate, or queries with another number of heads.
        """
        if self._untiled > new:
            raise ValueError(
                f'gate="tile" needs the queries of all tokens, but {self._untiled - new} came '
                "without it; use it from the first token on"
            )
        if self._tile_queries is not None and self._tile_queries.shape[1] != heads:
            raise ValueError(
                f"q must have the {self._tile_queries.shape[1]} heads of the tokens before, got "
                f"{heads}; other queries need a cache of their own"
            )

    def check_call(
        self,
        q: Tensor,
        k: Tensor,
        block_size: int,
        *,
        is_causal: bool,
        gate: str,
        impl: str,
        kernel_options: Mapping[str, Any] | None,
    ) -> None:
        """Raises unless a call of `flex_moba` may go through the cache; adds nothing to it.

        Raises:
            ValueError: Block sizes or lengths do not fit, or the call is not causal.
            NotImplementedError: The call needs gradients, or options that a cache does not take.
        """
        if self.block_size != block_size:
            raise ValueError(
                f"block_size must be that of the cache, {self.block_size}, got {block_size}"
            )
        if q.shape[2] != k.shape[2]:
            raise ValueError(
                f"with a cache, q, k and v are of the same new tokens, got Lq={q.shape[2]} and "
                f"Lk={k.shape[2]}"
            )
        if not is_causal:
            raise ValueError("is_causal=False and cache do not go together; leave one out")
        if impl != "auto":
            raise NotImplementedError(f'impl="{impl}" does not go with cache; use impl="auto"')
        if kernel_options:
            raise NotImplementedError("kernel_options do not go with cache; leave them out")
        check_no_gradients(q)
        if gate == "tile":
            self.check_tiles(q.shape[1])

    def _make_room(self, n: int) -> None:
        # Inside a compiled graph lengths are not known: there, room is made by `max_len`.
        if torch.compiler.is_compiling():
            if self.grows:
                raise ValueError("a cache that grows cannot be compiled; give it max_len")
            return
        if self._most + n > self.capacity and has_values(self.lengths):
            self._most = int(self.lengths.max())  # fewer, if rows were cropped, say
        if self._most + n <= self.capacity:
            return
        if not self.grows:
            if has_values(self.lengths):
                raise ValueError(
                    f"the cache has room for {self.capacity} tokens, of which {self._most} are "
                    f"taken, so {n} more do not fit; make it with a larger max_len"
                )
            return
        blocks = -(-max(2 * self.capacity, self._most + n) // self.block_size) + 1
        n_blocks = self.means.shape[2]
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
        self._untiled = 0
        if self._tile_queries is None:
            tiles = self.k.shape[2] // TILE
            self._tile_queries = storage((batch, heads, tiles, dim), q.dtype, q.device)
        starts = (positions >= 0) & (positions < self.capacity) & (positions % TILE == 0)
        tile = torch.where(starts, positions // TILE, self.capacity // TILE)
        self._tile_queries.scatter_(2, tile.long()[:, None, :, None].expand_as(q), q)
        return self._tile_queries

    def _check(self, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        check_new("k", k, self.k)
        check_new("v", v, self.v, k.shape[2])
        check_no_gradients(k, v)
        if mask is not None and (mask.shape != k.shape[::2] or mask.dtype != torch.bool):
            raise ValueError(
                f"key_padding_mask must be bool of shape {tuple(k.shape[::2])}, got {mask.dtype} "
                f"of shape {tuple(mask.shape)}"
            )
