"""Tests of paged attention on CUDA: kernels, chunks, CUDA graphs, and continuous batching."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flexmoba import MobaCache
from flexmoba.paged import Pages, append_paged, attend_paged, paged_batch
from tests.conftest import assert_as_exact_as, assert_bitwise_equal
from tests.ragged import LAYOUTS, Ragged

pytestmark = pytest.mark.gpu

STEPS = Ragged(
    sequences=((2000, 1), (63, 1), (0, 1), (700, 4), (1500, 1)), shared=3, kv_heads=2, group=4,
    head_dim=128, value_dim=128, block_size=64, topk=4,
)  # fmt: skip
MIXED = replace(STEPS, sequences=((2000, 1), (0, 900), (700, 300), (63, 1)))


def means_of(problem: Ragged, i: int, pages: Pages, table: Tensor) -> Tensor:
    """Returns the mean keys of all full sub-blocks of a sequence, ``(Hkv, n, D)``."""
    length = sum(problem.sequences[i])
    used = table[i, : -(-length // problem.block_size)].long()
    means = pages.means_of_sub_blocks[used].transpose(0, 1).flatten(1, 2)
    return means[:, : length // (problem.block_size // problem.sub_blocks)]


def masks(problem: Ragged, tensors: list[Tensor], pages: Pages, table: Tensor) -> list[Tensor]:
    """Returns the oracle's masks, given the mean keys that the pages hold."""
    gated = []
    for i in range(len(problem.sequences)):
        q, k, v = (x.cpu() for x in tensors[3 * i : 3 * i + 3])
        means = means_of(problem, i, pages, table).cpu()
        means = means.repeat_interleave(problem.block_size // problem.sub_blocks, 1)
        k = torch.cat([means, k[:, means.shape[1] :]], 1)
        gated += [q, k, v]
    return problem.masks(gated)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gate": "group", "sink_blocks": 1, "local_blocks": 1, "block_size": 48},
        {"topk": None},
        {"gate_block_size": 8},
        {"gate_block_size": 4, "block_size": 32, "topk": 32, "sink_blocks": 1, "head_dim": 64,
         "value_dim": 64},
        {"gate": "group", "gate_block_size": 12, "block_size": 48, "sink_blocks": 1},
        {"sequences": MIXED.sequences},
        {"sequences": MIXED.sequences, "gate_block_size": 16},
        {"sequences": MIXED.sequences, "topk": None},
    ],
)  # fmt: skip
def test_attention_to_pages(changes, dtype, layout):
    problem = replace(STEPS, dtype=dtype, layout=layout, **changes)
    table, n_pages = problem.table("cuda")
    tensors, pages = [x.cuda() for x in problem.tensors()], problem.pages(n_pages, "cuda")
    problem.fill(pages, table, tensors)
    for i, k in enumerate(tensors[1::3]):
        means = means_of(problem, i, pages, table)
        size = problem.block_size // problem.sub_blocks
        keys = k[:, : means.shape[1] * size].unflatten(1, (-1, size))
        torch.testing.assert_close(means, keys.mean(2, dtype=torch.float32).to(dtype))
    batch = problem.batch(table)

    def attend(*tensors: Tensor):
        return attend_paged(problem.queries(tensors), pages, batch, **problem.options)

    expected = masks(problem, tensors, pages, table)
    assert_as_exact_as(lambda *x: problem.dense(expected, *x), attend, tensors)


@pytest.mark.parametrize(("topk", "gate_block_size"), [(4, None), (None, None), (4, 16)])
def test_graphs_of_every_batch_size_share_memory_and_replay_with_other_values(
    topk, gate_block_size
):
    changes = {"topk": topk, "gate_block_size": gate_block_size}
    problem, most = replace(STEPS, dtype=torch.bfloat16, **changes), 256
    tables, n_pages = problem.table("cuda")
    tensors, pages = [x.cuda() for x in problem.tensors()], problem.pages(n_pages, "cuda")
    problem.fill(pages, tables, tensors)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(most, 8, 128, generator=generator).cuda().bfloat16()
    k = torch.randn(most, 2, 128, generator=generator).cuda().bfloat16()
    # Tensors that stay in place. The new tokens go to a page that no sequence uses.
    out, lse = torch.empty_like(q), torch.empty(most, 8, device="cuda")
    table = tables[torch.zeros(most, dtype=torch.long)].clone()
    lengths = torch.ones(most, dtype=torch.int32, device="cuda")
    bounds = torch.arange(most + 1, dtype=torch.int32, device="cuda")
    slots = torch.full((most,), (n_pages - 5) * problem.block_size, device="cuda")

    def step(size: int) -> tuple[Tensor, Tensor]:
        append_paged(k[:size], k[:size], pages, slots[:size])
        given = bounds[: size + 1], lengths[:size], table[:size]
        batch = paged_batch(*given, tokens=size, max_query_len=1)
        return attend_paged(q[:size], pages, batch, topk)

    step(most)  # compiles
    pool, graphs, reserved = torch.cuda.graph_pool_handle(), {}, []
    for size in range(most, 0, -1):
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        before = torch.cuda.memory_reserved()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.graph(graph, pool=pool):
                out[:size], lse[:size] = step(size)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        reserved.append(torch.cuda.memory_reserved() - before)
        graphs[size] = graph
    print(f"{len(graphs)} graphs reserve {sum(reserved) / 2**20:.0f} MiB, topk {topk}")
    ends = torch.tensor([2000, 63, 1, 704, 1500], device="cuda").int()
    slots.fill_(-1)
    for size in (torch.randperm(most, generator=generator) + 1).tolist():
        rows = torch.randint(0, 5, (most,), generator=generator).cuda()
        table.copy_(tables[rows])
        lengths.copy_(ends[rows])
        last = max(1, size - 2)  # the tokens after it are padding
        bounds.copy_(torch.arange(most + 1, device="cuda").clamp(max=last))
        graphs[size].replay()
        for actual, expected in zip((out, lse), step(size), strict=True):
            assert_bitwise_equal(actual[:size], expected)
    assert sum(reserved) <= 2 * reserved[0] + 2**26


def test_pages_that_are_not_selected_are_not_read():
    problem = replace(STEPS, dtype=torch.bfloat16, sequences=((2000, 1), (1500, 1)), shared=0)
    table, n_pages = problem.table("cuda")
    tensors, pages = [x.cuda() for x in problem.tensors()], problem.pages(n_pages, "cuda")
    problem.fill(pages, table, tensors)
    batch = problem.batch(table, max_query_len=1)
    q = problem.queries(tensors)
    expected = attend_paged(q, pages, batch, problem.topk)
    problem.poison(pages, table, masks(problem, tensors, pages, table))
    assert pages.k[table[0, :20].long()].isnan().any()
    for actual, x in zip(attend_paged(q, pages, batch, problem.topk), expected, strict=True):
        assert_bitwise_equal(actual, x)


@pytest.mark.parametrize("gate_block_size", [None, 8])
def test_a_step_equals_one_of_a_cache(gate_block_size):
    torch.manual_seed(0)
    sizes = {"block_size": 64, "gate_block_size": gate_block_size, "max_len": 1024}
    cache = MobaCache(4, 2, 128, **sizes, dtype=torch.bfloat16, device="cuda")
    k, v = torch.randn(2, 4, 2, 1000, 128, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(4, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
    positions = cache.append(k, v)
    expected, _ = cache.attend(q, positions[:, -1:], 4)
    pages = Pages(
        *(x.unflatten(2, (-1, 64)).transpose(1, 2).flatten(0, 1) for x in (cache.k, cache.v)),
        cache.means.unflatten(2, (17, -1)).transpose(1, 2).flatten(0, 1),
    )
    assert pages.sub_blocks == 64 // (gate_block_size or 64)
    table = torch.arange(4 * 17, device="cuda", dtype=torch.int32).view(4, 17)
    lengths = torch.full((4,), 1000, device="cuda", dtype=torch.int32)
    bounds = torch.arange(5, device="cuda", dtype=torch.int32)
    batch = paged_batch(bounds, lengths, table, tokens=4, max_query_len=1)
    out, _ = attend_paged(q[:, :, 0], pages, batch, 4)
    torch.testing.assert_close(out, expected[:, :, 0])


@pytest.mark.parametrize("options", [{}, {"gate_block_size": 4}])
@pytest.mark.parametrize("use_cuda_graph", [True, False])
def test_continuous_batching(use_cuda_graph, options):
    pytest.importorskip("transformers", minversion="5.22")
    from transformers import ContinuousBatchingConfig

    from flexmoba.integrations.transformers import convert
    from tests.test_batching import GREEDY, assert_greedy, prompts
    from tests.tiny_models import model_of

    model = model_of("llama", dtype=torch.float32).cuda()
    convert(model, 16, [3, None], sink_blocks=0, **options)
    inputs = prompts(2, 8, 90, 45)
    config = ContinuousBatchingConfig(
        page_size=16, num_blocks=80, max_batch_tokens=48, use_cuda_graph=use_cuda_graph
    )
    outputs = model.generate_batch(
        inputs, generation_config=GREEDY, continuous_batching_config=config
    )
    assert not [x.error for x in outputs.values() if x.error]
    with torch.device("cuda"):
        assert_greedy(model, inputs, [x.generated_tokens for x in outputs.values()])
