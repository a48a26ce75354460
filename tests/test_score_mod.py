"""`score_mod`: every backend passes the same indices to it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import AuxRequest

from flexmoba import MobaCache, flex_moba, moba_reference, moba_select, selected_attention
from flexmoba.backends.flex.routed import routed_attention
from flexmoba.backends.options import AttentionOptions
from flexmoba.backends.score_mod import score_modifier
from flexmoba.reference import reference_attention
from flexmoba.selection import BlockSelection
from tests.conftest import assert_bitwise_equal
from tests.problems import Problem, problems
from tests.test_errors import assert_raises
from tests.test_tiles import dense_flex

pytestmark = pytest.mark.usefixtures("small_pieces")

few = settings(max_examples=15)
doubles = problems(dtype=st.just(torch.float64))


def softcap(score, b, h, q_idx, kv_idx):
    return 2 * torch.tanh(score / 2)


def by_index(score, b, h, q_idx, kv_idx):
    """Adds a bounded value that differs for every pair."""
    return score + torch.sin(5 * b + 3 * h + 0.7 * q_idx - 0.3 * kv_idx)


def biased(bias: Tensor, offset: int = 500):
    """Adds a learned bias ``(heads, 2 * offset)`` by head and distance."""

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + bias[h, q_idx - kv_idx + offset]

    return score_mod


def looked_up(problem: Problem):
    """Adds the entry of a table for each pair; an index beyond the table would raise."""
    shape = (problem.batch, problem.heads, problem.kv_len, problem.kv_len)
    table = torch.randn(shape, generator=problem.generator(), dtype=torch.float64)
    return lambda score, b, h, q_idx, kv_idx: score + table[b, h, q_idx, kv_idx]


MODS = pytest.mark.parametrize("score_mod", [softcap, by_index], ids=lambda f: f.__name__)


@MODS
@few
@given(doubles)
def test_output_and_gradients_agree_with_the_oracle(score_mod, problem):
    inputs = problem.tensors(requires_grad=True)
    options = {"is_causal": problem.is_causal, "score_mod": score_mod}
    args = (problem.block_size, problem.topk)
    out = flex_moba(*inputs, *args, **options)
    expected = moba_reference(*inputs, *args, **options)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn(out.shape, generator=problem.generator(), dtype=out.dtype)
    grads = torch.autograd.grad(out, inputs, upstream)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, inputs, upstream))


@few
@given(doubles)
def test_any_selection_and_the_log_sum_exp(problem):
    q, k, v = problem.tensors()
    selection = problem.selection()
    options = {"is_causal": problem.is_causal, "score_mod": by_index}
    args = (q, k, v, selection, problem.block_size)
    out, aux = selected_attention(*args, **options, return_aux=AuxRequest(lse=True))
    mask = problem.mask_of(selection)
    expected, lse = reference_attention(q, k, v, mask, score_mod=by_index)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(aux.lse, lse)


@few
@given(doubles)
def test_captured_tensors_get_gradients(problem):
    q, k, v = problem.tensors()
    bias = torch.randn(problem.heads, 1000, generator=problem.generator(), dtype=torch.float64)
    bias.requires_grad_()
    args, causal = (problem.block_size, problem.topk), {"is_causal": problem.is_causal}
    out = flex_moba(q, k, v, *args, **causal, score_mod=biased(bias))
    expected = moba_reference(q, k, v, *args, **causal, score_mod=biased(bias))
    torch.testing.assert_close(out, expected)
    grads = (torch.autograd.grad(x.square().sum(), bias) for x in (out, expected))
    torch.testing.assert_close(*grads)


def test_many_tiles_are_processed_in_pieces(monkeypatch):
    problem = Problem(group=2, q_len=700, kv_len=700, block_size=32, topk=4)
    inputs = problem.tensors(requires_grad=True)
    results = []
    for scores in (24 * 128 * 512, 128 * 32 * 3):
        monkeypatch.setattr("flexmoba.backends.portable.modified_scores._SCORES_AT_ONCE", scores)
        out = flex_moba(*inputs, 32, 4, score_mod=by_index)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("topk", [2, None])
@pytest.mark.parametrize("q_len", [300, 190])
def test_masked(topk, q_len):
    problem = Problem(
        batch=2, kv_heads=2, group=2, q_len=q_len, kv_len=300, block_size=130,
        head_dim=16, value_dim=16, dtype=torch.float32,
    )  # fmt: skip
    q, k, v = problem.tensors()
    expected = moba_reference(q, k, v, 130, topk, score_mod=by_index)
    out = flex_moba(q, k, v, 130, topk, score_mod=by_index, impl="masked")
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("q_len", [300, 190])
def test_routed(pieces, q_len, monkeypatch):
    problem = Problem(
        batch=2, kv_heads=2, group=2, q_len=q_len, kv_len=300, block_size=130, head_dim=16,
        value_dim=16, dtype=torch.float32,
    )  # fmt: skip
    monkeypatch.setattr("flexmoba.backends.flex.routed.call_flex", dense_flex)
    monkeypatch.setattr(
        "flexmoba.backends.flex.routed.run_compiled", lambda f, *x, **static: f(*x, **static)
    )
    if pieces:
        monkeypatch.setattr("flexmoba.backends.flex.routed._MAX_ELEMENTS", 128 * 16 * 5)
    inputs = problem.tensors(requires_grad=True)
    past = moba_select(*inputs[:2], 130, 2)[..., 1:]
    modifier = score_modifier(by_index, *inputs[:2], None)
    selected, options = BlockSelection(past, 130), AttentionOptions("routed", 0.25)
    out, _ = routed_attention(*inputs, selected, options, modifier)
    expected = moba_reference(*inputs, 130, 2, score_mod=by_index)
    torch.testing.assert_close(out, expected)
    grads = (torch.autograd.grad(x.square().sum(), inputs) for x in (out, expected))
    torch.testing.assert_close(*grads)


@few
@given(doubles, st.integers(1, 5))
def test_documents_pass_the_positions_of_the_row(problem, count):
    problem = replace(problem, batch=1, q_len=problem.kv_len, is_causal=True)
    inputs = problem.tensors(requires_grad=True)
    inner = torch.randint(problem.kv_len + 1, (count - 1,), generator=problem.generator())
    bounds = torch.tensor([0, *inner.sort().values.tolist(), problem.kv_len])
    options = {"cu_seqlens": bounds, "score_mod": by_index}
    args = (problem.block_size, problem.topk)
    out = flex_moba(*inputs, *args, **options)
    expected = moba_reference(*inputs, *args, **options)
    torch.testing.assert_close(out, expected)
    grads = (torch.autograd.grad(x.square().sum(), inputs) for x in (out, expected))
    torch.testing.assert_close(*grads)


def test_queries_whose_scores_are_all_masked():
    def masked(score, b, h, q_idx, kv_idx):
        return torch.where(q_idx < 10, float("-inf"), score)

    problem = Problem(q_len=40, kv_len=40)
    inputs = problem.tensors(requires_grad=True)
    out, aux = flex_moba(*inputs, 8, 2, score_mod=masked, return_aux=AuxRequest(lse=True))
    assert not out[:, :, :10].any()
    assert (aux.lse[:, :, :10] == float("-inf")).all()
    grads = torch.autograd.grad(out.square().sum(), inputs)
    assert all(x.isfinite().all() for x in grads)
    assert not grads[0][:, :, :10].any()


def test_masked_values_have_no_effect():
    problem = Problem(q_len=40, kv_len=40)
    q, k, v = problem.tensors()
    out = flex_moba(q, k, v, 8, 2, score_mod=softcap)
    v[:, :, 30] = float("nan")
    assert_bitwise_equal(flex_moba(q, k, v, 8, 2, score_mod=softcap)[:, :, :30], out[:, :, :30])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
def test_inside_torch_compile():
    torch._dynamo.reset()
    problem = Problem(group=2, q_len=100, kv_len=100, block_size=16)
    inputs = problem.tensors(requires_grad=True)
    bias = torch.randn(2, 1000, dtype=torch.float64, requires_grad=True)

    def attend(q, k, v):
        return flex_moba(q, k, v, 16, 2, score_mod=biased(bias))

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    results = []
    for function in (attend, compiled):
        out = function(*inputs)
        results.append((out, *torch.autograd.grad(out.square().sum(), (*inputs, bias))))
    torch.testing.assert_close(*results)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
@pytest.mark.parametrize("packed", [False, True], ids=["alone", "documents"])
def test_many_lengths_compile_a_few_times(packed):
    torch._dynamo.reset()
    counter = CompileCounter()

    def attend(q, k, v, cu_seqlens):
        return flex_moba(q, k, v, 16, 2, score_mod=softcap, cu_seqlens=cu_seqlens)

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for length in range(60, 400, 37):
        q, k, v = Problem(group=2, q_len=length, kv_len=length).tensors(requires_grad=True)
        bounds = torch.tensor([0, *range(5, length, 70), length]) if packed else None
        results = []
        for function in (attend, compiled):
            out = function(q, k, v, bounds)
            results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
        torch.testing.assert_close(*results)
    assert counter.frame_count <= 4
    torch._dynamo.reset()


def test_autocast_changes_nothing():
    problem = Problem(q_len=100, kv_len=100, head_dim=16, block_size=8, dtype=torch.float32)
    results = []
    for enabled in (False, True):
        inputs = problem.tensors(requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = flex_moba(*inputs, 8, 3, score_mod=softcap)
        results.append((out, *torch.autograd.grad(out.sum(), inputs)))
    for first, second in zip(*results, strict=True):
        assert_bitwise_equal(first, second)


def test_shapes_without_values():
    q, k, v = (x.to("meta") for x in Problem(value_dim=5).tensors())
    assert flex_moba(q, k, v, 4, 2, score_mod=softcap).shape == (1, 1, 24, 5)


def test_errors():
    q, k, v = Problem().tensors()
    assert_raises(
        TypeError, ("score_mod", "kv_idx", "int"), lambda: flex_moba(q, k, v, 4, 2, score_mod=3)
    )


@few
@given(problems(dtype=st.just(torch.float64), is_causal=st.just(True)), st.data())
def test_a_cache_passes_the_same_indices(problem, data):
    problem = replace(problem, q_len=problem.kv_len)
    tensors = problem.tensors()
    args = (problem.block_size, problem.topk)
    cache = MobaCache(
        *(problem.batch, problem.kv_heads, problem.head_dim),
        value_dim=problem.value_dim, block_size=problem.block_size, dtype=problem.dtype,
    )  # fmt: skip
    score_mod = looked_up(problem)
    expected = moba_reference(*tensors, *args, score_mod=score_mod)
    start = 0
    while start < problem.kv_len:
        size = data.draw(st.sampled_from([1, 3, 17, 40]))
        chunk = [x[:, :, start : start + size] for x in tensors]
        out = flex_moba(*chunk, *args, cache=cache, score_mod=score_mod)
        torch.testing.assert_close(out, expected[:, :, start : start + size])
        start += size


@pytest.mark.parametrize("n", [2, 20])
def test_rows_of_a_cache_have_their_own_batch_index(n):
    problem = Problem(batch=2, group=2, q_len=60, kv_len=60)
    q, k, v = problem.tensors()
    cache = MobaCache(2, 1, 8, block_size=4, dtype=torch.float64)
    real = torch.arange(60 - n) >= torch.tensor([[0], [7]])
    cache.append(k[:, :, :-n], v[:, :, :-n], real)
    positions = cache.append(k[:, :, -n:], v[:, :, -n:])
    out, lse = cache.attend(q[:, :, -n:], positions, 3, score_mod=by_index)
    for row, start in enumerate((0, 7)):
        alone = (x[row : row + 1, :, start:] for x in (q, k, v))

        def of_row(score, b, h, q_idx, kv_idx, row=row):
            return by_index(score, b + row, h, q_idx, kv_idx)

        expected = moba_reference(*alone, 4, 3, score_mod=of_row)
        torch.testing.assert_close(out[row : row + 1], expected[:, :, -n:])
    assert lse.isfinite().all()


def test_a_step_with_a_cache_compiles():
    torch._dynamo.reset()
    q, k, v = Problem(q_len=40, kv_len=40).tensors()
    expected = flex_moba(q, k, v, 4, 3, score_mod=softcap)
    cache = MobaCache(1, 1, 8, block_size=4, max_len=60, dtype=torch.float64)

    def step(q, k, v):
        return flex_moba(q, k, v, 4, 3, cache=cache, score_mod=softcap)

    step(*(x[:, :, :38] for x in (q, k, v)))
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for i in (38, 39):
        out = compiled(*(x[:, :, i : i + 1] for x in (q, k, v)))
        torch.testing.assert_close(out, expected[:, :, i : i + 1])
    with pytest.raises(torch._dynamo.exc.Unsupported, match="reads lengths back"):
        compiled(q[:, :, :20], k[:, :, :20], v[:, :, :20])
    torch._dynamo.reset()


class Bias(torch.nn.Module):
    """A table in float64, the default dtype of NumPy."""

    def __init__(self):
        super().__init__()
        self.register_buffer("slopes", torch.tensor([0.5, 0.25], dtype=torch.float64))

    def forward(self, score, b, h, q_idx, kv_idx):
        return score - self.slopes[h] * (q_idx - kv_idx)


# torch.compile causes the first warning when it traces an autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("impl", ["portable", "masked"])
def test_a_module_of_another_dtype(impl):
    problem = Problem(kv_heads=2, q_len=40, kv_len=40, dtype=torch.float32)
    inputs, bias = problem.tensors(), Bias()
    expected = moba_reference(*inputs, 4, 2, score_mod=bias)
    out = flex_moba(*inputs, 4, 2, score_mod=bias, impl=impl)
    torch.testing.assert_close(out, expected)
    if impl == "portable":
        compiled = torch.compile(flex_moba, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs, 4, 2, score_mod=bias), expected)
        cache = MobaCache(1, 2, 8, block_size=4)
        chunks = [
            flex_moba(*(x[:, :, i:j] for x in inputs), 4, 2, score_mod=bias, cache=cache)
            for i, j in ((0, 30), (30, 33), (33, 40))
        ]
        torch.testing.assert_close(torch.cat(chunks, 2), expected)


WRONG = {
    "few arguments": (lambda score, b, h: score, TypeError, r"takes \(score, b, h\)"),
    "many": (lambda score, b, h, q, k, more: score, TypeError, "takes .*more"),
    "none": (lambda *x: None, TypeError, "NoneType"),
    "mask": (lambda score, b, h, q, k: q >= k, TypeError, "torch.bool"),
    "shape": (lambda score, b, h, q, k: score[None].expand(2), ValueError, r"\(2,\)"),
}


@pytest.mark.parametrize(("score_mod", "error", "match"), WRONG.values(), ids=WRONG)
def test_wrong_functions_are_errors(score_mod, error, match):
    inputs = Problem().tensors()
    with pytest.raises(error, match=f"score_mod must .*{match}"):
        flex_moba(*inputs, 4, 2, score_mod=score_mod)
    with pytest.raises(error, match=f"score_mod must .*{match}"):
        flex_moba(
            *inputs,
            4,
            2,
            score_mod=score_mod,
            cache=MobaCache(1, 1, 8, block_size=4, dtype=torch.float64),
        )
