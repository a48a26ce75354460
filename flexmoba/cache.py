"""A cache of keys, values and mean keys: prefill in chunks, and decoding that stays sparse.

Inference only; nothing here is differentiable.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest

from flexmoba.attention import selected_attention
from flexmoba.checks import (
    GateName,
    check_block_size,
    check_gate,
    check_like_cache,
    check_new,
    check_no_gradients,
    check_options,
    check_positive,
    check_topk,
    has_values,
    values_readable,
)
from flexmoba.decode import FEW, NO_ROOM, attend_few, has_kernels
from flexmoba.gate import (
    GATE_TILE,
    Gate,
    gate_queries,
    own_block,
    select_by_means,
    shared_out,
)
from flexmoba.precision import without_autocast
from flexmoba.score_mod import ScoreMod


def storage(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """Zeros that may be written to in and out of ``torch.inference_mode``."""
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=dtype, device=device)


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
        positions: Tensor = _next_positions(self.lengths, n, key_padding_mask)
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
        positions: Tensor = _append(
            self.k, self.v, self.means, self.lengths, k, v, key_padding_mask
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
        tensors = q, self.k, self.v, self.means, positions, tile_queries
        options = self.block_size, topk, scale, gate, sink_blocks, local_blocks
        if score_mod is None:
            out, lse = _attend(*tensors, *options)
            return out, lse
        if n > FEW and not has_values(positions):
            raise NotImplementedError(
                f"a chunk of {n} tokens with score_mod reads lengths back to the host, which "
                f"torch.compile and fake tensors do not take; trace steps of at most {FEW} tokens"
            )
        return _attend_cached(*tensors, *options, score_mod)

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
            tiles = self.k.shape[2] // GATE_TILE
            self._tile_queries = storage((batch, heads, tiles, dim), q.dtype, q.device)
        starts = (positions >= 0) & (positions < self.capacity) & (positions % GATE_TILE == 0)
        tile = torch.where(starts, positions // GATE_TILE, self.capacity // GATE_TILE)
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


# An operator of its own, as inductor computes an expression of lengths anew wherever it is used:
# also after `_append` has changed them.
@torch.library.custom_op("flexmoba::next_positions", mutates_args=())
def _next_positions(lengths: Tensor, n: int, mask: Tensor | None) -> Tensor:
    if mask is None:
        return lengths[:, None] + torch.arange(n, device=lengths.device, dtype=torch.int32)
    return torch.where(mask, lengths[:, None] + mask.cumsum(1, dtype=torch.int32) - 1, -1)


@_next_positions.register_fake
def _(lengths: Tensor, n: int, mask: Tensor | None) -> Tensor:
    return lengths.new_empty(lengths.shape[0], n)


@torch.library.custom_op(
    "flexmoba::append", mutates_args=("k_cache", "v_cache", "means", "lengths")
)
@without_autocast
def _append(
    k_cache: Tensor,
    v_cache: Tensor,
    means: Tensor,
    lengths: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
) -> Tensor:
    if k.shape[2] <= FEW and mask is None and has_kernels(k, v):
        from flexmoba.decode_kernels import append_few_on_cuda

        return append_few_on_cuda(k_cache, v_cache, means, lengths, k, v)
    return _append_scattered(k_cache, v_cache, means, lengths, k, v, mask)


def _append_scattered(
    k_cache: Tensor,
    v_cache: Tensor,
    means: Tensor,
    lengths: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
) -> Tensor:
    n_blocks, n = means.shape[2], k.shape[2]
    block_size = k_cache.shape[2] // n_blocks
    spare = (n_blocks - 1) * block_size
    before = lengths.clone()
    positions = _next_positions(before, n, mask)
    lengths += n if mask is None else mask.sum(1, dtype=torch.int32)
    fits = (positions >= 0) & (positions < spare)
    at = torch.where(fits, positions, spare).long()[:, None, :, None]
    k_cache.scatter_(2, at.expand_as(k), k)
    v_cache.scatter_(2, at.expand_as(v), v)
    positions = torch.where(positions < spare, positions, NO_ROOM)

    # The blocks that these tokens may have filled.
    block = before[:, None] // block_size + torch.arange(n // block_size + 1, device=k.device)
    full = ((block + 1) * block_size <= lengths[:, None]) & (block < n_blocks - 1)
    block = torch.where(full, block, n_blocks - 1)
    row = torch.arange(k.shape[0], device=k.device)[:, None]
    precise = torch.promote_types(k.dtype, torch.float32)
    filled = k_cache.unflatten(2, (n_blocks, block_size))[row, :, block]
    means[row, :, block] = filled.mean(3, dtype=precise).to(k.dtype)
    return positions


@_append.register_fake
def _(
    k_cache: Tensor,
    v_cache: Tensor,
    means: Tensor,
    lengths: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
) -> Tensor:
    return lengths.new_empty(k.shape[0], k.shape[2])


@without_autocast
def _attend_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    positions: Tensor,
    tile_queries: Tensor | None,
    block_size: int,
    topk: int,
    scale: float,
    per: str,
    sink_blocks: int,
    local_blocks: int,
    score_mod: ScoreMod | None = None,
) -> tuple[Tensor, Tensor]:
    gate = Gate(per, sink_blocks, local_blocks)
    # Longer chunks are sorted by block, like any other call, a row of the batch at a time.
    if q.shape[2] <= FEW:
        if tile_queries is None:
            choosing = gate_queries(q, k.shape[1], gate)
        else:
            tile = positions.clamp(0, k.shape[2] - 1).long() // GATE_TILE
            choosing = tile_queries.gather(2, tile[:, None, :, None].expand_as(q))
        return attend_few(
            q, k, v, means, positions, choosing, block_size, topk, scale, gate, score_mod
        )
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = torch.full_like(
        out[..., 0], float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32)
    )
    here = positions.tolist()
    same = all(row == here[0] for row in here) and -1 not in here[0]
    rows = [slice(None)] if same else [slice(row, row + 1) for row in range(len(here))]
    for row in rows:
        real = positions[row][0] >= 0
        queries = q[row] if same else q[row, :, real]
        if queries.numel() == 0:
            continue
        kv_len = max(here[row.start or 0]) + 1
        if kv_len > k.shape[2]:
            raise ValueError(
                f"the cache has room for {k.shape[2] - block_size} tokens, too few for these; "
                "make it with a larger max_len"
            )
        blocks = -(-kv_len // block_size)
        first = kv_len - queries.shape[2]
        place = first % gate.stride  # of the first query in its tile
        if tile_queries is None:
            choosing = gate_queries(queries, k.shape[1], gate)
        else:
            choosing = tile_queries[row, :, first // GATE_TILE : -(-kv_len // GATE_TILE)]
        past = select_by_means(
            choosing, means[row, :, :blocks], first - place, block_size, topk - 1, gate, True
        )
        past = shared_out(past, q.shape[1], queries.shape[2], gate, first_query=place)
        own = own_block(queries.shape[2], kv_len, block_size, q.device)[:, None]
        selection = torch.cat([own.expand(*past.shape[:3], 1), past], -1)
        result: Any = selected_attention(
            queries,
            k[row, :, :kv_len],
            v[row, :, :kv_len],
            selection,
            block_size,
            scale=scale,
            score_mod=score_mod if same else _of_row(score_mod, row.start),
            return_aux=AuxRequest(lse=True),
        )
        part, part_lse = result[0], result[1].lse
        if same:
            return part, part_lse
        out[row, :, real], lse[row, :, real] = part, part_lse
    return out, lse


@functools.lru_cache(maxsize=256)  # the same function again is not compiled again
def _of_row(score_mod: ScoreMod | None, row: int) -> ScoreMod | None:
    """A ``score_mod`` for a call with this row of the batch alone."""
    if score_mod is None:
        return None
    return lambda score, b, h, query, key: score_mod(score, b + row, h, query, key)


# Opaque to compilers: what it launches depends on lengths, where there are many queries.
@torch.library.custom_op("flexmoba::attend_cached", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    positions: Tensor,
    tile_queries: Tensor | None,
    block_size: int,
    topk: int,
    scale: float,
    per: str,
    sink_blocks: int,
    local_blocks: int,
) -> tuple[Tensor, Tensor]:
    return _attend_cached(
        *(q, k, v, means, positions, tile_queries),
        *(block_size, topk, scale, per, sink_blocks, local_blocks),
    )


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=lse_dtype)
