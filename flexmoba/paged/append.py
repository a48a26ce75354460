"""Writes new tokens into pages, and the mean keys of the sub-blocks that they fill."""

import torch
from torch import Tensor

from flexmoba.cache import check_no_gradients, has_kernels
from flexmoba.paged.pages import Pages, check_new, check_pages
from flexmoba.runtime import without_autocast


def append_paged(k: Tensor, v: Tensor, pages: Pages, slots: Tensor) -> None:
    """Writes keys and values of new tokens into pages, and the mean keys that they complete.

    The mean key (arXiv 2502.13189, Sec. 2.2) is the mean of the keys of a page, or of a sub-block
    if a page has several mean keys, accumulated in float32 (float64 for float64 keys). It is
    written with the last token of the page or sub-block. On CUDA, one kernel does it without host
    synchronization, so that a CUDA graph can capture the call.

    Args:
        k: New keys, ``(T, Hkv, D)`` in the dtype of the pages. The new tokens of a sequence are in
            order and follow each other.
        v: New values, ``(T, Hkv, Dv)``.
        pages: Pages of the layer, which the call changes.
        slots: The slot of each token, ``(T,)`` int64: ``page * block_size + offset``. Tokens with a
            negative slot are padding.

    Raises:
        ValueError: Shapes, dtypes or devices do not match.
        NotImplementedError: k or v requires gradients.

    Examples:
        >>> import torch
        >>> from flexmoba.paged import Pages, append_paged
        >>> k = v = torch.tensor([1.0, 2.0, 6.0, 5.0]).view(4, 1, 1)
        >>> pages = Pages(torch.zeros(9, 1, 3, 1), torch.zeros(9, 1, 3, 1), torch.zeros(9, 1, 1))
        >>> append_paged(k, v, pages, torch.tensor([21, 22, 23, 6]))  # pages 7 and 2
        >>> pages.means[7].item(), pages.k[2, 0, 0].item()
        (3.0, 5.0)
    """
    check_pages(pages)
    check_new("k", k, pages, pages.k.shape[3])
    check_new("v", v, pages, pages.v.shape[3])
    if slots.shape != k.shape[:1] or v.shape[0] != k.shape[0] or slots.dtype != torch.int64:
        raise ValueError(
            f"slots must be int64 of shape ({k.shape[0]},) for these keys, got {slots.dtype} of "
            f"shape {tuple(slots.shape)}; pass page * block_size + offset of every token"
        )
    check_no_gradients(k, v)
    _append(k.detach(), v.detach(), pages, slots)


@without_autocast
def _append(k: Tensor, v: Tensor, pages: Pages, slots: Tensor) -> None:
    if has_kernels(k, v):
        from flexmoba.paged.append_kernels import append_on_cuda

        append_on_cuda(k, v, pages, slots)
    else:
        append_scattered(k, v, pages, slots)


def append_scattered(k: Tensor, v: Tensor, pages: Pages, slots: Tensor) -> None:
    """Computes `append_paged` by plain tensor operations."""
    real = slots >= 0
    page, offset = slots[real] // pages.block_size, slots[real] % pages.block_size
    pages.k[page, :, offset], pages.v[page, :, offset] = k[real], v[real]
    size = pages.block_size // pages.sub_blocks
    fills = offset % size == size - 1
    filled, sub_block = page[fills], offset[fills] // size
    precise = torch.promote_types(k.dtype, torch.float32)
    keys = pages.k.unflatten(2, (pages.sub_blocks, size))[filled, :, sub_block]
    pages.means_of_sub_blocks[filled, :, sub_block] = keys.mean(2, dtype=precise).to(k.dtype)
