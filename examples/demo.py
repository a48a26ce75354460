"""Train a small language model with MoBA attention, then check, time and draw that attention.

1. A byte-level language model, whose only attention is `flex_moba`, learns the sources of Python's
   standard library for about a minute.
2. The trained model reads one long text; its queries, keys and values are put through `flex_moba`
   and compared with the oracle, `moba_reference`.
3. The same attention is timed beside full attention, at growing lengths.
4. A picture shows which blocks the queries chose.

Everything runs on this machine's best device; nothing is downloaded.
"""

import argparse
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from flexmoba import flex_moba, moba_reference, moba_select

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4, 2, 64, 2
BLOCK, TOPK = 64, 4  # while training, on sequences of LENGTH
LENGTH, BATCH = 1024, 4
LONG_BLOCK, LONG_TOPK = 512, 3  # where it is timed, on long ones


class Layer(nn.Module):
    """Attention and a feed-forward part, each on normalized inputs and added to them."""

    def __init__(self) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        self.to_qkv = nn.Linear(width, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width)
        )

    def qkv(self, x: Tensor) -> list[Tensor]:
        """Queries (B, HEADS, L, HEAD_DIM), keys and values (B, KV_HEADS, L, HEAD_DIM)."""
        heads = self.to_qkv(self.norms[0](x)).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        q, k, v = heads.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        return [rotate(q), rotate(k), v]

    def forward(self, x: Tensor, topk: int | None) -> Tensor:
        attended = flex_moba(*self.qkv(x), BLOCK, topk)
        x = x + self.to_out(attended.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.norms[1](x))


class ByteModel(nn.Module):
    """Predicts each byte of a text from those before it."""

    def __init__(self) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.embed = nn.Embedding(256, width)
        self.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])
        self.norm = nn.RMSNorm(width)
        self.to_logits = nn.Linear(width, 256, bias=False)

    def forward(self, text: Tensor, topk: int | None = TOPK) -> Tensor:
        x = self.embed(text)
        for layer in self.layers:
            x = layer(x, topk)
        return self.to_logits(self.norm(x))

    def bits_per_byte(self, text: Tensor, topk: int | None = TOPK) -> Tensor:
        logits = self(text[:, :-1], topk)
        return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()) / 0.6931


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding of (B, H, L, D)."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(x.shape[2], device=x.device)[:, None] * frequency
    a, b = x.split(half, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def standard_library() -> Tensor:
    """The text: the standard library's own modules, one after the other, as bytes."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idle_test", "dist-packages", "__pycache__"}
    files = [x for x in sorted(root.rglob("*.py")) if skipped.isdisjoint(x.parts)]
    return torch.frombuffer(bytearray(b"".join(x.read_bytes() for x in files)), dtype=torch.uint8)


def train(text: Tensor, seconds: float, device: torch.device) -> ByteModel:
    """Trains for some seconds on all but the last tenth of the text."""
    model = ByteModel().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    parameters = sum(x.numel() for x in model.parameters())
    print(f"Training {parameters / 1e6:.1f}M parameters on {len(text) / 1e6:.0f} MB of Python")
    seen, unseen = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    starts = torch.linspace(0, len(unseen) - LENGTH - 1, 16).long()
    held_out = windows(unseen, starts).to(device)
    model.bits_per_byte(held_out[:1]).backward()  # compiles, on a GPU, outside the time budget
    began, step = time.perf_counter(), 0
    with tqdm(total=round(seconds), unit="s", bar_format="{l_bar}{bar}| {postfix}") as bar:
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
    with torch.no_grad():
        sparse, full = (model.bits_per_byte(held_out, topk).item() for topk in (TOPK, None))
    print(f"Unseen text: {sparse:.3f} bits per byte, {full:.3f} if it attends fully (8 is chance)")
    return model


def windows(text: Tensor, starts: Tensor) -> Tensor:
    """One sequence of LENGTH + 1 bytes from each start."""
    return text[starts[:, None] + torch.arange(LENGTH + 1)].long()


@torch.no_grad()
def long_qkv(model: ByteModel, text: Tensor, length: int, device: torch.device) -> list[Tensor]:
    """The second layer's queries, keys and values on the beginning of the text."""
    x = model.layers[0](model.embed(text[None, :length].long().to(device)), TOPK)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return [y.to(dtype).contiguous() for y in model.layers[1].qkv(x)]


def check(qkv: list[Tensor]) -> bool:
    """Compares flex_moba with the oracle on the first 2,048 positions."""
    q, k, v = (x[:, :, :2048] for x in qkv)
    expected = moba_reference(q.cpu(), k.cpu(), v.cpu(), BLOCK, TOPK).float()
    error = (flex_moba(q, k, v, BLOCK, TOPK).float().cpu() - expected).abs().amax(-1)
    roundings = 16 if q.dtype == torch.float32 else 2  # half precision is rounded once per part
    allowed = roundings * torch.finfo(q.dtype).eps * float(expected.abs().max())
    # Two scores may be equal but for rounding: then either block is right.
    wrong = (error > allowed).float().mean().item()
    print(
        f"Against the oracle, 2,048 positions: largest error {error.quantile(0.999):.1e} "
        f"(allowed {allowed:.1e}), {wrong:.2%} of the queries chose another, equally good block"
    )
    return wrong < 1e-3


def time_lengths(qkv: list[Tensor], max_length: int) -> None:
    """Prints milliseconds beside full attention's, at lengths doubled up to the longest."""
    print(f"\nMilliseconds, block {LONG_BLOCK}, topk {LONG_TOPK}, {qkv[0].dtype}")
    print("          |          forward           |    forward and backward")
    print("   length |    full     MoBA   speed-up |    full     MoBA   speed-up")
    length = 1024
    while length <= max_length:
        q, k, v = (x[:, :, :length].detach().requires_grad_() for x in qkv)

        def moba(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return flex_moba(q, k, v, LONG_BLOCK, LONG_TOPK)

        def full(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        line = f"{length:9,} |"
        for backward in (False, True):
            dense, sparse = (milliseconds(x, (q, k, v), backward) for x in (full, moba))
            line += f"{dense:8.1f} {sparse:8.1f} {dense / sparse:9.1f}x |"
        print(line.rstrip(" |"), flush=True)
        length *= 2


def milliseconds(function: Callable[[], Tensor], inputs: tuple, backward: bool) -> float:
    """The median of three calls, or of more if they are short."""

    def call() -> None:
        with torch.set_grad_enabled(backward):
            out = function()
        if backward:
            torch.autograd.grad(out, inputs, torch.ones_like(out))
        if out.is_cuda:
            torch.cuda.synchronize()

    call()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 0.3 and len(times) < 30):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def draw(qkv: list[Tensor], path: Path) -> None:
    """Which blocks the queries of each head chose, on the first 4,096 positions."""
    q, k, _ = (x[:, :, :4096] for x in qkv)
    selection = moba_select(q, k, BLOCK, TOPK)[0].cpu()  # (HEADS, length, TOPK)
    length = selection.shape[1]
    colors = ListedColormap(["white", "#2f6db5", "#e8923a"])
    figure, axes = plt.subplots(1, HEADS, figsize=(3.4 * HEADS, 4.2), sharey=True, squeeze=False)
    for head, axis in enumerate(axes[0]):
        picture = torch.zeros(length, length // BLOCK + 1, dtype=torch.uint8)
        chosen = selection[head].long()
        picture.scatter_(1, torch.where(chosen < 0, length // BLOCK, chosen), 1)
        picture.scatter_(1, chosen[:, :1], 2)
        shape = (0, length // BLOCK, length, 0)
        axis.imshow(picture[:, :-1], cmap=colors, extent=shape, aspect="auto", interpolation="none")
        axis.set(title=f"head {head}", xlabel=f"block of {BLOCK} keys")
    axes[0, 0].set_ylabel("query position")
    names = ("not attended to", "chosen by its score", "own block, always attended to")
    patches = [plt.Rectangle((0, 0), 1, 1, fc=colors(i), ec="gray") for i in range(3)]
    figure.legend(patches, names, loc="lower center", ncols=3, frameon=False)
    figure.suptitle(f"The {TOPK} blocks that each query attends to")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"\nWhich blocks the queries chose: {path}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--seconds", type=float, default=60, help="how long to train")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--max-length", type=int, default=65536 if on_gpu else 16384)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    device, text = torch.device(arguments.device), standard_library()
    print(
        f"Device: {torch.cuda.get_device_name() if on_gpu else device}, torch {torch.__version__}"
    )
    model = train(text, arguments.seconds, device)
    qkv = long_qkv(model, text, max(arguments.max_length, 4096), device)
    if not check(qkv):
        print("flex_moba disagrees with the oracle", file=sys.stderr)
        return 1
    time_lengths(qkv, arguments.max_length)
    draw(qkv, arguments.output / "selection.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
