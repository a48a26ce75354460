"""The only file that calls FlexAttention: its versions, its options, its compilation."""

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
_INT32_OFFSETS = tuple(int(x) for x in torch.__version__.split(".")[:2]) < (2, 14)


def why_not_flex(q: Tensor, v: Tensor) -> str | None:
    """Why FlexAttention's CUDA kernels cannot take these inputs; None if they can."""
    if not q.is_cuda:
        return f"needs CUDA, the inputs are on {q.device}"
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
    """FlexAttention of ``q (B, Hq, Lq, D)`` over ``k, v (B, Hkv, Lk, D)``: output and log-sum-exp.

    Args:
        q: Queries.
        k: Keys, of heads that divide the queries'.
        v: Values.
        block_mask: What to visit, of ``seq_lengths`` ``(Lq, Lk)``.
        scale: Factor on the scores.
        kernel_options: The user's, which win over ours.
        score_mod: What to do with every score; its places are those of this call.
        divisible: Whether both lengths are multiples of the mask's block sizes; None to leave it to
            the compiler, which cannot see it when lengths are symbolic, and before torch 2.14 looks
            at multiples of 128 alone.
    """
    if _INT32_OFFSETS and max(x.shape[2] * x.stride(2) for x in (k, v)) >= 2**31:
        raise NotImplementedError(
            f"torch {torch.__version__} reads keys with 32-bit offsets, too few for k of shape "
            f"{tuple(k.shape)}: split the call over batch or KV heads, or install torch 2.14"
        )
    # The automatic choice of a decoding kernel refuses some of our shapes.
    options: dict[str, Any] = {"BACKEND": "TRITON"}
    if divisible is not None:
        options["IS_DIVISIBLE"] = divisible
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


def run_compiled(
    function: Callable[..., tuple[Tensor, Tensor]], *tensors: Tensor | None, **static: Any
) -> tuple[Tensor, Tensor]:
    """Calls ``function(*tensors, **static)`` compiled, each configuration compiled once.

    Inside somebody's own ``torch.compile`` the function is simply traced. Outside, only lengths
    may vary within one compiled function, and they become symbolic at the second one: dynamo's
    recompilation limit, beyond which it would give up, is never reached.
    """
    if torch.compiler.is_compiling():
        return function(*tensors, **static)
    if tensors[0] is not None and not has_values(
        tensors[0]
    ):  # fake tensors, of which FlexAttention knows the shapes itself
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            return function(*tensors, **static)
    if not torch.is_grad_enabled():  # spares a compilation, and the CPU refuses the flag itself
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
    # Dynamo counts compilations per code object: every configuration gets one of its own.
    name = f"{function.__name__}_{next(_serial)}"
    code = function.__code__.replace(co_name=name)
    copy = types.FunctionType(code, function.__globals__, name)
    copy.__kwdefaults__ = dict(static) | {"kernel_options": dict(options)}
    # CPU kernels of FlexAttention return no log-sum-exp; the plain one serves as a cross-check.
    backend = "inductor" if kinds[0][0].type == "cuda" else "eager"
    # fullgraph: should dynamo ever give up, that is an error, not a silent fall to dense attention.
    return torch.compile(copy, fullgraph=True, backend=backend)


_serial = itertools.count()
