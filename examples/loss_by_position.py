"""May a model be converted as it is? Its loss by position, untrained, for many settings of MoBA.

A model of transformers reads long texts: with full attention, and converted, over block size and
topk, without and with blocks that are always selected (`sink_blocks`, `local_blocks`), by the gate
of each head or group, with a gate that scores sub-blocks, and with the first and last layers full.
All read the same contexts, so compare with full attention within a text: the table has the mean
loss, that of the second half of the context, and how much more than full attention's the mean is.
--json keeps the loss of each sixty-fourth of the context and of each context.

Without --model it trains a tiny Llama on the text first, so that there is something to lose.

toy size, two minutes on a CPU:
  python examples/loss_by_position.py --json loss.json

full size, one GPU, a model in a folder of yours (--gguf names a file in it):
  python examples/loss_by_position.py --model ./smollm2 --text prose.txt source.txt \\
      --length 8192 --windows 16 --json loss.json
Only full attention and some of the settings, by a part of their names:
  python examples/loss_by_position.py --only sub-blocks "32 x 32, sink 1"
Only full attention, and settings with one topk beside as many blocks distributed over the layers so
that the captured mass, measured in one more context of each text, is highest:
  python examples/loss_by_position.py --by-layer 16x4 16x4+sub4
"""

import argparse
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from finetune_transformers import tiny_llama, train
from layer_topks import best_topks, masses_of, mean_mass
from pretrained import load, tokenizer_of
from torch import Tensor
from transformers import PreTrainedModel

from flexmoba.commands.demo import standard_library
from flexmoba.integrations.transformers import convert
from flexmoba.reporting import add_device, parse_writable, positive, table
from flexmoba.tune import Call, capture, tune

PARTS = 64  # of the context, in the JSON file
BY_LAYER = r"\d+x\d+(\+sub\d+)?"
Setting = dict[str, Any]  # of MoBA; {} is full attention


def settings_of(length: int, layers: int) -> list[Setting]:
    """What to measure: block sizes at equal numbers of keys, then variants of some."""
    always = {"sink_blocks": 1, "local_blocks": 1}
    found: list[Setting] = [{}]
    for share in (4, 8, 16):
        for blocks in (256, 128, 64, 32, 16):
            size = max(1, length // blocks)
            topk = length // share // size
            plain = {"block_size": size, "topk": topk}
            found += [plain | always] * (topk >= 3) + [plain] * (topk >= 1)
    few, some = max(1, layers // 15), max(1, layers // 10)
    for size in (length // 128, length // 64):  # at an eighth of the keys
        base = {"block_size": size, "topk": length // 8 // size}
        found += [base | {"sink_blocks": 1}, base | {"local_blocks": 1}]
        found += [base | {"sink_blocks": 1, "local_blocks": n} for n in (2, 4)]
        found += [base | always | {"gate": "group"}]
        found += [
            base | more | {"first_full": first, "last_full": last}
            for first, last in ((few, 0), (0, some), (few, some))
            for more in (always, {})
            if first + last < layers
        ]
    for blocks in (256, 128, 64):  # at an eighth of the keys, too
        size = max(1, length // blocks)
        base = {"block_size": size, "topk": length // 8 // size, "sink_blocks": 1}
        parts = (size // n for n in (2, 4, 8) if size % n == 0)
        found += [base, *(base | {"gate_block_size": part} for part in parts)]
    unique = {json.dumps(x, sort_keys=True): x for x in found}
    return [x for x in unique.values() if not x or room(x)]


def by_layer(calls: list[Call], setting: str) -> list[tuple[Setting, float]]:
    """A setting of --by-layer, with one topk and by layer, and the mass that each captures."""
    size, topk, *parts = (int(x) for x in setting.replace("+sub", "x").split("x"))
    part = parts[0] if parts else None
    topks = [
        max(2, topk * n // 4) for n in (1, 2, 3, 4, 6, 8)
    ]  # the own block and the sink, or more
    try:
        report = tune(calls, [size], topks, gate_block_sizes=parts, sink_blocks=1, timed=False)
    except ValueError as error:
        sys.exit(f"--by-layer {setting}: {error}")
    layers = masses_of(report, part)
    if topk not in layers[0]:
        sys.exit(f"--by-layer {setting}: topk must be at least 2 and below the number of blocks")
    best = best_topks(layers, topk * len(layers))
    masses = [mean_mass(layers, x) for x in ([topk] * len(layers), best)]
    print(f"{setting} captures {masses[0]:.1%}, by layer {masses[1]:.1%}: {best}", flush=True)
    base: Setting = {"block_size": size, "topk": topk, "sink_blocks": 1}
    base |= {"gate_block_size": part} if part else {}
    return list(zip((base, base | {"by_layer": best}), masses, strict=True))


@torch.no_grad()
def calls_of(model: PreTrainedModel, contexts: dict[str, Tensor], device: str) -> list[Call]:
    """The attention of the model, with full attention, in each context."""
    with capture(model, queries=512) as calls:
        for tokens in contexts.values():
            model.base_model(input_ids=tokens[None].to(device), use_cache=False)
    return calls


def room(x: Setting) -> bool:
    return bool(x["topk"] > x.get("sink_blocks", 0) + x.get("local_blocks", 0))


def name_of(x: Setting) -> str:
    if not x:
        return "full attention"
    name = f"{x['block_size']} x {x['topk']}"
    for option, text in (
        *(("sink_blocks", "sink {}"), ("local_blocks", "local {}"), ("gate", "by {}")),
        ("gate_block_size", "sub-blocks of {}"),
        *(("first_full", "first {} full"), ("last_full", "last {} full")),
        ("by_layer", "by layer"),
    ):
        if x.get(option):
            name += f", {text.format(x[option])}"
    return name


def apply(model: PreTrainedModel, x: Setting) -> None:
    """Converts the model, which may be converted already. A setting without sinks has none."""
    options: Setting = {"sink_blocks": 0} | x
    first, last = options.pop("first_full", 0), options.pop("last_full", 0)
    size, topk = options.pop("block_size"), options.pop("topk")
    middle = model.config.num_hidden_layers - first - last
    topks = options.pop("by_layer", [topk] * middle)
    convert(model, size, [*[None] * first, *topks, *[None] * last], **options)


@torch.no_grad()
def losses_of(model: PreTrainedModel, contexts: Tensor, o: argparse.Namespace) -> Tensor:
    """The loss of each token but the first, ``(n, length - 1)`` float32 on the CPU."""
    parts = []
    for some in contexts.split(o.batch):
        logits = model(input_ids=some.to(o.device), use_cache=False).logits
        for row, tokens in zip(logits, some.to(o.device), strict=True):
            parts.append(F.cross_entropy(row[:-1].float(), tokens[1:], reduction="none").cpu())
    return torch.stack(parts)


def model_of(o: argparse.Namespace) -> PreTrainedModel:
    dtype = torch.bfloat16 if o.device.startswith("cuda") else torch.float32
    model: PreTrainedModel = load(o.model, o.gguf, dtype=dtype).to(o.device).eval()
    return model


def tokens_of(o: argparse.Namespace) -> dict[str, Tensor]:
    """The tokens of each text."""
    found = {}
    for path in o.text:
        if o.model:
            tokenizer = tokenizer_of(o.model, o.gguf)
            text = path.read_text(errors="replace")
            # In pieces, as tokenizers warn of texts longer than the model's context.
            pieces = [text[i : i + 10_000] for i in range(0, len(text), 10_000)]
            ids = tokenizer(pieces, add_special_tokens=False).input_ids
            tokens = torch.tensor([y for x in ids for y in x])
        else:
            tokens = torch.tensor(list(path.read_bytes()))
        found[path.stem] = tokens
    if not o.text:
        found["standard library"] = standard_library()[-4_000_000:].long()
    return found


def spread(tokens: Tensor, o: argparse.Namespace) -> Tensor:
    """Contexts ``(windows, length)``, spread over a text."""
    if len(tokens) < o.length:
        sys.exit(f"a text has {len(tokens):,} tokens; --length {o.length} needs as many")
    starts = torch.linspace(0, len(tokens) - o.length, o.windows).long()
    return tokens[starts[:, None] + torch.arange(o.length)]


def between(tokens: Tensor, o: argparse.Namespace) -> Tensor:
    """A context that is none of these: between the first two of them, or after the only one."""
    gaps = max(1, 2 * o.windows - 2)
    start = (len(tokens) - o.length) // gaps
    if start < o.length:
        sys.exit(
            f"a text has {len(tokens):,} tokens; --by-layer needs {o.length * (gaps + 1):,} for a "
            f"context of {o.length} tokens between {o.windows} others"
        )
    return tokens[start : start + o.length]


def summary(losses: Tensor) -> dict[str, Any]:
    return {
        "loss": losses.mean().item(),
        "second_half": losses[:, losses.shape[1] // 2 :].mean().item(),
        "by_position": [x.mean().item() for x in losses.chunk(PARTS, 1)],
        "by_window": losses.mean(1).tolist(),
        "second_half_by_window": losses[:, losses.shape[1] // 2 :].mean(1).tolist(),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    o = parse(argv)
    deadline = time.monotonic() + 60 * o.minutes
    torch.manual_seed(o.seed)
    tokens = tokens_of(o)
    texts = {name: spread(x, o) for name, x in tokens.items()}
    if o.model:
        model = model_of(o)
    else:
        model = tiny_llama().to(o.device)
        print(f"a tiny model learns with full attention for {o.pretrain_steps} steps", flush=True)
        train(
            model,
            standard_library()[:4_000_000].long(),
            o.pretrain_steps,
            3e-3,
            o,
            "full attention",
        )
        model.eval()
    mass: dict[str, float] = {}
    if o.by_layer:
        calls = calls_of(model, {name: between(x, o) for name, x in tokens.items()}, o.device)
        tuned = [y for x in o.by_layer for y in by_layer(calls, x)]
        mass = {name_of(x): y for x, y in tuned}
        settings = [{}, *(x for x, _ in tuned)]
    else:
        settings = settings_of(o.length, model.config.num_hidden_layers)
    if o.only:
        settings = [x for x in settings if not x or any(y in name_of(x) for y in o.only)]
    settings = settings[: o.most]
    report: dict[str, Any] = {
        "options": {name: str(x) if isinstance(x, Path) else x for name, x in vars(o).items()}
        | {"text": [str(x) for x in o.text]},
        "model": f"{type(model).__name__}, {model.num_parameters():,} parameters, {model.dtype}",
        "device": torch.cuda.get_device_name() if o.device.startswith("cuda") else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "settings": [],
    }
    print(f"{report['model']}; {len(settings)} settings, {', '.join(texts)}", flush=True)
    dense: dict[str, float] = {}
    for x in settings:
        entry: dict[str, Any] = {"name": name_of(x)} | {"setting": x}
        if name_of(x) in mass:
            entry["mass"] = mass[name_of(x)]
        began = time.monotonic()
        try:
            if x:
                apply(model, x)
            entry["texts"] = {
                name: summary(losses_of(model, contexts, o)) for name, contexts in texts.items()
            }
        except Exception as error:  # the next setting may serve
            entry["error"] = f"{type(error).__name__}: {error}"[-1000:]
        entry["seconds"] = time.monotonic() - began
        report["settings"].append(entry)
        if o.json:
            new = Path(f"{o.json}.new")
            new.write_text(json.dumps(report) + "\n")
            new.replace(o.json)
        found = entry.get("texts", {})
        dense = dense or {name: y["loss"] for name, y in found.items()}
        print(f"{entry['name']}: {entry.get('error') or cells(found, dense)}", flush=True)
        if time.monotonic() > deadline:
            print("stopped by --minutes", flush=True)
            break
    heads = ["", *(f"{name}: loss / second half" for name in texts)]
    rows = [
        [entry["name"], *cells(entry["texts"], dense)]
        for entry in report["settings"]
        if "texts" in entry
    ]
    print(f"\nNats per token, and beyond full attention's\n\n{table(heads, rows)}")
    return report


def cells(found: dict[str, Any], dense: dict[str, float]) -> list[str]:
    return [
        f"{x['loss']:.4f} / {x['second_half']:.4f} ({x['loss'] / dense[name] - 1:+.1%})"
        for name, x in found.items()
    ]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", metavar="FOLDER", help="a model of transformers on this disk")
    add("--gguf", metavar="FILE", help="in that folder, the model as GGUF")
    add("--text", type=Path, nargs="+", default=[], metavar="FILE", help="default: the sources of "
        "Python's standard library")  # fmt: skip
    add("--length", type=positive, default=512, help="tokens of context (%(default)s)")
    add("--windows", type=positive, default=8, help="contexts of each text (%(default)s)")
    add("--batch", type=positive, default=4, help="contexts at a time (%(default)s)")
    add("--most", type=positive, default=None, metavar="N", help="settings to measure")
    add("--only", nargs="+", default=[], metavar="TEXT", help="settings with this in their names")
    add("--by-layer", nargs="+", default=[], metavar="SETTING", help="measure these instead of the "
        "grid, each also with its blocks distributed over the layers: block size x topk, with "
        "+sub4 for a gate that scores sub-blocks of 4")  # fmt: skip
    add("--minutes", type=float, default=math.inf, help="stop after so long")
    add("--pretrain-steps", type=positive, default=200, help="without --model (%(default)s)")
    add("--seed", type=int, default=0)
    add("--json", metavar="FILE", help="write all that was measured there")
    add_device(parser)
    o = parser.parse_args(argv)
    if missing := [str(x) for x in o.text if not x.is_file()]:
        parser.error(f"there is no {', '.join(missing)}")
    if wrong := [x for x in o.by_layer if not re.fullmatch(BY_LAYER, x)]:
        parser.error(f"--by-layer {' '.join(wrong)}: it must be like 64x16 or 64x16+sub4")
    if o.model and not Path(o.model).is_dir():
        parser.error(f"--model {o.model}: there is no such folder; nothing is downloaded")
    parse_writable(parser, json=o.json)
    return o


if __name__ == "__main__":
    main()
