"""Sampled results of calls that are too long for the oracle: rows of the output, and gradients.

The calls on a GPU have a million tokens or more. Their tensors have more than 2**31 elements, and
they fit one card of 80 GB, forward with backward.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest

from flexmoba import flex_moba, moba_select
from flexmoba.reference import reference_selection
from tests.conftest import assert_near_ties, assert_within_policy, block_scores

ROWS = 8  # sampled queries and keys of a head, besides the first and the last one


class Long(NamedTuple):
    """Sizes of a call with one row."""

    heads: int
    kv_heads: int
    length: int
    block_size: int
    topk: int
    head_dim: int = 128
    backward: bool = True

    def tensors(self, device: str, dtype: torch.dtype) -> list[Tensor]:
        """Returns q, k, v and a gradient of the output."""
        generator = torch.Generator(device).manual_seed(0)
        options = {"device": device, "dtype": dtype, "generator": generator}
        return [
            torch.randn(1, heads, self.length, self.head_dim, **options)
            for heads in (self.heads, self.kv_heads, self.kv_heads, self.heads)
        ]

    @property
    def sample(self) -> Tensor:
        """Positions of queries or keys, the first and the last one among them."""
        drawn = torch.randint(self.length, (ROWS,), generator=torch.Generator().manual_seed(1))
        return torch.cat([torch.tensor([0, self.length - 1]), drawn])


class Results(NamedTuple):
    out: Tensor
    lse: Tensor
    grads: tuple[Tensor, ...]


def run(long: Long, tensors: list[Tensor]) -> Results:
    *inputs, grad = tensors
    inputs = [x.requires_grad_(long.backward) for x in inputs]
    out, aux = flex_moba(*inputs, long.block_size, long.topk, return_aux=AuxRequest(lse=True))
    grads = torch.autograd.grad(out, inputs, grad) if long.backward else ()
    for x in inputs:
        x.requires_grad_(False)
    return Results(out.detach(), aux.lse.detach(), grads)


def check(long: Long, tensors: list[Tensor], results: Results) -> None:
    """Compares sampled rows of the first and the last head, and their selections."""
    q, k, v, grad = (x[0] for x in tensors)
    selection = moba_select(*tensors[:2], long.block_size, long.topk)[0]
    for head in {0, long.heads - 1}:
        kv_head = head * long.kv_heads // long.heads
        check_selection(long, q[head], k[kv_head], selection[head])
        compared = {}
        for dtype in (torch.float64, q.dtype):
            rows = [
                row_of(long, p, (q[head, p], k[kv_head], v[kv_head], grad[head, p]), s, dtype)
                for p, s in zip(long.sample.tolist(), selection[head, long.sample], strict=True)
            ]
            compared[dtype] = [torch.stack(x) for x in zip(*rows, strict=True)]
            if long.backward:
                compared[dtype] += gradients_of_keys(
                    long, tensors, results, kv_head, selection, dtype
                )
        actual = [x[0, head, long.sample] for x in (results.out, results.lse, *results.grads[:1])]
        actual += [x[0, kv_head, long.sample] for x in results.grads[1:]]
        largest = [float(x.abs().max()) for x in compared[torch.float64]]
        units = [largest[0], max(1.0, largest[1]), *(max(largest[2:]) for _ in largest[2:])]
        names = ("out", "lse", "dq", "dk", "dv")
        if not long.backward:
            del compared[torch.float64][2], compared[q.dtype][2]
        for name, x, exact, baseline, unit in zip(
            names, actual, compared[torch.float64], compared[q.dtype], units, strict=False
        ):
            assert_within_policy(name, x, exact, baseline, unit)


def check_selection(long: Long, q: Tensor, k: Tensor, selected: Tensor) -> None:
    """Compares the past blocks of sampled queries ``(L, D)`` with the scores in float64."""
    rows, keys = q[None, None, long.sample], k[None, None]
    score, uncertainty = block_scores(rows, keys, long.block_size)
    block = torch.arange(score.shape[-1], device=q.device)
    own = (long.sample.to(q.device) // long.block_size)[:, None]
    score = score.where(block < own, -torch.inf)
    best = score.topk(min(long.topk - 1, score.shape[-1])).indices
    expected = torch.zeros_like(score, dtype=torch.bool).scatter(-1, best, True) & (block < own)
    past = selected[long.sample]
    actual = (past[:, :, None] == block).any(1) & (block < own)
    assert_near_ties(actual[None, None], expected, (score, uncertainty))


def row_of(
    long: Long, position: int, tensors: tuple[Tensor, ...], selected: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """Returns the output, the log-sum-exp and the gradient of one query, computed in ``dtype``."""
    blocks = selected[selected >= 0].long()
    keys = blocks[:, None] * long.block_size + torch.arange(long.block_size, device=blocks.device)
    keys = keys.flatten()
    keys = keys[keys <= position]
    q, k, v, grad = tensors
    q, grad, k, v = (x.to(dtype) for x in (q, grad, k[keys], v[keys]))
    scale = long.head_dim**-0.5
    scores = (k @ q) * scale
    weights = scores.softmax(-1)
    out = weights @ v
    d_scores = weights * (v @ grad - out @ grad)
    return [
        out,
        scores.float().logsumexp(-1) if dtype != torch.float64 else scores.logsumexp(-1),
        scale * (d_scores @ k),
    ]


def gradients_of_keys(
    long: Long,
    tensors: list[Tensor],
    results: Results,
    kv_head: int,
    selection: Tensor,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Returns the gradients of sampled keys and values of a KV head, computed in ``dtype``.

    They follow from all queries that selected the block of the key, with the log-sum-exps and
    outputs of the call.
    """
    q, k, v, grad = (x[0] for x in tensors)
    group, scale = long.heads // long.kv_heads, long.head_dim**-0.5
    d_k = torch.zeros(len(long.sample), long.head_dim, dtype=torch.float64, device=q.device)
    d_v = torch.zeros_like(d_k)
    for head in range(kv_head * group, (kv_head + 1) * group):
        for i, position in enumerate(long.sample.tolist()):
            selects = (selection[head] == position // long.block_size).any(-1)
            selects[:position] = False
            rows = selects.nonzero()[:, 0]
            queries, grads, out = (x[head, rows].to(dtype) for x in (q, grad, results.out[0]))
            key, value = k[kv_head, position].to(dtype), v[kv_head, position].to(dtype)
            weights = ((queries @ key) * scale - results.lse[0, head, rows]).exp().to(dtype)
            d_scores = weights * (grads @ value - (grads * out).sum(-1))
            d_k[i] += scale * (d_scores @ queries)
            d_v[i] += weights @ grads
    return [d_k, d_v]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sampled_rows_are_checked(dtype):
    """The checks of this file agree with a short call, and find a wrong element of each result."""
    long = Long(4, 2, 1000, 64, 3, head_dim=16)
    tensors = long.tensors("cpu", dtype)
    selected = reference_selection(*tensors[:2], 64, 3, is_causal=True)
    assert (selected.sum(-1).amax() == 3).all()
    results = run(long, tensors)
    check(long, tensors, results)
    for x, head in zip((results.out, results.lse, *results.grads), (3, 3, 3, 1, 1), strict=True):
        before = x[0, head, 999].clone()
        x[0, head, 999] += x.abs().max() / 4
        with pytest.raises(AssertionError, match="error"):
            check(long, tensors, results)
        x[0, head, 999] = before


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "long",
    [
        Long(32, 8, 2**20, 4096, 12),
        Long(32, 8, 2**20, 128, 12),  # 8,192 blocks
        Long(1, 1, 10 * 2**20, 163840, 3, backward=False),
    ],
    ids=["1M", "1M, 8192 blocks", "10M"],
)
def test_a_million_tokens(long):
    if torch.cuda.mem_get_info()[1] < 75 * 2**30:
        pytest.skip("needs a card of 80 GB")
    tensors = long.tensors("cuda", torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    results = run(long, tensors)
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"{long}: peak {peak:.1f} GiB")
    assert peak < 76
    check(long, tensors, results)
