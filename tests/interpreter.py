"""Triton's interpreter without three of its detours, which took half of the time of the tests."""

import functools
from types import FunctionType
from typing import Any

import numpy as np
from triton import language as tl
from triton.runtime import interpreter

_patch_language = interpreter._patch_lang
_reduce_elements = interpreter.ReduceOps.generic_reduce
_dtype_of_scalar = functools.cache(interpreter._get_np_dtype)  # makes a table at each call
_patched: set[int] = set()  # global names of modules with kernels


def shorten() -> None:
    """Changes the interpreter for the rest of the process. Every result stays the same."""
    interpreter._patch_lang = _patch_language_once
    interpreter.ReduceOps.generic_reduce = _reduce
    interpreter._get_np_dtype = _numpy_dtype


def _patch_language_once(function: FunctionType) -> Any:
    """Prepares the language for the interpreter, once instead of at each call of a function."""
    names = id(function.__globals__)
    if names not in _patched:
        _patched.add(names)
        _patch_language(function)
    return interpreter._LangPatchScope()  # a launch ends without a change to take back


def _numpy_dtype(dtype: tl.dtype) -> np.dtype:
    scalar = dtype.scalar
    return np.dtype(np.uint64) if scalar.is_ptr() else _dtype_of_scalar(scalar)


def _reduce(self: interpreter.ReduceOps, arguments: tuple[Any, ...]) -> Any:
    """Reduces by exclusive or, of which `tl.sort` consists, at once and not by element."""
    if self.combine_fn is not tl.standard._xor_combine or self.axis is None:
        return _reduce_elements(self, arguments)
    (x,) = arguments
    out = np.bitwise_xor.reduce(x.handle.data, axis=self.axis, keepdims=self.keep_dims)
    return [self.to_tensor(out, x.dtype)]
