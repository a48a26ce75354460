"""Launches Triton kernels with little work on the host.

At every launch, Triton inspects every argument to find the matching specialisation. For a kernel of
forty arguments, that takes longer than the kernel itself at 8K tokens. Here, numbers are annotated
with their types and never specialised, pointers are aligned, and a key of dtypes and constants
identifies the compiled kernel. Its launcher is called without the objects that Triton prepares for
hooks, unless there is one.
"""

import contextlib
import inspect
from collections.abc import Callable, Hashable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_NUMBERS = (tl.int32, tl.int64, tl.float32)
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


def kernel(function: Callable[..., None], jit: Any = triton.jit) -> Any:
    """Applies `triton.jit` without specialisation of parameters that have the type of a number.

    Args:
        function: The kernel.
        jit: The decorator, `triton.jit` or that of Gluon.
    """
    parameters = inspect.signature(function).parameters.values()
    numbers = [x.name for x in parameters if x.annotation in _NUMBERS]
    return jit(function, do_not_specialize=numbers)


def launch(
    kernel: Any,
    n_programs: int,
    arguments: tuple[Any, ...],
    constants: dict[str, int],
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Launches ``kernel[(n_programs,)](*arguments, **constants)`` on the current device.

    Args:
        kernel: A kernel from `kernel`; its constexprs come after all other parameters.
        n_programs: Size of the grid. For 0, the function returns without a launch.
        arguments: All arguments but constexprs. Tensors begin at multiples of 16 bytes.
        constants: The constexprs by name, ``num_warps``, ``num_stages`` and ``maxnreg``. Further
            names are ignored.
        dtypes: Dtypes of the tensors whose dtype varies between calls.
    """
    if n_programs == 0:
        return
    assert isinstance(arguments[0], Tensor)
    # By identity, because Triton computes the hash of a kernel from its source. No kernel is ever
    # deleted.
    key: Hashable = (id(kernel), arguments[0].device, *dtypes, *constants.values())
    cached = _compiled.get(key)
    if cached is None:
        names = kernel.arg_names[len(arguments) :]
        options = {x: constants[x] for x in (*names, *_OPTIONS) if x in constants}
        # Explicit, because newer versions of Triton warn that the default will change.
        compiled = kernel[(n_programs,)](*arguments, **options, enable_fp_fusion=True)
        if compiled is not None:  # Triton's interpreter compiles nothing
            _compiled[key] = compiled, compiled.run, [constants[name] for name in names]
    else:
        compiled, run, constexprs = cached
        if _has_hooks():  # of a profiler
            compiled[n_programs, 1, 1](*arguments, *constexprs)
            return
        stream = torch._C._cuda_getCurrentRawStream(arguments[0].get_device())
        no_hooks = None, None, None
        run(
            *(n_programs, 1, 1, stream, compiled.function, compiled.packed_metadata, *no_hooks),
            *(*arguments, *constexprs),
        )


def _has_hooks() -> bool:
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    # Each is a chain of hooks, a hook, or None.
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Returns a context in which the device of ``x`` is current; it does nothing if it is already.

    To change the device and back takes as long as a launch.
    """
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device_of(x)


def packed(x: Tensor) -> Tensor:
    """Returns ``x`` or a copy, contiguous from a multiple of 16 bytes on, as `launch` requires."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def aligned(x: Tensor) -> Tensor:
    """Returns ``x (B, H, L, D)``, or a copy of it if its memory does not suit the kernels.

    They require rows without gaps, of which the first begins at a multiple of 16 bytes. The other
    strides are arbitrary.
    """
    if x.stride(3) != 1 and x.shape[3] > 1:
        x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


_compiled: dict[Hashable, tuple[Any, Callable[..., None], list[int]]] = {}
