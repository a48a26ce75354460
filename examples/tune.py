"""Chooses block size and topk for a model, applies them, and compares validation losses.

flexmoba.tune measures a grid of block sizes and topks on the queries and keys of the model's
attention. For each pair it measures the captured mass, which is the share of full attention's
probability that falls on the selected keys, and the time. The example runs it on a checkpoint of
train.py:

  1. The model reads unseen text, and `capture` records its queries and keys.
  2. `tune` measures the grid. A star in the table marks each choice on the frontier of mass and
     cost.
  3. `set_attention` applies the recommendation for --mass to the model.
  4. The example prints the validation loss with full attention, with the recommended blocks, and
     with the choice that captures the least mass, all without training for them.

toy size, half a minute on a CPU, after the first command has trained a model in four minutes:
  python examples/train.py --attention full --out gpt.pt
  python examples/tune.py gpt.pt --plot tune.png

full size, one GPU, on the checkpoint of the full-size command of train.py:
  python examples/tune.py gpt.pt --text corpus.txt --block-sizes 128 256 512 1024 2048 \\
      --topks 2 4 8 16 --mass 0.9 --plot tune.png

For a model of transformers: flexmoba tune --model FOLDER --text FILE
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from train import GPT, data_of, loss_by_position, read, windows

from flexmoba.hybrid import set_attention
from flexmoba.reporting import add_device, parse_writable, positive
from flexmoba.tune import Report, capture, tune


def load(o: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[GPT, Tensor]:
    """Returns the model, with full attention, and text that it was not trained on."""
    try:
        state = torch.load(o.checkpoint, map_location="cpu", weights_only=True)
        trained = argparse.Namespace(**state["options"])
    except Exception as error:
        parser.error(f"{o.checkpoint} is not a checkpoint of train.py ({type(error).__name__})")
    model = GPT(trained).to(o.device).eval()
    model.load_state_dict(state["model"])
    for name in ("length", "batch", "accumulate"):
        setattr(o, name, getattr(trained, name))
    _, unseen = read(o.text, o.length) if o.text else data_of(trained)
    return model, unseen


def main(argv: list[str] | None = None) -> tuple[Report, dict[str, float]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="FILE", help="a checkpoint of train.py --out")
    add("--text", nargs="+", metavar="PATH", help="as for train.py (default: its text)")
    for name, default in (("block-sizes", [8, 16, 32, 64]), ("topks", [2, 3, 4, 8])):
        shown = " ".join(map(str, default))
        add(f"--{name}", type=positive, nargs="+", default=default, metavar="N", help=shown)
    add("--mass", type=float, default=0.9, help="share of attention to capture (%(default)s)")
    add("--windows", type=positive, default=32, help="windows to measure the loss on (%(default)s)")
    add("--no-times", action="store_true", help="measure no times; cost is then the sparsity")
    add("--plot", metavar="FILE", help="draw the frontier (needs matplotlib)")
    add_device(parser)
    o = parser.parse_args(argv)
    if not o.checkpoint.is_file():
        parser.error(
            f"there is no {o.checkpoint}; train.py --attention full --out {o.checkpoint} makes it"
        )
    parse_writable(parser, plot=o.plot)
    model, unseen = load(o, parser)

    starts = torch.linspace(0, len(unseen) - o.length - 1, 4).long()
    tokens, _ = windows(unseen, starts, o.length, o.device)
    with torch.no_grad(), capture(model) as calls:
        model(tokens)
    report = tune(calls, o.block_sizes, o.topks, timed=not o.no_times, show_progress=True)
    best = report.recommend(mass=o.mass)
    print(
        f"{len(report.layers)} layers, {report.inputs}, {report.device}\n\n{report.table(best)}\n"
    )
    if o.plot:
        from flexmoba.plot import plot_report

        plot_report(report, best).savefig(o.plot)
        print(f"the frontier is drawn in {o.plot}")
    if best is None:
        print(f"no choice captures {o.mass:.0%}; applying the choice that captures most")
        best = max(report.choices, key=lambda x: x.mass)

    worst = min(report.choices, key=lambda x: x.mass)
    losses = {"full attention": loss_by_position(model, unseen, o).mean().item()}
    for choice in (best, worst):
        set_attention(model, block_size=choice.block_size, topk=choice.topk)
        name = f"block_size={choice.block_size}, topk={choice.topk} (mass {choice.mass:.1%})"
        losses[name] = loss_by_position(model, unseen, o).mean().item()
    set_attention(model, block_size=best.block_size, topk=best.topk)
    print("validation loss, without training for it:")
    for name, loss in losses.items():
        print(f"  {loss:.4f}  {name}")
    print(f"the first layer is now {model.get_submodule('blocks.0.attention.moba')}")
    return report, losses


if __name__ == "__main__":
    main()
