"""Convert a Hugging Face model to MoBA and fine-tune it, so that it gets used to its blocks.

A model that was trained with full attention computes something else once it attends to a few
blocks. This measures how much is lost at once, and how much of it comes back:

                           perplexity    full attention    MoBA
  before fine-tuning                     the model as is   converted, untrained
  after fine-tuning with MoBA            still serves      what you are after

Conversion is one line, `convert(model, block_size, topk)`; no weight changes its name or its value.
The fine-tuned model is saved, loaded again, and compared with itself.

Without --model it makes a tiny Llama with random weights and trains it with full attention on the
text first, for --pretrain-steps. Nothing is downloaded.

toy size, two minutes on a CPU:
  python examples/finetune_transformers.py

full size, one GPU, a model in a folder of yours (its last 3 layers stay full, arXiv 2502.13189,
Sec. 3.3):
  python examples/finetune_transformers.py --model ./llama-1b --text corpus/ --length 16384 \\
      --block-size 512 --topk 8 --full-layers 3 --batch 1 --steps 1000 --lr 2e-5 --save ./llama-moba
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path

import torch
from pretrained import load, tokenizer_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from flexmoba.commands.demo import standard_library
from flexmoba.hybrid import set_attention
from flexmoba.integrations.transformers import convert, register
from flexmoba.reporting import add_device, positive, progress, table


def tiny_llama() -> PreTrainedModel:
    """Random weights, and bytes for tokens."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config)


def tokens_of(o: argparse.Namespace, vocabulary: int) -> tuple[Tensor, Tensor]:
    """The text as tokens to train on, and the last tenth, to measure on."""
    if o.text:
        paths = [Path(x) for x in o.text]
        files = [y for x in paths for y in (sorted(x.rglob("*")) if x.is_dir() else [x])]
        text = b"\n".join(x.read_bytes() for x in files if x.is_file())
    else:
        text = bytes(standard_library()[: o.max_bytes].tolist())
    text = text[: o.max_bytes]
    if vocabulary == 256:
        tokens = torch.frombuffer(bytearray(text or b" "), dtype=torch.uint8).long()
    else:
        tokens = tokenizer_of(o.model)(
            text.decode(errors="replace"), return_tensors="pt"
        ).input_ids[0]
    cut = len(tokens) * 9 // 10
    if len(tokens) - cut < o.length:
        sys.exit(
            f"the text has {len(tokens):,} tokens; --length {o.length} needs {10 * o.length:,}"
        )
    return tokens[:cut], tokens[cut:]


def loss_of(model: PreTrainedModel, batch: Tensor, o: argparse.Namespace) -> Tensor:
    """Mean loss of predicting each token of ``(B, L)`` from those before it."""
    with torch.autocast("cuda", torch.bfloat16, enabled=o.device.startswith("cuda")):
        return model(input_ids=batch, labels=batch, use_cache=False).loss


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokens: Tensor, o: argparse.Namespace) -> float:
    starts = torch.linspace(0, len(tokens) - o.length, o.windows).long().tolist()
    rows = [tokens[start : start + o.length][None].to(o.device) for start in starts]
    model.eval()
    return math.exp(sum(loss_of(model, row, o).item() for row in rows) / len(rows))


def train(
    model: PreTrainedModel, tokens: Tensor, steps: int, lr: float, o: argparse.Namespace, name: str
) -> None:
    """A plain loop; transformers.Trainer needs nothing special either."""
    generator = torch.Generator().manual_seed(o.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in progress(range(steps), name):
        starts = torch.randint(len(tokens) - o.length + 1, (o.batch, 1), generator=generator)
        batch = tokens[starts + torch.arange(o.length)].to(o.device)
        loss_of(model, batch, o).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def main(argv: list[str] | None = None) -> dict[str, float]:
    o = parse(argv)
    torch.manual_seed(o.seed)
    model = (load(o.model, dtype=torch.float32) if o.model else tiny_llama()).to(o.device)
    seen, unseen = tokens_of(o, model.config.vocab_size)
    layers = model.config.num_hidden_layers
    if not 0 <= o.full_layers <= layers:
        sys.exit(f"--full-layers {o.full_layers} must lie from 0 to the model's {layers} layers")
    print(f"{type(model).__name__}, {model.num_parameters():,} parameters, {len(seen):,} tokens")
    if not o.model:
        print(f"a tiny model learns with full attention for {o.pretrain_steps} steps")
        train(model, seen, o.pretrain_steps, o.pretrain_lr, o, "full attention")
    elif o.device.startswith("cuda"):
        model.gradient_checkpointing_enable()

    found = {"dense": perplexity(model, unseen, o)}

    # The one line. A list of topks, one for each layer, keeps the last ones full. One of the topk
    # blocks is the first one, the sink block.
    topk = [o.topk] * (layers - o.full_layers) + [None] * o.full_layers
    convert(model, o.block_size, topk)

    found["converted"] = perplexity(model, unseen, o)
    print(f"converted: {layers - o.full_layers} of {layers} layers attend to {o.topk} blocks of "
          f"{o.block_size} in contexts of {o.length}")  # fmt: skip
    train(model, seen, o.steps, o.lr, o, "MoBA")
    found["finetuned"] = perplexity(model, unseen, o)

    with tempfile.TemporaryDirectory() as scratch:
        folder = o.save or scratch
        model.save_pretrained(folder)
        if o.model and model.config.vocab_size != 256:
            tokenizer_of(o.model).save_pretrained(folder)
        # The settings are in the config. The name of the attention is not saved, so it is given.
        register()
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="flexmoba", dtype=torch.float32
        ).to(o.device)
        found["loaded"] = perplexity(loaded, unseen, o)

    set_attention(model, topk=None)  # the same weights, with full attention
    found["finetuned, dense"] = perplexity(model, unseen, o)

    rows = [
        ["before fine-tuning", f"{found['dense']:.3f}", f"{found['converted']:.3f}"],
        ["after", f"{found['finetuned, dense']:.3f}", f"{found['finetuned']:.3f}"],
    ]
    print(f"\nPerplexity on unseen text\n\n{table(['', 'full attention', 'MoBA'], rows)}\n")
    print(f"saved and loaded again: {found['loaded']:.3f}" + f", in {o.save}" * bool(o.save))
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", metavar="FOLDER", help="a model of transformers on this disk")
    add("--text", nargs="+", metavar="PATH", help="files or folders; default: the sources of "
        "Python's standard library")  # fmt: skip
    add("--save", metavar="FOLDER", help="where the result goes; thrown away by default")
    add("--block-size", type=positive, default=16, help="keys in a block (%(default)s)")
    add("--topk", type=positive, default=3, help="blocks of each query (%(default)s)")
    add("--full-layers", type=int, default=0, help="last layers left full (%(default)s)")
    add("--length", type=positive, default=512, help="tokens of context (%(default)s)")
    add("--batch", type=positive, default=4, help="(%(default)s)")
    add("--steps", type=positive, default=100, help="of fine-tuning (%(default)s)")
    add("--lr", type=float, default=5e-4, help="of fine-tuning (%(default)s)")
    add("--pretrain-steps", type=positive, default=300, help="without --model (%(default)s)")
    add("--pretrain-lr", type=float, default=3e-3, help="without --model (%(default)s)")
    add("--windows", type=positive, default=32, help="contexts to measure on (%(default)s)")
    add("--max-bytes", type=positive, default=50_000_000, help="of the text (%(default)s)")
    add("--seed", type=int, default=0)
    add_device(parser)
    o = parser.parse_args(argv)
    if o.topk < 2:
        parser.error("--topk must be at least 2, for the own block and convert's sink block")
    if missing := [x for x in o.text or [] if not Path(x).exists()]:
        parser.error(f"there is no {', '.join(missing)}")
    if o.model and not Path(o.model).is_dir():
        parser.error(f"--model {o.model}: there is no such folder; nothing is downloaded")
    if o.save:
        try:
            Path(o.save).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--save {o.save}: no such folder can be made ({error.strerror})")
    return o


if __name__ == "__main__":
    main()
