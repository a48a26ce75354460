"""Triton kernels that are launched with little work on the host.

Triton inspects every argument at every launch to find the specialisation that fits. For kernels of
forty arguments that takes longer than they run at 8K tokens. So numbers are annotated with their
types and never specialised, pointers are aligned, and whoever launches says by a key what the
kernel was compiled for.
"""

import inspect
from collections.abc import Callable, Hashable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_NUMBERS = (tl.int32, tl.int64, tl.float32)


def kernel(function: Callable[..., None]) -> Any:
    """`triton.jit` that does not specialise what is annotated with the type of a number."""
    parameters = inspect.signature(function).parameters.values()
    numbers = [x.name for x in parameters if x.annotation in _NUMBERS]
    return triton.jit(function, do_not_specialize=numbers)


def launch(
    kernel: Any,
    n_programs: int,
    arguments: tuple[Any, ...],
    constants: dict[str, int],
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Launches ``kernel[(n_programs,)](*arguments, **constants)`` on the current device.

    Args:
        kernel: Made by `kernel`; its constexprs come after all other parameters.
        n_programs: Size of the grid; nothing is launched if it is 0.
        arguments: Everything that is no constexpr; tensors begin at multiples of 16 bytes.
        constants: The constexprs by name, ``num_warps`` and ``num_stages``; more may be there.
        dtypes: Dtypes of those tensors that may have more than one.
    """
    if n_programs == 0:
        return
    assert isinstance(arguments[0], Tensor)
    key: Hashable = (kernel, arguments[0].device, *dtypes, *constants.values())
    known = _compiled.get(key)
    if known is None:
        names = kernel.arg_names[len(arguments) :]
        wanted = {x: constants[x] for x in (*names, "num_warps", "num_stages") if x in constants}
        # Said aloud because newer versions of Triton warn that their default will change.
        compiled = kernel[(n_programs,)](*arguments, **wanted, enable_fp_fusion=True)
        if compiled is not None:  # Triton's interpreter compiles nothing
            _compiled[key] = compiled, [constants[name] for name in names]
    else:
        compiled, rest = known
        compiled[n_programs, 1, 1](*arguments, *rest)


def packed(x: Tensor) -> Tensor:
    """Contiguous, beginning at a multiple of 16 bytes, as `launch` wants tensors."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


_compiled: dict[Hashable, tuple[Any, list[int]]] = {}
