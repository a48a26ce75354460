"""Compares random calls with the oracle for a given time: ``make fuzz SECONDS=3600``.

Hypothesis draws the calls in rounds, each with its own seed. It shrinks a failing call and prints
it with the command that reproduces it. Then the next round begins.
"""

import argparse
import itertools
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from flexmoba import MobaCache, flex_moba, moba_reference, moba_select, selected_attention
from flexmoba.reference import reference_documents, reference_mask, reference_selection
from tests.conftest import (
    assert_as_exact_as_dense,
    assert_near_ties,
    block_scores,
    leave_flex_uncompiled,
    make_pieces_small,
    with_lse,
)
from tests.problems import DTYPES, Problem, as_bools
from tests.test_documents import bounds_of, holes_of, ids_of
from tests.test_gates import gated, tied, tiled

WHERE = ("cu_seqlens", "document_ids", "key_padding_mask")
LAYOUTS = ("heads first", "tokens first", "odd", "expanded")
HEAD_DIMS = (1, 8, 16, 33, 64)


def softcap(score, b, h, q_idx, kv_idx):
    return 2 * torch.tanh(score / 2)


def by_position(score, b, h, q_idx, kv_idx):
    """Adds a term that depends on row, head and positions, exact in every dtype."""
    return score + ((5 * b + 3 * h + q_idx + 5 * kv_idx) % 7 / 4).to(score.dtype)


MODS = {"softcap": softcap, "by_position": by_position}


# ---- Cases --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A call of `flex_moba` or `selected_attention`."""

    problem: Problem
    gate: dict[str, Any]
    full: bool = False  # topk=None
    tied: bool = False  # whether many blocks have equal scores
    where: str | None = None  # the argument that describes documents or padding
    sequences: int = 1  # documents of a row, or the kind of padding
    longest: bool = False  # whether to pass max_seqlen
    padding: float = 0.0  # the contents of padding
    scale: float | None = None
    mod: str | None = None
    layout: str = LAYOUTS[0]
    impl: str = "auto"
    gradients: bool = True
    small_pieces: bool = False


@dataclass(frozen=True)
class Use:
    """A sequence of operations on a cache: chunks to attend from, and changes of its rows."""

    problem: Problem  # without lengths
    gate: dict[str, Any]
    steps: tuple[tuple[str, int], ...]
    full: bool = False
    grows: bool = True
    scale: float | None = None
    mod: str | None = None
    small_pieces: bool = False


# On a GPU, each configuration takes seconds to compile, so there are few. Lengths may vary.
BF16 = Problem(
    batch=2, kv_heads=2, group=2, head_dim=128, value_dim=128, block_size=128, topk=3,
    dtype=torch.bfloat16,
)  # fmt: skip
ON_GPU: list[tuple[Problem, dict[str, Any]]] = [
    (BF16, {"gate": "token"}),
    (replace(BF16, block_size=32, topk=6, dtype=torch.float16, head_dim=64), {"gate": "token"}),
    (replace(BF16, block_size=100, group=1, head_dim=96), {"gate": "group", "sink_blocks": 1}),
    (replace(BF16, batch=1, block_size=512), {"gate": "token"}),
    (replace(BF16, batch=1, block_size=50), {"gate": "token", "local_blocks": 1}),
    (replace(BF16, is_causal=False, value_dim=64), {"gate": "token", "sink_blocks": 1}),
    (replace(BF16, head_dim=64, value_dim=64), {"gate": "tile"}),
    (replace(BF16, block_size=96), {"gate": "token", "gate_block_size": 16}),
    (replace(BF16, is_causal=False), {"gate": "group", "gate_block_size": 32}),
    (replace(BF16, dtype=torch.float32, head_dim=64, value_dim=64), {"gate": "token"}),
    (replace(BF16, dtype=torch.float64, head_dim=33, value_dim=8, block_size=20), {}),
]


@st.composite
def gpu_problems(draw: DrawFn) -> tuple[Problem, dict[str, Any]]:
    problem, gate = draw(st.sampled_from(ON_GPU))
    kv_len = draw(st.integers(2, 200) | st.integers(200, 1500))
    q_len = draw(st.just(kv_len) | st.integers(2, kv_len))
    if gate.get("gate") == "tile":
        q_len = kv_len - (kv_len - q_len) // 128 * 128
    problem = replace(problem, q_len=q_len, kv_len=kv_len, seed=draw(st.integers(0, 2**32 - 1)))
    return problem, gate


@st.composite
def any_problem(draw: DrawFn, device: str) -> tuple[Problem, dict[str, Any]]:
    if device != "cpu":
        return draw(gpu_problems())
    problem, gate = draw(gated(head_dims=HEAD_DIMS) | tiled())
    if gate["gate"] == "tile":
        problem = replace(problem, dtype=draw(st.sampled_from(DTYPES)))
    return problem, gate


@st.composite
def calls(draw: DrawFn, device: str) -> Call:
    problem, gate = draw(any_problem(device))
    where = draw(st.none() | st.sampled_from(WHERE))
    if where == "cu_seqlens" and device != "cpu" and problem.batch > 1:
        where = "document_ids"  # cu_seqlens needs a batch of 1, another configuration
    if where is not None:
        batch = 1 if where == "cu_seqlens" else problem.batch
        problem = replace(problem, batch=batch, q_len=problem.kv_len)
    if device == "cpu":
        mods, impls, layouts = (None, *MODS), ("auto", "auto", "masked"), LAYOUTS
    else:  # each combination compiles
        mods, impls = (None, None, None, "by_position"), ("auto", "auto", "auto", "portable")
        layouts = LAYOUTS[:2]
    impl = draw(st.sampled_from(impls))
    return Call(
        problem,
        gate,
        full=draw(st.integers(0, 7)) == 7,
        tied=draw(st.booleans()),
        where=where,
        sequences=draw(st.integers(1, 9)),
        longest=draw(st.booleans()) and where in ("cu_seqlens", "document_ids"),
        padding=draw(st.sampled_from((0.0, 1e4, float("inf"), float("nan")))),
        scale=draw(st.sampled_from((None, None, 0.3, 0.0, -0.5))) if device == "cpu" else None,
        mod=draw(st.sampled_from(mods)),
        layout=draw(st.sampled_from(layouts)),
        impl=impl,
        gradients=device != "cpu" or (impl != "masked" and draw(st.booleans())),
        small_pieces=device == "cpu" and draw(st.booleans()),
    )


STEPS = {
    "attend": st.integers(1, 3) | st.integers(1, 16) | st.integers(17, 150),
    "attend padded": st.integers(2, 60),
    "crop": st.integers(0, 300),
    "crop rows": st.integers(0, 2**16),
    "reorder": st.integers(0, 2**16),
    "reset": st.just(0),
}
USUAL = ("attend", "attend", "attend", "attend padded", *STEPS)


@st.composite
def uses(draw: DrawFn, device: str) -> Use:
    problem, gate = draw(any_problem(device).filter(lambda x: x[0].is_causal))
    names = draw(st.lists(st.sampled_from(USUAL), min_size=1, max_size=12))
    return Use(
        replace(problem, q_len=1, kv_len=1),
        gate,
        steps=tuple((name, draw(STEPS[name])) for name in names),
        full=draw(st.integers(0, 7)) == 7,
        grows=draw(st.booleans()),
        scale=draw(st.sampled_from((None, None, 0.3, 0.0, -0.5))),
        mod=draw(st.none() | st.sampled_from(sorted(MODS))),
        small_pieces=device == "cpu" and draw(st.booleans()),
    )


# ---- Checks -------------------------------------------------------------------------------------


@contextmanager
def conditions(case: Call | Use, device: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if device == "cpu":
            leave_flex_uncompiled(patch)
        if case.small_pieces:
            make_pieces_small(patch)
        yield


def check_flex_moba(call: Call, device: str) -> None:
    """Checks the selection of the gate, and the attention to the selected blocks."""
    problem, topk = call.problem, None if call.full else call.problem.topk
    q, k, v, where, real = inputs_of(call, device)
    sequences = reference_documents(q, k, **where)
    causal = {"is_causal": problem.is_causal}
    options = call.gate | causal | where
    blocks, sequence = blocks_and_sequences(problem, sequences, device)
    n_blocks = max(1, int(blocks.max()) + 1)

    expected = torch.zeros(*q.shape[:3], n_blocks, dtype=torch.bool, device=device)
    selected, scores = expected.clone(), (expected.double(), expected.double())
    for b, keys in sequences:
        queries = keys[keys >= problem.offset] - problem.offset
        alone = q[b : b + 1, :, queries], k[b : b + 1, :, keys]
        selection_alone = reference_selection(
            *alone, problem.block_size, topk, **causal, **call.gate
        )
        span = slice(int(blocks[b, keys[0]]), int(blocks[b, keys[-1]]) + 1)
        expected[b, :, queries, span] = selection_alone[0]
        for of_row, of_sequence in zip(scores, scores_of(problem, call.gate, *alone), strict=True):
            of_row[b, :, queries, span] = of_sequence[0]
    if topk is None:
        selected = expected
    else:
        filled = hide(real, call.padding, q, k)
        selection = moba_select(*filled, problem.block_size, topk, **options)
        selected = as_bools(selection, n_blocks)
    differ = assert_near_ties(selected, expected, scores)
    if call.tied and call.where is None:  # other sequences have other mean keys, without ties
        assert not differ.any()

    if call.longest:
        longest = max(len(keys) for _, keys in sequences)
        options["max_seqlen"] = longest + problem.seed % 3
    shared = {"scale": call.scale, "score_mod": MODS.get(call.mod)}
    attend = with_lse(flex_moba, problem.block_size, topk, **options, **shared, impl=call.impl)

    def attend_filled(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attend(*hide(real, call.padding, q, k, v))

    mask = mask_of(problem, selected, blocks, sequence)
    assert_as_exact_as_dense(attend_filled, q, k, v, mask, **shared, gradients=call.gradients)
    if problem.dtype == torch.float64 and not differ.any():
        oracle = moba_reference(q, k, v, problem.block_size, topk, **call.gate, **causal, **where,
                                **shared)  # fmt: skip
        torch.testing.assert_close(attend_filled(q, k, v)[0], oracle)


def check_selected_attention(call: Call, device: str) -> None:
    """Checks attention to random selections."""
    problem = call.problem
    q, k, v, where, real = inputs_of(call, device)
    blocks, sequence = blocks_and_sequences(problem, reference_documents(q, k, **where), device)
    n_blocks = blocks.amax(1) + 1  # for each row
    selection = problem.selection()
    generator = problem.generator()
    for b, n in enumerate(n_blocks.tolist()):  # rows have different numbers of blocks
        order = torch.rand(*q.shape[1:3], max(n, 1), generator=generator).argsort(-1).int()
        empty = selection[b] < 0
        selection[b] = -1
        count = min(order.shape[-1], problem.topk) if n else 0
        selection[b, ..., :count] = order[..., :count]
        selection[b][empty] = -1
    selection = selection.to(device)
    options = {"is_causal": problem.is_causal} | where
    shared = {"scale": call.scale, "score_mod": MODS.get(call.mod)}
    attend = with_lse(
        selected_attention, selection, problem.block_size, **options, **shared, impl=call.impl
    )

    def attend_filled(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attend(*hide(real, call.padding, q, k, v))

    selected = as_bools(selection, max(1, int(n_blocks.max())))
    mask = mask_of(problem, selected, blocks, sequence)
    assert_as_exact_as_dense(attend_filled, q, k, v, mask, **shared, gradients=call.gradients)


def check_cache(use: Use, device: str) -> None:
    """Checks each chunk against attention to the tokens that each row of the cache then holds."""
    problem, topk = use.problem, None if use.full else use.problem.topk
    generator = problem.generator()
    total = sum(n for name, n in use.steps if name.startswith("attend"))
    cache = MobaCache(
        *(problem.batch, problem.kv_heads, problem.head_dim),
        value_dim=problem.value_dim, block_size=problem.block_size, dtype=problem.dtype,
        gate_block_size=use.gate.get("gate_block_size"),
        max_len=None if use.grows else max(total, 1), device=device,
    )  # fmt: skip
    shared = {"scale": use.scale, "score_mod": MODS.get(use.mod)}
    nothing = [x[0, :, :0] for x in problem.tensors(device)]
    rows = [nothing] * problem.batch  # queries, keys and values of the tokens of each row
    for step, (name, n) in enumerate(use.steps):
        if name.startswith("attend"):
            chunk = replace(problem, q_len=n, kv_len=n, seed=problem.seed + step)
            q, k, v = chunk.tensors(device)
            real, padded = None, torch.ones(problem.batch, n, dtype=torch.bool)
            if name == "attend padded":
                padded = torch.rand(problem.batch, n, generator=generator) < 0.7
                real = padded.to(device)
            attend = with_lse(
                flex_moba, problem.block_size, topk, **use.gate, **shared, cache=cache,
                key_padding_mask=real,
            )  # fmt: skip
            out, lse = attend(*hide(real, float("nan"), q, k, v))
            padded = padded.to(device)
            for b in range(problem.batch):
                new = [x[b, :, padded[b]] for x in (q, k, v)]
                rows[b] = [torch.cat(x, 1) for x in zip(rows[b], new, strict=True)]
                assert not out[b, :, ~padded[b]].any()
                assert (lse[b, :, ~padded[b]] == -torch.inf).all()
                if new[0].shape[1]:
                    result = out[b : b + 1, :, padded[b]], lse[b : b + 1, :, padded[b]]
                    check_row(use, b, rows[b], result, shared)
        elif name == "crop":
            cache.crop(n)
            rows = [[x[:, :n] for x in row] for row in rows]
        elif name == "crop rows":
            lengths = [(n + 37 * b) % 200 for b in range(problem.batch)]
            cache.crop(torch.tensor(lengths, device=device))
            rows = [[x[:, :m] for x in row] for row, m in zip(rows, lengths, strict=True)]
        elif name == "reorder":
            order = [(n >> b) % problem.batch for b in range(problem.batch)]
            cache.reorder(torch.tensor(order, device=device))
            rows = [rows[i] for i in order]
        else:
            cache.reset()
            rows = [nothing] * problem.batch
        assert cache.lengths.tolist() == [row[0].shape[1] for row in rows]


def check_row(
    use: Use, b: int, tokens: list[Tensor], result: tuple[Tensor, Tensor], shared: dict[str, Any]
) -> None:
    """Checks the last tokens of a row, except for queries with almost equal block scores."""
    problem, n = use.problem, result[0].shape[2]
    topk = None if use.full else problem.topk
    q, k, v = (x[None] for x in tokens)
    length = k.shape[2]
    selected = reference_selection(q, k, problem.block_size, topk, is_causal=True, **use.gate)
    score, uncertainty = scores_of(problem, use.gate, q, k)
    own = (torch.arange(length, device=q.device) // problem.block_size)[:, None]
    block = torch.arange(selected.shape[-1], device=q.device)
    sinks, local = use.gate.get("sink_blocks", 0), use.gate.get("local_blocks", 0)
    scored = (block >= sinks) & (block < own - local)
    lowest = (score - uncertainty).where(selected & scored, torch.inf).amin(-1)
    highest = (score + uncertainty).where(~selected & scored, -torch.inf).amax(-1)
    unclear = (lowest <= highest)[:, :, -n:]
    mask = reference_mask(selected, problem.block_size, length, is_causal=True)[:, :, -n:]
    mask = mask & ~unclear[..., None]
    out, lse = result
    out = out.masked_fill(unclear[..., None], 0.0)
    lse = lse.masked_fill(unclear, -torch.inf)
    attended = q[:, :, -n:], k, v
    assert_as_exact_as_dense(lambda *_: (out, lse), *attended, mask, **shared, first_row=b)


def inputs_of(
    call: Call, device: str
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor], Tensor | None]:
    """Returns the inputs of a call.

    Returns:
        q, k, v, the argument that describes documents or padding, by name, and the mask of tokens
        that are not padding, ``(B, Lk)``, or None.
    """
    problem = call.problem
    tensors = tied(problem, call.gate, device) if call.tied else problem.tensors(device)
    q, k, v = (laid_out(x, call.layout) for x in tensors)
    if call.layout == "expanded":
        k, v = (x[:1].expand(problem.batch, -1, -1, -1) for x in (k, v))
    if call.where is None:
        return q, k, v, {}, None
    dtype = torch.int32 if problem.seed % 2 else torch.int64
    if call.where == "cu_seqlens":
        x = torch.tensor(bounds_of(problem, call.sequences), dtype=dtype)
    elif call.where == "document_ids":
        rows = (replace(problem, seed=problem.seed + b) for b in range(problem.batch))
        x = torch.cat([ids_of(bounds_of(row, call.sequences)) for row in rows]).to(dtype)
    else:
        x = holes_of(problem, call.sequences / 10)
        if call.sequences % 3 == 0:  # padding on the left or on the right
            x = x.sort(dim=1, descending=call.sequences % 2 == 0).values
    x = x.to(device)
    return q, k, v, {call.where: x}, x if x.dtype == torch.bool else None


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "tokens first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "odd":  # unaligned, with gaps between rows
        return torch.nn.functional.pad(x, (3, 2))[..., 3:-2]
    return x


def hide(real: Tensor | None, bad: float, *tensors: Tensor) -> list[Tensor]:
    """Returns the tensors with the value ``bad`` in padding."""
    if real is None:
        return list(tensors)
    return [x.masked_fill(~real[:, None, :, None], bad) for x in tensors]


def blocks_and_sequences(
    problem: Problem, sequences: list[tuple[int, Tensor]], device: str
) -> tuple[Tensor, Tensor]:
    """Returns the block (numbered within its row) and the sequence of each key, -1 for padding."""
    blocks, sequence = torch.full((2, problem.batch, problem.kv_len), -1, device=device)
    for i, (b, keys) in enumerate(sequences):
        block = torch.arange(len(keys), device=device) // problem.block_size
        blocks[b, keys] = block + blocks[b].max() + 1
        sequence[b, keys] = i
    return blocks, sequence


def mask_of(problem: Problem, selected: Tensor, blocks: Tensor, sequence: Tensor) -> Tensor:
    """Returns the mask of the keys of each query: keys of its sequence in its selected blocks."""
    batch, heads, q_len, _ = selected.shape
    key = torch.arange(problem.kv_len, device=selected.device)
    own = sequence[:, problem.offset :, None]
    visible = (own == sequence[:, None]) & (own >= 0)
    if problem.is_causal:
        visible = visible & (key <= key[problem.offset :, None])
    index = blocks.clamp(min=0)[:, None, None].expand(batch, heads, q_len, -1)
    return visible[:, None] & selected.gather(-1, index)


def scores_of(
    problem: Problem, gate: dict[str, Any], q: Tensor, k: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns `block_scores` of the queries that the gate scores for each query of a sequence."""
    if gate.get("gate") == "group":
        grouped = q.double().unflatten(1, (problem.kv_heads, problem.group))
        q = grouped.sum(2).repeat_interleave(problem.group, 1)
    if gate.get("gate") == "tile":
        position = torch.arange(q.shape[2], device=q.device) + k.shape[2] - q.shape[2]
        q = q[:, :, torch.arange(q.shape[2], device=q.device) - position % 128]
    return block_scores(q, k, problem.block_size, gate.get("gate_block_size"))


# ---- The program --------------------------------------------------------------------------------

Check = Callable[[Any, str], None]
CHECKS: dict[str, tuple[Callable[[str], SearchStrategy[Any]], Check]] = {
    "flex_moba": (calls, check_flex_moba),
    "selected_attention": (calls, check_selected_attention),
    "cache": (uses, check_cache),
}


def run_round(name: str, number: int, device: str, examples: int) -> int:
    """Draws and checks cases; returns their number, including those of shrinking."""
    strategy, check = CHECKS[name]
    count = 0

    @seed(number)
    @settings(
        database=None,
        deadline=None,
        derandomize=False,
        max_examples=examples,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy(device))
    def drawn(case: Call | Use) -> None:
        nonlocal count
        count += 1
        with conditions(case, device):
            check(case, device)

    drawn()
    return count


def main(arguments: list[str] | None = None) -> int:
    """Runs rounds until the time is over; returns 1 if any of them failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="duration (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--only", choices=CHECKS, help="one of the checks (default: all)")
    parser.add_argument("--seed", type=int, help="seed of the first round (default: random)")
    parser.add_argument("--examples", type=int, default=20, help="cases of a round (default: 20)")
    options = parser.parse_args(arguments)
    number = random.randrange(2**32) if options.seed is None else options.seed
    names = itertools.cycle([options.only] if options.only else CHECKS)
    end, cases, failures = time.monotonic() + options.seconds, dict.fromkeys(CHECKS, 0), 0
    for name in names:
        try:
            cases[name] += run_round(name, number, options.device, options.examples)
        except Exception:
            failures += 1
            traceback.print_exc(file=sys.stdout)
            print(
                f"To reproduce: python -m tests.fuzz --device {options.device} --only {name} "
                f"--seed {number} --examples {options.examples} --seconds 0",
                flush=True,
            )
        number += 1
        if time.monotonic() >= end:
            break
    counts = ", ".join(f"{count} of {name}" for name, count in cases.items())
    print(f"{sum(cases.values())} cases passed ({counts}); rounds that failed: {failures}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
