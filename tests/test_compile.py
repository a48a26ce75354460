"""`torch.compile`: no graph break, equal results, and a bounded number of compilations."""

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from flexmoba import (
    flex_moba,
    moba_block_mask,
    moba_select,
    selected_attention,
    window_attention,
)
from tests.conftest import assert_bitwise_equal
from tests.problems import DTYPES, Problem

LENGTHS = [64 + 37 * i for i in range(20)]  # with and without a shorter last block


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def moba(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_moba(q, k, v, 32, 3)


def moba_with_queries_at_the_end(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_moba(q[:, :, 5:], k, v, 32, 3)


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_moba(q, k, v, 32, None)


def non_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_moba(q, k, v, 32, 3, is_causal=False)


def halves(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return selected_attention(q, k, v, moba_select(q, k, 32, 3), 32)


FUNCTIONS = pytest.mark.parametrize(
    "function",
    [moba, moba_with_queries_at_the_end, full, non_causal, halves],
    ids=lambda function: function.__name__,
)


def problem_of(length: int, seed: int = 0) -> Problem:
    return Problem(batch=2, kv_heads=2, group=2, q_len=length, kv_len=length, seed=seed)


def outcome(function: Callable, problem: Problem) -> tuple[Tensor, ...]:
    """Returns the output, and the gradients of its sum of squares."""
    inputs = problem.tensors(requires_grad=True)
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out.square().sum(), inputs)


@FUNCTIONS
def test_fullgraph_equals_eager(function):
    problem = problem_of(200)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(
        outcome(compiled, problem), outcome(function, problem), strict=True
    ):
        assert_bitwise_equal(actual, expected)


@FUNCTIONS
def test_new_values_do_not_recompile(function):
    counter = CompileCounter()
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for seed in range(10):
        outcome(compiled, problem_of(200, seed))
    assert counter.frame_count == 1


@FUNCTIONS
def test_twenty_lengths_compile_a_few_times(function):
    counter = CompileCounter()
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for length in LENGTHS:
        problem = problem_of(length)
        for actual, expected in zip(
            outcome(compiled, problem), outcome(function, problem), strict=True
        ):
            assert_bitwise_equal(actual, expected)
    assert counter.frame_count <= 4


@pytest.mark.parametrize("options", [{"topk": 3}, {"topk": None}], ids=str)
def test_each_scale_compiles_once(options):
    """Layers that share code may have different scales, and dynamo makes the second a symbol."""

    def scaled(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return flex_moba(q, k, v, 32, scale=scale, **options)

    counter = CompileCounter()
    compiled = torch.compile(scaled, fullgraph=True, backend=counter)
    for scale in (0.1, 0.3, 1.0, 0.1, 0.3, 1.0):
        actual, expected = (
            outcome(functools.partial(f, scale=scale), problem_of(200)) for f in (compiled, scaled)
        )
        for x, y in zip(actual, expected, strict=True):
            assert_bitwise_equal(x, y)
    assert counter.frame_count == 3
    for scale in (float("nan"), float("inf")):
        with pytest.raises(Exception, match="scale must be finite"):
            compiled(*problem_of(200).tensors(), scale)


def test_twenty_lengths_and_batch_sizes_in_training_and_inference():
    counter = CompileCounter()
    compiled = torch.compile(moba, fullgraph=True, backend=counter)
    for i, length in enumerate(LENGTHS):
        problem = Problem(batch=1 + i % 3, group=2, q_len=length, kv_len=length)
        outcome(compiled, problem)
        with torch.no_grad():
            compiled(*problem.tensors())
    assert counter.frame_count <= 6


class Layers(nn.Module):
    """More configurations than dynamo's limit of recompilations of one code object."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for block_size in range(16, 66, 5):
            q = q + flex_moba(q, k, v, block_size, 2)
        return q


def test_many_layers_in_one_graph():
    counter = CompileCounter()
    compiled = torch.compile(Layers(), fullgraph=True, backend=counter)
    for length in LENGTHS[:3]:
        problem = problem_of(length)
        for actual, expected in zip(
            outcome(compiled, problem), outcome(Layers(), problem), strict=True
        ):
            assert_bitwise_equal(actual, expected)
    assert counter.frame_count <= 4


def test_eager_calls_of_many_configurations_stay_within_the_limit():
    # More configurations than dynamo compiles of one function, with the backend that also compiles
    # on CPU. Different integers would not suffice, because dynamo makes them symbolic.
    problems = [
        Problem(group=group, is_causal=is_causal, dtype=dtype)
        for dtype in DTYPES
        for is_causal in (True, False)
        for group in (1, 2)
    ]
    assert len(problems) > torch._dynamo.config.recompile_limit

    def run_all() -> None:
        for problem in problems:
            q, k, v = problem.tensors()
            flex_moba(q, k, v, 4, 2, is_causal=problem.is_causal, impl="masked")

    run_all()
    with torch.compiler.set_stance("fail_on_recompile"):
        run_all()


def test_eager_calls_of_many_lengths_compile_a_few_times():
    torch._dynamo.utils.counters.clear()
    for length in LENGTHS:
        q, k, v = problem_of(length).tensors()
        flex_moba(q, k, v, 32, 3, impl="masked")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 5


def test_windows_of_many_lengths_compile_a_few_times():
    torch._dynamo.utils.counters.clear()
    for length in LENGTHS:
        q, k, v = problem_of(length).tensors()
        window_attention(q, k, v, 20, impl="masked")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 5


def test_block_mask_is_built_without_a_graph_break():
    def lists(q: Tensor, k: Tensor) -> tuple[Tensor | None, ...]:
        mask = moba_block_mask(q, k, 32, 3)
        return mask.kv_num_blocks, mask.kv_indices, mask.q_num_blocks, mask.q_indices

    counter = CompileCounter()
    compiled = torch.compile(lists, fullgraph=True, backend=counter)
    for length in LENGTHS:
        q, k, _ = problem_of(length).tensors()
        for actual, expected in zip(compiled(q, k), lists(q, k), strict=True):
            assert_bitwise_equal(actual, expected)
    assert counter.frame_count <= 4


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_block_that_does_not_exist_is_none(is_causal):
    q, k, v = torch.randn(3, 1, 2, 100, 16)
    selection = torch.zeros(1, 2, 100, 2, dtype=torch.int32)

    @functools.partial(torch.compile, backend="eager")  # a compiled call does not check values
    def attend(selection):
        return selected_attention(q, k, v, selection, 32, is_causal=is_causal)

    beyond, none = (selection.index_fill(3, torch.tensor([1]), block) for block in (5, -1))
    assert_bitwise_equal(attend(beyond), attend(none))


def test_errors_are_raised_while_compiling():
    compiled = torch.compile(lambda q, k, v: flex_moba(q, k, v, 32, 0), backend="eager")
    with pytest.raises(ValueError, match="topk"):
        compiled(*problem_of(64).tensors())


class Block(nn.Module):
    """Attention as in a model, with projections and strided q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 4, 8)).transpose(1, 3).unbind(2)
        return x + flex_moba(q, k, v, 32, 3).transpose(1, 2).flatten(2)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # an import of torch
def test_inductor_forward_and_backward_at_growing_lengths():
    torch.manual_seed(0)
    block = Block()
    compiled = torch.compile(block, fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for length in LENGTHS[::7]:
        x = torch.randn(2, length, 32)
        results = []
        for function in (compiled, block):
            block.zero_grad()
            out = function(x)
            out.square().mean().backward()
            results.append((out.detach(), block.project.weight.grad.clone()))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
