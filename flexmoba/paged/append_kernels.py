"""The Triton kernel that appends tokens to pages, and the mean keys that they complete."""

import torch
import triton.language as tl
from torch import Tensor

from flexmoba.paged.kernels import aligned, by_token, constants_of
from flexmoba.paged.pages import Pages
from flexmoba.runtime.triton_launch import kernel, launch, packed

_KEYS = 64


def append_on_cuda(k: Tensor, v: Tensor, pages: Pages, slots: Tensor) -> None:
    """Computes `append_paged` by one Triton kernel."""
    k, v = by_token(k), by_token(v)
    constants = {
        "HEADS": pages.k.shape[1],
        "BLOCK_SIZE": pages.block_size,
        "SUB_BLOCK_SIZE": pages.block_size // pages.sub_blocks,
        "NEW_K": k.stride(0),
        "NEW_V": v.stride(0),
        "KEYS": _KEYS,
        "num_warps": 4,
    }
    constants |= constants_of(pages)
    tensors = (k, v, *aligned(pages), packed(slots))
    with torch.cuda.device_of(k):
        launch(_append_kernel, k.shape[0] * pages.k.shape[1], tensors, constants, (k.dtype,))


@kernel
def _append_kernel(
    k_ptr, v_ptr, k_pages_ptr, v_pages_ptr, means_ptr, slots_ptr,
    HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, SUB_BLOCK_SIZE: tl.constexpr,
    NEW_K: tl.constexpr, NEW_V: tl.constexpr, KEYS: tl.constexpr,
    K_PAGE: tl.constexpr, K_HEAD: tl.constexpr, K_TOKEN: tl.constexpr, V_PAGE: tl.constexpr,
    V_HEAD: tl.constexpr, V_TOKEN: tl.constexpr, MEAN_PAGE: tl.constexpr, MEAN_HEAD: tl.constexpr,
    MEAN_SUB_BLOCK: tl.constexpr, DIM: tl.constexpr, TILE_D: tl.constexpr,
    VALUE_DIM: tl.constexpr, TILE_VALUE_D: tl.constexpr,
):  # fmt: skip
    """Writes one KV head of one token, and the mean key if the token fills its sub-block."""
    token = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    page, offset = slot // BLOCK_SIZE, (slot % BLOCK_SIZE).to(tl.int32)
    dim, value_dim = tl.arange(0, TILE_D), tl.arange(0, TILE_VALUE_D)
    k_ptr += head * DIM
    k_pages_ptr += page * K_PAGE + head * K_HEAD
    k = tl.load(k_ptr + token * NEW_K + dim, mask=dim < DIM)
    v = tl.load(v_ptr + token * NEW_V + head * VALUE_DIM + value_dim, mask=value_dim < VALUE_DIM)
    tl.store(k_pages_ptr + offset * K_TOKEN + dim, k, mask=dim < DIM)
    v_pages_ptr += page * V_PAGE + head * V_HEAD
    tl.store(v_pages_ptr + offset * V_TOKEN + value_dim, v, mask=value_dim < VALUE_DIM)
    if offset % SUB_BLOCK_SIZE == SUB_BLOCK_SIZE - 1:
        # Other programs may not have written the other new keys of the sub-block yet, so these
        # come from the batch, where they precede this token.
        sub_block = offset // SUB_BLOCK_SIZE
        k_pages_ptr += sub_block * (SUB_BLOCK_SIZE * K_TOKEN)
        total = tl.zeros([TILE_D], tl.float32)
        for start in range(0, SUB_BLOCK_SIZE, KEYS):
            key = start + tl.arange(0, KEYS)
            source = token - (SUB_BLOCK_SIZE - 1 - key)
            in_sub_block = key < SUB_BLOCK_SIZE
            source_slot = tl.load(slots_ptr + source, mask=in_sub_block & (source >= 0), other=-1)
            is_new = in_sub_block & (source_slot == slot - (SUB_BLOCK_SIZE - 1 - key))
            in_dim = (dim < DIM)[None, :]
            new = tl.load(
                k_ptr + source[:, None] * NEW_K + dim[None, :],
                mask=is_new[:, None] & in_dim, other=0.0,
            )  # fmt: skip
            old = tl.load(
                k_pages_ptr + key[:, None] * K_TOKEN + dim[None, :],
                mask=(in_sub_block & ~is_new)[:, None] & in_dim, other=0.0,
            )  # fmt: skip
            total += tl.sum(new.to(tl.float32) + old.to(tl.float32), 0)
        mean = (total / SUB_BLOCK_SIZE).to(means_ptr.dtype.element_ty)
        means_ptr += page * MEAN_PAGE + head * MEAN_HEAD + sub_block * MEAN_SUB_BLOCK
        tl.store(means_ptr + dim, mean, mask=dim < DIM)
