"""Tests of flexmoba.tune: captured mass, signal-to-noise ratio, capture, and recommendations."""

import dataclasses
import json
import math
import re
from collections import OrderedDict
from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from flexmoba import flex_moba
from flexmoba.nn import FlexMoba, MobaAttention
from flexmoba.reference import reference_mask, reference_selection
from flexmoba.tune import (
    Call,
    Choice,
    Report,
    capture,
    gate_quality,
    required_snr,
    sample_positions,
    tune,
)
from tests.conftest import assert_bitwise_equal
from tests.problems import problems
from tests.test_gates import sub_blocks

pytestmark = pytest.mark.usefixtures("small_pieces")

# ---- Captured mass ------------------------------------------------------------------------------


def dense_weights(q, k, scale):
    """Returns the weights of full causal attention, ``(B, Hq, Lq, Lk)``."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q @ k.mT * scale).double()
    return scores.masked_fill(~causal(q, k), -math.inf).softmax(-1)


def causal(q, k):
    every = torch.ones(*q.shape[:3], 1, dtype=torch.bool)
    return reference_mask(every, k.shape[2], k.shape[2], is_causal=True)


@given(problems(max_len=60, dtype=st.just(torch.float64), is_causal=st.just(True)), st.data())
def test_mass_is_what_the_oracles_mask_leaves_of_full_attention(problem, data):
    q, k, _ = problem.tensors()
    sinks = data.draw(st.integers(0, problem.topk - 1))
    local = data.draw(st.integers(0, problem.topk - 1 - sinks))
    topks = (1 + sinks + local, problem.topk)
    gate = {"gate_block_size": data.draw(sub_blocks(problem.block_size))}
    gate |= {"sink_blocks": sinks, "local_blocks": local}
    found = gate_quality(q, k, problem.block_size, topks, **gate, scale=0.5)[problem.block_size]
    weights = dense_weights(q, k, 0.5)
    for row, topk in enumerate(topks):
        selected = reference_selection(q, k, problem.block_size, topk, is_causal=True, **gate)
        mask = reference_mask(selected, problem.block_size, k.shape[2], is_causal=True)
        expected = weights.masked_fill(~mask, 0.0).sum(-1).mean((0, 2))
        torch.testing.assert_close(found.mass[row], expected.float())


@given(problems(max_len=40, dtype=st.just(torch.float64), is_causal=st.just(True)))
def test_best_mass_and_found_query_by_query(problem):
    q, k, _ = problem.tensors()
    size, topk = problem.block_size, problem.topk
    measured = gate_quality(q, k, size, topk)[size]
    weights = dense_weights(q, k, q.shape[-1] ** -0.5)
    selected = reference_selection(q, k, size, topk, is_causal=True)
    for head in range(q.shape[1]):
        best, hits = [], []
        for b in range(q.shape[0]):
            for i in range(q.shape[2]):
                own = (i + k.shape[2] - q.shape[2]) // size
                shares = [float(x.sum()) for x in weights[b, head, i].split(size)]
                best.append(shares[own] + sum(sorted(shares[:own], reverse=True)[: topk - 1]))
                if own:
                    strongest = int(weights[b, head, i, : own * size].argmax()) // size
                    hits.append(bool(selected[b, head, i, strongest]))
        assert measured.best_mass[0, head] == pytest.approx(sum(best) / len(best), rel=1e-5)
        if hits:
            assert measured.found[0, head] == pytest.approx(sum(hits) / len(hits), rel=1e-5)
        else:
            assert measured.found[0, head].isnan()


def test_a_sample_and_pieces_give_the_same(monkeypatch):
    q, k = torch.randn(2, 2, 100, 8), torch.randn(2, 2, 130, 8)
    index = torch.tensor([3, 50, 51, 99])
    whole = gate_quality(q[:, :, index], k, (16, 40), (2, 3), positions=index + 30)
    each = [gate_quality(q[:, :, [i]], k[:, :, : i + 31], 40, 3)[40].mass for i in index]
    torch.testing.assert_close(whole[40].mass[1:], sum(each) / 4)
    monkeypatch.setattr("flexmoba.tune.quality._SCORES_AT_ONCE", 130 * 3)
    pieces = gate_quality(q[:, :, index], k, (16, 40), (2, 3), positions=index + 30)
    for size in (16, 40):
        for a, b in zip(whole[size], pieces[size], strict=True):
            torch.testing.assert_close(a, b)
    # Queries at other positions attend to other keys.
    moved = gate_quality(q[:, :, index], k, 16, 2, positions=index)
    assert not torch.allclose(moved[16].mass, whole[16].mass[:1])


# ---- Signal and noise ---------------------------------------------------------------------------


def needles(block_size, *, blocks=32, heads=256, dim=32, mean=3.0, cluster=1, mean_cluster=0.0):
    """Returns one query for each head, and keys whose products with it are known.

    The query is a unit vector, and noise keys have independent elements of variance 1 / dim, so
    ``mean`` is dmu in arXiv 2511.11571, Sec. 3. A random block holds a key whose product with the
    query is ``mean``, and ``cluster - 1`` keys whose products have the mean ``mean_cluster``.
    """
    generator = torch.Generator().manual_seed(0)
    length = blocks * block_size
    k = torch.randn(1, heads, length, dim, generator=generator) * dim**-0.5
    q = F.normalize(torch.randn(1, heads, 1, dim, generator=generator), dim=-1)
    for head in range(heads):
        start = int(torch.randint(blocks - 1, (), generator=generator)) * block_size
        direction = q[0, head, 0]
        key = k[0, head, start]
        k[0, head, start] = key + (mean - key @ direction) * direction
        k[0, head, start + 1 : start + cluster] += mean_cluster * direction
    return q, k


@pytest.mark.parametrize(
    ("block_size", "cluster", "mean_cluster"), [(16, 1, 0.0), (64, 1, 0.0), (64, 5, 0.5)]
)
def test_snr_of_a_needle_is_the_papers(block_size, cluster, mean_cluster):
    q, k = needles(block_size, cluster=cluster, mean_cluster=mean_cluster)
    measured = gate_quality(q, k, block_size, 2)[block_size]
    dmu_eff = 3.0 + (cluster - 1) * mean_cluster
    expected = dmu_eff * math.sqrt(32 / (2 * block_size))
    # The standard error of the mean over 256 signals is 1 / sqrt(2 * 256) = 0.044.
    assert float(measured.snr.mean()) == pytest.approx(expected, abs=0.15)


def test_a_needle_is_found_as_often_as_the_paper_predicts():
    # With one noise block, the noise block wins with probability Phi(-SNR).
    q, k = needles(64, blocks=3, heads=2000, mean=2.0)
    measured = gate_quality(q, k, 64, 2)[64]
    expected = 1 - NormalDist().cdf(-2.0 * math.sqrt(32 / 128))
    assert float(measured.found.mean()) == pytest.approx(expected, abs=0.03)


def test_snr_needs_two_blocks_of_noise():
    q, k = torch.randn(2, 1, 2, 40, 8)
    assert gate_quality(q[:, :, :30], k[:, :, :30], 10, 2)[10].snr.isnan().all()
    assert gate_quality(q, k, 10, 2)[10].snr.isfinite().all()


def test_required_snr():
    assert required_snr(100, 100) is None
    assert required_snr(4, 8) is None
    assert required_snr(2000, 50) == pytest.approx(1.959964, abs=1e-6)  # the usual 97.5 %


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"block_size": 0}, "block_size"),
        ({"topk": 0}, "topk"),
        ({"block_size": ()}, "nothing to measure"),
        ({"topk": ()}, "nothing to measure"),
        ({"sink_blocks": 2}, "topk=2 is too small for sink_blocks=2"),
        ({"sink_blocks": -1}, "sink_blocks must be at least 0, got -1"),
        ({"positions": torch.arange(3)}, r"int64 of shape \(8,\)"),
        ({"positions": torch.arange(8).int()}, "int64 of shape"),
        ({"positions": torch.arange(1, 9)}, "from 0 to 7, the last key, got 1 to 8; pass"),
    ],
)
def test_quality_refuses(change, text):
    q, k = torch.randn(2, 1, 1, 8, 4)
    with pytest.raises(ValueError, match=text):
        gate_quality(q, k, **({"block_size": 2, "topk": 2} | change))


# ---- Capturing ----------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention of ``x (B, H, L, D)`` by a given function, with queries 2x and keys 3x."""

    def __init__(self, attend):
        super().__init__()
        self.attend = attend

    def forward(self, x):
        return self.attend(2 * x, 3 * x, x)


def sdpa(**options):
    return Attention(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options))


CAUSAL = create_block_mask(lambda b, h, i, j: i >= j, None, None, 50, 50, device="cpu")
compiled_flex = torch.compile(flex_attention, backend="eager", fullgraph=True)


@pytest.mark.parametrize(
    ("layer", "scale"),
    [
        (lambda: sdpa(is_causal=True), 0.25),
        (lambda: sdpa(attn_mask=torch.ones(50, 50).tril().bool(), scale=0.7), 0.7),
        (lambda: Attention(lambda *x: compiled_flex(*x, block_mask=CAUSAL)), 0.25),
        (lambda: Attention(FlexMoba(16, 2)), 0.25),
        (lambda: Attention(FlexMoba(16, None, impl="masked", scale=0.3)), 0.3),
    ],
    ids=["causal", "mask", "flex", "FlexMoba", "FlexMoba that calls flex"],
)
def test_catches_each_layer_by_its_name(layer, scale):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([layer(), layer()])

        def forward(self, x):
            for attend in self.layers:
                x = attend(x)
            return x

    x, model = torch.randn(2, 3, 50, 16), Model()
    with torch.no_grad():
        expected = model(x)
        with capture(model, queries=7) as calls:
            out = model(x)
        assert_bitwise_equal(out, expected)
        second = 3 * model.layers[0](x)
    inner = ".attend" if isinstance(model.layers[0].attend, FlexMoba) else ""
    assert [call.name for call in calls] == [f"layers.0{inner}", f"layers.1{inner}"]
    assert [call.scale for call in calls] == [scale, scale]
    assert calls[0].positions.tolist() == sample_positions(50, 7).tolist()
    assert_bitwise_equal(calls[0].q, 2 * x[:, :, calls[0].positions])
    assert_bitwise_equal(calls[0].k, 3 * x)
    assert_bitwise_equal(calls[1].k, second)
    with torch.no_grad():
        model(x)
    assert len(calls) == 2  # no hook is left


def test_catches_inside_a_compiled_model_every_time():
    model = torch.compile(sdpa(is_causal=True), backend="eager", fullgraph=True)
    with torch.no_grad():
        model(torch.randn(1, 1, 50, 16))
    for _ in range(2):
        x = torch.randn(1, 1, 50, 16)
        with torch.no_grad(), capture(model) as calls:
            model(x)
        assert len(calls) == 1
        assert_bitwise_equal(calls[0].q, 2 * x)


def test_keeps_copies_and_gradients():
    x = torch.randn(1, 1, 50, 16, requires_grad=True)
    keys = torch.randn(1, 1, 50, 16)
    model = Attention(lambda q, k, v: F.scaled_dot_product_attention(q, keys, v, is_causal=True))
    with capture(model) as calls:
        model(x).sum().backward()
    before = keys.clone()
    keys.zero_()
    assert_bitwise_equal(calls[0].k, before)
    assert x.grad is not None
    assert not calls[0].q.requires_grad


POSITION = torch.arange(50)
PADDED = POSITION[None] < 40
PAST = torch.ones(50, 50).tril().bool()
WINDOW = PAST & ~PAST.roll(16, 0).tril(-16)
DOCUMENTS = PAST & ((POSITION < 20) == (POSITION[:, None] < 20))
OF_ONE_HEAD = torch.stack([PAST, WINDOW, PAST])[None]
DISTANCE = (POSITION - POSITION[:, None]).float()
MASK = "a mask other than the causal one"


def flex(mask_mod, score_mod=None):
    mask = create_block_mask(mask_mod, 1, 3, 50, 50, device="cpu")
    return Attention(lambda *x: compiled_flex(*x, score_mod=score_mod, block_mask=mask))


def calls_of(model, *inputs, **options):
    with torch.no_grad(), capture(model, **options) as calls:
        model(*inputs)
    return calls


def compiled(model):
    return torch.compile(model, backend="eager", fullgraph=True)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (sdpa(), "no causal mask"),
        (sdpa(attn_mask=PADDED), MASK),
        (sdpa(attn_mask=PADDED.expand(50, 50)), MASK),
        (sdpa(attn_mask=torch.zeros(50, 50).masked_fill(~PADDED, -math.inf)), MASK),
        (sdpa(attn_mask=WINDOW), MASK),
        (sdpa(attn_mask=torch.zeros(50, 50).masked_fill(~WINDOW, -math.inf)), MASK),
        (sdpa(attn_mask=PAST & PADDED), MASK),
        (sdpa(attn_mask=DOCUMENTS), MASK),
        (sdpa(attn_mask=OF_ONE_HEAD), MASK),
        (sdpa(attn_mask=DISTANCE.masked_fill(~PAST, -math.inf)), MASK),
        (compiled(sdpa(attn_mask=WINDOW)), MASK),
        (Attention(flex_attention), MASK),
        (Attention(compiled_flex), MASK),
        (flex(lambda b, h, i, j: (i >= j) & (i - j < 16)), MASK),
        (flex(lambda b, h, i, j: OF_ONE_HEAD[b, h, i, j]), MASK),
        (flex(lambda b, h, i, j: i >= j, lambda s, b, h, i, j: s - (i - j) / 9), MASK),
        (flex(lambda b, h, i, j: i >= j, lambda s, b, h, i, j: s + (PADDED[0, j] - 1) * 1e9), MASK),
        (Attention(FlexMoba(16, 2, is_causal=False)), "no causal mask"),
        (
            Attention(FlexMoba(16, 2, cu_seqlens=torch.tensor([0, 20, 50], dtype=torch.int32))),
            "called with cu_seqlens, in ",
        ),
        (Attention(FlexMoba(16, 2, key_padding_mask=PADDED)), "called with key_padding_mask"),
        (
            Attention(FlexMoba(16, 2, score_mod=lambda s, b, h, i, j: s / 2)),
            "called with score_mod",
        ),
        (
            Attention(
                lambda q, k, v: F.scaled_dot_product_attention(q[:, :, -1:], k, v, is_causal=True)
            ),
            "shapes other than (B, H, L, D) with as many queries as keys",
        ),
        (
            Attention(lambda q, k, v: F.scaled_dot_product_attention(q[0, 0], k[0, 0], v[0, 0])),
            "no causal mask",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_what_is_not_plain_causal_self_attention_is_left_out(model, reason):
    x = torch.randn(1, 3, 50, 16)
    with pytest.raises(
        ValueError, match=rf"no plain causal self-attention \({re.escape(reason)}.*sdpa"
    ):
        calls_of(model, x)
    both = nn.Sequential(OrderedDict({"kept": sdpa(is_causal=True), "skipped": model}))
    text = rf"^capture skipped attention calls: {re.escape(reason)}.*skipped"
    with pytest.warns(UserWarning, match=text):
        calls = calls_of(both, x)
    assert [call.name for call in calls] == ["kept"]


@pytest.mark.parametrize(
    "model",
    [
        sdpa(attn_mask=PAST.expand(1, 3, 50, 50)),
        sdpa(attn_mask=causal_lower_right(50, 50)),
        compiled(sdpa(attn_mask=PAST)),
        flex(lambda b, h, i, j: PAST[i, j]),
        flex(lambda b, h, i, j: i >= j, lambda s, b, h, i, j: s + 0 * b),
        flex(lambda b, h, i, j: (i >= j) & (i - j < 50)),
    ],
)
def test_a_mask_of_another_kind_that_is_causal_is_kept(model):
    assert len(calls_of(model, torch.randn(1, 3, 50, 16))) == 1


def test_many_calls_inside_torch_compile():
    model = nn.Sequential(*(flex(lambda b, h, i, j: i >= j) for _ in range(4)))
    with torch._dynamo.config.patch(recompile_limit=2):  # 8 by default
        calls = calls_of(model, torch.randn(1, 3, 50, 16))
    assert [call.name for call in calls] == ["0", "1", "2", "3"]


def test_names_few_of_many_layers():
    model = nn.Sequential(*(sdpa(attn_mask=WINDOW) for _ in range(6)), sdpa(is_causal=True))
    with pytest.warns(UserWarning, match=r", in 0, 1, 2, 3 and 2 more$"):
        calls = calls_of(model, torch.randn(1, 1, 50, 16))
    assert [call.name for call in calls] == ["6"]


@st.composite
def masks(draw, length):
    """Draws causal masks of two heads, with a window, padding, documents or a prefix.

    With some sizes of these, the mask equals the causal mask.
    """
    i, j = torch.arange(length)[:, None], torch.arange(length)
    sizes = st.integers(0, length)
    window, padding, edge, prefix = (draw(st.one_of(st.just(x), sizes)) for x in (length, 0, 0, 0))
    causal = (j <= i) & (i - j <= window) & ((i < edge) == (j < edge))
    mask = (causal | ((j < prefix) & (i < prefix))) & (j >= padding) | (j == i)
    mask = torch.stack([mask, (j <= i) if draw(st.booleans()) else mask])[None]
    return mask, torch.where(mask, 0.0, -math.inf) if draw(st.booleans()) else mask


@given(st.data(), st.integers(2, 24), st.integers(1, 24))
def test_what_is_kept_has_the_mass_that_its_mask_leaves(data, length, queries):
    mask, given_mask = data.draw(masks(length))
    x, model = torch.randn(1, 2, length, 8), sdpa(attn_mask=given_mask)
    positions = sample_positions(length, queries)
    causal = bool((mask[..., positions, :] == torch.ones(length, length).tril()[positions]).all())
    if not causal:
        with pytest.raises(ValueError, match=MASK):
            calls_of(model, x, queries=queries)
        return
    (call,) = calls_of(model, x, queries=queries)
    found = gate_quality(call.q, call.k, 4, 2, positions=call.positions, scale=call.scale)[4]
    selected = reference_selection(2 * x, 3 * x, 4, 2, is_causal=True)
    read = reference_mask(selected, 4, length, is_causal=True)
    scores = ((2 * x) @ (3 * x).mT * 8**-0.5).masked_fill(~mask, -math.inf)
    expected = scores.softmax(-1).masked_fill(~read, 0.0)[:, :, positions].sum(-1).mean((0, 2))
    torch.testing.assert_close(found.mass[0], expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_of_transformers_models_layers_with_a_window_are_left_out(attention):
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma3TextConfig(
        **{"vocab_size": 9, "hidden_size": 16, "intermediate_size": 16, "head_dim": 8},
        **{"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1},
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=16,
        attn_implementation=attention,
    )
    model = transformers.Gemma3TextModel(config).eval()
    tokens = torch.arange(50)[None] % 9
    if attention == "eager":  # eager attention calls no function that capture intercepts
        with pytest.raises(ValueError, match="no attention call"):
            calls_of(model, tokens)
        return
    with pytest.warns(UserWarning, match=rf"{MASK}.*layers.0.self_attn, layers.2.self_attn$"):
        calls = calls_of(model, tokens)
    assert [call.name for call in calls] == ["layers.1.self_attn"]
    assert len(calls_of(model, tokens[:, :16])) == 3  # no token is beyond the window


def test_a_chunk_for_a_cache_is_left_out():
    layer = MobaAttention(32, 2, block_size=8, topk=2)
    cache = layer.make_cache(1)

    def steps():
        with torch.no_grad(), capture(layer) as calls:
            layer(torch.randn(1, 50, 32))
            layer(torch.randn(1, 40, 32), cache=cache)
            layer(torch.randn(1, 10, 32), cache=cache)
        return calls

    with pytest.warns(UserWarning, match="called with cache, in moba"):
        calls = steps()
    assert [call.k.shape[2] for call in calls] == [50]


@pytest.mark.parametrize("low", [-math.inf, torch.finfo(torch.float32).min])
def test_a_mask_of_numbers_is_causal(low):
    mask = torch.full((1, 1, 50, 50), low).triu(1)
    with capture(sdpa(attn_mask=mask)) as calls:
        sdpa(attn_mask=mask)(torch.randn(1, 1, 50, 16))
    assert len(calls) == 1


def test_an_error_in_the_model_is_its_own():
    model = sdpa(is_causal=True)
    with pytest.raises(RuntimeError, match="mine"), capture(model):
        raise RuntimeError("mine")


@pytest.mark.parametrize(("length", "queries"), [(10, 10), (10, 99), (1000, 7), (1001, 600)])
def test_samples_one_of_each_stretch(length, queries):
    positions = sample_positions(length, queries)
    n = min(length, queries)
    assert positions.shape == (n,)
    ends = [i * length // n for i in range(n + 1)]
    for position, start, end in zip(positions.tolist(), ends, ends[1:], strict=False):
        assert start <= position < end


# ---- Tuning -------------------------------------------------------------------------------------


def test_measures_the_grid(capsys):
    q, k = torch.randn(1, 4, 200, 16), torch.randn(1, 2, 200, 16)
    report = tune([(q, k)], (32, 50, 200), (2, 4, 7), backward=True, queries=200)
    assert [(x.block_size, x.topk) for x in report.choices] == [(32, 2), (32, 4), (50, 2)]
    for choice in report.choices:
        selected = reference_selection(q, k, choice.block_size, choice.topk, is_causal=True)
        mask = reference_mask(selected, choice.block_size, 200, is_causal=True)
        assert choice.sparsity == pytest.approx(1 - float(mask.sum() / causal(q, k).sum()))
        measured = gate_quality(q, k, choice.block_size, choice.topk)[choice.block_size]
        assert choice.mass == pytest.approx(float(measured.mass.mean()))
        assert choice.best_mass == pytest.approx(float(measured.best_mass.mean()))
        assert choice.found == pytest.approx(float(measured.found.mean()))
        assert choice.snr == pytest.approx(float(measured.snr.mean()))
        assert choice.heads == [pytest.approx(measured.mass[0].tolist())]
        assert choice.worst_mass == pytest.approx(float(measured.mass.min()))
        assert choice.forward_ms > 0
        assert choice.both_ms > 0
    assert report.dense_forward_ms > 0
    assert report.dense_both_ms > 0
    assert report.inputs == "batch 1, heads 4/2, length 200, head dim 16, float32"
    restored = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    choices = [Choice(**x) for x in restored.pop("choices")]
    versions = {name: restored.pop(name) for name in report.versions}
    assert Report(**restored, versions=versions, choices=choices) == report


def test_measures_sub_blocks_of_the_blocks_that_they_divide():
    q, k = torch.randn(1, 4, 200, 16), torch.randn(1, 2, 200, 16)
    report = tune([(q, k)], (32, 50), (2, 3), gate_block_sizes=(16, 10))
    found = [(x.block_size, x.gate_block_size, x.topk) for x in report.choices]
    gates = [(32, None), (32, 16), (50, None), (50, 10)]
    assert found == [(*gate, topk) for gate in gates for topk in (2, 3)]
    for x in report.choices:
        quality = gate_quality(q, k, x.block_size, x.topk, gate_block_size=x.gate_block_size)
        assert x.mass == pytest.approx(float(quality[x.block_size].mass.mean()))
        assert x.lost_mass == pytest.approx(x.best_mass - x.mass)
        assert x.forward_ms > 0
    assert len({x.mass for x in report.choices}) == len(report.choices)
    heading, _, *rows = [line.split("|")[3].strip() for line in report.table().splitlines()]
    assert [heading, *rows] == ["sub-block", "", "", "16", "16", "", "", "10", "10"]
    assert [x.block for x in report.choices[1:3]] == ["block 32", "block 32, sub-block 16"]


def test_measures_with_blocks_that_are_always_selected():
    q, k = torch.randn(1, 4, 200, 16), torch.randn(1, 2, 200, 16)
    always = {"sink_blocks": 1, "local_blocks": 1}
    report = tune([(q, k)], (16,), (3, 5), **always)
    for x in report.choices:
        assert (x.sink_blocks, x.local_blocks) == (1, 1)
        mass = gate_quality(q, k, 16, x.topk, **always)[16].mass
        assert x.mass == pytest.approx(float(mass.mean()))
        selected = reference_selection(q, k, 16, x.topk, is_causal=True, **always)
        mask = reference_mask(selected, 16, 200, is_causal=True)
        assert x.sparsity == pytest.approx(1 - float(mask.sum() / causal(q, k).sum()))
        assert x.forward_ms > 0


def test_layers_are_told_apart_and_batches_of_one_averaged():
    torch.manual_seed(0)
    calls = [
        Call(name, *torch.randn(2, 1, 2, 64, 8), torch.arange(64), 1.0) for name in ("a", "b", "a")
    ]
    report = tune(calls, (16,), (2,), timed=False)
    a, b, again = (gate_quality(x.q, x.k, 16, 2, scale=1.0)[16].mass[0] for x in calls)
    assert report.layers == ["a", "b"]
    assert report.choices[0].heads == [
        pytest.approx(((a + again) / 2).tolist()),
        pytest.approx(b.tolist()),
    ]
    assert report.dense_forward_ms is None


def test_a_choice_that_fails_costs_no_other_result(monkeypatch):
    def fails(q, k, v, block_size, topk, **_):
        if (block_size, topk) in without:
            raise torch.OutOfMemoryError("no memory\nand more lines")
        return flex_moba(q, k, v, block_size, topk)

    monkeypatch.setattr("flexmoba.tune.measure.flex_moba", fails)
    calls, without = [tuple(torch.randn(2, 1, 2, 64, 8))], [(16, 2)]
    with pytest.warns(
        UserWarning, match="block_size=16, topk=2 failed and was omitted: no memory$"
    ):
        report = tune(calls, (8, 16), (2, 3))
    assert [(x.block_size, x.topk) for x in report.choices] == [(8, 2), (8, 3), (16, 3)]
    without = [(8, 2), (8, 3)]
    with pytest.warns(match="omitted"), pytest.raises(torch.OutOfMemoryError):
        tune(calls, (8,), (2, 3))


def test_dense_attention_that_fails_costs_no_other_result(monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("no memory\nand more lines")

    monkeypatch.setattr("flexmoba.tune.measure._dense", fails)
    with pytest.warns(UserWarning, match="dense attention failed and was not timed: no memory$"):
        report = tune([tuple(torch.randn(2, 1, 2, 64, 8))], (16,), (2,), backward=True)
    assert report.dense_forward_ms is None
    assert report.timed
    assert report.recommend(latency_ms=1e9) == report.choices[0]
    assert "both ms" in report.table()
    assert f"{report.choices[0].both_ms:.2f} |" in report.table()


def report_of(*choices):
    """Returns a report of choices given as (sparsity, mass, ms)."""
    empty = Choice(8, 1, 0.0, 0.0, 0.0, None, None, None, None, None, [[0.0]])
    return Report(
        "cpu",
        {"torch": ""},
        "",
        [""],
        None if choices[0][2] is None else 9.0,
        None,
        [
            dataclasses.replace(empty, topk=i, sparsity=sparsity, mass=mass, forward_ms=ms)
            for i, (sparsity, mass, ms) in enumerate(choices)
        ],
    )


def topks(choices):
    return [x.topk for x in choices]


def test_frontier_and_advice():
    report = report_of((0.9, 0.5, 1.0), (0.8, 0.7, 4.0), (0.7, 0.7, 2.0), (0.5, 0.9, 5.0))
    assert topks(report.frontier()) == [0, 1, 3]
    assert topks(report.frontier("forward_ms")) == [0, 2, 3]
    assert report.recommend(sparsity=0.8).topk == 1
    assert report.recommend(sparsity=0.95) is None
    assert report.recommend(latency_ms=4.5).topk == 1
    assert report.recommend(latency_ms=0.5) is None
    assert report.recommend(mass=0.6).topk == 2  # the fastest
    assert report.recommend(mass=0.95) is None
    untimed = report_of((0.9, 0.5, None), (0.8, 0.7, None), (0.7, 0.7, None))
    assert untimed.recommend(mass=0.6).topk == 1  # the sparsest
    with pytest.raises(ValueError, match="nothing was timed"):
        untimed.recommend(latency_ms=1)
    with pytest.raises(ValueError, match="exactly one of mass, sparsity and latency_ms, got mass="):
        report.recommend()
    with pytest.raises(ValueError, match="exactly one of mass, sparsity and latency_ms, got mass="):
        report.recommend(mass=0.5, sparsity=0.5)


def test_the_table_marks_frontier_and_advice():
    report = report_of((0.9, 0.5, 1.0), (0.8, 0.4, 4.0))
    lines = report.table(report.choices[0]).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["* <-", ""]
    assert "1.00 (9.0x)" in lines[2]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    ("calls", "options", "text"),
    [
        ([], {}, "calls is empty"),
        ([(torch.zeros(1, 1, 64, 8),) * 2], {"block_sizes": (64,)}, "select all of 64 keys"),
        ([(torch.zeros(1, 1, 64, 8),) * 2], {"topks": ()}, "select all of 64 keys"),
        ([(torch.zeros(1, 1, 64, 8),) * 2], {"block_sizes": (0, 8)}, "block_size"),
        ([(torch.zeros(1, 1, 64, 8), torch.zeros(1, 1, 64, 9))], {}, "q|k"),
        ([(torch.zeros(1, 1, 64, 8),) * 2], {"queries": 0}, "queries must be at least 1, got 0"),
        (
            [(torch.full((1, 1, 64, 8), math.nan),) * 2],
            {"block_sizes": (8,)},
            "q or k of a call contain NaN or inf",
        ),
        (
            [(torch.zeros(1, 1, 64, 8),) * 2, (torch.zeros(1, 2, 64, 8),) * 2],
            {"block_sizes": (8,)},
            "same number of query heads, got 1 and 2 for ''",
        ),
        (
            [(torch.zeros(1, 1, 64, 8),) * 2],
            {"block_sizes": (16, 24), "gate_block_sizes": (8, 16)},
            "gate_block_sizes must divide larger block_sizes, got 16 and block_sizes",
        ),
        (
            [(torch.zeros(1, 1, 64, 8),) * 2],
            {"block_sizes": (8,), "sink_blocks": 1, "local_blocks": 1},
            "topk=2 is too small for sink_blocks=1 and local_blocks=1 and the own block; use at",
        ),
        (
            [(torch.zeros(1, 1, 64, 8),) * 2],
            {"gate_block_sizes": (0,)},
            "gate_block_sizes must be at least 1, got 0",
        ),
    ],
)
def test_tune_refuses(calls, options, text):
    with pytest.raises(ValueError, match=text):
        tune(calls, timed=False, **options)


@pytest.mark.gpu
def test_on_a_gpu():
    q, k = torch.randn(2, 1, 4, 2048, 64, device="cuda").bfloat16()
    on_gpu = tune([(q, k)], (128, 256), (2, 4), backward=True)
    on_cpu = tune([(q.cpu(), k.cpu())], (128, 256), (2, 4), timed=False)
    for a, b in zip(on_gpu.choices, on_cpu.choices, strict=True):
        assert a.mass == pytest.approx(b.mass, abs=1e-3)
        assert a.snr == pytest.approx(b.snr, abs=1e-2)
