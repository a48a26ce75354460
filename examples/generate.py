"""Compares generation from a long prompt with a sparse cache and with dense caches.

A decoding step of full attention reads every key and value of the context. A decoding step of MoBA
needs only the mean key of each block and the topk selected blocks, if a cache keeps the mean keys.
FlexMobaCache keeps them. The example generates from the same prompt in three ways:

  dense             full attention, with the cache of transformers
  MoBA              the converted model, with the cache of transformers: correct, but every step
                    recomputes the mean keys of all blocks
  MoBA, sparse      the converted model with a FlexMobaCache: the same tokens, fewer reads

It prints the time to the first token (prefill), the median time of a step, tokens per second, and
the number of keys that a step reads for each head. MoBA and full attention generate different
tokens unless the model was trained with MoBA. The two ways of MoBA must generate the same tokens.

Without --model, the example makes a small Llama with random weights. Its text is meaningless; its
times are not. Nothing is downloaded.

toy size, half a minute on a CPU:
  python examples/generate.py

full size, one GPU; steps are compiled and captured in CUDA graphs:
  python examples/generate.py --model ./llama-moba --prompt book.txt --prompt-tokens 100000 \\
      --block-size 512 --topk 8 --new-tokens 256
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    PreTrainedModel,
    StaticCache,
)

from flexmoba.commands.demo import standard_library
from flexmoba.integrations.transformers import FlexMobaCache, convert
from flexmoba.reporting import add_device, positive, table


class Clock:
    """A streamer for ``generate`` that records when each token arrives on the host."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def put(self, tokens: Tensor) -> None:
        if tokens.ndim == 1:  # the prompt comes first and has two dimensions
            self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def small_llama(o: argparse.Namespace) -> PreTrainedModel:
    """Makes a Llama with random weights and a token for each byte."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=o.prompt_tokens + o.new_tokens,
    )
    return AutoModelForCausalLM.from_config(config)


def load(o: argparse.Namespace) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(
            o.model, local_files_only=True, dtype="auto", attn_implementation="sdpa"
        )
    except (OSError, ValueError) as error:
        sys.exit(f"--model {o.model}: transformers cannot load it: {str(error).splitlines()[0]}")


def prompt_of(o: argparse.Namespace, vocabulary: int) -> Tensor:
    """Returns token ids ``(1, --prompt-tokens)``, int64."""
    text = o.prompt.read_bytes() if o.prompt else bytes(standard_library()[: 8 * o.prompt_tokens])
    if vocabulary == 256:
        ids = torch.frombuffer(bytearray(text or b" "), dtype=torch.uint8).long()[None]
    else:
        tokenizer = AutoTokenizer.from_pretrained(o.model, local_files_only=True)
        ids = tokenizer(text.decode(errors="replace"), return_tensors="pt").input_ids
    if ids.shape[1] < o.prompt_tokens:
        sys.exit(f"the prompt has {ids.shape[1]:,} tokens, fewer than --prompt-tokens")
    return ids[:, : o.prompt_tokens].to(o.device)


def timed(
    model: PreTrainedModel, ids: Tensor, make_cache: Callable[[], Any], o: argparse.Namespace
) -> tuple[Tensor, float, float]:
    """Returns new tokens ``(n,)``, seconds to the first token, and median seconds of a step."""
    cache = make_cache()
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if ids.is_cuda:  # compiles, captures and warms up with the storage of the timed run
        model.generate(ids, past_key_values=cache, max_new_tokens=8, **options)
        cache = make_cache() if isinstance(cache, DynamicCache) else (cache.reset(), cache)[1]
    clock = Clock()
    tokens = model.generate(
        ids, past_key_values=cache, max_new_tokens=o.new_tokens, streamer=clock, **options
    )
    times = torch.tensor(clock.times, dtype=torch.float64).diff()
    return tokens[0, ids.shape[1] :], times[0].item(), times[1:].median().item()


def keys_read(o: argparse.Namespace, *, moba: bool, kept_means: bool = True) -> float:
    """Returns the keys and mean keys that a head reads in a step, averaged over the steps."""
    total = 0
    for length in range(o.prompt_tokens + 1, o.prompt_tokens + o.new_tokens):
        own = (length - 1) % o.block_size + 1
        full_blocks = (length - own) // o.block_size
        selected = own + min(o.topk - 1, full_blocks) * o.block_size
        if not moba:
            total += length
        else:  # without kept mean keys, a step reads all keys to compute them
            total += selected + (full_blocks if kept_means else length)
    return total / (o.new_tokens - 1)


def main(argv: list[str] | None = None) -> dict[str, Tensor]:
    o = parse(argv)
    torch.manual_seed(o.seed)
    model = (load(o) if o.model else small_llama(o)).to(o.device).eval()
    if not o.model and o.device.startswith("cuda"):
        model.bfloat16()
    ids = prompt_of(o, model.config.vocab_size)
    room = o.prompt_tokens + o.new_tokens if o.static else None
    print(f"{model.num_parameters():,} parameters, {model.dtype}, {o.device}, prompt of "
          f"{ids.shape[1]:,} tokens, {o.new_tokens} new")  # fmt: skip

    def static() -> StaticCache:
        return StaticCache(config=model.config, max_cache_len=room)

    results = {"dense": timed(model, ids, static if o.static else DynamicCache, o)}
    convert(model, o.block_size, o.topk)
    results["MoBA"] = timed(model, ids, DynamicCache, o)
    results["MoBA, sparse"] = timed(model, ids, lambda: FlexMobaCache(room), o)

    reads = {
        "dense": keys_read(o, moba=False),
        "MoBA": keys_read(o, moba=True, kept_means=False),
        "MoBA, sparse": keys_read(o, moba=True),
    }
    rows = [
        [name, f"{first:.2f}", f"{1e3 * step:.2f}", f"{1 / step:,.0f}", f"{reads[name]:,.0f}"]
        for name, (_, first, step) in results.items()
    ]
    heads = ["", "prefill s", "step ms", "tokens/s", "keys read in a step"]
    print(f"\nblocks of {o.block_size}, topk {o.topk}\n\n{table(heads, rows)}\n")
    tokens = {name: new for name, (new, _, _) in results.items()}
    same = (tokens["MoBA"] == tokens["MoBA, sparse"]).sum().item()
    print(f"MoBA with both caches generated the same {same} of {o.new_tokens} tokens")
    return tokens


def parse(argv: list[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, metavar="FOLDER", help="a folder with a model of transformers")
    add("--prompt", type=Path, metavar="FILE", help="default: the sources of Python's standard "
        "library")  # fmt: skip
    add("--prompt-tokens", type=positive, default=16384, help="its first tokens (%(default)s)")
    add("--new-tokens", type=positive, default=32, help="tokens to generate (%(default)s)")
    add("--block-size", type=positive, default=128, help="keys in a block (%(default)s)")
    add("--topk", type=positive, default=8, help="blocks for each query (%(default)s)")
    add("--static", action=argparse.BooleanOptionalAction, default=on_gpu, help="caches with "
        "fixed storage, for compiled steps (default: on a GPU)")  # fmt: skip
    add("--seed", type=int, default=0)
    add_device(parser)
    o = parser.parse_args(argv)
    if o.topk < 2:
        parser.error("--topk must be at least 2, for the own block and convert's sink block")
    if o.model and not o.model.is_dir():
        parser.error(f"--model {o.model}: there is no such folder; nothing is downloaded")
    if o.prompt and not o.prompt.is_file():
        parser.error(f"--prompt {o.prompt}: there is no such file")
    if o.new_tokens < 2:
        parser.error("--new-tokens must be at least 2: the prefill makes the first token")
    return o


if __name__ == "__main__":
    main()
