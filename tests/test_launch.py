"""Launches of compiled Triton kernels, with a stand-in for Triton's compiler and launcher."""

import types

import pytest
import torch

triton = pytest.importorskip("triton")

from flexmoba.runtime import triton_launch  # noqa: E402
from flexmoba.runtime.triton_launch import launch  # noqa: E402


class Compiled:
    """A compiled kernel that records how it is launched."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.launches: list[tuple] = []

    def run(self, *arguments):
        self.launches.append(("directly", *arguments))

    def __getitem__(self, grid):
        return lambda *arguments: self.launches.append(("by Triton", grid, *arguments))


class Kernel:
    arg_names = ("x", "n", "TILE")

    def __init__(self) -> None:
        self.compiled, self.compilations = Compiled(), []

    def __getitem__(self, grid):
        def compile_and_launch(*arguments, **options):
            self.compilations.append((grid, arguments, options))
            return self.compiled

        return compile_and_launch


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(triton_launch, "_compiled", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    return Kernel()


X, CONSTANTS = torch.zeros(4), {"TILE": 16, "num_warps": 2, "other": 3}


def test_compiles_once_and_then_launches_directly(kernel):
    for n_programs, n in ((5, 1), (6, 2), (0, 3)):
        launch(kernel, n_programs, (X, n), CONSTANTS, (X.dtype,))
    options = {"TILE": 16, "num_warps": 2, "enable_fp_fusion": True}
    assert kernel.compilations == [((5,), (X, 1), options)]
    prepared = 7, "function", "metadata", None, None, None
    assert kernel.compiled.launches == [("directly", 6, 1, 1, *prepared, X, 2, 16)]


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("is_chain", [True, False], ids=["chain", "function"])
def test_triton_launches_if_there_is_a_hook(name, is_chain, kernel, monkeypatch):
    launch(kernel, 5, (X, 1), CONSTANTS, (X.dtype,))
    hook = types.SimpleNamespace(calls=[print]) if is_chain else print
    monkeypatch.setattr(triton.knobs.runtime, name, hook)
    launch(kernel, 6, (X, 2), CONSTANTS, (X.dtype,))
    assert kernel.compiled.launches == [("by Triton", (6, 1, 1), X, 2, 16)]


@pytest.mark.parametrize("changed", ["dtype", "constant", "kernel"])
def test_compiles_again_if_the_key_changes(changed, kernel):
    launch(kernel, 5, (X, 1), CONSTANTS, (X.dtype,))
    other = Kernel() if changed == "kernel" else kernel
    constants = CONSTANTS | ({"TILE": 32} if changed == "constant" else {})
    launch(other, 5, (X, 1), constants, (torch.half if changed == "dtype" else X.dtype,))
    compilations = {id(x): len(x.compilations) for x in (kernel, other)}
    assert sum(compilations.values()) == 2
