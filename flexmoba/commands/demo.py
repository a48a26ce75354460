"""Train a small language model with MoBA attention, then check, time and plot its attention.

1. Train a byte-level language model whose only attention is flex_moba on the sources of Python's
   standard library, for about a minute.
2. Run the model on one long text, and compare flex_moba on its queries, keys and values with the
   oracle, moba_reference.
3. Plot the blocks that the queries select on unseen text, and how often they select each block.
4. Time the same attention and full attention at growing lengths.

The command uses the GPU if there is one, and downloads nothing. On two CPU cores, it takes about
two minutes. It prints each result at once.
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
    faster_from,
    median_ms,
    note,
    note_load,
    positive,
    print_result,
    save_picture,
    table_row,
    table_rule,
    versions,
    write_json,
)
from flexmoba.tune import gate_quality

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4, 2, 64, 2
BLOCK, TOPK = 64, 4
LENGTH, BATCH = 1024, 4  # of a training step
PICTURES = ("selection.png", "choices.png")


class Layer(nn.Module):
    """A pre-norm transformer layer of attention and a feed-forward network."""

    def __init__(self) -> None:
        """Creates the layer with random weights."""
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
        """Computes the input of the next layer, ``(B, L, width)`` like ``x``."""
        x = x + self.attention(self.norms[0](x))
        out: Tensor = x + self.feed_forward(self.norms[1](x))
        return out


class ByteModel(nn.Module):
    """A language model that predicts each byte of a text from the bytes before it."""

    def __init__(self) -> None:
        """Creates the model with random weights."""
        super().__init__()
        width = HEADS * HEAD_DIM
        self.embed = nn.Embedding(256, width)
        self.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])
        self.norm = nn.RMSNorm(width)
        self.to_logits = nn.Linear(width, 256, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        """Computes logits of the next byte, ``(B, L, 256)``, from bytes ``(B, L)`` int64."""
        x = self.embed(text)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.to_logits(self.norm(x))
        return logits

    def bits_per_byte(self, text: Tensor) -> Tensor:
        """Computes the mean loss in bits, ``()``; 8 is chance."""
        logits = self(text[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()) / math.log(2)


def standard_library() -> Tensor:
    """Returns the sources of the standard library as one text, ``(bytes,)`` uint8."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idle_test", "dist-packages", "__pycache__"}
    files = [x for x in sorted(root.rglob("*.py")) if skipped.isdisjoint(x.parts)]
    return torch.frombuffer(bytearray(b"".join(x.read_bytes() for x in files)), dtype=torch.uint8)


def train(
    text: Tensor, held_out: Tensor, seconds: int, device: torch.device
) -> tuple[ByteModel, dict[str, float]]:
    """Trains a model on a text for some seconds.

    Args:
        text: The text, ``(bytes,)`` uint8.
        held_out: Sequences for the validation, ``(n, LENGTH + 1)`` int64.
        seconds: Duration of the training.
        device: Device of the model.

    Returns:
        The model, and its bits per byte on the held-out sequences, with MoBA and with full
        attention.
    """
    model = ByteModel().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    parameters = sum(x.numel() for x in model.parameters())
    size = f"{parameters / 1e6:.1f}M parameters on {len(text) / 1e6:.0f} MB of Python"
    note(f"Training a model of {size} for {seconds} s")
    model.bits_per_byte(held_out[:1]).backward()  # compiles on a GPU, outside the time budget
    began, step, noted = time.perf_counter(), 0, 0.0
    while (elapsed := time.perf_counter() - began) < seconds:
        for group in optimizer.param_groups:  # a warm-up, then linearly down to 0
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
    """Returns a sequence of LENGTH + 1 bytes from each start, ``(n, LENGTH + 1)`` int64."""
    return text[starts[:, None] + torch.arange(LENGTH + 1)].long()


@torch.no_grad()
def qkv_of(model: ByteModel, texts: Tensor) -> list[Tensor]:
    """Returns queries, keys and values of the last layer on texts ``(B, L)`` int64."""
    *_, attend = (module for module in model.modules() if isinstance(module, FlexMoba))
    recorded: list[Tensor] = []
    hook = attend.register_forward_pre_hook(lambda _, qkv: recorded.extend(qkv))
    model(texts)
    hook.remove()
    dtype = torch.bfloat16 if texts.is_cuda else torch.float32
    return [x.to(dtype).contiguous() for x in recorded]


def check(qkv: list[Tensor]) -> dict[str, float]:
    """Compares flex_moba with the oracle on the first 2,048 positions.

    Returns:
        The largest error of 99.9 % of the queries, the allowed error, and the share of queries with
        a larger error, which selected another block.
    """
    q, k, v = (x[:, :, :2048] for x in qkv)
    expected = moba_reference(q.cpu(), k.cpu(), v.cpu(), BLOCK, TOPK).float()
    out: Any = flex_moba(q, k, v, BLOCK, TOPK)
    error = (out.float().cpu() - expected).abs().amax(-1)
    error = error.nan_to_num(nan=torch.finfo(error.dtype).max)  # NaN would compare as no error
    roundings = 16 if q.dtype == torch.float32 else 2  # half precision rounds each partial output
    allowed = roundings * torch.finfo(q.dtype).eps * float(expected.abs().max())
    # Rounding may swap two blocks with equal scores; then either selection is correct.
    wrong = (error > allowed).float().mean().item()
    return {"error": error.quantile(0.999).item(), "allowed": allowed, "other_block": wrong}


def captured(qkv: list[Tensor]) -> dict[str, float]:
    """Returns the captured mass of the selected blocks, and of the best possible selection."""
    q, k, _ = qkv
    quality = gate_quality(q, k, BLOCK, TOPK)[BLOCK]
    return {"mass": float(quality.mass.mean()), "best_mass": float(quality.best_mass.mean())}


def time_lengths(qkv: list[Tensor], max_length: int) -> Iterator[dict[str, float]]:
    """Yields the milliseconds of MoBA and of full attention, at lengths that double each time."""
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


TIME_HEADINGS = ["length", "full, forward", "MoBA, forward", "speed-up"]
TIME_HEADINGS += ["full, both ways", "MoBA, both ways", "speed-up"]
WIDTHS = [len(heading) for heading in TIME_HEADINGS]


def times_row(row: dict[str, float]) -> str:
    """Formats the times at one length as a line of the table."""
    line = [f"{row['length']:,}"]
    for way in ("forward_ms", "both_ms"):
        full, moba = row[f"full_{way}"], row[f"moba_{way}"]
        line += [f"{full:.1f}", f"{moba:.1f}", f"{full / moba:.1f}x"]
    return table_row(line, WIDTHS)


def summary(rows: list[dict[str, float]]) -> str:
    """Formats the length from which MoBA is faster."""
    texts = []
    for way, name in (("forward_ms", "forward"), ("both_ms", "forward and backward")):
        start = faster_from(
            [(int(row["length"]), row[f"moba_{way}"], row[f"full_{way}"]) for row in rows]
        )
        texts.append(
            f"{name} from {start:,} tokens" if start else f"{name} at none of these lengths"
        )
    return f"On this machine, MoBA is faster: {', '.join(texts)}"


def draw(qkv: list[Tensor], folder: Path) -> list[str]:
    """Plots the blocks that the queries of each head select, and how often; returns the files."""
    from flexmoba.plot import plot_choices, plot_heads

    q, k, _ = qkv
    selection = moba_select(q, k, BLOCK, TOPK)
    figures: list[Any] = [plot_heads(selection, BLOCK), plot_choices(selection, BLOCK).figure]
    files = [folder / name for name in PICTURES]
    for file, figure in zip(files, figures, strict=True):
        save_picture(figure, "output", file)
    return [str(file) for file in files]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``flexmoba demo``."""
    on_gpu = torch.cuda.is_available()
    parser.add_argument(
        "--seconds",
        type=positive,
        default=60,
        help="duration of the training in seconds (default: %(default)s)",
    )
    add_device(parser)
    parser.add_argument(
        "--max-length",
        type=positive,
        default=65536 if on_gpu else 16384,
        help="length of the longest text to time (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo-output"),
        metavar="FOLDER",
        help="folder for the pictures (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of the model (default: %(default)s)"
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Trains, checks, plots and times; returns 1 if flex_moba disagrees with the oracle."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("the demo needs matplotlib; run pip install 'flexmoba[plot]'")
    check_writable(json=arguments.json)
    torch.manual_seed(arguments.seed)
    text = standard_library()
    if not 1024 <= arguments.max_length <= len(text):
        raise UsageError(
            f"--max-length {arguments.max_length}: must be from 1024 to {len(text)}, the number of "
            "bytes of the text"
        )
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--output {arguments.output}: the folder cannot be created ({error.strerror}); choose "
            "another folder"
        ) from error
    for name in PICTURES:
        check_writable(output=arguments.output / name)
    report: dict[str, Any] = {"captured": None, "times": [], "pictures": []}
    try:
        return measure(text, report, arguments)
    finally:  # after an interruption or a failure, too
        if "bits_per_byte" in report:
            write_json(report, arguments.json)


def measure(text: Tensor, report: dict[str, Any], arguments: argparse.Namespace) -> int:
    """Fills in the report and prints each result at once; returns the exit code."""

    def show(result: str) -> None:
        print_result(result, arguments.json)

    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else platform.machine()
    report |= {"device": name, **versions()}
    show(f"Device: {name}, torch {torch.__version__}")
    note_load(arguments.device)
    training, unseen = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    held_out = windows(unseen, torch.linspace(0, len(unseen) - LENGTH - 1, 16).long()).to(device)
    model, bits = train(training, held_out, arguments.seconds, device)
    report["bits_per_byte"] = bits
    show(
        f"Unseen text: {bits['moba']:.3f} bits per byte, {bits['full']:.3f} with full attention "
        "(8 is chance)"
    )
    long = qkv_of(model, text[None, : max(arguments.max_length, 2048)].long().to(device))
    report["oracle"] = agreement = check(long)
    show(
        f"Comparison with the oracle at 2,048 positions: largest error {agreement['error']:.1e} "
        f"(allowed {agreement['allowed']:.1e}); {agreement['other_block']:.2%} of the queries "
        "select another block with an almost equal score"
    )
    if not agreement["other_block"] < 1e-3:
        note("flex_moba disagrees with the oracle")
        return 1
    qkv = qkv_of(model, held_out[:, :-1])
    report["captured"] = share = captured(qkv)
    show(
        f"The selected blocks capture {share['mass']:.1%} of full attention on unseen text of "
        f"{LENGTH:,} bytes, the length of the training; the best {TOPK} of {LENGTH // BLOCK} "
        f"blocks capture {share['best_mass']:.1%}"
    )
    report["pictures"] = draw(qkv, arguments.output)
    show(f"Pictures of the selection: {', '.join(report['pictures'])}")
    show(f"\nMilliseconds, block {BLOCK}, topk {TOPK}, {long[0].dtype}\n")
    show(f"{table_row(TIME_HEADINGS, WIDTHS)}\n{table_rule(WIDTHS)}")
    for row in time_lengths(long, arguments.max_length):
        report["times"].append(row)
        show(times_row(row))
    show(f"\n{summary(report['times'])}")
    return 0
