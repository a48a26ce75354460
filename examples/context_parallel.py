"""Trains a small model on contexts that are spread over several processes.

Each process holds a part of the tokens of every context, its shard. Embeddings, projections and
loss need only the shard. Attention needs the tokens of all processes:
flexmoba.distributed.context_parallel_moba attends to them. Every process has all parameters, and
their gradients are summed over the processes.

A token of the first half of a context shows a tag and the value of that tag, which differs from
context to context. A token of the second half shows a tag, and the model must answer with its
value. The token that shows it is usually on another process.

Process 0 prints the loss and the right answers. With --check, it compares the loss and all
gradients of the first step with those of one process that has all tokens.

toy size, two processes on a CPU, half a minute:
  python examples/context_parallel.py --processes 2 --check

full size, 8 GPUs, contexts of 1M tokens:
  python examples/context_parallel.py --processes 8 --device cuda --length 1048576 --batch 1 \\
      --dim 4096 --heads 32 --kv-heads 8 --block-size 4096 --topk 12 --tags 128

torchrun may start the processes instead; then omit --processes.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.multiprocessing.spawn import spawn

from flexmoba import flex_moba
from flexmoba.distributed import context_parallel_moba
from flexmoba.reporting import add_device, positive

VALUES = 16  # value 0 stands for a value that is not shown


class Model(nn.Module):
    """One layer of attention: tags and values ``(B, L)`` to logits of values ``(B, L, VALUES)``.

    With a mesh, ``L`` counts the tokens of the shard.
    """

    def __init__(self, o: argparse.Namespace) -> None:
        super().__init__()
        self.o, self.head_dim = o, o.dim // o.heads
        self.tag, self.value = nn.Embedding(o.tags, o.dim), nn.Embedding(VALUES, o.dim)
        self.q = nn.Linear(o.dim, o.heads * self.head_dim, bias=False)
        self.k = nn.Linear(o.dim, o.kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(o.dim, o.kv_heads * self.head_dim, bias=False)
        self.answer = nn.Linear(o.heads * self.head_dim, VALUES, bias=False)

    def forward(self, tags: Tensor, values: Tensor, mesh: DeviceMesh | None) -> Tensor:
        x = self.tag(tags)
        features = self.q(x), self.k(x), self.v(self.value(values))
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in features)
        block_size, topk = self.o.block_size, self.o.topk
        if mesh is None:
            out = flex_moba(q, k, v, block_size, topk)
        else:
            out = context_parallel_moba(
                q, k, v, block_size, topk, mesh=mesh, exchange=self.o.exchange
            )
        return self.answer(out.transpose(1, 2).flatten(2))


def contexts(o: argparse.Namespace, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draws contexts: tags, shown values and answers, int64 ``(batch, length)``; answer 0 for none.

    The tags of the first half are in runs, so that the mean key of a block stands for its tag.
    """
    shown = o.length // 2
    order = torch.rand(o.batch, o.tags, generator=generator).argsort(1)
    run = torch.arange(shown) * o.tags // shown
    asked = torch.randint(o.tags, (o.batch, o.length - shown), generator=generator)
    tags = torch.cat([order[:, run], asked], 1)
    value_of_tag = torch.randint(1, VALUES, (o.batch, o.tags), generator=generator)
    values = value_of_tag.gather(1, tags)
    is_shown = torch.arange(o.length) < shown
    return tags, values.where(is_shown, 0), values.where(~is_shown, 0)


def loss_of(
    model: Model, tokens: tuple[Tensor, ...], o: argparse.Namespace, mesh: DeviceMesh | None
) -> tuple[Tensor, Tensor]:
    """Returns the sum of the losses over the number of all answers, and the right answers."""
    tags, values, answers = (x.to(o.device) for x in tokens)
    logits = model(tags, values, mesh).float()
    losses = F.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="none")
    is_answer = (answers > 0).flatten()
    right = (logits.argmax(-1).flatten() == answers.flatten()) & is_answer
    n_answers = o.batch * (o.length - o.length // 2)
    # A sum over no answer is zero, so a shard without answers runs the backward pass, too.
    return losses.where(is_answer, 0.0).sum() / n_answers, right.sum() / n_answers


def compare(model: Model, tokens: tuple[Tensor, ...], loss: Tensor, o: argparse.Namespace) -> None:
    """Prints the differences from one process that has all tokens."""
    alone = Model(o).to(o.device, o.dtype)
    alone.load_state_dict(model.state_dict())
    expected, _ = loss_of(alone, tokens, o, None)
    expected.backward()
    largest = 0.0
    for mine, other in zip(model.parameters(), alone.parameters(), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        difference = (mine.grad - other.grad).abs().max() / other.grad.abs().max()
        largest = max(largest, float(difference))
    print(
        f"difference from one process: loss {abs(float(loss - expected.detach())):.1e}, gradients "
        f"{largest:.1e} of the largest element"
    )


def train(mesh: DeviceMesh, o: argparse.Namespace) -> None:
    """Trains on contexts of which this process has a shard."""
    rank, size = mesh.get_local_rank(), mesh.size()
    torch.manual_seed(o.seed)  # the same parameters in all processes
    model = Model(o).to(o.device, o.dtype)
    optimizer = torch.optim.Adam(model.parameters(), o.lr)
    generator = torch.Generator().manual_seed(o.seed)  # and the same contexts
    for step in range(1, o.steps + 1):
        tokens = contexts(o, generator)
        shard = tuple(x.tensor_split(size, dim=1)[rank] for x in tokens)
        loss, right = loss_of(model, shard, o, mesh)
        optimizer.zero_grad()
        loss.backward()
        sums = torch.stack([loss.detach(), right])
        for x in (sums, *(p.grad for p in model.parameters())):
            dist.all_reduce(x, group=mesh.get_group())
        if step == 1 and o.check and rank == 0:
            compare(model, tokens, sums[0], o)
        optimizer.step()
        if rank == 0 and step % o.every == 0:
            print(f"step {step}: loss {float(sums[0]):.3f}, {float(sums[1]):.0%} right", flush=True)


def run(rank: int, o: argparse.Namespace, store: str | None) -> None:
    """Runs one process. Without a store, the environment of torchrun describes the group."""
    device = torch.device(o.device).type
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    group = {} if store is None else {"rank": rank, "world_size": o.processes}
    init_method = None if store is None else f"file://{store}"
    dist.init_process_group("nccl" if device == "cuda" else "gloo", init_method, **group)
    try:
        train(init_device_mesh(device, (dist.get_world_size(),)), o)
    finally:
        dist.destroy_process_group()


def main(argv: list[str] | None = None) -> None:
    o = parse(argv)
    if "LOCAL_RANK" in os.environ:
        run(int(os.environ["LOCAL_RANK"]), o, None)
        return
    with tempfile.TemporaryDirectory() as folder:
        spawn(run, (o, str(Path(folder, "store"))), nprocs=o.processes)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--processes", type=positive, default=1, help="processes to start (1)")
    add("--exchange", choices=["auto", "gather", "heads"], default="auto")
    add("--check", action="store_true", help="compare the first step with one process")
    sizes = {"length": 512, "batch": 4, "dim": 32, "heads": 4, "kv-heads": 2, "tags": 16}
    sizes |= {"block-size": 16, "topk": 4, "steps": 120, "every": 20}
    for name, size in sizes.items():
        add(f"--{name}", type=positive, default=size, help=f"default {size}")
    add("--lr", type=float, default=1e-2, help="learning rate (%(default)s)")
    add("--seed", type=int, default=0)
    add_device(parser)
    o = parser.parse_args(argv)
    if o.dim % o.heads or o.heads % o.kv_heads:
        parser.error("--heads must divide --dim, and --kv-heads must divide --heads")
    o.dtype = torch.bfloat16 if torch.device(o.device).type == "cuda" else torch.float32
    return o


if __name__ == "__main__":
    main()
