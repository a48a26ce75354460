"""Compares results with the targets of their configurations."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from flexmoba.bench.configs import DENSE, TARGETS, Config

_Results = Sequence[tuple[Config, dict[str, Any]]]

_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def target_rows(results: _Results, dtype: str) -> list[dict[str, str]]:
    """Returns a table row for each result whose configuration has a target.

    Args:
        results: Configurations and their results.
        dtype: The dtype of the inputs.

    Returns:
        The cells of each row by heading. *Buffers* is the peak memory of a forward call beyond
        inputs and output, divided by the size of q and the output.
    """
    rows = []
    for config, result in results:
        if not config.target:
            continue
        row = {"batch x heads x length, block, topk": str(config), "quantity": config.target}
        for title, key, target in (
            ("forward", "forward_ms", config.forward_target),
            ("both ways", "both_ms", config.both_target),
        ):
            value = _value(config, result, key, results)
            row[title] = "" if value is None else f"{value:.4g}"
            row[f"{title}: target"] = _target(config, value, target)
        row["buffers"] = _buffers(config, result, dtype)
        memory = result.get("both_MiB")
        row["both ways: peak MiB"] = "" if memory is None else f"{memory:.0f}"
        rows.append(row)
    return rows


def _value(config: Config, result: dict[str, Any], key: str, results: _Results) -> float | None:
    """Returns the quantity of a result that has a target, or None if it was not measured."""
    times: dict[str, float] = result.get(key) or {}
    ours = times.get(config.name)
    if ours is None:
        return None
    if config.target == "milliseconds":
        return ours
    if config.target == "share of the gate":
        split: dict[str, float] | None = result.get("split_ms")
        return split["gate"] / ours if split else None
    if config.target == "time of head dim 128":
        other = _times_of_head_dim_128(config, key, results).get(config.name)
        return None if other is None else ours / other
    names = DENSE if config.target == "times the fastest" else ("SDPA cuDNN",)
    dense = [ms for name, ms in times.items() if name in names]
    return min(dense) / ours if dense else None


def _times_of_head_dim_128(config: Config, key: str, results: _Results) -> dict[str, float]:
    sizes = _sizes(dataclasses.replace(config, head_dim=128, value_dim=None))
    for other, result in results:
        if _sizes(other) == sizes:
            times: dict[str, float] = result.get(key) or {}
            return times
    return {}


def _sizes(config: Config) -> Config:
    """Returns the configuration without baselines and targets."""
    return dataclasses.replace(
        config, dense="all", backward=True, target="", forward_target=0, both_target=0
    )


def _target(config: Config, value: float | None, target: float) -> str:
    """Formats a target, and whether a value reaches it."""
    if not target:
        return ""
    if value is None:
        return f"{target:g}"
    reached = value >= target if TARGETS[config.target] == "least" else value <= target
    return f"{target:g} ({'reached' if reached else 'missed'})"


def _buffers(config: Config, result: dict[str, Any], dtype: str) -> str:
    peak = result.get("forward_MiB")
    if peak is None:
        return ""
    queries = config.batch * config.heads * config.length * _BYTES[dtype] / 2**20
    inputs = (config.head_dim + config.values_dim) * queries
    return f"{(peak - config.values_dim * queries) / inputs:.2f}x"
