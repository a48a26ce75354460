"""An emulator of Gluon's asynchronous kernels on CPU, since Gluon has no interpreter.

`launch` runs the Python functions of a kernel with stand-ins for Gluon's language. Every partition
is a thread; one thread runs at a time, and at each barrier a random runnable one goes on. Copies of
the copy engine and by ``cp.async`` are made at random later times, and a product reads its operands
when a wait completes it. So an operand that is overwritten too early, an accumulator that is read
too early, and barriers with wrong counts or phases show as wrong results or as a deadlock. Layouts,
registers and the memory model are not emulated.
"""

import random
import threading
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import JITFunction
from triton.experimental.gluon import language as real_gl

_local = threading.local()


class Scheduler:
    """Runs threads of one program in turns, in an order that a seed determines."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.ready: dict[int, Callable[[], bool]] = {}
        self.baton: dict[int, threading.Semaphore] = {}
        self.actions: list[Callable[[], None]] = []  # copies in flight
        self.error: BaseException | None = None
        self.done = threading.Event()

    def run(self, functions: list[Callable[[], None]]) -> None:
        @torch.no_grad()
        def body(i: int, function: Callable[[], None]) -> None:
            self.baton[i].acquire()
            try:
                if self.error is None:
                    _local.thread, _local.products, _local.copies = i, [], []
                    function()
                    assert not _local.products, "a product was not waited for"
                    assert not _local.copies, "a copy was not waited for"
            except BaseException as error:  # every thread must end
                self.error = self.error or error
            del self.ready[i]
            self.hand_over()

        threads = []
        for i, function in enumerate(functions):
            self.ready[i], self.baton[i] = lambda: True, threading.Semaphore(0)
            threads.append(threading.Thread(target=body, args=(i, function), daemon=True))
        for thread in threads:
            thread.start()
        self.hand_over()
        self.done.wait()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error
        while self.actions:
            self.actions.pop()()

    def hand_over(self) -> None:
        """Continues a random thread that can go on, after some of the copies in flight."""
        if not self.ready:
            self.done.set()
            return
        while True:
            runnable = [i for i, is_ready in self.ready.items() if self.error or is_ready()]
            choice = self.random.randrange(len(runnable) + len(self.actions) or 1)
            if choice < len(runnable):
                self.baton[runnable[choice]].release()
                return
            if not self.actions:
                self.error = RuntimeError("deadlock")
                continue
            try:
                self.actions.pop(choice - len(runnable))()
            except BaseException as error:
                self.error = self.error or error

    def pause(self, is_ready: Callable[[], bool]) -> None:
        i = _local.thread
        self.ready[i] = is_ready
        self.hand_over()
        self.baton[i].acquire()
        if self.error is not None:
            raise RuntimeError("another thread failed")


class Barrier:
    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0

    def arrive(self, count: int, n_bytes: int = 0) -> None:
        self.pending -= count
        self.bytes += n_bytes
        assert self.pending >= 0, "more arrivals than the barrier counts"
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count


class Shared:
    """A buffer in shared memory, or a view of one."""

    def __init__(self, data: Any) -> None:
        self.data = data

    @property
    def shape(self) -> Any:
        return self.data.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def index(self, i: int) -> Any:
        return self.data[i] if isinstance(self.data, list) else Shared(self.data[i])

    def slice(self, start: int, length: int) -> "Shared":
        return Shared(self.data[start : start + length])

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.data.permute(order))

    def store(self, x: Tensor) -> None:
        assert x.shape == self.data.shape
        self.data.copy_(x)

    def load(self, _layout: Any) -> Tensor:
        return self.data.clone()


class _Pointee(NamedTuple):
    element_ty: torch.dtype


class Pointer:
    def __init__(self, memory: Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset

    @property
    def dtype(self) -> _Pointee:
        return _Pointee(self.memory.dtype)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.memory, self.offset + offset)

    def load(self) -> Any:
        if isinstance(self.offset, int):
            assert 0 <= self.offset < len(self.memory), "out of bounds"
            return self.memory[self.offset].item()
        offset = self.offset.long()
        assert offset.min() >= 0, "out of bounds"
        return self.memory[offset]

    def store(self, x: Tensor, mask: Tensor) -> None:
        mask = mask.expand(self.offset.shape)
        offset = self.offset.long()[mask]
        assert not len(offset) or offset.min() >= 0, "out of bounds"
        self.memory[offset] = x.to(self.memory.dtype)[mask]


class Descriptor(NamedTuple):
    matrix: Tensor
    box: tuple[int, int]

    def load(self, row: int, column: int) -> Tensor:
        out = self.matrix.new_zeros(self.box)
        tile = self.matrix[row : row + self.box[0], column : column + self.box[1]]
        out[: tile.shape[0], : tile.shape[1]] = tile
        return out


class Product:
    """A product in flight; `value` exists when a wait has completed it."""

    def __init__(self, a: Any, b: Shared, acc: Tensor | None) -> None:
        assert not isinstance(acc, Product), "an accumulator is still in flight"
        self.operands = a, b, acc
        self.value: Tensor | None = None

    def complete(self) -> None:
        a, b, acc = self.operands
        a = a.data if isinstance(a, Shared) else a
        product = a.float() @ b.data.float()
        self.value = product if acc is None else acc + product


def _warpgroup_mma(
    a: Any, b: Shared, acc: Tensor, *, use_acc: bool = True, is_async: bool = False
) -> Product:
    assert is_async
    product = Product(a, b, acc if use_acc else None)
    _local.products.append(product)
    return product


def _warpgroup_mma_wait(outstanding: int, deps: list[Any]) -> Any:
    while len(_local.products) > outstanding:
        _local.products.pop(0).complete()
    values = tuple(x.value if isinstance(x, Product) else x for x in deps)
    assert all(x is not None for x in values), "a product is still in flight"
    return values if len(values) > 1 else values[0]


def _tensor(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else torch.tensor(x)


def _extremum(function: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def extremum(x: Any, y: Any) -> Any:
        if isinstance(x, Tensor) or isinstance(y, Tensor):
            return function(_tensor(x), _tensor(y))
        return plain(x, y)

    return extremum


def _language(scheduler: Scheduler, program: int, n_programs: int) -> dict[str, Any]:
    """Returns the stand-ins for the names that kernels import."""

    def allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        if layout == "barrier":
            return Shared([Barrier() for _ in range(shape[0])])
        fill = float("nan") if dtype.is_floating_point else -1
        return Shared(torch.full(shape, fill, dtype=dtype))

    def warp_specialize(partitions: list[Any], warps: list[int], registers: list[int]) -> None:
        assert len(registers) == len(warps) == len(partitions) - 1

        def bound(function: Any, arguments: Any, n_warps: int) -> Callable[[], None]:
            def run() -> None:
                _local.threads = 32 * n_warps
                function(*arguments)

            return run

        scheduler.run([bound(*x, n) for x, n in zip(partitions, [4, *warps], strict=True)])

    def init(barrier: Barrier, count: int) -> None:
        barrier.count = barrier.pending = count

    def wait(barrier: Barrier, phase: int, pred: bool = True) -> None:
        if pred:
            scheduler.pause(lambda: barrier.phase & 1 != phase)

    def tma_copy(desc: Descriptor, place: list[int], barrier: Barrier, buffer: Shared) -> None:
        def act() -> None:
            buffer.data.copy_(desc.load(*place))
            barrier.arrive(0, -buffer.data.numel() * buffer.data.element_size())

        scheduler.actions.append(act)

    def async_copy(buffer: Shared, pointer: Pointer) -> None:
        _local.copies.append((buffer, pointer))

    def async_arrive(barrier: Barrier, increment_count: bool = True) -> None:
        assert not increment_count
        copies, threads = _local.copies, _local.threads
        _local.copies = []

        def act() -> None:
            for buffer, pointer in copies:
                buffer.store(pointer.load())
            barrier.arrive(threads)

        scheduler.actions.append(act)

    def wait_group(outstanding: int) -> None:
        assert outstanding == 0
        for buffer, pointer in _local.copies:
            buffer.store(pointer.load())
        _local.copies = []

    def arrive(barrier: Barrier, *, count: int = 1) -> None:
        barrier.arrive(count)
        scheduler.pause(lambda: True)

    gl = types.SimpleNamespace(
        **{x: getattr(torch, x) for x in ("int32", "int64", "float32", "exp2", "log2")},
        where=lambda condition, x, y: torch.where(*map(_tensor, (condition, x, y))),
        arange=lambda start, end, layout=None: torch.arange(start, end, dtype=torch.int32),
        full=lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
        max=lambda x, axis: x.amax(axis),
        sum=lambda x, axis: x.sum(axis),
        minimum=_extremum(torch.minimum, min),
        maximum=_extremum(torch.maximum, max),
        load=lambda pointer: pointer.load(),
        store=lambda pointer, x, mask: pointer.store(x, mask),
        convert_layout=lambda x, layout: x,
        static_range=range,
        program_id=lambda axis: program,
        num_programs=lambda axis: n_programs,
        allocate_shared_memory=allocate,
        warp_specialize=warp_specialize,
        **dict.fromkeys(
            (
                *("NVMMASharedLayout", "SwizzledSharedLayout", "NVMMADistributedLayout"),
                *("BlockedLayout", "SliceLayout", "DotOperandLayout"),
            ),
            lambda *_: None,
        ),
    )
    return {
        "gl": gl,
        "mbarrier": types.SimpleNamespace(
            MBarrierLayout=lambda: "barrier", init=init, wait=wait, arrive=arrive,
            expect=lambda barrier, n_bytes: barrier.arrive(1, n_bytes),
        ),
        "tma": types.SimpleNamespace(async_copy_global_to_shared=tma_copy),
        "async_copy": types.SimpleNamespace(
            async_copy_global_to_shared=async_copy, mbarrier_arrive=async_arrive,
            commit_group=lambda: None, wait_group=wait_group,
        ),
        "warpgroup_mma": _warpgroup_mma,
        "warpgroup_mma_wait": _warpgroup_mma_wait,
        "fence_async_shared": lambda: None,
    }  # fmt: skip


@torch.no_grad()
def launch(
    kernel: Any,
    n_programs: int,
    arguments: tuple[Any, ...],
    constants: dict[str, int],
    _dtypes: tuple[torch.dtype, ...],
    seed: int = 0,
) -> None:
    """Emulates `flexmoba.runtime.triton_launch.launch` for a Gluon kernel."""

    def memory_of(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        size = x.untyped_storage().nbytes() // x.element_size()
        return Pointer(x.as_strided((size,), (1,), 0), x.storage_offset())

    for program in range(n_programs):
        names: dict[str, Any] = _language(Scheduler(seed + program), program, n_programs)
        for name, x in kernel.fn.__globals__.items():
            if isinstance(x, JITFunction):
                names[name] = types.FunctionType(x.fn.__code__, names, name, x.fn.__defaults__)
            elif isinstance(x, real_gl.constexpr):
                names[name] = x.value
        values = [memory_of(x) for x in arguments]
        values += [constants[name] for name in kernel.arg_names[len(arguments) :]]
        types.FunctionType(kernel.fn.__code__, names)(*values)
