"""How long a decoding step against a cache takes on a GPU, beside dense attention.

Times are medians of replayed CUDA graphs, of the whole step: the new keys and values written down,
the gate, the attention. Dense is `scaled_dot_product_attention` over all keys, by the faster of
FlashAttention-2 and cuDNN, without writing anything down.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flexmoba import MobaCache, flex_moba, moba_reference

HEADS, KV_HEADS, DIM = 32, 8, 128


def milliseconds(step: Callable[[], Tensor]) -> float:
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times = []
    for _ in range(55):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[5:])


def measure(batch: int, length: int, block_size: int, topk: int) -> dict[str, float]:
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    q = torch.randn(batch, HEADS, 1, DIM, **options)
    k, v = torch.randn(2, batch, KV_HEADS, length, DIM, **options)
    cache = MobaCache(batch, KV_HEADS, DIM, block_size=block_size, max_len=length, **options)
    cache.append(k[:, :, :-200], v[:, :, :-200])
    new = [x[:, :, -200:-199] for x in (k, v)]
    out = flex_moba(q, *new, block_size, topk, cache=cache)
    some = [x[:1, : HEADS // KV_HEADS] for x in (q, out)]  # the query heads of one KV head
    exact = moba_reference(
        some[0].double(), *(x[:1, :1, :-199].double() for x in (k, v)), block_size, topk
    )
    error = (some[1] - exact).abs().max().item()

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    result = {"error": error, "largest": exact.abs().max().item()}
    result["flex_moba"] = milliseconds(lambda: flex_moba(q, *new, block_size, topk, cache=cache))
    for name, backend in (
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("cuDNN", SDPBackend.CUDNN_ATTENTION),
    ):
        with sdpa_kernel(backend):
            result[name] = milliseconds(dense)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results, too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this needs a CUDA device")
    report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "results": []}
    print("| batch x context | flex_moba ms | SDPA flash | SDPA cuDNN | times faster |")
    print("| --- | --- | --- | --- | --- |")
    for batch, length in ((1, 2**20), (8, 2**17), (1, 2**17), (1, 2**15)):
        with torch.no_grad():
            times = measure(batch, length, arguments.block_size, arguments.topk)
        if times["error"] > 0.02 * times["largest"]:
            sys.exit(f"wrong at {batch} x {length}: error {times['error']}")
        ours, flash, cudnn = times["flex_moba"], times["flash"], times["cuDNN"]
        print(
            f"| {batch} x {length // 1024}K | {ours:.3f} | {flash:.3f} | {cudnn:.3f} | "
            f"{min(flash, cudnn) / ours:.1f} |"
        )
        report["results"].append({"batch": batch, "length": length} | times)
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
