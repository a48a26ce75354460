"""Problems of the tests: drawn sizes, and tensors and selections from a drawn seed.

Hypothesis draws a few small numbers, not tensor elements, so that examples are cheap and shrink to
the smallest sizes that fail.
"""

from dataclasses import dataclass, fields

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from flexmoba.reference import reference_mask

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Problem:
    """Sizes, options and the seed of one attention problem."""

    batch: int = 1
    kv_heads: int = 1
    group: int = 1
    q_len: int = 24
    kv_len: int = 24
    head_dim: int = 8
    value_dim: int = 8
    block_size: int = 4
    topk: int = 2
    is_causal: bool = True
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def __str__(self) -> str:
        """Names the fields that differ from the defaults, as the name of a test."""
        values = {field: getattr(self, field.name) for field in fields(self)}
        return " ".join(f"{f.name}={x}" for f, x in values.items() if x != f.default)

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def offset(self) -> int:
        """The position of the first query."""
        return self.kv_len - self.q_len

    @property
    def n_blocks(self) -> int:
        return -(-self.kv_len // self.block_size)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def tensors(
        self, device: str = "cpu", *, requires_grad: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draws normal ``q (B, Hq, Lq, D)``, ``k (B, Hkv, Lk, D)`` and ``v (B, Hkv, Lk, Dv)``."""
        generator = self.generator()
        shapes = (
            (self.batch, self.heads, self.q_len, self.head_dim),
            (self.batch, self.kv_heads, self.kv_len, self.head_dim),
            (self.batch, self.kv_heads, self.kv_len, self.value_dim),
        )
        # Drawn in float64 and rounded, so that every dtype has the same problem.
        q, k, v = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            .to(device, self.dtype)
            .requires_grad_(requires_grad)
            for shape in shapes
        )
        return q, k, v

    def tied_tensors(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Draws tensors with many ties, for which the gate is exact in every dtype.

        Queries and mean keys are small integers. The keys of a block differ from their mean in
        pairs that cancel, so that the mean is exact for any block size.
        """
        v = self.tensors(device)[2]
        generator = self.generator()

        def integers(length: int, dim: int, heads: int) -> Tensor:
            shape = (self.batch, heads, length, dim)
            return torch.randint(-2, 3, shape, generator=generator).to(device, self.dtype)

        position = torch.arange(self.kv_len, device=device)
        block, in_block = position // self.block_size, position % self.block_size
        first_of_pair = in_block % 2 == 0
        # The last key of a block of odd length has no partner.
        last = (in_block == self.block_size - 1) | (position == self.kv_len - 1)
        scatter = integers(self.kv_len, self.head_dim, self.kv_heads)
        scatter = torch.where(first_of_pair[:, None], scatter, -scatter.roll(1, dims=2))
        scatter = scatter.masked_fill((first_of_pair & last)[:, None], 0)
        means = integers(self.n_blocks, self.head_dim, self.kv_heads)
        return integers(self.q_len, self.head_dim, self.heads), means[:, :, block] + scatter, v

    def selection(self, device: str = "cpu", *, empty: float = 0.25) -> Tensor:
        """Draws an arbitrary selection, int32 ``(B, Hq, Lq, topk)``, unlike one of a gate.

        Every row holds distinct blocks, own, past and future, in any order. A share ``empty`` of
        all columns, anywhere in a row, and all columns of some rows hold -1.
        """
        generator = self.generator()
        rows = (self.batch, self.heads, self.q_len)
        order = torch.rand(*rows, self.n_blocks, generator=generator).argsort(-1)
        selected = order.new_full((*rows, self.topk), -1)
        selected[..., : self.n_blocks] = order[..., : self.topk]
        selected[torch.rand(selected.shape, generator=generator) < empty] = -1
        selected[torch.rand(rows, generator=generator) < empty / 2] = -1
        columns = torch.rand(selected.shape, generator=generator).argsort(-1)
        return selected.gather(-1, columns).to(device, torch.int32)

    def mask_of(self, selection: Tensor) -> Tensor:
        """Returns the keys that each query of a selection attends to, bools ``(B, Hq, Lq, Lk)``."""
        selected = as_bools(selection, self.n_blocks)
        return reference_mask(selected, self.block_size, self.kv_len, is_causal=self.is_causal)


def as_bools(selection: Tensor, n_blocks: int) -> Tensor:
    """Converts indices ``(B, Hq, Lq, topk)`` to bools ``(B, Hq, Lq, n_blocks)``."""
    blocks = torch.arange(n_blocks, dtype=selection.dtype, device=selection.device)
    return (selection[..., None] == blocks).any(-2)


@st.composite
def problems(
    draw: DrawFn,
    *,
    max_len: int = 200,
    max_block: int = 70,
    head_dims: tuple[int, ...] = (8, 16, 33),
    dtype: SearchStrategy[torch.dtype] | None = None,
    topk: SearchStrategy[int] | None = None,
    is_causal: SearchStrategy[bool] | None = None,
) -> Problem:
    """Draws a `Problem`; arguments narrow the ranges.

    By itself, hypothesis often draws from the ends of ranges, where there is nothing to route. The
    alternatives make long sequences, several blocks and a small topk frequent enough.
    """
    kv_len = draw(st.integers(1, max_len) | st.integers(max_len // 4, max_len))
    block_size = draw(st.integers(1, max_block) | st.integers(1, max(1, kv_len // 4)))
    n_blocks = -(-kv_len // block_size)
    any_topk = st.integers(1, n_blocks + 2) | st.integers(2, 4)
    return Problem(
        batch=draw(st.integers(1, 2)),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        q_len=draw(st.just(kv_len) | st.integers(1, kv_len)),
        kv_len=kv_len,
        head_dim=draw(st.sampled_from(head_dims)),
        value_dim=draw(st.sampled_from(head_dims)),
        block_size=block_size,
        topk=draw(any_topk if topk is None else topk),
        is_causal=draw(st.sampled_from((True, True, False)) if is_causal is None else is_causal),
        dtype=draw(st.sampled_from(DTYPES) if dtype is None else dtype),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
