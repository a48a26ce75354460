"""Validation of the arguments of users, by metadata only, so that nothing waits for the device.

Every message names the offending values and the remedy.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention.flex_attention import AuxRequest

from flexmoba.blocks import TILE
from flexmoba.runtime import accepts, described, has_values, is_transformed, values_readable

GateName = Literal["token", "group", "tile"]
GATES: tuple[GateName, ...] = get_args(GateName)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_queries_and_keys(q: Tensor, k: Tensor) -> None:
    """Raises unless q and k have matching shapes, one dtype and one device."""
    check_tensor("q", q)
    check_tensor("k", k)
    check_alike("q", q, "k", k)
    if q.shape[0] != k.shape[0]:
        raise ValueError(
            f"q and k must have the same batch size, got {q.shape[0]} and {k.shape[0]} "
            f"(q {tuple(q.shape)}, k {tuple(k.shape)}); call expand on one of them"
        )
    if q.shape[3] != k.shape[3] or q.shape[3] == 0:
        raise ValueError(
            f"q and k must have the same positive head dim, got {q.shape[3]} and {k.shape[3]} "
            f"(q {tuple(q.shape)}, k {tuple(k.shape)})"
        )
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(
            f"the number of query heads must be a positive multiple of the number of KV heads, "
            f"got Hq={q.shape[1]} and Hkv={k.shape[1]}; call .transpose(1, 2) on "
            "tensors (B, L, H, D) to get (B, H, L, D)"
        )
    if q.shape[2] > k.shape[2]:
        raise ValueError(
            f"there must be at least as many keys as queries, got Lq={q.shape[2]} and "
            f"Lk={k.shape[2]}; pass all keys up to the last query"
        )


def check_values(k: Tensor, v: Tensor) -> None:
    """Raises unless every key has one value, of the same dtype and device."""
    check_tensor("v", v)
    check_alike("k", k, "v", v)
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"k and v must agree in batch, heads and length, got {tuple(k.shape)} and "
            f"{tuple(v.shape)}; pass one value for every key"
        )
    if v.shape[3] == 0:
        raise ValueError(f"v must have a positive head dim, got shape {tuple(v.shape)}")


def check_no_tangents(**tensors: Tensor) -> None:
    """Raises if a tensor has a forward-mode tangent.

    Without this check, torch's custom operators would silently give derivatives of zero.
    """
    for name, x in tensors.items():
        if forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"attention has no forward-mode derivatives, but {name} has a tangent; use "
                "torch.autograd.grad or .backward(), not torch.func.jvp or jacfwd"
            )


def check_block_size(block_size: int) -> None:
    """Raises unless ``block_size`` is a positive integer."""
    check_positive("block_size", block_size, "pass the number of keys in a block, such as 512")


def check_topk(topk: int | None, *, none_allowed: bool = False) -> None:
    """Raises unless ``topk`` is a positive integer, or None if ``none_allowed``."""
    if topk is None and none_allowed:
        return
    remedy = "pass the number of blocks that a query attends to, including its own"
    if none_allowed:
        remedy += ", or None for full attention"
    check_positive("topk", topk, remedy)


def check_gate(
    gate: str,
    sink_blocks: int,
    local_blocks: int,
    offset: int | None,
    block_size: int,
    topk: int | None,
    *,
    is_causal: bool,
) -> None:
    """Raises unless the gate exists and its options match block size, topk and offset.

    ``offset`` is the position of the first query; None with a cache, which keeps earlier queries.
    """
    if gate not in GATES:
        raise ValueError(f"gate must be one of {', '.join(map(repr, GATES))}, got {gate!r}")
    for name, value in (("sink_blocks", sink_blocks), ("local_blocks", local_blocks)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    if local_blocks and not is_causal:
        raise ValueError(
            f"local_blocks={local_blocks} and is_causal=False cannot be combined: non-causal "
            "attention has no own block; use local_blocks=0"
        )
    always = sink_blocks + local_blocks + int(is_causal)
    if topk is not None and topk < always:
        raise ValueError(
            f"topk={topk} is too small for sink_blocks={sink_blocks} and "
            f"local_blocks={local_blocks}{' and the own block' if is_causal else ''}; use at least "
            f"{always}"
        )
    if gate == "tile":
        if block_size % TILE != 0:
            raise NotImplementedError(
                f'gate="tile" needs a multiple of {TILE} as block size, got '
                f'block_size={block_size}; use such a block size, or gate="token"'
            )
        if offset is not None and offset % TILE != 0:
            raise NotImplementedError(
                f'gate="tile" needs the first query of every tile, got queries from '
                f"position {offset} on; begin at a multiple of {TILE}, or pass a cache, which "
                "keeps that query"
            )


def check_gate_block_size(gate_block_size: int | None, block_size: int) -> int:
    """Returns the number of sub-blocks in a block; raises unless their size divides the block."""
    if gate_block_size is None:
        return 1
    check_positive("gate_block_size", gate_block_size, "pass a divisor of block_size, or None")
    if block_size % gate_block_size != 0:
        raise ValueError(
            f"gate_block_size must divide block_size, got gate_block_size={gate_block_size} and "
            f"block_size={block_size}; pass a divisor"
        )
    return block_size // gate_block_size


def check_selection(selection: Tensor, q: Tensor, kv_heads: int) -> None:
    """Raises unless shape, dtype and device of a selection match q, with rows per head or KV head.

    `check_selected_blocks` checks its values.
    """
    if not isinstance(selection, Tensor):
        raise TypeError(f"selection must be a tensor, got {type(selection).__name__}")
    if selection.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"selection must hold int32 (or int64) block indices, got {selection.dtype}; "
            "call .int() on it"
        )
    batch, heads, q_len, _ = q.shape
    rows = [(batch, n, q_len) for n in (heads, kv_heads)]
    if selection.ndim != 4 or selection.shape[:3] not in rows or selection.shape[3] == 0:
        raise ValueError(
            f"selection must be (B, Hq, Lq, topk) = {(*rows[0], 'topk')}, or (B, Hkv, Lq, topk), "
            f"got {tuple(selection.shape)}; pass one row for every query token and head"
        )
    if selection.device != q.device:
        raise ValueError(
            f"selection must be on the device of q ({q.device}), got {selection.device}; "
            "move it with .to(q.device)"
        )


def check_selected_blocks(selection: Tensor, n_blocks: int) -> None:
    """Raises unless a selection is valid: every value is a block or -1, and no row repeats a block.

    Reads the values, so on CUDA the host waits for the device.

    Args:
        selection: Block indices, ``(B, Hq, Lq, topk)``, int32 or int64, as `selected_attention`
            takes them.
        n_blocks: Number of blocks of the keys; with packed documents, of all documents of a row.

    Raises:
        ValueError: An index is out of range, or a row repeats a block.
    """
    if selection.numel() == 0:
        return
    low, high = int(selection.min()), int(selection.max())
    if low < -1 or high >= n_blocks:
        raise ValueError(
            f"selection must hold block indices from 0 to {n_blocks - 1}, or -1 for none, got "
            f"{low if low < -1 else high}; number the blocks from 0"
        )
    ordered = selection.sort(dim=-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if bool(twice.any()):
        b, h, i, column = (int(x) for x in twice.nonzero()[0])
        raise ValueError(
            f"selection must not list a block twice for one query, got block "
            f"{int(ordered[b, h, i, column])} twice for query {i} of batch {b}, head {h}; "
            "replace repetitions by -1"
        )


def check_documents(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None,
    document_ids: Tensor | None,
    key_padding_mask: Tensor | None,
    *,
    max_seqlen: int | None = None,
) -> None:
    """Raises unless at most one argument defines the sequences of a row, and is valid.

    Reads values on CPU only.
    """
    given = {
        "cu_seqlens": cu_seqlens,
        "document_ids": document_ids,
        "key_padding_mask": key_padding_mask,
    }
    names = [name for name, value in given.items() if value is not None]
    if max_seqlen is not None:
        check_positive("max_seqlen", max_seqlen, "pass the length of the longest document")
        if cu_seqlens is None and document_ids is None:
            raise ValueError(
                f"max_seqlen={max_seqlen} needs packed documents; pass cu_seqlens or document_ids "
                "too, or omit max_seqlen"
            )
    if not names:
        return
    name, x = names[0], given[names[0]]
    if len(names) > 1:
        raise ValueError(
            f"{name} and {names[1]} both define the sequences of a row; pass one of them"
        )
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    ints = (torch.int32, torch.int64)
    dtypes = (torch.bool,) if name == "key_padding_mask" else ints
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {x.dtype}; cast it")
    if x.device != q.device:
        raise ValueError(f"{name} must be on the device of q ({q.device}), got {x.device}; move it")
    if q.shape[2] != k.shape[2]:
        raise NotImplementedError(
            f"{name} needs as many queries as keys, got Lq={q.shape[2]} and Lk={k.shape[2]}; "
            "pass one query for every key"
        )
    if name == "cu_seqlens":
        if x.ndim != 1 or x.shape[0] < 2 or k.shape[0] != 1:
            raise ValueError(
                f"cu_seqlens must be (n + 1,) for a batch of 1, got {tuple(x.shape)} and a batch "
                f"of {k.shape[0]}; use document_ids for larger batches"
            )
    elif x.shape != (k.shape[0], k.shape[2]):
        raise ValueError(
            f"{name} must be (B, Lk) = {(k.shape[0], k.shape[2])}, got {tuple(x.shape)}; "
            "pass one value for every token"
        )
    if name == "document_ids" and not has_values(x):
        raise NotImplementedError(
            "document_ids must be read to count the documents, but fake tensors and tensors "
            "inside torch.compile or torch.func have no values; pass cu_seqlens"
        )
    if name == "cu_seqlens" and values_readable(x):
        _check_bounds(x, k.shape[2], max_seqlen)


def _check_bounds(cu_seqlens: Tensor, length: int, max_seqlen: int | None) -> None:
    first, last, shortest = int(cu_seqlens[0]), int(cu_seqlens[-1]), int(cu_seqlens.diff().min())
    if first != 0 or last != length or shortest < 0:
        raise ValueError(
            f"cu_seqlens must rise from 0 to Lk={length}, got {first} to {last} with a smallest "
            f"step of {shortest}; begin with 0, end with the length, and sort the boundaries"
        )
    check_longest(int(cu_seqlens.diff().max()), max_seqlen)


def check_longest(longest: int, max_seqlen: int | None) -> None:
    """Raises if the longest document has more than ``max_seqlen`` tokens."""
    if max_seqlen is not None and longest > max_seqlen:
        raise ValueError(
            f"no document may be longer than max_seqlen={max_seqlen}, got one of {longest} tokens; "
            "pass the length of the longest document, or omit max_seqlen"
        )


def check_options(
    scale: float | None,
    score_mod: Callable[..., Tensor] | None,
    kernel_options: Mapping[str, Any] | None,
    return_aux: AuxRequest | None,
) -> None:
    """Raises unless the options that all attention functions share are valid."""
    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise TypeError(
                f"scale must be a Python number or None, got {type(scale).__name__}; "
                "pass None for 1 / sqrt(head dim)"
            )
        if not -math.inf < scale < math.inf:  # math.isfinite does not accept compiled symbols
            raise ValueError(f"scale must be finite, got {scale}; pass None for 1 / sqrt(head dim)")
    if score_mod is not None and not accepts(score_mod, 5):
        raise TypeError(
            f"score_mod must be a function (score, b, h, q_idx, kv_idx) -> score or None, got "
            f"{described(score_mod)}"
        )
    if kernel_options is not None and not isinstance(kernel_options, Mapping):
        raise TypeError(
            f"kernel_options must be a dict of FlexAttention kernel options or None, got "
            f"{type(kernel_options).__name__}"
        )
    if return_aux is not None and not isinstance(return_aux, AuxRequest):
        raise TypeError(
            "return_aux must be torch.nn.attention.flex_attention.AuxRequest(lse=True) or None, "
            f"got {type(return_aux).__name__}"
        )
    if return_aux is not None and return_aux.max_scores:
        raise NotImplementedError(
            "return_aux=AuxRequest(max_scores=True) is not supported, because partial outputs are "
            "merged by their log-sum-exps alone; pass AuxRequest(lse=True)"
        )


def check_tensor(name: str, x: Tensor) -> None:
    """Raises unless ``x`` is a strided, floating point tensor of four dimensions."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(
            f"{name} must be a strided tensor, got layout {x.layout}; of a nested tensor of "
            "components (length, heads, head dim), pass values().transpose(0, 1)[None], and "
            "offsets() as cu_seqlens"
        )
    if not torch.compiler.is_compiling() and is_transformed(x):
        raise NotImplementedError(
            f"attention does not support transforms of torch.func, but {name} is inside one; use "
            "torch.autograd.grad or .backward() instead of grad, vjp and jacrev, and the batch "
            "dimension instead of vmap"
        )
    if x.ndim != 4:
        raise ValueError(
            f"{name} must have four dimensions (batch, heads, length, head dim), got "
            f"{x.ndim} in shape {tuple(x.shape)}; add the missing dimensions with unsqueeze"
        )
    if x.dtype not in DTYPES:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}; cast it first"
        )


def check_alike(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Raises unless two tensors have the same dtype and device."""
    if x.dtype != other.dtype:
        raise ValueError(
            f"{name} and {other_name} must have the same dtype, got {x.dtype} and {other.dtype}; "
            "cast one with .to(dtype)"
        )
    if x.device != other.device:
        raise ValueError(
            f"{name} and {other_name} must be on the same device, got {x.device} and "
            f"{other.device}; move one with .to(device)"
        )


def check_positive(name: str, value: Any, remedy: str) -> None:
    """Raises unless ``value`` is a positive integer; ``remedy`` ends the message."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__}); {remedy}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}; {remedy}")
