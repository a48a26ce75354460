"""Tests of `flexmoba.nn`."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from flexmoba import MobaCache, flex_moba, moba_reference
from flexmoba.nn import FlexMoba, KeyConv, MobaAttention
from tests.conftest import assert_bitwise_equal

few = settings(max_examples=15)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_flex_moba_as_a_module_is_the_function():
    q, k, v = torch.randn(3, 1, 2, 100, 16)
    module = FlexMoba(16, 3, eval_topk=2, gate="group")
    assert_bitwise_equal(module(q, k, v), flex_moba(q, k, v, 16, 3, gate="group"))
    assert_bitwise_equal(module(q, k, v, gate="token"), flex_moba(q, k, v, 16, 3))
    module.eval()
    assert_bitwise_equal(module(q, k, v), flex_moba(q, k, v, 16, 2, gate="group"))
    module.eval_topk = "same"
    assert_bitwise_equal(module(q, k, v), flex_moba(q, k, v, 16, 3, gate="group"))
    assert not module.state_dict()
    assert repr(module) == "FlexMoba(block_size=16, topk=3, gate='group')"


@pytest.mark.parametrize("sizes", [(0, 2, 1), (4, 0, 1), (4, 2, 0)])
def test_flex_moba_as_a_module_refuses_sizes(sizes):
    with pytest.raises(ValueError, match="got 0"):
        FlexMoba(*sizes[:2], eval_topk=sizes[2])


def test_flex_moba_as_a_module_refuses_options():
    with pytest.raises(TypeError, match="no option 'gat'"):
        FlexMoba(16, 3, gat="group")
    with pytest.raises(ValueError, match="topk=2 is too small"):
        FlexMoba(16, 4, eval_topk=2, sink_blocks=2)
    with pytest.raises(ValueError, match="gate_block_size=5 and block_size=16"):
        FlexMoba(16, 4, gate_block_size=5)


def test_a_layer_and_its_cache_have_the_same_sub_blocks():
    layer = MobaAttention(8, 2, block_size=8, topk=2, gate_block_size=2, dtype=torch.float64)
    x = torch.randn(1, 50, 8, dtype=torch.float64)
    with torch.no_grad():
        cache = layer.make_cache(1)
        outs = [layer(part, cache=cache) for part in x.split(17, dim=1)]
    out = layer(x)
    torch.testing.assert_close(torch.cat(outs, 1), out)
    layer.moba.options.clear()
    assert not torch.allclose(layer(x), out)


@dataclass(frozen=True)
class Sizes:
    """Sizes of one layer and its input."""

    batch: int
    length: int
    kv_heads: int
    group: int
    head_dim: int
    block_size: int
    topk: int
    rope_base: float | None
    bias: bool
    key_conv: int | None
    seed: int

    def layer(self, dtype: torch.dtype = torch.float64) -> MobaAttention:
        torch.manual_seed(self.seed)
        layer = MobaAttention(
            12,
            self.kv_heads * self.group,
            self.kv_heads,
            head_dim=self.head_dim,
            block_size=self.block_size,
            topk=self.topk,
            rope_base=self.rope_base,
            bias=self.bias,
            key_conv=self.key_conv,
            dtype=dtype,
        )
        if layer.key_conv is not None:
            nn.init.normal_(layer.key_conv.weight)
        return layer

    def x(self, dtype: torch.dtype = torch.float64) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.batch, self.length, 12, generator=generator, dtype=dtype)


@st.composite
def sizes(draw: DrawFn, max_batch: int = 2) -> Sizes:
    return Sizes(
        batch=draw(st.integers(1, max_batch)),
        length=draw(st.integers(1, 60)),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 2)),
        head_dim=draw(st.sampled_from((2, 6, 8))),
        block_size=draw(st.integers(1, 20)),
        topk=draw(st.integers(1, 4)),
        rope_base=draw(st.sampled_from((None, 100.0, 10000.0))),
        bias=draw(st.booleans()),
        key_conv=draw(st.sampled_from((None, 3, 5))),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


EXAMPLE = Sizes(2, 50, 2, 2, 8, 8, 3, 10000.0, True, 3, seed=0)


def written_out(layer: MobaAttention, x: Tensor) -> Tensor:
    """Computes the layer by its definition, one token, one lag and one pair of dims at a time."""
    heads = [
        F.linear(x, proj.weight, proj.bias).view(*x.shape[:2], -1, layer.head_dim).transpose(1, 2)
        for proj in (layer.q_proj, layer.k_proj, layer.v_proj)
    ]
    q, k, v = heads
    if layer.key_conv is not None:
        channels = k.transpose(1, 2).flatten(2)  # (B, L, C)
        rows = []
        for t in range(x.shape[1]):
            mixed = torch.zeros_like(channels[:, 0])
            for lag in range(min(t + 1, layer.key_conv.width)):
                mixed = mixed + layer.key_conv.weight[:, lag] * channels[:, t - lag]
            rows.append(channels[:, t] + mixed * torch.sigmoid(mixed))
        k = torch.stack(rows, 1).view(*x.shape[:2], -1, layer.head_dim).transpose(1, 2)
    if layer.rope_base is not None:
        half = layer.head_dim // 2
        angles = torch.tensor(
            [
                [t * layer.rope_base ** (-2 * i / layer.head_dim) for i in range(half)]
                for t in range(x.shape[1])
            ],
            dtype=x.dtype,
        )
        turn = torch.polar(torch.ones_like(angles), angles)

        def turned(y: Tensor) -> Tensor:
            pairs = torch.complex(y[..., :half], y[..., half:]) * turn
            return torch.cat([pairs.real, pairs.imag], -1)

        q, k = turned(q), turned(k)
    out = moba_reference(q, k, v, layer.moba.block_size, layer.moba.topk)
    return F.linear(out.transpose(1, 2).flatten(2), layer.o_proj.weight, layer.o_proj.bias)


def gradients(layer: nn.Module, out: Tensor) -> tuple[Tensor, ...]:
    upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).to(out).view_as(out)
    return torch.autograd.grad(out, list(layer.parameters()), upstream)


@few
@given(sizes())
def test_the_layer_and_its_gradients_are_what_it_says(sizes):
    layer, x = sizes.layer(), sizes.x()
    out, expected = layer(x), written_out(layer, x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients(layer, out), gradients(layer, expected))


@few
@given(sizes(max_batch=1), st.lists(st.integers(0, 60), max_size=5))
def test_packed_documents_are_as_if_alone(sizes, cuts):
    layer, x = sizes.layer(), sizes.x()
    bounds = [0, *sorted(min(cut, sizes.length) for cut in cuts), sizes.length]
    alone = [layer(x[:, a:b]) for a, b in itertools.pairwise(bounds) if a < b]
    expected = torch.cat(alone, 1)
    torch.testing.assert_close(layer(x, cu_seqlens=torch.tensor(bounds)), expected)
    ids = torch.arange(len(bounds) - 1).repeat_interleave(torch.tensor(bounds).diff())[None]
    torch.testing.assert_close(layer(x, document_ids=ids), expected)


@few
@given(sizes(), st.data())
def test_padding_does_not_matter(sizes, data):
    layer, x = sizes.layer(), sizes.x()
    share = data.draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))  # of padding, also between tokens
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    real = torch.rand(x.shape[:2], generator=generator) >= share
    out = layer(x.masked_fill(~real[..., None], float("nan")), key_padding_mask=real)
    loss, expected = out[real].square().sum(), torch.zeros((), dtype=x.dtype)
    for row, mask, actual in zip(x, real, out, strict=True):
        if mask.any():
            alone = layer(row[mask][None])[0]
            torch.testing.assert_close(actual[mask], alone)
            expected = expected + alone.square().sum()
    if real.any():
        grads = (torch.autograd.grad(y, list(layer.parameters())) for y in (loss, expected))
        torch.testing.assert_close(*grads)
    nothing = torch.zeros_like(out) if layer.o_proj.bias is None else layer.o_proj.bias
    assert_bitwise_equal(out[~real], nothing.expand_as(out)[~real])


def test_positions_begin_anew_with_every_sequence():
    # Except for rounding, attention depends only on differences of positions. With this base, the
    # rotation is so fast that rounding reveals positions: no two positions have the same angles.
    layer = replace(EXAMPLE, rope_base=7e-21, key_conv=None).layer()
    x = EXAMPLE.x()[:1]
    first, second = layer(x[:, :20]), layer(x[:, 20:])
    real = torch.arange(50)[None] >= 20
    for out in (
        layer(x, cu_seqlens=torch.tensor([0, 20, 50])),
        layer(x, document_ids=real.int()),
    ):
        torch.testing.assert_close(out, torch.cat([first, second], 1))
    padded = layer(x, key_padding_mask=real)
    torch.testing.assert_close(padded[:, 20:], second)
    with torch.no_grad():
        cache = layer.make_cache(1)
        out = layer(x, cache=cache, key_padding_mask=real)
    torch.testing.assert_close(out[:, 20:], second)


@few
@given(sizes(), st.data())
@torch.no_grad()
def test_chunks_and_steps_equal_one_call(sizes, data):
    layer, x = sizes.layer(), sizes.x()
    cache = layer.make_cache(sizes.batch, data.draw(st.sampled_from((None, sizes.length))))
    outs = []
    start = 0
    while start < sizes.length:
        n = data.draw(st.integers(1, 3) | st.integers(1, sizes.length))
        outs.append(layer(x[:, start : start + n], cache=cache))
        start += n
    torch.testing.assert_close(torch.cat(outs, 1), layer(x))


@few
@given(sizes(), st.data())
@torch.no_grad()
def test_rows_of_different_lengths_are_decoded_on_their_own(sizes, data):
    layer, x = sizes.layer(), sizes.x()
    cache = layer.make_cache(sizes.batch)
    ends = [0] * sizes.batch
    for _ in range(3):  # padded chunks, with the tokens of each row anywhere in the chunk
        take = [data.draw(st.integers(0, sizes.length - end)) for end in ends]
        n = max(take) + data.draw(st.integers(1, 2))
        chunk, real = x.new_full((sizes.batch, n, 12), float("nan")), torch.zeros(sizes.batch, n)
        for row, (end, count) in enumerate(zip(ends, take, strict=True)):
            first = data.draw(st.integers(0, n - count))
            chunk[row, first : first + count] = x[row, end : end + count]
            real[row, first : first + count] = 1
        out = layer(chunk, cache=cache, key_padding_mask=real.bool())
        for row, (end, count) in enumerate(zip(ends, take, strict=True)):
            if count:
                alone = layer(x[row : row + 1, : end + count])[0, end:]
                torch.testing.assert_close(out[row][real[row].bool()], alone)
        ends = [end + count for end, count in zip(ends, take, strict=True)]
    assert cache.lengths.tolist() == ends


@torch.no_grad()
@pytest.mark.parametrize(("max_len", "rows"), [(None, [1, 0]), (50, [1, 0, 1])])
def test_a_cache_of_inference_mode_goes_on_outside(max_len, rows):
    layer, x = EXAMPLE.layer(), EXAMPLE.x()
    with torch.inference_mode():
        cache = layer.make_cache(2, max_len)
        layer(x[:, :10], cache=cache)
        layer(x[:, 10:25], cache=cache)
        cache.reorder(torch.tensor(rows))
    out = [layer(part, cache=cache) for part in x[rows, 25:].split(1, dim=1)]
    torch.testing.assert_close(torch.cat(out, 1), layer(x)[rows, 25:])


@torch.no_grad()
@pytest.mark.parametrize("max_len", [None, 50])
def test_a_cache_cropped_reset_or_reordered_goes_on_from_there(max_len):
    layer, x = EXAMPLE.layer(), EXAMPLE.x()
    cache = layer.make_cache(2, max_len)

    def decode(x: Tensor, start: int) -> Tensor:
        parts = x[:, start:].split(1, dim=1)
        return torch.cat([layer(part, cache=cache) for part in parts], 1)

    expected = decode(x, 0)
    torch.testing.assert_close(expected, layer(x))
    for length in (49, 24, 1):
        cache.crop(length)
        assert_bitwise_equal(decode(x, length), expected[:, length:])
    cache.crop(30)
    rows = torch.tensor([1, 0])
    cache.reorder(rows)
    assert_bitwise_equal(decode(x[rows], 30), expected[rows, 30:])
    cache.reset()
    assert_bitwise_equal(decode(x, 0), expected)


def test_a_new_key_convolution_changes_nothing():
    plain = MobaAttention(16, 2, block_size=8, topk=2)
    convolved = MobaAttention(16, 2, block_size=8, topk=2, key_conv=5)
    convolved.load_state_dict(plain.state_dict() | {"key_conv.weight": torch.zeros(16, 5)})
    assert not convolved.key_conv.weight.any()
    x = torch.randn(1, 30, 16)
    out = convolved(x)
    assert_bitwise_equal(out, plain(x))
    out.square().sum().backward()
    assert (convolved.key_conv.weight.grad != 0).all()  # so that training can change the weights


def test_state_dict_and_repr():
    layer = EXAMPLE.layer()
    shapes = {name: tuple(x.shape) for name, x in layer.state_dict().items()}
    assert shapes == {
        "q_proj.weight": (32, 12),
        "q_proj.bias": (32,),
        "k_proj.weight": (16, 12),
        "k_proj.bias": (16,),
        "v_proj.weight": (16, 12),
        "v_proj.bias": (16,),
        "o_proj.weight": (12, 32),
        "o_proj.bias": (12,),
        "key_conv.weight": (16, 3),
    }
    text = repr(layer)
    assert "head_dim=8, rope_base=10000.0" in text
    assert "(key_conv): KeyConv(channels=16, width=3)" in text
    assert "(moba): FlexMoba(block_size=8, topk=3)" in text
    meta = MobaAttention(12, 4, 2, block_size=8, topk=3, key_conv=3, device="meta")
    meta.to_empty(device="cpu").key_conv.reset_parameters()
    assert not meta.key_conv.weight.any()


# torch.compile itself causes this warning for an autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiles_to_one_graph_that_serves_all_lengths():
    layer = EXAMPLE.layer()
    counter = CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for length in (50, 34, 61):
        x = torch.randn(2, length, 12, dtype=torch.float64)
        out, expected = compiled(x), layer(x)
        assert_bitwise_equal(out, expected)
        for actual, eager in zip(*(gradients(layer, y) for y in (out, expected)), strict=True):
            assert_bitwise_equal(actual, eager)
    assert counter.frame_count <= 2
    x, bounds = torch.randn(1, 50, 12, dtype=torch.float64), torch.tensor([0, 3, 20, 50])
    assert_bitwise_equal(compiled(x, cu_seqlens=bounds), layer(x, cu_seqlens=bounds))


@pytest.mark.usefixtures("fresh_dynamo")
@torch.no_grad()
def test_a_compiled_step_compiles_once():
    layer, x = EXAMPLE.layer(), EXAMPLE.x()
    counter = CompileCounter()
    step = torch.compile(layer, fullgraph=True, backend=counter)
    eager, cache = layer.make_cache(2, 50), layer.make_cache(2, 50)
    for part in x.split(1, dim=1):
        assert_bitwise_equal(step(part, cache=cache), layer(part, cache=eager))
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # torch's own import
@pytest.mark.usefixtures("fresh_dynamo")
@torch.no_grad()
def test_inductor_does_not_take_positions_from_lengths_that_were_changed_since():
    layer, x = EXAMPLE.layer(), EXAMPLE.x()[:, :20]
    step = torch.compile(layer, fullgraph=True)
    cache = layer.make_cache(2, 20)
    out = torch.cat([step(part, cache=cache) for part in x.split(1, dim=1)], 1)
    torch.testing.assert_close(out, layer(x))


# Warnings of torch.export's own code.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@torch.no_grad()
def test_an_exported_layer_equals_it_at_any_length():
    layer, x = EXAMPLE.layer().eval(), EXAMPLE.x()
    # More than topk blocks, since at most topk blocks are full attention, another program.
    length = torch.export.Dim("length", min=25)
    exported = torch.export.export(layer, (x,), dynamic_shapes={"x": {1: length}})
    for n in (25, 50, 64, 101):
        x = torch.randn(2, n, 12, dtype=torch.float64)
        assert_bitwise_equal(exported.module()(x), layer(x))


def test_autocast_projects_and_attends_in_half_precision():
    layer, x = EXAMPLE.layer(torch.float32), EXAMPLE.x(torch.float32)
    seen = []
    layer.moba.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        with torch.no_grad():
            cache = layer.make_cache(2)
            cached = layer(x, cache=cache)
    assert {x.dtype for x in seen} == {torch.bfloat16}
    assert (out.dtype, cache.k.dtype) == (torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close(cached, out)
    out.float().square().mean().backward()
    assert {x.grad.dtype for x in layer.parameters()} == {torch.float32}
    # The error is compared with the error of full attention under the same autocast.
    with torch.autocast("cpu", torch.bfloat16):
        layer.moba.topk = None
        dense = layer(x)
    exact = layer(x)
    layer.moba.topk = 3
    error, dense_error = (out - layer(x)).abs().mean(), (dense - exact).abs().mean()
    assert error <= 2 * dense_error


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_no_bit(use_reentrant):
    layer, x = EXAMPLE.layer(), EXAMPLE.x().requires_grad_()
    results = []
    for out in (layer(x), checkpoint(layer, x, use_reentrant=use_reentrant)):
        layer.zero_grad()
        out.square().mean().backward()
        results.append([out.detach(), *(p.grad for p in layer.parameters())])
    for actual, expected in zip(*results, strict=True):
        assert_bitwise_equal(actual, expected)


class Quantised(nn.Module):
    """Linear map with 8-bit weights, whose scales are a buffer if ``scales``."""

    def __init__(self, linear, scales=True, weight_dtype=torch.int8):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(weight_dtype))
        if scales:
            self.register_buffer("scale", scale)
        else:
            self.scale = scale

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale.to(x.dtype)).T


class Plain(nn.Module):
    """Projection of another library, without parameters and buffers."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach()
        self.call = lambda x: x @ weight.T

    def forward(self, x):
        return self.call(x)


def wrapped_all(layer, wrap):
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        setattr(layer, name, wrap(getattr(layer, name)))
    return layer


@pytest.mark.parametrize(
    ("wrap", "options"),
    [
        (Quantised, {}),
        (lambda linear: Quantised(linear, weight_dtype=torch.float8_e4m3fn), {}),
        (lambda linear: Quantised(linear, scales=False), {"dtype": torch.float32}),
        (nn.Sequential, {}),
        (nn.Sequential, {"dtype": torch.float32}),
        (lambda linear: torch.compile(linear, backend="eager"), {}),
        (Plain, {"dtype": torch.float32, "device": "cpu"}),
    ],
)
@torch.no_grad()
def test_a_cache_for_projections_that_are_wrapped_or_quantised(wrap, options):
    layer = wrapped_all(EXAMPLE.layer(torch.float32), wrap)
    cache, x = layer.make_cache(2, **options), EXAMPLE.x().float()
    outs = [layer(part, cache=cache) for part in x.split(30, dim=1)]
    torch.testing.assert_close(torch.cat(outs, 1), layer(x))


@torch.no_grad()
def test_a_cache_for_quantised_projections_follows_autocast():
    layer = wrapped_all(EXAMPLE.layer(torch.float32), lambda x: Quantised(x, scales=False))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.make_cache(2).k.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("wrap", "options", "text"),
    [
        (lambda x: Quantised(x, scales=False), {}, "a Quantised, .* dtype=None and device=cpu; "),
        (Plain, {}, "from k_proj, a Plain, got dtype=None and device=None; pass both"),
        (Plain, {"dtype": torch.half}, "dtype=torch.float16 and device=None; pass both"),
    ],
)
def test_a_cache_that_nothing_tells_the_dtype_of_is_refused(wrap, options, text):
    layer = wrapped_all(MobaAttention(16, 4, block_size=8, topk=2), wrap)
    with pytest.raises(ValueError, match=text):
        layer.make_cache(2, **options)


@pytest.mark.gpu
def test_the_layer_on_cuda_and_a_step_in_a_cuda_graph():
    # Float32, so that the gate rarely selects other blocks than in float64.
    sizes = replace(EXAMPLE, length=300, head_dim=64, block_size=64)
    exact, x = sizes.layer(), sizes.x()
    layer, x32 = sizes.layer(torch.float32).cuda(), x.float().cuda()
    layer.load_state_dict(exact.state_dict())
    out, expected = layer(x32), written_out(exact, x)
    close = {"rtol": 1e-3, "atol": 1e-4, "check_dtype": False, "check_device": False}
    torch.testing.assert_close(out, expected, **close)
    torch.testing.assert_close(gradients(layer, out), gradients(exact, expected), **close)

    with torch.no_grad():
        cache = layer.make_cache(2, max_len=300)
        layer(x32[:, :299], cache=cache)
        token = x32[:, 299:].clone()
        layer(token, cache=cache)  # compiles the kernels before the capture
        cache.crop(299)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step = layer(token, cache=cache)
        for _ in range(2):
            cache.crop(299)
            graph.replay()
            torch.testing.assert_close(step, expected[:, 299:], **close)


X = torch.zeros(2, 10, 16)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"heads": 0}, ValueError, "heads must be at least 1, got 0"),
        ({"heads": 3, "kv_heads": 2}, ValueError, "heads=3 and kv_heads=2"),
        ({"dim": 15}, ValueError, "dim=15 and heads=4"),
        ({"head_dim": 0}, ValueError, "head_dim must be at least 1, got 0"),
        ({"head_dim": 3, "rope_base": 1e4}, ValueError, "head_dim=3"),
        ({"rope_base": 0.0}, ValueError, "rope_base=0.0"),
        ({"dropout": 0.1}, NotImplementedError, "dropout=0.1; use 0"),
        ({"key_conv": 4}, ValueError, "3 or 5, got 4"),
        ({"return_aux": None}, TypeError, "return_aux"),
        ({"cu_seqlens": torch.tensor([0, 10])}, TypeError, "no option 'cu_seqlens'"),
        ({"cache": None}, TypeError, "no option 'cache'"),
        ({"dim": "16"}, TypeError, "dim must be an int, got '16'"),
        ({"heads": 4.0}, TypeError, "heads must be an int, got 4.0"),
        ({"key_conv": 3.0}, ValueError, "3 or 5, got 3.0"),
        ({"gait": "group"}, TypeError, "no option 'gait'"),
        ({"gate": "tile"}, NotImplementedError, "block_size=8"),
    ],
)
def test_the_layer_refuses(options, error, text):
    options = {"dim": 16, "heads": 4, "block_size": 8, "topk": 2} | options
    with pytest.raises(error, match=text):
        MobaAttention(options.pop("dim"), options.pop("heads"), **options)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m: m(X, cache=m.make_cache(2)), NotImplementedError, "no_grad"),
        (lambda m: m(X, cache=m.make_cache(1)), ValueError, "batch size, got 2 and 1"),
        (lambda m: m(X, cache=m.make_cache(2, dtype=torch.half)), ValueError, "float16 on cpu"),
        (lambda m: m(X, cache=m.make_cache(2, kv_heads=2)), ValueError, "k must be"),
        (lambda m: m(X, cache=MobaCache(2, 4, 4, block_size=8)), TypeError, "make_cache"),
        (lambda m: m(X, key_padding_mask=torch.ones(2, 9).bool()), ValueError, r"\(2, 10\)"),
        (lambda m: m(X, key_padding_mask=torch.ones(2, 10)), TypeError, "float32"),
        (lambda m: m(X, key_padding_mask=[True]), TypeError, "key_padding_mask"),
        (lambda m: m(X, cu_seqlens=torch.tensor([0, 10])), ValueError, "batch of 1"),
        (lambda m: KeyConv(8)(torch.zeros(1, 2, 5, 8)), ValueError, "8 channels, got 2 heads of 8"),
        (lambda m: KeyConv(0), ValueError, "channels must be at least 1"),
        (lambda m: m(X[0]), ValueError, r"x must be \(B, L, dim\), got \(10, 16\)"),
        (lambda m: m._heads(X[..., :6]), ValueError, "6 features on this device"),
    ],
)
def test_a_call_is_refused(call, error, text):
    with pytest.raises(error, match=text):
        call(MobaAttention(16, 4, block_size=8, topk=2, key_conv=3, rope_base=1e4))


def test_a_refused_call_leaves_the_cache_as_it_was():
    layer = EXAMPLE.layer()
    cache = layer.make_cache(2)
    with pytest.raises(NotImplementedError, match="no_grad"):
        layer(EXAMPLE.x(), cache=cache)
    assert not cache.projected.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(layer(EXAMPLE.x(), cache=cache), layer(EXAMPLE.x()))


def test_no_tokens():
    layer = MobaAttention(16, 4, block_size=8, topk=2, key_conv=3, rope_base=1e4)
    mask = torch.ones(2, 0, dtype=torch.bool)
    assert layer(X[:, :0], key_padding_mask=mask).shape == (2, 0, 16)
    assert layer(X[:, :0]).shape == (2, 0, 16)
