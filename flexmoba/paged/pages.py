"""`Pages`: the pages of one layer, as views of the memory of a server."""

from typing import NamedTuple

from torch import Tensor

from flexmoba.checks import DTYPES


class Pages(NamedTuple):
    """The pages of one attention layer. A page holds one block (arXiv 2502.13189, Sec. 2.2).

    The tensors are views of any strides, whose features are adjacent (the last stride is 1). They
    may share storage, also with the pages of other layers. A view of a token-major page
    ``(pages, page_size, Hkv, D)`` is ``x.transpose(1, 2)``.

    Attributes:
        k: Keys, ``(pages, Hkv, block_size, D)``.
        v: Values, ``(pages, Hkv, block_size, Dv)``.
        means: Mean keys, ``(pages, Hkv, D)`` or, for a gate that scores sub-blocks (see
            `moba_select`), ``(pages, Hkv, block_size / gate_block_size, D)``. Only the mean keys of
            full pages are read.
    """

    k: Tensor
    v: Tensor
    means: Tensor

    @property
    def block_size(self) -> int:
        """Keys in a page."""
        return self.k.shape[2]

    @property
    def sub_blocks(self) -> int:
        """Sub-blocks of a block: mean keys in a page."""
        return 1 if self.means.ndim == 3 else self.means.shape[2]

    @property
    def means_of_sub_blocks(self) -> Tensor:
        """Mean keys as ``(pages, Hkv, sub_blocks, D)``."""
        return self.means.unsqueeze(2) if self.means.ndim == 3 else self.means


def check_pages(pages: Pages) -> None:
    """Raises unless the tensors of pages match one another."""
    k, v, means = pages
    shapes = tuple(k.shape), tuple(v.shape), tuple(means.shape)
    per_page = (*means.shape[:2], *means.shape[-1:])  # without the sub-blocks
    fits = k.ndim == 4 and means.ndim in (3, 4) and per_page == (*k.shape[:2], k.shape[-1])
    if not fits or v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            "pages must have keys (pages, Hkv, block_size, D), values (pages, Hkv, block_size, Dv) "
            "and mean keys (pages, Hkv, D) or (pages, Hkv, sub_blocks, D), got "
            f"{shapes[0]}, {shapes[1]} and {shapes[2]}; call .transpose(1, 2) on token-major pages "
            "(pages, block_size, Hkv, D)"
        )
    if pages.block_size == 0:
        raise ValueError(
            f"a page must hold at least one key, got keys of shape {shapes[0]}; allocate "
            "block_size keys for each page"
        )
    if pages.sub_blocks == 0 or pages.block_size % pages.sub_blocks != 0:
        raise ValueError(
            f"a page of {pages.block_size} keys must divide evenly into sub-blocks, got mean keys "
            f"of {pages.sub_blocks}; allocate block_size / gate_block_size mean keys for each page"
        )
    kinds = {(x.dtype, x.device) for x in pages}
    if len(kinds) > 1 or k.dtype not in DTYPES:
        names = ", ".join(f"{x.dtype} on {x.device}" for x in pages)
        raise ValueError(
            f"pages must have one dtype, float16, bfloat16, float32 or float64, and one device, "
            f"got {names}; allocate keys, values and mean keys alike"
        )
    strides = [x.stride(-1) for x in pages]
    if any(stride != 1 for stride, x in zip(strides, pages, strict=True) if x.shape[-1] > 1):
        raise ValueError(
            f"the features of keys, values and mean keys must be adjacent in pages, got last "
            f"strides {strides}; keep the head dim innermost in memory"
        )


def check_new(name: str, x: Tensor, pages: Pages, dim: int) -> None:
    """Raises unless new tensors ``(T, heads, dim)`` fit the pages."""
    kv_heads = pages.k.shape[1]
    heads = x.shape[1] if x.ndim == 3 else 0
    fits = heads > 0 and heads % kv_heads == 0 if name == "q" else heads == kv_heads
    if not fits or x.shape[2] != dim:
        expected = "a multiple of " if name == "q" else ""
        raise ValueError(
            f"{name} must be (tokens, heads, {dim}) with {expected}{kv_heads} heads for these "
            f"pages, got {tuple(x.shape)}; pass one row for every token of the batch"
        )
    if (x.dtype, x.device) != (pages.k.dtype, pages.k.device):
        raise ValueError(
            f"{name} must be {pages.k.dtype} on {pages.k.device} like the pages, got {x.dtype} on "
            f"{x.device}; allocate the pages in the dtype and on the device of the model"
        )
