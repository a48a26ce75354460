"""The configurations of ``flexmoba bench``, their operation counts, and the presets."""

import functools
import random
from dataclasses import dataclass

from flexmoba.checks import GateName
from flexmoba.nsa import seen_pairs

# The default sizes of `flex_nsa`.
CMP_BLOCK, CMP_STRIDE, WINDOW = 32, 16, 512

# The names of dense baselines, in results.
DENSE = (
    *("SDPA", "SDPA flash", "SDPA cuDNN", "SDPA FA3", "SDPA FA4", "FlexAttention", "topk=None"),
    *("varlen flash", "one sequence"),
)

# The quantities with targets, and whether a target is the least or the most that reaches it.
TARGETS = {
    "times cuDNN": "least",  # the time of SDPA cuDNN divided by the time of flexmoba
    "times the fastest": "least",  # of the dense baselines
    "time of head dim 128": "most",  # divided by the time of the same call with head dim 128
    "share of the gate": "most",  # of the time
    "milliseconds": "most",
}


@dataclass(frozen=True)
class Config:
    """A configuration: causal self-attention of normal inputs, a decoding step or a training step.

    Attributes:
        batch: Rows of the batch.
        heads: Query heads.
        kv_heads: KV heads.
        length: Tokens of a row; in a decoding step, tokens of the context.
        block_size: Keys in a block.
        topk: Blocks that a query attends to, including its own block; None for full attention.
        head_dim: Head dim of queries and keys.
        value_dim: Head dim of values; None for ``head_dim``.
        backward: Whether to also time the backward pass.
        dense: Baselines: ``"all"``; ``"routed"``, without FlexAttention over all keys; ``"SDPA"``,
            also without other backends; ``"SDPA cuDNN"``, without FlashAttention; or ``"nothing"``.
        gate: The gate.
        documents: Documents packed in each row.
        longest_known: Whether the call gets ``max_seqlen``.
        decode: Whether to measure a step of one token for each row against a cache.
        correlated: Whether neighbouring queries select similar blocks, as in a language model.
        layers: Layers of a language model whose training step to measure; 0 for a call of
            `flex_moba`.
        nsa: Whether to measure `flex_nsa`, at its default sizes but for ``block_size`` and
            ``topk``, instead of `flex_moba`.
        paged: Whether to measure a batch of decoding steps over the pages of a server.
        chunk: New tokens of another sequence in that batch.
        target: The quantity with targets, one of `TARGETS`; empty for none.
        forward_target: The target of the forward pass; 0 for none.
        both_target: The target of forward and backward together; 0 for none.
    """

    batch: int
    heads: int
    kv_heads: int
    length: int
    block_size: int
    topk: int | None
    head_dim: int = 128
    value_dim: int | None = None
    backward: bool = True
    dense: str = "all"
    gate: GateName = "token"
    documents: int = 1
    longest_known: bool = False
    decode: bool = False
    correlated: bool = False
    layers: int = 0
    nsa: bool = False
    paged: bool = False
    chunk: int = 0
    target: str = ""
    forward_target: float = 0
    both_target: float = 0

    def __str__(self) -> str:
        """Returns the first cell of its table row."""
        text = (
            f"{self.batch} x {self.heads}/{self.kv_heads} x {size(self.length)}, "
            f"{self.block_size}, {'all' if self.topk is None else self.topk}"
        )
        has_usual_dims = self.value_dim is None and self.head_dim <= 128
        text += "" if has_usual_dims else f", head dims {self.head_dim}/{self.values_dim}"
        text += ", correlated" if self.correlated else ""
        text += f", {self.layers} layers" if self.layers else ""
        text += f", chunk of {size(self.chunk)}" if self.chunk else ""
        text += "" if self.gate == "token" else f", by {self.gate}"
        text += "" if self.documents == 1 else f", {self.documents} documents"
        return text + (", longest known" if self.longest_known else "")

    @property
    def name(self) -> str:
        """The name of the measured function, in results."""
        return "flex_nsa" if self.nsa else "flex_moba"

    @property
    def values_dim(self) -> int:
        """The head dim of values and of the output."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def count(self) -> int:
        """The number of blocks that a query attends to, unless it attends to all."""
        assert self.topk is not None
        return self.topk

    @property
    def lengths(self) -> tuple[int, ...]:
        """The random lengths of the documents of a row, which add up to ``length``."""
        return _document_lengths(self.length, self.documents)

    @property
    def dense_pairs(self) -> int:
        """The query-key pairs of one head in full causal attention."""
        return sum(n * (n + 1) // 2 for n in self.lengths)

    @property
    def pairs(self) -> int:
        """The query-key pairs of one head: own blocks up to the query, and past blocks.

        In Native Sparse Attention, those of compressed keys and of windows, too.
        """
        return sum(map(self._pairs_of, self.lengths))

    def _pairs_of(self, length: int) -> int:
        others = 0
        if self.nsa:
            others = seen_pairs(length, length, CMP_BLOCK, CMP_STRIDE)
            short = min(WINDOW, length)
            others += short * (short + 1) // 2 + (length - short) * WINDOW
        blocks, rest = divmod(length, self.block_size)
        past = blocks if self.topk is None else self.topk - 1
        sizes = [self.block_size] * blocks + [rest]
        own = sum(size * (size + 1) // 2 for size in sizes)
        return (
            others
            + own
            + sum(size * min(past, block) * self.block_size for block, size in enumerate(sizes))
        )

    def flop(self, *, backward: bool) -> int:
        """Returns the floating point operations of the matrix products.

        Args:
            backward: Whether to add the backward pass, which has 5 products to the forward's 2.
        """
        # Of the 5 products, 3 are over the head dim of queries, and 2 over that of values.
        dims = 4 * self.head_dim + 3 * self.values_dim if backward else 0
        dims = dims or self.head_dim + self.values_dim
        return 2 * self.batch * self.heads * self.pairs * dims


def size(length: int) -> str:
    """Formats a number of tokens, in units of K or M if it is a multiple."""
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
    "million": [Config(1, 32, 8, 2**20, size, 12, dense="nothing") for size in (4096, 128)],
    "gates": [
        Config(1, heads, kv_heads, 65536, block_size, topk, dense="SDPA", gate=gate)
        for heads, kv_heads, block_size, topk in ((16, 16, 128, 8), (32, 8, 512, 3))
        for gate in (("token", "tile") if heads == kv_heads else ("token", "group", "tile"))
    ],
    "documents": [
        *(Config(1, 16, 16, 65536, 512, 3, documents=n) for n in (1, 16, 128, 1024)),
        Config(1, 16, 16, 65536, 512, 3, documents=1024, longest_known=True),
    ],
    "targets": [
        *(
            Config(1, heads, kv_heads, n * 1024, block_size, topk, dense="routed",
                   target="times cuDNN", forward_target=forward, both_target=both)
            for heads, kv_heads, n, block_size, topk, forward, both in (
                (16, 16, 8, 128, 8, 1.3, 1.5), (16, 16, 16, 512, 3, 2.8, 3.2),
                (32, 8, 32, 512, 3, 8, 7.5), (16, 16, 64, 512, 3, 15, 15),
                (16, 16, 64, 128, 8, 10.5, 14),
            )
        ),
        *(
            Config(1, 16, 16, 65536, 512, 3, head_dim=dim, value_dim=value_dim, dense="routed",
                   target="time of head dim 128", forward_target=most, both_target=most)
            for dim, value_dim, most in ((192, 128, 1.8), (256, 256, 2.4))
        ),
        Config(1, 16, 16, 65536, 512, None,
               target="times the fastest", forward_target=1, both_target=1),
        Config(1, 16, 16, 131072, 128, 8, dense="SDPA",
               target="times cuDNN", forward_target=21, both_target=29),
        Config(1, 4, 1, 2**20, 128, 16, backward=False, dense="nothing",
               target="share of the gate", forward_target=0.5),
        Config(1, 4, 1, 2**20, 4096, 12, dense="SDPA cuDNN",
               target="times cuDNN", forward_target=14.5, both_target=10),
        Config(1, 1, 1, 10 * 2**20, 163840, 3, backward=False, dense="nothing",
               target="milliseconds", forward_target=3700),
    ],
    "correlated": [
        Config(1, heads, kv_heads, n * 1024, block_size, topk, correlated=correlated)
        for heads, kv_heads, n, block_size, topk in (
            (16, 16, 8, 128, 8), (16, 16, 16, 512, 3), (32, 8, 32, 512, 3), (16, 16, 64, 128, 8),
        )
        for correlated in (False, True)
    ],
    "training": [
        Config(batch, 8, 2, n * 1024, block_size, topk, layers=12, dense=dense)
        for batch, n in ((4, 8), (1, 32), (1, 64))
        for block_size, topk, dense in ((512, 3, "all"), (128, 8, "nothing"))
    ],
    "decode": [
        Config(batch, 32, 8, length, 512, 8, backward=False, decode=True, gate=gate)
        for batch, length in ((1, 2**20), (8, 2**17), (1, 2**17), (1, 2**15))
        for gate in ("token", "group")
    ],
    "paged": [
        Config(
            *(batch, 32, 8, n * 1024, block_size, 8),
            backward=False, decode=True, paged=True, chunk=chunk,
        )
        for block_size in (128, 512)
        for batch, n, chunk in (
            (1, 128, 0), (8, 128, 0), (32, 128, 0), (64, 32, 0), (256, 16, 0), (256, 4, 0),
            (32, 32, 2048), (32, 32, 8192), (32, 128, 8192),
        )
    ],
    "nsa": [
        *(Config(1, 64, 4, n * 1024, 64, 16, dense="SDPA", nsa=True) for n in (8, 16, 32, 64)),
        *(
            Config(batch, 64, 4, 65536, 64, 16, backward=False, decode=True, nsa=True)
            for batch in (1, 32)
        ),
    ],
}  # fmt: skip
