"""Needle retrieval: what does a sparse gate still find, how deep, in how long a context?

A needle is a key token and a value token after it, somewhere in a haystack of filler tokens. The
last token asks for a key, and the model must answer with the value. Needles of other keys lie about
as well, so it has to look for the right one: attention must find one token among many by content.

Three small models learn the task, each from the same numbers:

  full            full attention
  moba            every query attends to topk blocks; the gate must pick the needle's block by its
                  mean key (arXiv 2502.13189, Sec. 2.2)
  moba+conv       the same with a short convolution on the keys (arXiv 2511.11571), which writes a
                  needle's key into the token that holds its value, and lifts its block's mean

Then each is asked at every depth and length: 0 % is the beginning of the context, the farthest from
the question. Chance is 1 of 8.

toy size, a minute on a CPU:
  python examples/needle.py

full size, one GPU, trained on contexts of 8K and tested up to 64K:
  python examples/needle.py --lengths 8192 16384 32768 65536 --train-length 8192 \\
      --block-size 128 --topk 8 --dim 256 --heads 4 --layers 4 --steps 4000 --batch 8
"""

import argparse
import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexmoba.console import positive, progress, table
from flexmoba.nn import MobaAttention

KEYS = VALUES = 8  # different ones
FILLERS = 16
ASK = KEYS + VALUES + FILLERS  # the first of the tokens that ask, one for each key
VOCABULARY = ASK + KEYS
NEEDLES = 8  # in a context, of different keys
VARIANTS = {"full": (False, None), "moba": (True, None), "moba+conv": (True, 3)}


class Model(nn.Module):
    """Logits ``(B, L, VOCABULARY)`` from tokens ``(B, L)``."""

    def __init__(self, o: argparse.Namespace, topk: int | None, key_conv: int | None) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, o.dim)
        options = {"block_size": o.block_size, "topk": topk, "key_conv": key_conv}
        self.attention = nn.ModuleList(
            MobaAttention(o.dim, o.heads, rope_base=10000.0, **options) for _ in range(o.layers)
        )
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(o.dim, 2 * o.dim), nn.GELU(), nn.Linear(2 * o.dim, o.dim))
            for _ in range(o.layers)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(o.dim) for _ in range(2 * o.layers + 1))
        self.head = nn.Linear(o.dim, VALUES, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x, norms = self.embed(tokens), iter(self.norms)
        for attention, mlp in zip(self.attention, self.mlps, strict=True):
            x = x + attention(next(norms)(x))
            x = x + mlp(next(norms)(x))
        return self.head(next(norms)(x))


def contexts(
    batch: int, length: int, questions: int, generator: torch.Generator, depth: float | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens ``(batch, length)`` whose last ones ask, and the answers ``(batch, questions)``.

    The first question is for a needle at ``depth``; the others lie anywhere.
    """
    def draw(n: int, *shape: int) -> Tensor:
        return torch.randint(n, shape, generator=generator)

    body = length - questions
    tokens = KEYS + VALUES + draw(FILLERS, batch, length)
    keys = torch.rand(batch, KEYS, generator=generator).argsort(1)[:, :NEEDLES]
    values = draw(VALUES, batch, NEEDLES)
    # One needle in each of as many stretches of two tokens, so that none overlap.
    places = torch.rand(batch, body // 2, generator=generator)
    if depth is not None:
        places[:, round(depth * (body // 2 - 1))] = 2.0
    places = 2 * places.argsort(1, descending=True)[:, :NEEDLES]
    tokens.scatter_(1, places, keys)
    tokens.scatter_(1, places + 1, KEYS + values)
    tokens[:, body:] = ASK + keys[:, :questions]
    return tokens, values[:, :questions]


def train(model: Model, name: str, o: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(o.seed)
    optimizer = torch.optim.AdamW(model.parameters(), o.lr, weight_decay=0.01)
    run = torch.compile(model) if o.device.startswith("cuda") else model
    losses = []
    for step in progress(range(o.steps), name):
        for group in optimizer.param_groups:
            group["lr"] = o.lr * min(1, (step + 1) / 50) * (1 - step / o.steps)
        tokens, answers = contexts(o.batch, o.train_length, NEEDLES, generator)
        with torch.autocast("cuda", torch.bfloat16, enabled=o.device.startswith("cuda")):
            logits = run(tokens.to(o.device))[:, -NEEDLES:]
        loss = F.cross_entropy(logits.float().flatten(0, 1), answers.flatten().to(o.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 49: print(step, round(sum(losses[-50:]) / 50, 3), end="; ")


@torch.no_grad()
def accuracy(model: Model, length: int, depth: float, o: argparse.Namespace) -> float:
    """Share of the contexts, of one question each, that are answered right."""
    generator = torch.Generator().manual_seed(o.seed + 1)
    right = 0
    for _ in range(o.tests // o.test_batch):
        tokens, answers = contexts(o.test_batch, length, 1, generator, depth)
        logits = model(tokens.to(o.device))[:, -1]
        right += (logits.argmax(-1).cpu() == answers[:, 0]).sum().item()
    return right / o.tests

def main(argv=None):
    p = argparse.ArgumentParser()
    add = p.add_argument
    for n, d in dict(layers=2, dim=64, heads=2, block_size=16, topk=3, train_length=128, steps=1500, batch=32, tests=128, test_batch=16).items():
        add("--" + n.replace("_", "-"), type=int, default=d)
    add("--lr", type=float, default=3e-3)
    add("--seed", type=int, default=0)
    add("--device", default="cpu")
    add("--lengths", type=int, nargs="+", default=[64, 128, 256, 512])
    add("--only", nargs="+", default=list(VARIANTS))
    o = p.parse_args(argv)
    for name in o.only:
        torch.manual_seed(o.seed)
        sparse, conv = VARIANTS[name]
        m = Model(o, o.topk if sparse else None, conv).to(o.device)
        t = time.time()
        train(m, name, o)
        print(name, time.time() - t)
        for L in o.lengths:
            print(L, [round(accuracy(m, L, d, o), 2) for d in (0, .25, .5, .75, 1)])
if __name__ == "__main__":
    main()
