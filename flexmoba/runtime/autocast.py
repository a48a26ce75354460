"""Autocast: turns it off for operators, which set their own precision, and returns its dtype."""

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
    """Decorates a function to run with autocast off on the device of its first argument."""

    @functools.wraps(function)
    def wrapped(x: Tensor, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        # Where autocast is off, its context would take longer than an operator of flexmoba.
        if not _has_autocast(x.device.type) or not torch.is_autocast_enabled(x.device.type):
            return function(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return wrapped


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype to which autocast casts ``x`` for a matrix product, or that of ``x``."""
    device = x.device.type
    if (
        not _has_autocast(device)
        or x.dtype == torch.float64
        or not torch.is_autocast_enabled(device)
    ):
        return x.dtype  # autocast does not cast float64
    return torch.get_autocast_dtype(device)


def _has_autocast(device: str) -> bool:
    # Dynamo of torch 2.11 cannot trace `is_autocast_available`.
    if torch.compiler.is_compiling():
        return device != "meta"
    return torch.amp.is_autocast_available(device)
