"""Ragged batches of the tests: sequences with tensors of their own, and pages in any order.

Unused slots, pages and entries of the block table hold NaN or large numbers.
"""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor

from flexmoba.paged import PagedBatch, Pages, append_paged, paged_batch
from flexmoba.reference import reference_attention, reference_mask, reference_selection

LAYOUTS = ("separate", "head-major", "token-major")


@dataclass(frozen=True)
class Ragged:
    """Sizes and the seed of one batch. A sequence is a pair of numbers: old and new tokens."""

    sequences: tuple[tuple[int, int], ...] = ((9, 1), (0, 40), (30, 1), (17, 20))
    shared: int = 0  # blocks of old tokens that all sequences with so many old tokens share
    padding: int = 2
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 8
    value_dim: int = 8
    block_size: int = 4
    gate_block_size: int | None = None
    topk: int | None = 3
    gate: str = "token"
    sink_blocks: int = 0
    local_blocks: int = 0
    layout: str = "separate"
    dtype: torch.dtype = torch.float64
    seed: int = 0

    @property
    def options(self) -> dict:
        names = ("topk", "gate", "sink_blocks", "local_blocks")
        return {name: getattr(self, name) for name in names}

    @property
    def sub_blocks(self) -> int:
        return self.block_size // (self.gate_block_size or self.block_size)

    @property
    def tokens(self) -> int:
        return sum(new for _, new in self.sequences) + self.padding

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def shares(self, index: int) -> bool:
        return self.sequences[index][0] >= self.shared * self.block_size

    def tensors(self) -> list[Tensor]:
        """Draws q ``(Hq, new, D)``, k ``(Hkv, length, D)`` and v of every sequence, in order."""
        generator, heads, tensors = self.generator(), self.kv_heads * self.group, []
        n = self.shared * self.block_size
        prefix = [
            torch.randn(self.kv_heads, n, dim, generator=generator, dtype=torch.float64)
            for dim in (self.head_dim, self.value_dim)
        ]
        for index, (old, new) in enumerate(self.sequences):
            shapes = (
                (heads, new, self.head_dim),
                (self.kv_heads, old + new, self.head_dim),
                (self.kv_heads, old + new, self.value_dim),
            )
            drawn = [torch.randn(x, generator=generator, dtype=torch.float64) for x in shapes]
            if self.shares(index):
                drawn[1][:, :n], drawn[2][:, :n] = prefix
            tensors += [x.to(self.dtype) for x in drawn]
        return tensors

    def masks(self, tensors: list[Tensor]) -> list[Tensor]:
        """Returns the keys that each query of each sequence attends to, by the oracle."""
        masks = []
        for q, k in zip(tensors[::3], tensors[1::3], strict=True):
            options = self.options | {"gate_block_size": self.gate_block_size, "is_causal": True}
            selected = reference_selection(q[None], k[None], self.block_size, **options)
            masks.append(reference_mask(selected, self.block_size, k.shape[1], is_causal=True))
        return masks

    def dense(self, masks: list[Tensor], *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Computes dense masked attention of every sequence, in the order of the batch."""
        outs, lses = [], []
        for i, mask in enumerate(masks):
            q, k, v = (x[None] for x in tensors[3 * i : 3 * i + 3])
            out, lse = reference_attention(q, k, v, mask.to(q.device))
            outs.append(out[0].transpose(0, 1))
            lses.append(lse[0].T)
        zeros = outs[0].new_zeros(self.padding, *outs[0].shape[1:])
        nothing = lses[0].new_full((self.padding, lses[0].shape[1]), float("-inf"))
        return torch.cat([*outs, zeros]), torch.cat([*lses, nothing])

    def table(self, device: str = "cpu") -> tuple[Tensor, int]:
        """Draws a block table with arbitrary unused entries, and the number of pages."""
        generator = self.generator()
        sizes = [-(-(old + new) // self.block_size) for old, new in self.sequences]
        pages = sum(sizes) + 5
        order = torch.randperm(pages, generator=generator).int().tolist()
        prefix = [order.pop() for _ in range(self.shared)]
        table = torch.full((len(sizes), max(sizes) + 2), 2**30, dtype=torch.int32)
        for index, size in enumerate(sizes):
            own = prefix if self.shares(index) else []
            used = own + [order.pop() for _ in range(size - len(own))]
            table[index, :size] = torch.tensor(used, dtype=torch.int32)
        return table.to(device), pages

    def pages(self, n: int, device: str = "cpu") -> Pages:
        """Returns pages full of NaN in the layout of the problem.

        The mean keys have a dimension of sub-blocks if the problem names their size.
        """
        size, heads, dim, value_dim = self.block_size, self.kv_heads, self.head_dim, self.value_dim
        sub_blocks = self.sub_blocks

        def storage(*shape: int) -> Tensor:
            return torch.full(shape, torch.nan, dtype=self.dtype, device=device)

        if self.layout == "separate":
            sizes = (size, dim), (size, value_dim), (sub_blocks, dim)
            k, v, means = (storage(n, heads, *x) for x in sizes)
        elif self.layout == "head-major":  # keys, values and mean keys of a head, in this order
            sizes = [size * dim, size * value_dim, sub_blocks * dim]
            rows = storage(n, heads, size * -(-sum(sizes) // size))
            parts = rows[..., : sum(sizes)].split(sizes, dim=2)
            k, v, means = (
                x.unflatten(2, (-1, y)) for x, y in zip(parts, (dim, value_dim, dim), strict=True)
            )
        else:
            rows = storage(n, 2 * size + sub_blocks, heads, dim).transpose(1, 2)
            k, v, means = rows.split([size, size, sub_blocks], dim=2)
        return Pages(k, v, means[:, :, 0] if self.gate_block_size is None else means)

    def batch(self, table: Tensor, max_query_len: int | None = None) -> PagedBatch:
        bounds = torch.tensor([0, *(new for _, new in self.sequences)]).cumsum(0).int()
        lengths = torch.tensor([sum(x) for x in self.sequences]).int()
        return paged_batch(
            *(bounds.to(table.device), lengths.to(table.device), table),
            tokens=self.tokens,
            max_query_len=max_query_len,
        )

    def fill(self, pages: Pages, table: Tensor, tensors: list[Tensor], append=append_paged) -> None:
        """Appends the old tokens in two calls for each sequence, then all new tokens in one."""
        new_k, new_v, new_slots = [], [], []
        for index, (old, new) in enumerate(self.sequences):
            k, v = (x.transpose(0, 1) for x in tensors[3 * index + 1 : 3 * index + 3])
            position = torch.arange(old + new, device=table.device)
            slots = table[index, position // self.block_size].long() * self.block_size
            slots += position % self.block_size
            for part in (slice(0, old // 3), slice(old // 3, old)):
                append(k[part], v[part], pages, slots[part])
            new_k.append(k[old:])
            new_v.append(v[old:])
            new_slots.append(slots[old:])
        zeros = [x[0].new_full((self.padding, *x[0].shape[1:]), torch.nan) for x in (new_k, new_v)]
        padding = new_slots[0].new_full((self.padding,), -1)
        tensors = [torch.cat([*x, y]) for x, y in zip((new_k, new_v), zeros, strict=True)]
        append(*tensors, pages, torch.cat([*new_slots, padding]))

    def poison(self, pages: Pages, table: Tensor, masks: list[Tensor]) -> None:
        """Writes NaN over the keys and values of pages to which no query of a KV head attends.

        The sequences share no pages.
        """
        for i, mask in enumerate(masks):
            for block, keys in enumerate(mask.split(self.block_size, dim=-1)):
                for head in range(self.kv_heads):
                    if not keys[:, head * self.group : (head + 1) * self.group].any():
                        pages.k[table[i, block], head] = torch.nan
                        pages.v[table[i, block], head] = torch.nan

    def queries(self, tensors: list[Tensor]) -> Tensor:
        """Returns the queries of the batch, ``(T, Hq, D)``."""
        q = [x.transpose(0, 1) for x in tensors[::3]]
        return torch.cat([*q, q[0].new_full((self.padding, *q[0].shape[1:]), torch.nan)])


@st.composite
def ragged(draw: DrawFn, dtype: torch.dtype | None = None) -> Ragged:
    """Draws batches of steps and chunks."""
    block_size = draw(st.integers(1, 9) | st.sampled_from((16, 50)))
    divisors = [x for x in range(1, block_size + 1) if block_size % x == 0]
    new = st.just(1) | st.integers(0, 4) | st.integers(17, 60)
    sequences = draw(
        st.lists(st.tuples(st.integers(0, 90), new), min_size=1, max_size=4).filter(
            lambda x: all(sum(y) > 0 for y in x)
        )
    )
    sinks, locals_ = draw(st.sampled_from(((0, 0), (0, 0), (1, 0), (1, 1), (0, 2))))
    scored = draw(st.integers(0, 4))
    layout = draw(st.sampled_from(LAYOUTS))
    head_dim = draw(st.sampled_from((8, 16, 33)))
    return Ragged(
        sequences=tuple(sequences),
        shared=draw(st.integers(0, 3)),
        padding=draw(st.integers(0, 3)),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        head_dim=head_dim,
        value_dim=head_dim if layout == "token-major" else draw(st.sampled_from((8, 33))),
        block_size=block_size,
        gate_block_size=draw(st.none() | st.sampled_from(divisors)),
        topk=None if draw(st.integers(0, 4)) == 0 else 1 + sinks + locals_ + scored,
        gate=draw(st.sampled_from(("token", "token", "group"))),
        sink_blocks=sinks,
        local_blocks=locals_,
        layout=layout,
        dtype=draw(st.sampled_from((torch.float64, torch.float32))) if dtype is None else dtype,
        seed=draw(st.integers(0, 2**32 - 1)),
    )
