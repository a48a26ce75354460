"""What ``flexmoba bench`` measures: configurations, what they cost, and their presets."""

import functools
import random
from dataclasses import dataclass

from flexmoba.checks import GateName


@dataclass(frozen=True)
class Config:
    """One row of a table: causal self-attention of random normal inputs, or a decoding step."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    block_size: int
    topk: int
    head_dim: int = 128
    backward: bool = True
    dense: str = "all"  # what it is compared with: all, SDPA (without FlexAttention) or nothing
    gate: GateName = "token"
    documents: int = 1  # packed in each row
    longest_known: bool = False  # whether the call is told how long the longest document is
    decode: bool = False  # one token for each row of the batch against so many before

    def __str__(self) -> str:
        """The first cell of its row."""
        text = (
            f"{self.batch} x {self.heads}/{self.kv_heads} x {size(self.length)}, "
            f"{self.block_size}, {self.topk}"
        )
        text += "" if self.gate == "token" else f", by {self.gate}"
        text += "" if self.documents == 1 else f", {self.documents} documents"
        return text + (", longest known" if self.longest_known else "")

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the documents of a row, which differ; their sum is the length."""
        return _document_lengths(self.length, self.documents)

    @property
    def dense_pairs(self) -> int:
        """Pairs of a query and a key that causal attention multiplies, of one head."""
        return sum(n * (n + 1) // 2 for n in self.lengths)

    @property
    def pairs(self) -> int:
        """Those that MoBA multiplies: the own block up to the query, and whole past ones."""
        return sum(map(self._pairs_of, self.lengths))

    def _pairs_of(self, length: int) -> int:
        blocks, rest = divmod(length, self.block_size)
        sizes = [self.block_size] * blocks + [rest]
        own = sum(size * (size + 1) // 2 for size in sizes)
        return own + sum(
            size * min(self.topk - 1, block) * self.block_size for block, size in enumerate(sizes)
        )

    def flop(self, *, backward: bool) -> int:
        """Floating point operations of its matrix products; the backward pass has 5 for 2."""
        products = 7 if backward else 2
        return 2 * products * self.batch * self.heads * self.pairs * self.head_dim


def size(length: int) -> str:
    """A number of tokens, in K or M where it is whole."""
    for unit, tokens in (("M", 2**20), ("K", 2**10)):
        if length % tokens == 0:
            return f"{length // tokens}{unit}"
    return str(length)


@functools.cache
def _document_lengths(length: int, documents: int) -> tuple[int, ...]:
    edges = sorted(random.Random(0).sample(range(1, length), documents - 1))
    return tuple(b - a for a, b in zip([0, *edges], [*edges, length], strict=True))


PRESETS = {
    "cpu": [Config(1, 4, 4, n * 1024, 512, 3, head_dim=64) for n in (4, 8, 16)],
    "quick": [Config(1, 16, 16, 8192, 128, 8), Config(1, 16, 16, 32768, 512, 3)],
    "flashmoba": [
        Config(1, 16, 16, 8192, 128, 8),
        Config(1, 16, 16, 16384, 512, 3),
        Config(1, 32, 8, 32768, 512, 3),
        Config(1, 16, 16, 65536, 512, 3),
        Config(1, 16, 16, 65536, 128, 8),
        Config(1, 16, 16, 131072, 128, 8, dense="SDPA"),
    ],
    "paper": [
        Config(1, 4, 1, 2**17, 4096, 12, dense="SDPA"),
        Config(1, 4, 1, 2**20, 4096, 12, dense="SDPA"),
    ],
    "longest": [
        Config(1, 4, 1, 2**20, 1024, 12, backward=False, dense="SDPA"),
        Config(1, 4, 1, 2**20, 16384, 3, backward=False, dense="SDPA"),
        Config(1, 1, 1, 10 * 2**20, 163840, 3, backward=False, dense="nothing"),
    ],
    "gates": [
        Config(1, heads, kv_heads, 65536, block_size, topk, dense="SDPA", gate=gate)
        for heads, kv_heads, block_size, topk in ((16, 16, 128, 8), (32, 8, 512, 3))
        for gate in (("token", "tile") if heads == kv_heads else ("token", "group", "tile"))
    ],
    "documents": [
        *(Config(1, 16, 16, 65536, 512, 3, documents=n) for n in (1, 16, 128, 1024)),
        Config(1, 16, 16, 65536, 512, 3, documents=1024, longest_known=True),
    ],
    "decode": [
        Config(batch, 32, 8, length, 512, 8, backward=False, decode=True, gate=gate)
        for batch, length in ((1, 2**20), (8, 2**17), (1, 2**17), (1, 2**15))
        for gate in ("token", "group")
    ],
}  # fmt: skip
