"""The Triton kernel of a decoding step that selects blocks, once for each row of the gate.

It sorts the best blocks of all splits. Every program of the attention then loads its block.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from flexmoba.blocks import next_power_of_2
from flexmoba.cache.options import CachedCall
from flexmoba.gate.kernel import NOTHING
from flexmoba.runtime.triton_launch import kernel, launch, on_device_of


def select_best_on_cuda(best: Tensor, positions: Tensor, n_blocks: int, call: CachedCall) -> Tensor:
    """Selects the blocks of each row of the gate among the best blocks of each split.

    Args:
        best: Sort keys, ``(B, H, Lq, splits, slots)``.
        positions: ``(B, Lq)`` int32, contiguous.
        n_blocks: Blocks of a sequence.
        call: Options.

    Returns:
        Block indices, ``(B, H, Lq, topk)``, as from `select_step_on_cuda`.
    """
    *rows, splits, slots = best.shape
    selected = positions.new_empty(*rows, call.topk)
    all_splits = next_power_of_2(splits)
    constants = {
        "SINKS": call.gate.sink_blocks,
        "LOCALS": call.gate.local_blocks,
        "FORCED": next_power_of_2(1 + call.gate.forced),
        "Q_LEN": rows[2],
        "COUNT": call.scored,
        "SLOTS": slots,
        "SPLITS": splits,
        "ALL_SPLITS": all_splits,
        "BLOCK_SIZE": call.block_size,
        "num_warps": min(4, max(1, all_splits * slots // 64)),  # two sort keys of a thread
    }
    with on_device_of(positions):
        arguments = positions, best, selected, rows[1], n_blocks
        launch(_select_best_kernel, math.prod(rows), arguments, constants, ())
    return selected


@triton.jit
def forced_block(column, own, SINKS: tl.constexpr, LOCALS: tl.constexpr):
    """Returns the own, local or sink block in a column of a selection; -1 for none.

    The own block comes first, then local and sink blocks. Without an own block, -1, there are none.
    """
    sink = column - (1 + LOCALS)
    block = tl.where(sink < 0, own - column, sink)
    # A local block that is also a sink block counts as a sink block.
    is_own_or_past = tl.where(sink < 0, (column == 0) | (block >= SINKS), block < own)
    return tl.where(is_own_or_past, block, -1)


@kernel
def _select_best_kernel(
    positions_ptr, best_ptr, selected_ptr, heads: tl.int32, n_blocks: tl.int32,
    SINKS: tl.constexpr, LOCALS: tl.constexpr, FORCED: tl.constexpr, Q_LEN: tl.constexpr,
    COUNT: tl.constexpr, SLOTS: tl.constexpr, SPLITS: tl.constexpr, ALL_SPLITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Writes the selected blocks of one row of the gate; -1 for none.

    The columns are the own block, local blocks, sink blocks, and the ``COUNT`` blocks of the
    highest scores among the best blocks of all splits. Padding, and a position beyond the last
    block, have none.
    """
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + row // (Q_LEN * heads) * Q_LEN + row % Q_LEN)
    has_blocks = (position >= 0) & (position < n_blocks * BLOCK_SIZE)
    own = tl.where(has_blocks, position // BLOCK_SIZE, -1)
    selected_ptr += row * (1 + LOCALS + SINKS + COUNT)
    column = tl.arange(0, FORCED)
    block = forced_block(column, own, SINKS, LOCALS)
    tl.store(selected_ptr + column, block, mask=column < 1 + LOCALS + SINKS)
    if COUNT > 0:
        index = tl.arange(0, ALL_SPLITS * SLOTS)
        best_ptr += row * (SPLITS * SLOTS)
        keys = tl.load(best_ptr + index, mask=index < SPLITS * SLOTS, other=NOTHING)
        keys = tl.sort(keys, descending=True)
        exists = has_blocks & (keys >= NOTHING + SLOTS)
        block = tl.where(exists, (keys & 0xFFFFFFFF).to(tl.int32), -1)
        tl.store(selected_ptr + (1 + LOCALS + SINKS) + index, block, mask=index < COUNT)
