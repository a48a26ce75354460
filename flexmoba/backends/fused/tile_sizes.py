"""The compile-time constants of the fused kernels: sizes, strides and tile sizes."""

import functools
from collections.abc import Iterator

from flexmoba.backends.fused.schedule import QUERY_TILE, Sizes
from flexmoba.blocks import next_power_of_2

DELTA_ROWS = 64  # queries that one program of `delta_kernel` processes


@functools.lru_cache(maxsize=1024)
def forward_constants(
    sizes: Sizes, layout: tuple[int, ...], is_causal: bool, has_own: bool, large_shared_memory: bool
) -> list[dict[str, int]]:
    """Returns the constants of `attend_kernel` and `finish_kernel`."""
    constants = _constants(sizes, layout, is_causal, has_own)
    return [constants | tile for tile in _forward_tiles(sizes, is_causal, large_shared_memory)]


@functools.lru_cache(maxsize=1024)
def backward_constants(
    sizes: Sizes, layout: tuple[int, ...], is_causal: bool, has_own: bool, large_shared_memory: bool
) -> list[dict[str, int]]:
    """Returns the constants of the kernels of the backward pass.

    These are `key_grads_kernel`, `item_query_grads_kernel`, `finish_query_grads_kernel` and
    `delta_kernel`, in this order.
    """
    constants = _constants(sizes, layout, is_causal, has_own)
    tiles = [constants | tile for tile in _backward_tiles(sizes, is_causal, large_shared_memory)]
    return [*tiles, constants | {"ROWS": DELTA_ROWS}]


def _constants(
    sizes: Sizes, layout: tuple[int, ...], is_causal: bool, has_own: bool
) -> dict[str, int]:
    names = ("UNIT", "Q_STRIDE", "K_STRIDE", "V_STRIDE", "GRAD_STRIDE")
    return {
        "IS_CAUSAL": is_causal,
        "HAS_OWN": has_own,
        "GROUP": sizes.group,
        "COUNT": sizes.count,
        "BLOCK_SIZE": sizes.block_size,
        "DIM": sizes.dim,
        "TILE_DIM": padded_dim(sizes.dim),
        "VALUE_DIM": sizes.value_dim,
        "TILE_VALUE_DIM": next_power_of_2(sizes.value_dim),
        **dict(zip(names, layout, strict=False)),  # the forward pass has no GRAD_STRIDE
    }


def padded_dim(dim: int) -> int:
    """Returns the head dim of queries and keys in the kernels: 192 or a power of two."""
    return 192 if is_split(dim) else next_power_of_2(dim)


def is_split(dim: int) -> bool:
    """Returns whether the kernels divide the head dim of queries and keys into parts, 128 + 64."""
    return 128 < dim <= 192


def _forward_tiles(
    sizes: Sizes, is_causal: bool, large_shared_memory: bool
) -> Iterator[dict[str, int]]:
    """Yields the tile sizes of `attend_kernel` and `finish_kernel`, tuned on H200 and H100."""
    finish_keys = min(64, max(16, next_power_of_2(sizes.block_size)))
    if _is_wide(sizes):
        attend, finish = _wide_forward_tiles(sizes, finish_keys, large_shared_memory)
    else:
        if sizes.block_size <= 128:
            keys = max(16, next_power_of_2(sizes.block_size))
            attend = {"SHARE": 1024, "ROWS": 64, "KEYS": keys, "num_warps": 4, "num_stages": 1}
        elif sizes.block_size <= 1024 or not large_shared_memory:
            stages = 3 if large_shared_memory else 2
            attend = {"SHARE": 128, "ROWS": 64, "KEYS": 64, "num_warps": 4, "num_stages": stages}
        else:
            attend = {"SHARE": 256, "ROWS": 128, "KEYS": 64, "num_warps": 8, "num_stages": 3}
        stages = (2 if sizes.block_size <= 128 else 3) if large_shared_memory else 1
        finish = {"ROWS": QUERY_TILE, "KEYS": finish_keys, "num_warps": 4, "num_stages": stages}
    yield attend | {"RAGGED": _is_ragged(sizes, attend["KEYS"], is_causal)}
    yield finish


def _backward_tiles(
    sizes: Sizes, is_causal: bool, large_shared_memory: bool
) -> Iterator[dict[str, int]]:
    """Yields the tile sizes of the first three kernels of `backward_constants`."""
    finish_keys = min(64, max(16, next_power_of_2(sizes.block_size)))
    if _is_wide(sizes):
        key, query, finish = _wide_backward_tiles(sizes, finish_keys, large_shared_memory)
    else:
        if sizes.block_size <= 128 and large_shared_memory:
            keys = max(16, next_power_of_2(sizes.block_size))
            key = {"ROWS": 64, "KEYS": keys, "num_warps": 8, "num_stages": 4}
        else:
            stages = 2 if large_shared_memory else 1
            key = {"ROWS": 64, "KEYS": finish_keys, "num_warps": 4, "num_stages": stages}
        if large_shared_memory:
            query = {"ROWS": 128, "KEYS": 64, "num_warps": 8, "num_stages": 3}
        else:
            query = {"ROWS": 64, "KEYS": 64, "num_warps": 4, "num_stages": 1}
        stages = 2 if large_shared_memory else 1
        finish = {"ROWS": QUERY_TILE, "KEYS": finish_keys, "num_warps": 4, "num_stages": stages}
    yield key | {"RAGGED": _is_ragged(sizes, key["KEYS"], is_causal)}
    yield query | {"RAGGED": _is_ragged(sizes, query["KEYS"], is_causal)}
    yield finish


def _is_wide(sizes: Sizes) -> bool:
    """Returns whether head dims need smaller tiles, to fit in shared memory and in registers."""
    return max(sizes.dim, sizes.value_dim) > 128


def _wide_forward_tiles(sizes: Sizes, keys: int, large_shared_memory: bool) -> list[dict[str, int]]:
    """Returns the tile sizes of `_forward_tiles` for large head dims, with at most ``keys`` keys.

    Compiled for an H100, the largest use 208 of 227 KiB of shared memory.
    """
    few = min(32, keys)
    if large_shared_memory:
        attend = {"KEYS": keys, "num_warps": 8, "num_stages": 2}
        finish_keys = keys if is_split(sizes.dim) and sizes.value_dim <= 128 else few
        finish = {"KEYS": finish_keys, "num_warps": 4, "num_stages": 2}  # two programs in an SM
    else:  # 99 KiB
        attend = finish = {"KEYS": few, "num_warps": 8, "num_stages": 1}
    if sizes.block_size <= attend["KEYS"]:
        attend = attend | {"SHARE": 1024, "ROWS": 64}
    elif large_shared_memory:
        attend = attend | {"SHARE": 256, "ROWS": 128, "num_stages": 2 if _is_wider(sizes) else 3}
    else:
        attend = attend | {"SHARE": 256, "ROWS": 64}
    return [attend, finish | {"ROWS": QUERY_TILE}]


def _wide_backward_tiles(
    sizes: Sizes, keys: int, large_shared_memory: bool
) -> list[dict[str, int]]:
    """Returns the tile sizes of `_backward_tiles` for large head dims; arguments as above."""
    few = min(32, keys)
    if large_shared_memory:
        tile = {"KEYS": keys, "num_warps": 8, "num_stages": 2}
        key = {"ROWS": 32 if sizes.block_size <= keys else 64}
        fits_twice = is_split(sizes.dim) or not _is_wider(sizes)  # in an SM
        query = {"ROWS": 64, "num_warps": 4} if fits_twice else {"ROWS": 128, "num_warps": 8}
        return [key | tile, tile | {"KEYS": few} | query, {"ROWS": QUERY_TILE} | tile]
    tile = {"KEYS": few, "num_warps": 8, "num_stages": 1}
    return [{"ROWS": 32} | tile, {"ROWS": 32} | tile, tile | {"ROWS": QUERY_TILE, "KEYS": 16}]


def _is_wider(sizes: Sizes) -> bool:
    """Returns whether both head dims are large, where 192/128 has one."""
    return min(sizes.dim, sizes.value_dim) > 128


def _is_ragged(sizes: Sizes, keys: int, is_causal: bool) -> bool:
    """Returns whether a routed block may end within a tile of keys.

    If causal, no query routes to the last block, which may be shorter than the others.
    """
    return sizes.block_size % keys != 0 or (not is_causal and sizes.kv_len % sizes.block_size != 0)
