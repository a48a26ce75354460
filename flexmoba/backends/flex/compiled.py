"""The only file that calls FlexAttention, with its versions, options and compilation."""

import functools
import itertools
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from flexmoba.backends.score_mod import ScoreMod
from flexmoba.runtime import HAS_TRITON, has_values

MIN_HEAD_DIM = 16
# For head dims such as 192/128 on Hopper: the fastest tiles of those in docs/performance.md.
_TILES = {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8, "fwd_num_stages": 3}
_TILES |= {"bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 128, "bwd_BLOCK_M2": 128, "bwd_BLOCK_N2": 32}
_TILES |= {"bwd_num_warps": 8, "bwd_num_stages": 2}
_INT32_OFFSETS = tuple(int(x) for x in torch.__version__.split(".")[:2]) < (2, 14)


def why_not_flex(q: Tensor, v: Tensor) -> str | None:
    """Returns the reason why FlexAttention's CUDA kernels do not support these inputs, or None.

    Args:
        q: Queries, ``(B, Hq, Lq, D)``.
        v: Values, ``(B, Hkv, Lk, Dv)``.
    """
    if not q.is_cuda:
        return f"needs inputs on CUDA, got {q.device}"
    if q.dtype == torch.float64:
        return "has no float64 kernels"
    if min(q.shape[-1], v.shape[-1]) < MIN_HEAD_DIM:
        return f"needs head dims of at least {MIN_HEAD_DIM}, got {q.shape[-1]} and {v.shape[-1]}"
    if not HAS_TRITON:
        return "needs Triton, which is not installed"
    return None


def call_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    scale: float,
    kernel_options: Mapping[str, Any] | None,
    score_mod: ScoreMod | None = None,
    *,
    divisible: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Calls FlexAttention.

    Args:
        q: Queries, ``(B, Hq, Lq, D)``.
        k: Keys, ``(B, Hkv, Lk, D)``, where ``Hkv`` divides ``Hq``.
        v: Values, ``(B, Hkv, Lk, Dv)``.
        block_mask: A mask with ``seq_lengths`` ``(Lq, Lk)``.
        scale: Factor on the scores.
        kernel_options: The caller's kernel options, which override the defaults here.
        score_mod: A function of every score, with the indices of this call.
        divisible: Whether both lengths are multiples of the mask's block sizes. None leaves it to
            the compiler, which cannot know it for symbolic lengths, and which before torch 2.14
            tests only for multiples of 128.

    Returns:
        The output ``(B, Hq, Lq, Dv)`` in the dtype of ``q`` and the log-sum-exp ``(B, Hq, Lq)``
        float32.

    Raises:
        NotImplementedError: The keys or values need 64-bit offsets, and this torch has only 32.
    """
    if _INT32_OFFSETS and max(x.shape[2] * x.stride(2) for x in (k, v)) >= 2**31:
        raise NotImplementedError(
            f"torch {torch.__version__} addresses keys with 32-bit offsets, too small for k of "
            f"shape {tuple(k.shape)}; split the call over batch or KV heads, or install torch 2.14"
        )
    # By default, FlexAttention selects a decoding kernel that rejects some of these shapes.
    options: dict[str, Any] = {"BACKEND": "TRITON"}
    if divisible is not None:
        options["IS_DIVISIBLE"] = divisible
    if _needs_tiles(q, v, block_mask):
        options |= _TILES
    options |= kernel_options or {}
    out, aux = flex_attention(  # type: ignore[call-overload]
        q,
        k,
        v,
        score_mod,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=options,
        return_aux=AuxRequest(lse=True),
    )
    return out, aux.lse


def _needs_tiles(q: Tensor, v: Tensor, block_mask: BlockMask) -> bool:
    """Returns whether a call has head dims such as 192/128, for which torch has no tiles on Hopper.

    Torch takes default tiles forward, and in the backward pass those of all head dims above 128.
    """
    return (
        128 < q.shape[-1] <= 192
        and v.shape[-1] <= 128
        and q.dtype in (torch.float16, torch.bfloat16)
        and all(size % 128 == 0 for size in block_mask.BLOCK_SIZE)  # the largest tile
        and q.is_cuda
        and not torch.version.hip  # whose GPUs have a major version of 9, too
        and torch.cuda.get_device_properties(q.device).major == 9
    )


def run_compiled(
    function: Callable[..., tuple[Tensor, Tensor]], *tensors: Tensor | None, **static: Any
) -> tuple[Tensor, Tensor]:
    """Calls ``function(*tensors, **static)`` compiled, and compiles each configuration once.

    Inside the caller's ``torch.compile``, the function is only traced. Outside, only lengths vary
    within one compiled function, and they become symbolic at the second length. Dynamo's
    recompilation limit, beyond which it would not compile, is therefore never reached.

    Args:
        function: A function of tensors and keyword arguments, one of them ``kernel_options``.
        tensors: Tensors of at most four dimensions, or None. The third dimension is a length.
        static: Hashable constants, and ``kernel_options``, a mapping or None.

    Returns:
        The output and the log-sum-exp that the function returns.
    """
    if torch.compiler.is_compiling():
        return function(*tensors, **static)
    # FlexAttention computes the shapes of its results for fake tensors without compilation.
    if tensors[0] is not None and not has_values(tensors[0]):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            return function(*tensors, **static)
    # Detached, tensors with and without requires_grad are one configuration. On CPU, FlexAttention
    # rejects tensors that require gradients.
    if not torch.is_grad_enabled():
        tensors = tuple(x if x is None else x.detach() for x in tensors)
    options = static.pop("kernel_options") or {}
    kinds = tuple(
        x if x is None else (x.device, x.dtype, x.shape[:2], x.shape[3:], x.requires_grad)
        for x in tensors
    )
    compiled = _compiled(
        function, tuple(static.items()), tuple(options.items()), kinds, torch.is_grad_enabled()
    )
    return compiled(*tensors)


@functools.cache
def _compiled(
    function: types.FunctionType,
    static: tuple[tuple[str, Any], ...],
    options: tuple[tuple[str, Any], ...],
    kinds: tuple[Any, ...],
    grad: bool,
) -> Callable[..., tuple[Tensor, Tensor]]:
    # Dynamo counts compilations per code object, so every configuration gets its own copy.
    name = f"{function.__name__}_{next(_serial)}"
    code = function.__code__.replace(co_name=name)
    copy = types.FunctionType(code, function.__globals__, name)
    copy.__kwdefaults__ = dict(static) | {"kernel_options": dict(options)}
    # CPU kernels of FlexAttention return no log-sum-exp, so CPU runs its eager implementation.
    backend = "inductor" if kinds[0][0].type == "cuda" else "eager"
    # With fullgraph, a function that dynamo cannot trace is an error. Without it, FlexAttention
    # would silently fall back to dense attention.
    return torch.compile(copy, fullgraph=True, backend=backend)


_serial = itertools.count()
