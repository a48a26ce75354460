"""The fused backend without a GPU: its split into pieces, and its kernels in the interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexmoba import flex_moba
from flexmoba.backends.fused import schedule, why_not_fused
from flexmoba.backends.fused.schedule import QUERY_TILE, Sizes

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    # NumPy warns of log2(0) and, in Triton 3.6, of arrays in place of numbers.
    command += ["-W", "ignore::RuntimeWarning", "-W", "ignore::DeprecationWarning"]
    command += ["tests/interpreted.py"]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@st.composite
def all_sizes(draw):
    group, kv_heads = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    q_len = draw(st.integers(1, 1000))
    return Sizes(
        batch=draw(st.integers(1, 3)),
        heads=group * kv_heads,
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=q_len + draw(st.integers(0, 300)),
        block_size=draw(st.integers(1, 200)),
        count=draw(st.integers(0, 64)),
        dim=128,
        value_dim=128,
    )


@given(all_sizes(), st.booleans())
def test_every_query_is_in_one_piece(sizes, whole_kv_heads):
    queries = tiles = 0
    for group in schedule.sort_groups(sizes, whole_kv_heads=whole_kv_heads):
        assert group.first_query == queries
        assert group.first_kv_head == queries // (sizes.group * sizes.q_len)
        blocks = 0
        for piece in group.pieces:
            assert (piece.first_query, piece.first_tile) == (queries, tiles)
            queries, tiles = queries + piece.n_queries, tiles + piece.n_tiles
            if len(group.pieces) > 1:  # of full KV heads, whose blocks are consecutive
                assert piece.first_block == blocks
                blocks += piece.n_blocks
        assert group.first_query + group.n_queries == queries
    assert queries == sizes.batch * sizes.heads * sizes.q_len
    assert tiles == sizes.batch * sizes.heads * -(-sizes.q_len // QUERY_TILE)


@given(all_sizes())
def test_a_forward_call_allocates_at_most_twice_the_queries_and_the_output(sizes):
    queries = sizes.batch * sizes.heads * sizes.q_len
    size = 2 * (sizes.dim + sizes.value_dim) * queries
    selection = 4 * queries * sizes.count
    one_tile = QUERY_TILE * sizes.count * (2 * sizes.value_dim + 4)  # the smallest piece
    for group in schedule.sort_groups(sizes):
        pairs = group.n_queries * sizes.count
        partial_outputs = group.max_queries * sizes.count * (2 * sizes.value_dim + 4)
        assert selection + pairs * 8 + partial_outputs <= 2 * size + one_tile
        assert selection + pairs * schedule._SORTING_BYTES <= 2 * size + one_tile


def test_names_unsupported_inputs():
    q = torch.zeros(1, 1, 4, 16)
    with pytest.raises(
        NotImplementedError, match=r'impl="fused" needs inputs on CUDA, got cpu; use impl="auto"'
    ):
        flex_moba(q, q, q, 2, 1, impl="fused")
    assert "float32" in (why_not_fused(q, q, None) or "")
    wide = torch.zeros(1, 1, 4, 256, dtype=torch.bfloat16)
    assert "at most 128, got 256" in (why_not_fused(wide, wide, None) or "")
    half = q.bfloat16()
    assert "kernel_options={'num_warps': 4}" in (why_not_fused(half, half, {"num_warps": 4}) or "")
    assert why_not_fused(half, half, None) is None
