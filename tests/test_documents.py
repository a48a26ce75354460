"""Packed documents and padding: every sequence of a row gets the result of a separate call."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest
from torch.utils._python_dispatch import TorchDispatchMode

from flexmoba import flex_moba, moba_reference, moba_select, selected_attention
from tests.conftest import assert_bitwise_equal, with_lse
from tests.problems import Problem, problems
from tests.test_errors import assert_raises

pytestmark = pytest.mark.usefixtures("small_pieces")

few = settings(max_examples=20)
self_attention = problems().map(lambda p: replace(p, q_len=p.kv_len))
doubles = self_attention.map(lambda p: replace(p, dtype=torch.float64))


def bounds_of(problem: Problem, count: int) -> list[int]:
    """Draws the boundaries of ``count`` documents, some of them empty."""
    inner = torch.randint(problem.kv_len + 1, (count - 1,), generator=problem.generator())
    return [0, *inner.sort().values.tolist(), problem.kv_len]


def ids_of(bounds: list[int]) -> Tensor:
    """Returns the document ids of one row, counted from 0."""
    lengths = torch.tensor(bounds).diff()
    return torch.arange(len(lengths)).repeat_interleave(lengths)[None]


def assert_like_the_oracle(problem: Problem, inputs: tuple[Tensor, ...], **where: Tensor) -> None:
    """Asserts that output and gradients equal the oracle's, in float64."""
    args = (problem.block_size, problem.topk)
    causal = {"is_causal": problem.is_causal}
    out = flex_moba(*inputs, *args, **where, **causal)
    expected = moba_reference(*inputs, *args, **where, **causal)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn(out.shape, generator=problem.generator(), dtype=out.dtype)
    grads = torch.autograd.grad(out, inputs, upstream)
    expected = torch.autograd.grad(expected, inputs, upstream)
    torch.testing.assert_close(grads, expected)


@few
@given(doubles, st.integers(1, 9))
def test_documents_and_their_gradients_are_the_oracles(problem, count):
    problem = replace(problem, batch=1)
    inputs = problem.tensors(requires_grad=True)
    bounds = bounds_of(problem, count)
    assert_like_the_oracle(problem, inputs, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


@few
@given(doubles, st.integers(1, 9))
def test_every_row_has_documents_of_its_own(problem, count):
    inputs = problem.tensors(requires_grad=True)
    rows = [ids_of(bounds_of(replace(problem, seed=i), count)) for i in range(problem.batch)]
    assert_like_the_oracle(problem, inputs, document_ids=torch.cat(rows))


@few
@given(self_attention, st.integers(2, 9))
def test_documents_are_blind_to_each_other(problem, count):
    problem = replace(problem, batch=1)
    q, k, v = problem.tensors()
    bounds = bounds_of(problem, count)
    options = {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}
    options["is_causal"] = problem.is_causal
    attend = with_lse(flex_moba, problem.block_size, problem.topk, **options)
    start, end = bounds[count // 2], bounds[count // 2 + 1]
    others = torch.ones(problem.kv_len, dtype=torch.bool)
    others[start:end] = False
    changed = [torch.where(others[:, None], x, 3 - 2 * x) for x in (q, k, v)]
    for actual, expected in zip(attend(*changed), attend(q, k, v), strict=True):
        assert_bitwise_equal(actual[:, :, others], expected[:, :, others])


@few
@given(doubles, st.integers(1, 9))
def test_blocks_are_counted_over_all_documents_of_a_row(problem, count):
    problem = replace(problem, batch=1)
    q, k, v = problem.tensors()
    bounds = bounds_of(problem, count)
    args, causal = (problem.block_size, problem.topk), {"is_causal": problem.is_causal}
    where = {"cu_seqlens": torch.tensor(bounds)} | causal
    selection = moba_select(q, k, *args, **where)
    before = 0
    for start, end in itertools.pairwise(bounds):
        alone = moba_select(q[:, :, start:end], k[:, :, start:end], *args, **causal)
        expected = torch.where(alone >= 0, alone + before, -1)
        assert_bitwise_equal(selection[:, :, start:end], expected)
        before += -(-(end - start) // problem.block_size)
    out = selected_attention(q, k, v, selection, problem.block_size, **where)
    torch.testing.assert_close(out, flex_moba(q, k, v, *args, **where))
    everything = torch.arange(before, dtype=torch.int32).expand(*q.shape[:3], -1)
    out = selected_attention(q, k, v, everything, problem.block_size, **where)
    torch.testing.assert_close(out, flex_moba(q, k, v, problem.block_size, None, **where))


@few
@given(doubles)
def test_blocks_are_counted_from_the_first_real_token(problem):
    q, k, v = problem.tensors()
    start = problem.kv_len // 2
    where = {"key_padding_mask": (torch.arange(problem.kv_len) >= start).repeat(problem.batch, 1)}
    args, causal = (problem.block_size, problem.topk), {"is_causal": problem.is_causal}
    where |= causal
    selection = moba_select(q, k, *args, **where)
    assert (selection[:, :, :start] == -1).all()
    alone = moba_select(q[:, :, start:], k[:, :, start:], *args, **causal)
    assert_bitwise_equal(selection[:, :, start:], alone)
    attend = with_lse(selected_attention, selection, problem.block_size, **where)
    expected = with_lse(flex_moba, *args, **where)(q, k, v)
    torch.testing.assert_close(attend(q, k, v), expected)


@pytest.mark.parametrize("gate", ["token", "group", "tile"])
def test_full_attention_scores_no_blocks(gate, monkeypatch):
    monkeypatch.setattr("flexmoba.gate.select.top_blocks_in_pieces", None)
    q, k, v = Problem(kv_heads=2, group=2, q_len=700, kv_len=700).tensors()
    options = {"gate": gate, "sink_blocks": 1, "cu_seqlens": torch.tensor([0, 0, 270, 271, 700])}
    out = flex_moba(q, k, v, 128, None, **options)
    torch.testing.assert_close(out, moba_reference(q, k, v, 128, None, **options))


def test_thousands_of_documents():
    problem = Problem(q_len=5000, kv_len=5000, block_size=4, topk=2)
    inputs = problem.tensors(requires_grad=True)
    bounds = bounds_of(problem, 3000)  # many of them empty or of one token
    lengths = torch.tensor(bounds).diff()
    assert (lengths == 0).any()
    assert (lengths == 1).any()
    assert_like_the_oracle(problem, inputs, cu_seqlens=torch.tensor(bounds))


@few
@given(doubles, st.data())
def test_padding_changes_nothing(problem, data):
    q, k, v = problem.tensors()
    length = problem.kv_len
    real = torch.zeros(problem.batch, length, dtype=torch.bool)
    spans = []
    for row in real:
        start = data.draw(st.integers(0, length))
        spans.append((start, data.draw(st.integers(start, length))))
        row[slice(*spans[-1])] = True
    hidden = ~real[:, None, :, None]
    inputs = [x.masked_fill(hidden, bad) for x, bad in zip((q, k, v), (2.0, 3.0, 4.0), strict=True)]
    inputs = [x.requires_grad_() for x in inputs]
    args = (problem.block_size, problem.topk)
    out, lse = with_lse(flex_moba, *args, key_padding_mask=real)(*inputs)
    grads = torch.autograd.grad(out.sum() + lse.where(lse.isfinite(), 0.0).sum(), inputs)
    for b, (start, end) in enumerate(spans):
        for x in (out, *grads):
            assert not x[b, :, ~real[b]].any()
        assert (lse[b, :, ~real[b]] == float("-inf")).all()
        if start < end:
            alone = [x.detach()[b : b + 1, :, start:end] for x in inputs]
            expected = with_lse(flex_moba, *args)(*alone)
            torch.testing.assert_close(out[b : b + 1, :, start:end], expected[0])
            torch.testing.assert_close(lse[b : b + 1, :, start:end], expected[1])


def holes_of(problem: Problem, share: float) -> Tensor:
    """Draws a mask ``(B, Lk)`` with padding anywhere; of several rows, the last is all padding."""
    real = torch.rand(problem.batch, problem.kv_len, generator=problem.generator()) >= share
    real[1:][-1:] = False
    return real


@few
@given(doubles, st.sampled_from([0.1, 0.5, 0.9]))
def test_the_real_tokens_of_a_row_are_its_sequence(problem, share):
    q, k, v = problem.tensors()
    real = holes_of(problem, share)
    args, where = (problem.block_size, problem.topk), {"key_padding_mask": real}
    causal = {"is_causal": problem.is_causal}
    out, lse = with_lse(flex_moba, *args, **where, **causal)(q, k, v)
    selection = moba_select(q, k, *args, **where, **causal)
    for b, row in enumerate(real):
        alone = [x[b : b + 1, :, row] for x in (q, k, v)]
        expected = with_lse(flex_moba, *args, **causal)(*alone)
        torch.testing.assert_close(out[b : b + 1, :, row], expected[0])
        torch.testing.assert_close(lse[b : b + 1, :, row], expected[1])
        picked = moba_select(*alone[:2], *args, **causal)
        assert_bitwise_equal(selection[b : b + 1, :, row], picked)
        assert not out[b, :, ~row].any()
        assert (lse[b, :, ~row] == -torch.inf).all()


@few
@given(doubles, st.sampled_from([0.1, 0.5, 0.9]))
def test_padding_may_hold_anything(problem, share):
    q, k, v = problem.tensors()
    real = holes_of(problem, share)
    args = (problem.block_size, problem.topk)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert_like_the_oracle(problem, tuple(inputs), key_padding_mask=real)
    results = []
    for bad in (0.0, float("nan"), float("inf")):
        inputs = [x.detach().masked_fill(~real[:, None, :, None], bad) for x in (q, k, v)]
        inputs = [x.requires_grad_() for x in inputs]
        out = flex_moba(*inputs, *args, key_padding_mask=real)
        results.append((out, *torch.autograd.grad(out.sum(), inputs)))
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            assert_bitwise_equal(actual, expected)


@pytest.mark.parametrize("impl", ["portable", "masked"])
def test_implementations_agree(impl):
    problem = Problem(
        kv_heads=2, group=2, q_len=300, kv_len=300, block_size=32, topk=3, head_dim=16
    )
    q, k, v = problem.tensors()
    q, k, v = q.float(), k.float(), v.float()
    for where in (
        {"cu_seqlens": torch.tensor([0, 7, 7, 8, 205, 300], dtype=torch.int32)},
        {"document_ids": ids_of([0, 7, 8, 205, 300])},
        {"key_padding_mask": (torch.arange(300) >= 37)[None]},
    ):
        # Blocks of 100 keys are longer than most documents, so the documents stay in place. All
        # pairs of two of these options occur.
        for size, topk, is_causal in (
            *((32, 2, True), (32, None, False)),
            *((100, 2, False), (100, None, True)),
        ):
            options = where | {"is_causal": is_causal}
            out, lse = with_lse(flex_moba, size, topk, impl=impl, **options)(q, k, v)
            torch.testing.assert_close(out, moba_reference(q, k, v, size, topk, **options))
            other = with_lse(flex_moba, size, topk, impl="portable", **options)
            torch.testing.assert_close(lse, other(q.double(), k.double(), v.double())[1].float())
            if topk is not None:
                selection = moba_select(q, k, size, topk, **options)
                attend = with_lse(selected_attention, selection, size, impl=impl, **options)
                for actual, expected in zip(attend(q, k, v), (out, lse), strict=True):
                    torch.testing.assert_close(actual, expected)


# The warning refers to code of torch.compile for an autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["cu_seqlens", "key_padding_mask"])
def test_compiles_to_one_graph(name):
    problem = Problem(q_len=70, kv_len=70, block_size=8, topk=3)
    inputs = problem.tensors(requires_grad=True)
    where = {
        "cu_seqlens": torch.tensor([0, 3, 40, 70], dtype=torch.int32),
        "key_padding_mask": (torch.arange(70) >= 9)[None],
    }[name]

    def attend(q: Tensor, k: Tensor, v: Tensor, where: Tensor) -> Tensor:
        return flex_moba(q, k, v, 8, 3, **{name: where})

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*inputs, where), attend(*inputs, where)
    assert_bitwise_equal(out, expected)
    grads = (torch.autograd.grad(x.sum(), inputs) for x in (out, expected))
    for actual, eager in zip(*grads, strict=True):
        assert_bitwise_equal(actual, eager)


@few
@given(doubles.map(lambda p: replace(p, is_causal=True)), st.integers(2, 9), st.booleans())
def test_scores_of_documents_in_place_may_be_modified(problem, count, ids):
    problem = replace(problem, batch=1, block_size=max(problem.block_size, problem.kv_len // 3))
    inputs = problem.tensors(requires_grad=True)
    bounds = bounds_of(problem, count)
    where = {"document_ids": ids_of(bounds)} if ids else {"cu_seqlens": torch.tensor(bounds)}

    def bias(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score * (1 + h) + (query - key) / 7 + key % 3

    assert_like_the_oracle(problem, inputs, score_mod=bias, **where)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *(x.numel() for x in tensors)])
        return result


@pytest.mark.parametrize("attends", [True, False])
@pytest.mark.parametrize("topk", [2, 5])
def test_documents_take_memory_for_their_tokens(topk, attends):
    length, dim = 2048, 16
    q, k, v = Problem(q_len=length, kv_len=length, head_dim=dim, value_dim=dim).tensors()
    inputs = [x.float().requires_grad_() for x in (q, k, v)]
    # The last document has past blocks, so that the call is not full attention.
    bounds = torch.tensor([*range(0, 1024, 8), 1024, 2048])
    with Largest() as largest:
        if attends:
            out = flex_moba(*inputs, 256, topk, cu_seqlens=bounds)
            torch.autograd.grad(out.sum(), inputs)
        else:
            moba_select(*inputs[:2], 256, topk, cu_seqlens=bounds)
    # A piece of scores has a constant size. If every document began a block, there would be 133
    # blocks instead of 8.
    assert largest.elements <= 2 * length * dim * topk


def test_full_attention_by_the_longest_document():
    problem = Problem(q_len=90, kv_len=90, kv_heads=2)
    q, k, v = problem.tensors()
    bounds = torch.tensor([0, 20, 50, 90])
    for longest in (40, 41, 1000):
        out = flex_moba(q, k, v, 20, 2, cu_seqlens=bounds, max_seqlen=longest)
        assert_bitwise_equal(out, flex_moba(q, k, v, 20, None, cu_seqlens=bounds))
    attend = torch.compile(flex_moba, fullgraph=True, backend="eager")
    out = attend(q, k, v, 20, 2, cu_seqlens=bounds, max_seqlen=40)
    torch.testing.assert_close(out, flex_moba(q, k, v, 20, None, cu_seqlens=bounds))
    with pytest.raises(RuntimeError, match="longer than max_seqlen"):
        attend(q, k, v, 20, 2, cu_seqlens=bounds, max_seqlen=39)


X = torch.zeros(2, 1, 6, 4)
ONE = X[:1]
CU, IDS = torch.tensor([0, 2, 6]), torch.zeros(2, 6, dtype=torch.int64)
REAL = torch.ones(2, 6, dtype=torch.bool)
BAD = {
    "two": (X, {"document_ids": IDS, "key_padding_mask": REAL}, ValueError, ("document_ids and",)),
    "list": (ONE, {"cu_seqlens": [0, 6]}, TypeError, ("cu_seqlens", "list")),
    "float": (ONE, {"cu_seqlens": CU.float()}, TypeError, ("cu_seqlens", "float32", "int32")),
    "int mask": (X, {"key_padding_mask": IDS}, TypeError, ("key_padding_mask", "int64", "bool")),
    "batch": (X, {"cu_seqlens": CU}, ValueError, ("cu_seqlens", "batch of 2", "document_ids")),
    "shape": (X, {"document_ids": IDS[:1]}, ValueError, ("document_ids", r"\(2, 6\)", r"\(1, 6\)")),
    "end": (ONE, {"cu_seqlens": CU - 1}, ValueError, ("cu_seqlens", "Lk=6", "-1 to 5")),
    "falling": (ONE, {"cu_seqlens": CU[[0, 2, 1, 2]]}, ValueError, ("cu_seqlens", "-4")),
    "device": (X, {"document_ids": IDS.to("meta")}, ValueError, ("document_ids", "cpu", "meta")),
    "no longest": (X, {"max_seqlen": 6}, ValueError, ("max_seqlen=6", "cu_seqlens")),
    "longer": (
        ONE,
        {"cu_seqlens": CU, "max_seqlen": 3},
        ValueError,
        ("max_seqlen=3", "4 tokens", "omit max_seqlen"),
    ),
    "longest by ids": (
        X,
        {"document_ids": IDS, "max_seqlen": 5},
        ValueError,
        ("max_seqlen=5", "6 tokens"),
    ),
    "longest is no int": (
        ONE,
        {"cu_seqlens": CU, "max_seqlen": torch.tensor(4)},
        TypeError,
        ("max_seqlen", "Tensor"),
    ),
}


@pytest.mark.parametrize(("x", "options", "error", "fragments"), BAD.values(), ids=BAD)
def test_bad_calls(x, options, error, fragments):
    assert_raises(error, fragments, lambda: flex_moba(x, x, x, 2, 2, **options))


def test_fewer_queries_than_keys():
    for where in ({"document_ids": IDS}, {"key_padding_mask": REAL}):
        fragments = (*where, "Lq=5", "Lk=6")
        attend = lambda where=where: flex_moba(X[:, :, 1:], X, X, 2, 2, **where)  # noqa: E731
        assert_raises(NotImplementedError, fragments, attend)


def test_nothing_at_all():
    nothing = torch.zeros(1, 2, 0, 4)
    aux = AuxRequest(lse=True)
    out, _ = flex_moba(nothing, nothing, nothing, 2, 2, cu_seqlens=CU[[0, 0]], return_aux=aux)
    assert out.shape == nothing.shape
    assert moba_select(nothing, nothing, 2, 2, cu_seqlens=CU[[0, 0]]).shape == (1, 2, 0, 2)
