"""Train a small GPT on local text with full attention, MoBA, a hybrid of both, or NSA.

A language model of bytes, or of the tokens of corpus.py, whose attention is
flexmoba.nn.MobaAttention, or flexmoba.nn.NsaAttention:

  --attention full     every token attends to all before it
  --attention moba     every token attends to topk blocks, from the first step to the last
  --attention hybrid   MoBA, and full attention for the last tenth of the steps
                       (arXiv 2502.13189, Sec. 3.2)
  --attention nsa      Native Sparse Attention: compressed keys, topk blocks and a window
                       (arXiv 2502.11089)
  --full-layers N      in any but the last, the last N layers keep full attention (Sec. 3.3)

It ends with the validation loss by position in the context, as the paper reports it: what a sparse
model loses, it loses in the trailing tokens, which have most to attend to. Each loss is measured
with the blocks selected and with full attention, as the parameters serve both; a model with NSA has
one loss. --results writes that, the loss of every step and the times into a JSON file, together
with the loss of a span that the context holds once before, by how deep it lies there.

toy size, four minutes on a CPU:
  python examples/train.py --attention hybrid --out gpt.pt

full size, one GPU (bfloat16, compiled), 16 contexts to a step, 2 at a time:
  python examples/train.py --attention hybrid --text corpus.txt --layers 24 --dim 1024 \\
      --heads 16 --kv-heads 4 --length 32768 --block-size 2048 --topk 3 --batch 16 \\
      --accumulate 8 --steps 20000 --lr 4e-4 --out gpt.pt

Configurations to compare, one after the other on each GPU: see sweep.py.

--model continues the training of a pretrained model of transformers, whose tokenizer made the
corpus (`corpus.py --tokenizer`), and --save saves it for transformers:
  python examples/train.py --attention moba --model ./smollm2 --tokens corpus --length 8192 \\
      --block-size 64 --topk 16 --sink-blocks 1 --batch 8 --accumulate 4 --steps 400 --lr 2e-4 \\
      --to-zero --out smollm2.pt --save ./smollm2-moba

On several GPUs put torchrun in place of python: processes share out the contexts of each step. A
run that was interrupted, or stopped by --minutes, goes on where --out was last written, with the
options it began with, and on as many GPUs as there are now:
  torchrun --nproc-per-node 8 examples/train.py --resume gpt.pt --accumulate 1

Contexts that one GPU does not hold: --context-parallel N spreads each over N processes, --fsdp the
parameters and the optimizer over all processes, and --recompute keeps only the inputs of layers:
  torchrun --nproc-per-node 8 examples/train.py --context-parallel 8 --fsdp --recompute \\
      --length 1048576 --block-size 4096 --topk 12 --batch 1 --out gpt.pt
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint as recomputed

from flexmoba.commands.demo import standard_library
from flexmoba.hybrid import HybridSchedule, set_attention
from flexmoba.nn import FlexMoba, MobaAttention, NsaAttention
from flexmoba.reporting import (
    add_device,
    parse_writable,
    positive,
    progress,
    table,
    versions,
)

if TYPE_CHECKING:
    from pretrained import Pretrained

BUCKETS = 8  # of positions, in the report
TIMED = 10  # steps between two readings of the clock, and of the losses
DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.9)  # of the span that is copied


class Dense(FlexMoba):
    """A FlexMoba whose full attention is torch's own, to be compared with the fastest there is."""

    grouped = True  # whether the kernel takes fewer KV heads than query heads

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        if self.current_topk is not None:
            return super().forward(q, k, v, **options)
        if self.grouped:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def use_kernels(dense: str) -> None:
    """Restricts torch's scaled_dot_product_attention to one kernel."""
    if dense != "flex":
        torch.backends.cuda.enable_flash_sdp(dense == "flash")
        torch.backends.cuda.enable_cudnn_sdp(dense == "cudnn")
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_math_sdp(not torch.cuda.is_available())


class HeadNorm(nn.Module):
    """RMSNorm of each head of queries or keys, with a gain for each channel (arXiv 2309.14322)."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.norm, self.head_dim = nn.RMSNorm(head_dim), head_dim

    def forward(self, x: Tensor) -> Tensor:
        heads: Tensor = self.norm(x.unflatten(-1, (-1, self.head_dim)).float())
        return heads.flatten(-2).type_as(x)


class Block(nn.Module):
    attention: MobaAttention | NsaAttention

    def __init__(self, o: argparse.Namespace) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(o.dim) for _ in range(2))
        always = {"sink_blocks": o.sink_blocks, "local_blocks": o.local_blocks}
        more = {"gate_block_size": o.gate_block_size}
        options: dict[str, Any] = {name: x for name, x in (always | more).items() if x}
        sizes, rope_base = (o.dim, o.heads, o.kv_heads), o.rope_base or 10000.0
        if o.attention == "nsa":
            self.attention = NsaAttention(
                *sizes,
                rope_base=rope_base,
                block_size=o.block_size,
                cmp_block=o.block_size // 2,  # the proportions of the paper
                cmp_stride=o.block_size // 4,
                topk=o.topk,
                window=o.window,
                **always,
            )
        else:
            self.attention = MobaAttention(
                *sizes,
                block_size=o.block_size,
                topk=None,
                rope_base=rope_base,
                key_conv=o.key_conv,
                **options,
            )
        if o.qk_norm:  # after the projections, before the convolution and the rotary embedding
            for name in ("q_proj", "k_proj"):
                projection = self.attention.get_submodule(name)
                normalised = nn.Sequential(projection, HeadNorm(o.dim // o.heads))
                self.attention.add_module(name, normalised)
        if o.dense != "flex" and isinstance(self.attention, MobaAttention):
            self.attention.moba = Dense(o.block_size, None, **options)
            self.attention.moba.grouped = o.dense == "flash"
        self.mlp = nn.Sequential(
            nn.Linear(o.dim, 4 * o.dim), nn.GELU(), nn.Linear(4 * o.dim, o.dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Head(nn.Module):
    """Logits of the next token; with targets ``(B, L)``, the loss of each, in nats."""

    def __init__(self, norm: nn.Module, logits: nn.Module) -> None:
        super().__init__()
        self.norm, self.logits = norm, logits

    def forward(self, x: Tensor, targets: Tensor | None) -> Tensor:
        logits: Tensor = self.logits(self.norm(x))
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        return loss.view_as(targets)


class GPT(nn.Module):
    """Of the next token, from tokens ``(B, L)``: logits, or losses; full attention at first."""

    def __init__(self, o: argparse.Namespace) -> None:
        super().__init__()
        self.context: DeviceMesh | None = None  # the processes that share each context
        self.recompute = False  # layers in the backward pass
        self.embed = nn.Embedding(o.vocabulary, o.dim)
        self.blocks = nn.ModuleList(Block(o) for _ in range(o.layers))
        self.head = Head(nn.RMSNorm(o.dim), nn.Linear(o.dim, o.vocabulary, bias=False))
        std = 0.5 * o.dim**-0.5
        for name, module in self.named_modules():
            # The compression of NSA begins as a mean.
            if isinstance(module, (nn.Embedding, nn.Linear)) and ".compress_" not in name:
                nn.init.normal_(module.weight, std=std)
        for block in self.blocks:  # what adds to the stream, as in GPT-2
            for last in (block.get_submodule("attention.o_proj"), block.get_submodule("mlp.2")):
                nn.init.normal_(last.get_parameter("weight"), std=std * (2 * o.layers) ** -0.5)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = recomputed(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.head(x, targets)

    def compile_parts(self) -> None:
        """Compiles block by block: layers of equal settings are compiled once."""
        torch._dynamo.config.recompile_limit = 32  # by length, attention, and with no gradient
        for part in (*self.blocks, self.head):
            part.compile(dynamic=False)


def spread(model: GPT, o: argparse.Namespace) -> None:
    """Spreads contexts and parameters over processes, as the options say."""
    device, processes, n = torch.device(o.device).type, dist.get_world_size(), o.context_parallel
    if n > 1:
        from torch.distributed.tensor.parallel import parallelize_module

        from flexmoba.distributed import ContextParallel

        mesh = init_device_mesh(device, (processes // n, n), mesh_dim_names=("data", "context"))
        model.context = mesh["context"]
        style = ContextParallel(exchange=o.exchange, equal_lengths=True)
        parallelize_module(model, model.context, style)
    if o.fsdp:
        from torch.distributed.fsdp import fully_shard

        shards = o.fsdp_processes or processes
        names = ("copy", "shard")  # of the parameters
        both = init_device_mesh(device, (processes // shards, shards), mesh_dim_names=names)
        for part in (*model.blocks, model):
            fully_shard(part, mesh=both if shards < processes else both["shard"])


def context_of(model: nn.Module) -> DeviceMesh | None:
    """The processes that share each context; None if each has whole contexts."""
    return model.context if isinstance(model, GPT) else None


def part_of(x: Tensor, context: DeviceMesh | None) -> Tensor:
    """The tokens of this process, of contexts ``(B, L)``."""
    if context is None:
        return x
    return x.tensor_split(context.size(), 1)[context.get_local_rank()].contiguous()


def whole(x: Tensor, context: DeviceMesh | None) -> Tensor:
    """Contexts ``(B, L)`` of the tokens of all processes that share them."""
    if context is None:
        return x
    parts = [torch.empty_like(x) for _ in range(context.size())]
    dist.all_gather(parts, x.contiguous(), context.get_group())
    return torch.cat(parts, 1)


def data_of(o: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Tokens to train on and to validate on: of a corpus, or bytes."""
    if not o.tokens:
        return read(o.text, o.length)
    files = [Path(o.tokens, f"{name}.bin") for name in ("train", "held_out")]
    if missing := [str(x) for x in files if not x.is_file()]:
        sys.exit(f"--tokens: there is no {', '.join(missing)}; corpus.py --out {o.tokens} makes it")
    sizes = [x.stat().st_size // 2 for x in files]
    if min(sizes) <= o.length + 1:
        sys.exit(f"--tokens: {min(sizes):,} of them, too few for --length {o.length}")
    seen, unseen = (
        torch.from_file(str(file), size=size, dtype=torch.int16)
        for file, size in zip(files, sizes, strict=True)
    )
    return seen, unseen


def vocabulary_of(o: argparse.Namespace) -> int:
    file = Path(o.tokens or "", "corpus.json")
    return json.loads(file.read_text())["vocabulary"] if o.tokens and file.is_file() else 256


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
    both = data[starts[:, None] + torch.arange(length + 1)].long() % 65536  # of a signed integer
    if device.startswith("cuda"):
        both = both.pin_memory()  # so that the copy waits for nothing
    both = both.to(device, non_blocking=True)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


@lru_cache(maxsize=2)
def order(seed: int, epoch: int, tokens: int, length: int) -> Tensor:
    """Where the contexts of an epoch begin, shuffled: they do not overlap."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    offset = int(torch.randint(min(length, tokens - length), (), generator=generator))
    return offset + length * torch.randperm((tokens - offset - 1) // length, generator=generator)


def short_steps(o: argparse.Namespace) -> int:
    """How many steps have short contexts."""
    return round(o.short_share * o.steps) if o.short_length else 0


def length_of(step: int, o: argparse.Namespace) -> int:
    """Tokens in each context of a step."""
    return int(o.short_length if step < short_steps(o) else o.length)


def starts_of(step: int, tokens: int, o: argparse.Namespace) -> Tensor:
    """Where the contexts of a step begin: a function of the seed and the step alone."""
    starts: list[int] = []
    length = length_of(step, o)
    contexts = o.batch * o.length // length  # the same tokens in every step
    epoch, first = 0, step * contexts
    while len(starts) < contexts:
        drawn = order(o.seed, epoch, tokens, length)
        if first < len(drawn):
            starts += drawn[first : first + contexts - len(starts)].tolist()
        epoch, first = epoch + 1, max(0, first - len(drawn))
    return torch.tensor(starts)


@torch.no_grad()
def losses_of(model: nn.Module, inputs: Tensor, targets: Tensor, o: argparse.Namespace) -> Tensor:
    """The loss of each target, ``(B, length)`` float32 on the CPU, of some contexts at a time."""
    rows = max(1, o.batch // o.accumulate)  # as in training, so that nothing compiles anew
    some = len(inputs)
    short = -some % rows
    inputs, targets = (torch.cat([x, x[:1].expand(short, -1)]) for x in (inputs, targets))
    parts, context = [], context_of(model)
    for x, y in zip(inputs.split(rows), targets.split(rows), strict=True):
        with autocast(o.device):
            losses = model(part_of(x, context), part_of(y, context))
        parts.append(whole(losses.float(), context).cpu())
    return torch.cat(parts)[:some]


def unseen_windows(data: Tensor, n: int, o: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Contexts spread over a text."""
    return windows(data, torch.linspace(0, len(data) - o.length - 1, n).long(), o.length, o.device)


def loss_by_position(model: nn.Module, data: Tensor, o: argparse.Namespace) -> Tensor:
    """Mean loss at each position, ``(length,)``, in nats, of windows spread over the text."""
    return losses_of(model, *unseen_windows(data, o.windows, o), o).mean(0)


def loss_of_copies(model: nn.Module, data: Tensor, o: argparse.Namespace) -> dict[str, float]:
    """Mean loss of a span that ends the context and that it holds before, by its depth there.

    The first quarter of the span does not count: there the model learns that it is a copy.
    """
    found, span = {}, max(4, o.length // 64)
    for depth in DEPTHS:
        inputs, _ = unseen_windows(data, max(1, o.windows // 4), o)
        at = int(depth * (o.length - 2 * span))
        inputs[:, -span:] = inputs[:, at : at + span]
        targets = inputs.roll(-1, 1)
        losses = losses_of(model, inputs, targets, o)[:, :-1]  # nothing follows the last token
        found[f"{depth:.0%}"] = losses[:, -(3 * span // 4) :].mean().item()
    return found


def summary(losses: Tensor) -> dict[str, Any]:
    """Of losses ``(n, length)``: their mean, in parts of the context, and of each context."""
    part = max(1, losses.shape[1] // BUCKETS)
    middle = (losses.shape[1] - part) // 2
    return {
        "loss": losses.mean().item(),
        "first": losses[:, :part].mean().item(),
        "middle": losses[:, middle : middle + part].mean().item(),
        "last": losses[:, -part:].mean().item(),
        "by_position": [x.mean().item() for x in losses.chunk(8 * BUCKETS, 1)],
        "by_window": losses.mean(1).tolist(),
        "last_by_window": losses[:, -part:].mean(1).tolist(),
    }


def evaluate(
    model: nn.Module, schedule: "HybridSchedule | Steps", data: Tensor, o: argparse.Namespace
) -> dict[str, Any]:
    """Validation losses with the blocks selected ("moba") and with full attention ("full").

    A model with NSA has one loss ("nsa").
    """
    inputs, targets = unseen_windows(data, o.windows, o)
    found = {}
    for name in ("nsa",) if o.attention == "nsa" else ("moba", "full"):
        if name != "nsa":
            set_attention(model, topk=None)
        if name == "moba":
            set_attention(model, topk=o.topk, layers=slice(0, o.layers - o.full_layers))
        found[name] = summary(losses_of(model, inputs, targets, o))
        found[name]["copied"] = loss_of_copies(model, data, o)
    schedule.load_state_dict(schedule.state_dict())  # back to the attention of this phase
    return found


def report(found: dict[str, Any], o: argparse.Namespace) -> str:
    """The validation loss by position, with each attention."""
    columns = [torch.tensor(x["by_position"]).chunk(BUCKETS) for x in found.values()]
    rows = []
    for i, losses in enumerate(zip(*columns, strict=True)):
        name = f"{i * o.length // BUCKETS:,} to {(i + 1) * o.length // BUCKETS:,}"
        name += " (trailing)" * (i == BUCKETS - 1)
        rows.append([name, *(f"{x.mean():.4f}" for x in losses)])
    rows.append(["all", *(f"{x['loss']:.4f}" for x in found.values())])
    blocks = f"blocks of {o.block_size}, topk {o.topk}"
    heads = {"moba": blocks, "full": "full attention", "nsa": f"NSA, {blocks}, window {o.window}"}
    return table(["position", *(heads[name] for name in found)], rows)


class Steps:
    """Counts the steps of a model whose attention does not change, as a HybridSchedule does."""

    count = 0

    def step(self) -> bool:
        self.count += 1
        return False

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.count = state["count"]


def schedule_of(model: nn.Module, o: argparse.Namespace) -> "HybridSchedule | Steps":
    """What each step attends to. The model has full attention where this says nothing."""
    if o.attention == "nsa":
        return Steps()
    full = {"topk": None}
    moba = {"topk": o.topk, "layers": slice(0, o.layers - o.full_layers)}
    first = short_steps(o) if o.full_while_short else 0
    phases = [(0, full), (first, moba)] if first else [(0, moba)]
    if o.attention == "hybrid":
        phases.append((1 - o.full_share, full))
    return HybridSchedule(model, [(0, full)] if o.attention == "full" else phases, total=o.steps)


def autocast(device: str) -> torch.autocast:
    return torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda"))


def learning_rate(step: int, o: argparse.Namespace) -> float:
    """Up over the first 5 % of the steps, then down a cosine to a tenth, or a line to 0."""
    warm = max(1, o.steps // 20)
    if step < warm:
        return float(o.lr * (step + 1) / warm)
    done = (step - warm) / max(1, o.steps - warm)
    down = 1 - done if o.to_zero else 0.55 + 0.45 * math.cos(math.pi * done)
    return float(o.lr * down)


def optimizers_of(model: nn.Module, o: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """AdamW of all parameters, or Muon of the matrices of the blocks beside it (arXiv 2502.16982).

    The gains of --qk-norm and all that Muon leaves to AdamW do not decay.
    """
    blocks = {name: x for name, x in model.named_parameters() if name.startswith("blocks.")}
    others = "key_conv", "positions"  # convolutions, and the embeddings of NSA's compression
    muon = {x for x in blocks if blocks[x].ndim == 2 and not any(name in x for name in others)}
    muon = muon if o.optimizer == "muon" else set()
    rest = {name: x for name, x in model.named_parameters() if name not in muon}
    kept = {name for name in rest if muon or "_proj.1.norm" in name}
    groups: list[dict[str, Any]] = [
        {"params": [x for name, x in rest.items() if name not in kept]},
        {"params": [x for name, x in rest.items() if name in kept], "weight_decay": 0.0},
    ]
    adam: torch.optim.Optimizer = torch.optim.AdamW(
        [x for x in groups if x["params"]],
        betas=(0.9, 0.95),
        weight_decay=0.1,
        fused=o.device.startswith("cuda"),
    )
    if not muon:
        return [adam]
    matrices = [blocks[name] for name in blocks if name in muon]
    # With RMS of updates as AdamW's, so that both take one learning rate.
    return [adam, torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")]


def model_of(o: argparse.Namespace) -> "GPT | Pretrained":
    """A new GPT, or the pretrained model of --model."""
    if not o.model:
        # A billion random numbers take the CPU a minute. Other runs keep the values of the CPU.
        with torch.device(o.device if o.fsdp else "cpu"):
            return GPT(o)
    from pretrained import Pretrained  # needs transformers

    model = Pretrained(o, Head)
    o.layers = model.layers
    if o.full_layers > o.layers:
        sys.exit(f"--full-layers {o.full_layers}: the model has {o.layers} layers")
    return model


def average(tensors: list[Tensor], processes: int) -> None:
    """The mean over all processes, in place. A compiled model has all gradients at once."""
    flat = nn.utils.parameters_to_vector(tensors)
    dist.all_reduce(flat)
    nn.utils.vector_to_parameters(flat / processes, tensors)


def plain(x: Any) -> Any:
    """A state of parameters or of an optimizer, whose tensors are whole: no DTensors."""
    if isinstance(x, dict):
        return {name: plain(value) for name, value in x.items()}
    if isinstance(x, list):
        return [plain(value) for value in x]
    return x.full_tensor().cpu() if hasattr(x, "full_tensor") else x


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads a plain state, whose tensors become sharded as the parameters are."""
    parameters = [x for group in optimizer.param_groups for x in group["params"]]
    for i, parameter in enumerate(parameters):
        if hasattr(parameter, "placements"):
            from torch.distributed.tensor import distribute_tensor

            place = (parameter.device_mesh, parameter.placements)
            state["state"][i] = {
                name: distribute_tensor(x.to(parameter.device), *place) if x.ndim else x
                for name, x in state["state"][i].items()
            }
    optimizer.load_state_dict(state)


def save(state: dict[str, Any], file: str) -> None:
    """Never leaves a part of a checkpoint where there was a whole one."""
    torch.save(state, f"{file}.new")
    Path(f"{file}.new").replace(file)


class Results:
    """What ``--results`` writes: settings, the loss of every step, times, validation losses."""

    def __init__(self, o: argparse.Namespace, model: nn.Module, history: dict[str, Any]) -> None:
        self.o, self.history = o, history
        cuda = o.device.startswith("cuda")
        self.about = {
            "options": {name: x for name, x in vars(o).items() if name != "deadline"},
            "parameters": sum(x.numel() for x in model.parameters()),
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "versions": versions(),
        }

    def speed(self) -> dict[str, float]:
        """Milliseconds of a step and tokens per second, at full length, without compilation."""
        long = short_steps(self.o)  # contexts are long from this step on
        each = [
            seconds / n
            for step, n, seconds, compiles in self.history["times"]
            if not compiles and step - n >= long
        ]
        if not each:
            return {}
        step = statistics.median(each)
        return {"step_ms": step * 1e3, "tokens_per_second": self.o.batch * self.o.length / step}

    def write(self, **more: Any) -> None:
        if self.o.results:
            steps = len(self.history["loss"])
            done = {"steps": steps, "tokens": steps * self.o.batch * self.o.length}
            if self.o.device.startswith("cuda"):  # of process 0
                done["peak_MiB"] = round(torch.cuda.max_memory_allocated() / 2**20)
            text = json.dumps(self.about | done | self.speed() | more | {"history": self.history})
            Path(f"{self.o.results}.new").write_text(text + "\n")
            Path(f"{self.o.results}.new").replace(self.o.results)


def train(o: argparse.Namespace, state: dict[str, Any] | None = None) -> "GPT | Pretrained":
    torch.manual_seed(o.seed)
    use_kernels(o.dense)
    seen, unseen = data_of(o)
    cuda = o.device.startswith("cuda")
    model = model_of(o).to(o.device)
    if state is not None:
        model.load_state_dict(state["model"])
    is_spread = o.context_parallel > 1 or o.fsdp
    if isinstance(model, GPT):
        model.recompute = o.recompute
        if is_spread:
            spread(model, o)
    context = context_of(model)
    optimizers = optimizers_of(model, o)
    schedule = schedule_of(model, o)
    history: dict[str, Any] = {"loss": [], "times": [], "checks": []}
    if state is not None:
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            load_optimizer(optimizer, saved)
        schedule.load_state_dict(state["schedule"])
        history = state["history"]
    if cuda:  # settings of attention are constants of a compiled graph: each compiles once
        model.compile_parts()
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    say = print if rank == 0 else lambda *_, **__: None
    results = Results(o, model, history)
    unit = "tokens" if o.tokens else "bytes"
    say(f"{results.about['parameters']:,} parameters, {len(seen):,} {unit}, {o.attention}, "
        f"{o.device}" + f", {processes} processes" * (processes > 1), flush=True)  # fmt: skip

    def checkpoint() -> None:
        if o.out and (rank == 0 or o.fsdp):  # all processes gather shards
            saved: Any = {"model": model.state_dict(), "schedule": schedule.state_dict()}
            saved["optimizers"] = [x.state_dict() for x in optimizers]
            saved = plain(saved) if o.fsdp else saved
        if o.out and rank == 0:
            save(saved | {"history": history, "options": vars(o)}, o.out)
        if rank == 0:
            results.write()

    losses: list[Tensor] = []
    compiles, began, said, said_tokens = True, time.perf_counter(), time.perf_counter(), 0
    steps = range(schedule.count, o.until or o.steps)
    for step in progress(steps, "training") if rank == 0 else steps:
        starts, loss = starts_of(step, len(seen), o), torch.zeros((), device=o.device)
        length = length_of(step, o)
        group = rank // o.context_parallel
        for some in starts.view(o.accumulate, processes // o.context_parallel, -1)[:, group]:
            inputs, targets = windows(seen, some, length, o.device)
            inputs, targets = (part_of(x, context) for x in (inputs, targets))
            with autocast(o.device):
                part = model(inputs, targets).mean() / o.accumulate
            part.backward()
            loss += part.detach()
        if processes > 1:
            grads = [x.grad for x in model.parameters() if x.grad is not None]
            grads = [] if o.fsdp else grads  # it averages them
            average([*grads, loss], processes)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, o)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss)
        said_tokens += o.batch * o.length
        switched = schedule.step()
        if switched:
            moba = next(x for x in model.modules() if isinstance(x, FlexMoba))
            say(f"step {schedule.count}: {moba} from here on", flush=True)
        stop = schedule.count == (o.until or o.steps)
        changes = switched or schedule.count == short_steps(o)  # what compiles
        if stop or changes or schedule.count % TIMED == 0 or schedule.count % o.every == 0:
            history["loss"] += torch.stack(losses).tolist()  # waits for the device
            seconds = time.perf_counter() - began
            history["times"].append([schedule.count, len(losses), seconds, compiles])
            losses, compiles = [], changes
            late = torch.tensor(float(time.monotonic() > o.deadline))
            if processes > 1:  # all stop, or none does
                dist.broadcast(late := late.to(o.device), 0)
            stop = stop or bool(late)
            if stop or schedule.count % o.every == 0:
                now = time.perf_counter()
                say(f"step {schedule.count}: loss {history['loss'][-1]:.4f}, "
                    f"{said_tokens / (now - said):,.0f} tokens/s", flush=True)  # fmt: skip
                if (rank == 0 or is_spread) and o.check_windows and not stop:
                    few = unseen_windows(unseen, o.check_windows, o)
                    checked = losses_of(model, *few, o)
                    part = max(1, o.length // BUCKETS)
                    history["checks"].append(
                        [schedule.count, checked.mean().item(), checked[:, -part:].mean().item()]
                    )
                checkpoint()
                said, said_tokens = time.perf_counter(), 0
            if stop and schedule.count < (o.until or o.steps):
                say(f"stopped by --minutes at step {schedule.count}; --resume goes on", flush=True)
                return model
            began = time.perf_counter()
    found = evaluate(model, schedule, unseen, o) if rank == 0 or is_spread else {}
    if rank == 0:
        results.write(final=found)
        if not isinstance(model, GPT) and o.save:
            model.save(o)
        print(f"\nValidation loss (nats per {unit[:-1]}) after {schedule.count} steps\n")
        print(report(found, o), flush=True)
    return model


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--attention", choices=["full", "moba", "hybrid", "nsa"], default="hybrid")
    add("--text", nargs="+", default=[], metavar="PATH", help="files or folders, read whole; one "
        "file alone is mapped (default: the sources of Python's standard library)")  # fmt: skip
    add("--tokens", metavar="FOLDER", help="a corpus of corpus.py, in place of --text")
    add("--block-size", type=positive, default=32, help="keys in a block (%(default)s)")
    add("--topk", type=positive, default=3, help="blocks of each query (%(default)s)")
    add("--full-share", type=float, default=0.1, help="of hybrid's steps (%(default)s)")
    add("--full-layers", type=int, default=0, help="last layers always full (%(default)s)")
    add("--key-conv", type=int, choices=[3, 5], help="width of a convolution on keys (none)")
    add("--sink-blocks", type=int, default=0, help="first blocks, always seen (%(default)s)")
    add("--local-blocks", type=int, default=0, help="blocks before the own one, always seen "
        "(%(default)s)")  # fmt: skip
    add("--gate-block-size", type=positive, help="keys in a sub-block, whose mean keys the gate "
        "scores (the block size)")  # fmt: skip
    add("--window", type=int, default=64, help="tokens in the window of NSA, or 0 (%(default)s)")
    add("--dense", choices=["flex", "flash", "cudnn"], default="flex", help="kernel of full "
        "attention: flexmoba's FlexAttention, or one of torch's (%(default)s)")  # fmt: skip
    add("--qk-norm", action="store_true", help="normalise the queries and keys of each head")
    add("--rope-base", type=float, help="of rotary embeddings (10000, or the model's)")
    add("--model", metavar="FOLDER", help="a model of transformers, to continue its training")
    add("--gguf", metavar="FILE", help="in that folder, the model as GGUF")
    add("--save", metavar="FOLDER", help="where that model goes, for transformers")
    sizes = {"layers": 2, "dim": 128, "heads": 4, "kv-heads": 2, "length": 512, "batch": 8}
    sizes |= {"steps": 400, "windows": 32, "every": 100}
    notes = {"length": "tokens of context, ", "windows": "to validate on, "}
    notes |= {"batch": "contexts to a step, of all processes, "}
    notes |= {"every": "steps between lines and checkpoints, "}
    for name, size in sizes.items():
        add(f"--{name}", type=positive, default=size, help=f"{notes.get(name, '')}default {size}")
    add("--accumulate", type=positive, default=1, help="parts in which each process takes its "
        "share of a step's contexts, to spare memory (%(default)s)")  # fmt: skip
    add("--context-parallel", type=positive, default=1, metavar="N", help="processes that share "
        "each context (%(default)s)")  # fmt: skip
    add("--exchange", choices=["auto", "gather", "heads"], default="auto", help="of these: gather "
        "needs less memory, heads is mostly faster (%(default)s)")  # fmt: skip
    add("--fsdp", action="store_true", help="spread parameters and optimizer over all processes")
    add("--fsdp-processes", type=positive, metavar="N", help="with --fsdp, processes that share a "
        "copy of them (all)")  # fmt: skip
    add("--recompute", action="store_true", help="compute layers again in the backward pass")
    add("--lr", type=float, default=2e-3, help="highest learning rate (%(default)s)")
    add("--to-zero", action="store_true", help="bring it down a line to 0, not a cosine to a tenth")
    add("--optimizer", choices=["adamw", "muon"], default="adamw", help="muon takes the matrices "
        "of the blocks (%(default)s)")  # fmt: skip
    add("--short-length", type=int, default=0, metavar="N", help="contexts of so many tokens first "
        "(none)")  # fmt: skip
    add("--short-share", type=float, default=0.2, help="of the steps, with them (%(default)s)")
    add("--full-while-short", action="store_true", help="these have full attention; moba and "
        "hybrid begin after them")  # fmt: skip
    add("--seed", type=int, default=0)
    add_device(parser)
    add("--until", type=positive, metavar="STEP", help="stop there, to resume later")
    add("--minutes", type=float, help="stop after so long, to resume later")
    add("--check-windows", type=int, default=0, help="to validate on every --every steps "
        "(%(default)s)")  # fmt: skip
    add("--results", metavar="FILE", help="write losses and times there, as JSON")
    add("--out", metavar="FILE", help="where checkpoints go")
    add("--resume", metavar="FILE", help="go on from a checkpoint; of other options, only "
        "--until, --minutes, --accumulate, --context-parallel, --fsdp, --recompute, --results and "
        "--device count")  # fmt: skip
    o = parser.parse_args(argv)
    if o.resume and not Path(o.resume).is_file():
        parser.error(f"--resume: there is no {o.resume}")
    parse_writable(parser, out=o.out, results=o.results)
    if o.model and not Path(o.model).is_dir():
        parser.error(f"--model {o.model}: there is no such folder; nothing is downloaded")
    if o.save and not o.model:
        parser.error("--save needs --model; --out keeps a GPT")
    of_gpt = ("qk_norm", "key_conv", "fsdp", "recompute")
    if o.model and (o.context_parallel > 1 or any(getattr(o, name) for name in of_gpt)):
        names = ", ".join(f"--{x.replace('_', '-')}" for x in (*of_gpt, "context_parallel"))
        parser.error(f"{names} are of a new GPT; leave them out with --model")
    of_moba = ("model", "key_conv", "full_layers", "gate_block_size")
    if o.attention == "nsa" and (o.context_parallel > 1 or any(getattr(o, x) for x in of_moba)):
        names = ", ".join(f"--{x.replace('_', '-')}" for x in (*of_moba, "context_parallel"))
        parser.error(f"{names} are of MoBA; leave them out with --attention nsa")
    if o.attention == "nsa" and o.block_size % 4:
        parser.error(f"--block-size {o.block_size} must be a multiple of 4 with --attention nsa")
    layers = math.inf if o.model else o.layers  # of a model that is not loaded yet
    if not 0 < o.full_share < 1 or not 0 <= o.full_layers <= layers:
        parser.error("--full-share must lie between 0 and 1, --full-layers from 0 to --layers")
    if o.short_length and (o.short_length < 1 or o.length % o.short_length):
        parser.error(f"--short-length {o.short_length} must divide --length {o.length}")
    if o.length % o.context_parallel or o.short_length % o.context_parallel:
        parser.error(f"--context-parallel {o.context_parallel} must divide --length and "
                     "--short-length")  # fmt: skip
    if o.context_parallel > 1 and o.dense != "flex":
        parser.error(f"--context-parallel needs --dense flex, not {o.dense}")
    if o.fsdp_processes and not o.fsdp:
        parser.error("--fsdp-processes needs --fsdp")
    if o.fsdp and o.optimizer != "adamw":
        parser.error(f"--fsdp needs --optimizer adamw, not {o.optimizer}")
    if not 0 <= o.short_share <= 1:
        parser.error(f"--short-share {o.short_share} must lie between 0 and 1")
    latest = {"moba": 1.0, "hybrid": 1 - o.full_share}.get(o.attention, 0.0)
    if o.full_while_short and not (short_steps(o) and o.short_share < latest):
        parser.error("--full-while-short needs --attention moba or hybrid, --short-length, and a "
                     "--short-share that leaves steps to both")  # fmt: skip
    if o.topk < o.sink_blocks + o.local_blocks + 1:
        parser.error("--topk must be at least --sink-blocks plus --local-blocks plus 1")
    if o.gate_block_size and o.block_size % o.gate_block_size:
        parser.error(f"--gate-block-size {o.gate_block_size} must divide --block-size "
                     f"{o.block_size}")  # fmt: skip
    if o.dim % o.heads or o.heads % o.kv_heads or o.dim // o.heads % 2 or o.length < BUCKETS:
        parser.error(
            f"--heads must divide --dim into even parts, --kv-heads --heads; --length >= {BUCKETS}"
        )
    return o


def main(argv: list[str] | None = None) -> "GPT | Pretrained":
    began = time.monotonic()
    o, state = parse(argv), None
    o.vocabulary = vocabulary_of(o)
    if o.resume:
        try:
            state = torch.load(o.resume, map_location="cpu", weights_only=True)
            now = ["until", "minutes", "accumulate", "results", "device"]
            now += ["context_parallel", "exchange", "fsdp", "fsdp_processes", "recompute"]
            kept = {name: getattr(o, name) for name in now}
            o = argparse.Namespace(**state["options"] | kept | {"out": o.resume})
        except Exception as error:
            sys.exit(f"--resume {o.resume}: no checkpoint of this program ({type(error).__name__})")
    processes = int(os.environ.get("WORLD_SIZE", 1))  # more under torchrun
    if processes % o.context_parallel:
        sys.exit(f"--context-parallel {o.context_parallel} must divide {processes} processes")
    if o.batch % (processes // o.context_parallel * o.accumulate):
        n = o.context_parallel
        groups = f"{processes} processes" if n == 1 else f"{processes // n} groups of processes"
        sys.exit(f"--batch {o.batch} must be a multiple of {groups} times "
                 f"--accumulate {o.accumulate}")  # fmt: skip
    if o.fsdp and processes == 1:
        sys.exit("--fsdp needs several processes; start them with torchrun")
    if processes % (o.fsdp_processes or 1):
        sys.exit(f"--fsdp-processes {o.fsdp_processes} must divide {processes} processes")
    if (o.until or 0) > o.steps:
        sys.exit(f"--until {o.until} must be at most --steps {o.steps}")
    if processes > 1:
        if o.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
    o.deadline = math.inf if o.minutes is None else began + 60 * o.minutes
    try:
        return train(o, state)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
