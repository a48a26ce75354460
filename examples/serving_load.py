"""Measures a server under load: many requests at once, with MoBA and with full attention.

The program makes a random model of Llama's architecture, and passes the same prompts, all at once,
to `generate_batch`, the continuous batching of transformers. Prompts have lengths from --shortest
to --longest, in geometric progression and random order. --attention names what to measure:

  moba   the model converted with --block-size and --topk
  dense  the model converted with topk=None: full attention over the same pages
  sdpa   the model without flexmoba. transformers then builds a mask of the tokens of a batch by
         all tokens in the cache, so its requests must be few or short.

Each attention serves the prompts twice: once with few new tokens, which compiles kernels, and once
measured. Before that, the program compares the new tokens of two prompts with a pass over each
prompt and its new tokens.

toy size, a minute on a CPU:
  python examples/serving_load.py

full size, one GPU of 80 GB, the shape of Llama 3.2 1B:
  python examples/serving_load.py --layers 16 --width 2048 --heads 32 --kv-heads 8 \\
      --vocabulary 128256 --requests 64 --shortest 1024 --longest 131072 --new-tokens 256 \\
      --block-size 128 --topk 8 --batch-tokens 16384 --json load.json

sizes that sdpa can serve, one GPU:
  python examples/serving_load.py --layers 16 --width 2048 --heads 32 --kv-heads 8 \\
      --vocabulary 128256 --requests 16 --shortest 1024 --longest 16384 --new-tokens 128 \\
      --block-size 128 --topk 8 --batch-tokens 8192 --attention moba dense sdpa --json small.json
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
)

from flexmoba.bench import describe
from flexmoba.integrations.transformers import convert
from flexmoba.reporting import UsageError, add_device, add_json, positive, table, write_json

ATTENTIONS = ("moba", "dense", "sdpa")
HEADINGS = ("attention", "tokens/s", "first token, median", "90 %", "last", "decoding", "all")
ALLOWED_GAP = 0.3  # standard deviations of the logits, see `mean_gap`
WARM_TOKENS = 4  # of each request in the pass that compiles


def model_of(o: argparse.Namespace, attention: str) -> Any:
    """Returns a random model with an attention; its weights do not depend on the attention."""
    config = LlamaConfig(
        vocab_size=o.vocabulary,
        hidden_size=o.width,
        intermediate_size=4 * o.width,
        num_hidden_layers=o.layers,
        num_attention_heads=o.heads,
        num_key_value_heads=o.kv_heads,
        max_position_embeddings=o.longest + o.new_tokens,
        tie_word_embeddings=True,
        # 0.02 for a width of 2048. Larger weights attend to few keys, and the layers then amplify a
        # single rounding of bfloat16 until the tokens of two exact computations differ.
        initializer_range=0.9 * o.width**-0.5,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    dtype = torch.bfloat16 if "cuda" in o.device else torch.float32
    torch.manual_seed(0)
    with torch.device(o.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.eval()
    if attention != "sdpa":
        convert(model, o.block_size, o.topk if attention == "moba" else None, sink_blocks=0)
    return model


def prompts_of(o: argparse.Namespace) -> list[list[int]]:
    """Returns random prompts, with lengths in geometric progression and random order."""
    generator = torch.Generator().manual_seed(0)
    ratio = o.longest / o.shortest
    lengths = [round(o.shortest * ratio ** (i / max(1, o.requests - 1))) for i in range(o.requests)]
    order = torch.randperm(o.requests, generator=generator).tolist()
    return [
        torch.randint(1, o.vocabulary, (lengths[i],), generator=generator).tolist() for i in order
    ]


def generate(
    o: argparse.Namespace, model: Any, prompts: list[list[int]], new_tokens: int
) -> list[Any]:
    """Returns the outputs of the requests, with the times of their tokens."""
    page = 256 if model.config._attn_implementation == "sdpa" else o.block_size
    batching = ContinuousBatchingConfig(
        page_size=page,
        num_blocks=sum(-(-(len(x) + new_tokens) // page) for x in prompts) + 8,
        max_batch_tokens=min(o.batch_tokens, sum(map(len, prompts))),
        max_requests_per_batch=o.requests,
        allow_block_sharing=False,
        safety_margin=0.0,  # all requests fit in the cache
    )
    # No token ends an answer, since no token has this index.
    greedy = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=o.vocabulary, pad_token_id=0
    )
    outputs = model.generate_batch(
        prompts,
        generation_config=greedy,
        continuous_batching_config=batching,
        record_timestamps=True,
    )
    outputs = list(outputs.values())
    errors = [x.error for x in outputs if x.error]
    if errors or len(outputs) < len(prompts):
        raise RuntimeError(f"{len(prompts) - len(outputs)} requests are missing; errors: {errors}")
    return outputs


@torch.no_grad()
def mean_gap(o: argparse.Namespace, model: Any, prompts: list[list[int]]) -> float:
    """Compares new tokens with a pass over the prompt and the new tokens.

    Returns:
        The mean difference between the best logit and the logit of the new token, in standard
        deviations of the logits. It is 0 for equal tokens. With 16 layers of width 256, it was
        0.003 in bfloat16, where logits round differently, and more than 2 for a wrong selection.
    """
    gaps = []
    for prompt, output in zip(prompts, generate(o, model, prompts, o.new_tokens), strict=True):
        new = output.generated_tokens
        tokens = torch.tensor([prompt + new[:-1]], device=model.device)
        logits = model(tokens, use_cache=False, logits_to_keep=len(new)).logits[0].float()
        best = logits.max(-1).values
        chosen = logits.gather(-1, torch.tensor(new, device=model.device)[:, None])[:, 0]
        gaps.append(float(((best - chosen) / logits.std(-1)).mean()))
    return statistics.mean(gaps)


def measure(o: argparse.Namespace, attention: str) -> dict[str, Any]:
    """Returns rates in tokens per second, times in seconds, and memory in GiB."""
    model, prompts = model_of(o, attention), prompts_of(o)
    by_length = sorted(prompts, key=len)
    sparse = [x for x in by_length if len(x) > 2 * o.topk * o.block_size]
    gap = mean_gap(o, model, [by_length[0], (sparse or by_length[-1:])[0]])
    if gap > ALLOWED_GAP:
        raise RuntimeError(f"new tokens of {attention} are wrong by {gap:.2f} deviations of logits")
    generate(o, model, prompts, WARM_TOKENS)
    if "cuda" in o.device:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    outputs = generate(o, model, prompts, o.new_tokens)
    begin = min(x.created_time for x in outputs)
    end = max(x.timestamps[-1] for x in outputs)
    first = sorted(x.timestamps[0] - begin for x in outputs)
    # From the last first token to the first last token, all requests decode. An evicted request
    # begins again, and keeps only the times after that.
    decoding = begin + first[-1], min(x.timestamps[-1] for x in outputs)
    steps = sorted(t for x in outputs for t in x.timestamps if decoding[0] < t <= decoding[1])
    rate = len(steps) / (steps[-1] - decoding[0]) if steps else None
    result = {
        "attention": model.config._attn_implementation,
        "mean_gap": gap,
        "seconds": end - begin,
        "tokens_per_second": sum(len(x) + o.new_tokens for x in prompts) / (end - begin),
        "first_token": {
            "median": statistics.median(first),
            "90 %": first[int(0.9 * (len(first) - 1))],
            "last": first[-1],
        },
        "decoding_tokens_per_second": rate,
        "evicted": sum(len(x.timestamps) < o.new_tokens for x in outputs),
    }
    if "cuda" in o.device:
        result["peak_GiB"] = torch.cuda.max_memory_allocated() / 2**30
        del model
        torch.cuda.empty_cache()
    return result


def table_of(report: dict[str, Any]) -> str:
    """Formats a report as a Markdown table."""
    rows = []
    for name, x in report["results"].items():
        rate, first = x["decoding_tokens_per_second"], x["first_token"]
        cells = [name, f"{x['tokens_per_second']:,.0f}"]
        cells += [f"{first[key]:.2f} s" for key in ("median", "90 %", "last")]
        cells += ["" if rate is None else f"{rate:,.0f} tokens/s", f"{x['seconds']:.1f} s"]
        rows.append(cells)
    used = [i for i in range(len(HEADINGS)) if any(row[i] for row in rows)]
    return table([HEADINGS[i] for i in used], [[row[i] for i in used] for row in rows])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    sizes = {
        "layers": (2, "layers of the model"),
        "width": (64, "width of the model"),
        "heads": (4, "query heads"),
        "kv-heads": (2, "KV heads"),
        "vocabulary": (1000, "tokens of the vocabulary"),
        "requests": (6, "requests"),
        "shortest": (64, "tokens of the shortest prompt"),
        "longest": (1024, "tokens of the longest prompt"),
        "new-tokens": (16, "new tokens of a request"),
        "block-size": (64, "keys in a block"),
        "topk": (4, "blocks that a query attends to"),
        "batch-tokens": (512, "tokens of a batch, at most"),
    }
    for name, (default, text) in sizes.items():
        add(f"--{name}", type=positive, default=default, metavar="N", help=f"{text} (%(default)s)")
    chosen = ["moba", "dense"]
    add("--attention", nargs="+", choices=ATTENTIONS, default=chosen, help="moba dense by default")
    add("--show", type=Path, metavar="FILE", help="print the table of an earlier --json")
    add_json(parser)
    add_device(parser)
    o = parser.parse_args(argv)
    if o.show:
        report: dict[str, Any] = json.loads(o.show.read_text())
        print(table_of(report))
        return report
    options = {name: getattr(o, name.replace("-", "_")) for name in sizes}
    report = describe(torch.device(o.device)) | {"transformers": transformers.__version__}
    report |= {"options": options, "results": {}}
    for attention in o.attention:
        report["results"][attention] = measure(o, attention)
        print(f"{attention}: {report['results'][attention]}", file=sys.stderr)
        if o.json not in (None, "-"):  # after every result, in case the next one fails
            write_json(report, o.json)
    if write_json(report, o.json):
        print(f"\n{table_of(report)}")
    return report


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        sys.exit(str(error))
