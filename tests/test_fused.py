"""The fused backend without a GPU: its split into pieces, and its kernels in the interpreter."""

import importlib.util
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flexmoba import flex_moba
from flexmoba.backends.fused import schedule, why_not_fused
from flexmoba.backends.fused.schedule import QUERY_TILE, Sizes
from flexmoba.selection import BlockSelection

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


COMPILE = """
import inspect, pathlib, subprocess, sys, tempfile, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from flexmoba.backends.fused.hopper_kernels import hopper_attend_kernel as attention
from flexmoba.backends.fused.hopper_key_grads_kernels import hopper_key_grads_kernel as keys
from flexmoba.backends.fused.hopper_query_grads_kernels import hopper_query_grads_kernel as queries
from flexmoba.cache.kernels import _score_kernel as score
from flexmoba.gate.kernel import _select_kernel as gate

FORWARD = dict(GROUP=4, COUNT=2, Q_STRIDE=1024, STAGES=2, REGISTERS=216, COPY_REGISTERS=72)
BACKWARD = dict(GROUP=4, COUNT=2, BLOCK_SIZE=512, Q_STRIDE=1024, GRAD_STRIDE=128, STAGES=4)
CONSTANTS = {
    attention: dict(FORWARD, BLOCK_SIZE=512, ROWS=128, KEYS=128),
    keys: dict(BACKWARD, IS_CAUSAL=True, HAS_OWN=False, own_ptr=None, ROWS=64, KEYS=128,
               REGISTERS=232, COPY_REGISTERS=40),
    queries: dict(BACKWARD, ROWS=128, KEYS=64, REGISTERS=216, COPY_REGISTERS=72),
    gate: dict(DIM=128, COUNT=7, HAS_FIRST=False, HAS_END=False, SINKS=0, LOCALS=0,
               SUB_BLOCKS=1, STRIDE=1, IS_CAUSAL=True, BY_PARTS=False, USE_LISTS=True, DOUBLES=True,
               LISTS=4, TILE_Q=64, TILE_N=32, TILE_D=128, SLOTS=8),
    score: dict(GATE_GROUP=4, BY_PARTS=False, SINKS=1, LOCALS=0, SUB_BLOCKS=8, Q_LEN=1, SLOTS=32,
                SPLIT=256, SPLITS=16, TILE_Q=16, ROWS=4, TILE_N=32, STAGES=3, BLOCK_SIZE=32,
                DIM=128, TILE_D=128),
}
MANY_ROWS = dict(Q_LEN=4, ROWS=16, SLOTS=64, TILE_N=64)
LONG_LISTS = dict(DIM=64, TILE_D=64, COUNT=30, SINKS=1, SUB_BLOCKS=8, TILE_N=64, SLOTS=32)
POINTERS = dict.fromkeys(("partial_lse_ptr", "lse_ptr", "delta_ptr", "extra_ptr"), "*fp32") | {
    x: "*i32" for x in ("pair_ptr", "selected_ptr", "first_row_ptr", "first_item_ptr",
                        "block_of_item_ptr", "first_extra_ptr", "positions_ptr")}
POINTERS["best_ptr"] = "*i64"

def type_of(parameter, constants, box):
    name, annotation = parameter.name, parameter.annotation
    if name in constants:
        return "constexpr"
    if name.endswith("_desc"):
        layout = gl.NVMMASharedLayout(128, 16, 2)
        return f"tensordesc<bf16[{box}, {constants['DIM']}],{layout!r}>"
    if name.endswith("_ptr"):
        return POINTERS.get(name, "*bf16")
    return {"int32": "i32", "int64": "i64"}.get(str(annotation), str(annotation))

def resources(kernel, **more):
    constants = CONSTANTS[kernel] | more
    box = 128 if kernel is attention else 64
    signature = {p.name: type_of(p, constants, box)
                 for p in inspect.signature(kernel.fn).parameters.values()}
    index = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    aligned = {index[x]: [["tt.divisibility", 16]] for x in index if signature[x][0] == "*"}
    is_gluon = kernel not in (gate, score)
    source = GluonASTSource if is_gluon else ASTSource
    options = {"num_warps": 1 if kernel is score else 4} | ({"maxnreg": 168} if is_gluon else {})
    source = source(kernel, signature, {index[x]: y for x, y in constants.items()}, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tools = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        ptx = pathlib.Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        command = [tools / "ptxas", "-v", "--gpu-name=sm_90a", ptx, "-o", ptx.with_suffix(".bin")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr

name, dim = sys.argv[1], int(sys.argv[2])
if name == "gate":
    print(resources(gate, **LONG_LISTS if dim else {}))
elif name == "score":
    print(resources(score, **MANY_ROWS if dim else {}))
elif name == "attention":
    print(resources(attention, DIM=dim))
else:
    print(resources(keys if name == "keys" else queries, DIM=dim))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize(
    ("kernel", "dim"),
    [
        ("gate", 0),
        pytest.param("gate", 1, marks=pytest.mark.slow, id="gate-long lists"),
        ("score", 0),
        pytest.param("score", 1, marks=pytest.mark.slow, id="score-many rows"),
        pytest.param("attention", 64, marks=pytest.mark.slow),
        ("attention", 128),
        pytest.param("keys", 64, marks=pytest.mark.slow),
        ("keys", 128),
        pytest.param("queries", 64, marks=pytest.mark.slow),
        ("queries", 128),
    ],
)
def test_kernels_for_hopper_fit_in_registers(kernel, dim, tmp_path):
    """Compiles for an H100 without one. Spills and serialised products would be slow, silently."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    (tmp_path / "compile.py").write_text(COMPILE)
    result = subprocess.run(
        [sys.executable, tmp_path / "compile.py", kernel, str(dim)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    spilled = int(re.search(r"(\d+) bytes spill stores", result.stdout)[1])
    # The gradients of keys spill numbers, outside of the loop over routed rows.
    assert spilled <= (64 if kernel == "keys" else 0)
    assert "C75" not in result.stdout  # ptxas warns that it serialises asynchronous products


@pytest.mark.parametrize("misaligned", [(), (0,), (1,), (2,)])
def test_warp_specialised_kernels_get_aligned_rows_only(misaligned, monkeypatch):
    """Tests strides of batch, heads and tokens that Gluon's copies of 16 bytes cannot address."""
    from flexmoba.backends.fused import hopper

    monkeypatch.setattr(hopper, "_is_hopper", lambda _: True)
    sizes = Sizes(2, 4, 2, 8192, 8192, 4096, 1, 64, 64)
    k = torch.empty(2, 2, 8192, 64, dtype=torch.half, device="meta")
    strides = [4 * 8192 * 80, 8192 * 80, 80]
    for dim in misaligned:
        strides[dim] += 4
    q = torch.empty_strided((2, 4, 8192, 64), (*strides, 1), dtype=torch.half, device="meta")
    expected = not misaligned
    assert hopper.supports(q, k, k, sizes, is_causal=True) == expected
    assert hopper.supports_backward((q, k, k), q, sizes, is_causal=True) == expected


COMPILE_WIDE = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from flexmoba.backends.fused import backward_kernels, forward_kernels, tile_sizes
from flexmoba.backends.fused.schedule import Sizes
from flexmoba.backends.grouped import key_kernels, launches, query_kernels

POINTERS = {"bin_ptr": "i16", "own_ptr": "i1", "list_ptr": "i64"} | {
    x: "fp32" for x in ("partial_lse_ptr", "lse_ptr", "grad_lse_ptr", "delta_ptr", "extra_ptr")} | {
    x: "i32" for x in ("pair_ptr", "first_row_ptr", "first_item_ptr", "block_of_item_ptr",
                       "first_extra_ptr", "routed_ptr", "length_ptr")}

def shared_memory(kernel, constants, capability):
    signature, constexprs, aligned = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constexprs[(i,)] = "constexpr", constants[name]
        elif name.endswith("_ptr"):
            signature[name] = "*" + POINTERS.get(name, "bf16")
            aligned[(i,)] = [["tt.divisibility", 16]]
        else:
            types = {"int32": "i32", "int64": "i64", "float32": "fp32"}
            signature[name] = types.get(str(parameter.annotation_type), parameter.annotation_type)
    source = ASTSource(kernel, signature, constexprs, aligned)
    options = {x: constants[x] for x in ("num_warps", "num_stages")}
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options).metadata.shared

capability, dim, value_dim, block_size = (int(x) for x in sys.argv[1:])
sizes = Sizes(1, 16, 4, 65536, 65536, block_size, 2, dim, value_dim)
options = True, False, capability == 90
attend, finish = tile_sizes.forward_constants(sizes, (16, dim, dim, value_dim), *options)
keys, queries, finish_queries, _ = tile_sizes.backward_constants(
    sizes, (16, dim, dim, value_dim, value_dim), *options)
keys = keys | {"WRITES_QUERY_GRADS": block_size <= keys["KEYS"]}
kernels = [
    (forward_kernels.attend_kernel, attend), (forward_kernels.finish_kernel, finish),
    (backward_kernels.key_grads_kernel, keys), (backward_kernels.item_query_grads_kernel, queries),
    (backward_kernels.finish_query_grads_kernel, finish_queries)]
if block_size <= 64:  # a shared selection
    launches.has_large_shared_memory = lambda _: capability == 90
    cpu, (q, v) = torch.device("cpu"), (torch.empty(1, 1, 2, x) for x in (dim, value_dim))
    shared = Sizes(1, 64, 4, 65536, 65536, block_size, 16, dim, value_dim)
    constants = launches._constants(shared, is_causal=True, unit=16, q=q, k=q, v=v)
    constants |= {"GRAD_STRIDE": value_dim, "HAS_GRAD_LSE": True}
    kernels += [
        (query_kernels.attend_kernel, constants | launches._forward_tile(shared, cpu)),
        (query_kernels.query_grads_kernel, constants | launches._query_grads_tile(shared, cpu)),
        (key_kernels.key_grads_kernel,
         constants | launches._key_tile(shared, large_shared_memory=capability == 90))]
print(max(shared_memory(*kernel, capability) for kernel in kernels))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize(("capability", "most"), [(90, 227), (89, 99)])
@pytest.mark.parametrize(
    "sizes",
    [
        (192, 128, 64),
        (192, 128, 512),
        (192, 192, 64),
        (192, 192, 512),
        (128, 256, 512),
        (256, 256, 64),
        (256, 256, 512),
    ],
)
def test_kernels_for_large_head_dims_fit_in_shared_memory(capability, most, sizes, tmp_path):
    assert compiled_shared_memory(COMPILE_WIDE, tmp_path, capability, *sizes) <= most * 1024


def compiled_shared_memory(program, folder, *arguments):
    """Returns the bytes that a program of this file prints, which compiles without a GPU."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    (folder / "compile.py").write_text(program)
    command = [sys.executable, folder / "compile.py", *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


COMPILE_GATE = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from flexmoba import gate
from flexmoba.cache import CachedCall, kernels as steps, select_kernel as select
from flexmoba.gate import kernel as gates

capability, dim = (int(x) for x in sys.argv[1:])
gates.has_large_shared_memory = lambda _: capability == 90
INTEGERS = ("first_ptr", "end_ptr", "selected_ptr", "positions_ptr")
NAMES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32"}
shared = []

def compile(kernel, _, arguments, constants, dtypes):
    signature, constexprs, aligned = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name], constexprs[(i,)] = "constexpr", constants[parameter.name]
        elif isinstance(arguments[i], torch.Tensor):
            unused = "*i32" if parameter.name in INTEGERS else NAMES[arguments[i].dtype]
            signature[parameter.name], aligned[(i,)] = unused, [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32"
    options = {x: constants[x] for x in ("num_warps", "num_stages") if x in constants}
    source = ASTSource(kernel, signature, constexprs, aligned)
    target = GPUTarget("cuda", capability, 32)
    shared.append(triton.compile(source, target=target, options=options).metadata.shared)

gates.launch = steps.launch = select.launch = compile
F32, BF16 = torch.float32, torch.bfloat16
for rows_dtype, dtype in ((F32, F32), (F32, BF16), (BF16, BF16)):
    for sub_blocks in (1, 8):
        options = gate.GateOptions(sub_blocks=sub_blocks)
        rows = torch.empty(1, 64, 16, dim, dtype=rows_dtype)
        means = torch.empty(1, 1, 200 * sub_blocks, dim, dtype=dtype)
        sizes = gate.GateSizes(64, 8, 0, is_causal=True)
        gates.select_on_cuda(rows, means, sizes, options, gate.Candidates())
        positions = torch.zeros(1, 16, dtype=torch.int32)
        steps.select_step_on_cuda(rows, means, positions, CachedCall(9, 1.0, options, 64))
print(max(shared))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize(("capability", "most"), [(90, 227), (89, 99)])
@pytest.mark.parametrize("dim", [128, 256])
def test_the_gate_fits_in_shared_memory(capability, most, dim, tmp_path):
    assert compiled_shared_memory(COMPILE_GATE, tmp_path, capability, dim) <= most * 1024


@st.composite
def all_sizes(draw):
    group, kv_heads = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    q_len = draw(st.integers(1, 5000))
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


@pytest.fixture(params=[0, schedule._SMALL], ids=["divided", "usual"])
def small(request, monkeypatch):
    """Bytes of buffers that are not divided."""
    monkeypatch.setattr(schedule, "_SMALL", request.param)
    monkeypatch.setattr(schedule, "sort_groups", schedule.sort_groups.__wrapped__)  # no cache
    return request.param


SAME_SMALL = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(all_sizes(), st.integers(1, 5000), st.booleans())
@SAME_SMALL
def test_every_query_is_in_one_piece(small, sizes, query_bytes, whole_kv_heads):
    queries = tiles = 0
    for group in schedule.sort_groups(sizes, query_bytes, whole_kv_heads=whole_kv_heads):
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
@SAME_SMALL
def test_buffers_are_at_most_as_large_as_queries_and_output(small, sizes):
    query_bytes = sizes.count * (2 * sizes.value_dim + 4)
    queries = sizes.batch * sizes.heads * sizes.q_len
    size = 2 * (sizes.dim + sizes.value_dim) * queries
    selection = 4 * queries * sizes.count
    # The smallest piece is a tile, and the last tile of a head may have fewer queries.
    most = max(size * (1 + QUERY_TILE / sizes.q_len) + QUERY_TILE * query_bytes, small)
    for group in schedule.sort_groups(sizes, query_bytes):
        pairs = group.n_queries * sizes.count
        assert selection + pairs * 8 + group.max_queries * query_bytes <= most
        assert selection + pairs * schedule._SORTING_BYTES <= most


class Allocations(TorchDispatchMode):
    """Adds up the bytes of the tensors that exist at the same time, without known ones."""

    def __init__(self, *known):
        super().__init__()
        self.known = {x.untyped_storage()._cdata for x in known}
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self.free, storage.nbytes(), storage._cdata)
        return result

    def free(self, n: int, key: int) -> None:
        self.bytes -= n
        self.known.remove(key)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        ((16, 16, 2**16, 128, 8), 1.5),
        ((16, 16, 2**16, 512, 3), 1.5),
        ((4, 1, 2**20, 4096, 12), 5),
        ((4, 1, 2**20, 128, 16), 5),
    ],
)
def test_a_call_allocates_little(monkeypatch, sizes, most):
    """Counts what a call allocates, on the meta device; ``most`` is in GiB, with backward."""
    from flexmoba.backends.fused import backward, forward, hopper, routing

    for module in (backward, forward, hopper, routing):
        monkeypatch.setattr(module, "launch", lambda *_: None)
    monkeypatch.setattr(hopper, "supports", lambda *_, **__: sizes[3] >= hopper.least_block)
    monkeypatch.setattr(hopper, "attend_on_hopper", lambda *_: None)
    heads, kv_heads, length, block_size, topk = sizes
    with torch.device("meta"):
        q, grad = torch.empty(2, 1, heads, length, 128, dtype=torch.half)
        k, v = torch.empty(2, 1, kv_heads, length, 128, dtype=torch.half)
        routed = torch.empty(1, heads, length, topk - 1, dtype=torch.int32)
    selection = BlockSelection(routed, block_size)
    with Allocations(q, k, v, routed) as forward_call:
        out, lse, rows = forward.attend_on_cuda(q, k, v, selection, 0.1, True)
    assert routed.nbytes + forward_call.peak - out.nbytes <= q.nbytes + out.nbytes
    saved = q, k, v, routed, out, lse, *(rows or ())
    with Allocations(*saved, grad) as backward_call:
        arguments = grad, None, (out, lse), (q, k, v), selection, 0.1, True, rows
        backward.attend_backward_on_cuda(*arguments)
    kept = sum(x.nbytes for x in saved[3:])
    assert kept + backward_call.peak <= most * 2**30


def test_names_unsupported_inputs():
    q = torch.zeros(1, 1, 4, 16)
    with pytest.raises(
        NotImplementedError, match=r'impl="fused" needs inputs on CUDA, got cpu; use impl="auto"'
    ):
        flex_moba(q, q, q, 2, 1, impl="fused")
    assert "float32" in (why_not_fused(q, q, None) or "")
    wide = torch.zeros(1, 1, 4, 257, dtype=torch.bfloat16)
    assert "at most 256, got 257" in (why_not_fused(wide, wide, None) or "")
    half = q.bfloat16()
    assert "kernel_options={'num_warps': 4}" in (why_not_fused(half, half, {"num_warps": 4}) or "")
    assert why_not_fused(half, half, None) is None
