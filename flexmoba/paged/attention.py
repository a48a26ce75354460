"""`attend_paged`: attention of a ragged batch to pages."""

import torch
from torch import Tensor

from flexmoba.backends import AttentionOptions, attend, resolve
from flexmoba.blocks import ceil_div
from flexmoba.cache import (
    CachedCall,
    CachedTensors,
    attend_rows,
    attend_to_gathered,
    check_no_gradients,
    has_kernels,
    select_for_step,
)
from flexmoba.checks import GateName, check_gate, check_options, check_topk
from flexmoba.gate import GateOptions, gate_rows
from flexmoba.paged.batch import Chunk, PagedBatch
from flexmoba.paged.pages import Pages, check_new, check_pages
from flexmoba.runtime import values_readable, without_autocast
from flexmoba.sequence import Layout


def attend_paged(
    q: Tensor,
    pages: Pages,
    batch: PagedBatch,
    topk: int | None,
    *,
    scale: float | None = None,
    gate: GateName = "token",
    sink_blocks: int = 0,
    local_blocks: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attends from the new tokens of a ragged batch to the pages of their sequences (Eq. 2 to 6).

    Each query attends to its own block and to the past blocks that the gate selects (arXiv
    2502.13189, Sec. 2.2). A page holds a block. If it has mean keys of several sub-blocks, the
    score of the block is the highest of their scores. Call `append_paged` before, since a query
    also attends to its own key. A sequence with at most 16 new tokens is a step, which reads only
    mean keys and the selected pages. On CUDA, a batch of steps is computed by kernels that do not
    synchronize with the host, so that a CUDA graph can capture them. A longer chunk gathers the
    pages of its sequence and calls the backends of `flex_moba`.

    Args:
        q: Queries, ``(T, Hq, D)`` in the dtype of the pages.
        pages: Pages of the layer.
        batch: The sequences of the batch, from `paged_batch`.
        topk: Blocks that each query attends to, its own block included; None for all blocks.
        scale: Factor on the attention scores, ``1 / sqrt(D)`` by default.
        gate: ``"token"`` or ``"group"``, as in `moba_select`.
        sink_blocks: As in `moba_select`.
        local_blocks: As in `moba_select`.

    Returns:
        The output, ``(T, Hq, Dv)`` in the dtype of q, and the log-sum-exp, ``(T, Hq)`` float32
        (float64 for float64 q). They are 0 and -inf for padding.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: Shapes, dtypes, devices or the options of the gate do not match, or (checked on
            CPU only) the block table does not fit.
        NotImplementedError: q requires gradients, or the gate is ``"tile"``.

    Examples:
        >>> import torch
        >>> from flexmoba import flex_moba
        >>> from flexmoba.paged import Pages, append_paged, attend_paged, paged_batch
        >>> _ = torch.manual_seed(0)
        >>> q, k, v = torch.randn(3, 30, 4, 16)  # a prompt of 30 tokens, 4 heads
        >>> pages = Pages(torch.zeros(9, 4, 8, 16), torch.zeros(9, 4, 8, 16), torch.zeros(9, 4, 16))
        >>> table = torch.tensor([[7, 3, 5, 2]], dtype=torch.int32)
        >>> position = torch.arange(30)
        >>> slots = table[0, position // 8].long() * 8 + position % 8
        >>> append_paged(k, v, pages, slots)
        >>> bounds, lengths = (torch.tensor(x, dtype=torch.int32) for x in ([0, 30], [30]))
        >>> batch = paged_batch(bounds, lengths, table, tokens=30)
        >>> out, lse = attend_paged(q, pages, batch, topk=2)
        >>> q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, 4, 30, 16)
        >>> torch.testing.assert_close(out, flex_moba(q, k, v, 8, 2)[0].transpose(0, 1))
    """
    check_pages(pages)
    check_new("q", q, pages, pages.k.shape[3])
    check_no_gradients(q)
    check_topk(topk, none_allowed=True)
    check_options(scale, None, None, None)
    block_size = pages.block_size
    if gate == "tile":
        raise NotImplementedError(
            'pages do not keep the queries that gate="tile" needs; use gate="token" or "group"'
        )
    check_gate(gate, sink_blocks, local_blocks, None, block_size, topk, is_causal=True)
    _check_batch(q, pages, batch)
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    n_blocks = batch.block_table.shape[1]
    if topk is not None and topk >= n_blocks:
        topk = None
    options = GateOptions(gate, sink_blocks, local_blocks, pages.sub_blocks)
    call = CachedCall(0 if topk is None else topk, scale, options, block_size)
    return _attend(q.detach(), pages, batch, call)


@without_autocast
def _attend(q: Tensor, pages: Pages, batch: PagedBatch, call: CachedCall) -> tuple[Tensor, Tensor]:
    if not batch.chunks:
        return attend_steps(q, pages, batch, call)
    out = q.new_zeros(*q.shape[:2], pages.v.shape[3])
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=lse_dtype, device=q.device)
    steps = batch.steps
    if steps is not None and steps.numel() > 0:
        alone = batch._replace(rows=batch.rows[steps], positions=batch.positions[steps])
        out[steps], lse[steps] = attend_steps(q[steps], pages, alone, call)
    for chunk in batch.chunks:
        tokens = slice(chunk.start, chunk.end)
        chunk_out, chunk_lse = _attend_chunk(q[tokens], pages, batch.block_table, chunk, call)
        out[tokens], lse[tokens] = chunk_out, chunk_lse
    return out, lse


def attend_steps(
    q: Tensor, pages: Pages, batch: PagedBatch, call: CachedCall
) -> tuple[Tensor, Tensor]:
    """Computes `attend_paged` without chunks; ``call.topk`` is 0 for full attention."""
    if has_kernels(q, pages.v):
        from flexmoba.paged.kernels import MAX_TOPK, attend_steps_on_cuda

        if call.topk <= MAX_TOPK:
            return attend_steps_on_cuda(q, pages, batch, call)
    return attend_steps_gathered(q, pages, batch, call)


def attend_steps_gathered(
    q: Tensor, pages: Pages, batch: PagedBatch, call: CachedCall
) -> tuple[Tensor, Tensor]:
    """Computes `attend_steps` by plain tensor operations, which gather the selected pages."""
    kv_heads, positions = pages.k.shape[1], batch.positions[:, None]
    n_blocks = batch.block_table.shape[1]
    if q.shape[0] > 0 and values_readable(positions):
        n_blocks = max(int(positions.max()), 0) // call.block_size + 1
    if call.topk == 0 or call.topk > n_blocks:
        # Of so few blocks, the gate selects all.
        topk = max(n_blocks, 1 + call.gate.forced)
        call = call._replace(topk=topk)
    table = batch.block_table[:, :n_blocks].long()[batch.rows].clamp(0, pages.k.shape[0] - 1)
    means = pages.means_of_sub_blocks[table].transpose(1, 2).flatten(2, 3)
    queries = q[:, :, None]
    rows = gate_rows(queries, kv_heads, call.gate)
    selected = select_for_step(rows, means, positions, q.shape[1], call)
    token = torch.arange(q.shape[0], device=q.device).view(-1, 1, 1, 1, 1)
    head = torch.arange(kv_heads, device=q.device).view(-1, 1, 1, 1)
    index = table[token, selected.clamp(min=0)], head
    keys, values = pages.k[index], pages.v[index]
    out, lse = attend_to_gathered(queries, keys, values, selected, positions, call)
    return out[:, :, 0], lse[:, :, 0]


def _attend_chunk(
    q: Tensor, pages: Pages, block_table: Tensor, chunk: Chunk, call: CachedCall
) -> tuple[Tensor, Tensor]:
    """Attends from the last tokens of a sequence, ``(n, Hq, D)``, to its gathered pages."""
    n_blocks = ceil_div(chunk.seq_len, call.block_size)
    table = block_table[chunk.row, :n_blocks]
    k, v, means = (
        x.transpose(0, 1).index_select(1, table)[None].flatten(2, 3)
        for x in (pages.k, pages.v, pages.means_of_sub_blocks)
    )
    queries = q.transpose(0, 1)[None]
    if call.topk == 0 or call.topk >= n_blocks:
        k, v = k[:, :, : chunk.seq_len], v[:, :, : chunk.seq_len]
        options = AttentionOptions(resolve("auto", queries, k, v), call.scale)
        out, lse = attend(queries, k, v, None, Layout(call.block_size), options, None)
    else:
        tensors = CachedTensors(k, v, means, None)
        out, lse = attend_rows(queries, slice(None), chunk.seq_len, tensors, call, None)
    return out[0].transpose(0, 1), lse[0].T


def _check_batch(q: Tensor, pages: Pages, batch: PagedBatch) -> None:
    """Raises unless the batch has the tokens of q and fits the pages."""
    table, rows, positions = batch[:3]
    if rows.shape != q.shape[:1]:
        raise ValueError(
            f"q must have the {rows.shape[0]} tokens of the batch, got {q.shape[0]}; pass "
            "tokens=q.shape[0] to paged_batch"
        )
    if not values_readable(positions) or q.shape[0] == 0:
        return
    last = torch.where(positions < 0, -1, positions // pages.block_size)
    if int(last.max()) >= table.shape[1]:
        raise ValueError(
            f"the block table has {table.shape[1]} pages for each sequence, too few for position "
            f"{int(positions.max())} in pages of {pages.block_size} keys; pass a wider table"
        )
    used = torch.arange(table.shape[1])[None] <= last[:, None]
    entries = table[rows.long()][used]
    if entries.numel() and not 0 <= int(entries.min()) <= int(entries.max()) < pages.k.shape[0]:
        raise ValueError(
            f"the block table must hold pages from 0 to {pages.k.shape[0] - 1}, got "
            f"{int(entries.min())} to {int(entries.max())}; pass the pages of this layer"
        )
