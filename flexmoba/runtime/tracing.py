"""Tests whether a tensor has values, or comes from a tracer or from torch.func."""

from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn import Parameter


def has_values(x: Tensor) -> bool:
    """Returns False while tracing, for meta and fake tensors, and inside torch.func."""
    return not (
        torch.compiler.is_compiling()
        or x.is_meta
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
        or detect_fake_mode(x) is not None
        or get_proxy_mode() is not None
    )


def is_plain_call(*tensors: Tensor) -> bool:
    """Returns whether nothing traces, transforms or observes the operators of a call.

    Its operators can then be replaced by their functions, which takes less time on the host.
    """
    return not (
        torch.compiler.is_compiling()
        or any(type(x) not in (Tensor, Parameter) or x.is_meta for x in tensors)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


def values_readable(x: Tensor) -> bool:
    """Returns whether ``x`` has values that can be read without a wait for a device."""
    return x.device.type == "cpu" and has_values(x)


def is_transformed(x: Tensor) -> bool:
    """Returns whether ``x`` is an argument inside `torch.func.grad`, ``jvp`` or ``vmap``."""
    functorch = torch._C._functorch
    return functorch.is_gradtrackingtensor(x) or functorch.is_batchedtensor(x)


def no_second_derivatives(*_: Any) -> Any:
    """Raises, as the backward function of a backward operator."""
    raise NotImplementedError(
        "attention has no second derivatives: its gradients cannot be differentiated; use "
        "moba_reference, which is dense, to compute them"
    )
