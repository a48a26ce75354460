"""Measures Native Sparse Attention: `flex_nsa`, or a decoding step with an `NsaCache`."""

from typing import Any

import torch
from torch import Tensor

from flexmoba.bench.baselines import dense_attention, try_to_time
from flexmoba.bench.calls import (
    ROUNDINGS,
    SAMPLED_QUERIES,
    largest_error,
    time_both,
    time_forward,
)
from flexmoba.bench.configs import CMP_BLOCK, CMP_STRIDE, WINDOW, Config
from flexmoba.bench.steps import STEPS, replayed_ms
from flexmoba.nsa import NsaCache, NsaSizes, block_means_of, flex_nsa, nsa_select


def measure_nsa(config: Config, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Measures one configuration of Native Sparse Attention and its dense baselines.

    Every branch has its own keys and values. Compressed keys and values are means, computed before
    the timed calls, except in decoding steps.

    Args:
        config: The configuration.
        device: Device of the inputs.
        dtype: Dtype of the inputs.

    Returns:
        ``error`` and ``allowed``; if the error is allowed, also median milliseconds by name and
        peak memory in MiB.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int, length: int, dim: int = config.head_dim) -> Tensor:
        shape = config.batch, heads, length, dim
        return torch.randn(shape, device=device, dtype=dtype, generator=generator)

    q_len = 1 if config.decode else config.length
    q, gates = normal(config.heads, q_len), normal(config.heads, q_len, 3).sigmoid()
    k, v, k_win, v_win, to_compress, values_to_compress = (
        normal(config.kv_heads, config.length) for _ in range(6)
    )
    sizes = NsaSizes(CMP_BLOCK, CMP_STRIDE, config.block_size, config.count, 1, 1)
    k_cmp, v_cmp = (block_means_of(x, sizes) for x in (to_compress, values_to_compress))
    inputs = [q, k, v, gates, k_cmp, v_cmp, k_win, v_win]
    with torch.no_grad():
        if config.decode:
            new = {"k_cmp": to_compress, "v_cmp": values_to_compress}
            new |= {"k_win": k_win, "v_win": v_win}
            return _measure_step(config, inputs, new)

        def attend() -> Tensor:
            return _attend(inputs, config)

        result = _errors(attend(), inputs, config)
        if not result["error"] <= result["allowed"]:
            return result
        result |= time_forward(attend, (q, k, v), config, device)
    if not config.backward:
        return result
    inputs[:] = [x.requires_grad_() for x in inputs]
    grad = normal(config.heads, config.length)
    return result | time_both(attend, inputs, grad, config, device)


def _attend(inputs: list[Tensor], config: Config) -> Tensor:
    q, k, v, gates, k_cmp, v_cmp, k_win, v_win = inputs
    return flex_nsa(
        *(q, k, v, gates),
        k_cmp=k_cmp,
        v_cmp=v_cmp,
        k_win=k_win,
        v_win=v_win,
        block_size=config.block_size,
        topk=config.count,
    )


def _measure_step(config: Config, inputs: list[Tensor], new: dict[str, Tensor]) -> dict[str, Any]:
    """Measures a step at the end of the context, and dense attention over all its keys."""
    q, k, v, gates = inputs[:4]
    cache = NsaCache(
        *(config.batch, config.kv_heads, config.head_dim),
        block_size=config.block_size,
        max_len=config.length + STEPS,
        dtype=q.dtype,
        device=q.device,
    )
    new = {"k": k, "v": v} | new
    # Projections leave the keys and values of a new token side by side.
    last = {name: x[:, :, -1:].contiguous() for name, x in new.items()}

    def step() -> Tensor:
        positions = cache.append(**last)
        return cache.attend(q, gates, positions, topk=config.count)[0]

    cache.append(**{name: x[:, :, :-1] for name, x in new.items()})
    result = _errors(step(), inputs, config)
    if not result["error"] <= result["allowed"]:
        return result
    result["step_ms"] = {config.name: replayed_ms(step, q.device)}
    for name, dense in dense_attention(q.device, is_causal=False).items():

        def attend(dense: Any = dense) -> Tensor:
            out: Tensor = dense(q, k, v)
            return out

        def measured(attend: Any = attend) -> float:
            return replayed_ms(attend, q.device)

        result["step_ms"] |= try_to_time(name, measured)
    return result


def _errors(out: Tensor, inputs: list[Tensor], config: Config) -> dict[str, Any]:
    """Returns the largest error of sampled queries and the allowed error."""
    q, k, _, gates, k_cmp, *_ = inputs
    first = k.shape[2] - q.shape[2]
    generator = torch.Generator().manual_seed(1)
    sample = torch.randint(q.shape[2], (SAMPLED_QUERIES,), generator=generator).to(q.device)
    selection = nsa_select(q, k_cmp, k.shape[2], block_size=config.block_size, topk=config.count)[
        :, :, sample
    ]
    exact = _exact_rows(inputs, selection, sample, sample + first, config)
    gates = gates[:, :, sample].double()
    largest = float(exact.abs().max())
    # Each branch rounds its output once, before its gate value weights it.
    allowed = ROUNDINGS[q.dtype] * torch.finfo(q.dtype).eps * largest * float(gates.sum(-1).max())
    return {"error": largest_error(out[:, :, sample], exact), "allowed": allowed}


def _exact_rows(
    inputs: list[Tensor], selection: Tensor, row: Tensor, position: Tensor, config: Config
) -> Tensor:
    """Computes the attention of some queries in float64, one head at a time.

    Args:
        inputs: The tensors of the call.
        selection: The selected blocks of each query, ``(B, Hkv, n, topk)`` int32.
        row: The index of each query, ``(n,)`` int64.
        position: Its position, ``(n,)`` int64.
        config: The configuration.
    """
    q, k, v, gates, k_cmp, v_cmp, k_win, v_win = inputs
    key = torch.arange(k.shape[2], device=q.device)
    end = torch.arange(k_cmp.shape[2], device=q.device) * CMP_STRIDE + CMP_BLOCK - 1
    past = key <= position[:, None]
    in_window = past & (key > position[:, None] - WINDOW)
    exact = q.new_zeros((*q.shape[:2], len(row), v.shape[3]), dtype=torch.float64)
    for b in range(config.batch):
        for h in range(config.heads):
            kv = h // (config.heads // config.kv_heads)
            chosen = (selection[b, kv, :, :, None] == key // config.block_size).any(1) & past
            seen = end <= position[:, None]
            branches = (k_cmp, v_cmp, seen), (k, v, chosen), (k_win, v_win, in_window)
            for c, (keys, values, mask) in enumerate(branches):
                scores = q[b, h, row].double() @ keys[b, kv].double().T * config.head_dim**-0.5
                weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0.0)
                weighted = weights @ values[b, kv].double()
                exact[b, h] += gates[b, h, row, c, None].double() * weighted
    return exact
