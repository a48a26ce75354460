"""The modules of Native Sparse Attention: compression, the layer, and that it learns."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flexmoba.nn import BlockCompress, MobaAttention, NsaAttention
from flexmoba.nn.rotary import rotate
from flexmoba.nsa import nsa_reference
from flexmoba.nsa.reference import reference_means
from tests.conftest import assert_bitwise_equal

SMALL = {"cmp_block": 8, "cmp_stride": 4, "block_size": 8, "topk": 4, "window": 12}


def layer_of(**options) -> NsaAttention:
    """Returns a layer in float64, whose perceptrons are not zero."""
    torch.manual_seed(0)
    layer = NsaAttention(32, 4, 2, **(SMALL | {"rope_base": 100.0} | options), dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    return layer


def by_hand(layer: NsaAttention, x: Tensor, heads: int = 4) -> Tensor:
    """Computes the layer for one sequence with the oracle."""
    length = x.shape[1]
    branches = 3 if layer.window > 0 else 2
    q = layer.q_proj(x).view(*x.shape[:2], heads, -1).transpose(1, 2)
    k = layer.k_proj(x).view(*x.shape[:2], branches, 2, -1).permute(2, 0, 3, 1, 4)
    v = layer.v_proj(x).view(*x.shape[:2], branches, 2, -1).permute(2, 0, 3, 1, 4)
    gates = layer.gate_proj(x).sigmoid().unflatten(-1, (-1, branches)).transpose(1, 2)
    gates = F.pad(gates, (0, 3 - branches))
    starts = range(0, length - layer.sizes.cmp_block + 1, layer.sizes.cmp_stride)
    compressed = []
    for branch, phi in ((k[0], layer.compress_k), (v[0], layer.compress_v)):
        blocks = [branch[:, :, i : i + layer.sizes.cmp_block] for i in starts]
        means = [block.mean(2) for block in blocks]
        if phi.mlp is not None:
            added = [phi.mlp((block + phi.positions).flatten(2)) for block in blocks]
            means = [a + b for a, b in zip(means, added, strict=True)]
        compressed.append(torch.stack(means, 2) if means else branch[:, :, :0])
    position = torch.arange(length)[None]
    if layer.rope_base is not None:
        q, *rotated = (rotate(y, position, layer.rope_base) for y in (q, *k[1:]))
        k = [k[0], *rotated]
        compressed[0] = rotate(compressed[0], position[:, : len(starts) * 4 : 4], layer.rope_base)
    of_window = {"k_win": k[2], "v_win": v[2]} if layer.window > 0 else {}
    out = nsa_reference(
        *(q, k[1], v[1], gates),
        k_cmp=compressed[0],
        v_cmp=compressed[1],
        **of_window,
        window=layer.window,
        **layer.sizes._asdict(),
    )
    return layer.o_proj(out.transpose(1, 2).flatten(2))


# ---- Compression --------------------------------------------------------------------------------


@pytest.mark.parametrize("mlp", [True, False])
def test_compression_begins_with_means(mlp):
    compress = BlockCompress(8, 12, 4, mlp=mlp)
    x = torch.randn(2, 3, 50, 8)
    torch.testing.assert_close(compress(x), reference_means(x, 12, 4))
    assert len(list(compress.parameters())) == (5 if mlp else 0)


@pytest.mark.parametrize("length", [0, 1, 11, 12, 50])
def test_compression_of_any_length(length):
    compress = BlockCompress(8, 12, 4)
    n_blocks = len(range(0, length - 12 + 1, 4))
    assert compress(torch.randn(1, 2, length, 8)).shape == (1, 2, n_blocks, 8)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(any))
@settings(max_examples=20)
def test_compressed_blocks_of_documents_are_listed_in_order(lengths):
    compress = BlockCompress(8, 6, 3, dtype=torch.float64)
    for parameter in compress.parameters():
        nn.init.normal_(parameter)
    bounds = [0, *itertools.accumulate(lengths)]
    x = torch.randn(1, 2, bounds[-1], 8, dtype=torch.float64)
    listed = compress(x, cu_seqlens=torch.tensor(bounds))
    alone = [compress(x[:, :, a:b]) for a, b in itertools.pairwise(bounds)]
    expected = torch.cat(alone, 2)
    assert listed.shape[2] == len(range(0, bounds[-1] - 6 + 1, 3))
    torch.testing.assert_close(listed[:, :, : expected.shape[2]], expected)
    assert (listed[:, :, expected.shape[2] :] == 0).all()


# ---- The layer ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compress": "mean", "gate": "token", "rope_base": None},
        {"head_dim": 6, "value_dim": 5},
        {"topk": 3, "cmp_block": 4},
        {"window": 0},
    ],
    ids=lambda x: "-".join(x),
)
@pytest.mark.parametrize("length", [7, 61])
def test_the_layer_by_hand(options, length):
    layer = layer_of(**options)
    x = torch.randn(2, length, 32, dtype=torch.float64, requires_grad=True)
    results = []
    for out in (layer(x), by_hand(layer, x)):
        inputs = [x, *layer.parameters()]
        grads = torch.autograd.grad(out.square().sum(), inputs, allow_unused=True)
        results.append((out, *(torch.zeros(()) if g is None else g for g in grads)))
    torch.testing.assert_close(*results, rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [{"rope_base": None}, {}, {"window": 0}])
def test_documents_and_padding_as_if_alone(options):
    layer = layer_of(**options)
    x = torch.randn(1, 90, 32, dtype=torch.float64)
    parts = [layer(part) for part in x.split([13, 50, 27], dim=1)]
    packed = layer(x, cu_seqlens=torch.tensor([0, 13, 63, 90]))
    torch.testing.assert_close(packed, torch.cat(parts, 1))
    ids = torch.tensor([4, 5, 4]).repeat_interleave(torch.tensor([13, 50, 27]))[None]
    assert_bitwise_equal(layer(x, document_ids=ids), packed)
    real = (ids == 4).clone()
    alone = layer(x[:, real[0]])
    x[:, ~real[0]] = torch.nan
    out = layer(x, key_padding_mask=real)
    torch.testing.assert_close(out[:, real[0]], alone)
    assert (out[:, ~real[0]] == 0).all()


def test_without_tokens():
    layer = layer_of()
    assert layer(torch.randn(2, 0, 32, dtype=torch.float64)).shape == (2, 0, 32)


def test_selection_gets_its_signal_from_the_gate_of_the_compressed_branch():
    """Tests that a gate value of 0 leaves the scores of the selection without gradients."""
    layer = layer_of(gate="token", rope_base=None)
    x = torch.randn(1, 60, 32, dtype=torch.float64)
    for logit, trained in ((0.0, True), (-torch.inf, False)):
        with torch.no_grad():
            layer.gate_proj.weight.zero_()
            layer.gate_proj.bias.copy_(torch.tensor([logit, 0.0, 0.0]))
        layer.zero_grad()
        layer(x).square().sum().backward()
        key_grads = layer.k_proj.weight.grad.unflatten(0, (3, -1))
        assert [bool((x != 0).any()) for x in key_grads] == [trained, True, True]
        assert bool((layer.compress_k.positions.grad != 0).any()) == trained


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"kv_heads": 3}, ValueError, "heads must be a multiple of kv_heads"),
        ({"dim": 30}, ValueError, "dim must be a multiple of heads"),
        ({"head_dim": 3, "rope_base": 10.0}, ValueError, "needs an even head_dim"),
        ({"compress": "max"}, ValueError, "compress must be one of 'mlp', 'mean', got 'max'"),
        ({"gate": "row"}, ValueError, "gate must be one of 'head', 'token', got 'row'"),
        ({"window": -1}, ValueError, "window must be at least 1, got -1; pass.*or 0"),
        ({"value_dim": 0}, ValueError, "value_dim must be at least 1"),
        ({"cmp_stride": 5}, ValueError, "cmp_stride must divide"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_errors(options, error, match):
    with pytest.raises(error, match=match):
        NsaAttention(**({"dim": 32, "heads": 4, "kv_heads": 2} | options))


def test_errors_of_calls():
    with pytest.raises(ValueError, match=r"x must be \(B, L, dim\)"):
        layer_of()(torch.randn(5, 32, dtype=torch.float64))
    with pytest.raises(ValueError, match="cmp_stride must divide"):
        BlockCompress(8, 6, 4)


# ---- Learning -----------------------------------------------------------------------------------


class Needle(nn.Module):
    """One layer that answers the last token with the value of the only needle in the row."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 32)  # 4 kinds of noise, 4 needles, and the question
        self.attention, self.head = attention, nn.Linear(32, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.attention(self.embed(tokens))[:, -1])


def needles(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws rows of 48 tokens with a needle before the window of the last token."""
    tokens = torch.randint(4, (batch, 48), generator=generator)
    answer = torch.randint(4, (batch,), generator=generator)
    place = torch.randint(34, (batch,), generator=generator)
    tokens[torch.arange(batch), place] = 4 + answer
    tokens[:, -1] = 8
    return tokens, answer


def trained(attention: nn.Module, steps: int) -> float:
    """Returns the loss on new rows after training."""
    generator = torch.Generator().manual_seed(1)
    model = Needle(attention)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        tokens, answer = needles(16, generator)
        loss = F.cross_entropy(model(tokens), answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        tokens, answer = needles(256, generator)
        return F.cross_entropy(model(tokens), answer).item()


def assert_learns(heads: tuple[int, int], steps: int, worst: float) -> None:
    """Asserts the loss, and that the gates of all branches and all other parameters move."""
    torch.manual_seed(0)
    layer = NsaAttention(32, *heads, **SMALL, rope_base=10000.0)
    before = {name: x.clone() for name, x in layer.named_parameters()}
    assert trained(layer, steps) < worst
    moved = {name: (x - before[name]).abs().max().item() for name, x in layer.named_parameters()}
    assert min(moved.values()) > 0.01, moved
    gates = layer.gate_proj.weight - before["gate_proj.weight"]
    assert (gates.unflatten(0, (-1, 3)).abs().amax((0, 2)) > 0.01).all()


def test_learns():
    assert_learns((2, 1), 20, 1.35)  # log(4) = 1.39 before


@pytest.mark.slow
def test_learns_like_full_attention():
    """Tests a needle that only the compressed and the selected branch can reach."""
    torch.manual_seed(0)
    full = trained(MobaAttention(32, 4, 2, block_size=8, topk=None, rope_base=10000.0), 300)
    assert full < 0.01
    assert_learns((4, 2), 300, full + 0.02)
