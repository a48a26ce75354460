"""Trains a small language model with MoBA attention, then checks, times and draws that attention.

1. A byte-level language model, whose only attention is `flex_moba`, learns the sources of Python's
   standard library for about a minute.
2. The trained model reads one long text; its queries, keys and values are put through `flex_moba`
   and compared with the oracle, `moba_reference`.
3. The same attention is timed beside full attention, at growing lengths.
4. Pictures show which blocks the queries chose, and how often each.

Everything runs on this machine's best device; nothing is downloaded.
"""

import argparse
import importlib.util
import math
import platform
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexmoba import flex_moba, moba_reference, moba_select
from flexmoba.console import (
    UsageError,
    add_device,
    add_json,
    check_writable,
    positive,
    progress,
    table,
    write_json,
)
from flexmoba.hybrid import set_attention
from flexmoba.nn import FlexMoba, MobaAttention
from flexmoba.timing import median_ms
from flexmoba.tune import gate_quality, sample_positions
from flexmoba.versions import versions

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4, 2, 64, 2
BLOCK, TOPK = 64, 4  # while training, on sequences of LENGTH
LENGTH, BATCH = 1024, 4
LONG_BLOCK, LONG_TOPK = 512, 3  # where it is timed, on long ones


class Layer(nn.Module):
    """Attention and a feed-forward part, each on normalized inputs and added to them."""

    def __init__(self) -> None:
        """Makes the parts."""
        super().__init__()
        width = HEADS * HEAD_DIM
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        self.attention = MobaAttention(
            width, HEADS, KV_HEADS, block_size=BLOCK, topk=TOPK, rope_base=10000.0
        )
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The next layer's input, from x (B, L, width)."""
        x = x + self.attention(self.norms[0](x))
        out: Tensor = x + self.feed_forward(self.norms[1](x))
        return out


class ByteModel(nn.Module):
    """Predicts each byte of a text from those before it."""

    def __init__(self) -> None:
        """Makes the layers."""
        super().__init__()
        width = HEADS * HEAD_DIM
        self.embed = nn.Embedding(256, width)
        self.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])
        self.norm = nn.RMSNorm(width)
        self.to_logits = nn.Linear(width, 256, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        """Logits (B, L, 256) of the next byte, from bytes (B, L)."""
        x = self.embed(text)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.to_logits(self.norm(x))
        return logits

    def bits_per_byte(self, text: Tensor) -> Tensor:
        """The mean loss, in bits; 8 is chance."""
        logits = self(text[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()) / math.log(2)


def standard_library() -> Tensor:
    """The text: the standard library's own modules, one after the other, as bytes."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idle_test", "dist-packages", "__pycache__"}
    files = [x for x in sorted(root.rglob("*.py")) if skipped.isdisjoint(x.parts)]
    return torch.frombuffer(bytearray(b"".join(x.read_bytes() for x in files)), dtype=torch.uint8)


def train(text: Tensor, seconds: int, device: torch.device) -> tuple[ByteModel, dict[str, float]]:
    """Trains for some seconds on all but the last tenth of the text; bits per byte on that."""
    from tqdm import tqdm

    model = ByteModel().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    parameters = sum(x.numel() for x in model.parameters())
    size = f"{parameters / 1e6:.1f}M parameters on {len(text) / 1e6:.0f} MB of Python"
    print(f"Training {size} for {seconds} s", file=sys.stderr)
    seen, unseen = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    starts = torch.linspace(0, len(unseen) - LENGTH - 1, 16).long()
    held_out = windows(unseen, starts).to(device)
    model.bits_per_byte(held_out[:1]).backward()  # compiles, on a GPU, outside the time budget
    began, step = time.perf_counter(), 0
    with tqdm(total=seconds, bar_format="{l_bar}{bar}| {postfix}", disable=None) as bar:
        while (elapsed := time.perf_counter() - began) < seconds:
            for group in optimizer.param_groups:  # up, then linearly down to nothing
                group["lr"] = 2e-3 * min(1.0, (step + 1) / 20) * (1 - elapsed / seconds)
            batch = windows(seen, torch.randint(len(seen) - LENGTH - 1, (BATCH,))).to(device)
            loss = model.bits_per_byte(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            bar.set_postfix_str(f"step {step}, {loss.item():.2f} bits per byte")
            bar.update(min(round(elapsed), bar.total) - bar.n)
    bits = {}
    for name, topk in (("full", None), ("moba", TOPK)):
        set_attention(model, topk=topk)
        with torch.no_grad():
            bits[name] = model.bits_per_byte(held_out).item()
    return model, bits


def windows(text: Tensor, starts: Tensor) -> Tensor:
    """One sequence of LENGTH + 1 bytes from each start."""
    return text[starts[:, None] + torch.arange(LENGTH + 1)].long()


@torch.no_grad()
def long_qkv(model: ByteModel, text: Tensor, length: int, device: torch.device) -> list[Tensor]:
    """The last layer's queries, keys and values on the beginning of the text."""
    *_, attend = (module for module in model.modules() if isinstance(module, FlexMoba))
    caught: list[Tensor] = []
    hook = attend.register_forward_pre_hook(lambda _, qkv: caught.extend(qkv))
    model(text[None, :length].long().to(device))
    hook.remove()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return [x.to(dtype).contiguous() for x in caught]


def check(qkv: list[Tensor]) -> dict[str, float]:
    """Compares flex_moba with the oracle on the first 2,048 positions."""
    q, k, v = (x[:, :, :2048] for x in qkv)
    expected = moba_reference(q.cpu(), k.cpu(), v.cpu(), BLOCK, TOPK).float()
    out: Any = flex_moba(q, k, v, BLOCK, TOPK)
    error = (out.float().cpu() - expected).abs().amax(-1)
    error = error.nan_to_num(nan=torch.finfo(error.dtype).max)  # a NaN compares as no error
    roundings = 16 if q.dtype == torch.float32 else 2  # half precision is rounded once per part
    allowed = roundings * torch.finfo(q.dtype).eps * float(expected.abs().max())
    # Two scores may be equal but for rounding: then either block is right.
    wrong = (error > allowed).float().mean().item()
    return {"error": error.quantile(0.999).item(), "allowed": allowed, "other_block": wrong}


def captured(qkv: list[Tensor]) -> dict[str, float]:
    """What the chosen blocks capture of the attention that full attention would pay."""
    q, k, _ = (x[:, :, :4096] for x in qkv)
    positions = sample_positions(q.shape[2], 256).to(q.device)
    quality = gate_quality(q[:, :, positions], k, BLOCK, TOPK, positions=positions)[BLOCK]
    return {"mass": float(quality.mass.mean()), "best_mass": float(quality.best_mass.mean())}


def time_lengths(qkv: list[Tensor], max_length: int) -> list[dict[str, float]]:
    """Milliseconds beside full attention's, at lengths doubled up to the longest."""
    rows = []
    lengths = [1024 << i for i in range(20) if 1024 << i <= max_length]
    for length in progress(lengths, "times"):
        q, k, v = (x[:, :, :length].detach().requires_grad_() for x in qkv)

        def moba(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Any:
            return flex_moba(q, k, v, LONG_BLOCK, LONG_TOPK)

        def full(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        row: dict[str, float] = {"length": length}
        for name, attend in (("full", full), ("moba", moba)):

            def both(attend: Any = attend, inputs: Any = (q, k, v)) -> Any:
                out = attend()
                return torch.autograd.grad(out, inputs, torch.ones_like(out))

            with torch.no_grad():
                row[f"{name}_forward_ms"] = median_ms(attend, q.device)
            row[f"{name}_both_ms"] = median_ms(both, q.device)
        rows.append(row)
    return rows


def times_table(rows: list[dict[str, float]]) -> str:
    """The times as a table."""
    heads = ["length", "full, forward", "MoBA", "speed-up", "full, both ways", "MoBA", "speed-up"]
    lines = []
    for row in rows:
        line = [f"{row['length']:,}"]
        for way in ("forward_ms", "both_ms"):
            full, moba = row[f"full_{way}"], row[f"moba_{way}"]
            line += [f"{full:.1f}", f"{moba:.1f}", f"{full / moba:.1f}x"]
        lines.append(line)
    return table(heads, lines)


def draw(qkv: list[Tensor], folder: Path) -> list[str]:
    """Which blocks the queries of each head chose on the first 4,096 positions, and how often."""
    from flexmoba.plot import plot_choices, plot_heads

    q, k, _ = (x[:, :, :4096] for x in qkv)
    selection = moba_select(q, k, BLOCK, TOPK)
    figures: dict[str, Any] = {
        "selection.png": plot_heads(selection, BLOCK),
        "choices.png": plot_choices(selection, BLOCK).figure,
    }
    for name, figure in figures.items():
        figure.savefig(folder / name)
    return [str(folder / name) for name in figures]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``flexmoba demo``."""
    on_gpu = torch.cuda.is_available()
    parser.add_argument(
        "--seconds", type=positive, default=60, help="how long to train (default: %(default)s)"
    )
    add_device(parser)
    parser.add_argument(
        "--max-length",
        type=positive,
        default=65536 if on_gpu else 16384,
        help="the longest text to time (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo-output"),
        metavar="FOLDER",
        help="where the pictures go (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the model (default: %(default)s)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Trains, checks, times and draws; 1 if flex_moba disagrees with the oracle."""
    if any(importlib.util.find_spec(name) is None for name in ("matplotlib", "tqdm")):
        raise UsageError("the demo needs matplotlib and tqdm; pip install 'flexmoba[plot]'")
    check_writable(json=arguments.json)
    # What is said on the way goes where it does not mix with JSON.
    out = sys.stderr if arguments.json == "-" else sys.stdout
    torch.manual_seed(arguments.seed)
    device, text = torch.device(arguments.device), standard_library()
    if not 1024 <= arguments.max_length <= len(text):
        raise UsageError(
            f"--max-length {arguments.max_length}: must lie from 1024 to {len(text)}, the bytes of "
            "the text"
        )
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--output {arguments.output}: no such folder can be made ({error.strerror}); name "
            "another"
        ) from error
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else platform.machine()
    print(f"Device: {name}, torch {torch.__version__}", file=out)
    model, bits = train(text, arguments.seconds, device)
    print(
        f"Unseen text: {bits['moba']:.3f} bits per byte, {bits['full']:.3f} if it attends fully "
        "(8 is chance)",
        file=out,
    )
    qkv = long_qkv(model, text, max(arguments.max_length, 4096), device)
    agreement = check(qkv)
    print(
        f"Against the oracle, 2,048 positions: largest error {agreement['error']:.1e} (allowed "
        f"{agreement['allowed']:.1e}), {agreement['other_block']:.2%} of the queries chose "
        "another, equally good block",
        file=out,
    )
    report: dict[str, Any] = {
        "device": name,
        **versions(),
        "bits_per_byte": bits,
        "oracle": agreement,
    }
    if not agreement["other_block"] < 1e-3:
        print("flex_moba disagrees with the oracle", file=sys.stderr)
        write_json(report | {"captured": None, "times": [], "pictures": []}, arguments.json)
        return 1
    share = captured(qkv)
    print(
        f"The chosen blocks capture {share['mass']:.1%} of full attention on 4,096 positions; the "
        f"best {TOPK} blocks would {share['best_mass']:.1%}",
        file=out,
    )
    times = time_lengths(qkv, arguments.max_length)
    report |= {"captured": share, "times": times, "pictures": draw(qkv, arguments.output)}
    if write_json(report, arguments.json):
        print(f"\nMilliseconds, block {LONG_BLOCK}, topk {LONG_TOPK}, {qkv[0].dtype}\n")
        print(times_table(times))
        print(f"\nPictures: {', '.join(report['pictures'])}")
    return 0
