"""Native Sparse Attention on CUDA: its kernels and those of the backends, against the oracle.

Every configuration compiles for some seconds, so there are few. Run them with
``pytest -m gpu -n 4``.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flexmoba import selected_attention
from flexmoba.backends.flex.range_mask import range_lists
from flexmoba.nn import NsaAttention
from flexmoba.nsa import NsaSizes, flex_nsa, nsa_select
from flexmoba.nsa.decode import attend_gathered, attend_step
from flexmoba.nsa.tensors import BranchTensors
from tests.conftest import assert_as_exact_as_dense, assert_bitwise_equal, with_lse
from tests.problems import Problem as BlockProblem
from tests.test_nsa import NAMES, Problem, assert_exact, assert_rules, nsa_of

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# The sizes of the paper for 1000 tokens, with a topk that leaves blocks out.
PAPER = Problem(
    kv_heads=2,
    group=16,
    q_len=1000,
    kv_len=1000,
    head_dim=128,
    value_dim=128,
    topk=6,
    window=200,
    dtype=torch.bfloat16,
)


def variant(**changes) -> Problem:
    return replace(PAPER, **changes)


PROBLEMS = {
    "paper": PAPER,
    "full tiles": variant(q_len=1024, kv_len=1024, batch=2),
    "float16": variant(dtype=torch.float16, batch=2),
    "float32": variant(dtype=torch.float32, group=4, head_dim=64, value_dim=64),
    "groups of 1": variant(group=1),
    "groups of 3": variant(group=3),
    "groups of 9": variant(group=9),
    "groups of 40": variant(group=40, kv_heads=1),
    "wide heads": variant(head_dim=192),
    "narrow heads": variant(head_dim=80, value_dim=48, group=12),
    "blocks of 32": variant(block_size=32, topk=9, head_dim=64, value_dim=64),
    "blocks of 96": variant(block_size=96, head_dim=64, value_dim=64),
    "blocks of 128": variant(block_size=128, head_dim=64, value_dim=64),
    "one size": variant(cmp_block=64, cmp_stride=64),
    "long compressed blocks": variant(cmp_block=64, cmp_stride=8, block_size=32, topk=9),
    "one query": variant(q_len=1, batch=3),
    "chunk": variant(q_len=333, kv_len=1111),
    "few tokens": variant(q_len=31, kv_len=31),
    "scale": variant(scale=-0.2, gate_heads=False),
    "no window": variant(window=0, batch=2),
}
# Without gradients, which compile for the longest time, and with torch's dense kernels.
FORWARD_ALONE = [PROBLEMS[x] for x in ("blocks of 32", "one size", "one query", "few tokens")]
every_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("q_len", "kv_len"), [(1, 1), (100, 7), (700, 300), (1000, 62), (8192, 512), (40000, 2500)]
)
def test_lists_of_ranges(q_len, kv_len, documents):
    """Tests the kernel against plain operations on CPU, bit for bit."""
    position = torch.arange(q_len, dtype=torch.int32)
    end = ((position - 15) * kv_len // q_len).clamp(max=kv_len)
    starts = torch.stack([position // 333 * 333, position // 1100 * 1100])
    first = end[starts].clamp(min=0) if documents else None
    for backward in (False, True):
        expected = range_lists(first, end, kv_len, backward)
        on_device = None if first is None else first.to(DEVICE)
        lists = range_lists(on_device, end.to(DEVICE), kv_len, backward)
        for actual, x in zip(lists, expected, strict=True):
            assert_bitwise_equal(actual.cpu(), x)


@every_problem
def test_the_selection(problem):
    assert_rules(problem, DEVICE)


@every_problem
def test_output_and_gradients(problem):
    gradients = problem not in FORWARD_ALONE
    with torch.set_grad_enabled(gradients):
        assert_exact(problem, DEVICE, gradients=gradients)


@pytest.mark.parametrize("group", [8, 16])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("block_size", [64, 100])
def test_a_shared_selection(block_size, is_causal, group):
    problem = BlockProblem(
        batch=16 // group, kv_heads=2, group=group, q_len=700, kv_len=900, head_dim=64,
        value_dim=128, block_size=block_size, topk=5, is_causal=is_causal, dtype=torch.bfloat16,
    )  # fmt: skip
    q, k, v = problem.tensors(DEVICE)
    shared = problem.selection(DEVICE)[:, ::group]
    shared[:, :, :300, 0] = torch.where((shared == 1).any(-1), -1, 1)[:, :, :300]
    repeated = shared.repeat_interleave(group, 1)
    attend = with_lse(selected_attention, shared, block_size, is_causal=is_causal, impl="fused")
    assert_as_exact_as_dense(attend, q, k, v, problem.mask_of(repeated), gradients=True)


@pytest.mark.parametrize("name", ["paper", "groups of 3", "wide heads"])
def test_twice_the_same_bits(name):
    problem = PROBLEMS[name]
    tensors = problem.tensors(DEVICE, requires_grad=True)
    runs = []
    for _ in range(2):
        out, lse = nsa_of(problem)(*tensors)
        loss = out.float().square().sum() + lse[:, :, 31:].sum()
        runs.append((out, lse, *torch.autograd.grad(loss, tensors)))
    for first, second in zip(*runs, strict=True):
        assert_bitwise_equal(first, second)


@pytest.mark.parametrize("group", [2, 16])
def test_documents_and_padding(group):
    problem = variant(group=group, kv_heads=1, batch=1)
    tensors = problem.tensors(DEVICE)
    bounds = [0, 20, 420, 1000]
    where = {"cu_seqlens": torch.tensor(bounds, device=DEVICE)}
    selection = nsa_select(tensors[0], tensors[4], 1000, **problem.blocks, **where)
    out, lse = nsa_of(problem, selection=selection, **where)(*tensors)
    first_block = first_compressed = 0
    for start, end in itertools.pairwise(bounds):
        alone = replace(problem, q_len=end - start, kv_len=end - start)
        parts = [
            x[:, :, first_compressed : first_compressed + alone.n_compressed]
            if name.endswith("_cmp")
            else x[:, :, start:end]
            for name, x in zip(NAMES, tensors, strict=True)
        ]
        own = selection[:, :, start:end]
        own = torch.where(own >= 0, own - first_block, -1)
        expected = nsa_of(alone, selection=own)(*parts)
        torch.testing.assert_close(out[:, :, start:end], expected[0], rtol=0, atol=2e-2)
        torch.testing.assert_close(lse[:, :, start:end], expected[1], rtol=0, atol=1e-3)
        first_block += alone.n_blocks
        first_compressed += alone.n_compressed
    real = torch.arange(1000, device=DEVICE)[None] >= 100
    padded = nsa_of(problem, key_padding_mask=real)(*tensors)[0]
    assert (padded[:, :, :100] == 0).all()
    assert padded.isfinite().all()


@pytest.mark.parametrize("window", [100, 0])
def test_compiled(window):
    layer = NsaAttention(256, 16, 1, head_dim=64, topk=6, window=window, rope_base=1e4)
    layer = layer.to(DEVICE, torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True)
    for length in (700, 1100):
        x = torch.randn(1, length, 256, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        torch._dynamo.maybe_mark_dynamic(x, 1)  # one compilation for both lengths
        out = compiled(x)
        with torch.no_grad():
            expected = layer(x)
        torch.testing.assert_close(out, expected, rtol=0, atol=3e-2)
        (grad,) = torch.autograd.grad(out.float().square().sum(), x)
        assert grad.isfinite().all()


@pytest.mark.parametrize("changes", [{}, {"batch": 2, "cmp_block": 64, "cmp_stride": 8}])
def test_compiled_flex_nsa_at_two_lengths(changes):
    """Tests one compilation for symbolic lengths, without gradients."""
    compiled = torch.compile(flex_nsa, fullgraph=True)
    for length in (1000, 1500):
        problem = variant(q_len=length, kv_len=length, head_dim=64, value_dim=64, **changes)
        tensors = problem.tensors(DEVICE)
        named = dict(zip(NAMES[4:], tensors[4:], strict=True))
        with torch.no_grad():
            expected = flex_nsa(*tensors[:4], **named, **problem.options)
            for x in (*tensors, *named.values()):
                torch._dynamo.maybe_mark_dynamic(x, 2)
            out = compiled(*tensors[:4], **named, **problem.options)
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize("window", [100, 0])
def test_decoding_in_a_cuda_graph(window):
    layer = NsaAttention(256, 16, 1, head_dim=64, topk=6, window=window, rope_base=1e4)
    layer = layer.to(DEVICE, torch.bfloat16)
    x = torch.randn(2, 1000, 256, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = layer(x)
        cache = layer.make_cache(2, 1000)
        outs = [layer(x[:, :900], cache=cache), layer(x[:, 900:901], cache=cache)]
        graph, token = torch.cuda.CUDAGraph(), x[:, 901:902].clone()
        lengths = cache.lengths.clone()
        with torch.cuda.graph(graph):
            out = layer(token, cache=cache)
        cache.lengths.copy_(lengths)  # the capture runs nothing
        for i in range(901, 1000):
            token.copy_(x[:, i : i + 1])
            graph.replay()
            outs.append(out.clone())
    # Near ties may be decided otherwise, which changes few rows.
    error = (torch.cat(outs, 1) - expected).abs().amax((0, 2))
    assert error.median() < 1e-2
    assert (error < 5e-2).float().mean() > 0.95


@pytest.mark.parametrize(
    ("changes", "gate_heads"),
    [
        ({}, 16),
        ({"group": 3, "dtype": torch.float16}, 1),
        ({"head_dim": 192}, 16),
        ({"dtype": torch.float32, "head_dim": 80, "value_dim": 48}, 16),
        ({"block_size": 256, "cmp_block": 64, "topk": 3}, 16),
        ({"window": 0}, 16),
    ],
)
@pytest.mark.parametrize("n", [1, 5])
def test_a_decoding_step(changes, gate_heads, n):
    """Tests rows of different lengths, NaN beyond the lengths, and padding."""
    problem = variant(batch=3, q_len=n, kv_len=5000, **changes)
    sizes = NsaSizes(*problem.blocks.values())
    q, k, v, *_ = problem.tensors(DEVICE)
    gates = torch.rand(3, problem.heads if gate_heads > 1 else 1, n, 3, device=DEVICE).to(q.dtype)
    lengths = torch.tensor([4600, 2000, n], device=DEVICE)
    positions = (lengths[:, None] + torch.arange(-n, 0, device=DEVICE)).int()
    positions[1, 0] = -1
    n_blocks, ring = problem.kv_len // problem.block_size, -1
    if problem.window > 0:
        ring = problem.window + 15
    n_compressed = sizes.compressed_blocks((n_blocks - 1) * problem.block_size)
    ends = n_blocks * problem.block_size, n_compressed + 1, ring + 1
    cache = BranchTensors(*(x[:, :, :end].contiguous() for end in ends for x in (k, v)))
    for row, length in enumerate(lengths.tolist()):
        used = length, sizes.compressed_blocks(length), ring if length > ring else length
        for i, end in enumerate(used):
            for x in cache[2 * i : 2 * i + 2]:
                x[row, :, end:] = torch.nan
    options = sizes, problem.window, problem.head_dim**-0.5
    out, lse = attend_step(q, gates, positions, cache, *options)
    exact = BranchTensors(*(x.double() for x in cache))
    expected = attend_gathered(q.double(), gates.double(), positions, exact, *options)
    assert out.dtype == q.dtype
    # Near ties may be decided otherwise, which changes the selected branch of few KV heads.
    tolerance = 1e-4 if q.dtype == torch.float32 else 2e-2
    error = torch.where(out == expected[0], 0.0, (out - expected[0]).abs())
    assert error.unflatten(1, (problem.kv_heads, -1)).amax((2, 4)).median() < tolerance
    error = torch.where(lse == expected[1], 0.0, (lse - expected[1]).abs())
    assert error[..., ::2].amax() < tolerance
    assert error.amax() < 0.5


def test_memory_does_not_grow_with_the_square_of_the_length():
    """Tests that a forward call of 32K tokens needs less than 8 times the memory of q."""
    shape, n_compressed = (1, 2, 32768, 64), (32768 - 32) // 16 + 1

    def normal(heads: int, length: int) -> Tensor:
        return torch.randn(1, heads, length, 64, device=DEVICE, dtype=torch.bfloat16)

    q, k, v = normal(32, shape[2]), normal(2, shape[2]), normal(2, shape[2])
    k_cmp, v_cmp = normal(2, n_compressed), normal(2, n_compressed)
    gates = torch.rand(1, 32, shape[2], 3, device=DEVICE).bfloat16()
    with torch.no_grad():
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            flex_nsa(q, k, v, gates, k_cmp=k_cmp, v_cmp=v_cmp)
    assert torch.cuda.max_memory_allocated() - before < 8 * q.nbytes


def test_memory_of_the_backward_pass():
    """Tests that both passes need less than 8 times the memory of q.

    They need 7.7 times as much if autograd differentiates the window branch first, and else 8.6.
    Shorter calls need more, for sums of smaller items.
    """
    length, n_compressed = 65536, 4095

    def leaf(heads: int, n: int) -> Tensor:
        shape = 1, heads, n, 128
        return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)

    q, grad = leaf(64, length), leaf(64, length).detach()
    gates = torch.rand(1, 64, length, 3, device=DEVICE).bfloat16().requires_grad_()
    tensors = {name: leaf(4, length) for name in ("k", "v", "k_win", "v_win")}
    tensors |= {name: leaf(4, n_compressed) for name in ("k_cmp", "v_cmp")}
    leaves = [q, gates, *tensors.values()]
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(flex_nsa(q, gates=gates, **tensors), leaves, grad)
    assert torch.cuda.max_memory_allocated() - before < 8 * q.nbytes
