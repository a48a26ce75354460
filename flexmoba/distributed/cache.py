"""`ShardedMobaCache`: a cache whose blocks are spread over the ranks of a mesh."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flexmoba.backends import AttentionOptions, attend_selected, merge_two, resolve
from flexmoba.blocks import ceil_div
from flexmoba.cache import (
    MAX_STEP_QUERIES,
    CachedCall,
    check_new_tokens,
    check_no_gradients,
    has_kernels,
    storage,
)
from flexmoba.checks import (
    GateName,
    check_block_size,
    check_gate,
    check_gate_block_size,
    check_options,
    check_positive,
    check_queries_and_keys,
    check_topk,
)
from flexmoba.distributed.agreement import agree_on_lengths
from flexmoba.distributed.cyclic import CyclicBlocks
from flexmoba.distributed.ranks import Ranks, all_gather, all_to_all, check_lengths, check_mesh
from flexmoba.gate import (
    GateOptions,
    GateSizes,
    block_means,
    expand_rows,
    gate_rows,
    select_by_means,
)
from flexmoba.runtime import without_autocast
from flexmoba.sequence import Layout


class ShardedMobaCache:
    """Cache of one attention layer whose blocks are spread over the ranks of a mesh.

    Block ``i`` of the sequence (arXiv 2502.13189, Sec. 2.2) is on rank ``i % ranks``. Every rank
    also has the mean keys of all sub-blocks and the tokens of the last block that is not full. So
    each rank selects the same blocks without communication, attends to the selected blocks that it
    holds, and the ranks merge their partial outputs by the log-sum-exps.

    A prompt that is sharded over the ranks comes into the cache by `append_shard`. Further tokens,
    in chunks or one by one, come by `attend`, in which all ranks pass the same tokens. All rows of
    the batch have the same length. The cache has no gradients.

    Args:
        mesh: A mesh of one dimension, or one dimension of a larger mesh.
        batch: Rows ``B``.
        kv_heads: KV heads ``Hkv``.
        head_dim: Head dim ``D`` of the keys.
        block_size: Keys in a block, at least 1.
        gate_block_size: Keys in a sub-block, as in `moba_select`; ``block_size`` by default.
        max_len: Capacity of a row in tokens, on all ranks together.
        value_dim: Head dim ``Dv`` of the values; ``head_dim`` by default.
        dtype: Dtype of keys and values.
        device: Device of the cache; by default, the current device of the type of the mesh.

    Attributes:
        k: Keys of this rank's blocks, ``(B, Hkv, N_r * block_size, D)`` in ``dtype``.
        v: Values of this rank's blocks, ``(B, Hkv, N_r * block_size, Dv)`` in ``dtype``.
        means: Mean keys of the sub-blocks of all full blocks,
            ``(B, Hkv, N * block_size / gate_block_size, D)`` in ``dtype``.
        length: Tokens of a row, on all ranks together.

    Raises:
        TypeError: A size is not an int.
        ValueError: A size is not positive, ``gate_block_size`` does not divide ``block_size``, or
            the mesh has more than one dimension.

    Examples:
        One rank has all blocks.

        >>> import torch
        >>> import torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from flexmoba import flex_moba
        >>> from flexmoba.distributed import ShardedMobaCache, context_parallel_moba
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = init_device_mesh("cpu", (1,))
        >>> q, k, v = torch.randn(3, 1, 2, 101, 16)
        >>> cache = ShardedMobaCache(mesh, 1, 2, 16, block_size=8, max_len=200)
        >>> prompt_q, prompt_k, prompt_v = (x[:, :, :100] for x in (q, k, v))
        >>> out = context_parallel_moba(prompt_q, prompt_k, prompt_v, 8, 3, mesh=mesh)
        >>> cache.append_shard(prompt_k, prompt_v)
        >>> new_q, new_k, new_v = (x[:, :, 100:] for x in (q, k, v))
        >>> last, lse = cache.attend(new_q, new_k, new_v, topk=3)
        >>> torch.testing.assert_close(last, flex_moba(q, k, v, 8, 3)[:, :, 100:])
        >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        batch: int,
        kv_heads: int,
        head_dim: int,
        *,
        block_size: int,
        gate_block_size: int | None = None,
        max_len: int,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Makes an empty cache."""
        check_mesh(mesh)
        check_block_size(block_size)
        value_dim = head_dim if value_dim is None else value_dim
        sizes = {"batch": batch, "kv_heads": kv_heads, "head_dim": head_dim}
        for name, size in (sizes | {"value_dim": value_dim, "max_len": max_len}).items():
            check_positive(name, size, "pass a number of rows, heads, features or tokens")
        self.sub_blocks = check_gate_block_size(gate_block_size, block_size)
        self.mesh, self.block_size, self.max_len, self.length = mesh, block_size, max_len, 0
        self._rank, self._ranks = mesh.get_local_rank(), mesh.size()
        self._blocks = CyclicBlocks(self._rank, self._ranks, block_size)
        device = mesh.device_type if device is None else device
        blocks = ceil_div(max_len, block_size)
        mine = ceil_div(blocks, self._ranks) * block_size
        shape = (batch, kv_heads)
        self.k = storage((*shape, mine, head_dim), dtype, device)
        self.v = storage((*shape, mine, value_dim), dtype, device)
        self.means = storage((*shape, blocks * self.sub_blocks, head_dim), dtype, device)
        # The keys and values of the last block, on every rank.
        self._last = [storage((*shape, 0, dim), dtype, device) for dim in (head_dim, value_dim)]

    @property
    def gate_block_size(self) -> int:
        """Keys in a sub-block; the gate scores the mean key of each sub-block."""
        return self.block_size // self.sub_blocks

    def append_shard(self, k: Tensor, v: Tensor, *, lengths: Sequence[int] | None = None) -> None:
        """Appends tokens of which each rank has a shard, such as those of a prompt.

        Each rank sends its keys and values to the ranks of their blocks, one KV head at a time.

        Args:
            k: This rank's new keys, ``(B, Hkv, L_r, D)`` in the dtype of the cache.
            v: This rank's new values, ``(B, Hkv, L_r, Dv)`` in the dtype of the cache.
            lengths: The number of new tokens of each rank; without it, the ranks exchange them.

        Raises:
            ValueError: The arguments of a rank do not fit, or the cache is full.
            NotImplementedError: k or v requires gradients.
        """
        if lengths is None:
            lengths = agree_on_lengths(k, self.mesh, lambda: self._check(k, v))
        else:
            self._check(k, v)
            check_lengths(lengths, k.shape[2], self.mesh)
        ranks = Ranks(self.mesh.get_group(), self._rank, tuple(lengths))
        self._check_room(ranks.total)
        bounds = [self.length + x for x in (*ranks.firsts, ranks.total)]
        begin, end = bounds[self._rank], bounds[self._rank + 1]
        size = k.shape[0] * (k.shape[3] + v.shape[3])  # elements of a token of one KV head
        keys_before = self._blocks.keys_before
        sent = [size * (keys_before(end, r) - keys_before(begin, r)) for r in range(self._ranks)]
        mine = [keys_before(x, self._rank) for x in bounds]
        received = [size * (last - first) for first, last in pairwise(mine)]
        # On the device, because the host would take longer to sort than the exchange.
        order = self._blocks.owners(torch.arange(begin, end, device=k.device)).argsort(stable=True)
        for head in range(k.shape[1]):
            both = torch.cat([k[:, head], v[:, head]], dim=-1).transpose(0, 1)  # (L, B, D + Dv)
            parts = both.index_select(0, order).flatten()
            exchange = all_to_all(parts, sent, received, ranks.group)
            found = exchange.wait().view(-1, *both.shape[1:]).transpose(0, 1)
            # The tokens of this rank are adjacent in its storage, in the order of positions.
            self.k[:, head, mine[0] : mine[-1]] = found[..., : k.shape[3]]
            self.v[:, head, mine[0] : mine[-1]] = found[..., k.shape[3] :]
        first = self.length // self.block_size
        self.length += ranks.total
        self._share_means(first, self.length // self.block_size)
        self._share_last_block()

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        topk: int | None,
        *,
        scale: float | None = None,
        gate: GateName = "token",
        sink_blocks: int = 0,
        local_blocks: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Appends new tokens, which all ranks pass, and attends from them (Eq. 2 to 6).

        Args:
            q: Queries of the new tokens, ``(B, Hq, n, D)`` in the dtype of the cache.
            k: Keys of the new tokens, ``(B, Hkv, n, D)``.
            v: Values of the new tokens, ``(B, Hkv, n, Dv)``.
            topk: Blocks that each query attends to, its own block included; None for all blocks.
            scale: Factor on the attention scores, ``1 / sqrt(D)`` by default.
            gate: ``"token"`` or ``"group"``, as in `flex_moba`.
            sink_blocks: As in `flex_moba`.
            local_blocks: As in `flex_moba`.

        Returns:
            The output, ``(B, Hq, n, Dv)`` in the dtype of q, and the log-sum-exp, ``(B, Hq, n)``
            float32 (float64 for float64 q), the same on all ranks.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: Shapes, dtypes or devices do not fit, or the cache is full.
            NotImplementedError: An argument requires gradients, or the gate is ``"tile"``.
        """
        self._check(k, v)
        check_queries_and_keys(q, k)
        check_no_gradients(q)
        check_topk(topk, none_allowed=True)
        check_options(scale, None, None, None)
        check_gate(gate, sink_blocks, local_blocks, None, self.block_size, topk, is_causal=True)
        if gate == "tile":
            raise NotImplementedError(
                'a ShardedMobaCache does not support gate="tile"; use gate="token" or "group"'
            )
        self._check_room(k.shape[2])
        if k.shape[2] == 0:
            return _nothing(q, v)
        keys, values = self._append(k, v)
        scale = q.shape[3] ** -0.5 if scale is None else float(scale)
        options = GateOptions(gate, sink_blocks, local_blocks, self.sub_blocks)
        capacity = ceil_div(self.max_len, self.block_size)
        topk = max(1 + options.forced, min(capacity if topk is None else topk, capacity))
        call = CachedCall(topk, scale, options, self.block_size)
        with torch.no_grad():
            if self._has_kernels(q, call):
                return self._merged(*self._attend_step(q, call))
            n_blocks = ceil_div(self.length, self.block_size)
            call = call._replace(topk=max(1 + options.forced, min(topk, n_blocks)))
            own = self._attend_to_own_blocks(q, keys, values, scale)
            past = self._attend_to_past_blocks(q, call)
            return self._merged(*merge_two(*own, *past))

    def reset(self) -> None:
        """Removes all tokens and keeps the storage."""
        self.length = 0
        self._last = [x[:, :, :0] for x in self._last]

    def _append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends tokens that all ranks have, and returns them with the block where they begin."""
        size, first, end = self.block_size, self.length // self.block_size, self.length + k.shape[2]
        start, stop = (self._blocks.keys_before(x, self._rank) for x in (self.length, end))
        if start < stop:
            # Computed on the device, because the host would wait for a copy of indices.
            source = self._blocks.positions(start, stop, k.device) - self.length
            self.k[:, :, start:stop] = k.index_select(2, source)
            self.v[:, :, start:stop] = v.index_select(2, source)
        keys, values = (torch.cat(x, 2) for x in zip(self._last, (k, v), strict=True))
        self.length, full = end, end // size - first
        self._last = [keys, values]
        if full > 0:
            means = block_means(keys[:, :, : full * size], size, sub_blocks=self.sub_blocks)
            self._means_of(first, first + full).copy_(means)
            self._last = [x[:, :, full * size :].clone() for x in self._last]
        return keys, values

    def _has_kernels(self, q: Tensor, call: CachedCall) -> bool:
        """Returns whether the kernels of `MobaCache` support a call."""
        if q.shape[2] > MAX_STEP_QUERIES or not has_kernels(q, self.v):
            return False
        from flexmoba.cache.kernels import MAX_TOPK

        return call.topk <= MAX_TOPK

    def _attend_step(self, q: Tensor, call: CachedCall) -> tuple[Tensor, Tensor]:
        """Attends to the selected blocks that are on this rank, by the kernels of `MobaCache`."""
        from flexmoba.cache.kernels import attend_to_selected_on_cuda

        positions, selected = self._select_step(q, call)
        mine, n_blocks = self._blocks.on_this_rank(selected), self.means.shape[2] // self.sub_blocks
        return attend_to_selected_on_cuda(q, self.k, self.v, positions, mine, n_blocks, call)

    def _select_step(self, q: Tensor, call: CachedCall) -> tuple[Tensor, Tensor]:
        """Returns the positions of the queries, and their selected blocks, on every rank the same.

        The first column of the selection is the own block.
        """
        from flexmoba.cache.kernels import select_step_on_cuda

        first, rows = self.length - q.shape[2], gate_rows(q, self.k.shape[1], call.gate)
        positions = torch.arange(first, self.length, dtype=torch.int32, device=q.device)
        positions = positions.repeat(q.shape[0], 1)
        return positions, select_step_on_cuda(rows, self.means, positions, call)

    def _attend_to_own_blocks(
        self, q: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attends from the queries whose own blocks are on this rank to these blocks."""
        n, first = q.shape[2], (self.length - q.shape[2]) // self.block_size
        block = torch.arange(self.length - n, self.length) // self.block_size
        is_mine = block % self._ranks == self._rank
        if not is_mine.any():
            return _nothing(q, values)
        selected = torch.where(is_mine, block - first, -1).int().to(q.device)
        return self._attend_selected(q, keys, values, selected[:, None], scale, is_causal=True)

    def _attend_to_past_blocks(self, q: Tensor, call: CachedCall) -> tuple[Tensor, Tensor]:
        """Attends to the selected past blocks that are on this rank."""
        full = self.length // self.block_size
        mine = (full - self._rank + self._ranks - 1) // self._ranks
        if mine == 0 or call.topk == 1:
            return _nothing(q, self.v)
        selected = self._select_past_blocks(q, call)
        selected = expand_rows(selected, q.shape[1], q.shape[2], call.gate)
        selected = self._blocks.on_this_rank(selected)
        k, v = (x[:, :, : mine * self.block_size] for x in (self.k, self.v))
        return self._attend_selected(q, k, v, selected, call.scale, is_causal=False)

    def _select_past_blocks(self, q: Tensor, call: CachedCall) -> Tensor:
        """Selects the past blocks of each row of the gate, on every rank the same."""
        rows, means = gate_rows(q, self.k.shape[1], call.gate), self.means
        if not q.is_cuda:  # the kernel of the gate reads only past blocks, and would copy a part
            means = self._means_of(0, self.length // self.block_size)
        first = self.length - q.shape[2]
        sizes = GateSizes(self.block_size, call.topk - 1, first, is_causal=True)
        return without_autocast(select_by_means)(rows, means, sizes, call.gate)

    def _attend_selected(
        self, q: Tensor, k: Tensor, v: Tensor, selected: Tensor, scale: float, *, is_causal: bool
    ) -> tuple[Tensor, Tensor]:
        impl = resolve("auto", q, k, v, None, None)
        options = AttentionOptions(impl, scale, is_causal)
        selected = selected.expand(*q.shape[:3], -1)
        return attend_selected(q, k, v, selected, Layout(self.block_size), options, None)

    def _merged(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Merges the partial outputs of all ranks, in their order."""
        if self._ranks == 1:
            return out, lse
        group = self.mesh.get_group()
        pending = [all_gather(x.contiguous(), group, self._ranks) for x in (out, lse)]
        outs, lses = (x.wait() for x in pending)
        total = lses.logsumexp(0)
        weighted = outs.to(lses.dtype) * (lses - total).exp()[..., None]
        return weighted.sum(0).to(out.dtype), total

    def _share_means(self, first: int, end: int) -> None:
        """Computes the mean keys of blocks ``first`` to ``end - 1``, each on one rank."""
        if first == end:
            return
        size, ranks, group = self.block_size, self._ranks, self.mesh.get_group()
        # As many blocks on each rank, which may include blocks before and after these.
        begin, stop = first // ranks, ceil_div(end, ranks)
        keys = self.k[:, :, begin * size : stop * size]
        mine = block_means(keys, size, sub_blocks=self.sub_blocks)
        wanted = slice(first - begin * ranks, end - begin * ranks)
        for head in range(self.k.shape[1]):  # to hold little beside the cache
            found = all_gather(mine[:, head].contiguous(), group, ranks).wait()
            in_order = rearrange(found, "r b (n s) d -> b (n r) s d", s=self.sub_blocks)
            self._means_of(first, end)[:, head] = in_order[:, wanted].flatten(1, 2)

    def _share_last_block(self) -> None:
        """Sends the tokens of the last block, which is not full, to all ranks."""
        block, count = divmod(self.length, self.block_size)
        owner, start = block % self._ranks, block // self._ranks * self.block_size
        self._last = [x[:, :, :0] for x in self._last]
        if count == 0:
            return
        group: Any = self.mesh.get_group()
        self._last = [x[:, :, start : start + count].clone() for x in (self.k, self.v)]
        for x in self._last:  # copies, also of one KV head, because the ranks receive into them
            dist.broadcast(x, group=group, group_src=owner)

    def _means_of(self, first: int, end: int) -> Tensor:
        """Returns the mean keys of blocks ``first`` to ``end - 1``, a view."""
        return self.means[:, :, first * self.sub_blocks : end * self.sub_blocks]

    def _check(self, k: Tensor, v: Tensor) -> None:
        check_new_tokens("k", k, self.k)
        check_new_tokens("v", v, self.v, k.shape[2])
        check_no_gradients(k, v)

    def _check_room(self, n: int) -> None:
        if self.length + n > self.max_len:
            raise ValueError(
                f"the cache has room for {self.max_len} tokens, of which {self.length} are taken, "
                f"so {n} more do not fit; make it with a larger max_len"
            )


def _nothing(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the partial output of queries that attend to no key."""
    out = q.new_zeros((*q.shape[:3], v.shape[3]))
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return out, torch.full(q.shape[:3], float("-inf"), dtype=lse_dtype, device=q.device)
