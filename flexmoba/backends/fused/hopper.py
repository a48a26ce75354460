"""Launches the warp-specialised kernels, where they support the inputs.

Gluon is an experimental part of Triton: this module and the kernels of Hopper alone use it, with
versions of Triton that compiled them.
"""

import functools
import importlib.util
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from flexmoba.backends.fused.routing import items_of_blocks
from flexmoba.backends.fused.schedule import Piece, Sizes, SortGroup
from flexmoba.backends.fused.strides import token_stride
from flexmoba.runtime.triton_launch import launch

# The least block sizes of both passes, measured at 512 and 4096.
least_block = 512
least_backward_block = 512

_KEYS, _ROWS = 128, 128  # of a tile of keys, and of an item
_BOX_KEYS = 64  # that one copy of the backward pass moves
_HEAD_DIMS = (64, 128)


class _Place(NamedTuple):
    """Where the heads of keys or values are in a matrix with a token in each row."""

    n_rows: int
    n_columns: int
    row_of_batch: int
    row_of_head: int
    column_of_head: int


def supports(q: Tensor, k: Tensor, v: Tensor, sizes: Sizes, *, is_causal: bool) -> bool:
    """Returns whether the kernel supports a call.

    It attends to full blocks of full tiles of keys, whose rows the copy engine can address. Rows of
    queries must begin at multiples of 16 bytes, which the offsets of rows count.
    """
    return (
        sizes.block_size >= least_block
        and _is_supported(k, v, sizes, is_causal=is_causal)
        and _has_short_offsets(q, sizes.group)
    )


def supports_backward(
    inputs: tuple[Tensor, Tensor, Tensor], grad_out: Tensor, sizes: Sizes, *, is_causal: bool
) -> bool:
    """Returns whether the kernels of the backward pass support a call, as `supports` does.

    The kernels of `backward_kernels` serve blocks of one tile, and write all gradients at once.
    """
    q, k, v = inputs
    return (
        sizes.block_size >= max(least_backward_block, 2 * _KEYS)
        and _is_supported(k, v, sizes, is_causal=is_causal)
        and all(_has_short_offsets(x, sizes.group) for x in (q, grad_out))
    )


def _is_supported(k: Tensor, v: Tensor, sizes: Sizes, *, is_causal: bool) -> bool:
    return (
        sizes.count > 0
        and sizes.block_size % _KEYS == 0
        and sizes.dim == sizes.value_dim
        and sizes.dim in _HEAD_DIMS
        and (is_causal or sizes.kv_len % sizes.block_size == 0)
        and _is_hopper(k.device)
        and _place(k) is not None
        and _place(v) is not None
    )


def _has_short_offsets(x: Tensor, group: int) -> bool:
    """Returns whether the offsets within a KV head are int32 in units of 16 bytes."""
    strides = [x.stride(dim) if x.shape[dim] > 1 else 0 for dim in (0, 1)] + [token_stride(x)]
    last = (group - 1) * strides[1] + (x.shape[2] - 1) * strides[2]
    return all(stride % 8 == 0 for stride in strides) and last < 2**34


def _short_strides(x: Tensor) -> list[int]:
    """Returns the strides of batch and heads in units of 16 bytes."""
    return [x.stride(dim) // 8 if x.shape[dim] > 1 else 0 for dim in (0, 1)]


def items_of(first_rows: Tensor, group: SortGroup, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Divides the rows of each block into items of the forward pass.

    Returns:
        The first item of each block and the block of each item, both int32.
    """
    items = items_of_blocks(first_rows, _ROWS, _ROWS, group, sizes).of_queries
    assert items is not None
    return items


def attend_on_hopper(
    inputs: tuple[Tensor, Tensor, Tensor],
    partial: tuple[Tensor, Tensor],
    tables: tuple[Tensor, ...],
    group: SortGroup,
    piece: Piece,
    sizes: Sizes,
    factor: float,
) -> None:
    """Computes `attend_kernel` for a piece.

    Args:
        inputs: q, k and v, for which `supports` is True.
        partial: The partial outputs ``(rows, D)`` and log-sum-exps ``(rows,)`` to write.
        tables: The pairs, the first row of each bin, and the two of `items_of`, all int32.
        group: The sort group.
        piece: The piece.
        sizes: The sizes of the call.
        factor: The scale in base 2.
    """
    from flexmoba.backends.fused.hopper_kernels import hopper_attend_kernel

    q, k, v = inputs
    k_place, v_place = _place(k), _place(v)
    assert k_place is not None
    assert v_place is not None
    launch(
        hopper_attend_kernel,
        _programs(q),
        (
            *(q, _descriptor(k, k_place, _KEYS), _descriptor(v, v_place, _KEYS)),
            *(*partial, *tables, *k_place[2:], *v_place[2:], *_short_strides(q)),
            *(group.first_query, group.first_kv_head),
            *(piece.first_block, piece.first_block + piece.n_blocks),
            (piece.first_query - group.first_query) * sizes.count,
            *(sizes.kv_heads, sizes.q_len, sizes.n_blocks, factor),
        ),
        _constants(sizes) | {"Q_STRIDE": token_stride(q)},
        (q.dtype,),
    )


class BackwardCall(NamedTuple):
    """The tensors and sizes that the launches of a backward pass share.

    Attributes:
        inputs: q, k, v and the gradient of the output, for which `supports_backward` is True.
        lse: ``(B, Hq, Lq)`` float32, the log-sum-exp.
        delta: ``(B, Hq, Lq)`` float32, of `delta_kernel`.
        own: Which queries attend to their own blocks, or None for all.
        sizes: The sizes of the call.
        is_causal: Whether queries attend to their own blocks.
        scale: The scale.
    """

    inputs: tuple[Tensor, Tensor, Tensor, Tensor]
    lse: Tensor
    delta: Tensor
    own: Tensor | None
    sizes: Sizes
    is_causal: bool
    scale: float

    def arguments(self, group: SortGroup, piece: Piece) -> tuple[tuple[Any, ...], list[int]]:
        """Returns the first five arguments of a kernel, and its numbers up to the last block."""
        q, k, v, grad = self.inputs
        k_place, v_place = _place(k), _place(v)
        assert k_place is not None
        assert v_place is not None
        descriptors = (_descriptor(k, k_place, _BOX_KEYS), _descriptor(v, v_place, _BOX_KEYS))
        numbers = [
            *(*k_place[2:], *v_place[2:], *_short_strides(q), *_short_strides(grad)),
            *(group.first_query, group.first_kv_head),
            *(piece.first_block, piece.first_block + piece.n_blocks),
        ]
        return (q, *descriptors, grad, self.lse, self.delta), numbers

    def constants(self) -> dict[str, int]:
        """Returns the constants of both kernels."""
        q, *_, grad = self.inputs
        sizes = self.sizes
        return {
            "IS_CAUSAL": self.is_causal,
            "HAS_OWN": self.own is not None,
            "GROUP": sizes.group,
            "COUNT": sizes.count,
            "BLOCK_SIZE": sizes.block_size,
            "DIM": sizes.dim,
            "Q_STRIDE": token_stride(q),
            "GRAD_STRIDE": token_stride(grad),
            "STAGES": 4,
            "num_warps": 4,
            "maxnreg": 168,
        }


def key_grads_on_hopper(
    call: BackwardCall,
    grads: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor, ...],
    group: SortGroup,
    piece: Piece,
    item_rows: int,
) -> None:
    """Computes `key_grads_kernel` for a piece.

    Args:
        call: The call.
        grads: The gradients of k and v to write, and the buffer ``extra``.
        tables: The pairs, the first row of each bin, the first item of each block, the block of
            each item, and the first extra buffer of each block, all int32.
        group: The sort group.
        piece: The piece.
        item_rows: The number of rows of an item.
    """
    from flexmoba.backends.fused.hopper_key_grads_kernels import hopper_key_grads_kernel

    sizes = call.sizes
    tensors, numbers = call.arguments(group, piece)
    items = piece.n_queries * sizes.count // item_rows + piece.n_blocks
    launch(
        hopper_key_grads_kernel,
        items * (sizes.block_size // _KEYS),
        (
            *(*tensors, call.own, *grads, *tables, *numbers),
            *(sizes.kv_heads, sizes.q_len, sizes.kv_len, sizes.n_blocks),
            *(call.scale / math.log(2), call.scale, item_rows),
        ),
        call.constants() | {"ROWS": 64, "KEYS": _KEYS, "REGISTERS": 232, "COPY_REGISTERS": 40},
        (tensors[0].dtype,),
    )


def query_grads_on_hopper(
    call: BackwardCall,
    partial_grads: Tensor,
    tables: tuple[Tensor, ...],
    group: SortGroup,
    piece: Piece,
) -> None:
    """Computes `item_query_grads_kernel` for a piece.

    Args:
        call: The call.
        partial_grads: ``(rows, D)``, the gradients of pairs to write.
        tables: The pairs, the first row of each bin, the first item of each block, and the block
            of each item, all int32. An item has 128 rows.
        group: The sort group.
        piece: The piece.
    """
    from flexmoba.backends.fused.hopper_query_grads_kernels import hopper_query_grads_kernel

    sizes = call.sizes
    tensors, numbers = call.arguments(group, piece)
    launch(
        hopper_query_grads_kernel,
        _programs(call.lse),
        (
            *(*tensors, partial_grads, *tables, *numbers),
            (piece.first_query - group.first_query) * sizes.count,
            *(sizes.kv_heads, sizes.q_len, sizes.n_blocks),
            *(call.scale / math.log(2), call.scale),
        ),
        call.constants()
        | {"ROWS": _ROWS, "KEYS": _BOX_KEYS, "REGISTERS": 216, "COPY_REGISTERS": 72},
        (tensors[0].dtype,),
    )


@functools.lru_cache(maxsize=1024)
def _constants(sizes: Sizes) -> dict[str, int]:
    """Returns the constants of the kernel but for strides."""
    # A thread of the products needs about 200 registers, and one of the copies few.
    return {
        "GROUP": sizes.group,
        "COUNT": sizes.count,
        "BLOCK_SIZE": sizes.block_size,
        "ROWS": _ROWS,
        "KEYS": _KEYS,
        "DIM": sizes.dim,
        "STAGES": 2,
        "REGISTERS": 216,
        "COPY_REGISTERS": 72,
        "num_warps": 4,
        "maxnreg": 168,
    }


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    version = tuple(int(x) for x in triton.__version__.split(".")[:2])
    has_gluon = importlib.util.find_spec("triton.experimental.gluon") is not None
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return is_hopper and has_gluon and (3, 6) <= version <= (3, 7)


def _programs(x: Tensor) -> int:
    """Returns the number of programs of a kernel whose programs process one item after another."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def _place(x: Tensor) -> _Place | None:
    """Returns the place of each head of ``x (B, H, L, D)``, or None if the layout has no matrix."""
    batch, heads, length, dim = x.shape
    stride_b, stride_h = (x.stride(i) if x.shape[i] > 1 else 0 for i in (0, 1))
    token = token_stride(x)
    if token % 8 != 0 or stride_b % token != 0:
        return None
    row_b = stride_b // token
    n_rows = (batch - 1) * row_b + length
    if stride_h % token == 0:  # heads one after the other
        row_h = stride_h // token
        return _Place(n_rows + (heads - 1) * row_h, dim, row_b, row_h, 0)
    if (heads - 1) * stride_h + dim <= token:  # heads side by side
        return _Place(n_rows, (heads - 1) * stride_h + dim, row_b, 0, stride_h)
    return None


def _descriptor(x: Tensor, place: _Place, keys: int) -> Any:
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    dim = x.shape[3]
    return TensorDescriptor(
        x,
        [place.n_rows, place.n_columns],
        [token_stride(x), 1],
        [keys, dim],
        NVMMASharedLayout(128, 16, 2),
    )
