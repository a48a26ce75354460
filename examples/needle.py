"""Measures needle retrieval of full attention and of MoBA, by depth and context length.

A needle is a key token followed by a value token, somewhere in a haystack of filler tokens. The
last token asks for a key, and the model must answer with its value. The haystack also holds needles
of other keys, so attention must find one token among many by its content.

The example trains small models on the same contexts, from the same initial weights:

  full            full attention
  moba            every query attends to topk blocks; the gate must select the block of the needle
                  by its mean key (arXiv 2502.13189, Sec. 2.2)
  moba+conv       moba with a short convolution on the keys (arXiv 2511.11571), which adds the key
                  token of a needle to its value token, and so to the mean key of the block
  moba+sub        moba whose gate scores sub-blocks of --gate-block-size keys
  moba+conv+sub   moba with both

The models with MoBA train with full attention for the first --full-share of the steps, and with
MoBA for the rest. From the first step on (--full-share 0), a query learns only from the needles in
the blocks that it happens to select, and 400 steps are too few.

Then it tests each model at every depth and length. A depth of 0 % is the beginning of the context,
farthest from the question. A random choice among the values in the context is right once in 8.

toy size, six minutes on a CPU (fifteen seconds for full attention alone):
  python examples/needle.py

full size, one GPU, trained on contexts of 8K and tested up to 64K:
  python examples/needle.py --lengths 8192 16384 32768 65536 --train-length 8192 \\
      --block-size 128 --topk 8 --gate-block-size 16 --dim 256 --heads 4 --layers 4 \\
      --steps 4000 --batch 8
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexmoba.hybrid import HybridSchedule
from flexmoba.nn import MobaAttention
from flexmoba.reporting import add_device, positive, progress, table

KINDS = 16  # of keys, and of values
NEEDLES = 8  # in each context
FILLERS = 16
# The first token of each kind; keys begin at 0.
VALUE, ASK, FILLER = KINDS, 2 * KINDS, 3 * KINDS
VARIANTS = ("full", "moba", "moba+conv", "moba+sub", "moba+conv+sub")


class Model(nn.Module):
    """A small GPT: tokens ``(B, L)`` to logits of the values, ``(B, L, KINDS)``."""

    def __init__(self, o: argparse.Namespace, name: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(FILLER + FILLERS, o.dim)
        options = {"block_size": o.block_size, "topk": o.topk if "moba" in name else None}
        if "conv" in name:
            options["key_conv"] = 3
        if "sub" in name:
            options["gate_block_size"] = o.gate_block_size
        self.attention = nn.ModuleList(
            MobaAttention(o.dim, o.heads, rope_base=10000.0, **options) for _ in range(o.layers)
        )
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(o.dim, 2 * o.dim), nn.GELU(), nn.Linear(2 * o.dim, o.dim))
            for _ in range(o.layers)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(o.dim) for _ in range(2 * o.layers + 1))
        self.head = nn.Linear(o.dim, KINDS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x, norms = self.embed(tokens), iter(self.norms)
        for attention, mlp in zip(self.attention, self.mlps, strict=True):
            x = x + attention(next(norms)(x))
            x = x + mlp(next(norms)(x))
        return self.head(next(norms)(x))


def contexts(
    batch: int, length: int, questions: int, generator: torch.Generator, depth: float | None = None
) -> tuple[Tensor, Tensor]:
    """Returns tokens ``(batch, length)`` and answers ``(batch, questions)``, int64.

    The last ``questions`` tokens of each row are questions. The needle of the first question lies
    at ``depth`` if given, the other needles at random positions.
    """

    def some() -> Tensor:
        """Draws ``(batch, NEEDLES)`` kinds, all different within a row."""
        return torch.rand(batch, KINDS, generator=generator).argsort(1)[:, :NEEDLES]

    body = length - questions
    tokens = FILLER + torch.randint(FILLERS, (batch, length), generator=generator)
    keys, values = some(), some()
    # Each needle takes one of the pairs of adjacent tokens, so that needles do not overlap.
    places = torch.rand(batch, body // 2, generator=generator)
    if depth is not None:
        places[:, round(depth * (body // 2 - 1))] = 2.0
    places = 2 * places.argsort(1, descending=True)[:, :NEEDLES]
    tokens.scatter_(1, places, keys)
    tokens.scatter_(1, places + 1, VALUE + values)
    tokens[:, body:] = ASK + keys[:, :questions]
    return tokens, values[:, :questions]


def autocast(device: str) -> torch.autocast:
    return torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda"))


def train(model: Model, name: str, o: argparse.Namespace) -> float:
    """Trains on all questions of fresh contexts, and returns the last loss."""
    generator = torch.Generator().manual_seed(o.seed)
    optimizer = torch.optim.AdamW(model.parameters(), o.lr, weight_decay=0.01)
    run = torch.compile(model) if o.device.startswith("cuda") else model
    topk = model.attention[0].moba.topk  # after full attention for the first steps
    start = min(round(o.full_share * o.steps), o.steps - 1)
    phases = [(0, {"topk": None})] * (start > 0) + [(start, {"topk": topk})]
    schedule = HybridSchedule(model, phases)
    for step in progress(range(o.steps), name):
        for group in optimizer.param_groups:
            group["lr"] = o.lr * min(1, (step + 1) / 50) * (1 - step / o.steps)
        tokens, answers = contexts(o.batch, o.train_length, NEEDLES, generator)
        with autocast(o.device):
            logits = run(tokens.to(o.device))[:, -NEEDLES:]
        loss = F.cross_entropy(logits.float().flatten(0, 1), answers.flatten().to(o.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


@torch.no_grad()
def accuracy(model: Model, length: int, depth: float, o: argparse.Namespace) -> float:
    """Returns the share of right answers in --tests contexts of one question each."""
    generator = torch.Generator().manual_seed(o.seed + 1)
    right = 0
    for first in range(0, o.tests, o.batch):
        batch = min(o.batch, o.tests - first)
        tokens, answers = contexts(batch, length, 1, generator, depth)
        with autocast(o.device):
            logits = model(tokens.to(o.device))[:, -1]
        right += (logits.argmax(-1).cpu() == answers[:, 0]).sum().item()
    return right / o.tests


def main(argv: list[str] | None = None) -> dict[str, dict[int, list[float]]]:
    o = parse(argv)
    depths = [i / (o.depths - 1) for i in range(o.depths)]
    found: dict[str, dict[int, list[float]]] = {}
    for name in o.variants:
        torch.manual_seed(o.seed)  # the same initial weights for each model
        model = Model(o, name).to(o.device)
        began = time.perf_counter()
        loss = train(model, name, o)
        model.eval()
        seconds = time.perf_counter() - began
        print(f"\n{name}: {model.attention[0].moba}, {seconds:.0f} s, loss {loss:.3f}\n")
        found[name] = {x: [accuracy(model, x, depth, o) for depth in depths] for x in o.lengths}
        heads = ["context", "blocks", *(f"{depth:.0%} deep" for depth in depths), "mean"]
        rows = []
        for length, right in found[name].items():
            cells = [*right, sum(right) / len(right)]
            blocks = -(-length // o.block_size)
            rows.append([f"{length:,}", f"{blocks:,}", *(f"{x:.0%}" for x in cells)])
        print(table(heads, rows))
    means = [[name, *(f"{sum(x) / len(x):.0%}" for x in found[name].values())] for name in found]
    print(f"\nMean of all depths\n\n{table(['context', *map(str, o.lengths)], means)}")
    print(f"\nRight answers of {o.tests}; a random value of the context gives {1 / NEEDLES:.1%}")
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME",
        help=" ".join(VARIANTS))  # fmt: skip
    add("--lengths", type=positive, nargs="+", default=[64, 128, 256], metavar="L",
        help="lengths of test contexts (64 128 256)")  # fmt: skip
    sizes = {"train-length": 64, "block-size": 8, "topk": 3, "gate-block-size": 2}
    sizes |= {"layers": 2, "dim": 64, "heads": 1}
    sizes |= {"steps": 400, "batch": 16, "tests": 128, "depths": 5}
    for name, size in sizes.items():
        add(f"--{name}", type=positive, default=size, help=f"default {size}")
    add("--full-share", type=float, default=0.6, help="of the steps with full attention, before "
        "MoBA (%(default)s)")  # fmt: skip
    add("--lr", type=float, default=4e-3, help="highest learning rate (%(default)s)")
    add("--seed", type=int, default=0)
    add_device(parser)
    o = parser.parse_args(argv)
    least = 3 * NEEDLES  # two tokens for each needle, and one for its question
    if min(*o.lengths, o.train_length) < least:
        parser.error(f"a context needs at least {least} tokens for {NEEDLES} needles")
    if not 0 <= o.full_share < 1:
        parser.error(f"--full-share {o.full_share} must be from 0 to less than 1")
    if o.block_size % o.gate_block_size:
        parser.error(f"--gate-block-size must divide --block-size {o.block_size}")
    if o.depths < 2:
        parser.error("--depths must be at least 2, for the beginning and the end")
    if o.dim % o.heads or o.dim // o.heads % 2:
        parser.error(f"--heads must divide --dim {o.dim} into parts of even size")
    return o


if __name__ == "__main__":
    main()
