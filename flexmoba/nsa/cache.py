"""`NsaCache`: the keys and values of the branches of one layer of Native Sparse Attention."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flexmoba.cache import (
    MAX_STEP_QUERIES,
    check_new_padding,
    check_new_tokens,
    check_no_gradients,
    check_queries,
    next_positions,
    storage,
)
from flexmoba.checks import check_options, check_positive, check_tensor
from flexmoba.nsa.append import append
from flexmoba.nsa.attention import NsaCall, attend_in_branches
from flexmoba.nsa.checks import check_gates, check_sizes, check_window
from flexmoba.nsa.decode import attend_step
from flexmoba.nsa.sizes import NsaSizes
from flexmoba.nsa.tensors import BranchTensors, CacheState, Compress


class NsaCache:
    """Cache of the keys and values of one attention layer of Native Sparse Attention.

    Each row of the batch is a separate sequence with its own length. The cache holds the keys and
    values of the selected branch, the compressed keys and values of the full compressed blocks, and
    the last keys and values of the window branch, in a ring (arXiv 2502.11089, Sec. 3.3). It keeps
    the last ``cmp_block - 1`` inputs of the compression of every row, and compresses a block when
    its last token arrives.

    A step of at most 16 tokens reads all compressed keys, and the keys and values of selected
    blocks and windows alone, on CUDA by Triton kernels. It does not synchronize a GPU with the
    host. A longer chunk copies the positions of its tokens to the host and computes `flex_nsa`
    once, or for each row if rows have different lengths or padding. The keys and values of the
    window branch of a chunk stay in memory until the next call of `append`.

    Args:
        batch: Rows ``B``.
        kv_heads: KV heads ``Hkv``.
        head_dim: Head dim ``D`` of the keys.
        value_dim: Head dim ``Dv`` of the values; ``head_dim`` by default.
        cmp_block: Tokens in a compressed block.
        cmp_stride: Distance of the first tokens of two consecutive compressed blocks.
        block_size: Keys in a block of the selected branch.
        window: Tokens in the window of a query, including its own; 0 for no window branch. The
            cache then keeps no keys and values of it.
        compress: A function of the keys ``(N, Hkv, cmp_block, D)``, the values ``(N, Hkv,
            cmp_block, Dv)`` and the positions of the first tokens ``(N,)`` of ``N`` compressed
            blocks. It returns their compressed keys ``(N, Hkv, 1, D)`` and values ``(N, Hkv, 1,
            Dv)``. The means by default.
        max_len: Capacity of each row in tokens, rounded up to full blocks. None to double the
            storage whenever it is full.
        dtype: Dtype of keys and values.
        device: Device of the cache.

    Attributes:
        lengths: Tokens in each row, ``(B,)`` int32.

    Raises:
        TypeError: A size is not an int.
        ValueError: A size is too small, or sizes do not match one another.

    Examples:
        >>> import torch
        >>> from flexmoba.nsa import NsaCache, flex_nsa
        >>> _ = torch.manual_seed(0)
        >>> q, k, v = torch.randn(3, 2, 4, 100, 16)
        >>> gates = torch.rand(2, 4, 100, 3)
        >>> cache = NsaCache(batch=2, kv_heads=4, head_dim=16, block_size=16)
        >>> outs = []
        >>> for part in (slice(0, 99), slice(99, 100)):
        ...     positions = cache.append(k[:, :, part], v[:, :, part])
        ...     out, _ = cache.attend(q[:, :, part], gates[:, :, part], positions, topk=4)
        ...     outs.append(out)
        >>> expected = flex_nsa(q, k, v, gates, block_size=16, topk=4)
        >>> torch.testing.assert_close(torch.cat(outs, dim=2), expected)
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        cmp_block: int = 32,
        cmp_stride: int = 16,
        block_size: int = 64,
        window: int = 512,
        compress: Compress | None = None,
        max_len: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Makes an empty cache."""
        self.sizes = NsaSizes(cmp_block, cmp_stride, block_size, 1, 0, 0)
        check_sizes(self.sizes)
        value_dim = head_dim if value_dim is None else value_dim
        numbers = {"batch": batch, "kv_heads": kv_heads, "head_dim": head_dim}
        numbers |= {"value_dim": value_dim, "max_len": 1 if max_len is None else max_len}
        for name, size in numbers.items():
            check_positive(name, size, "pass a number of rows, heads, features or tokens")
        check_window(window)
        self.window = window
        self.grows = max_len is None
        self._compress = compress
        self._branches = self._storage(
            (batch, kv_heads), (head_dim, value_dim), self.sizes.blocks(max_len or 1), dtype, device
        )
        tail = (batch, kv_heads, cmp_block - 1)
        # The last inputs of the compression, the last token last.
        self._tail = (
            storage((*tail, head_dim), dtype, device),
            storage((*tail, value_dim), dtype, device),
        )
        self.lengths = storage((batch,), torch.int32, device)
        # An upper bound of the length of the longest row, known without reading from the device.
        self._longest_row = 0
        self._appended = 0  # tokens of the last call of `append`
        # The keys and values of the windows of the last call, if it was a chunk.
        self._chunk: tuple[Tensor, Tensor] | None = None

    @property
    def capacity(self) -> int:
        """Tokens that each row can hold; a multiple of the block size."""
        return self._branches.k.shape[2] - self.sizes.block_size

    def append(
        self,
        k: Tensor,
        v: Tensor,
        *,
        k_cmp: Tensor | None = None,
        v_cmp: Tensor | None = None,
        k_win: Tensor | None = None,
        v_win: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Appends new tokens to every row, and compresses the compressed blocks that they fill.

        Args:
            k: New keys of the selected branch, ``(B, Hkv, n, D)`` in the dtype of the cache.
            v: New values of the selected branch, ``(B, Hkv, n, Dv)``.
            k_cmp: Inputs of the compression for each new token, ``(B, Hkv, n, D)``; k by default.
            v_cmp: Inputs of the compression, ``(B, Hkv, n, Dv)``; v by default.
            k_win: New keys of the window branch, ``(B, Hkv, n, D)``; k by default. Pass neither
                keys nor values of this branch to a cache with ``window=0``.
            v_win: New values of the window branch, ``(B, Hkv, n, Dv)``; v by default.
            key_padding_mask: ``(B, n)`` bool, True for real tokens. The cache omits the others.

        Returns:
            The position of each token in its row, ``(B, n)`` int32; -1 for padding.

        Raises:
            ValueError: Shapes, dtypes or devices do not fit, or the cache is full.
            NotImplementedError: A tensor requires gradients.
        """
        check_window(self.window, k_win, v_win)
        new = {"k": k, "v": v, "k_cmp": k if k_cmp is None else k_cmp}
        new |= {"v_cmp": v if v_cmp is None else v_cmp, "k_win": k if k_win is None else k_win}
        new |= {"v_win": v if v_win is None else v_win}
        n = k.shape[2]
        for name, x in new.items():
            cached = self._branches.k if name.startswith("k") else self._branches.v
            check_new_tokens(name, x, cached, None if name == "k" else n)
        check_no_gradients(*new.values())
        check_new_padding(key_padding_mask, k)
        self._make_room(n)
        if not torch.compiler.is_compiling():
            self._longest_row += n
        self._appended = n
        state = CacheState(self._branches, self._tail, self.lengths)
        tokens = BranchTensors(**new)
        options = self.sizes, self.window, self._compress
        positions, self._chunk = append(state, tokens, key_padding_mask, *options)
        return positions

    def attend(
        self,
        q: Tensor,
        gates: Tensor,
        positions: Tensor,
        *,
        topk: int = 16,
        sink_blocks: int = 1,
        local_blocks: int = 1,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Computes `flex_nsa` from new queries to the tokens of their rows up to each.

        Args:
            q: Queries of all tokens of the last call of `append`, ``(B, Hq, n, D)`` in the dtype of
                the cache.
            gates: Gate values, ``(B, Hq or 1, n, 3)``, as in `flex_nsa`.
            positions: The positions that `append` returned for these tokens, ``(B, n)`` int32.
            topk: As in `flex_nsa`.
            sink_blocks: As in `flex_nsa`.
            local_blocks: As in `flex_nsa`.
            scale: As in `flex_nsa`.

        Returns:
            The output, ``(B, Hq, n, Dv)`` in the dtype of q, and the log-sum-exps of the branches,
            ``(B, Hq, n, 3)`` float32 (float64 for float64 q); 0 and -inf for padding. In a step,
            both are NaN for positions beyond the capacity, which a CUDA graph may reach.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: Shapes, dtypes or options do not fit.
            NotImplementedError: q or the gate values require gradients.
        """
        sizes = self.sizes._replace(topk=topk, sink_blocks=sink_blocks, local_blocks=local_blocks)
        check_sizes(sizes)
        check_options(scale, None, None, None)
        check_tensor("q", q)
        check_queries(q, positions, self._branches.k)
        check_gates(q, gates)
        check_no_gradients(q, gates)
        if q.shape[2] != self._appended:
            raise ValueError(
                f"the last call of append had {self._appended} tokens, got {q.shape[2]} queries; "
                "attend from the tokens of each call before the next one"
            )
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        if q.shape[2] <= MAX_STEP_QUERIES:
            return attend_step(q, gates, positions, self._branches, sizes, self.window, scale)
        return self._attend_chunk(q, gates, positions, sizes, scale)

    def next_positions(self, n: int, key_padding_mask: Tensor | None = None) -> Tensor:
        """Returns the positions that `append` would give to ``n`` new tokens of every row.

        Args:
            n: New tokens of every row.
            key_padding_mask: As in `append`.

        Returns:
            Positions, ``(B, n)`` int32; -1 for padding.
        """
        positions: Tensor = next_positions(self.lengths, n, key_padding_mask)
        return positions

    def reset(self) -> None:
        """Removes all tokens and keeps the storage."""
        self.lengths.zero_()
        self._longest_row = self._appended = 0

    def reorder(self, rows: Tensor) -> None:
        """Replaces row ``i`` by a copy of the old row ``rows[i]``, as beam search needs.

        Args:
            rows: Row indices, ``(B,)`` int32 or int64.
        """
        for x in (*self._branches, *self._tail, self.lengths):
            x.copy_(x.index_select(0, rows))

    def _attend_chunk(
        self, q: Tensor, gates: Tensor, positions: Tensor, sizes: NsaSizes, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Computes `flex_nsa` for all rows at once if they are alike, or for each row."""
        lse_dtype = torch.promote_types(q.dtype, torch.float32)
        out = q.new_zeros((*q.shape[:3], self._branches.v.shape[3]))
        lse = q.new_full((*q.shape[:3], 3), float("-inf"), dtype=lse_dtype)
        positions_of_row = positions.tolist()
        rows = [(slice(i, i + 1), row) for i, row in enumerate(positions_of_row)]
        if all(row == positions_of_row[0] for row in positions_of_row):
            rows = [(slice(None), positions_of_row[0])]
        assert self._chunk is not None
        call = NsaCall(sizes, self.window, scale, "auto")
        for row, row_positions in rows:
            kv_len = max(row_positions) + 1
            if kv_len == 0:
                continue
            real = torch.tensor([x >= 0 for x in row_positions], device=q.device)
            k, v, k_cmp, v_cmp = (x[row] for x in self._branches[:4])
            end = self.window - 1 + sum(x >= 0 for x in row_positions)
            in_windows = slice(max(end - kv_len, 0), end)
            tensors = BranchTensors(
                *(x[:, :, :kv_len] for x in (k, v)),
                *(x[:, :, : sizes.compressed_blocks(kv_len)] for x in (k_cmp, v_cmp)),
                *(x[row, :, in_windows] for x in self._chunk),
            )
            results = attend_in_branches(q[row, :, real], gates[row, :, real], tensors, call)
            out[row, :, real], lse[row, :, real] = results
        return out, lse

    def _make_room(self, n: int) -> None:
        # A compiled graph does not know the lengths, so its cache must have a fixed capacity.
        if torch.compiler.is_compiling():
            if self.grows:
                raise ValueError("a cache that grows cannot be compiled; make it with max_len")
            return
        if self._longest_row + n > self.capacity:
            self._longest_row = int(self.lengths.max())  # less after padding
        if self._longest_row + n <= self.capacity:
            return
        if not self.grows:
            raise ValueError(
                f"the cache has room for {self.capacity} tokens, of which {self._longest_row} "
                f"are taken, so {n} more do not fit; make it with a larger max_len"
            )
        old = self._branches
        size = max(2 * self.capacity, self._longest_row + n)
        dims = old.k.shape[3], old.v.shape[3]
        blocks = self.sizes.blocks(size)
        self._branches = self._storage(old.k.shape[:2], dims, blocks, old.k.dtype, old.k.device)
        for grown, x in zip(self._branches, old, strict=True):
            grown[:, :, : x.shape[2]] = x  # with what nothing reads, since it is overwritten

    def _storage(
        self,
        rows: Sequence[int],
        dims: tuple[int, int],
        n_blocks: int,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> BranchTensors:
        """Returns zeros for ``n_blocks`` blocks, since masked values get weights of 0."""
        tokens = n_blocks * self.sizes.block_size
        # One more block, and compressed block, takes the writes of padding. Nothing reads it.
        length = tokens + self.sizes.block_size
        n_compressed = self.sizes.compressed_blocks(tokens) + 1
        # Keys in the windows of the queries of a step, and an entry that nothing reads.
        ring = self.window + MAX_STEP_QUERIES if self.window > 0 else 0
        lengths = (length, length, n_compressed, n_compressed, ring, ring)
        return BranchTensors(
            *(
                storage((*rows, length, dims[i % 2]), dtype, device)
                for i, length in enumerate(lengths)
            )
        )
