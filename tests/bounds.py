"""Bounds checks for Triton's interpreter, in which a kernel may access any memory of the process.

On a GPU, such an access reads another tensor, or ends the process with an illegal memory access.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from torch import Tensor
from triton.runtime import interpreter


@contextmanager
def checked() -> Iterator[None]:
    """Raises an error if a kernel accesses an element outside of its arguments."""
    extents: list[tuple[int, int]] = []
    copy_arguments = interpreter.GridExecutor._init_args_hst
    load = interpreter.InterpreterBuilder.create_masked_load
    store = interpreter.InterpreterBuilder.create_masked_store

    def note_arguments(self, arguments, kwargs):
        copies = copy_arguments(self, arguments, kwargs)
        extents[:] = [
            (x.data_ptr(), x.data_ptr() + _bytes(x))
            for x in (*copies[0], *copies[1].values())
            if isinstance(x, Tensor)
        ]
        return copies

    def check(pointers, mask) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        address = pointers.data.astype(np.uint64)
        inside = ~mask.data
        for start, end in extents:
            inside = inside | ((address >= start) & (address + size <= end))
        if not inside.all():
            first = int(np.broadcast_to(address, inside.shape)[~inside].flat[0])
            raise IndexError(f"access to address {first}, outside of the arguments {extents}")

    def checked_load(self, pointers, mask, *more):
        check(pointers, mask)
        return load(self, pointers, mask, *more)

    def checked_store(self, pointers, value, mask, *more):
        check(pointers, mask)
        return store(self, pointers, value, mask, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "_init_args_hst", note_arguments)
        patch.setattr(interpreter.InterpreterBuilder, "create_masked_load", checked_load)
        patch.setattr(interpreter.InterpreterBuilder, "create_masked_store", checked_store)
        yield


def _bytes(x: Tensor) -> int:
    """Returns the number of bytes from the first to the last element."""
    if x.numel() == 0:
        return 0
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size()
