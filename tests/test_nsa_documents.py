"""Packed documents and padding in Native Sparse Attention: every sequence as if it were alone."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexmoba.nsa import flex_nsa, nsa_reference, nsa_select
from tests.conftest import assert_bitwise_equal
from tests.problems import as_bools
from tests.test_nsa import NAMES, Problem, nsa_of, problems

pytestmark = pytest.mark.usefixtures("small_pieces", "uncompiled_flex")

few = settings(max_examples=8)
self_attention = problems().map(lambda p: replace(p, q_len=p.kv_len))
# Lengths of documents: empty, below a compressed block or a block, and longer.
lengths = st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any)


def listed_blocks(problem: Problem, lengths: list[int]) -> list[tuple[int, int]]:
    """Returns the range of compressed blocks of each sequence, in the list of a row."""
    counts = [
        len(range(0, n - problem.cmp_block + 1, problem.cmp_stride)) if n else 0 for n in lengths
    ]
    return list(itertools.pairwise([0, *itertools.accumulate(counts)]))


def sequence_of(
    tensors: tuple[Tensor, ...], row: int, tokens: Tensor, compressed: tuple[int, int]
) -> tuple[Tensor, ...]:
    """Returns the tensors of one sequence, in the order of `NAMES`."""
    parts = []
    for name, x in zip(NAMES, tensors, strict=True):
        index = torch.arange(*compressed) if name.endswith("_cmp") else tokens
        parts.append(x[row : row + 1].index_select(2, index))
    return tuple(parts)


def assert_each_alone(problem: Problem, rows: list[list[Tensor]], **where: Tensor) -> None:
    """Asserts outputs, log-sum-exps, gradients and selections of sequences, each ``tokens``."""
    tensors = problem.tensors(requires_grad=True)
    out, lse = nsa_of(problem, **where)(*tensors)
    options = problem.blocks | {"scale": problem.scale}
    selection = nsa_select(tensors[0], tensors[4], problem.kv_len, **options, **where)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=generator, dtype=out.dtype)
    grads = torch.autograd.grad((out * upstream).sum() + lse.sigmoid().sum(), tensors)
    expected = [torch.zeros_like(x) for x in tensors]
    real = torch.zeros(problem.batch, problem.kv_len, dtype=torch.bool)
    for row, sequences in enumerate(rows):
        ranges = listed_blocks(problem, [len(x) for x in sequences])
        before = 0
        for tokens, compressed in zip(sequences, ranges, strict=True):
            if len(tokens) == 0:
                continue
            alone = replace(problem, batch=1, q_len=len(tokens), kv_len=len(tokens))
            parts = sequence_of(tensors, row, tokens, compressed)
            own = [x.detach().requires_grad_() for x in parts]
            own_out, own_lse = nsa_of(alone)(*own)
            torch.testing.assert_close(out[row, :, tokens], own_out[0], rtol=0, atol=1e-10)
            torch.testing.assert_close(lse[row, :, tokens], own_lse[0], rtol=0, atol=1e-10)
            loss = (own_out[0] * upstream[row, :, tokens]).sum() + own_lse.sigmoid().sum()
            for total, name, grad in zip(
                expected, NAMES, torch.autograd.grad(loss, own), strict=True
            ):
                index = torch.arange(*compressed) if name.endswith("_cmp") else tokens
                total[row, :, index] = grad[0]
            own_selection = nsa_select(own[0], own[4], len(tokens), **options)
            own_selection = torch.where(own_selection >= 0, own_selection + before, -1)
            assert_bitwise_equal(selection[row, :, tokens], own_selection[0])
            before += alone.n_blocks
            real[row, tokens] = True
    torch.testing.assert_close(grads, tuple(expected), rtol=0, atol=1e-9)
    padding = ~real[:, None].expand(-1, problem.heads, -1)
    assert (out[padding] == 0).all()
    assert (lse[padding] == -torch.inf).all()
    assert (selection[~real[:, None].expand(-1, problem.kv_heads, -1)] == -1).all()


@few
@given(problems(), lengths)
def test_each_document_is_computed_alone(problem, lengths):
    total = sum(lengths)
    problem = replace(problem, batch=1, q_len=total, kv_len=total)
    bounds = [0, *itertools.accumulate(lengths)]
    documents = [torch.arange(*pair) for pair in itertools.pairwise(bounds)]
    assert_each_alone(problem, [documents], cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


@settings(max_examples=5)
@given(problems(), st.lists(st.integers(1, 40), min_size=2, max_size=4))
def test_every_row_has_documents_of_its_own(problem, lengths):
    total = sum(lengths)
    problem = replace(problem, batch=2, q_len=total, kv_len=total)
    rows, ids = [], []
    for order in (lengths, [total - lengths[0], lengths[0]]):
        bounds = [0, *itertools.accumulate(order)]
        rows.append([torch.arange(*pair) for pair in itertools.pairwise(bounds)])
        ids.append(torch.arange(len(order)).repeat_interleave(torch.tensor(order)))
    assert_each_alone(problem, rows, document_ids=torch.stack(ids))


@few
@given(problems(), st.lists(st.integers(1, 60), min_size=2, max_size=4))
def test_documents_by_the_masked_backend(problem, lengths):
    total = sum(lengths)
    problem = replace(problem, batch=2, q_len=total, kv_len=total)
    ids = [
        torch.arange(len(x)).repeat_interleave(torch.tensor(x)) for x in (lengths, lengths[::-1])
    ]
    where = {"document_ids": torch.stack(ids)}
    tensors = problem.tensors()
    with torch.no_grad():
        expected = nsa_of(problem, **where)(*tensors)
        actual = nsa_of(problem, impl="masked", **where)(*tensors)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@few
@given(self_attention, st.sampled_from(("left", "right", "anywhere")), st.integers(0, 2**32 - 1))
def test_padding_changes_nothing(problem, where, seed):
    generator = torch.Generator().manual_seed(seed)
    n_real = torch.randint(problem.kv_len + 1, (problem.batch, 1), generator=generator)
    real = torch.arange(problem.kv_len) < n_real
    if where == "left":
        real = real.flip(1)
    if where == "anywhere":
        real = torch.rand(problem.batch, problem.kv_len, generator=generator) < 0.7
    rows = [[row.nonzero()[:, 0]] for row in real]
    assert_each_alone(problem, rows, key_padding_mask=real)


@few
@given(problems(), lengths, st.booleans())
def test_equals_the_oracle(problem, lengths, named):
    """Tests default keys and values, too, and a selection that names other documents' blocks."""
    total = sum(lengths)
    problem = replace(problem, batch=1, q_len=total, kv_len=total)
    q, k, v, gates, *others = problem.tensors()
    tensors = {"q": q, "k": k, "v": v, "gates": gates}
    if named:
        tensors |= problem.named(others)
    where = {"cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)])}
    n_blocks = sum(-(-n // problem.block_size) for n in lengths)
    every = torch.arange(n_blocks).expand(1, problem.kv_heads, total, -1)
    for selection in (None, every):
        options = problem.options | where | {"selection": selection}
        actual, expected = (f(**tensors, **options) for f in (flex_nsa, nsa_reference))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_the_values_of_padding_and_of_unused_compressed_keys_have_no_effect():
    problem = Problem(batch=2, q_len=150, kv_len=150, block_size=32, topk=4, window=30)
    real = torch.arange(150) < torch.tensor([[150], [100]])
    real[0, 10:40] = False
    tensors = problem.tensors()
    expected = nsa_of(problem, key_padding_mask=real)(*tensors)
    used = torch.arange(problem.n_compressed) < ((real.sum(1) - 32) // 16 + 1)[:, None]
    changed = []
    for name, x in zip(NAMES, tensors, strict=True):
        mask = used if name.endswith("_cmp") else real
        changed.append(x.where(mask[:, None, :, None], torch.nan).requires_grad_())
    actual = nsa_of(problem, key_padding_mask=real)(*changed)
    for x, y in zip(actual, expected, strict=True):
        assert_bitwise_equal(x, y)
    loss = actual[0].square().sum() + actual[1].sigmoid().sum()
    for grad in torch.autograd.grad(loss, changed):
        assert grad.isfinite().all()


@pytest.mark.parametrize("named", [True, False])
def test_documents_do_not_see_one_another(named):
    """Tests NaN in one document, also in compressed blocks between two documents."""
    problem = Problem(q_len=150, kv_len=150, block_size=32, topk=4, window=30)
    where = {"cu_seqlens": torch.tensor([0, 70, 150])}
    tensors = dict(zip(NAMES, problem.tensors(), strict=True))
    tensors = tensors if named else {name: tensors[name] for name in NAMES[:4]}
    expected = flex_nsa(**tensors, **problem.options, **where)
    for other in (slice(0, 70), slice(70, 150)):
        changed = {}
        for name, x in tensors.items():
            index = (slice(0, 3) if other.start == 0 else slice(3, 8)) if "cmp" in name else other
            changed[name] = x.index_fill(2, torch.arange(x.shape[2])[index], torch.nan)
            changed[name].requires_grad_()
        out = flex_nsa(**changed, **problem.options, **where)
        kept = torch.ones(150, dtype=torch.bool)
        kept[other] = False
        assert_bitwise_equal(out[:, :, kept], expected[:, :, kept])
        grads = torch.autograd.grad(out[:, :, kept].square().sum(), list(changed.values()))
        for name, grad in zip(changed, grads, strict=True):
            assert "cmp" in name or grad[:, :, kept].isfinite().all(), name


# The warning refers to code of torch.compile for an autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_compiled_without_a_graph_break():
    problem = Problem(kv_heads=2, q_len=200, kv_len=200, topk=5, block_size=16, window=20)

    def attend(*tensors: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        return nsa_of(problem, cu_seqlens=cu_seqlens)(*tensors)

    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    tensors = problem.tensors(requires_grad=True)
    for bounds in ([0, 90, 200], [0, 13, 200]):
        results = []
        for function in (compiled, attend):
            out, lse = function(*tensors, cu_seqlens=torch.tensor(bounds))
            loss = out.square().sum() + lse.sigmoid().sum()
            results.append((out, lse, *torch.autograd.grad(loss, tensors)))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"cu_seqlens": torch.tensor([0, 99])}, ValueError, "rise from 0 to Lk=100"),
        (
            {"cu_seqlens": torch.tensor([0, 100]), "document_ids": torch.zeros(1, 100).int()},
            ValueError,
            "cu_seqlens and document_ids both define",
        ),
        ({"key_padding_mask": torch.ones(1, 100)}, TypeError, "must be torch.bool"),
    ],
    ids=["bounds", "two", "dtype"],
)
def test_errors(options, error, match):
    tensors = dict(zip(NAMES, Problem().tensors(), strict=True))
    with pytest.raises(error, match=match):
        flex_nsa(**tensors, **options)
    with pytest.raises(error, match=match):
        nsa_select(tensors["q"], tensors["k_cmp"], 100, **options)
    if "cu_seqlens" not in options:
        tensors["q"], tensors["gates"] = tensors["q"][:, :, :9], tensors["gates"][:, :, :9]
        real = {"key_padding_mask": torch.ones(1, 100, dtype=torch.bool)}
        with pytest.raises(NotImplementedError, match="as many queries as keys, got Lq=9"):
            flex_nsa(**tensors, **real)
        with pytest.raises(NotImplementedError, match="as many queries as keys, got Lq=9"):
            nsa_select(tensors["q"], tensors["k_cmp"], 100, **real)


def test_the_selection_is_that_of_the_tokens():
    """Tests that a selection from `nsa_select` gives the same output as the call's own."""
    problem = Problem(q_len=150, kv_len=150, block_size=32, topk=4, window=30)
    tensors = problem.tensors()
    where = {"cu_seqlens": torch.tensor([0, 40, 150])}
    selection = nsa_select(tensors[0], tensors[4], 150, **problem.blocks, **where)
    assert as_bools(selection, 6)[0, 0, 149].tolist() == [False, False, True, True, True, True]
    expected = nsa_of(problem, **where)(*tensors)
    for x, y in zip(nsa_of(problem, **where, selection=selection)(*tensors), expected, strict=True):
        assert_bitwise_equal(x, y)
