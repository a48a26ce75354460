"""``gate="tile"`` as one FlexAttention call, and its BlockMask in both directions.

As in `test_tiles`, dense attention over the mask that the `BlockMask` describes replaces the
kernels, which run only on CUDA.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask

from flexmoba import flex_moba, moba_reference, moba_select
from flexmoba.backends.flex import masked
from flexmoba.backends.flex.masked import tile_gate_attention
from flexmoba.backends.flex.tile_gate_mask import tile_gate_mask
from flexmoba.backends.options import AttentionOptions
from flexmoba.backends.score_mod import score_modifier
from flexmoba.reference import reference_attention
from flexmoba.selection import BlockSelection
from tests.conftest import assert_as_exact_as_dense
from tests.problems import Problem
from tests.test_score_mod import looked_up
from tests.test_tiles import listed


def stretches(mask: BlockMask) -> dict[str, Tensor]:
    """Returns each list as bools ``(B, H, tiles, stretches)``, with transposed lists restored."""
    rows, keys = mask.seq_lengths
    tiles, columns = rows // mask.BLOCK_SIZE[0], -(-keys // mask.BLOCK_SIZE[1])

    def bools(num: Tensor, indices: Tensor, columns: int) -> Tensor:
        assert num.shape == indices.shape[:3]  # a kernel reads both with the same strides
        assert (num.dtype, indices.dtype) == (torch.int32, torch.int32)
        assert ((indices >= 0) & (indices < columns)).all()
        lists = zip(num.flatten(0, 1), indices.flatten(0, 1), strict=True)
        rows = [listed(n[None, None], x[None, None], columns) for n, x in lists]
        return torch.stack(rows).unflatten(0, num.shape[:2])

    def ascending(num: Tensor, indices: Tensor) -> bool:
        used = torch.arange(indices.shape[-1] - 1) < num[..., None] - 1
        return bool((indices.diff(dim=-1) > 0)[used].all())

    lists = {
        "partial": (mask.kv_num_blocks, mask.kv_indices),
        "full": (mask.full_kv_num_blocks, mask.full_kv_indices),
    }
    found = {name: bools(*pair, columns) for name, pair in lists.items()}
    if mask.q_indices is not None:
        lists |= {
            "partial back": (mask.q_num_blocks, mask.q_indices),
            "full back": (mask.full_q_num_blocks, mask.full_q_indices),
        }
        for name in ("partial back", "full back"):
            found[name] = bools(*lists[name], tiles).mT
    assert all(ascending(*pair) for pair in lists.values())
    return found


def dense_flex(q, k, v, mask: BlockMask, scale, kernel_options, score_mod=None, *, divisible):
    """Computes the result of FlexAttention, and checks that the transposed lists agree."""
    rows, keys = mask.seq_lengths
    assert (q.shape[2], k.shape[2], rows % mask.BLOCK_SIZE[0]) == (rows, keys, 0)
    assert divisible == (keys % mask.BLOCK_SIZE[1] == 0)
    found = stretches(mask)
    assert not (found["partial"] & found["full"]).any()
    for name in ("partial", "full"):
        assert torch.equal(found.get(f"{name} back", found[name]), found[name])
    partial, full = (
        found[x].repeat_interleave(128, -2).repeat_interleave(mask.BLOCK_SIZE[1], -1)[..., :keys]
        for x in ("partial", "full")
    )
    visible = mask.mask_mod(None, None, torch.arange(rows)[:, None], torch.arange(keys))
    visible = full | (partial & visible)
    rows = torch.arange(q.shape[2])
    return reference_attention(
        q, k, v, visible, scale=scale, score_mod=score_mod, query_positions=rows
    )


@pytest.fixture(autouse=True)
def _dense(monkeypatch):
    monkeypatch.setattr(masked, "call_flex", dense_flex)
    monkeypatch.setattr(masked, "run_compiled", lambda f, *tensors, **static: f(*tensors, **static))


@st.composite
def tiled(draw) -> Problem:
    q_len, offset = draw(st.integers(1, 600)), 128 * draw(st.integers(0, 4))
    return Problem(
        batch=draw(st.integers(1, 2)),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 2)),
        q_len=q_len,
        kv_len=q_len + offset,
        block_size=128 * draw(st.sampled_from([1, 2, 3, 5])),
        topk=draw(st.integers(1, 4)),
        dtype=torch.float32,
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@given(tiled())
@settings(max_examples=25)
def test_attends_to_the_selected_blocks_of_each_tile(problem):
    q, k, v = problem.tensors()
    selection = moba_select(q, k, problem.block_size, problem.topk, gate="tile")
    selected = BlockSelection(selection[:, :, ::128, 1:], problem.block_size, per_tile=True)

    def attend(q, k, v):
        return tile_gate_attention(q, k, v, selected, AttentionOptions("masked", 0.3))

    mask = problem.mask_of(selection)
    assert_as_exact_as_dense(attend, q, k, v, mask, scale=0.3, gradients=True)


@given(tiled())
@settings(max_examples=10)
def test_a_score_mod_gets_the_indices_of_the_user(problem):
    problem = Problem(**(vars(problem) | {"dtype": torch.float64}))
    q, k, v = problem.tensors()
    options = {"gate": "tile", "block_size": problem.block_size, "topk": problem.topk}
    selected = moba_select(q, k, **options)[:, :, ::128, 1:]
    score_mod = looked_up(problem)
    modifier = score_modifier(score_mod, q, k, None)
    selection = BlockSelection(selected, problem.block_size, per_tile=True)
    options_of_call = AttentionOptions("masked", 8**-0.5)
    out, _ = tile_gate_attention(q, k, v, selection, options_of_call, modifier)
    torch.testing.assert_close(out, moba_reference(q, k, v, **options, score_mod=score_mod))


def test_stretches_are_few_and_only_the_diagonal_is_partial():
    problem = Problem(q_len=4096, kv_len=8192, block_size=4096)
    q, k, _ = problem.tensors()
    selected = moba_select(q, k, 4096, 2, gate="tile")[:, :, ::128, 1:]
    mask = tile_gate_mask(selected, 4096, 8192, 4096, backward=False)
    assert mask.BLOCK_SIZE == (128, 1024)
    assert mask.q_indices is None
    found = stretches(mask)
    assert (found["partial"].sum(-1) == 1).all()
    assert torch.equal(found["full"].sum(-1)[0, 0], 4 + torch.arange(32) // 8)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_len": 600, "kv_len": 984},
        {"block_size": 512, "q_len": 640, "kv_len": 640},
        {"block_size": 1024, "kv_len": 4000, "q_len": 4000, "topk": 2},
        {"topk": 1},
        {"dtype": torch.float32},
    ],
)
def test_on_a_gpu(changes, monkeypatch):
    monkeypatch.undo()
    sizes = {"batch": 2, "kv_heads": 2, "group": 2, "head_dim": 128, "value_dim": 64, "topk": 3}
    sizes |= {"q_len": 2048, "kv_len": 2048, "block_size": 128, "dtype": torch.bfloat16}
    problem = Problem(**(sizes | changes))
    q, k, v = problem.tensors("cuda")
    selection = moba_select(q, k, problem.block_size, problem.topk, gate="tile")
    mask = problem.mask_of(selection)

    def attend(q, k, v):
        out, aux = flex_moba(
            *(q, k, v, problem.block_size, problem.topk),
            gate="tile",
            return_aux=AuxRequest(lse=True),
        )
        return out, aux.lse

    assert_as_exact_as_dense(attend, q, k, v, mask, gradients=True)
