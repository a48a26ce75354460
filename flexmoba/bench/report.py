"""Formats the results of a benchmark as Markdown tables and as a figure."""

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from flexmoba.bench.configs import DENSE, Config, size
from flexmoba.bench.targets import target_rows
from flexmoba.reporting import faster_from, log_scale, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def tables(report: dict[str, Any]) -> str:
    """Formats a report as Markdown: times of calls and of steps, then forward times by stage."""
    results = [(_config(result), result) for result in report["results"]]
    parts = []
    for title, backward in (("Forward", False), ("Forward and backward", True)):
        # Documents have other baselines; one table with all columns would be too wide.
        for suffix in ("", ", packed documents", _NSA):
            rows = [
                row
                for config, result in results
                if _suffix(config) == suffix
                and (row := _times_row(config, result, report, backward))
            ]
            if rows:
                dense = [name for name in _BASELINES if any(name in row for row in rows)]
                ours = _OURS[suffix == _NSA]
                share = [_SHARE] if len(dense) < 5 else []  # more columns would not fit the site
                headings = [_CONFIG, "sparsity", ours, "TFLOP/s", *share, *dense, _MIB]
                parts.append(f"{title}{suffix}\n\n{_table(headings, rows)}")
    for suffix in ("", _NSA, _PAGES):
        steps = [
            row
            for config, result in results
            if _suffix(config) == suffix and (row := _step_row(config, result))
        ]
        if steps:
            others = [name for name in _BASELINES if any(name in row for row in steps)]
            table = _table([_STEP, _OURS[suffix == _NSA], *others], steps)
            parts.append(f"Decoding steps{suffix}\n\n{table}")
    training = [row for config, result in results if (row := _training_row(config, result))]
    if training:
        headings = [_CONFIG, "flex_moba ms", "topk=None", "SDPA"]
        parts.append(f"Training steps\n\n{_table(headings, training)}")
    splits = [
        {_CONFIG: str(config), "all": f"{result['forward_ms']['flex_moba']:.2f}"}
        | {stage: f"{ms:.2f}" for stage, ms in result["split_ms"].items()}
        for config, result in results
        if result.get("split_ms")
    ]
    if splits:
        stages = list(dict.fromkeys(stage for row in splits for stage in row))
        parts.append(f"Forward time by stage, in ms\n\n{_table(stages, splits)}")
    alone = [
        {_CONFIG: str(config)}
        | {way: f"{result[key]:.2f}" for way, key in _ALONE.items() if key in result}
        for config, result in results
        if any(key in result for key in _ALONE.values())
    ]
    if alone:
        parts.append(f"One call on an idle GPU, in ms\n\n{_table([_CONFIG, *_ALONE], alone)}")
    if rows := targets(report):
        parts.append(f"Targets\n\n{_table(list(rows[0]), rows)}")
    parts += _break_even_texts(report["results"])
    return "\n\n".join(parts)


def targets(report: dict[str, Any]) -> list[dict[str, str]]:
    """Returns the rows of the table of targets, by heading; empty for a report without targets."""
    results = [(_config(result), result) for result in report["results"]]
    return target_rows(results, report.get("dtype", "bfloat16"))


# With a cache in place of pages, and with other backends of flex_moba.
_BASELINES = ("MobaCache", *DENSE, "routed", "masked")
_CONFIG = "batch x heads x length, block, topk"
_ALONE = {"forward": "forward_alone_ms", "forward + backward": "both_alone_ms"}
_SHARE, _MIB = "of matmul", "peak MiB"
_STEP = "batch x heads x context, block, topk"
_NSA, _PAGES = ", Native Sparse Attention", ", pages"
_OURS = {False: "flex_moba ms", True: "flex_nsa ms"}  # by `Config.nsa`


# Fields in which configurations of the same kind may differ.
_ALIKE: dict[str, Any] = {
    "length": 0,
    "backward": True,
    "dense": "all",
    "target": "",
    "forward_target": 0,
    "both_target": 0,
}


def _suffix(config: Config) -> str:
    """Returns the end of the title of a configuration's table."""
    if config.nsa or config.paged:
        return _NSA if config.nsa else _PAGES
    return "" if config.documents == 1 else ", packed documents"


_TIMES = {
    "step_ms": "step",
    "training_ms": "training step",
    "forward_ms": "forward",
    "both_ms": "both ways",
}


def line(result: dict[str, Any]) -> str:
    """Formats the result of one configuration as a line."""
    parts = [bad] if (bad := _wrong(result)) else []
    for key, name in _TIMES.items():
        if times := result.get(key):
            ours = times[_config(result).name]
            others = [
                f", {x} {ms:.4g} ({ms / ours:.1f}x)" for x, ms in times.items() if x in _BASELINES
            ]
            parts.append(f"{name} {ours:.4g} ms{''.join(others)}")
    return f"{_config(result)}: {'; '.join(parts)}"


def _break_even_texts(results: list[dict[str, Any]]) -> list[str]:
    """Returns the length from which MoBA is faster than the fastest dense attention, as text.

    It compares results that differ only in length, and needs at least two of them.
    """
    alike: dict[Config, list[dict[str, Any]]] = {}
    for result in results:
        config = replace(_config(result), **_ALIKE)
        if not config.decode and not config.layers and config.documents == 1:
            alike.setdefault(config, []).append(result)
    texts = []
    for key, name in (("forward_ms", "forward"), ("both_ms", "forward and backward")):
        for config, group in alike.items():
            times = [
                (result["length"], result[key][config.name], min(dense))
                for result in group
                if (dense := [ms for x, ms in (result.get(key) or {}).items() if x in DENSE])
            ]
            if len(times) > 1:
                start, longest = faster_from(times), max(times)[0]
                heads = f"{'NSA, ' if config.nsa else ''}{config.heads}/{config.kv_heads} heads"
                texts.append(
                    f"{heads}, block {config.block_size}, topk {config.topk}, {name}: "
                    + ("faster than dense attention " if start else "not faster ")
                    + (f"from {size(start)} tokens" if start else f"at {size(longest)} tokens")
                )
    return ["\n".join(texts)] if texts else []


def _config(result: dict[str, Any]) -> Config:
    """Returns the configuration of a result; older results lack some fields."""
    return Config(**{f.name: result[f.name] for f in fields(Config) if f.name in result})


def _training_row(config: Config, result: dict[str, Any]) -> dict[str, str] | None:
    if not config.layers:
        return None
    if not result.get("training_ms"):
        return {_CONFIG: str(config), "flex_moba ms": _wrong(result)}
    ours = result["training_ms"]["flex_moba"]
    row = {_CONFIG: str(config), "flex_moba ms": f"{ours:.1f}"}
    return row | {
        name: f"{ms:.1f} ({ms / ours:.2f}x)"
        for name, ms in result["training_ms"].items()
        if name in DENSE
    }


def _step_row(config: Config, result: dict[str, Any]) -> dict[str, str] | None:
    if not config.decode:
        return None
    if "step_ms" not in result:
        return {_STEP: str(config), _OURS[config.nsa]: _wrong(result)}
    ours = result["step_ms"][config.name]
    row = {_STEP: str(config), _OURS[config.nsa]: f"{ours:.3f}"}
    return row | {
        name: f"{ms:.3f} ({ms / ours:.1f}x)"
        for name, ms in result["step_ms"].items()
        if name in _BASELINES
    }


def _wrong(result: dict[str, Any]) -> str:
    """Returns the reason why times are missing, empty if none are."""
    if "failed" in result:
        return f"FAILED: {result['failed']}"
    if result["error"] > result["allowed"]:
        return f"WRONG: error {result['error']:.3g} > {result['allowed']:.3g}"
    return ""


def _times_row(
    config: Config, result: dict[str, Any], report: dict[str, Any], backward: bool
) -> dict[str, str] | None:
    if config.decode or config.layers:
        return None
    times = result.get("both_ms" if backward else "forward_ms")
    if not times:
        wrong = _wrong(result)
        return {_CONFIG: str(config), _OURS[config.nsa]: wrong} if wrong else None
    ours, memory = times[config.name], result["both_MiB" if backward else "forward_MiB"]
    rate = config.flop(backward=backward) / ours / 1e9
    return {
        _CONFIG: str(config),
        "sparsity": f"{1 - config.pairs / config.dense_pairs:.1%}",
        _OURS[config.nsa]: f"{ours:.2f}",
        "TFLOP/s": f"{rate:.3g}",
        _SHARE: f"{rate / report['matrix_tflops']:.0%}",
        **{
            name: f"{ms:.2f} ({ms / ours:.1f}x)" for name, ms in times.items() if name in _BASELINES
        },
        _MIB: "" if memory is None else f"{memory:.0f}",
    }


def _table(headings: list[str], rows: list[dict[str, str]]) -> str:
    cells = ([row.get(heading, "") for heading in headings] for row in rows)
    lines = [headings, ["---"] * len(headings), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(report: dict[str, Any]) -> "Figure":
    """Draws the times of a report as bars: first the calls, then the decoding steps.

    Raises:
        ValueError: The report has no times.
    """
    kinds = (
        {"forward_ms": "forward", "both_ms": "forward and backward"},
        {"step_ms": "decoding step"},
        {"training_ms": "training step"},
    )
    groups = [
        (rows, titles)
        for titles in kinds
        if (rows := [x for x in report["results"] if x.get(next(iter(titles)))])
    ]
    if not groups:
        raise ValueError("this report has no times to draw; pass a report of timed results")
    counts = [len(rows) for rows, _ in groups]
    figure = new_figure((11, 1.4 * len(groups) + 0.55 * sum(counts)))
    parts = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=[n + 2 for n in counts])
    for (rows, titles), part in zip(groups, parts[:, 0], strict=True):
        panels = part.subplots(1, len(titles), sharey=True, squeeze=False)[0]
        for axes, (key, title) in zip(panels, titles.items(), strict=True):
            _draw_bars(axes, [row.get(key) or {} for row in rows])
            axes.set(title=f"{title}, milliseconds")
            log_scale(axes)
            axes.grid(axis="x", alpha=0.3)
        panels[0].set_yticks(range(len(rows)), [str(_config(row)) for row in rows])
        panels[0].invert_yaxis()
        part.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=7)
    figure.suptitle(f"{report['device']}, torch {report['torch']}, {report['dtype']}")
    return figure


def _draw_bars(axes: Any, rows: list[dict[str, float]]) -> None:
    """Draws a group of bars for each row, with one colour for each name."""
    names = ("flex_moba", *_BASELINES, "flex_nsa")
    for color, name in enumerate(names):
        positions, times = [], []
        for y, row in enumerate(rows):
            timed = [x for x in names if x in row]
            if name in timed:
                positions.append(y + (timed.index(name) + 0.5) * 0.8 / len(timed) - 0.4)
                times.append(row[name])
        heights = [0.8 / max(1, sum(x in row for x in names)) for row in rows if name in row]
        if times:
            axes.barh(positions, times, heights, label=name, color=f"C{color}")
