"""Train a small GPT on local text with full attention, MoBA, or a hybrid of both.

A byte-level language model whose attention is flexmoba.nn.MobaAttention:

  --attention full     every token attends to all before it
  --attention moba     every token attends to topk blocks, from the first step to the last
  --attention hybrid   MoBA, and full attention for the last tenth of the steps
                       (arXiv 2502.13189, Sec. 3.2)
  --full-layers N      in any of them, the last N layers keep full attention (Sec. 3.3)

It ends with the validation loss by position in the context, as the paper reports it: what a sparse
model loses, it loses in the trailing tokens, which have most to attend to. Each loss is measured
with the blocks selected and with full attention, as the parameters serve both.

toy size, four minutes on a CPU:
  python examples/train.py --attention hybrid --out gpt.pt

full size, one GPU (bfloat16, compiled), 16 contexts to a step, 2 at a time:
  python examples/train.py --attention hybrid --text corpus.txt --layers 24 --dim 1024 \\
      --heads 16 --kv-heads 4 --length 32768 --block-size 2048 --topk 3 --batch 16 \\
      --accumulate 8 --steps 20000 --lr 4e-4 --out gpt.pt

On several GPUs put torchrun in place of python: processes share out the contexts of each step. A
run that was interrupted goes on where --out was last written, with the options it began with, and
on as many GPUs as there are now:
  torchrun --nproc-per-node 8 examples/train.py --resume gpt.pt --accumulate 1
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from flexmoba.commands.demo import standard_library
from flexmoba.hybrid import HybridSchedule, set_attention
from flexmoba.nn import MobaAttention
from flexmoba.reporting import UsageError, add_device, check_writable, positive, progress, table

BUCKETS = 8  # of positions, in the report


class Block(nn.Module):
    def __init__(self, o: argparse.Namespace) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(o.dim) for _ in range(2))
        self.attention = MobaAttention(
            o.dim, o.heads, o.kv_heads, block_size=o.block_size, topk=None, rope_base=10000.0
        )
        self.mlp = nn.Sequential(
            nn.Linear(o.dim, 4 * o.dim), nn.GELU(), nn.Linear(4 * o.dim, o.dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    """Logits ``(B, L, 256)`` of the next byte, from bytes ``(B, L)``; full attention at first."""

    def __init__(self, o: argparse.Namespace) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, o.dim)
        self.blocks = nn.ModuleList(Block(o) for _ in range(o.layers))
        self.norm = nn.RMSNorm(o.dim)
        self.head = nn.Linear(o.dim, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def read(paths: list[str], length: int) -> tuple[Tensor, Tensor]:
    """Bytes to train on, and the last tenth, to validate on; of files, or all files in folders."""
    if missing := [x for x in paths if not Path(x).exists()]:
        sys.exit(f"--text: there is no {', '.join(missing)}")
    files = [y for x in map(Path, paths) for y in (sorted(x.rglob("*")) if x.is_dir() else [x])]
    files = [x for x in files if x.is_file() and x.stat().st_size]
    if len(files) == 1:  # mapped, so that only what is drawn is ever read
        data = torch.from_file(str(files[0]), size=files[0].stat().st_size, dtype=torch.uint8)
    elif paths:
        text = b"".join(x.read_bytes() for x in files)
        data = torch.frombuffer(bytearray(text or b" "), dtype=torch.uint8)
    else:
        data = standard_library()
    cut = len(data) * 9 // 10
    if len(data) - cut <= length + 1:
        sys.exit(f"the text has {len(data):,} bytes; --length {length} needs {10 * (length + 2):,}")
    return data[:cut], data[cut:]


def windows(data: Tensor, starts: Tensor, length: int, device: str) -> tuple[Tensor, Tensor]:
    """Inputs and targets, ``(B, length)`` each."""
    both = data[starts[:, None] + torch.arange(length + 1)].long().to(device)
    return both[:, :-1], both[:, 1:]


@torch.no_grad()
def loss_by_position(model: nn.Module, data: Tensor, o: argparse.Namespace) -> Tensor:
    """Mean loss at each position, ``(length,)``, in nats, of windows spread over the text."""
    total = torch.zeros(o.length)
    starts = torch.linspace(0, len(data) - o.length - 1, o.windows).long()
    for start in starts.split(4):
        inputs, targets = windows(data, start, o.length, o.device)
        with autocast(o.device):
            logits = model(inputs)
        total += F.cross_entropy(logits.float().mT, targets, reduction="none").sum(0).cpu()
    return total / o.windows


def report(model: nn.Module, schedule: HybridSchedule, data: Tensor, o: argparse.Namespace) -> str:
    """The validation loss by position, with the blocks selected and with full attention."""
    sparse = slice(0, o.layers - o.full_layers)
    set_attention(model, topk=o.topk, layers=sparse)
    moba = loss_by_position(model, data, o)
    set_attention(model, topk=None)
    full = loss_by_position(model, data, o)
    schedule.load_state_dict(schedule.state_dict())  # back to the attention of this phase
    rows = []
    for i in range(BUCKETS):
        at = slice(i * o.length // BUCKETS, (i + 1) * o.length // BUCKETS)
        name = f"{at.start:,} to {at.stop:,}" + " (trailing)" * (i == BUCKETS - 1)
        rows.append([name, f"{moba[at].mean():.4f}", f"{full[at].mean():.4f}"])
    rows.append(["all", f"{moba.mean():.4f}", f"{full.mean():.4f}"])
    return table(["position", f"blocks of {o.block_size}, topk {o.topk}", "full attention"], rows)


def schedule_of(model: nn.Module, o: argparse.Namespace) -> HybridSchedule:
    """What each step attends to. The model has full attention where this says nothing."""
    moba = {"topk": o.topk, "layers": slice(0, o.layers - o.full_layers)}
    phases = {
        "full": [(0.0, {"topk": None})],
        "moba": [(0.0, moba)],
        "hybrid": [(0.0, moba), (1 - o.full_share, {"topk": None})],
    }
    return HybridSchedule(model, phases[o.attention], total=o.steps)


def autocast(device: str) -> torch.autocast:
    return torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda"))


def learning_rate(step: int, o: argparse.Namespace) -> float:
    """Up over the first 5 % of the steps, then down a cosine to a tenth."""
    warm = max(1, o.steps // 20)
    if step < warm:
        return o.lr * (step + 1) / warm
    return o.lr * (0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, o.steps - warm)))


def average(tensors: list[Tensor], processes: int) -> None:
    """The mean over all processes, in place. A compiled model has all gradients at once."""
    flat = nn.utils.parameters_to_vector(tensors)
    dist.all_reduce(flat)
    nn.utils.vector_to_parameters(flat / processes, tensors)


def save(state: dict[str, Any], file: str) -> None:
    """Never leaves a part of a checkpoint where there was a whole one."""
    torch.save(state, f"{file}.new")
    Path(f"{file}.new").replace(file)


def train(o: argparse.Namespace, state: dict[str, Any] | None = None) -> GPT:
    torch.manual_seed(o.seed)
    seen, unseen = read(o.text, o.length)
    model = GPT(o).to(o.device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    schedule = schedule_of(model, o)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    # Settings of attention are constants of a compiled graph: each phase compiles once.
    run: Any = torch.compile(model) if o.device.startswith("cuda") else model
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    say = print if rank == 0 else lambda *_: None
    parameters = sum(x.numel() for x in model.parameters())
    say(f"{parameters:,} parameters, {len(seen):,} bytes, {o.attention}, {o.device}"
        + f", {processes} processes" * (processes > 1))  # fmt: skip
    began, tokens = time.perf_counter(), 0
    steps = range(schedule.count, o.until or o.steps)
    for step in progress(steps, "training") if rank == 0 else steps:
        # Every step draws from a seed of its own, so that a resumed run sees what it would have.
        generator = torch.Generator().manual_seed(o.seed * 1_000_003 + step)
        starts = torch.randint(len(seen) - o.length, (o.batch,), generator=generator)
        loss = torch.zeros((), device=o.device)
        for some in starts.view(o.accumulate, processes, -1)[:, rank]:
            inputs, targets = windows(seen, some, o.length, o.device)
            with autocast(o.device):
                logits = run(inputs)
            part = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()) / o.accumulate
            part.backward()
            loss += part.detach()
        if processes > 1:
            grads = [x.grad for x in model.parameters() if x.grad is not None]
            average([*grads, loss], processes)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, o)
        optimizer.step()
        optimizer.zero_grad()
        tokens += o.batch * o.length
        if schedule.step():
            moba = model.get_submodule("blocks.0.attention.moba")
            say(f"step {schedule.count}: {moba} from here on")
        last = schedule.count == (o.until or o.steps)
        if last or schedule.count % o.every == 0:
            speed = tokens / (time.perf_counter() - began)
            say(f"step {schedule.count}: loss {loss.item():.4f}, {speed:,.0f} tokens/s")
            if o.out and rank == 0:
                parts: Any = {"model": model, "optimizer": optimizer, "schedule": schedule}
                saved = {name: part.state_dict() for name, part in parts.items()}
                save(saved | {"options": vars(o)}, o.out)
    if rank == 0:
        print(f"\nValidation loss (nats per byte) after {schedule.count} steps\n")
        print(report(run, schedule, unseen, o))
    return model


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--attention", choices=["full", "moba", "hybrid"], default="hybrid")
    add("--text", nargs="+", default=[], metavar="PATH", help="files or folders, read whole; one "
        "file alone is mapped (default: the sources of Python's standard library)")  # fmt: skip
    add("--block-size", type=positive, default=32, help="keys in a block (%(default)s)")
    add("--topk", type=positive, default=3, help="blocks of each query (%(default)s)")
    add("--full-share", type=float, default=0.1, help="of hybrid's steps (%(default)s)")
    add("--full-layers", type=int, default=0, help="last layers always full (%(default)s)")
    sizes = {"layers": 2, "dim": 128, "heads": 4, "kv-heads": 2, "length": 512, "batch": 8}
    sizes |= {"steps": 400, "windows": 32, "every": 100}
    notes = {"length": "tokens of context, ", "windows": "to validate on, "}
    notes |= {"batch": "contexts to a step, of all processes, "}
    notes |= {"every": "steps between lines and checkpoints, "}
    for name, size in sizes.items():
        add(f"--{name}", type=positive, default=size, help=f"{notes.get(name, '')}default {size}")
    add("--accumulate", type=positive, default=1, help="parts in which each process takes its "
        "share of a step's contexts, to spare memory (%(default)s)")  # fmt: skip
    add("--lr", type=float, default=2e-3, help="highest learning rate (%(default)s)")
    add("--seed", type=int, default=0)
    add_device(parser)
    add("--until", type=positive, metavar="STEP", help="stop there, to resume later")
    add("--out", metavar="FILE", help="where checkpoints go")
    add("--resume", metavar="FILE", help="go on from a checkpoint; of other options, only "
        "--until, --accumulate and --device count")  # fmt: skip
    o = parser.parse_args(argv)
    if o.resume and not Path(o.resume).is_file():
        parser.error(f"--resume: there is no {o.resume}")
    try:
        check_writable(out=o.out)
    except UsageError as error:
        parser.error(str(error))
    if not 0 < o.full_share < 1 or not 0 <= o.full_layers <= o.layers:
        parser.error("--full-share must lie between 0 and 1, --full-layers from 0 to --layers")
    if o.dim % o.heads or o.heads % o.kv_heads or o.dim // o.heads % 2 or o.length < BUCKETS:
        parser.error(
            f"--heads must divide --dim into even parts, --kv-heads --heads; --length >= {BUCKETS}"
        )
    return o


def main(argv: list[str] | None = None) -> GPT:
    o, state = parse(argv), None
    if o.resume:
        try:
            state = torch.load(o.resume, map_location="cpu", weights_only=True)
            kept = {name: getattr(o, name) for name in ("until", "accumulate", "device")}
            o = argparse.Namespace(**state["options"] | kept | {"out": o.resume})
        except Exception as error:
            sys.exit(f"--resume {o.resume}: no checkpoint of this program ({type(error).__name__})")
    processes = int(os.environ.get("WORLD_SIZE", 1))  # more under torchrun
    if o.batch % (processes * o.accumulate):
        sys.exit(f"--batch {o.batch} must be a multiple of {processes} processes times "
                 f"--accumulate {o.accumulate}")  # fmt: skip
    if (o.until or 0) > o.steps:
        sys.exit(f"--until {o.until} must be at most --steps {o.steps}")
    if processes > 1:
        if o.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
    try:
        return train(o, state)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
