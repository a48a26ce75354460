"""Sorted lists in the registers of a Triton kernel, by sorting networks.

A row of a tile has several lists, one in each thread that holds the row of a matrix product. One
network sorts new elements, and another merges them into a list, so the cost does not depend on the
elements.
"""

import triton
import triton.language as tl


@triton.jit
def halves(x, A: tl.constexpr, B: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr):
    """Splits ``x (A, B, N)`` into elements whose index has the bit ``STRIDE`` unset or set."""
    x = tl.reshape(x, [A, B, N // (2 * STRIDE), 2, STRIDE])
    return tl.split(tl.permute(x, [0, 1, 2, 4, 3]))


@triton.jit
def from_halves(x, y, A: tl.constexpr, B: tl.constexpr, N: tl.constexpr):
    """Returns the inverse of `halves`."""
    return tl.reshape(tl.permute(tl.join(x, y), [0, 1, 2, 4, 3]), [A, B, N])


@triton.jit
def exchange(x, y):
    """Returns the larger and the smaller elements."""
    larger = tl.where(x > y, x, y)
    if x.dtype == tl.float64:
        smaller = tl.where(x > y, y, x)
    else:
        smaller = x ^ y ^ larger  # fewer instructions than a second comparison
    return larger, smaller


@triton.jit
def reverse(x, A: tl.constexpr, B: tl.constexpr, N: tl.constexpr):
    """Reverses the order of the last dimension of ``x (A, B, N)``."""
    for i in tl.static_range(6):
        if 1 << i < N:
            low, high = halves(x, A, B, N, 1 << i)
            x = from_halves(high, low, A, B, N)
    return x


@triton.jit
def sort_bitonic(x, A: tl.constexpr, B: tl.constexpr, N: tl.constexpr, RUN: tl.constexpr):
    """Sorts every bitonic run of ``RUN`` elements of the last dimension, in descending order."""
    for i in tl.static_range(6):
        if RUN >> (i + 1) > 0:
            low, high = halves(x, A, B, N, RUN >> (i + 1))
            low, high = exchange(low, high)
            x = from_halves(low, high, A, B, N)
    return x


@triton.jit
def merge_runs(x, A: tl.constexpr, B: tl.constexpr, N: tl.constexpr, RUN: tl.constexpr):
    """Merges pairs of sorted runs of ``RUN`` elements into sorted runs of twice the length."""
    low, high = halves(x, A, B, N, RUN)
    PAIRS: tl.constexpr = B * (N // (2 * RUN))
    high = reverse(tl.reshape(high, [A, PAIRS, RUN]), A, PAIRS, RUN)
    low, high = exchange(low, tl.reshape(high, [A, B, N // (2 * RUN), RUN]))
    return sort_bitonic(from_halves(low, high, A, B, N), A, B, N, RUN)


@triton.jit
def sort_runs(x, A: tl.constexpr, B: tl.constexpr, N: tl.constexpr, RUN: tl.constexpr):
    """Sorts every run of ``RUN`` elements of the last dimension, in descending order."""
    for i in tl.static_range(6):
        if 1 << i < RUN:
            x = merge_runs(x, A, B, N, 1 << i)
    return x


@triton.jit
def merge_lists(x, y, A: tl.constexpr, B: tl.constexpr, N: tl.constexpr):
    """Returns the best N elements of pairs of lists ``(A, B, N)`` in descending order, sorted."""
    y = reverse(y, A, B, N)
    return sort_bitonic(tl.where(x > y, x, y), A, B, N, N)


@triton.jit
def merge_half(x, A: tl.constexpr, B: tl.constexpr, N: tl.constexpr, RUN: tl.constexpr):
    """Merges pairs of sorted runs of the last dimension into their best ``RUN`` elements."""
    low, high = halves(x, A, B, N, RUN)
    PAIRS: tl.constexpr = B * (N // (2 * RUN))
    low, high = tl.reshape(low, [A, PAIRS, RUN]), tl.reshape(high, [A, PAIRS, RUN])
    return tl.reshape(merge_lists(low, high, A, PAIRS, RUN), [A, B, N // 2])


@triton.jit
def keep_best_in_lists(
    best, key, ROWS: tl.constexpr, TILE_N: tl.constexpr, LISTS: tl.constexpr, SLOTS: tl.constexpr
):
    """Merges the sort keys ``(ROWS, TILE_N)`` of a tile into lists ``(ROWS, LISTS, SLOTS)``.

    Of every 8 columns of a matrix product on the matrix units, a thread holds two neighbours.
    """
    key = tl.reshape(key, [ROWS, TILE_N // (2 * LISTS), LISTS, 2])
    key = tl.reshape(tl.permute(key, [0, 2, 1, 3]), [ROWS, LISTS, TILE_N // LISTS])
    RUN: tl.constexpr = TILE_N // LISTS if TILE_N // LISTS < SLOTS else SLOTS
    key = sort_runs(key, ROWS, LISTS, TILE_N // LISTS, RUN)
    if RUN == SLOTS:
        for i in tl.static_range(6):
            if TILE_N // LISTS >> i > SLOTS:
                key = merge_half(key, ROWS, LISTS, TILE_N // LISTS >> i, SLOTS)
        best = merge_lists(best, key, ROWS, LISTS, SLOTS)
    else:  # half as many keys, which compete with the worse half of a list
        better, worse = halves(best, ROWS, LISTS, SLOTS, RUN)
        key = tl.reshape(reverse(key, ROWS, LISTS, RUN), [ROWS, LISTS, 1, RUN])
        worse = tl.where(worse > key, worse, key)
        best = from_halves(better, worse, ROWS, LISTS, SLOTS)
        best = sort_bitonic(best, ROWS, LISTS, SLOTS, SLOTS)
    return best


@triton.jit
def best_of_lists(best, ROWS: tl.constexpr, LISTS: tl.constexpr, SLOTS: tl.constexpr):
    """Merges the lists of a row, ``(ROWS, SLOTS)`` in descending order."""
    best = tl.reshape(best, [ROWS, 1, LISTS * SLOTS])
    for i in tl.static_range(6):
        if LISTS >> i > 1:
            best = merge_half(best, ROWS, 1, LISTS * SLOTS >> i, SLOTS)
    return tl.reshape(best, [ROWS, SLOTS])
