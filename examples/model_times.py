"""Times of one attention call, and of a whole decoder, at the sizes of a model.

`flexmoba bench` measures fixed sizes. This program measures yours: one call of `flex_moba`, forward
and with backward, and forward and backward of a decoder of transformers whose layers are compiled
one by one. The decoder is a Llama with random weights and without the head. "full" is `topk=None`;
"cudnn" and "flash" are backends of `scaled_dot_product_attention`. Names of MoBA are those of
retrieval.py, for example "64x16+sink+sub8" for 16 blocks of 64 keys, one of them a sink block, with
sub-blocks of 8. Calls of up to 13 ms queue one after another.

toy size, half a minute on a CPU:
  python examples/model_times.py

full size, the sizes of SmolLM2-135M, four minutes on one GPU:
  python examples/model_times.py --heads 9 --kv-heads 3 --head-dim 64 --layers 30 --hidden 576 \\
      --intermediate 1536 --attention full cudnn 64x16+sink 64x16+sink+sub8 32x32+sink+sub4 \\
      --lengths 8192 32768 --decoder-lengths 32768 --json times.json
"""

import argparse
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from retrieval import NAME, options_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaModel

from flexmoba import flex_moba
from flexmoba.integrations.transformers import convert
from flexmoba.reporting import (
    add_device,
    median_ms,
    parse_writable,
    positive,
    table,
    versions,
)

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def call_of(attention: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A causal call of queries, keys and values."""
    if attention not in BACKENDS:
        return functools.partial(flex_moba, **options_of(attention))

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(BACKENDS[attention]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return dense


def time_call(attention: str, length: int, o: argparse.Namespace) -> list[float]:
    """Milliseconds of one call: forward, and with backward."""
    device = torch.device(o.device)
    heads = {"q": o.heads, "k": o.kv_heads, "v": o.kv_heads, "grad": o.heads}
    made = {
        name: torch.randn(1, n, length, o.head_dim, device=device, dtype=dtype_of(o))
        for name, n in heads.items()
    }
    grad, inputs = made.pop("grad"), [*made.values()]
    call = call_of(attention)
    with torch.no_grad():
        forward = median_ms(lambda: call(*inputs), device)
    inputs = [x.requires_grad_() for x in inputs]
    both = median_ms(lambda: torch.autograd.grad(call(*inputs), inputs, grad), device)
    return [round(forward, 4), round(both, 4)]


def time_decoder(attention: str, length: int, o: argparse.Namespace) -> float:
    """Milliseconds of forward and backward of the decoder."""
    device = torch.device(o.device)
    config = LlamaConfig(
        hidden_size=o.hidden,
        intermediate_size=o.intermediate,
        num_hidden_layers=o.layers,
        num_attention_heads=o.heads,
        num_key_value_heads=o.kv_heads,
        head_dim=o.head_dim,
        max_position_embeddings=length,
        vocab_size=o.vocabulary,
    )
    config._attn_implementation = "sdpa"
    model = LlamaModel(config).to(device, dtype_of(o))
    if attention not in BACKENDS:
        convert(model, **options_of(attention))
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = o.layers + 8  # a converted layer knows its index
    for layer in model.layers:
        layer.compile(dynamic=False)
    tokens = torch.randint(o.vocabulary, (1, length), device=device)

    def step() -> None:
        with sdpa_kernel(BACKENDS.get(attention, [*BACKENDS.values(), SDPBackend.MATH])):
            out = model(input_ids=tokens, use_cache=False).last_hidden_state
            out.sum().backward()
        model.zero_grad(set_to_none=True)

    return round(median_ms(step, device), 4)


def dtype_of(o: argparse.Namespace) -> torch.dtype:
    return torch.bfloat16 if o.device.startswith("cuda") else torch.float32


def main(argv: list[str] | None = None) -> dict[str, Any]:
    o = parse(argv)
    report: dict[str, Any] = {
        "options": {x: y for x, y in vars(o).items() if x != "json"},
        "device": torch.cuda.get_device_name() if o.device.startswith("cuda") else "cpu",
        "versions": versions() | {"transformers": transformers.__version__},
        "ms": {},
    }
    measures: dict[str, Callable[[str, int, argparse.Namespace], list[float] | float]]
    measures = {"call": time_call, "decoder": time_decoder}
    jobs = [("call", x) for x in o.lengths] + [("decoder", x) for x in o.decoder_lengths]
    for kind, length in jobs:
        for attention in o.attention:
            report["ms"][f"{kind} {length} {attention}"] = measures[kind](attention, length, o)
            if o.json:
                Path(o.json).write_text(json.dumps(report) + "\n")
    rows = [
        [attention, *(cell(report["ms"][f"{kind} {x} {attention}"]) for kind, x in jobs)]
        for attention in o.attention
    ]
    heads = [f"{kind}, {x:,}" for kind, x in jobs]
    print("Milliseconds: forward / with backward of a call; with backward of a decoder\n")
    print(table(["attention", *heads], rows))
    return report


def cell(ms: list[float] | float) -> str:
    return " / ".join(f"{x:.2f}" for x in ms) if isinstance(ms, list) else f"{ms:.1f}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    sizes = {"heads": 4, "kv-heads": 2, "head-dim": 16, "layers": 2, "hidden": 64}
    for name, size in (sizes | {"intermediate": 128, "vocabulary": 49152}).items():
        add(f"--{name}", type=positive, default=size, help="of the model (%(default)s)")
    add("--attention", nargs="+", default=["full", "16x4+sink", "16x4+sink+sub4"], metavar="NAME",
        help="full, cudnn, flash, or for example 64x16+sink+sub8 (%(default)s)")  # fmt: skip
    add("--lengths", type=positive, nargs="+", default=[512], help="of calls (%(default)s)")
    add("--decoder-lengths", type=positive, nargs="*", default=[512], help="(%(default)s)")
    add("--json", metavar="FILE", help="write the times there")
    add_device(parser)
    o = parser.parse_args(argv)
    of_moba = [x for x in o.attention if x not in ("full", *BACKENDS)]
    if wrong := [x for x in of_moba if not re.fullmatch(NAME, x) or x.endswith("+full-decode")]:
        parser.error(f"--attention {', '.join(wrong)}: say full, cudnn, flash, or for example "
                     "64x16, 64x16+sink or 64x16+sink+sub8")  # fmt: skip
    if o.heads % o.kv_heads:
        parser.error(f"--kv-heads {o.kv_heads} must divide --heads {o.heads}")
    parse_writable(parser, json=o.json)
    return o


if __name__ == "__main__":
    main()
