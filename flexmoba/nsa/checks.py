"""Validation of the arguments of Native Sparse Attention, by metadata only."""

from torch import Tensor

from flexmoba.checks import (
    check_alike,
    check_block_size,
    check_gate,
    check_positive,
    check_tensor,
    check_topk,
)
from flexmoba.nsa.sizes import NsaSizes


def check_sizes(sizes: NsaSizes) -> None:
    """Raises unless the sizes are positive and match one another."""
    cmp_block, cmp_stride, block_size, topk, sink_blocks, local_blocks = sizes
    check_positive("cmp_block", cmp_block, "pass the number of tokens in a compressed block")
    check_positive("cmp_stride", cmp_stride, "pass the distance of two compressed blocks")
    check_block_size(block_size)
    check_topk(topk)
    check_gate("group", sink_blocks, local_blocks, None, block_size, topk, is_causal=True)
    if cmp_block % cmp_stride != 0 or block_size % cmp_stride != 0:
        raise ValueError(
            f"cmp_stride must divide cmp_block and block_size, got cmp_stride={cmp_stride}, "
            f"cmp_block={cmp_block} and block_size={block_size}; use a common divisor of both"
        )


def check_window(window: int, *own: Tensor | None) -> None:
    """Raises unless the window is positive, or 0 without ``own`` keys and values."""
    if type(window) is not int or window != 0:
        remedy = "pass the number of tokens in a window, with the query's own, or 0 for no window"
        check_positive("window", window, remedy)
    elif any(x is not None for x in own):
        raise ValueError(
            "window=0 leaves out the window branch, to which k_win and v_win belong; pass neither, "
            "or a window of at least 1"
        )


def check_compressed_keys(q: Tensor, k_cmp: Tensor, kv_len: int, sizes: NsaSizes) -> None:
    """Raises unless there is one key for each compressed block of ``kv_len`` tokens.

    The number of KV heads must divide the number of query heads.
    """
    check_tensor("k_cmp", k_cmp)
    heads = k_cmp.shape[1]
    if heads == 0 or q.shape[1] == 0 or q.shape[1] % heads != 0:
        raise ValueError(
            f"the number of query heads must be a positive multiple of the number of heads of "
            f"k_cmp, got {q.shape[1]} and {heads}; call .transpose(1, 2) on tensors (B, L, H, D) "
            "to get (B, H, L, D)"
        )
    shape = (q.shape[0], heads, sizes.compressed_blocks(kv_len), q.shape[3])
    check_shape("k_cmp", k_cmp, q, shape)


def check_shape(name: str, x: Tensor, q: Tensor, shape: tuple[int, ...]) -> None:
    """Raises unless ``x`` has this shape, and the dtype and device of q."""
    check_tensor(name, x)
    check_alike("q", q, name, x)
    if tuple(x.shape) != shape:
        raise ValueError(
            f"{name} must have the shape {shape}, got {tuple(x.shape)}; pass {_CONTENTS[name]}"
        )


_CONTENTS = {
    "gates": "three gate values for every query, for all heads or for each head",
    "k_cmp": "one key for every compressed block that ends within the keys",
    "v_cmp": "one value for every compressed block that ends within the keys",
    "k_win": "one key for every key of k",
    "v_win": "one value for every value of v",
}


def check_branches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    compressed: tuple[Tensor | None, Tensor | None],
    window: tuple[Tensor | None, Tensor | None],
    sizes: NsaSizes,
) -> None:
    """Raises unless keys and values of the other branches match those of the selected branch."""
    length = {"cmp": sizes.compressed_blocks(k.shape[2]), "win": k.shape[2]}
    for branch, (keys, values) in (("cmp", compressed), ("win", window)):
        if (keys is None) != (values is None):
            names = f"k_{branch}", f"v_{branch}"
            missing, given = names if keys is None else names[::-1]
            raise ValueError(
                f"{missing} must be passed with {given}, got None; pass both or neither"
            )
        if keys is not None and values is not None:
            shape = (*k.shape[:2], length[branch])
            check_shape(f"k_{branch}", keys, q, (*shape, q.shape[3]))
            check_shape(f"v_{branch}", values, q, (*shape, v.shape[3]))


def check_gates(q: Tensor, gates: Tensor) -> None:
    """Raises unless the gates are ``(B, Hq or 1, Lq, 3)`` in the dtype of q."""
    check_tensor("gates", gates)
    heads = 1 if gates.shape[1] == 1 else q.shape[1]
    check_shape("gates", gates, q, (q.shape[0], heads, q.shape[2], 3))


def check_shared_selection(selection: Tensor, q: Tensor, kv_heads: int) -> None:
    """Raises unless a selection has one row for each query token and KV head.

    `selected_attention` checks its dtype, device and values.
    """
    if not isinstance(selection, Tensor):
        raise TypeError(f"selection must be a tensor, got {type(selection).__name__}")
    rows = (q.shape[0], kv_heads, q.shape[2])
    if selection.ndim != 4 or tuple(selection.shape[:3]) != rows or selection.shape[3] == 0:
        raise ValueError(
            f"selection must be (B, Hkv, Lq, topk) = {(*rows, 'topk')}, "
            f"got {tuple(selection.shape)}; pass one row for every query token and KV head"
        )
