"""The number of arguments of functions that users pass."""

import inspect
from typing import Any

import torch


def accepts(function: Any, count: int) -> bool:
    """Returns whether a function accepts ``count`` arguments; any callable while compiling."""
    if not callable(function) or torch.compiler.is_compiling():
        return callable(function)
    try:
        inspect.signature(_called(function)).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # some functions in C have no signature
        return True
    return True


def described(function: Any) -> str:
    """Returns a function's signature, or the type of an object that is no function."""
    if not callable(function):
        return type(function).__name__
    return f"one that takes {inspect.signature(_called(function))}"


def _called(function: Any) -> Any:
    return function.forward if isinstance(function, torch.nn.Module) else function
