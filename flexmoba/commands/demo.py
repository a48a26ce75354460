"""Trains a small language model with MoBA attention, then checks, times and draws that attention.

1. A byte-level language model, whose only attention is `flex_moba`, learns the sources of Python's
   standard library for about a minute.
2. The trained model reads one long text; its queries, keys and values are put through `flex_moba`
   and compared with the oracle, `moba_reference`.
3. Pictures show which blocks the queries chose on unseen text, and how often each.
4. The same attention is timed beside full attention, at growing lengths.

Everything runs on this machine's best device; nothing is downloaded. On two cores it takes about
two minutes; every result is printed at once.
"""

import argparse
import importlib.util
import math
import platform
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexmoba import flex_moba, moba_reference, moba_select
from flexmoba.hybrid import set_attention
from flexmoba.nn import FlexMoba, MobaAttention
from flexmoba.reporting import (
    UsageError,
    add_device,
    add_json,
    check_writable,
    median_ms,
    note,
    note_load,
    pays_from,
    positive,
    save_picture,
    say,
    table_row,
    table_rule,
    versions,
    write_json,
)
from flexmoba.tune import gate_quality

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4, 2, 64, 2
BLOCK, TOPK = 64, 4
LENGTH, BATCH = 1024, 4  # of the training
PICTURES = ("selection.png", "choices.png")


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


def train(
    text: Tensor, held_out: Tensor, seconds: int, device: torch.device
) -> tuple[ByteModel, dict[str, float]]:
    """Trains on a text for some seconds; bits per byte on held-out sequences."""
    model = ByteModel().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    parameters = sum(x.numel() for x in model.parameters())
    size = f"{parameters / 1e6:.1f}M parameters on {len(text) / 1e6:.0f} MB of Python"
    note(f"Training {size} for {seconds} s")
    model.bits_per_byte(held_out[:1]).backward()  # compiles, on a GPU, outside the time budget
    began, step, noted = time.perf_counter(), 0, 0.0
    while (elapsed := time.perf_counter() - began) < seconds:
        for group in optimizer.param_groups:  # up, then linearly down to nothing
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 20) * (1 - elapsed / seconds)
        batch = windows(text, torch.randint(len(text) - LENGTH - 1, (BATCH,))).to(device)
        loss = model.bits_per_byte(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if elapsed - noted > 10:
            noted = elapsed
            note(f"{elapsed:.0f} s: step {step}, {loss.item():.2f} bits per byte")
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
def qkv_of(model: ByteModel, texts: Tensor) -> list[Tensor]:
    """The last layer's queries, keys and values on texts ``(B, L)``."""
    *_, attend = (module for module in model.modules() if isinstance(module, FlexMoba))
    caught: list[Tensor] = []
    hook = attend.register_forward_pre_hook(lambda _, qkv: caught.extend(qkv))
    model(texts)
    hook.remove()
    dtype = torch.bfloat16 if texts.is_cuda else torch.float32
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
    q, k, _ = qkv
    quality = gate_quality(q, k, BLOCK, TOPK)[BLOCK]
    return {"mass": float(quality.mass.mean()), "best_mass": float(quality.best_mass.mean())}


def time_lengths(qkv: list[Tensor], max_length: int) -> Iterator[dict[str, float]]:
    """Milliseconds beside full attention's, at lengths doubled up to the longest."""
    for length in (max_length >> i for i in (3, 2, 1, 0) if max_length >> i >= 1024):
        q, k, v = (x[:, :, :length].detach().requires_grad_() for x in qkv)

        def moba(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Any:
            return flex_moba(q, k, v, BLOCK, TOPK)

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
        yield row


HEADS_OF_TIMES = ["length", "full, forward", "MoBA, forward", "speed-up"]
HEADS_OF_TIMES += ["full, both ways", "MoBA, both ways", "speed-up"]
WIDTHS = [len(head) for head in HEADS_OF_TIMES]


def times_row(row: dict[str, float]) -> str:
    """The times of one length as a line of the table."""
    line = [f"{row['length']:,}"]
    for way in ("forward_ms", "both_ms"):
        full, moba = row[f"full_{way}"], row[f"moba_{way}"]
        line += [f"{full:.1f}", f"{moba:.1f}", f"{full / moba:.1f}x"]
    return table_row(line, WIDTHS)


def summary(rows: list[dict[str, float]]) -> str:
    """From which length on MoBA is the faster."""
    texts = []
    for way, name in (("forward_ms", "forward"), ("both_ms", "forward and backward")):
        start = pays_from(
            [(int(row["length"]), row[f"moba_{way}"], row[f"full_{way}"]) for row in rows]
        )
        texts.append(f"{name} from {start:,} tokens on" if start else f"{name} at none of these")
    return f"Here MoBA is the faster {', '.join(texts)}"


def draw(qkv: list[Tensor], folder: Path) -> list[str]:
    """Which blocks the queries of each head chose on the first text, and how often on it."""
    from flexmoba.plot import plot_choices, plot_heads

    q, k, _ = qkv
    selection = moba_select(q, k, BLOCK, TOPK)
    figures: list[Any] = [plot_heads(selection, BLOCK), plot_choices(selection, BLOCK).figure]
    files = [folder / name for name in PICTURES]
    for file, figure in zip(files, figures, strict=True):
        save_picture(figure, "output", file)
    return [str(file) for file in files]


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
    """Trains, checks, draws and times; 1 if flex_moba disagrees with the oracle."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("the demo needs matplotlib; pip install 'flexmoba[plot]'")
    check_writable(json=arguments.json)
    torch.manual_seed(arguments.seed)
    text = standard_library()
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
    for name in PICTURES:
        check_writable(output=arguments.output / name)
    report: dict[str, Any] = {"captured": None, "times": [], "pictures": []}
    try:
        return measure(text, report, arguments)
    finally:  # an interruption or a failure loses nothing that was measured
        if "bits_per_byte" in report:
            write_json(report, arguments.json)


def measure(text: Tensor, report: dict[str, Any], arguments: argparse.Namespace) -> int:
    """Fills in the report, and prints each part at once."""

    def tell(result: str) -> None:
        say(result, arguments.json)

    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else platform.machine()
    report |= {"device": name, **versions()}
    tell(f"Device: {name}, torch {torch.__version__}")
    note_load(arguments.device)
    seen, unseen = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    held_out = windows(unseen, torch.linspace(0, len(unseen) - LENGTH - 1, 16).long()).to(device)
    model, bits = train(seen, held_out, arguments.seconds, device)
    report["bits_per_byte"] = bits
    tell(
        f"Unseen text: {bits['moba']:.3f} bits per byte, {bits['full']:.3f} if it attends fully "
        "(8 is chance)"
    )
    long = qkv_of(model, text[None, : max(arguments.max_length, 2048)].long().to(device))
    report["oracle"] = agreement = check(long)
    tell(
        f"Against the oracle, 2,048 positions: largest error {agreement['error']:.1e} (allowed "
        f"{agreement['allowed']:.1e}), {agreement['other_block']:.2%} of the queries chose "
        "another, equally good block"
    )
    if not agreement["other_block"] < 1e-3:
        note("flex_moba disagrees with the oracle")
        return 1
    qkv = qkv_of(model, held_out[:, :-1])
    report["captured"] = share = captured(qkv)
    tell(
        f"The chosen blocks capture {share['mass']:.1%} of full attention on unseen text of "
        f"{LENGTH:,} bytes, as in training; the best {TOPK} of {LENGTH // BLOCK} blocks would "
        f"{share['best_mass']:.1%}"
    )
    report["pictures"] = draw(qkv, arguments.output)
    tell(f"Pictures of that: {', '.join(report['pictures'])}")
    tell(f"\nMilliseconds, block {BLOCK}, topk {TOPK}, {long[0].dtype}\n")
    tell(f"{table_row(HEADS_OF_TIMES, WIDTHS)}\n{table_rule(WIDTHS)}")
    for row in time_lengths(long, arguments.max_length):
        report["times"].append(row)
        tell(times_row(row))
    tell(f"\n{summary(report['times'])}")
    return 0
