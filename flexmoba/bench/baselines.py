"""The baselines of the benchmark: dense attention of torch, and other backends of flexmoba."""

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flexmoba.attention import flex_moba
from flexmoba.bench.configs import Config

Attention = Callable[..., Tensor]

FLASH_VERSIONS = ("FA3", "FA4")


def try_to_time(name: str, measured: Callable[[], float]) -> dict[str, float]:
    """Returns the time under a name, or nothing if the measurement fails, so that others go on."""
    try:
        return {name: measured()}
    except (RuntimeError, TypeError) as error:  # such as a missing backend
        print(f"{name} failed: {str(error).splitlines()[0]}", file=sys.stderr)
        return {}


def baselines(config: Config, device: torch.device) -> dict[str, Attention]:
    """Returns the functions of q, k and v to time beside `flex_moba`, by name."""
    if config.dense == "nothing":
        return {}
    if config.documents > 1:
        return _document_baselines(config, device)
    found = dense_attention(device, is_causal=True)
    if config.dense == "SDPA cuDNN":
        return {name: call for name, call in found.items() if name in ("SDPA", config.dense)}
    if device.type == "cuda":
        found |= {
            f"SDPA {version}": found["SDPA flash"]
            for version in FLASH_VERSIONS
            if why_not_flash(version) is None
        }
    if config.dense == "all" and device.type == "cuda":
        found["FlexAttention"] = _dense_flex_attention
    if config.dense in ("all", "routed") and device.type == "cuda":
        impls = ("routed", "masked") if config.correlated else ("routed",)
        for impl in impls if config.gate == "token" and config.topk is not None else ():
            found[impl] = functools.partial(_moba, config=config, impl=impl)
    return found


def dense_attention(device: torch.device, *, is_causal: bool) -> dict[str, Attention]:
    """Returns the backends of `scaled_dot_product_attention` on this device, by name."""
    backends: dict[str, Any] = {"SDPA": None}
    if device.type == "cuda":
        backends = {
            "SDPA flash": SDPBackend.FLASH_ATTENTION,
            "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
        }
    return {
        name: functools.partial(_sdpa, backend=backend, is_causal=is_causal)
        for name, backend in backends.items()
    }


def edges_of(config: Config, device: torch.device) -> Tensor:
    """Returns the boundaries of the documents of a row, ``(documents + 1,)`` int32."""
    edges = [0, *itertools.accumulate(config.lengths)]
    return torch.tensor(edges, dtype=torch.int32, device=device)


@functools.cache
def why_not_flash(version: str) -> str | None:
    """Returns the reason why torch cannot use a newer FlashAttention, ``"FA3"`` or ``"FA4"``."""
    try:
        with flash_of(f"SDPA {version}"):
            return None
    except (AttributeError, ImportError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


@contextlib.contextmanager
def flash_of(name: str) -> Iterator[None]:
    """Makes the FlashAttention that a baseline names the flash backend of torch."""
    version = name.removeprefix("SDPA ")
    if version not in FLASH_VERSIONS:
        yield
        return
    attention: Any = torch.nn.attention
    restore = attention.restore_flash_attention_impl  # an error before anything changes
    attention.activate_flash_attention_impl(version)
    try:
        yield
    finally:
        restore()


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, backend: Any, is_causal: bool) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=gqa)


def _dense_flex_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_moba(q, k, v, q.shape[2], None, impl="masked")


def _moba(q: Tensor, k: Tensor, v: Tensor, *, config: Config, impl: Any) -> Tensor:
    return flex_moba(q, k, v, config.block_size, config.topk, impl=impl)


def _document_baselines(config: Config, device: torch.device) -> dict[str, Attention]:
    """Returns MoBA over the tokens as one sequence, and dense attention within each document."""

    def unpacked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_moba(q, k, v, config.block_size, config.topk)

    found: dict[str, Attention] = {"one sequence": unpacked}
    if device.type == "cuda":
        from torch.nn.attention.varlen import varlen_attn

        edges = edges_of(config, device)
        bounds = 2 * (edges,) + 2 * (max(config.lengths),)

        def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
            out: Any = varlen_attn(q, k, v, *bounds, window_size=(-1, 0))  # causal
            return out.transpose(0, 1)[None]  # type: ignore[no-any-return]

        def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flex_moba(q, k, v, config.block_size, None, cu_seqlens=edges)

        found |= {"FlexAttention": flex, "varlen flash": varlen}
    return found
