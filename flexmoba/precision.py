"""Keeps autocast out of the operators: they choose their own precision."""

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def without_autocast(
    function: Callable[Concatenate[Tensor, _Arguments], _Result],
) -> Callable[Concatenate[Tensor, _Arguments], _Result]:
    """Runs a function of tensors with autocast off, on the device of the first one."""

    @functools.wraps(function)
    def wrapped(x: Tensor, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if x.is_meta:  # which has no autocast
            return function(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return wrapped
