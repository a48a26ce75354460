"""The masked backend, compiled; `test_attention` draws problems for it without compilation."""

from types import SimpleNamespace

import pytest
import torch

from flexmoba import flex_moba, selected_attention
from flexmoba.backends.flex import compiled
from tests.conftest import assert_as_exact_as_dense, with_lse
from tests.problems import DTYPES, Problem
from tests.test_attention import full_mask, moba_of, select

# Each problem compiles once, so these are a few fixed problems instead of drawn ones.
MASKED = [
    Problem(kv_len=150, q_len=150, block_size=16, topk=3, group=2),
    Problem(kv_len=150, q_len=40, block_size=50, topk=2, kv_heads=2, dtype=torch.float32),
    Problem(kv_len=150, q_len=150, block_size=7, topk=1, batch=2, group=3, dtype=torch.float16),
    Problem(kv_len=150, q_len=9, block_size=200, topk=2, value_dim=33, dtype=torch.bfloat16),
    Problem(kv_len=150, q_len=130, block_size=33, topk=2, kv_heads=2, group=2, is_causal=False),
    Problem(kv_len=1, q_len=1, block_size=1, topk=1),
]


@pytest.mark.parametrize("problem", MASKED, ids=str)
def test_agrees(problem):
    q, k, v = problem.tensors()
    attend = moba_of(problem, problem.topk, "masked")
    assert_as_exact_as_dense(attend, q, k, v, problem.mask_of(select(problem, q, k)))


@pytest.mark.parametrize("problem", MASKED, ids=str)
def test_supports_any_selection(problem):
    q, k, v = problem.tensors()
    selection = problem.selection()
    attend = with_lse(
        selected_attention,
        selection,
        problem.block_size,
        is_causal=problem.is_causal,
        impl="masked",
    )
    assert_as_exact_as_dense(attend, q, k, v, problem.mask_of(selection))


@pytest.mark.parametrize("is_causal", [True, False])
def test_full_attention(is_causal):
    problem = Problem(kv_len=300, q_len=200, group=2, is_causal=is_causal)
    q, k, v = problem.tensors()
    assert_as_exact_as_dense(moba_of(problem, None, "masked"), q, k, v, full_mask(problem))


def test_supports_leaves_that_require_grad_under_no_grad():
    problem = Problem(dtype=DTYPES[1])
    q, k, v = problem.tensors(requires_grad=True)
    with torch.no_grad():
        out = flex_moba(q, k, v, 4, 2, impl="masked")
        torch.testing.assert_close(out, flex_moba(q, k, v, 4, 2, impl="portable"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"head_dim": 160, "value_dim": 64}, True),
        ({"head_dim": 128}, False),
        ({"head_dim": 256}, False),
        ({"value_dim": 192}, False),
        ({"dtype": torch.float32}, False),
        ({"block": 64}, False),  # smaller than a tile
        ({"major": 8}, False),
        ({"hip": "7.0"}, False),  # AMD Instinct MI300, whose major version is 9
    ],
)
def test_head_dims_without_tiles_in_torch(monkeypatch, changes, expected):
    x = {"head_dim": 192, "value_dim": 128, "dtype": torch.half, "block": 128, "major": 9}
    x = SimpleNamespace(**(x | {"hip": None} | changes))
    monkeypatch.setattr(torch.version, "hip", x.hip)
    device = SimpleNamespace(major=x.major)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    shapes = (1, 4, 256, x.head_dim), (1, 4, 256, x.value_dim)
    q, v = (SimpleNamespace(shape=y, dtype=x.dtype, is_cuda=True, device="cuda") for y in shapes)
    mask = SimpleNamespace(BLOCK_SIZE=(128, x.block))
    assert compiled._needs_tiles(q, v, mask) == expected
