"""The exchange by blocks: each rank gets only the blocks that its queries selected.

All ranks know the mean keys of all blocks, so each rank selects the blocks of its queries first.
Then it asks the ranks before for the selected blocks. The number of these blocks depends on the
data, so the host waits for the device.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexmoba.backends import AttentionOptions, attend, resolve
from flexmoba.blocks import ceil_div
from flexmoba.checks import check_gate_block_size
from flexmoba.distributed.attend import Attention
from flexmoba.distributed.gather import arranged, chunks_of, start_gathering
from flexmoba.distributed.plan import plan_of
from flexmoba.distributed.ranks import Pending, Ranks, all_to_all
from flexmoba.gate import (
    GateOptions,
    GateSizes,
    block_means,
    expand_rows,
    gate_rows,
    select_by_means,
)
from flexmoba.local import empty
from flexmoba.runtime import without_autocast
from flexmoba.selection import BlockSelection
from flexmoba.sequence import Layout


class _Fetch(NamedTuple):
    """The blocks of a chunk of KV heads that ranks send to each other.

    Attributes:
        ranks: The ranks.
        block_size: Keys in a block.
        sent: For each rank, the indices of the blocks of this rank that it gets.
        counts: For each rank, the number of blocks that this rank gets from it.
    """

    ranks: Ranks
    block_size: int
    sent: list[Tensor]
    counts: list[int]

    def sizes(self, elements: int) -> tuple[list[int], list[int]]:
        """Returns the elements for and from each rank, given the elements of a block."""
        return [elements * len(x) for x in self.sent], [elements * n for n in self.counts]


def attend_by_blocks(
    q: Tensor, k: Tensor, v: Tensor, attention: Attention, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Computes the attention of this rank's queries; see `context_parallel_moba`.

    Args:
        q: This rank's queries, ``(B, Hq, L, D)``.
        k: This rank's keys, ``(B, Hkv, L, D)``.
        v: This rank's values, ``(B, Hkv, L, Dv)``.
        attention: The attention, with a topk and without a ``score_mod``.
        ranks: The ranks, which begin at multiples of the block size.

    Returns:
        The output ``(B, Hq, L, Dv)`` and the log-sum-exp ``(B, Hq, L)``.
    """
    selected, n_blocks = _selected(q, k, attention, ranks)
    sizes, group = [end - first for first, end in chunks_of(k, v, ranks)], q.shape[1] // k.shape[1]
    wanted = torch.stack(
        [_wanted(x, n_blocks) for x in selected.split([n * group for n in sizes], 1)]
    )
    fetches = _agreed(wanted, attention.block_size, ranks)
    keys, values = k.split(sizes, 1), v.split(sizes, 1)
    results, first = [], 0
    following = _start_fetching(keys[0].detach(), values[0].detach(), fetches[0])
    for i, queries in enumerate(q.split([n * group for n in sizes], 1)):
        received = following.wait()
        if i + 1 < len(sizes):
            following = _start_fetching(
                keys[i + 1].detach(), values[i + 1].detach(), fetches[i + 1]
            )
        fetched: tuple[Tensor, Tensor]
        fetched = _Fetched.apply(keys[i], values[i], received, fetches[i])  # type: ignore[no-untyped-call]
        heads = slice(first, first + queries.shape[1])
        local = _renumbered(selected[:, heads], wanted[i], attention.block_size, ranks)
        results.append(_attend(queries, *fetched, local, attention))
        first = heads.stop
    out, lse = (torch.cat(x, 1) for x in zip(*results, strict=True))
    return out, lse


def why_not_blocks(
    attention: Attention, lengths: tuple[int, ...], *, has_documents: bool
) -> str | None:
    """Returns the reason why ``"blocks"`` does not support a call, or None if it does."""
    if attention.topk is None:
        return "needs a topk, got None"
    if has_documents:
        return "does not support cu_seqlens"
    if attention.score_mod is not None:
        return "does not support score_mod"
    if attention.options["gate"] == "tile":
        return 'does not support gate="tile"'
    first = 0
    for length in lengths:
        if length > 0 and first % attention.block_size:
            return (
                f"needs shards that begin at multiples of block_size={attention.block_size}, got "
                f"lengths {list(lengths)}"
            )
        first += length
    return None


# ---- The selection ------------------------------------------------------------------------------


@torch.no_grad()
def _selected(q: Tensor, k: Tensor, attention: Attention, ranks: Ranks) -> tuple[Tensor, int]:
    """Returns the past blocks of each query, ``(B, Hq, L, T)`` int32, and the number of blocks."""
    size, options = attention.block_size, attention.options
    sub_blocks = check_gate_block_size(options["gate_block_size"], size)
    gate = GateOptions(options["gate"], options["sink_blocks"], options["local_blocks"], sub_blocks)
    full = k[:, :, : k.shape[2] // size * size]
    means = block_means(full, size, sub_blocks=sub_blocks)
    counts = Ranks(ranks.group, ranks.rank, tuple(n // size * sub_blocks for n in ranks.lengths))
    plan = plan_of(counts, (0,) * ranks.size, None, None)  # all mean keys before
    nothing = means[..., :0]
    before, _ = arranged(start_gathering(means, nothing, plan).wait(), means, nothing, plan)
    n_blocks = ceil_div(ranks.first + ranks.length, size)
    assert attention.topk is not None
    topk = max(1, min(attention.topk, n_blocks))
    sizes = GateSizes(size, topk - 1, ranks.first, is_causal=True)
    rows = gate_rows(q, k.shape[1], gate)
    selected = without_autocast(select_by_means)(rows, before, sizes, gate)
    return expand_rows(selected, q.shape[1], q.shape[2], gate), ranks.total // size


def _wanted(selected: Tensor, n_blocks: int) -> Tensor:
    """Returns which blocks any query selects, ``(blocks,)`` bool."""
    found = torch.zeros(n_blocks + 1, dtype=torch.bool, device=selected.device)
    found[selected.flatten().long()] = True  # -1 is the last element
    return found[:-1]


def _agreed(wanted: Tensor, block_size: int, ranks: Ranks) -> list[_Fetch]:
    """Sends to each rank which of its blocks this rank wants, ``(chunks, blocks)`` bool."""
    chunks = wanted.shape[0]
    blocks = [length // block_size for length in ranks.lengths]
    asked = [x if rank < ranks.rank else x[:, :0] for rank, x in enumerate(wanted.split(blocks, 1))]
    mine = blocks[ranks.rank]
    received = [0] * (ranks.rank + 1) + [chunks * mine] * (ranks.size - ranks.rank - 1)
    sizes = [x.numel() for x in asked]
    parts = torch.cat([x.flatten() for x in asked]).to(torch.uint8)
    found = all_to_all(parts, sizes, received, ranks.group).wait()
    on_host = torch.cat([parts, found]).cpu().bool()  # the only wait for the device
    of_ranks = on_host.split([*sizes, *received])
    own, others = of_ranks[: ranks.size], of_ranks[ranks.size :]
    counts = [x.view(chunks, -1).sum(1).tolist() if x.numel() else [0] * chunks for x in own]
    sent = [x.view(chunks, mine) if x.numel() else x.view(1, 0).expand(chunks, 0) for x in others]
    return [
        _Fetch(
            ranks,
            block_size,
            [x[chunk].nonzero()[:, 0].to(wanted.device) for x in sent],
            [count[chunk] for count in counts],
        )
        for chunk in range(chunks)
    ]


def _renumbered(selected: Tensor, wanted: Tensor, block_size: int, ranks: Ranks) -> Tensor:
    """Returns the selection with indices among the fetched blocks and then those of this rank."""
    first = ranks.first // block_size
    is_there = wanted.clone()
    is_there[first:] = True
    index = is_there.cumsum(0, dtype=torch.int32) - 1
    index = torch.cat([index, index.new_full((1,), -1)])  # of -1
    return index[selected.long()]


# ---- The exchange -------------------------------------------------------------------------------


def _start_fetching(k: Tensor, v: Tensor, fetch: _Fetch) -> Pending:
    """Starts to send the blocks that other ranks selected, keys and values side by side."""
    batch, heads, length, dim = k.shape
    size = fetch.block_size
    blocks = torch.cat([k, v], dim=-1)[:, :, : length // size * size]
    blocks = (
        blocks.unflatten(2, (-1, size))
        if blocks.shape[2]
        else blocks.new_empty(batch, heads, 0, size, dim + v.shape[3])
    )
    parts = [blocks.index_select(2, x).transpose(0, 2).flatten() for x in fetch.sent]
    elements = batch * heads * size * (dim + v.shape[3])
    return all_to_all(torch.cat(parts), *fetch.sizes(elements), fetch.ranks.group)


class _Fetched(torch.autograd.Function):
    """The fetched keys and values of a chunk, and after them those of this rank.

    The backward sends gradients to the ranks of the blocks, which add them in float32 in the order
    of ranks.
    """

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, received: Tensor, fetch: _Fetch) -> Any:
        batch, heads, _, dim = k.shape
        ctx.fetch, ctx.dims = fetch, (dim, v.shape[3])
        shape = sum(fetch.counts), heads, batch, fetch.block_size, dim + v.shape[3]
        blocks = received.view(shape).transpose(0, 2).flatten(2, 3)
        parts = blocks.split(ctx.dims, dim=-1)
        return tuple(torch.cat([x, own], dim=2) for x, own in zip(parts, (k, v), strict=True))

    @staticmethod
    def backward(ctx: Any, d_k: Tensor, d_v: Tensor) -> Any:
        fetch, size = ctx.fetch, ctx.fetch.block_size
        grad = torch.cat([d_k, d_v], dim=-1)
        fetched = sum(fetch.counts) * size
        batch, heads, _, features = grad.shape
        sent = grad[:, :, :fetched].reshape(batch, heads, -1, size, features).transpose(0, 2)
        own = grad[:, :, fetched:]
        received, parts = fetch.sizes(batch * heads * size * features)
        found = all_to_all(sent.flatten(), parts, received, fetch.ranks.group).wait()
        total = own.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
        full = total[:, :, : total.shape[2] // size * size].unflatten(2, (-1, size))
        for part, blocks in zip(found.split(received), fetch.sent, strict=True):
            if len(blocks):
                grads = part.view(len(blocks), heads, batch, size, features).transpose(0, 2)
                full[:, :, blocks] += grads  # each block once
        return *total.to(grad.dtype).split(ctx.dims, dim=-1), None, None


def _attend(
    q: Tensor, k: Tensor, v: Tensor, selected: Tensor, attention: Attention
) -> tuple[Tensor, Tensor]:
    """Attends from queries at the end of the keys to their past and own blocks."""
    if q.numel() == 0:
        return empty(q, k, v)
    options, scale = attention.options, attention.options["scale"]
    impl = resolve(options["impl"], q, k, v, options["kernel_options"], None)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    size = attention.block_size
    selection = BlockSelection(selected, size)
    backend = AttentionOptions(impl, scale, True, options["kernel_options"])
    return attend(q, k, v, selection, Layout(size), backend, None)
