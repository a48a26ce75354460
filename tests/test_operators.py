"""The operators with tools of torch: fake tensors, FLOP counts, transforms and `opcheck`."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import AuxRequest
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from flexmoba import MobaCache, flex_moba, moba_reference, moba_select, selected_attention
from flexmoba.backends.flex.block_masks import materialize, materialize_all
from flexmoba.backends.flex.range_mask import range_lists
from flexmoba.backends.grouped import grouped_attention
from flexmoba.flops import pairs
from flexmoba.nsa import NsaCache, flex_nsa, nsa_select
from flexmoba.nsa.reference import reference_seen
from flexmoba.runtime import is_plain_call
from tests.conftest import assert_bitwise_equal
from tests.problems import Problem

PROBLEM = Problem(kv_heads=2, group=2, q_len=150, kv_len=150, block_size=16, topk=3)


def by_position(score, b, h, q_idx, kv_idx):
    return score + torch.sin(0.7 * q_idx - 0.3 * kv_idx + h)


def over_selection(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, topk: int, **options
) -> Tensor:
    selection = torch.arange(topk, dtype=torch.int32).expand(*q.shape[:3], -1)
    return selected_attention(q, k, v, selection, block_size, **options)


def nsa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    gates = q.new_ones(*q.shape[:3], 3)
    return flex_nsa(q, k, v, gates, block_size=16, topk=5, window=20)


def nsa_step(max_len: int, window: int = 40) -> None:
    cache = NsaCache(2, 2, 16, value_dim=32, window=window, max_len=max_len)
    k, v = torch.zeros(2, 2, 3, 16), torch.zeros(2, 2, 3, 32)
    cache.attend(torch.zeros(2, 4, 3, 16), torch.zeros(2, 4, 3, 3), cache.append(k, v), topk=4)


# Calls with every argument whose values the operators use.
CALLS = {
    "flex_moba": lambda *qkv: flex_moba(*qkv, 16, 3),
    "not causal": lambda *qkv: flex_moba(*qkv, 16, 3, is_causal=False),
    "full": lambda *qkv: flex_moba(*qkv, 16, None),
    "score_mod": lambda *qkv: flex_moba(*qkv, 16, 3, score_mod=by_position),
    "selection": lambda *qkv: over_selection(*qkv, 16, 3),
    "cu_seqlens": lambda *qkv: flex_moba(*qkv, 16, 3, cu_seqlens=torch.tensor([0, 40, 150])),
    "full cu_seqlens": lambda *qkv: flex_moba(
        *qkv, 16, None, cu_seqlens=torch.tensor([0, 40, 150])
    ),
    "key_padding_mask": lambda *qkv: flex_moba(
        *qkv, 16, 3, key_padding_mask=torch.arange(150)[None] > 20
    ),
    "flex_nsa": nsa,
}


# ---- Plain calls, which need no operators -------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_knows_plain_calls():
    x = torch.randn(3)
    plain = []

    def note(x: Tensor) -> Tensor:
        plain.append(is_plain_call(x))
        return x.clone()

    note(x)
    note(torch.nn.Parameter(x))
    assert plain == [True, True]
    with FlopCounterMode(display=False):
        note(x)
    with FakeTensorMode():
        fake = torch.randn(3)
    note(fake)
    note(x.to("meta"))
    note(WithSubclass(x))
    torch.func.vmap(note)(x)
    make_fx(note)(x)
    torch.jit.trace(note, x, check_trace=False)
    assert plain[2:] == [False] * 7
    assert torch.compile(lambda x: x + is_plain_call(x), backend="eager")(x).equal(x)


class WithSubclass(Tensor):
    pass


def test_cached_calls_without_operators_give_the_same_results():
    def results() -> list[Tensor]:
        q, k, v = PROBLEM.tensors()
        cache = MobaCache(1, 2, PROBLEM.head_dim, block_size=16, dtype=PROBLEM.dtype)
        q, k, v = (x[:1] for x in (q, k, v))
        parts = [slice(0, 100), slice(100, 140), slice(140, 141), slice(141, 144)]
        call = partial(flex_moba, block_size=16, topk=3, cache=cache)
        outs = [call(q[:, :, part], k[:, :, part], v[:, :, part]) for part in parts]
        return [*outs, cache.k, cache.v, cache.means, cache.lengths]

    with torch.no_grad():
        plain = results()
        with FlopCounterMode(display=False) as counter:
            observed = results()
    assert torch.ops.flexmoba.attend_cached in counter.get_flop_counts()["Global"]
    for x, y in zip(plain, observed, strict=True):
        assert_bitwise_equal(x, y)


# ---- Fake tensors, which have no values ---------------------------------------------------------

NO_VALUES = pytest.mark.parametrize(
    "mode", [FakeTensorMode, partial(torch.device, "meta")], ids=["fake", "meta"]
)


def empty_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype).requires_grad_(x.requires_grad)


@NO_VALUES
@pytest.mark.parametrize("name", CALLS)
def test_training_without_values_gives_the_shapes(name, mode):
    def train(inputs):
        out = CALLS[name](*inputs)
        return out, *torch.autograd.grad(out.sum(), inputs)

    inputs = PROBLEM.tensors(requires_grad=True)
    expected = train(inputs)
    with mode():
        results = train([empty_like(x) for x in inputs])
    for x, real in zip(results, expected, strict=True):
        assert (x.shape, x.dtype, x.stride()) == (real.shape, real.dtype, real.stride())


@NO_VALUES
@pytest.mark.parametrize("max_len", [200, None])
def test_a_cache_without_values(mode, max_len):
    tensors = PROBLEM.tensors()
    with mode(), torch.no_grad():
        q, k, v = (empty_like(x) for x in tensors)
        cache = MobaCache(1, 2, 8, block_size=16, max_len=max_len, dtype=q.dtype)

        def attend(n: int, **options) -> Tensor:
            return flex_moba(*(x[:, :, :n] for x in (q, k, v)), 16, 3, cache=cache, **options)

        assert attend(150, key_padding_mask=torch.ones(1, 150, dtype=torch.bool)).shape == q.shape
        cache.crop(100)
        cache.crop(torch.tensor([50]))
        cache.reorder(torch.tensor([0]))
        assert attend(150).shape == q.shape  # without values, lengths are not checked
        assert attend(1, score_mod=by_position).shape == (1, 4, 1, 8)
        with pytest.raises(NotImplementedError, match=r"fake tensors .* at most 16 tokens"):
            attend(17, score_mod=by_position)


@NO_VALUES
def test_documents_that_values_alone_count_are_refused(mode):
    tensors = PROBLEM.tensors()
    with mode():
        inputs = [empty_like(x) for x in tensors]
        ids = torch.zeros(1, 150, dtype=torch.int32)
        with pytest.raises(
            NotImplementedError, match=r"document_ids .* fake tensors .* cu_seqlens"
        ):
            flex_moba(*inputs, 16, 3, document_ids=ids)
        with pytest.raises(
            NotImplementedError, match=r"document_ids .* fake tensors .* cu_seqlens"
        ):
            moba_select(*inputs[:2], 16, 3, document_ids=ids)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", ["selection", "cu_seqlens", "key_padding_mask", "flex_nsa"])
def test_traced_calls_read_no_value(name, mode):
    inputs = PROBLEM.tensors()
    traced = make_fx(CALLS[name], tracing_mode=mode)(*inputs)
    assert not [x for x in traced.graph.nodes if "local_scalar_dense" in str(x.target)]
    torch.testing.assert_close(traced(*inputs), CALLS[name](*inputs), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("topk", [3, None])
def test_fake_tensors_on_cuda(topk, dtype):
    with FakeTensorMode():
        inputs = [torch.empty(1, 4, 300, 64, dtype=dtype, device="cuda") for _ in "qkv"]
        inputs = [x.requires_grad_() for x in inputs]
        out, aux = flex_moba(*inputs, 64, topk, return_aux=AuxRequest(lse=True))
        grads = torch.autograd.grad(out.sum() + aux.lse.sum(), inputs)
    assert (out.shape, out.dtype) == (inputs[0].shape, dtype)
    assert all(x.shape == y.shape for x, y in zip(grads, inputs, strict=True))


# ---- opcheck ------------------------------------------------------------------------------------

# Operators that run only on CUDA; `test_operators_of_cuda` checks them.
CUDA_ALONE = {
    "attend_fused",
    "attend_fused_backward",
    "attend_grouped",
    "attend_grouped_backward",
    "move_rows",
}
DIFFERENTIABLE = {
    "attend_dense",
    "attend_fused",
    "attend_grouped",
    "attend_portable",
    "move_rows",
}


class Recorder(TorchDispatchMode):
    """Records the first call of each operator of flexmoba, with its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "flexmoba":
            name = function.name().removeprefix("flexmoba::")
            copies = torch.utils._pytree.tree_map_only(Tensor, torch.clone, args)
            self.calls.setdefault(name, (function, copies))
        return function(*args, **(kwargs or {}))


def operators() -> set[str]:
    prefix = "flexmoba::"
    names = torch._C._dispatch_get_all_op_names()
    return {x.removeprefix(prefix).split(".")[0] for x in names if x.startswith(prefix)}


def check_operators(recorder: Recorder, differentiable: set[str]) -> None:
    for name, (function, args) in recorder.calls.items():
        if name in differentiable:
            args = [
                x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
                for x in args
            ]
        torch.library.opcheck(function, tuple(args))


def test_operators():
    inputs = PROBLEM.tensors(requires_grad=True)
    real = torch.arange(150)[None] >= 9
    with Recorder() as recorder:
        flex_moba(*inputs, 16, 3, key_padding_mask=real).sum().backward()
        materialize(real)
        materialize_all([real, real.mT])
        first_key = torch.arange(300, dtype=torch.int32).repeat(2, 1) // 2
        range_lists(first_key, torch.arange(300).int(), 299, True)
        cache = MobaCache(1, 2, 8, block_size=16, dtype=torch.float64)
        flex_moba(*(x.detach() for x in inputs), 16, 3, cache=cache)
        cache.next_positions(1)
        nsa(*inputs)
        nsa_step(150)
        flex_moba(*inputs, 16, None).sum().backward()
    assert recorder.calls.keys() == operators() - CUDA_ALONE
    check_operators(recorder, DIFFERENTIABLE)


@pytest.mark.gpu
def test_operators_of_cuda():
    sizes = {"q_len": 150, "kv_len": 150, "head_dim": 16, "value_dim": 16, "block_size": 32}
    problem = Problem(kv_heads=2, dtype=torch.bfloat16, **sizes)
    inputs = problem.tensors("cuda", requires_grad=True)
    real = torch.arange(150, device="cuda")[None] >= 9
    with Recorder() as recorder:
        flex_moba(*inputs, 32, 2, key_padding_mask=real).float().sum().backward()
        flex_moba(*(x.detach() for x in inputs), 32, None)
        q, k, v = replace(problem, group=8).tensors("cuda", requires_grad=True)
        selection = torch.zeros(1, 2, 150, 1, dtype=torch.int32, device="cuda")
        selected_attention(q, k, v, selection, 32).float().sum().backward()
    assert recorder.calls.keys() >= CUDA_ALONE | {"attend_dense"}
    check_operators(recorder, DIFFERENTIABLE - {"attend_dense"})


# ---- FLOPs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("q_len", "kv_len"), [(150, 150), (37, 150), (1, 150)])
@pytest.mark.parametrize(("block_size", "routed"), [(16, 2), (7, 30), (200, 0)])
def test_pairs_are_those_of_a_mask(q_len, kv_len, block_size, routed):
    expected = 0
    for position in range(kv_len - q_len, kv_len):
        own = position // block_size
        expected += position % block_size + 1 + min(routed, own) * block_size
    assert pairs(q_len, kv_len, block_size, routed, is_causal=True) == expected
    expected = q_len * min(routed * block_size, kv_len)
    assert pairs(q_len, kv_len, block_size, routed, is_causal=False) == expected


def flops_of(step) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_flops_of_a_step_of_training(device):
    problem = Problem(
        batch=2, kv_heads=2, group=2, q_len=150, kv_len=150, head_dim=16, value_dim=32,
        block_size=16, topk=3, dtype=torch.float32 if device == "cpu" else torch.bfloat16,
    )  # fmt: skip
    inputs = problem.tensors(device, requires_grad=True)
    gate = flops_of(lambda: moba_select(*inputs[:2], 16, 3))
    forward = flops_of(lambda: flex_moba(*inputs, 16, 3))
    both = flops_of(lambda: flex_moba(*inputs, 16, 3).sum().backward())
    n_pairs = 2 * 4 * pairs(150, 150, 16, 2, is_causal=True)
    assert gate == 2 * 2 * 4 * 16 * (150 * 10 // 2)
    finer = flops_of(lambda: moba_select(*inputs[:2], 16, 3, gate_block_size=4))
    assert finer == 4 * gate
    assert forward - gate == 2 * n_pairs * (16 + 32)
    assert both - forward == 2 * n_pairs * (3 * 16 + 2 * 32)


@pytest.mark.parametrize("is_causal", [True, False])
def test_flops_of_full_attention(is_causal):
    inputs = PROBLEM.tensors(requires_grad=True)
    n_pairs = 4 * (150 * 151 // 2 if is_causal else 150 * 150)

    def attend() -> Tensor:
        return flex_moba(*inputs, 16, None, is_causal=is_causal)

    forward = flops_of(attend)
    assert forward == 2 * n_pairs * (8 + 8)
    assert flops_of(lambda: attend().sum().backward()) - forward == 2 * n_pairs * 5 * 8


@pytest.mark.parametrize("q_len", [150, 37, 1])
def test_flops_of_the_selection_of_nsa(q_len):
    q, k_cmp = torch.zeros(2, 6, q_len, 16), torch.zeros(2, 2, 8, 16)
    counted = flops_of(lambda: nsa_select(q, k_cmp, 150))
    seen = int(reference_seen(q_len, 150, 32, 16).sum())
    assert counted == 2 * 2 * 6 * 16 * seen


@pytest.mark.parametrize("is_causal", [True, False])
def test_flops_of_a_shared_selection(is_causal):
    q = torch.empty(2, 32, 150, 16, device="meta", requires_grad=True)
    k, v = (torch.empty(2, 2, 150, dim, device="meta", requires_grad=True) for dim in (16, 32))
    selected = torch.empty(2, 2, 150, 3, dtype=torch.int32, device="meta")

    def attend():
        return grouped_attention(q, k, v, selected, 16, 0.3, is_causal)[0]

    count = 2 * 32 * pairs(150, 150, 16, 2 if is_causal else 3, is_causal=is_causal)
    assert flops_of(attend) == 2 * count * (16 + 32)
    assert flops_of(lambda: attend().sum().backward()) == 2 * count * (4 * 16 + 3 * 32)


def test_flops_of_decoding_are_those_of_the_room():
    cache = MobaCache(2, 2, 16, block_size=16, max_len=160)
    x, q = torch.zeros(2, 2, 1, 16), torch.zeros(2, 4, 1, 16)
    counted = flops_of(lambda: flex_moba(q, x, x, 16, 3, cache=cache))
    assert counted == 2 * 2 * 4 * (16 * cache.means.shape[2] + 3 * 16 * 32)


@pytest.mark.parametrize("window", [40, 0])
def test_flops_of_a_decoding_step_of_nsa(window):
    compressed = (640 - 32) // 16 + 1
    expected = 2 * 2 * 4 * 3 * (compressed + 4 * 64 + window) * (16 + 32)
    assert flops_of(lambda: nsa_step(640, window)) == expected


# ---- Derivatives --------------------------------------------------------------------------------

LOSS = {
    "grad": lambda f: torch.func.grad(f),
    "vjp": lambda f: lambda x: torch.func.vjp(f, x),
    "jacrev": lambda f: torch.func.jacrev(f),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
    "vmap": lambda f: lambda x: torch.vmap(f)(x[None]),
    "vmap of grad": lambda f: lambda x: torch.vmap(torch.func.grad(f))(x[None]),
    "hessian": lambda f: torch.func.hessian(f),
}


# The warning refers to an import of torch for jvp.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("name", LOSS)
@pytest.mark.parametrize("attends", [True, False])
def test_transforms_are_refused_by_name(name, attends):
    q, k, v = PROBLEM.tensors()

    def loss(q: Tensor) -> Tensor:
        return (flex_moba(q, k, v, 16, 3) if attends else moba_select(q, k, 16, 3)).sum()

    with pytest.raises(NotImplementedError, match=r"not support transforms of torch\.func, but q"):
        LOSS[name](loss)(q)


def test_second_derivatives_are_refused_by_name():
    inputs = PROBLEM.tensors(requires_grad=True)
    (grad,) = torch.autograd.grad(
        flex_moba(*inputs, 16, 3).square().sum(), inputs[:1], create_graph=True
    )
    with pytest.raises(NotImplementedError, match=r"no second derivatives.*moba_reference"):
        grad.sum().backward()
    # The remedy.
    small = [x.detach()[:, :, :20].requires_grad_() for x in inputs]
    out = moba_reference(*small, 4, 2)
    (grad,) = torch.autograd.grad(out.square().sum(), small[:1], create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), small[:1])
    assert second.abs().max() > 0


# ---- Nested tensors -----------------------------------------------------------------------------


def test_nested_tensors_are_refused_with_a_remedy():
    parts = [torch.randn(n, 2, 8) for n in (5, 1, 9)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    with pytest.raises(TypeError, match=r"values\(\).transpose\(0, 1\)\[None\], and offsets\(\)"):
        flex_moba(*3 * [nested.transpose(1, 2)], 4, 2)
    q = nested.values().transpose(0, 1)[None]
    out = flex_moba(q, q, q, 4, 2, cu_seqlens=nested.offsets())
    alone = [x.transpose(0, 1)[None] for x in parts]
    expected = torch.cat([flex_moba(x, x, x, 4, 2) for x in alone], dim=2)
    torch.testing.assert_close(out, expected)
