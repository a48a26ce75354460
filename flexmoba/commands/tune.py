"""Measure block sizes and topks on given queries and keys, on this device.

For each block size and topk, the table shows the share of full attention that the selected blocks
capture (mass), the share that the best selection of as many blocks captures (best mass), the
difference of the two (lost), the lowest mass of any head (worst head), how often the block of the
strongest past key is selected (found), the signal-to-noise ratio of the gate (SNR), the ratio that
makes the gate reliable (needed), and the time, with the speedup over dense attention. A star marks
the frontier: the choices without an alternative that captures more mass at no higher cost. An arrow
marks the choice for your budget.

Sources of queries and keys:
  --model FOLDER --text FILE   a local Hugging Face model, and a text for it
  --tensors FILE               tensors "q" (B, Hq, L, D) and "k" (B, Hkv, L, D), or several pairs
                               "NAME.q" and "NAME.k", in a .pt or .safetensors file
  --example                    synthetic tensors, only to show the output
"""

import argparse
import functools
import importlib
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexmoba.reporting import (
    UsageError,
    add_device,
    add_json,
    check_writable,
    note_load,
    positive,
    print_result,
    save_picture,
    write_json,
)
from flexmoba.tune import Call, Choice, Report, capture, reports, sampled, synthetic


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``flexmoba tune``."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--model", type=Path, metavar="FOLDER", help="folder of a model; needs --text"
    )
    source.add_argument("--tensors", type=Path, metavar="FILE", help="file of tensors")
    source.add_argument("--example", action="store_true", help="use synthetic tensors")
    parser.add_argument("--text", type=Path, metavar="FILE", help="text for the model")
    parser.add_argument(
        "--length",
        type=positive,
        default=8192,
        help="maximum number of tokens of the text or the example (default: %(default)s)",
    )
    for name, default in (("block-sizes", [64, 128, 256, 512]), ("topks", [2, 3, 4, 8])):
        parser.add_argument(
            f"--{name}",
            type=positive,
            nargs="+",
            default=default,
            metavar="N",
            help=f"{name.replace('-', ' ')} to measure (default: {' '.join(map(str, default))})",
        )
    parser.add_argument(
        "--gate-block-sizes",
        type=positive,
        nargs="+",
        default=[],
        metavar="N",
        help="sizes of sub-blocks to measure beside the gate without sub-blocks (default: none)",
    )
    for name, which in (("sink", "first"), ("local", "nearest past")):
        parser.add_argument(
            f"--{name}-blocks",
            type=int,
            default=0,
            metavar="N",
            help=f"always select the {which} N blocks, which count towards topk (default: 0)",
        )
    parser.add_argument(
        "--queries",
        type=positive,
        default=256,
        help="number of queries to sample of each layer (default: %(default)s)",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--mass",
        type=_share,
        default=0.95,
        help="recommend the cheapest choice with at least this mass (default: %(default)s)",
    )
    budget.add_argument(
        "--sparsity",
        type=_share,
        help="recommend the choice with most mass at this sparsity or more",
    )
    budget.add_argument(
        "--latency-ms", type=_milliseconds, help="recommend the choice with most mass in this time"
    )
    parser.add_argument("--backward", action="store_true", help="also time the backward pass")
    parser.add_argument("--no-times", action="store_true", help="omit times")
    add_device(parser)
    add_json(parser)
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="plot the report to FILE (needs matplotlib)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints or writes a report; returns 1 if no choice meets the budget."""
    check_writable(json=arguments.json, plot=arguments.plot)
    if arguments.no_times and (arguments.latency_ms is not None or arguments.backward):
        raise UsageError("--latency-ms and --backward need times; remove --no-times")
    if (arguments.model is None) != (arguments.text is None):
        raise UsageError("--model and --text go together; pass both")
    if not arguments.no_times:
        note_load(arguments.device)
    report: Report | None = None
    recommended = None
    try:
        for report in reports(
            _calls(arguments),
            arguments.block_sizes,
            arguments.topks,
            gate_block_sizes=arguments.gate_block_sizes,
            sink_blocks=arguments.sink_blocks,
            local_blocks=arguments.local_blocks,
            queries=arguments.queries,
            timed=not arguments.no_times,
            backward=arguments.backward,
            device=arguments.device,
            show_progress=True,
        ):
            if report.timed:
                print_result(_line(report), arguments.json)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    finally:  # after an interruption or a failure, too
        if report is not None:
            recommended = _show(report, arguments)
    if arguments.plot:
        from flexmoba.plot import plot_report

        assert report is not None  # reports yields at least one, or raises
        save_picture(plot_report(report, recommended), "plot", arguments.plot)
    return int(recommended is None)


def _show(report: Report, arguments: argparse.Namespace) -> Choice | None:
    """Prints or writes a report; returns the recommended choice."""
    budget, recommended = _recommend(report, arguments)
    example = "synthetic, from no model" if arguments.example else None
    asked = {"budget": budget, "recommended": recommended, "example": example}
    if write_json(_json(report, asked), arguments.json):
        tables = report.table(recommended)
        print(
            "", _heading(report, example), tables, _advice(report, budget, recommended), sep="\n\n"
        )
    return recommended


def _line(report: Report) -> str:
    """Formats the last choice of a report as a line."""
    x = report.choices[-1]
    text = f"{x.block}, topk {x.topk}: captures {x.mass:.1%}, {x.forward_ms:.2f} ms forward"
    if report.dense_forward_ms is not None and x.forward_ms is not None:
        text += f" ({report.dense_forward_ms / x.forward_ms:.1f}x)"
    return text


def _share(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be greater than 0 and at most 1, got {text}")
    return value


def _milliseconds(text: str) -> float:
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from error


def _json(report: Report, asked: dict[str, Any]) -> dict[str, Any]:
    recommended = asked["recommended"]
    index = None if recommended is None else report.choices.index(recommended)
    return report.to_dict() | asked | {"recommended": index}


def _recommend(report: Report, arguments: argparse.Namespace) -> tuple[str, Choice | None]:
    if arguments.sparsity is not None:
        return f"sparsity {arguments.sparsity:g}", report.recommend(sparsity=arguments.sparsity)
    if arguments.latency_ms is not None:
        choice = report.recommend(latency_ms=arguments.latency_ms)
        return f"latency {arguments.latency_ms:g} ms", choice
    return f"mass {arguments.mass:g}", report.recommend(mass=arguments.mass)


def _heading(report: Report, example: str | None) -> str:
    layers = f"{len(report.layers)} layers, " if len(report.layers) > 1 else ""
    lines = [f"{report.device}, torch {report.versions['torch']}", f"{layers}{report.inputs}"]
    if example:
        lines.append(f"queries and keys: {example}")
    if report.dense_forward_ms is not None:
        dense = f"dense attention: {report.dense_forward_ms:.2f} ms forward"
        if report.dense_both_ms is not None:
            dense += f", {report.dense_both_ms:.2f} ms forward and backward"
        lines.append(dense)
    return "\n".join(lines)


def _advice(report: Report, budget: str, choice: Choice | None) -> str:
    if choice is None:
        best = max(report.choices, key=lambda x: x.mass)
        return (
            f"For {budget}: no measured choice meets this budget. {_settings(best)} captures the "
            f"most mass, {best.mass:.1%}, at sparsity {best.sparsity:.1%}. The best selection of "
            f"as many blocks captures {best.best_mass:.1%}. Try other --block-sizes and --topks, "
            "or another budget."
        )
    return (
        f"For {budget}: {_settings(choice)}. It captures {choice.mass:.1%} of full attention, "
        f"{choice.worst_mass:.1%} in the worst head, and reads {1 - choice.sparsity:.1%} of the "
        f"keys. The best selection of as many blocks captures {choice.best_mass:.1%}, so the gate "
        f"loses {choice.lost_mass:.1%}."
    )


def _settings(choice: Choice) -> str:
    """Formats the arguments of `flex_moba` for a choice."""
    text = f"block_size={choice.block_size}, topk={choice.topk}"
    for name in ("gate_block_size", "sink_blocks", "local_blocks"):
        if value := getattr(choice, name):
            text += f", {name}={value}"
    return text


# ---- Sources of queries and keys ----------------------------------------------------------------


def _calls(arguments: argparse.Namespace) -> Sequence[Call | tuple[Tensor, Tensor]]:
    if arguments.example:
        dtype = torch.bfloat16 if arguments.device.startswith("cuda") else torch.float32
        return [synthetic(arguments.length, device=arguments.device, dtype=dtype)]
    if arguments.tensors is not None:
        return _from_file(arguments.tensors, arguments.queries)
    return _from_model(arguments)


def _from_file(file: Path, queries: int) -> list[Call]:
    if not file.is_file():
        raise UsageError(f"--tensors {file}: there is no such file; check the path")
    load: Callable[[Path], Any] = functools.partial(
        torch.load, map_location="cpu", weights_only=True
    )
    reader, writer = "torch.load", "torch.save"
    if file.suffix == ".safetensors":
        load = _module("safetensors.torch", "safetensors").load_file
        reader, writer = "safetensors", "safetensors.torch.save_file"
    try:
        tensors = load(file)
    except Exception as error:
        raise UsageError(
            f"--tensors {file}: {reader} cannot read tensors from it; write it with "
            f'{writer}({{"q": q, "k": k}}, FILE)'
        ) from error
    if not isinstance(tensors, dict) or not all(map(_is_dense, tensors.values())):
        raise UsageError(
            f"--tensors {file}: it must hold a dict of dense tensors; write it with "
            f'{writer}({{"q": q, "k": k}}, FILE)'
        )
    names = [name for name in tensors if name == "q" or str(name).endswith(".q")]
    pairs = {name[:-1].rstrip("."): (name, f"{name[:-1]}k") for name in names}
    missing = [k for _, k in pairs.values() if k not in tensors]
    if missing or not pairs:
        raise UsageError(
            f'--tensors {file}: must have "q" and "k", or pairs "NAME.q" and "NAME.k", got '
            f"{_few(tensors) or 'nothing'}; rename the tensors"
        )
    calls = []
    for name, (q, k) in pairs.items():
        try:
            calls.append(sampled(tensors[q], tensors[k], queries, name))
        except (TypeError, ValueError) as error:
            raise UsageError(f"--tensors {file}, {q!r} and {k!r}: {error}") from error
    return calls


def _is_dense(x: object) -> bool:
    if not isinstance(x, Tensor):
        return False
    return x.layout == torch.strided and not x.is_nested and not x.is_meta


def _few(names: Iterable[Any]) -> str:
    """Formats the first names as text."""
    first = [str(name) for name in itertools.islice(names, 9)]
    return ", ".join(first[:8]) + ", ..." * (len(first) > 8)


def _from_model(arguments: argparse.Namespace) -> list[Call]:
    folder, file = arguments.model, arguments.text
    if not folder.is_dir():
        raise UsageError(f"--model {folder}: there is no such folder; download the model first")
    if not file.is_file():
        raise UsageError(f"--text {file}: there is no such file; check the path")
    transformers = _module("transformers", "transformers")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, attn_implementation="sdpa", dtype="auto"
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--model {folder}: transformers cannot load it: {reason}") from error
    model = model.to(arguments.device).eval()
    with file.open(encoding="utf-8", errors="replace") as lines:
        text = lines.read(64 * arguments.length)  # enough for that many tokens of most texts
    tokens = tokenizer(text, return_tensors="pt").input_ids
    tokens = tokens[:, : arguments.length].to(arguments.device)
    print(f"the model processes {tokens.shape[1]:,} tokens", file=sys.stderr)
    with torch.no_grad(), capture(model, queries=arguments.queries, device="cpu") as calls:
        model.base_model(tokens, use_cache=False)
    return calls


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"this command needs {package}; run pip install {package}") from error
