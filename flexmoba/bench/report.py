"""Shows what was measured: tables in Markdown, and a picture."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from flexmoba.bench.configs import Config


def tables(report: dict[str, Any]) -> str:
    """A report as Markdown: times forward and both ways, then where the forward time goes."""
    results = [(_config(result), result) for result in report["results"]]
    parts = []
    for title, backward in (("Forward", False), ("Forward and backward", True)):
        rows = [
            row
            for config, result in results
            if (row := _times_row(config, result, report, backward))
        ]
        if rows:
            dense = [name for name in DENSE if any(name in row for row in rows)]
            heads = [_CONFIG, "sparsity", "flex_moba ms", "TFLOP/s", "of a matmul's", *dense]
            parts.append(f"{title}\n\n{_table([*heads, _MIB], rows)}")
    steps = [row for config, result in results if (row := _step_row(config, result))]
    if steps:
        dense = [name for name in DENSE if any(name in row for row in steps)]
        parts.append(f"Decoding steps\n\n{_table([_STEP, 'flex_moba ms', *dense], steps)}")
    splits = [
        {_CONFIG: str(config), "all": f"{result['forward_ms']['flex_moba']:.2f}"}
        | {stage: f"{ms:.2f}" for stage, ms in result["split_ms"].items()}
        for config, result in results
        if result.get("split_ms")
    ]
    if splits:
        stages = list(dict.fromkeys(stage for row in splits for stage in row))
        parts.append(f"Where the forward time goes, in ms\n\n{_table(stages, splits)}")
    return "\n\n".join(parts)


DENSE = ("SDPA", "SDPA flash", "SDPA cuDNN", "FlexAttention", "varlen flash", "one sequence")
_CONFIG, _MIB = "batch x heads x length, block, topk", "peak MiB"
_STEP = "batch x heads x context, block, topk"


def _config(result: dict[str, Any]) -> Config:
    """That of a result, which may be older than some fields."""
    return Config(**{f.name: result[f.name] for f in fields(Config) if f.name in result})


def _step_row(config: Config, result: dict[str, Any]) -> dict[str, str] | None:
    if not config.decode:
        return None
    if "step_ms" not in result:
        return {_STEP: str(config), "flex_moba ms": _wrong(result)}
    ours = result["step_ms"]["flex_moba"]
    row = {_STEP: str(config), "flex_moba ms": f"{ours:.3f}"}
    return row | {
        name: f"{ms:.3f} ({ms / ours:.1f}x)"
        for name, ms in result["step_ms"].items()
        if name in DENSE
    }


def _wrong(result: dict[str, Any]) -> str:
    return f"WRONG: error {result['error']:.3g} > {result['allowed']:.3g}"


def _times_row(
    config: Config, result: dict[str, Any], report: dict[str, Any], backward: bool
) -> dict[str, str] | None:
    if config.decode:
        return None
    if "forward_ms" not in result:
        return {_CONFIG: str(config), "flex_moba ms": _wrong(result)}
    times = result.get("both_ms") if backward else result["forward_ms"]
    if not times:
        return None
    ours, memory = times["flex_moba"], result["both_MiB" if backward else "forward_MiB"]
    rate = config.flop(backward=backward) / ours / 1e9
    return {
        _CONFIG: str(config),
        "sparsity": f"{1 - config.pairs / config.dense_pairs:.1%}",
        "flex_moba ms": f"{ours:.2f}",
        "TFLOP/s": f"{rate:.3g}",
        "of a matmul's": f"{rate / report['matrix_tflops']:.0%}",
        **{name: f"{ms:.2f} ({ms / ours:.1f}x)" for name, ms in times.items() if name in DENSE},
        _MIB: "" if memory is None else f"{memory:.0f}",
    }


def _table(heads: list[str], rows: list[dict[str, str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([row.get(head, "") for head in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """Draws the times of a report as bars."""
    from matplotlib.figure import Figure

    titles = {
        "forward_ms": "forward",
        "both_ms": "forward and backward",
        "step_ms": "a decoding step",
    }
    titles = {key: x for key, x in titles.items() if any(r.get(key) for r in report["results"])}
    figure = Figure(figsize=(11, 1.2 + 0.55 * len(report["results"])), layout="constrained")
    panels = figure.subplots(1, max(1, len(titles)), squeeze=False)[0]
    for axes, (key, title) in zip(panels, titles.items(), strict=False):
        names = ["flex_moba", *DENSE]
        results = [result for result in report["results"] if result.get(key)]
        names = [name for name in names if any(name in (r.get(key) or ()) for r in results)]
        for i, name in enumerate(names):
            at = [y + (i - (len(names) - 1) / 2) * 0.8 / len(names) for y in range(len(results))]
            times = [(result.get(key) or {}).get(name, float("nan")) for result in results]
            axes.barh(at, times, 0.8 / len(names), label=name)
        axes.set(title=f"{title}, milliseconds", xscale="log")
        axes.set_yticks(range(len(results)), [str(_config(result)) for result in results])
        axes.grid(axis="x", alpha=0.3)
        axes.invert_yaxis()
    panels[0].legend()
    figure.suptitle(f"{report['device']}, torch {report['torch']}, {report['dtype']}")
    figure.savefig(path, dpi=120)
