"""Errors: the type of the exception, and a message that names values and remedy.

Also inputs that are unusual but valid: empty tensors, NaN and infinity.
"""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest

from flexmoba import flex_moba, moba_block_mask, moba_select, selected_attention
from tests.conftest import assert_bitwise_equal, with_lse
from tests.problems import DTYPES, Problem, problems


def queries(*shape: int, **options) -> Tensor:
    return torch.zeros(*(shape or (2, 4, 10, 8)), **options)


def keys(*shape: int, **options) -> Tensor:
    return torch.zeros(*(shape or (2, 2, 12, 8)), **options)


def assert_raises(error: type[Exception], fragments: tuple[str, ...], call: Callable) -> None:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    for fragment in fragments:
        assert re.search(fragment, str(caught.value)), f"{fragment!r} in: {caught.value}"


NUMBER = r"(?<!\d){}(?!\d)".format

# Arguments that replace those of a valid call, the exception, and patterns of its message.
BAD_TENSORS = {
    "q of rank 3": ({"q": queries(4, 10, 8)}, ValueError, ("q ", r"\(4, 10, 8\)", "unsqueeze")),
    "k of rank 5": ({"k": keys(1, 2, 2, 12, 8)}, ValueError, ("k ", r"\(1, 2, 2, 12, 8\)")),
    "q not a tensor": ({"q": [1.0]}, TypeError, ("q ", "list")),
    "batch": ({"q": queries(3, 4, 10, 8)}, ValueError, ("batch", NUMBER(3), NUMBER(2))),
    "head dim": ({"q": queries(2, 4, 10, 16)}, ValueError, ("head dim", NUMBER(16), NUMBER(8))),
    "no head dim": ({"q": queries(2, 4, 10, 0)}, ValueError, ("head dim", NUMBER(0))),
    "groups": ({"q": queries(2, 5, 10, 8)}, ValueError, ("head", NUMBER(5), NUMBER(2), "multiple")),
    "no heads": ({"q": queries(2, 0, 10, 8)}, ValueError, ("head", NUMBER(0))),
    "(B, L, H, D)": (
        {"q": queries(2, 10, 4, 8), "k": keys(2, 12, 2, 8), "v": keys(2, 12, 2, 8)},
        ValueError,
        (NUMBER(10), NUMBER(12), "transpose"),
    ),
    "more queries than keys": (
        {"q": queries(2, 4, 13, 8)},
        ValueError,
        ("quer", NUMBER(13), NUMBER(12)),
    ),
    "integers": (
        {"q": queries(dtype=torch.int64)},
        TypeError,
        ("q ", "int64", "float32", "bfloat16"),
    ),
    "complex": ({"k": keys(dtype=torch.complex64)}, TypeError, ("k ", "complex64", "float32")),
    "mixed dtypes": (
        {"k": keys(dtype=torch.bfloat16)},
        ValueError,
        ("q ", "k ", "dtype", "float32", "bfloat16", r"\.to\("),
    ),
    "devices": ({"k": keys(device="meta")}, ValueError, ("k", "device", "cpu", "meta", r"\.to\(")),
}
BAD_VALUES = {
    "v of rank 2": ({"v": keys(12, 8)}, ValueError, ("v ", r"\(12, 8\)")),
    "v not a tensor": ({"v": None}, TypeError, ("v ", "NoneType")),
    "length of v": ({"v": keys(2, 2, 11, 8)}, ValueError, ("k", "v", "length", "12", "11")),
    "heads of v": ({"v": keys(2, 1, 12, 8)}, ValueError, ("k", "v", "heads", NUMBER(1))),
    "batch of v": ({"v": keys(1, 2, 12, 8)}, ValueError, ("k", "v", "batch", NUMBER(1))),
    "no value dim": ({"v": keys(2, 2, 12, 0)}, ValueError, ("v ", "head dim", NUMBER(0))),
    "dtype of v": (
        {"v": keys(dtype=torch.float16)},
        ValueError,
        ("v ", "dtype", "float32", "float16", r"\.to\("),
    ),
    "device of v": ({"v": keys(device="meta")}, ValueError, ("v", "device", "cpu", "meta")),
}
BAD_BLOCK_SIZES = {
    f"block_size {value!r}": ({"block_size": value}, error, ("block_size", fragment))
    for value, error, fragment in (
        (0, ValueError, NUMBER(0)),
        (-4, ValueError, "-4"),
        (4.0, TypeError, r"4\.0.*float"),
        (True, TypeError, "True.*bool"),
        ("4", TypeError, "'4'.*str"),
        (None, TypeError, "None"),
    )
}
BAD_TOPKS = {
    f"topk {value!r}": ({"topk": value}, error, ("topk", fragment))
    for value, error, fragment in (
        (0, ValueError, NUMBER(0)),
        (-1, ValueError, "-1"),
        (2.5, TypeError, r"2\.5.*float"),
        (False, TypeError, "False.*bool"),
        ([2], TypeError, r"\[2\].*list"),
    )
}
BAD_OPTIONS = {
    "impl": ({"impl": "fast"}, ValueError, ("impl", "'fast'", "auto", "portable", "routed")),
    "routed on CPU": (
        {"impl": "routed"},
        NotImplementedError,
        ("routed", "CUDA", "cpu", "portable"),
    ),
    "max_scores": (
        {"return_aux": AuxRequest(max_scores=True)},
        NotImplementedError,
        ("max_scores", "lse"),
    ),
    "return_aux": ({"return_aux": True}, TypeError, ("return_aux", "AuxRequest", "bool")),
    "kernel_options": (
        {"kernel_options": ["BLOCK_M"]},
        TypeError,
        ("kernel_options", "dict", "list"),
    ),
    "scale of text": ({"scale": "1"}, TypeError, ("scale", "str")),
    "scale of bool": ({"scale": True}, TypeError, ("scale", "bool")),
    "scale of tensor": ({"scale": torch.ones(())}, TypeError, ("scale", "Tensor")),
    "scale of NaN": ({"scale": float("nan")}, ValueError, ("scale", "nan")),
}
BAD_GATES = BAD_TENSORS | BAD_BLOCK_SIZES | BAD_TOPKS
BAD_ATTENTION = BAD_TENSORS | BAD_VALUES | BAD_BLOCK_SIZES | BAD_OPTIONS


def table(*tables: dict) -> pytest.MarkDecorator:
    cases = {name: case for table in tables for name, case in table.items()}
    return pytest.mark.parametrize(("bad", "error", "fragments"), cases.values(), ids=cases.keys())


@table(BAD_ATTENTION, BAD_TOPKS)
def test_flex_moba(bad, error, fragments):
    good = {"q": queries(), "k": keys(), "v": keys(), "block_size": 4, "topk": 2}
    flex_moba(**good)
    assert_raises(error, fragments, lambda: flex_moba(**good | bad))


@table(BAD_GATES, {"topk None": ({"topk": None}, TypeError, ("topk", "None"))})
@pytest.mark.parametrize("is_causal", [True, False])
def test_moba_select(bad, error, fragments, is_causal):
    good = {"q": queries(), "k": keys(), "block_size": 4, "topk": 2, "is_causal": is_causal}
    bad = {name: value for name, value in bad.items() if name != "v"}
    assert_raises(error, fragments, lambda: moba_select(**good | bad))


@table(BAD_GATES)
def test_moba_block_mask(bad, error, fragments):
    good = {"q": queries(), "k": keys(), "block_size": 4, "topk": 2}
    bad = {name: value for name, value in bad.items() if name != "v"}
    assert_raises(error, fragments, lambda: moba_block_mask(**good | bad))


def selection_of(value: float = 0, *shape: int, **options) -> Tensor:
    return torch.full(shape or (2, 4, 10, 2), value, **{"dtype": torch.int32} | options)


def with_row(*blocks: int) -> Tensor:
    """Returns a selection that is valid except for head 1, query 7 of batch element 1."""
    selection = torch.tensor([0, -1], dtype=torch.int32).repeat(2, 4, 10, 1)
    selection[1, 1, 7] = torch.tensor(blocks)
    return selection


BAD_SELECTIONS = {
    f"selection {name}": ({"selection": selection}, error, ("selection", *fragments))
    for name, selection, error, fragments in (
        ("a list", [[0]], TypeError, ("list",)),
        ("floats", selection_of(0, dtype=torch.float32), TypeError, ("float32", "int32")),
        ("bools", selection_of(False, dtype=torch.bool), TypeError, ("bool", "int32")),
        ("rank", selection_of(0, 2, 4, 10), ValueError, (r"\(2, 4, 10\)", "topk")),
        ("of other heads", selection_of(0, 2, 3, 10, 2), ValueError, (r"\(2, 3, 10, 2\)", "4")),
        ("of keys", selection_of(0, 2, 4, 12, 2), ValueError, (r"\(2, 4, 12, 2\)", "10")),
        ("without columns", selection_of(0, 2, 4, 10, 0), ValueError, (r"\(2, 4, 10, 0\)",)),
        ("device", selection_of(0, device="meta"), ValueError, ("meta", "cpu", "device")),
        ("too high", with_row(0, 3), ValueError, (NUMBER(3), NUMBER(2))),  # three blocks: 0 to 2
        ("too low", with_row(-2, 0), ValueError, ("-2", "-1")),
        ("duplicated", with_row(2, 2), ValueError, ("twice|duplicate", NUMBER(2), NUMBER(7))),
    )
}


@table(BAD_ATTENTION, BAD_SELECTIONS)
def test_selected_attention(bad, error, fragments):
    good = {"q": queries(), "k": keys(), "v": keys(), "selection": with_row(2, 0), "block_size": 4}
    selected_attention(**good)
    assert_raises(error, fragments, lambda: selected_attention(**good | bad))


def test_int64_selections_are_taken():
    q, k, v = Problem().tensors()
    selection = Problem().selection()
    assert_bitwise_equal(
        selected_attention(q, k, v, selection.long(), 4), selected_attention(q, k, v, selection, 4)
    )


@pytest.mark.parametrize("leaf", [0, 1, 2], ids="qkv")
@pytest.mark.parametrize("topk", [2, None])
def test_masked_has_no_gradient_on_cpu(leaf, topk):
    inputs = [queries(), keys(), keys()]
    inputs[leaf].requires_grad_()
    assert_raises(
        NotImplementedError,
        ("masked", "grad", "portable"),
        lambda: flex_moba(*inputs, 4, topk, impl="masked"),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["auto", "portable", "masked"])
@pytest.mark.parametrize("topk", [1, 2, 100, None])
@pytest.mark.parametrize(("batch", "q_len", "kv_len"), [(0, 5, 9), (2, 0, 9), (2, 0, 0), (0, 0, 0)])
def test_empty_inputs_give_empty_outputs(batch, q_len, kv_len, topk, impl, dtype):
    q = torch.randn(batch, 4, q_len, 8, dtype=dtype)
    k = torch.randn(batch, 2, kv_len, 8, dtype=dtype)
    v = torch.randn(batch, 2, kv_len, 3, dtype=dtype)
    for is_causal in (True, False):
        options = {"is_causal": is_causal, "impl": impl}
        out, lse = with_lse(flex_moba, 4, topk, **options)(q, k, v)
        assert (out.shape, out.dtype) == ((batch, 4, q_len, 3), dtype)
        assert lse.shape == (batch, 4, q_len)
        assert lse.dtype == torch.promote_types(dtype, torch.float32)
        if topk is not None:
            selection = moba_select(q, k, 4, topk, is_causal=is_causal)
            assert selection.shape == (batch, 4, q_len, topk)
            assert selection.dtype == torch.int32
            attend = with_lse(selected_attention, selection, 4, **options)
            assert attend(q, k, v)[0].shape == (batch, 4, q_len, 3)


def test_empty_inputs_have_gradients():
    q = torch.randn(2, 4, 0, 8, requires_grad=True)
    k, v = (torch.randn(2, 2, 9, 8, requires_grad=True) for _ in "kv")
    flex_moba(q, k, v, 4, 2).sum().backward()
    assert q.grad.shape == q.shape
    for x in (k, v):
        assert x.grad is None or not x.grad.any()


# Sums of the finite values overflow in half precision, and products in float32 and in float64.
poison = st.sampled_from((float("nan"), float("inf"), float("-inf"), 6e4, 1e30, 1e300))


@pytest.mark.parametrize("name", ["q", "k", "v"])
@given(problems(max_len=100), poison, st.integers(0, 5), st.integers(0, 99))
@settings(max_examples=20)  # for each of q, k and v; an example takes 0.2 seconds
def test_what_a_token_holds_reaches_only_rows_that_could_see_it(name, problem, value, head, index):
    problem = replace(problem, batch=2, kv_heads=2)
    inputs = dict(zip("qkv", problem.tensors(), strict=True))
    poisoned = {key: x.clone() for key, x in inputs.items()}
    x = poisoned[name]
    head, index = head % x.shape[1], index % x.shape[2]
    x[1, head, index] = torch.tensor(value, dtype=torch.float64).to(x.dtype)

    # The queries that can attend to the poisoned token, and the keys that these can attend to.
    rows = torch.zeros(2, problem.heads, problem.q_len, dtype=torch.bool)
    cols = torch.zeros(2, 2, problem.kv_len, dtype=torch.bool)
    if name == "q":
        rows[1, head, index] = True
        last = index + problem.offset if problem.is_causal else problem.kv_len
        cols[1, head // problem.group, : last + 1] = True
    else:
        first = max(index - problem.offset, 0) if problem.is_causal else 0
        rows[1, head * problem.group : (head + 1) * problem.group, first:] = True
        cols[1, head] = True

    dirty = _everything(problem, poisoned.values())
    clean = _everything(problem, inputs.values())
    for key, reached in {"out": rows, "lse": rows, "dq": rows, "dk": cols, "dv": cols}.items():
        assert_bitwise_equal(dirty[key][~reached], clean[key][~reached])


@pytest.mark.parametrize("name", ["q", "k", "v"])
@given(problems(max_len=100), st.integers(0, 99))
@settings(max_examples=20)
def test_nan_is_not_hidden(name, problem, index):
    inputs = problem.tensors()
    x = inputs["qkv".index(name)]
    index %= x.shape[2]
    x[0, 0, index] = float("nan")
    selection = moba_select(
        *inputs[:2], problem.block_size, problem.topk, is_causal=problem.is_causal
    )
    results = _everything(problem, inputs)
    seen = torch.zeros(problem.q_len, dtype=torch.bool)
    if name == "q":
        seen[index] = True
    else:
        seen = problem.mask_of(selection)[0, 0, :, index]
    assert results["out"][0, 0, seen].isnan().all()
    assert results["dq"][0, 0, seen].isnan().all()


def _everything(problem: Problem, tensors) -> dict[str, Tensor]:
    inputs = [x.clone().requires_grad_() for x in tensors]
    attend = with_lse(flex_moba, problem.block_size, problem.topk, is_causal=problem.is_causal)
    out, lse = attend(*inputs)
    # With squares, a row that is not finite also has an incoming gradient that is not finite.
    grads = torch.autograd.grad(out.square().sum() + lse.square().sum(), inputs)
    results = (out.detach(), lse.detach(), *grads)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), results, strict=True))
